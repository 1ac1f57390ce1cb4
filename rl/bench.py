"""`winnow bench`: figures of this machine as one JSON object. Every figure says what was timed; nothing is extrapolated."""

from __future__ import annotations

import platform
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

PROMPT, NEW = 128, 32  # tokens
PROMPTS, SAMPLES = 8, 4


def measure(
    what: str, model: str | None, threads: int, seconds: float, only: Sequence[str] = (), timed: bool = True
) -> dict[str, Any]:
    """The figures of "kernels" (its rows named by `only`), "rewards" or "rollout". Without a model folder, a small random model stands in."""
    import torch

    torch.set_num_threads(threads)
    result: dict[str, Any] = {
        "bench": what,
        "torch": torch.__version__,
        "machine": platform.machine(),
        "threads": threads,
    }
    if torch.cuda.is_available():
        result["device"] = torch.cuda.get_device_name()
    if what == "kernels":
        from winnow.kernels.bench import measure_kernels

        return result | {"figures": measure_kernels(only, seconds, timed)}
    if what == "rewards":
        from winnow.rl.bench_rewards import bench_rewards

        return result | {"figures": bench_rewards(seconds)}
    with tempfile.TemporaryDirectory(prefix="winnow-bench-") as scratch:
        path = model or str(random_model(Path(scratch) / "model"))
        figures = bench_rollout(path, seconds)
    return result | {"model": model or "random, 2 layers, hidden 128, top_k 32", **figures}


def random_model(folder: Path) -> Path:
    """A converted model with random weights, for figures that do not depend on what it says."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from winnow.models.attach import attach
    from winnow.models.indexer import IndexerConfig
    from winnow.models.load import save

    torch.manual_seed(0)
    shape = LlamaConfig(
        vocab_size=1024,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        eos_token_id=None,
    )
    model = attach(LlamaForCausalLM(shape), IndexerConfig(top_k=32, num_heads=4, head_dim=32, rope_dim=16))
    return save(model, None, folder)


def bench_rollout(path: str, seconds: float) -> dict[str, Any]:
    """Tokens per second of the native engine: whole batches of prompts, prefill included."""
    from winnow.models.load import load
    from winnow.rollout.engine import Engine, EngineConfig
    from winnow.rollout.schema import Sampling

    pages = PROMPTS * SAMPLES * ((PROMPT + NEW) // 16 + 2)
    model = load(path)
    engine = Engine(model, None, EngineConfig(num_pages=pages, max_batch=PROMPTS * SAMPLES))
    rng = np.random.default_rng(0)
    vocab = int(model.config.vocab_size)

    def once() -> int:
        prompts = [rng.integers(0, vocab, PROMPT).tolist() for _ in range(PROMPTS)]
        groups = engine.generate(prompts, Sampling(max_tokens=NEW), SAMPLES)
        return sum(len(sequence.tokens) - PROMPT for group in groups for sequence in group)

    return {"timed": f"{PROMPTS} prompts of {PROMPT} tokens, {SAMPLES} samples of <= {NEW}", **repeat(once, seconds)}


def repeat(once: Callable[[], int], seconds: float) -> dict[str, Any]:
    """Runs `once` (it returns how many tokens it handled) once to warm up, then until `seconds` have passed, at least 3 times."""
    once()
    rates: list[float] = []
    begin = time.perf_counter()
    while len(rates) < 3 or time.perf_counter() - begin < seconds:
        start = time.perf_counter()
        tokens = once()
        rates.append(tokens / (time.perf_counter() - start))
    low, middle, high = np.percentile(rates, [0, 50, 100])
    return {
        "runs": len(rates),
        "tokens_per_s": {"median": round(middle, 1), "min": round(low, 1), "max": round(high, 1)},
    }
