"""Questions about facts strewn over a long text, as rows that a domain reads: what sparse attention is for, and a rule can verify.

    ... The secret number of Oslo is 4821. ... What are the secret numbers of Oslo and Lima? ...     answer "4821 9034", reward each_number

Facts, places and their sentence are those of `needles.py`, which teaches them to a model before it is converted. A prompt has a given
number of tokens, the chat template's included, but for the few that cutting a text into words costs.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from winnow.rl.needles import PLACES, fact
from winnow.rollout.schema import Message
from winnow.rollout.template import ChatTemplate


@dataclass(frozen=True, kw_only=True)
class NeedleTasks:
    """tokens: of a prompt, at most. facts: in one text. asked: of them, by the question."""

    tokens: int
    facts: int = 16
    asked: int = 2
    seed: int = 0

    def __post_init__(self) -> None:
        if not 1 <= self.asked <= self.facts <= len(PLACES):
            raise ValueError(
                f"needle tasks: {self.asked} of {self.facts} facts are asked for, but it must be 1 <= asked <= facts <= {len(PLACES)}"
            )


def write_tasks(tokenizer: Any, text: str, options: NeedleTasks, count: int, path: Path) -> Path:
    """`count` rows {prompt, answer, reward, ...} into the JSONL file `path`. ValueError where facts and question alone are too long."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}")
    with temporary.open("w") as stream:
        for row, _ in zip(rows(tokenizer, text, options), range(count), strict=False):
            stream.write(json.dumps(row, ensure_ascii=False) + "\n")
    temporary.replace(path)
    return path


def rows(tokenizer: Any, text: str, options: NeedleTasks) -> Iterator[dict[str, Any]]:
    """Rows without end, each with another piece of the text, other facts and other places for them."""
    template = ChatTemplate(tokenizer)
    hay = list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    rng = random.Random(options.seed)
    while True:
        prompt, wanted, length = draw_task(template, hay, options, rng)
        yield {"prompt": prompt, "answer": " ".join(number for _, number in wanted), "tokens": length}


def draw_task(
    template: ChatTemplate, hay: Sequence[int], options: NeedleTasks, rng: random.Random
) -> tuple[str, list[tuple[str, str]], int]:
    """(prompt, the facts it asks for in order, its tokens with the template's)."""

    def length(prompt: str) -> int:
        return len(template.prompt_ids([{"role": "user", "content": prompt}]))

    tokenizer = template.tokenizer
    facts = [(place, f"{rng.randrange(1000, 10000)}") for place in rng.sample(PLACES, options.facts)]
    wanted = rng.sample(facts, options.asked)
    places = [rng.random() for _ in facts]
    begin = rng.randrange(len(hay))
    least = length(assembled(tokenizer, [], facts, places, wanted))
    room = options.tokens - least
    if room < 0:
        raise ValueError(
            f"needle tasks: {options.facts} facts and the question take {least} tokens, more than the prompt's {options.tokens}: fewer facts "
            "or longer prompts"
        )
    while True:  # joined pieces are tokenized anew: a few tokens more or less
        prompt = assembled(tokenizer, piece(hay, begin, room), facts, places, wanted)
        total = length(prompt)
        if total <= options.tokens:
            return prompt, wanted, total
        room = max(0, room - (total - options.tokens))


def question_tokens(template: ChatTemplate, asked: int) -> int:
    """How many tokens the template and a question for `asked` facts take, about."""
    wanted = [(place, "0000") for place in PLACES[:asked]]
    prompt = assembled(template.tokenizer, [], [], [], wanted)
    return len(template.prompt_ids([{"role": "user", "content": prompt}])) + 4 * asked


def answered(
    template: ChatTemplate, hay: Sequence[int], options: NeedleTasks, rng: random.Random
) -> tuple[list[int], tuple[int, int]]:
    """A task with the reply that it asks for, as tokens, and where in them the reply is, its end mark included."""
    prompt, wanted, _ = draw_task(template, hay, options, rng)
    messages: list[Message] = [{"role": "user", "content": prompt}]
    tokens = template.prompt_ids(messages)
    reply = template.reply_ids(messages, " ".join(fact(place, number) for place, number in wanted))
    return [*tokens, *reply], (len(tokens), len(tokens) + len(reply))


def piece(hay: Sequence[int], begin: int, count: int) -> list[int]:
    """`count` tokens from `begin` on, around the end where the text is too short."""
    return [hay[(begin + i) % len(hay)] for i in range(count)]


def assembled(
    tokenizer: Any, hay: list[int], facts: list[tuple[str, str]], places: list[float], wanted: list[tuple[str, str]]
) -> str:
    """The text with the facts at their places in [0, 1) in order, then the question."""
    parts, last = [], 0
    for (place, number), share in zip(facts, sorted(places), strict=True):
        cut = int(share * len(hay))
        parts += [tokenizer.decode(hay[last:cut]), f" {fact(place, number)} "]
        last = cut
    names = [place for place, _ in wanted]
    asked = f"s of {', '.join(names[:-1])} and {names[-1]}" if len(names) > 1 else f" of {names[0]}"
    question = f"What {'are' if len(names) > 1 else 'is'} the secret number{asked}?"
    form = " ".join(fact(place, "...") for place in names)
    return f"{''.join(parts)}{tokenizer.decode(hay[last:])}\n\n{question} Answer in this form: {form}"
