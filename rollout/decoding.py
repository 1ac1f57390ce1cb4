"""One decode step at a fixed shape: static inputs -> one forward -> tokens, captured as a CUDA graph for each shape that occurs.

    host rows -> [one copy] -> static inputs -> forward, head, draw -> static outputs -> [one copy, one wait] -> host

A shape is (rows, capacity): the next sizes of `BUCKETS` and of the capacities up to the context. Rows that fill up a batch are sequences of one
token on the scratch page. Nothing inside a step looks at a value on the host: plans follow from the shape, and what would be raised
there (a NaN score, logits that are not finite) is a flag that comes back with the tokens. Where nothing is captured (`capture` False) the
same step runs as it is, which is how a machine without a GPU tests it.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from winnow.kernels import ops
from winnow.kernels.branch import Branch, captured
from winnow.models.context import ForwardContext
from winnow.models.forward import hidden_states, lm_head_weight
from winnow.rollout.cache import PagedCache
from winnow.rollout.records import NARROW_LIMIT
from winnow.rollout.sampler import uniforms
from winnow.rollout.scheduler import Slots
from winnow.rollout.sequence import Sequence

BUCKETS = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)  # rows; beyond, multiples of 128
PATIENCE = 48  # steps that run at a larger shape before theirs is captured: a capture takes about as long as they lose
SPARE = 1 / 16  # of the device's memory, which a capture wants free before it
LEAST = 2048  # the smallest capacity of a model without an indexer
ALIGN = 256  # bytes: kernels are compiled for aligned addresses
# One number a row of each goes to the device, in one copy, and comes back.
INPUTS = {"ids": torch.int64, "after": torch.int64, "positions": torch.int64, "slots": torch.int64, "rows": torch.int64, "columns": torch.int64,
          "pages": torch.int32, "lengths": torch.int32, "temperature": torch.float32, "uniform": torch.float64}  # fmt: skip
OUTPUTS = {"tokens": torch.int64, "logprobs": torch.float32, "flags": torch.int32}


@dataclass(frozen=True, slots=True)
class Shape:
    """rows of the batch; positions that a sequence may have; whether tokens are drawn inside, and index sets recorded."""

    rows: int
    capacity: int
    draws: bool
    records: bool


@dataclass(frozen=True, slots=True)
class Stepped:
    """What a step left: tokens int64 and logprobs fp32 [rows] when it drew them, else logits fp32 [rows, V] on the device; sets of the
    recorded layers [layers, rows, k], filled once `Decoding.flush` has returned."""

    tokens: np.ndarray | None
    logprobs: np.ndarray | None
    logits: Tensor | None
    sets: np.ndarray | None


class Block:
    """Named arrays of one number a row in one piece of memory, on the device and twice (pinned) on the host: while a step is under way,
    the host fills the other one for the next."""

    def __init__(self, fields: dict[str, torch.dtype], rows: int, device: torch.device) -> None:
        sizes = [kind.itemsize * rows for kind in fields.values()]
        starts = np.cumsum([0, *(-(-size // ALIGN) * ALIGN for size in sizes)])
        self.device = torch.zeros(int(starts[-1]), dtype=torch.uint8, device=device)
        self.on_device: dict[str, Tensor] = {}
        self._hosts = [
            torch.zeros(int(starts[-1]), dtype=torch.uint8, pin_memory=device.type == "cuda") for _ in range(2)
        ]
        self._views: list[dict[str, np.ndarray]] = [{}, {}]
        self._turn = 0
        for (name, kind), size, start in zip(fields.items(), sizes, starts.tolist(), strict=False):
            self.on_device[name] = self.device[start : start + size].view(kind)
            for host, views in zip(self._hosts, self._views, strict=True):
                views[name] = host[start : start + size].view(kind).numpy()

    def turn(self) -> dict[str, np.ndarray]:
        """The host's other arrays; those of two turns ago are written over."""
        self._turn = 1 - self._turn
        return self._views[self._turn]

    def send(self) -> None:
        self.device.copy_(self._hosts[self._turn], non_blocking=True)

    def fetch(self) -> None:
        """Starts the copy to the host; the caller waits."""
        self._hosts[self._turn].copy_(self.device, non_blocking=True)


@dataclass(slots=True, kw_only=True)
class Launched:
    """A step under way: its shape and rows, when it is over, where its outputs arrive on the host, its logits, the copy of its sets."""

    shape: Shape
    count: int
    done: Any  # a CUDA event; None where nothing runs behind the host's back
    host: dict[str, np.ndarray]
    logits: Tensor | None
    copy: Copy | None


@dataclass(slots=True, kw_only=True)
class Copy:
    """Recorded sets on their way: when they are in `source` (pinned), the array that they go to, and what must live until then."""

    done: Any
    source: Tensor
    target: np.ndarray
    staged: Tensor


@dataclass(slots=True, kw_only=True)
class Flight:
    """A decode step under way: the sequences that it runs for, as they were when it was launched."""

    sequences: list[Sequence]
    slots: np.ndarray
    lengths: np.ndarray
    step: Launched

    @property
    def alive(self) -> list[bool]:
        """Whose token still counts: not that of a sequence whose turn ended with the step before, or that was pushed out meanwhile."""
        return [sequence.slot == slot for sequence, slot in zip(self.sequences, self.slots.tolist(), strict=True)]


class Decoding:
    """The decode steps of one engine. `graphs` counts what was captured."""

    def __init__(
        self, model: Any, cache: PagedCache, *, max_batch: int, context: int, index_k: int, layers: tuple[int, ...], selector: str,
        fused: bool, exact: bool, capture: bool,
    ) -> None:  # fmt: skip
        self.model, self.cache, self.layers, self.selector = model, cache, layers, selector
        self.fused, self.exact, self.capture = fused, exact, capture
        self.index_k = index_k if selector != "dense" else 0
        weight = lm_head_weight(model)
        self.device, self.context = weight.device, context
        self.buckets = [n for n in BUCKETS if n < max_batch]
        self.buckets += [*range(self.buckets[-1] + 128, max_batch, 128)] if max_batch > BUCKETS[-1] else []
        self.buckets.append(max_batch)
        self.capacities = [min(context, self.index_k or LEAST)]
        while self.capacities[-1] < context:
            self.capacities.append(min(context, 2 * self.capacities[-1]))
        # Block tables live on the device by batch slot, and only what changes is sent; the last row is that of padding.
        pages = cache.pages_for(context)
        self.table = torch.full((max_batch + 1, pages), cache.scratch_page, dtype=torch.int32, device=self.device)
        self._seen = np.full(max_batch, -1, dtype=np.int64)  # `Slots.stamp` of what the table holds
        self._inputs: dict[int, Block] = {}
        self._outputs: dict[int, Block] = {}
        self._steps: dict[Shape, tuple[Callable[[], None], dict[str, Tensor]]] = {}
        self._pool: Any = None
        self._pinned: dict[Shape, list[Tensor]] = {}  # two, used in turn
        self._copying: Copy | None = None  # of the step that landed last
        self._side = torch.cuda.Stream() if self.device.type == "cuda" else None  # copies of sets
        self.branch = Branch() if capture else None  # of a graph: sets beside the layer's projections
        self.graphs = 0
        self.patience = PATIENCE if capture else 0
        self._asked: Counter[Shape] = Counter()  # steps of shapes that are not captured
        self._stream = (
            torch.cuda.Stream() if capture else None
        )  # of captures: graphs that share memory are captured on one

    def launch(
        self, state: Slots, slots: np.ndarray, lengths: np.ndarray, draws: bool, records: bool,
        after: tuple[Launched, np.ndarray] | None,
    ) -> Launched | None:  # fmt: skip
        """Starts a step: one token for each batch slot of `slots`, whose sequences have `lengths` tokens and their pages.

        after: the step under way (one at most), which draws its tokens, and the row of it, int64 [rows], whose token is each sequence's newest;
        None: `state.last` are. None where the step has a shape that must be captured first, which `after` would not survive.
        """
        shape = self._shape(len(slots), int(lengths.max()), draws, records)
        rows = shape.rows
        if rows not in self._inputs:
            self._inputs[rows] = Block(INPUTS, rows, self.device)
            self._outputs[rows] = Block(OUTPUTS, rows, self.device)
        if shape not in self._steps:
            if after is not None:
                return None
            self._steps[shape] = self._prepare(shape)
        inputs, outputs = self._inputs[rows], self._outputs[rows]
        self._fill(inputs.turn(), state, slots, lengths, None if after is None else after[1])
        inputs.send()
        if after is not None:
            drawn = self._outputs[after[0].shape.rows].on_device["tokens"]
            torch.index_select(drawn, 0, inputs.on_device["after"], out=inputs.on_device["ids"])
        replay, static = self._steps[shape]
        replay()
        host = outputs.turn()
        outputs.fetch()
        done = torch.cuda.Event() if self.device.type == "cuda" else None
        if done is not None:
            done.record()
        copy = self._copy_sets(shape, static["sets"], len(slots)) if shape.records else None
        logits = None if draws else static["logits"][: len(slots)]
        return Launched(shape=shape, count=len(slots), done=done, host=host, logits=logits, copy=copy)

    def land(self, step: Launched, wanted: bool = True) -> Stepped:
        """Waits for a step. ValueError: a score or logit is not finite, unless none of it is `wanted` any more."""
        if step.done is not None:
            step.done.synchronize()
        self.flush()
        self._copying = step.copy
        if wanted:
            self._check(step.host["flags"])
        sets = None if step.copy is None else step.copy.target
        if step.logits is not None:
            return Stepped(None, None, step.logits, sets)
        tokens, logprobs = (step.host[name][: step.count].copy() for name in ("tokens", "logprobs"))
        return Stepped(tokens, logprobs, None, sets)

    def flush(self) -> None:
        """Until it returns, the recorded sets of the step that landed last may still be on their way."""
        if self._copying is None:
            return
        copy, self._copying = self._copying, None
        if copy.done is not None:
            copy.done.synchronize()
        np.copyto(copy.target, copy.source.numpy().view(copy.target.dtype)[:, : copy.target.shape[1]])

    def _shape(self, count: int, longest: int, draws: bool, records: bool) -> Shape:
        """The smallest shape that holds `count` sequences of at most `longest` tokens. While it has been asked for only a few times, the next
        larger one of those that are there, if that has at most four times its capacity."""
        shape = Shape(
            self.buckets[bisect_left(self.buckets, count)],
            self.capacities[bisect_left(self.capacities, longest)],
            draws,
            records and 0 < self.index_k < longest,
        )
        if shape in self._steps:
            return shape
        larger = [
            other for other in self._steps
            if other.rows >= shape.rows and shape.capacity <= other.capacity <= 4 * shape.capacity
            and (other.draws, other.records) == (shape.draws, shape.records)
        ]  # fmt: skip
        self._asked[shape] += 1
        if not larger or self._asked[shape] > self.patience:
            return shape
        return min(larger, key=lambda other: (other.capacity, other.rows))

    def _fill(
        self, host: dict[str, np.ndarray], state: Slots, slots: np.ndarray, lengths: np.ndarray, after: np.ndarray | None
    ) -> None:  # fmt: skip
        """The step's inputs, and the block tables of slots that have changed hands."""
        size, scratch, count = self.cache.page_size, self.cache.scratch_page, len(slots)
        changed = slots[self._seen[slots] != state.stamp[slots]]
        if len(changed):
            fresh = state.table[changed]
            used = self.cache.pages_for(int(state.length[changed].max()))
            self.table[torch.from_numpy(changed).to(self.device), :used] = torch.from_numpy(fresh[:, :used]).to(
                self.device
            )
            self._seen[changed] = state.stamp[changed]
        positions = lengths - 1
        columns = positions // size
        pages = state.table[slots, columns]
        for name, values, padding in (
            ("ids", state.last[slots], 0), ("after", 0 if after is None else after, 0), ("positions", positions, 0), ("lengths", lengths, 1), ("rows", slots, len(self.table) - 1),
            ("columns", columns, 0), ("pages", pages, scratch), ("slots", pages.astype(np.int64) * size + positions % size, scratch * size),
            ("uniform", uniforms(state.stream[slots], lengths), 0.0), ("temperature", state.temperature[slots], 0.0),
        ):  # fmt: skip
            host[name][:count] = values
            host[name][count:] = padding

    def _prepare(self, shape: Shape) -> tuple[Callable[[], None], dict[str, Tensor]]:
        """The step of this shape as a function, and its outputs that are too large to fetch each time."""
        static: dict[str, Tensor] = {}
        if not self.capture:
            return lambda: self._step(shape, static), static
        # Once as it is, on the inputs of padding: kernels are compiled and libraries make their plans, none of which a capture allows.
        nobody = np.zeros(0, dtype=np.int64)
        self._fill(self._inputs[shape.rows].turn(), Slots(1, 1), nobody, nobody, None)
        self._inputs[shape.rows].send()
        assert self._stream is not None
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            self._step(shape, static)
        torch.cuda.synchronize()  # nothing of that run is under way when its memory is given back
        static.clear()
        free, total = torch.cuda.mem_get_info(self.device)
        if free < SPARE * total:
            torch.cuda.empty_cache()
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        graph, _ = captured(partial(self._step, shape, static), self._stream, self._pool)
        torch.cuda.current_stream().wait_stream(self._stream)
        self.graphs += 1
        return graph.replay, static

    def _step(self, shape: Shape, static: dict[str, Tensor]) -> None:
        x, y = self._inputs[shape.rows].on_device, self._outputs[shape.rows].on_device
        self.table[x["rows"], x["columns"]] = x["pages"]
        table = self.table[:, : self.cache.pages_for(shape.capacity)].index_select(0, x["rows"])
        y["flags"].zero_()
        sets: dict[int, Any] | None = {} if shape.records else None
        context = ForwardContext(
            mode="decode",
            positions=x["positions"],
            cu_seqlens=torch.arange(shape.rows + 1, dtype=torch.int32, device=self.device),
            seq_lens=x["lengths"],
            block_table=table,
            slot_mapping=x["slots"],
            cache=self.cache,
            selector=self.selector,
            selection_out=sets,
            max_seq_len=shape.capacity,
            fresh=False,
            faults=y["flags"][:1],
            fused=self.fused,
            exact=self.exact,
            side=self.branch if self.fused else None,
        )
        hidden = hidden_states(self.model, x["ids"], context)
        logits = ops.linear(hidden, lm_head_weight(self.model), None, self.exact)
        if shape.draws:
            faults = y["flags"][1:2] if shape.rows > 1 else y["flags"][:1]
            ops.draw(logits, x["temperature"], x["uniform"], y["tokens"], y["logprobs"], faults)
        else:
            static["logits"] = logits
        if sets is not None:
            assert tuple(sorted(sets)) == self.layers, (
                f"selections of layers {sorted(sets)} were recorded, want {self.layers}"
            )
            stacked = torch.stack([sets[layer].indices for layer in self.layers])
            # 16 bits: -1 becomes the largest number, which is the padding value
            narrow = self.context <= NARROW_LIMIT
            static["sets"] = stacked.to(torch.int16) if narrow else stacked.masked_fill_(stacked < 0, 2**31 - 1)

    def _copy_sets(self, shape: Shape, sets: Tensor, count: int) -> Copy:
        """Starts the copy of recorded sets, which the next step of this shape overwrites and must not wait for. The copy of the step that
        landed last is finished meanwhile: the next but one has the same place on the host."""
        self.flush()
        kind = np.uint16 if sets.dtype == torch.int16 else np.int32
        target = np.empty((sets.shape[0], count, sets.shape[2]), dtype=kind)
        staged = sets.clone()
        if self._side is None:
            return Copy(done=None, source=staged, target=target, staged=staged)
        if shape not in self._pinned:
            self._pinned[shape] = [torch.empty(sets.shape, dtype=sets.dtype, pin_memory=True) for _ in range(2)]
        pinned = self._pinned[shape]
        pinned.reverse()
        self._side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._side):
            pinned[0].copy_(staged, non_blocking=True)
            done = torch.cuda.Event()
            done.record()
        return Copy(done=done, source=pinned[0], target=target, staged=staged)

    def _check(self, flags: np.ndarray) -> None:
        if flags[0]:
            raise ValueError("a decode step has a score or logit that is NaN: the weights or the cache are not finite")
        if len(flags) > 1 and flags[1]:
            raise ValueError("the logits of a decode step are not finite: the weights or the cache are not finite")
