"""An engine in this process, sized for the requests it will get: what `winnow eval` and `winnow generate` run on."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from winnow.rollout.schema import Request

PAGE = 16
OBSERVATION = 64  # tokens that an environment's answer may add to a turn, as a guess
CACHE_TOKENS = {"cpu": 1 << 16, "cuda": 1 << 19}  # upper bounds; the engine pauses sequences when pages run out
BATCH = {"cpu": 64, "cuda": 512}
PREFILL = {"cpu": 2048, "cuda": 16384}  # tokens of one forward
CACHE_SHARE = 0.4  # of a GPU's free memory


def settle(arguments: argparse.Namespace) -> None:
    """Fills in what the command line left open, from the machine: device, dtype, batch."""
    import torch

    if arguments.device == "auto":
        arguments.device = "cuda" if torch.cuda.is_available() else "cpu"
    kind = kind_of(arguments.device)
    if arguments.dtype == "auto":
        arguments.dtype = "bfloat16" if kind == "cuda" else "float32"
    arguments.batch = arguments.batch or BATCH[kind]


def kind_of(device: str) -> str:
    return "cuda" if device.startswith("cuda") else "cpu"


def cache_tokens(arguments: argparse.Namespace) -> int:
    """The most tokens that the cache may hold: CACHE_TOKENS, on a GPU no more than a share of its memory."""
    kind = kind_of(arguments.device)
    if kind == "cpu":
        return CACHE_TOKENS[kind]
    import torch

    from winnow.models.load import read_config, resolve

    shape = read_config(resolve(arguments.model))
    heads = getattr(shape, "num_key_value_heads", None) or shape.num_attention_heads
    width = getattr(shape, "head_dim", None) or shape.hidden_size // shape.num_attention_heads
    size = shape.num_hidden_layers * (2 * heads * width + 128) * (2 if arguments.dtype == "bfloat16" else 4)
    return min(CACHE_TOKENS[kind], int(CACHE_SHARE * torch.cuda.mem_get_info(arguments.device)[0] / size))


def local_pool(arguments: argparse.Namespace, requests: Sequence[Request]) -> Any:
    """A LocalPool for the model of the arguments (model, dtype, device, threads, batch, selector)."""
    from winnow.models.load import load_tokenizer
    from winnow.rewards.registry import make_environment
    from winnow.rollout.engine import EngineConfig
    from winnow.rollout.local_pool import LocalPool
    from winnow.rollout.template import ChatTemplate
    from winnow.rollout.worker import WorkerSpec

    template = ChatTemplate(load_tokenizer(arguments.model))
    longest = max(
        context_tokens(request, len(template.prompt_ids(request.task.messages, request.template)))
        for request in requests
    )
    samples = sum(request.num_samples for request in requests)
    batch = min(arguments.batch, samples)
    tokens = max(longest, min(cache_tokens(arguments), batch * longest))
    engine = EngineConfig(
        page_size=PAGE,
        num_pages=-(-tokens // PAGE) + batch,
        max_batch=batch,
        prefill_chunk=PREFILL[kind_of(arguments.device)],
        record_indices=True,
        selector=arguments.selector,
    )
    return LocalPool(
        WorkerSpec(
            model=arguments.model,
            dtype=arguments.dtype,
            engine=engine,
            threads=arguments.threads,
            device=arguments.device,
            environments=make_environment,
        )
    )


def context_tokens(request: Request, prompt: int) -> int:
    """The most tokens that one sample of the request may take."""
    return prompt + request.max_turns * (request.sampling.max_tokens + OBSERVATION)
