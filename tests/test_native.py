"""Native MLA models and shared indexers: the three modes, gradients, folders, refusals, the engine."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import (
    DeepseekV32Config,
    DeepseekV32ForCausalLM,
    GlmMoeDsaConfig,
    GlmMoeDsaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from winnow.models import attach as A
from winnow.models import load as L
from winnow.models import mla
from winnow.models.context import ForwardContext, IndexerLoss, forward_context, train_context
from winnow.models.forward import hidden_states, lm_head_weight
from winnow.models.indexer import IndexerConfig
from winnow.rl.config_sections import IndexerConfig as IndexerTraining
from winnow.rl.config_sections import LearnerConfig
from winnow.rl.convert import load_dense
from winnow.rl.convert_options import ConvertOptions
from winnow.rl.optimizer import Optimizer
from winnow.rollout.cache import PagedCache
from winnow.rollout.engine import Engine, EngineConfig
from winnow.rollout.schema import Sampling

BASE = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "max_position_embeddings": 256,
    "initializer_range": 0.1,
    "eos_token_id": 2,
}
MLA = {
    **BASE, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 4, "moe_intermediate_size": 16, "n_routed_experts": 4,
    "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1, "kv_lora_rank": 16, "q_lora_rank": 24, "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 12, "v_head_dim": 10, "index_topk": 8, "index_head_dim": 16, "index_n_heads": 6, "first_k_dense_replace": 1,
}  # fmt: skip
GQA = {**BASE, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
SHARED = {"indexer_types": ["full", "shared", "full"]}


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def raw_model(name):
    torch.manual_seed(3)
    if name == "deepseek":
        return DeepseekV32ForCausalLM(DeepseekV32Config(**MLA)).eval()
    if name == "glm":
        return GlmMoeDsaForCausalLM(GlmMoeDsaConfig(**MLA, **SHARED)).eval()
    return Qwen3ForCausalLM(Qwen3Config(**GQA)).eval()


def make(name):
    """deepseek: MLA, an indexer a layer; glm: MLA, layer 1 shares; qwen: GQA with IndexShare 1:2."""
    model = raw_model(name)
    if name == "qwen":
        return A.attach(model, IndexerConfig(top_k=8, num_heads=3, head_dim=16, rope_dim=4, leaders=(0, 2)))
    A.use_winnow_attention(model)
    return model


MODELS = ("deepseek", "glm", "qwen")


def tokens(n, seed=2):
    return torch.randint(3, 97, (n,), generator=torch.Generator().manual_seed(seed))


def logits(model, ids, ctx):
    return hidden_states(model, ids, ctx) @ lm_head_weight(model).T


@pytest.mark.parametrize("name", MODELS)
def test_packed_equals_unpacked(name):
    model = make(name)
    parts = [tokens(n, n) for n in (30, 5, 51, 30)]
    lengths = [len(p) for p in parts]
    with torch.no_grad():
        whole = logits(model, torch.cat(parts), train_context(lengths)).split(lengths)
        for part, got in zip(parts, whole, strict=True):
            torch.testing.assert_close(logits(model, part, train_context([len(part)])), got, rtol=0, atol=1e-5)


SCHEDULES = {"at once": [60], "sixteens": [16] * 4, "mixed": [20, *[1] * 20, 20], "tokens": [1] * 60}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_chunked_prefill_at_once_and_token_by_token_are_the_training_pass(name, schedule, run_cached):
    model = make(name)
    parts = [tokens(60, 5), tokens(23, 6), tokens(6, 7)]
    got, sets = run_cached(model, parts, SCHEDULES[schedule])
    recorded, lengths = {}, [len(p) for p in parts]
    with torch.no_grad():
        want = logits(model, torch.cat(parts), train_context(lengths, selection_out=recorded)).split(lengths)
    assert sorted(recorded) == [0, 1, 2]
    stacked = torch.stack([recorded[i].indices for i in sorted(recorded)]).split(lengths, 1)
    for a, b, chosen, other in zip(got, want, sets, stacked, strict=True):
        assert torch.equal(chosen, other)
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)
    if name != "deepseek":
        assert torch.equal(sets[0][1], sets[0][0]) and not torch.equal(sets[0][2], sets[0][0])


@pytest.mark.parametrize("pays", [0.0, 1e9])
def test_both_forms_of_latent_attention_agree(pays, monkeypatch, run_cached):
    """Prefill all in absorbed form, and all in MHA form, whatever the length."""
    monkeypatch.setattr(mla, "ABSORBED_PAYS", pays)
    model, ids = make("deepseek"), tokens(60, 5)
    with torch.no_grad():
        want = logits(model, ids, train_context([60]))
    for schedule in ([60], [16] * 4):
        got, _ = run_cached(model, [ids], schedule)
        torch.testing.assert_close(got[0], want, rtol=0, atol=1e-5)


def test_dense_decode_of_a_native_model():
    model = make("deepseek")
    with torch.no_grad():
        want = logits(model, tokens(40), train_context([40], selector="dense"))
        cache = PagedCache(**A.cache_shape(model), num_pages=8, page_size=5)
        table = torch.arange(8, dtype=torch.int32)[None]
        rows = []
        for a, b in ((0, 20), (20, 39), (39, 40)):
            ctx = ForwardContext(
                mode="decode" if b - a == 1 else "prefill", positions=torch.arange(a, b), cu_seqlens=torch.tensor([0, b - a]).int(),
                seq_lens=torch.tensor([b]).int(), block_table=table, slot_mapping=torch.arange(a, b), cache=cache, selector="dense",
            )  # fmt: skip
            rows.append(logits(model, tokens(40)[a:b], ctx))
    torch.testing.assert_close(torch.cat(rows), want, rtol=0, atol=1e-5)
    assert A.indexer_calls(model) == 0


# Gradients


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("selector", ["indexer", "dense"])
def test_no_gradient_crosses(name, selector):
    """The language-model loss gives the indexers exactly zero, the KL gives everything else exactly zero."""
    model = make(name).train()
    loss = IndexerLoss()
    out = logits(model, tokens(60), train_context([40, 20], indexer_loss=loss, selector=selector))
    assert sorted(loss.kl) == [0, 1, 2] and loss.rows == 60
    loss.total().backward(retain_graph=True)
    assert all(p.grad is None or not p.grad.any() for p in A.base_parameters(model).values())
    assert all(p.grad is not None and p.grad.any() for p in A.indexer_parameters(model).values())
    model.zero_grad(set_to_none=True)
    out.square().mean().backward()
    assert all(p.grad is None for p in A.indexer_parameters(model).values())
    assert sum(p.grad is not None and bool(p.grad.any()) for p in A.base_parameters(model).values()) > 20


def test_coupled_gradients_do_cross():
    model = make("qwen").train()
    loss = IndexerLoss()
    logits(model, tokens(60), train_context([60], indexer_loss=loss, coupled=True))
    loss.total().backward()
    assert model.model.embed_tokens.weight.grad.any()


@pytest.mark.parametrize("name", ["glm", "qwen"])
def test_a_shared_indexer_learns_from_every_layer_that_it_serves(name):
    grads = []
    for wanted in ([0], [1], [0, 1]):
        model = make(name)
        loss = IndexerLoss()
        logits(model, tokens(50), train_context([50], indexer_loss=loss))
        torch.stack([loss.kl[layer] for layer in wanted]).sum().backward()
        grads.append(model.model.layers[0].self_attn.indexer.wk.weight.grad.clone())
    assert grads[0].any() and grads[1].any() and not torch.allclose(grads[0], grads[1], rtol=1e-2)
    torch.testing.assert_close(grads[0] + grads[1], grads[2], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", MODELS)
def test_activation_checkpointing_changes_nothing(name):
    grads = []
    for checkpointing in (False, True):
        model = make(name).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        loss = IndexerLoss()
        with forward_context(train_context([40, 20], indexer_loss=loss)) as ctx:
            out = logits(model, tokens(60), ctx).square().mean()
            (out + loss.total()).backward()
        grads.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    for key, grad in grads[0].items():
        torch.testing.assert_close(grads[1][key], grad, rtol=0, atol=1e-6, msg=key)


@pytest.mark.parametrize("name", ["glm", "qwen"])
def test_a_frozen_indexer_is_bit_identical_after_a_hundred_steps_with_decay(name):
    model = make(name).train()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = Optimizer(
        A.base_parameters(model).values(), A.indexer_parameters(model).values(), LearnerConfig(lr=1e-3, weight_decay=0.1),
        IndexerTraining(train="frozen"),
    )  # fmt: skip
    ids = tokens(12)
    for _ in range(100):
        rows = logits(model, ids, train_context([12]))
        torch.nn.functional.cross_entropy(rows[:-1], ids[1:]).backward()
        optimizer.step()
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert not any(A.is_indexer_name(n) for n in changed) and len(changed) > 20


# Folders


def names_in(folder):
    found = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as opened:
            found |= {key: tuple(opened.get_slice(key).get_shape()) for key in opened.keys()}  # noqa: SIM118
    return found


@pytest.mark.parametrize("name", ["deepseek", "glm"])
def test_native_folders_keep_their_tensor_names(tmp_path, name):
    raw_model(name).save_pretrained(tmp_path / "original")
    model = L.load(tmp_path / "original")
    assert A.is_converted(model) and A.indexer_config(model).top_k == 8
    with torch.no_grad():
        for p in A.indexer_parameters(model).values():
            p.add_(0.01 * torch.randn_like(p))
    L.save(model, None, tmp_path / "ours")
    assert not list((tmp_path / "ours").glob("*.bin"))
    assert names_in(tmp_path / "ours") == names_in(tmp_path / "original")
    assert any(".experts.0." in key for key in names_in(tmp_path / "ours"))
    again = L.load(tmp_path / "ours")
    assert all(torch.equal(p, again.state_dict()[n]) for n, p in model.state_dict().items())
    with torch.no_grad():
        assert torch.equal(
            logits(again, tokens(40), train_context([40])), logits(model, tokens(40), train_context([40]))
        )
    half = L.load(tmp_path / "ours", dtype="bfloat16")
    assert lm_head_weight(half).dtype == torch.bfloat16
    assert all(torch.equal(p, A.indexer_parameters(model)[n]) for n, p in A.indexer_parameters(half).items())


def edit(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_native_folders_that_do_not_fit_are_refused(tmp_path):
    folder = tmp_path / "model"
    original = raw_model("glm")

    def refused(reason, **changes):
        original.save_pretrained(folder)
        edit(folder, **changes)
        with pytest.raises(ValueError, match=reason):
            L.load(folder)

    refused("do not match", index_head_dim=24)
    refused("do not match", indexer_types=["full", "full", "full"])  # layer 1 has no indexer
    refused("do not match", indexer_types=["full", "shared", "shared"])  # layer 2 has one
    refused("the first one 'full'", indexer_types=["shared", "full", "full"])
    refused("dequantize", quantization_config={"quant_method": "fp8"})
    original.save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    save_file({n: t for n, t in tensors.items() if "q_a_proj" not in n}, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="tensors are missing"):
        L.load(folder)
    model = make("glm")
    with pytest.raises(ValueError, match="born with indexers"):
        A.attach(model, IndexerConfig(top_k=8))
    original.save_pretrained(tmp_path / "whole")
    with pytest.raises(ValueError, match="nothing to attach"):
        load_dense(tmp_path / "whole", ConvertOptions())
    with pytest.raises(ValueError, match="no dense form"):
        A.strip(model)


def test_shared_indexers_round_trip_and_strip(tmp_path):
    model = make("qwen")
    L.save(model, None, tmp_path / "model")
    assert not any("layers.1.self_attn.indexer" in n for n in names_in(tmp_path / "model"))
    again = L.load(tmp_path / "model")
    assert again.config.winnow["leaders"] == [0, 2] and A.cache_shape(again)["index_layers"] == [0, 2]
    with torch.no_grad():
        assert torch.equal(
            logits(again, tokens(40), train_context([40])), logits(model, tokens(40), train_context([40]))
        )
    dense = raw_model("qwen").state_dict()
    stripped = A.strip(again).state_dict()
    assert dense.keys() == stripped.keys() and all(torch.equal(t, stripped[n]) for n, t in dense.items())
    for leaders, reason in (((1, 2), "begin with layer 0"), ((0, 2, 1), "ascending"), ((0, 7), "layers are 0 to 2")):
        with pytest.raises(ValueError, match=reason):
            A.attach(raw_model("qwen"), IndexerConfig(top_k=8, rope_dim=4, leaders=leaders))


# The engine


@pytest.mark.parametrize("name", MODELS)
def test_the_engine_scores_its_samples_as_the_learner_does(name):
    model = make(name)
    config = EngineConfig(page_size=4, num_pages=100, max_batch=8, prefill_chunk=16, record_indices=True)
    engine = Engine(model, None, config)
    groups = engine.generate([tokens(21, 3).tolist(), tokens(5, 4).tolist()], Sampling(max_tokens=20), 2)
    for sequence in (s for group in groups for s in group):
        ids = torch.tensor(sequence.tokens)
        with torch.no_grad():
            rows = torch.log_softmax(logits(model, ids, train_context([len(ids)])), -1)
        want = rows[:-1].gather(1, ids[1:, None])[:, 0]
        got = torch.tensor(sequence.logprobs)[1:]
        made = torch.tensor(sequence.versions)[1:] >= 0
        torch.testing.assert_close(got[made], want[made], rtol=0, atol=2e-5)
    assert engine.cache.k[0].shape[2:] == ((24,) if name != "qwen" else (2, 8))
    assert sorted(engine.cache.index) == ([0, 1, 2] if name == "deepseek" else [0, 2])
