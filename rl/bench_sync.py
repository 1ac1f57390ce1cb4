"""`winnow bench sync`: how long new weights take from a learner's process to an engine's, by each transport, checksums on.

    two Ray actors, one with the weights, one with another model of the shape ─ transfer, loaded ─> seconds; beside them the raw rate

Raw rates: of nccl the process group's own broadcast of as many bytes, of ipc one copy of as many bytes on the device, of store a put and a
get of one array. `share_of_nccl` is of the raw broadcast of the same run, where there was one. `engine_s` says where the engine's time
went: until it had all and had compared the checksums, and to load it. Every run sends other weights, and what arrived is compared with
what was sent at the end.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from winnow.rl.bench_models import SHAPES, random_model
from winnow.rollout.transport import Layout, Member, Order, Ticket, checksum, fill, own_device, written
from winnow.rollout.weights import Kept

PARTS = ("nccl", "ipc", "store")  # the broadcast first: its raw rate is what the others are compared with too
FULL = {"qwen3-1.7b": {"vocab_size": 151936, "tie_word_embeddings": True}}  # shapes whose head other benches cut
LIMIT_S = 120.0  # of one call
STALL_S = 20.0
REPEATS = {"nccl": 9, "ipc": 9, "store": 3}


class Peer:
    """One end. Both ends are this class: a model of the shape, a sender, a receiver. gpu: whether on one."""

    def __init__(self, shape: str, layers: int | None, gpu: bool, threads: int, seed: int) -> None:
        from winnow.rollout.transfer import Receiver, Sender

        torch.set_num_threads(threads)
        self.device = torch.device("cuda" if gpu else "cpu")
        dtype = torch.bfloat16 if gpu else torch.float32
        self.model = random_model(shape, layers, dtype, str(self.device), changes=FULL.get(shape))
        self.sender, self.receiver, self.seed = Sender("127.0.0.1", self.device), Receiver(), seed

    def named(self) -> dict[str, Tensor]:
        from winnow.rollout.weights import state_of, untied

        return untied(state_of(self.model))

    def about(self) -> dict[str, Any]:
        return {
            "address": self.sender.address,
            "device": own_device(self.device),
            "bytes": sum(t.nbytes for t in self.named().values()),
        }

    @torch.no_grad()
    def change(self) -> None:
        """Other weights, as an update would make them."""
        for tensor in self.model.parameters():
            tensor.mul_(1.01).add_(1e-3 * (1 + self.seed))
        self._settle()

    def send(self, order: Order, bucket_bytes: int) -> dict[int, str]:
        named = self.named()
        return self.sender.send(order, Layout.of(named, order.ticket.version, bucket_bytes), iter(named.values()))

    def receive(self, ticket: Ticket) -> dict[str, float]:
        begin = time.perf_counter()
        tensors = self.receiver.receive(ticket, self.model)
        there = time.perf_counter()
        self._load(tensors, ticket.version)
        return {"receive": there - begin, "load": time.perf_counter() - there}

    def put(self, version: int) -> list[Any]:
        import ray

        from winnow.rollout.weights import pack

        return [ray.put(pack(self.model.state_dict(), version))]

    def take(self, update: Any) -> dict[str, float]:
        from winnow.rollout.weights import unpack

        begin = time.perf_counter()
        tensors = dict(unpack(update))
        there = time.perf_counter()
        self._load(tensors, update.version)
        return {"receive": there - begin, "load": time.perf_counter() - there}

    def digest(self) -> list[str]:
        """Checksums of all weights."""
        named, sums = self.named(), []
        layout = Layout.of(named, 0, 1 << 26)
        buffer = torch.zeros(1 << 26, dtype=torch.uint8, device=self.device)
        for _, bucket in fill(layout, iter(named.values()), lambda number: buffer.zero_(), Kept()):
            sums.append(written(checksum(bucket)))
        return sums

    def raw_copy(self, nbytes: int, repeats: int) -> float:
        """Median seconds of one copy of `nbytes` on the device, bucket by bucket of 256 MB."""
        size = min(nbytes, 1 << 28)
        left, right = (torch.zeros(size, dtype=torch.uint8, device=self.device) for _ in range(2))

        def once() -> None:
            for _ in range(max(1, nbytes // size)):
                left.copy_(right)

        return self._median(once, repeats) * nbytes / (max(1, nbytes // size) * size)

    def raw_broadcast(self, ticket: Ticket, nbytes: int, repeats: int) -> float:
        """Median seconds of broadcasts of `nbytes` in all, in a bare group, without checksums."""
        from winnow.rollout.broadcast import Group

        group = Group("raw", ticket.address, ticket.rank, 2, self.device, STALL_S)
        size = min(nbytes, 1 << 28)
        data = torch.zeros(size, dtype=torch.uint8, device=self.device)

        def once() -> None:
            for work in [group.start(data) for _ in range(max(1, nbytes // size))]:
                group.wait(work)

        seconds = self._median(once, repeats) * nbytes / (max(1, nbytes // size) * size)
        group.abort()
        return seconds

    def raw_put(self, nbytes: int) -> list[Any]:
        import numpy as np
        import ray

        return [ray.put(np.zeros(nbytes, dtype=np.uint8))]

    def raw_get(self, array: Any) -> int:
        return int(array[:: 1 << 12].sum())

    def _load(self, tensors: dict[str, Tensor], version: int) -> None:
        from winnow.rollout.weights import copy_into

        copy_into(self.model, tensors, version)
        self._settle()

    def _median(self, once: Callable[[], None], repeats: int) -> float:
        times = []
        for _ in range(repeats + 1):
            self._settle()
            begin = time.perf_counter()
            once()
            self._settle()
            times.append(time.perf_counter() - begin)
        return statistics.median(times[1:])

    def _settle(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def bench_sync(
    shape: str, device: str, parts: Sequence[str] = PARTS, layers: int | None = None, threads: int = 1, bucket_mb: int = 256,
    repeats: int | None = None, say: Callable[[str], object] = print,
) -> dict[str, Any]:  # fmt: skip
    """A row for each part, said as soon as it is there. ValueError: an unknown part or shape. A part that this machine cannot run is a row
    that says why."""
    import ray

    from winnow.rl.cluster import ray_session
    from winnow.rl.config import Config

    if shape not in SHAPES:
        raise ValueError(f"bench sync: shape {shape!r} is unknown: the shapes are {', '.join(SHAPES)}")
    if unknown := [part for part in parts if part not in PARTS]:
        raise ValueError(f"bench sync: {unknown[0]!r} is unknown: the transports are {', '.join(PARTS)}")
    gpu, rows, broadcast = device.startswith("cuda"), [], 0.0
    peers: list[Any] = []
    kept = 0.0  # the share of a GPU that the peers have
    with ray_session(Config()):
        for part in parts:
            row: dict[str, Any] = {"row": f"sync {part}", "shape": shape, "device": device.partition(":")[0]}
            gpus = torch.cuda.device_count() if gpu else 0
            if part == "nccl" and gpu and gpus < 2:
                row["refused"] = (
                    f"a broadcast by NCCL needs a GPU for each end, and this machine has {gpus}: here it is ipc"
                )
            else:
                share = 0.0 if not gpu else 1.0 if part == "nccl" else 0.5
                if not peers or share != kept:
                    for peer in peers:
                        ray.kill(peer)
                    peers, kept = start_peers(shape, layers, gpu, threads, share), share
                try:
                    row |= measure(part, peers, bucket_mb << 20, repeats or REPEATS[part])
                    broadcast = row["raw_gb_per_s"] if part == "nccl" else broadcast
                    row |= {"share_of_nccl": round(row["gb_per_s"] / broadcast, 3)} if broadcast else {}
                except Exception as error:  # the other parts may work, with other processes
                    row["failed"] = f"{type(error).__name__}: {str(error).splitlines()[-1][:300]}"
                    for peer in peers:
                        ray.kill(peer)
                    peers = []
            rows.append(row)
            say(json.dumps(row))
    name = torch.cuda.get_device_name() if gpu else "cpu"
    return {"bench": "sync", "torch": torch.__version__, "device": name, "threads": threads, "figures": {"rows": rows}}


def start_peers(shape: str, layers: int | None, gpu: bool, threads: int, share: float) -> list[Any]:
    """The learner's end and the engine's. share: of a GPU, for each; 0 without one."""
    import ray

    actor: Any = ray.remote(Peer)
    options = {
        "num_cpus": 0,
        "num_gpus": share,
        "runtime_env": {"env_vars": {"OMP_NUM_THREADS": str(threads)}},
    }
    return [actor.options(**options).remote(shape, layers, gpu, threads, seed) for seed in (0, 1)]


def measure(part: str, peers: Sequence[Any], bucket_bytes: int, repeats: int) -> dict[str, Any]:
    """The figures of one transport between two peers, after one transfer to warm up."""
    import ray

    learner, engine = peers
    about, other = ray.get([learner.about.remote(), engine.about.remote()], timeout=LIMIT_S)
    if part == "ipc" and about["device"] != other["device"]:
        raise ValueError(f"the two ends are on {about['device']} and {other['device']}: ipc needs one GPU")
    nbytes, times, inside = about["bytes"], [], []
    for version in range(repeats + 1):
        ray.get(learner.change.remote(), timeout=LIMIT_S)
        begin = time.perf_counter()
        inside.append(transfer(part, learner, engine, about["address"], version, bucket_bytes))
        times.append(time.perf_counter() - begin)
    raw = raw_seconds(part, learner, engine, about["address"], nbytes)
    sent, arrived = ray.get([learner.digest.remote(), engine.digest.remote()], timeout=LIMIT_S)
    if sent != arrived:
        raise RuntimeError("what arrived is not what was sent")
    seconds = statistics.median(times[1:])
    spread = {"median": seconds, "min": min(times[1:]), "max": max(times[1:]), "first": times[0]}
    return {
        "gb": round(nbytes / 1e9, 3),
        "seconds": {name: round(value, 4) for name, value in spread.items()},
        "engine_s": {name: round(statistics.median(each[name] for each in inside[1:]), 4) for name in inside[0]},
        "runs": repeats,
        "gb_per_s": round(nbytes / 1e9 / seconds, 2),
        "raw_gb_per_s": round(nbytes / 1e9 / raw, 2),
        "share_of_raw": round(raw / seconds, 3),
        "equal": True,
    }


def transfer(part: str, learner: Any, engine: Any, address: str, version: int, bucket_bytes: int) -> dict[str, float]:
    """One version, sent and loaded: the engine's own times. RuntimeError for what it says against it."""
    import ray

    if part == "store":
        [reference] = ray.get(learner.put.remote(version), timeout=LIMIT_S)
        return ray.get(engine.take.remote(reference), timeout=LIMIT_S)
    common: dict[str, Any] = {
        "kind": part, "version": version, "address": address, "session": f"{part}{version}", "group": "bench", "world": 2, "wait_s": LIMIT_S,
        "stall_s": STALL_S,
    }  # fmt: skip
    member = Member(number=0, name="the engine", key="engine", host="here", device="same")
    order = Order(ticket=Ticket(rank=0, **common), members=(member,))
    sent, received = learner.send.remote(order, bucket_bytes), engine.receive.remote(Ticket(rank=1, **common))
    report, times = ray.get([sent, received], timeout=LIMIT_S)
    if report != {0: "ok"}:
        raise RuntimeError(f"the transfer failed: {report[0]}")
    return times


def raw_seconds(part: str, learner: Any, engine: Any, address: str, nbytes: int, repeats: int = 5) -> float:
    import ray

    if part == "ipc":
        return ray.get(learner.raw_copy.remote(nbytes, repeats), timeout=LIMIT_S)
    if part == "nccl":
        ticket = Ticket(
            kind=part, version=0, address=address, session="raw", group="raw", rank=0, world=2, wait_s=LIMIT_S, stall_s=STALL_S
        )  # fmt: skip
        there = replace(ticket, rank=1)
        both = [end.raw_broadcast.remote(mine, nbytes, repeats) for end, mine in ((learner, ticket), (engine, there))]
        return max(ray.get(both, timeout=LIMIT_S))
    times = []
    for _ in range(2):
        begin = time.perf_counter()
        [reference] = ray.get(learner.raw_put.remote(nbytes), timeout=LIMIT_S)
        ray.get(engine.raw_get.remote(reference), timeout=LIMIT_S)
        times.append(time.perf_counter() - begin)
        del reference
    return min(times)
