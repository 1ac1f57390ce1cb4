"""`winnow bench rollout --suite PART ...`: decode, prefill, start-up and whole batches of one model shape, and vLLM's on the same machine.

    decode    ms a step at each of `DECODE`: sparse, dense (the same model without its indexers' choice)
    share     the same sparse step with one indexer for four layers (IndexShare) at 12 x 64K
    prefill   seconds to the first token of one long prompt
    startup   a fresh process: imports, model, engine, first token, first decode step
    small     1024 prompts x 256 tokens of a 135M model, everything included
    exact     bits: log-probabilities of decode against those of one prefill of the same tokens; what that mode costs a step
    vllm      its dense figures for decode, prefill and small, in a process of its own (`bench_vllm.py`)

Contexts are random numbers written straight into the cache: what a step costs does not depend on how they came there. A random indexer
chooses positions all over the context, a trained one chooses more of its neighbours: its gathers are no slower. Every row is printed
as soon as it is measured; the table at the end divides rows of the same name.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from winnow.rl.bench_models import SHAPES, random_model

DECODE = ((128, 4096), (64, 8192), (64, 16384), (24, 32768), (12, 65536), (6, 131072), (128, 2048))
SHARED = ((12, 65536),)
PREFILL = (32768, 131072)
SMALL = (1024, 64, 256)  # prompts, their tokens, tokens drawn for each
PAGE = 64
WARM, STEPS = 8, 40
VOCAB = {"qwen3-1.7b": {"vocab_size": 151936, "tie_word_embeddings": True}}  # the head counts here
PARTS = ("decode", "share", "prefill", "startup", "small", "exact", "vllm")
CHUNK = {"cuda": 16384, "cpu": 64}  # tokens of a prefill forward
VLLM_S = 420  # of the whole vLLM process


def run_suite(
    parts: Sequence[str], shape: str, device: str, rows: Sequence[tuple[int, int]] = DECODE
) -> dict[str, Any]:
    """All rows of the parts as {"rows": [...], "ratios": {...}}. ValueError for an unknown part."""
    unknown = [part for part in parts if part not in PARTS]
    if unknown:
        raise ValueError(f"bench rollout --suite: {unknown[0]!r} is unknown: the parts are {', '.join(PARTS)}")
    every: list[dict[str, Any]] = []

    def note(row: dict[str, Any]) -> None:
        print(json.dumps(row), flush=True)
        every.append(row)

    runners: dict[str, Callable[[], None]] = {
        "decode": lambda: decode_rows(shape, device, rows, note),
        "share": lambda: decode_rows(shape, device, SHARED if rows is DECODE else rows[:1], note, shared=True),
        "prefill": lambda: prefill_rows(shape, device, PREFILL if device == "cuda" else [n for _, n in rows], note),
        "startup": lambda: note(startup_row(shape, device)),
        "small": lambda: note(small_row(device, SMALL if device == "cuda" else (6, 9, 5))),
        "exact": lambda: exact_rows(device, note),
        "vllm": lambda: vllm_rows(shape, rows, note),
    }
    for part in parts:
        try:
            runners[part]()
        except torch.OutOfMemoryError as error:
            note({"row": part, "failed": str(error)[:300]})
    return {"rows": every, "ratios": ratios(every)}


def ratios(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Ours over vLLM's tokens/s for rows of the same name, and shared over own indexers."""
    rate = {(row.get("engine"), row["row"]): row["tokens_per_s"] for row in rows if "tokens_per_s" in row}
    result = {}
    for (engine, name), value in rate.items():
        if engine in ("sparse", "dense") and ("vllm", name) in rate:
            result[f"{engine} / vllm, {name}"] = round(value / rate["vllm", name], 2)
        if engine == "shared" and ("sparse", name) in rate:
            result[f"shared / own indexers, {name}"] = round(value / rate["sparse", name], 2)
    return result


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
    shape: str, device: str, rows: Sequence[tuple[int, int]], note: Callable[[dict[str, Any]], None], shared: bool = False
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
    _settle(model.device)
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
    _settle(model.device)
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

    engine._prefill_forward = skip


def prefill_rows(shape: str, device: str, lengths: Sequence[int], note: Callable[[dict[str, Any]], None]) -> None:
    from winnow.rollout.engine import Engine, EngineConfig
    from winnow.rollout.schema import Sampling

    model = build_model(shape, device)
    for length in lengths:
        for selector in ("indexer", "dense"):
            config = EngineConfig(
                page_size=PAGE, num_pages=-(-(length + 8) // PAGE) + 1, max_batch=1, prefill_chunk=CHUNK[model.device.type],
                max_context=length + 8, selector=selector, cuda_graphs=False,
            )  # fmt: skip
            engine = Engine(model, None, config)
            rng, times = np.random.default_rng(0), []
            for number in range(3):  # the first compiles
                prompt = rng.integers(0, engine.vocab, length).tolist()
                _settle(model.device)
                start = time.perf_counter()
                [sequence] = engine.add(prompt, Sampling(max_tokens=4), request_id=str(number))
                while len(sequence.tokens) == length:
                    engine.step()
                _settle(model.device)
                times.append(time.perf_counter() - start)
                engine.release(sequence)
            best = statistics.median(times[1:])
            note({"engine": "sparse" if selector == "indexer" else "dense", "row": f"prefill 1x{length}", "s": round(best, 4), "first_s": round(times[0], 3), "tokens_per_s": round(length / best, 1)})  # fmt: skip
            del engine


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
        _settle(model.device)
        start = time.perf_counter()
        groups = engine.generate(asked, Sampling(max_tokens=drawn, seed=number))
        times.append(time.perf_counter() - start)
        assert all(len(sequence.tokens) == total for group in groups for sequence in group)
    return {"engine": "sparse", "row": f"small {prompts}x{drawn}", "s": round(times[1], 3), "first_s": round(times[0], 3),
            "tokens_per_s": round(prompts * drawn / times[1], 1)}  # fmt: skip


STARTUP = """
import sys, time
begin = float(sys.argv[1])
from winnow.rl.bench_suite import build_model
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


def exact_rows(device: str, note: Callable[[dict[str, Any]], None]) -> None:
    """64 trajectories, most rows past k: decode's log-probabilities against one prefill of the same tokens, in both modes; then the cost."""
    from winnow.rollout.engine import Engine, EngineConfig
    from winnow.rollout.schema import Sampling

    gpu = device == "cuda"
    shape, top_k, count = ("qwen3-0.6b", 64, 64) if gpu else ("tiny", 8, 4)
    dtype = torch.bfloat16 if gpu else torch.float32
    model = random_model(shape, None, dtype, device, changes={"eos_token_id": None}, indexer_changes={"top_k": top_k})
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, model.config.vocab_size, 2 * top_k + i % 7).tolist() for i in range(count)]
    for exact in (False, True) if gpu else (False,):
        config = EngineConfig(page_size=16, num_pages=count * (4 * top_k // 16 + 2), max_batch=count, max_context=4 * top_k, exact=exact)  # fmt: skip
        engine = Engine(model, None, config)
        groups = engine.generate(prompts, [Sampling(max_tokens=16 + (5 * i) % 100) for i in range(count)])
        gap, rows, past = 0.0, 0, 0
        for [sequence] in groups:
            scored = engine.score(sequence.tokens)
            begin = sequence.turn_start
            gap = max(gap, float(np.abs(scored[begin:] - np.array(sequence.logprobs[begin:], dtype=np.float32)).max()))
            rows += len(sequence.tokens) - 1
            past += len(sequence.tokens) - 1 - top_k
        note({"engine": "exact" if exact else "fast", "row": "parity", "trajectories": count, "rows": rows,
              "past_k": round(past / rows, 3), "max_abs_logprob_difference": gap})  # fmt: skip
        del engine
    if gpu:
        model = build_model("qwen3-1.7b", device)
        for batch, length in ((64, 8192), (128, 4096)):
            note({"engine": "exact", "row": f"decode {batch}x{length}", **decode_row(model, batch, length, exact=True)})


def vllm_rows(shape: str, rows: Sequence[tuple[int, int]], note: Callable[[dict[str, Any]], None], only: Sequence[str] = ("decode", "small")) -> None:  # fmt: skip
    """vLLM's rows, each noted as it comes; a process that dies or outlasts its time costs the rest, and the row says why."""
    for part in only:
        with tempfile.TemporaryDirectory(prefix="winnow-bench-") as scratch:
            small = part == "small"
            config = SHAPES["smollm2-135m" if small else shape]
            plan = {"part": part, "rows": list(rows), "prefill": list(PREFILL), "small": list(SMALL), "family": config[0],
                    "config": {**config[1], **({} if small else VOCAB.get(shape, {}))}, "steps": STEPS, "folder": scratch}  # fmt: skip
            Path(scratch, "plan.json").write_text(json.dumps(plan))
            command = [sys.executable, "-m", "winnow.rl.bench_vllm", str(Path(scratch, "plan.json"))]
            with open(Path(scratch, "log"), "w") as log:
                process = subprocess.Popen(
                    command, stdout=subprocess.PIPE, stderr=log, text=True, start_new_session=True
                )
                deadline = time.monotonic() + VLLM_S
                try:
                    _read_rows(process, deadline, note)
                finally:
                    _end(process)
            if process.returncode:
                tail = Path(scratch, "log").read_text()[-1500:]
                note({"engine": "vllm", "row": part, "failed": f"exit code {process.returncode}: {tail}"})


def _read_rows(process: subprocess.Popen[str], deadline: float, note: Callable[[dict[str, Any]], None]) -> None:
    assert process.stdout is not None
    timer = threading.Timer(max(0.0, deadline - time.monotonic()), process.kill)
    timer.start()
    try:
        for line in process.stdout:
            if line.startswith("ROW "):
                note({"engine": "vllm", **json.loads(line[4:])})
        process.wait(timeout=30)
    except subprocess.TimeoutExpired:
        pass  # `_end` names and ends it
    finally:
        timer.cancel()


def _end(process: subprocess.Popen[str]) -> None:
    """Ends the process and those that it started: it leads a session of its own."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait(timeout=30)


def _settle(device: torch.device) -> None:
    """Waits for the device and gives the memory of engines that are gone back: a row may need nearly all of it."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def table(result: dict[str, Any]) -> str:
    """The rows and ratios as text."""
    lines = [f"{'engine':8} {'row':22} {'ms':>9} {'tokens/s':>11}"]
    for row in result["rows"]:
        if "tokens_per_s" in row:
            ms = row.get("ms", 1e3 * row.get("s", 0.0))
            lines.append(f"{row['engine']:8} {row['row']:22} {ms:9.2f} {row['tokens_per_s']:11.0f}")
        else:
            lines.append(f"{row.get('engine', ''):8} {row['row']:22} " + ", ".join(f"{k} {v}" for k, v in row.items() if k not in ("engine", "row")))  # fmt: skip
    return "\n".join([*lines, *(f"{name}: {value}" for name, value in result["ratios"].items())])
