"""The small language of the procedural tasks: its words, its lists of facts, and the rule that splits them.

A *world* is a list of short facts in prompt order, e.g. `ann 7 . bob eva . zoe red .` (ann has 7, bob likes eva, zoe keeps red): one
word a token for a byte-level tokenizer trained on these texts, so 28 facts are about 84 tokens. Facts have no verb and replies restate
the fact they use, so that the smallest circuit that can look something up in a context is enough. Whether a world is for training or held out is a function
of its facts alone (a hash, whatever their order, the question, or the seed), so no seed can put one world on both sides.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from random import Random

NAME_WORDS = (
    "ann bob cal dan eva fay gus hal ida jon kim leo mia ned ola pam "
    "quin ray sue tom uma vic wes xia yan zoe abe bea cy dee eli flo"
)
THING_WORDS = (
    "red blue gold pink sun moon star rain snow wind fire lake tree leaf rose fish "
    "bird wolf bear lamp bell drum flag ring rope cake milk salt corn boat kite ship"
)
NAMES = tuple(NAME_WORDS.split())
THINGS = tuple(THING_WORDS.split())
MARKS = ("!", ";")
DIGITS = tuple(range(10))
SPLITS = ("train", "heldout", "all")
NUM_FACTS = (26, 30)  # how many facts a world has, both ends included
HELDOUT_OF = 5  # one world in this many is held out
LATE_FACTS = 4  # a question never asks for one of the last few facts: what it needs stands far back


@dataclass(frozen=True)
class Fact:
    """Written `name value .`; verbs: `has` (a digit), `keeps` (a thing), `likes` (a name)."""

    name: str
    verb: str
    value: str

    def __str__(self) -> str:
        return f"{self.name} {self.value} ."


def digest(text: str) -> int:
    """64 bits of a hash that is the same in every process, Python version and machine."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def split_of(key: str) -> str:
    """Which split a text belongs to: 'heldout' for one in HELDOUT_OF, 'train' for the others."""
    return "heldout" if digest("winnow split " + key) % HELDOUT_OF == 0 else "train"


def check_split(split: str) -> None:
    """Raises ValueError unless `split` is one of SPLITS."""
    if split not in SPLITS:
        raise ValueError(f"split is {split!r}, but it must be one of {', '.join(SPLITS)}")


def world_key(facts: Sequence[Fact]) -> str:
    """What decides a world's split: its facts, in an order that does not depend on the prompt's."""
    return " ".join(sorted(map(str, facts)))


def in_split(key: str, split: str) -> bool:
    return split == "all" or split_of(key) == split


def render(facts: Sequence[Fact]) -> str:
    return " ".join(map(str, facts))


def far_slots(rng: Random, num_facts: int, num_asked: int) -> list[int]:
    """Positions in the fact list that a question may ask for: any but the last few."""
    return rng.sample(range(num_facts - LATE_FACTS), num_asked)


def deck(rng: Random, values: Sequence[int]) -> Iterator[int]:
    """The values for ever, each once per shuffled round: answers drawn from it are balanced by construction."""
    while True:
        cards = list(values)
        rng.shuffle(cards)
        yield from cards
