"""`winnow bench rollout --lengths ...`: the engine at given batch x length, dense and sparse in the same run, on any shape.

    load -> prefill of the whole batch -> decode steps, each timed -> the same again without the indexer

Weights may be random: what a step costs does not depend on what it says, but which keys a random indexer picks does not look like what a
trained one picks, and caches notice. Not timed here: other engines.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from winnow.rl.bench_models import SHAPES, random_model

PAGE = 16
MIN_STEPS = 8


def measure_rollout(
    model: str, lengths: Sequence[int], batch: int, seconds: float, device: str, layers: int | None
) -> dict[str, Any]:
    """`model`: a shape of `bench_models.SHAPES` or a folder. Times in ms, rates in tokens/s, memory in bytes."""
    dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
    start = time.perf_counter()
    if model in SHAPES:
        loaded = random_model(model, layers, dtype, device)
    elif Path(model).is_dir():
        from winnow.models.load import load

        loaded = load(model, dtype, device)
    else:
        raise ValueError(f"bench rollout: {model!r} is neither a model folder nor a shape: {', '.join(SHAPES)}")
    loaded.config.eos_token_id = None  # random tokens must not end a sequence: the batch would shrink
    if getattr(loaded, "generation_config", None) is not None:
        loaded.generation_config.eos_token_id = None
    result: dict[str, Any] = {
        "bench": "rollout",
        "model": model,
        "device": torch.cuda.get_device_name() if device.startswith("cuda") else "cpu",
        "threads": torch.get_num_threads(),
        "load_s": round(time.perf_counter() - start, 3),
        "weight_bytes": sum(p.numel() * p.element_size() for p in loaded.parameters()),
    }
    rows = [
        measure_shape(loaded, selector, batch, length, seconds)
        for length in lengths
        for selector in ("dense", "indexer")
    ]
    return result | {"figures": {"rows": rows}}


def measure_shape(model: Any, selector: str, batch: int, length: int, seconds: float) -> dict[str, Any]:
    """One row: prompts of `length` tokens, then decode steps of the full batch, at least 8 and for `seconds`."""
    from winnow.rollout.engine import Engine, EngineConfig
    from winnow.rollout.schema import Sampling

    room = max(64, length // 8)  # tokens that may be drawn: the length stays what the row says
    pages = batch * (-(-(length + room) // PAGE) + 1)
    config = EngineConfig(page_size=PAGE, num_pages=pages, max_batch=batch, selector=selector)
    begin = time.perf_counter()
    engine = Engine(model, None, config)
    build_s = time.perf_counter() - begin
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, engine.vocab, length).tolist() for _ in range(batch)]

    def first_tokens(chosen: Sequence[list[int]], number: int) -> tuple[float, list[Any]]:
        """Seconds until each prompt has its first token, and the sequences, still running."""
        _wait(engine)
        begin = time.perf_counter()
        added = [
            engine.add(prompt, Sampling(max_tokens=room), request_id=f"{number}.{i}")[0]
            for i, prompt in enumerate(chosen)
        ]
        while any(len(sequence.tokens) == length for sequence in added):
            engine.step()
        _wait(engine)
        return time.perf_counter() - begin, added

    cold_s, [one] = first_tokens(prompts[:1], 0)
    engine.release(one)
    warm_s, [one] = first_tokens(prompts[:1], 1)
    engine.release(one)
    prefill_s, running = first_tokens(prompts, 2)
    steps: list[float] = []
    while len(steps) < room - 2 and (len(steps) < MIN_STEPS or sum(steps) < seconds):
        begin = time.perf_counter()
        ended = engine.step()
        _wait(engine)
        steps.append(time.perf_counter() - begin)
        assert not ended, "a sequence ended while its batch was timed"
    for sequence in running:
        engine.release(sequence)
    step = statistics.median(steps)
    row = {
        "row": f"{'sparse' if selector == 'indexer' else 'dense'} {batch}x{length}",
        "k": engine.index_k,
        "engine_ms": round(build_s * 1e3, 2),
        "first_token_ms": {"cold": round(cold_s * 1e3, 2), "warm": round(warm_s * 1e3, 2)},
        "prefill_tokens_per_s": round(batch * length / prefill_s, 1),
        "step_ms": {name: round(f(steps) * 1e3, 3) for name, f in (("median", statistics.median), ("max", max))},
        "steps": len(steps),
        "decode_tokens_per_s": round(batch / step, 1),
        "cache_bytes": engine.cache.nbytes,
    }
    if engine.device.type == "cuda":
        row["peak_bytes"] = torch.cuda.max_memory_allocated(engine.device)
    return row


def _wait(engine: Any) -> None:
    if engine.device.type == "cuda":
        torch.cuda.synchronize(engine.device)
