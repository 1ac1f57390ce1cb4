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
from winnow.models import joined, training
from winnow.models.context import IndexerLoss, train_context
from winnow.models.forward import hidden_states
from winnow.models.indexer import Indexer, IndexerConfig, _TensorCores
from winnow.models.load import load, save
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
@pytest.mark.parametrize("heads", [(6, 2, 8), (9, 3, 64), (1, 1, 20), (4, 4, 128)])
def test_heads_come_out_of_one_product_turned(heads, dtype):
    number, kv, dim = heads
    angles = draw(13, dim // 2, seed=4) * 3
    cos, sin = (torch.cat((f(angles),) * 2, -1) for f in (torch.cos, torch.sin))

    def plain(qkv):
        from winnow.models.indexer import rotate

        q, k, v = (x.unflatten(-1, (-1, dim)) for x in qkv.split([number * dim, kv * dim, kv * dim], -1))
        c, s = (x[:, None, : dim // 2].double() for x in (cos, sin))
        return rotate(q, c, s, "half"), rotate(k, c, s, "half"), v

    agree(lambda x: train_rows.split_heads(x, cos, sin, heads), plain, (draw(13, (number + 2 * kv) * dim),), dtype)
    none = train_rows.split_heads(draw(0, (number + 2 * kv) * dim), cos[:0], sin[:0], heads)
    assert [x.shape for x in none] == [(0, number, dim), (0, kv, dim), (0, kv, dim)]
    qkv = draw(13, (number + 2 * kv) * dim).requires_grad_()
    train_rows.split_heads(qkv, cos, sin, heads)[2].sum().backward()  # nothing came from q and k
    assert not qkv.grad[:, : (number + kv) * dim].any() and (qkv.grad[:, (number + kv) * dim :] == 1).all()


def test_a_part_of_each_tokens_numbers_is_turned_where_it_lies():
    angles = draw(13, 8, seed=4)
    cos, sin = (torch.cat((f(angles),) * 2, -1) for f in (torch.cos, torch.sin))
    wide = draw(13, 3 * 16 + 5)
    part = wide[:, 2:50].unflatten(-1, (3, 16))
    want = train_rows.turn(part.contiguous(), cos, sin, 16, "half", torch.float32)
    assert not part.is_contiguous() and torch.equal(train_rows.turn(part, cos, sin, 16, "half", torch.float32), want)


@pytest.mark.parametrize("frozen", [(), (1,), (0, 1, 2)])
def test_one_product_of_joined_weights_has_the_gradients_of_several(frozen):
    layer = make_model("llama").model.layers[0]
    linears = joined.heads(layer.self_attn)
    for number in frozen:
        linears[number].weight.requires_grad_(False)
    x = draw(7, 48).requires_grad_()
    assert joined.together(x, linears) is None, "not joined yet"
    want = torch.cat([linear(x) for linear in linears], -1)
    cotangent = draw(*want.shape, seed=3)
    want.backward(cotangent)
    expected = [x.grad, *(linear.weight.grad for linear in linears)]
    holder = SimpleNamespace(layers=[layer])
    joined.join(SimpleNamespace(get_decoder=lambda: holder))
    for tensor in (x, *(linear.weight for linear in linears)):
        tensor.grad = None
    out = joined.together(x, linears)
    torch.testing.assert_close(out, want)
    out.backward(cotangent)
    for tensor, gradient in zip((x, *(linear.weight for linear in linears)), expected, strict=True):
        assert (tensor.grad is None) == (gradient is None)
        if gradient is not None:
            torch.testing.assert_close(tensor.grad, gradient)
    biased = joined.heads(make_model("qwen2").model.layers[0].self_attn)
    assert biased[0].bias is not None and joined.together(x, biased) is None


def test_a_joined_model_is_saved_and_copied_as_it_is(tmp_path):
    """Its weights lie in common storages, which a folder must not show."""
    model = make_model("llama")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    joined.join(model)
    saved = load(save(model, None, tmp_path / "joined"), dtype="float32", device=DEV.type)
    for other in (saved, copy.deepcopy(model)):
        assert all(torch.equal(tensor, before[name]) for name, tensor in other.state_dict().items())
    attention = model.model.layers[0].self_attn
    with torch.no_grad():
        attention.k_proj.weight.add_(1)  # an update of a part is one of the whole
    x = draw(3, 48)
    torch.testing.assert_close(joined.together(x, joined.heads(attention))[:, 48:64], attention.k_proj(x))


@pytest.mark.parametrize("dtype", DTYPES)
def test_silu_mul(dtype):
    for shape in ((0, 4), (1, 1), (50, 77), (2, 2048)):
        agree(
            train_rows.silu_mul,
            lambda g, u: torch.nn.functional.silu(g) * u,
            (draw(*shape) * 4, draw(*shape, seed=1)),
            dtype,
        )
        agree(
            train_rows.silu_mul,
            lambda both: torch.nn.functional.silu(both.chunk(2, -1)[0]) * both.chunk(2, -1)[1],
            (draw(*shape[:-1], 2 * shape[-1]) * 4,),
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
    joined.join(model)  # the same with one product for what meets the same input
    together, _ = trained(model, monkeypatch, True, **options)
    for name, value in theirs.items():
        size = max(1.0, float(value.abs().max()))
        for mine in (ours, together):
            torch.testing.assert_close(
                mine[name], value, rtol=1e-4, atol=size * 2e-5, msg=lambda text, name=name: f"{name}: {text}"
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
    theirs = indexer(*inputs)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-5)
    parts = torch.cat([linear.weight.data for linear in joined.of_indexer(indexer)]).split([48, 16, 3])
    for linear, part in zip(joined.of_indexer(indexer), parts, strict=True):
        linear.weight.data = part
    calls, indexer = indexer.calls, indexer.requires_grad_(False)
    for rows in (None, train_rows):
        monkeypatch.setattr(ops, "train_rows_of", lambda x, rows=rows: rows)
        for mine, other in zip(indexer(*inputs), theirs, strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-5)
            assert not mine.requires_grad and mine.is_contiguous()
    assert indexer.calls == calls + 2
