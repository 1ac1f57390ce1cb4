"""Exactly once, without processes: what the pool owes."""

import numpy as np
import pytest

from winnow.rollout.ledger import Ledger
from winnow.rollout.schema import Request, Sampling, Task, Trajectory


def request_of(name, samples=1):
    task = Task(id=name, domain="d", messages=({"role": "user", "content": "x"},), reward="r")
    return Request(request_id=name, task=task, num_samples=samples, sampling=Sampling(max_tokens=1))


def trajectory_of(job, sample):
    nothing = np.zeros(2, dtype=np.int32)
    return Trajectory(
        request_id=job.request.request_id, sample=sample, task_id=job.request.task.id, domain="d", tokens=nothing, loss_mask=nothing > 0,
        rollout_logprobs=nothing, policy_versions=nothing, finish_reason="stop", messages=(),
    )  # fmt: skip


def deliver(ledger, job, sample=0):
    ledger.deliver(job, sample, (trajectory_of(job, sample),))


def drained(call):
    return [call.outbox.get(timeout=1) for _ in range(call.outbox.qsize())]


def test_a_group_is_handed_over_once_whatever_comes_back():
    ledger = Ledger(3)
    call = ledger.open([request_of("a"), request_of("b")])
    (a, _), (b, _) = ledger.take(), ledger.take()
    assert ledger.lost(a, [0], OSError("gone"), "was lost") is None and list(ledger.line) == [a]  # first in line again
    deliver(ledger, a)
    deliver(ledger, a)  # the worker that was thought dead answers too
    assert ledger.names == {"b"}
    deliver(ledger, b)
    assert [g.request.request_id for g in drained(call)] == ["a", "b"] and not ledger.names


def test_a_late_result_of_a_dropped_call_does_not_close_a_new_request_of_that_name():
    ledger = Ledger(3)
    first = ledger.open([request_of("a")])
    old, _ = ledger.take()
    ledger.drop(first)
    second = ledger.open([request_of("a")])
    deliver(ledger, old)
    assert ledger.lost(old, [0], OSError("gone"), "was lost") is None
    assert not drained(first) and not drained(second) and ledger.names == {"a"} and len(ledger.line) == 1
    with pytest.raises(ValueError, match="'a' is used more than once"):
        ledger.open([request_of("z"), request_of("a")])
    assert ledger.names == {"a"} and len(ledger.line) == 1  # nothing of the refused call was taken


def test_a_request_that_cannot_succeed_ends_its_call_and_no_other():
    ledger = Ledger(2)
    doomed, other = ledger.open([request_of("a"), request_of("b")]), ledger.open([request_of("c")])
    job, _ = ledger.take()
    assert ledger.lost(job, [0], OSError("gone"), "was lost") is None
    assert ledger.lost(ledger.take()[0], [0], OSError("gone"), "was lost") is doomed
    [error] = drained(doomed)
    assert isinstance(error, RuntimeError) and "'a' was lost, attempt 2 of 2: OSError('gone')" in str(error)
    assert ledger.names == {"c"} and [job.request.request_id for job in ledger.line] == ["c"]
    assert ledger.lost(ledger.take()[0], [0], ValueError("wrong"), "failed") is other  # at once
    assert str(drained(other)[0]) == "wrong" and not ledger.names


def test_the_end_of_the_pool_reaches_every_open_call():
    ledger = Ledger(1)
    done, waiting = ledger.open([request_of("a")]), ledger.open([request_of("b")])
    job, _ = ledger.take()
    deliver(ledger, job)
    ledger.fail(RuntimeError("over"))
    assert len(drained(done)) == 1 and str(drained(waiting)[0]) == "over" and not ledger.line
    assert not drained(ledger.open([]))


def test_finished_samples_are_kept_and_only_the_others_are_sent_again():
    ledger = Ledger(2)
    call = ledger.open([request_of("a", 4), request_of("b")])
    a, samples = ledger.take()
    assert samples == [0, 1, 2, 3] and not a.waiting
    deliver(ledger, a, 2)
    deliver(ledger, a, 0)
    assert ledger.lost(a, [3], KeyError("x"), "failed") is None
    assert ledger.lost(a, [1], OSError("gone"), "was lost") is None
    assert ledger.take() == (a, [1, 3]), "once in line, first, with both"
    deliver(ledger, a, 3)
    deliver(ledger, a, 2)  # once more, from a worker that was thought dead
    assert not drained(call) and a.attempts == {1: 1, 3: 1}
    deliver(ledger, a, 1)
    [group] = drained(call)
    assert [t.sample for t in group.trajectories] == [0, 1, 2, 3] and group.request.num_samples == 4
    with pytest.raises(ValueError, match="'c' asks for 0 samples"):
        ledger.open([request_of("c", 0)])
    b, _ = ledger.take()
    assert (
        ledger.lost(b, [0], OSError("gone"), "was lost") is None and ledger.lost(b, [0], OSError(), "was lost") is call
    )
