"""A learner that dies is replaced, where the config asks for it: new processes, the last checkpoint, the same run.

train ─ LearnerDied ─> learner processes anew (the workers stay up where the cluster was lent) ─> train with resume=true
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable
from typing import Any

from winnow.rl.cluster import Cluster
from winnow.rl.config import Config
from winnow.rl.remote_learner import LearnerDied

Train = Callable[..., dict[str, Any]]
Say = Callable[[str], object]


def restarted(train: Train) -> Train:
    """Lets a driver go on up to learner.restarts times after its learner died. Any other failure, and one death more, is raised."""

    @functools.wraps(train)
    def run(
        config: Config, cluster: Cluster | None = None, progress: Say = print, seconds: float | None = None
    ) -> dict[str, Any]:
        begin = time.monotonic()
        for left in reversed(range(config.learner.restarts + 1)):
            try:
                spent = time.monotonic() - begin if left < config.learner.restarts else 0.0
                return train(config, cluster, progress, None if seconds is None else max(0.0, seconds - spent))
            except LearnerDied as death:
                if not left:
                    raise
                progress(
                    f"{death}\nthe learner is started again (restart {config.learner.restarts - left + 1} of {config.learner.restarts})"
                )
            if cluster is not None:
                cluster.revive()
            config = dataclasses.replace(config, resume=True)
        raise AssertionError("the last attempt returns or raises")

    return run
