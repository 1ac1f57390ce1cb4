"""What the runs of an ablation found: figures of every run, means over seeds, paired differences, and curves as SVG.

A figure of a variant is the mean over its seeds with their range. Differences are paired: both runs of a seed drew the same prompts, so
each prompt's mean reward is compared with its own. A run that failed has no figures and is named.
"""

from __future__ import annotations

import json
import math
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import mean, median, stdev
from typing import TYPE_CHECKING, Any

from winnow.rl.charts import HEIGHT, WIDTH, Series, line_chart
from winnow.rl.cost_figure import GAP, HEAD, STYLE
from winnow.rl.evaluate import interval, student_t
from winnow.rl.report import read_lines

if TYPE_CHECKING:
    from winnow.rl.bench_ablation import Running

REFERENCE = "deterministic"
LAST = 10  # steps at the end over which "reward at the end" is taken
SMOOTH = 5  # steps of a moving mean in the reward's chart
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
    "indexer_kl": "indexer KL, first and last steps", "grad_norm_max": "largest gradient norm", "step_s": "s a step",
}  # fmt: skip


def write_table(out: Path, runs: Sequence[Running]) -> dict[str, Any]:
    """Writes OUT/table.json, table.md and the charts from what the runs have left so far, and returns the first."""
    ended = [run for run in runs if run.status in ("done", "cut")]
    counts = {run.name: len(run.rows()) for run in ended}
    longest = max(counts.values(), default=0)
    kept = [run for run in ended if counts[run.name] >= max(1, longest / 2)]
    steps = min((counts[run.name] for run in kept), default=0)
    for run in kept:
        if steps not in run.found:
            run.found[steps] = run_figures(run, steps)
    figures = {run.name: run.found[steps] for run in kept}
    result: dict[str, Any] = {
        "steps": steps,
        "runs": {run.name: {"status": run.status, "steps": len(run.rows()), "why": run.why} for run in runs},
        "figures": {name: found["figures"] for name, found in figures.items()},
        "variants": by_variant(kept, figures),
        "by_length": by_length(kept, figures),
    }
    result["config"] = plan_of(runs[0])
    (out / "table.json").write_text(json.dumps(result, indent=1) + "\n")
    (out / "table.md").write_text(as_markdown(result))
    for group, names in GROUPS.items():
        shown = [run for name in names for run in kept if run.variant == name]
        if len({run.variant for run in shown}) > 1:
            (out / f"{group}.svg").write_text(figure(names, shown))
    return result


def plan_of(run: Running) -> dict[str, Any]:
    """What all runs have in common, in a few words for the table's head."""
    config = run.config
    return {
        "model": config.model.path, "dtype": config.model.dtype, "lr": config.learner.lr, "samples": config.rollout.samples,
        "prompts": config.prompts_per_step, "updates_per_batch": config.learner.updates_per_batch, "sync_every": config.schedule.sync_every,
        "domains": [domain.name for domain in config.domains], "asked_steps": config.schedule.steps,
    }  # fmt: skip


def run_figures(run: Running, steps: int) -> dict[str, Any]:
    """Figures of one run over its first `steps` steps; `prompts`: request -> mean reward; `lengths`: tokens -> (samples, solved)."""
    from winnow.rl.bench_ablation import read_final, step_seconds

    rows = run.rows()[:steps]
    prompts, lengths, available = read_samples(run.folder, steps)
    top_k = top_k_of(run.config.model.path)
    end = [value for (step, _), value in prompts.items() if step > steps - LAST]
    trained = [row for row in rows if row["tokens/trained"]]  # a step without a mixed group measures nothing
    fresh = [row for row in trained if row["staleness/max"] == 0]
    evals = read_final(run.folder).get("eval", {})
    domains = [domain.name for domain in run.config.domains]
    masked = [sum(value for name, value in row.items() if name in MASKED) for row in trained]
    kls = [row["loss/indexer_kl"] for row in trained if "loss/indexer_kl" in row]
    found: dict[str, Any] = {
        "steps": len(rows),
        "reward_end": list(interval(end)),
        "reward_all": list(interval(list(prompts.values()))),
        "held_out": [mean(evals[f"eval/{d}{part}"] for d in domains if f"eval/{d}{part}" in evals) for part in ("", "_low", "_high")]
        if any(f"eval/{d}" in evals for d in domains) else None,
        "trained_steps": len(trained),
        "entropy_first": average(trained[:1], "entropy"),
        "entropy_end": average(trained[-LAST:], "entropy"),
        "k3_fresh": average(fresh, "mismatch/k3_kl"),
        "k3": average(trained, "mismatch/k3_kl"),
        "k3_max": max((row["mismatch/k3_kl"] for row in trained), default=None),
        "jaccard_fresh": average(fresh, "index/jaccard"),
        "jaccard": average(trained, "index/jaccard"),
        "masked": mean(masked) if masked else None,
        "clipped": average(trained, "clip_fraction"),
        "indexer_kl": [mean(kls[:LAST]), mean(kls[-LAST:])] if kls else None,
        "grad_norm_max": max(row["grad_norm"] for row in rows),
        "staleness": [min(row["staleness/max"] for row in rows), max(row["staleness/max"] for row in rows)],
        "step_s": median(step_seconds(row) for row in rows),
        "stage_s": {name: median(row[name] for row in rows) for name in rows[0] if name.startswith("time/")},
        "tokens_per_step": mean(row["tokens/trained"] for row in rows),
    }  # fmt: skip
    if run.config.indexer.selector == "dense":
        found |= {"jaccard": None, "jaccard_fresh": None}  # no sets on either side
    if top_k:
        seen = sorted(available)
        found["length_over_k"] = (
            {"k": top_k, "min": seen[0] / top_k, "median": seen[len(seen) // 2] / top_k} if seen else None
        )
    return {"figures": found, "prompts": prompts, "lengths": lengths}


def average(rows: Sequence[Mapping[str, Any]], name: str) -> float | None:
    return mean(row[name] for row in rows) if rows else None


MASKED = ("masked/tis_capped", "masked/icepop", "masked/opsm")


def top_k_of(model: str) -> int | None:
    from winnow.models.load import read_config, resolve

    return (getattr(read_config(resolve(model)), "winnow", None) or {}).get("top_k")


def read_samples(
    folder: Path, steps: int
) -> tuple[dict[tuple[int, str], float], dict[int, tuple[int, float]], list[int]]:
    """Mean reward of every prompt by (step, request); (samples, sum of rewards) by generated tokens; what each trained row could see.

    Samples without a score are left out, as in training.
    """
    rewards: dict[tuple[int, str], list[float]] = defaultdict(list)
    lengths: dict[int, tuple[int, float]] = {}
    available: list[int] = []
    for step in range(1, steps + 1):
        for row in read_lines(folder / "samples" / f"step-{step:06d}.jsonl"):
            if "reward" not in row:
                continue
            rewards[step, row["request_id"]].append(float(row["reward"]))
            drawn = [position for position, counts in enumerate(row["loss_mask"]) if counts]
            available += drawn  # the query of the token at position p sees p positions
            count, total = lengths.get(len(drawn), (0, 0.0))
            lengths[len(drawn)] = (count + 1, total + float(row["reward"]))
    return {key: mean(values) for key, values in rewards.items()}, lengths, available


def by_variant(runs: Sequence[Running], figures: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Variant -> figure -> [mean over seeds, smallest, largest], and `difference`: reward minus the reference's, paired by prompt."""
    found: dict[str, Any] = {}
    for variant in dict.fromkeys(run.variant for run in runs):
        members = [figures[run.name] for run in runs if run.variant == variant]
        row: dict[str, Any] = {"seeds": len(members)}
        for name in COLUMNS:
            values = [first_of(m["figures"][name], name) for m in members]
            known = [value for value in values if value is not None]
            row[name] = [mean(known), min(known), max(known)] if known else None
        if variant != REFERENCE:
            row["difference"] = paired([run for run in runs if run.variant == variant], runs, figures)
        found[variant] = row
    return found


def first_of(value: Any, name: str) -> float | None:
    """The figure itself: of a mean with its interval the mean, of first and last the last."""
    if isinstance(value, list):
        value = value[-1] if name == "indexer_kl" else value[0]
    return None if value is None else float(value)


def paired(
    mine: Sequence[Running], runs: Sequence[Running], figures: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any] | None:
    """Mean and 95 % interval over prompts of reward minus the reference's at the same seed, step and prompt: all steps, last steps."""
    theirs = {run.name: figures[run.name]["prompts"] for run in runs if run.variant == REFERENCE}
    everything, end = [], []
    for run in mine:
        other = theirs.get(f"{REFERENCE}-s{run.config.seed}", {})
        last = max((step for step, _ in other), default=0)
        for key, value in figures[run.name]["prompts"].items():
            if key in other:
                everything.append(value - other[key])
                if key[0] > last - LAST:
                    end.append(value - other[key])
    return {"all": differences(everything), "end": differences(end), "prompts": len(everything)} if everything else None


def differences(values: Sequence[float]) -> list[float]:
    """Mean and 95 % interval by Student's t."""
    middle = mean(values)
    half = student_t(len(values) - 1) * stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.inf
    return [middle, middle - half, middle + half]


def by_length(runs: Sequence[Running], figures: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Variant -> generated tokens -> [samples, mean reward], over all seeds and steps: replies of equal length compared."""
    found: dict[str, Any] = {}
    for variant in dict.fromkeys(run.variant for run in runs):
        sums: dict[int, tuple[int, float]] = {}
        for run in runs:
            if run.variant == variant:
                for length, (count, total) in figures[run.name]["lengths"].items():
                    before = sums.get(length, (0, 0.0))
                    sums[length] = (before[0] + count, before[1] + total)
        found[variant] = {str(n): [count, total / count] for n, (count, total) in sorted(sums.items())}
    return found


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
    size = f"0 0 {2 * WIDTH + GAP} {2 * (HEIGHT + HEAD)}"
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
