"""What training on some things cost on others: a model against its base and against the specialist of each domain, task by task.

Both models answered the same held-out tasks (answers files of `evaluate`), so the difference is taken within each task: its interval is
that of a mean of paired differences. `forward_kl` is KL(base || model) on the base's own held-out replies: how far a model has moved
where nobody asked it to.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from winnow.rl.evaluate import student_t
from winnow.rollout.schema import Trajectory

UNKNOWN = 1e6  # half an interval that nothing is known of; JSON has no infinity


def solved_by_task(answers: Path) -> dict[str, dict[str, float]]:
    """domain -> task id -> share of its samples that solved it; samples without a score are left out."""
    found: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for line in answers.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        if "solved" in row:
            found[row["domain"]][row["task_id"]].append(float(row["solved"]))
    return {domain: {task: float(np.mean(v)) for task, v in tasks.items()} for domain, tasks in found.items()}


def paired_change(before: Mapping[str, float], after: Mapping[str, float]) -> dict[str, float]:
    """Mean of after - before over the tasks that both have, with its 95 % interval (Student's t). ValueError where there are none."""
    shared = sorted(set(before) & set(after))
    if not shared:
        raise ValueError("the two models answered no task in common: evaluate both on the same held-out tasks")
    change = mean_interval([after[task] - before[task] for task in shared])
    return {**change, "low": max(-1.0, change["low"]), "high": min(1.0, change["high"])}


def mean_interval(values: Sequence[float]) -> dict[str, float]:
    """Mean and 95 % interval of independent values of any range; a single one says next to nothing: +- UNKNOWN."""
    n, mean = len(values), float(np.mean(values))
    half = student_t(n - 1) * float(np.std(values, ddof=1)) / math.sqrt(n) if n > 1 else UNKNOWN
    return {"mean": mean, "low": mean - half, "high": mean + half, "count": float(n)}


def forgetting(folder: Path, names: Sequence[str], base: str = "base", prefix: str = "specialist-") -> dict[str, Any]:
    """model -> domain -> {"over_base": change, "over_specialist": change} from `folder`/<model>.jsonl; what has no file is left out.

    The specialist of domain D is <prefix>D. Specialists are compared with the base on every domain they were evaluated on.
    """
    solved = {name: solved_by_task(folder / f"{name}.jsonl") for name in names if (folder / f"{name}.jsonl").is_file()}
    report: dict[str, Any] = {}
    for name, domains in solved.items():
        for domain, tasks in domains.items():
            row = {}
            if name != base and domain in solved.get(base, {}):
                row["over_base"] = paired_change(solved[base][domain], tasks)
            own = f"{prefix}{domain}"
            if name not in (base, own) and domain in solved.get(own, {}):
                row["over_specialist"] = paired_change(solved[own][domain], tasks)
            if row:
                report.setdefault(name, {})[domain] = row
    return report


def base_replies(answers: Path) -> list[Trajectory]:
    """The replies of an answers file, ready to be scored under another model."""
    made = []
    for line in answers.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        mask = np.array(row["loss_mask"], bool)
        if mask.any():
            made.append(
                Trajectory(
                    request_id=row["request_id"], sample=row["sample"], task_id=row["task_id"], domain=row["domain"],
                    tokens=np.array(row["tokens"], np.int32), loss_mask=mask, rollout_logprobs=np.zeros(len(mask), np.float32),
                    policy_versions=np.where(mask, 0, -1).astype(np.int32), finish_reason=row["finish_reason"], messages=(),
                )
            )  # fmt: skip
    return made


def forward_kl(
    replies: Sequence[Trajectory], base: Sequence[np.ndarray], model: Sequence[np.ndarray]
) -> dict[str, dict[str, float]]:
    """domain -> KL(base || model) per token: the mean over the base's replies of mean(log base - log model), with its interval by reply.

    base, model: fp32 [generated tokens] of each reply under the two.
    """
    by_domain: dict[str, list[float]] = defaultdict(list)
    for reply, old, new in zip(replies, base, model, strict=True):
        by_domain[reply.domain].append(float(np.mean(old.astype(np.float64) - new)))
    return {domain: mean_interval(values) for domain, values in by_domain.items()}


def lines(report: Mapping[str, Any]) -> list[str]:
    """One line for each model, domain and comparison."""
    made = []
    for name, domains in report.items():
        for domain, row in domains.items():
            for against, change in row.items():
                made.append(
                    f"{domain}: {name} {change['mean']:+.3f} ({change['low']:+.2f} to {change['high']:+.2f}, {change['count']:.0f} tasks) "
                    f"{against.replace('_', ' ')}"
                )
    return made
