"""vLLM's side of `winnow bench rollout`: a process that prints `ROW {json}` lines. `bench_peer.py` writes its plan and reads them.

Weights are vLLM's dummies. Contexts of decode rows come from vLLM's own DecodeBenchConnector, which fills the cache without computing it;
a request for a single token is prefilled in earnest. Steps are timed from output to output while the whole batch decodes.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

from winnow.rl.children import end_together, watch_parent

ARCHITECTURES = {"qwen3": "Qwen3ForCausalLM", "llama": "LlamaForCausalLM"}
SIZES = (1, 2, 4, 6, 8, 12, 16, 24, 32, 64, 128, 256, 512, 1024)
SPARE = 120  # steps beyond the timed ones: requests start one after the other


def main(path: str) -> None:
    plan = json.loads(Path(path).read_text())
    watch_parent()
    os.environ.setdefault("VLLM_USE_FLASHINFER_SAMPLER", "0")
    os.environ.setdefault(
        "VLLM_WORKER_MULTIPROCESSING_METHOD", "fork"
    )  # the engine's process inherits `_prefill_single_tokens`
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    begin = time.perf_counter()
    from vllm import LLM

    decode = plan["part"] == "decode"
    longest = max(length for _, length in plan["rows"]) if decode else plan["small"][1] + plan["small"][2]
    options: dict[str, Any] = {}
    if decode:
        _prefill_single_tokens()
        options["kv_transfer_config"] = {"kv_connector": "DecodeBenchConnector", "kv_role": "kv_both",
                                         "kv_connector_extra_config": {"fill_mean": 0.0, "fill_std": 0.5}}  # fmt: skip
    llm = LLM(
        model=_folder(plan, longest + 512), load_format="dummy", skip_tokenizer_init=True, dtype="bfloat16", max_model_len=longest + 256,
        max_num_seqs=256 if decode else plan["small"][0], max_num_batched_tokens=16384, enable_prefix_caching=False,
        gpu_memory_utilization=0.93, compilation_config={"cudagraph_capture_sizes": [n for n in SIZES if n <= (128 if decode else 1024)]},
        **options,
    )  # fmt: skip
    _row(row="startup", first_token_s=None, engine_s=round(time.perf_counter() - begin, 1))
    vocab = plan["config"]["vocab_size"]
    if decode:
        for batch, length in plan["rows"]:
            _guarded(f"decode {batch}x{length}", partial(_decode, llm, batch, length, plan["steps"], vocab))
        for length in plan["prefill"]:
            _guarded(f"prefill 1x{length}", partial(_prefill, llm, length, vocab))
    else:
        _guarded(f"small {plan['small'][0]}x{plan['small'][2]}", partial(_small, llm, plan["small"], vocab))
    print("END", flush=True)
    end_together()  # its engine process would take seconds to close


def _guarded(name: str, measure: Any) -> None:
    """One row; a failure is a row too."""
    try:
        _row(row=name, **measure())
    except Exception as error:  # vLLM raises many kinds
        _row(row=name, failed=f"{type(error).__name__}: {error}"[:400])


def _row(**values: Any) -> None:
    print("ROW " + json.dumps(values), flush=True)


def _folder(plan: dict[str, Any], context: int) -> str:
    """A model folder with a config and nothing else."""
    folder = Path(plan["folder"], "model")
    folder.mkdir(exist_ok=True)
    config = {
        "architectures": [ARCHITECTURES[plan["family"]]], "model_type": plan["family"], "max_position_embeddings": context,
        "hidden_act": "silu", "rms_norm_eps": 1e-6, "rope_theta": 1e6, "torch_dtype": "bfloat16", "attention_bias": False,
        "bos_token_id": 0, "eos_token_id": 1, **plan["config"],
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


def _prefill_single_tokens() -> None:
    """Requests for one token are not filled, so that a prefill can be timed beside the decode rows."""
    from vllm.distributed.kv_transfer.kv_connector.v1 import decode_bench_connector as module

    scheduler = module.DecodeBenchConnectorScheduler
    filled = scheduler.get_num_new_matched_tokens

    def matched(self: Any, request: Any, num_computed_tokens: int) -> tuple[int, bool]:
        return (0, False) if request.max_tokens == 1 else filled(self, request, num_computed_tokens)

    scheduler.get_num_new_matched_tokens = matched


def _prompts(count: int, length: int, vocab: int, seed: int) -> list[Any]:
    import numpy as np

    rng = np.random.default_rng(seed)
    return [{"prompt_token_ids": rng.integers(2, vocab, length).tolist()} for _ in range(count)]


def _decode(llm: Any, batch: int, length: int, steps: int, vocab: int) -> dict[str, Any]:
    from vllm import SamplingParams

    engine = llm.llm_engine
    drawn = steps + SPARE
    parameters = SamplingParams(max_tokens=drawn, ignore_eos=True, detokenize=False)
    for number, prompt in enumerate(_prompts(batch, length - drawn, vocab, length)):
        engine.add_request(f"{length}.{batch}.{number}", prompt, parameters)
    marks: list[tuple[float, int]] = []
    while engine.has_unfinished_requests():
        outputs = engine.step()
        marks.append((time.perf_counter(), sum(not output.finished for output in outputs)))
    full = [b[0] - a[0] for a, b in pairwise(marks) if a[1] == b[1] == batch]
    if len(full) < 30:
        return {
            "failed": f"only {len(full)} of {len(marks)} steps had the whole batch, at most {max(m[1] for m in marks)} rows"
        }
    timed = full[-steps:]
    median = statistics.median(timed)
    return {"ms": round(median * 1e3, 3), "min_ms": round(min(timed) * 1e3, 3), "max_ms": round(max(timed) * 1e3, 3), "steps": len(timed),
            "tokens_per_s": round(batch / median, 1)}  # fmt: skip


def _prefill(llm: Any, length: int, vocab: int) -> dict[str, Any]:
    from vllm import SamplingParams

    times = []
    for seed in range(3):
        prompts = _prompts(1, length, vocab, seed)
        start = time.perf_counter()
        llm.generate(prompts, SamplingParams(max_tokens=1, ignore_eos=True, detokenize=False), use_tqdm=False)
        times.append(time.perf_counter() - start)
    best = statistics.median(times[1:])
    return {"s": round(best, 4), "first_s": round(times[0], 3), "tokens_per_s": round(length / best, 1)}


def _small(llm: Any, size: list[int], vocab: int) -> dict[str, Any]:
    from vllm import SamplingParams

    count, length, drawn = size
    times = []
    for seed in range(3):
        prompts = _prompts(count, length, vocab, seed)
        start = time.perf_counter()
        outputs = llm.generate(
            prompts, SamplingParams(max_tokens=drawn, ignore_eos=True, detokenize=False), use_tqdm=False
        )
        times.append(time.perf_counter() - start)
        assert all(len(output.outputs[0].token_ids) == drawn for output in outputs)
    best = statistics.median(times[1:])
    return {"s": round(best, 3), "first_s": round(times[0], 3), "tokens_per_s": round(count * drawn / best, 1)}


if __name__ == "__main__":
    main(sys.argv[1])
