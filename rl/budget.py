"""Seconds for a whole pipeline, shared among the stages that are left, so that the last evaluation is made in time.

    share(stage) = what is left of the time x weight(stage) / sum of the weights of stages that are not done

Stages that train begin no update once their share is over; what samples or evaluates has a size of its own and only weighs. A stage that
needs less leaves the rest to those behind it. What was done before a restart is paid for already. The weights are in the seconds of one
specialist.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable

MARGIN = 0.06  # of the seconds: kept for the step under way when a share ends, and for checkpoints
CONTROL = 1.25  # over what it is compared with, so that equal cost is what ends it, not its share
SPECIALIST, DATA, STUDENT, MIXED, EVALUATION = 1.0, 0.2, 0.6, 1.0, 0.15  # data and evaluation: a domain


class Budget:
    """`begin`: what the clock (time.monotonic) said when the pipeline started. `seconds` None: nothing ends early."""

    def __init__(self, seconds: float | None, stages: Iterable[str], num_domains: int, begin: float) -> None:
        self.seconds, self._begin = seconds, begin
        self.weights = weights(list(stages), num_domains)

    def share(self, stage: str, done: Collection[str], earlier: float = 0.0) -> float | None:
        """Seconds that this stage may take now, at least 0; None without a limit. `done`: names of stages that are behind; `earlier`:
        seconds that they took before this start."""
        if self.seconds is None:
            return None
        left = (1 - MARGIN) * self.seconds - (time.monotonic() - self._begin) - earlier
        waiting = sum(weight for name, weight in self.weights.items() if name not in done or name == stage)
        return max(0.0, left) * self.weights[stage] / waiting


def weights(stages: list[str], num_domains: int) -> dict[str, float]:
    """What each stage weighs."""
    made = num_domains * DATA + STUDENT
    whole = num_domains * SPECIALIST + made + MIXED
    fixed = {"student": STUDENT, "mixed": MIXED, "mixed-from-base": CONTROL * whole}

    def weight(name: str) -> float:
        if name.startswith("evaluation-"):
            return EVALUATION * (1 if name.startswith("evaluation-specialist-") else num_domains)
        if name.startswith(("specialist-", "data-")):
            return SPECIALIST if name.startswith("specialist-") else DATA
        return fixed.get(name, CONTROL * made)  # student-sft, student-on_policy: the other student

    return {name: weight(name) for name in stages}


def least(*limits: float | None) -> float | None:
    """The smallest of the limits that there are."""
    return min((limit for limit in limits if limit is not None), default=None)
