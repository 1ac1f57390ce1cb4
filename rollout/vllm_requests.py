"""Which sequences live and which turn of theirs is under way in vLLM, as `rollout/scheduler.py` knows it for the native engine."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, NamedTuple

from winnow.rollout.sequence import Prompt, Sequence

if TYPE_CHECKING:
    from winnow.rollout.vllm_engine import VllmEngine


class Turn(NamedTuple):
    """A request of vLLM's: our name of it, which its outputs carry, and its own id, which its batches carry."""

    name: str
    id: str


class VllmRequests:
    """What the native engine's scheduler is to it: who lives, who runs. Who runs next is vLLM's decision.

    Samples of one prompt share its record until each has drawn its first token, as they share what vLLM has cached of it.
    """

    def __init__(self, engine: VllmEngine) -> None:
        self._engine = engine
        self.live: dict[Sequence, None] = {}
        self.turns: dict[Sequence, Turn] = {}  # those under way
        self.by_name: dict[str, Sequence] = {}
        self.by_id: dict[str, Sequence] = {}
        self.preemptions = self.reused_tokens = 0
        self._held: list[Sequence] | None = None  # while draining: those that have not begun
        # whose cached prefixes a sequence may read: those of its prompt's samples, or from some point on only its own
        self.families: dict[Sequence, int] = {}
        self._prompts: dict[tuple[int, ...], Prompt] = {}
        self._orders = itertools.count(1)

    @property
    def has_work(self) -> bool:
        return bool(self.turns or self._held)

    @property
    def started(self) -> list[Sequence]:
        """Live samples that have drawn a token."""
        return [sequence for sequence in self.live if sequence.prompt is None]

    @property
    def draining(self) -> bool:
        return self._held is not None

    @draining.setter
    def draining(self, value: bool) -> None:
        """Takes back from vLLM what has not begun, or hands it over again."""
        held, self._held = self._held, [] if value else None
        if value:
            for sequence in [s for s in self.turns if s.prompt is not None]:
                self._engine.withdraw(self.ended(sequence))
                self.resume(sequence)
        for sequence in held or ():
            self.resume(sequence)

    def next_order(self) -> int:
        return next(self._orders)

    def add(self, sequences: list[Sequence]) -> None:
        tokens = tuple(sequences[0].tokens)
        parent = self._prompts.get(tokens)
        if parent is None:
            parent = self._prompts[tokens] = Prompt(tokens=list(tokens), order=self.next_order())
        try:
            for sequence in sequences:
                parent.waiting += 1
                sequence.prompt = parent
                self.live[sequence], self.families[sequence] = None, parent.order
                self.resume(sequence)
        except BaseException:
            for sequence in sequences:
                self.release(sequence)
            raise

    def resume(self, sequence: Sequence) -> None:
        """Hands the conversation so far to vLLM as a request for the turn, or the rest of it."""
        sequence.num_cached = 0
        if self._held is not None and sequence.prompt is not None:
            self._held.append(sequence)
            return
        turn = self.turns[sequence] = self._engine.submit(sequence)
        self.by_name[turn.name] = self.by_id[turn.id] = sequence

    def begun(self, sequence: Sequence) -> None:
        """The first token is drawn, so the prompt's record is whole: from here on the sequence has one of its own."""
        assert sequence.prompt is not None
        sequence.records = list(sequence.prompt.records)
        self._leave_prompt(sequence)

    def ended(self, sequence: Sequence) -> Turn:
        turn = self.turns.pop(sequence)
        del self.by_name[turn.name], self.by_id[turn.id]
        return turn

    def release(self, sequence: Sequence) -> None:
        if sequence in self.turns:
            self._engine.withdraw(self.ended(sequence))
        if self._held is not None and sequence in self._held:
            self._held.remove(sequence)
        if sequence.prompt is not None:
            self._leave_prompt(sequence)
        if sequence in self.live:
            del self.live[sequence], self.families[sequence]

    def restart(self, sequence: Sequence) -> None:
        """Goes on with the turn in a new request, from the sequence's own tokens."""
        self._engine.withdraw(self.ended(sequence))
        self.resume(sequence)

    def restart_all(self) -> None:
        """Forgets all that was computed."""
        for span in (*self._prompts.values(), *self.live):
            span.records = []
        for sequence in list(self.turns):
            self.restart(sequence)

    def part(self, sequence: Sequence) -> None:
        """A sibling has computed tokens that this one has drawn too, and their index sets went to the sibling: computes them itself."""
        self.families[sequence] = sequence.order
        self.restart(sequence)

    def _leave_prompt(self, sequence: Sequence) -> None:
        parent, sequence.prompt = sequence.prompt, None
        assert parent is not None
        parent.waiting -= 1
        if parent.waiting == 0:
            del self._prompts[tuple(parent.tokens)]
