"""Part of the report page: what each domain's reward is made of, over the steps, and which samples had none."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from winnow.rl.charts import Series, line_chart
from winnow.rl.report import card, grid, section, table

MAX_CURVES = 6  # parts of one domain in its chart; the table has all of them
HEAD = ("domain", "part", "first steps", "last steps", "failures by kind, all steps")
EDGE = 3  # steps at either end that a figure of the table is the mean of


def sections(metrics: Sequence[Mapping[str, Any]], title: str = "Rewards by part") -> Iterator[str]:
    """A chart a domain and one table. Nothing for a run without parts and failures."""
    lines = [line for line in metrics if line.get("step", 0) > 0]
    names = dict.fromkeys(name for line in lines for name in line)
    domains = list(dict.fromkeys(name.split("/")[1] for name in names if name.startswith(("part/", "reward/"))))
    domains = [domain for domain in domains if domain != "mean"]
    cards, rows = [], []
    for domain in domains:
        parts = [name for name in names if name.startswith(f"part/{domain}/")]
        failures = failure_counts(lines, domain)
        said = ", ".join(f"{kind} {count}" for kind, count in failures.items()) or "none"
        series = [
            Series(
                name.removeprefix(f"part/{domain}/"),
                [line["step"] for line in lines],
                [line.get(name) for line in lines],
            )
            for name in parts
        ]
        if series:
            note = "mean over the step's samples" + (f"; failures: {said}" if failures else "")
            cards.append(card(domain, note, line_chart(series[:MAX_CURVES], label=f"parts of the reward of {domain}")))
        for place, name in enumerate([f"reward/{domain}", *parts]):
            shown = "reward" if place == 0 else name.removeprefix(f"part/{domain}/")
            rows.append([domain, shown, *edges(lines, name), said if place == 0 else ""])
    if rows:
        text = "<p>A failure is a sample without a score: it is dropped and counted, never a reward of 0.</p>"
        yield section(title, text + grid(cards) + table(HEAD, rows))


def failure_counts(lines: Sequence[Mapping[str, Any]], domain: str) -> Counter[str]:
    """Failures of a domain by kind, over all steps."""
    counts: Counter[str] = Counter()
    start = f"failures/{domain}/"
    for line in lines:
        for name, value in line.items():
            if name.startswith(start) and value:
                counts[name.removeprefix(start)] += int(value)
    return counts


def edges(lines: Sequence[Mapping[str, Any]], name: str) -> tuple[str, str]:
    """Means over the first and the last steps that have the metric."""
    values = [float(line[name]) for line in lines if line.get(name) is not None]
    if not values:
        return "-", "-"
    first, last = values[:EDGE], values[-EDGE:]
    return f"{sum(first) / len(first):.3f}", f"{sum(last) / len(last):.3f}"
