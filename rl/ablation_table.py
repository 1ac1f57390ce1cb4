"""What the runs of an ablation found: figures of every run, means over seeds, paired differences, and curves as SVG.

A figure of a variant is the mean over its seeds with their range. Differences are paired: both runs of a seed drew the same prompts, so
each prompt's mean reward is compared with its own. A run that failed has no figures and is named.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import mean, median, stdev
from typing import TYPE_CHECKING, Any

from winnow.rl.ablation_page import COLUMNS, GROUPS, LAST, REFERENCE, as_markdown, average, figure
from winnow.rl.evaluate import interval, student_t
from winnow.rl.report import read_lines

if TYPE_CHECKING:
    from winnow.rl.bench_ablation import Running

MASKED = ("masked/tis_capped", "masked/icepop", "masked/opsm")
SHOWN = (
    "entropy", "mismatch/k3_kl", "mismatch/agreement_p5", "index/jaccard", *MASKED, "clip_fraction", "loss/indexer_kl", "grad_norm",
    "staleness/max", "tokens/trained", "groups/kept_share", "time/rollout_s", "time/learn_s", "time/sync_s",
)  # fmt: skip


def write_table(out: Path, runs: Sequence[Running]) -> dict[str, Any]:
    """Writes OUT/table.json, table.md, curves.jsonl and the charts from what the runs have left so far, and returns the first."""
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
    (out / "curves.jsonl").write_text(
        "".join(json.dumps(line) + "\n" for run in kept for line in curve_lines(run, steps))
    )
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
