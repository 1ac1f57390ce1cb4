"""What a reward must keep to, checked on every group: count, finiteness, domain, group id. A fault is named, never a silent 0.

    groups without scores ─ grade ─> the same groups with one Score or Failure per trajectory, in sample order ─ check_failures

A reward that raises or returns NaN costs that sample (a Failure, dropped and counted). A reward function that returns the wrong number
of values, or trajectories that are not the group's own, stop the run by name: then no score can be trusted to be its sample's. So does a
share of failures above a ceiling: a run that learns from what is left of its samples is no longer the run that was asked for.

A reward is a function of (task, trajectory). Two attributes are understood: `parallel = True`, it waits for other processes and may be
called from several threads at once; `grade_group(task, trajectories)`, it grades a group at a time (trl_functions.py).
"""

from __future__ import annotations

import math
import numbers
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeout
from dataclasses import replace
from typing import Any

from winnow.rewards.alignment import soft_overlong
from winnow.rollout.schema import Failure, Group, Reward, Score, Task, Trajectory

OVERLONG_BUFFER = 0.25  # the last quarter of the token budget is where the length penalty grows
DETAIL = 300  # characters of an exception kept in a Failure
WAIT_S = 1800.0  # for all parallel verdicts of a step; the pools behind them have closer limits of their own
THREADS = 32  # that wait for parallel rewards; the pools behind them decide how much runs at once
EXPECTED = ("abort", "not_applicable")  # kinds that are no fault of a grader's
FEWEST = 8  # samples below which a share of failures says nothing


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
    if "failure" in trajectory.environment_state:
        return Failure(**trajectory.environment_state["failure"])
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
    found: list[Reward] = []
    for group in groups:
        check_group(group)
        task = group.request.task
        reward = find(task.reward)
        if reward is None:
            known = f", only for {', '.join(rewards)}" if isinstance(rewards, Mapping) else ""
            raise ValueError(f"task {task.id!r} wants reward {task.reward!r}, but none was given for it{known}")
        found.append(reward)
    graded = []
    for group, verdicts in zip(groups, verdicts_of(found, groups), strict=True):
        weight = (length_penalty or {}).get(group.request.task.domain, 0.0)
        scores = [shaped(s, group, t, weight) for s, t in zip(verdicts, group.trajectories, strict=True)]
        graded.append(replace(group, scores=tuple(scores)))
    return graded


def verdicts_of(rewards: Sequence[Reward], groups: Sequence[Group]) -> list[list[Score | Failure]]:
    """A verdict per trajectory of every group. Parallel rewards run in threads while the others are computed here."""
    parallel = sum(len(g.trajectories) for r, g in zip(rewards, groups, strict=True) if getattr(r, "parallel", False))
    threads, until = (
        ThreadPoolExecutor(max(1, min(THREADS, parallel)), thread_name_prefix="grade"),
        time.monotonic() + WAIT_S,
    )
    try:
        started = [
            submit(threads, *pair) if getattr(pair[0], "parallel", False) else None
            for pair in zip(rewards, groups, strict=True)
        ]
        return [
            grade_group(reward, group)
            if futures is None
            else [verdict for part, future in futures for verdict in awaited(future, part, until)]
            for reward, group, futures in zip(rewards, groups, started, strict=True)
        ]
    finally:
        threads.shutdown(
            wait=False, cancel_futures=True
        )  # a thread that is stuck must not hold up what has been graded


def awaited(future: Future[list[Score | Failure]], group: Group, until: float) -> list[Score | Failure]:
    """The verdicts of a part of a group; a Failure for each where they have not come by then (monotonic seconds)."""
    try:
        return future.result(timeout=max(0.0, until - time.monotonic()))
    except FutureTimeout:
        if future.done():
            return future.result()  # the reward's own TimeoutError, or verdicts that came just now
        task = group.request.task
        late = Failure(
            kind="timeout", detail=f"reward {task.reward!r} of task {task.id!r}: no verdict within {WAIT_S:g} s"
        )
        return [late] * len(group.trajectories)


def submit(
    threads: ThreadPoolExecutor, reward: Reward, group: Group
) -> list[tuple[Group, Future[list[Score | Failure]]]]:
    whole = hasattr(reward, "grade_group")
    parts = [group] if whole else [replace(group, trajectories=(t,)) for t in group.trajectories]
    return [(part, threads.submit(grade_group, reward, part)) for part in parts]


def grade_group(reward: Reward, group: Group) -> list[Score | Failure]:
    task = group.request.task
    if hasattr(reward, "grade_group"):
        return list(reward.grade_group(task, group.trajectories))
    return [grade_one(reward, task.reward, task, trajectory) for trajectory in group.trajectories]


def check_failures(groups: Sequence[Group], ceiling: float) -> None:
    """Raises RuntimeError, with the kinds, their counts and an example, when a larger share of a domain's samples has no score."""
    by_domain: dict[str, list[Score | Failure]] = {}
    for group in groups:
        by_domain.setdefault(group.request.task.domain, []).extend(group.scores)
    for domain, scores in by_domain.items():
        counted = [score for score in scores if isinstance(score, Score) or score.kind not in EXPECTED]
        failures = [score for score in counted if isinstance(score, Failure)]
        if len(counted) < FEWEST or len(failures) <= ceiling * len(counted):
            continue
        kinds = ", ".join(f"{times} {kind}" for kind, times in Counter(f.kind for f in failures).most_common())
        raise RuntimeError(
            f"{len(failures)} of {len(counted)} samples of domain {domain!r} have no score ({kinds}; e.g. {failures[0].detail!r}): "
            f"that is more than the {ceiling:.0%} which algorithm.max_failures allows. Mend the reward, or raise that limit"
        )


def success(score: Score | Failure) -> float:
    """What evaluation counts: the part `all` of a rubric, the value before a length penalty elsewhere, 0 for a Failure."""
    if isinstance(score, Failure):
        return 0.0
    return score.parts.get("all", score.parts.get("outcome", score.value))
