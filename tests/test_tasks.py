"""Procedural tasks: right solutions score 1, wrong ones 0, constants stay weak, splits never meet, seeds decide everything."""

from __future__ import annotations

from itertools import pairwise
from random import Random

import pytest

from winnow.rewards.baseline import constant_baseline, constant_replies, play
from winnow.rewards.benchmarks import BENCHMARKS, load_benchmark
from winnow.rewards.contract import success
from winnow.rewards.demonstrations import demonstrations, noisy_demonstration, pretraining_texts
from winnow.rewards.language import LATE_FACTS, NAMES, NUM_FACTS, split_of, world_key
from winnow.rewards.registry import get_reward
from winnow.rewards.tasks import DOMAINS, LEVELS, Fact, facts_of, generate_tasks

ALL = [(kind, level) for kind in DOMAINS for level in LEVELS]


def replay(task, messages):
    """Plays the assistant turns of a conversation in the task's own environment; returns (score, trajectory)."""
    replies = iter([m["content"] for m in messages[len(task.messages) :] if m["role"] == "assistant"])
    trajectory = play(task, lambda _: next(replies))
    return get_reward(task.reward)(task, trajectory), trajectory


@pytest.mark.parametrize(("kind", "level"), ALL)
def test_demonstrations_are_right_and_noisy_ones_wrong(kind, level):
    for number, task in enumerate(generate_tasks(kind, level, 60, seed=3)):
        rng = Random(number)
        right = demonstrations(task, rng)
        score, trajectory = replay(task, right)
        assert score.value == success(score) == 1, right
        assert list(trajectory.messages) == right, "the environment must say what the demonstration says"
        score, _ = replay(task, noisy_demonstration(task, rng, 1.0))
        assert success(score) == 0
        assert score.value < 1
        if kind in ("lookup", "addition", "tool"):
            assert score.value == 0


def test_noise_is_a_probability():
    tasks = generate_tasks("lookup", 1, 400, seed=5)
    rng = Random(0)
    wrong = sum(success(replay(task, noisy_demonstration(task, rng, 0.3))[0]) == 0 for task in tasks)
    assert 0.2 < wrong / len(tasks) < 0.4
    with pytest.raises(ValueError, match="probability"):
        noisy_demonstration(tasks[0], rng, 1.5)


@pytest.mark.parametrize(("kind", "level"), ALL)
def test_the_same_arguments_give_the_same_tasks(kind, level):
    tasks = generate_tasks(kind, level, 40, seed=7)
    assert tasks == generate_tasks(kind, level, 40, seed=7)
    assert tasks[:10] == generate_tasks(kind, level, 10, seed=7), "a smaller count is a prefix"
    assert [t.id for t in tasks] != [t.id for t in generate_tasks(kind, level, 40, seed=8)]
    assert len({t.id for t in tasks}) == len({t.messages[0]["content"] for t in tasks}) == 40


@pytest.mark.parametrize("kind", ["lookup", "tool", "rubric"])
def test_no_world_is_on_both_sides(kind):
    """Whatever the seeds, levels and counts: the facts alone decide, and the two questions about one list share its side."""
    sides = {}
    for split in ("train", "heldout"):
        worlds = {
            world_key(facts_of(t))
            for level in LEVELS
            for seed in (0, 1)
            for t in generate_tasks(kind, level, 60, seed, split)
        }
        assert {split_of(world) for world in worlds} == {split}
        sides[split] = worlds
    assert not sides["train"] & sides["heldout"]


def test_pretraining_documents_use_training_worlds_only_and_are_right():
    documents = pretraining_texts(60, seed=1)
    assert documents == pretraining_texts(60, seed=1) != pretraining_texts(60, seed=2)
    for messages in documents:
        assert 8 <= sum(m["role"] == "user" for m in messages) <= 12
        text = messages[0]["content"]
        pairs = [words.split() for words in text.split(" . ") if len(words.split()) == 2]
        facts = [Fact(name, "has" if value.isdigit() else "keeps", value) for name, value in pairs if name in NAMES]
        assert len(facts) >= NUM_FACTS[0] and split_of(world_key(facts)) == "train"
        values = {fact.name: fact.value for fact in facts}
        for question, answer in pairwise(messages):
            if question["role"] != "user":
                continue
            name = question["content"].split()[-2]
            assert answer["content"].startswith(f"{name} {values[name]}")
            if "code of" in question["content"]:
                assert answer["content"] == f"{name} {values[name]} call {values[name]}"


def test_addition_has_every_pair_once():
    train, heldout = (
        generate_tasks("addition", count=1000, seed=s, split=p) for s, p in ((0, "train"), (9, "heldout"))
    )
    pairs = [tuple(t.metadata["operands"]) for t in train + heldout]
    assert (len(train), len(heldout)) == (70, 30) and len(set(pairs)) == 100
    assert len(generate_tasks("addition", count=1000, split="all")) == 100


@pytest.mark.parametrize(("kind", "level"), ALL)
@pytest.mark.parametrize("split", ["train", "heldout"])
def test_constant_replies_are_weak(kind, level, split):
    tasks = generate_tasks(kind, level, 300, seed=0, split=split)
    reply, rate = constant_baseline(tasks, limit=12)
    assert constant_replies(tasks) and rate <= 0.15, f"{reply!r} solves {rate:.0%} of {kind} level {level}"


@pytest.mark.parametrize("kind", ["lookup", "tool", "rubric"])
@pytest.mark.parametrize("level", LEVELS)
def test_what_is_asked_stands_far_back(kind, level):
    tasks = generate_tasks(kind, level, 100, seed=2)
    for task in tasks:
        assert 80 <= len(task.messages[0]["content"].split()) <= 150
        facts, asked = facts_of(task), set(task.metadata["asked"])
        late = {fact.name for fact in facts[-LATE_FACTS:]}
        assert not asked & late, task.messages[0]["content"]
        needed = [i for i, fact in enumerate(facts) if fact.name in asked]
        assert len(needed) == len(asked), "every name asked for has one fact"
        if kind == "tool":
            assert not any(character.isdigit() for character in task.messages[0]["content"]), (
                "codes must not be in the prompt"
            )
    assert sum(min(i for i, f in enumerate(facts_of(t)) if f.name in t.metadata["asked"]) < 16 for t in tasks) > 60


@pytest.mark.parametrize("level", LEVELS)
def test_agents_in_the_tool_environment(level):
    for number, task in enumerate(generate_tasks("tool", level, 30, seed=4)):
        rng, keys, answer = Random(number), list(task.metadata["keys"]), task.answer
        wrong_key = next(key for key in task.metadata["codes"] if key not in keys)

        def scripted(*replies):
            replies = iter(replies)
            return play(task, lambda _: next(replies), max_turns=4)  # noqa: B023

        def parts(trajectory):
            return tool_answer(task, trajectory)  # noqa: B023

        tool_answer = get_reward("tool_answer")
        expert = scripted(*[f"call {key}" for key in keys], answer)
        assert parts(expert).value == 1 and expert.finish_reason == "done" and expert.turns == len(keys) + 1
        assert parts(expert).parts == {"called": 1, "answer": 1, "clean": 1}
        guess = parts(scripted(answer))
        assert guess.value == 0 and guess.parts == {"called": 0, "answer": 1, "clean": 1}, (
            "a lucky guess without a call earns nothing"
        )
        assert parts(scripted(f"call {wrong_key}", answer)).value == 0
        assert parts(scripted("call", *[f"call {key}" for key in keys], answer)).parts == {
            "called": 1,
            "answer": 1,
            "clean": 0,
        }
        unknown = scripted("call zebra", answer)
        assert parts(unknown).value == 0 and "no key zebra" in unknown.messages[-2]["content"]
        endless = play(task, lambda _: f"call {keys[0]}", max_turns=3)  # noqa: B023
        assert endless.finish_reason == "length" and parts(endless).value == 0
        choices = [f"call {key}" for key in task.metadata["codes"]] + ["4", "call", "", "call a b"]
        monkey = play(task, lambda _: rng.choice(choices), max_turns=20)  # noqa: B023
        assert monkey.finish_reason == "done" and 0 <= parts(monkey).value <= 1


def test_faults_are_named():
    for arguments, message in (
        ({"kind": "chess"}, "task kind 'chess' is unknown: the procedural kinds are lookup"),
        ({"kind": "lookup", "level": 9}, "level of 'lookup' tasks is 9"),
        ({"kind": "lookup", "count": 0}, "count of 'lookup' tasks is 0"),
        ({"kind": "lookup", "split": "test"}, "split is 'test'"),
    ):
        with pytest.raises(ValueError, match=message):
            generate_tasks(**arguments)
    with pytest.raises(ValueError, match="pretraining kinds"):
        pretraining_texts(1, 0, kinds=("addition",))


def test_benchmarks_are_held_out_and_known_by_name():
    for name in DOMAINS:
        tasks = load_benchmark(name, count=20)
        assert tasks == generate_tasks(name, count=20, split="heldout")
    assert set(BENCHMARKS) >= {*DOMAINS, "gsm8k", "humaneval", "ifeval"}
    with pytest.raises(
        ValueError, match="benchmark 'chess' is unknown: known are lookup, tool, rubric, addition, gsm8k"
    ):
        load_benchmark("chess")
    with pytest.raises(ValueError, match="give --data"):
        load_benchmark("gsm8k")
