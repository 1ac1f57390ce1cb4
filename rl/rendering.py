"""Conversations to token ids with a loss mask, in the very pieces that the rollout engine makes them of.

The text up to a reply, each reply with its end mark, and the text between two turns are tokenised separately, as in
`winnow.rollout.template`: so what a student learns from is what it will see when it generates.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from winnow.rollout.schema import Message
from winnow.rollout.template import ChatTemplate


class TrainingTemplate:
    """`render(messages) -> (ids, mask)`: mask True on the assistant's replies and on the mark that ends each of them."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer, self.end_ids = tokenizer, ChatTemplate(tokenizer).end_ids

    def render(self, messages: Sequence[Message]) -> tuple[list[int], list[bool]]:
        """Raises ValueError for a conversation without a reply, and where the template rewrites earlier turns."""
        ids: list[int] = []
        mask: list[bool] = []
        done = ""
        for number, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before = self._text(messages[:number], reply_follows=True)
            whole = self._text(messages[: number + 1], reply_follows=False)
            if not (before.startswith(done) and whole.startswith(before)):
                raise ValueError(
                    "the chat template renders earlier turns differently once a message follows, so replies cannot be told from the "
                    "rest token by token: use a template that leaves earlier turns alone"
                )
            prompt, reply = self._encode(before[len(done) :]), self._encode(whole[len(before) :])
            end = next((place for place, token in enumerate(reply) if token in self.end_ids), len(reply) - 1)
            reply = reply[: end + 1]
            ids += [*prompt, *reply]
            mask += [False] * len(prompt) + [True] * len(reply)
            done = before + self._up_to_end(whole[len(before) :], message["content"])
        if not ids:
            raise ValueError("the conversation has no reply of the assistant: there is nothing to learn from it")
        return ids, mask

    def _up_to_end(self, reply: str, content: str) -> str:
        """The reply's text with its end mark, without what the template puts after it (often a line break)."""
        marks = [self.tokenizer.decode([token]) for token in self.end_ids]
        ends = [reply.index(mark, len(content)) + len(mark) for mark in marks if mark and mark in reply[len(content) :]]
        return reply[: min(ends)] if ends else reply

    def _text(self, messages: Sequence[Message], reply_follows: bool) -> str:
        plain = [dict(message) for message in messages]
        return self.tokenizer.apply_chat_template(plain, tokenize=False, add_generation_prompt=reply_follows)

    def _encode(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])
