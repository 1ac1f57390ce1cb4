"""Graders on their own gold answers, the reward contract, the agent environment, the shaping terms."""

from __future__ import annotations

import json
import os
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from winnow.rewards import alignment, contract, reasoning
from winnow.rewards.agent import ToolEnvironment, parse_call
from winnow.rewards.baseline import play
from winnow.rewards.contract import grade, success
from winnow.rewards.registry import KNOWN_REWARDS, get_reward, make_environment
from winnow.rewards.trl_functions import BatchReward
from winnow.rollout.schema import Environment, Failure, Group, Request, Sampling, Score, Task

GSM8K = (  # question-free gold answers in the data set's form, with what it has of commas, signs, decimals and money
    ("She has 16 - 3 - 4 = <<16-3-4=9>>9 eggs.\nShe makes 9 * 2 = $<<9*2=18>>18.\n#### 18", "18"),
    ("That is 70,000 * 1 = 70000.\n#### 70,000", "$70,000.00"),
    ("It fell by 12 to -5 degrees.\n#### -5", "minus... it is \u22125 degrees"),
    ("Half of 5 is 2.5.\n#### 2.5", "2.50"),
    ("1,234,567 in all\n#### 1,234,567", "1234567."),
)


def task_for(reward: str, answer: str | None = "18", **metadata) -> Task:
    return Task(
        id="t",
        domain="d",
        messages=({"role": "user", "content": "?"},),
        reward=reward,
        answer=answer,
        metadata=metadata,
    )


def value(reward: str, reply: str, answer: str | None = "18", **metadata) -> float:
    task = task_for(reward, answer, **metadata)
    score = get_reward(reward)(task, play(task, lambda _: reply))
    assert isinstance(score, Score), score
    return score.value


def group_of(
    replies: list[str], reward: str = "number", answer: str | None = "18", max_tokens: int = 8, **metadata
) -> Group:
    task = task_for(reward, answer, **metadata)
    request = Request(request_id="r", task=task, num_samples=len(replies), sampling=Sampling(max_tokens=max_tokens))
    made = [play(task, lambda _, reply=reply: reply, request_id="r", sample=i) for i, reply in enumerate(replies)]
    return Group(request=request, trajectories=tuple(made))


# --------------------------------------------------------------------------------------------------------------------------- numbers


@pytest.mark.parametrize(
    ("reply", "right"),
    [
        ("The number of Oslo is 4821. The number of Lima is 9034.", 1.0),
        ("4821 9034 1111 2222", 1.0),
        ("4821, then 77", 0.5),
        ("9034 4821", 0.0),  # in the other order
        ("1111 2222 4821 9034", 0.0),  # every number of the text is no answer
        ("4,821.0", 0.5),
        ("I do not know.", 0.0),
    ],
)
def test_each_number_counts_at_its_place(reply, right):
    assert value("each_number", reply, "4821 9034") == right
    assert value("each_number", "4821", "4821") == 1


@pytest.mark.parametrize(("solution", "reply"), GSM8K)
def test_gsm8k_gold_answers_grade_right_and_others_wrong(solution, reply):
    number = solution.split("#### ")[1]
    for right in (solution, reply, f"The answer is {number}.", f"so \\boxed{{{number}}}", f"**{number}**"):
        assert value("gsm8k", right, solution) == 1 and value("gsm8k", right, number) == 1, right
    for wrong in ("", "no idea", "18 19", f"{number}1", f"#### 7\n{number}", "#### "):
        assert value("gsm8k", wrong, solution) == 0, wrong


def test_gsm8k_file_gold_answers_all_grade_right():
    folder = os.environ.get("WINNOW_DATA")
    if not folder:
        pytest.skip("WINNOW_DATA does not name a folder with gsm8k/train.jsonl and gsm8k/test.jsonl")
    for name in ("train", "test"):
        for line in (Path(folder) / "gsm8k" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines():
            gold = json.loads(line)["answer"]
            number = gold.split("####")[1].strip()
            assert value("gsm8k", gold, gold) == value("number", f"It is ${number}.", gold) == 1, gold
            assert value("gsm8k", gold, gold + "1") == 0, gold


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("7 + 5 = 12.", "12"),
        ("5-3", "3"),
        ("(5)-3", "3"),
        ("is -3", "-3"),
        ("3,4", "4"),
        ("1,234", "1234"),
        ("1,2345", "2345"),
        ("$1,234.50 a year", "1234.50"),
        ("-$5", "-5"),
        ("10%", "10"),
        ("x2", "2"),
        ("0.50.", "0.50"),
        ("9" * 100, None),
        ("none", None),
    ],
)
def test_last_number(text, found):
    assert reasoning.last_number(text) == (None if found is None else reasoning.Decimal(found))


def test_long_digit_strings_cost_nothing():
    assert reasoning.last_number("1" * 1_000_000 + " 4") == 4
    assert reasoning.last_number("1,111" * 200_000) is not None


def test_exact_and_choice():
    assert value("exact", " a  b\n", "a b") == 1 and value("exact", "a c", "a b") == 0
    for right in (
        "B",
        "(B)",
        "b)",
        "The answer is B.",
        "A good one, but \\boxed{B}",
        "**Answer:** (B)",
        "It is A? No, answer: B",
        "I pick B",
    ):
        assert value("choice", right, "B") == 1, right
    for wrong in ("A", "", "Banana", "The answer is C, not (B)", "F"):
        assert value("choice", wrong, "B") == 0, wrong


def test_a_missing_gold_answer_is_no_zero():
    (graded,) = grade(get_reward, [group_of(["18"], answer=None)])
    assert isinstance(graded.scores[0], Failure) and "no answer" in graded.scores[0].detail


# ------------------------------------------------------------------------------------------------------------------------- alignment


RUBRIC = [
    {"type": "num_words", "value": 3, "weight": 1},
    {"type": "use_word", "value": "red", "weight": 2},
    {"type": "use_word", "value": "kite", "weight": 2},
    {"type": "avoid_word", "value": "blue", "weight": 1},
    {"type": "end_mark", "value": "!", "weight": 1},
    {"type": "lower_latin", "weight": 1},
]


@pytest.mark.parametrize(
    ("reply", "share"),
    [
        ("red kite boat !", 8),
        ("red kite boat!", 8),
        ("Red kite boat !", 7),
        ("red kite blue !", 7),
        ("red kite boat", 7),
        ("red kite boat !!", 7),
        ("redkite boat so !", 4),
        ("red kite boat 4 !", 7),
        ("", 0),
        ("!", 0),
    ],
)
def test_rubric_is_the_weighted_share(reply, share):
    score = alignment.rubric(
        task_for("rubric", rubric=RUBRIC), play(task_for("rubric", rubric=RUBRIC), lambda _: reply)
    )
    assert score.value == pytest.approx(share / 8)
    assert score.parts["all"] == success(score) == float(share == 8)
    assert set(score.parts) == {"num_words", "use_word", "use_word_2", "avoid_word", "end_mark", "lower_latin", "all"}


@pytest.mark.parametrize("rubric", [None, [{"type": "polite"}], [{"type": "use_word", "value": "a", "weight": 0}]])
def test_a_broken_rubric_is_a_failure(rubric):
    (graded,) = grade(get_reward, [group_of(["a"], "rubric", rubric=rubric)])
    assert isinstance(graded.scores[0], Failure) and graded.scores[0].kind == "error"


def test_soft_overlong_and_language():
    assert [alignment.soft_overlong(n, 100, 20) for n in (1, 80, 90, 100, 200)] == [0, 0, -0.5, -1, -1]
    assert [alignment.soft_overlong(n, 100, 0) for n in (99, 100, 101)] == [0, 0, -1]
    with pytest.raises(ValueError, match="buffer is 101"):
        alignment.soft_overlong(1, 100, 101)
    assert alignment.language_consistency("caf\u00e9 au lait") == 1
    assert alignment.language_consistency("ab \u044f\u0437") == 0.5
    assert alignment.language_consistency("\u4f60\u597d", "cjk") == 1
    assert alignment.language_consistency("12 !") == 1


# ------------------------------------------------------------------------------------------------------------------------- contract


def test_grade_keeps_order_and_takes_a_table_or_a_function():
    group = group_of(["18", "17", "it is 18.0"])
    for rewards in (KNOWN_REWARDS, get_reward):
        (graded,) = grade(rewards, [group])
        assert [s.value for s in graded.scores] == [1, 0, 1] and graded.trajectories == group.trajectories


def test_length_penalty_is_a_part_and_not_a_success():
    group = group_of(["18", "so " * 30 + "18"], max_tokens=31)
    (graded,) = grade(KNOWN_REWARDS, [group], {"d": 0.5})
    short, long = graded.scores
    assert short.value == 1 and long.value == 0.5 and long.parts["length"] == -0.5
    assert success(short) == success(long) == 1


@pytest.mark.parametrize(
    ("returned", "kind", "detail"),
    [
        (float("nan"), "invalid", "returned nan"),
        (float("-inf"), "invalid", "returned -inf"),
        (None, "not_applicable", "None"),
        ("1", "invalid", "str"),
        (np.float32(0.5), None, ""),
        (True, None, ""),
        (Failure(kind="timeout", detail="judge"), "timeout", "judge"),
    ],
)
def test_what_a_reward_may_return(returned, kind, detail):
    (graded,) = grade({"number": lambda task, trajectory: returned}, [group_of(["18"])])
    (score,) = graded.scores
    if kind is None:
        assert isinstance(score, Score) and score.value == float(returned)
    else:
        assert isinstance(score, Failure) and score.kind == kind and detail in score.detail


def test_an_exception_is_a_failure_of_its_sample_only():
    def fragile(task, trajectory):
        return {"a": 1.0}[trajectory.reply]

    (graded,) = grade({"number": fragile}, [group_of(["a", "b"])])
    assert graded.scores[0] == Score(value=1.0)
    assert (
        isinstance(graded.scores[1], Failure)
        and "KeyError" in graded.scores[1].detail
        and success(graded.scores[1]) == 0
    )


def test_cancelled_samples_are_not_graded():
    group = group_of(["18", "18"])
    group = replace(group, trajectories=(replace(group.trajectories[0], finish_reason="abort"), group.trajectories[1]))
    for reward in (reasoning.number, BatchReward(lambda completions: [1.0] * len(completions))):
        (graded,) = grade({"number": reward}, [group])
        assert graded.scores[0].kind == "abort" and graded.scores[1].value == 1


def test_a_reward_that_never_answers_is_a_timeout_of_its_samples_only(monkeypatch):
    """Wherever it hangs: the others' scores are kept, the step ends, and the reward and the task are named."""
    held = threading.Event()

    def stuck(task, trajectory):
        if trajectory.sample == 1:
            held.wait(60)
        elif trajectory.sample == 2:
            raise TimeoutError("of its own")
        return 1.0

    stuck.parallel = True
    monkeypatch.setattr(contract, "WAIT_S", 0.3)
    begun = time.monotonic()
    (graded,) = grade({"number": stuck}, [group_of(["18", "18", "18"])])
    held.set()
    assert time.monotonic() - begun < 30 and graded.scores[0] == Score(value=1.0)
    assert graded.scores[1] == Failure(kind="timeout", detail="reward 'number' of task 't': no verdict within 0.3 s")
    assert graded.scores[2].kind == "error" and "of its own" in graded.scores[2].detail


def test_trl_functions():
    seen = {}

    def by_length(completions, answer, level, **columns):
        seen.update(columns)
        return [float(len(text)) if text else None for text in completions]

    group = group_of(["abc", ""], level=2)
    (graded,) = grade({"number": BatchReward(by_length)}, [group])
    assert graded.scores[0] == Score(value=3.0) and graded.scores[1].kind == "not_applicable"
    assert seen["prompts"] == ["?", "?"] and len(seen["completion_ids"]) == 2

    def chatty(completions):
        return np.array([float(completion[0]["content"] == "abc") for completion in completions])

    (graded,) = grade({"number": BatchReward(chatty, conversational=True)}, [group])
    assert [s.value for s in graded.scores] == [1, 0]

    def too_few(completions):
        return [1.0]

    with pytest.raises(ValueError, match="'too_few' returned 1 values for 2 samples"):
        grade({"number": BatchReward(too_few)}, [group])
    with pytest.raises(ValueError, match="'single' returned float"):
        grade({"number": BatchReward(lambda completions: 1.0, "single")}, [group])
    (graded,) = grade({"number": BatchReward(lambda prompts, missing: [1.0])}, [group])
    assert [s.kind for s in graded.scores] == ["error", "error"]


def test_foreign_groups_are_refused_by_name():
    group = group_of(["18", "17"])
    first, second = group.trajectories
    for trajectories, message in (
        ((first,), "1 trajectories for 2 samples"),
        ((first, first), r"\[0\] occur more than once"),
        ((first, replace(second, domain="other")), "of domain 'other'"),
        ((first, replace(second, task_id="other")), "answers task 'other'"),
    ):
        with pytest.raises(ValueError, match=message):
            grade(get_reward, [replace(group, trajectories=trajectories)])
    with pytest.raises(ValueError, match="more than one group"):
        grade(get_reward, [group, group])
    with pytest.raises(ValueError, match=r"wants reward 'number'.*only for exact"):
        grade({"exact": reasoning.exact}, [group])


def test_registry_names():
    with pytest.raises(ValueError, match="reward 'nmber' is unknown: known are number, gsm8k"):
        get_reward("nmber")
    with pytest.raises(ValueError, match="environment 'web' is unknown: known are tool"):
        make_environment("web")
    with pytest.raises(ValueError, match="cannot be imported"):
        get_reward("no.such.module:f")
    assert get_reward("winnow.rewards.reasoning:exact") is reasoning.exact
    assert isinstance(make_environment("tool"), Environment)


# ----------------------------------------------------------------------------------------------------------------------------- agent


@pytest.mark.parametrize(
    ("reply", "key"),
    [
        ("call red", "red"),
        (" Call red\n", "red"),
        ('<tool_call>{"tool": "lookup", "arguments": {"key": "red"}}</tool_call>', "red"),
        ('let me see <tool_call>\n{"name": "lookup", "arguments": "{\\"key\\": \\"red\\"}"}\n', "red"),
    ],
)
def test_calls(reply, key):
    assert parse_call(reply) == (key, None)


@pytest.mark.parametrize(
    "reply",
    [
        "call",
        "call red blue",
        "<tool_call>red</tool_call>",
        "<tool_call>[1]</tool_call>",
        '<tool_call>{"tool": "search", "arguments": {"key": "red"}}</tool_call>',
        '<tool_call>{"tool": "lookup", "arguments": {"key": 3}}</tool_call>',
        '<tool_call>{"tool": "lookup"}</tool_call>',
        "<tool_call>" + "[" * 100_000,
    ],
)
def test_malformed_calls_get_an_error_text(reply):
    key, error = parse_call(reply)
    assert key is None and error is not None and error.startswith("error")


def test_replies_without_a_call_are_answers():
    for reply in ("4", "", "I call it 4", "recall red"):
        assert parse_call(reply) == (None, None)


def test_an_environment_forgets_its_last_episode():
    task = task_for("tool_answer", codes={"red": 4}, keys=["red"])
    environment = ToolEnvironment()
    environment.reset(task)
    environment.step("call red")
    assert environment.step("4").done
    environment.reset(task)
    assert environment.state() == {"called": [], "errors": 0, "answer": None}
    with pytest.raises(ValueError, match="no metadata 'codes'"):
        environment.reset(task_for("tool_answer"))
