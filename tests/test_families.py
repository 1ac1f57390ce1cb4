"""Every family against a model written out here: float64, one sequence, full [L, L] scores with a mask. Nothing of the package is used."""

import math

import pytest
import torch
from transformers import (
    DeepseekV32Config,
    DeepseekV32ForCausalLM,
    GlmMoeDsaConfig,
    GlmMoeDsaForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from winnow.models import attach as A
from winnow.models.context import train_context
from winnow.models.forward import hidden_states, lm_head_weight
from winnow.models.indexer import IndexerConfig

TOP_K = 8
BASE = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 64,
    "max_position_embeddings": 256,
    "initializer_range": 0.1,
}
GQA = {**BASE, "num_hidden_layers": 3, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 8}
MLA = {
    **BASE, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 4, "moe_intermediate_size": 16, "n_routed_experts": 8,
    "num_experts_per_tok": 3, "n_group": 4, "topk_group": 2, "kv_lora_rank": 16, "q_lora_rank": 24, "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 12, "v_head_dim": 10, "index_topk": TOP_K, "index_head_dim": 16, "index_n_heads": 6, "first_k_dense_replace": 1,
}  # fmt: skip
CASES = {
    "llama": (LlamaConfig, LlamaForCausalLM, {"attention_bias": True, "mlp_bias": True}),
    "llama tied": (LlamaConfig, LlamaForCausalLM, {"tie_word_embeddings": True, "rope_parameters": {"rope_type": "default", "rope_theta": 1e5}}),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {"tie_word_embeddings": True}),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {"head_dim": 12}),
    "mistral": (MistralConfig, MistralForCausalLM, {"sliding_window": None}),
    "deepseek_v32": (DeepseekV32Config, DeepseekV32ForCausalLM, {}),
    "glm_moe_dsa": (GlmMoeDsaConfig, GlmMoeDsaForCausalLM, {"indexer_types": ["full", "shared", "full"], "rms_norm_eps": 1e-5}),
}  # fmt: skip
NATIVE = ("deepseek_v32", "glm_moe_dsa")
SETUPS = [(name, layout, ()) for name in CASES if name not in NATIVE for layout in ("half", "interleaved")]
SETUPS += [("qwen3", "half", (0, 2)), ("llama", "interleaved", (0,)), *((name, "", ()) for name in NATIVE)]


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def make(name, layout="half", leaders=()):
    config, model, extra = CASES[name]
    shape = MLA if name in NATIVE else GQA
    torch.manual_seed(4)
    model = model(config(**{**shape, "tie_word_embeddings": False, **extra})).eval()
    with torch.no_grad():
        for parameter_name, p in model.named_parameters():
            if (
                parameter_name.endswith("bias") or "norm" in parameter_name
            ):  # transformers' initial zeros and ones hide mistakes
                p.add_(0.3 * torch.randn_like(p))
    if name in NATIVE:
        for module in model.modules():
            if hasattr(module, "e_score_correction_bias"):
                module.e_score_correction_bias.normal_(std=0.2)
        A.use_winnow_attention(model)
    else:
        A.attach(
            model, IndexerConfig(top_k=TOP_K, num_heads=3, head_dim=16, rope_dim=4, rope_layout=layout, leaders=leaders)
        )
    return model


def tokens(n, seed=2):
    return torch.randint(3, 97, (n,), generator=torch.Generator().manual_seed(seed))


def norm(x, weight, eps):
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def turn(x, base, width, pairs):
    """RoPE on the first `width` dims of x [L, ..., D]: `pairs` of neighbours, or of the two halves."""
    angle = torch.arange(len(x), dtype=torch.float64)[:, None] / base ** (
        torch.arange(0, width, 2, dtype=torch.float64) / width
    )
    spin = torch.polar(torch.ones_like(angle), angle).reshape(len(x), *[1] * (x.ndim - 2), width // 2)
    head = x[..., :width]
    a, b = (head[..., 0::2], head[..., 1::2]) if pairs == "interleaved" else head.chunk(2, -1)
    z = torch.complex(a, b) * spin
    head = torch.stack((z.real, z.imag), -1).flatten(-2) if pairs == "interleaved" else torch.cat((z.real, z.imag), -1)
    return torch.cat((head, x[..., width:]), -1)


def chosen(q, k, w, top_k):
    """q [L, J, D], k [L, D], w [L, J] -> bool [L, L]: row by row, sorting pairs (-score, position)."""
    scores = (w[:, :, None] * torch.einsum("tjd,sd->tjs", q, k).clamp(min=0)).sum(1) / math.sqrt(
        q.shape[1] * q.shape[2]
    )
    keep = torch.zeros(len(k), len(k), dtype=torch.bool)
    for t, row in enumerate(scores.tolist()):
        best = sorted((-value, s) for s, value in enumerate(row[: t + 1]))[:top_k]
        keep[t, [s for _, s in best]] = True
    return keep


def softmax_over(q, k, v, keep, scale):
    """q, k [L, H, D], v [L, H, Dv] -> [L, H * Dv]."""
    scores = torch.einsum("thd,shd->hts", q, k) * scale
    weights = scores.masked_fill(~keep, -torch.inf).softmax(-1)
    return torch.einsum("hts,shd->thd", weights, v).flatten(1)


class Plain:
    """A decoder on a state dict of float64 tensors."""

    def __init__(self, model):
        self.c, self.s = model.config, {name: p.detach().double() for name, p in model.state_dict().items()}
        self.base = model.config.rope_parameters["rope_theta"]
        self.layout = {"deepseek_v32": "half", "glm_moe_dsa": "interleaved"}.get(model.config.model_type)

    def linear(self, name, x):
        out = x @ self.s[name + ".weight"].T
        return out + self.s[name + ".bias"] if name + ".bias" in self.s else out

    def logits(self, ids):
        x = self.s["model.embed_tokens.weight"][ids]
        keep = None
        for i in range(self.c.num_hidden_layers):
            p = f"model.layers.{i}."
            h = norm(x, self.s[p + "input_layernorm.weight"], self.c.rms_norm_eps)
            mixed, keep = (self.mla if self.layout else self.gqa)(p + "self_attn.", h, keep)
            x = x + self.linear(p + "self_attn.o_proj", mixed)
            h = norm(x, self.s[p + "post_attention_layernorm.weight"], self.c.rms_norm_eps)
            x = x + (self.moe(p + "mlp.", h) if p + "mlp.gate.weight" in self.s else self.mlp(p + "mlp.", h))
        return norm(x, self.s["model.norm.weight"], self.c.rms_norm_eps) @ self.s["lm_head.weight"].T

    def layer_norm(self, name, x, eps=1e-6):
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, unbiased=False) + eps).sqrt()
        return x * self.s[name + ".weight"] + self.s[name + ".bias"]

    def gqa(self, p, h, keep):
        width, length = self.c.head_dim, len(h)
        q, k, v = (self.linear(p + n, h).view(length, -1, width) for n in ("q_proj", "k_proj", "v_proj"))
        if p + "q_norm.weight" in self.s:
            q, k = (norm(x, self.s[p + n + ".weight"], self.c.rms_norm_eps) for x, n in ((q, "q_norm"), (k, "k_norm")))
        q, k = (turn(x, self.base, width, "half") for x in (q, k))
        if p + "indexer.wq.weight" in self.s:
            w = self.c.winnow
            iq = turn(self.linear(p + "indexer.wq", h).view(length, 3, 16), self.base, 4, w["rope_layout"])
            ik = turn(
                self.layer_norm(p + "indexer.k_norm", self.linear(p + "indexer.wk", h)), self.base, 4, w["rope_layout"]
            )
            keep = chosen(iq, ik, self.linear(p + "indexer.ww", h), TOP_K)
        group = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        return softmax_over(q, k, v, keep, width**-0.5), keep

    def mla(self, p, h, keep):
        c, length = self.c, len(h)
        latent_q = norm(self.linear(p + "q_a_proj", h), self.s[p + "q_a_layernorm.weight"], 1e-6)
        q = self.linear(p + "q_b_proj", latent_q).view(length, c.num_attention_heads, -1)
        q = torch.cat((q[..., :12], turn(q[..., 12:], self.base, 8, "interleaved")), -1)
        both = self.linear(p + "kv_a_proj_with_mqa", h)
        latent, rope = (
            norm(both[:, :16], self.s[p + "kv_a_layernorm.weight"], 1e-6),
            turn(both[:, 16:], self.base, 8, "interleaved"),
        )
        kv = self.linear(p + "kv_b_proj", latent).view(length, c.num_attention_heads, -1)
        k = torch.cat((kv[..., :12], rope[:, None].expand(-1, c.num_attention_heads, -1)), -1)
        if p + "indexer.wk.weight" in self.s:
            iq = turn(self.linear(p + "indexer.wq_b", latent_q).view(length, 6, 16), self.base, 8, self.layout)
            ik = turn(
                self.layer_norm(p + "indexer.k_norm", self.linear(p + "indexer.wk", h)), self.base, 8, self.layout
            )
            keep = chosen(iq, ik, self.linear(p + "indexer.weights_proj", h), TOP_K)
        return softmax_over(q, k, kv[..., 12:], keep, 20**-0.5), keep

    def mlp(self, p, h):
        gate = self.linear(p + "gate_proj", h)
        return self.linear(p + "down_proj", gate / (1 + torch.exp(-gate)) * self.linear(p + "up_proj", h))

    def moe(self, p, h):
        """Sigmoid routing with a selection bias, limited to the best groups (DeepSeek-V3)."""
        c, out = self.c, self.mlp(p + "shared_experts.", h)
        scores = torch.sigmoid(self.linear(p + "gate", h))
        biased = scores + self.s[p + "gate.e_score_correction_bias"]
        for t in range(len(h)):
            groups = biased[t].view(c.n_group, -1)
            best = groups.topk(2).values.sum(-1).topk(c.topk_group).indices
            allowed = torch.full_like(groups, -torch.inf)
            allowed[best] = groups[best]
            experts = allowed.flatten().topk(c.num_experts_per_tok).indices
            weights = scores[t, experts] / scores[t, experts].sum() * c.routed_scaling_factor
            for expert, weight in zip(experts.tolist(), weights, strict=True):
                gate, up = (self.s[p + "experts.gate_up_proj"][expert] @ h[t]).chunk(2)
                out[t] += weight * (self.s[p + "experts.down_proj"][expert] @ (gate / (1 + torch.exp(-gate)) * up))
        return out


@torch.no_grad()
def ours(model, ids, **options):
    return hidden_states(model, ids, train_context([len(ids)], **options)) @ lm_head_weight(model).T


@pytest.mark.parametrize("name, layout, leaders", SETUPS)
def test_logits_equal_a_dense_model_with_the_same_mask(name, layout, leaders):
    model = make(name, layout, leaders)
    plain = Plain(model)
    for length in (TOP_K - 1, TOP_K, TOP_K + 1, 70):
        ids = tokens(length, length)
        got, want = ours(model, ids), plain.logits(ids)
        assert want.abs().max() > 0.5
        torch.testing.assert_close(got.double(), want, rtol=0, atol=1e-5)
    assert (ours(model, ids, selector="dense") - got).abs().max() > 0.05  # the sets matter


@pytest.mark.parametrize("name", NATIVE)
def test_native_models_equal_transformers(name):
    """Theirs is right wherever no two scores of a row are equal at the threshold; 16 heads are hardly ever all zero at once."""
    config, model_class, extra = CASES[name]
    torch.manual_seed(4)
    model = model_class(config(**{**MLA, **extra, "index_n_heads": 16})).eval()
    want = {}
    with torch.no_grad():
        for length in (TOP_K - 1, TOP_K, TOP_K + 1, 70):
            want[length] = model(tokens(length, length)[None]).logits[0]
        A.use_winnow_attention(model)
        for length, logits in want.items():
            torch.testing.assert_close(ours(model, tokens(length, length)), logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", NATIVE)
def test_where_transformers_is_not_the_reference(name):
    """On a plateau the order of torch.topk decides theirs; ours is the lowest positions, on every device. And theirs has no gradient."""
    config, model_class, extra = CASES[name]
    torch.manual_seed(4)
    model = model_class(config(**{**MLA, **extra})).eval()
    with torch.no_grad():
        for p_name, p in model.named_parameters():
            if "weights_proj" in p_name:
                p.zero_()  # every score is 0
    loss = model(tokens(30)[None]).logits.square().mean()
    loss.backward()
    assert all(p.grad is None for n, p in model.named_parameters() if ".indexer." in n)
    A.use_winnow_attention(model)
    recorded = {}
    ours(model, tokens(30), selection_out=recorded)
    first = torch.arange(TOP_K, dtype=torch.int32)
    assert all(torch.equal(sets.indices[t], first) for sets in recorded.values() for t in range(TOP_K - 1, 30))
