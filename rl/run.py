"""The run folder: what a run leaves behind, in formats other tools read. Layout in docs and in the names below."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from winnow.rl.checkpoints import best_checkpoint, read_meta, save_checkpoint
from winnow.rl.config import Config, ConfigError, config_hash, to_yaml
from winnow.rollout.schema import Failure, Group, Score, Trajectory


class Run:
    """Writes config.yaml, metrics.jsonl, samples/, result.json and TensorBoard events below `config.folder`.

    Opening a folder that holds another run's metrics is refused unless `config.resume`; then lines after `step` are removed, so that
    metrics.jsonl has each step once. As a context manager it writes result.json at the end, also when the run fails.
    """

    def __init__(self, config: Config, step: int = 0, checkpoint: Path | None = None) -> None:
        self.config = config
        self.folder = config.folder
        self.step = self.saved = step  # the last finished step; the last one with a checkpoint
        self.checkpoint = checkpoint
        self.status, self._begin = "done", time.monotonic()
        self.drift: float | None = None  # nats, see Cluster.check_drift
        self.result: dict[str, Any] = {}
        self._held_out: tuple[int, float] | None = None  # the last evaluated step and its mean held-out reward
        self._pending: tuple[int, dict[str, float]] | None = None
        self._domains: dict[str, dict[str, float]] = {domain.name: {} for domain in config.domains}
        metrics = self.folder / "metrics.jsonl"
        if metrics.exists() and metrics.stat().st_size and not config.resume:
            raise ConfigError(
                f"{self.folder} already holds a run: set resume=true to continue it, or give this one another name (name=...)"
            )
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "samples").mkdir(exist_ok=True)
        (self.folder / "config.yaml").write_text(
            f"# config {config_hash(config)}, winnow {code_version()}\n{to_yaml(config)}"
        )
        if metrics.exists():
            rows = [(_step_of(line), line) for line in metrics.read_text().splitlines()]
            metrics.write_text(
                "".join(f"{line}\n" for number, line in rows if number is not None and number <= step and checkpoint)
            )
        self._metrics = metrics.open("a")
        self._events = _tensorboard(self.folder, step)

    def __enter__(self) -> Run:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.flush()
        self._metrics.close()
        if self._events is not None:
            self._events.close()
        if error is not None:
            self.status = "interrupted" if isinstance(error, KeyboardInterrupt) else "failed"
        self.result = {
            "status": self.status,
            "step": self.step,
            "steps": self.config.schedule.steps,
            "checkpoint": str(self.checkpoint) if self.checkpoint else None,
            "best": str(self.best) if self.best else None,  # of the kept ones, by held-out reward
            "drift": self.drift,
            "run": str(self.folder),
            "config_hash": config_hash(self.config),
            "version": code_version(),
            "domains": self._domains,
            **({"error": f"{type(error).__name__}: {error}"} if error is not None else {}),
        }
        temporary = self.folder / ".result.json"
        temporary.write_text(json.dumps(self.result, indent=1, default=_plain))
        temporary.replace(self.folder / "result.json")

    def steps(self, seconds: float | None = None) -> Iterator[int]:
        """The steps that are left. None begins more than `seconds` after the run was opened, but for the run's first."""
        for step in range(self.step + 1, self.config.schedule.steps + 1):
            if self.step and seconds is not None and time.monotonic() - self._begin > seconds:
                return
            yield step

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    @property
    def best(self) -> Path | None:
        """The kept checkpoint with the highest held-out reward."""
        return best_checkpoint(self.checkpoints)

    @property
    def save_due(self) -> bool:
        """Whether the last finished step wants a checkpoint: every `save_every` steps, and for a new best of the held-out tasks."""
        schedule = self.config.schedule
        if not schedule.keep:
            return False
        if schedule.save_every and self.step % schedule.save_every == 0:
            return True
        return schedule.keep_best and self.held_out is not None and self.held_out > self._best_held_out()

    @property
    def held_out(self) -> float | None:
        """The last finished step's mean reward over the domains' held-out tasks; None where it was not evaluated."""
        return self._held_out[1] if self._held_out and self._held_out[0] == self.step else None

    def _best_held_out(self) -> float:
        return float(read_meta(self.best)["held_out"]) if self.best else float("-inf")

    def save(self, learner: Any, rollouts: Any = None) -> None:
        """A checkpoint of the last finished step, with what `rollouts` has in flight, unless there is one."""
        if self.step and self.saved != self.step and self.config.schedule.keep:
            meta = {"config": config_hash(self.config), "seed": self.config.seed}
            if self.config.schedule.keep_best and self.held_out is not None:
                meta["held_out"] = self.held_out

            def fill(folder: Path) -> None:
                learner.save(folder)
                if rollouts is not None:
                    rollouts.save(folder, self.step)

            keep = self.config.schedule.keep
            self.checkpoint = save_checkpoint(self.checkpoints, self.step, fill, keep=keep, meta=meta)
            self.saved = self.step

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Adds to the line of a step, which `flush` (or the next step, or the end) writes."""
        if self._pending is None or self._pending[0] != step:
            self.flush()
            self._pending = (step, {})
        self._pending[1].update(metrics)
        rewards = [value for name, value in metrics.items() if name.startswith("eval/") and name.endswith("_reward")]
        if rewards:
            self._held_out = (step, float(np.mean(rewards)))

    def flush(self) -> str:
        """Writes the pending line to metrics.jsonl and TensorBoard; returns a short form of it for a terminal."""
        if self._pending is None:
            return ""
        (step, metrics), self._pending = self._pending, None
        self._metrics.write(
            json.dumps({"step": step, **{name: _short(value) for name, value in metrics.items()}}) + "\n"
        )
        self._metrics.flush()
        if self._events is not None:
            for name, value in metrics.items():
                self._events.add_scalar(name, value, step)
        for name, figures in self._domains.items():
            if f"reward/{name}" in metrics:
                figures.setdefault("reward_first", metrics[f"reward/{name}"])
                figures["reward_last"] = metrics[f"reward/{name}"]
            if f"eval/{name}" in metrics:
                figures["eval"] = metrics[f"eval/{name}"]
        return _line(step, self.config.schedule.steps, metrics)

    def save_samples(self, step: int, groups: Sequence[Group]) -> Path:
        """samples/step-NNNNNN.jsonl: every trajectory of the step with its reward by part or its failure."""
        path = self.folder / "samples" / f"step-{step:06d}.jsonl"
        with path.open("w") as stream:
            for group in groups:
                scores = group.scores or (None,) * len(group.trajectories)
                for trajectory, score in zip(group.trajectories, scores, strict=True):
                    stream.write(json.dumps(sample_row(trajectory, score), ensure_ascii=False, default=_plain) + "\n")
        return path


def sample_row(trajectory: Trajectory, score: Score | Failure | None) -> dict[str, Any]:
    """One line of samples/: JSON values only. Index records are too large for it; their size is given."""
    record = trajectory.index_record
    row: dict[str, Any] = {
        "task_id": trajectory.task_id,
        "domain": trajectory.domain,
        "request_id": trajectory.request_id,
        "sample": trajectory.sample,
        "messages": [dict(message) for message in trajectory.messages],
        "tokens": trajectory.tokens.tolist(),
        "loss_mask": trajectory.loss_mask.astype(int).tolist(),
        "policy_versions": sorted({int(v) for v in trajectory.policy_versions[trajectory.loss_mask]}),
        "finish_reason": trajectory.finish_reason,
        "turns": trajectory.turns,
        "index_record_bytes": record.nbytes if record is not None else 0,
        **({"expert_record_bytes": routed.nbytes} if (routed := trajectory.expert_record) is not None else {}),
    }
    if isinstance(score, Score):
        row |= {"reward": score.value, "parts": dict(score.parts)}
    elif isinstance(score, Failure):
        row |= {"failure": {"kind": score.kind, "detail": score.detail}}
    return row


def code_version() -> str:
    """The installed version; "source" when run from a checkout."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("winnow-rl")
    except PackageNotFoundError:
        return "source"


class Stopwatch:
    """Seconds by stage: `with watch("rollout"): ...`, then `watch.times`."""

    def __init__(self) -> None:
        self.times: dict[str, float] = {}
        self._stage, self._start = "", 0.0

    def __call__(self, stage: str) -> Stopwatch:
        self._stage, self._start = stage, time.perf_counter()
        return self

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        self.times[self._stage] = self.times.get(self._stage, 0.0) + time.perf_counter() - self._start


def _line(step: int, steps: int, metrics: Mapping[str, float]) -> str:
    """step 3/50  reward 0.41 (math 0.38, tool 0.44)  length ...  what a person watching wants to see."""
    rewards = {name.removeprefix("reward/"): value for name, value in metrics.items() if name.startswith("reward/")}
    mean = rewards.pop("mean", 0.0)
    if step == 0:
        return "  ".join(
            ["before training", *(f"{n} {v:.3f}" for n, v in metrics.items() if n.startswith("eval/") and "_" not in n)]
        )
    by_domain = ", ".join(f"{name} {value:.3f}" for name, value in rewards.items())
    evals = [f"{name} {value:.3f}" for name, value in metrics.items() if name.startswith("eval/") and "_" not in name]
    seconds = sum(value for name, value in metrics.items() if name.startswith("time/"))
    parts = [
        f"step {step}/{steps}",
        f"reward {mean:.3f} ({by_domain})",
        f"k3 {metrics.get('mismatch/k3_kl', 0.0):.1e}",
        f"jaccard {metrics.get('index/jaccard', 1.0):.3f}",
        f"grad {metrics.get('grad_norm', 0.0):.2f}",
        f"{seconds:.1f} s",
        *evals,
    ]
    return "  ".join(parts)


def _tensorboard(folder: Path, step: int) -> Any:
    """A TensorBoard writer, or None where tensorboard is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)


def _step_of(line: str) -> int | None:
    try:
        return int(json.loads(line)["step"])
    except (json.JSONDecodeError, KeyError, TypeError):
        return None


def _short(value: float) -> float | None:
    number = float(value)
    return float(f"{number:.6g}") if np.isfinite(number) else None  # JSON has no NaN


def _plain(value: Any) -> Any:
    """JSON form of what numpy and pathlib leave in results."""
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray):
        return value.tolist()
    return str(value)


def resumable(config: Config) -> bool:
    """Whether the run's folder holds an unfinished run of this very config."""
    text = config.folder / "config.yaml"
    return text.is_file() and text.read_text().startswith(f"# config {config_hash(config)},")
