"""The pages of an ablation: table.md, and its curves as SVG. What they show is made in ablation_table.py."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from statistics import mean, median
from typing import TYPE_CHECKING, Any

from winnow.rl.charts import HEIGHT, WIDTH, Series, line_chart
from winnow.rl.cost_figure import GAP, HEAD, STYLE

if TYPE_CHECKING:
    from winnow.rl.bench_ablation import Running

REFERENCES = ("deterministic", "dense")  # what the others are compared with: the first of these that was run
LAST = 10  # steps at the end over which "reward at the end" is taken
SMOOTH = 5  # steps of a moving mean in the reward's chart
WINDOW = 5  # steps of one point of the differences' chart
ROOM = 50  # right of the charts, for the ends of names
BINDING = 8  # a trained row should see so many times k positions
# the charts: a file each, its variants in this order
GROUPS = {
    "selection": ("random_ties", "deterministic", "replay"),
    "training": ("deterministic", "kl", "replay", "replay_kl"),
    "correction": ("deterministic", "tis", "icepop", "opsm"),
    "attention": ("deterministic", "sparse", "dense"),
}
CURVES = (
    ("reward/mean", f"reward, mean of {SMOOTH} steps", False),
    ("entropy", "entropy, nats a token", False),
    ("mismatch/k3_kl", "k3 KL of rollout and learner", True),
    ("index/jaccard", "Jaccard of their sets", False),
)
COLUMNS = {
    "steps": "steps", "reward_end": f"reward, last {LAST} steps", "reward_all": "reward, all steps", "held_out": "held out, at the end", "held_out_step": "that is after step",
    "entropy_end": "entropy at the end", "k3_fresh": "k3 KL, same weights", "k3": "k3 KL, all steps", "k3_max": "k3 KL, largest",
    "jaccard_fresh": "Jaccard, same weights", "jaccard": "Jaccard, all steps", "masked": "masked or capped", "clipped": "clipped",
    "indexer_kl": f"indexer KL, last {LAST} steps", "grad_norm_max": "largest gradient norm", "step_s": "s a step",
}  # fmt: skip


def reference_of(variants: Iterable[str]) -> str:
    """What the others are compared with."""
    run = list(variants)
    return next((name for name in REFERENCES if name in run), "")


def average(rows: Sequence[Mapping[str, Any]], name: str) -> float | None:
    """Of the rows that have it; None without any. A value that was not finite is null in metrics.jsonl, and makes the mean so."""
    values = [math.nan if row[name] is None else row[name] for row in rows if name in row]
    return mean(values) if values else None


# -------------------------------------------------------------------------------------------------------------------------- as text


def as_markdown(result: Mapping[str, Any]) -> str:
    """The tables: a line a variant, differences, accuracy by length; then what failed or was cut, by name."""
    plan, reference = result["config"], reference_of(result["variants"])
    shared = plan["at_a_time"] > 1
    lines = [
        f"{plan['model']}, {plan['dtype']}, lr {plan['lr']:g}, {plan['prompts']} prompts x {plan['samples']} samples a step of "
        f"{', '.join(plan['domains'])}; {plan['updates_per_batch']} updates a batch, the rollout's weights renewed every "
        f"{plan['sync_every']} steps. The first {result['steps']} of {plan['asked_steps']} steps. Mean of the seeds (smallest-largest)."
        + (f" {plan['at_a_time']} runs shared the device: their seconds are not those of a run alone." if shared else ""),
        "",
        *as_rows(["variant", "seeds", *COLUMNS.values()], [
            [name, str(row["seeds"]), *(ranged(row[column]) for column in COLUMNS)] for name, row in result["variants"].items()
        ]),
        "",
    ]  # fmt: skip
    differences = [
        [
            name,
            *(spanned(row["difference"][part]) for part in ("all", "end")),
            str(row["difference"]["prompts"]),
            by_seed(row["difference"]),
        ]
        for name, row in result["variants"].items()
        if row.get("difference")
    ]
    if differences:
        head = ["variant", f"reward minus {reference}'s, all steps", f"last {LAST} steps", "prompts", "of each seed"]
        text = "Paired by prompt, mean and 95 % interval over prompts; how far other seeds would be apart is another question:"
        lines += [text, "", *as_rows(head, differences), ""]
    lines += binding_lines(result["figures"])
    if "dense" in result["by_length"] and len(result["by_length"]) > 1:
        names = [name for name in GROUPS["attention"] if name in result["by_length"]]
        lines += stage_lines(result["variants"], names)
        lines += ["Mean reward by generated tokens (samples):", "", *length_rows(result["by_length"], names), ""]
        lines += equal_length_lines(result["at_equal_length"], names, reference)
    for name, run in result["runs"].items():
        if run["status"] != "done":
            why = f"{run['why']}{'' if run['in_table'] or run['status'] == 'failed' else ' left out of the table'}"
            lines.append(f"{name}: {run['status']} after {run['steps']} steps. {why}".rstrip())
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


def stage_lines(variants: Mapping[str, Any], names: Sequence[str]) -> list[str]:
    """Median seconds of every part of a step."""
    stages = list(variants[names[0]]["stage_s"])
    cells = [[name, *(short(variants[name]["stage_s"][stage]) for stage in stages)] for name in names]
    head = ["variant", *(stage.removeprefix("time/").removesuffix("_s") for stage in stages)]
    return ["Median seconds of the parts of a step:", "", *as_rows(head, cells), ""]


def equal_length_lines(found: Mapping[str, Any], names: Sequence[str], reference: str) -> list[str]:
    return [
        f"At equal numbers of generated tokens, {name} minus {reference}: {spanned(found[name]['difference'])} "
        f"({found[name]['lengths']} lengths, {found[name]['share']:.0%} of its samples, taken as independent)."
        for name in names
        if name in found
    ] + [""]


def by_seed(difference: Mapping[str, Any]) -> str:
    return ", ".join(f"{seed}: {value:+.3f}" for seed, value in difference["seeds"].items())


def length_rows(found: Mapping[str, Mapping[str, Sequence[float]]], names: Collection[str]) -> list[str]:
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
    if not math.isfinite(value):
        return "not finite"
    if value == 0 or value == int(value):
        return f"{value:.0f}"
    return f"{value:.1e}" if abs(value) < 1e-3 or abs(value) >= 1e4 else f"{value:.3g}"


# ------------------------------------------------------------------------------------------------------------------------- as curves


def figure(names: Sequence[str], runs: Sequence[Running]) -> str:
    """A whole SVG document: CURVES in two columns, a line a variant, the mean of its seeds."""
    panels = []
    for metric, title, log in CURVES:
        series = [curve(name, [run.rows() for run in runs if run.variant == name], metric) for name in names]
        panels.append((title, [s for s in series if s.x], log))
    return document(panels)


def comparison_figure(result: Mapping[str, Any]) -> str:
    """Of two variants: the reward's difference by steps with its 95 % interval, and reward by generated tokens."""
    reference = reference_of(result["variants"])
    name, row = next((name, row) for name, row in result["variants"].items() if row.get("difference"))
    windows = row["difference"]["windows"]
    middle = [(first + last) / 2 for first, last, *_ in windows]
    bounds = [
        Series(text, middle, [w[place] for w in windows]) for text, place in (("mean", 2), ("low", 3), ("high", 4))
    ]
    lengths = [
        Series(variant, [int(n) for n in found], [value for _, value in found.values()])
        for variant, found in result["by_length"].items()
    ]
    title = f"reward, {name} minus {reference}, {WINDOW} steps each, with 95 % interval"
    return document([(title, bounds, False), ("reward by generated tokens", lengths, False)])


def document(panels: Sequence[tuple[str, Sequence[Series], bool]]) -> str:
    """Charts (title, series, log) in two columns as a whole SVG document."""
    parts = []
    for number, (title, series, log) in enumerate(panels):
        inner = re.sub(r"^<(svg|p)[^>]*>|</(svg|p)>$", "", line_chart(series, log=log, label=title))
        inner = inner if inner.startswith("<") else f'<text x="60" y="90">{inner}</text>'
        x, y = number % 2 * (WIDTH + GAP), number // 2 * (HEIGHT + HEAD)
        parts.append(
            f'<g transform="translate({x} {y})"><text x="8" y="14">{title}</text><g transform="translate(0 {HEAD})">{inner}</g></g>'
        )
    size = f"0 0 {2 * WIDTH + GAP + ROOM} {-(-len(panels) // 2) * (HEIGHT + HEAD)}"
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
