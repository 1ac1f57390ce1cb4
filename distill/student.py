"""Rows to what the student trains on: token ids with a loss mask, packed into batches of a token budget.

The template is handed in: `render(messages) -> (ids, mask)`, the mask True on the tokens of the assistant's replies and on the mark that
ends each of them. Replies that stand in the prompt itself (examples a task brought along) are not trained on.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any, Protocol

import numpy as np

from winnow.distill.data import Row
from winnow.rollout.schema import Message


class Template(Protocol):
    def render(
        self, messages: Sequence[Message], options: Mapping[str, Any] = {}
    ) -> tuple[Sequence[int], Sequence[bool]]:
        """Token ids and loss mask of a whole conversation, equally long; `options` of the chat template."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Example:
    """tokens int32 [L]; loss_mask bool [L], True on what is learned. `(e.tokens, e.loss_mask)` is what `make_sft_batch` takes."""

    tokens: np.ndarray
    loss_mask: np.ndarray
    domain: str
    row_id: str

    def __post_init__(self) -> None:
        if len(self.tokens) != len(self.loss_mask):
            raise ValueError(
                f"row {self.row_id!r}: the template gave {len(self.tokens)} tokens but {len(self.loss_mask)} mask entries"
            )
        if not self.loss_mask[1:].any():
            raise ValueError(f"row {self.row_id!r}: the template masks every token, so nothing would be learned")

    def __len__(self) -> int:
        return len(self.tokens)


@dataclass(frozen=True, kw_only=True, slots=True)
class Packed:
    """Whole examples end to end: tokens int32 [N], loss_mask bool [N], cu_seqlens int32 [examples + 1]."""

    tokens: np.ndarray
    loss_mask: np.ndarray
    cu_seqlens: np.ndarray


def make_example(
    messages: Sequence[Message],
    template: Template,
    domain: str = "",
    row_id: str = "",
    prompt_messages: int = 0,
    options: Mapping[str, Any] = {},
) -> Example:
    """One conversation as tokens, by the template with these options. Nothing within its first `prompt_messages` messages is learned."""
    ids, mask = template.render(messages, options)
    tokens, loss_mask = np.asarray(ids, np.int32), np.array(mask, bool)
    if any(message["role"] == "assistant" for message in messages[:prompt_messages]):
        prompt = np.asarray(template.render(messages[:prompt_messages], options)[0], np.int32)
        same = min(len(prompt), len(tokens))
        if not np.array_equal(prompt[:same], tokens[:same]):
            raise ValueError(
                f"row {row_id!r}: the template renders the prompt differently once a reply follows, so it cannot be masked"
            )
        loss_mask[:same] = False
    return Example(tokens=tokens, loss_mask=loss_mask, domain=domain, row_id=row_id)


def make_examples(
    rows: Iterable[Row], template: Template, max_tokens: int | None = None
) -> tuple[list[Example], dict[str, int]]:
    """The examples of all rows, and how many rows were too long, by domain.

    Raises ValueError where every row is longer than `max_tokens`.
    """
    examples, too_long, shortest = [], Counter[str](), 0
    for row in rows:
        example = make_example(row.messages, template, row.domain, row.id, row.prompt_messages, row.template)
        if max_tokens is not None and len(example) > max_tokens:
            too_long[row.domain] += 1
            shortest = min(shortest or len(example), len(example))
        else:
            examples.append(example)
    if not examples:
        raise ValueError(
            f"no row is left to learn from: all {too_long.total()} exceed max_tokens {max_tokens} (the shortest has {shortest})"
        )
    return examples, dict(too_long)


def batches(examples: Sequence[Example], token_budget: int, seed: int = 0, epoch: int = 0) -> Iterator[list[Example]]:
    """One epoch in batches of at most `token_budget` tokens (a longer example comes alone), in an order that seed and epoch decide."""
    if token_budget < 1:
        raise ValueError(f"token_budget is {token_budget}, but a batch needs at least one token")
    order = list(examples)
    Random(f"winnow student {seed} {epoch}").shuffle(order)
    batch: list[Example] = []
    used = 0
    for example in order:
        if batch and used + len(example) > token_budget:
            yield batch
            batch, used = [], 0
        batch.append(example)
        used += len(example)
    if batch:
        yield batch


def pack(batch: Sequence[Example]) -> Packed:
    """The examples of one batch end to end."""
    lengths = [len(example) for example in batch]
    return Packed(
        tokens=np.concatenate([example.tokens for example in batch]),
        loss_mask=np.concatenate([example.loss_mask for example in batch]),
        cu_seqlens=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32),
    )


def domain_counts(examples: Iterable[Example]) -> Mapping[str, int]:
    """Examples by domain, for the log: a student of several specialists should see all of them."""
    return Counter(example.domain for example in examples)
