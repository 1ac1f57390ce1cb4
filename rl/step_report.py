"""What a step says of itself: the report, the refusal, and the small measures that go into them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from winnow.rl.batching import MicroBatch
from winnow.rl.metrics import mismatch_metrics


class StepRefused(RuntimeError):
    """A step that would have damaged the model. The message says what, where, and where the batch was saved."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StepReport:
    """What a step did. Metrics are named as in metrics.jsonl."""

    step: int
    metrics: Mapping[str, float] = field(default_factory=dict)


def where(index: int, micro: MicroBatch, values: Tensor) -> str:
    """Which sequences of a micro-batch have a value that is not finite."""
    bad = (~torch.isfinite(values.detach())).cpu().numpy()
    keys = [micro.keys[i] for i in sorted(set(micro.sequence_ids[bad]))] or list(micro.keys)
    return f", micro-batch {index + 1}, sequences {', '.join(keys[:4])}{' ...' if len(keys) > 4 else ''}"


def shares(norms: Mapping[str, float]) -> dict[str, float]:
    """grad_norm_of/<domain>, before the clip, and each one's share of their sum: what 'equal share of the gradient' comes to."""
    total = sum(norms.values()) or 1.0
    return {f"grad_norm_of/{name}": norm for name, norm in norms.items()} | {
        f"grad_share/{name}": norm / total for name, norm in norms.items()
    }


# What a step without anything to train reports, so that every line of metrics.jsonl has the same names.
STILL = {
    "loss/policy": 0.0,
    "clip_fraction": 0.0,
    "entropy": 0.0,
    "grad_norm": 0.0,
    "index/jaccard": 1.0,
    "index/selected_share": 1.0,
    "index/sparse_rows": 0.0,
}


@dataclass
class Drift:
    """The learner's and the rollout's log-probabilities of a step's first update, gathered over micro-batches."""

    learner: list[np.ndarray] = field(default_factory=list)
    rollout: list[np.ndarray] = field(default_factory=list)

    def add(self, learner: Tensor, rollout: np.ndarray) -> None:
        self.learner.append(learner.float().cpu().numpy())
        self.rollout.append(rollout)

    @classmethod
    def joined(cls, ranks: Sequence[Drift]) -> Drift:
        return cls([a for part in ranks for a in part.learner], [a for part in ranks for a in part.rollout])

    def metrics(self) -> dict[str, float]:
        empty = [np.zeros(0, np.float32)]
        return mismatch_metrics(np.concatenate(self.learner or empty), np.concatenate(self.rollout or empty))
