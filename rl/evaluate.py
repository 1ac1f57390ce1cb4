"""Evaluation: tasks -> samples -> a score per domain with its count, its 95 % interval and the best answer that ignores the question.

    tasks ─ make_requests ─> Generate ─> groups ─ grade ─> answers file (every sample) + DomainResult per domain

The unit of the interval is the task: samples of one task are averaged first, because they are not independent. Wilson's interval where
every task counts 0 or 1, Student's t elsewhere. A sample whose reward is a Failure has no score: it is left out and counted.
"""

from __future__ import annotations

import json
import math
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from winnow.rewards.baseline import constant_baseline
from winnow.rewards.contract import grade, success
from winnow.rewards.registry import get_reward
from winnow.rl.answers import partial_file, resumed
from winnow.rl.excerpts import attention_stats, index_excerpt
from winnow.rl.pass_at_k import by_k
from winnow.rollout.schema import Failure, Generate, Group, Request, Sampling, Score, Task

Z95 = 1.959964  # of the normal distribution, two-sided 95 %
EXCERPTS = 2  # answers per domain whose index sets are written out, for the report
BASELINE_CANDIDATES = 32
FEWEST_BY_LENGTH = 20  # samples below which accuracy by length says nothing


@dataclass(frozen=True, kw_only=True)
class DomainResult:
    """One domain's result. `mean` counts solved tasks (a rubric: all criteria met); `reward` is the mean reward itself."""

    domain: str
    mean: float
    low: float
    high: float
    num_tasks: int
    num_samples: int
    reward: float
    reward_low: float  # 95 % interval of the mean reward, also by task
    reward_high: float
    length: float  # generated tokens
    truncated: float  # share of samples that ran out of tokens
    failures: int = 0
    constant: float | None = None  # the share that the best constant reply solves
    constant_reply: str = ""
    pass_at: Mapping[str, tuple[float, float, float]] = field(
        default_factory=dict
    )  # k -> pass@k with its interval; several samples
    attention: Mapping[str, float] = field(default_factory=dict)  # mean_selected, mean_available, sparse_rows
    by_length: Sequence[
        tuple[int, int, float]
    ] = ()  # quarters of the samples: generated tokens up to, samples, share solved
    failure_kinds: Mapping[str, int] = field(default_factory=dict)
    parts: Mapping[str, float] = field(default_factory=dict)  # mean of each part of the reward

    def as_dict(self) -> dict[str, Any]:
        return json.loads(json.dumps(asdict(self)))  # lists for tuples: what is read back equals it


def make_requests(
    tasks: Sequence[Task],
    *,
    samples: int = 1,
    temperature: float = 0.0,
    max_tokens: int | Mapping[str, int] = 64,
    max_turns: int | Mapping[str, int] = 1,
    seed: int = 0,
    prefix: str = "eval",
    templates: Mapping[str, Mapping[str, Any]] = {},
) -> list[Request]:
    """One request a task. Limits are one number, or one by domain; `templates`: options of the chat template by domain. Several greedy samples would be equal: that raises ValueError."""
    if samples > 1 and temperature == 0:
        raise ValueError(
            f"{samples} samples a task at temperature 0 would be {samples} times the same: set samples to 1 or temperature > 0"
        )
    requests = []
    for number, task in enumerate(tasks):
        tokens = max_tokens if isinstance(max_tokens, int) else max_tokens[task.domain]
        turns = max_turns if isinstance(max_turns, int) else max_turns[task.domain]
        sampling = Sampling(max_tokens=tokens, temperature=temperature, seed=seed)
        requests.append(
            Request(
                request_id=f"{prefix}/{number}",
                task=task,
                num_samples=samples,
                sampling=sampling,
                max_turns=turns,
                template=templates.get(task.domain, {}),
            )
        )
    return requests


def evaluate(
    generate: Generate,
    requests: Sequence[Request],
    *,
    answers: Path | None = None,
    tokenizer: Any = None,
    baseline: bool = True,
    model: str = "",
) -> dict[str, DomainResult]:
    """Runs and grades the requests; results by domain, in order of first appearance.

    `answers`: a JSONL file that gets every sample. `tokenizer`: lets the answers file name the tokens that the index chose. `model`: what
    answers; where it is given, samples of an interrupted evaluation with the same answers file are used again. Raises ValueError for no
    requests.
    """
    if not requests:
        raise ValueError("there is nothing to evaluate: no task was given")
    order = {request.request_id: number for number, request in enumerate(requests)}
    sampled = resumed(generate, requests, answers if model else None, model)
    groups = grade(get_reward, sorted(sampled, key=lambda group: order[group.request.request_id]))
    if answers is not None:
        write_answers(answers, groups, tokenizer)
        partial_file(answers).unlink(missing_ok=True)
    by_domain: dict[str, list[Group]] = defaultdict(list)
    for group in groups:
        by_domain[group.request.task.domain].append(group)
    return {domain: summarise(domain, members, baseline) for domain, members in by_domain.items()}


def summarise(domain: str, groups: Sequence[Group], baseline: bool = True) -> DomainResult:
    """The result of one domain's graded groups."""
    per_task, per_task_reward, rewards = [], [], []
    kinds: Counter[str] = Counter()
    parts: dict[str, list[float]] = defaultdict(list)
    right: list[tuple[int, int]] = []  # samples with a score, and those that solved the task
    for group in groups:
        scores = [score for score in group.scores if isinstance(score, Score)]
        kinds.update(score.kind for score in group.scores if isinstance(score, Failure))
        for score in scores:
            for name, value in score.parts.items():
                parts[name].append(value)
        rewards += [score.value for score in scores]
        if scores:
            per_task.append(float(np.mean([success(score) for score in scores])))
            per_task_reward.append(float(np.mean([score.value for score in scores])))
            right.append((len(scores), sum(success(score) == 1 for score in scores)))
    mean, low, high = interval(per_task)
    reward, reward_low, reward_high = interval(per_task_reward)
    trajectories = [trajectory for group in groups for trajectory in group.trajectories]
    tasks = [group.request.task for group in groups]
    max_turns = max(group.request.max_turns for group in groups)
    cheap = baseline and not any(
        getattr(get_reward(name), "parallel", False) for name in {task.reward for task in tasks}
    )
    reply, rate = constant_baseline(tasks, BASELINE_CANDIDATES, max_turns) if cheap else ("", None)
    return DomainResult(
        domain=domain,
        mean=mean,
        low=low,
        high=high,
        num_tasks=len(per_task),
        num_samples=len(rewards),
        reward=reward,
        reward_low=reward_low,
        reward_high=reward_high,
        length=float(np.mean([t.num_generated for t in trajectories])),
        truncated=float(np.mean([t.finish_reason == "length" for t in trajectories])),
        failures=sum(kinds.values()),
        constant=rate,
        constant_reply=reply,
        pass_at=by_k(right, interval) if max((n for n, _ in right), default=0) > 1 else {},
        attention=attention_stats(trajectories),
        by_length=by_length(groups),
        failure_kinds=dict(kinds),
        parts={name: float(np.mean(values)) for name, values in parts.items()},
    )


def by_length(groups: Sequence[Group], pieces: int = 4) -> list[tuple[int, int, float]]:
    """Accuracy against generated tokens: the samples in order of length, cut in pieces that are equal as far as samples of one length
    stay together: (longest, samples, share solved)."""
    rows = [
        (trajectory.num_generated, success(score))
        for group in groups
        for trajectory, score in zip(group.trajectories, group.scores, strict=True)
        if isinstance(score, Score)
    ]
    rows.sort(key=lambda row: row[0])
    if not rows:
        return []
    lengths = [length for length, _ in rows]
    longest = sorted({lengths[-(-len(rows) * i // pieces) - 1] for i in range(1, pieces + 1)})
    ends = np.searchsorted(lengths, longest, side="right").tolist()
    return [
        (length, end - start, float(np.mean([solved for _, solved in rows[start:end]])))
        for length, start, end in zip(longest, [0, *ends[:-1]], ends, strict=True)
    ]


def details(results: Mapping[str, DomainResult]) -> str:
    """What the table has no room for: accuracy by generated tokens, failures by kind; "" where there is nothing to say."""
    lines = []
    for name, r in results.items():
        if sum(n for _, n, _ in r.by_length) >= FEWEST_BY_LENGTH:
            lines.append(
                f"{name} solved by tokens: " + ", ".join(f"up to {n}: {share:.3f}" for n, _, share in r.by_length)
            )
        if r.failure_kinds:
            lines.append(f"{name} failures: " + ", ".join(f"{kind} {n}" for kind, n in r.failure_kinds.items()))
    return "\n".join(lines)


def interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean and 95 % interval of independent values: Wilson's for 0/1 values, Student's t otherwise (cut to the values' own range when
    that is [0, 1]). (0, 0, 1) for none: nothing is known."""
    n = len(values)
    if n == 0:
        return 0.0, 0.0, 1.0
    mean = float(np.mean(values))
    if all(value in (0.0, 1.0) for value in values):
        return mean, *wilson(mean, n)
    half = student_t(n - 1) * float(np.std(values, ddof=1)) / math.sqrt(n) if n > 1 else math.inf
    low, high = mean - half, mean + half
    if all(0 <= value <= 1 for value in values):
        low, high = max(0.0, low), min(1.0, high)
    return mean, low, high


def wilson(rate: float, n: int) -> tuple[float, float]:
    """Wilson's score interval of `n` trials with this success rate (E. B. Wilson, 1927)."""
    shrink = 1 + Z95**2 / n
    middle = (rate + Z95**2 / (2 * n)) / shrink
    half = Z95 / shrink * math.sqrt(rate * (1 - rate) / n + Z95**2 / (4 * n**2))
    return (0.0 if rate == 0 else middle - half), (1.0 if rate == 1 else middle + half)


def student_t(freedom: int) -> float:
    """The two-sided 95 % point of Student's t (a table up to 4, then the Cornish-Fisher expansion, within 0.2 %)."""
    if freedom < 5:
        return {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776}.get(freedom, math.inf)
    z, n = Z95, freedom
    terms = (
        z,
        (z**3 + z) / 4 / n,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96 / n**2,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384 / n**3,
    )
    return sum(terms)


def write_answers(path: Path, groups: Sequence[Group], tokenizer: Any = None) -> None:
    """Every sample as a line of JSON: as in a run's samples/, with the gold answer, and for a few the positions that the index chose."""
    from winnow.rl.run import sample_row

    path.parent.mkdir(parents=True, exist_ok=True)
    written: dict[str, int] = defaultdict(int)
    with path.open("w", encoding="utf-8") as stream:
        for group, number in each_sample(groups):
            trajectory, score = group.trajectories[number], group.scores[number]
            row = sample_row(trajectory, score) | {"answer": group.request.task.answer}
            row["num_tokens"] = trajectory.num_generated
            if not isinstance(score, Failure):
                row["solved"] = success(score)
            if trajectory.index_record is not None and written[trajectory.domain] < EXCERPTS:
                excerpt = index_excerpt(trajectory, tokenizer)
                written[trajectory.domain] += excerpt is not None
                row["index_excerpt"] = excerpt
            stream.write(json.dumps(row, ensure_ascii=False, default=str) + "\n")


def each_sample(groups: Sequence[Group]) -> Iterator[tuple[Group, int]]:
    return ((group, number) for group in groups for number in range(len(group.trajectories)))


def table(results: Mapping[str, DomainResult]) -> str:
    """The results as text for a terminal."""
    head = (
        "domain",
        "solved",
        "95 % interval",
        "tasks",
        "reward",
        "tokens",
        "cut off",
        "failures",
        "best constant reply",
    )
    rows = [head]
    for name, r in results.items():
        constant = "" if r.constant is None else f"{r.constant:.3f} {r.constant_reply[:24]!r}"
        cut = f"{r.truncated:.0%}"
        span = f"{r.low:.3f} to {r.high:.3f}"
        rows.append(
            (
                name,
                f"{r.mean:.3f}",
                span,
                str(r.num_tasks),
                f"{r.reward:.3f}",
                f"{r.length:.1f}",
                cut,
                str(r.failures),
                constant,
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    for name, r in results.items():
        chances = (f"pass@{k} {mean:.3f} ({low:.3f} to {high:.3f})" for k, (mean, low, high) in r.pass_at.items())
        lines += [f"{name}: {', '.join(chances)}"] if r.pass_at else []
    return "\n".join(lines)
