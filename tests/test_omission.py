"""The indexers' target "output": what a layer's output loses without a key."""

import dataclasses

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from winnow.kernels import ops
from winnow.kernels.omission import Omission, omission
from winnow.kernels.torch_indexer import attention_target
from winnow.models.attach import attach, base_parameters, indexer_config, indexer_parameters
from winnow.models.context import IndexerLoss, LayerInputs, train_context
from winnow.models.forward import hidden_states
from winnow.models.indexer import IndexerConfig
from winnow.models.load import load, save
from winnow.rl.share import best_sets

SHAPE = {
    "vocab_size": 60, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 8, "max_position_embeddings": 256, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
INDEXER = IndexerConfig(top_k=8, num_heads=2, head_dim=8, rope_dim=4, target="output")
LENGTHS = [70, 1, 40]


def model_of(family):
    torch.manual_seed(0)
    config, kind = {"llama": (LlamaConfig, LlamaForCausalLM), "qwen3": (Qwen3Config, Qwen3ForCausalLM)}[family]
    model = kind(config(**SHAPE)).eval()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.q_proj.weight.mul_(40)  # sharp: sets hold most of the mass, as those of trained models do
            layer.self_attn.k_proj.weight.mul_(40)
            layer.self_attn.o_proj.weight.mul_(torch.linspace(0.1, 4, 32))  # heads that count, and heads that do not
    return model


class Seen(IndexerLoss):
    def __init__(self):
        super().__init__()
        self.inputs = []

    def observe(self, inputs, projected):
        self.inputs.append(inputs)
        super().observe(inputs, projected)


def run(model, selector):
    seen = Seen()
    tokens = torch.randint(3, 60, (sum(LENGTHS),), generator=torch.Generator().manual_seed(4))
    hidden = hidden_states(model, tokens, train_context(LENGTHS, selector=selector, indexer_loss=seen))
    return seen, hidden


@pytest.mark.parametrize("selector", ["dense", "indexer"])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_a_models_loss_takes_the_target_of_its_config(family, selector):
    model = attach(model_of(family), INDEXER)
    seen, _ = run(model, selector)
    for x in seen.inputs:
        q, k, w = x.indexer(*x.inputs)
        rest = (q, k, w, x.q, x.k, x.lse, x.cu_seqlens, x.selection, x.scale)
        torch.testing.assert_close(seen.kl[x.layer], ops.indexer_kl(*rest, x.cost)[0])
        assert abs(float((ops.indexer_kl(*rest, None)[0] - seen.kl[x.layer]).detach())) > 1e-3
    seen.total().backward()
    assert all(p.grad is None for p in base_parameters(model).values()), "the KL moves indexers alone"
    assert all(p.grad is not None and p.grad.any() for p in indexer_parameters(model).values())


def test_distances_are_those_behind_the_projection():
    draw = torch.Generator().manual_seed(1)
    values, out, weight = (
        torch.randn(*shape, generator=draw, dtype=torch.float64) for shape in ((9, 2, 6), (9, 4, 6), (10, 24))
    )
    cost = omission(values, out, weight)
    for head in range(4):
        projection = weight[:, head * 6 : head * 6 + 6]
        want = torch.cdist(out[:, head] @ projection.T, values[:, head // 2] @ projection.T).square()
        got = cost.own[:, head, None] + cost.theirs[None, :, head] - 2 * cost.pull[:, head] @ values[:, head // 2].T
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)
    with pytest.raises(ValueError, match="does not take 4 heads of 6"):
        omission(values, out, weight[:, :-6])


def test_sets_by_output_change_the_output_less_than_sets_by_attention():
    model = attach(model_of("llama"), INDEXER)
    seen, _ = run(model, "dense")
    lost: dict[str, float] = {}
    for x, layer in zip(seen.inputs, model.model.layers, strict=True):
        positions = torch.cat([torch.arange(n) for n in LENGTHS])
        values = x.cost.values
        whole = ops.sparse_attention(x.q, x.k, values, x.cu_seqlens, None, x.scale)[0]
        for name, cost in (("output", x.cost), ("attention", None)):
            sets = best_sets(dataclasses.replace(x, cost=cost), positions, INDEXER.top_k)
            part = ops.sparse_attention(x.q, x.k, values, x.cu_seqlens, sets, x.scale)[0]
            away = ((part - whole).flatten(1) @ layer.self_attn.o_proj.weight.T).norm(dim=1)
            lost[name] = lost.get(name, 0.0) + float(away.detach().sum())
    assert lost["output"] < 0.95 * lost["attention"], lost


def test_the_target_is_kept_with_the_model(tmp_path):
    model = attach(model_of("llama"), INDEXER)
    save(model, None, tmp_path / "model")
    assert indexer_config(load(tmp_path / "model", "float32", "cpu")) == INDEXER
    with pytest.raises(ValueError, match=r"indexer\.target is 'value', but it must be one of"):
        dataclasses.replace(INDEXER, target="value")


@pytest.mark.parametrize("length", [7, 8, 9, 60])  # k - 1, k, k + 1, far above
@pytest.mark.parametrize("values", ["equal", "zero", "one"])
def test_rows_that_lose_nothing_still_have_a_target(length, values):
    """All values alike, all zero, or one key with all of the attention: every distance is 0 or nearly, and the target a distribution."""
    draw = torch.Generator().manual_seed(2)
    q, k = (torch.randn(length, heads, 8, generator=draw) for heads in (4, 2))
    v = {"equal": torch.ones(length, 2, 8), "zero": torch.zeros(length, 2, 8), "one": torch.randn(length, 2, 8)}[values]
    if values == "one":
        q, k = torch.ones_like(q), torch.zeros_like(k)
        k[0] = 30.0
    cu, weight = torch.tensor([0, length], dtype=torch.int32), torch.randn(16, 32, generator=draw)
    index = [
        torch.randn(*shape, generator=draw, requires_grad=True) for shape in ((length, 2, 8), (length, 8), (length, 2))
    ]
    positions = torch.arange(length)
    sets = ops.select_packed(*(x.detach() for x in index), cu, positions, 8, "indexer", None)
    for chosen in (None, sets):
        out, lse = ops.sparse_attention(q, k, v, cu, chosen, 1.0)
        kl, rows = ops.indexer_kl(*index, q, k, lse, cu, chosen, 1.0, omission(v, out, weight))
        gradients = torch.autograd.grad(kl, index)
        assert rows == length and torch.isfinite(kl) and all(g.isfinite().all() for g in gradients)
    whole = ops.sparse_attention(q, k, v, cu, None, 1.0)
    x = LayerInputs(layer=0, leader=0, indexer=None, inputs=(), q=q, k=k, lse=whole[1], cu_seqlens=cu, selection=None, scale=1.0,
                    cost=omission(v, whole[0], weight))  # fmt: skip
    best = best_sets(x, positions, 8)
    keep = torch.ones(1, length, length, dtype=torch.bool).tril()
    cost = Omission(*(part[None] for part in x.cost))
    target = attention_target(q[None], k[None], whole[1][None], keep, 1.0, cost)
    torch.testing.assert_close(target.sum(-1), torch.ones(1, length))
    if values == "one":
        assert (best.indices == 0).any(1).all(), "a key that is attended to alone is in every set"
