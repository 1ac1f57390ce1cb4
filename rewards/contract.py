"""What a reward must keep to, checked on every group: count, finiteness, domain, group id. A fault is named, never a silent 0.

    groups without scores ─ grade ─> the same groups with one Score or Failure per trajectory, in sample order

A reward that raises or returns NaN costs that sample (a Failure, dropped and counted). A reward function that returns the wrong number
of values, or trajectories that are not the group's own, stop the run by name: then no score can be trusted to be its sample's.
"""

from __future__ import annotations

import inspect
import math
import numbers
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from winnow.rewards.alignment import soft_overlong
from winnow.rollout.schema import Failure, Group, Reward, Score, Task, Trajectory

OVERLONG_BUFFER = 0.25  # the last quarter of the token budget is where the length penalty grows
DETAIL = 300  # characters of an exception kept in a Failure


class BatchReward:
    """A function in TRL's form, `f(completions, **columns) -> list[float | None]`, graded a group at a time.

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

    def columns(self, task: Task, trajectories: Sequence[Trajectory]) -> dict[str, list[Any]]:
        """What the function is called with, one entry per sample."""
        first = len(task.messages)
        answers = [list(t.messages[first:]) for t in trajectories]
        columns: dict[str, list[Any]] = {key: [value] * len(trajectories) for key, value in task.metadata.items()}
        columns |= {
            "prompts": [list(task.messages) if self.conversational else task.messages[-1]["content"]]
            * len(trajectories),
            "completions": answers if self.conversational else [t.reply for t in trajectories],
            "completion_ids": [t.tokens[t.loss_mask].tolist() for t in trajectories],
            "answer": [task.answer] * len(trajectories),
        }
        parameters = inspect.signature(self.function).parameters
        if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
            return columns
        return {key: column for key, column in columns.items() if key in parameters}

    def grade_group(self, task: Task, trajectories: Sequence[Trajectory]) -> list[Score | Failure]:
        """One verdict per trajectory. Raises ValueError, naming the function, when it returns another number of values."""
        try:
            values = self.function(**self.columns(task, trajectories))
        except Exception as error:
            return [failed(self.name, error)] * len(trajectories)
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


def failed(name: str, error: Exception) -> Failure:
    return Failure(kind="error", detail=f"reward {name!r}: {type(error).__name__}: {error}"[:DETAIL])


def checked(name: str, value: Any) -> Score | Failure:
    """A reward's return value as a Score or Failure."""
    if isinstance(value, Score | Failure):
        return value
    if value is None:
        return Failure(kind="not_applicable", detail=f"reward {name!r} returned None")
    if not isinstance(value, numbers.Real):
        return Failure(kind="invalid", detail=f"reward {name!r} returned {type(value).__name__}, not a number")
    if not math.isfinite(value):
        return Failure(kind="invalid", detail=f"reward {name!r} returned {float(value)}")
    return Score(value=float(value))


def check_group(group: Group) -> None:
    """Raises ValueError unless the trajectories are this request's own samples, each once, of its task and domain."""
    request, task = group.request, group.request.task
    if len(group.trajectories) != request.num_samples:
        raise ValueError(
            f"group {request.request_id}: {len(group.trajectories)} trajectories for {request.num_samples} samples"
        )
    repeated = [sample for sample, times in Counter(t.sample for t in group.trajectories).items() if times > 1]
    if repeated:
        raise ValueError(f"group {request.request_id}: sample numbers {repeated} occur more than once")
    for trajectory in group.trajectories:
        if trajectory.domain != task.domain:
            raise ValueError(
                f"trajectory {trajectory.key} is of domain {trajectory.domain!r}, its task {task.id!r} of {task.domain!r}"
            )
        if trajectory.task_id != task.id:
            raise ValueError(
                f"trajectory {trajectory.key} answers task {trajectory.task_id!r}, its group asked {task.id!r}"
            )


def grade_one(reward: Reward, name: str, task: Task, trajectory: Trajectory) -> Score | Failure:
    try:
        return checked(name, reward(task, trajectory))
    except Exception as error:
        return failed(name, error)


def shaped(score: Score | Failure, group: Group, trajectory: Trajectory, weight: float) -> Score | Failure:
    """The score minus the weighted soft overlong penalty; part `length` is the penalty, part `outcome` the reward before it.

    A cancelled sample has no score, whatever its beginning would get.
    """
    if trajectory.finish_reason == "abort":
        return Failure(kind="abort", detail="the sample was cancelled before its end")
    if isinstance(score, Failure) or weight == 0:
        return score
    budget = group.request.sampling.max_tokens * max(1, trajectory.turns)
    penalty = weight * soft_overlong(trajectory.num_generated, budget, int(budget * OVERLONG_BUFFER))
    return Score(value=score.value + penalty, parts={**score.parts, "outcome": score.value, "length": penalty})


def grade(
    rewards: Mapping[str, Reward] | Callable[[str], Reward],
    groups: Sequence[Group],
    length_penalty: Mapping[str, float] | None = None,
) -> list[Group]:
    """The groups with their scores.

    `rewards`: name (`task.reward`) to reward, as a table or as a function such as `registry.get_reward`. `length_penalty`: weight of
    the soft overlong penalty by domain. Raises ValueError for groups that break the contract, two groups of one request id, and a reward
    that is not in the table.
    """
    find = rewards.get if isinstance(rewards, Mapping) else rewards
    repeated = [name for name, times in Counter(g.request.request_id for g in groups).items() if times > 1]
    if repeated:
        raise ValueError(f"request ids {repeated} have more than one group: their samples would be mixed up")
    graded = []
    for group in groups:
        check_group(group)
        task = group.request.task
        reward = find(task.reward)
        if reward is None:
            known = f", only for {', '.join(rewards)}" if isinstance(rewards, Mapping) else ""
            raise ValueError(f"task {task.id!r} wants reward {task.reward!r}, but none was given for it{known}")
        if isinstance(reward, BatchReward):
            scores = reward.grade_group(task, group.trajectories)
        else:
            scores = [grade_one(reward, task.reward, task, trajectory) for trajectory in group.trajectories]
        weight = (length_penalty or {}).get(task.domain, 0.0)
        scores = [shaped(s, group, t, weight) for s, t in zip(scores, group.trajectories, strict=True)]
        graded.append(replace(group, scores=tuple(scores)))
    return graded


def success(score: Score | Failure) -> float:
    """What evaluation counts: the part `all` of a rubric, the value before a length penalty elsewhere, 0 for a Failure."""
    if isinstance(score, Failure):
        return 0.0
    return score.parts.get("all", score.parts.get("outcome", score.value))
