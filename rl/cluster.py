"""Ray behind a run: started or joined, one placement group, the learner's actor and the rollout pool in it, all gone at the end.

    connect(config) ─> Cluster(learner, pool) ─ start(config, checkpoint) ─> both hold the same weights, version = step

The driver calls `cluster.learner` and `cluster.pool` and cannot tell actors from objects in its own process (`Cluster` takes either).
Every wait has a bound and names what it waited for; every actor checks that it runs the driver's version of the code.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from winnow.rl.checkpoints import Checkpoint
from winnow.rl.config import Config
from winnow.rl.metrics import engine_metrics
from winnow.rl.placement import Places, bundles, check_placement, placed
from winnow.rl.remote_learner import RemoteLearner, start_learner
from winnow.rl.watch import watch_learner
from winnow.rollout.schema import Group, Request

HERE = "here"
DRIFT = 1e-5  # nats
PROBE_TOKENS = 8192


class LearnerLike(Protocol):
    """What the driver needs of a learner: the class itself, or `RemoteLearner`."""

    def load(self, path: str | Path | None = None, config: Config | None = None) -> dict[str, Any]: ...
    def resume(self, folder: str | Path, config: Config | None = None) -> dict[str, Any]: ...
    def step(self, batch: Any) -> Any: ...
    def sft_step(self, examples: Sequence[Any], step: int = 0) -> Any: ...
    def distill_step(self, trajectories: Sequence[Any], teachers: Mapping[str, str], step: int = 0) -> Any: ...
    def weights(self, version: int) -> Any: ...
    def save(self, folder: str | Path, state: bool = True) -> None: ...


class Cluster:
    """A learner and a pool. Use as a context manager, or call `close`."""

    def __init__(
        self,
        learner: LearnerLike,
        pool: Any,
        on_close: Callable[[], None] | None = None,
        on_revive: Callable[[], LearnerLike] | None = None,
        watching: threading.Event | None = None,
    ) -> None:
        self.learner, self.pool, self._on_close, self._on_revive = learner, pool, on_close, on_revive
        self._watching = watching
        self._stats: dict[int, dict[str, int]] = {}

    def revive(self) -> None:
        """A new learner in the place of one that died: `start` loads what it holds. The pool stays as it is."""
        if self._on_revive is None:
            raise RuntimeError("this cluster's learner runs in the driver's own process and cannot be started again")
        self.learner = self._on_revive()

    def start(self, config: Config, checkpoint: Checkpoint | None = None) -> dict[str, Any]:
        """Loads model and optimizer for this config (or the checkpoint) and gives the pool the same weights. What the learner says of the
        model, with the version."""
        info = self.learner.resume(checkpoint.path, config) if checkpoint else self.learner.load(None, config)
        version = checkpoint.step if checkpoint else 0
        self.pool.push_weights(self.learner.weights(version), version)
        return {**info, "version": version}

    def check_drift(self, config: Config, info: Mapping[str, Any]) -> float | None:
        """Gives the pool the weights that it has, once more, as an update at learning rate 0 would: the engine's log-probabilities of a text
        must stay what they were. `info` is from `start`. Returns the largest difference, in nats; None where sets are drawn at random.

        The text is random tokens, more than top_k of them, so that sets are chosen. Raises RuntimeError above `DRIFT`.
        """
        if config.indexer.selector == "random_ties":
            return None
        length = min(info["context"], config.rollout.cache_tokens, PROBE_TOKENS, max(64, 2 * (info["top_k"] or 0) + 1))
        text = np.random.default_rng(0).integers(0, info["vocab_size"], length).tolist()
        before = self.pool.score([text])[0]
        self.pool.push_weights(self.learner.weights(info["version"]), info["version"])
        drift = float(np.abs(self.pool.score([text])[0] - before).max(initial=0.0))
        self.engine_metrics()  # what this cost is no step's
        if not drift <= DRIFT:
            raise RuntimeError(
                f"an update that changes nothing moved the rollout's log-probabilities by {drift:.3g} nats (at most {DRIFT:g} are rounding): "
                "weights are lost or altered on their way from the learner to the engines, and every update would add to it. See whether another "
                "cluster.transport or rollout.engine does the same"
            )
        return drift

    def generate(self, requests: Sequence[Request]) -> list[Group]:
        """All groups, in the order of their requests: the order of arrival must not matter."""
        order = {request.request_id: number for number, request in enumerate(requests)}
        return sorted(self.pool.generate(requests), key=lambda group: order[group.request.request_id])

    def engine_metrics(self) -> dict[str, float]:
        """What the engines did since the last call."""
        before, self._stats = self._stats, self.pool.stats()
        return engine_metrics(before, self._stats)

    @property
    def alive(self) -> bool:
        """Whether the learner's processes are there, as far as Ray knows."""
        return bool(getattr(self.learner, "alive", True))

    def close(self) -> None:
        """Ends every process this cluster started. Safe to call twice."""
        on_close, self._on_close = self._on_close, None
        if self._watching is not None:
            self._watching.set()
        if on_close is not None:
            self.pool.shutdown()
            on_close()

    def __enter__(self) -> Cluster:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@contextmanager
def connect(config: Config) -> Iterator[Cluster]:
    """Starts or joins Ray, places the learner and the workers, and takes everything down again, also after a failure or Ctrl-C.

    With cluster.address here there is no Ray and no other process (here.py).
    """
    if config.cluster.address == HERE:
        from winnow.rl.here import here

        with here(config) as cluster:
            yield cluster
        return
    with ray_session(config), placed(config) as places:
        cluster = build(config, places)
        try:
            yield cluster
        finally:
            cluster.close()


@contextmanager
def ray_session(config: Config, copies: int = 1) -> Iterator[None]:
    """Ray for this process: started here, joined at cluster.address or RAY_ADDRESS, or the one already there, which is left running.

    One that is started here has logical CPUs for `copies` clusters of the config.
    """
    # Otherwise ray.init() writes a token file into the home folder, and later `ray job submit` wants it.
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # Ray's own advice, else it warns at every start
    import ray

    if ray.is_initialized():
        yield
        return
    check_placement(config)
    address = os.environ.get("RAY_ADDRESS") or (None if config.cluster.address == "local" else config.cluster.address)
    options: dict[str, Any] = {"logging_level": logging.ERROR, "namespace": "winnow", "log_to_driver": False}
    if address is None:
        # Logical CPUs: a laptop with fewer cores than threads asked for runs too, only slower.
        cpus = max(os.cpu_count() or 1, copies * sum(bundle["CPU"] for bundle in bundles(config)))
        options |= {"include_dashboard": False, "num_cpus": cpus, "address": "local"}
    else:
        options["address"] = address
    try:
        ray.init(**options)
    except ConnectionError as error:
        raise ValueError(
            f"there is no Ray cluster at {address!r} ({error}): start one with `ray start --head`, or set cluster.address=local"
        ) from None
    try:
        yield
    finally:
        ray.shutdown()


def build(config: Config, places: Places) -> Cluster:
    """The learner's actors and the pool, each in its place."""
    import ray

    actors: list[Any] = []

    def close() -> None:
        for actor in actors:
            with contextlib.suppress(Exception):  # the process may be gone already
                ray.kill(actor)
        actors.clear()

    def start() -> RemoteLearner:
        close()
        actors.extend(start_learner(config, places.learner))
        learner = RemoteLearner(list(actors), config)
        learner.join()
        return learner

    try:
        actors.extend(start_learner(config, places.learner))  # they start while the workers do
        pool = make_pool(config, places.workers)
        learner = RemoteLearner(list(actors), config)
        learner.join()
    except BaseException:
        close()
        raise
    # A learner that may be started again leaves the pool as it is.
    watching = None if config.learner.restarts else watch_learner(actors, pool.shutdown)
    return Cluster(learner, pool, close, start, watching)


def worker_spec(config: Config) -> Any:
    """What the workers are built from."""
    from winnow.rewards.registry import make_environment
    from winnow.rollout.engine import EngineConfig
    from winnow.rollout.worker import WorkerSpec

    rollout = config.rollout
    engine = EngineConfig(
        page_size=rollout.page_size,
        num_pages=rollout.num_pages,
        max_batch=rollout.max_batch,
        prefill_chunk=rollout.prefill_chunk,
        record_indices=rollout.record_indices,
        record_experts=rollout.record_experts,
        keep_kept_sets=config.algorithm.keep_kept_sets,
        selector=config.indexer.selector,
        cuda_graphs=rollout.cuda_graphs,
        reuse_prefixes=rollout.reuse_prefixes,
        on_update=rollout.on_update,
        drain_timeout_s=rollout.drain_timeout_s,
    )
    return WorkerSpec(
        model=config.model.path,
        kind=rollout.engine,
        dtype=config.model.dtype,
        engine=engine,
        threads=rollout.threads,
        device="cuda" if config.cluster.worker_gpus > 0 else "cpu",
        environments=make_environment,
    )


def make_pool(config: Config, places: Sequence[Any]) -> Any:
    """The rollout pool, an actor for each scheduling strategy of `places`. Returns once all of them are up."""
    from winnow.rollout.pool import Pool, PoolLimits

    drain_s = config.rollout.drain_timeout_s if config.rollout.on_update == "drain" else 0.0
    limits = PoolLimits(
        request_timeout_s=config.rollout.request_timeout_s,
        start_timeout_s=config.cluster.start_timeout_s,
        load_timeout_s=PoolLimits().load_timeout_s + drain_s,
    )
    options = [{"num_gpus": config.cluster.worker_gpus, "scheduling_strategy": place} for place in places]
    return Pool(worker_spec(config), options, limits=limits)
