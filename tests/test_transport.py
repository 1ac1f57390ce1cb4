"""Weights over mapped memory and over a broadcast, between real processes: everything arrives, damage and deaths are named, nobody hangs."""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import os
import pickle
import signal
import threading
import time
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from winnow.rl import placement
from winnow.rl.config import ConfigError, make_config
from winnow.rl.transports import transport_of
from winnow.rollout import transfer
from winnow.rollout.broadcast import Group, make_group, no_multicast
from winnow.rollout.ipc import Bounce
from winnow.rollout.transfer import Receiver, Sender
from winnow.rollout.transport import (
    Channel,
    Layout,
    LinkBroken,
    Member,
    Order,
    Ticket,
    check_sums,
    checksum,
    fill,
    written,
)
from winnow.rollout.weights import Kept, WeightError, copy_into, untied

KINDS = ["ipc", "nccl"]
BUCKET = 1 << 12
CPU = torch.device("cpu")


class Net(nn.Module):
    """Odd sizes, a tied tensor, a scalar, a tensor larger than a bucket."""

    def __init__(self, seed: int, width: int = 37) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embed = nn.Embedding(61, width)
        self.norm = nn.LayerNorm(width).to(torch.bfloat16)
        self.head = nn.Linear(width, 61, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("scale", torch.tensor(float(seed), dtype=torch.float64))
        self.register_buffer("empty", torch.empty(0, 3))


# ---------------------------------------------------------------------------------------------------------------------- the stream


@pytest.mark.parametrize("bucket", [16, 48, 1 << 12, 1 << 20])
def test_a_stream_of_any_bucket_size_holds_every_byte(bucket: int) -> None:
    tensors = {**untied(Net(1).state_dict()), "turned": torch.randn(5, 7).T, "wide": torch.randn(3, 2000)}
    layout = Layout.read(Layout.of(tensors, 4, bucket).write())
    assert layout == Layout.of(tensors, 4, bucket) and all(piece.offset % 16 == 0 for piece in layout.pieces)
    buffers = [torch.full((bucket,), 255, dtype=torch.uint8) for _ in range(2)]
    stream, numbers = torch.full((layout.nbytes,), 77, dtype=torch.uint8), []
    for number, data in fill(layout, iter(tensors.values()), lambda number: buffers[number % 2], Kept()):
        stream[layout.span(number)] = data
        numbers.append(number)
    assert numbers == list(range(layout.num_buckets))
    found = layout.tensors(stream)
    assert list(found) == list(tensors)
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name
    assert {name for number in numbers for name in layout.inside(number)} == set(tensors) - {"empty"}
    with pytest.raises(ValueError, match=r"cluster\.bucket_mb"):
        Layout.of(tensors, 4, 17)


@pytest.mark.parametrize("other", [torch.zeros(1), torch.zeros(4, dtype=torch.float16), torch.zeros(2, 2)])
def test_a_tensor_that_is_not_what_was_announced_is_refused(other: torch.Tensor) -> None:
    """One copy for many tensors would broadcast a smaller one, and cast another dtype."""
    layout = Layout.of({"a": torch.zeros(3), "b": torch.zeros(4)}, 5, 64)
    with pytest.raises(WeightError, match=r"version 5: tensor 'b' is .* was announced"):
        list(fill(layout, iter([torch.zeros(3), other]), lambda number: torch.zeros(64, dtype=torch.uint8), Kept()))


@pytest.mark.parametrize("words", [2, 510, 512, 514, 512 * 9 + 6])
def test_a_checksum_sees_flips_swaps_shifts_and_zeros(words: int) -> None:
    data = torch.randint(0, 256, (8 * words,), generator=torch.Generator().manual_seed(words), dtype=torch.uint8)
    before = written(checksum(data))
    assert before == written(checksum(data.clone())) and len(before) == 32
    generator = torch.Generator().manual_seed(1)
    for _ in range(40):
        place, bit = (int(torch.randint(0, n, (1,), generator=generator)) for n in (8 * words, 8))
        flipped = data.clone()
        flipped[place] ^= 1 << bit
        sums = checksum(flipped)
        assert all(sums != checksum(data)), (place, bit)  # either half alone sees it
    halves = data.view(2, -1).flip(0).reshape(-1)
    for other in (halves, data.roll(8), data.roll(8 * 512), data.clone().fill_(0)):
        assert torch.equal(other, data) or written(checksum(other)) != before


def test_a_damaged_bucket_is_named_with_both_checksums() -> None:
    layout = Layout.of({"a": torch.zeros(8), "b": torch.zeros(100), "c": torch.zeros(4)}, 7, 64)
    sent = torch.arange(2 * layout.num_buckets).view(-1, 2)
    arrived = sent.clone()
    check_sums(layout, sent, arrived)
    arrived[2, 1] += 1
    wanted = rf"version 7: bucket 2 of 7 \(tensors 'b' to 'b'\) arrived with checksum {written(arrived[2])}, sent with {written(sent[2])}"
    with pytest.raises(WeightError, match=wanted):
        check_sums(layout, sent, arrived)


# ----------------------------------------------------------------------------------------------------------------- real processes


def engine(ticket: Ticket, seed: int, how: str, out: str, again: Any) -> None:
    """One engine's process. how: fine, narrow, damaged, dies, stops, dead (it never comes). Then the tickets of `again`, as they come."""
    torch.set_num_threads(1)
    receiver, model = Receiver(), Net(seed, 36 if how == "narrow" else 37)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    Path(out, f"{ticket.rank}.pid").write_text(str(os.getpid()))
    if how == "dead":
        os.kill(os.getpid(), signal.SIGKILL)
    seen = 0

    def faulty(data: torch.Tensor) -> torch.Tensor:
        nonlocal seen
        seen += 1
        if how == "damaged" and seen == 2:
            data[5] ^= 1
        if how in ("dies", "stops") and seen == 2:
            os.kill(os.getpid(), signal.SIGKILL if how == "dies" else signal.SIGSTOP)
        return checksum(data)

    transfer.checksum = faulty  # type: ignore[attr-defined]
    answer: dict[str, Any] = {"begin": time.monotonic()}
    while True:
        try:
            tensors = receiver.receive(ticket, model)
            copy_into(model, tensors, ticket.version)
            answer["said"] = f"version {ticket.version}"
        except Exception as error:
            answer["said"] = f"{type(error).__name__}: {error}"
            answer["kept"] = all(torch.equal(before[n], t) for n, t in model.state_dict().items())
        answer |= {
            "seconds": time.monotonic() - answer["begin"],
            "weights": {n: t.clone() for n, t in model.state_dict().items()},
        }
        Path(out, f"{ticket.session}.{ticket.rank}.tmp").write_bytes(pickle.dumps(answer))
        Path(out, f"{ticket.session}.{ticket.rank}.tmp").rename(Path(out, f"{ticket.session}.{ticket.rank}"))
        ticket = again.get(timeout=60)
        if ticket is None:
            return


def engines_context() -> Any:
    """Forks of a process that has imported everything and runs no thread: a fork of this one, after a thousand tests and with the sender's
    threads at work, now and then begins with a lock that nobody will ever release."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "torch.distributed", "winnow.rollout.transfer", __name__])
    return context


class Hall:
    """A sender in this process and engines in processes of their own."""

    def __init__(
        self, kind: str, hows: tuple[str, ...], out: Path, stall_s: float = 20.0, wait_s: float = 20.0
    ) -> None:
        self.kind, self.hows, self.out, self.stall_s, self.wait_s = kind, hows, out, stall_s, wait_s
        self.sender = Sender("127.0.0.1", CPU)
        self.members = tuple(
            Member(number=i, name=f"worker {i}", key=f"k{i}", host="h", device="cpu") for i, _ in enumerate(hows)
        )
        context = engines_context()
        self.queues = [context.Queue() for _ in hows]
        first = [self.ticket("s1", "g1", 1, rank, self.members) for rank, _ in enumerate(hows, 1)]
        self.processes = [
            context.Process(target=engine, args=(t, 50 + t.rank, how, str(out), queue))
            for t, how, queue in zip(first, hows, self.queues, strict=True)
        ]
        for process in self.processes:
            process.start()

    def wait_for_processes(self) -> None:
        deadline = time.monotonic() + 40
        while not all((self.out / f"{rank}.pid").exists() for rank, _ in enumerate(self.hows, 1)):
            assert time.monotonic() < deadline, "an engine's process does not start"
            time.sleep(0.02)

    def ticket(self, session: str, group: str, version: int, rank: int, members: tuple[Member, ...]) -> Ticket:
        return Ticket(
            kind=self.kind, version=version, address=self.sender.address, session=session, group=group, rank=rank, world=len(members) + 1,
            wait_s=self.wait_s, stall_s=self.stall_s,
        )  # fmt: skip

    def send(
        self, model: nn.Module, version: int = 1, session: str = "s1", group: str = "g1", members: Any = None
    ) -> dict[int, str]:
        members = self.members if members is None else members
        named = untied(model.state_dict())
        left = iter(named.values())
        order = Order(ticket=self.ticket(session, group, version, 0, members), members=members)
        report = self.sender.send(order, Layout.of(named, version, BUCKET), left)
        assert next(left, None) is None, "the other ranks of the learner would wait for their gathers"
        return report

    def again(self, model: nn.Module, version: int, session: str, group: str, ranks: tuple[int, ...]) -> dict[int, str]:
        members = tuple(self.members[rank - 1] for rank in ranks)
        for place, rank in enumerate(ranks, 1):
            self.queues[rank - 1].put(self.ticket(session, group, version, place, members))
        return self.send(model, version, session, group, members)

    def answer(self, rank: int, session: str = "s1") -> dict[str, Any]:
        path, deadline = self.out / f"{session}.{rank}", time.monotonic() + 40
        while not path.exists():
            assert time.monotonic() < deadline, f"engine {rank} hangs"
            time.sleep(0.02)
        return pickle.loads(path.read_bytes())

    def __enter__(self) -> Hall:
        return self

    def __exit__(self, *_: object) -> None:
        for process, queue, how in zip(self.processes, self.queues, self.hows, strict=True):
            queue.put(None)
            process.join(0.0 if how == "stops" else 5.0)
            if process.is_alive():
                process.kill()
                process.join(5.0)


def equal(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize("kind", KINDS)
def test_all_engines_get_every_version_and_stay_together(kind: str, tmp_path: Path) -> None:
    with Hall(kind, ("fine", "fine"), tmp_path) as hall:
        for version, group in ((1, "g1"), (2, "g1"), (3, "g2")):  # the same group twice, then a new one
            model = Net(version)
            report = hall.send(model) if version == 1 else hall.again(model, version, f"s{version}", group, (1, 2))
            assert report == {0: "ok", 1: "ok"}
            for rank in (1, 2):
                answer = hall.answer(rank, f"s{version}")
                assert answer["said"] == f"version {version}" and equal(answer["weights"], model.state_dict())
        assert hall.sender.channel.store.num_keys() < 40, "what was said in a transfer is forgotten after it"


@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_bucket_is_refused_and_the_engine_keeps_its_weights(kind: str, tmp_path: Path) -> None:
    with Hall(kind, ("damaged", "fine"), tmp_path) as hall:
        report = hall.send(Net(1))
        bad, good = hall.answer(1), hall.answer(2)
        assert bad["kept"] and "bucket 1 of 3 (tensors 'embed.weight'" in bad["said"] and "sent with" in bad["said"]
        assert report[0] == bad["said"] and report[1] == "ok" and equal(good["weights"], Net(1).state_dict())
        assert hall.again(Net(2), 2, "s2", "g2", (1, 2)) == {0: "ok", 1: "ok"}  # the next one is whole
        assert equal(hall.answer(1, "s2")["weights"], Net(2).state_dict())


@pytest.mark.parametrize("kind", KINDS)
def test_a_tensor_that_does_not_fit_ends_it_before_anything_travels(kind: str, tmp_path: Path) -> None:
    with Hall(kind, ("fine", "narrow"), tmp_path) as hall:
        report = hall.send(Net(1))
        assert "'embed.weight' has shape (61, 37), the model wants (61, 36)" in hall.answer(2)["said"]
        other = hall.answer(1)  # told why, and what it has is what it had
        assert other["kept"] and other["said"].startswith(
            "LinkBroken: worker 1 takes no part: refused: weights of version 1"
        )
        assert "ok" not in report.values()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("how", ["dies", "stops", "dead"])
def test_an_engine_that_dies_or_hangs_holds_up_nobody(
    kind: str, how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transfer, "GRACE_S", 1.0)
    with Hall(kind, ("fine", how), tmp_path, stall_s=2.0, wait_s=6.0) as hall:
        hall.wait_for_processes()  # a limit is not there to time how a machine starts them
        begin = time.monotonic()
        report = hall.send(Net(1))
        assert time.monotonic() - begin < 15
        left = hall.answer(1)
        assert report[1].startswith("worker 1") and "said nothing" in report[1], "it is named"
        assert left["seconds"] < 15
        if left["said"] == "version 1":  # the other one went when there was nothing left to wait for
            assert how != "dead" and equal(left["weights"], Net(1).state_dict())
        else:
            assert left["said"].startswith("LinkBroken: ") and left["kept"]
        if how != "stops":
            assert hall.processes[1].exitcode == -signal.SIGKILL
        assert hall.again(Net(2), 2, "s2", "g2", (1,)) == {0: "ok"}  # the group without it
        assert equal(hall.answer(1, "s2")["weights"], Net(2).state_dict())


@pytest.mark.parametrize("kind", KINDS)
def test_a_learner_that_fails_on_the_way_says_so_at_once(kind: str, tmp_path: Path) -> None:
    with Hall(kind, ("fine",), tmp_path) as hall:
        named = untied(Net(1).state_dict())

        def tensors() -> Any:
            yield next(iter(named.values()))
            raise MemoryError("no room for the next one")

        order = Order(ticket=hall.ticket("s1", "g1", 1, 0, hall.members), members=hall.members)
        with pytest.raises(MemoryError, match="no room"):
            hall.sender.send(order, Layout.of(named, 1, BUCKET), tensors())
        answer = hall.answer(1)
        assert answer["kept"] and answer["seconds"] < 10 < hall.stall_s and answer["said"].startswith("LinkBroken: ")
        assert kind != "ipc" or "the learner failed: MemoryError: no room for the next one" in answer["said"]
        assert hall.again(Net(2), 2, "s2", "g2", (1,)) == {0: "ok"}
        assert equal(hall.answer(1, "s2")["weights"], Net(2).state_dict())


# -------------------------------------------------------------------------------------------------------------- what NCCL does not say


@pytest.fixture
def channel() -> Channel:
    return Channel("127.0.0.1:0", host=True)


@pytest.fixture
def group(channel: Channel) -> Group:
    return Group("g", channel.address, 0, 1, CPU, 1.0)


def test_what_is_under_way_is_held_until_an_abort_is_through(group: Group) -> None:
    """The device may write into it until then, and its memory would be somebody else's."""
    begun, through = threading.Event(), threading.Event()

    class Work:
        def wait(self, limit: Any = None) -> None:
            raise RuntimeError("timed out")

    class Stuck:
        def broadcast(self, data: torch.Tensor, root: int) -> Work:
            return Work()

        def abort(self) -> None:
            begun.set()
            through.wait(10)

    assert not group._under_way, "what is done is let go"
    group._group = Stuck()
    data = torch.zeros(1 << 16, dtype=torch.uint8)
    held, work = weakref.ref(data), group.start(data)
    del data
    with pytest.raises(LinkBroken, match="group g failed: timed out"):
        group.wait(work)
    group.abort()
    del work
    assert begun.wait(5)
    gc.collect()
    assert held() is not None
    through.set()
    deadline = time.monotonic() + 5
    while held() is not None and time.monotonic() < deadline:
        time.sleep(0.01)
    assert held() is None


def test_a_broadcast_is_done_when_the_device_is_and_not_before(group: Group, monkeypatch: pytest.MonkeyPatch) -> None:
    """NCCL's own word for an error is `completed`, and waiting for it raises nothing."""
    waited: list[Any] = []
    current = SimpleNamespace(wait_event=waited.append)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: current)
    done = SimpleNamespace(query=lambda: False)
    work: Any = SimpleNamespace(is_completed=lambda: True, wait=lambda: True)
    aside: Any = SimpleNamespace(record_event=lambda: done)
    with pytest.raises(LinkBroken, match="made no progress for 1 s"):
        group._wait_for_device(work, aside)
    assert not waited, "the engine's own stream must not wait for what hangs"
    done.query = lambda: True
    group._wait_for_device(work, aside)
    assert waited == [done]


def test_a_group_of_nccl_cannot_end_its_process_nor_use_multicast(
    channel: Channel, monkeypatch: pytest.MonkeyPatch
) -> None:
    names, seen = ("TORCH_NCCL_ASYNC_ERROR_HANDLING", "TORCH_NCCL_ENABLE_MONITORING", "NCCL_NVLS_ENABLE"), []

    class FakeGroup:
        Options = SimpleNamespace

        def __init__(self, *_: Any) -> None:
            seen.append([os.environ.get(name) for name in names])

    monkeypatch.setattr(torch.distributed, "ProcessGroupNCCL", FakeGroup, raising=False)
    for name in names:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(names[0], "3")
    make_group("g", channel.address, 0, 1, torch.device("cuda"), 1.0)
    assert seen == [["0", "0", "0"]] and os.environ[names[0]] == "3" and names[1] not in os.environ
    monkeypatch.setenv("NCCL_NVLS_ENABLE", "1")  # the user's
    no_multicast()
    assert os.environ["NCCL_NVLS_ENABLE"] == "1"


def test_memory_that_cannot_be_shared_says_what_to_set() -> None:
    def refuse() -> None:
        raise RuntimeError("invalid argument\nframe #0")

    bounce = Bounce(16, CPU)
    os.close(bounce._fd)
    bounce._fd = -1
    bounce.data = SimpleNamespace(untyped_storage=lambda: SimpleNamespace(_share_cuda_=refuse))  # type: ignore[assignment]
    with pytest.raises(LinkBroken, match=r"cannot be shared \(invalid argument\): set cluster.transport to store"):
        bounce.handle()


def test_colocated_processes_share_bundles() -> None:
    shares = (
        "cluster.colocate=true",
        "cluster.learner_gpus=0.5",
        "cluster.worker_gpus=0.25",
        "rollout.workers=4",
        "learner.ranks=2",
    )
    assert (
        placement.bundles(config_of(*shares)) == [{"CPU": 3.0, "GPU": 1.0}] * 2
    )  # a rank with two workers on each GPU
    small = ("cluster.colocate=true", "cluster.learner_gpus=0.25", "cluster.worker_gpus=0.5", "learner.ranks=2")
    assert placement.bundles(config_of(*small)) == [{"CPU": 3.0, "GPU": 1.0}]
    assert placement.bundles(config_of("cluster.colocate=true", "rollout.workers=3")) == [{"CPU": 4.0}]
    from winnow.rl.plan import placement as planned

    lines = planned(config_of(*shares))
    assert (
        "learner rank 0 with rollout worker 0 with rollout worker 2: 3 CPU, 1 GPU" in lines[1]
        and "travel by ipc" in lines[-1]
    )


def test_a_channel_says_who_was_waited_for_and_stops_when_told() -> None:
    channel = Channel("127.0.0.1:0", host=True)
    begin = time.monotonic()
    with pytest.raises(LinkBroken, match=r"worker 3 said nothing for 0 s"):
        channel.hear("s/ready/1", 0.3, "worker 3")
    Channel(channel.address).say("s/stop", "worker 2 is gone")
    with pytest.raises(LinkBroken, match="worker 2 is gone"):
        channel.hear("s/ready/1", 60, "worker 3", "s")
    assert time.monotonic() - begin < 5
    with pytest.raises(LinkBroken, match="no connection to the learner"):
        Channel("127.0.0.1:1", connect_s=1.0)


def learner_with_a_store(address: Any) -> None:
    channel = Channel("127.0.0.1:0", host=True)
    address.put(channel.address)
    time.sleep(60)


def test_a_learner_that_is_stopped_does_not_hold_its_engines() -> None:
    """Its store answers nothing then, not even that there is nothing."""
    context = engines_context()
    address = context.Queue()
    process = context.Process(target=learner_with_a_store, args=(address,), daemon=True)
    process.start()
    channel, receiver = Channel(address.get(timeout=20)), Receiver()
    assert process.pid is not None
    os.kill(process.pid, signal.SIGSTOP)
    begin = time.monotonic()
    ticket = Ticket(
        kind="nccl",
        version=1,
        address=channel.address,
        session="s",
        group="g",
        rank=1,
        world=2,
        wait_s=1.0,
        stall_s=1.0,
    )
    receiver._channel = channel
    with pytest.raises(LinkBroken, match=r"an answer of .* where the learner was waited for"):
        receiver.receive(ticket, Net(1))
    assert time.monotonic() - begin < 10 and receiver._channel is None
    process.kill()
    process.join(5)


# ------------------------------------------------------------------------------------------------------------------- the choice


def config_of(*overrides: str) -> Any:
    return make_config({"model": {"path": "m"}, "domains": [{"name": "d", "source": "lookup"}]}, overrides)


@pytest.mark.parametrize(
    ("overrides", "chosen"),
    [
        ((), "store"),
        (("cluster.learner_gpus=1", "cluster.worker_gpus=1"), "nccl"),
        (("cluster.learner_gpus=0.5", "cluster.worker_gpus=0.5"), "store"),
        (("cluster.learner_gpus=0.5", "cluster.worker_gpus=0.5", "cluster.colocate=true"), "ipc"),
        (("cluster.learner_gpus=1",), "store"),
        (("cluster.transport=nccl",), "nccl"),
        (("cluster.transport=ipc", "cluster.colocate=true"), "ipc"),
        (("cluster.address=here", "cluster.learner_gpus=0.5", "cluster.worker_gpus=0.5"), "store"),
        (("cluster.learner_gpus=1", "cluster.worker_gpus=1", "schedule.sync_every=2", "indexer.min_overlap=0"), "store"),
        (("cluster.colocate=true", "learner.ranks=2", "rollout.workers=4", "cluster.learner_gpus=.5", "cluster.worker_gpus=.25"), "ipc"),
    ],
)  # fmt: skip
def test_the_transport_follows_the_placement(overrides: tuple[str, ...], chosen: str) -> None:
    assert transport_of(config_of(*overrides)) == chosen


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("cluster.transport=ipc",), "are placed apart: set cluster.colocate=true"),
        (("cluster.transport=ipc", "cluster.learner_gpus=1", "cluster.worker_gpus=1"), "are placed apart: set cluster.colocate=true"),
        (("cluster.transport=nccl", "cluster.learner_gpus=1"), "needs a GPU on both sides, or on neither"),
        (("cluster.transport=nccl", "cluster.learner_gpus=0.5", "cluster.worker_gpus=0.5"), "refuses two processes on one GPU"),
        (("cluster.transport=nccl", "cluster.colocate=true", "cluster.learner_gpus=0.5", "cluster.worker_gpus=0.5"), "two processes on one"),
        (("cluster.colocate=true", "cluster.learner_gpus=1", "cluster.worker_gpus=1"), "which makes 2: give each a share"),
        (
            ("cluster.colocate=true", "learner.ranks=2", "rollout.workers=3", "cluster.learner_gpus=.5", "cluster.worker_gpus=.3"),
            "set rollout.workers to a multiple of 2",
        ),
        (("cluster.colocate=true", "cluster.learner_gpus=1"), "give each a share"),
        (("cluster.transport=store", "cluster.address=here"), "leave cluster.transport at auto"),
        (("cluster.transport=nccl", "schedule.sync_every=2"), "set cluster.transport to store, or sync_every to 1"),
        (("cluster.transport=shm",), "must be one of auto, store, ipc, nccl"),
    ],
)  # fmt: skip
def test_a_transport_that_cannot_work_is_refused_with_the_config(overrides: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        config_of(*overrides)
    assert message in str(error.value)
