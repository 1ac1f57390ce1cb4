"""Packing: shifted to predicting positions, nothing lost, nothing padded, denominators of the whole batch."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from winnow.rl.advantages import Sample
from winnow.rl.batching import TrainBatch, make_batch, make_sft_batch
from winnow.rollout.schema import IndexRecord, KeptSets, Trajectory


def trajectory(name: str, mask: list[int], temperature: float = 1.0, **extra: object) -> Trajectory:
    trained = np.array(mask, bool)
    rng = np.random.default_rng(len(mask) + len(name))
    return Trajectory(
        request_id=name, sample=0, task_id=name, domain="d", tokens=rng.integers(1, 99, len(mask)).astype(np.int32), loss_mask=trained,
        rollout_logprobs=np.where(trained, -rng.random(len(mask)), 0).astype(np.float32),
        policy_versions=np.where(trained, 0, -1).astype(np.int32), finish_reason="stop", messages=(), temperature=temperature, **extra,  # type: ignore[arg-type]
    )  # fmt: skip


def sample(made: Trajectory, advantage: float = 1.0, group: int = 0, **extra: float) -> Sample:
    return Sample(trajectory=made, group=group, advantage=advantage, **extra)  # type: ignore[arg-type]


def pairs(batch: TrainBatch) -> set[tuple[str, int, int, float]]:
    """(key, input token, predicted token, rollout log-probability) of every trained position."""
    found = set()
    for update in batch.updates:
        for micro in update.micro_batches:
            for number, (row, seq) in enumerate(zip(micro.rows, micro.sequence_ids, strict=True)):
                assert micro.cu_seqlens[seq] <= row < micro.cu_seqlens[seq + 1]
                found.add(
                    (
                        micro.keys[seq],
                        int(micro.tokens[row]),
                        int(micro.targets[number]),
                        float(micro.rollout_logprobs[number]),
                    )
                )
    return found


MASKS = {"a": [0, 0, 1, 1, 1], "b": [0, 1, 1, 0, 0, 1, 0, 0], "c": [0, 0, 0, 1]}


@pytest.mark.parametrize("micro_tokens", [1, 6, 9, 100])
def test_every_trained_token_is_predicted_from_the_one_before_it(micro_tokens: int) -> None:
    made = {name: trajectory(name, mask) for name, mask in MASKS.items()}
    batch = make_batch([sample(t) for t in made.values()], step=3, micro_tokens=micro_tokens)
    want = {
        (t.key, int(t.tokens[i - 1]), int(t.tokens[i]), float(t.rollout_logprobs[i]))
        for t in made.values()
        for i in np.flatnonzero(t.loss_mask)
    }
    assert pairs(batch) == want and batch.num_trained_tokens == 7
    micros = batch.updates[0].micro_batches
    assert all(len(m.tokens) <= max(micro_tokens, 5) for m in micros)
    assert sum(len(m.tokens) for m in micros) == 4 + 5 + 3  # up to the last trained token: b's tail is cut
    assert batch.updates[0].denominators.sequences == 3 and batch.updates[0].denominators.tokens == 7


def test_idle_sequences_are_not_run_but_stay_in_the_denominators() -> None:
    samples = [sample(trajectory("a", MASKS["a"]), 0.0), sample(trajectory("c", MASKS["c"]), 1.0)]
    update = make_batch(samples, step=0, micro_tokens=100).updates[0]
    assert (
        update.micro_batches[0].keys == ("c/0",)
        and update.denominators.sequences == 2
        and update.denominators.tokens == 4
    )
    assert len(make_batch(samples, step=0, micro_tokens=100, keep_idle=True).updates[0].micro_batches[0].keys) == 2
    pulled = [replace(samples[0], beta=0.1), samples[1]]
    assert len(make_batch(pulled, step=0, micro_tokens=100).updates[0].micro_batches[0].keys) == 2


def test_kept_sets_follow_the_trained_tokens() -> None:
    kept = KeptSets(indptr=np.array([0, 0, 0, 2, 2, 5]), token_ids=np.array([1, 2, 3, 4, 5], np.int32))
    with_sets, without = trajectory("a", MASKS["a"], kept_sets=kept), trajectory("c", MASKS["c"])
    micro = make_batch([sample(with_sets), sample(without)], step=0, micro_tokens=100).updates[0].micro_batches[0]
    assert micro.kept_sets is not None
    rows = [
        micro.kept_sets.token_ids[i:j].tolist()
        for i, j in zip(micro.kept_sets.indptr, micro.kept_sets.indptr[1:], strict=False)
    ]
    assert rows == [[1, 2], [], [3, 4, 5], []]  # a's three tokens, then c's one: the whole vocabulary
    assert (
        make_batch([sample(with_sets)], step=0, micro_tokens=9, kept_sets=False).updates[0].micro_batches[0].kept_sets
        is None
    )


def test_index_records_are_cut_with_the_inputs() -> None:
    record = IndexRecord(first=2, k=2, layers=(0,), indices=np.arange(10, dtype=np.uint16).reshape(1, 5, 2))
    made = trajectory("b", MASKS["b"], index_record=record)
    micro = make_batch([sample(made)], step=0, micro_tokens=100).updates[0].micro_batches[0]
    assert micro.index_records[0] is not None and micro.index_records[0].indices.shape == (1, 3, 2)  # inputs 0..4


def test_updates_keep_groups_whole_and_cover_the_batch() -> None:
    samples = [sample(trajectory(f"g{group}", MASKS["a"]), group=group) for group in range(5) for _ in range(3)]
    batch = make_batch(samples, step=0, micro_tokens=8, updates=2)
    groups = [{key for m in update.micro_batches for key in m.keys} for update in batch.updates]
    assert len(groups) == 2 and not groups[0] & groups[1] and len(groups[0] | groups[1]) == 5
    assert sum(update.denominators.sequences for update in batch.updates) == 15
    assert make_batch([], step=0, micro_tokens=8).updates == ()


def test_samples_of_two_temperatures_or_greedy_ones_are_refused() -> None:
    with pytest.raises(ValueError, match=r"temperatures \[0.5, 1.0\]"):
        make_batch([sample(trajectory("a", [0, 1], 0.5)), sample(trajectory("c", [0, 1]))], step=0, micro_tokens=8)
    with pytest.raises(ValueError, match="greater than 0"):
        make_batch([sample(trajectory("a", [0, 1], 0.0))], step=0, micro_tokens=8)


def test_sft_batches_count_ce_tokens_only() -> None:
    tokens = np.arange(1, 6)
    batch = make_sft_batch([(tokens, tokens > 3), (tokens, tokens > 9)], step=1, micro_tokens=100)
    update = batch.updates[0]
    assert update.denominators.ce_tokens == 2 and update.denominators.sequences == 0
    assert update.micro_batches[0].targets.tolist() == [4, 5]
    with pytest.raises(ValueError, match="no trained token"):
        make_sft_batch([(tokens, tokens > 9)], step=1, micro_tokens=100)


def test_a_trained_first_token_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="a/0: the first token"):
        make_batch([sample(trajectory("a", [1, 1]))], step=0, micro_tokens=8)
