"""Procedural tasks: one generator per kind, levels 1 (easy) to 3, endless but for `addition`, with disjoint splits.

    lookup    (reasoning)  find a number in the prompt; 2: add two of them; 3: follow a pointer first         reward number
    tool      (agent)      find a key in the prompt, call a tool with it, answer with the code it returns     reward tool_answer
    rubric    (alignment)  write a few words that meet the prompt's own weighted criteria                     reward rubric
    addition  (reasoning)  "What is a + b?", one digit each: 100 tasks, 70 for training and 30 held out       reward number

The fact a question needs is drawn from all but the last few of 26-30, so it usually stands 25 to 100 tokens back: an attention window,
or an index that keeps the last 16 tokens, cannot see it. Answers are balanced by construction, so the best constant reply is weak.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from random import Random
from typing import Any

from winnow.rewards.language import (
    DIGITS,
    LATE_FACTS,
    MARKS,
    NAMES,
    NUM_FACTS,
    THINGS,
    Fact,
    check_split,
    deck,
    digest,
    far_slots,
    in_split,
    render,
    world_key,
)
from winnow.rollout.schema import Task

LEVELS = (1, 2, 3)
DOMAINS = {"lookup": "reasoning", "tool": "agent", "rubric": "alignment", "addition": "reasoning"}


def generate_tasks(
    kind: str, level: int = 1, count: int = 256, seed: int = 0, split: str = "train", domain: str | None = None
) -> list[Task]:
    """`count` different tasks; the same arguments give the same tasks, and a smaller count gives their beginning.

    `split` is 'train', 'heldout' or 'all'. `addition` has 70 and 30 tasks: a larger count returns all there are, in the seed's order.
    `domain` overrides the kind's own. Raises ValueError for an unknown kind, level or split and for a count below 1.
    """
    if kind not in DOMAINS:
        raise ValueError(f"task kind {kind!r} is unknown: the procedural kinds are {', '.join(DOMAINS)}")
    if level not in LEVELS:
        raise ValueError(f"level of {kind!r} tasks is {level!r}, but it must be one of {LEVELS}")
    if count < 1:
        raise ValueError(f"count of {kind!r} tasks is {count}, but it must be at least 1")
    check_split(split)
    rng = Random(f"winnow {kind} {level} {split} {seed}")
    tasks: dict[str, Task] = {}
    for fields in GENERATORS[kind](rng, level, split):
        text = fields.pop("text")
        name = f"{kind}-{level}-{digest(text):016x}"
        tasks[name] = Task(
            id=name, domain=domain or DOMAINS[kind], messages=({"role": "user", "content": text},), **fields
        )
        if len(tasks) == count:
            break
    return list(tasks.values())


def facts_of(task: Task) -> list[Fact]:
    """The facts in a procedural task's prompt, in order."""
    return [Fact(*fact) for fact in task.metadata["facts"]]


# ---------------------------------------------------------------------------------------------------------------------------- lookup


def lookup_question(level: int, asked: list[str]) -> str:
    if level == 1:
        return f"how many has {asked[0]} ?"
    if level == 2:
        return f"how many have {asked[0]} and {asked[1]} ?"
    return f"how many has the one liked by {asked[0]} ?"


def lookup_fields(facts: list[Fact], level: int, asked: list[str], answer: int) -> dict[str, Any]:
    return {
        "text": f"{render(facts)} {lookup_question(level, asked)}",
        "answer": str(answer),
        "reward": "number",
        "metadata": {
            "kind": "lookup",
            "level": level,
            "asked": asked,
            "facts": [[f.name, f.verb, f.value] for f in facts],
        },
    }


def lookups(rng: Random, level: int, split: str) -> Iterator[dict[str, Any]]:
    for answer in deck(rng, range(19) if level == 2 else DIGITS):
        while True:
            facts, asked = lookup_world(rng, level, answer)
            if in_split(world_key(facts), split):
                break
        yield lookup_fields(facts, level, asked, answer)


def lookup_world(
    rng: Random, level: int, answer: int, facts: tuple[int, int] = NUM_FACTS
) -> tuple[list[Fact], list[str]]:
    """Facts in which the question about `asked` has this answer; every other value is drawn evenly."""
    num_facts = rng.randint(*facts)
    if level == 3:
        return pointer_world(rng, num_facts, "has", str(answer), [str(v) for v in DIGITS])
    names = rng.sample(NAMES, num_facts)
    values = [rng.choice(DIGITS) for _ in names]
    slots = far_slots(rng, num_facts, level)
    first = answer if level == 1 else rng.randint(max(0, answer - 9), min(9, answer))
    for slot, value in zip(slots, (first, answer - first), strict=False):
        values[slot] = value
    return [Fact(n, "has", str(v)) for n, v in zip(names, values, strict=True)], [names[slot] for slot in slots]


def pointer_world(
    rng: Random, num_facts: int, verb: str, answer: str, values: list[str]
) -> tuple[list[Fact], list[str]]:
    """A third of the facts say who likes whom, the others who has or keeps what: one hop, then the lookup."""
    names = rng.sample(NAMES, num_facts)
    num_pointers = num_facts // 3
    likers, owners = names[:num_pointers], names[num_pointers:]
    drawn = [rng.choice(values) for _ in owners] if verb == "has" else rng.sample(values, len(owners))
    if answer in drawn and verb != "has":  # things are distinct: swap instead of writing a second one
        drawn[drawn.index(answer)] = drawn[0]
    drawn[0] = answer
    pointers = [Fact(name, "likes", rng.choice(owners)) for name in likers]
    pointers[0] = Fact(likers[0], "likes", owners[0])
    others = pointers[1:] + [Fact(n, verb, v) for n, v in zip(owners[1:], drawn[1:], strict=True)]
    rng.shuffle(others)
    for fact in (pointers[0], Fact(owners[0], verb, answer)):
        others.insert(rng.randrange(len(others) - LATE_FACTS), fact)
    return others, [likers[0], owners[0]]


# ------------------------------------------------------------------------------------------------------------------- keeps: tool, rubric


def keeps_world(
    rng: Random, split: str, num_asked: int, facts: tuple[int, int] = NUM_FACTS
) -> tuple[list[Fact], list[int]]:
    """Who keeps what, all things different, and the positions of the facts asked for."""
    while True:
        num_facts = rng.randint(*facts)
        names, things = rng.sample(NAMES, num_facts), rng.sample(THINGS, num_facts)
        world = [Fact(n, "keeps", t) for n, t in zip(names, things, strict=True)]
        if in_split(world_key(world), split):
            return world, far_slots(rng, num_facts, num_asked)


def tool_question(level: int, asked: list[str]) -> str:
    if level == 1:
        return f"what is the code of the thing of {asked[0]} ?"
    if level == 2:
        return f"what is the code of the thing of the one liked by {asked[0]} ?"
    return f"what is the sum of the codes of the things of {asked[0]} and {asked[1]} ?"


def tool_fields(
    facts: list[Fact], level: int, asked: list[str], keys: list[str], codes: dict[str, int]
) -> dict[str, Any]:
    metadata = {"kind": "tool", "level": level, "asked": asked, "keys": keys, "codes": codes}
    return {
        "text": f"{render(facts)} {tool_question(level, asked)}",
        "answer": str(sum(codes[key] for key in keys)),
        "reward": "tool_answer",
        "environment": "tool",
        "metadata": metadata | {"facts": [[f.name, f.verb, f.value] for f in facts]},
    }


def tools(rng: Random, level: int, split: str) -> Iterator[dict[str, Any]]:
    for answer in deck(rng, range(19) if level == 3 else DIGITS):
        if level == 2:
            while True:
                facts, asked = pointer_world(rng, rng.randint(*NUM_FACTS), "keeps", rng.choice(THINGS), list(THINGS))
                if in_split(world_key(facts), split):
                    break
            keys = [next(f.value for f in facts if f.name == asked[1])]
        else:
            facts, slots = keeps_world(rng, split, 2 if level == 3 else 1)
            asked, keys = [facts[slot].name for slot in slots], [facts[slot].value for slot in slots]
        codes = {f.value: rng.choice(DIGITS) for f in facts if f.verb == "keeps"}
        first = answer if len(keys) == 1 else rng.randint(max(0, answer - 9), min(9, answer))
        codes.update(zip(keys, (first, answer - first), strict=False))
        yield tool_fields(facts, level, asked, keys, codes)


def rubrics(rng: Random, level: int, split: str) -> Iterator[dict[str, Any]]:
    while True:
        facts, slots = keeps_world(rng, split, 2 if level == 3 else 1)
        yield rubric_fields(rng, facts, level, slots)


def rubric_fields(rng: Random, facts: list[Fact], level: int, slots: list[int]) -> dict[str, Any]:
    """Level 1: length, ending, word; level 2: also a forbidden word; level 3: two words and the language as well.

    The mark to end with ends the request, and the name stands before it as in the other kinds: a small model then finds both at the
    same distance from where its reply begins.
    """
    asked, words = [facts[slot].name for slot in slots], [facts[slot].value for slot in slots]
    length, mark = 2 * len(words) + (rng.randint(0, 2) if level > 1 else 0), rng.choice(MARKS)
    criteria: list[dict[str, Any]] = [{"type": "num_words", "value": length, "weight": 1.0}]
    criteria += [{"type": "use_word", "value": word, "weight": 2.0} for word in words]
    text = f"write {length} words and end them as this ends ."
    if level >= 2:
        forbidden = rng.choice([f.value for f in facts if f.value not in words])
        criteria.append({"type": "avoid_word", "value": forbidden, "weight": 1.0})
        text += f" do not say {forbidden} ."
    if level == 3:
        criteria.append({"type": "lower_latin", "weight": 1.0})
    criteria.append({"type": "end_mark", "value": mark, "weight": 1.0})
    metadata = {"kind": "rubric", "level": level, "asked": asked, "rubric": criteria}
    return {
        "text": f"{render(facts)} {text} use the thing of {' and '.join(asked)} {mark}",
        "reward": "rubric",
        "metadata": metadata | {"facts": [[f.name, f.verb, f.value] for f in facts]},
    }


# -------------------------------------------------------------------------------------------------------------------------- addition


def additions(rng: Random, level: int, split: str) -> Iterator[dict[str, Any]]:
    """All pairs of digits in the seed's order. Three of every ten pairs, sorted by sum, are held out: no sum is over-represented."""
    pairs = sorted(((a, b) for a in DIGITS for b in DIGITS), key=lambda p: (sum(p), digest(f"{p[0]} + {p[1]}")))
    chosen = [p for i, p in enumerate(pairs) if split == "all" or (i % 10 in (1, 4, 7)) == (split == "heldout")]
    rng.shuffle(chosen)
    for a, b in chosen:
        metadata = {"kind": "addition", "level": level, "operands": [a, b]}
        yield {"text": f"What is {a} + {b}?", "answer": str(a + b), "reward": "number", "metadata": metadata}


GENERATORS: dict[str, Callable[[Random, int, str], Iterator[dict[str, Any]]]] = {
    "lookup": lookups,
    "tool": tools,
    "rubric": rubrics,
    "addition": additions,
}
