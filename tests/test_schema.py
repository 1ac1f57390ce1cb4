"""The types between processes refuse what does not fit, where it is made."""

import numpy as np
import pytest

from winnow.rollout.schema import Group, IndexRecord, KeptSets, Request, Sampling, Score, Task, Trajectory

TASK = Task(id="t", domain="d", messages=({"role": "user", "content": "hi"},), reward="r")
REQUEST = Request(request_id="q", task=TASK, num_samples=1, sampling=Sampling(max_tokens=3))


def trajectory(tokens=5, **changes):
    fields = {
        "request_id": "q", "sample": 0, "task_id": "t", "domain": "d", "tokens": np.zeros(tokens, np.int32), "loss_mask": np.zeros(tokens, bool),
        "rollout_logprobs": np.zeros(tokens, np.float32), "policy_versions": np.zeros(tokens, np.int32), "finish_reason": "stop",
        "messages": ({"role": "assistant", "content": "yes"}, {"role": "tool", "content": "no"}),
    }  # fmt: skip
    return Trajectory(**{**fields, **changes})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_tokens", 0),
        ("temperature", -0.1),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.5),
        ("min_p", 1.0),
        ("stop", "text"),
        ("stop", ("",)),
    ],
)
def test_sampling_ranges(field, value):
    with pytest.raises(ValueError, match=rf"sampling\.{field} is "):
        Sampling(**{"max_tokens": 1, field: value})


def test_filters():
    assert not Sampling(max_tokens=1, temperature=0, top_k=4).filters
    assert Sampling(max_tokens=1, top_p=0.9).filters and not Sampling(max_tokens=1).filters


@pytest.mark.parametrize("field", ["loss_mask", "rollout_logprobs", "policy_versions"])
def test_unequal_lengths(field):
    with pytest.raises(ValueError, match=f"trajectory q/0: {field} has 4 entries for 5 tokens"):
        trajectory(**{field: np.zeros(4)})


def test_trajectory():
    assert trajectory().reply == "yes" and trajectory().key == "q/0" and trajectory().num_generated == 0
    with pytest.raises(ValueError, match="finish_reason 'maybe'"):
        trajectory(finish_reason="maybe")
    with pytest.raises(ValueError, match="kept sets cover 3 of 5"):
        trajectory(kept_sets=KeptSets(indptr=np.zeros(4, np.int64), token_ids=np.zeros(0, np.int32)))
    record = IndexRecord(first=2, k=2, layers=(0,), indices=np.zeros((1, 2, 2), np.uint16))
    assert trajectory(index_record=record).index_record.num_rows == 2
    with pytest.raises(ValueError, match="2 rows from position 2, want 3 for 6 tokens"):
        trajectory(6, index_record=record)
    with pytest.raises(ValueError, match="want"):
        IndexRecord(first=2, k=3, layers=(0,), indices=np.zeros((1, 2, 2), np.uint16))
    with pytest.raises(ValueError, match="indptr ends at 2"):
        KeptSets(indptr=np.array([0, 2]), token_ids=np.zeros(1, np.int32))


def test_group_and_score():
    with pytest.raises(ValueError, match="1 scores for 2"):
        Group(request=REQUEST, trajectories=(trajectory(), trajectory(sample=1)), scores=(Score(value=1.0),))
    with pytest.raises(ValueError, match="other requests"):
        Group(request=REQUEST, trajectories=(trajectory(request_id="z"),))
    with pytest.raises(ValueError, match="part is nan"):
        Score(value=1.0, parts={"part": float("nan")})
    with pytest.raises(ValueError, match="no messages"):
        Task(id="t", domain="d", messages=(), reward="r")
