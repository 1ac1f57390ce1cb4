"""Advantages: what is dropped is counted, what stays is centred, and each domain has its share."""

from __future__ import annotations

import numpy as np
import pytest

from winnow.rl.advantages import compute_advantages
from winnow.rl.config_sections import AlgorithmConfig, DomainConfig
from winnow.rollout.schema import Failure, Group, Request, Sampling, Score, Task, Trajectory

DOMAINS = [DomainConfig(name="math", source="x"), DomainConfig(name="chat", source="x", beta=0.1)]


def make_group(
    name: str,
    rewards: list[float | None],
    domain: str = "math",
    lengths: list[int] | None = None,
    cut: tuple[int, ...] = (),
) -> Group:
    """A group of samples with these rewards; None is a failure, `cut` numbers the truncated ones."""
    task = Task(id=name, domain=domain, messages=({"role": "user", "content": "?"},), reward="number")
    request = Request(request_id=name, task=task, num_samples=len(rewards), sampling=Sampling(max_tokens=8))
    made = []
    for number, length in enumerate(lengths or [3] * len(rewards)):
        mask = np.arange(2 + length) >= 2
        made.append(
            Trajectory(
                request_id=name,
                sample=number,
                task_id=name,
                domain=domain,
                tokens=np.arange(2 + length, dtype=np.int32),
                loss_mask=mask,
                rollout_logprobs=np.where(mask, -1.0, 0).astype(np.float32),
                policy_versions=np.where(mask, 0, -1).astype(np.int32),
                finish_reason="length" if number in cut else "stop",
                messages=task.messages,
            )
        )
    scores = tuple(Failure(kind="timeout") if reward is None else Score(value=reward) for reward in rewards)
    return Group(request=request, trajectories=tuple(made), scores=scores)


def advantages_of(groups: list[Group], **settings: object) -> tuple[list[float], dict[str, float]]:
    result = compute_advantages(groups, AlgorithmConfig(**settings), DOMAINS)  # type: ignore[arg-type]
    return [round(sample.advantage, 6) for sample in result.samples], dict(result.metrics)


def test_centred_without_division_by_default() -> None:
    values, metrics = advantages_of([make_group("a", [1, 0, 0, 1])])
    assert values == [0.5, -0.5, -0.5, 0.5] and metrics["dropped/zero_variance"] == 0


def test_std_has_a_floor() -> None:
    assert advantages_of([make_group("a", [1, 0])], advantage_scale="std")[0] == [1.0, -1.0]
    assert advantages_of([make_group("a", [1e-4, 0])], advantage_scale="std", std_floor=1e-2)[0] == [0.005, -0.005]


def test_batch_scale_whitens_the_whole_batch() -> None:
    values, _ = advantages_of([make_group("a", [1, 0]), make_group("b", [3, 0])], advantage_scale="batch")
    assert np.std(values) == pytest.approx(1, abs=1e-5) and values[2] == pytest.approx(3 * values[0], rel=1e-5)


def test_failures_are_dropped_not_zero() -> None:
    values, metrics = advantages_of([make_group("a", [1, None, 0])])
    assert values == [0.5, -0.5] and metrics["dropped/failures"] == 1


def test_groups_without_two_scores_or_without_a_difference_are_dropped_and_counted() -> None:
    values, metrics = advantages_of(
        [make_group("a", [1, None]), make_group("b", [0.1, 0.1, 0.1]), make_group("c", [0, 1])]
    )
    assert values == [-0.5, 0.5]
    assert (metrics["dropped/small_groups"], metrics["dropped/zero_variance"], metrics["dropped/failures"]) == (1, 1, 1)
    assert metrics["groups/kept_share"] == pytest.approx(1 / 3)


def test_truncated_samples_count_in_the_mean_but_are_not_trained() -> None:
    groups = [make_group("a", [1, 0, 0, 0], cut=(3,))]
    values, metrics = advantages_of(groups)
    assert values == [0.75, -0.25, -0.25] and metrics["dropped/truncated"] == 1
    assert advantages_of(groups, truncated="keep")[0] == [0.75, -0.25, -0.25, -0.25]


@pytest.mark.parametrize("aggregate", ["sequence", "token"])
def test_each_domain_has_an_equal_share_however_many_samples_survive(aggregate: str) -> None:
    groups = [make_group("a", [1, 0, 0, 1], lengths=[2, 2, 2, 2]), make_group("b", [10, 0], "chat", lengths=[6, 8])]
    result = compute_advantages(groups, AlgorithmConfig(aggregate=aggregate), DOMAINS)
    mass = {"math": 0.0, "chat": 0.0}
    for sample in result.samples:
        mass[sample.trajectory.domain] += sample.weight * (
            sample.trajectory.num_generated if aggregate == "token" else 1
        )
    assert mass["math"] == pytest.approx(mass["chat"])
    assert sum(mass.values()) == pytest.approx(6 if aggregate == "sequence" else 22)
    assert {sample.beta for sample in result.samples if sample.trajectory.domain == "chat"} == {0.1}


def test_domain_weights_set_the_shares() -> None:
    domains = [DomainConfig(name="math", source="x", weight=3.0), DomainConfig(name="chat", source="x")]
    result = compute_advantages([make_group("a", [1, 0]), make_group("b", [1, 0], "chat")], AlgorithmConfig(), domains)
    assert [sample.weight for sample in result.samples] == [1.5, 1.5, 0.5, 0.5]


def test_ungraded_groups_and_unknown_domains_are_errors() -> None:
    group = make_group("a", [1, 0])
    with pytest.raises(ValueError, match="no scores"):
        advantages_of([Group(request=group.request, trajectories=group.trajectories)])
    with pytest.raises(ValueError, match="domain 'law'"):
        advantages_of([make_group("a", [1, 0], "law")])


def test_parts_are_normalised_in_their_group_before_they_are_weighed() -> None:
    # right 1, 0, 1, 0 has std 1/2; short 10, 10, 0, 0 has std 5: each becomes +-1, then 1 and 0.5 weigh them
    group = make_group("a", [11, 10, 1, 0])
    scores = tuple(
        Score(value=right + short, parts={"right": right, "short": short})
        for right, short in ((1.0, 10.0), (0.0, 10.0), (1.0, 0.0), (0.0, 0.0))
    )
    group = Group(request=group.request, trajectories=group.trajectories, scores=scores)
    domains = [DomainConfig(name="math", source="x", parts={"right": 1.0, "short": 0.5})]
    result = compute_advantages([group], AlgorithmConfig(), domains)
    assert [sample.advantage for sample in result.samples] == pytest.approx([1.5, -0.5, 0.5, -1.5])
    plain = [s.advantage for s in compute_advantages([group], AlgorithmConfig(), DOMAINS).samples]
    assert plain[1] > plain[2]  # added first, the large part decides
    with pytest.raises(ValueError, match="weighs part 'kind', but a score has"):
        compute_advantages([group], AlgorithmConfig(), [DomainConfig(name="math", source="x", parts={"kind": 1.0})])
