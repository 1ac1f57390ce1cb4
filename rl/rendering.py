"""Conversations to token ids with a loss mask, in the very pieces that the rollout engine makes them of.

The text up to a reply, each reply with its end mark, and the text between two turns are tokenised separately, by the same functions as in
a rollout (`winnow.rollout.template`): so what a student learns from is what it will see when it generates, reasoning included.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from winnow.rollout.schema import Message
from winnow.rollout.template import PLAIN, ChatTemplate, check_options


class TrainingTemplate:
    """`render(messages) -> (ids, mask)`: mask True on the assistant's replies and on the mark that ends each of them."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer, self.chat = tokenizer, ChatTemplate(tokenizer)
        self.end_ids = self.chat.end_ids

    def render(self, messages: Sequence[Message], options: Mapping[str, Any] = PLAIN) -> tuple[list[int], list[bool]]:
        """`options`: of the chat template. Raises ValueError for a conversation without a reply, and where the template rewrites
        earlier turns."""
        ids: list[int] = []
        mask: list[bool] = []
        last = -1  # the message of the last reply
        for number, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            if last < 0:
                between = self.chat.prompt_ids(messages[:number], options)
            else:
                between = self.chat.observation_ids(messages[: last + 1], messages[last + 1 : number], ids[-1], options)
            reply = self.chat.reply_ids(messages[:number], message["content"], options)
            ids += [*between, *reply]
            mask += [False] * len(between) + [True] * len(reply)
            last = number
        if not ids:
            raise ValueError("the conversation has no reply of the assistant: there is nothing to learn from it")
        return ids, mask


def check_templates(model: str, domains: Sequence[Any]) -> None:
    """Raises ValueError, before any process is started, for a domain whose template options the model's template does not read."""
    if not any(domain.template for domain in domains):
        return  # most runs: the tokenizer need not be opened
    from winnow.models.load import load_tokenizer

    tokenizer = load_tokenizer(model)
    for domain in domains:
        try:
            check_options(tokenizer, domain.template)
        except ValueError as error:
            raise ValueError(f"domain {domain.name!r}: {error}") from None
