"""`winnow bench scaling`: what a second GPU brings, in short runs of the program itself. Without GPUs (gloo, mapped memory) a rehearsal.

    throughput  learner and engine on one GPU, then on each of two, as much work for each   -> tokens/s on two over one
    schedule    learner and engine on a GPU each, sync, then one step off                   -> step time of the second over the first
    curve       the run of --config on one GPU, on both, on one and one                     -> first step's figures, rewards, side by side
    kills       two ranks and two engines; an engine, then a rank ended by SIGKILL          -> seconds until each is named, steps missing

A model with random weights is rewarded by the toss of a coin, so all samples go through both passes, and learning changes nothing. Each run ends after its share of --limit-s at the latest, at the end of a step; figures are medians over the steps after the first two.
"""

from __future__ import annotations

import itertools
import json
import logging
import os
import signal
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from winnow.rl.bench_step import PAGE, WARM_UP, Over

PARTS = ("throughput", "schedule", "curve", "kills")
# name -> learner ranks, rollout workers, whether they share GPUs
PLACES = {"one": (1, 1, True), "two": (2, 2, True), "apart": (1, 1, False)}
FIRST = ("loss/policy", "loss/indexer_kl", "entropy", "grad_norm")  # of a step, compared between placements
PROMPT = 256  # tokens of a prompt at most, for the size of the cache
KILL_AFTER = {2: "engine", 4: "rank"}  # step -> who is killed when it ends
NAMED = {"engine": "rollout worker 1", "rank": "the learner's"}  # what a line that names it holds
Say = Callable[[str], object]


@dataclass(frozen=True, kw_only=True)
class ScalingBench:
    """What is run. prompts, samples: of a step, for each rollout worker; config: of the part curve."""

    model: str | None = None  # a converted folder or a shape of `bench_models.SHAPES`; None: a small random one
    layers: int | None = None
    device: str = "cpu"
    threads: int = 1
    prompts: int = 32
    samples: int = 8
    tokens: int = 64
    steps: int = 6
    limit_s: float = 480.0
    config: str | None = None
    overrides: tuple[str, ...] = ()

    @property
    def gpu(self) -> bool:
        return self.device.startswith("cuda")


def bench_scaling(bench: ScalingBench, parts: Sequence[str], say: Say) -> dict[str, Any]:
    """Rows as they come. ValueError: an unknown part, or too few GPUs for it. A run that fails is a row that says why."""
    import torch

    from winnow.rl.cluster import ray_session

    if unknown := [part for part in parts if part not in PARTS]:
        raise ValueError(f"bench scaling: part {unknown[0]!r} is unknown: the parts are {', '.join(PARTS)}")
    if "curve" in parts and not bench.config:
        raise ValueError("bench scaling: the part curve compares one run in several places: name it by --config")
    if bench.gpu and torch.cuda.device_count() < 2:
        raise ValueError(
            f"bench scaling: {bench.device} has {torch.cuda.device_count()} GPUs here, and this compares two with one"
        )
    runs = {"throughput": 2, "schedule": 2, "curve": len(PLACES), "kills": 1}
    seconds = bench.limit_s / sum(runs[part] for part in parts)
    rows: list[dict[str, Any]] = []

    def add(row: dict[str, Any]) -> dict[str, Any]:
        rows.append(row)
        say(json.dumps(row))
        return row

    with tempfile.TemporaryDirectory(prefix="winnow-bench-") as scratch:
        made = Made(bench, Path(scratch), seconds, say)
        with ray_session(made.config("largest", "two")):
            for part in parts:
                {"throughput": throughput, "schedule": schedule, "curve": curve, "kills": kills}[part](made, add)
    name = torch.cuda.get_device_name() if bench.gpu else "cpu"
    return {
        "bench": "scaling",
        "torch": torch.__version__,
        "device": name,
        "model": bench.model or "random, 2 layers",
        "figures": {"rows": rows},
    }


def throughput(made: Made, add: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    one, two = (
        add(made.row(f"throughput {place}", made.config(f"throughput-{place}", place))) for place in ("one", "two")
    )
    names = {"rollout": "rollout_tokens_per_s", "learner": "trained_tokens_per_s"}
    if all(name in row for name in names.values() for row in (one, two)):
        add({"row": "two over one", **{part: round(two[name] / one[name], 3) for part, name in names.items()}})


def schedule(made: Made, add: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    kinds = ("sync", "one_step_off")
    sync, ahead = (
        add(made.row(f"schedule {kind}", made.config(f"schedule-{kind}", "apart", f"schedule.kind={kind}"))) for kind in kinds
    )  # fmt: skip
    if "step_s" in sync and "step_s" in ahead:
        add({"row": "one step off over sync", "step": round(ahead["step_s"] / sync["step_s"], 3)})


def curve(made: Made, add: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    from winnow.rl.config import load_config
    from winnow.rl.verbs import find_config

    bench, found = made.bench, {}
    for place in PLACES:
        own = [
            f"name=curve-{place}",
            f"runs_dir={made.scratch}",
            *([f"model.path={bench.model}"] if bench.model else []),
        ]
        config = load_config(find_config(str(bench.config)), [*placement(place, bench.gpu), *bench.overrides, *own])
        found[place] = add(made.row(f"curve {place}", config))
    first = found["one"].get("first", {})
    for place, row in found.items():
        if place != "one" and first and "first" in row:
            apart = {name: abs(row["first"][name] - first[name]) for name in first}
            last = {who: round(statistics.mean(found[who]["rewards"][-5:]), 4) for who in ("one", place)}
            add({"row": f"curve {place} against one", "first_step_difference": apart, "reward_of_last_5": last})


def kills(made: Made, add: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """As the steps of KILL_AFTER end, a process is killed. Named: the first line of the log, or of progress, with its name."""
    from winnow.rl.cluster import connect
    from winnow.rl.train import train

    last = max(KILL_AFTER) + 2
    config = made.config("kills", "two", f"schedule.steps={last}", "schedule.save_every=1", "learner.restarts=1")
    heard: list[tuple[float, str]] = []
    killed: dict[str, tuple[float, str]] = {}  # who -> when, and what names it

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            heard.append((time.perf_counter(), record.getMessage()))

    def ended(text: str) -> None:
        heard.append((time.perf_counter(), text))
        step = int(text.split()[1].split("/")[0]) if text.startswith("step ") else 0
        who = KILL_AFTER.get(step, "")
        if not who or who in killed:
            return
        victim = process_of(cluster, who)
        killed[who] = (time.perf_counter(), NAMED[who])
        os.kill(victim, signal.SIGKILL)

    listener = Listener(logging.ERROR)
    logging.getLogger("winnow").addHandler(listener)
    row: dict[str, Any] = {"row": "kills"}
    try:
        with connect(config) as cluster:
            row["status"] = train(config, cluster, ended)["status"]
    except Exception as error:
        row["failed"] = f"{type(error).__name__}: {str(error).splitlines()[0][:300]}"
    finally:
        logging.getLogger("winnow").removeHandler(listener)
    for who, (when, name) in killed.items():
        after = next((moment - when for moment, text in heard if moment >= when and name in text), None)
        row[f"{who}_named_after_s"] = None if after is None else round(after, 2)
    steps = [found["step"] for found in read_rows(config)]
    missing = sorted(set(range(1, last + 1)) - set(steps))
    add({**row, "steps": len(steps), "missing": missing, "twice": len(steps) - len(set(steps))})


def process_of(cluster: Any, who: str) -> int:
    """The process id of the second engine, or of the learner's second rank."""
    import ray

    if who == "engine":
        return int(cluster.pool.describe()[1].split("pid ")[1].split()[0])
    return ray.get(cluster.learner.actors[1].pid.remote(), timeout=60)


class Made:
    """The model and the configs of a bench, and how one of them becomes a row."""

    def __init__(self, bench: ScalingBench, scratch: Path, seconds: float, say: Say) -> None:
        self.bench, self.scratch, self.seconds, self.say = bench, scratch, seconds, say
        self._model = ""

    @property
    def model(self) -> str:
        """The folder; made when it is first asked for."""
        from winnow.rl.bench_models import SHAPES
        from winnow.rl.bench_step import small_model

        if not self._model:
            shape, folder = self.bench.model, self.scratch / "model"
            if shape in SHAPES:
                self._model = str(shape_folder(shape, self.bench, folder))
            else:
                self._model = shape or str(small_model(folder))
        return self._model

    def config(self, name: str, place: str, *overrides: str) -> Any:
        """Of a run with as much work for each rollout worker, wherever they are."""
        from winnow.rl.config import make_config

        bench, gpu = self.bench, self.bench.gpu
        _, workers, _ = PLACES[place]
        samples = bench.prompts * bench.samples  # of a worker
        tasks = write_questions(self.scratch / "questions.jsonl", 4 * bench.prompts * workers)
        values = {
            "name": name, "runs_dir": str(self.scratch), "model": {"path": self.model, "dtype": "bfloat16" if gpu else "float32"},
            "domains": [{"name": "coin", "source": str(tasks), "reward": "winnow.rl.bench_scaling:coin", "holdout": 0,
                         "count": 4 * bench.prompts * workers, "quota": bench.prompts * workers, "max_tokens": bench.tokens}],
            "rollout": {
                "samples": bench.samples, "max_batch": samples, "num_pages": samples * -(-(PROMPT + bench.tokens) // PAGE) + 64,
                "page_size": PAGE, "prefill_chunk": 16384 if gpu else 2048, "record_indices": False, "threads": bench.threads,
            },
            # Two ranks move all weights to each other for every micro-batch: few large ones.
            "learner": {"lr": 1e-6, "micro_tokens": 65536 if gpu else 4096, "threads": bench.threads, "checkpointing": gpu},
            "algorithm": {"truncated": "keep", "recompute_old": False, "max_mismatch": 1e9},
            "indexer": {"train": "kl", "selection": "own", "min_overlap": 0.0},
            "schedule": {"steps": bench.steps, "save_every": 0},
            "cluster": {"start_timeout_s": 200.0, "step_timeout_s": 200.0},
        }  # fmt: skip
        return make_config(values, [*placement(place, gpu), *overrides])

    def row(self, name: str, config: Any) -> dict[str, Any]:
        """A run's figures, or why there are none."""
        from winnow.rl.train import train

        ends: list[float] = []
        begin = time.perf_counter()

        def ended(text: str) -> None:
            if text.startswith("step "):
                ends.append(time.perf_counter())
                self.say(f"{name}: {text}")
                if len(ends) == config.schedule.steps or ends[-1] - begin > self.seconds:
                    raise Over

        row: dict[str, Any] = {
            "row": name, "ranks": config.learner.ranks, "workers": config.rollout.workers,
            "samples": config.prompts_per_step * config.rollout.samples,
        }  # fmt: skip
        try:
            with suppress(Over):
                train(config, progress=ended, seconds=self.seconds)
        except Exception as error:  # the other runs may work
            return row | {"failed": f"{type(error).__name__}: {str(error).splitlines()[0][:300]}"}
        rows = read_rows(config)
        row |= {"first_step_s": round(ends[0] - begin, 1)} if ends else {}
        row |= {"run_s": round(time.perf_counter() - begin, 1)}
        if len(rows) <= WARM_UP and len(rows) < config.schedule.steps:
            return row | {
                "failed": f"{len(rows)} steps within {self.seconds:.0f} s, the start included: raise --limit-s"
            }
        return row | figures(rows, ends)


def coin(task: Any, trajectory: Any) -> Any:
    """A reward that follows from the sample, and from nothing that could be learned."""
    from winnow.rollout.schema import Score

    return Score(value=float(int(trajectory.tokens.sum()) % 2))


def write_questions(path: Path, count: int) -> Path:
    """A JSONL file with enough prompts of about a hundred tokens for `count` of them to be trained on."""
    from winnow.rewards.tasks import generate_tasks

    tasks = generate_tasks("lookup", count=2 * count)
    path.write_text("".join(json.dumps({"prompt": t.messages[0]["content"], "answer": t.answer}) + "\n" for t in tasks))
    return path


def figures(rows: Sequence[dict[str, float]], ends: Sequence[float]) -> dict[str, Any]:
    """Of the metrics of a run's steps, and when each ended. Medians; without the first two steps, if there are others."""
    counted = rows[WARM_UP:] or rows
    steps = [after - before for before, after in itertools.pairwise(ends)]

    def middle(values: Sequence[float]) -> float:
        return float(f"{statistics.median(values):.5g}")

    stages = ("rollout", "reward", "learn", "sync")
    return {
        "steps": len(rows),
        "step_s": middle(steps[WARM_UP - 1 :] or steps or [0.0]),
        "stage_s": {stage: middle([row[f"time/{stage}_s"] for row in counted]) for stage in stages},
        "rollout_tokens_per_s": middle([row["tokens/rollout_per_s"] for row in counted]),
        "trained_tokens_per_s": middle([row["tokens/trained"] / row["time/learn_s"] for row in counted]),
        "first": {name: rows[0][name] for name in FIRST if name in rows[0]},
        "rewards": [round(row["reward/mean"], 4) for row in rows],
    }


def placement(place: str, gpu: bool) -> list[str]:
    """Overrides that put learner and engines there; on GPUs the transports are those that `auto` takes."""
    ranks, workers, shared = PLACES[place]
    share = (0.5 if shared else 1.0) if gpu else 0.0
    return [
        f"learner.ranks={ranks}", f"rollout.workers={workers}", f"cluster.colocate={str(shared).lower()}", f"cluster.learner_gpus={share}",
        f"cluster.worker_gpus={share}", f"cluster.transport={'ipc' if shared else 'nccl'}",
    ]  # fmt: skip


def read_rows(config: Any) -> list[dict[str, float]]:
    """The metrics of a run's steps so far."""
    from winnow.rl.report import read_lines

    return [row for row in read_lines(config.folder / "metrics.jsonl") if row["step"] > 0]


def shape_folder(shape: str, bench: ScalingBench, folder: Path) -> Path:
    """A folder with random weights in that shape, with its whole vocabulary on a GPU, and a tokenizer that knows a part of it."""
    import torch

    from winnow.models.load import save
    from winnow.rewards.demonstrations import pretraining_texts
    from winnow.rl.base import make_tokenizer
    from winnow.rl.bench_learner import VOCABULARY
    from winnow.rl.bench_models import random_model

    tokenizer = make_tokenizer(pretraining_texts(12, 0), 400, 1 << 16)
    changes = {
        "vocab_size": VOCABULARY if bench.gpu else 512, "tie_word_embeddings": True, "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": None, "pad_token_id": tokenizer.pad_token_id,
    }  # fmt: skip
    dtype = torch.bfloat16 if bench.gpu else torch.float32
    model = random_model(shape, bench.layers, dtype, bench.device, changes=changes)
    save(model, tokenizer, folder)
    del model
    if bench.gpu:  # the GPU belongs to the run's processes from here on
        torch.cuda.empty_cache()
    return folder
