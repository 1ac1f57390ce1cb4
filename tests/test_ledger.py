"""Exactly once, without processes: what the pool owes."""

import pytest

from winnow.rollout.ledger import Ledger
from winnow.rollout.schema import Group, Request, Sampling, Task


def request_of(name):
    task = Task(id=name, domain="d", messages=({"role": "user", "content": "x"},), reward="r")
    return Request(request_id=name, task=task, num_samples=1, sampling=Sampling(max_tokens=1))


def group_of(job):
    return Group(request=job.request, trajectories=())


def drained(call):
    return [call.outbox.get(timeout=1) for _ in range(call.outbox.qsize())]


def test_a_group_is_handed_over_once_whatever_comes_back():
    ledger = Ledger(3)
    call = ledger.open([request_of("a"), request_of("b")])
    a, b = ledger.line.popleft(), ledger.line.popleft()
    assert ledger.lost(a, OSError("gone"), "was lost") is None and list(ledger.line) == [a]  # first in line again
    ledger.deliver(a, group_of(a))
    ledger.deliver(a, group_of(a))  # the worker that was thought dead answers too
    assert ledger.names == {"b"}
    ledger.deliver(b, group_of(b))
    assert [g.request.request_id for g in drained(call)] == ["a", "b"] and not ledger.names


def test_a_late_result_of_a_dropped_call_does_not_close_a_new_request_of_that_name():
    ledger = Ledger(3)
    first = ledger.open([request_of("a")])
    old = ledger.line.popleft()
    ledger.drop(first)
    second = ledger.open([request_of("a")])
    ledger.deliver(old, group_of(old))
    assert ledger.lost(old, OSError("gone"), "was lost") is None
    assert not drained(first) and not drained(second) and ledger.names == {"a"} and len(ledger.line) == 1
    with pytest.raises(ValueError, match="'a' is used more than once"):
        ledger.open([request_of("z"), request_of("a")])
    assert ledger.names == {"a"} and len(ledger.line) == 1  # nothing of the refused call was taken


def test_a_request_that_cannot_succeed_ends_its_call_and_no_other():
    ledger = Ledger(2)
    doomed, other = ledger.open([request_of("a"), request_of("b")]), ledger.open([request_of("c")])
    job = ledger.line.popleft()
    assert ledger.lost(job, OSError("gone"), "was lost") is None
    assert ledger.lost(ledger.line.popleft(), OSError("gone"), "was lost") is doomed
    [error] = drained(doomed)
    assert isinstance(error, RuntimeError) and "'a' was lost, attempt 2 of 2: OSError('gone')" in str(error)
    assert ledger.names == {"c"} and [job.request.request_id for job in ledger.line] == ["c"]
    assert ledger.lost(ledger.line.popleft(), ValueError("wrong"), "failed") is other  # at once
    assert str(drained(other)[0]) == "wrong" and not ledger.names


def test_the_end_of_the_pool_reaches_every_open_call():
    ledger = Ledger(1)
    done, waiting = ledger.open([request_of("a")]), ledger.open([request_of("b")])
    job = ledger.line.popleft()
    ledger.deliver(job, group_of(job))
    ledger.fail(RuntimeError("over"))
    assert len(drained(done)) == 1 and str(drained(waiting)[0]) == "over" and not ledger.line
    assert not drained(ledger.open([]))
