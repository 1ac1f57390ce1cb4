"""Faults of weight sync and of starts with real processes: a store that is full, a worker that hangs while it starts or while weights
travel, and a run over two ranks whose curve is that of one."""

from __future__ import annotations

import json
import logging
import os
import signal
import time
from collections.abc import Iterator
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
from winnow.rl.config import Config, make_config
from winnow.rl.remote_learner import RemoteLearner
from winnow.rl.train import train
from winnow.rollout import pool as pools
from winnow.rollout.pool import Pool, PoolLimits
from winnow.rollout.schema import Request
from winnow.rollout.weights import pack
from winnow.rollout.worker import RolloutWorker

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
        def _build(self) -> None:
            if not os.path.exists(once):
                time.sleep(2.0)  # the first ping is answered
                Path(once).touch()
                os.kill(os.getpid(), signal.SIGSTOP)
            super()._build()

    limits = PoolLimits(ping_timeout_s=8.0)
    assert limits.start_timeout_s == 300 and PoolLimits().ping_timeout_s + 5 < 60
    with (
        caplog.at_level(logging.ERROR, "winnow.rollout"),
        Pool(spec_of(folder), [OPTIONS], limits=limits, worker_class=Stopping) as pool,
    ):
        assert names(pool.generate([request_of("a")])) == ["a"]
        after = pids(pool)[0]
    [line] = errors(caplog)
    assert "rollout worker 0 (pid" in line and "did not answer a ping while starting for" in line
    stopped = int(line.split("pid ")[1].split()[0])
    assert stopped != after and gone(stopped) and gone(after)


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


@pytest.mark.parametrize("transport", ["nccl", pytest.param("ipc", marks=pytest.mark.slow)])
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
