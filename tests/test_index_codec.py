"""Packed index sets: exact whatever they hold, small where neighbours choose alike."""

import pickle

import numpy as np
import pytest

from winnow.rollout import index_codec
from winnow.rollout.index_codec import pack_sets, unpack_sets
from winnow.rollout.schema import IndexRecord


def drifting(layers, rows, k, changes, seed=0, dtype=np.uint16, first=None, share=1):
    """Sets of which `changes` entries are redrawn from row to row; `share` layers in a row choose the same."""
    rng = np.random.default_rng(seed)
    first = k if first is None else first
    made = np.empty((layers, rows, k), dtype=dtype)
    for layer in range(0, layers, share):
        chosen = set(rng.choice(first + 1, k, replace=False).tolist())
        for row in range(rows):
            for gone in rng.choice(sorted(chosen), changes, replace=False).tolist():
                chosen.discard(gone)
            left = sorted(set(range(first + row + 1)) - chosen)
            chosen |= set(rng.choice(left, k - len(chosen), replace=False).tolist())
            made[layer : layer + share, row] = sorted(chosen)
    return made


def same(indices, first):
    packed = pickle.loads(pickle.dumps(pack_sets(indices, first)))
    again = unpack_sets(packed)
    assert again.dtype == indices.dtype and again.shape == indices.shape
    np.testing.assert_array_equal(again, indices)
    for rows in {0, 1, indices.shape[1] // 2, indices.shape[1]}:
        np.testing.assert_array_equal(unpack_sets(packed, rows), indices[:, :rows])
    return packed


@pytest.mark.parametrize("cells", [1, 700, 1 << 23])
@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
@pytest.mark.parametrize(("k", "changes"), [(1, 1), (5, 0), (8, 8), (16, 3)])
def test_sets_survive_exactly_in_blocks_of_any_size(monkeypatch, cells, dtype, k, changes):
    monkeypatch.setattr(index_codec, "_CELLS", cells)
    packed = same(drifting(3, 40, k, changes, dtype=dtype), k)
    assert packed.raw is None


def test_short_rows_empty_rows_far_positions_and_no_rows():
    rng = np.random.default_rng(1)
    sets = np.full((2, 30, 12), 65535, dtype=np.uint16)
    for layer in range(2):
        for row in range(30):
            size = int(rng.integers(0, 13))  # 0 as well: an empty row is found by `records.decode`, not here
            sets[layer, row, :size] = np.sort(rng.choice(61 + row, size, replace=False))
    assert same(sets, 60).raw is None
    far = np.array([[[0, 70_000, 99_998], [1, 99_999, 100_001]]], dtype=np.int32)
    assert same(far, 100_000).raw is None
    same(np.zeros((2, 0, 4), dtype=np.uint16), 4)


@pytest.mark.parametrize("bad", [[3, 3, 4], [5, 4, 6], [1, 65535, 2], [1, 2, 60]])
def test_what_no_row_can_be_is_kept_as_it_is_and_found_by_name_later(bad):
    sets = drifting(2, 6, 3, 1)
    sets[1, 2] = bad
    assert same(sets, 3).raw is not None


def test_shares_of_raw_int32():
    def share(sets, first):
        return same(sets, first).nbytes / (4 * sets.size)

    slow, shared = drifting(4, 300, 32, 4, first=256), drifting(4, 300, 32, 4, first=256, share=4)
    assert share(slow, 256) < 0.085  # 4 of 32 entries change a row
    assert share(shared, 256) < 0.3 * share(slow, 256)  # three layers of four cost nothing but their head
    assert share(drifting(2, 200, 32, 32, first=400), 400) < 0.25  # no locality at all


def test_a_record_stays_small_until_it_is_read():
    sets = drifting(2, 50, 8, 1)
    record = IndexRecord(first=8, k=8, layers=(0, 1), indices=sets)
    arrived = pickle.loads(pickle.dumps(record))
    np.testing.assert_array_equal(arrived.indices, sets)
    assert arrived.nbytes == record.nbytes and len(pickle.dumps(record)) < record.nbytes + 700 < sets.nbytes
    cut = record.cut(20)
    assert cut.num_rows == 20 and record.num_rows == 50
    np.testing.assert_array_equal(cut.indices, sets[:, :20])
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(cut)).indices, sets[:, :20])


def test_a_damaged_stream_is_refused():
    packed = pack_sets(drifting(1, 40, 8, 2), 8)
    flipped = bytearray(packed.unary)
    flipped[3] ^= 0xFF
    with pytest.raises(ValueError, match="damaged on the way"):
        unpack_sets(
            type(packed)(
                shape=packed.shape,
                dtype=packed.dtype,
                first=8,
                heads=packed.heads,
                unary=bytes(flipped),
                low=packed.low,
            )
        )
