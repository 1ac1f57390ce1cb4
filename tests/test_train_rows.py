"""The row-wise kernels of a training step, and the layers made of them, against torch and transformers' own modules, with gradients."""

import copy
import os
from types import SimpleNamespace

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported
pytest.importorskip("triton")

from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from winnow.kernels import ops, train_rows
from winnow.models import attach as A
from winnow.models import training
from winnow.models.context import IndexerLoss, train_context
from winnow.models.forward import hidden_states
from winnow.models.indexer import Indexer, IndexerConfig, _TensorCores
from winnow.rl.stages import checkpointed

GPU = torch.cuda.is_available()
pytestmark = [pytest.mark.gpu] if GPU else []
DEV = torch.device("cuda" if GPU else "cpu")
DTYPES = [torch.float32, torch.bfloat16] if GPU else [torch.float32]  # the interpreter computes in fp32 only
FAMILIES = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
    "mistral": (MistralConfig, MistralForCausalLM),
}


def draw(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEV, dtype)


def with_gradients(function, *inputs, dtype):
    """Outputs and gradients under a random cotangent, in fp64."""
    given = [x.to(dtype).detach().clone().requires_grad_() for x in inputs]
    out = function(*given)
    out = out if isinstance(out, tuple) else (out,)
    torch.autograd.backward(out, [draw(*o.shape, seed=9 + i).to(o.dtype) for i, o in enumerate(out)])
    return [x.double() for x in (*out, *(x.grad for x in given))]


def agree(ours, theirs, inputs, dtype):
    """Against float64; 16-bit numbers against what such numbers can say."""
    got = with_gradients(ours, *inputs, dtype=dtype)
    want = with_gradients(theirs, *(x.to(dtype) for x in inputs), dtype=torch.float64)
    for mine, other in zip(got, want, strict=True):
        assert mine.shape == other.shape
        size = max(1.0, float(other.detach().abs().max())) if other.numel() else 1.0
        torch.testing.assert_close(
            mine,
            other,
            rtol=2e-5 if dtype == torch.float32 else 2e-2,
            atol=size * (2e-6 if dtype == torch.float32 else 1e-2),
        )


def plain_norm(x, weight):
    return weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(0, 8), (1, 5), (3, 64), (700, 48), (40, 576), (3, 2048), (2, 5000), (33, 5, 24)])
def test_norms(shape, dtype):
    x, residual, weight = draw(*shape), draw(*shape, seed=1), draw(shape[-1], seed=2)
    agree(
        lambda x, r, w: train_rows.add_norm(x, r, w, 1e-5),
        lambda x, r, w: (x + r, plain_norm(x + r, w)),
        (x, residual, weight),
        dtype,
    )
    agree(lambda x, w: train_rows.norm(x, w, 1e-5), plain_norm, (x, weight), dtype)
    huge = draw(*shape, seed=3) * 1e4
    agree(lambda x, w: train_rows.norm(x, w, 1e-5), plain_norm, (huge, weight), dtype)


def test_a_frozen_weight_gets_no_gradient_and_the_input_the_same_one():
    x, weight = draw(30, 48).requires_grad_(), draw(48, seed=1)
    train_rows.norm(x, weight, 1e-5).sum().backward()
    frozen, x.grad = x.grad, None
    weight.requires_grad_()
    train_rows.norm(x, weight, 1e-5).sum().backward()
    assert torch.equal(frozen, x.grad) and weight.grad is not None


@pytest.mark.parametrize("layout", ["half", "interleaved"])
@pytest.mark.parametrize(
    ("dim", "rope", "width"), [(16, 16, 16), (24, 8, 16), (64, 64, 64), (128, 64, 64), (20, 4, 12)]
)
def test_turns(dim, rope, width, layout):
    """Whole heads and a part of them, with every angle or every other one, against `indexer.rotate`."""
    from winnow.models.indexer import rope_angles, rotate

    angles = draw(13, width // 2, seed=4) * 3
    cos, sin = (torch.cat((f(angles),) * 2, -1) for f in (torch.cos, torch.sin))

    def plain(x):
        c, s = (a.double()[:, None] for a in rope_angles(cos, sin, rope))
        return rotate(x, c, s, layout)

    for dtype in DTYPES:
        agree(lambda x: train_rows.turn(x, cos, sin, rope, layout, x.dtype), plain, (draw(13, 3, dim),), dtype)
    wide = draw(13, 3, dim).requires_grad_()
    narrow = train_rows.turn(wide, cos, sin, rope, layout, torch.bfloat16)
    narrow.float().sum().backward()
    assert narrow.dtype == torch.bfloat16 and wide.grad.dtype == torch.float32
    assert train_rows.turn(draw(0, 3, dim), cos[:0], sin[:0], rope, layout, torch.float32).shape == (0, 3, dim)


@pytest.mark.parametrize("dtype", DTYPES)
def test_silu_mul(dtype):
    for shape in ((0, 4), (1, 1), (50, 77), (2, 2048)):
        agree(
            train_rows.silu_mul,
            lambda g, u: torch.nn.functional.silu(g) * u,
            (draw(*shape) * 4, draw(*shape, seed=1)),
            dtype,
        )
    far = torch.tensor([[-200.0, 200.0, 0.0]], device=DEV)
    agree(train_rows.silu_mul, lambda g, u: torch.nn.functional.silu(g) * u, (far, far.flip(1)), torch.float32)


def make_model(family, leaders=(), **changes):
    torch.manual_seed(0)
    config, model_class = FAMILIES[family]
    shape = {
        "vocab_size": 61, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3, "num_attention_heads": 6, "head_dim": 8,
        "num_key_value_heads": 2, "max_position_embeddings": 256, "eos_token_id": None, "bos_token_id": None, "pad_token_id": None,
        "initializer_range": 0.2, **({"sliding_window": None} if family == "mistral" else {}), **changes,
    }  # fmt: skip
    model = model_class(config(**shape)).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "norm" in name or "bias" in name:  # ones and zeros would hide a mistake
                p.uniform_(0.5, 1.5)
    A.attach(model, IndexerConfig(top_k=6, num_heads=3, head_dim=16, rope_dim=4, leaders=leaders))
    return model.to(DEV)


def trained(model, monkeypatch, fused, coupled=False, checkpointing=False, selector="indexer", lengths=(25, 15)):
    """Final states, loss of the indexers, and every gradient; how often a norm was a kernel's."""
    used = []
    if fused:
        monkeypatch.setattr(ops, "train_rows_of", lambda x: used.append(1) or train_rows)
    else:
        monkeypatch.setattr(ops, "train_rows_of", lambda x: None)
    ids = torch.randint(0, 61, (sum(lengths),), generator=torch.Generator().manual_seed(5)).to(DEV)
    watch = IndexerLoss()
    with checkpointed(model, checkpointing):
        ctx = train_context(list(lengths), DEV, selector=selector, indexer_loss=watch, coupled=coupled)
        out = hidden_states(model, ids, ctx)
        loss = (out * draw(*out.shape, seed=6)).sum() + watch.total()
        loss.backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return {"out": out.detach(), "kl": watch.total().detach(), **grads}, len(used)


KINDS = (
    "coupled",
    "checkpointed",
    "dense",
    "shared",
)  # the families differ in their projections alone: two of them are enough


@pytest.mark.parametrize(
    ("family", "kind"), [*((f, "plain") for f in FAMILIES), *((f, kind) for f in ("llama", "qwen3") for kind in KINDS)]
)
def test_a_layer_of_kernels_is_the_layer_of_modules(family, kind, monkeypatch):
    model = make_model(family, leaders=(0,) if kind == "shared" else ())
    options = {
        "coupled": kind == "coupled",
        "checkpointing": kind == "checkpointed",
        "selector": "dense" if kind == "dense" else "indexer",
    }
    ours, used = trained(model, monkeypatch, True, **options)
    theirs, unused = trained(model, monkeypatch, False, **options)
    assert used > 0 and unused == 0 and set(ours) == set(theirs) and any("indexer.wq" in name for name in ours)
    for name, value in theirs.items():
        size = max(1.0, float(value.abs().max()))
        torch.testing.assert_close(
            ours[name], value, rtol=1e-4, atol=size * 2e-5, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("lengths", [(5,), (6,), (7,), (1,), (5, 6, 7), (1, 30, 1)])
def test_layers_about_k_tokens_long(lengths, monkeypatch):
    """k - 1, k, k + 1: without a selection, and with the first that leaves anything out."""
    model = make_model("qwen3")
    ours, used = trained(model, monkeypatch, True, lengths=lengths)
    theirs, _ = trained(model, monkeypatch, False, lengths=lengths)
    assert used and set(ours) == set(theirs)
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-4, atol=max(1.0, float(value.abs().max())) * 2e-5)


def test_copies_run_their_own_layers_and_stripped_ones_none(monkeypatch):
    monkeypatch.setattr(ops, "train_rows_of", lambda x: train_rows)
    model = make_model("llama")
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for p in twin.parameters():
            p.zero_()
    ids = torch.arange(20, device=DEV)
    for each, zero in ((model, False), (twin, True)):
        with torch.no_grad():
            assert (hidden_states(each, ids, train_context([20], DEV)).abs().sum() == 0) == zero
    stripped = A.strip(twin)
    assert not any("forward" in layer.__dict__ for layer in stripped.model.layers)
    assert all("forward" in layer.__dict__ for layer in model.model.layers)


def test_what_the_kernels_do_not_know_goes_through_the_modules(monkeypatch):
    """Dropout in training (which is refused there), norms of another dtype, and a context that is no training's."""
    monkeypatch.setattr(ops, "train_rows_of", lambda x: train_rows)
    ids = torch.arange(20, device=DEV)
    with pytest.raises(ValueError, match="no dropout"):
        hidden_states(make_model("qwen3", attention_dropout=0.1).train(), ids, train_context([20], DEV))
    layer, ctx = make_model("qwen3").model.layers[0], train_context([20], DEV)
    x, cos = draw(1, 20, 48), draw(1, 20, 8)
    assert training.knows(layer, x, cos, ctx)
    assert not training.knows(layer, x, cos, SimpleNamespace(mode="prefill"))
    assert not training.knows(layer, x, draw(1, 20, 4), ctx)  # RoPE over a part of a head
    assert not training.knows(layer, x.bfloat16(), cos, ctx)
    layer.self_attn.k_norm.double()
    assert not training.knows(layer, x, cos, ctx)


def test_an_indexers_products_have_the_gradients_of_plain_ones():
    hidden = draw(50, 48, dtype=torch.bfloat16)

    def product(x, weight):
        return _TensorCores.apply(x.to(torch.bfloat16), weight)

    got = with_gradients(product, hidden, draw(32, 48, seed=1), dtype=torch.float32)
    want = with_gradients(lambda x, w: x @ w.T, hidden, draw(32, 48, seed=1), dtype=torch.float64)
    for mine, other, close in zip(got, want, (1e-2 if GPU else 1e-5, 3e-2, 1e-2 if GPU else 1e-5), strict=True):
        torch.testing.assert_close(mine, other, rtol=close, atol=close * float(other.detach().abs().max()))


def test_indexers_turn_alike(monkeypatch):
    indexer = Indexer(48, IndexerConfig(top_k=4, num_heads=3, head_dim=16, rope_dim=4)).to(DEV)
    angles = draw(20, 4, seed=1)
    inputs = (draw(20, 48), *(torch.cat((f(angles),) * 2, -1) for f in (torch.cos, torch.sin)))
    monkeypatch.setattr(ops, "train_rows_of", lambda x: train_rows)
    ours = indexer(*inputs)
    monkeypatch.setattr(ops, "train_rows_of", lambda x: None)
    for mine, other in zip(ours, indexer(*inputs), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-5)
