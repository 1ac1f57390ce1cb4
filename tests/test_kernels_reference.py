"""Every public operation against its definition, on inputs that try to fool it."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from winnow.kernels import ops, reference, torch_attention
from winnow.kernels.omission import omission
from winnow.kernels.packing import batches
from winnow.kernels.selection import Selection

LENGTHS = [5, 40, 17, 0, 40, 300, 1]  # a zero-length sequence, one longer than a query chunk, two of the same length
TOP_K = 12


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)
    torch.manual_seed(0)


def packed(lengths, dtype=torch.float64, heads=6, kv_heads=2, index_heads=3, grad=True):
    cu = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    positions = torch.cat([torch.arange(n) for n in lengths])
    total = len(positions)
    shapes = {
        "q": (total, heads, 16), "k": (total, kv_heads, 16), "v": (total, kv_heads, 16), "qi": (total, index_heads, 8), "ki": (total, 8), "w": (total, index_heads)
    }  # fmt: skip
    tensors = {name: torch.randn(shape, dtype=dtype, requires_grad=grad) for name, shape in shapes.items()}
    return SimpleNamespace(cu=cu, positions=positions, lengths=lengths, **tensors)


def paged(rows, lengths, page, poison=torch.nan):
    """Scatter packed rows [T, ...] into shuffled pages; everything not written is poisoned."""
    need = [-(-n // page) for n in lengths]
    order = torch.randperm(sum(need) + 3)
    cache = torch.full((sum(need) + 3, page, *rows.shape[1:]), poison, dtype=rows.dtype)
    table = torch.zeros(len(lengths), max(need) + 1, dtype=torch.int32)
    start, taken = 0, 0
    for i, n in enumerate(lengths):
        pages = order[taken : taken + need[i]]
        table[i, : need[i]] = pages.to(torch.int32)
        taken += need[i]
        place = torch.arange(n)
        cache[pages[place // page], place % page] = rows[start : start + n].detach()
        start += n
    return cache, table


def paged_many(rows_list, lengths, page):
    state = torch.get_rng_state()
    caches = []
    for rows in rows_list:
        torch.set_rng_state(state)
        cache, table = paged(rows, lengths, page)
        caches.append(cache)
    return caches, table


def same(a: Selection, b: Selection):
    assert torch.equal(a.indices, b.indices), (a.indices != b.indices).nonzero()[:5]
    assert torch.equal(a.counts, b.counts)


@pytest.mark.parametrize("kind", ["normal", "plateau", "zeros", "signed zeros", "infinite"])
def test_topk_equals_a_stable_sort(kind):
    for k, width in [(1, 1), (3, 2), (4, 4), (4, 5), (7, 64), (16, 300)]:
        scores = torch.randn(50, width)
        if kind == "plateau":
            scores = scores.relu().mul(2).round()
        elif kind == "zeros":
            scores = torch.zeros(50, width)
        elif kind == "signed zeros":
            scores = torch.where(torch.rand(50, width) < 0.5, -0.0, 0.0)
        elif kind == "infinite":
            scores = torch.where(torch.rand(50, width) < 0.5, -torch.inf, scores)
        lengths = torch.randint(0, width + 1, (50,))
        same(ops.topk(scores, lengths, k), reference.topk(scores, lengths, k))


def test_topk_lowest_index_wins_and_minus_zero_is_zero():
    scores = torch.tensor([[-1.0, -0.0, 0.0, -0.0, 5.0, 0.0]])
    assert ops.topk(scores, torch.tensor([6]), 3).indices.tolist() == [[1, 2, 4]]


def test_topk_nan_raises_only_inside_the_length():
    scores = torch.tensor([[1.0, 2.0, torch.nan], [1.0, 2.0, 3.0]])
    assert ops.topk(scores, torch.tensor([2, 3]), 2).indices.tolist() == [[0, 1], [1, 2]]
    with pytest.raises(ValueError, match="row 0, position 2 is NaN"):
        ops.topk(scores, torch.tensor([3, 3]), 2)
    with pytest.raises(ValueError, match="top_k >= 1"):
        ops.topk(scores, torch.tensor([2, 3]), 0)


def test_topk_of_a_row_does_not_depend_on_the_batch():
    scores = torch.randn(64, 200).relu()
    lengths = torch.randint(1, 201, (64,))
    whole = ops.topk(scores, lengths, 9)
    for i in (0, 17, 63):
        alone = ops.topk(scores[i : i + 1], lengths[i : i + 1], 9)
        assert torch.equal(alone.indices[0], whole.indices[i])


def test_indexer_logits():
    x = packed([70])
    torch.testing.assert_close(
        ops.indexer_logits(x.qi, x.ki, x.w), reference.indexer_logits(x.qi, x.ki, x.w), rtol=0, atol=1e-13
    )


def test_select_packed_is_the_reference_row_by_row():
    x = packed(LENGTHS, grad=False)
    got = ops.select_packed(x.qi, x.ki, x.w, x.cu, x.positions, TOP_K)
    for a, b in zip(x.cu.tolist()[:-1], x.cu.tolist()[1:], strict=True):
        if b > a:
            scores = reference.indexer_logits(x.qi[a:b], x.ki[a:b], x.w[a:b])
            same(
                Selection(got.indices[a:b], got.counts[a:b]), reference.topk(scores, torch.arange(1, b - a + 1), TOP_K)
            )


@pytest.mark.parametrize("selector", ["indexer", "random", "recent"])
def test_packed_prefill_and_decode_select_the_same_bits(selector):
    lengths = [n for n in LENGTHS if n]
    x = packed(lengths, torch.float32, grad=False)
    whole = ops.select_packed(x.qi, x.ki, x.w, x.cu, x.positions, TOP_K, selector)
    (cache,), table = paged_many([x.ki], lengths, 7)
    last = x.cu[1:].long() - 1
    lens = torch.tensor(lengths)
    decode = ops.select_paged(x.qi[last], cache, x.w[last], table, lens, TOP_K, selector)
    same(decode, Selection(whole.indices[last], whole.counts[last]))
    rows, cu = tails(x, 9)
    chunk = ops.select_prefill(x.qi[rows], cache, x.w[rows], cu, x.positions[rows], table, lens, TOP_K, selector)
    same(chunk, Selection(whole.indices[rows], whole.counts[rows]))


def tails(x, most):
    """Rows of the last `most` queries of each sequence, and their cu_seqlens."""
    parts = [torch.arange(max(a, b - most), b) for a, b in zip(x.cu.tolist()[:-1], x.cu.tolist()[1:], strict=True)]
    return torch.cat(parts), torch.tensor([0] + [len(p) for p in parts]).cumsum(0).to(torch.int32)


def test_floors():
    x = packed([30], grad=False)
    recent = ops.select_packed(None, None, None, x.cu, x.positions, 4, "recent")
    assert recent.indices[20].tolist() == [17, 18, 19, 20] and recent.indices[1].tolist() == [0, 1, -1, -1]
    random = ops.select_packed(None, None, None, x.cu, x.positions, 4, "random")
    assert len({tuple(row) for row in random.indices[10:].tolist()}) > 15
    with pytest.raises(ValueError, match="selector"):
        ops.select_packed(None, None, None, x.cu, x.positions, 4, "best")


def strange_sets(x, k=9):
    """Valid sets plus everything a caller can get wrong: sentinels, future positions, duplicates, empty rows."""
    indices = torch.randint(-3, 60, (len(x.positions), k), dtype=torch.int32)
    indices[::5, 0] = torch.iinfo(torch.int32).max
    indices[::7, 1] = torch.iinfo(torch.int32).min
    indices[3] = -1
    allowed = (indices >= 0) & (indices <= x.positions[:, None])
    counts = torch.tensor(
        [len(set(row[keep].tolist())) for row, keep in zip(indices, allowed, strict=True)], dtype=torch.int32
    )
    return Selection(indices, counts)


@pytest.mark.parametrize("sets", ["dense", "selected", "strange"])
def test_sparse_attention_and_its_gradients(sets):
    x = packed(LENGTHS)
    chosen = {
        "dense": lambda: None,
        "selected": lambda: ops.select_packed(x.qi, x.ki, x.w, x.cu, x.positions, TOP_K),
        "strange": lambda: strange_sets(x),
    }[sets]()
    out, lse = ops.sparse_attention(x.q, x.k, x.v, x.cu, chosen, 0.25)
    want, want_lse = reference.sparse_attention(x.q, x.k, x.v, x.cu, chosen, 0.25)
    torch.testing.assert_close(out, want, rtol=0, atol=1e-12)
    torch.testing.assert_close(lse, want_lse, rtol=0, atol=1e-12)
    if sets == "strange":
        empty = chosen.counts == 0
        assert empty.any() and (out[empty] == 0).all() and (lse[empty] == -torch.inf).all()
    weight = torch.randn_like(out)
    got = torch.autograd.grad((out * weight).sum(), (x.q, x.k, x.v))
    expected = torch.autograd.grad((want * weight).sum(), (x.q, x.k, x.v))
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-11)


def test_attention_of_a_sequence_does_not_depend_on_its_neighbours():
    x = packed([33, 40, 37], torch.float32, grad=False)
    chosen = ops.select_packed(x.qi, x.ki, x.w, x.cu, x.positions, 6)
    out, _ = ops.sparse_attention(x.q, x.k, x.v, x.cu, chosen, 0.25)
    alone = Selection(chosen.indices[33:73], chosen.counts[33:73])
    part = [t[33:73] for t in (x.q, x.k, x.v)]
    single, _ = ops.sparse_attention(*part, torch.tensor([0, 40], dtype=torch.int32), alone, 0.25)
    torch.testing.assert_close(out[33:73], single, rtol=0, atol=2e-6)


@pytest.mark.parametrize("causal", [True, False])
def test_plain_attention_of_other_devices(causal):
    q, k, v, grad = (torch.randn(2, h, 20, 8, dtype=torch.float64) for h in (6, 2, 2, 6))
    mask = None
    if not causal:
        mask = torch.zeros(2, 1, 20, 20, dtype=torch.float64).masked_fill(torch.rand(2, 1, 20, 20) < 0.5, -torch.inf)
        mask[:, :, 4] = -torch.inf
    out, lse = torch_attention.attend(q, k, v, mask, causal, 0.3)
    plain, plain_lse = torch_attention.attend_plain(q, k, v, mask, causal, 0.3)
    torch.testing.assert_close(plain, out)
    torch.testing.assert_close(plain_lse, lse)
    a = torch_attention.attend_backward(grad, q, k, v, out, lse, mask, causal, 0.3)
    b = torch_attention.attend_plain_backward(grad, q, k, v, out, lse, mask, causal, 0.3)
    for one, other in zip(a, b, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("page", [1, 16, 61])
@pytest.mark.parametrize("sparse", [True, False])
def test_decode_and_chunked_prefill_agree_with_packed(page, sparse):
    lengths = [n for n in LENGTHS if n]
    x = packed(lengths, torch.float32, grad=False)
    chosen = ops.select_packed(x.qi, x.ki, x.w, x.cu, x.positions, TOP_K) if sparse else None
    out, lse = ops.sparse_attention(x.q, x.k, x.v, x.cu, chosen, 0.25)
    (kc, vc), table = paged_many([x.k, x.v], lengths, page)
    lens = torch.tensor(lengths, dtype=torch.int32)

    def part(rows):
        return None if chosen is None else Selection(chosen.indices[rows], chosen.counts[rows])

    last = x.cu[1:].long() - 1
    got, got_lse = ops.sparse_decode(x.q[last], kc, vc, table, lens, part(last), 0.25)
    torch.testing.assert_close(got, out[last], rtol=0, atol=2e-6)
    torch.testing.assert_close(got_lse, lse[last], rtol=0, atol=2e-6)
    want, _want_lse = reference.sparse_decode(x.q[last], kc, vc, table, lens, part(last), 0.25)
    torch.testing.assert_close(got, want, rtol=0, atol=2e-6)
    rows, cu = tails(x, 9)
    chunk, chunk_lse = ops.sparse_prefill(x.q[rows], kc, vc, cu, table, lens, part(rows), 0.25)
    torch.testing.assert_close(chunk, out[rows], rtol=0, atol=2e-6)
    torch.testing.assert_close(chunk_lse, lse[rows], rtol=0, atol=2e-6)


@pytest.mark.parametrize("target", ["attention", "output"])
@pytest.mark.parametrize("sets", ["dense", "selected", "strange"])
def test_indexer_kl_and_its_gradients(sets, target):
    x = packed([5, 40, 0, 33, 270])
    chosen = {
        "dense": lambda: None,
        "selected": lambda: ops.select_packed(x.qi, x.ki, x.w, x.cu, x.positions, TOP_K),
        "strange": lambda: strange_sets(x),
    }[sets]()
    out, lse = reference.sparse_attention(x.q, x.k, x.v, x.cu, chosen, 0.25)
    args = (x.qi, x.ki, x.w, x.q, x.k, lse, x.cu, chosen, 0.25)
    weight = torch.randn(24, out[0].numel(), generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    projected = (x.v, out, weight) if target == "output" else None
    cost = None if projected is None else omission(*projected)
    kl, rows = ops.indexer_kl(*args, cost)
    want, want_rows = reference.indexer_kl(*args, projected)
    assert rows == want_rows
    torch.testing.assert_close(kl, want)
    got = torch.autograd.grad(3 * kl, (x.qi, x.ki, x.w))
    expected = torch.autograd.grad(3 * want, (x.qi, x.ki, x.w))
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)
    assert torch.autograd.grad(ops.indexer_kl(*args, cost)[0], (x.q, x.k, x.v), allow_unused=True) == (None,) * 3


def test_indexer_kl_is_zero_when_the_indexer_is_the_attention():
    x = packed([20], heads=1, kv_heads=1, index_heads=1, grad=False)
    q, k = x.q.abs(), x.k.abs()  # ReLU and a weight of 1 then change nothing
    lse = reference.sparse_attention(q, k, x.v, x.cu, None, 1.0)[1]
    kl, _ = ops.indexer_kl(q, k[:, 0], torch.ones(20, 1, dtype=torch.float64), q, k, lse, x.cu, None, 1.0, None)
    assert abs(float(kl)) < 1e-10


def kept_sets(targets, vocab):
    """Every third row keeps everything; the others a random set with their target in it."""
    rows = [
        [] if i % 3 == 0 else sorted({int(t), *torch.randint(0, vocab, (5,)).tolist()}) for i, t in enumerate(targets)
    ]
    indptr = np.cumsum([0, *map(len, rows)]).astype(np.int64)
    return SimpleNamespace(indptr=indptr, token_ids=np.array([t for row in rows for t in row], dtype=np.int32))


@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize("chunk", [1, 64, 1 << 20])
def test_token_logprobs_and_gradients(kept, chunk, monkeypatch):
    monkeypatch.setattr("winnow.kernels.torch_logprobs.CHUNK_ELEMENTS", chunk)
    hidden = torch.randn(14, 8, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(31, 8, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(0, 31, (14,))
    temperature = torch.rand(14) + 0.5
    sets = kept_sets(targets, 31) if kept else None
    got = ops.token_logprobs(hidden, weight, targets, temperature, sets)
    pair = (torch.tensor(sets.indptr), torch.tensor(sets.token_ids)) if kept else None
    want = reference.token_logprobs(hidden, weight, targets, temperature.double(), pair)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)
    for which in ([1.0, 0.0], [0.0, 1.0], [0.7, -0.3]):
        grads = [
            torch.autograd.grad(
                which[0] * (p[0] ** 2).sum() + which[1] * (p[1] ** 2).sum(), (hidden, weight), retain_graph=True
            )
            for p in (got, want)
        ]
        for a, b in zip(*grads, strict=True):
            torch.testing.assert_close(a, b)


def test_token_logprobs_refuses():
    hidden, weight, targets = torch.randn(2, 4), torch.randn(9, 4), torch.tensor([1, 2])
    with pytest.raises(ValueError, match="temperature"):
        ops.token_logprobs(hidden, weight, targets, 0.0)
    for wrong in (-1, 9):
        with pytest.raises(ValueError, match=f"token {wrong} is scored, but the vocabulary is 0 .. 8"):
            ops.token_logprobs(hidden, weight, torch.tensor([1, wrong]), 1.0)
    with pytest.raises(ValueError, match="not in that row's kept set"):
        ops.token_logprobs(
            hidden, weight, targets, 1.0, SimpleNamespace(indptr=np.array([0, 1, 2]), token_ids=np.array([1, 7]))
        )


def test_autograd_keeps_nothing_quadratic():
    x = packed([1200], torch.float32)
    chosen = ops.select_packed(x.qi, x.ki, x.w, x.cu, x.positions, TOP_K)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        _out, lse = ops.sparse_attention(x.q, x.k, x.v, x.cu, chosen, 0.25)
        ops.indexer_kl(x.qi, x.ki, x.w, x.q, x.k, lse, x.cu, chosen, 0.25, None)
        ops.token_logprobs(
            x.q.flatten(1), torch.randn(500, 96, requires_grad=True), torch.zeros(1200, dtype=torch.int64)
        )
    assert max(kept) <= 1200 * 6 * 16


def test_batches_cover_every_row_once():
    lengths = [3, 700, 5, 0, 4, 90, 700, 33]
    cu = torch.tensor([0, *lengths]).cumsum(0)
    seen = torch.zeros(int(cu[-1]), dtype=torch.int64)
    for batch in batches(cu):
        seen[batch.rows[batch.valid]] += 1
        padded = batch.pad(torch.arange(len(seen)))
        assert torch.equal(padded[batch.valid], batch.rows[batch.valid])
    assert (seen == 1).all()


@pytest.mark.parametrize("longest", [510, 512, 513, 530])  # up to 512 positions are masked, longer contexts gathered
@pytest.mark.parametrize("group", [1, 9])  # query heads of a kv head: 9 are a block of eight and one beyond it
def test_decode_is_the_reference_on_both_sides_of_the_switch(longest, group):
    generator = torch.Generator().manual_seed(longest + group)
    lengths, page, top_k = torch.tensor([longest, 1, 7, 300], dtype=torch.int32), 16, 8
    num_pages = -(-longest // page)
    table = torch.randperm(4 * num_pages, generator=generator).view(4, num_pages).to(torch.int32)
    k, v = (torch.full((4 * num_pages, page, 2, 16), torch.nan) for _ in range(2))
    for row, length in enumerate(lengths.tolist()):  # what was never written stays NaN
        places = torch.arange(length)
        for store in (k, v):
            store[table[row, places // page].long(), places % page] = torch.randn(length, 2, 16, generator=generator)
    q = torch.randn(4, 2 * group, 16, generator=generator)
    indices = torch.full((4, top_k), -1, dtype=torch.int32)
    indices[0] = torch.tensor(
        [0, 5, 6, longest - 2, longest - 1, longest, 2**31 - 1, -(2**31)]
    )  # three that nobody may see
    indices[1, 0] = 0
    indices[3, :3] = torch.tensor([2, 100, 299])
    chosen = Selection(indices, torch.tensor([5, 1, 0, 3], dtype=torch.int32))
    out, lse = ops.sparse_decode(q, k, v, table, lengths, chosen, 0.25)
    seen = [0, 1, 3]  # row 2 has no valid index: output 0, lse -inf
    want, want_lse = reference.sparse_decode(
        q[seen], k, v, table[seen], lengths[seen], Selection(indices[seen], chosen.counts[seen]), 0.25
    )
    torch.testing.assert_close(out[seen], want, rtol=0, atol=2e-6)
    torch.testing.assert_close(lse[seen], want_lse, rtol=0, atol=2e-6)
    assert (out[2] == 0).all() and (lse[2] == -torch.inf).all()


def test_bench_rows_are_chosen_by_name_or_part():
    from winnow.kernels.bench import choose

    names = ("gqa", "mla", "layer-gqa", "topk")
    assert choose(names, ()) == list(names)
    assert choose(names, ("gqa",)) == ["gqa"], "a whole name means that row alone"
    assert choose(names, ("layer", "top")) == ["layer-gqa", "topk"]
    assert choose(names, ("la",)) == ["mla", "layer-gqa"]
    assert choose(names, ("nothing",)) == []
