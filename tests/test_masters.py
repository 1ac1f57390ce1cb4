"""Masters of 16-bit weights: they round to the weights, and the model moves as far as they do."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from winnow.rl.config_sections import IndexerConfig, LearnerConfig
from winnow.rl.masters import dithered, masters_of
from winnow.rl.optimizer import Optimizer
from winnow.rl.stages import MasterAdamW


def edges(dtype: torch.dtype) -> torch.Tensor:
    """Where intervals are unlike their neighbours'."""
    info = torch.finfo(dtype)
    powers = [2.0**n for n in range(-8, 9)]
    ends = [
        0.0,
        -0.0,
        info.max,
        info.min,
        info.smallest_normal,
        info.smallest_normal / 4,
        1 - info.eps / 2,
        1 + info.eps,
    ]
    return torch.tensor([*powers, *(-p for p in powers), *ends], dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_masters_round_to_their_weights_and_lie_anywhere_between(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    weights = torch.cat([(torch.randn(50_000) * 0.05).to(dtype), edges(dtype).repeat(50)])
    found = dithered(weights, 0)
    assert found.dtype == torch.float32 and torch.equal(found.to(dtype), weights)
    plain, offsets = weights[:50_000].float(), (found - weights.float())[:50_000]
    spacing = torch.finfo(dtype).eps / 2 * torch.exp2(torch.floor(torch.log2(plain.abs())) + 1)
    places = offsets / spacing  # of a spacing: evenly from -1/2 to 1/2
    assert places.abs().max() <= 0.5 and abs(float(places.mean())) < 0.01
    assert float(places.std()) == pytest.approx(12**-0.5, rel=0.02)
    assert torch.equal(found, dithered(weights, 0)) and not torch.equal(found, dithered(weights, 1))


@pytest.mark.parametrize("share", [0.02, 0.3, 3.0])
def test_weights_move_as_far_as_their_masters_on_average(share: float) -> None:
    """A step of `share` spacings: from the middle of their intervals none would move for the first, all too far for the last but one."""
    weights = torch.linspace(0.0501, 0.0599, 400).bfloat16().repeat(100)  # one binade: spacing 2^-12
    step = share * 2.0**-12
    moved = (dithered(weights, 0) + step).bfloat16().float() - weights.float()
    assert float(moved.mean()) == pytest.approx(step, rel=0.1 if share < 0.1 else 0.02)
    assert ((weights.float() + 0.3 * 2.0**-12).bfloat16() == weights).all()


def test_a_model_in_bf16_follows_the_gradient_from_its_first_update_on() -> None:
    """Least squares at a learning rate of a twentieth of a spacing: as fast as in fp32; from the middles it stands still."""
    torch.manual_seed(0)
    start = (torch.randn(64, 256) * 0.05).bfloat16()
    inputs = torch.randn(256, 400)
    target = (start.float() + torch.randn(64, 256) * 0.01) @ inputs

    def error(weight: torch.Tensor) -> torch.Tensor:
        return (weight.float() @ inputs - target).square().mean()

    def after(kind: str) -> float:
        weight = nn.Parameter(start.clone() if kind != "fp32" else start.float())
        optimizer = Optimizer([weight], [], LearnerConfig(lr=1e-5, max_grad_norm=1e9), IndexerConfig())
        if kind == "middle":
            optimizer._masters[weight].copy_(start)
        for _ in range(4):
            error(weight).backward()
            optimizer.collect()
            optimizer.step()
        return float(error(start) - error(weight.detach()))

    wanted = after("fp32")
    assert wanted > 0 and after("bf16") == pytest.approx(wanted, rel=0.15) and after("middle") < 0.3 * wanted


def test_both_optimizers_have_such_masters_and_leave_the_weights_and_the_random_state() -> None:
    weight, wide = nn.Parameter((torch.randn(40, 40) * 0.05).bfloat16()), nn.Parameter(torch.randn(4))
    before, state = weight.detach().clone(), torch.get_rng_state()
    masters = masters_of([weight, wide])
    assert list(masters) == [weight]
    assert torch.equal(MasterAdamW({"a": weight, "b": wide}, 1e-4).masters[weight], masters[weight])
    assert torch.equal(Optimizer([weight, wide], [], LearnerConfig(), IndexerConfig()).target(weight), masters[weight])
    assert torch.equal(weight, before) and torch.equal(torch.get_rng_state(), state)
