"""A user's own reward, `package.module:function`, in the pool of killable processes: it may hang, leak or crash, and costs one Failure.

The function may carry two attributes: `seconds`, its own bound on one call (SECONDS otherwise), and `in_process = True`, which keeps it in
the driver, for rewards that hold a model or a connection there.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from winnow.rewards.contract import checked
from winnow.rewards.grader_pool import shared
from winnow.rewards.grader_process import find_function
from winnow.rewards.trl_functions import BatchReward, awaited
from winnow.rollout.schema import Failure, Reward, Score, Task, Trajectory

SECONDS = 30.0
CALL = "winnow.rewards.pooled:call_with"


class PooledReward:
    """`f(task, trajectory)` by its name. The trajectory travels without its records and kept sets."""

    parallel = True

    def __init__(self, name: str, seconds: float = SECONDS) -> None:
        self.__name__, self.seconds = name, seconds

    def __call__(self, task: Task, trajectory: Trajectory) -> Score | Failure:
        slim = replace(trajectory, index_record=None, expert_record=None, kept_sets=None)
        return checked(self.__name__, shared().call(self.__name__, task, slim, seconds=self.seconds))


class PooledBatchReward(BatchReward):
    """TRL's `f(completions, **columns)` by its name."""

    parallel = True

    def __init__(self, name: str, function: Callable[..., Any], seconds: float = SECONDS) -> None:
        def remote(**columns: Any) -> Any:
            return shared().load(name) or shared().call(CALL, name, columns, seconds=seconds)

        remote.__signature__ = inspect.signature(function)  # type: ignore[attr-defined]  # decides which columns it gets
        super().__init__(remote, name)


def call_with(name: str, columns: Mapping[str, Any]) -> Any:
    """In the pool's process: the function's result, awaited where it is `async`; arrays and tensors become lists."""
    values = find_function(name)(**columns)
    if inspect.isawaitable(values):
        values = asyncio.run(awaited(values))
    return values.tolist() if hasattr(values, "tolist") else values


def pooled(name: str, function: Callable[..., Any]) -> Reward:
    """The reward of an imported function, in either form; in this process where it asks for that."""
    batch = "completions" in inspect.signature(function).parameters
    if getattr(function, "in_process", False):
        return BatchReward(function, name) if batch else function
    seconds = float(getattr(function, "seconds", SECONDS))
    return PooledBatchReward(name, function, seconds) if batch else PooledReward(name, seconds)
