"""Losses against numbers worked out by hand, and the KL's gradient against the analytic one."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from winnow.rl.config_sections import AlgorithmConfig
from winnow.rl.losses import Denominators, LossInputs, LossOutput, compute_loss, unbiased_kl

# Two sequences: A of 2 tokens with advantage +1, B of 1 token with advantage -2.
OLD = [-1.0, -2.0, -1.5]
LENGTHS = [2.0, 1.0]
COUNTS = Denominators(sequences=2, tokens=3)


def inputs(ratios: list[float], rollout: list[float] | None = None, **changes: object) -> LossInputs:
    """Inputs whose r is `ratios`; rollout_logprobs default to old_logprobs."""
    old = torch.tensor(OLD)
    values: dict[str, object] = {
        "logprobs": (old + torch.tensor(ratios).log()).requires_grad_(),
        "old_logprobs": old,
        "rollout_logprobs": old if rollout is None else torch.tensor(rollout),
        "sequence_ids": torch.tensor([0, 0, 1]),
        "lengths": torch.tensor(LENGTHS),
        "advantages": torch.tensor([1.0, -2.0]),
        "weights": torch.ones(2),
        "betas": torch.zeros(2),
    }
    return LossInputs(**{**values, **changes})  # type: ignore[arg-type]


def run(given: LossInputs, counts: Denominators = COUNTS, **settings: object) -> LossOutput:
    return compute_loss(given, AlgorithmConfig(**{"eps_low": 0.2, "eps_high": 0.28, **settings}), counts)  # type: ignore[arg-type]


def test_sequence_aggregate_averages_tokens_then_sequences() -> None:
    # r = 1.1, 1.5 (clipped to 1.28), 0.9:  J = 1/2 [ (1.1 + 1.28)/2 + (-2 * 0.9) ] = 1/2 [1.19 - 1.8] = -0.305
    out = run(inputs([1.1, 1.5, 0.9]), aggregate="sequence")
    assert out.loss.item() == pytest.approx(0.305, abs=1e-6)
    assert out.metrics.result()["clip_fraction"] == pytest.approx(1 / 3)
    assert out.metrics.result()["loss/policy"] == pytest.approx(0.305, abs=1e-6)


def test_token_aggregate_averages_over_all_tokens() -> None:
    # J = (1.1 + 1.28 - 1.8) / 3
    assert run(inputs([1.1, 1.5, 0.9]), aggregate="token").loss.item() == pytest.approx(
        -(1.1 + 1.28 - 1.8) / 3, abs=1e-6
    )


def test_clip_holds_the_low_side_of_a_negative_advantage() -> None:
    # r = 0.5, A = -2: min(-1.0, 0.8 * -2) = -1.6, and no gradient flows through the clipped token
    given = inputs([1.0, 1.0, 0.5])
    out = run(given, aggregate="token")
    assert out.loss.item() == pytest.approx(-(1 + 1 - 1.6) / 3, abs=1e-6)
    out.loss.backward()
    assert given.logprobs.grad is not None
    torch.testing.assert_close(given.logprobs.grad, torch.tensor([-1 / 3, -1 / 3, 0.0]))


def test_weights_multiply_sequences() -> None:
    out = run(inputs([1.0, 1.0, 1.0], weights=torch.tensor([0.5, 1.5])), aggregate="sequence")
    assert out.loss.item() == pytest.approx(-(0.5 * 1 + 1.5 * -2) / 2, abs=1e-6)


def test_tis_caps_the_weight_and_icepop_drops_the_token() -> None:
    rollout = [-1.0 - math.log(1.5), -2.0 - math.log(4.0), -1.5 + math.log(4.0)]  # rho = 1.5, 4, 0.25
    out = run(inputs([1.0] * 3, rollout), aggregate="token", correction="tis", tis_cap=2.0)
    assert out.loss.item() == pytest.approx(-(1.5 + 2.0 + 0.25 * -2) / 3, abs=1e-5)
    assert out.metrics.result()["masked/tis_capped"] == pytest.approx(1 / 3)
    out = run(inputs([1.0] * 3, rollout), aggregate="token", correction="icepop", tis_cap=2.0)
    assert out.loss.item() == pytest.approx(-1.0 / 3, abs=1e-5)
    assert out.metrics.result()["masked/icepop"] == pytest.approx(2 / 3)


def test_opsm_masks_only_negative_sequences_that_drifted() -> None:
    drifted = [-1.0 + 0.3, -2.0 + 0.3, -1.5 + 0.3]  # rollout - logprobs = 0.3 everywhere
    out = run(inputs([1.0] * 3, drifted), aggregate="token", correction="opsm", opsm_delta=0.2)
    assert out.loss.item() == pytest.approx(-2.0 / 3, abs=1e-5)  # B is gone, A's positive advantage stays
    assert out.metrics.result()["masked/opsm_negatives"] == pytest.approx(1.0)
    kept = run(inputs([1.0] * 3, drifted), aggregate="token", correction="opsm", opsm_delta=0.4)
    assert kept.loss.item() == pytest.approx(0.0, abs=1e-5)  # 1 + 1 - 2


def test_rollout_drift_is_measured_by_k3() -> None:
    rollout = [value - 0.1 for value in OLD]  # d = old - rollout = 0.1
    result = run(inputs([1.0] * 3, rollout)).metrics.result()
    assert result["kl/rollout_old"] == pytest.approx(math.exp(0.1) - 1 - 0.1, rel=1e-3)
    assert result["kl/rollout_old_max_abs"] == pytest.approx(0.1, rel=1e-4)


def test_gspo_uses_one_ratio_per_sequence_and_cispo_keeps_the_gradient_of_clipped_tokens() -> None:
    # A: geometric mean of 1.1 and 1.1 * 1.0 -> 1.1 ; B: 0.9
    out = run(inputs([1.21, 1.0, 0.9]), name="gspo", aggregate="sequence", eps_low=0.2, eps_high=0.28)
    assert out.loss.item() == pytest.approx(-(1.1 - 1.8) / 2, abs=1e-6)
    given = inputs([3.0, 1.0, 1.0])
    run(given, name="cispo", aggregate="token").loss.backward()
    assert given.logprobs.grad is not None
    torch.testing.assert_close(given.logprobs.grad, torch.tensor([-1.28 / 3, -1 / 3, 2 / 3]))


def test_reference_kl_is_added_with_beta_per_domain() -> None:
    ref = torch.tensor(OLD) + 0.5
    out = run(inputs([1.0] * 3, ref_logprobs=ref, betas=torch.tensor([0.0, 0.1])), aggregate="sequence")
    k3 = math.exp(0.5) - 0.5 - 1
    assert out.loss.item() == pytest.approx(-(1 - 2) / 2 + 0.1 * k3 / 2, abs=1e-6)
    assert out.metrics.result()["kl/reference"] == pytest.approx(k3, rel=1e-5)


def test_unbiased_kl_has_value_and_gradient_of_the_true_kl() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(7, generator=generator, dtype=torch.float64, requires_grad=True)
    ref, rollout = (torch.randn(7, generator=generator, dtype=torch.float64).log_softmax(0) for _ in range(2))

    def expected(estimate: Tensor) -> Tensor:
        return (rollout.exp() * estimate).sum()  # exact expectation over the rollout's distribution

    logp = logits.log_softmax(0)
    truth = (logp.exp() * (logp - ref)).sum()
    (want,) = torch.autograd.grad(truth, logits, retain_graph=True)
    # E[r * (ratio - 1)] is 0 only for normalised distributions, so value and gradient agree in expectation, not per token
    value = expected(unbiased_kl(logp, ref, rollout))
    (got,) = torch.autograd.grad(value, logits, retain_graph=True)
    torch.testing.assert_close(value, truth)
    torch.testing.assert_close(got, want)
    biased = expected((logp - rollout).exp().detach() * (torch.expm1(ref - logp) - (ref - logp)))
    (wrong,) = torch.autograd.grad(biased, logits)
    assert not torch.allclose(wrong, want, atol=1e-2)


def test_ce_and_distillation_have_denominators_of_their_own() -> None:
    teacher = torch.tensor([-1.0, -9.0, -1.0])
    given = inputs(
        [1.0] * 3,
        ce_weights=torch.tensor([0.0, 1.0, 0.0]),
        teacher_logprobs=teacher,
        teacher_weights=torch.tensor([0.0, 0.0, 1.0]),
    )
    out = run(given, Denominators(ce_tokens=4, kl_tokens=5))
    k3 = math.exp(0.5) - 0.5 - 1
    assert out.loss.item() == pytest.approx(2.0 / 4 + k3 / 5, abs=1e-6)
    assert out.metrics.result()["loss/ce"] == pytest.approx(2.0)


@pytest.mark.parametrize("aggregate", ["sequence", "token"])
@pytest.mark.parametrize("name", ["grpo", "gspo", "cispo"])
def test_any_split_of_the_sequences_gives_the_same_loss_and_gradient(name: str, aggregate: str) -> None:
    whole = inputs([1.1, 1.5, 0.9], ref_logprobs=torch.tensor(OLD) + 0.5, betas=torch.tensor([0.2, 0.1]))
    total = run(whole, name=name, aggregate=aggregate)
    total.loss.backward()
    leaf = whole.logprobs.detach().clone().requires_grad_()
    split = 0.0
    for tokens, seq in ((slice(0, 2), 0), (slice(2, 3), 1)):
        assert whole.ref_logprobs is not None
        part = LossInputs(
            logprobs=leaf[tokens], old_logprobs=whole.old_logprobs[tokens], rollout_logprobs=whole.rollout_logprobs[tokens],
            ref_logprobs=whole.ref_logprobs[tokens], sequence_ids=torch.zeros_like(whole.sequence_ids[tokens]),
            lengths=whole.lengths[seq : seq + 1], advantages=whole.advantages[seq : seq + 1], weights=whole.weights[seq : seq + 1],
            betas=whole.betas[seq : seq + 1],
        )  # fmt: skip
        loss = run(part, name=name, aggregate=aggregate).loss
        loss.backward()
        split += loss.item()
    assert split == pytest.approx(total.loss.item(), abs=1e-6)
    torch.testing.assert_close(leaf.grad, whole.logprobs.grad)


def test_kl_and_entropy_are_told_apart_by_domain() -> None:
    ref = torch.tensor(OLD) + torch.tensor([0.5, 0.5, 0.25])
    rollout = [value - 0.1 for value in OLD[:2]] + OLD[2:]
    given = inputs(
        [1.0] * 3, rollout, ref_logprobs=ref, betas=torch.tensor([0.1, 0.2]), entropy=torch.tensor([1.0, 3.0, 5.0]),
        domains=("math", "chat"),
    )  # fmt: skip
    found = run(given).metrics.result()
    k3 = {value: math.exp(value) - value - 1 for value in (0.5, 0.25, 0.1)}
    assert found["kl/reference/math"] == pytest.approx(math.exp(0.1) * k3[0.5], rel=1e-4)  # r = exp(0.1) there
    assert found["kl/reference/chat"] == pytest.approx(k3[0.25], rel=1e-4)
    assert found["kl/rollout_old/math"] == pytest.approx(k3[0.1], rel=1e-3) and found["kl/rollout_old/chat"] == 0
    assert (found["entropy/math"], found["entropy/chat"], found["entropy"]) == (2.0, 5.0, 3.0)


def test_dr_grpo_and_dapo_are_the_same_loss_with_other_settings() -> None:
    """Advantages as given; r = 1.1, 1.5, 0.5. GRPO clips 0.2/0.2, DAPO 0.2/0.28; both Dr.GRPO and DAPO weigh tokens alike."""
    ratios = [1.1, 1.5, 0.5]
    grpo = run(inputs(ratios), aggregate="sequence", eps_high=0.2).loss.item()
    assert grpo == pytest.approx(-((1.1 + 1.2) / 2 - 1.6) / 2, abs=1e-6)
    assert run(inputs(ratios), aggregate="token", eps_high=0.28).loss.item() == pytest.approx(
        -(1.1 + 1.28 - 1.6) / 3, abs=1e-6
    )
    assert run(inputs(ratios), aggregate="token", eps_high=0.2).loss.item() == pytest.approx(
        -(1.1 + 1.2 - 1.6) / 3, abs=1e-6
    )
