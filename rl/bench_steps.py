"""Rows of our engine for `winnow bench rollout --suite`: decode steps, prefills, whole batches, start-up.

Contexts are random numbers written straight into the cache: what a step costs does not depend on how they came there. A random indexer
chooses positions all over the context, a trained one chooses more of its neighbours: its gathers are no slower. A prefill is faster with
sets that neighbours share, so its rows have both: what the random indexer chooses, and synthetic sets of a trained one's locality.
"""

from __future__ import annotations

import gc
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from winnow.kernels.bench_sets import local_sets
from winnow.rl.bench_models import SHAPES, random_model

Note = Callable[[dict[str, Any]], None]  # takes a row as soon as it is measured
PAGE = 64
WARM, STEPS = 8, 40
VOCAB = {"qwen3-1.7b": {"vocab_size": 151936, "tie_word_embeddings": True}}  # the head counts here
CHUNK = {"cuda": 16384, "cpu": 64}  # tokens of a prefill forward


def build_model(shape: str, device: str, shared: bool = False) -> Any:
    """The shape with random weights; no token ends a sequence."""
    layers = SHAPES[shape][1].get("num_hidden_layers", 2)
    changes = {"eos_token_id": None, **VOCAB.get(shape, {})}
    dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
    leaders = {"leaders": tuple(range(0, layers, 4))} if shared else None
    model = random_model(shape, None, dtype, device, changes=changes, indexer_changes=leaders)
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.eos_token_id = None
    return model


def decode_rows(
    shape: str, device: str, rows: Sequence[tuple[int, int]], note: Note, shared: bool = False
) -> None:  # fmt: skip
    model = build_model(shape, device, shared)
    for batch, length in rows:
        for selector in ("indexer",) if shared else ("indexer", "dense"):
            name = "shared" if shared else "sparse" if selector == "indexer" else "dense"
            note({"engine": name, "row": f"decode {batch}x{length}", **decode_row(model, batch, length, selector)})


def decode_row(model: Any, batch: int, length: int, selector: str = "indexer", exact: bool = False) -> dict[str, Any]:
    """Steps of `batch` sequences that reach `length` tokens at the last one; the step's parts on the host are measured with it."""
    steps = min(STEPS, length // 4)
    warm = min(WARM, length // 8)
    from winnow.rollout.engine import Engine, EngineConfig
    from winnow.rollout.schema import Sampling

    pages = batch * (-(-length // PAGE) + 1)
    config = EngineConfig(page_size=PAGE, num_pages=pages, max_batch=batch, prefill_chunk=batch * length, max_context=length, selector=selector, exact=exact)  # fmt: skip
    settle(model.device)
    begin = time.perf_counter()
    engine = Engine(model, None, config)
    fill(engine)
    rng = np.random.default_rng(0)
    for number in range(batch):
        prompt = rng.integers(0, engine.vocab, length - steps - warm - 2).tolist()
        engine.add(prompt, Sampling(max_tokens=steps + warm + 2), request_id=str(number))
    while len(engine.scheduler.running) < batch:
        engine.step()
    times = []
    for _ in range(warm):
        engine.step()
    settle(model.device)
    ready = time.perf_counter() - begin
    for _ in range(steps):
        start = time.perf_counter()
        engine.step()
        times.append(time.perf_counter() - start)
    assert len(engine.scheduler.running) == batch, "a sequence ended while its batch was timed"
    median = statistics.median(times)
    row = {
        "ms": round(median * 1e3, 3), "min_ms": round(min(times) * 1e3, 3), "max_ms": round(max(times) * 1e3, 3), "steps": steps,
        "tokens_per_s": round(batch / median, 1), "k": engine.index_k, "until_timed_s": round(ready, 2),
        "cache_gib": round(engine.cache.nbytes / 2**30, 2),
    }  # fmt: skip
    if model.device.type == "cuda":
        row["peak_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
        row["graphs"] = engine.decoding.graphs if engine.decoding is not None else 0
    for sequence in list(engine.scheduler.live):
        engine.release(sequence)
    return row


def fill(engine: Any) -> None:
    """Random contexts: normal numbers in every page, and a prefill that runs no model."""
    for store in (engine.cache._k, engine.cache._v, engine.cache._index):
        store.normal_()

    def skip(spans: Sequence[Any], counts: Sequence[int]) -> Any:
        for span, count in zip(spans, counts, strict=True):
            span.num_cached += count
        return torch.zeros(
            1, engine.model.config.hidden_size, dtype=engine.cache._k.dtype, device=engine.device
        ).expand(sum(counts), -1)

    engine.forward.prefill = skip


@contextmanager
def choosing(sets: Any) -> Iterator[None]:
    """Selections of one sequence are made as ever, and paid for, but attention gets those of `sets` (None: the ones made)."""
    from winnow.kernels import ops
    from winnow.kernels.selection import Selection

    made = ops.select_packed, ops.select_prefill

    def instead(choose: Callable[..., Any]) -> Callable[..., Any]:
        def select(*args: Any) -> Any:
            choose(*args)
            positions = args[4]
            return Selection(sets.indices[positions], sets.counts[positions])

        return select

    if sets is not None:
        ops.select_packed, ops.select_prefill = (instead(choose) for choose in made)
    try:
        yield
    finally:
        ops.select_packed, ops.select_prefill = made


def prefill_rows(shape: str, device: str, lengths: Sequence[int], note: Note) -> None:
    """Per length: sparse, dense, IndexShare 1:4 (shared), and the sparse ones with sets of a trained indexer's locality (local)."""
    for shared in (False, True):
        model = build_model(shape, device, shared)
        for length in lengths:
            local = local_sets(length, top_k=model.config.winnow["top_k"], device=device)
            rows = (
                {"shared": None, "shared local": local} if shared else {"sparse": None, "local": local, "dense": None}
            )
            for engine, sets in rows.items():
                with choosing(sets):
                    times = prefill_times(model, length, "dense" if engine == "dense" else "indexer")
                best = statistics.median(times[1:])
                note({"engine": engine, "row": f"prefill 1x{length}", "s": round(best, 4), "first_s": round(times[0], 3), "tokens_per_s": round(length / best, 1)})  # fmt: skip
        del model


def prefill_times(model: Any, length: int, selector: str) -> list[float]:
    """Seconds until the first token after `length` random ones, four times; the first compiles. Cached memory stays, as in a service."""
    from winnow.rollout.engine import Engine, EngineConfig
    from winnow.rollout.schema import Sampling

    config = EngineConfig(
        page_size=PAGE, num_pages=-(-(length + 8) // PAGE) + 1, max_batch=1, prefill_chunk=CHUNK[model.device.type],
        max_context=length + 8, selector=selector, cuda_graphs=False,
    )  # fmt: skip
    settle(model.device)
    engine = Engine(model, None, config)
    rng, times = np.random.default_rng(0), []
    for number in range(4):
        prompt = rng.integers(0, engine.vocab, length).tolist()
        start = time.perf_counter()
        [sequence] = engine.add(prompt, Sampling(max_tokens=4), request_id=str(number))
        while len(sequence.tokens) == length:  # a token on the host has waited for the device
            engine.step()
        times.append(time.perf_counter() - start)
        engine.release(sequence)
    return times


def small_row(device: str, size: tuple[int, int, int]) -> dict[str, Any]:
    from winnow.rollout.engine import Engine, EngineConfig
    from winnow.rollout.schema import Sampling

    prompts, length, drawn = size
    model = build_model("smollm2-135m" if device == "cuda" else "tiny", device)
    total = length + drawn
    config = EngineConfig(page_size=16, num_pages=prompts * (-(-total // 16) + 1), max_batch=prompts, prefill_chunk=CHUNK[device], max_context=total)  # fmt: skip
    engine = Engine(model, None, config)
    rng, times = np.random.default_rng(0), []
    for number in range(2):  # the first captures
        asked = [rng.integers(0, engine.vocab, length).tolist() for _ in range(prompts)]
        settle(model.device)
        start = time.perf_counter()
        groups = engine.generate(asked, Sampling(max_tokens=drawn, seed=number))
        times.append(time.perf_counter() - start)
        assert all(len(sequence.tokens) == total for group in groups for sequence in group)
    return {"engine": "sparse", "row": f"small {prompts}x{drawn}", "s": round(times[1], 3), "first_s": round(times[0], 3),
            "tokens_per_s": round(prompts * drawn / times[1], 1)}  # fmt: skip


STARTUP = """
import sys, time
begin = float(sys.argv[1])
from winnow.rl.bench_steps import build_model
from winnow.rollout.engine import Engine, EngineConfig
from winnow.rollout.schema import Sampling
imported = time.time()
model = build_model(sys.argv[2], sys.argv[3])
engine = Engine(model, None, EngineConfig(page_size=64, num_pages=2048, max_batch=64, max_context=65536))
built = time.time()
[sequence] = engine.add(list(range(100)), Sampling(max_tokens=8))
while len(sequence.tokens) == 100:
    engine.step()
first = time.time()
engine.step()
print("STARTUP", imported - begin, built - begin, first - begin, time.time() - begin)
"""


def startup_row(shape: str, device: str) -> dict[str, Any]:
    """Seconds from the start of a process until it has imported, built the engine, the first token, and one drawn by a decode step."""
    command = [sys.executable, "-c", STARTUP, str(time.time()), shape, device]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    found = [line.split()[1:] for line in done.stdout.splitlines() if line.startswith("STARTUP")]
    if done.returncode or not found:
        raise RuntimeError(
            f"the process that measures start-up ended with code {done.returncode}: {done.stderr[-600:]}"
        )
    names = ("imported_s", "engine_s", "first_token_s", "first_decode_s")
    return {
        "engine": "sparse",
        "row": "startup",
        **{name: round(float(x), 2) for name, x in zip(names, found[0], strict=True)},
    }


def settle(device: torch.device) -> None:
    """Waits for the device and gives the memory of engines that are gone back: a row may need nearly all of it."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
