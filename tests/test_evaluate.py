"""Evaluation: intervals against known values, failures left out, every answer written, a baseline that knows the best constant."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from winnow.rewards.baseline import play
from winnow.rewards.demonstrations import demonstrations
from winnow.rewards.tasks import generate_tasks
from winnow.rl.evaluate import evaluate, interval, make_requests, student_t, summarise, table, wilson
from winnow.rl.excerpts import attention_stats, index_excerpt
from winnow.rl.pass_at_k import pass_at_k
from winnow.rollout.schema import Failure, Group, IndexRecord, Request, Score, Task, Trajectory


def scripted(reply: Callable[[Task], str]) -> Callable[[Sequence[Request]], Iterator[Group]]:
    """A Generate that answers every request with `reply(task)` at every turn, last request first."""

    def generate(requests: Sequence[Request]) -> Iterator[Group]:
        for request in reversed(requests):
            answer = reply(request.task)
            samples = [
                play(request.task, lambda _, a=answer: a, request.max_turns, request.request_id, n)
                for n in range(request.num_samples)
            ]
            yield Group(request=request, trajectories=tuple(samples))

    return generate


def right(task: Task) -> str:
    from random import Random

    return demonstrations(task, Random(0))[-1]["content"]


@pytest.mark.parametrize(
    ("solved", "tasks", "low", "high"),
    [
        (0, 10, 0.0, 0.2775),
        (5, 10, 0.2366, 0.7634),
        (10, 10, 0.7225, 1.0),
        (58, 64, 0.8102, 0.9564),
        (1, 1, 0.2065, 1.0),
    ],
)
def test_wilson_against_published_values(solved: int, tasks: int, low: float, high: float) -> None:
    assert wilson(solved / tasks, tasks) == pytest.approx((low, high), abs=5e-4)
    assert interval([1.0] * solved + [0.0] * (tasks - solved))[1:] == pytest.approx((low, high), abs=5e-4)


@pytest.mark.parametrize(
    ("freedom", "value"), [(1, 12.706), (2, 4.303), (3, 3.182), (5, 2.571), (10, 2.228), (30, 2.042), (1000, 1.962)]
)
def test_student_t_against_the_table(freedom: int, value: float) -> None:
    assert student_t(freedom) == pytest.approx(value, rel=2e-3)


def test_an_interval_of_real_values_is_student_t_and_covers_as_often_as_it_says() -> None:
    assert interval([1.0, 2.0, 3.0, 4.0, 5.0]) == pytest.approx((3.0, 3 - 1.963, 3 + 1.963), abs=1e-2)
    rng = np.random.default_rng(0)
    covered = sum(low <= 0.3 <= high for _, low, high in (interval(rng.normal(0.3, 2.0, 12)) for _ in range(600)))
    assert 0.92 <= covered / 600 <= 0.98
    binary = sum(
        low <= 0.3 <= high for _, low, high in (interval((rng.random(30) < 0.3).astype(float)) for _ in range(600))
    )
    assert 0.91 <= binary / 600 <= 0.99


def test_fractions_stay_in_their_range_and_nothing_is_known_of_nothing() -> None:
    mean, low, high = interval([0.5, 1.0, 1.0])
    assert (round(mean, 3), high) == (0.833, 1.0) and low >= 0
    assert interval([]) == (0.0, 0.0, 1.0)
    assert interval([0.5])[1:] == (0.0, 1.0)


def test_every_answer_is_written_in_the_order_of_the_tasks(tmp_path: Path) -> None:
    tasks = [
        *generate_tasks("addition", count=10, split="heldout"),
        *generate_tasks("rubric", count=5, split="heldout"),
    ]
    answers = tmp_path / "deep" / "answers.jsonl"
    results = evaluate(scripted(right), make_requests(tasks, samples=2, temperature=1.0), answers=answers)
    rows = [json.loads(line) for line in answers.read_text().splitlines()]
    assert [row["task_id"] for row in rows] == [task.id for task in tasks for _ in range(2)]
    assert rows[0]["answer"] == tasks[0].answer and rows[0]["solved"] == 1.0 and rows[0]["reward"] == 1.0
    assert list(results) == ["reasoning", "alignment"]
    sums = results["reasoning"]
    assert (sums.mean, sums.num_tasks, sums.num_samples, sums.failures) == (1.0, 10, 20, 0)
    assert 0.7 < sums.low < 0.8 and sums.high == 1.0
    assert "reasoning" in table(results) and "0.722 to 1.000" in table(results)


def test_the_constant_baseline_is_what_that_reply_really_gets() -> None:
    tasks = generate_tasks("lookup", count=40, split="heldout")
    result = evaluate(scripted(lambda _: "7"), make_requests(tasks))["reasoning"]
    assert result.constant is not None and result.constant >= result.mean
    best = evaluate(scripted(lambda _: result.constant_reply), make_requests(tasks))["reasoning"]
    assert best.mean == result.constant
    assert result.constant < 0.25, "ten digits, balanced: no constant may do well"


def test_a_failure_is_no_zero() -> None:
    tasks = generate_tasks("addition", count=4, split="heldout")
    requests = make_requests(tasks)
    groups = list(scripted(right)(requests))
    graded = [
        replace(group, scores=(Failure(kind="timeout"),) if number == 0 else (Score(value=1.0),))
        for number, group in enumerate(groups)
    ]
    result = summarise("sums", graded, baseline=False)
    assert (result.mean, result.num_tasks, result.failures) == (1.0, 3, 1)


def test_several_greedy_samples_and_no_tasks_are_refused() -> None:
    tasks = generate_tasks("addition", count=2)
    with pytest.raises(ValueError, match="temperature"):
        make_requests(tasks, samples=4, temperature=0.0)
    with pytest.raises(ValueError, match="no task"):
        evaluate(scripted(right), [])


def recorded(length: int = 10, k: int = 3, prompt: int = 7) -> Trajectory:
    """Two layers; layer 0 keeps the first k positions, layer 1 the last k."""
    queries = range(k, length - 1)
    rows = np.array([[[0, 1, 2] for _ in queries], [[t - 2, t - 1, t] for t in queries]], np.uint16)
    mask = np.arange(length) >= prompt
    return Trajectory(
        request_id="r", sample=0, task_id="t", domain="d", tokens=np.arange(length, dtype=np.int32), loss_mask=mask,
        rollout_logprobs=np.zeros(length, np.float32), policy_versions=np.where(mask, 0, -1).astype(np.int32), finish_reason="stop",
        messages=({"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}),
        index_record=IndexRecord(first=k, k=k, layers=(0, 1), indices=rows),
    )  # fmt: skip


def test_attention_statistics_count_what_was_recorded() -> None:
    stats = attention_stats([recorded()])
    assert stats["mean_available"] == pytest.approx(np.mean(np.arange(1, 10)))
    assert stats["mean_selected"] == pytest.approx((1 + 2 + 3 + 6 * 3) / 9)
    assert stats["sparse_rows"] == pytest.approx(6 / 9)
    assert attention_stats([replace(recorded(), index_record=None)]) == {}


def test_an_excerpt_shows_the_queries_that_drew_tokens() -> None:
    excerpt = index_excerpt(recorded())
    assert excerpt is not None
    assert [query["position"] for query in excerpt["queries"]] == [6, 7, 8]
    assert excerpt["queries"][0]["layers"] == {"0": [0, 1, 2], "1": [4, 5, 6]}
    assert index_excerpt(replace(recorded(), index_record=None)) is None


def test_pass_at_k_is_unbiased_and_right_at_its_ends() -> None:
    assert [pass_at_k(4, 1, k) for k in (1, 2, 4)] == [0.25, 0.5, 1.0]
    assert pass_at_k(5, 0, 5) == 0 and pass_at_k(5, 5, 1) == 1
    for bad in ((3, 1, 4), (3, 1, 0), (3, 4, 1)):
        with pytest.raises(ValueError, match=r"needs 1 <= k <= samples"):
            pass_at_k(*bad)
    rng = np.random.default_rng(0)
    draws = rng.random((4000, 6)) < 0.3
    for k in (1, 2, 3):
        assert np.mean([pass_at_k(6, int(row.sum()), k) for row in draws]) == pytest.approx(1 - 0.7**k, abs=0.015)


def test_several_samples_get_pass_at_k_with_intervals() -> None:
    tasks = generate_tasks("addition", count=4)
    replies = iter(["0"] * 999)
    result = evaluate(
        scripted(lambda _: next(replies)), make_requests(tasks, samples=6, temperature=1.0), baseline=False
    )
    assert list(result["reasoning"].pass_at) == ["1", "2", "4", "6"]
    groups = list(scripted(right)(make_requests(tasks, samples=2, temperature=1.0)))
    graded = [replace(g, scores=(Score(value=float(n < 2)), Score(value=0.0))) for n, g in enumerate(groups)]
    found = summarise("sums", graded, baseline=False)
    assert found.pass_at["1"][0] == found.mean == 0.25 and found.pass_at["2"] == interval([1.0, 1.0, 0.0, 0.0])
    assert "pass@2 0.500" in table({"sums": found}) and "pass@" not in table({"sums": replace(found, pass_at={})})
