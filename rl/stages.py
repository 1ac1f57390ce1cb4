"""The two stages that train a conversion, and the control that shows what they cost: each resumable to the bit.

    warm-up    model frozen, attention dense; each indexer learns KL(attention || softmax(I)) over all s <= t
    sparse     top-k on; indexers learn the KL over S_t, the model its language loss; neither sees the other's gradient
    control    the dense model, given the sparse stage's data and schedule: what to compare the sparse model with

In the warm-up layers do not depend on one another's indexers, so every layer takes its optimizer steps while the forward pass goes by
(`LayerwiseWarmup`): one forward of the model feeds many steps, and nothing of size [L, L] is kept.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from winnow.kernels import ops
from winnow.kernels.packing import known, on_host
from winnow.models.attach import base_parameters, freeze, indexer_config, indexer_parameters, unfreeze
from winnow.models.context import IndexerLoss, LayerInputs, train_context
from winnow.models.forward import hidden_states
from winnow.rl.convert_data import Packed
from winnow.rl.convert_options import ConvertOptions
from winnow.rl.masters import masters_of
from winnow.rl.partial import Partial, run_steps
from winnow.rl.retention import language_loss
from winnow.rl.teacher import Teacher

Progress = Callable[[str], object]
Probe = Callable[[], float | None]  # recall on a few held-out tokens
RECALL_POINTS = 4  # of a stage's recall curve, beside the one before its first step


@dataclass
class LayerwiseWarmup(IndexerLoss):
    """Trains each indexer on its layers' inputs as they pass. `losses[layer]`: the mean KL of the first pass over each batch, scalars.

    last[leader]: the last layer that an indexer serves; its steps are taken there, on the mean KL of all of them. Without an entry an
    indexer serves its own layer only.
    """

    lr: float = 3e-3
    passes: int = 4
    micro_tokens: int = 768
    max_grad_norm: float = 1.0
    last: dict[int, int] = field(default_factory=dict)
    losses: dict[int, list[Tensor]] = field(default_factory=dict)
    optimizers: dict[int, torch.optim.Optimizer] = field(default_factory=dict)
    factor: float = 1.0  # of the learning rate, set by the schedule
    waiting: dict[int, list[LayerInputs]] = field(default_factory=dict)

    def observe(self, inputs: LayerInputs, projected: tuple[Tensor, Tensor, Tensor] | None) -> None:
        seen = [*self.waiting.pop(inputs.leader, []), inputs]
        if inputs.layer < self.last.get(inputs.leader, inputs.layer):
            self.waiting[inputs.leader] = seen
        else:
            self._train(seen)

    def optimizer(self, leader: int, indexer: nn.Module) -> torch.optim.Optimizer:
        if leader not in self.optimizers:
            self.optimizers[leader] = torch.optim.Adam(indexer.parameters(), betas=(0.9, 0.99))
        return self.optimizers[leader]

    def _train(self, seen: list[LayerInputs]) -> None:
        first = seen[0]
        optimizer = self.optimizer(first.leader, first.indexer)
        for group in optimizer.param_groups:
            group["lr"] = self.lr * self.factor
        totals, rows = torch.zeros(len(seen), device=first.q.device), 0
        with torch.enable_grad():
            for turn in range(self.passes):
                for a, b, bounds in _micro_bounds(on_host(first.cu_seqlens), self.micro_tokens):
                    q, k, w = first.indexer(*(tensor[a:b] for tensor in first.inputs))
                    cu = known(torch.tensor(bounds, dtype=torch.int32).to(q.device), bounds)
                    kl = torch.stack(
                        [
                            ops.indexer_kl(
                                q, k, w, x.q[a:b], x.k[a:b], x.lse[a:b], cu, None, x.scale, x.cost and x.cost.rows(a, b)
                            )[0]
                            for x in seen
                        ]
                    )
                    optimizer.zero_grad(set_to_none=True)
                    (kl.mean() / max(1, b - a)).backward()  # no set is empty: every row counts
                    torch.nn.utils.clip_grad_norm_(first.indexer.parameters(), self.max_grad_norm)
                    optimizer.step()
                    if turn == 0:
                        totals += kl.detach()
                        rows += b - a
        optimizer.zero_grad(set_to_none=True)
        for x, total in zip(seen, totals, strict=True):
            # On the device: nobody waits in every layer.
            self.losses.setdefault(x.layer, []).append(total / max(1, rows))


def _micro_bounds(bounds: Sequence[int], tokens: int) -> Iterator[tuple[int, int, list[int]]]:
    """Cut packed sequences into runs of about `tokens` tokens: (first row, last row, cu_seqlens of the run)."""
    start = 0
    for i in range(1, len(bounds)):
        if i == len(bounds) - 1 or bounds[i + 1] - bounds[start] > tokens:
            yield bounds[start], bounds[i], [b - bounds[start] for b in bounds[start : i + 1]]
            start = i


def warm_up(
    model: Any, stream: Iterator[Packed], options: ConvertOptions, progress: Progress, partial: Partial | None = None, probe: Probe | None = None,
) -> dict[str, list[Any]]:  # fmt: skip
    """Dense warm-up of the indexers; the model does not change.

    Returns curves: kl, the mean over layers of each batch before its steps; kl_layers, the last batch's by layer; recall, pairs of step
    and recall.
    """
    freeze(base_parameters(model))
    unfreeze(indexer_parameters(model))
    last = last_served(model)
    watch = LayerwiseWarmup(
        lr=options.warmup_lr,
        passes=options.warmup_passes,
        micro_tokens=options.warmup_micro,
        max_grad_norm=options.max_grad_norm,
        last=last,
    )
    layers = model.get_decoder().layers
    for leader in last:
        watch.optimizer(leader, layers[leader].self_attn.indexer)
    device = next(model.parameters()).device
    curves: dict[str, list[Any]] = {"kl": [], "kl_layers": [], "recall": []}
    total = options.warmup_batches

    def step(number: int) -> str:
        begin = time.monotonic()
        _measure(curves, probe, number, total)
        watch.factor = 0.5 * (1 + math.cos(math.pi * number / total))
        batch = next(stream)
        ctx = train_context(batch.lengths, device, selector="dense", indexer_loss=watch)
        with torch.no_grad():
            hidden_states(model, batch.tokens.to(device), ctx)
        curves["kl_layers"] = torch.stack([watch.losses[layer][-1] for layer in sorted(watch.losses)]).tolist()
        curves["kl"].append(sum(curves["kl_layers"]) / len(curves["kl_layers"]))
        return f"warm-up {number + 1}/{total}  kl {curves['kl'][-1]:.4f}  {time.monotonic() - begin:.1f} s"

    holds = _Holds(indexer_parameters(model), [watch.optimizers[leader] for leader in sorted(last)], curves)
    run_steps("warm-up", total, step, holds, stream, partial, progress)
    _measure(curves, probe, total, total)
    return curves


def last_served(model: Any) -> dict[int, int]:
    """Layer with an indexer -> the last layer that it serves."""
    config = indexer_config(model)
    assert config is not None, "the model has no indexers"
    total = model.config.num_hidden_layers
    return {leader: config.last_served(leader, total) for leader in (config.leaders or range(total))}


def sparse_stage(
    model: Any, stream: Iterator[Packed], options: ConvertOptions, progress: Progress, partial: Partial | None = None, probe: Probe | None = None,
) -> dict[str, list[Any]]:  # fmt: skip
    """Top-k on. Two optimizers and two learning rates: the KL over S_t moves the indexers, the language loss the model.

    options.sparse_teacher "dense": in place of the language loss, the model's KL to itself as it was before the stage, attending to all.
    options.sparse_average: the share of the steps, the last ones, whose mean weights are left instead of the last one's. options.coupled
    lets the KL's gradient into the model as well: the ablation. Returns curves: kl, loss, recall.
    """
    teacher = Teacher(model) if options.sparse_teacher == "dense" else None
    indexers, base = indexer_parameters(model), base_parameters(model)
    unfreeze(indexers)
    groups = [MasterAdamW(indexers, options.sparse_indexer_lr)]
    freeze(base)
    if options.sparse_model_lr > 0:
        unfreeze(base)
        groups.append(MasterAdamW(base, options.sparse_model_lr))
    curves: dict[str, list[Any]] = {"kl": [], "loss": [], "recall": []}
    total = options.sparse_steps
    last = round(options.sparse_average * total)
    average = Averaged(groups, total - last) if last else None

    def step(number: int) -> str:
        begin = time.monotonic()
        _measure(curves, probe, number, total)
        watch = IndexerLoss()
        if teacher is None:
            loss, rows = language_loss(model, next(stream), indexer_loss=watch, coupled=options.coupled)
        else:
            loss, rows = _taught_loss(model, next(stream), teacher, watch, options.coupled)
        loss, kl = loss / rows, watch.total()
        (loss + kl).backward()  # the sum is safe: no parameter has a gradient from both
        for group in groups:
            group.step(schedule(number, total), options.max_grad_norm)
        if average is not None:
            average.update(number)
        curves["kl"].append(float(kl.detach()))
        curves["loss"].append(float(loss.detach()))
        return (
            f"sparse {number + 1}/{total}  kl {curves['kl'][-1]:.4f}  loss {curves['loss'][-1]:.4f}  "
            f"{time.monotonic() - begin:.1f} s"
        )

    with checkpointed(model, options.checkpointing):
        held: list[Any] = [*groups, *([average] if average is not None else [])]
        holds = _Holds({**indexers, **base}, held, curves)
        run_steps("sparse", total, step, holds, stream, partial, progress)
    if average is not None:
        average.take()
    _measure(curves, probe, total, total)
    return curves


def _taught_loss(model: Any, batch: Packed, teacher: Teacher, watch: IndexerLoss, coupled: bool) -> tuple[Tensor, int]:
    device = next(model.parameters()).device
    ctx = train_context(batch.lengths, device, selector="indexer", indexer_loss=watch, coupled=coupled)
    return teacher.loss(batch, model, hidden_states(model, batch.tokens.to(device), ctx))


def dense_control(model: Any, stream: Iterator[Packed], options: ConvertOptions, progress: Progress) -> list[float]:
    """The dense model trained like the sparse stage trains it: same data, steps and learning rate. Returns its losses.

    None with sparse_teacher="dense": a model that is to say what it says already has no gradient.
    """
    if options.sparse_teacher == "dense":
        return []
    base = base_parameters(model)
    unfreeze(base)
    adamw, curve = MasterAdamW(base, options.sparse_model_lr), []
    with checkpointed(model, options.checkpointing):
        for number in range(options.sparse_steps):
            loss, rows = language_loss(model, next(stream), selector="dense")
            (loss / rows).backward()
            adamw.step(schedule(number, options.sparse_steps), options.max_grad_norm)
            curve.append(float(loss.detach()) / rows)
            progress(f"dense {number + 1}/{options.sparse_steps}  loss {curve[-1]:.4f}")
    return curve


def schedule(step: int, total: int) -> float:
    """A twentieth of the steps of rise, three at least, and a straight line down to a tenth. Adam's first steps move every weight by the whole
    rate: with three steps of rise, rates that pay later undo in a few steps what the model knew (docs/experiments.md)."""
    rise = max(3, total // 20)
    return min(1.0, (step + 1) / rise) * (1 - 0.9 * step / total)


class MasterAdamW:
    """AdamW without decay; weights below fp32 are stepped on fp32 masters, or steps this small would round away."""

    def __init__(self, parameters: dict[str, nn.Parameter], lr: float) -> None:
        self.parameters, self.lr = list(parameters.values()), lr
        self.masters = masters_of(self.parameters)
        stepped = [self.masters.get(p, p) for p in self.parameters]
        self.adamw = torch.optim.AdamW(stepped, lr=lr, betas=(0.9, 0.95), weight_decay=0.0)

    def step(self, factor: float, max_grad_norm: float) -> None:
        """Clips, steps at lr * factor, drops the gradients."""
        torch.nn.utils.clip_grad_norm_(self.parameters, max_grad_norm)
        for group in self.adamw.param_groups:
            group["lr"] = self.lr * factor
        given = {p: p.grad for p in self.masters if p.grad is not None}
        moved = [self.masters[p] for p in given]
        grads = [torch.empty_like(master) for master in moved]
        with torch.no_grad():
            if moved:  # in a few launches, not one a tensor
                torch._foreach_copy_(grads, list(given.values()))
            for master, grad in zip(moved, grads, strict=True):
                master.grad = grad
            self.adamw.step()
            if moved:
                torch._foreach_copy_(list(given), moved)
        for master in moved:
            master.grad = None
        for p in self.parameters:
            p.grad = None

    def state_dict(self) -> dict[str, Any]:
        return {"adamw": self.adamw.state_dict(), "masters": list(self.masters.values())}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.adamw.load_state_dict(state["adamw"])
        with torch.no_grad():
            for master, saved in zip(self.masters.values(), state["masters"], strict=True):
                master.copy_(saved)


class Averaged:
    """The mean of the weights that optimizers leave from one step on, in fp32 (suffix averaging: Rakhlin et al. 2012).

    Near the end of a stage whose loss is nearly zero Adam's steps are noise of full size, and a model that walks at random forgets
    (docs/experiments.md). first: the number of the first step that counts.
    """

    def __init__(self, groups: Sequence[MasterAdamW], first: int) -> None:
        self.parameters: list[Tensor] = [p for group in groups for p in group.parameters]
        self.stepped = [group.masters.get(p, p) for group in groups for p in group.parameters]
        self.first, self.counted = first, 0
        self.means = [p.detach().clone() for p in self.stepped]

    @torch.no_grad()
    def update(self, number: int) -> None:
        """After each step."""
        if number >= self.first:
            self.counted += 1
            torch._foreach_lerp_(self.means, self.stepped, 1 / self.counted)

    @torch.no_grad()
    def take(self) -> None:
        """The model becomes the mean."""
        torch._foreach_copy_(self.parameters, self.means)

    def state_dict(self) -> dict[str, Any]:
        return {"counted": self.counted, "means": self.means}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.counted = state["counted"]
        with torch.no_grad():
            torch._foreach_copy_(self.means, [mean.to(self.means[0].device) for mean in state["means"]])


class checkpointed:
    """Activation checkpointing inside a `with`, where it is asked for."""

    def __init__(self, model: Any, wanted: bool) -> None:
        self.model, self.wanted = model, wanted

    def __enter__(self) -> None:
        if self.wanted:
            self.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            self.model.train()  # transformers checkpoints in training mode only

    def __exit__(self, *_: object) -> None:
        if self.wanted:
            self.model.gradient_checkpointing_disable()
            self.model.eval()


@dataclass
class _Holds:
    """All that a stage changes, for `Partial`: weights, optimizers, curves."""

    parameters: dict[str, nn.Parameter]
    optimizers: list[Any]
    curves: dict[str, list[Any]]

    def state_dict(self) -> dict[str, Any]:
        weights = {name: p.detach() for name, p in self.parameters.items()}
        return {
            "weights": weights,
            "optimizers": [o.state_dict() for o in self.optimizers],
            "curves": dict(self.curves),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        with torch.no_grad():
            for name, p in self.parameters.items():
                p.copy_(state["weights"][name])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.curves.update(state["curves"])


def _measure(curves: dict[str, list[Any]], probe: Probe | None, step: int, total: int) -> None:
    """A point of the recall curve before the first step, after the last, and between them `RECALL_POINTS` - 1 times."""
    every = max(1, total // RECALL_POINTS)
    if (
        probe is None
        or total == 0
        or (step % every and step != total)
        or (curves["recall"] and curves["recall"][-1][0] >= step)
    ):
        return
    value = probe()
    if value is not None:
        curves["recall"].append([step, value])
