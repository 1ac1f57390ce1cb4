"""Training passes in pieces of fixed size against the layers as they are: states, the indexers' loss, every gradient. On a GPU with
graphs, here with something that does what they do."""

from contextlib import nullcontext
from copy import deepcopy
from types import SimpleNamespace

import pytest
import torch
from test_train_rows import DEV, GPU, draw, make_model

from winnow.kernels import ops, train_rows
from winnow.models import joined, pieces
from winnow.models.context import IndexerLoss, train_context
from winnow.models.forward import hidden_states
from winnow.models.pieces import Pieces

pytestmark = [pytest.mark.gpu] if GPU else []
DTYPES = [torch.float32, torch.bfloat16] if GPU else [torch.float32]


@pytest.fixture(autouse=True)
def kernels(monkeypatch):
    monkeypatch.setattr(ops, "train_rows_of", lambda x: train_rows)


class Recorded:
    """What a CUDA graph does, on a CPU: runs again what was captured, and leaves the results where they were then. A backward pass is made of
    the inputs as they lie, which must be those of its own forward pass."""

    def __init__(self, run, stream, pool):
        self.run, self.piece = run, run.__defaults__[0] if run.__name__ == "back" else None
        self.made = run()

    def replay(self):
        if self.piece is None:
            fresh = self.run()
        else:
            with torch.enable_grad():
                inputs = [x.detach().clone().requires_grad_() for x in self.piece.inputs]
                outputs = [x for x in self.piece.run(*inputs) if x.requires_grad]
                learned = [*inputs, *self.piece.parameters]
                fresh = torch.autograd.grad(outputs, learned, self.piece.into, allow_unused=True)
        for static, value in zip(self.made, fresh, strict=True):
            if static is not None:
                static.data.copy_(value)


@pytest.fixture
def captures(monkeypatch):
    """Whether pieces are captured: by graphs on a GPU, by `Recorded` elsewhere."""
    monkeypatch.setattr(pieces, "STEP", 16)
    if not GPU:
        monkeypatch.setattr(pieces, "_captured", lambda *how: (lambda graph: (graph, graph.made))(Recorded(*how)))
        monkeypatch.setattr(torch.cuda, "Stream", lambda: SimpleNamespace(wait_stream=lambda other: None))
        monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
        monkeypatch.setattr(torch.cuda, "current_stream", torch.cuda.Stream)
        for name in ("synchronize", "graph_pool_handle"):
            monkeypatch.setattr(torch.cuda, name, lambda: None)
    return True


def trained(states, model, lengths, seed=5, selector="indexer", kl=True):
    """One pass and its gradients; what is not `model`'s own is gone before the next."""
    ids = torch.randint(0, 61, (sum(lengths),), generator=torch.Generator().manual_seed(seed)).to(DEV)
    watch = IndexerLoss() if kl else None
    ctx = train_context(list(lengths), DEV, selector=selector, indexer_loss=watch)
    out = states(model, ids, ctx)
    loss = (out * draw(*out.shape, seed=seed + 1, dtype=out.dtype)).sum() + (watch.total() if watch else 0.0)
    loss.backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return {"out": out.detach().clone(), **({"kl": watch.total().detach()} if watch else {}), **grads}


def same(ours, theirs):
    assert set(ours) == set(theirs)
    for name, value in theirs.items():
        size = max(1.0, float(value.float().abs().max()))
        close = {"rtol": 1e-4, "atol": size * 2e-5}
        torch.testing.assert_close(ours[name], value, msg=lambda text, name=name: f"{name}: {text}", **close)


def as_good(ours, theirs, exact):
    """In 16 bits another number of rows rounds elsewhere: both lie as far from fp32."""
    assert set(ours) == set(theirs) == set(exact)

    def off(found, name):
        return float((found[name].double() - exact[name].double()).norm() / exact[name].double().norm().clamp_min(1e-9))

    for name in exact:
        assert off(ours, name) <= 1.5 * off(theirs, name) + 2e-3, name


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("llama", {}),
        ("qwen2", {}),
        ("qwen3", {}),
        ("llama", {"leaders": (0,)}),
        ("llama", {"num_hidden_layers": 1}),
    ],
)
def test_pieces_are_the_layers(family, options, dtype, monkeypatch, captures):
    """Batches that shrink and grow, past the first capacity too; what an earlier one left in the rows behind changes nothing."""
    monkeypatch.setattr(pieces, "STEP", 8)
    model = make_model(family, **options).to(dtype)
    for layer in model.model.layers:
        if getattr(layer.self_attn, "indexer", None) is not None:
            layer.self_attn.indexer.float()
    joined.join(model)
    graphed = Pieces(model, capture=captures)
    capacities = []
    for seed, lengths in enumerate([(12, 9), (7, 5, 1), (24,), (5,), (17, 15, 1), (6, 13)]):
        capacities.append(graphed.capacity)
        if dtype == torch.float32:
            same(trained(graphed.states, model, lengths, seed), trained(hidden_states, model, lengths, seed))
            continue
        how = (lengths, seed, "recent", False)  # sets that do not depend on the last bits
        exact = trained(hidden_states, deepcopy(model).float(), *how)
        as_good(trained(graphed.states, model, *how), trained(hidden_states, model, *how), exact)
    assert capacities == [0, 24, 24, 24, 24, 40] and graphed.captures == 2
    assert (graphed._out[:, 19:] == 0).all() and (graphed._first[19:] == 0).all(), "rows behind the batch's"
    assert all((part[:, 19:] == 0).all() for part in graphed._heads_back)


@pytest.mark.parametrize("selector", ["dense", "recent"])
def test_other_selections_and_frozen_parameters(selector, monkeypatch, captures):
    model = make_model("llama")
    for name, p in model.named_parameters():
        p.requires_grad_(
            "indexer" not in name and "layers.1.mlp.up_proj" not in name and "layers.2.self_attn.q" not in name
        )
    joined.join(model)
    graphed = Pieces(model, capture=captures)
    for lengths in ((12, 9), (10,)):
        ours = trained(graphed.states, model, lengths, 1, selector, kl=False)
        same(ours, trained(hidden_states, model, lengths, 1, selector, kl=False))
    assert not any("up_proj" in name and "layers.1" in name for name in ours)


def test_gradients_of_two_passes_add_up(captures):
    """In fp32 the sums are the parameters' own, and a second pass must not write where the first one's lie."""
    model = make_model("llama")
    joined.join(model)
    graphed = Pieces(model, capture=captures)
    sums = {}
    for states in (graphed.states, hidden_states):
        for seed in (1, 2):
            ids = torch.randint(0, 61, (15,), generator=torch.Generator().manual_seed(seed)).to(DEV)
            states(model, ids, train_context([9, 6], DEV)).square().sum().backward()
        sums[states] = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        model.zero_grad(set_to_none=True)
    same(*sums.values())


def test_a_backward_pass_after_another_forward_is_refused(captures):
    """Its numbers are written over by then: the gradients would be the other batch's, and nothing would say so."""
    model = make_model("llama")
    joined.join(model)
    graphed = Pieces(model, capture=captures)
    first, second = (graphed.states(model, torch.arange(n, device=DEV), train_context([n], DEV)) for n in (12, 12))
    with pytest.raises(RuntimeError, match="those of a later forward pass"):
        first.sum().backward()
    model.zero_grad()
    second.sum().backward()


def test_what_the_pieces_leave_to_the_layers(monkeypatch, captures):
    """Passes without gradients, batches far below the capacity, other models, other devices' kernels."""
    model, other = make_model("llama"), make_model("qwen3")
    graphed = Pieces(model, capture=captures)
    left = []
    monkeypatch.setattr(pieces, "hidden_states", lambda *a: left.append(1) or hidden_states(*a))
    ids = torch.arange(60, device=DEV)
    graphed.states(model, ids, train_context([60], DEV))
    assert graphed.capacity == 80 and not left
    with torch.no_grad():
        graphed.states(model, ids, train_context([60], DEV))
    graphed.states(other, ids, train_context([60], DEV))
    graphed.states(model, ids, train_context([60], DEV, coupled=True))
    assert len(left) == 3
    graphed.states(model, ids[:10], train_context([10], DEV))
    assert len(left) == 3 and graphed.smaller is None
    with pytest.raises(ValueError, match="the context holds 12 packed tokens"):
        graphed.states(model, ids[:10], train_context([12], DEV))
    assert len(left) == 4
    monkeypatch.setattr(ops, "train_rows_of", lambda x: None)
    graphed.states(model, ids, train_context([60], DEV))
    assert len(left) == 5


def test_small_batches_have_pieces_of_their_own(monkeypatch, captures):
    """Those of less than an eighth of the rows; which of them runs changes no numbers, and each is captured once."""
    monkeypatch.setattr(pieces, "STEP", 8)
    model = make_model("llama")
    joined.join(model)
    graphed = Pieces(model, capture=captures)
    for seed, lengths in enumerate([(40, 20), (5, 3), (30, 31), (1,), (8,)]):
        same(trained(graphed.states, model, lengths, seed), trained(hidden_states, model, lengths, seed))
    assert graphed.capacity == 72 and graphed.captures == 1
    assert graphed.smaller.capacity == 16 and graphed.smaller.captures == 1
    assert graphed.smaller.smaller.capacity == 8, "one of 16 rows is less than an eighth"
    assert graphed.smaller.smaller.smaller is None, "there are no smaller ones than one step"


def test_a_capture_that_fails_halfway_leaves_nothing_to_run(monkeypatch, captures):
    """Of the pieces that were there by then none may be taken for all: the next batch captures anew."""
    model = make_model("llama")
    joined.join(model)
    graphed, capture, asked = Pieces(model, capture=True), pieces._captured, []

    def fails_third(*how):
        asked.append(1)
        if len(asked) == 3:
            raise torch.OutOfMemoryError("no room")
        return capture(*how)

    monkeypatch.setattr(pieces, "_captured", fails_third)
    with pytest.raises(torch.OutOfMemoryError, match="no room"):
        trained(graphed.states, model, (9, 6))
    assert graphed.captures == graphed.capacity == 0
    model.zero_grad(set_to_none=True)
    same(trained(graphed.states, model, (9, 6)), trained(hidden_states, model, (9, 6)))
    assert graphed.captures == 1


def test_a_run_that_goes_on_has_the_sizes_of_the_one_before(monkeypatch, captures):
    """Another number of rows rounds elsewhere: with the sizes of an earlier run, batches find the rows that they would have found there."""
    monkeypatch.setattr(pieces, "STEP", 8)
    model = make_model("llama")
    joined.join(model)
    first, second = (Pieces(model, capture=captures) for _ in range(2))
    for lengths in ((24, 10), (4,), (34,)):
        trained(first.states, model, lengths)
    assert first.sizes == [40, 8]
    second.reserve(first.sizes)
    assert second.sizes == first.sizes and second.captures == 0
    for lengths in ((36,), (2, 1), (8,)):  # 36 would ask for room beyond 40
        same(trained(second.states, model, lengths), trained(first.states, model, lengths))
        assert second.sizes == first.sizes == [40, 8]
    assert second.captures == second.smaller.captures == 1
    trained(second.states, model, (41,))
    assert second.sizes == [48, 8], "a larger batch makes room as ever"
    with pytest.raises(AssertionError, match="have run already"):
        second.reserve([8])


@pytest.mark.parametrize("options", [{}, {"leaders": (0,)}])
def test_frozen_indexers_are_part_of_the_pieces(options, monkeypatch, captures):
    """The same sets and gradients; an indexer is counted where it chooses and nowhere else, and learns in no piece."""
    model = make_model("qwen3", **options)
    indexers = {
        n: layer.self_attn.indexer for n, layer in enumerate(model.model.layers) if hasattr(layer.self_attn, "indexer")
    }
    indexers = {n: indexer for n, indexer in indexers.items() if indexer is not None}
    for indexer in indexers.values():
        indexer.requires_grad_(False)
    joined.join(model)
    graphed = Pieces(model, capture=captures)
    top_k = next(iter(indexers.values())).config.top_k
    for lengths in ((12, 9), (top_k + 1, 2), (top_k, 1)):
        sets = []
        for states in (graphed.states, hidden_states):
            found: dict = {}
            ids = torch.randint(0, 61, (sum(lengths),), generator=torch.Generator().manual_seed(3)).to(DEV)
            states(model, ids, train_context([1] * sum(lengths), DEV))  # pieces are there
            before = [indexer.calls for indexer in indexers.values()]
            states(model, ids, train_context(list(lengths), DEV, selection_out=found))
            assert [indexer.calls for indexer in indexers.values()] == [n + (max(lengths) > top_k) for n in before]
            sets.append(found)
        assert set(sets[0]) == set(sets[1]) == set(range(len(model.model.layers)))
        assert all(torch.equal(sets[0][n].indices, sets[1][n].indices) for n in sets[0])
        how = (lengths, 4, "indexer", False)
        same(trained(graphed.states, model, *how), trained(hidden_states, model, *how))
    assert graphed._indexing and graphed.captures == 1
    for indexer in indexers.values():
        indexer.requires_grad_(True)
    same(trained(graphed.states, model, (12, 9)), trained(hidden_states, model, (12, 9)))
    assert not graphed._indexing and graphed.captures == 2
