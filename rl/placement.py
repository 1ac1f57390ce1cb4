"""Where a run's processes go: what they ask of the cluster, whether it can be had, and the reserved places."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from winnow.rl.config import Config, ConfigError
from winnow.rl.transports import on_one_gpu


@dataclass(frozen=True)
class Places:
    """Ray scheduling strategies, one a process."""

    learner: list[Any]
    workers: list[Any]


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
    """What the run asks of the cluster: the learner's bundles first, one a rank, then one a worker. Colocated: one a rank, with a whole GPU
    for it and its workers, or one for all where they fit on one GPU."""
    learner = {"CPU": float(config.learner.threads), "GPU": config.cluster.learner_gpus}
    worker = {"CPU": float(config.rollout.threads), "GPU": config.cluster.worker_gpus}
    asked = [*[learner] * config.learner.ranks, *[worker] * config.rollout.workers]
    if config.cluster.colocate:
        count = 1 if on_one_gpu(config) else config.learner.ranks
        cpus = (config.learner.ranks * learner["CPU"] + config.rollout.workers * worker["CPU"]) / count
        asked = [{"CPU": cpus, "GPU": 1.0 if learner["GPU"] else 0.0}] * count
    return [{name: amount for name, amount in bundle.items() if amount} for bundle in asked]


def has_room(config: Config) -> bool:
    """Whether the cluster has enough free at this moment for one more learner and pool of this config."""
    import ray

    free, wanted = ray.available_resources(), bundles(config)
    return all(free.get(name, 0.0) >= sum(bundle.get(name, 0.0) for bundle in wanted) for name in ("CPU", "GPU"))


@contextmanager
def placed(config: Config) -> Iterator[Places]:
    """Places of the learner's ranks and of the workers, reserved: a placement group for each side, or one for both where they are colocated.

    Raises TimeoutError saying what was asked for and what there is.
    """
    import ray
    from ray.util.placement_group import placement_group, remove_placement_group

    asked, limit, strategy = bundles(config), config.cluster.start_timeout_s, config.cluster.strategy
    ranks, workers = config.learner.ranks, config.rollout.workers
    if config.cluster.colocate:
        groups = [placement_group(asked)]
    else:
        groups = [placement_group(asked[:ranks]), placement_group(asked[ranks:], strategy=strategy)]
    shared = len(asked) if config.cluster.colocate else None  # bundles that ranks and workers go into by turns
    try:
        if not all(group.wait(limit) for group in groups):
            raise TimeoutError(
                f"the cluster did not offer {asked} ({strategy}) within {limit:.0f} s; it has "
                f"{_round(ray.cluster_resources())}, free are {_round(ray.available_resources())}: ask for less, or wait for others to end"
            )
        yield Places(
            learner=[_inside(groups[0], rank % (shared or ranks)) for rank in range(ranks)],
            workers=[_inside(groups[-1], number % (shared or workers)) for number in range(workers)],
        )
    finally:
        with contextlib.suppress(Exception):  # Ray itself may be gone
            for group in groups:
                remove_placement_group(group)


def _inside(group: Any, bundle: int = 0) -> Any:
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    return PlacementGroupSchedulingStrategy(placement_group=group, placement_group_bundle_index=bundle)


def _round(resources: dict[str, float]) -> dict[str, float]:
    return {name: round(amount, 2) for name, amount in sorted(resources.items()) if name in ("CPU", "GPU")}
