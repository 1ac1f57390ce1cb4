"""`winnow bench WHAT`: its options, and which file measures what. Everything heavy is imported when it runs."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from winnow.rl.argument_types import count, positive
from winnow.rl.verbs import say


def add_bench(bench: argparse.ArgumentParser) -> None:
    """What is measured, and the options of each."""
    _add_measured(bench)
    _add_runs(bench)


def _add_measured(bench: argparse.ArgumentParser) -> None:
    """What is measured, on what, and how long."""
    bench.add_argument(
        "what",
        choices=(
            "kernels",
            "rollout",
            "step",
            "learner",
            "rewards",
            "cost",
            "warmup",
            "memory",
            "ablation",
            "sparse-dense",
            "sync",
            "scaling",
        ),
    )
    bench.add_argument(
        "--model",
        help="a model folder (rollout, step, scaling) or a shape (cost, memory, sync, scaling, rollout with --lengths): qwen3-1.7b, v3.2 ...; "
        "without it a small random one",
    )
    bench.add_argument("--threads", type=positive, default=1)
    bench.add_argument("--seconds", type=positive, default=2, help="at least so long on each figure (2)")
    bench.add_argument(
        "--only",
        nargs="+",
        metavar="NAME",
        help="kernels: these rows, or all whose names contain a word, e.g. mla topk; step: ours, trl; ablation, sparse-dense: these variants",
    )
    bench.add_argument(
        "--check", action="store_true", help="kernels on a GPU: compare with the references, time nothing"
    )
    bench.add_argument("--out", help="a file for the same JSON; ablation, sparse-dense, step --seeds: a folder")
    bench.add_argument("--device", default="cpu", help="where to measure (cpu)")
    bench.add_argument(
        "--layers", type=positive, help="cost, memory, learner, sync, scaling: cut the shape to so many layers"
    )
    bench.add_argument(
        "--lengths",
        type=positive,
        nargs="+",
        help="cost, warmup, memory, learner, rollout: contexts in tokens; sparse-dense: the longest sequence (the model's context)",
    )
    bench.add_argument(
        "--batch", type=positive, default=8, help="rollout with --lengths: sequences that decode together"
    )
    bench.add_argument(
        "--suite",
        nargs="+",
        metavar="PART",
        help="rollout: decode, share, prefill, startup, small, exact, vllm: rows of long contexts, and vLLM's beside them; "
        "greedy, plugin, records: of a model folder; sync: nccl, ipc, store (all of them); scaling: throughput, schedule, curve, kills",
    )
    bench.add_argument(
        "--text", help="rollout --suite greedy, records: a text to read; sparse-dense: where facts are hidden"
    )
    bench.add_argument(
        "--reference", help="rollout --suite greedy, plugin: a JSON file of greedy tokens (greedy: written if missing)"
    )


def _add_runs(bench: argparse.ArgumentParser) -> None:
    """Runs: their sizes, ends, seeds, and what is varied."""
    bench.add_argument("--prompts", type=positive, default=32, help="step, scaling: prompts of a step (32)")
    bench.add_argument("--samples", type=positive, default=8, help="step, scaling: samples of a prompt (8)")
    bench.add_argument("--tokens", type=positive, default=64, help="step, scaling: the most tokens of a sample (64)")
    bench.add_argument(
        "--steps",
        type=positive,
        help="step, scaling: steps to run (10, 6; 1000 with --seeds); ablation, sparse-dense: of each run (the config's)",
    )
    bench.add_argument(
        "--wall", type=positive, help="step: end a run so many seconds after its first step (60 with --seeds)"
    )
    bench.add_argument("--seed", type=count, default=0, help="step: of the problems and the draws (0)")
    bench.add_argument(
        "--config",
        help="ablation, sparse-dense (sparse_dense), scaling --suite curve: the run that is varied, a YAML file or a shipped one",
    )
    bench.add_argument(
        "--seeds", type=count, nargs="+", help="ablation, sparse-dense: of each variant (0 1); step: a process each"
    )
    bench.add_argument(
        "--parallel", type=positive, default=1, help="ablation, sparse-dense: runs at a time on the device (1)"
    )
    bench.add_argument(
        "--limit-s",
        type=positive,
        metavar="S",
        help="ablation, sparse-dense: end and evaluate what still runs then (36000); step --seeds: begin no run that would not end before "
        "(36000); scaling: of all runs (480)",
    )
    bench.add_argument(
        "--set",
        nargs="+",
        default=[],
        metavar="KEY=VALUE",
        help="step, ablation, sparse-dense, scaling: overrides of our run's config",
    )
    bench.add_argument(
        "--peers", nargs="+", default=[], choices=("trl",), help="step: who else does the same work, where installed"
    )


def measure_what(arguments: argparse.Namespace) -> None:
    """Measures, prints JSON and writes it to --out. RuntimeError where a kernel is wrong or a run failed, once all else is done."""
    from winnow.rl.bench import measure
    from winnow.rl.bench_models import measure_models

    if arguments.what in ("ablation", "sparse-dense"):
        return ablation(arguments)
    if arguments.what == "step" and arguments.seeds:
        return versus(arguments)
    timed = not arguments.check
    if arguments.what in ("step", "learner"):
        figures = bench_training(arguments)
    elif arguments.what == "sync":
        from winnow.rl.bench_sync import PARTS, bench_sync

        a = arguments
        figures = bench_sync(a.model or "small", a.device, a.suite or PARTS, a.layers, a.threads, say=say)
    elif arguments.what == "scaling":
        from winnow.rl.bench_scaling import ScalingBench, bench_scaling

        a = arguments
        asked = ScalingBench(
            model=a.model, layers=a.layers, device=a.device, threads=a.threads, prompts=a.prompts, samples=a.samples, tokens=a.tokens,
            steps=a.steps or ScalingBench.steps, limit_s=a.limit_s or ScalingBench.limit_s, config=a.config, overrides=tuple(a.set),
        )  # fmt: skip
        figures = bench_scaling(asked, a.suite or ("throughput", "schedule"), say)
    elif arguments.what in ("cost", "warmup", "memory"):
        figures = measure_models(arguments.what, arguments)
    elif arguments.what == "rollout" and arguments.suite:
        from winnow.rl import bench_suite

        rows = [(arguments.batch, length) for length in arguments.lengths or ()] or bench_suite.DECODE
        figures = bench_suite.run_suite(
            arguments.suite,
            arguments.model or "qwen3-1.7b",
            arguments.device,
            rows,
            arguments.text,
            arguments.reference,
        )
        print(bench_suite.table(figures))
    elif arguments.what == "rollout" and arguments.lengths:
        import torch

        from winnow.rl.bench_rollout import measure_rollout

        torch.set_num_threads(arguments.threads)
        a = arguments
        figures = measure_rollout(a.model or "small", a.lengths, a.batch, a.seconds, a.device, a.layers)
    else:
        figures = measure(
            arguments.what, arguments.model, arguments.threads, arguments.seconds, arguments.only or (), timed
        )
    text = json.dumps(figures, indent=1)
    print(text)
    if arguments.out:
        Path(arguments.out).write_text(text + "\n")
    wrong = [row for row in figures.get("figures", {}).get("rows", []) if "wrong" in row]
    if wrong:
        raise RuntimeError(f"{len(wrong)} rows are wrong, the first: {wrong[0]}")


def ablation(arguments: argparse.Namespace) -> None:
    """`bench ablation` and `bench sparse-dense`: the table on standard output; RuntimeError when a run failed, once all others are done."""
    from winnow.rl.bench_ablation import bench_ablation
    from winnow.rl.bench_sparse_dense import bench_sparse_dense

    result = (bench_ablation if arguments.what == "ablation" else bench_sparse_dense)(arguments, say)
    print((Path(arguments.out) / "table.md").read_text(), end="")
    failed = [f"{name}: {run['why']}" for name, run in result["runs"].items() if run["status"] == "failed"]
    if failed:
        raise RuntimeError(f"{len(failed)} of {len(result['runs'])} runs failed: {'; '.join(failed)}")


def bench_training(arguments: argparse.Namespace) -> dict[str, Any]:
    """`bench step` and `bench learner`."""
    import torch

    torch.set_num_threads(arguments.threads)
    a = arguments
    if a.what == "learner":
        from winnow.rl.bench_learner import ROWS, bench_learner

        long = 32768 if a.device.startswith("cuda") else 512
        rows = [name for name in ROWS if not a.only or any(word in name for word in a.only)]

        def keep(figures: Any) -> None:
            if a.out:
                Path(a.out).write_text(json.dumps(figures, indent=1) + "\n")

        return bench_learner(a.model or "tiny", a.lengths or [long], a.device, a.layers, rows, progress=say, keep=keep)
    from winnow.rl.bench_step import StepBench, as_rows, bench_step

    bench = StepBench(
        model=a.model, device=a.device, threads=a.threads, prompts=a.prompts, samples=a.samples, tokens=a.tokens, steps=a.steps or 10,
        wall=a.wall, seed=a.seed, overrides=a.set,
    )  # fmt: skip
    figures = bench_step(bench, a.peers, a.only or (), say)
    for line in as_rows(figures):
        say(line)
    return {"bench": "step", "model": a.model or "random, 2 layers", "device": a.device, **figures}


def versus(arguments: argparse.Namespace) -> None:
    """`bench step --seeds`: the table on standard output, the rest in the folder; RuntimeError when a run failed, once all are over."""
    from winnow.rl.bench_step import StepBench
    from winnow.rl.bench_versus import Versus

    a = arguments
    if not a.out:
        raise ValueError("bench step --seeds needs --out (a folder for table, curves and every run's figures)")
    bench = StepBench(
        model=a.model, device=a.device, threads=a.threads, prompts=a.prompts, samples=a.samples, tokens=a.tokens,
        steps=a.steps or 1000, wall=a.wall or 60, overrides=a.set,
    )  # fmt: skip
    missing = Versus(bench, Path(a.out), a.peers, a.seeds, a.only or (), a.limit_s or Versus.limit_s, say).run()[
        "missing"
    ]
    print((Path(a.out) / "table.md").read_text(), end="")
    if missing:
        raise RuntimeError(
            f"{len(missing)} runs have no figures: " + "; ".join(f"{run}: {why}" for run, why in missing.items())
        )
