"""Who runs next: waiting line, batch slots, cache pages.

    waiting (by age) -> slot -> prefilling -> running -> turn ends -> extend: waiting again | release

Samples of one prompt wait for one prefill and fork off it. What is cached of a prefix outlives its request: full pages are published under
a hash of their tokens, and a prefill begins behind those that it finds. While draining, only samples that have begun go on. Who needs a page may push out younger holders (idle prompts first); those
keep their tokens and are prefilled again later. The oldest can always go on, so nobody waits for ever.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable

import numpy as np
from torch import Tensor

from winnow.rollout.cache import OutOfPagesError, PagedCache, PageRecord
from winnow.rollout.sampler import RowParams
from winnow.rollout.sequence import Prompt, RecordPart, Sequence, Span, recorded_rows


class Slots:
    """One row a batch slot, filled when a sequence starts to run: a step picks rows instead of building them anew."""

    def __init__(self, rows: int, pages: int) -> None:
        self.table = np.zeros((rows, pages), dtype=np.int32)
        self.length, self.last, self.limit, self.top_k = (np.zeros(rows, dtype=np.int64) for _ in range(4))
        self.temperature, self.top_p, self.min_p = (np.zeros(rows, dtype=np.float32) for _ in range(3))
        self.stream = np.zeros(rows, dtype=np.uint64)
        self.stamp = np.zeros(
            rows, dtype=np.int64
        )  # how often a slot was filled: a copy of its table elsewhere is known by it

    def fill(self, sequence: Sequence) -> None:
        slot, sampling = sequence.slot, sequence.sampling
        self.stamp[slot] += 1
        self.table[slot, : len(sequence.pages)] = sequence.pages
        self.length[slot], self.limit[slot], self.stream[slot] = len(sequence.tokens), sequence.limit, sequence.stream
        self.temperature[slot], self.top_k[slot] = sampling.temperature, sampling.top_k
        self.top_p[slot], self.min_p[slot] = sampling.top_p, sampling.min_p

    def filtered(self, slots: np.ndarray) -> bool:
        """Whether any of these slots cuts its vocabulary."""
        return bool(self.params(slots).filtered.any())

    def params(self, slots: np.ndarray) -> RowParams:
        """What the sampler needs for the next token of these slots."""
        return RowParams(
            temperature=self.temperature[slots],
            top_k=self.top_k[slots],
            top_p=self.top_p[slots],
            min_p=self.min_p[slots],
            stream=self.stream[slots],
            position=self.length[slots],
        )


class Scheduler:
    """Owns every live sequence and the pages each holds. Never runs the model."""

    def __init__(
        self,
        cache: PagedCache,
        max_batch: int,
        prefill_chunk: int,
        context: int,
        reuse: bool = False,  # look for published pages, and publish
        record_from: int | None = None,  # the first position whose index sets are recorded; None: none are
        record_routes: bool = False,  # the experts of every position are
    ) -> None:
        self.cache, self.prefill_chunk = cache, prefill_chunk
        self.reuse, self.record_from, self.record_routes = reuse, record_from, record_routes
        self.settle_records: Callable[[], None] = lambda: None  # returns once every recorded set has arrived
        self.draining = False
        self.reused_tokens = 0
        self.live: dict[Sequence, None] = {}
        self.running: list[Sequence] = []
        self.slots = Slots(max_batch, cache.pages_for(context))
        self.preemptions = 0
        self._order = 0
        self._prompts: dict[tuple[int, ...], Prompt] = {}
        self._waiting: list[Sequence] = []  # sorted by age
        self._prefilling: list[Span] = []
        self._free_slots = list(range(max_batch - 1, -1, -1))

    @property
    def has_work(self) -> bool:
        return bool(self._waiting or self._prefilling or self.running)

    def next_order(self) -> int:
        self._order += 1
        return self._order

    def add(self, sequences: list[Sequence]) -> None:
        """Queues the samples of one prompt, behind the prefill of an equal prompt that is still waiting, if there is one."""
        tokens = sequences[0].tokens
        parent = self._prompts.get(tuple(tokens))
        if parent is None:
            parent = self._prompts[tuple(tokens)] = Prompt(tokens=list(tokens), order=sequences[0].order)
        parent.waiting += len(sequences)
        for sequence in sequences:
            sequence.prompt = parent
            self.live[sequence] = None
            self._waiting.append(sequence)

    def resume(self, sequence: Sequence) -> None:
        """Queues a live sequence whose next turn has been opened, by age."""
        bisect.insort(self._waiting, sequence, key=lambda s: s.order)

    def release(self, sequence: Sequence) -> None:
        """Forgets a sequence in any state and takes its pages back. What it drew and recorded stays readable."""
        if sequence not in self.live:
            return
        records, routes = sequence.records, sequence.routes
        self._evict(sequence)
        sequence.records, sequence.routes = records, routes
        if sequence in self._waiting:
            self._waiting.remove(sequence)
        parent = sequence.prompt
        if parent is not None:
            parent.waiting -= 1
            if parent.waiting == 0:
                self._drop_prompt(parent)
            sequence.prompt = None
        del self.live[sequence]

    def retire(self, ended: list[Sequence]) -> None:
        """Takes sequences whose turn ended out of the batch; they keep their pages."""
        self.running = [sequence for sequence in self.running if sequence.finish is None]
        for sequence in ended:
            self._free_slots.append(sequence.slot)
            sequence.slot = -1

    def evict_all(self) -> None:
        """Drops everything that is cached: nothing computed so far may be read again."""
        publishing, self.reuse = self.reuse, False
        for parent in self._prompts.values():
            self._evict_prompt(parent)
        for sequence in reversed(self.live):
            self._evict(sequence)
        self.cache.forget()
        self.reuse = publishing

    @property
    def started(self) -> list[Sequence]:
        """Live samples that have begun: those with a slot, and those past their prompt."""
        return [sequence for sequence in self.live if sequence.slot >= 0 or sequence.prompt is None]

    def admit(self) -> list[Sequence]:
        """Gives slots to waiting sequences, oldest first; returns those whose prompt is prefilled already."""
        ready: list[Sequence] = []
        while (sequence := self._next(len(ready))) is not None:
            parent = sequence.prompt
            self._waiting.remove(sequence)
            sequence.slot = self._free_slots.pop()
            if parent is None:
                self._prefilling.append(sequence)
                continue
            parent.starting.append(sequence)
            if parent.logits is not None:
                ready.append(sequence)
            elif parent not in self._prefilling:
                self._prefilling.append(parent)
        return ready

    def _next(self, ready: int) -> Sequence | None:
        """Who could be admitted now, `ready` others being about to start; None also where it would only push somebody else out."""
        if not self._free_slots:
            return None
        sequence = next((s for s in self._waiting if not self.draining or s.prompt is None), None)
        if sequence is None:
            return None
        span = sequence.prompt if sequence.prompt is not None else sequence
        wanted = self.cache.pages_for(len(span.tokens) + 1) - len(span.pages)
        busy = bool(self.running or self._prefilling or ready)
        return None if busy and self.cache.num_free < wanted + len(self.running) + ready else sequence

    def start(self, sequences: list[Sequence]) -> tuple[list[Sequence], list[Tensor]]:
        """Forks sequences off their prefilled prompts into the batch; those that got pages, and each one's first logits."""
        forked: list[Sequence] = []
        logits: list[Tensor] = []
        copies: list[tuple[int, int]] = []
        for sequence in sequences:
            parent = sequence.prompt
            if (
                parent is None or parent.logits is None
            ):  # another fork took the prompt's pages over: prefilled again later
                continue
            first = parent.logits
            if self._fork(sequence, parent, copies, alone=not (self.running or forked)):
                forked.append(sequence)
                logits.append(first)
        self.cache.copy([source for source, _ in copies], [target for _, target in copies])
        self.running.extend(forked)
        return forked, logits

    def plan_prefill(self) -> tuple[list[Span], list[int]]:
        """The next chunk: spans, oldest first, and how many tokens of each; their pages are taken. Empty when none got pages."""
        budget = self.prefill_chunk
        plan: list[tuple[Span, int]] = []
        for span in sorted(self._prefilling, key=lambda s: s.order):
            if budget == 0:
                break
            if span not in self._prefilling:
                continue  # pushed out by an older one in this very loop
            if self.reuse and not span.pages:
                self._match(span)
            count = min(span.num_missing, budget)
            try:
                self.take_pages(span, span.num_cached + count, anyone=not (plan or self.running))
            except OutOfPagesError:
                break
            plan.append((span, count))
            budget -= count
        plan = [(span, count) for span, count in plan if span.pages]  # some were pushed out after they were planned
        return [span for span, _ in plan], [count for _, count in plan]

    def prefilled(self, spans: list[Span], logits: Tensor) -> tuple[list[Sequence], list[Sequence], list[int]]:
        """Spans that are whole now, with the logits [spans, V] of their last tokens. Returns the samples that can fork, the resumed
        sequences, which run from here on, and the logits row of each of those.
        """
        self._prefilling = [s for s in self._prefilling if s not in spans]
        starting: list[Sequence] = []
        resumed: list[Sequence] = []
        rows = []
        for row, span in enumerate(spans):
            self._publish(span)
            if isinstance(span, Prompt):
                span.logits = logits[row]
                starting += span.starting
            elif isinstance(span, Sequence):
                self.slots.fill(span)
                resumed.append(span)
                rows.append(row)
        self.running.extend(resumed)
        return starting, resumed, rows

    def plan_decode(self) -> list[Sequence]:
        """The running sequences, each with a page for its next token; those that cannot get one wait again."""
        size = self.cache.page_size
        for sequence in sorted((s for s in self.running if s.num_cached % size == 0), key=lambda s: s.order):
            if sequence.slot < 0:
                continue  # pushed out by an older one in this very loop
            try:
                self.take_pages(sequence, sequence.num_cached + 1, anyone=len(self.running) == 1)
                self.slots.table[sequence.slot, len(sequence.pages) - 1] = sequence.pages[-1]
            except OutOfPagesError:
                self.preemptions += 1
                self._evict(sequence)
        return list(self.running)

    def plan_ahead(self, sequences: list[Sequence]) -> bool:
        """Pages for two more tokens of each running sequence. False, taking none: there are none, or others could run instead of them."""
        if not sequences or self._prefilling or self._next(0) is not None:
            return False
        size = self.cache.page_size
        growing = [s for s in sequences if len(s.tokens) % size == 0 and len(s.pages) * size == len(s.tokens)]
        if len(growing) > self.cache.num_free:
            return False
        for sequence in growing:
            self.take_pages(sequence, len(sequence.tokens) + 1)
            self.slots.table[sequence.slot, len(sequence.pages) - 1] = sequence.pages[-1]
        return True

    def take_pages(self, span: Span, num_tokens: int, anyone: bool = False) -> None:
        """Grows `span` to hold `num_tokens`, pushing out younger holders, or `anyone` where nothing else could go on.
        OutOfPagesError when it has to wait for older ones.
        """
        count = self.cache.pages_for(num_tokens) - len(span.pages)
        while count > self.cache.num_free:
            idle = next((p for p in self._prompts.values() if p.pages and not p.starting and p is not span), None)
            if idle is not None:
                self._evict_prompt(idle)
                continue
            holders: list[Span] = [s for s in self.live if s.pages and s is not span]
            holders += [p for p in self._prompts.values() if p.pages and p is not span]
            younger = [s for s in holders if anyone or s.order > span.order]
            if not younger:
                raise OutOfPagesError(f"{count} pages wanted, {self.cache.num_free} free, and all holders are older")
            victim = max(younger, key=lambda s: s.order)
            self.preemptions += 1
            if isinstance(victim, Prompt):
                self._evict_prompt(victim)
            else:
                assert isinstance(victim, Sequence)
                self._evict(victim)
        span.pages += self.cache.allocate(max(0, count))

    def _fork(self, sequence: Sequence, parent: Prompt, copies: list[tuple[int, int]], alone: bool) -> bool:
        """Pages of the prompt for one sample: full ones shared, the partial one copied, all of them taken over by the last sample."""
        parent.starting.remove(sequence)
        full, partial = divmod(len(parent.tokens), self.cache.page_size)
        starved = partial > 0 and self.cache.num_free == 0
        if starved and not alone and parent.waiting > 1:
            self._requeue(sequence)
            return False
        sequence.records, sequence.routes, sequence.keys = list(parent.records), list(parent.routes), list(parent.keys)
        if parent.waiting == 1 or starved:
            sequence.pages, parent.pages = parent.pages, []
            if starved:
                self._evict_prompt(parent)  # the others prefill it again later
        else:
            sequence.pages = self.cache.share(parent.pages[:full])
            if partial:
                sequence.pages += self.cache.allocate(1)
                copies.append((parent.pages[full], sequence.pages[full]))
        sequence.num_cached, sequence.prompt = len(parent.tokens), None
        parent.waiting -= 1
        if parent.waiting == 0:
            self._drop_prompt(parent)
        self.slots.fill(sequence)
        return True

    def _requeue(self, sequence: Sequence) -> None:
        self._free_slots.append(sequence.slot)
        sequence.slot = -1
        self.resume(sequence)

    def _match(self, span: Span) -> None:
        """Begins a prefill behind the published pages of its prefix; its last token is always left, for its logits."""
        whole = (len(span.tokens) - 1) // self.cache.page_size
        keys = self.cache.extend_keys(span.keys, span.tokens, whole)
        span.pages, records = self.cache.match(keys[:whole])
        span.num_cached = len(span.pages) * self.cache.page_size
        span.records, span.routes = _parts(records, "records"), _parts(records, "routes")
        self.reused_tokens += span.num_cached

    def _publish(self, span: Span) -> None:
        """Publishes the full pages that `span` is about to leave or to share, with the records of their queries."""
        if not self.reuse:
            return
        size = self.cache.page_size
        keys = self.cache.extend_keys(span.keys, span.tokens, span.num_cached // size)
        new = [number for number in range(span.num_cached // size) if not self.cache.published(keys[number])]
        noted: dict[int, dict[str, np.ndarray]] = {number: {} for number in new}
        streams = [
            ("records", span.records, self.record_from),
            ("routes", span.routes, 0 if self.record_routes else None),
        ]
        for name, parts, first in streams:
            recorded = [number for number in new if first is not None and (number + 1) * size > first]
            if not recorded:
                continue
            assert first is not None
            self.settle_records()
            bounds = [(max(0, number * size - first), (number + 1) * size - first) for number in recorded]
            for number, rows in zip(recorded, recorded_rows(parts, bounds), strict=True):
                noted[number][name] = rows
        for number in new:
            self.cache.publish(keys[number], span.pages[number], noted[number])

    def _evict(self, sequence: Sequence) -> None:
        """Takes pages and slot away; a sequence whose turn was under way waits again."""
        self._publish(sequence)
        self.cache.free(sequence.pages)
        sequence.pages, sequence.num_cached, sequence.records, sequence.routes = [], 0, [], []
        if sequence.slot < 0:
            return
        for queue in (self.running, self._prefilling):
            if sequence in queue:
                queue.remove(sequence)
        if sequence.prompt is not None:
            sequence.prompt.starting.remove(sequence)
        self._requeue(sequence)

    def _evict_prompt(self, parent: Prompt) -> None:
        self.cache.free(parent.pages)
        parent.pages, parent.num_cached, parent.records, parent.routes, parent.logits = [], 0, [], [], None
        if parent.starting and parent not in self._prefilling:
            self._prefilling.append(parent)

    def _drop_prompt(self, parent: Prompt) -> None:
        parent.starting.clear()
        self._evict_prompt(parent)
        if parent in self._prefilling:
            self._prefilling.remove(parent)
        self._prompts.pop(tuple(parent.tokens), None)


def _parts(records: list[PageRecord], name: str) -> list[RecordPart]:
    """One of the things that are recorded of pages, as a span keeps it."""
    return [(record[name], 0, record[name].shape[1]) for record in records if name in record]
