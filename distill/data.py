"""From the specialists' graded groups to verified rows: what the student learns from.

    graded Groups ─ select ─> Rows + Summary ─ write_rows ─> NAME.jsonl, NAME.parquet, NAME.summary.json ─ read_rows ─> Rows

A row is kept when it was graded, ended by itself, scored at least the threshold, is new, and is among the best of its prompt. Every
row says where it comes from: the specialist and its checkpoint, the policy version that drew it, config hash, seed, reward by part, and
how sparse the attention was. Selecting is deterministic: the order of the groups does not change which rows are kept.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from winnow.rollout.schema import Failure, Group, IndexRecord, Message, Score, Trajectory


@dataclass(frozen=True, kw_only=True, slots=True)
class Provenance:
    """What one specialist's groups have in common."""

    specialist: str
    checkpoint: str
    config_hash: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One verified conversation. JSON values only, so that any tool can read it.

    `messages` begins with the `prompt_messages` messages of the prompt. `policy_version` is the newest that drew a token of it.
    `index`: `rows` (query rows recorded, over layers), `mean_selected`, `mean_available`, `selected_share`; empty without a record.
    """

    id: str  # a hash of prompt and replies: equal conversations have equal ids
    domain: str
    task_id: str
    messages: tuple[Message, ...]
    prompt_messages: int
    reward: float
    parts: Mapping[str, float] = field(default_factory=dict)
    specialist: str
    checkpoint: str
    config_hash: str
    policy_version: int
    seed: int
    request_id: str
    sample: int
    turns: int
    num_tokens: int
    num_generated: int
    index: Mapping[str, float] = field(default_factory=dict)


@dataclass(kw_only=True)
class Summary:
    """What was kept and what was dropped, by domain and reason: `low_reward`, `truncated`, `duplicate`, `surplus`, `failure_KIND`."""

    sampled: dict[str, int] = field(default_factory=dict)
    passed: dict[str, int] = field(default_factory=dict)
    kept: dict[str, int] = field(default_factory=dict)
    dropped: dict[str, dict[str, int]] = field(default_factory=dict)

    def pass_rate(self, domain: str) -> float:
        """Share of the sampled trajectories that reached the threshold and ended by themselves, before dedup and best n."""
        return self.passed.get(domain, 0) / max(1, self.sampled.get(domain, 0))

    def as_dict(self) -> dict[str, Any]:
        rates = {domain: round(self.pass_rate(domain), 4) for domain in self.sampled}
        return {"sampled": self.sampled, "pass_rate": rates, "kept": self.kept, "dropped": self.dropped}


def select(
    groups: Iterable[Group], provenance: Provenance, threshold: float = 1.0, best: int = 2
) -> tuple[list[Row], Summary]:
    """The verified rows of one specialist: reward >= threshold, at most `best` different replies a prompt, the best first.

    Of equal rewards the shorter reply wins. Raises ValueError for ungraded groups, for best < 1, and for a domain of which nothing is
    left: it names the domain and its pass rate.
    """
    if best < 1:
        raise ValueError(f"best is {best}, but at least one reply per prompt must be kept")
    dropped: dict[str, Counter[str]] = defaultdict(Counter)
    sampled: Counter[str] = Counter()
    passed: Counter[str] = Counter()
    by_prompt: dict[str, list[Row]] = defaultdict(list)
    for group in groups:
        if len(group.scores) != len(group.trajectories):
            raise ValueError(f"group {group.request.request_id} is not graded: rows can only be verified from scores")
        for trajectory, score in zip(group.trajectories, group.scores, strict=True):
            domain = trajectory.domain
            sampled[domain] += 1
            reason = why_not(trajectory, score, threshold)
            if reason:
                dropped[domain][reason] += 1
                continue
            assert isinstance(score, Score)
            passed[domain] += 1
            by_prompt[prompt_key(group)].append(make_row(group, trajectory, score, provenance))
    rows = choose(by_prompt, best, dropped)
    kept = Counter(row.domain for row in rows)
    summary = Summary(
        sampled=dict(sampled),
        passed=dict(passed),
        kept=dict(kept),
        dropped={domain: dict(reasons) for domain, reasons in dropped.items()},
    )
    check_kept(summary, threshold, provenance)
    return rows, summary


def check_kept(summary: Summary, threshold: float, provenance: Provenance) -> None:
    """Raises ValueError where a domain, or everything, has no verified row."""
    if not summary.sampled:
        raise ValueError(f"specialist {provenance.specialist!r} has no samples to verify: generate some first")
    for domain, count in summary.sampled.items():
        if not summary.kept.get(domain):
            raise ValueError(
                f"domain {domain!r} has no verified row: pass rate {summary.pass_rate(domain):.1%} of {count} samples at threshold "
                f"{threshold:g} (dropped: {summary.dropped.get(domain, {})}); train specialist {provenance.specialist!r} longer, sample "
                "more per prompt, or lower the threshold"
            )


def why_not(trajectory: Trajectory, score: Score | Failure, threshold: float) -> str | None:
    """Why a trajectory is no candidate, or None."""
    if isinstance(score, Failure):
        return f"failure_{score.kind}"
    if score.value < threshold:
        return "low_reward"
    return "truncated" if trajectory.finish_reason in ("length", "abort") else None


def choose(by_prompt: Mapping[str, Sequence[Row]], best: int, dropped: Mapping[str, Counter[str]]) -> list[Row]:
    """Exact duplicates and all but the best of each prompt removed; sorted, so that the order of arrival does not matter."""
    rows: list[Row] = []
    for key in sorted(by_prompt):
        unique: dict[str, Row] = {}
        for row in sorted(by_prompt[key], key=lambda r: (-r.reward, r.num_generated, r.id, r.request_id, r.sample)):
            if row.id in unique:
                dropped[row.domain]["duplicate"] += 1
            elif len(unique) >= best:
                dropped[row.domain]["surplus"] += 1
            else:
                unique[row.id] = row
        rows += unique.values()
    return rows


def prompt_key(group: Group) -> str:
    return conversation_id(group.request.task.messages)


def conversation_id(messages: Sequence[Message]) -> str:
    plain = [[message["role"], message["content"]] for message in messages]
    return hashlib.blake2b(json.dumps(plain, ensure_ascii=False).encode(), digest_size=12).hexdigest()


def make_row(group: Group, trajectory: Trajectory, score: Score, provenance: Provenance) -> Row:
    versions = trajectory.policy_versions[trajectory.loss_mask]
    return Row(
        id=conversation_id(trajectory.messages),
        domain=trajectory.domain,
        task_id=trajectory.task_id,
        messages=tuple({"role": m["role"], "content": m["content"]} for m in trajectory.messages),
        prompt_messages=len(group.request.task.messages),
        reward=score.value,
        parts=dict(score.parts),
        specialist=provenance.specialist,
        checkpoint=provenance.checkpoint,
        config_hash=provenance.config_hash,
        policy_version=int(versions.max()) if len(versions) else -1,
        seed=group.request.sampling.seed,
        request_id=trajectory.request_id,
        sample=trajectory.sample,
        turns=trajectory.turns,
        num_tokens=len(trajectory.tokens),
        num_generated=trajectory.num_generated,
        index=index_stats(trajectory.index_record),
    )


def index_stats(record: IndexRecord | None) -> dict[str, float]:
    """How sparse the rollout was: mean numbers of selected and of available positions over the recorded rows of all layers."""
    if record is None or not record.num_rows:
        return {}
    sets = record.indices
    selected = (sets != np.iinfo(sets.dtype).max).sum(-1)  # [layers, rows]
    available = record.first + 1 + np.arange(record.num_rows)  # the query at position t sees t + 1
    return {
        "rows": float(selected.size),
        "mean_selected": round(float(selected.mean()), 3),
        "mean_available": round(float(available.mean()), 3),
        "selected_share": round(float((selected / available).mean()), 5),
    }
