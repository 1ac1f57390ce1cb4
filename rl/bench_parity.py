"""Rows of `winnow bench rollout --suite` about what is computed: equal bits, equal tokens, the size of index records."""

from __future__ import annotations

import gc
import json
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from winnow.rl.bench_models import random_model
from winnow.rl.bench_steps import Note, build_model, decode_row

CLOSE = 1e-3  # logits of the best two tokens this near may swap places with the order of a sum
REPLIES = (8, 64)  # greedy: prompts, tokens of each reply


def exact_rows(device: str, note: Note) -> None:
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


def greedy_rows(folder: str, reference: Path, text: str | None, device: str, note: Note) -> None:
    """Greedy replies of the engine against `reference` ({"prompts", "tokens", "gaps"}), which is made first where it does not exist.

    A reply counts as equal when every token before the first gap below `CLOSE` is. ValueError: neither a file nor a text to make it from.
    """
    from winnow.models.load import load
    from winnow.rollout.engine import Engine

    model = load(folder, torch.float32, device)
    if not reference.exists():
        if text is None:
            raise ValueError(
                f"bench rollout --suite greedy: {reference} does not exist, and without --text it cannot be made"
            )
        reference.write_text(json.dumps(token_by_token(model, _prompts(folder, text, model), REPLIES[1])) + "\n")
    given = json.loads(reference.read_text())
    dtypes = (torch.float32, torch.bfloat16) if device.startswith("cuda") else (torch.float32,)
    for dtype in dtypes:
        model = model if dtype is torch.float32 else load(folder, dtype, device)
        note(compare_greedy(partial(Engine, model, None), given, str(dtype).removeprefix("torch.")))


def plugin_rows(folder: str, reference: Path, device: str, note: Note) -> None:
    """The same of vLLM with winnow's plugin, in this process. VllmError: none that it knows is installed; ValueError: no such file."""
    from winnow.rollout.vllm_engine import VllmEngine

    if not reference.exists():
        raise ValueError(
            f"bench rollout --suite plugin: {reference} does not exist: make it by --suite greedy --text FILE"
        )
    given = json.loads(reference.read_text())
    for dtype in ("float32", "bfloat16") if device.startswith("cuda") else ("float32",):

        def make(config: Any, dtype: str = dtype) -> VllmEngine:
            return VllmEngine(folder, None, config, dtype=dtype, device=device)

        note(compare_greedy(make, given, f"plugin {dtype}"))
        gc.collect()  # one engine in a process at a time


def compare_greedy(make: Callable[[Any], Any], given: dict[str, Any], name: str) -> dict[str, Any]:
    """One row: how many of the reference's replies an engine repeats, and where the first other token is, with the gap there.

    make: an `EngineConfig` -> an engine of the native interface.
    """
    from winnow.rollout.engine_config import EngineConfig
    from winnow.rollout.schema import Sampling

    prompts, wanted = given["prompts"], given["tokens"]
    longest = max(len(p) + len(w) for p, w in zip(prompts, wanted, strict=True))
    pages = len(prompts) * (-(-longest // 16) + 1)
    engine = make(EngineConfig(num_pages=pages, max_batch=len(prompts), max_context=longest))
    engine._ends = np.zeros(0, dtype=np.int64)  # the reference does not stop either
    sampling = [Sampling(max_tokens=len(w), temperature=0.0) for w in wanted]
    groups = engine.generate(prompts, sampling)
    equal, first = 0, []
    for number, ([sequence], tokens, gaps) in enumerate(zip(groups, wanted, given["gaps"], strict=True)):
        fair = next((i for i, gap in enumerate(gaps) if gap < CLOSE), len(tokens))
        other = next(
            (i for i, pair in enumerate(zip(sequence.reply_ids, tokens, strict=True)) if pair[0] != pair[1]),
            len(tokens),
        )
        equal += other >= fair
        if other < len(tokens):
            first.append({"prompt": number, "token": other, "gap": round(gaps[other], 5)})
    rows = sum(len(p) + len(w) - 1 for p, w in zip(prompts, wanted, strict=True))
    past = sum(max(0, len(p) + len(w) - 1 - engine.index_k) for p, w in zip(prompts, wanted, strict=True))
    return {"engine": name, "row": f"greedy {len(prompts)}x{max(map(len, wanted))}", "k": engine.index_k, "past_k": round(past / rows, 3),
            "equal": equal, "of": len(prompts), "first_differences": first}  # fmt: skip


@torch.no_grad()
def token_by_token(model: Any, prompts: Sequence[Sequence[int]], count: int) -> dict[str, Any]:
    """The reference: every token from a pass of its own over the whole sequence, without cache, pages or batch; and top-2 gaps."""
    from winnow.models.context import train_context
    from winnow.models.forward import hidden_states, lm_head_weight

    replies: list[list[int]] = []
    gaps: list[list[float]] = []
    for prompt in prompts:
        tokens, apart = list(prompt), []
        for _ in range(count):
            ids = torch.tensor(tokens, device=model.device)
            hidden = hidden_states(model, ids, train_context([len(tokens)], model.device))[-1]
            best = (lm_head_weight(model).float() @ hidden.float()).topk(2)
            tokens.append(int(best.indices[0]))
            apart.append(float(best.values[0] - best.values[1]))
        replies.append(tokens[len(prompt) :])
        gaps.append(apart)
    return {"prompts": [list(p) for p in prompts], "tokens": replies, "gaps": gaps}


def _tokens(folder: str, text: str) -> list[int]:
    """The longest document of `text` as token ids."""
    from winnow.models.load import load_tokenizer
    from winnow.rl.convert_data import read_documents

    longest = max(read_documents(text), key=len)
    return [int(i) for i in load_tokenizer(folder)(longest, add_special_tokens=False)["input_ids"]]


def _prompts(folder: str, text: str, model: Any) -> list[list[int]]:
    """Pieces of a text, 4 k tokens and more each, or what the context holds."""
    tokens, count = _tokens(folder, text), REPLIES[0]
    top_k = int(model.config.winnow["top_k"]) if hasattr(model.config, "winnow") else 64
    length = min(4 * top_k, model.config.max_position_embeddings - REPLIES[1] - 16 * count)
    if len(tokens) < length + 113 * count:
        raise ValueError(
            f"the text has {len(tokens)} tokens, but {count} prompts want {length + 113 * count}: give a longer one"
        )
    return [tokens[97 * i : 97 * i + length + 16 * i] for i in range(count)]


def record_rows(folder: str, text: str | None, lengths: Sequence[int], device: str, note: Note) -> None:
    """Index records of a model's own indexers on a text: three quarters read, one quarter drawn, packed as they travel.

    `share` is that of raw int32 [layers, rows, k]; with shared indexers (IndexShare) every layer counts, as every layer is replayed.
    """
    from winnow.models.attach import indexer_config
    from winnow.models.load import load

    if text is None:
        raise ValueError("bench rollout --suite records needs a text whose tokens are read: set --text FILE")
    model = load(folder, torch.bfloat16 if device.startswith("cuda") else torch.float32, device)
    shape = indexer_config(model)
    if shape is None:
        raise ValueError(f"bench rollout --suite records: {folder} has no indexers: convert it first (winnow convert)")
    tokens = _tokens(folder, text)
    for length in lengths:
        longest = min(len(tokens), model.config.max_position_embeddings)
        if not shape.top_k < length <= longest:
            raise ValueError(
                f"--lengths {length}: records want more than k = {shape.top_k} tokens, and text and context hold {longest}"
            )
        note(record_row(model, tokens[: length * 3 // 4], length, len(shape.leaders)))


def record_row(model: Any, prompt: list[int], length: int, leaders: int = 0) -> dict[str, Any]:
    """One trajectory of `length` tokens that begins with `prompt`, its record packed and unpacked again. leaders: indexers, 0 for all."""
    from winnow.rollout.engine import Engine, EngineConfig
    from winnow.rollout.index_codec import pack_sets, unpack_sets
    from winnow.rollout.schema import Sampling

    config = EngineConfig(num_pages=-(-length // 16) + 1, max_batch=1, max_context=length, record_indices=True)
    engine = Engine(model, None, config)
    engine._ends = np.zeros(0, dtype=np.int64)
    [[sequence]] = engine.generate([prompt], Sampling(max_tokens=length - len(prompt)))
    record = sequence.index_record(engine.index_k, engine.layers, engine.record_dtype)
    begin = time.perf_counter()
    packed = pack_sets(record.indices, record.first)
    seconds = time.perf_counter() - begin
    assert np.array_equal(unpack_sets(packed), record.indices), "a record came back changed"
    layers, rows, k = record.indices.shape
    return {"engine": "shared" if leaders else "own", "row": f"records 1x{length}", "k": k, "layers": layers, "indexers": leaders or layers,
            "sets": layers * rows, "bytes_per_token_and_layer": round(packed.nbytes / (layers * rows), 2),
            "share": round(packed.nbytes / (4.0 * layers * rows * k), 4), "pack_ms": round(1e3 * seconds, 1)}  # fmt: skip
