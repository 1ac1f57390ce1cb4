"""Messages to tokens, once. What the model generated is never tokenised again.

A conversation is tokens in, tokens out: the prompt is rendered and tokenised, replies stay the tokens that were drawn, and between two
turns only the text that the template puts after a reply (its end mark, the observation, the next assistant header) is tokenised and
appended. A template that would render an earlier turn differently once more follows cannot be continued this way and is refused.

`options` are the template's own switches, handed to it by name: `{"enable_thinking": False}`, or `{"chat_template": "..."}` for another
template altogether. One that the template does not read would do nothing without a word, so it is refused, unless it asks for the
absence of something (False or None): what the template cannot do it does not do.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from winnow.rollout.schema import Message

_MARK = "\u2042reply\u2042"  # stands for a reply while the text around it is measured
_OWN = ("chat_template", "tools", "documents")  # arguments of apply_chat_template itself
_TAKEN = ("tokenize", "add_generation_prompt", "continue_final_message", "conversation", "return_dict")
PLAIN: Mapping[str, Any] = {}


def check_options(tokenizer: Any, options: Mapping[str, Any]) -> None:
    """Raises ValueError for an option that this project sets itself, and for one that would do nothing."""
    text = str(options.get("chat_template") or getattr(tokenizer, "chat_template", ""))
    for name, value in options.items():
        if name in _TAKEN:
            raise ValueError(f"template option {name!r} is set by the rollout itself: take it out")
        if value not in (False, None) and name not in _OWN and not re.search(rf"\b{re.escape(name)}\b", text):
            raise ValueError(
                f"template option {name}={value!r} would do nothing: the model's chat template does not read {name!r}. Take it out of the "
                "domain's `template`, or use a model whose template has this switch"
            )


class ChatTemplate:
    """The tokenizer's chat template and its end tokens (`end_ids`: a reply stops at any of them)."""

    def __init__(self, tokenizer: Any, end_ids: Sequence[int] = ()) -> None:
        if not getattr(tokenizer, "chat_template", None):
            raise ValueError(
                "the tokenizer has no chat template, so messages cannot become tokens: set tokenizer.chat_template and save the "
                "tokenizer beside the model"
            )
        self.tokenizer = tokenizer
        ends = {int(i) for i in end_ids}
        if tokenizer.eos_token_id is not None:
            ends.add(int(tokenizer.eos_token_id))
        tail = self._encode(self._tail([{"role": "user", "content": "a"}, {"role": "assistant", "content": _MARK}]))
        if tail and tail[0] in getattr(tokenizer, "all_special_ids", ()):
            ends.add(tail[0])  # e.g. a base model whose eos is not the mark that its template ends a turn with
        self.end_ids = frozenset(ends)

    def prompt_ids(self, messages: Sequence[Message], options: Mapping[str, Any] = PLAIN) -> list[int]:
        """The tokens of a conversation up to where the assistant's reply begins. Raises ValueError for an option that does nothing."""
        check_options(self.tokenizer, options)
        return self._encode(self._render(messages, options, reply_follows=True))

    def reply_ids(self, messages: Sequence[Message], reply: str, options: Mapping[str, Any] = PLAIN) -> list[int]:
        """The tokens of a given reply to these messages, end mark included: what a model that draws this text draws.

        The reply stands as it is, also where the template would leave its reasoning out of past turns.
        """
        tail = self._tail([*messages, {"role": "assistant", "content": _MARK}], options)
        ids = self._encode(reply + tail)
        end = next((place for place, token in enumerate(ids) if token in self.end_ids), len(ids) - 1)
        return ids[: end + 1]

    def observation_ids(
        self,
        messages: Sequence[Message],
        observations: Sequence[Message],
        last_token: int | None = None,
        options: Mapping[str, Any] = PLAIN,
    ) -> list[int]:
        """The tokens between a reply and the next one.

        messages: the conversation so far, ending in that reply; observations: what the environment answered; last_token: the last
        token of the reply. Where that is already the template's end mark, the mark is not repeated.
        """
        if not messages or messages[-1]["role"] != "assistant":
            raise ValueError("observations follow an assistant's reply, but the conversation does not end with one")
        marked = [*messages[:-1], {"role": "assistant", "content": _MARK}]
        before = self._render(marked, options, reply_follows=False)
        prefix = before[: before.rindex(_MARK) + len(_MARK)]
        after = self._render([*marked, *observations], options, reply_follows=True)
        if not after.startswith(prefix):
            raise ValueError(
                "the chat template renders earlier turns differently once a message follows, so a conversation cannot be continued "
                "token by token: use a template that leaves earlier turns alone (e.g. one that keeps the reasoning of past replies; "
                "domains.NAME.template={chat_template: ...} sets one)"
            )
        ids = self._encode(after[len(prefix) :])
        if ids and ids[0] == last_token and last_token in self.end_ids:
            return ids[1:]
        return ids

    def text(self, ids: Sequence[int]) -> str:
        """The text of generated tokens, special tokens left out."""
        return self.tokenizer.decode(list(ids), skip_special_tokens=True)

    def _tail(self, marked: Sequence[Message], options: Mapping[str, Any] = PLAIN) -> str:
        text = self._render(marked, options, reply_follows=False)
        return text[text.rindex(_MARK) + len(_MARK) :]

    def _render(self, messages: Sequence[Message], options: Mapping[str, Any], reply_follows: bool) -> str:
        plain = [dict(message) for message in messages]
        return self.tokenizer.apply_chat_template(
            plain, tokenize=False, add_generation_prompt=reply_follows, **dict(options)
        )

    def _encode(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])
