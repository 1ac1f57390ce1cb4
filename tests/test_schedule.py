"""Schedules: the order of rollouts and updates, the bound on staleness, the learner's idle time; prompts that replace idle ones."""

from __future__ import annotations

import pickle
import queue
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from winnow.rl.config import Config, make_config
from winnow.rl.config_sections import ScheduleConfig
from winnow.rl.dynamic import refill
from winnow.rl.sampler import TaskSampler
from winnow.rl.schedule import Rollouts, read_in_flight
from winnow.rollout.schema import Failure, Group, Request, Sampling, Score, Task, Trajectory

TOKENS = 4


def request(step: int, number: int) -> Request:
    task = Task(id=f"{step}-{number}", domain="d", messages=({"role": "user", "content": "?"},), reward="number")
    return Request(request_id=f"{step}/{number}", task=task, num_samples=1, sampling=Sampling(max_tokens=TOKENS))


class SlowPool:
    """One worker in a thread: a step's requests take `seconds(step)`; every token has the version of the moment it is drawn."""

    def __init__(self, seconds: Any) -> None:
        self.seconds, self.version, self.sent = seconds, 0, []  # type: ignore[var-annotated]
        self.inbox: queue.Queue = queue.Queue()
        threading.Thread(target=self.work, daemon=True).start()

    def generate(self, requests: Sequence[Request]) -> Iterator[Group]:
        outbox: queue.Queue = queue.Queue()
        self.sent.append((requests[0].request_id.split("/")[0], self.version))
        self.inbox.put((list(requests), outbox))
        return (outbox.get(timeout=20) for _ in requests)

    def work(self) -> None:
        while True:
            requests, outbox = self.inbox.get()
            versions: list[list[int]] = [[] for _ in requests]
            for _ in range(TOKENS):
                time.sleep(self.seconds(int(requests[0].request_id.split("/")[0])) / TOKENS)
                for drawn in versions:
                    drawn.append(self.version)
            for made, drawn in reversed(list(zip(requests, versions, strict=True))):
                outbox.put(group_of(made, drawn))


def group_of(made: Request, versions: Sequence[int], scores: Any = ()) -> Group:
    mask = np.arange(1 + len(versions)) >= 1
    trajectory = Trajectory(
        request_id=made.request_id, sample=0, task_id=made.task.id, domain=made.task.domain, tokens=np.zeros(len(mask), np.int32),
        loss_mask=mask, rollout_logprobs=np.zeros(len(mask), np.float32), policy_versions=np.array([-1, *versions], np.int32),
        finish_reason="stop", messages=(),
    )  # fmt: skip
    count = max(1, len(scores))
    return Group(request=made, trajectories=tuple(replace(trajectory, sample=n) for n in range(count)), scores=scores)


def run(schedule: ScheduleConfig, seconds: Any, learn_s: float, first: int = 1) -> tuple[float, list[int], SlowPool]:
    """A driver's loop with sleeps for updates: the learner's idle share after the first step, each step's oldest token, the pool."""
    pool = SlowPool(seconds)
    pool.version = first - 1
    rollouts = Rollouts(lambda step: [request(step, n) for n in range(3)], schedule)
    idle, start, staleness = 0.0, 0.0, []
    for step in range(first, schedule.steps + 1):
        before = time.perf_counter()
        groups = rollouts.take(step, pool)
        if step > first:
            idle += time.perf_counter() - before
        else:
            start = time.perf_counter()  # every schedule waits for the first rollout
        assert [group.request.request_id for group in groups] == [f"{step}/{n}" for n in range(3)]
        staleness.append(
            step - 1 - min(int(v) for g in groups for t in g.trajectories for v in t.policy_versions[t.loss_mask])
        )
        time.sleep(learn_s)
        pool.version = step
    return idle / (time.perf_counter() - start), staleness, pool


def test_idle_falls_from_sync_to_one_step_off_to_async_and_staleness_keeps_its_bound() -> None:
    def uneven(step: int) -> float:
        return 0.14 if step % 3 == 0 else 0.02

    found = {}
    for kind, bound in (("sync", 0), ("one_step_off", 1), ("async", 3)):
        share, staleness, pool = run(ScheduleConfig(kind=kind, max_staleness=3, steps=10), uneven, 0.07)
        found[kind] = share
        assert max(staleness) <= bound and [step for step, _ in pool.sent] == [str(s) for s in range(1, 11)]
        if kind != "sync":
            assert max(staleness) > 0  # it does run ahead
    assert found["sync"] > found["one_step_off"] + 0.05 > found["async"] + 0.08, found


def test_a_run_that_goes_on_at_a_later_step_and_steps_that_end() -> None:
    _, staleness, pool = run(ScheduleConfig(kind="async", max_staleness=4, steps=9), lambda step: 0.01, 0.01, first=6)
    assert [step for step, _ in pool.sent] == ["6", "7", "8", "9"] and max(staleness) <= 4


def test_a_rollout_that_outlives_an_update_has_tokens_of_both_versions() -> None:
    pool = SlowPool(lambda step: 0.2)
    rollouts = Rollouts(lambda step: [request(step, 0)], ScheduleConfig(kind="one_step_off", steps=2))
    rollouts.take(1, pool)
    time.sleep(0.1)
    pool.version = 1
    versions = rollouts.take(2, pool)[0].trajectories[0].policy_versions[1:].tolist()
    assert versions == sorted(versions) and set(versions) == {0, 1}


def test_a_token_beyond_the_bound_stops_the_run() -> None:
    class Stale:
        def generate(self, requests: Sequence[Request]) -> Iterator[Group]:
            yield from (group_of(r, [0] * TOKENS) for r in requests)

    rollouts = Rollouts(lambda step: [request(step, 0)], ScheduleConfig(kind="one_step_off", steps=9))
    rollouts.take(1, Stale())
    rollouts.take(2, Stale())
    with pytest.raises(RuntimeError, match=r"3/0/0 has tokens of version 0, 2 behind version 2.*allows 1"):
        rollouts.take(3, Stale())


def dynamic_config(rounds: int) -> Config:
    domain = {"source": "x", "count": 20, "quota": 2}
    return make_config(
        {
            "model": {"path": "m"}, "domains": [{"name": "a", **domain}, {"name": "b", **domain}],
            "algorithm": {"dynamic_rounds": rounds},
        }
    )  # fmt: skip


def scored(made: Request, *values: float | None) -> Group:
    return group_of(made, [0] * TOKENS, tuple(Failure(kind="error") if v is None else Score(value=v) for v in values))


def test_idle_prompts_are_replaced_inside_their_domain() -> None:
    config = dynamic_config(rounds=3)
    tasks = {
        name: [
            Task(id=f"{name}{i}", domain=name, messages=({"role": "user", "content": "?"},), reward="n")
            for i in range(20)
        ]
        for name in ("a", "b")
    }
    sampler = TaskSampler(tasks, config)
    first = sampler.requests(1)
    groups = [scored(r, 1, 0) if r.task.domain == "b" else scored(r, 1, 1) for r in first]
    played: list[list[Request]] = []

    def play(requests: Sequence[Request]) -> list[Group]:
        played.append(list(requests))
        return [scored(r, 0, 1) if len(played) > 1 else scored(r, None, 1) for r in requests]

    full, metrics = refill(config, sampler, 1, groups, play)
    assert [len(requests) for requests in played] == [2, 2] and full[: len(groups)] == groups
    extra = [r for requests in played for r in requests]
    assert {r.task.domain for r in extra} == {"a"}  # b had its quota
    assert len({r.task.id for r in (*first, *extra)}) == 8 and len({r.request_id for r in (*first, *extra)}) == 8
    assert metrics == {"dynamic/extra_prompts": 4.0, "dynamic/missing": 0.0}
    again: list[list[Request]] = []
    refill(
        config,
        sampler,
        1,
        groups,
        lambda requests: again.append(list(requests)) or [scored(r, None, 1) for r in requests],
    )
    assert again[0] == played[0] and len(again) == 3  # the same prompts in every run of the step; rounds are bounded
    assert refill(dynamic_config(0), sampler, 1, groups, play) == (
        groups,
        {"dynamic/extra_prompts": 0.0, "dynamic/missing": 2.0},
    )


class EagerPool:
    """Finishes everything but `slow` ids at once; `ready` says what has come, as a real pool's iterator does."""

    def __init__(self, slow: set[str] = frozenset()) -> None:  # type: ignore[assignment]
        self.asked: list[str] = []
        self.slow, self.cancelled = set(slow), 0

    def generate(self, requests: Sequence[Request]) -> Any:
        self.asked += [r.request_id for r in requests]
        pool = self

        class Arriving:
            def __init__(self) -> None:
                self.left = [group_of(r, [0] * TOKENS) for r in requests]

            def __iter__(self) -> Any:
                return self

            def __next__(self) -> Group:
                if not self.left:
                    raise StopIteration
                return self.left.pop()

            def ready(self) -> list[Group]:
                return [group for group in self.left if group.request.request_id not in pool.slow]

            def close(self) -> None:
                pool.cancelled += len(self.left)

        return Arriving()


def test_what_is_in_flight_goes_into_a_checkpoint_and_only_the_rest_is_asked_for_again(tmp_path: Path) -> None:
    def make(step: int) -> list[Request]:
        return [request(step, n) for n in range(3)]

    schedule = ScheduleConfig(kind="async", max_staleness=2, steps=9)
    pool = EagerPool(slow={"2/1", "3/0"})
    with Rollouts(make, schedule) as rollouts:
        rollouts.take(1, pool)
        assert pool.asked == [f"{s}/{n}" for s in (1, 2, 3) for n in range(3)]
        rollouts.save(tmp_path, 1)
        kept = {g.request.request_id for g in rollouts.in_flight(0)}
        assert {"1/0", "1/1", "1/2"} <= kept  # taken but not trained: Ctrl-C between the two loses nothing
    assert pool.cancelled == 6
    found = read_in_flight(tmp_path)
    assert [g.request.request_id for g in found] == ["2/0", "2/2", "3/1", "3/2"]
    again = EagerPool()
    rollouts = Rollouts(make, schedule, [*found, group_of(replace(request(4, 0), num_samples=7), [0])])
    groups = rollouts.take(2, again)
    assert again.asked == ["2/1", "3/0", "4/0", "4/1", "4/2"]  # 4/0 is another request by now
    assert [g.request.request_id for g in groups] == ["2/0", "2/1", "2/2"]
    assert [g.request.request_id for g in rollouts.take(3, again)] == ["3/0", "3/1", "3/2"]
    assert read_in_flight(None) == [] == read_in_flight(tmp_path / "none")


def test_a_checkpoint_of_somebody_elses_cannot_run_code(tmp_path: Path) -> None:
    (tmp_path / "in_flight.pkl").write_bytes(pickle.dumps([eval]))
    with pytest.raises(ValueError, match=r"names builtins\.eval, which is no rollout type"):
        read_in_flight(tmp_path)
