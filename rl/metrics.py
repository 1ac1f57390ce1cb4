"""Numbers of a step: sums that merge over micro-batches and ranks, and the metrics read off groups and log-probabilities."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from winnow.rollout.schema import Failure, Group, Score

Number = float | int | torch.Tensor


@dataclass
class Tally:
    """Means, sums and maxima that merge: name -> (total, count), name -> sum, name -> largest. Tensors stay put until `result`."""

    totals: dict[str, tuple[Number, Number]] = field(default_factory=dict)
    sums: dict[str, Number] = field(default_factory=dict)
    peaks: dict[str, Number] = field(default_factory=dict)

    def add(self, name: str, total: Number, count: Number) -> None:
        old_total, old_count = self.totals.get(name, (0.0, 0.0))
        self.totals[name] = (old_total + total, old_count + count)

    def sum(self, name: str, value: Number) -> None:
        self.sums[name] = self.sums.get(name, 0.0) + value

    def peak(self, name: str, value: Number) -> None:
        old = self.peaks.get(name)
        self.peaks[name] = value if old is None else torch.maximum(torch.as_tensor(old), torch.as_tensor(value))

    def merge(self, other: Tally) -> None:
        for name, (total, count) in other.totals.items():
            self.add(name, total, count)
        for name, value in other.sums.items():
            self.sum(name, value)
        for name, value in other.peaks.items():
            self.peak(name, value)

    def floats(self) -> Tally:
        """The same in plain numbers, to be sent."""
        return Tally(
            totals={name: (float(total), float(count)) for name, (total, count) in self.totals.items()},
            sums={name: float(value) for name, value in self.sums.items()},
            peaks={name: float(value) for name, value in self.peaks.items()},
        )

    def result(self) -> dict[str, float]:
        """Everything as floats; a mean over nothing is 0."""
        means = {
            name: float(total) / float(count) if float(count) else 0.0 for name, (total, count) in self.totals.items()
        }
        return {**means, **{name: float(value) for name, value in {**self.sums, **self.peaks}.items()}}


def mismatch_metrics(learner: np.ndarray, rollout: np.ndarray) -> dict[str, float]:
    """How far the rollout's log-probabilities are from the learner's under the same weights. Both fp32 [tokens], natural log.

    k3 estimates KL(rollout || learner) from the rollout's own tokens (Schulman): mean of exp(d) - d - 1 with d = learner - rollout.
    Agreement of a token is exp(-|d|), the smaller of its two probability ratios; its low percentiles show what a mean hides.
    """
    if not len(learner):  # nothing was sampled that is trained: no token disagrees
        learner = rollout = np.zeros(1, np.float32)
    d = learner.astype(np.float64) - rollout.astype(np.float64)
    agreement = np.exp(-np.abs(d))
    return {
        "mismatch/k3_kl": float(np.mean(np.expm1(d) - d)),
        "mismatch/max_abs": float(np.abs(d).max()),
        "mismatch/mean_abs": float(np.abs(d).mean()),
        "mismatch/agreement_p5": float(np.percentile(agreement, 5)),
        "mismatch/agreement_p1": float(np.percentile(agreement, 1)),
        "mismatch/max_ratio": float(np.exp(np.abs(d).max())),
    }


def group_metrics(groups: Sequence[Group], version: int) -> dict[str, float]:
    """Reward, parts, length, truncation, failures, token share and staleness of scored groups, per domain and in all.

    `version` is the policy version that is about to be trained; staleness is how many versions behind the oldest token is.
    """
    rewards, lengths, cut, parts = (defaultdict(list) for _ in range(4))
    failures: Counter[str] = Counter()
    staleness = 0
    for group in groups:
        for trajectory, score in zip(group.trajectories, group.scores, strict=True):
            lengths[trajectory.domain].append(trajectory.num_generated)
            cut[trajectory.domain].append(trajectory.finish_reason == "length")
            drawn = trajectory.policy_versions[trajectory.loss_mask]
            staleness = max(staleness, version - int(drawn.min())) if len(drawn) else staleness
            if isinstance(score, Failure):
                failures[score.kind] += 1
                failures[f"{trajectory.domain}/{score.kind}"] += 1
            elif isinstance(score, Score):
                rewards[trajectory.domain].append(score.value)
                for name, value in score.parts.items():
                    parts[f"{trajectory.domain}/{name}"].append(value)
    everything = [value for values in rewards.values() for value in values]
    tokens = {domain: sum(values) for domain, values in lengths.items()}
    metrics = {"reward/mean": float(np.mean(everything)) if everything else 0.0, "staleness/max": float(staleness)}
    metrics |= {f"reward/{domain}": float(np.mean(values)) for domain, values in sorted(rewards.items())}
    metrics |= {f"part/{name}": float(np.mean(values)) for name, values in sorted(parts.items())}
    metrics |= {f"length/{domain}": float(np.mean(values)) for domain, values in sorted(lengths.items())}
    metrics |= {f"truncated/{domain}": float(np.mean(values)) for domain, values in sorted(cut.items())}
    metrics |= {
        f"token_share/{domain}": count / max(1, sum(tokens.values())) for domain, count in sorted(tokens.items())
    }
    return (
        metrics
        | record_metrics(groups)
        | {f"failures/{kind}": float(count) for kind, count in sorted({"timeout": 0, "error": 0, **failures}.items())}
    )


def record_metrics(groups: Sequence[Group]) -> dict[str, float]:
    """index_record/bytes_per_token: packed bytes of the index records by generated token; index_record/share_of_int32: by the bytes of
    the same sets as int32; expert_record/bytes_per_token: packed bytes of the expert records by generated token. Nothing of what is not
    recorded."""
    tokens = sum(trajectory.num_generated for group in groups for trajectory in group.trajectories)
    routed = [t.expert_record.nbytes for group in groups for t in group.trajectories if t.expert_record is not None]
    metrics = {"expert_record/bytes_per_token": sum(routed) / max(1, tokens)} if routed else {}
    records = [t.index_record for group in groups for t in group.trajectories if t.index_record is not None]
    if not records:
        return metrics
    packed = sum(record.nbytes for record in records)
    raw = sum(4 * len(record.layers) * record.num_rows * record.k for record in records)
    return metrics | {
        "index_record/bytes_per_token": packed / max(1, tokens),
        "index_record/share_of_int32": packed / raw if raw else 0.0,
    }


def engine_metrics(before: Mapping[int, Mapping[str, int]], now: Mapping[int, Mapping[str, int]]) -> dict[str, float]:
    """What the engines did between two readings of `pool.stats()`; a worker that was replaced counts from its start.

    engine/reused_tokens: prompt tokens that were found in the cache, not computed; engine/reused_share: of all prompt tokens.
    """

    def grown(name: str) -> float:
        counts = [(stats.get(name, 0), before.get(worker, {}).get(name, 0)) for worker, stats in now.items()]
        return float(sum(new - old if new >= old else new for new, old in counts))

    reused, computed = grown("reused_tokens"), grown("prefill_tokens")
    return {
        "engine/reused_tokens": reused,
        "engine/reused_share": reused / max(1.0, reused + computed),
        "engine/preemptions": grown("preemptions"),
    }


def speed_metrics(times: Mapping[str, float], groups: Sequence[Group]) -> dict[str, float]:
    """`time/<stage>_s` of each stage, generated tokens per second of rollout, samples per second of the whole step."""
    tokens = sum(trajectory.num_generated for group in groups for trajectory in group.trajectories)
    samples = sum(len(group.trajectories) for group in groups)
    metrics = {f"time/{stage}_s": seconds for stage, seconds in times.items()}
    metrics["tokens/rollout_per_s"] = tokens / max(times.get("rollout", 0.0), 1e-9)
    # from step to step, whatever the schedule: waiting for rollouts, grading and pushing weights
    metrics["learner/idle_share"] = 1.0 - times.get("learn", 0.0) / max(sum(times.values()), 1e-9)
    metrics["samples_per_s"] = samples / max(sum(times.values()), 1e-9)
    return metrics
