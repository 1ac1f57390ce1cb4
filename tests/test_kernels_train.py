"""The training kernels against reference.py in float64, outputs and gradients: compiled on a GPU, under Triton's interpreter elsewhere."""

import os
import sys
from itertools import accumulate, pairwise

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported
triton = pytest.importorskip("triton")

from winnow.kernels import gpu_ops, gpu_train  # noqa: E402
from winnow.kernels import reference as ref  # noqa: E402
from winnow.kernels.gqa_decode import gqa_decode  # noqa: E402
from winnow.kernels.indexer_kl import indexer_kl, kl_and_gradients  # noqa: E402
from winnow.kernels.key_lists import WHOLE, all_kept, keep_small, key_lists, query_blocks  # noqa: E402
from winnow.kernels.logprobs import token_logprobs  # noqa: E402
from winnow.kernels.mla_backward import mla_attention, mla_backward  # noqa: E402
from winnow.kernels.mla_decode import mla_decode  # noqa: E402
from winnow.kernels.mla_prefill import EXACT, absolute, gqa_prefill_exact, mla_exact, mla_prefill  # noqa: E402
from winnow.kernels.omission import Omission, omission  # noqa: E402
from winnow.kernels.packing import known  # noqa: E402
from winnow.kernels.segments import add_rows  # noqa: E402
from winnow.kernels.selection import Selection, window_selection  # noqa: E402
from winnow.kernels.sparse_backward import sparse_attention, sparse_backward  # noqa: E402
from winnow.kernels.sparse_prefill import context_prefill, plan_for, sparse_prefill  # noqa: E402
from winnow.kernels.torch_attention import paged_context_attention  # noqa: E402
from winnow.kernels.torch_indexer import packed_selection  # noqa: E402

GPU = torch.cuda.is_available()
pytestmark = [pytest.mark.gpu] if GPU else []
DEV = torch.device("cuda" if GPU else "cpu")
DTYPE = torch.bfloat16 if GPU else torch.float32  # the interpreter computes in fp32 only
REPEATS = 20 if GPU else 2
LENGTHS = (25, 0, 1, 12)


def randn(*shape, seed=0):
    """Values that the kernels' dtype holds exactly, in float64 on the CPU."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DTYPE).double()


def bounds(lengths):
    return torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)


def random_sets(lengths, k, seed=0, empty=True):
    """Random ascending sets with a -1 tail; every seventh row is empty, rows with t < k have fewer than k keys."""
    generator = torch.Generator().manual_seed(seed)
    indices = torch.full((sum(lengths), k), -1, dtype=torch.int32)
    row = 0
    for length in lengths:
        for t in range(length):
            chosen = torch.randperm(t + 1, generator=generator)[:k].sort().values
            if not empty or t % 7 != 3:
                indices[row, : len(chosen)] = chosen.int()
            row += 1
    return Selection(indices, (indices >= 0).sum(1).int())


def device(x):
    if isinstance(x, Selection):
        return Selection(x.indices.to(DEV), x.counts.to(DEV))
    return x if x is None else x.to(DEV)


def leaves(*tensors):
    """The same numbers twice: float64 on the CPU and the kernels' dtype on the device, both asking for gradients."""
    return [x.clone().requires_grad_() for x in tensors], [x.to(DEV, DTYPE).requires_grad_() for x in tensors]


def close(name, got, want):
    """fp32: 2e-5 of the largest value; bf16: similarity 1 - 2xy / (x^2 + y^2) below 1e-4. Prints where the worst value stands."""
    got, want = got.detach().double().cpu(), want.detach().double().cpu()
    assert got.shape == want.shape and torch.isfinite(got).all(), f"{name}: {got.shape} or not finite"
    error = (got - want).abs()
    if GPU:
        bad = 1 - 2 * (got * want).sum() / (got * got + want * want).sum().clamp_min(1e-30) > 1e-4
    else:
        bad = error.max() > 2e-5 * want.abs().max().clamp_min(1.0)
    if bad:
        at = tuple(int(i) for i in torch.unravel_index(error.argmax(), error.shape))
        raise AssertionError(f"{name} at {at}: {got[at]} for {want[at]}")


def check_lse(got, want):
    got = got.double().cpu()
    assert torch.equal(got.isinf(), want.isinf())
    finite = ~want.isinf()
    assert ((got - want)[finite].abs() <= 1e-4 + 2 / 65536 * want[finite].abs()).all()


@pytest.fixture
def unions(monkeypatch):
    """Lists of what is selected for contexts of every length, also those short enough to be listed whole."""
    monkeypatch.setattr("winnow.kernels.key_lists.WHOLE", 0)


@pytest.fixture(params=[0, 512], ids=["unions", "whole"])
def both(request, monkeypatch):
    monkeypatch.setattr("winnow.kernels.key_lists.WHOLE", request.param)


@pytest.mark.usefixtures("both")
@pytest.mark.parametrize(
    ("lengths", "heads", "kv_heads", "dim", "k"),
    [
        ((20,), 2, 1, 16, None),
        (LENGTHS, 4, 2, 16, 8),
        ((33,), 3, 1, 24, 32),  # L = k + 1, a group and a dimension that are no powers of two
        ((32,), 1, 1, 16, 32),  # L = k
        ((31,), 1, 1, 16, 32),  # L = k - 1
    ],
)
def test_sparse_attention(lengths, heads, kv_heads, dim, k):
    cu, tokens = bounds(lengths), sum(lengths)
    sets = None if k is None else random_sets(lengths, k)
    wide, narrow = leaves(
        randn(tokens, heads, dim, seed=1), randn(tokens, kv_heads, dim, seed=2), randn(tokens, kv_heads, dim, seed=3)
    )
    grad = randn(tokens, heads, dim, seed=4)
    want, want_lse = ref.sparse_attention(*wide, cu, sets, 0.3)
    want.backward(grad)
    got, got_lse = sparse_attention(*narrow, device(cu), device(sets), 0.3)
    got.backward(grad.to(DEV, DTYPE))
    close("out", got, want)
    check_lse(got_lse, want_lse)
    for name, a, b in zip("qkv", narrow, wide, strict=True):
        close(f"d{name}", a.grad, b.grad)
    if sets is not None:
        empty = (sets.counts == 0).to(DEV)
        assert bool((got[empty] == 0).all()) and bool(got_lse[empty].isinf().all())


@pytest.mark.parametrize("k", [None, 32, 200])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim"), [(4, 2, 64), (3, 1, 128), (8, 1, 64), (2, 2, 128)] if GPU else [(3, 1, 16)]
)
def test_the_last_queries_of_long_contexts(heads, kv_heads, dim, k, monkeypatch):
    """Contexts past `WHOLE`, of which a chunk of queries is there: of k - 1 .. k + 1 keys, of one tile and one key more. Between the contexts,
    and before and after them, lies NaN, which nobody may read."""
    lengths = (600, 1, 1100, 515, 128, 129, 199, 200, 201) if GPU else (70, 1, 64, 65, 33)
    chunks = [min(n, 1 + (37 * i) % 150) for i, n in enumerate(lengths, 3)]
    monkeypatch.setattr("winnow.kernels.key_lists.WHOLE", 0 if not GPU else WHOLE)
    room = [n + 3 for n in lengths]
    starts = [3 + sum(room[:i]) for i in range(len(lengths))]
    total = sum(room) + 3
    sets = None if k is None else random_sets(lengths, k, 5)
    q = randn(sum(lengths), heads, dim, seed=1)
    kv = [randn(sum(lengths), kv_heads, dim, seed=s) for s in (2, 3)]
    want, want_lse = ref.sparse_attention(*leaves(q, *kv)[0], bounds(lengths), sets, 0.3)
    there = torch.cat([torch.arange(a, a + n) for a, n in zip(starts, lengths, strict=True)])
    spread = [torch.full((total, kv_heads, dim), torch.nan, dtype=x.dtype).index_copy_(0, there, x) for x in kv]
    ends = list(accumulate(lengths))
    last = torch.cat([torch.arange(end - n, end) for end, n in zip(ends, chunks, strict=True)])
    part = None if sets is None else device(Selection(sets.indices[last], sets.counts[last]))
    given = [x.to(DEV, DTYPE) for x in (q[last], *spread)]
    keys = tuple(zip(starts, lengths, strict=True))
    got, lse = context_prefill(*given, device(bounds(chunks)), keys, part, 0.3)
    close("out", got, want[last])
    check_lse(lse, want_lse[last])
    again = context_prefill(*given, device(bounds(chunks)), keys, part, 0.3)
    assert torch.equal(got, again[0]) and torch.equal(lse, again[1])


def test_no_tokens_and_empty_sequences():
    for lengths in ((), (0,), (0, 0)):
        q, k, v = (torch.zeros(0, heads, 16, device=DEV, dtype=DTYPE, requires_grad=True) for heads in (4, 2, 2))
        for sets in (None, Selection(*(torch.zeros(*shape, dtype=torch.int32) for shape in ((0, 4), (0,))))):
            out, lse = sparse_attention(q, k, v, device(bounds(lengths)), device(sets), 0.3)
            out.sum().backward()
            assert out.shape == (0, 4, 16) and lse.shape == (0, 4) and k.grad.shape == (0, 2, 16)
    q, k, v = (randn(5, heads, 16, seed=s).to(DEV, DTYPE) for s, heads in enumerate((4, 2, 2)))
    padded = sparse_attention(q, k, v, device(bounds((0, 3, 0, 2, 0))), None, 0.3)
    plain = sparse_attention(q, k, v, device(bounds((3, 2))), None, 0.3)
    assert all(torch.equal(a, b) for a, b in zip(padded, plain, strict=True))


@pytest.mark.usefixtures("both")
def test_hostile_indices_change_nothing():
    """Future positions, repeats and sentinels; the same rows without them."""
    length, k = 24, 4
    sets = random_sets((length,), k)
    hostile = torch.cat([sets.indices, sets.indices.new_full((length, 4), -1)], 1)
    hostile[:, k] = sets.indices[:, 0]
    hostile[:, k + 1] = torch.arange(1, length + 1)
    hostile[:, k + 2], hostile[:, k + 3] = 2**31 - 1, -(2**31)
    q, k_, v = (randn(length, 2, 16, seed=s).to(DEV, DTYPE) for s in range(3))
    results = [
        sparse_prefill(q, k_, v, device(bounds((length,))), device(s), 0.3)[0]
        for s in (sets, Selection(hostile, sets.counts + 4))
    ]
    assert torch.equal(*results)


@pytest.mark.usefixtures("both")
def test_packed_is_unpacked():
    sets, cu = random_sets(LENGTHS, 8), bounds(LENGTHS)
    q, k, v = (randn(sum(LENGTHS), heads, 16, seed=heads).to(DEV, DTYPE) for heads in (2, 1, 1))
    grad = randn(sum(LENGTHS), 2, 16, seed=9).to(DEV, DTYPE)
    out, lse = sparse_prefill(q, k, v, device(cu), device(sets), 0.3)
    together = [out, lse, *sparse_backward(grad, q, k, v, out, lse, device(cu), device(sets), 0.3)]
    for a, b in pairwise(cu.tolist()):
        if a == b:
            continue
        one = device(Selection(sets.indices[a:b], sets.counts[a:b]))
        alone = device(bounds((b - a,)))
        own = sparse_prefill(q[a:b], k[a:b], v[a:b], alone, one, 0.3)
        own = [*own, *sparse_backward(grad[a:b], q[a:b], k[a:b], v[a:b], *own, alone, one, 0.3)]
        assert all(torch.equal(x[a:b], y) for x, y in zip(together, own, strict=True))


@pytest.mark.usefixtures("unions")
def test_pieces_and_slices_change_nothing_but_memory():
    """Lists made in many small pieces hold the same entries; gradients added slice by slice agree to rounding."""
    length = 300 if GPU else 40  # several blocks of queries, which are larger on a GPU
    sets, cu = device(random_sets((length,), 8)), device(bounds((length,)))
    blocks = query_blocks(cu, 8)
    whole = next(iter(key_lists(blocks, sets)))
    pieces = list(key_lists(blocks, sets, bitmap_bytes=64))
    assert len(pieces) > 3
    assert torch.equal(torch.cat([p.keys for p in pieces]), whole.keys)
    assert torch.equal(torch.cat([p.bits for p in pieces]), whole.bits)
    for block in range(len(blocks)):
        rows = range(8 * block, min(length, 8 * block + 8))
        union = sorted({i for r in rows for i in sets.indices[r].tolist() if i >= 0})
        mine = whole.keys[whole.ends[block] : whole.ends[block + 1]].tolist()
        assert [i for i in mine if i >= 0] == union
    q, k, v, grad = (randn(length, 2, 16, seed=s).to(DEV, DTYPE) for s in range(4))
    out, lse = sparse_prefill(q, k, v, cu, sets, 0.3)
    one, many = (sparse_backward(grad, q, k, v, out, lse, cu, sets, 0.3, parts_bytes=n) for n in (1 << 30, 1 << 12))
    for name, a, b in zip("qkv", one, many, strict=True):
        close(f"d{name}", a, b)
    kept: list = []
    for lists in key_lists(query_blocks(cu, plan_for(q, k)[0]), sets, bitmap_bytes=64):
        assert all_kept(kept) is None  # a piece is missing still
        keep_small(kept, lists, 1 << 20)
    again = sparse_backward(grad, q, k, v, out, lse, cu, sets, 0.3, kept=all_kept(kept))
    assert len(kept) > 1 and all(torch.equal(a, b) for a, b in zip(one, again, strict=True))
    late: list = []
    for i, lists in enumerate(kept):
        keep_small(late, lists, 0 if i == 0 else 1 << 20)  # the first was too large: none is kept
    assert all_kept(late) is None


def listed(lists) -> list[list[int]]:
    """The keys of each block, and each query's bits of them."""
    found = []
    for block, (start, stop) in enumerate(zip(lists.ends, lists.stops.tolist(), strict=False)):
        rows = lists.keys[start:stop].tolist()
        found.append([rows, lists.bits[start // 32 : stop // 32].tolist()])
        assert all(key < 0 for key in lists.keys[stop : lists.ends[block + 1]].tolist())
    return found


@pytest.mark.usefixtures("unions")
def test_lists_with_room_are_lists_end_to_end(monkeypatch):
    """What is not waited for has the room of the longest lists; both ways hold the same keys and give the same bits everywhere."""
    lengths = (150, 3, 90) if GPU else (90, 3, 50)
    cu, tokens = device(bounds(lengths)), sum(lengths)
    sets = device(window_selection(torch.cat([torch.arange(n) for n in lengths]), 40))  # neighbours share all but one
    q, k, v, grad = (randn(tokens, h, 16, seed=s).to(DEV, DTYPE) for s, h in enumerate((4, 2, 2, 4)))
    index = [
        randn(tokens, 3, 16, seed=5).to(DEV, DTYPE),
        randn(tokens, 16, seed=6).to(DEV, DTYPE),
        randn(tokens, 3, seed=7).to(DEV),
    ]
    index[2] = index[2].to(index[0].dtype)
    project = randn(20, 4 * 16, seed=8).to(DEV, DTYPE)

    def run():
        lists = list(key_lists(query_blocks(cu, 8), sets, bitmap_bytes=1 << 9))
        assert len(lists) > 2
        kept: list = []
        out, lse = sparse_prefill(q, k, v, cu, sets, 0.3, kept)
        grads = sparse_backward(grad, q, k, v, out, lse, cu, sets, 0.3)
        assert all(
            torch.equal(a, b)
            for a, b in zip(grads, sparse_backward(grad, q, k, v, out, lse, cu, sets, 0.3, kept=kept), strict=True)
        )
        total, rows, by_index = kl_and_gradients(*index, q, k, lse, cu, sets, 0.3, None)
        by_output = kl_and_gradients(*index, q, k, lse, cu, sets, 0.3, omission(v, out, project))[2]
        results = (out, lse, *grads, rows, *by_index, *by_output)
        return [x for piece in lists for x in listed(piece)], lists, results, float(total)

    wanted, roomy, results, total = run()
    monkeypatch.setattr("winnow.kernels.key_lists.ROOMY", 0)
    found, packed, others, other = run()
    assert all(x.shared is not None for x in roomy) and all(x.shared is None for x in packed)
    assert sum(x.ends[-1] for x in packed) < sum(x.ends[-1] for x in roomy)  # there was room to be wrong in
    assert found == wanted
    assert all(torch.equal(a, b) for a, b in zip(results, others, strict=True))
    assert total == pytest.approx(other, rel=1e-12)  # tiles are added in another grouping


@pytest.mark.usefixtures("unions")
def test_room_is_enough_for_sets_that_share_nothing_and_for_none_at_all():
    """Lists as long as can be (eight queries with eight keys each of their own: exactly one unit), sequences of k - 1, k, k + 1 and no
    tokens, and a block whose sets are all empty."""
    k, lengths = 8, (7, 8, 0, 9, 200)
    cu, tokens = device(bounds(lengths)), sum(lengths)
    sets = window_selection(torch.cat([torch.arange(n) for n in lengths]), k)
    long = 24  # the first row of the last sequence
    for t in range(128, 192):
        first = (t % 8) * 8  # neighbours in a block of eight share no key
        sets.indices[long + t] = torch.arange(first, first + 8, dtype=torch.int32)
    sets.indices[long + 64 : long + 128] = -1  # eight blocks of nothing
    sets.counts[long + 64 : long + 128] = 0
    moved = device(sets)
    lists = next(iter(key_lists(query_blocks(cu, 8), moved)))
    assert lists.shared is not None
    widths = [b - a for a, b in pairwise(lists.ends)]
    full = [stop - start for start, stop in zip(lists.ends, lists.stops.tolist(), strict=False)]
    assert full[20:28] == widths[20:28] == [64] * 8 and full[12:20] == [0] * 8  # 4 blocks of short sequences come first
    q, key, v = (randn(tokens, h, 16, seed=s) for s, h in enumerate((4, 2, 2)))
    wide, narrow = leaves(q, key, v)
    want, want_lse = ref.sparse_attention(*wide, bounds(lengths), sets, 0.3)
    got, lse = gpu_train.sparse_attention(*narrow, cu, moved, 0.3)
    close("out", got, want)
    grad = randn(tokens, 4, 16, seed=5)
    want.backward(grad)
    got.backward(grad.to(DEV, DTYPE))
    for name, a, b in zip("qkv", narrow, wide, strict=True):
        close(f"d{name}", a.grad, b.grad)
    index, ours = leaves(randn(tokens, 3, 16, seed=6), randn(tokens, 16, seed=7), randn(tokens, 3, seed=8) * 0.25)
    want_kl, want_rows = ref.indexer_kl(*index, q, key, want_lse, bounds(lengths), sets, 0.3)
    kl, rows = gpu_train.indexer_kl(*ours, q.to(DEV, DTYPE), key.to(DEV, DTYPE), lse, cu, moved, 0.3, None)
    assert int(rows) == int(want_rows) == tokens - 64
    close("kl", kl, want_kl)
    want_kl.backward()
    kl.backward()
    for name, a, b in zip(("q", "k", "w"), ours, index, strict=True):
        close(f"index d{name}", a.grad, b.grad)


@pytest.mark.parametrize("longest", [0, 1024])
@pytest.mark.parametrize("lengths", [(), (0,), (1,), (4, 5, 6, 0, 1), (6, 6)])
def test_packed_selection_around_k_with_ties(longest, lengths, monkeypatch):
    """k - 1, k, k + 1, one token and none; half of the scores are the same zero. Twice: layouts are kept from the first time."""
    monkeypatch.setattr("winnow.kernels.select_short.LONGEST", longest)
    tokens, cu = sum(lengths), device(bounds(lengths))
    positions = torch.cat([torch.arange(0), *(torch.arange(n) for n in lengths)])
    q, k, w = (randn(tokens, *shape, seed=3).to(DEV, DTYPE) for shape in ((2, 16), (16,), (2,)))
    w[::2] = 0.0
    for faults in (None, torch.zeros(1, dtype=torch.int32, device=DEV)):
        got = gpu_ops.select_packed(q, k, w, cu, positions.to(DEV), 5, faults)
        want = packed_selection(q, k, w, cu, positions.to(DEV), 5, "indexer")
        assert torch.equal(got.indices, want.indices) and torch.equal(got.counts, want.counts)
        assert faults is None or faults.tolist() == [0]


def asked(monkeypatch) -> list[str]:
    """Fills up with what this project's files ask a tensor to say on the host, which waits where it lies on a GPU."""
    questions: list[str] = []

    def listen(name, real):
        def heard(self, *args, **kwargs):
            caller = sys._getframe(1)
            if (
                any(f"/{room}/" in caller.f_code.co_filename for room in ("kernels", "models"))
                and "triton" not in caller.f_code.co_filename
            ):
                questions.append(f"{name} in {caller.f_code.co_name}")
            return real(self, *args, **kwargs)

        return heard

    for name in ("tolist", "item", "__int__", "__bool__", "__float__", "__index__", "nonzero", "cpu", "numpy"):
        monkeypatch.setattr(torch.Tensor, name, listen(name, getattr(torch.Tensor, name)))
    return questions


@pytest.mark.parametrize("longest", [0, 1024])
def test_a_training_layer_asks_the_device_nothing(longest, monkeypatch):
    """Selection, attention and KL of a batch whose shape has been seen, forward and backward: a wait in every layer is what made steps of
    a small model twice as long."""
    monkeypatch.setattr("winnow.kernels.select_short.LONGEST", longest)
    lengths, k = ((70, 9, 40) if GPU else (24, 9, 12)), 8
    tokens = sum(lengths)
    cu = known(device(bounds(lengths)), bounds(lengths).tolist())
    positions = torch.cat([torch.arange(n) for n in lengths]).to(DEV)
    faults = torch.zeros(1, dtype=torch.int32, device=DEV)
    heads = [randn(tokens, h, 16, seed=s).to(DEV, DTYPE).requires_grad_() for s, h in enumerate((4, 2, 2))]
    index = [
        randn(*shape, seed=9).to(DEV, DTYPE).requires_grad_() for shape in ((tokens, 3, 16), (tokens, 16), (tokens, 3))
    ]
    project = randn(20, 4 * 16, seed=8).to(DEV, DTYPE)

    def layer():
        sets = gpu_ops.select_packed(*(x.detach() for x in index), cu, positions, k, faults)
        out, lse = gpu_train.sparse_attention(*heads, cu, sets, 0.3)
        for cost in (None, omission(heads[2], out, project)):
            kl, rows = gpu_train.indexer_kl(*index, heads[0].detach(), heads[1].detach(), lse, cu, sets, 0.3, cost)
            (kl / rows).backward()
        out.sum().backward()

    layer()
    questions = asked(monkeypatch)
    if GPU:  # torch's own ear
        torch.cuda.set_sync_debug_mode("error")
    try:
        layer()
    finally:
        if GPU:
            torch.cuda.set_sync_debug_mode("default")
    assert questions == []
    gpu_ops.select_packed(*(x.detach() for x in index), cu, positions, k)  # without faults it has to look
    assert len(questions) == 1
    questions.clear()
    gpu_train.sparse_attention(
        *heads, device(bounds(lengths)), window_selection(positions, k), 0.3
    )  # bounds that nobody noted
    assert questions and set(questions) == {"tolist in on_host"}


@pytest.mark.parametrize("k", [3, 70])
def test_short_contexts_are_listed_whole(k, monkeypatch):
    """Every position up to a block's last query, and each query's bits: those of its set, whatever else its row holds. Sequences of no tokens,
    one, a unit of the lists and one more, the longest ones; the queries of a block that there are not have no bits."""
    limit = WHOLE if GPU else 90  # the interpreter is slow
    monkeypatch.setattr("winnow.kernels.key_lists.WHOLE", limit)
    lengths = (0, 1, 64, 65, limit)
    sets, size = random_sets(lengths, k, 4), 8
    sets.indices[5::9, 0] = 2**30  # past the end
    sets.indices[4::9, -1] = sets.indices[4::9, 0]  # twice
    blocks = query_blocks(device(bounds(lengths)), size)
    [lists] = key_lists(blocks, device(sets))
    [dense] = key_lists(blocks, None)
    assert lists.keys is dense.keys and lists.fixed and not dense.fixed and dense.bits is None
    bits = lists.bits.cpu()
    for block, (start, stop) in enumerate(zip(lists.ends, lists.stops.tolist(), strict=False)):
        first, rows, origin, _ = (x[block] for x in blocks.host)
        keys = [x for x in lists.keys[start:stop].tolist() if x >= 0]
        assert keys == list(range(origin, first + rows))
        words = bits[start // 32 : stop // 32]
        for i in range(size):
            found = {32 * w + b for w, word in enumerate(words[:, i].tolist()) for b in range(32) if word >> b & 1}
            own = first + i - origin
            wanted = {x for x in sets.indices[first + i].tolist() if 0 <= x <= own} if i < rows else set()
            assert found == wanted, (block, i)
    other = next(iter(key_lists(blocks, device(random_sets(lengths, k, 7)))))
    rows = len(sets.indices)
    assert other.order(0, other.ends[-1], rows) is lists.order(0, lists.ends[-1], rows), "sorted once a batch"
    longer = query_blocks(device(bounds((limit + 1,))), size)
    assert not next(iter(key_lists(longer, device(random_sets((limit + 1,), k))))).fixed


@pytest.mark.usefixtures("unions")
def test_the_layout_of_blocks_is_made_once():
    cu, sets = device(bounds((90,))), device(random_sets((90,), 6))
    blocks = query_blocks(cu, 8)
    a, b = (next(iter(key_lists(blocks, sets))) for _ in range(2))
    assert a.offsets is b.offsets and a.owners(1, 4, 64) is b.owners(1, 4, 64)
    assert a.owners(1, 4, 64).tolist() == [0] * (a.ends[2] // 64 - a.ends[1] // 64) + [1] * (
        a.ends[3] // 64 - a.ends[2] // 64
    ) + [2] * (a.ends[4] // 64 - a.ends[3] // 64)
    other = next(iter(key_lists(blocks, device(random_sets((90,), 9)))))
    assert other.ends != a.ends and other.offsets is not a.offsets  # another k, another room
    assert a.order(0, a.ends[-1], 90) is not a.order(0, a.ends[-1], 90), "keys are a layer's own"
    dense = [next(iter(key_lists(blocks, None))) for _ in range(2)]
    assert dense[0] is dense[1]


def test_add_rows_is_a_sum_by_key():
    keys = torch.tensor([5, -1, 2, 5, 0, 5, -1, 2], dtype=torch.int32)
    parts = randn(8, 20)
    want = torch.zeros(7, 20, dtype=torch.float64).index_add_(0, keys[keys >= 0].long(), parts[keys >= 0]) + 1
    out = torch.ones(7, 20, device=DEV)
    add_rows(parts.to(DEV, DTYPE), keys.to(DEV), out)
    close("sums", out, want)


@pytest.mark.parametrize("target", ["attention", "output"])
@pytest.mark.parametrize(("sparse", "whole"), [(False, 0), (True, 0), (True, 512)])
def test_indexer_kl(sparse, whole, target, monkeypatch):
    monkeypatch.setattr("winnow.kernels.key_lists.WHOLE", whole)
    cu, tokens = bounds(LENGTHS), sum(LENGTHS)
    sets = random_sets(LENGTHS, 8) if sparse else None
    attn_q, attn_k = randn(tokens, 4, 16, seed=4), randn(tokens, 2, 16, seed=5)
    values, weight = randn(tokens, 2, 24, seed=6), randn(20, 4 * 24, seed=7)
    out, lse = ref.sparse_attention(attn_q, attn_k, values, cu, sets, 0.2)
    projected = (values, out, weight) if target == "output" else None
    cost = projected and Omission(
        *(x.to(DEV, d) for x, d in zip(omission(*projected), (DTYPE, DTYPE, torch.float32, torch.float32), strict=True))
    )
    wide, narrow = leaves(randn(tokens, 3, 16, seed=1), randn(tokens, 16, seed=2), randn(tokens, 3, seed=3) * 0.25)
    want, want_rows = ref.indexer_kl(*wide, attn_q, attn_k, lse, cu, sets, 0.2, projected)
    want.backward()
    inputs = (attn_q.to(DEV, DTYPE), attn_k.to(DEV, DTYPE), lse.to(DEV, torch.float32))
    got, rows = indexer_kl(*narrow, *inputs, device(cu), device(sets), 0.2, cost)
    (2 * got).backward()
    assert rows == want_rows
    assert abs(float(got.detach()) - float(want.detach())) <= 2e-3 * float(want.detach())
    for name, a, b in zip("qkw", narrow, wide, strict=True):
        close(f"d{name}", a.grad, 2 * b.grad)
    slices = kl_and_gradients(
        *(x.detach() for x in narrow), *inputs, device(cu), device(sets), 0.2, cost, slice_bytes=1 << 10
    )
    close("sliced dk", slices[2][1], wide[1].grad)


def kept_sets(tokens, vocabulary, targets):
    """Every third row has no set (the whole vocabulary); the others about twenty tokens, the target among them."""
    generator = torch.Generator().manual_seed(5)
    indptr, ids = [0], []
    for row in range(tokens):
        if row % 3:
            ids += sorted({*torch.randint(0, vocabulary, (20,), generator=generator).tolist(), int(targets[row])})
        indptr.append(len(ids))
    return torch.tensor(indptr), torch.tensor(ids)


@pytest.mark.parametrize("with_sets", [False, True])
def test_token_logprobs(with_sets):
    tokens, vocabulary = 13, 150
    targets = torch.randint(0, vocabulary, (tokens,), generator=torch.Generator().manual_seed(1))
    temperature = torch.rand(tokens, generator=torch.Generator().manual_seed(2)) + 0.5
    kept = kept_sets(tokens, vocabulary, targets) if with_sets else None
    wide, narrow = leaves(randn(tokens, 24, seed=1), randn(vocabulary, 24, seed=2))
    by_logprob, by_entropy = randn(2, tokens, seed=3)
    want = ref.token_logprobs(*wide, targets, temperature.double(), kept)
    (want[0] @ by_logprob + want[1] @ by_entropy).backward()
    got = token_logprobs(*narrow, targets.to(DEV), temperature.to(DEV), kept, chunk_bytes=4 * 5 * 64, vocabulary=64)
    (got[0].double() @ by_logprob.to(DEV) + got[1].double() @ by_entropy.to(DEV)).backward()
    for name, a, b in zip(("logprob", "entropy"), got, want, strict=True):
        assert (a.double().cpu() - b).abs().max() <= 1e-4, name
    for name, a, b in zip(("hidden", "weight"), narrow, wide, strict=True):
        close(f"d {name}", a.grad, b.grad)


def test_target_outside_its_set_is_refused():
    hidden, weight = randn(2, 16).to(DEV, DTYPE), randn(30, 16, seed=1).to(DEV, DTYPE)
    kept = (torch.tensor([0, 2, 4]), torch.tensor([3, 7, 4, 9]))
    with pytest.raises(ValueError, match="token 5 of row 1"):
        token_logprobs(hidden, weight, torch.tensor([3, 5], device=DEV), torch.ones(2, device=DEV), kept)


def test_mla_attention():
    lengths, heads, k = (4, 0, 9), 5, 6
    cu, tokens, sets = bounds(lengths), sum(lengths), random_sets(lengths, k)
    wide, narrow = leaves(randn(tokens, heads, 576, seed=1), randn(tokens, 576, seed=2))
    grad = randn(tokens, heads, 512, seed=3)
    want, want_lse = ref.sparse_attention(wide[0], wide[1][:, None], wide[1][:, None], cu, sets, 0.05)
    want[..., :512].backward(grad)
    got, lse = mla_attention(*narrow, device(cu), device(sets), 0.05)
    got.backward(grad.to(DEV, DTYPE))
    close("out", got, want[..., :512])
    check_lse(lse, want_lse)
    for name, a, b in zip(("q", "kv"), narrow, wide, strict=True):
        close(f"d{name}", a.grad, b.grad)


def test_gradients_repeat_bit_for_bit():
    tokens, k = (40, 8) if GPU else (12, 4)
    cu, sets = device(bounds((tokens,))), device(random_sets((tokens,), k))
    q, k_, v, grad = (randn(tokens, 2, 16, seed=s).to(DEV, DTYPE) for s in range(4))
    out, lse = sparse_prefill(q, k_, v, cu, sets, 0.3)
    mla = [randn(tokens, *s, seed=6).to(DEV, DTYPE) for s in ((2, 576), (576,), (2, 512))]
    rows = absolute(sets, cu, tokens)
    mla_out, mla_lse = mla_prefill(*mla[:2], rows, 0.05)
    index = [randn(tokens, *s, seed=7).to(DEV, DTYPE) for s in ((3, 16), (16,), (3,))]
    hidden, weight = (randn(n, 16, seed=8).to(DEV, DTYPE).requires_grad_() for n in (tokens, 90))
    project = randn(20, 2 * 16, seed=9).to(DEV, DTYPE)

    def once():
        logprob, entropy = token_logprobs(
            hidden, weight, torch.arange(tokens, device=DEV), torch.ones(tokens, device=DEV), vocabulary=64
        )
        total, _, index_grads = kl_and_gradients(*index, q, k_, lse, cu, sets, 0.3, None)
        by_output = kl_and_gradients(*index, q, k_, lse, cu, sets, 0.3, omission(v, out, project))[2]
        return [
            *sparse_backward(grad, q, k_, v, out, lse, cu, sets, 0.3),
            *mla_backward(mla[2], *mla[:2], mla_out, mla_lse, rows, 0.05),
            total, *index_grads, *by_output, *torch.autograd.grad(logprob.sum() + entropy.sum(), (hidden, weight)),
        ]  # fmt: skip

    first = once()
    for _ in range(REPEATS - 1):
        for i, (a, b) in enumerate(zip(first, once(), strict=True)):
            assert torch.equal(a, b), f"result {i} differs from run to run"


@pytest.mark.parametrize("mla_heads", [4, 64] if GPU else [4])
def test_exact_prefill_is_decode_bit_for_bit(mla_heads):
    """Each token of a packed prefill against a decode from shuffled pages of another size, L much larger than k."""
    length, k, page = (600, 64, 16) if GPU else (24, 6, 4)
    sets = random_sets((length,), k, empty=False)
    order = torch.randperm(length // page + 1, generator=torch.Generator().manual_seed(1))[: -(-length // page)]
    table = order.int()[None].to(DEV)

    def pages(x):
        cache = torch.full((length // page + 2, page, *x.shape[1:]), float("nan"), dtype=DTYPE, device=DEV)
        for i, place in enumerate(order.tolist()):
            cache[place, : len(x[i * page : (i + 1) * page])] = x[i * page : (i + 1) * page]
        return cache

    q, k_, v = (randn(length, heads, 16, seed=heads).to(DEV, DTYPE) for heads in (4, 2, 2))
    mla_q, kv = randn(length, mla_heads, 576, seed=1).to(DEV, DTYPE), randn(length, 576, seed=2).to(DEV, DTYPE)
    cu = device(bounds((length,)))
    prefill = gqa_prefill_exact(q, k_, v, cu, device(sets), 0.3)
    prefill_mla = mla_prefill(mla_q, kv, absolute(device(sets), cu, length), 0.05, **mla_exact(mla_q))
    caches, cache = (pages(k_), pages(v)), pages(kv)
    for t in (*range(0, length, length // 5), length - 1):
        one = (sets.indices[t : t + 1].to(DEV), sets.counts[t : t + 1].to(DEV))
        seen = torch.tensor([t + 1], dtype=torch.int32, device=DEV)
        decode = gqa_decode(q[t : t + 1], *caches, table, seen, *one, scale=0.3, **EXACT)
        assert all(torch.equal(a[t], b[0]) for a, b in zip(prefill, decode, strict=True)), f"GQA, token {t}"
        decode = mla_decode(mla_q[t : t + 1], cache, table, seen, *one, scale=0.05, **mla_exact(mla_q))
        assert all(torch.equal(a[t], b[0]) for a, b in zip(prefill_mla, decode, strict=True)), f"MLA, token {t}"


@pytest.mark.skipif(not GPU, reason="the interpreter's other tests are fp32 already")
@pytest.mark.parametrize("sparse", [False, True])
def test_fp32_on_a_gpu(sparse):
    """Four bytes a number need smaller tiles: head dimension 128, compiled, close to float64."""
    length, k = 200, 16
    cu, sets = bounds((length,)), random_sets((length,), k) if sparse else None
    shapes = ((length, 4, 128), (length, 2, 128), (length, 2, 128))
    wide = [randn(*s, seed=i).requires_grad_() for i, s in enumerate(shapes)]
    narrow = [x.detach().to(DEV, torch.float32).requires_grad_() for x in wide]
    want, lse = ref.sparse_attention(*wide, cu, sets, 0.1)
    want.sum().backward()
    got, got_lse = sparse_attention(*narrow, device(cu), device(sets), 0.1)
    got.sum().backward()
    for a, b in ((got, want), *((x.grad, y.grad) for x, y in zip(narrow, wide, strict=True))):
        assert (a.detach().double().cpu() - b.detach()).abs().max() <= 2e-5 * b.detach().abs().max()
    index = [randn(*s, seed=7) for s in ((length, 3, 64), (length, 64), (length, 3))]
    want_kl = ref.indexer_kl(*index, wide[0], wide[1], lse, cu, sets, 0.1)[0]
    ours = (x.to(DEV, torch.float32) for x in index)
    got_kl = indexer_kl(*ours, narrow[0], narrow[1], got_lse, device(cu), device(sets), 0.1, None)[0]
    assert abs(float(got_kl) - float(want_kl)) <= 1e-5 * float(want_kl)


@pytest.mark.parametrize("sparse", [True, False])
def test_paged_prefill_is_the_torch_one(sparse):
    """Chunks at the end of paged contexts of other lengths, pages shuffled, one chunk empty, one a whole context."""
    queries, contexts, page, k = (5, 0, 9, 7), (23, 4, 9, 30), 4, 6
    generator = torch.Generator().manual_seed(0)
    table = torch.randperm(4 * 8, generator=generator).int().view(4, 8)
    caches = [randn(32, page, 2, 16, seed=s).to(DEV, DTYPE) for s in (1, 2)]
    q = randn(sum(queries), 6, 16, seed=3).to(DEV, DTYPE)
    parts = [random_sets((n,), k, seed=n) for n in contexts]
    last = [n - m for n, m in zip(contexts, queries, strict=True)]
    sets = Selection(
        *(torch.cat([getattr(p, x)[a:] for p, a in zip(parts, last, strict=True)]) for x in ("indices", "counts"))
    )
    given = (
        device(bounds(queries)),
        device(table),
        device(torch.tensor(contexts).int()),
        device(sets) if sparse else None,
        0.3,
    )
    got, want = gpu_ops.sparse_prefill(q, *caches, *given), paged_context_attention(q, *caches, *given)
    close("out", got[0], want[0])
    assert torch.equal(got[1].isinf(), want[1].isinf())
    close("lse", got[1].nan_to_num(neginf=0), want[1].nan_to_num(neginf=0))


def test_absorbed_prefill_reads_the_slots_of_its_pages():
    queries, contexts, page, k = (3, 4), (9, 13), 4, 5
    table = torch.tensor([[7, 2, 5, 0], [1, 6, 3, 4]], dtype=torch.int32)
    cache, q = (randn(*shape, seed=s).to(DEV, DTYPE) for s, shape in enumerate(((8, page, 576), (7, 2, 576))))
    parts = [random_sets((n,), k, seed=n, empty=False) for n in contexts]
    sets = Selection(*(torch.cat([getattr(parts[0], x)[6:], getattr(parts[1], x)[9:]]) for x in ("indices", "counts")))
    where = (device(bounds(queries)), device(torch.tensor(contexts).int()))
    got = gpu_ops.mla_prefill(q, cache, device(table), *where, device(sets), 0.05)[0]
    shared = cache[:, :, None]
    want = paged_context_attention(q, shared, shared, where[0], device(table), where[1], device(sets), 0.05)[0]
    close("out", got, want[..., :512])


@pytest.mark.parametrize("lengths", [(40, 7, 0, 25), (1,)])
def test_selection_of_packed_queries_is_the_torch_one(lengths):
    tokens, k = sum(lengths), 8
    q, keys, w = (
        randn(*shape, seed=s).to(DEV, DTYPE) for s, shape in enumerate(((tokens, 3, 16), (tokens, 16), (tokens, 3)))
    )
    positions = device(torch.cat([torch.arange(n) for n in lengths]))
    got = gpu_ops.select_packed(q, keys, w.float(), device(bounds(lengths)), positions, k)
    want = packed_selection(q, keys, w.float(), device(bounds(lengths)), positions, k, "indexer")
    assert torch.equal(got.counts, want.counts)
    same = (got.indices == want.indices).all(1)
    assert same.all() if not GPU else same.float().mean() > 0.9  # sums in another order may part near-ties
