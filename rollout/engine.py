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
from typing import Any

import numpy as np
import torch
from torch import Tensor

from winnow.models.attach import cache_shape, indexer_config
from winnow.models.forward import lm_head_weight
from winnow.models.routing import routers
from winnow.rollout.cache import PagedCache
from winnow.rollout.decoding import Decoding, Flight
from winnow.rollout.engine_config import EngineConfig, check_prompt, named_ends
from winnow.rollout.forward import Forward
from winnow.rollout.records import NARROW_LIMIT
from winnow.rollout.sampler import Drawn, stream_seed
from winnow.rollout.scheduler import Scheduler
from winnow.rollout.schema import Sampling
from winnow.rollout.sequence import Sequence, Span
from winnow.rollout.weights import copy_into


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
        routed = routers(model) if config.record_experts else {}
        self.expert_layers = tuple(routed)
        self.cache = PagedCache(
            **cache_shape(model),
            num_pages=config.num_pages,
            page_size=config.page_size,
            dtype=weight.dtype,
            device=self.device,
        )
        ends = set(end_ids) | named_ends(model, tokenizer)
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
            record_routes=bool(self.expert_layers),
        )
        self.paused = False
        self.forward = Forward(
            model, self.cache, selector=config.selector, exact=config.exact, context=self.context, index_k=self.index_k, layers=self.layers,
            records=self.records, expert_layers=self.expert_layers, num_experts=max((r.num_experts for r in routed.values()), default=0),
        )  # fmt: skip
        graphs = self.forward.fused and config.cuda_graphs and config.selector in ("indexer", "dense")
        self.decoding = self.static_decoding(capture=True) if graphs else None
        self._flight: Flight | None = None
        self.scheduler.settle_records = self._settle_records

    def _settle_records(self) -> None:
        """Waits for the last step's recorded sets, which a graph's step copies behind its own back."""
        if self.decoding is not None:
            self.decoding.flush()

    def static_decoding(self, capture: bool) -> Decoding:
        """Decode steps at fixed shapes; capture: as CUDA graphs."""
        assert not self.expert_layers, (
            "decode steps at fixed shapes record no experts; no model that has any takes them"
        )
        return Decoding(
            self.model, self.cache, max_batch=self.config.max_batch, context=self.context, index_k=self.index_k, layers=self.layers,
            selector=self.config.selector, fused=self.forward.fused, exact=self.config.exact, capture=capture,
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
        total = min(self.context, max_total_tokens or self.context)
        check_prompt(tokens, what, self.vocab, total, self.context)
        if num_samples < 1:
            raise ValueError(f"{what} asks for {num_samples} samples, but it must be at least 1")
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
            if self._flight is not None:
                if any(self._flight.alive):
                    return self._land()
                self._abandon()
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
        copy_into(self.model, tensors if isinstance(tensors, Mapping) else dict(tensors), version)
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
                hidden = self.forward.prefill([span], [count])
                self.counters["prefill_tokens"] += count
                targets = torch.tensor(span.tokens[start + 1 : start + count + 1], device=self.device)
                logprobs = self.forward.score(hidden[: len(targets)], targets, temperature)
                result[start + 1 : start + 1 + len(targets)] = logprobs.cpu().numpy()
        finally:
            self.cache.free(span.pages)
        return result

    def _start(self, sequences: list[Sequence]) -> list[Sequence]:
        """First tokens of samples whose prompt is prefilled; returns those that ended with it."""
        forked, logits = self.scheduler.start(sequences)
        return self._draw(forked, torch.stack(logits)) if forked else []

    def _prefill(self) -> list[Sequence] | None:
        """One packed chunk; returns those whose turn ended. None when nothing could get pages: running sequences go first then."""
        spans, counts = self.scheduler.plan_prefill()
        if not spans:
            return None
        hidden = self.forward.prefill(spans, counts)
        self.counters["prefill_tokens"] += sum(counts)
        self.counters["prefill_steps"] += 1
        done = [i for i, span in enumerate(spans) if span.num_missing == 0]
        if not done:
            return []
        last = torch.from_numpy(np.cumsum(counts)[done] - 1).to(self.device)
        logits = self.forward.logits(hidden[last])
        starting, resumed, rows = self.scheduler.prefilled([spans[i] for i in done], logits)
        ended = self._draw(resumed, logits[torch.tensor(rows, device=self.device)]) if resumed else []
        return ended + self._start(starting)

    def _decode(self) -> list[Sequence]:
        """One token for every running sequence; returns those whose turn ended."""
        running = self.scheduler.plan_decode()
        if not running:
            return []
        rows = self.scheduler.slots
        slots = np.array([sequence.slot for sequence in running])
        lengths = rows.length[slots]
        if self.decoding is not None:
            step = self.decoding.launch(rows, slots, lengths, not rows.filtered(slots), self.records, None)
            assert step is not None
            self._flight = Flight(sequences=running, slots=slots, lengths=lengths, step=step)
            return self._land()
        self._stepped(len(running))
        hidden, sets, routes = self.forward.decode(rows, slots)
        self._record_decode(running, range(len(running)), lengths, sets)
        if routes is not None:
            for row, sequence in enumerate(running):
                sequence.routes.append((routes, row, row + 1))
        return self._draw(running, self.forward.logits(hidden))

    def _stepped(self, tokens: int) -> None:
        self.counters["decode_tokens"] += tokens
        self.counters["decode_steps"] += 1

    def _land(self) -> list[Sequence]:
        """Takes in the step under way, and launches the next before it; returns the sequences whose turn ended."""
        flight = self._flight
        assert flight is not None and self.decoding is not None
        self._flight = self._launch_ahead(flight)
        try:
            stepped = self.decoding.land(flight.step)
        except ValueError:
            self._abandon()
            raise
        rows = [row for row, alive in enumerate(flight.alive) if alive]
        running, slots = [flight.sequences[row] for row in rows], flight.slots[rows]
        self._stepped(len(rows))
        self._record_decode(running, rows, flight.lengths[rows], stepped.sets)
        if stepped.logits is not None:
            return self._draw(running, stepped.logits)
        assert stepped.tokens is not None and stepped.logprobs is not None
        drawn = Drawn(tokens=stepped.tokens[rows], logprobs=stepped.logprobs[rows], kept=None)
        return self._append(running, slots, drawn)

    def _launch_ahead(self, flight: Flight) -> Flight | None:
        """The step after the one under way, for those of its sequences that have room for two more tokens. One of them may yet end with the
        token under way: then the other is drawn for nothing. None where somebody else could begin, pages are short, or the host draws.
        """
        assert self.decoding is not None
        rows, state = np.flatnonzero(flight.alive), self.scheduler.slots
        rows = rows[flight.lengths[rows] + 1 < state.limit[flight.slots[rows]]]
        slots, lengths = flight.slots[rows], flight.lengths[rows] + 1
        sequences = [flight.sequences[row] for row in rows.tolist()]
        if flight.step.logits is not None or not self.scheduler.plan_ahead(sequences):
            return None
        step = self.decoding.launch(state, slots, lengths, True, self.records, (flight.step, rows))
        return None if step is None else Flight(sequences=sequences, slots=slots, lengths=lengths, step=step)

    def _abandon(self) -> None:
        """Waits for the step under way, of which nothing is wanted."""
        flight, self._flight = self._flight, None
        if flight is not None and self.decoding is not None:
            self.decoding.land(flight.step, wanted=False)

    def _record_decode(
        self, running: list[Sequence], rows: Row[int], lengths: np.ndarray, sets: np.ndarray | None
    ) -> None:  # fmt: skip
        """A step's sets [layers, rows, k], `rows` of them, to the sequences that are longer than k."""
        if sets is None:
            return
        for sequence, row, deep in zip(running, rows, (lengths > self.index_k).tolist(), strict=True):
            if deep:
                sequence.records.append((sets, row, row + 1))

    def _draw(self, sequences: list[Sequence], logits: Tensor) -> list[Sequence]:
        """Draws one token for each sequence (all of them running) from logits [rows, V], and takes those that end out of the batch."""
        slots = np.array([sequence.slot for sequence in sequences])
        drawn = self.forward.sample(logits, self.scheduler.slots, slots, self.config.keep_kept_sets)
        return self._append(sequences, slots, drawn)

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
