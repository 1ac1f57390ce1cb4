"""`winnow bench step`: the program itself, timed. Some steps of `winnow train` in one process, by stage, and TRL's beside them.

    winnow bench step --model FOLDER --device cuda --peers trl
    winnow bench step --model FOLDER --device cuda --wall 60 --steps 1000 --seed 1 --peers trl --only trl      one of them, alone in its process

A step is timed from the end of the one before to its own, whatever lies between; figures are medians over the steps after the first two,
`early` over those of them until the tenth, before samples without a gradient become many. `first_step_s` counts from the start of this
process to the end of the first step, imports and compilation included. `curve` has a row a step: seconds since the end of the first
step, mean reward, mean tokens of a reply. TRL trains the dense weights of the same folder on the same prompts with as many samples of as
many tokens, and the same reward.
"""

from __future__ import annotations

import itertools
import json
import os
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

WARM_UP = 2  # steps that are not counted
EARLY = 10  # the last step of `early`
PAGE = 16
PROMPT = 128  # tokens of a prompt at most, for the size of the cache


@dataclass(frozen=True, kw_only=True)
class StepBench:
    """What is run. Defaults are the comparison of docs/experiments.md: 256 samples of at most 64 tokens."""

    model: str | None = None  # a converted folder; None: a small random one
    device: str = "cpu"
    threads: int = 1
    prompts: int = 32
    samples: int = 8
    tokens: int = 64
    steps: int = 10
    wall: float | None = None  # seconds after the first step at which a run ends, if its steps have not
    until: float | None = None  # seconds after the start of its process, likewise
    seed: int = 0
    overrides: Sequence[str] = ()  # of our run's config


def bench_step(
    bench: StepBench, peers: Sequence[str] = (), only: Sequence[str] = (), progress: Callable[[str], object] = lambda text: None
) -> dict[str, Any]:  # fmt: skip
    """Ours, then each peer of `peers`: "trl", or why it could not be run. `only` leaves out what it does not name; `progress` hears of
    every step."""
    if wrong := [name for name in (*peers, *only) if name not in ("trl", *(["ours"] if name in only else []))]:
        raise ValueError(f"bench step has no peer {wrong[0]!r}: it knows trl")
    names = [name for name in ("ours", *peers) if not only or name in only]
    if not names:
        raise ValueError(f"bench step has nothing to run: --only names {', '.join(only)}, which --peers does not")
    with tempfile.TemporaryDirectory(prefix="winnow-bench-") as scratch:
        model = bench.model or str(small_model(Path(scratch) / "model"))
        figures: dict[str, Any] = {
            "timed": f"{bench.steps} steps of {bench.prompts} prompts x {bench.samples} samples of <= {bench.tokens} tokens, one-digit sums"
            + (f", for {bench.wall:g} s at most" if bench.wall else ""),
            "seed": bench.seed,
        }
        for name in names:
            if name == "ours":
                figures[name] = ours(bench, model, Path(scratch), progress)
                continue
            from winnow.rl.bench_trl import bench_trl

            try:
                begin = 0.0 if names == [name] else seconds_alive()
                figures[name] = bench_trl(bench, model, Path(scratch), begin, progress)
            except ImportError as error:
                figures[name] = f"not here: {error}"
                continue
            if "ours" in figures:
                figures["ours_over_trl"] = round(
                    figures["ours"]["samples_per_s"]["median"] / figures["trl"]["samples_per_s"]["median"], 2
                )
    return figures


def over(bench: StepBench, ends: Sequence[float]) -> bool:
    """Whether a run has had its time with the step that ended last. ends: in seconds after the start of the process."""
    wall = bench.wall is not None and ends[-1] - ends[0] >= bench.wall
    return wall or (bench.until is not None and ends[-1] >= bench.until)


class Over(Exception):
    """All that is timed has run: raised by what hears of steps, so that a run ends without the checkpoint that runs end with (of a large
    model, minutes)."""


def ours(bench: StepBench, model: str, scratch: Path, progress: Callable[[str], object]) -> dict[str, Any]:
    from winnow.rl.train import train

    ends: list[float] = []

    def ended(text: str) -> None:
        if text.startswith("step "):
            ends.append(seconds_alive())
            progress(f"ours: {ends[-1]:.2f} s after the start, {text}")
            if over(bench, ends):
                raise Over

    config = step_config(bench, model, scratch)
    with suppress(Over):
        train(config, progress=ended)
    rows = [json.loads(line) for line in (config.folder / "metrics.jsonl").read_text().splitlines()]
    counted = [row for row in rows if row["step"] > WARM_UP] or rows
    stages = [name for name in rows[0] if name.startswith("time/")]
    curve = [(row["reward/mean"], row["length/addition"]) for row in rows]
    return {
        **timing(bench, 0.0, ends, curve),
        "stage_s": {
            name.removeprefix("time/")[:-2]: spread([row[name] for row in counted])["median"] for name in stages
        },
        "rollout_tokens_per_s": spread([row["tokens/rollout_per_s"] for row in counted]),
        "trained_tokens_per_s": spread([row["tokens/trained"] / row["time/learn_s"] for row in counted]),
        "mismatch_k3_kl": spread([row["mismatch/k3_kl"] for row in counted]),
    }


def timing(
    bench: StepBench, begin: float, ends: Sequence[float], curve: Sequence[tuple[float, float]]
) -> dict[str, Any]:
    """What is asked of every program: ends of steps and `begin` in seconds of one clock; (reward, tokens of a reply) of each step."""
    total = bench.prompts * bench.samples
    times = [b - a for a, b in itertools.pairwise([begin, *ends])]
    counted = times[WARM_UP:] or times
    return {
        "first_step_s": round(ends[0] - begin, 2),
        "steps_counted": len(counted),
        "samples_per_s": spread([total / seconds for seconds in counted]),
        "samples_per_s_early": spread([total / seconds for seconds in times[WARM_UP:EARLY] or times]),
        "step_s": spread(counted),
        "rewards": [round(reward, 3) for reward, _ in curve],
        "curve": [
            [round(end - ends[0], 3), round(reward, 4), round(length, 1)]
            for end, (reward, length) in zip(ends, curve, strict=True)
        ],
    }


def step_config(bench: StepBench, model: str, scratch: Path) -> Any:
    """The config of the run: colocated on one device, nothing recorded that the comparison does not need."""
    from winnow.rl.config import make_config

    total, gpu = bench.prompts * bench.samples, bench.device.startswith("cuda")
    share = 0.5 if gpu else 0.0
    return make_config(
        {
            "name": "bench", "runs_dir": str(scratch), "seed": bench.seed,
            "model": {"path": model, "dtype": "bfloat16" if gpu else "float32"},
            "domains": [{"name": "addition", "source": "addition", "count": 70, "holdout": 30, "quota": bench.prompts, "max_tokens": bench.tokens}],
            "rollout": {
                "samples": bench.samples, "max_batch": total, "num_pages": total * -(-(PROMPT + bench.tokens) // PAGE) + 64, "page_size": PAGE,
                "prefill_chunk": 16384 if gpu else 2048, "record_indices": False, "threads": bench.threads,
            },
            "learner": {"lr": 1e-5, "micro_tokens": 32768 if gpu else 4096, "threads": bench.threads, "cuda_graphs": gpu},
            "algorithm": {"truncated": "keep"},
            "schedule": {"steps": bench.steps, "save_every": 0},
            "cluster": {"address": "here", "learner_gpus": share, "worker_gpus": share},
        },
        bench.overrides,
    )  # fmt: skip


def small_model(folder: Path) -> Path:
    """A converted model of two layers with random weights, and a tokenizer."""
    import torch

    from winnow.models.attach import attach
    from winnow.models.indexer import IndexerConfig
    from winnow.models.load import save
    from winnow.rewards.demonstrations import pretraining_texts
    from winnow.rl.base import BaseOptions, make_model, make_tokenizer

    torch.manual_seed(0)
    tokenizer = make_tokenizer(pretraining_texts(12, 0), 400, 512)
    model = make_model(tokenizer, BaseOptions(hidden=64, layers=2, heads=4, context=512))
    return save(attach(model, IndexerConfig(top_k=16, num_heads=4, head_dim=16, rope_dim=8)), tokenizer, folder)


def spread(values: Sequence[float]) -> dict[str, float]:
    low, middle, high = np.percentile(values, [0, 50, 100])
    return {"median": _short(middle), "min": _short(low), "max": _short(high)}


def _short(value: float) -> float:
    return float(f"{value:.5g}")


def seconds_alive() -> float:
    """Seconds since this process was started; since this module was imported where the system does not say."""
    return time.perf_counter() - _born()


@cache
def _born() -> float:
    """The time of this process's start on the clock of `perf_counter`, to a hundredth of a second."""
    now = time.perf_counter()
    try:
        started = int(Path("/proc/self/stat").read_text().rsplit(")", 1)[1].split()[19]) / os.sysconf("SC_CLK_TCK")
        return now - (float(Path("/proc/uptime").read_text().split()[0]) - started)
    except (OSError, IndexError, ValueError):
        return _IMPORTED


_IMPORTED = time.perf_counter()


def as_rows(figures: Mapping[str, Any]) -> list[str]:
    """One line a program, for a terminal."""
    lines = []
    for name in ("ours", "trl"):
        found = figures.get(name)
        if isinstance(found, Mapping):
            rate, step = found["samples_per_s"], found["step_s"]
            lines.append(
                f"{name}: {rate['median']:.1f} samples/s ({rate['min']:.1f}-{rate['max']:.1f}), {step['median']:.3f} s a step, "
                f"first step after {found['first_step_s']:.1f} s"
            )
        elif found:
            lines.append(f"{name}: {found}")
    return lines
