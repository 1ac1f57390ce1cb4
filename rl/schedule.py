"""How far the rollout runs ahead of the learner: sync, one step off, or asynchronous within a bound on staleness.

    take(step):  send the requests of every step up to step + lead  ->  wait for the groups of `step`  ->  check their versions

When step s is taken the pool has the weights of step s-1, and the requests of s + lead go out: they are trained when version
s + lead - 1 is the newest, so no token is more than `lead` versions behind. The pool serves the oldest requests first; weights pushed
while a sequence is under way are used from its next token on, and each token keeps the version it was drawn with.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from winnow.rl.config import ScheduleConfig
from winnow.rollout.schema import Group, Request


def lead_of(schedule: ScheduleConfig) -> int:
    """How many steps the rollout may be ahead, which is the bound on staleness."""
    return {"sync": 0, "one_step_off": 1, "async": schedule.max_staleness}[schedule.kind]


class Rollouts:
    """The groups of each step, asked for as early as the schedule allows. Steps are taken in order, from any first one."""

    def __init__(self, pool: Any, requests: Callable[[int], Sequence[Request]], schedule: ScheduleConfig) -> None:
        self.pool, self._requests = pool, requests
        self.lead, self.last = lead_of(schedule), schedule.steps
        self._sent: dict[int, tuple[list[str], Iterator[Group]]] = {}
        self._next = 0  # the first step whose requests have not been sent

    def take(self, step: int) -> list[Group]:
        """The groups of `step` in the order of their requests, whatever the order of arrival. RuntimeError for a token that is too old."""
        for ahead in range(max(step, self._next), min(step + self.lead, self.last) + 1):
            made = list(self._requests(ahead))
            self._sent[ahead] = ([request.request_id for request in made], self.pool.generate(made))
            self._next = ahead + 1
        order, arriving = self._sent.pop(step)
        groups = sorted(arriving, key=lambda group: order.index(group.request.request_id))
        self._check(groups, step - 1)
        return groups

    def _check(self, groups: Sequence[Group], version: int) -> None:
        for group in groups:
            for trajectory in group.trajectories:
                drawn = trajectory.policy_versions[trajectory.loss_mask]
                if len(drawn) and version - int(drawn.min()) > self.lead:
                    raise RuntimeError(
                        f"{trajectory.key} has tokens of version {int(drawn.min())}, {version - int(drawn.min())} behind version "
                        f"{version} that is trained, and the schedule allows {self.lead}: the pool did not take the weights pushed to it"
                    )
