"""Which of the verified rows a student learns from: not the benchmarks', of the wanted difficulty, new, the best or most different ones.

verified rows by prompt ─ contaminated ─ too easy, too hard ─ best of each prompt, exact and near duplicates ─ limit a domain ─> Rows
"""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from winnow.distill.contamination import Contamination, Leak
from winnow.distill.data import PASS_BINS, Provenance, Row, Sampled, Summary, examine, verified
from winnow.distill.similarity import NearIndex, jaccard, shingles, words
from winnow.rollout.schema import Group

Shingles = frozenset[int]


@dataclass(frozen=True, kw_only=True)
class Rules:
    """What is kept. The defaults switch everything off but the threshold, exact duplicates and the best two of a prompt."""

    threshold: float = 1.0  # least reward
    best: int = 2  # rows of a prompt
    diverse: bool = False  # after the best reply, the one least like those chosen, instead of the next best
    near: float = 1.0  # rows at least so alike (Jaccard of runs of five words) are duplicates; 1: only equal ones
    min_pass_rate: float = 0.0  # of a prompt's scored samples
    max_pass_rate: float = 1.0
    limit: int | None = None  # rows of a domain, spread over difficulties, every prompt once before any twice
    max_contaminated: float = 0.05  # a larger share of a domain's verified prompts in a benchmark is an error

    def __post_init__(self) -> None:
        if self.best < 1:
            raise ValueError(f"best is {self.best}, but at least one reply per prompt must be kept")
        if not 0 < self.near <= 1:
            raise ValueError(
                f"near is {self.near}, but a similarity is in (0, 1]: 0.8 is usual, 1 keeps all but equal rows"
            )
        if not 0 <= self.min_pass_rate <= self.max_pass_rate <= 1:
            raise ValueError(
                f"pass rates from {self.min_pass_rate} to {self.max_pass_rate} are no range within 0 and 1: "
                "set min_pass_rate <= max_pass_rate"
            )


def select(
    groups: Iterable[Group], provenance: Provenance, threshold: float = 1.0, best: int = 2
) -> tuple[list[Row], Summary]:
    """The verified rows of one specialist's graded groups; `choose` with the two rules that everybody sets."""
    return choose(
        [examine(group, provenance) for group in groups], provenance.specialist, Rules(threshold=threshold, best=best)
    )


def choose(
    sampled: Sequence[Sampled], specialist: str, rules: Rules, benchmarks: Contamination | None = None
) -> tuple[list[Row], Summary]:
    """The rows that the rules keep, sorted, so that the order of arrival does not matter.

    Of equal rewards the shorter reply wins. Raises ValueError for a domain of which nothing is left (it names the domain and its pass
    rate) and for one with more prompts in a benchmark than the rules allow.
    """
    summary = Summary()
    prompts = verified(sampled, rules.threshold, summary)
    prompts = without_leaks(prompts, benchmarks, rules, summary)
    prompts = of_difficulty(prompts, rules, summary)
    rows = [row for key in sorted(prompts) for row in best_of(prompts[key], rules, summary)]
    if rules.near < 1:
        rows = without_near(rows, rules.near, summary)
    if rules.limit is not None:
        rows = limited(rows, rules.limit, summary)
    summary.kept = dict(Counter(row.domain for row in rows))
    check_kept(summary, rules, specialist)
    return rows, summary


def check_kept(summary: Summary, rules: Rules, specialist: str) -> None:
    """Raises ValueError where a domain, or everything, has no verified row."""
    if not summary.sampled:
        raise ValueError(f"specialist {specialist!r} has no samples to verify: generate some first")
    for domain, count in summary.sampled.items():
        if not summary.kept.get(domain):
            raise ValueError(
                f"domain {domain!r} has no verified row: pass rate {summary.pass_rate(domain):.1%} of {count} samples at threshold "
                f"{rules.threshold:g} (dropped: {summary.dropped.get(domain, {})}); train specialist {specialist!r} longer, sample "
                "more per prompt, or lower the threshold"
            )


def without_leaks(
    prompts: Mapping[str, list[Row]], benchmarks: Contamination | None, rules: Rules, summary: Summary
) -> dict[str, list[Row]]:
    """The prompts that no benchmark holds. Raises ValueError where a domain has more of them than `max_contaminated`."""
    if benchmarks is None:
        return dict(prompts)
    kept, leaks = {}, defaultdict[str, list[Leak]](list)
    totals = Counter(rows[0].domain for rows in prompts.values())
    for key, rows in sorted(prompts.items()):
        leak = benchmarks.find(prompt_text(rows[0]))
        if leak is None:
            kept[key] = rows
            continue
        domain = rows[0].domain
        leaks[domain].append(leak)
        summary.drop(domain, "contaminated", len(rows))
    for domain, found in leaks.items():
        summary.contaminated[domain] = dict(sorted(Counter(leak.benchmark for leak in found).items()))
        if len(found) > rules.max_contaminated * totals[domain]:
            raise ValueError(
                f"domain {domain!r}: {len(found)} of {totals[domain]} verified prompts stand in a benchmark that evaluation uses "
                f"({summary.contaminated[domain]}; e.g. {found[0].benchmark}: {found[0].item!r}, {found[0].overlap:.0%} of it), more than "
                f"max_contaminated {rules.max_contaminated:g}: take these tasks out of the domain's source, evaluate on another "
                "benchmark, or raise max_contaminated, which only drops them"
            )
    return kept


def prompt_text(row: Row) -> str:
    """What the model was asked, without a system message: that stands before every prompt."""
    return "\n".join(m["content"] for m in row.messages[: row.prompt_messages] if m["role"] != "system")


def of_difficulty(prompts: Mapping[str, list[Row]], rules: Rules, summary: Summary) -> dict[str, list[Row]]:
    kept = {}
    for key, rows in prompts.items():
        rate = rows[0].selection["pass_rate"]
        if rules.min_pass_rate <= rate <= rules.max_pass_rate:
            kept[key] = rows
        else:
            summary.drop(rows[0].domain, "too_hard" if rate < rules.min_pass_rate else "too_easy", len(rows))
    return kept


def best_of(rows: Sequence[Row], rules: Rules, summary: Summary) -> list[Row]:
    """At most `best` different replies to one prompt: the best first, then the next best or the most different one."""
    unique: dict[str, Row] = {}
    for row in sorted(rows, key=lambda r: (-r.reward, r.num_generated, r.id, r.request_id, r.sample)):
        if row.id in unique:
            summary.drop(row.domain, "duplicate")
        else:
            unique[row.id] = row
    waiting = [(row, reply_shingles(row)) for row in unique.values()]
    chosen: list[tuple[Row, Shingles]] = []
    while waiting and len(chosen) < rules.best:
        alike = [max((jaccard(found, other) for _, other in chosen), default=0.0) for _, found in waiting]
        place = min(range(len(waiting)), key=lambda i: (alike[i], i)) if rules.diverse and chosen else 0
        row, found = waiting.pop(place)
        if chosen and alike[place] >= rules.near and rules.near < 1:
            summary.drop(row.domain, "near_duplicate")
            continue
        marks = {**row.selection, "rank": len(chosen), "alike": round(alike[place], 4)}
        chosen.append((replace(row, selection=marks), found))
    for row, _ in waiting:
        summary.drop(row.domain, "surplus")
    return [row for row, _ in chosen]


def reply_shingles(row: Row) -> Shingles:
    return shingles([w for m in row.messages[row.prompt_messages :] for w in words(m["content"])])


def without_near(rows: Sequence[Row], threshold: float, summary: Summary) -> list[Row]:
    """Rows whose whole conversation is less than `threshold` alike to every one kept before of another prompt, by domain.

    Replies to one prompt are compared in `best_of`, without the prompt that they share.
    """
    indices: dict[str, NearIndex] = {}
    kept: list[Row] = []
    kept_prompts: set[tuple[str, str]] = set()
    for row in rows:
        index = indices.setdefault(row.domain, NearIndex(threshold))
        prompt = (row.domain, prompt_text(row))
        found = shingles([w for m in row.messages for w in words(m["content"])])
        if prompt not in kept_prompts and index.nearest(found):
            summary.drop(row.domain, "near_duplicate")
            continue
        kept_prompts.add(prompt)
        index.add(row.id, found)
        kept.append(row)
    return kept


def limited(rows: Sequence[Row], limit: int, summary: Summary | None = None) -> list[Row]:
    """At most `limit` rows of each domain: difficulties in turn, every prompt once before any twice, in the order of a hash."""
    ranked: dict[str, list[tuple[tuple[float, int, str], Row]]] = defaultdict(list)
    seen: Counter[tuple[str, float, int]] = Counter()
    for row in sorted(rows, key=_draw):
        rank = row.selection.get("rank", 0)
        bin_ = min(PASS_BINS - 1, int(row.selection.get("pass_rate", 1.0) * PASS_BINS))
        turn = seen[row.domain, rank, bin_]  # the n-th row of its difficulty
        seen[row.domain, rank, bin_] += 1
        ranked[row.domain].append(((rank, turn, _draw(row)), row))
    keep = {row.id for pairs in ranked.values() for _, row in sorted(pairs, key=lambda pair: pair[0])[: max(limit, 0)]}
    for row in rows:
        if row.id not in keep and summary is not None:
            summary.drop(row.domain, "over_limit")
    return [row for row in rows if row.id in keep]


def balanced(rows: Sequence[Row]) -> list[Row]:
    """As many rows of every domain as the smallest has."""
    counts = Counter(row.domain for row in rows)
    return limited(rows, min(counts.values())) if counts else []


def _draw(row: Row) -> str:
    return hashlib.blake2b(row.id.encode(), digest_size=8).hexdigest()
