"""An engine in this process, sized for the requests it will get: what `winnow eval` and `winnow generate` run on."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from winnow.rollout.schema import Request

PAGE = 16
OBSERVATION = 64  # tokens that an environment's answer may add to a turn, as a guess
CACHE_TOKENS = 1 << 16  # upper bound; the engine pauses sequences when pages run out


def local_pool(arguments: argparse.Namespace, requests: Sequence[Request]) -> Any:
    """A LocalPool for the model of the arguments (model, dtype, device, threads, batch, selector)."""
    from winnow.models.load import load_tokenizer
    from winnow.rewards.registry import make_environment
    from winnow.rollout.engine import EngineConfig
    from winnow.rollout.local_pool import LocalPool
    from winnow.rollout.template import ChatTemplate
    from winnow.rollout.worker import WorkerSpec

    template = ChatTemplate(load_tokenizer(arguments.model))
    longest = max(context_tokens(request, len(template.prompt_ids(request.task.messages))) for request in requests)
    samples = sum(request.num_samples for request in requests)
    batch = min(arguments.batch, samples)
    tokens = max(longest, min(CACHE_TOKENS, batch * longest))
    engine = EngineConfig(
        page_size=PAGE,
        num_pages=-(-tokens // PAGE) + batch,
        max_batch=batch,
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
