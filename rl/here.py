"""A run in one process: learner and engine side by side on one device, no Ray. `cluster.address: here`.

    Learner.weights -> the engine's own tensors, copied on the device and compared -> next rollout

For one GPU (or none): nothing is serialised, weights never leave the device, and a start costs one set of imports. What is given up:
rollout and learner take turns (schedule sync), there is one worker and one rank, and a crash ends the run (`resume=true` continues it).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from winnow.rl.cluster import Cluster, worker_spec
from winnow.rl.config import Config, ConfigError
from winnow.rl.learner import Learner
from winnow.rollout.local_pool import LocalPool
from winnow.rollout.weights import WeightError, state_of

LOT = 1 << 28  # bytes that are compared at a time


class LocalLearner(Learner):
    """Hands over its tensors instead of packing them. The engine copies: nothing of the learner is shared with it."""

    def weights(self, version: int) -> Any:
        return self.named_weights()


class DevicePool(LocalPool):
    """Takes weights as tensors of this process."""

    def push_weights(self, update: Any, version: int | None = None) -> dict[int, int]:
        """WeightError for an unknown, missing or misshapen tensor, or one that differs after the copy."""
        if not isinstance(update, Mapping):
            return super().push_weights(update, version)
        assert version is not None
        engine = self.runner.engine
        engine.load_weights(update, version)
        check_equal(state_of(engine.model), update, version)
        return {0: version}


def check_equal(held: Mapping[str, Tensor], sent: Mapping[str, Tensor], version: int) -> None:
    """Raises WeightError naming a tensor that has not the values that were sent, or a NaN. A few launches and one wait for the device."""
    largest: list[Tensor] = []
    for names in _lots(held, sent):
        pairs = [held[name] for name in names], [sent[name].to(held[name].dtype) for name in names]
        largest += torch._foreach_norm(torch._foreach_sub(*pairs), math.inf)
    differences = torch.stack(largest).tolist()
    wrong = [name for name, difference in zip(sent, differences, strict=True) if difference != 0]  # NaN is not 0 either
    if wrong:
        raise WeightError(
            f"weights of version {version}: tensor {wrong[0]!r} differs after the copy ({len(wrong)} of {len(sent)} do)"
        )


def _lots(held: Mapping[str, Tensor], sent: Mapping[str, Tensor]) -> Iterator[list[str]]:
    """The names in their order, in lots of at most `LOT` bytes (a larger tensor goes alone): as much memory the comparison takes."""
    lot: list[str] = []
    size = 0
    for name in sent:
        if lot and size + held[name].nbytes > LOT:
            yield lot
            lot, size = [], 0
        lot.append(name)
        size += held[name].nbytes
    if lot:
        yield lot


@contextmanager
def here(config: Config) -> Iterator[Cluster]:
    """The cluster of a run that stays in this process."""
    asked = max(config.cluster.learner_gpus, config.cluster.worker_gpus)
    if asked and not torch.cuda.is_available():
        raise ConfigError(
            "cluster.learner_gpus or cluster.worker_gpus asks for a GPU, but torch sees none here: set both to 0, or install a torch built "
            "for CUDA"
        )
    cluster = Cluster(LocalLearner(config), DevicePool(worker_spec(config)), lambda: None)
    try:
        yield cluster
    finally:
        cluster.close()
