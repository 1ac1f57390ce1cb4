"""From the specialists' graded groups to verified rows: what the student learns from.

    graded Groups ─ examine ─> Sampled (shards.py) ─ select ─> Rows + Summary ─ write_rows ─> NAME.jsonl, .parquet, .summary.json, .card.md

A row is kept when it was graded, ended by itself, scored at least the threshold, is in no benchmark, of the wanted difficulty, new, and
among the best of its prompt. Every row says where it comes from: the specialist and its checkpoint, the policy version that drew it, config
hash, tokenizer, seed, reward by part, how sparse the attention was, and what it was chosen from. Selecting is deterministic: the order of
the groups does not change which rows are kept.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from winnow.rollout.schema import Failure, Group, IndexRecord, Message, Score, Trajectory

PASS_BINS = 5  # of the histogram of pass rates: 0-20 %, ..., 80-100 %


@dataclass(frozen=True, kw_only=True, slots=True)
class Provenance:
    """What one specialist's groups have in common."""

    specialist: str
    checkpoint: str
    config_hash: str
    tokenizer: str = ""  # a hash of vocabulary and chat template


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One verified conversation. JSON values only, so that any tool can read it.

    `messages` begins with the `prompt_messages` messages of the prompt. `policy_version` is the newest that drew a token of it.
    `index`: `rows` (query rows recorded, over layers), `mean_selected`, `mean_available`, `selected_share`; empty without a record.
    `selection`: of the prompt's samples, how many had a score (`samples`), how many `passed`, the `pass_rate`, this row's `rank` among
    those kept (0 is the best), and `alike`, its largest similarity to a better one (Jaccard of the replies' words).
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
    tokenizer: str = ""
    selection: Mapping[str, float] = field(default_factory=dict)
    template: Mapping[str, Any] = field(default_factory=dict)  # options of the chat template that it was drawn with


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampled:
    """One prompt's graded samples, before anything is chosen: what a shard holds. `rows[i]` is None where the sample has no score."""

    request_id: str
    prompt: str  # `conversation_id` of the prompt's messages
    domain: str
    rows: tuple[Row | None, ...]
    finish_reasons: tuple[str, ...]
    failures: tuple[str | None, ...]  # kinds


@dataclass(kw_only=True)
class Summary:
    """What was kept and what was dropped, by domain and reason: `low_reward`, `truncated`, `failure_KIND`, `contaminated`, `too_easy`,
    `too_hard`, `duplicate`, `near_duplicate`, `surplus` (beyond the best of its prompt), `over_limit` (of the domain).

    `contaminated`: prompts by domain and benchmark. `difficulty`: prompts by domain and pass rate, in PASS_BINS bins.
    """

    sampled: dict[str, int] = field(default_factory=dict)
    passed: dict[str, int] = field(default_factory=dict)
    kept: dict[str, int] = field(default_factory=dict)
    dropped: dict[str, dict[str, int]] = field(default_factory=dict)
    contaminated: dict[str, dict[str, int]] = field(default_factory=dict)
    difficulty: dict[str, list[int]] = field(default_factory=dict)

    def pass_rate(self, domain: str) -> float:
        """Share of the sampled trajectories that reached the threshold and ended by themselves, before dedup and best n."""
        return self.passed.get(domain, 0) / max(1, self.sampled.get(domain, 0))

    def drop(self, domain: str, reason: str, count: int = 1) -> None:
        reasons = self.dropped.setdefault(domain, {})
        reasons[reason] = reasons.get(reason, 0) + count

    def as_dict(self) -> dict[str, Any]:
        rates = {domain: round(self.pass_rate(domain), 4) for domain in self.sampled}
        found = {"sampled": self.sampled, "pass_rate": rates, "kept": self.kept, "dropped": self.dropped}
        return {**found, "contaminated": self.contaminated, "difficulty": self.difficulty}


def examine(group: Group, provenance: Provenance) -> Sampled:
    """A graded group's samples as candidate rows. Raises ValueError for an ungraded group."""
    if len(group.scores) != len(group.trajectories):
        raise ValueError(f"group {group.request.request_id} is not graded: rows can only be verified from scores")
    pairs = list(zip(group.trajectories, group.scores, strict=True))
    return Sampled(
        request_id=group.request.request_id,
        prompt=prompt_key(group),
        domain=group.request.task.domain,
        rows=tuple(make_row(group, t, s, provenance) if isinstance(s, Score) else None for t, s in pairs),
        finish_reasons=tuple(t.finish_reason for t, _ in pairs),
        failures=tuple(s.kind if isinstance(s, Failure) else None for _, s in pairs),
    )


def verified(sampled: Iterable[Sampled], threshold: float, summary: Summary) -> dict[str, list[Row]]:
    """The rows that passed, by prompt, each with its prompt's pass rate; the others are counted in `summary` by reason."""
    prompts: dict[str, list[Row]] = {}
    scored: Counter[str] = Counter()
    domains: dict[str, str] = {}
    for one in sampled:
        summary.sampled[one.domain] = summary.sampled.get(one.domain, 0) + len(one.rows)
        domains[one.prompt] = one.domain
        for row, finish, failure in zip(one.rows, one.finish_reasons, one.failures, strict=True):
            scored[one.prompt] += row is not None
            reason = why_not(row, finish, failure, threshold)
            if reason:
                summary.drop(one.domain, reason)
                continue
            assert row is not None
            summary.passed[one.domain] = summary.passed.get(one.domain, 0) + 1
            prompts.setdefault(one.prompt, []).append(row)
    for prompt, domain in domains.items():
        if scored[prompt]:
            rate = len(prompts.get(prompt, ())) / scored[prompt]
            bins = summary.difficulty.setdefault(domain, [0] * PASS_BINS)
            bins[min(PASS_BINS - 1, int(rate * PASS_BINS))] += 1
    return {
        prompt: [with_selection(row, samples=scored[prompt], passed=len(rows)) for row in rows]
        for prompt, rows in prompts.items()
    }


def with_selection(row: Row, *, samples: int, passed: int) -> Row:
    return replace(row, selection={"samples": samples, "passed": passed, "pass_rate": round(passed / samples, 4)})


def why_not(row: Row | None, finish_reason: str, failure: str | None, threshold: float) -> str | None:
    """Why a sample is no candidate, or None."""
    if row is None:
        return f"failure_{failure}"
    if row.reward < threshold:
        return "low_reward"
    return "truncated" if finish_reason in ("length", "abort") else None


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
        tokenizer=provenance.tokenizer,
        template=dict(group.request.template),
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
