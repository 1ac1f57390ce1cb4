"""Losses: pure functions of `LossInputs`. One term for RL, one for SFT, one for distillation, each over its own global denominator.

    r = exp(logprobs - old_logprobs)            ratio to the policy before this batch's updates
    rho = exp(old_logprobs - rollout_logprobs)  ratio of that policy to the one that sampled
    J = mean_seq mean_t  w(rho) * surrogate(r, A) * M  -  beta * KL           loss = -J

Simpler algorithms are instances: Dr.GRPO is advantage_scale none with aggregate token; DAPO is eps 0.2/0.28 with aggregate token;
DeepSeek-V3.2 is aggregate sequence with correction opsm. GSPO (arXiv 2507.18071) and CISPO (2506.13585) replace the surrogate.
Sums are divided by counts over the whole batch, never over a micro-batch: any split gives the same gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from winnow.rl.config_sections import AlgorithmConfig
from winnow.rl.metrics import Tally


@dataclass(frozen=True, kw_only=True, slots=True)
class Denominators:
    """Counts over the whole batch (every micro-batch of every rank) of one update. 0 where the term is absent."""

    sequences: float = 0.0  # trained RL sequences
    tokens: float = 0.0  # trained RL tokens
    ce_tokens: float = 0.0  # SFT tokens
    kl_tokens: float = 0.0  # tokens with a teacher


@dataclass(frozen=True, kw_only=True, slots=True)
class LossInputs:
    """One micro-batch, trained positions only: N tokens of n whole sequences, a sequence's tokens adjacent. Floats are fp32."""

    logprobs: Tensor  # [N] the learner now, with gradient
    old_logprobs: Tensor  # [N] the learner before this batch's updates
    rollout_logprobs: Tensor  # [N] the engine that sampled
    sequence_ids: Tensor  # int64 [N] in 0..n-1
    lengths: Tensor  # [n] trained tokens of each sequence
    advantages: Tensor  # [n]
    weights: Tensor  # [n] the sequence's factor from balancing domains; 0: not an RL sequence
    betas: Tensor  # [n] strength of the KL to the reference
    domains: tuple[str, ...] = ()  # [n] metric only
    entropy: Tensor | None = None  # [N] metric only
    ref_logprobs: Tensor | None = None  # [N]
    ce_weights: Tensor | None = None  # [N] weight of each SFT token
    teacher_logprobs: Tensor | None = None  # [N]
    teacher_weights: Tensor | None = None  # [N] 0 where there is no teacher

    def __post_init__(self) -> None:
        count, sequences = len(self.logprobs), len(self.lengths)
        for name in (
            "old_logprobs",
            "rollout_logprobs",
            "sequence_ids",
            "entropy",
            "ref_logprobs",
            "ce_weights",
            "teacher_logprobs",
        ):
            value = getattr(self, name)
            assert value is None or value.shape == (count,), f"{name} is {tuple(value.shape)}, want ({count},)"
        for name in ("advantages", "weights", "betas"):
            value = getattr(self, name)
            assert value.shape == (sequences,), f"{name} is {tuple(value.shape)}, want ({sequences},)"


@dataclass(frozen=True, kw_only=True, slots=True)
class LossOutput:
    loss: Tensor  # fp32 scalar: this micro-batch's share of the batch's loss
    metrics: Tally


def compute_loss(inputs: LossInputs, config: AlgorithmConfig, denominators: Denominators) -> LossOutput:
    """The micro-batch's share of rl + ce + kl. Summed over micro-batches it is the batch's loss."""
    tally = Tally()
    loss = inputs.logprobs.new_zeros(())
    if denominators.sequences:
        loss = loss + policy_loss(inputs, config, denominators, tally)
    if inputs.ce_weights is not None:
        loss = loss + ce_loss(inputs, denominators, tally)
    if inputs.teacher_logprobs is not None:
        loss = loss + distillation_loss(inputs, denominators, tally)
    return LossOutput(loss=loss, metrics=tally)


def policy_loss(inputs: LossInputs, config: AlgorithmConfig, denominators: Denominators, tally: Tally) -> Tensor:
    """-J of RL.md, 'One loss': surrogate, correction, sequence mask, KL to the reference. Fp32 scalar."""
    seq = inputs.sequence_ids
    advantages = inputs.advantages[seq]  # [N]
    factors = _token_factors(inputs, config.aggregate, denominators)  # [N], they sum to 1 over a balanced batch
    objective, clipped = SURROGATES[config.name](inputs, advantages, config)  # [N], bool [N]
    correction = correction_weights(inputs, advantages, config, tally)  # [N], no gradient
    policy = -(factors * correction * objective).sum()
    _tally_policy(inputs, clipped, policy, tally)
    if inputs.ref_logprobs is None:
        return policy
    kl = unbiased_kl(inputs.logprobs, inputs.ref_logprobs, inputs.rollout_logprobs)  # [N]
    penalty = (factors * inputs.betas[seq] * kl).sum()
    pulled = (inputs.betas[seq] > 0).float()
    tally.sum("loss/kl", penalty.detach())
    tally.add("kl/reference", (kl.detach() * pulled).sum(), pulled.sum())
    for name, inside in _by_domain(inputs).items():
        tally.add(f"kl/reference/{name}", (kl.detach() * pulled * inside).sum(), (pulled * inside).sum())
    return policy + penalty


def grpo(inputs: LossInputs, advantages: Tensor, config: AlgorithmConfig) -> tuple[Tensor, Tensor]:
    """min(r*A, clip(r)*A) per token, and which tokens the clip holds. DeepSeekMath 2402.03300, clip-higher of DAPO 2503.14476."""
    ratio = torch.exp(inputs.logprobs - inputs.old_logprobs)
    free, held = ratio * advantages, ratio.clamp(1 - config.eps_low, 1 + config.eps_high) * advantages
    return torch.minimum(free, held), held < free


def gspo(inputs: LossInputs, advantages: Tensor, config: AlgorithmConfig) -> tuple[Tensor, Tensor]:
    """The same with one ratio per sequence, the geometric mean of its tokens' (2507.18071); its bounds are near 1e-4, not 0.2."""
    log_ratio = _sequence_means(inputs.logprobs - inputs.old_logprobs, inputs)[inputs.sequence_ids]
    ratio = torch.exp(log_ratio)
    free, held = ratio * advantages, ratio.clamp(1 - config.eps_low, 1 + config.eps_high) * advantages
    return torch.minimum(free, held), held < free


def cispo(inputs: LossInputs, advantages: Tensor, config: AlgorithmConfig) -> tuple[Tensor, Tensor]:
    """REINFORCE weighed by the clipped ratio without gradient (2506.13585): clipped tokens keep their gradient."""
    ratio = torch.exp(inputs.logprobs - inputs.old_logprobs).detach()
    weight = ratio.clamp(1 - config.eps_low, 1 + config.eps_high)
    return weight * advantages * inputs.logprobs, weight != ratio


Surrogate = Callable[[LossInputs, Tensor, AlgorithmConfig], tuple[Tensor, Tensor]]
SURROGATES: dict[str, Surrogate] = {"grpo": grpo, "gspo": gspo, "cispo": cispo}


def correction_weights(inputs: LossInputs, advantages: Tensor, config: AlgorithmConfig, tally: Tally) -> Tensor:
    """What each token's objective is multiplied by against train/rollout mismatch: fp32 [N], no gradient.

    tis: min(rho, cap). icepop (2510.18855): 1 where 1/cap <= rho <= cap, else 0. opsm (DeepSeek-V3.2): 0 for a whole sequence with
    A < 0 whose mean of (rollout_logprobs - logprobs) exceeds delta. none: 1.
    """
    if config.correction == "none":
        return torch.ones_like(inputs.rollout_logprobs)
    rho = torch.exp(inputs.old_logprobs - inputs.rollout_logprobs)
    if config.correction == "tis":
        tally.add("masked/tis_capped", (rho > config.tis_cap).float().sum(), len(rho))
        return rho.clamp(max=config.tis_cap)
    if config.correction == "icepop":
        keep = ((rho >= 1 / config.tis_cap) & (rho <= config.tis_cap)).float()
        tally.add("masked/icepop", (1 - keep).sum(), len(rho))
        return keep
    assert config.correction == "opsm", config.correction
    drift = _sequence_means(inputs.rollout_logprobs - inputs.logprobs.detach(), inputs)[inputs.sequence_ids]
    masked = ((advantages < 0) & (drift > config.opsm_delta)).float()
    tally.add("masked/opsm", masked.sum(), len(masked))
    tally.add("masked/opsm_negatives", masked.sum(), (advantages < 0).float().sum())
    return 1 - masked


def unbiased_kl(logprobs: Tensor, ref_logprobs: Tensor, rollout_logprobs: Tensor) -> Tensor:
    """r * (pi_ref/pi - log(pi_ref/pi) - 1) per token, r = exp(logprobs - rollout_logprobs) carrying gradient. Fp32 [N].

    In expectation over the rollout's tokens its value and its gradient are those of KL(pi || pi_ref) (DeepSeek-V3.2, 3.1). With r
    detached, clipped or masked the gradient would be another divergence's, so it is neither.
    """
    log_ratio = ref_logprobs - logprobs
    return torch.exp(logprobs - rollout_logprobs) * (torch.expm1(log_ratio) - log_ratio)


def ce_loss(inputs: LossInputs, denominators: Denominators, tally: Tally) -> Tensor:
    """Cross entropy of the SFT tokens over their number in the whole batch. Fp32 scalar."""
    assert inputs.ce_weights is not None
    total = -(inputs.ce_weights * inputs.logprobs).sum()
    tally.add("loss/ce", total.detach(), inputs.ce_weights.sum())
    return total / denominators.ce_tokens


def distillation_loss(inputs: LossInputs, denominators: Denominators, tally: Tally) -> Tensor:
    """KL(pi || teacher) on the student's own samples, by the unbiased estimator, over the teacher tokens of the batch. Scalar."""
    assert inputs.teacher_logprobs is not None and inputs.teacher_weights is not None
    kl = unbiased_kl(inputs.logprobs, inputs.teacher_logprobs, inputs.rollout_logprobs)
    total = (inputs.teacher_weights * kl).sum()
    tally.add("loss/distillation", total.detach(), inputs.teacher_weights.sum())
    return total / denominators.kl_tokens


def _token_factors(inputs: LossInputs, aggregate: str, denominators: Denominators) -> Tensor:
    """Each token's share of the mean: [N]. sequence: weight / (length * sequences); token: weight / tokens."""
    weights = inputs.weights[inputs.sequence_ids]
    if aggregate == "token":
        return weights / denominators.tokens
    return weights / (inputs.lengths[inputs.sequence_ids] * denominators.sequences)


def _sequence_means(values: Tensor, inputs: LossInputs) -> Tensor:
    """Mean over each sequence's tokens: [N] -> [n], differentiable."""
    sums = values.new_zeros(len(inputs.lengths)).index_add(0, inputs.sequence_ids, values)
    return sums / inputs.lengths.clamp(min=1)


def _by_domain(inputs: LossInputs) -> dict[str, Tensor]:
    """1 for each domain's tokens, else 0: fp32 [N]."""
    found = {}
    for name in sorted(set(inputs.domains)):
        members = [float(domain == name) for domain in inputs.domains]
        found[name] = inputs.weights.new_tensor(members)[inputs.sequence_ids]
    return found


def _tally_policy(inputs: LossInputs, clipped: Tensor, policy: Tensor, tally: Tally) -> None:
    count = len(inputs.logprobs)
    with torch.no_grad():
        drift = inputs.old_logprobs - inputs.rollout_logprobs
        tally.sum("loss/policy", policy.detach())
        tally.add("clip_fraction", clipped.float().sum(), count)
        tally.add("kl/rollout_old", (torch.expm1(drift) - drift).sum(), count)
        if count:
            tally.peak("kl/rollout_old_max_abs", drift.abs().max())
        if inputs.entropy is not None:
            tally.add("entropy", inputs.entropy.detach().sum(), count)
        for name, inside in _by_domain(inputs).items():
            tally.add(f"kl/rollout_old/{name}", ((torch.expm1(drift) - drift) * inside).sum(), inside.sum())
            if inputs.entropy is not None:
                tally.add(f"entropy/{name}", (inputs.entropy.detach() * inside).sum(), inside.sum())
