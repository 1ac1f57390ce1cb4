"""What an engine is told when it is built, and what a request must fulfil before it is taken."""

from __future__ import annotations

from collections.abc import Sequence as Row
from dataclasses import dataclass
from typing import Any

ON_UPDATE = ("recompute", "drain")


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineConfig:
    """Sizes and switches of one engine. Cache memory: num_pages * page_size * (2 * Hkv * D + D_I) * layers * element size."""

    page_size: int = 16
    num_pages: int = 2048
    max_batch: int = 64  # sequences that decode together
    prefill_chunk: int = 2048  # tokens of one prefill forward
    max_context: int | None = None  # None: the model's max_position_embeddings
    record_indices: bool = False
    record_experts: bool = False  # of a model with experts, which ones each token went to
    keep_kept_sets: bool = True
    selector: str = "indexer"
    cuda_graphs: bool = True  # decode steps as CUDA graphs, where there is a GPU and the model's forward pass allows it
    exact: bool = False  # on a GPU: bits of a token that depend on its own sequence alone, not on the batch or on how it was computed
    # start a prefill behind the pages that an earlier request left, within one policy version
    reuse_prefixes: bool = True
    on_update: str = "recompute"  # new weights: live samples go on under them, or (drain) end under the old ones first
    drain_timeout_s: float = 300.0  # how long an update waits for them

    def __post_init__(self) -> None:
        for name in ("page_size", "num_pages", "max_batch", "prefill_chunk"):
            if getattr(self, name) < 1:
                raise ValueError(f"rollout.{name} is {getattr(self, name)}, but it must be >= 1")
        if self.on_update not in ON_UPDATE:
            raise ValueError(f"rollout.on_update is {self.on_update!r}, but it must be one of {', '.join(ON_UPDATE)}")
        if self.drain_timeout_s <= 0:
            raise ValueError(f"rollout.drain_timeout_s is {self.drain_timeout_s}, but it must be > 0 seconds")


def check_prompt(tokens: Row[int], what: str, vocab: int, total: int, context: int) -> None:
    """ValueError, naming the request `what`, for a prompt that is empty, leaves the vocabulary, or has no room for a reply.

    total: tokens that prompt and reply may have together; context: the engine's own limit.
    """
    if not tokens:
        raise ValueError(f"{what} has an empty prompt: there is nothing to continue; give it at least one token")
    if min(tokens) < 0 or max(tokens) >= vocab:
        wrong = next(token for token in tokens if not 0 <= token < vocab)
        raise ValueError(
            f"{what} holds token id {wrong}, outside the model's vocabulary of {vocab}: is the tokenizer its own?"
        )
    if len(tokens) >= total:
        limit = "max_total_tokens" if total < context else "the context"
        raise ValueError(
            f"{what} has a prompt of {len(tokens)} tokens, but {limit} is {total}, which leaves no room for a reply: shorten the "
            "prompt or raise that limit"
        )


def named_ends(model: Any, tokenizer: Any) -> set[int]:
    """Every token that the model's folder names as an end of generation."""
    named = [getattr(tokenizer, "eos_token_id", None), getattr(model.config, "eos_token_id", None)]
    named.append(getattr(getattr(model, "generation_config", None), "eos_token_id", None))
    return {int(i) for value in named if value is not None for i in (value if isinstance(value, list) else [value])}
