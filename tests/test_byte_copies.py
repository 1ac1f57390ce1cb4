"""Copies of many tensors in one launch and the checksum's sums in one pass, against torch; bits, so on every device alike."""

import os
import weakref

import pytest
import torch

GPU = torch.cuda.is_available()
if not GPU:
    os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported
pytest.importorskip("triton")

from winnow.kernels import byte_copies  # noqa: E402
from winnow.rollout import weights  # noqa: E402
from winnow.rollout.transport import Layout, checksum, fill  # noqa: E402

pytestmark = [pytest.mark.gpu] if GPU else []
DEV = torch.device("cuda" if GPU else "cpu")


def words(count: int, seed: int = 0) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(-(2**63), 2**63 - 1, (count,), generator=draw).to(DEV)


def test_everything_arrives_and_nothing_else_is_touched() -> None:
    """Sizes about a piece's, empty and odd ones, views into a larger tensor, another dtype, a transposed one."""
    piece = byte_copies.PIECE // 4
    sources = [torch.randn(n, device=DEV) for n in (piece - 4, piece, piece + 4, 2 * piece + 8, 0, 3, 4)]
    sources += [
        torch.randn(8, 16, device=DEV).bfloat16(),
        torch.randn(16, 8, device=DEV).T,
        torch.randn(9, device=DEV)[1:],
    ]
    sources += [torch.randn(64, device=DEV)]
    around = torch.full((3, 128), 7.0, device=DEV)
    targets = [torch.zeros_like(s, memory_format=torch.contiguous_format) for s in sources[:-1]] + [around[1, 32:96]]
    targets[7] = targets[7].float()
    made = byte_copies.Copies(targets, sources)
    assert (
        len(made.held) == 7 and len(made.rest) == 4
    )  # of three words, of another dtype, transposed, off by four bytes
    assert all(not target.any() for target in targets[:-1])
    for turn in range(2):
        made.run()
        assert all(torch.equal(t, s.to(t.dtype)) for t, s in zip(targets, sources, strict=True))
        assert (
            (around[0] == 7).all()
            and (around[2] == 7).all()
            and (around[1, :32] == 7).all()
            and (around[1, 96:] == 7).all()
        )
        for source in sources:
            source.add_(turn + 1)  # the same copies again, of other numbers
    byte_copies.Copies([], []).run()


def test_copies_are_kept_for_tensors_that_stay_and_hold_none(monkeypatch) -> None:
    monkeypatch.setattr(weights, "copies", byte_copies.Copies)
    kept, made = weights.Kept(), []
    buffers = [torch.zeros(24, device=DEV) for _ in range(2)]

    def bucket(number: int, sources: list[torch.Tensor]) -> torch.Tensor:
        buffer = buffers[number % 2].fill_(-1)

        def targets() -> list[torch.Tensor]:
            made.append(number)
            parts = buffer[: sum(s.numel() for s in sources)].split([s.numel() for s in sources])
            return [part.view(s.shape) for part, s in zip(parts, sources, strict=True)]

        kept.run(number, buffer, [4 * part for part in range(len(sources))], sources, targets)
        return buffer

    a, b = torch.randn(2, 4, device=DEV), torch.randn(8, device=DEV)
    for turn in range(3):
        for number in range(2):
            assert torch.equal(bucket(number, [a, b])[:16], torch.cat([a.flatten(), b]))
        a.add_(turn), b.mul_(2)
    assert made == [0, 1], "found out once"
    moved = a.clone()
    assert torch.equal(bucket(0, [moved, b])[:8], moved.flatten()) and made == [0, 1, 0]
    assert torch.equal(bucket(0, [b, moved])[:8], b) and made == [0, 1, 0, 0], "in another order"
    turned = moved.T.contiguous().T  # torch copies it, so nothing is kept
    for _ in range(2):
        assert torch.equal(bucket(0, [turned, b])[:8], turned.flatten())
    assert made == [0, 1, 0, 0, 0, 0]
    gone = weakref.ref(a)
    del a
    assert gone() is None, "a learner that was replaced would stay in memory"


def test_kept_copies_know_where_in_the_buffer_they_go(monkeypatch) -> None:
    """The checksum is made of the filled buffer: it would not see that a tensor lies where it lay in another layout."""
    monkeypatch.setattr(weights, "copies", byte_copies.Copies)
    kept, buffers = weights.Kept(), [torch.zeros(96, dtype=torch.uint8, device=DEV) for _ in range(2)]
    tensors = {name: torch.randn(n, device=DEV) for name, n in (("long", 16), ("a", 4), ("b", 4))}
    for bucket_bytes in (
        48,
        64,
        96,
        48,
    ):  # "a" and "b" are in bucket 1 from byte 16 on, then from byte 0, then in bucket 0
        layout = Layout.of(tensors, 1, bucket_bytes)
        stream = torch.zeros(layout.nbytes, dtype=torch.uint8, device=DEV)
        free = [buffer[:bucket_bytes] for buffer in buffers]
        for number, data in fill(layout, iter(tensors.values()), lambda number: free[number % 2].fill_(9), kept):  # noqa: B023
            stream[layout.span(number)] = data
        assert all(torch.equal(found, tensors[name]) for name, found in layout.tensors(stream).items()), bucket_bytes


@pytest.mark.parametrize(
    "rows", [0, 1, 7, 8, 9, byte_copies.PROGRAMS, byte_copies.PROGRAMS + 1, 3 * byte_copies.PROGRAMS + 5]
)
def test_sums_are_those_of_torch(rows: int) -> None:
    matrix = words(rows * byte_copies.COLUMNS).view(-1, byte_copies.COLUMNS)
    columns, total = byte_copies.row_and_column_sums(matrix)
    assert torch.equal(columns, matrix.sum(0))
    numbers = torch.arange(rows, device=DEV)
    weights = (numbers * -0x61C8864680B583EB) ^ (numbers << 17) | 1
    assert total.tolist() == [int((matrix.sum(1) * weights).sum())]


@pytest.mark.parametrize("count", [2, 510, 512, 514, 512 * 40, 512 * 1100 + 6])
def test_a_checksum_is_the_same_on_every_device(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    data = words(count, 1).view(torch.uint8)
    if not GPU:  # the kernel's way, interpreted
        whole = count // 512 * 512
        columns, rows = byte_copies.row_and_column_sums(data.view(torch.int64)[:whole].view(-1, 512))
        assert torch.equal(columns, data.view(torch.int64)[:whole].view(-1, 512).sum(0)) and rows.shape == (1,)
    assert checksum(data).tolist() == checksum(data.cpu()).tolist()
    before = checksum(data).tolist()
    data[count * 4] += 1
    after = checksum(data).tolist()
    assert before[0] != after[0] and before[1] != after[1]
