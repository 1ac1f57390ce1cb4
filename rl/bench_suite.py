"""`winnow bench rollout --suite PART ...`: decode, prefill, start-up and whole batches of one model shape, and vLLM's on the same machine.

    decode    ms a step at each of `DECODE`: sparse, dense (the same model without its indexers' choice)
    share     the same sparse step with one indexer for four layers (IndexShare) at 12 x 64K
    prefill   seconds to the first token of one long prompt: sets of random indexers, and (local) synthetic ones as neighbouring as trained ones
    startup   a fresh process: imports, model, engine, first token, first decode step
    small     1024 prompts x 256 tokens of a 135M model, everything included
    exact     bits: log-probabilities of decode against those of one prefill of the same tokens; what that mode costs a step
    vllm      its dense figures for decode, prefill and small, in processes of their own (`bench_peer.py`)
    greedy    a model folder's greedy tokens against a file of them, made token by token where it is missing (--reference, --text)
    plugin    the same tokens from vLLM with winnow's plugin, against the same file
    records   a converted model folder's index records on a text: bytes per token and layer, share of raw int32 (--text, --lengths)

Every row is printed as soon as it is measured; the table at the end divides rows of the same name.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from winnow.rl.bench_parity import exact_rows, greedy_rows, plugin_rows, record_rows
from winnow.rl.bench_peer import vllm_rows
from winnow.rl.bench_steps import decode_rows, prefill_rows, small_row, startup_row

DECODE = ((128, 4096), (64, 8192), (64, 16384), (24, 32768), (12, 65536), (6, 131072), (128, 2048))
SHARED = ((12, 65536),)
PREFILL = (32768, 131072)
SMALL = (1024, 64, 256)  # prompts, their tokens, tokens drawn for each
FOLDERS = ("greedy", "plugin", "records")  # parts about a model that was trained


def run_suite(
    parts: Sequence[str], model: str, device: str, rows: Sequence[tuple[int, int]] = DECODE, text: str | None = None,
    reference: str | None = None,
) -> dict[str, Any]:  # fmt: skip
    """All rows of the parts as {"rows": [...], "ratios": {...}}. model: a shape, or a folder for `FOLDERS`.

    ValueError: an unknown part, a part that lacks its folder or file.
    """
    every: list[dict[str, Any]] = []

    def note(row: dict[str, Any]) -> None:
        print(json.dumps(row), flush=True)
        every.append(row)

    gpu, lengths = device.startswith("cuda"), [length for _, length in rows]
    prefill = list(PREFILL) if gpu else lengths
    runners: dict[str, Callable[[], None]] = {
        "decode": lambda: decode_rows(model, device, rows, note),
        "share": lambda: decode_rows(model, device, SHARED if rows is DECODE else rows[:1], note, shared=True),
        "prefill": lambda: prefill_rows(model, device, prefill, note),
        "startup": lambda: note(startup_row(model, device)),
        "small": lambda: note(small_row(device, SMALL if gpu else (6, 9, 5))),
        "exact": lambda: exact_rows(device, note),
        "vllm": lambda: vllm_rows(model, rows, PREFILL, SMALL, note),
        "greedy": lambda: greedy_rows(model, Path(reference or "greedy.json"), text, device, note),
        "plugin": lambda: plugin_rows(model, Path(reference or "greedy.json"), device, note),
        "records": lambda: record_rows(model, text, [512] if rows is DECODE else lengths, device, note),
    }
    for part in parts:
        if part not in runners:
            raise ValueError(f"bench rollout --suite: {part!r} is unknown: the parts are {', '.join(runners)}")
        if part in FOLDERS and not Path(model).is_dir():
            raise ValueError(f"bench rollout --suite {part} is about a trained model: --model {model!r} is no folder")
    for part in parts:
        try:
            runners[part]()
        except torch.OutOfMemoryError as error:
            note({"row": part, "failed": str(error)[:300]})
    return {"rows": every, "ratios": ratios(every)}


def ratios(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """All of ours over vLLM's tokens/s for rows of the same name, shared over own indexers, exact over fast."""
    rate = {(row.get("engine"), row["row"]): row["tokens_per_s"] for row in rows if "tokens_per_s" in row}
    result = {}
    for (engine, name), value in rate.items():
        if engine != "vllm" and ("vllm", name) in rate:
            result[f"{engine} / vllm, {name}"] = round(value / rate["vllm", name], 2)
        if engine == "exact" and ("sparse", name) in rate:
            result[f"exact / fast, {name}"] = round(value / rate["sparse", name], 2)
        if engine == "shared" and ("sparse", name) in rate:
            result[f"shared / own indexers, {name}"] = round(value / rate["sparse", name], 2)
    return result


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
