"""AdamW over fp32 weights, with the indexer in groups of its own or nowhere.

Decay applies to matrices only. A frozen indexer is not in the optimizer at all: AdamW's decay shrinks a weight whose gradient is zero.
Weights in bf16 are stepped on fp32 masters and copied back, so the model in the learner is bit for bit the one the rollout gets.

    backward -> absorb (bf16 gradients into fp32 sums) -> ... -> end_part (one domain's sum: its norm) -> ... -> collect -> clip -> step
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from winnow.rl.config_sections import IndexerConfig, LearnerConfig
from winnow.rl.masters import masters_of
from winnow.rl.ranks import own_part, split_like, whole


class Optimizer:
    """Groups, masters, linear warm-up and clipping. The base model and the indexer are clipped apart: their losses share nothing."""

    def __init__(
        self,
        base: Iterable[nn.Parameter],
        indexer: Iterable[nn.Parameter],
        learner: LearnerConfig,
        indexer_config: IndexerConfig,
    ) -> None:
        self.base, self.indexer = list(base), list(indexer)
        self.warmup_steps, self.max_grad_norm = learner.warmup_steps, learner.max_grad_norm
        train_indexer = indexer_config.train == "kl"
        for parameter in self.indexer:
            parameter.requires_grad_(train_indexer)
        if not train_indexer:
            self.indexer = []
        self.base = [parameter for parameter in self.base if parameter.requires_grad]
        self._masters = masters_of((*self.base, *self.indexer))
        self._part: dict[nn.Parameter, Tensor] = {}  # fp32 gradients of the present part, of parameters with a master
        self._total: dict[nn.Parameter, Tensor] = {}  # of the parts that have ended
        groups = []
        for parameters, lr in ((self.base, learner.lr), (self.indexer, indexer_config.lr)):
            for decay in (True, False):
                chosen = [self._masters.get(p, p) for p in parameters if (p.ndim >= 2) == decay]
                if chosen:
                    groups.append(
                        {"params": chosen, "lr": lr, "peak": lr, "weight_decay": learner.weight_decay if decay else 0.0}
                    )
        self._adamw = torch.optim.AdamW(groups, betas=learner.betas, fused=True)
        self.num_updates = 0

    def zero_grad(self) -> None:
        for parameter in (*self.base, *self.indexer):
            parameter.grad = None
            self.target(parameter).grad = None
        self._part.clear()
        self._total.clear()

    def target(self, parameter: nn.Parameter) -> Tensor:
        """What is stepped for a parameter, and has its gradient from `collect` on: its master, or itself."""
        return self._masters.get(parameter, parameter)

    @property
    def has_gradients(self) -> bool:
        return any(self.target(p).grad is not None for p in (*self.base, *self.indexer))

    def absorb(self) -> None:
        """Takes the gradients that a backward pass left on parameters with masters into fp32 sums: in bf16 a sum over micro-batches
        would lose what is small. Gradients of fp32 parameters are such sums already."""
        gradients = {p: p.grad for p in self._masters if p.grad is not None}
        first = {p: gradient for p, gradient in gradients.items() if p not in self._part}
        for parameter, gradient in gradients.items():
            if parameter not in first:
                _add(self._part, parameter, gradient)
            parameter.grad = None
        self._part |= zip(first, _widened(list(first.values())), strict=True)

    def end_part(self) -> Tensor:
        """Ends a part of the update, such as one domain's micro-batches: the norm of the base's gradient in it, an fp32 scalar."""
        for parameter in self.base:
            if parameter.grad is not None:
                _add(self._part, parameter, parameter.grad)
                parameter.grad = None
        norm = nn.utils.get_total_norm(list(self._part.values())) if self._part else torch.zeros(())
        self._end()
        return whole(norm)

    def collect(self) -> None:
        """Puts the summed gradients where `clip` and `step` look for them."""
        self.absorb()
        for parameter in self._total:
            if parameter.grad is not None:
                _add(self._total, parameter, parameter.grad)
        self._end()
        for parameter, gradient in self._total.items():
            self.target(parameter).grad = gradient
            if parameter in self._masters:
                parameter.grad = None
        self._total.clear()

    def _end(self) -> None:
        for parameter, gradient in self._part.items():
            _add(self._total, parameter, gradient)
        self._part.clear()

    @property
    def lr(self) -> float:
        """The base learning rate of the next update."""
        return float(self._adamw.param_groups[0]["peak"]) * self._warmup()

    def clip(self) -> dict[str, Tensor]:
        """Clips both sides to max_grad_norm and returns their norms before it, fp32 scalars: grad_norm, grad_norm/indexer."""
        norms = {"grad_norm": self.base, "grad_norm/indexer": self.indexer}
        return {
            name: whole(nn.utils.clip_grad_norm_([self.target(p) for p in parameters], self.max_grad_norm))
            for name, parameters in norms.items()
            if any(self.target(p).grad is not None for p in parameters)
        }

    def step(self) -> None:
        """One update from the accumulated gradients, which are released."""
        for group in self._adamw.param_groups:
            group["lr"] = group["peak"] * self._warmup()
        self._adamw.step()
        if self._masters:  # in a few launches, not one a tensor
            with torch.no_grad():
                torch._foreach_copy_(
                    [own_part(p) for p in self._masters], [own_part(m) for m in self._masters.values()]
                )
        self.zero_grad()
        self.num_updates += 1

    def _warmup(self) -> float:
        return min(1.0, (self.num_updates + 1) / max(1, self.warmup_steps))

    def state_dict(self) -> dict[str, Any]:
        """Whole tensors, whatever the number of ranks; each rank must ask."""
        adamw = self._adamw.state_dict()
        moments = {
            number: {name: whole(value) for name, value in values.items()} for number, values in adamw["state"].items()
        }
        return {
            "adamw": {**adamw, "state": moments},
            "masters": [whole(master) for master in self._masters.values()],
            "num_updates": self.num_updates,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises ValueError when the state belongs to other parameter groups."""
        adamw = state["adamw"]
        parameters = [p for group in self._adamw.param_groups for p in group["params"]]
        if adamw["state"] and max(adamw["state"]) < len(parameters):
            moments = {
                number: {name: split_like(value, parameters[number]) for name, value in values.items()}
                for number, values in adamw["state"].items()
            }
            adamw = {**adamw, "state": moments}
        try:
            self._adamw.load_state_dict(adamw)
        except ValueError as error:
            raise ValueError(
                f"the optimizer state does not fit this model and config (indexer.train changed?): {error}"
            ) from None
        with torch.no_grad():
            for (parameter, master), saved in zip(self._masters.items(), state["masters"], strict=True):
                master.copy_(split_like(saved, master))
                parameter.copy_(master)
        self.num_updates = int(state["num_updates"])


def non_finite_gradients(named: Iterable[tuple[str, nn.Parameter]], optimizer: Optimizer) -> list[str]:
    """Names of the parameters whose gradient holds NaN or infinity."""
    found = ((name, optimizer.target(parameter).grad) for name, parameter in named)
    return [name for name, grad in found if grad is not None and not torch.isfinite(own_part(grad)).all()]


def _widened(gradients: list[Tensor]) -> list[Tensor]:
    """Copies in fp32, in a few launches, not one a tensor."""
    wide = [torch.empty_like(gradient, dtype=torch.float32) for gradient in gradients]
    if wide:
        torch._foreach_copy_([own_part(w) for w in wide], [own_part(g) for g in gradients])
    return wide


def _add(sums: dict[nn.Parameter, Tensor], parameter: nn.Parameter, gradient: Tensor) -> None:
    """sums[parameter] += gradient, in fp32; the first one is taken as it is, not copied."""
    known = sums.get(parameter)
    sums[parameter] = gradient.float() if known is None else known.add_(gradient)
