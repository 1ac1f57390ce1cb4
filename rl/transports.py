"""Which way the weights go from learner to engines, by the config alone, and which ways cannot work where. No Ray, no torch in here.

store   Ray's object store: any placement
ipc     memory that both ends map: each engine on a learner rank's own GPU (without GPUs: its own machine), cluster.colocate
nccl    a broadcast from the first rank to all engines: GPUs of their own on both sides (without GPUs: gloo)
auto    ipc for colocated GPUs, nccl for whole GPUs on both sides, store for everything else

Only the store keeps weights that the learner has moved on from. With schedule.sync_every above 1 a worker that comes back may need such.
"""

from __future__ import annotations

from typing import Any

from winnow.rl.config_fields import ConfigError


def transport_of(config: Any) -> str:
    """store, ipc or nccl for a `Config`."""
    cluster = config.cluster
    if cluster.transport != "auto":
        return cluster.transport
    if (
        cluster.address == "here"
        or not (cluster.learner_gpus and cluster.worker_gpus)
        or config.schedule.sync_every > 1
    ):
        return "store"
    if cluster.colocate:
        return "ipc"
    return "nccl" if cluster.learner_gpus >= 1 and cluster.worker_gpus >= 1 else "store"


def check_transport(config: Any) -> None:
    """ConfigError for a placement or a transport that cannot work, before anything is started."""
    cluster = config.cluster
    learner, worker = cluster.learner_gpus, cluster.worker_gpus
    if cluster.address == "here":
        if cluster.transport != "auto" or cluster.colocate:
            raise ConfigError(
                "cluster.address is here, where weights are copied within one process: leave cluster.transport at auto and cluster.colocate "
                "at false, or set cluster.address to local"
            )
        return
    if cluster.colocate:
        _check_colocation(config)
    if cluster.transport in ("ipc", "nccl") and config.schedule.sync_every > 1:
        raise ConfigError(
            f"cluster.transport is {cluster.transport}, which sends the weights that the learner has, but schedule.sync_every is "
            f"{config.schedule.sync_every}: a worker that is started again between two updates would wait for weights that nobody has any "
            "more; set cluster.transport to store, or sync_every to 1"
        )
    if cluster.transport == "ipc" and not cluster.colocate:
        raise ConfigError(
            f"cluster.transport is ipc, which needs each engine on a learner rank's own GPU, but learner ({learner:g} GPUs a rank) and "
            f"workers ({worker:g}) are placed apart: set cluster.colocate=true, or cluster.transport to nccl or store"
        )
    if cluster.transport == "nccl" and (learner or worker):
        if bool(learner) != bool(worker):
            raise ConfigError(
                f"cluster.transport is nccl, but cluster.learner_gpus is {learner:g} and cluster.worker_gpus {worker:g}: a broadcast needs a "
                "GPU on both sides, or on neither (gloo); set cluster.transport to store"
            )
        if cluster.colocate or learner < 1 or worker < 1:
            raise ConfigError(
                f"cluster.transport is nccl, which refuses two processes on one GPU, but learner ({learner:g}) and workers ({worker:g}) "
                "may share one: set learner_gpus and worker_gpus to 1 and colocate to false, or cluster.transport to ipc with colocate=true"
            )


def on_one_gpu(config: Any) -> bool:
    """Whether everything that is colocated fits on one GPU, or needs none."""
    cluster = config.cluster
    return config.learner.ranks * cluster.learner_gpus + config.rollout.workers * cluster.worker_gpus <= 1


def _check_colocation(config: Any) -> None:
    """Everything on one GPU, or each learner rank with as many workers as every other one on a GPU of its own."""
    cluster, ranks, workers = config.cluster, config.learner.ranks, config.rollout.workers
    learner, worker = cluster.learner_gpus, cluster.worker_gpus
    if bool(learner) != bool(worker):
        raise ConfigError(
            f"cluster.colocate puts learner and workers on the same GPUs, but cluster.learner_gpus is {learner:g} and cluster.worker_gpus "
            f"{worker:g}: give each a share, e.g. 0.5 and 0.5, or 0 to both, without GPUs"
        )
    if on_one_gpu(config):
        return
    if workers % ranks:
        raise ConfigError(
            f"cluster.colocate puts rollout.workers = {workers} beside learner.ranks = {ranks}, but {workers} cannot be divided by {ranks}: "
            f"set rollout.workers to a multiple of {ranks}"
        )
    if (asked := learner + workers // ranks * worker) > 1:
        raise ConfigError(
            f"cluster.colocate puts one learner rank (cluster.learner_gpus = {learner:g}) and {workers // ranks} workers (worker_gpus = "
            f"{worker:g} each) on one GPU, which makes {asked:g}: give each a share, at most 1 together, e.g. 0.5 and "
            f"{0.5 / (workers // ranks):g}"
        )
