"""What a forward pass is for: the one thing in which learner and engine differ.

    train     packed sequences, whole contexts, autograd
    prefill   packed chunks at the end of their contexts; writes K, V and indexer keys to the cache
    decode    one token per sequence; writes them too

`hidden_states` hands the context down through the model's keyword arguments, so a layer recomputed in the backward (activation
checkpointing) sees it as well. `forward_context` is for code that calls a model directly: leave it open around the backward.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from winnow.kernels import ops
from winnow.kernels.branch import Branch
from winnow.kernels.omission import Omission
from winnow.kernels.packing import known
from winnow.kernels.selection import Selection

MODES = ("train", "prefill", "decode")
SELECTORS = ("indexer", "random", "recent", "dense", "random_ties")


@dataclass
class LayerInputs:
    """What an observer sees of one layer's attention. All of it detached.

    `inputs` [T, ...] are the indexer's own: hidden states, RoPE angles (MLA: the q latent too); q [T, H, D], k [T, Hkv, D] and
    lse [T, H] (over S_t) make its target, with cost where the target is the output. leader: the layer that the indexer belongs to, `layer` itself unless layers share one.
    """

    layer: int
    leader: int
    indexer: Any
    inputs: tuple[Tensor, ...]
    q: Tensor
    k: Tensor
    lse: Tensor
    cu_seqlens: Tensor
    selection: Selection | None
    scale: float
    cost: Omission | None


@dataclass
class IndexerLoss:
    """Accumulates KL(attention || indexer) per layer over one forward pass. A recomputed layer is not counted twice.

    kl: layer -> summed KL, an fp32 scalar with gradient; rows: rows counted, int64 scalar, the same in every layer.
    """

    kl: dict[int, Tensor] = field(default_factory=dict)
    rows: Tensor | None = None

    def observe(self, inputs: LayerInputs, projected: tuple[Tensor, Tensor, Tensor] | None) -> None:
        """Score one layer; `projected` holds the indexer's q, k, w when the selection has computed them already."""
        x = inputs
        q, k, w = projected if projected is not None else x.indexer(*x.inputs)
        kl, rows = ops.indexer_kl(q, k, w, x.q, x.k, x.lse, x.cu_seqlens, x.selection, x.scale, x.cost)
        if x.layer not in self.kl:
            self.kl[x.layer] = kl
            self.rows = rows

    def sum(self) -> Tensor:
        """KL summed over layers and rows: divide by a global count of rows times layers."""
        if not self.kl:
            raise ValueError("no indexer loss was recorded: is the model converted, and was the context in train mode?")
        return torch.stack(list(self.kl.values())).sum()

    def total(self) -> Tensor:
        """Mean KL over layers and rows, carrying gradient."""
        total = self.sum()
        assert self.rows is not None
        return total / (self.rows * len(self.kl)).clamp(min=1)

    def per_layer(self) -> dict[int, float]:
        rows = 0 if self.rows is None else int(self.rows)
        return {layer: float(kl.detach()) / max(1, rows) for layer, kl in sorted(self.kl.items())}


@dataclass
class Served:
    """An indexer's work in one forward pass, for every layer that it serves: its inputs, its q, k, w and the selection made of them."""

    indexer: Any
    inputs: tuple[Tensor, ...]
    projected: tuple[Tensor, Tensor, Tensor] | None = None
    selection: Selection | None = None


@dataclass(frozen=True, kw_only=True)
class ForwardContext:
    """positions int64 [tokens]: logical positions; cu_seqlens int32 [n + 1]: bounds of the query tokens; seq_lens int32 [n]: contexts,
    these tokens included; block_table int32 [n, max_pages] and slot_mapping int64 [tokens] (physical slots of these tokens) with a
    cache that has .k[layer], .v[layer] [pages, page, Hkv, D] and .index[layer] [pages, page, D_I].

    selection_in replays given sets, and the indexer does not run; selection_out is filled per layer; observer (indexer_loss) sees every
    converted layer in train mode; force_sparse runs the sparse path also where every set is the identity (tests). coupled lets the KL's
    gradient into the model through the indexer's input: what skipping DSA's recipe does, for the ablation only.

    experts_in replays given experts, layer -> int64 [tokens, k], and the routers choose nothing; experts_out is filled per layer with
    experts (models/routing.py).

    max_seq_len (a bound is enough) and fresh (no earlier context) are read off the tensors where they are not given, which waits for a
    GPU. A CUDA graph must not wait, and a training step should not wait in every layer: with faults int32 [1] on the device a bad score
    sets it to 1 instead of raising, and scratch, filled by the operations, serves all layers of a decode. fused:
    `models/inference.py` computes the rows; exact: with bits that depend on no batch; side: a second stream, on which a decode step
    chooses its sets, once they are scored, while the layer's queries, keys and values are made.
    """

    mode: str
    positions: Tensor
    cu_seqlens: Tensor
    seq_lens: Tensor
    block_table: Any = None  # Tensors in prefill and decode, checked on construction
    slot_mapping: Any = None
    cache: Any = None
    selector: str = "indexer"
    selection_in: Mapping[int, Selection] | None = None
    selection_out: dict[int, Selection] | None = None
    experts_in: Mapping[int, Tensor] | None = None
    experts_out: dict[int, Tensor] | None = None
    indexer_loss: IndexerLoss | None = None
    force_sparse: bool = False
    coupled: bool = False
    max_seq_len: int = -1
    fresh: bool | None = None  # prefill without an earlier context: K and V need not be read back
    faults: Tensor | None = None
    fused: bool = False
    exact: bool = False
    side: Branch | None = None
    scratch: dict[Any, Any] = field(init=False, default_factory=dict)
    served: dict[int, Served] = field(
        init=False, default_factory=dict
    )  # layer with an indexer -> its work in this pass

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ValueError(f"forward mode {self.mode!r} is none of {MODES}")
        if self.selector not in SELECTORS:
            raise ValueError(f"selector {self.selector!r} is none of {SELECTORS}")
        if self.mode != "train":
            missing = [name for name in ("block_table", "slot_mapping", "cache") if getattr(self, name) is None]
            if missing:
                raise ValueError(f"a {self.mode} context needs {', '.join(missing)}")
        if self.max_seq_len < 0:
            object.__setattr__(self, "max_seq_len", int(self.seq_lens.max()) if len(self.seq_lens) else 0)
        if self.fresh is None:
            queries = self.cu_seqlens[1:] - self.cu_seqlens[:-1]
            object.__setattr__(self, "fresh", bool((queries.to(self.seq_lens.device) == self.seq_lens).all()))
        if self.mode == "train" and not self.fresh:
            raise ValueError("a train context holds whole sequences: seq_lens must equal the lengths in cu_seqlens")

    def check_tokens(self, count: int) -> None:
        """ValueError unless a layer's input has this context's tokens: it would attend by the sequences of another batch."""
        if count != len(self.positions):
            raise ValueError(
                f"a layer got {count} tokens in a forward context of {len(self.positions)}: the context belongs to another batch; pass its own "
                "by models.forward.hidden_states, or open forward_context around this pass and its backward"
            )

    def check_faults(self) -> None:
        """ValueError where a score was NaN. Waits for the device, once a pass."""
        if self.faults is not None and int(self.faults):
            self.faults.zero_()
            raise ValueError("top-k: a score is NaN; the indexer's inputs or weights are not finite")

    @property
    def scores(self) -> bool:
        """Whether sets are chosen by the indexers' scores."""
        return self.selector in ("indexer", "random_ties")


def train_context(lengths: list[int], device: torch.device | str = "cpu", **options: Any) -> ForwardContext:
    """The train context of packed sequences of these lengths."""
    ends = [0, *accumulate(lengths)]
    bounds = known(torch.tensor(ends, dtype=torch.int32).to(device), ends)
    positions = (
        torch.cat([torch.arange(n) for n in lengths]).to(device) if lengths else torch.empty(0, dtype=torch.int64)
    )
    return ForwardContext(
        mode="train", positions=positions, cu_seqlens=bounds, seq_lens=known(bounds.diff(), lengths), fresh=True,
        max_seq_len=max(lengths, default=0), faults=faults_of(bounds), **options,
    )  # fmt: skip


def faults_of(tensor: Tensor) -> Tensor | None:
    """Where a pass on the tensor's GPU notes bad scores, for `hidden_states` to look at once; None on a CPU, which need not wait."""
    return torch.zeros(1, dtype=torch.int32, device=tensor.device) if tensor.is_cuda else None


_open: dict[int, tuple[ForwardContext, ...]] = {}  # by thread: what it has open, the innermost last


@contextmanager
def forward_context(ctx: ForwardContext) -> Iterator[ForwardContext]:
    me = threading.get_ident()
    before = _open.get(me, ())
    _open[me] = (*before, ctx)
    try:
        yield ctx
    finally:
        if before:
            _open[me] = before
        else:
            del _open[me]


def open_context() -> ForwardContext | None:
    """This thread's. Autograd recomputes layers in threads of its own, which have none: theirs is the only one that is open anywhere."""
    mine = _open.get(threading.get_ident())
    if mine is not None:
        return mine[-1]
    others = list(_open.values())
    return others[0][-1] if len(others) == 1 else None


def current_context() -> ForwardContext:
    found = open_context()
    if found is None:
        raise RuntimeError(
            f"{len(_open)} threads have a forward context open, and this one has none, so it is not known which to take: train in one "
            "thread of a process at a time"
            if _open
            else "no forward context is open: call models.forward.hidden_states, or open forward_context(ctx)"
        )
    return found
