"""Reward functions in TRL's form, taken as they are: `f(completions, **columns) -> list[float | None]`, one or several with weights.

BatchReward(f)                                    one function, graded a group at a time
WeightedRewards([f, g], weights=[1.0, 0.2])       TRL's `reward_funcs` and `reward_weights`: the weighted sum, parts by name
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable, Sequence
from typing import Any

from winnow.rewards.contract import checked, failed
from winnow.rollout.schema import Failure, Score, Task, Trajectory


class BatchReward:
    """A function in TRL's form, plain or `async`.

    It gets those of the columns that it names (all, if it takes **kwargs): prompts, completions, completion_ids, answer, and every key of
    the task's metadata, each a list of one entry per sample. `conversational`: completions are message lists, as TRL gives them for
    conversational prompts, instead of texts. None means "not applicable" and becomes a Failure of that kind.
    """

    def __init__(self, function: Callable[..., Any], name: str | None = None, conversational: bool = False) -> None:
        self.function, self.conversational = function, conversational
        self.name: str = name or str(getattr(function, "__name__", type(function).__name__))
        self.__name__ = self.name

    def __call__(self, task: Task, trajectory: Trajectory) -> Score | Failure:
        return self.grade_group(task, [trajectory])[0]

    def columns(self, task: Task, trajectories: Sequence[Trajectory]) -> dict[str, Any]:
        """What the function is called with, one entry per sample. `trainer_state` is None, `log_extra` and `log_metric` do nothing."""
        first = len(task.messages)
        answers = [list(t.messages[first:]) for t in trajectories]
        columns: dict[str, Any] = {key: [value] * len(trajectories) for key, value in task.metadata.items()}
        columns |= {
            "prompts": [list(task.messages) if self.conversational else task.messages[-1]["content"]]
            * len(trajectories),
            "completions": answers if self.conversational else [t.reply for t in trajectories],
            "completion_ids": [t.tokens[t.loss_mask].tolist() for t in trajectories],
            "answer": [task.answer] * len(trajectories),
            "trainer_state": None,
            "log_extra": ignore,
            "log_metric": ignore,
        }
        parameters = inspect.signature(self.function).parameters
        if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
            return columns
        return {key: column for key, column in columns.items() if key in parameters}

    def grade_group(self, task: Task, trajectories: Sequence[Trajectory]) -> list[Score | Failure]:
        """One verdict per trajectory. Raises ValueError, naming the function, when it returns another number of values."""
        try:
            values = self.function(**self.columns(task, trajectories))
            if inspect.isawaitable(values):
                values = asyncio.run(awaited(values))
        except Exception as error:
            return [failed(self.name, error)] * len(trajectories)
        if isinstance(values, Failure):  # from the pool (pooled.py)
            return [values] * len(trajectories)
        if not isinstance(values, Sequence) and hasattr(values, "tolist"):
            values = values.tolist()  # an array or tensor
        if not isinstance(values, Sequence) or isinstance(values, str):
            raise ValueError(
                f"reward {self.name!r} returned {type(values).__name__}, but it must return a list, one number per sample"
            )
        if len(values) != len(trajectories):
            raise ValueError(
                f"reward {self.name!r} returned {len(values)} values for {len(trajectories)} samples of task {task.id!r}"
            )
        return [checked(self.name, value) for value in values]


async def awaited(value: Any) -> Any:
    return await value


def ignore(*_: Any, **__: Any) -> None:
    """TRL's logging hooks: parts and failures are logged by the run itself."""


class WeightedRewards:
    """Several functions in TRL's form: the weighted sum of those that apply, as TRL's `nansum`; a part by each function's name.

    A sample that none applies to is a Failure("not_applicable"); one that any of them fails on is that Failure.
    """

    def __init__(self, functions: Sequence[Callable[..., Any]], weights: Sequence[float] | None = None) -> None:
        self.rewards = [f if isinstance(f, BatchReward) else BatchReward(f) for f in functions]
        self.weights = [1.0] * len(self.rewards) if weights is None else [float(weight) for weight in weights]
        if not self.rewards or len(self.weights) != len(self.rewards):
            raise ValueError(
                f"{len(self.rewards)} reward functions have {len(self.weights)} weights: give one function or more, and one weight each"
            )
        names = [reward.name for reward in self.rewards]
        if len(set(names)) < len(names):
            raise ValueError(f"reward functions {names} share a name, which would merge their parts: name them apart")
        self.__name__ = "+".join(names)

    def __call__(self, task: Task, trajectory: Trajectory) -> Score | Failure:
        return self.grade_group(task, [trajectory])[0]

    def grade_group(self, task: Task, trajectories: Sequence[Trajectory]) -> list[Score | Failure]:
        columns = [reward.grade_group(task, trajectories) for reward in self.rewards]
        return [self.combine(list(verdicts)) for verdicts in zip(*columns, strict=True)]

    def combine(self, verdicts: Sequence[Score | Failure]) -> Score | Failure:
        total, parts = 0.0, {}
        for reward, weight, verdict in zip(self.rewards, self.weights, verdicts, strict=True):
            if isinstance(verdict, Score):
                total += weight * verdict.value
                parts[reward.name] = verdict.value
            elif verdict.kind != "not_applicable":
                return verdict
        if not parts:
            return Failure(kind="not_applicable", detail=f"none of {self.__name__} applies")
        return Score(value=total, parts=parts)
