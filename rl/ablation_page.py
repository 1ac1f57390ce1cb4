"""The pages of an ablation: table.md, and its curves as SVG. What they show is made in ablation_table.py."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from statistics import mean, median
from typing import TYPE_CHECKING, Any

from winnow.rl.charts import HEIGHT, WIDTH, Series, line_chart
from winnow.rl.cost_figure import GAP, HEAD, STYLE

if TYPE_CHECKING:
    from winnow.rl.bench_ablation import Running

REFERENCE = "deterministic"
LAST = 10  # steps at the end over which "reward at the end" is taken
SMOOTH = 5  # steps of a moving mean in the reward's chart
ROOM = 50  # right of the charts, for the ends of names
BINDING = 8  # a trained row should see so many times k positions
# the charts: a file each, its variants in this order
GROUPS = {
    "selection": ("random_ties", "deterministic", "replay"),
    "training": ("deterministic", "kl", "replay", "replay_kl"),
    "correction": ("deterministic", "tis", "icepop", "opsm"),
    "attention": ("deterministic", "dense"),
}
CURVES = (
    ("reward/mean", f"reward, mean of {SMOOTH} steps", False),
    ("entropy", "entropy, nats a token", False),
    ("mismatch/k3_kl", "k3 KL of rollout and learner", True),
    ("index/jaccard", "Jaccard of their sets", False),
)
COLUMNS = {
    "steps": "steps", "reward_end": f"reward, last {LAST} steps", "reward_all": "reward, all steps", "held_out": "held out, at the end",
    "entropy_end": "entropy at the end", "k3_fresh": "k3 KL, same weights", "k3": "k3 KL, all steps", "k3_max": "k3 KL, largest",
    "jaccard_fresh": "Jaccard, same weights", "jaccard": "Jaccard, all steps", "masked": "masked or capped", "clipped": "clipped",
    "indexer_kl": f"indexer KL, last {LAST} steps", "grad_norm_max": "largest gradient norm", "step_s": "s a step",
}  # fmt: skip


def average(rows: Sequence[Mapping[str, Any]], name: str) -> float | None:
    return mean(row[name] for row in rows) if rows else None


# -------------------------------------------------------------------------------------------------------------------------- as text


def as_markdown(result: Mapping[str, Any]) -> str:
    """The tables: a line a variant, differences, accuracy by length; then what failed or was cut, by name."""
    plan = result["config"]
    lines = [
        f"{plan['model']}, {plan['dtype']}, lr {plan['lr']:g}, {plan['prompts']} prompts x {plan['samples']} samples a step of "
        f"{', '.join(plan['domains'])}; {plan['updates_per_batch']} updates a batch, the rollout's weights renewed every "
        f"{plan['sync_every']} steps. The first {result['steps']} of {plan['asked_steps']} steps. Mean of the seeds (smallest-largest).",
        "",
        *as_rows(["variant", "seeds", *COLUMNS.values()], [
            [name, str(row["seeds"]), *(ranged(row[column]) for column in COLUMNS)] for name, row in result["variants"].items()
        ]),
        "",
    ]  # fmt: skip
    differences = [
        [name, *(spanned(row["difference"][part]) for part in ("all", "end")), str(row["difference"]["prompts"])]
        for name, row in result["variants"].items()
        if row.get("difference")
    ]
    if differences:
        head = ["variant", f"reward minus {REFERENCE}'s, all steps", f"last {LAST} steps", "prompts"]
        lines += ["Paired by prompt, mean and 95 % interval over prompts:", "", *as_rows(head, differences), ""]
    lines += binding_lines(result["figures"])
    if {"dense", REFERENCE} <= set(result["by_length"]):
        lines += ["Mean reward by generated tokens (samples):", "", *length_rows(result["by_length"]), ""]
    for name, run in result["runs"].items():
        if run["status"] != "done":
            lines.append(f"{name}: {run['status']} after {run['steps']} steps. {run['why']}".rstrip())
    return "\n".join(lines).rstrip() + "\n"


def binding_lines(figures: Mapping[str, Any]) -> list[str]:
    """How far past k the trained rows are; says so where some see less than BINDING times k."""
    found = [row["length_over_k"] for row in figures.values() if row.get("length_over_k")]
    if not found:
        return []
    least = min(row["min"] for row in found)
    middle = median(row["median"] for row in found)
    short = "" if least >= BINDING else f" NOT ALL rows see {BINDING} k or more."
    return [
        f"Trained rows see {least:.1f} k positions or more, {middle:.1f} k in the middle (k = {found[0]['k']}).{short}",
        "",
    ]


def length_rows(found: Mapping[str, Mapping[str, Sequence[float]]]) -> list[str]:
    names = [REFERENCE, "dense"]
    lengths = sorted({int(n) for name in names for n in found[name]})
    cells = [
        [
            str(n),
            *(
                f"{found[name][str(n)][1]:.3f} ({found[name][str(n)][0]:.0f})" if str(n) in found[name] else "-"
                for name in names
            ),
        ]
        for n in lengths
    ]
    return as_rows(["tokens", *names], cells)


def as_rows(head: Sequence[str], cells: Iterable[Sequence[str]]) -> list[str]:
    return [" | ".join(("", *row, "")).strip() for row in (head, ["---"] * len(head), *cells)]


def ranged(value: Sequence[float] | None) -> str:
    if value is None:
        return "-"
    middle, low, high = (short(v) for v in value)
    return middle if low == high else f"{middle} ({low}-{high})"


def spanned(value: Sequence[float]) -> str:
    return f"{value[0]:+.3f} ({value[1]:+.3f} to {value[2]:+.3f})"


def short(value: float) -> str:
    if value == 0 or value == int(value):
        return f"{value:.0f}"
    return f"{value:.1e}" if abs(value) < 1e-3 or abs(value) >= 1e4 else f"{value:.3g}"


# ------------------------------------------------------------------------------------------------------------------------- as curves


def figure(names: Sequence[str], runs: Sequence[Running]) -> str:
    """A whole SVG document: CURVES in two columns, a line a variant, the mean of its seeds."""
    parts = []
    for number, (metric, title, log) in enumerate(CURVES):
        series = [curve(name, [run.rows() for run in runs if run.variant == name], metric) for name in names]
        inner = re.sub(r"^<(svg|p)[^>]*>|</(svg|p)>$", "", line_chart([s for s in series if s.x], log=log, label=title))
        inner = inner if inner.startswith("<") else f'<text x="60" y="90">{inner}</text>'
        x, y = number % 2 * (WIDTH + GAP), number // 2 * (HEIGHT + HEAD)
        parts.append(
            f'<g transform="translate({x} {y})"><text x="8" y="14">{title}</text><g transform="translate(0 {HEAD})">{inner}</g></g>'
        )
    size = f"0 0 {2 * WIDTH + GAP + ROOM} {2 * (HEIGHT + HEAD)}"
    return f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="{size}" role="img"><style>{STYLE}</style>{"".join(parts)}</svg>\n'


def curve(name: str, runs: Sequence[Sequence[Mapping[str, Any]]], metric: str) -> Series:
    """The mean over seeds at the steps that all of them have; the reward as a moving mean, the others where something was trained."""
    steps = range(min((len(rows) for rows in runs), default=0))
    values: list[float | None]
    if metric.startswith("reward"):
        raw = [mean(rows[i][metric] for rows in runs) for i in steps]
        values = [mean(raw[max(0, i - SMOOTH + 1) : i + 1]) for i in steps]
    else:
        values = [average([rows[i] for rows in runs if rows[i]["tokens/trained"]], metric) for i in steps]
    return Series(name, [i + 1 for i in steps], values)
