"""Conversations that solve procedural tasks, ones that nearly do, and dense documents to learn the skill from.

A base model trained on `noisy_demonstration` knows the format and most of the skill but errs as often as the noise says: what
reinforcement learning then sharpens. `pretraining_texts` asks many questions about one list of facts, so that a tiny transformer sees
ten lookups per document instead of one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from random import Random
from typing import Any

from winnow.rewards.language import MARKS, THINGS, Fact, in_split, render, world_key
from winnow.rewards.tasks import (
    NUM_FACTS,
    Task,
    facts_of,
    generate_tasks,
    keeps_world,
    lookup_question,
    lookup_world,
    rubric_fields,
    tool_question,
)
from winnow.rollout.schema import Message

PRETRAINING_KINDS = ("lookup", "tool", "rubric")


def demonstrations(task: Task, rng: Random) -> list[Message]:
    """A conversation that solves the task: its messages, then the turns of a correct solution (the tool's answers included)."""
    return [*task.messages, *solve(task, rng, wrong=False)]


def noisy_demonstration(task: Task, rng: Random, noise: float) -> list[Message]:
    """With probability `noise` a plausible wrong conversation (another fact's value, the wrong key, criteria not met), else a right one."""
    if not 0 <= noise <= 1:
        raise ValueError(f"noise is {noise}, but it is a probability: it must be in [0, 1]")
    return [*task.messages, *solve(task, rng, wrong=rng.random() < noise)]


def solve(task: Task, rng: Random, wrong: bool) -> list[Message]:
    kind = task.metadata.get("kind")
    if kind not in SOLVERS:
        raise ValueError(f"task {task.id!r} has no demonstration: only the kinds {', '.join(SOLVERS)} do, not {kind!r}")
    return SOLVERS[kind](task, rng, wrong)


def says(text: str) -> Message:
    return {"role": "assistant", "content": text}


def lookup_turns(task: Task, rng: Random, wrong: bool) -> list[Message]:
    return [says(lookup_reply(facts_of(task), task.metadata["level"], list(task.metadata["asked"]), rng, wrong))]


def lookup_reply(facts: Sequence[Fact], level: int, asked: list[str], rng: Random, wrong: bool) -> str:
    """The facts used, restated: `ann 7`. Level 2 writes both before the sum, level 3 the pointer before the value: `ann eva 7`."""
    values = {fact.name: fact.value for fact in facts if fact.verb == "has"}

    def value_of(name: str, err: bool) -> str:
        others = [v for v in values.values() if v != values[name]]
        return rng.choice(others) if err and others else values[name]

    if level == 1:
        return f"{asked[0]} {value_of(asked[0], wrong)}"
    if level == 2:
        first, second = value_of(asked[0], wrong), value_of(asked[1], False)
        return f"{asked[0]} {first} {asked[1]} {second} {int(first) + int(second)}"
    return f"{asked[0]} {asked[1]} {value_of(asked[1], wrong)}"


def tool_turns(task: Task, rng: Random, wrong: bool) -> list[Message]:
    """One call per key, the tool's answer to each, then the code or the sum. Wrong: the first key is another one of the prompt."""
    codes, keys = task.metadata["codes"], list(task.metadata["keys"])
    if wrong:
        keys[0] = rng.choice([key for key in codes if key not in keys])
    turns: list[Message] = []
    for name, key in zip(task.metadata["asked"], keys, strict=False):  # level 2 asks for one key through another name
        found = f"{name} {task.metadata['asked'][-1]}" if len(keys) < len(task.metadata["asked"]) else name
        turns += [says(f"{found} {key} call {key}"), {"role": "tool", "content": f"{key} is {codes[key]}"}]
    return [*turns, says(str(sum(codes[key] for key in keys)))]


def rubric_turns(task: Task, rng: Random, wrong: bool) -> list[Message]:
    return [says(rubric_reply(task.metadata["rubric"], task.metadata["asked"], rng, wrong))]


def rubric_reply(rubric: Sequence[Mapping[str, Any]], asked: Sequence[str], rng: Random, wrong: bool) -> str:
    """The asked facts restated, then fillers up to the length, then the mark. Wrong: one or two of the criteria are broken."""
    wants: dict[str, list[Any]] = {}
    for criterion in rubric:
        wants.setdefault(criterion["type"], []).append(criterion.get("value"))
    breakable = [kind for kind in ("use_word", "num_words", "end_mark", "avoid_word") if kind in wants]
    broken = set(rng.sample(breakable, rng.randint(1, 2))) if wrong else set()
    words, forbidden = list(wants.get("use_word", [])), set(wants.get("avoid_word", []))
    free = [thing for thing in THINGS if thing not in forbidden and thing not in words]
    if "use_word" in broken:
        words[0] = rng.choice(free)
    words = [word for fact in zip(asked, words, strict=False) for word in fact]
    length = wants["num_words"][0] + (rng.choice((-1, 1)) if "num_words" in broken else 0)
    while len(words) < length:
        words.append(rng.choice(free))
    words = words[:length]
    if "avoid_word" in broken:
        words[-1] = next(iter(forbidden))
    mark = wants["end_mark"][0]
    return " ".join([*words, rng.choice([m for m in MARKS if m != mark]) if "end_mark" in broken else mark])


def addition_turns(task: Task, rng: Random, wrong: bool) -> list[Message]:
    a, b = task.metadata["operands"]
    return [says(f"{a} + {b} = {a + b + (rng.choice((-2, -1, 1, 2)) if wrong else 0)}")]


SOLVERS = {"lookup": lookup_turns, "tool": tool_turns, "rubric": rubric_turns, "addition": addition_turns}


def pretraining_texts(
    count: int,
    seed: int,
    kinds: Sequence[str] = PRETRAINING_KINDS,
    level: int = 1,
    pairs: tuple[int, int] = (8, 12),
    facts: tuple[int, int] = NUM_FACTS,
) -> list[list[Message]]:
    """`count` conversations: a list of facts, then a number of question/answer pairs about it, kinds in turn. Training worlds only.

    `pairs` bounds the number of questions per document, `facts` that of its facts (short lists are where recall is learned first). Every answer is right; noise comes from the demonstrations.
    """
    unknown = [kind for kind in kinds if kind not in PRETRAINING_KINDS]
    if unknown or not kinds:
        raise ValueError(f"pretraining kinds are {list(kinds)}: choose from {', '.join(PRETRAINING_KINDS)}")
    rng = Random(f"winnow pretraining {'-'.join(kinds)} {level} {seed} {facts}")
    return [document(kinds[i % len(kinds)], level, rng.randint(*pairs), rng, facts) for i in range(count)]


def document(kind: str, level: int, num_pairs: int, rng: Random, num_facts: tuple[int, int]) -> list[Message]:
    """One list of facts and `num_pairs` questions about it, each with its turns."""
    if level != 1:  # one list cannot serve many pointers or sums evenly: questions of other levels come one a document
        return demonstrations(generate_tasks(kind, level, 1, rng.getrandbits(32))[0], rng)
    while True:
        facts = (
            lookup_world(rng, 1, rng.randint(0, 9), num_facts)[0]
            if kind == "lookup"
            else keeps_world(rng, "train", 1, num_facts)[0]
        )
        if in_split(world_key(facts), "train"):
            break
    asked = rng.sample(facts, min(num_pairs, len(facts)))
    codes = {fact.value: rng.randint(0, 9) for fact in facts}
    turns: list[Message] = []
    for fact in asked:
        question, answers = ask(kind, facts, fact, codes, rng)
        prefix = "" if turns else render(facts) + " "
        turns += [{"role": "user", "content": prefix + question}, *answers]
    return turns


def ask(kind: str, facts: list[Fact], fact: Fact, codes: dict[str, int], rng: Random) -> tuple[str, list[Message]]:
    """A question about one fact, worded as in the tasks, and the turns that answer it."""
    if kind == "lookup":
        return lookup_question(1, [fact.name]), [says(lookup_reply(facts, 1, [fact.name], rng, False))]
    if kind == "tool":
        tool: Message = {"role": "tool", "content": f"{fact.value} is {codes[fact.value]}"}
        return tool_question(1, [fact.name]), [
            says(f"{fact.name} {fact.value} call {fact.value}"),
            tool,
            says(str(codes[fact.value])),
        ]
    fields = rubric_fields(rng, facts, 1, [facts.index(fact)])
    return fields["text"].removeprefix(render(facts) + " "), [
        says(rubric_reply(fields["metadata"]["rubric"], [fact.name], rng, False))
    ]
