"""Multi-needle retrieval: several numbered facts strewn over a long text, all of them asked for at its end.

    ... The secret number of Oslo is 4821. ...            one fact a needle, at evenly spread depths
    The secret number of Oslo is 4821.                    the questions, in another order; the digits are what is scored

A needle counts as found when every token of its number is the model's first choice, given what stands before it: exactly what greedy
decoding would write. One needle that a small set cannot miss proves nothing; many needles with a small k do.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from winnow.models.forward import hidden_states, lm_head_weight
from winnow.rl.convert_data import pack
from winnow.rl.retention import reading_context

PLACES = (
    "Oslo", "Lima", "Cairo", "Delhi", "Paris", "Tokyo", "Quito", "Dakar", "Riga", "Seoul", "Milan", "Boston", "Havana", "Vienna", "Lagos",
    "Berlin", "Madrid", "Athens", "Sofia", "Prague", "Dublin", "Warsaw", "Geneva", "Naples", "Kyoto", "Chicago", "Denver", "Dallas",
    "Turin", "Genoa", "Porto", "Lisbon", "Bergen", "Malmo", "Tallinn", "Minsk", "Odessa", "Ankara", "Tehran", "Kabul", "Mumbai", "Hanoi",
    "Manila", "Jakarta", "Sydney", "Perth", "Auckland", "Bogota", "Caracas", "Santiago", "Montreal", "Toronto", "Seattle", "Houston",
    "Memphis", "Phoenix", "Nairobi", "Accra", "Tunis", "Algiers", "Beirut", "Baghdad", "Zurich", "Munich",
)  # fmt: skip


@dataclass(frozen=True)
class Haystack:
    """tokens of one text; answers: (first, last + 1) of each number to predict; depths in [0, 1]: where its fact stands."""

    tokens: list[int]
    answers: list[tuple[int, int]]
    depths: list[float]


def densest(tokenizer: Any, length: int, wanted: int) -> int:
    """As many needles as take a quarter of a text of `length` tokens, `wanted` at least: what a training text teaches the most with."""
    return min(len(PLACES), max(wanted, length // (4 * max(1, room_needed(tokenizer, 1)))))


def room_needed(tokenizer: Any, num_needles: int) -> int:
    """About how many tokens facts and questions take."""
    return 2 * num_needles * (len(_encode(tokenizer, fact("Vienna", "8888"))) + 1)


def make_haystack(tokenizer: Any, text: Sequence[int], length: int, num_needles: int, rng: random.Random) -> Haystack:
    """One text of exactly `length` tokens out of `text` (repeated where it is too short). ValueError when the needles do not fit."""
    if num_needles > len(PLACES):
        raise ValueError(f"needles: {num_needles} are wanted, but there are {len(PLACES)} names for them")
    facts = [(place, f"{rng.randrange(1000, 10000)}") for place in rng.sample(PLACES, num_needles)]
    pieces = [_encode(tokenizer, " " + fact(place, number)) for place, number in facts]
    asked = rng.sample(range(num_needles), num_needles)
    questions = [_question(tokenizer, *facts[i]) for i in asked]
    room = length - sum(map(len, pieces)) - sum(len(q) for q, _ in questions)
    if room < num_needles:
        raise ValueError(
            f"needles: {num_needles} facts and their questions take {length - room} tokens, more than a text of {length} has; use fewer "
            "needles or longer texts"
        )
    begin = rng.randrange(max(1, len(text) - room))
    hay = [text[(begin + i) % len(text)] for i in range(room)]
    tokens: list[int] = []
    depths, last = [], 0
    for i, piece in enumerate(pieces):
        cut = int(room * (i + rng.random()) / num_needles)
        tokens += [*hay[last:cut], *piece]
        depths.append(cut / room)
        last = cut
    tokens += hay[last:]
    answers = []
    for question, digits in questions:
        answers.append((len(tokens) + len(question) - digits, len(tokens) + len(question)))
        tokens += question
    return Haystack(tokens, answers, [depths[i] for i in asked])


def fact(place: str, number: str) -> str:
    return f"The secret number of {place} is {number}."


def _question(tokenizer: Any, place: str, number: str) -> tuple[list[int], int]:
    """The tokens of a question with its answer, and how many of them, the last ones, are the answer."""
    stem = _encode(tokenizer, "\n" + fact(place, "").removesuffix(" ."))
    answer = _encode(tokenizer, f" {number}")
    return [*stem, *answer], len(answer)


def _encode(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


@torch.no_grad()
def found(model: Any, haystack: Haystack, selector: str) -> list[bool]:
    """Of each needle, in the order of the questions, whether the model would write its number."""
    batch = pack([haystack.tokens])
    weight = lm_head_weight(model)
    ctx = reading_context(model, batch.lengths, selector)
    tokens = batch.tokens.to(weight.device)
    hidden = hidden_states(model, tokens, ctx)
    rows = torch.cat([torch.arange(a - 1, b - 1) for a, b in haystack.answers]).to(weight.device)
    right = ((hidden[rows] @ weight.T).argmax(-1) == tokens[rows + 1]).tolist()
    result, done = [], 0
    for a, b in haystack.answers:
        result.append(all(right[done : done + b - a]))
        done += b - a
    return result


def needle_report(
    model: Any, tokenizer: Any, sequences: Sequence[Sequence[int]], lengths: Sequence[int], num_needles: int, samples: int, seed: int,
    depths: int = 4, selectors: Sequence[str] = ("dense", "indexer", "random", "recent"),
) -> dict[str, Any]:  # fmt: skip
    """Share of needles found by selector, length and depth. `kept`: the smallest sparse share over dense where dense finds half.

    {"num_needles", "lengths": [{"length", "needles", "dense": {"mean", "depths": [..]}, ...}], "kept"}
    """
    text = [token for sequence in sequences for token in sequence]
    rows = []
    for length in lengths:
        if length < 2 * room_needed(tokenizer, num_needles):
            continue  # the facts would be the text
        rng = random.Random(seed * 1_000_003 + length)
        stacks = [make_haystack(tokenizer, text, length, num_needles, rng) for _ in range(samples)]
        row: dict[str, Any] = {"length": length, "needles": samples * num_needles}
        for selector in selectors:
            cells: list[list[bool]] = [[] for _ in range(depths)]
            for stack in stacks:
                for depth, hit in zip(stack.depths, found(model, stack, selector), strict=True):
                    cells[min(depths - 1, int(depth * depths))].append(hit)
            every = [hit for cell in cells for hit in cell]
            name = "sparse" if selector == "indexer" else selector
            row[name] = {"mean": sum(every) / len(every), "depths": [sum(c) / len(c) if c else None for c in cells]}
        rows.append(row)
    shares = [r["sparse"]["mean"] / r["dense"]["mean"] for r in rows if "sparse" in r and r["dense"]["mean"] >= 0.5]
    return {"num_needles": num_needles, "lengths": rows, "kept": min(shares) if shares else None}
