"""Ray behind a run: the learner as an actor, bounded waits, and nothing left running. Starts a real local Ray: slow."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from winnow.models import attach
from winnow.models.indexer import IndexerConfig
from winnow.models.load import save
from winnow.rl import cluster as clusters
from winnow.rl import placement, remote_learner
from winnow.rl.config import Config, ConfigError, make_config
from winnow.rollout.weights import unpack


class SilentPool:
    """Takes weights, as workers would: by reference."""

    def __init__(self) -> None:
        self.pushed: list[tuple[int, int]] = []
        self.closed = 0
        self.why = ""

    def push_weights(self, reference: Any, version: int) -> None:
        import ray

        update = ray.get(reference)
        self.pushed.append((version, len(list(unpack(update)))))

    def shutdown(self, why: str = "") -> None:
        self.closed, self.why = self.closed + 1, self.why or why


def config_for(tmp_path: Path, *overrides: str) -> Config:
    values = {
        "runs_dir": str(tmp_path),
        "model": {"path": str(tmp_path / "m")},
        "domains": [{"name": "d", "source": "x"}],
    }
    return make_config(values, overrides)


def test_bundles_follow_the_config(tmp_path: Path) -> None:
    config = config_for(
        tmp_path, "rollout.workers=2", "rollout.threads=3", "cluster.worker_gpus=1", "learner.threads=4"
    )
    assert placement.bundles(config) == [{"CPU": 4.0}, {"CPU": 3.0, "GPU": 1.0}, {"CPU": 3.0, "GPU": 1.0}]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ("cluster.learner_gpus=1", "learner.ranks=2", "cluster.worker_gpus=0.5"),
            "asks for 2.5 GPUs (2 learner ranks x 1",
        ),
        (("cluster.strategy=STRICT_SPREAD", "rollout.workers=2"), "set it to PACK"),
    ],
)
def test_an_impossible_placement_is_refused_before_ray_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overrides: tuple[str, ...], message: str
) -> None:
    import ray

    monkeypatch.setattr(placement, "count_gpus", lambda: 2)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(ray, "init", lambda **options: pytest.fail("Ray was started"))
    with pytest.raises(ConfigError) as error, clusters.connect(config_for(tmp_path, *overrides)):
        pass
    assert message in str(error.value)
    placement.check_placement(config_for(tmp_path, "cluster.learner_gpus=1", "cluster.worker_gpus=1"))  # fits
    joined = config_for(tmp_path, "cluster.learner_gpus=64", "cluster.address=auto")
    placement.check_placement(joined)  # for the cluster to say


def test_what_was_started_ends_and_a_learners_death_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the pool, whose callers wait for groups; in the log where the learner is started again and the pool goes on."""
    pool, told, joined = SilentPool(), [], [True, True, False]
    learner = SimpleNamespace(actors=[], join=lambda: joined.pop(0) or pytest.fail("not together"))
    monkeypatch.setattr(clusters, "start_learner", lambda config, places: [])
    monkeypatch.setattr(clusters, "make_pool", lambda config, options: pool)
    monkeypatch.setattr(clusters, "RemoteLearner", lambda actors, config: learner)
    monkeypatch.setattr(clusters, "watch_learner", lambda actors, tell: told.append(tell) or threading.Event())
    places = placement.Places(learner=[], workers=[])
    clusters.build(config_for(tmp_path), places)
    clusters.build(config_for(tmp_path, "learner.restarts=1"), places)
    told[1]("rank 1 is gone")
    assert not pool.closed
    told[0]("rank 1 is gone")
    assert pool.closed == 1 and pool.why == "rank 1 is gone"
    with pytest.raises(pytest.fail.Exception, match="not together"):
        clusters.build(config_for(tmp_path), places)
    assert pool.closed == 2, "the workers of a learner that did not come together end with it"


@pytest.mark.slow
def test_an_actor_learner_trains_and_everything_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import ray
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape = LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    save(
        attach.attach(LlamaForCausalLM(shape), IndexerConfig(top_k=4, num_heads=2, head_dim=8, rope_dim=4)),
        None,
        tmp_path / "m",
    )
    pool = SilentPool()
    monkeypatch.setattr(clusters, "make_pool", lambda config, options: pool)
    tokens = np.arange(20)
    with clusters.connect(config_for(tmp_path)) as cluster:
        assert cluster.start(config_for(tmp_path))["top_k"] == 4 and pool.pushed[0][0] == 0 and pool.pushed[0][1] > 10
        losses = [cluster.learner.sft_step([(tokens, tokens > 5)], step).metrics["loss/ce"] for step in (1, 2, 3)]
        assert losses[-1] < losses[0]
        with pytest.raises(ValueError, match="no trained token"):  # the cause itself, not Ray's wrapping of it
            cluster.learner.sft_step([(tokens, tokens > 99)], 4)
        cluster.learner.save(tmp_path / "saved")
        cluster.learner.timeout_s = 1e-3  # type: ignore[attr-defined]
        with pytest.raises(TimeoutError, match=r"learner\.load has not returned.*raise cluster\.step_timeout_s"):
            cluster.learner.load()
    assert (tmp_path / "saved" / "learner.pt").exists() and pool.closed == 1 and not ray.is_initialized()
    too_much = config_for(tmp_path, "cluster.learner_gpus=64", "cluster.start_timeout_s=2")
    monkeypatch.setattr(clusters, "check_placement", lambda config: None)  # as in a cluster that was joined
    with pytest.raises(TimeoutError, match=r"did not offer .*'GPU': 64.0"), clusters.connect(too_much):
        pass
    assert not ray.is_initialized()


@pytest.mark.slow
def test_two_ranks_train_as_one_and_a_killed_one_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import ray
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1
    )  # fmt: skip
    save(LlamaForCausalLM(shape), None, tmp_path / "m")
    pool = SilentPool()
    monkeypatch.setattr(clusters, "make_pool", lambda config, options: pool)
    tokens = np.arange(20)
    config = config_for(tmp_path, "learner.ranks=2", "learner.lr=1e-2")
    with clusters.connect(config) as cluster:
        cluster.start(config)
        assert pool.pushed[0][0] == 0 and pool.pushed[0][1] > 5
        learner: Any = cluster.learner
        losses = [learner.sft_step([(tokens, tokens > 5)] * 3, step).metrics["loss/ce"] for step in (1, 2, 3)]
        assert losses[-1] < losses[0]
        learner.save(tmp_path / "saved")
        ray.kill(learner.actors[1])
        with pytest.raises(
            remote_learner.LearnerDied, match=r"(?s)learner's rank 1 of 2 died during sft_step.*resume=true"
        ):
            learner.sft_step([(tokens, tokens > 5)] * 3, 4)
        assert not cluster.alive
        deadline = time.monotonic() + 60
        while not pool.why and time.monotonic() < deadline:
            time.sleep(0.2)
        assert "the learner's process died" in pool.why, "who waits for groups is told"
        cluster.revive()  # what learner.restarts does: new processes, the checkpoint, the same workers
        cluster.learner.resume(tmp_path / "saved", config)
        after = cluster.learner.sft_step([(tokens, tokens > 5)] * 3, 4).metrics["loss/ce"]
        assert after < losses[-1]
    assert (tmp_path / "saved" / "learner.pt").exists() and pool.closed == 2 and not ray.is_initialized()
