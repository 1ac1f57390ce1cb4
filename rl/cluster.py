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
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from winnow.rl.checkpoints import Checkpoint
from winnow.rl.config import Config, ConfigError
from winnow.rl.metrics import engine_metrics
from winnow.rl.run import code_version
from winnow.rl.watch import watch_learner
from winnow.rollout.schema import Group, Request

HERE = "here"
CLOSE_TIMEOUT_S = 30.0
DEATH_GRACE_S = 10.0  # after one rank's failure, for the death of another to show


class LearnerDied(RuntimeError):
    """A process of the learner is gone, and with it every step since the last checkpoint."""


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
        """Loads model and optimizer for this config (or the checkpoint) and gives the pool the same weights."""
        info = self.learner.resume(checkpoint.path, config) if checkpoint else self.learner.load(None, config)
        version = checkpoint.step if checkpoint else 0
        self.pool.push_weights(self.learner.weights(version), version)
        return info

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


class RemoteLearner:
    """The learner's actors, one a rank, with bounded waits. Every rank gets every call; the first one's result is the learner's.

    Weights stay in the object store: `weights` returns a reference to them. A rank that dies is named in the error.
    """

    def __init__(self, actors: Sequence[Any], timeout_s: float) -> None:
        self.actors, self.timeout_s = list(actors), timeout_s

    def load(self, path: str | Path | None = None, config: Config | None = None) -> dict[str, Any]:
        return self._get("load", None if path is None else str(path), config)

    def resume(self, folder: str | Path, config: Config | None = None) -> dict[str, Any]:
        return self._get("resume", str(Path(folder).resolve()), config)

    def step(self, batch: Any) -> Any:
        return self._get("step", batch)

    def sft_step(self, examples: Sequence[Any], step: int = 0) -> Any:
        return self._get("sft_step", examples, step)

    def distill_step(self, trajectories: Sequence[Any], teachers: Mapping[str, str], step: int = 0) -> Any:
        return self._get("distill_step", trajectories, teachers, step)

    def logprobs(self, trajectories: Sequence[Any], replay: bool = False) -> Any:
        return self._get("logprobs", trajectories, replay)

    def weights(self, version: int) -> Any:
        return self._ready("weights", version)

    def save(self, folder: str | Path, state: bool = True) -> None:
        self._get("save", str(Path(folder).resolve()), state)

    @property
    def alive(self) -> bool:
        import ray

        try:
            ray.get([actor.address.remote() for actor in self.actors], timeout=DEATH_GRACE_S)
        except ray.exceptions.RayActorError:
            return False
        except ray.exceptions.GetTimeoutError:
            return True  # busy
        return True

    def join(self) -> None:
        """Brings the ranks together in one process group, at an address of the first one's machine."""
        import ray

        if len(self.actors) > 1:
            address = ray.get(self.actors[0].address.remote(), timeout=self.timeout_s)
            self._get("join", address)

    def _get(self, method: str, *arguments: Any) -> Any:
        import ray

        return ray.get(self._ready(method, *arguments))

    def _ready(self, method: str, *arguments: Any) -> Any:
        """A reference to the first rank's result, once every rank is done. Raises what a rank raised; TimeoutError after `timeout_s`."""
        import ray

        if len(self.actors) > 1:
            arguments = tuple(ray.put(argument) for argument in arguments)  # once, not once a rank
        references = [getattr(actor, method).remote(*arguments) for actor in self.actors]
        waiting, deadline = list(references), time.monotonic() + self.timeout_s
        while waiting:
            done, waiting = ray.wait(waiting, timeout=max(0.0, deadline - time.monotonic()), fetch_local=False)
            if not done:
                late = f" on rank {references.index(waiting[0])}" if len(references) > 1 else ""
                raise TimeoutError(
                    f"learner.{method} has not returned for {self.timeout_s:.0f} s{late}: raise cluster.step_timeout_s, or give the "
                    "learner less work (learner.micro_tokens, domains.*.quota)"
                )
            if method == "weights" and done[0] == references[0]:
                continue  # large, and wanted by the workers alone
            try:
                ray.get(done[0])
            except ray.exceptions.RayError as error:
                raise self._explain(method, references, error) from None
        return references[0]

    def _explain(self, method: str, references: Sequence[Any], error: Exception) -> Exception:
        """What to raise for a failed call. Where a rank has died the others fail too, and often first: the dead one is looked for."""
        import ray

        if len(references) > 1:
            ray.wait(list(references), num_returns=len(references), timeout=DEATH_GRACE_S, fetch_local=False)
        for rank, reference in enumerate(references):
            name = f"rank {rank} of {len(references)}" if len(references) > 1 else "process"
            try:
                if ray.wait([reference], timeout=0, fetch_local=False)[0] and not (method == "weights" and rank == 0):
                    ray.get(reference)
            except ray.exceptions.RayActorError as dead:
                return LearnerDied(
                    f"the learner's {name} died during {method}: {dead}; resume=true goes on from the last checkpoint"
                )
            except ray.exceptions.RayError:
                continue
        cause = getattr(error, "cause", None)
        return cause if isinstance(cause, Exception) else error


def make_actor_class() -> type:
    """The learner's class for an actor: it refuses to run another version of the code than the driver's."""
    from winnow.rl.learner import Learner
    from winnow.rl.ranks import free_address, join_ranks

    class LearnerActor(Learner):
        def __init__(self, config: Config, driver_version: str, rank: int = 0) -> None:
            if code_version() != driver_version:
                raise RuntimeError(
                    f"the learner runs winnow {code_version()}, the driver {driver_version}: install the same version on every node, or "
                    "submit with the built wheel"
                )
            super().__init__(config)
            self._rank = rank

        def address(self) -> str:
            import ray

            return free_address(ray.util.get_node_ip_address())

        def join(self, address: str) -> None:
            learner, timeout_s = self.config.learner, self.config.cluster.step_timeout_s
            self.ranks = join_ranks(self._rank, learner.ranks, address, timeout_s)

    return LearnerActor


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
    with ray_session(config), placed(config) as groups:
        cluster = build(config, *groups)
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


def check_placement(config: Config) -> None:
    """Raises ConfigError, before Ray starts, for what this machine alone cannot offer. A cluster that is joined is asked itself."""
    if os.environ.get("RAY_ADDRESS") or config.cluster.address != "local":
        return
    if config.cluster.strategy == "STRICT_SPREAD" and config.rollout.workers > 1:
        raise ConfigError(
            f"cluster.strategy is STRICT_SPREAD, which puts each of the {config.rollout.workers} rollout workers on a machine of its own, but "
            "Ray is started on this machine alone: set it to PACK, or cluster.address to a running cluster"
        )
    asked = sum(bundle.get("GPU", 0.0) for bundle in bundles(config))
    if asked > (have := count_gpus()):
        raise ConfigError(
            f"the run asks for {asked:g} GPUs ({config.learner.ranks} learner ranks x {config.cluster.learner_gpus:g} + "
            f"{config.rollout.workers} workers x {config.cluster.worker_gpus:g}), but this machine has {have}: lower cluster.learner_gpus, "
            "cluster.worker_gpus, learner.ranks or rollout.workers, or set cluster.address to a running cluster"
        )


def count_gpus() -> int:
    import torch

    return torch.cuda.device_count()


def bundles(config: Config) -> list[dict[str, float]]:
    """What the run asks of the cluster: the learner's bundles first, one a rank, then one a worker."""
    learner = {"CPU": float(config.learner.threads), "GPU": config.cluster.learner_gpus}
    worker = {"CPU": float(config.rollout.threads), "GPU": config.cluster.worker_gpus}
    return [
        {name: amount for name, amount in bundle.items() if amount}
        for bundle in (*[learner] * config.learner.ranks, *[worker] * config.rollout.workers)
    ]


def has_room(config: Config) -> bool:
    """Whether the cluster has enough free at this moment for one more learner and pool of this config."""
    import ray

    free, wanted = ray.available_resources(), bundles(config)
    return all(free.get(name, 0.0) >= sum(bundle.get(name, 0.0) for bundle in wanted) for name in ("CPU", "GPU"))


@contextmanager
def placed(config: Config) -> Iterator[tuple[Any, Any]]:
    """Placement groups of the learner and of the workers, reserved.

    Raises TimeoutError saying what was asked for and what there is.
    """
    import ray
    from ray.util.placement_group import placement_group, remove_placement_group

    asked, limit = bundles(config), config.cluster.start_timeout_s
    ranks = config.learner.ranks
    groups = (placement_group(asked[:ranks]), placement_group(asked[ranks:], strategy=config.cluster.strategy))
    try:
        if not all(group.wait(limit) for group in groups):
            raise TimeoutError(
                f"the cluster did not offer {asked} ({config.cluster.strategy}) within {limit:.0f} s; it has "
                f"{_round(ray.cluster_resources())}, free are {_round(ray.available_resources())}: ask for less, or wait for others to end"
            )
        yield groups
    finally:
        with contextlib.suppress(Exception):  # Ray itself may be gone
            for group in groups:
                remove_placement_group(group)


def build(config: Config, learner_group: Any, worker_group: Any) -> Cluster:
    """The learner's actors and the pool, each in its placement group."""
    import ray

    actors: list[Any] = []

    def close() -> None:
        for actor in actors:
            with contextlib.suppress(Exception):  # the process may be gone already
                ray.kill(actor)
        actors.clear()

    def start() -> RemoteLearner:
        close()
        actors.extend(_learner_actors(config, learner_group))
        learner = RemoteLearner(list(actors), config.cluster.step_timeout_s)
        learner.join()
        return learner

    try:
        actors.extend(_learner_actors(config, learner_group))  # they start while the workers do
        pool = make_pool(config, [_inside(worker_group, number) for number in range(config.rollout.workers)])
        learner = RemoteLearner(list(actors), config.cluster.step_timeout_s)
        learner.join()
    except BaseException:
        close()
        raise
    # A learner that may be started again leaves the pool as it is.
    watching = None if config.learner.restarts else watch_learner(actors, pool.shutdown)
    return Cluster(learner, pool, close, start, watching)


def _learner_actors(config: Config, group: Any) -> list[Any]:
    """One actor a rank, in the placement group."""
    import ray

    threads, gpus = config.learner.threads, config.cluster.learner_gpus
    actor_class: Any = ray.remote(make_actor_class())
    return [
        actor_class.options(
            num_cpus=threads,
            num_gpus=gpus,
            scheduling_strategy=_inside(group, rank),
            runtime_env={"env_vars": {"OMP_NUM_THREADS": str(threads)}},  # Ray sets it to 1 otherwise
        ).remote(config, code_version(), rank)
        for rank in range(config.learner.ranks)
    ]


def _inside(group: Any, bundle: int = 0) -> Any:
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    return PlacementGroupSchedulingStrategy(placement_group=group, placement_group_bundle_index=bundle)


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


def _round(resources: dict[str, float]) -> dict[str, float]:
    return {name: round(amount, 2) for name, amount in sorted(resources.items()) if name in ("CPU", "GPU")}
