"""What a pipeline found, for a page of the docs: python -m winnow.rl.students_figure RESULT.json OUT.svg prints a Markdown table, writes a figure.

RESULT.json is a pipeline's result.json. The table has a row a model: held-out tasks solved by domain, with 95 % intervals, and its cost;
below it, what was asked of the student and of the mixed stage, as differences with the interval of the difference of two means. A pipeline
with controls writes both itself, as comparison.md and comparison.svg.
"""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from winnow.rl.charts import Interval, interval_chart
from winnow.rl.cost_figure import GAP, HEAD, STYLE
from winnow.rl.results import MODELS

LABELS = {"base": "base", "specialist": "specialist", "student": "student", "mixed": "mixed", "student-sft": "student (SFT)",
          "student-on_policy": "on-policy", "mixed-from-base": "from the base"}  # fmt: skip
UNEQUAL = 0.05  # a cost further than this from what it should equal is said to be so
ROW, EDGE, WIDTH = 26, 40, 320  # of interval_chart


def found(result: Mapping[str, Any], domain: str) -> dict[str, Mapping[str, Any]]:
    """Column of the table -> that model's result in the domain, in the order of the stages."""
    names = {column: f"specialist-{domain}" if column == "specialist" else column for column in MODELS}
    evaluated = result["evaluation"]
    return {column: evaluated[name][domain] for column, name in names.items() if domain in evaluated.get(name, {})}


def table(result: Mapping[str, Any]) -> Iterator[str]:
    """The lines of the Markdown table, then one line a comparison."""
    domains = list(result["domains"])
    by_domain = {domain: found(result, domain) for domain in domains}
    yield f"| model | {' | '.join(domains)} | {result['spent_unit']} |"
    yield "| --- |" + " --- |" * (len(domains) + 1)
    for column in [c for c in MODELS if any(c in by_domain[d] for d in domains)]:
        cells = []
        for domain in domains:
            r = by_domain[domain].get(column)
            cells.append(f"{r['mean']:.3f} ({r['low']:.3f} to {r['high']:.3f})" if r else "")
        own = [f"specialist-{d}" for d in domains] if column == "specialist" else [column]
        cost = ", ".join(f"{result['spent'][name]:.0f}" for name in own if result["spent"].get(name))
        yield f"| {LABELS[column]} | {' | '.join(cells)} | {cost} |"
    yield ""
    for one, other in (("student", "specialist"), ("student-on_policy", "specialist"), ("mixed", "specialist"), ("mixed", "mixed-from-base")):  # fmt: skip
        for domain in domains:
            pair = by_domain[domain]
            if one in pair and other in pair:
                yield f"{domain}: {LABELS[one]} - {LABELS[other]} = {difference(pair[one], pair[other])}"
    yield from equal_costs(result["spent"])


def equal_costs(spent: Mapping[str, float]) -> Iterator[str]:
    """What each control cost over what it is compared with: a control that ran short of its seconds flatters the other."""
    pairs = (("student-on_policy", "student"), ("student-sft", "student"), ("mixed-from-base", "mixed"))
    for control, other in pairs:
        if spent.get(control) and spent.get(other):
            ratio = spent[control] / spent[other]
            apart = "" if abs(ratio - 1) <= UNEQUAL else " NOT EQUAL"
            yield f"cost of {LABELS[control]} over {LABELS[other]}: {ratio:.2f}{apart}"


def difference(one: Mapping[str, Any], other: Mapping[str, Any]) -> str:
    """Points between two means, with the 95 % interval of independent ones: wider than that of the same tasks' differences."""
    points = 100 * (one["mean"] - other["mean"])
    half = 50 * math.hypot(one["high"] - one["low"], other["high"] - other["low"])
    return f"{points:+.1f} points ({points - half:+.1f} to {points + half:+.1f})"


def figure(result: Mapping[str, Any]) -> str:
    """A whole SVG document: a panel a domain, a row a model, the best constant reply dashed."""
    parts, tallest = [], 0
    for number, domain in enumerate(result["domains"]):
        rows = [
            Interval(LABELS[column], r["mean"], r["low"], r["high"], f"{r['num_tasks']} tasks")
            for column, r in found(result, domain).items()
        ]
        constant = result["domains"][domain].get("constant")
        chart = interval_chart(rows, mark=constant, mark_label="the best constant reply", label=domain)
        inner = re.sub(r"^<svg[^>]*>|</svg>$", "", chart)
        title = f'<text x="8" y="14">{domain}: held-out tasks solved, 95 % intervals</text>'
        at = number * (WIDTH + GAP)
        parts.append(f'<g transform="translate({at} 0)">{title}<g transform="translate(0 {HEAD})">{inner}</g></g>')
        tallest = max(tallest, ROW * len(rows) + EDGE)
    size = f"0 0 {len(parts) * (WIDTH + GAP) - GAP} {tallest + HEAD}"
    return f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="{size}" role="img"><style>{STYLE}</style>{"".join(parts)}</svg>\n'


def write_comparison(folder: Path, result: Mapping[str, Any]) -> Path:
    """FOLDER/comparison.md with the table, comparison.svg with the figure; returns the first."""
    (folder / "comparison.svg").write_text(figure(result))
    path = folder / "comparison.md"
    path.write_text("\n".join(table(result)) + "\n")
    return path


def main(arguments: Sequence[str]) -> int:
    if len(arguments) != 2:
        print(__doc__, file=sys.stderr)
        return 2
    result = json.loads(Path(arguments[0]).read_text())
    Path(arguments[1]).write_text(figure(result))
    print("\n".join(table(result)))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
