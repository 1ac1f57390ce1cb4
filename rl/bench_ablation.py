"""`winnow bench ablation`: what each choice about sparse attention does to one run. Variants x seeds of a config, side by side.

    CONFIG ─ variant, seed ─> OUT/runs/VARIANT-sSEED (a process each, `--parallel` at a time) ─> OUT/table.md, table.json, *.svg

Every run is `winnow train` in one process (`cluster.address: here`) and one thread, then an evaluation on the held-out tasks. The first
run goes ahead until its first step is done: it compiles the kernels, which the others, their modules imported meanwhile, find. What is
done is not run again. A run that fails is named with its reason and has no figures. `--limit-s` is shared evenly by what runs one after
another: a run whose time is over is ended and evaluated where it stands, and the table covers the steps that all have. The same command
again goes on with those runs from there. No run outlives the command, also where that is killed.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from winnow.rl import children
from winnow.rl.config import Config, ConfigError, config_hash, make_config, read_values, to_yaml
from winnow.rl.interrupts import Interrupts

# variant -> what it changes in the config. deterministic: indexer frozen, each side chooses with the exact top-k, no correction
VARIANTS: dict[str, tuple[str, ...]] = {
    "kl": ("indexer.train=kl",),  # the first one compiles the most kernels
    "deterministic": (),
    "random_ties": ("indexer.selector=random_ties",),
    "replay": ("indexer.selection=replay",),
    "replay_kl": ("indexer.selection=replay", "indexer.train=kl"),
    "tis": ("algorithm.correction=tis", "algorithm.recompute_old=true"),
    "icepop": ("algorithm.correction=icepop", "algorithm.recompute_old=true"),
    "opsm": ("algorithm.correction=opsm",),
    "sparse": ("rollout.record_indices=false",),  # deterministic, at dense's cost of records: none
    "dense": ("indexer.selector=dense", "rollout.record_indices=false"),
}
DEFAULT = tuple(name for name in VARIANTS if name not in ("sparse", "dense"))
# a run is to show what happens, not to stop at it; a checkpoint is kept of those that are cut
FIXED = (
    "cluster.address=here", "learner.threads=1", "rollout.threads=1", "schedule.keep=1", "schedule.keep_best=false",
    "schedule.save_every=0", "schedule.eval_every=0", "algorithm.max_mismatch=1.0e+9", "indexer.min_overlap=0",
)  # fmt: skip
ON_GPU = ("model.dtype=bfloat16", "cluster.learner_gpus=0.5", "cluster.worker_gpus=0.5")
FINAL = "final.json"
POLL_S = 0.2
SAY_S = 10.0
EVALUATION_S = 15.0  # kept at the end of the limit for the evaluations of runs that are ended by it
SAVE_S = 10.0  # for the checkpoints of what still runs when the command ends
FIRST_STEP_S = 300.0  # how long the others wait for the first run's first step
MEMORY, CONTEXT = (
    0.94,
    0.007,
)  # of the GPU, shared evenly by the runs; of it, what each one's context takes beside its tensors


@dataclass
class Running:
    """One run: its config, its process while there is one, and how it stands."""

    name: str
    config: Config
    process: subprocess.Popen[str] | None = None
    ends: float = 0.0  # seconds of the ablation at which it is interrupted
    status: str = "waiting"  # waiting, running, done, cut (ended by the limit, evaluated), failed
    why: str = ""
    found: dict[int, dict[str, Any]] = field(default_factory=dict)  # its figures over so many steps, once it has ended

    @property
    def folder(self) -> Path:
        return self.config.folder

    @property
    def variant(self) -> str:
        return self.name.rsplit("-s", 1)[0]

    def rows(self) -> list[dict[str, Any]]:
        """The metrics of its steps so far."""
        from winnow.rl.report import read_lines

        return [row for row in read_lines(self.folder / "metrics.jsonl") if row["step"] > 0]


@dataclass
class Ablation:
    """The plan and its processes. `run` returns what table.json holds."""

    config: Path
    out: Path
    variants: Sequence[str] = DEFAULT
    seeds: Sequence[int] = (0, 1)
    overrides: Sequence[str] = ()
    device: str = "cpu"
    parallel: int = 1
    limit_s: float = 36000.0
    say: Callable[[str], object] = print
    runs: list[Running] = field(default_factory=list)
    _begin: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        unknown = [name for name in self.variants if name not in VARIANTS]
        if unknown or not self.variants:
            raise ValueError(f"variants are {list(self.variants)}: choose among {', '.join(VARIANTS)}")
        values = read_values(self.config)
        for seed in self.seeds:
            self.runs += [
                Running(f"{name}-s{seed}", self._config(values, name, seed))
                for name in VARIANTS
                if name in self.variants
            ]

    def _config(self, values: Mapping[str, Any], variant: str, seed: int) -> Config:
        own = (f"name={variant}-s{seed}", f"seed={seed}", f"runs_dir={self.out / 'runs'}")
        on = ON_GPU if self.device.startswith("cuda") else ()
        try:
            return make_config(values, [*FIXED, *on, *self.overrides, *VARIANTS[variant], *own])
        except ConfigError as error:
            raise ConfigError(f"variant {variant}: {error}") from None

    @property
    def elapsed(self) -> float:
        return time.monotonic() - self._begin

    def run(self) -> dict[str, Any]:
        self._begin = time.monotonic()
        self.out.mkdir(parents=True, exist_ok=True)
        self._go = self.out / "go"
        self._go.unlink(missing_ok=True)
        for run in self.runs:
            if (status := status_before(run.config)) == "done":
                run.status = "done"
                self.say(f"{run.name}: done before")
            elif status == "cut":
                self.say(f"{run.name}: goes on after step {read_final(run.folder)['step']}")
        self._leader = next((run for run in self.runs if run.status == "waiting"), None)
        try:
            with Interrupts():
                self._watch()
        finally:
            self._end_all()
            result = self.write()
        return result

    def _watch(self) -> None:
        said = 0.0
        while any(run.status in ("waiting", "running") for run in self.runs):
            self._start_some()
            live = [run for run in self.runs if run.status == "running"]
            if any(self._settle(run) for run in live):  # `write` settles the others
                self.write()
            first = self._leader
            if first is not None and not self._go.exists() and (first.status != "running" or first.rows()):
                self._go.touch()
                self.say(f"[{self.elapsed:6.1f} s] {first.name} is past its first step or over: the others go")
            self._end_late()
            if self.elapsed > self.limit_s + EVALUATION_S:
                break  # `run` kills what is left
            if time.monotonic() - said > SAY_S:
                said = time.monotonic()
                self.say(self._pace())
            time.sleep(POLL_S)

    def _start_some(self) -> None:
        while sum(run.status == "running" for run in self.runs) < self.parallel:
            run = next((run for run in self.runs if run.status == "waiting"), None)
            if run is None:
                return
            if status_before(run.config) != "cut":
                shutil.rmtree(run.folder, ignore_errors=True)  # of a run that failed, or was of other inputs
            run.found.clear()
            run.folder.mkdir(parents=True, exist_ok=True)
            plan = run.folder / "plan.yaml"
            plan.write_text(to_yaml(run.config))
            width = min(self.parallel, len(self.runs))
            command = [sys.executable, "-m", "winnow.rl.bench_ablation", str(plan), str(MEMORY / width - CONTEXT)]
            command += [
                str(os.getpid()),
                *([str(self._go)] if not self._go.exists() and run is not self._leader else []),
            ]
            run.process = children.start(command, run.folder / "run.log", env={"OMP_NUM_THREADS": "1"})
            waves = -(-sum(r.status == "waiting" for r in self.runs) // self.parallel)
            run.ends = self.elapsed + (self.limit_s - self.elapsed) / waves - EVALUATION_S
            run.status = "running"

    def _settle(self, run: Running) -> bool:
        """Notices that a run's process has ended, and how; whether it did so now."""
        code = run.process.poll() if run.status == "running" and run.process is not None else None
        if code is None:
            return False
        final = read_final(run.folder)
        run.status = str(final["status"]) if code == 0 and final else "failed"
        run.why = "" if run.status != "failed" else reason(run.folder, code)
        self.say(f"[{self.elapsed:6.1f} s] {run.name}: {run.status} after {len(run.rows())} steps {run.why}".rstrip())
        return True

    def _end_late(self) -> None:
        """A run whose share of the limit is over is interrupted between two updates and evaluated; one that never began is named."""
        for run in self.runs:
            if run.status == "waiting" and self.elapsed > self.limit_s - EVALUATION_S:
                late = f"not started within {self.limit_s:.0f} s"
                run.status, run.why = ("cut", f"({late})") if status_before(run.config) == "cut" else ("failed", late)
            elif run.status == "running" and run.process is not None and self.elapsed > run.ends:
                run.ends = math.inf
                run.process.send_signal(signal.SIGTERM)
                self.say(f"[{self.elapsed:6.1f} s] {run.name}: its time is over, it is ended and evaluated")

    def _pace(self) -> str:
        """Where the running ones stand, in a line of bounded length."""
        live = {run.name: run.rows() for run in self.runs if run.status == "running"}
        steps = sorted((len(rows), name) for name, rows in live.items()) or [(0, "none")]
        seconds = sorted(step_seconds(rows[-1]) for rows in live.values() if rows)
        last = f"; a step takes {seconds[0]:.2f} to {seconds[-1]:.2f} s" if seconds else ""
        return (
            f"[{self.elapsed:6.1f} s] {len(live)} running, of {self.runs[0].config.schedule.steps} steps {steps[0][0]} ({steps[0][1]}) "
            f"to {steps[-1][0]} ({steps[-1][1]}){last}"
        )

    def _end_all(self) -> None:
        """Ends what still runs: each may save first, so that it can go on another time."""
        started = [run.process for run in self.runs if run.process is not None]
        for process in started:
            if process.poll() is None:
                process.terminate()
        end = time.monotonic() + SAVE_S
        while any(process.poll() is None for process in started) and time.monotonic() < end:
            time.sleep(POLL_S)
        for process in started:
            children.end(process)

    def write(self) -> dict[str, Any]:
        """table.json, table.md and the charts, as far as the runs have come."""
        from winnow.rl.ablation_table import write_table

        for run in self.runs:
            self._settle(run)
        return write_table(self.out, self.runs, min(self.parallel, len(self.runs)))


def status_before(config: Config) -> str | None:
    """How the run of exactly this config, model and tasks has ended before: done, cut, or None where it has not."""
    final = read_final(config.folder)
    same = final.get("config_hash") == config_hash(config) and final.get("inputs") == inputs(config)
    return str(final["status"]) if same else None


def inputs(config: Config) -> dict[str, str]:
    """What a run reads, by what it looks like now: its model and the files of its domains."""
    from winnow.rl.lineage import fingerprint

    files = [config.model.path, *(path for domain in config.domains for path in (domain.source, domain.path) if path)]
    return {path: fingerprint(path) for path in files}


def read_final(folder: Path) -> dict[str, Any]:
    path = folder / FINAL
    return json.loads(path.read_text()) if path.is_file() else {}


def step_seconds(row: Mapping[str, Any]) -> float:
    return sum(value for name, value in row.items() if name.startswith("time/"))


def reason(folder: Path, code: int) -> str:
    """Why a run failed: what it says itself, else the end of its log."""
    result = folder / "result.json"
    if result.is_file() and "error" in (said := json.loads(result.read_text())):
        return str(said["error"])[:500]
    log = folder / "run.log"
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()] if log.is_file() else []
    last = lines[-1][:500] if lines else "its log is empty"
    return f"killed by signal {-code}: {last}" if code < 0 else f"exit code {code}: {last}"


def run_one(plan: Path, share: float, parent: int, go: Path | None) -> None:
    """The body of one process: wait for the first run, train, evaluate. TimeoutError when the first run never takes a step."""
    import torch

    from winnow.models.load import load_tokenizer
    from winnow.rl.config import load_config
    from winnow.rl.here import here
    from winnow.rl.holdout import holdout_metrics
    from winnow.rl.train import train

    children.watch_parent(parent)
    config = load_config(plan)
    load_tokenizer(config.model.path)  # its libraries too are imported before the wait
    end = time.monotonic() + FIRST_STEP_S
    while go is not None and not go.exists():
        if time.monotonic() > end:
            raise TimeoutError(f"the first run has not taken its first step within {FIRST_STEP_S:.0f} s")
        time.sleep(POLL_S)
    if config.cluster.learner_gpus:
        torch.cuda.set_per_process_memory_fraction(share)
    resume = status_before(config) == "cut"
    signal.signal(
        signal.SIGTERM, signal.SIG_IGN
    )  # while `train` runs it saves; a run past its last step is evaluated in peace
    with here(config) as cluster:
        result = train(replace(config, resume=resume), cluster)
        status, step = "done" if result["status"] == "done" else "cut", int(result["step"])
        if status == "cut":
            write_final(config, status, step, {})  # whatever becomes of the evaluation, the run can go on
        cluster.pool.push_weights(cluster.learner.weights(step), step)
        found = holdout_metrics(config, cluster.pool.generate, step)
    write_final(config, status, step, found)
    if status == "done":
        shutil.rmtree(config.folder / "checkpoints", ignore_errors=True)


def write_final(config: Config, status: str, step: int, found: Mapping[str, float]) -> None:
    final = {
        "status": status, "step": step, "config_hash": config_hash(config), "inputs": inputs(config), "eval": dict(found),
    }  # fmt: skip
    temporary = config.folder / f".{FINAL}"
    temporary.write_text(json.dumps(final, indent=1, default=float))
    temporary.replace(config.folder / FINAL)


def bench_ablation(arguments: Any, say: Callable[[str], object]) -> dict[str, Any]:
    """`winnow bench ablation` by its parsed arguments."""
    a = arguments
    if not a.config or not a.out:
        raise ValueError("bench ablation needs --config (the run whose variants are compared) and --out (a folder)")
    from winnow.rl.verbs import find_config

    return Ablation(
        config=find_config(a.config), out=Path(a.out), variants=a.only or DEFAULT, seeds=a.seeds or (0, 1), overrides=overrides_of(a),
        device=a.device, parallel=a.parallel, limit_s=a.limit_s or Ablation.limit_s, say=say,
    ).run()  # fmt: skip


def overrides_of(arguments: Any) -> list[str]:
    """What the options say of the config."""
    a = arguments
    steps = [f"schedule.steps={a.steps}"] if a.steps else []
    return [*a.set, *steps, *([f"model.path={a.model}"] if a.model else [])]


if __name__ == "__main__":
    run_one(Path(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]) if len(sys.argv) > 4 else None)
