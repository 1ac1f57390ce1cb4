"""What the runs of an ablation found: figures of every run, means over seeds, paired differences, and curves as SVG.

A figure of a variant is the mean over its seeds with their range. Differences are paired: both runs of a seed drew the same prompts, so
each prompt's mean reward is compared with its own. Their interval is over prompts, so it speaks of these runs: what other seeds would do
is seen in the seeds' own differences beside it. A run that failed has no figures and is named.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import mean, median, stdev
from typing import TYPE_CHECKING, Any

from winnow.rl.ablation_page import (
    COLUMNS,
    GROUPS,
    LAST,
    WINDOW,
    as_markdown,
    average,
    comparison_figure,
    figure,
    reference_of,
)
from winnow.rl.evaluate import interval, student_t
from winnow.rl.report import read_lines

if TYPE_CHECKING:
    from winnow.rl.bench_ablation import Running

MASKED = ("masked/tis_capped", "masked/icepop", "masked/opsm")
Sums = tuple[int, float, float]  # samples, their rewards, the squares of these
NOTHING: Sums = (0, 0.0, 0.0)
SHOWN = (
    "entropy", "mismatch/k3_kl", "mismatch/agreement_p5", "index/jaccard", *MASKED, "clip_fraction", "loss/indexer_kl", "grad_norm",
    "staleness/max", "tokens/trained", "groups/kept_share", "time/rollout_s", "time/learn_s", "time/sync_s",
)  # fmt: skip


def write_table(out: Path, runs: Sequence[Running], at_a_time: int = 1) -> dict[str, Any]:
    """Writes OUT/table.json, table.md, curves.jsonl and the charts from what the runs have left so far, and returns the first.

    Runs with less than half the steps of the longest are named and left out, or all would be cut to theirs. at_a_time: how many shared
    the device.
    """
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
        "runs": {
            run.name: {"status": run.status, "steps": len(run.rows()), "why": run.why, "in_table": run in kept}
            for run in runs
        },
        "figures": {name: found["figures"] for name, found in figures.items()},
        "variants": by_variant(kept, figures),
        "by_length": by_length(kept, figures),
        "at_equal_length": at_equal_length(kept, figures),
    }
    result["config"] = {**plan_of(runs[0]), "at_a_time": at_a_time}
    (out / "table.json").write_text(json.dumps(plain(result), indent=1) + "\n")
    (out / "table.md").write_text(as_markdown(result))
    (out / "curves.jsonl").write_text(
        "".join(json.dumps(line) + "\n" for run in kept for line in curve_lines(run, steps))
    )
    for group, names in GROUPS.items():
        shown = [run for name in names for run in kept if run.variant == name]
        if len({run.variant for run in shown}) > 1:
            (out / f"{group}.svg").write_text(figure(names, shown))
    if len(result["variants"]) == 2 and any(row.get("difference") for row in result["variants"].values()):
        (out / "difference.svg").write_text(comparison_figure(result))
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
    final = read_final(run.folder)
    evals = final.get("eval", {})
    domains = [domain.name for domain in run.config.domains]
    masked = [sum(value for name, value in row.items() if name in MASKED) for row in trained]
    kls = [row for row in trained if "loss/indexer_kl" in row]
    found: dict[str, Any] = {
        "steps": len(rows),
        "reward_end": list(interval(end)),
        "reward_all": list(interval(list(prompts.values()))),
        "held_out": [mean(evals[f"eval/{d}{part}"] for d in domains if f"eval/{d}{part}" in evals) for part in ("", "_low", "_high")]
        if any(f"eval/{d}" in evals for d in domains) else None,
        "held_out_step": final.get("step"),  # a run that was cut may have made more steps than the table has
        "trained_steps": len(trained),
        "entropy_first": average(trained[:1], "entropy"),
        "entropy_end": average(trained[-LAST:], "entropy"),
        "k3_fresh": average(fresh, "mismatch/k3_kl"),
        "k3": average(trained, "mismatch/k3_kl"),
        "k3_max": largest(trained, "mismatch/k3_kl"),
        "jaccard_fresh": average(fresh, "index/jaccard"),
        "jaccard": average(trained, "index/jaccard"),
        "masked": mean(masked) if masked else None,
        "clipped": average(trained, "clip_fraction"),
        "indexer_kl": [average(kls[:LAST], "loss/indexer_kl"), average(kls[-LAST:], "loss/indexer_kl")] if kls else None,
        "grad_norm_max": largest(rows, "grad_norm"),
        "staleness": [min(row["staleness/max"] for row in rows), max(row["staleness/max"] for row in rows)],
        "step_s": median(step_seconds(row) for row in rows),
        "stage_s": {name: median(row[name] for row in rows) for name in rows[0] if name.startswith("time/")},
        "tokens_per_step": mean(row["tokens/trained"] for row in rows),
    }  # fmt: skip
    if not run.config.rollout.record_indices or run.config.indexer.selector == "dense":
        found |= {"jaccard": None, "jaccard_fresh": None}  # nothing to compare
    if top_k:
        seen = sorted(available)
        found["length_over_k"] = (
            {"k": top_k, "min": seen[0] / top_k, "median": seen[len(seen) // 2] / top_k} if seen else None
        )
    return {"figures": found, "prompts": prompts, "lengths": lengths}


def plain(value: Any) -> Any:
    """As JSON can hold it: numbers that are not finite as text."""
    if isinstance(value, dict):
        return {key: plain(of) for key, of in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(of) for of in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def largest(rows: Sequence[Mapping[str, Any]], name: str) -> float | None:
    """None without rows; a value that was not finite is the largest."""
    return max((math.inf if row[name] is None else float(row[name]) for row in rows), default=None)


def curve_lines(run: Running, steps: int) -> Iterator[dict[str, Any]]:
    """Every step of a run: its reward with the 95 % interval over the step's prompts, and the metrics that are compared."""
    rewards: dict[int, list[float]] = defaultdict(list)
    for (step, _), value in run.found[steps]["prompts"].items():
        rewards[step].append(value)
    for row in run.rows()[:steps]:
        shown = {name: row[name] for name in SHOWN if name in row}
        yield {"run": run.name, "step": row["step"], "reward": list(interval(rewards[row["step"]])), **shown}


def top_k_of(model: str) -> int | None:
    from winnow.models.load import read_config, resolve

    return (getattr(read_config(resolve(model)), "winnow", None) or {}).get("top_k")


def added(one: Sums, other: Sums) -> Sums:
    return one[0] + other[0], one[1] + other[1], one[2] + other[2]


def read_samples(folder: Path, steps: int) -> tuple[dict[tuple[int, str], float], dict[int, Sums], list[int]]:
    """Mean reward of every prompt by (step, request and task); (samples, sums of rewards and of their squares) by generated tokens; what
    each trained row could see.

    Samples without a score are left out, as in training.
    """
    rewards: dict[tuple[int, str], list[float]] = defaultdict(list)
    lengths: dict[int, Sums] = {}
    available: list[int] = []
    for step in range(1, steps + 1):
        for row in read_lines(folder / "samples" / f"step-{step:06d}.jsonl"):
            if "reward" not in row:
                continue
            value = float(row["reward"])
            rewards[step, f"{row['request_id']} {row['task_id']}"].append(value)
            drawn = [position for position, counts in enumerate(row["loss_mask"]) if counts]
            available += drawn  # the query of the token at position p sees p positions
            lengths[len(drawn)] = added(lengths.get(len(drawn), NOTHING), (1, value, value * value))
    return {key: mean(values) for key, values in rewards.items()}, lengths, available


def by_variant(runs: Sequence[Running], figures: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Variant -> figure -> [mean over seeds, smallest, largest], and `difference`: reward minus the reference's, paired by prompt."""
    found: dict[str, Any] = {}
    reference = reference_of(run.variant for run in runs)
    for variant in dict.fromkeys(run.variant for run in runs):
        members = [figures[run.name] for run in runs if run.variant == variant]
        row: dict[str, Any] = {"seeds": len(members)}
        for name in COLUMNS:
            values = [first_of(m["figures"][name], name) for m in members]
            known = [value for value in values if value is not None]
            row[name] = [mean(known), min(known), max(known)] if known else None
        stages = [m["figures"]["stage_s"] for m in members]
        row["stage_s"] = {stage: mean(of_run[stage] for of_run in stages) for stage in stages[0]}
        if variant != reference:
            row["difference"] = paired([run for run in runs if run.variant == variant], reference, figures)
        found[variant] = row
    return found


def first_of(value: Any, name: str) -> float | None:
    """The figure itself: of a mean with its interval the mean, of first and last the last."""
    if isinstance(value, list):
        value = value[-1] if name == "indexer_kl" else value[0]
    return None if value is None else float(value)


def paired(mine: Sequence[Running], reference: str, figures: Mapping[str, Mapping[str, Any]]) -> dict[str, Any] | None:
    """Mean and 95 % interval over prompts of reward minus the reference's at the same seed, step and prompt: over all steps, the last
    ones, windows of steps [first, last, mean, low, high]; and every seed's own mean."""
    everything: list[tuple[int, float]] = []
    seeds: dict[str, float] = {}
    for run in mine:
        other = figures.get(f"{reference}-s{run.config.seed}", {}).get("prompts", {})
        pairs = [(key[0], value - other[key]) for key, value in figures[run.name]["prompts"].items() if key in other]
        if pairs:
            seeds[str(run.config.seed)] = mean(value for _, value in pairs)
        everything += pairs
    if not everything:
        return None
    last = max(step for step, _ in everything)
    windows = [(first, min(first + WINDOW - 1, last)) for first in range(1, last + 1, WINDOW)]
    inside = [(first, end, [v for step, v in everything if first <= step <= end]) for first, end in windows]
    return {
        "all": differences([value for _, value in everything]),
        "end": differences([value for step, value in everything if step > last - LAST]),
        "windows": [[first, end, *differences(values)] for first, end, values in inside if len(values) > 1],
        "seeds": seeds,
        "prompts": len(everything),
    }


def differences(values: Sequence[float]) -> list[float]:
    """Mean and 95 % interval by Student's t."""
    middle = mean(values)
    half = student_t(len(values) - 1) * stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.inf
    return [middle, middle - half, middle + half]


def by_length(runs: Sequence[Running], figures: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Variant -> generated tokens -> [samples, mean reward], over all seeds and steps: replies of equal length compared."""
    return {
        variant: {str(n): [count, total / count] for n, (count, total, _) in sorted(sums.items())}
        for variant, sums in sums_by_length(runs, figures).items()
    }


def sums_by_length(runs: Sequence[Running], figures: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[int, Sums]]:
    found: dict[str, dict[int, Sums]] = {}
    for run in runs:
        sums = found.setdefault(run.variant, {})
        for length, of_run in figures[run.name]["lengths"].items():
            sums[length] = added(sums.get(length, NOTHING), of_run)
    return found


def at_equal_length(runs: Sequence[Running], figures: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Variant -> reward minus the reference's at equal numbers of generated tokens: mean over the lengths that both have (two samples or
    more), each weighed by the smaller number of samples, 95 % interval as if samples were independent; and the share of its samples."""
    sums = sums_by_length(runs, figures)
    reference = reference_of(sums)
    found = {}
    for variant, mine in sums.items():
        theirs = sums.get(reference, {})
        both = [n for n in mine if n in theirs and min(mine[n][0], theirs[n][0]) > 1]
        if variant == reference or not both:
            continue
        weights = [min(mine[n][0], theirs[n][0]) for n in both]
        total = sum(weights)
        apart = [mine[n][1] / mine[n][0] - theirs[n][1] / theirs[n][0] for n in both]
        middle = sum(w * d for w, d in zip(weights, apart, strict=True)) / total
        spread = sum(w * w * (of_mean(mine[n]) + of_mean(theirs[n])) for w, n in zip(weights, both, strict=True))
        half = 1.96 * math.sqrt(spread) / total
        share = sum(mine[n][0] for n in both) / sum(count for count, *_ in mine.values())
        found[variant] = {"difference": [middle, middle - half, middle + half], "lengths": len(both), "share": share}
    return found


def of_mean(sums: Sums) -> float:
    """The squared standard error of the mean."""
    count, total, squares = sums
    return max(0.0, squares - total * total / count) / (count - 1) / count
