"""`winnow bench step`: the program itself, timed. Some steps of `winnow train` in one process, by stage, and TRL's beside them.

    winnow bench step --model FOLDER --device cuda --peers trl

Figures are those of metrics.jsonl, medians over the steps after the first two; `first_step_s` counts from the start of this process to
the end of the first step, imports and compilation included. TRL trains the dense weights of the same folder on the same prompts with as
many samples of as many tokens, and the same reward.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

WARM_UP = 2  # steps that are not counted
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
    seed: int = 0


def bench_step(bench: StepBench, peers: Sequence[str] = ()) -> dict[str, Any]:
    """Ours, then each peer of `peers`: "trl", or why it could not be run."""
    with tempfile.TemporaryDirectory(prefix="winnow-bench-") as scratch:
        model = bench.model or str(small_model(Path(scratch) / "model"))
        figures: dict[str, Any] = {
            "timed": f"{bench.steps} steps of {bench.prompts} prompts x {bench.samples} samples of <= {bench.tokens} tokens, one-digit sums",
            "ours": ours(bench, model, Path(scratch)),
        }
        for peer in peers:
            if peer != "trl":
                raise ValueError(f"bench step has no peer {peer!r}: it knows trl")
            from winnow.rl.bench_trl import bench_trl

            try:
                figures["trl"] = bench_trl(bench, model, Path(scratch))
            except ImportError as error:
                figures["trl"] = f"not here: {error}"
                continue
            figures["ours_over_trl"] = round(
                figures["ours"]["samples_per_s"]["median"] / figures["trl"]["samples_per_s"]["median"], 2
            )
    return figures


def ours(bench: StepBench, model: str, scratch: Path) -> dict[str, Any]:
    from winnow.rl.train import train

    ends: list[float] = []
    config = step_config(bench, model, scratch)
    train(config, progress=lambda text: ends.append(seconds_alive()) if text.startswith("step ") else None)
    rows = [json.loads(line) for line in (config.folder / "metrics.jsonl").read_text().splitlines()]
    counted = [row for row in rows if row["step"] > WARM_UP] or rows
    stages = [name for name in rows[0] if name.startswith("time/")]
    return {
        "first_step_s": round(ends[0], 2),
        "steps_counted": len(counted),
        "samples_per_s": spread([row["samples_per_s"] for row in counted]),
        "step_s": spread([sum(row[name] for name in stages) for row in counted]),
        "stage_s": {
            name.removeprefix("time/")[:-2]: spread([row[name] for row in counted])["median"] for name in stages
        },
        "rollout_tokens_per_s": spread([row["tokens/rollout_per_s"] for row in counted]),
        "trained_tokens_per_s": spread([row["tokens/trained"] / row["time/learn_s"] for row in counted]),
        "mismatch_k3_kl": spread([row["mismatch/k3_kl"] for row in counted]),
        "rewards": [round(row["reward/mean"], 3) for row in rows],
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
            "learner": {"lr": 1e-5, "micro_tokens": 32768 if gpu else 4096, "threads": bench.threads},
            "algorithm": {"truncated": "keep"},
            "schedule": {"steps": bench.steps, "save_every": 0},
            "cluster": {"address": "here", "learner_gpus": share, "worker_gpus": share},
        }
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
    try:
        started = int(Path("/proc/self/stat").read_text().rsplit(")", 1)[1].split()[19]) / os.sysconf("SC_CLK_TCK")
        return float(Path("/proc/uptime").read_text().split()[0]) - started
    except (OSError, IndexError, ValueError):
        return time.monotonic() - _IMPORTED


_IMPORTED = time.monotonic()


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
