"""Faults of weight sync and of starts with real processes: a store that is full, a worker that hangs while it starts or while weights
travel, and a run over two ranks whose curve is that of one."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from test_pool import OPTIONS, fake_worker_class, gone, names, request_of, spec_of
from test_pool import folder as tiny_folder

from winnow.models.load import load
from winnow.rl import cluster as clusters
from winnow.rl import remote_learner
from winnow.rl.config import Config, make_config
from winnow.rl.remote_learner import LearnerDied, RemoteLearner, SendingEnd, make_actor_class
from winnow.rl.train import train
from winnow.rl.weight_offer import StreamOffer
from winnow.rollout import pool as pools
from winnow.rollout.pool import Pool, PoolLimits
from winnow.rollout.schema import Request
from winnow.rollout.transport import Member
from winnow.rollout.weights import pack
from winnow.rollout.worker import RolloutWorker, code_version

folder = tiny_folder


@pytest.fixture(scope="module")
def small_store() -> Iterator[Any]:
    """A Ray with the smallest object store there is, and a disk that counts as full: what does not fit really fails."""
    import ray

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "disabled")
        patch.setenv("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        system = {"local_fs_capacity_threshold": 0.0, "object_store_full_delay_ms": 100}
        ray.init(
            num_cpus=8, include_dashboard=False, address="local", logging_level=logging.ERROR, log_to_driver=False,
            object_store_memory=80 << 20, _system_config=system, namespace="winnow",
        )  # fmt: skip
        yield ray
        ray.shutdown()


def errors(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR]


def pids(pool: Any) -> dict[int, int]:
    return {number: int(text.split("pid ")[1].split()[0]) for number, text in pool.describe().items() if "pid " in text}


def test_weights_that_a_full_store_refuses_are_named_and_nothing_is_lost(small_store: Any) -> None:
    spec: Any = SimpleNamespace(model="fake", threads=1, engine=SimpleNamespace(max_batch=4))
    limits = PoolLimits(request_timeout_s=30.0, start_timeout_s=120.0)
    with Pool(spec, [OPTIONS], limits=limits, worker_class=fake_worker_class()) as pool:
        assert set(pool.push_weights(pack({"x": torch.zeros(9)}, 1)).values()) == {1}
        under_way = pool.generate([request_of("slow", "slow:1"), request_of("fine")])
        with pytest.raises(
            RuntimeError, match=r"weights of version 2 \(0\.20 GB\) do not fit into Ray's object store.*OutOfDiskError"
        ):
            pool.push_weights(pack({"x": torch.zeros(50_000_000)}, 2))
        assert names(under_way) == ["fine", "slow"] and pool.stats()[0]["version"] == 1
        assert set(pool.push_weights(pack({"x": torch.zeros(9)}, 3)).values()) == {3}
        [pid] = pids(pool).values()
    assert gone(pid)


def test_a_learner_whose_weights_do_not_fit_says_so(small_store: Any) -> None:
    @small_store.remote(num_cpus=0)
    class Huge:
        def hand_over(self, version: int) -> tuple[Any, None]:
            return np.ones(200_000_000 if version == 2 else 9, np.uint8), None

    config = make_config({"model": {"path": "m"}, "domains": [{"name": "d", "source": "lookup"}]})
    learner = RemoteLearner([Huge.remote()], config)
    assert small_store.get(learner.weights(1)).shape == (9,)
    with pytest.raises(RuntimeError, match="weights of version 2 do not fit into Ray's object store"):
        learner.weights(2)
    assert small_store.get(learner.weights(3)).shape == (9,)


def test_a_worker_that_hangs_while_it_starts_is_named_and_replaced(
    small_store: Any, folder: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Stopped while its model is loaded: its heartbeat names it, not the limit of a start, which is as long as ever."""
    once = str(tmp_path / "once")

    class Stopping(RolloutWorker):
        """Stopped when its first ping is answered, before it has a model; the next one needs none."""

        async def ping(self) -> dict[str, Any]:
            self.asked = True
            return await super().ping()

        def _build(self) -> None:
            if not os.path.exists(once):
                while not getattr(self, "asked", False):
                    time.sleep(0.02)
                time.sleep(0.3)  # the answer is under way
                Path(once).touch()
                os.kill(os.getpid(), signal.SIGSTOP)
            runner: Any = SimpleNamespace(engine=SimpleNamespace(version=0), has_work=False)
            self._built.set_result(runner)

    limits = PoolLimits(ping_timeout_s=4.0)
    assert limits.start_timeout_s == 300 and PoolLimits().ping_timeout_s + 5 < 60
    with (
        caplog.at_level(logging.ERROR, "winnow.rollout"),
        Pool(spec_of(folder), [OPTIONS], limits=limits, worker_class=Stopping) as pool,
    ):
        after = pids(pool)[0]
    [line] = errors(caplog)
    assert "rollout worker 0 (pid" in line and "did not answer a ping while starting for" in line
    stopped = int(line.split("pid ")[1].split()[0])
    assert stopped != after and gone(stopped) and gone(after)


# ------------------------------------------------------------------------------------------------ light ends: real transfers, no model


SHAPE = (64, 65)


def light_worker_class() -> type:
    """Answers as the fake worker does, and takes weights as a real one does, into one matrix."""
    fake, shape = fake_worker_class(), SHAPE

    class LightWorker(fake):  # type: ignore[misc, valid-type]
        def __init__(self, spec: Any, number: int, driver_version: str) -> None:
            super().__init__(spec, number, driver_version)
            import torch

            from winnow.rollout.transfer import Receiver

            self.receiver, self.model = Receiver(), torch.nn.Linear(shape[1], shape[0], bias=False)

        async def ping(self) -> dict[str, Any]:
            return {**await super().ping(), "host": os.uname().nodename, "device": "cpu"}

        ready = ping

        async def load_weights(self, update: Any) -> int:
            from winnow.rollout.weights import copy_into, unpack

            if hasattr(update, "session"):
                tensors = await asyncio.to_thread(self.receiver.receive, update, self.model)
            else:
                tensors = dict(unpack(update))
            copy_into(self.model, tensors, update.version)
            self.version = update.version
            return self.version

        async def stats(self) -> dict[str, Any]:
            return {"version": self.version, "values": self.model.weight.unique().tolist()}

    return LightWorker


def light_learner_class() -> type:
    """The learner's side of a transfer, with one matrix whose every element is the version."""
    shape = SHAPE

    class LightLearner:
        def __init__(self) -> None:
            import torch

            from winnow.rollout.transfer import Sender

            self.sender = Sender("127.0.0.1", torch.device("cpu"))

        def weights(self, version: int) -> Any:
            import torch

            return {"weight": torch.full(shape, float(version))}

        def open_sender(self) -> tuple[str, str, str]:
            return self.sender.address, os.uname().nodename, "cpu"

        def send(self, version: int, orders: Any, bucket_bytes: int) -> Any:
            from winnow.rollout.transport import Layout

            named = self.weights(version)
            return self.sender.send(orders[0], Layout.of(named, version, 1 << 12), iter(named.values()))

        def late(self, version: int) -> Any:
            import ray

            from winnow.rollout.weights import pack

            return [ray.put(pack(self.weights(version), version))]

    return LightLearner


@pytest.mark.parametrize("transport", ["nccl", pytest.param("ipc", marks=pytest.mark.slow)])
def test_a_worker_lost_while_weights_travel_holds_up_nobody(
    small_store: Any, transport: str, caplog: pytest.LogCaptureFixture
) -> None:
    """One of two workers is killed when new weights come (nccl), or stopped (ipc): the other has them, the new one gets them late."""
    config = make_config(
        {"model": {"path": "m"}, "domains": [{"name": "d", "source": "lookup"}]},
        (f"cluster.transport={transport}", f"cluster.colocate={str(transport == 'ipc').lower()}", "cluster.stall_timeout_s=3"),
    )  # fmt: skip
    actor = small_store.remote(light_learner_class()).options(num_cpus=0, **OPTIONS).remote()
    learner = RemoteLearner([actor], config)
    spec: Any = SimpleNamespace(model="fake", threads=1, engine=SimpleNamespace(max_batch=4))
    limits = PoolLimits(request_timeout_s=60.0, ping_timeout_s=4.0)
    with (
        caplog.at_level(logging.WARNING),
        Pool(spec, [OPTIONS] * 2, limits=limits, worker_class=light_worker_class()) as pool,
    ):
        for version in (0, 1):
            assert pool.push_weights(learner.weights(version)) == {0: version, 1: version}
        before = pids(pool)
        os.kill(before[1], signal.SIGKILL if transport == "nccl" else signal.SIGSTOP)
        begin = time.monotonic()
        assert set(pool.push_weights(learner.weights(2))) <= {0, 1}
        assert time.monotonic() - begin < 60
        pool._wait_ready()
        assert [pool.stats()[n] for n in (0, 1)] == [{"version": 2, "values": [2.0]}] * 2
        assert pids(pool)[0] == before[0] and pids(pool)[1] != before[1]
        assert pool.push_weights(learner.weights(3)) == {0: 3, 1: 3}  # together again
    assert any(f"rollout worker 1 (pid {before[1]} on" in line for line in errors(caplog))
    assert gone(before[0]) and gone(before[1])
    small_store.kill(actor)


def test_a_rank_that_dies_while_weights_travel_is_named_whatever_the_others_wait_for(
    small_store: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote_learner, "DEATH_GRACE_S", 1.0)

    @small_store.remote(num_cpus=0)
    class Rank:
        def send(self, version: int, orders: Any, bucket_bytes: int) -> dict[int, str]:
            if version:
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(60)  # in a gather that nobody ends
            return {}

    config = make_config(
        {"model": {"path": "m"}, "domains": [{"name": "d", "source": "lookup"}]}, ("cluster.transport=nccl",)
    )
    actors = [Rank.remote(), Rank.remote()]
    learner = RemoteLearner(actors, config)
    monkeypatch.setattr(
        learner, "submit", lambda *_: [actors[0].send.remote(0, [], 0), actors[1].send.remote(1, [], 0)]
    )
    offer = StreamOffer(learner, [SendingEnd("127.0.0.1:1", "h", "cpu")] * 2, 1)
    offer.begin([])
    begin = time.monotonic()
    with pytest.raises(LearnerDied, match="rank 1 of 2 died during send"):
        while not offer.finished():
            time.sleep(0.05)
    assert time.monotonic() - begin < 30
    small_store.kill(actors[0])


def test_requests_do_not_wait_for_ever_where_no_worker_gets_weights(small_store: Any, tmp_path: Path) -> None:
    """A learner that has moved on and sends nothing newer: named, while work waits for it and not before."""

    class MovedOn:
        version = 1

        def begin(self, members: list[Member]) -> dict[int, Any]:
            return {member.number: small_store.put(SimpleNamespace(version=1)) for member in members}

        def late(self) -> Any:
            return small_store.put(None)

        def lost(self, number: int, why: str) -> None: ...

        def finished(self) -> bool:
            return True

    spec: Any = SimpleNamespace(model="fake", threads=1, engine=SimpleNamespace(max_batch=4))
    limits = PoolLimits(request_timeout_s=60.0, weights_timeout_s=1.0)
    with Pool(spec, [OPTIONS], limits=limits, worker_class=fake_worker_class()) as pool:
        assert pool.push_weights(MovedOn()) == {0: 1}
        under_way = pool.generate([request_of("a", f"suicide:{tmp_path}/once")])
        with pytest.raises(TimeoutError, match=r"waited 1 s for weights of version 1 or newer, which the learner"):
            list(under_way)


def test_the_learners_actor_and_a_worker_agree(small_store: Any, model: str, tmp_path: Path) -> None:
    """The two classes themselves, in one process: an update, one too late, none once the learner has moved on."""
    config = sync_config(tmp_path, model, "pair", "cluster.transport=nccl", "cluster.bucket_mb=1")
    learner = make_actor_class()(config, code_version())
    learner.load()
    worker = RolloutWorker(clusters.worker_spec(config), 0, code_version())
    offer = StreamOffer(
        SimpleNamespace(
            transport="nccl", cluster=config.cluster, group=None,
            submit=lambda method, *arguments: [sending.submit(getattr(learner, method), *arguments)],
        ),  # type: ignore[arg-type]
        [SendingEnd(*learner.open_sender())], 4,
    )  # fmt: skip
    with ThreadPoolExecutor(1) as sending:
        said = asyncio.run(worker.ready())
        member = Member(number=0, name="w", key="k", host=said["host"], device=said["device"])
        ticket = offer.begin([member])[0]
        assert asyncio.run(worker.load_weights(ticket)) == 4
        assert offer._sending is not None and offer._sending[0].result(60) == {0: "ok"}
    held, sent = worker.runner.engine.model.state_dict(), learner.model.state_dict()
    assert held.keys() == sent.keys() and all(torch.equal(held[name], sent[name]) for name in sent)
    [reference] = learner.late(4)
    assert small_store.get(reference).version == 4
    tokens = np.arange(20)
    learner.sft_step([(tokens, tokens > 5)], 5)
    assert learner.late(4) is None
    with pytest.raises(AssertionError):
        assert torch.equal(held["model.norm.weight"], learner.model.state_dict()["model.norm.weight"])


# ---------------------------------------------------------------------------------------------------------------------- whole clusters


def sync_config(root: Path, model: str, name: str, *overrides: str) -> Config:
    domain = {"count": 24, "holdout": 6, "quota": 4, "max_tokens": 10}
    values = {
        "name": name, "runs_dir": str(root), "model": {"path": model},
        "domains": [{"name": "lookup", "source": "lookup", **domain}, {"name": "sums", "source": "addition", **domain}],
        "rollout": {"samples": 8, "num_pages": 512, "max_batch": 16}, "learner": {"lr": 1e-3},
        "indexer": {"train": "kl", "selection": "replay"}, "schedule": {"steps": 3, "save_every": 0},
    }  # fmt: skip
    return make_config(values, ("cluster.stall_timeout_s=3", *overrides))


@pytest.fixture(scope="module")
def model(babbler: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    from winnow.models import attach
    from winnow.models.indexer import IndexerConfig
    from winnow.models.load import load_tokenizer, save

    sparse = attach.attach(load(babbler), IndexerConfig(top_k=8, num_heads=2, head_dim=8, rope_dim=4))
    return str(save(sparse, load_tokenizer(babbler), tmp_path_factory.mktemp("sync") / "model"))


def requests_of(config: Config, number: int) -> list[Request]:
    from winnow.rl.grading import prepared_tasks
    from winnow.rl.sampler import TaskSampler

    return list(TaskSampler(prepared_tasks(config, lambda text: None), config).requests(number))


@pytest.mark.slow
@pytest.mark.parametrize("transport", ["nccl", "ipc"])
def test_a_worker_lost_while_weights_travel_is_named_and_gets_them_when_it_is_back(
    small_store: Any, model: str, tmp_path: Path, transport: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:  # fmt: skip
    """One of two engines is stopped when new weights come (nccl), or killed (ipc): the other has them, the new one gets them late."""
    monkeypatch.setattr(pools, "PoolLimits", partial(PoolLimits, ping_timeout_s=4.0))
    colocate = f"cluster.colocate={str(transport == 'ipc').lower()}"
    config = sync_config(tmp_path, model, transport, f"cluster.transport={transport}", "rollout.workers=2", colocate)
    with caplog.at_level(logging.WARNING), clusters.connect(config) as cluster:
        cluster.start(config)
        assert {stats["version"] for stats in versions(cluster.pool)} == {0}
        assert len(cluster.generate(requests_of(config, 1))) == 8
        assert set(cluster.pool.push_weights(cluster.learner.weights(1), 1).values()) == {1}
        before = pids(cluster.pool)
        os.kill(before[1], signal.SIGSTOP if transport == "nccl" else signal.SIGKILL)
        begin = time.monotonic()
        assert set(cluster.pool.push_weights(cluster.learner.weights(2), 2)) <= {0, 1}
        assert time.monotonic() - begin < 60
        cluster.pool._wait_ready()
        assert {stats["version"] for stats in versions(cluster.pool)} == {2} and pids(cluster.pool)[1] != before[1]
        groups = cluster.generate(requests_of(config, 2))
        assert {int(v) for g in groups for t in g.trajectories for v in t.policy_versions[t.loss_mask]} == {2}
        assert set(cluster.pool.push_weights(cluster.learner.weights(3), 3).values()) == {3}  # together again
    assert any(f"rollout worker 1 (pid {before[1]} on" in line for line in errors(caplog))
    assert gone(before[0]) and gone(before[1])


def versions(pool: Any) -> list[dict[str, Any]]:
    import ray

    return ray.get([worker.actor.ping.remote() for worker in pool._crew.workers], timeout=60)


def curve_of(root: Path, model: str, name: str, *overrides: str) -> list[dict[str, float]]:
    """The metrics of a run, a row a step."""
    config = sync_config(root, model, name, *overrides)
    assert train(config, progress=lambda text: None)["status"] == "done"
    return [json.loads(line) for line in (config.folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def alone(small_store: Any, model: str, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, float]]:
    """The curve of one rank, one engine and the object store."""
    return curve_of(tmp_path_factory.mktemp("alone"), model, "alone")


TWO = ("learner.ranks=2", "rollout.workers=2")


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize(
    "overrides",
    [
        (*TWO, "cluster.transport=nccl", "cluster.bucket_mb=1"),
        (*TWO, "cluster.transport=ipc", "cluster.colocate=true", "schedule.kind=one_step_off"),
    ],
)
def test_two_ranks_and_two_engines_have_the_curve_of_one_each(
    overrides: tuple[str, ...], alone: list[dict[str, float]], model: str, tmp_path: Path
) -> None:
    curve = curve_of(tmp_path, model, "two", *overrides)
    for key in ("loss/policy", "loss/indexer_kl", "entropy", "grad_norm"):
        assert curve[0][key] == pytest.approx(alone[0][key], abs=1e-5), key
        if "schedule.kind=one_step_off" not in overrides:
            for step in (1, 2):
                assert curve[step][key] == pytest.approx(alone[step][key], abs=1e-4), (step, key)
    if "schedule.kind=one_step_off" not in overrides:
        assert [row["reward/mean"] for row in curve] == [row["reward/mean"] for row in alone]
    assert alone[2]["loss/indexer_kl"] != alone[0]["loss/indexer_kl"]
