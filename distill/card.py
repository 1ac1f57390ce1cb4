"""The data card: what a folder of rows holds, where it comes from and what was left out, as Markdown with its counts and bars of text."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from winnow.distill.data import PASS_BINS, Row, Summary

BAR = 30  # characters of the longest bar
LENGTHS = 6  # bins of generated tokens


def data_card(rows: Sequence[Row], summary: Summary, name: str) -> str:
    """Markdown, with the front matter that the hub's viewers read."""
    sections = [
        f"---\nconfigs:\n- config_name: default\n  data_files: {name}.parquet\n---\n",
        f"# {name}: {len(rows)} verified conversations\n",
        _table(
            ["domain", "samples", "pass rate", "rows", "prompts", "left out"],
            [_domain(domain, rows, summary) for domain in summary.sampled],
        ),
        "## Where they come from\n",
        _table(["specialist", "checkpoint", "config", "tokenizer", "rows"], _sources(rows)),
        "Each row also names its seed, request, sample, policy version, the parts of its reward and what it was chosen from.\n",
    ]
    for domain, bins in summary.difficulty.items():
        labels = [f"{100 * i // PASS_BINS}-{100 * (i + 1) // PASS_BINS} %" for i in range(PASS_BINS)]
        sections.append(_bars(f"{domain}: prompts by pass rate", dict(zip(labels, bins, strict=True))))
    for domain in summary.kept:
        tokens = [row.num_generated for row in rows if row.domain == domain]
        sections.append(_bars(f"{domain}: rows by generated tokens", _histogram(tokens)))
    return "\n".join(sections)


def _domain(domain: str, rows: Sequence[Row], summary: Summary) -> list[str]:
    own = [row for row in rows if row.domain == domain]
    prompts = {tuple(m["content"] for m in row.messages[: row.prompt_messages]) for row in own}
    left = ", ".join(f"{reason} {count}" for reason, count in sorted(summary.dropped.get(domain, {}).items()))
    leaks = ", ".join(f"{name} {count}" for name, count in sorted(summary.contaminated.get(domain, {}).items()))
    left += f" (prompts in {leaks})" if leaks else ""
    return [
        domain, str(summary.sampled[domain]), f"{summary.pass_rate(domain):.1%}", str(len(own)), str(len(prompts)), left or "-"
    ]  # fmt: skip


def _sources(rows: Sequence[Row]) -> list[list[str]]:
    found = Counter((row.specialist, row.checkpoint, row.config_hash, row.tokenizer) for row in rows)
    return [[*source, str(count)] for source, count in sorted(found.items())]


def _histogram(values: Sequence[int]) -> dict[str, int]:
    """Counts in at most LENGTHS equal bins from the least to the largest value."""
    if not values:
        return {}
    low, high = min(values), max(values)
    width = -(-(high - low + 1) // LENGTHS)
    counts = Counter((value - low) // width for value in values)
    return {f"{low + i * width}-{low + (i + 1) * width - 1}": counts[i] for i in range((high - low) // width + 1)}


def _bars(title: str, counts: Mapping[str, int]) -> str:
    longest, width = max(counts.values(), default=0), max((len(label) for label in counts), default=0)
    lines = [
        f"{label.rjust(width)}  {'#' * round(BAR * count / max(1, longest))} {count}" for label, count in counts.items()
    ]
    return "\n".join([f"### {title}\n", "```", *lines, "```\n"])


def _table(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    rows = [head, ["---"] * len(head), *body]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows) + "\n"
