"""Maths answers: hand-made equivalences, the gold answers of GSM8K and AIME, attacks on the grader's time, threads, asyncio and Ray."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from winnow.rewards import grader_pool
from winnow.rewards.baseline import play
from winnow.rewards.extraction import boxed, candidates
from winnow.rewards.math_process import COMPARE, available, decide, gold_answer, matches
from winnow.rewards.registry import get_reward
from winnow.rollout.schema import Failure, Score, Task

CASES = Path(__file__).parent / "data" / "maths_cases.txt"
needs_math_verify = pytest.mark.skipif(not available(), reason="math-verify is not installed")


def cases() -> list[tuple[bool, str, str]]:
    rows = [line for line in CASES.read_text(encoding="utf-8").splitlines() if line and not line.startswith("#")]
    pairs = [(row[0] == "=", *row[2:].split(" ;; ")) for row in rows]
    return [
        (want, gold, reply.replace(".\\n", ".\n").replace("\n\\n", "\n\n").replace("\\n####", "\n####"))
        for want, gold, reply in pairs
    ]


def grade(reward: str, gold: str, reply: str) -> Score | Failure:
    task = Task(id="t", domain="d", messages=({"role": "user", "content": "?"},), reward=reward, answer=gold)
    return get_reward(reward)(task, play(task, lambda _: reply))


@needs_math_verify
def test_hand_made_equivalences() -> None:
    """At least 99 % right; the misses are in the message."""
    made = cases()
    assert len(made) >= 300 and sum(not want for want, _, _ in made) >= 90
    results = [(want, gold, reply, matches(gold, reply)[0]) for want, gold, reply in made]
    misses = [(gold, reply, got) for want, gold, reply, got in results if got is not want]
    assert len(misses) <= len(made) // 100, misses
    score = grade("math", "\\frac{1}{2}", "so $\\boxed{0.5}$")
    assert isinstance(score, Score) and score.value == 1 and score.parts == {"right": 1, "answered": 1}


def test_equality_does_not_depend_on_the_side_where_neither_is_marked() -> None:
    """Gold and reply change places: only percent signs and equations may make a difference."""
    differ = []
    for want, gold, reply in cases():
        if any(mark in gold + reply for mark in ("%", "percent", "=", "box", "is", "\n", "nswer", "Step", "are")):
            continue
        verdict = decide(reply, f"\\boxed{{{gold}}}")[0]
        if verdict is not None and verdict is not want:
            differ.append((gold, reply))
    assert not differ


@pytest.mark.parametrize(("name", "count"), [("gsm8k", 1319), ("aime24", 30)])
def test_gold_answers_score_1_and_perturbed_ones_0(name: str, count: int) -> None:
    folder = os.environ.get("WINNOW_DATA")
    if not folder:
        pytest.skip("WINNOW_DATA names no folder of benchmark files")
    rows = [json.loads(line) for line in (Path(folder) / name / "test.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(rows) == count
    for row in rows:
        gold = gold_answer(str(row["answer"]))
        plain = gold.replace(",", "")
        off = str(int(plain) + 1) if plain.lstrip("-").isdigit() else plain + "1"
        for right in (
            f"The answer is {gold}.",
            f"so $x = {plain}$ and \\boxed{{{plain}}}",
            f"It adds up.\n#### {gold}",
        ):
            assert decide(gold, right)[0] is True, (gold, right)
        for wrong in (
            f"The answer is {off}.",
            f"\\boxed{{{off}}}",
            f"#### {plain}7",
            "no idea",
            f"\\boxed{{{plain}, {off}}}",
        ):
            assert decide(gold, wrong)[0] is False, (gold, wrong)
        for reward in ("number", "gsm8k") if name == "gsm8k" else ("math",):
            right, wrong = (grade(reward, str(row["answer"]), f"#### {n}") for n in (plain, off))
            assert isinstance(right, Score) and isinstance(wrong, Score) and (right.value, wrong.value) == (1, 0)


def test_where_the_answer_stands() -> None:
    assert boxed("\\boxed{\\frac{1}{2}} and \\boxed{a{b}c} \\boxed{open") == "a{b}c"
    assert boxed("\\boxed{\\{1, 2\\}}") == "\\{1, 2\\}" and boxed("none") is None
    assert boxed("\\boxed{outer \\boxed{inner} x}") == "inner"
    assert next(candidates("the answer is \\(x^2\\). Done.")) == "x^2"
    assert decide("1", "") == (False, "") == decide("1", "\\boxed{ }")
    with pytest.raises(ValueError, match="is empty"):
        gold_answer(" $ $ ")


SLOW = [
    "9^{9^{9^{9}}}", "(10^9)!!!!", "((((((((((9!)!)!)!)!)!)!)!)!)!)", "\\boxed{" * 3000, "\\(" * 10_000, "$" * 20_000, "a" * 1000 + "!",
    "1 " + "ab " * 330 + "!", "(" * 5000, "\\frac" * 200, "{" * 400 + "}" * 400, "sin " * 200 + "1", "1," * 400, "-" * 900 + "1", "^2" * 300,
    "2^" * 100 + "2", "1e9999*" * 30 + "1", "\\sqrt{" * 60 + "2" + "}" * 60, "|" * 300, "cm/" * 300, "5 " + "cm " * 300 + "!",
    "exp(" * 12 + "9" + ")" * 12, "x^{x^{x^{x^{x}}}}" * 15, "(1+x)" * 75, "\\binom{1000}{500}" * 20, "tan(10^{8})" * 30, "answer is " * 2000,
]  # fmt: skip


@pytest.mark.parametrize("text", SLOW, ids=range(len(SLOW)))
def test_no_reply_holds_the_grader_up(text: str) -> None:
    """What is decided in this process is decided at once; the rest is for the pool, which kills."""
    start = time.process_time()
    for reply in (text, f"\\boxed{{{text}}}", f"The answer is {text}"):
        assert decide("\\frac{1}{2}", reply)[0] is not True
    assert time.process_time() - start < 2.0


@needs_math_verify
def test_a_hang_is_a_failure_and_delays_no_other() -> None:
    pool = grader_pool.GraderPool(workers=2, seconds=20)
    try:
        assert pool.call(COMPARE, "\\int_0^1 x dx", "\\frac{1}{2}") is True
        assert pool.call(COMPARE, "\\int_0^1 x dx", "\\frac{1}{3}") is False
        with ThreadPoolExecutor(3) as threads:
            start = time.monotonic()
            hung = threads.submit(pool.call, COMPARE, "3", "9^{9^{9^{9}}}", seconds=2.0)
            others = [threads.submit(pool.call, COMPARE, "3x", "2x+x") for _ in range(4)]
            assert all(other.result() is True for other in others) and time.monotonic() - start < 15
            failure = hung.result()
        assert isinstance(failure, Failure) and failure.kind in ("timeout", "memory", "error"), failure
        undecided, _ = matches("\\sum_{k=1}^{3} k", "\\boxed{6}", pool)
        assert undecided is True
    finally:
        pool.close()


JOBS = [
    ("\\frac{1}{2}", "0.5", True),
    ("3", "\\boxed{4}", False),
    ("\\sum_{k=1}^{3} k", "\\boxed{6}", True),
    ("2\\sqrt{3}", "\\sqrt{12}", True),
]


def graded() -> list[bool | Failure]:
    return [matches(gold, reply)[0] for gold, reply, _ in JOBS]


@needs_math_verify
def test_threads_and_asyncio_grade_alike_and_no_alarm_is_set() -> None:
    before, ticking = signal.getsignal(signal.SIGALRM), signal.getitimer(signal.ITIMER_REAL)[0] > 0
    want = [right for _, _, right in JOBS]
    found: list[list[bool | Failure]] = []
    threads = [threading.Thread(target=lambda: found.append(graded())) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert found == [want] * 6

    async def many() -> list[list[bool | Failure]]:
        return await asyncio.gather(*(asyncio.to_thread(graded) for _ in range(6)))

    assert asyncio.run(many()) == [want] * 6
    assert signal.getsignal(signal.SIGALRM) == before, "the caller's own alarm must stay"
    assert (signal.getitimer(signal.ITIMER_REAL)[0] > 0) == ticking


@pytest.mark.slow
@needs_math_verify
def test_a_threaded_ray_actor_grades_alike() -> None:
    """Where alarm-based graders give 0 for everything: the actor's methods do not run on its main thread."""
    import logging

    import ray

    mine = not ray.is_initialized()
    if mine:
        ray.init(num_cpus=1, include_dashboard=False, address="local", logging_level=logging.ERROR, log_to_driver=False)
    try:

        @ray.remote(max_concurrency=4, num_cpus=0)
        class Grader:
            def grade(self, jobs: list) -> tuple[bool, list]:
                from winnow.rewards.math_process import matches as compare

                return threading.current_thread() is threading.main_thread(), [compare(g, r)[0] for g, r, _ in jobs]

        actor = Grader.remote()
        answers = ray.get([actor.grade.remote(JOBS) for _ in range(4)], timeout=120)
        assert [verdicts for _, verdicts in answers] == [[right for _, _, right in JOBS]] * 4
        assert not any(on_main for on_main, _ in answers), "the trap is not set: these ran on the main thread"
    finally:
        if mine:
            ray.shutdown()


def test_rates() -> None:
    """Well above what a run needs: 300 numeric answers a second, 50 in LaTeX (measured figures: docs/experiments.md)."""
    latex = [(gold, reply) for _, gold, reply in cases() if "\\" in gold]
    decide("\\sqrt{2}", "\\boxed{2}")
    start = time.perf_counter()
    for number in range(300):
        assert decide(str(number), f"It is {number}.")[0]
    assert time.perf_counter() - start < 1.0
    start = time.perf_counter()
    for gold, reply in latex[:150]:
        decide(gold, reply)
    assert time.perf_counter() - start < 3.0


def test_reasoning_gym_tasks_grade_their_own_answers() -> None:
    pytest.importorskip("reasoning_gym")
    from winnow.rewards.data import load_tasks

    tasks = load_tasks("reasoning-gym:leg_counting", count=8, seed=1)
    assert tasks == load_tasks("reasoning-gym:leg_counting", count=8, seed=1)
    held = load_tasks("reasoning-gym:leg_counting", count=8, seed=1, split="heldout")
    assert not {t.messages[0]["content"] for t in tasks} & {t.messages[0]["content"] for t in held}
    for task in tasks:
        right = get_reward("reasoning_gym")(task, play(task, lambda _: f"<answer>{task.answer}</answer>"))  # noqa: B023
        wrong = get_reward("reasoning_gym")(task, play(task, lambda _: "<answer>-1</answer>"))
        assert isinstance(right, Score) and isinstance(wrong, Score) and right.value == 1 and wrong.value < 0.2
    with pytest.raises(ValueError, match="no generator 'nonsense'"):
        load_tasks("reasoning-gym:nonsense", count=2)
