"""`winnow bench step --seeds`: ours and each peer, each with every seed, in a process of its own, one after the other.

    (seed, program) ─> a process: bench_step ─> OUT/NAME-sSEED.json ─> OUT/table.md, table.json, curves.svg, anew after each

What is there already with the same sizes is not run again. `--limit-s` is shared by what is left; a run begins with less wall time
rather than late, not at all where it could not come to its first step. Steps are timed, so nothing runs beside another.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import mean
from typing import Any

from winnow.rl import children
from winnow.rl.ablation_page import as_rows, document
from winnow.rl.bench_peer import read_peer
from winnow.rl.bench_step import EARLY, StepBench, bench_step
from winnow.rl.charts import Series
from winnow.rl.lineage import fingerprint

START_S = {"ours": 40.0, "trl": 90.0}  # kept for what comes before a first step: TRL with vLLM needs about 70 s
LEAST_S = 10.0  # of steps; a shorter run shows nothing
SPARE_S = 10.0  # of a run's share, for its last step and for what it says at the end
EVERY_S = 10.0  # of the curves' table, and the seconds over which a reward is taken
LAST = 10  # steps over which the last reward is taken


@dataclass
class Versus:
    """The runs and what they found. `run` returns what table.json holds."""

    bench: StepBench
    out: Path
    peers: Sequence[str] = ("trl",)
    seeds: Sequence[int] = (0, 1)
    only: Sequence[str] = ()
    limit_s: float = 36000.0
    say: Callable[[str], object] = print
    _found: dict[str, dict[str, Any]] = field(default_factory=dict)

    def run(self) -> dict[str, Any]:
        begin = time.monotonic()
        self.out.mkdir(parents=True, exist_ok=True)
        names = [name for name in ("ours", *self.peers) if not self.only or name in self.only]
        plans = {f"{name}-s{seed}": (name, replace(self.bench, seed=seed)) for seed in self.seeds for name in names}
        if not plans:
            raise ValueError(
                f"bench step has nothing to run: --only names {', '.join(self.only)}, which --peers does not"
            )
        waiting = []
        for run, plan in plans.items():
            before = self._read(run)
            if before.get("plan") == self._plan(*plan) and "figures" in before:
                self._found[run] = before
                self.say(f"{run}: done before")
            else:
                waiting.append(run)
        for number, run in enumerate(waiting):
            left = self.limit_s - (time.monotonic() - begin)
            self._found[run] = self._measure(run, *plans[run], left / (len(waiting) - number))
            self._write(list(plans))
        return self._write(list(plans))

    def _plan(self, name: str, bench: StepBench) -> dict[str, Any]:
        """What decides a run's figures; how long it may take is no part of it."""
        sizes = {key: value for key, value in asdict(bench).items() if key not in ("wall", "until")}
        sizes["overrides"] = list(bench.overrides)  # as a file has them
        return {**sizes, "name": name, "model_files": fingerprint(bench.model) if bench.model else None}

    def _measure(self, run: str, name: str, bench: StepBench, share: float) -> dict[str, Any]:
        """One process within `share` seconds: where its start takes more of them than was kept for it, its steps have fewer. A run that
        failed says why and has no figures."""
        found: dict[str, Any] = {"plan": self._plan(name, bench)}
        wall = min(bench.wall or float("inf"), share - START_S[name])
        if wall < LEAST_S:
            return {
                **found,
                "why": f"not run: its share of the limit is {share:.0f} s, {START_S[name]:.0f} of them for its start",
            }
        path = self.out / f"{run}.json"
        plan = self.out / f"{run}.plan.json"
        plan.write_text(json.dumps({"name": name, "bench": {**asdict(bench), "wall": wall, "until": share - SPARE_S}}))
        rows: list[dict[str, Any]] = []
        command = [sys.executable, "-m", "winnow.rl.bench_versus", str(plan)]
        self.say(f"{run}: {wall:.0f} s after its first step at most")
        why = read_peer(command, self.out / f"{run}.log", share, rows.append)
        figures = next((row["figures"] for row in rows if "figures" in row), None)
        if isinstance(figures, Mapping):
            found |= {"figures": figures, "wall": wall}
        else:
            found["why"] = (why or str(figures))[-1500:]
        path.write_text(json.dumps(found, indent=1))
        self.say(f"{run}: {found['why'] if 'why' in found else in_short(found['figures'])}")
        return found

    def _read(self, run: str) -> dict[str, Any]:
        path = self.out / f"{run}.json"
        return json.loads(path.read_text()) if path.is_file() else {}

    def _write(self, runs: Sequence[str]) -> dict[str, Any]:
        done = {run: self._found[run]["figures"] for run in runs if "figures" in self._found.get(run, {})}
        b = self.bench
        sizes = f"{b.prompts} prompts x {b.samples} samples of at most {b.tokens} tokens a step, one-digit sums"
        result = {
            "bench": "step", "model": b.model or "random, 2 layers", "device": b.device, "timed": sizes, "runs": done,
            "ratios": ratios(done), "missing": {run: self._found.get(run, {}).get("why", "not run yet") for run in runs if run not in done},
        }  # fmt: skip
        (self.out / "table.json").write_text(json.dumps(result, indent=1) + "\n")
        (self.out / "table.md").write_text(as_markdown(result))
        if done:
            (self.out / "curves.svg").write_text(curves(done))
        return result


def in_short(figures: Mapping[str, Any]) -> str:
    return (
        f"{figures['samples_per_s']['median']:.1f} samples/s, first step after {figures['first_step_s']:.1f} s, reward {figures['rewards'][0]:.3f} "
        f"to {last_reward(figures):.3f} in {len(figures['curve'])} steps"
    )


def last_reward(figures: Mapping[str, Any]) -> float:
    return mean(figures["rewards"][-LAST:])


def ratios(done: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """Ours over each peer's samples/s, of one seed: until step 10, and over all steps. Later on ours trains on less than it samples,
    since groups that agree have no gradient, so the first of the two compares equal work."""
    found = {}
    for run, figures in done.items():
        name, seed = run.rsplit("-s", 1)
        ours = done.get(f"ours-s{seed}")
        if ours and name != "ours":
            for text, rate in ((f"until step {EARLY}", "samples_per_s_early"), ("all steps", "samples_per_s")):
                found[f"ours / {name}, seed {seed}, {text}"] = round(ours[rate]["median"] / figures[rate]["median"], 2)
    return found


def reward_at(figures: Mapping[str, Any], seconds: float) -> float | None:
    """Mean reward of the steps that ended in the `EVERY_S` before `seconds`, of the last one before where none did; None after the run."""
    curve = figures["curve"]
    before = [(end, reward) for end, reward, _ in curve if end <= seconds]
    if seconds > curve[-1][0] or not before:
        return None
    recent = [reward for end, reward in before if end > seconds - EVERY_S]
    return mean(recent or [before[-1][1]])


def as_markdown(result: Mapping[str, Any]) -> str:
    """A row a run, ratios, and the reward at equal seconds after the first step."""
    done = result["runs"]
    head = [
        "run",
        "first step, s",
        "samples/s, median (min-max)",
        "until step 10",
        "s a step",
        "steps",
        f"reward, last {LAST} steps",
    ]
    cells = []
    for run, f in done.items():
        rate, early = f["samples_per_s"], f["samples_per_s_early"]
        cells.append([
            run, f"{f['first_step_s']:.1f}", f"{rate['median']:.1f} ({rate['min']:.1f}-{rate['max']:.1f})", f"{early['median']:.1f}",
            f"{f['step_s']['median']:.3f}", str(len(f["curve"])), f"{last_reward(f):.3f}",
        ])  # fmt: skip
    lines = [f"{result['model']}, {result['device']}; {result['timed']}.", "", *as_rows(head, cells), ""]
    lines += [f"{name}: {value:.2f} times the samples/s" for name, value in result["ratios"].items()] + [""]
    longest = max((f["curve"][-1][0] for f in done.values()), default=0.0)
    times = [EVERY_S * (i + 1) for i in range(int(longest / EVERY_S))]
    if times:
        rows = [[f"{t:g}", *(shown(reward_at(f, t)) for f in done.values())] for t in times]
        text = f"Reward at equal seconds after the first step, mean of the steps of the {EVERY_S:g} s before:"
        lines += [text, "", *as_rows(["s", *done], rows), ""]
    lines += [f"{run}: {why}" for run, why in result["missing"].items()]
    return "\n".join(lines).rstrip() + "\n"


def shown(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def curves(done: Mapping[str, Mapping[str, Any]]) -> str:
    """Reward by seconds after the first step, and by seconds after the start of the process: a line a run."""
    after = [
        Series(run, [end for end, *_ in f["curve"]], [reward for _, reward, _ in f["curve"]]) for run, f in done.items()
    ]
    whole = [
        Series(s.name, [x + f["first_step_s"] for x in s.x], s.y) for s, f in zip(after, done.values(), strict=True)
    ]
    titles = ("reward by seconds after the first step", "reward by seconds after the start")
    return document([(titles[0], after, False), (titles[1], whole, False)])


def main(path: str) -> None:
    """The body of one process."""
    children.watch_parent()
    plan = json.loads(Path(path).read_text())
    name = plan["name"]
    peers = [] if name == "ours" else [name]
    figures = bench_step(StepBench(**plan["bench"]), peers, [name], lambda text: print(text, flush=True))
    print("ROW " + json.dumps({"figures": figures[name]}), flush=True)
    print("END", flush=True)
    children.end_together()  # an engine's process would take seconds to close


if __name__ == "__main__":
    main(sys.argv[1])
