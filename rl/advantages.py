"""Advantages: from scored groups to the samples that are trained, each with its advantage, weight and beta.

    groups -> drop failures -> centre within the group -> drop groups without a difference -> mask truncated -> scale -> balance domains

A failure is not a score: the sample is dropped and counted. Every reward is centred within its own group before domains are weighed
against each other (GDPO, arXiv 2601.05242), so no domain's scale of reward speaks for its share of the gradient.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from winnow.rl.config_sections import AlgorithmConfig, DomainConfig
from winnow.rollout.schema import Group, Score, Trajectory


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """A trajectory to train on. `group` keeps the samples of one prompt together when a batch is split into updates."""

    trajectory: Trajectory
    group: int
    advantage: float
    weight: float = 1.0  # factor that balances the domains; its mean over the batch's sequences (or tokens) is 1
    beta: float = 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Advantages:
    """What is trained and what was left out, by reason."""

    samples: tuple[Sample, ...]
    metrics: Mapping[str, float] = field(default_factory=dict)


def compute_advantages(
    groups: Sequence[Group], algorithm: AlgorithmConfig, domains: Iterable[DomainConfig]
) -> Advantages:
    """Samples with advantages. Raises ValueError for a group that has no scores or whose domain is not configured."""
    table = {domain.name: domain for domain in domains}
    dropped: Counter[str] = Counter(failures=0, small_groups=0, zero_variance=0, truncated=0)
    samples: list[Sample] = []
    for number, group in enumerate(groups):
        domain = group.request.task.domain
        if domain not in table:
            raise ValueError(
                f"group {group.request.request_id} is of domain {domain!r}; the config has {sorted(table)}"
            )
        if len(group.scores) != len(group.trajectories):
            raise ValueError(
                f"group {group.request.request_id} has no scores: grade the groups before computing advantages"
            )
        scored = [(t, s) for t, s in zip(group.trajectories, group.scores, strict=True) if isinstance(s, Score)]
        dropped["failures"] += len(group.trajectories) - len(scored)
        if len(scored) < 2:
            dropped["small_groups"] += 1
            continue
        advantages = (
            part_advantages([score for _, score in scored], table[domain].parts, algorithm, group.request.request_id)
            if table[domain].parts
            else group_advantages(np.array([score.value for _, score in scored]), algorithm)
        )
        # Centring leaves rounding of the order of one ulp of the rewards; the group carries no signal then.
        if np.abs(advantages).max() < 1e-9:
            dropped["zero_variance"] += 1
            continue
        for (trajectory, _), advantage in zip(scored, advantages, strict=True):
            if algorithm.truncated == "mask" and trajectory.finish_reason in ("length", "abort"):
                dropped["truncated"] += 1
            elif trajectory.num_generated:
                samples.append(
                    Sample(trajectory=trajectory, group=number, advantage=float(advantage), beta=table[domain].beta)
                )
    if algorithm.advantage_scale == "batch" and samples:
        spread = max(float(np.std([sample.advantage for sample in samples])), algorithm.std_floor)
        samples = [replace(sample, advantage=sample.advantage / spread) for sample in samples]
    samples = balance_domains(samples, table, algorithm)
    return Advantages(samples=tuple(samples), metrics=_metrics(groups, samples, dropped))


def group_advantages(rewards: np.ndarray, algorithm: AlgorithmConfig) -> np.ndarray:
    """Advantages of one group's scored samples, fp64 [n] -> [n].

    R - mean (Dr.GRPO 2503.20783, DeepSeek-V3.2); with advantage_scale std divided by max(std, std_floor) (GRPO).
    """
    centred = rewards.astype(np.float64) - rewards.mean()
    return centred / max(float(centred.std()), algorithm.std_floor) if algorithm.advantage_scale == "std" else centred


def part_advantages(
    scores: Sequence[Score], weights: Mapping[str, float], algorithm: AlgorithmConfig, where: str
) -> np.ndarray:
    """GDPO (2601.05242): each reward part is centred and divided by its own std in the group before it is weighed. fp64 [n].

    A large or rare part then cannot drown the others: with rewards added first, (1, 0) and (0, 1) would be the same. Raises ValueError
    for a part that a score lacks.
    """
    for score in scores:
        if missing := sorted(set(weights) - set(score.parts)):
            raise ValueError(
                f"group {where}: the domain weighs part {missing[0]!r}, but a score has {sorted(score.parts)}: set domains.*.parts to "
                "names of that reward's parts"
            )
    total = np.zeros(len(scores))
    for name, weight in weights.items():
        values = np.array([score.parts[name] for score in scores], np.float64)
        centred = values - values.mean()
        total += weight * centred / max(float(centred.std()), algorithm.std_floor)
    return total


def balance_domains(
    samples: list[Sample], domains: Mapping[str, DomainConfig], algorithm: AlgorithmConfig
) -> list[Sample]:
    """Weights that give each present domain its configured share of the loss, however many of its samples survived.

    Counted in what the loss averages over: sequences, or tokens with aggregate token. A domain with share w_d / sum(w) of a batch of N
    has weight N * share / N_d; the weights sum to N, so denominators are unchanged. balance none: the weights are w_d as they stand.
    """
    if algorithm.balance == "none":
        return [replace(sample, weight=domains[sample.trajectory.domain].weight) for sample in samples]
    sizes: dict[str, float] = defaultdict(float)
    for sample in samples:
        sizes[sample.trajectory.domain] += sample.trajectory.num_generated if algorithm.aggregate == "token" else 1
    total, shares = sum(sizes.values()), sum(domains[name].weight for name in sizes)
    factors = {name: total * domains[name].weight / shares / size for name, size in sizes.items()}
    return [replace(sample, weight=factors[sample.trajectory.domain]) for sample in samples]


def _metrics(groups: Sequence[Group], samples: Sequence[Sample], dropped: Mapping[str, int]) -> dict[str, float]:
    metrics = {f"dropped/{reason}": float(count) for reason, count in dropped.items()}
    metrics["groups/kept_share"] = len({sample.group for sample in samples}) / max(1, len(groups))
    metrics["samples/trained"] = float(len(samples))
    if samples:
        values = np.array([sample.advantage for sample in samples])
        metrics["advantage/abs_mean"] = float(np.abs(values).mean())
    return metrics
