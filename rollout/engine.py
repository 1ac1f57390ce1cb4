"""The native engine: continuous batching over a paged cache, running the learner's own module.

    add / extend -> waiting -> (slot) -> prefill in chunks -> running -> one token a step -> turn ends -> extend or release

A step is one forward: a packed prefill of up to `prefill_chunk` tokens while anything waits for one, otherwise one token for every
running sequence. Samples of one prompt start from one prefill and share its full pages. When pages run out the youngest sequence gives
its pages back and is prefilled again later; the same happens to everything when the weights change, so no key of an old policy is ever
read. Rows are independent: a request draws the same tokens whatever shares its batch, up to rounding of the matrix products.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from collections.abc import Sequence as Row
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from winnow.kernels import ops
from winnow.kernels.packing import known, round_up
from winnow.models import inference
from winnow.models.attach import cache_shape, indexer_config
from winnow.models.context import ForwardContext
from winnow.models.forward import hidden_states, lm_head_weight
from winnow.rollout.cache import PagedCache
from winnow.rollout.decoding import Decoding
from winnow.rollout.records import NARROW_LIMIT, compact
from winnow.rollout.sampler import Drawn, sample, stream_seed, uniforms
from winnow.rollout.scheduler import Scheduler
from winnow.rollout.schema import Sampling
from winnow.rollout.sequence import Sequence, Span
from winnow.rollout.weights import copy_into

SCORED = 256  # rows of logits of one piece of an exact scoring
ON_UPDATE = ("recompute", "drain")


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineConfig:
    """Sizes and switches of one engine. Cache memory: num_pages * page_size * (2 * Hkv * D + D_I) * layers * element size."""

    page_size: int = 16
    num_pages: int = 2048
    max_batch: int = 64  # sequences that decode together
    prefill_chunk: int = 2048  # tokens of one prefill forward
    max_context: int | None = None  # None: the model's max_position_embeddings
    record_indices: bool = False
    keep_kept_sets: bool = True
    selector: str = "indexer"
    cuda_graphs: bool = True  # decode steps as CUDA graphs, where there is a GPU and the model's forward pass allows it
    exact: bool = False  # on a GPU: bits of a token that depend on its own sequence alone, not on the batch or on how it was computed
    reuse_prefixes: bool = (
        True  # start a prefill behind the pages that an earlier request left, within one policy version
    )
    on_update: str = "recompute"  # new weights: live samples go on under them, or (drain) end under the old ones first
    drain_timeout_s: float = 300.0  # how long an update waits for them

    def __post_init__(self) -> None:
        for name in ("page_size", "num_pages", "max_batch", "prefill_chunk"):
            if getattr(self, name) < 1:
                raise ValueError(f"rollout.{name} is {getattr(self, name)}, but it must be >= 1")
        if self.on_update not in ON_UPDATE:
            raise ValueError(f"rollout.on_update is {self.on_update!r}, but it must be one of {', '.join(ON_UPDATE)}")
        if self.drain_timeout_s <= 0:
            raise ValueError(f"rollout.drain_timeout_s is {self.drain_timeout_s}, but it must be > 0 seconds")


class Engine:
    """One model, one cache, one device. Not thread-safe: one thread calls it."""

    def __init__(self, model: Any, tokenizer: Any, config: EngineConfig, end_ids: Iterable[int] = ()) -> None:
        self.model, self.tokenizer, self.config = model.eval(), tokenizer, config
        shape = model.config
        weight = lm_head_weight(model)
        self.device, self.vocab = weight.device, weight.shape[0]
        longest = shape.max_position_embeddings
        self.context = min(longest, config.max_context or longest)
        indexer = indexer_config(model)
        self.index_k = indexer.top_k if indexer else 0
        self.records = config.record_indices and indexer is not None and config.selector != "dense"
        self.record_dtype = np.uint16 if self.context <= NARROW_LIMIT else np.int32
        self.layers = tuple(range(shape.num_hidden_layers))
        self.cache = PagedCache(
            **cache_shape(model),
            num_pages=config.num_pages,
            page_size=config.page_size,
            dtype=weight.dtype,
            device=self.device,
        )
        ends = set(end_ids) | _end_ids(model, tokenizer)
        self._end_ids = frozenset(ends)
        self._ends = np.array(sorted(ends), dtype=np.int64)
        self.version = 0
        self.counters = {"prefill_tokens": 0, "decode_tokens": 0, "prefill_steps": 0, "decode_steps": 0}
        self.scheduler = Scheduler(
            self.cache,
            config.max_batch,
            config.prefill_chunk,
            self.context,
            reuse=config.reuse_prefixes,
            record_from=self.index_k if self.records else None,
        )
        self.paused = False
        self.fused = self.device.type == "cuda" and inference.takes(model)
        if config.exact and self.device.type == "cuda" and not self.fused:
            raise ValueError(
                f"rollout.exact is set, but a {shape.model_type} model has no exact forward pass: it needs one of {inference.FAMILIES}"
            )
        if self.fused:
            inference.join(model)
        graphs = self.fused and config.cuda_graphs and config.selector in ("indexer", "dense")
        self.decoding = self.static_decoding(capture=True) if graphs else None

    def static_decoding(self, capture: bool) -> Decoding:
        """Decode steps at fixed shapes; capture: as CUDA graphs."""
        return Decoding(
            self.model, self.cache, max_batch=self.config.max_batch, context=self.context, index_k=self.index_k, layers=self.layers,
            selector=self.config.selector, fused=self.fused, exact=self.config.exact, capture=capture,
        )  # fmt: skip

    @property
    def has_work(self) -> bool:
        """Whether `step` would do anything."""
        return not self.paused and self.scheduler.has_work and not self.drained

    @property
    def stats(self) -> dict[str, int]:
        """Counters since the start, and the version in use."""
        scheduler = self.scheduler
        more = {"preemptions": scheduler.preemptions, "reused_tokens": scheduler.reused_tokens, "version": self.version}
        return {**self.counters, **more}

    def pause(self) -> None:
        """Stops at this token: `step` does nothing until `resume`. What is cached stays."""
        self.paused = True

    def drain(self) -> None:
        """Lets samples that have begun run to their end and starts no other until `resume`."""
        self.scheduler.draining = True

    def resume(self) -> None:
        """Ends `pause` and `drain`."""
        self.paused = self.scheduler.draining = False

    @property
    def drained(self) -> bool:
        """Whether a drain is over: no sample that has begun is left, between turns or otherwise."""
        return self.scheduler.draining and not self.scheduler.started

    def abort(self) -> list[Sequence]:
        """Ends every live sample where it is, as "abort"; returns them, released."""
        aborted = list(self.scheduler.live)
        for sequence in aborted:
            self.release(sequence)
            sequence.finish = "abort"
        return aborted

    def add(
        self,
        prompt: Row[int],
        sampling: Sampling,
        num_samples: int = 1,
        request_id: str = "",
        max_total_tokens: int | None = None,
        first_sample: int = 0,
    ) -> list[Sequence]:
        """Queues samples `first_sample`.. of one prompt; draws depend on request id and sample number, prefills are shared by tokens.
        ValueError: an empty or too long prompt, ids outside the vocabulary, a cache that could not hold one sample.
        """
        tokens = [int(token) for token in prompt]
        what = f"request {request_id!r}" if request_id else "a request"
        if not tokens:
            raise ValueError(f"{what} has an empty prompt: there is nothing to continue; give it at least one token")
        if min(tokens) < 0 or max(tokens) >= self.vocab:
            wrong = next(token for token in tokens if not 0 <= token < self.vocab)
            raise ValueError(
                f"{what} holds token id {wrong}, outside the model's vocabulary of {self.vocab}: is the tokenizer its own?"
            )
        if num_samples < 1:
            raise ValueError(f"{what} asks for {num_samples} samples, but it must be at least 1")
        total = min(self.context, max_total_tokens or self.context)
        if len(tokens) >= total:
            limit = "max_total_tokens" if total < self.context else "the context"
            raise ValueError(
                f"{what} has a prompt of {len(tokens)} tokens, but {limit} is {total}, which leaves no room for a reply: shorten the "
                "prompt or raise that limit"
            )
        limit = min(total, len(tokens) + sampling.max_tokens)
        self.cache.check_fits(limit if max_total_tokens is None else total, what)
        sequences = [
            Sequence(
                tokens=list(tokens),
                order=self.scheduler.next_order(),
                sampling=sampling,
                stream=stream_seed(sampling.seed, request_id, first_sample + number),
                total_limit=total,
                limit=limit,
                turn_start=len(tokens),
                logprobs=[0.0] * len(tokens),
                versions=[-1] * len(tokens),
            )
            for number in range(num_samples)
        ]
        self.scheduler.add(sequences)
        return sequences

    def extend(self, sequence: Sequence, tokens: Row[int]) -> None:
        """Opens the next turn of a finished one with given tokens; what is cached stays. ValueError when no token would be left."""
        assert sequence.finish is not None and sequence in self.scheduler.live, (
            "only a finished, unreleased sequence can be extended"
        )
        if len(tokens) >= sequence.room:
            raise ValueError(
                f"{len(tokens)} more tokens leave no room for a reply: {sequence.room} tokens are left of the budget"
            )
        limit = min(sequence.total_limit, len(sequence.tokens) + len(tokens) + sequence.sampling.max_tokens)
        self.cache.check_fits(limit, "a conversation")
        sequence.tokens.extend(int(token) for token in tokens)
        sequence.logprobs.extend([0.0] * len(tokens))
        sequence.versions.extend([-1] * len(tokens))
        sequence.turn_start, sequence.limit, sequence.finish = len(sequence.tokens), limit, None
        self.scheduler.resume(sequence)

    def release(self, sequence: Sequence) -> None:
        """Ends a sequence in any state and gives its pages back. Its tokens stay readable."""
        if self.decoding is not None:
            self.decoding.flush()
        self.scheduler.release(sequence)

    def step(self) -> list[Sequence]:
        """One forward; returns the sequences whose turn ended. Extend or release each before the next step, or its pages stay taken."""
        if self.paused:
            return []
        with torch.inference_mode():
            ended = self._start(self.scheduler.admit())
            prefilled = self._prefill()
            return ended + (prefilled if prefilled is not None else self._decode())

    def generate(
        self,
        prompts: Row[Row[int]],
        sampling: Sampling | Row[Sampling],
        num_samples: int = 1,
        request_ids: Row[str] | None = None,
    ) -> list[list[Sequence]]:
        """Samples every prompt to its end; one list of sequences a prompt, released. Draws depend on the request id (default: index)."""
        names = request_ids if request_ids is not None else [str(i) for i in range(len(prompts))]
        each = [sampling] * len(prompts) if isinstance(sampling, Sampling) else sampling
        groups: list[list[Sequence]] = []
        try:
            for prompt, parameters, name in zip(prompts, each, names, strict=True):
                groups.append(self.add(prompt, parameters, num_samples, name))
            while self.has_work:
                for sequence in self.step():
                    self.release(sequence)
        finally:
            for sequence in (s for group in groups for s in group):
                self.release(sequence)
        return groups

    def load_weights(self, tensors: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]], version: int) -> None:
        """Overwrites all weights in place; WeightError by name leaves the old ones. What is cached is dropped: live sequences go on
        under the new policy, from a new prefill of their own tokens.
        """
        copy_into(self.model, dict(tensors), version)
        self.version = version
        self.scheduler.evict_all()

    @torch.inference_mode()
    def score(self, tokens: Row[int], temperature: float = 1.0) -> np.ndarray:
        """The engine's own log-probabilities of given tokens through the paged path: fp32 [tokens], 0 for the first. For parity."""
        span = Span(tokens=list(tokens), order=-1)
        self.cache.check_fits(len(span.tokens), "a sequence to score")
        result = np.zeros(len(span.tokens), dtype=np.float32)
        try:
            while span.num_missing:
                start, count = span.num_cached, min(span.num_missing, self.config.prefill_chunk)
                self.scheduler.take_pages(span, start + count, anyone=True)
                hidden = self._prefill_forward([span], [count])
                targets = torch.tensor(span.tokens[start + 1 : start + count + 1], device=self.device)
                logprobs = self._score(hidden[: len(targets)], targets, temperature)
                result[start + 1 : start + 1 + len(targets)] = logprobs.cpu().numpy()
        finally:
            self.cache.free(span.pages)
        return result

    def _score(self, hidden: Tensor, targets: Tensor, temperature: float) -> Tensor:
        """Log-probabilities fp32 [T] of targets int64 [T]; in exact mode by the very kernel that drew them."""
        weight = lm_head_weight(self.model)
        if not (self.config.exact and self.fused):
            return ops.token_logprobs(hidden, weight, targets, temperature, None)[0]
        parts = []
        for some, wanted in zip(hidden.split(SCORED), targets.split(SCORED), strict=True):
            warm = torch.full((len(some),), temperature, dtype=torch.float32, device=self.device)
            logprobs, faults = torch.empty_like(warm), torch.zeros(1, dtype=torch.int32, device=self.device)
            ops.draw(ops.linear(some, weight, None, True), warm, warm.double(), wanted, logprobs, faults, given=True)
            parts.append(logprobs)
        return torch.cat(parts) if parts else torch.empty(0, device=self.device)

    def _start(self, sequences: list[Sequence]) -> list[Sequence]:
        """First tokens of samples whose prompt is prefilled; returns those that ended with it."""
        forked, logits = self.scheduler.start(sequences)
        return self._draw(forked, torch.stack(logits)) if forked else []

    def _prefill(self) -> list[Sequence] | None:
        """One packed chunk; returns those whose turn ended. None when nothing could get pages: running sequences go first then."""
        spans, counts = self.scheduler.plan_prefill()
        if not spans:
            return None
        hidden = self._prefill_forward(spans, counts)
        self.counters["prefill_steps"] += 1
        done = [i for i, span in enumerate(spans) if span.num_missing == 0]
        if not done:
            return []
        last = torch.from_numpy(np.cumsum(counts)[done] - 1).to(self.device)
        logits = self._logits(hidden[last])
        starting, resumed, rows = self.scheduler.prefilled([spans[i] for i in done], logits)
        ended = self._draw(resumed, logits[torch.tensor(rows, device=self.device)]) if resumed else []
        return ended + self._start(starting)

    def _prefill_forward(self, spans: list[Span], counts: list[int]) -> Tensor:
        """Runs the next counts[i] tokens of each span through the model; their pages exist. Returns hidden [sum(counts), C]."""
        starts = np.array([span.num_cached for span in spans])
        sizes = np.array(counts)
        offsets = np.concatenate([[0], np.cumsum(sizes)])
        ids = np.concatenate([s.tokens[s.num_cached : s.num_cached + c] for s, c in zip(spans, counts, strict=True)])
        positions = np.arange(offsets[-1]) + np.repeat(starts - offsets[:-1], sizes)
        table = np.zeros((len(spans), max(len(span.pages) for span in spans)), dtype=np.int32)
        for row, span in enumerate(spans):
            table[row, : len(span.pages)] = span.pages
        hidden, sets = self._forward(
            "prefill", ids, positions, np.repeat(np.arange(len(spans)), sizes), offsets, starts + sizes, table
        )
        for row, span in enumerate(spans):
            if sets is not None and span.order >= 0:  # only queries past the k-th position see more than k
                begin = offsets[row] + max(0, self.index_k - int(starts[row]))
                if begin < offsets[row + 1]:
                    span.records.append((sets, int(begin), int(offsets[row + 1])))
            span.num_cached += counts[row]
        self.counters["prefill_tokens"] += int(offsets[-1])
        return hidden

    def _decode(self) -> list[Sequence]:
        """One token for every running sequence; returns those whose turn ended."""
        running = self.scheduler.plan_decode()
        if not running:
            return []
        rows = self.scheduler.slots
        slots = np.array([sequence.slot for sequence in running])
        lengths = rows.length[slots]
        self.counters["decode_tokens"] += len(running)
        self.counters["decode_steps"] += 1
        if self.decoding is not None:
            stepped = self.decoding.run(rows, slots, draws=not rows.filtered(slots), records=self.records)
            self._record_decode(running, lengths, stepped.sets)
            if stepped.logits is not None:
                return self._draw(running, stepped.logits)
            assert stepped.tokens is not None and stepped.logprobs is not None
            return self._append(running, slots, Drawn(tokens=stepped.tokens, logprobs=stepped.logprobs, kept=None))
        table = rows.table[slots, : self.cache.pages_for(int(lengths.max()))]
        each = np.arange(len(running) + 1)
        hidden, sets = self._forward("decode", rows.last[slots], lengths - 1, each[:-1], each, lengths, table)
        self._record_decode(running, lengths, sets)
        return self._draw(running, self._logits(hidden))

    def _record_decode(self, running: list[Sequence], lengths: np.ndarray, sets: np.ndarray | None) -> None:
        """A step's sets [layers, rows, k] to the sequences that are longer than k."""
        if sets is None:
            return
        for row, (sequence, deep) in enumerate(zip(running, (lengths > self.index_k).tolist(), strict=True)):
            if deep:
                sequence.records.append((sets, row, row + 1))

    def _forward(
        self,
        mode: str,
        ids: np.ndarray,
        positions: np.ndarray,
        row_of: np.ndarray,
        offsets: np.ndarray,
        lengths: np.ndarray,
        table: np.ndarray,
    ) -> tuple[Tensor, np.ndarray | None]:
        """hidden [tokens, C], and the index sets [layers, tokens, k] where they are recorded and any query sees more than k."""
        size, num_tokens = self.config.page_size, len(ids)
        # Whole blocks of rows, as packing.ROW_MULTIPLE explains: filled up with sequences of one token each, on the scratch page.
        extra = round_up(num_tokens) - num_tokens if self.device.type == "cpu" else 0
        if extra:
            more = np.arange(extra)
            ids, positions = np.append(ids, 0 * more), np.append(positions, 0 * more)
            row_of, offsets = np.append(row_of, len(lengths) + more), np.append(offsets, num_tokens + 1 + more)
            lengths = np.append(lengths, 1 + 0 * more)
            table = np.concatenate([table, np.full((extra, table.shape[1]), self.cache.scratch_page, table.dtype)])
        slots = table[row_of, positions // size].astype(np.int64) * size + positions % size

        def move(array: np.ndarray, dtype: type) -> Tensor:
            return torch.from_numpy(np.ascontiguousarray(array, dtype=dtype)).to(self.device)

        record = self.records and int(lengths.max()) > self.index_k
        out: dict[int, Any] | None = {} if record else None
        context = ForwardContext(
            mode=mode,
            positions=move(positions, np.int64),
            cu_seqlens=known(move(offsets, np.int32), offsets.tolist()),
            seq_lens=known(move(lengths, np.int32), lengths.tolist()),
            block_table=move(table, np.int32),
            slot_mapping=move(slots, np.int64),
            cache=self.cache,
            selector=self.config.selector,
            selection_out=out,
            max_seq_len=int(lengths.max()),
            fresh=mode == "prefill" and bool((np.diff(offsets) == lengths).all()),
            fused=self.fused,
            exact=self.config.exact and self.fused,
        )
        hidden = hidden_states(self.model, move(ids, np.int64), context)
        hidden = hidden[:num_tokens]
        if out is None:
            return hidden, None
        assert tuple(sorted(out)) == self.layers, (
            f"selections of layers {sorted(out)} were recorded, want {self.layers}"
        )
        stacked = torch.stack([out[layer].indices[:num_tokens] for layer in self.layers])
        return hidden, compact(stacked, self.context)

    def _logits(self, hidden: Tensor) -> Tensor:
        rows, weight = len(hidden), lm_head_weight(self.model)
        if self.device.type == "cpu":
            hidden = torch.nn.functional.pad(hidden, (0, 0, 0, round_up(rows) - rows))
        return ops.linear(hidden, weight, None, self.config.exact)[:rows]

    def _draw(self, sequences: list[Sequence], logits: Tensor) -> list[Sequence]:
        """Draws one token for each sequence (all of them running) from logits [rows, V], and takes those that end out of the batch."""
        slots = np.array([sequence.slot for sequence in sequences])
        return self._append(sequences, slots, self._sample(logits, slots))

    def _sample(self, logits: Tensor, slots: np.ndarray) -> Drawn:
        """A draw for each slot. Without filters on a GPU by the kernel that decode steps use, so that both sides have the same bits."""
        rows = self.scheduler.slots
        params = rows.params(slots)
        if not self.fused or rows.filtered(slots):
            return sample(logits.float(), params, self.config.keep_kept_sets)
        tokens = torch.empty(len(slots), dtype=torch.int64, device=self.device)
        logprobs = torch.empty(len(slots), dtype=torch.float32, device=self.device)
        faults = torch.zeros(1, dtype=torch.int32, device=self.device)
        temperature = torch.from_numpy(params.temperature).to(self.device)
        uniform = torch.from_numpy(uniforms(params.stream, params.position)).to(self.device)
        ops.draw(logits, temperature, uniform, tokens, logprobs, faults)
        if int(faults):
            raise ValueError("the logits of a prefill are not finite: the weights or the cache are not finite")
        return Drawn(tokens=tokens.cpu().numpy(), logprobs=logprobs.cpu().numpy(), kept=None)

    def _append(self, sequences: list[Sequence], slots: np.ndarray, drawn: Drawn) -> list[Sequence]:
        """Writes down one drawn token for each sequence; returns those that end with it."""
        rows = self.scheduler.slots
        rows.length[slots] += 1
        rows.last[slots] = drawn.tokens
        at_end = np.isin(drawn.tokens, self._ends)
        over = (at_end | (rows.length[slots] >= rows.limit[slots])).tolist()
        ended = []
        # A step of hundreds of sequences is a few milliseconds on a GPU: this loop does only what every token needs.
        for sequence, token, logprob, ends in zip(
            sequences, drawn.tokens.tolist(), drawn.logprobs.tolist(), over, strict=True
        ):
            sequence.num_cached = len(sequence.tokens)
            sequence.tokens.append(token)
            sequence.logprobs.append(logprob)
            sequence.versions.append(self.version)
            if ends or (sequence.sampling.stop and self._stop_text(sequence)):
                ended.append(sequence)
        if drawn.kept is not None:
            for sequence, kept in zip(sequences, drawn.kept, strict=True):
                if kept is not None:
                    sequence.kept.append((len(sequence.tokens) - 1, kept))
        for sequence in ended:
            text = sequence.tokens[-1] in self._end_ids or (sequence.sampling.stop and self._stop_text(sequence))
            sequence.finish = "stop" if text else "length"
        if ended:
            self.scheduler.retire(ended)
            if self.decoding is not None:
                self.decoding.flush()
        return ended

    def _stop_text(self, sequence: Sequence) -> bool:
        """Whether the newest token completed a stop text. Every token is at least a byte, so a short tail is enough to look at."""
        longest = max(len(text.encode()) for text in sequence.sampling.stop)
        tail = sequence.tokens[max(sequence.turn_start, len(sequence.tokens) - longest - 8) :]
        text = self.tokenizer.decode(tail, skip_special_tokens=True)
        return any(stop in text for stop in sequence.sampling.stop)


def _end_ids(model: Any, tokenizer: Any) -> set[int]:
    """Every token that the model's folder names as an end of generation."""
    named = [getattr(tokenizer, "eos_token_id", None), getattr(model.config, "eos_token_id", None)]
    named.append(getattr(getattr(model, "generation_config", None), "eos_token_id", None))
    return {int(i) for value in named if value is not None for i in (value if isinstance(value, list) else [value])}
