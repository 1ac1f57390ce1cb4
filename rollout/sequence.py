"""What the engine knows about one sample while it lives: its tokens, its pages, what was drawn, what its queries attended to, and the
experts that its tokens went through."""

from __future__ import annotations

from collections.abc import Sequence as Row
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor

from winnow.rollout.schema import ExpertRecord, IndexRecord, KeptSets, Sampling

RecordPart = tuple[
    np.ndarray, int, int
]  # (sets or experts [layers, rows, k], first row, end row): a step's array is shared by all its sequences


@dataclass(eq=False, slots=True, kw_only=True)
class Span:
    """Tokens with cache pages. The first `num_cached` tokens have their keys and values in `pages`."""

    tokens: list[int]
    order: int  # age: a smaller number was added earlier and is preempted later
    pages: list[int] = field(default_factory=list)
    num_cached: int = 0
    records: list[RecordPart] = field(default_factory=list)  # index sets, of the queries from position k on
    routes: list[RecordPart] = field(default_factory=list)  # experts, of every token in the cache
    keys: list[bytes] = field(default_factory=list)  # of its full pages, see PagedCache.extend_keys

    @property
    def num_missing(self) -> int:
        return len(self.tokens) - self.num_cached


def recorded_rows(parts: Row[RecordPart], bounds: Row[tuple[int, int]]) -> list[np.ndarray]:
    """Copies [layers, rows, k] of the recorded rows start..end of each of the ascending `bounds`: no step's array is kept alive."""
    ends = np.cumsum([end - start for _, start, end in parts], dtype=np.int64)
    copies = []
    for low, high in bounds:
        first, last = (int(np.searchsorted(ends, row, side="right")) for row in (low, high - 1))
        assert last < len(ends), f"row {high - 1} was not recorded: there are {ends[-1] if len(ends) else 0}"
        pieces = []
        for (array, start, end), until in zip(parts[first : last + 1], ends[first : last + 1], strict=True):
            shift = start - (int(until) - (end - start))  # row 0 of this sequence, in the array
            pieces.append(array[:, max(start, low + shift) : min(end, high + shift)])
        copies.append(np.concatenate(pieces, axis=1))
    return copies


@dataclass(eq=False, slots=True, kw_only=True)
class Prompt(Span):
    """A distinct prompt while samples still wait to start from it. `logits` fp32 [V] of its last token once it is prefilled."""

    logits: Tensor | None = None
    waiting: int = 0  # samples that have not forked yet
    starting: list[Sequence] = field(default_factory=list)  # those of them that have a batch slot


@dataclass(eq=False, slots=True, kw_only=True)
class Sequence(Span):
    """One sample. `finish` is None while its turn runs; afterwards `extend` may open the next turn, or `release` ends it.

    logprobs and versions run parallel to tokens: 0.0 and -1 where a token was given, not drawn.
    """

    sampling: Sampling
    stream: int  # seeds its draws together with the position
    total_limit: int  # tokens it may ever have
    limit: int  # tokens at which this turn ends
    turn_start: int  # index of the turn's first generated token
    logprobs: list[float]
    versions: list[int]
    kept: list[tuple[int, np.ndarray]] = field(
        default_factory=list
    )  # (position, token ids) where the vocabulary was cut
    prompt: Prompt | None = None  # until it has forked
    slot: int = -1
    finish: str | None = None

    @property
    def room(self) -> int:
        """How many more tokens it may ever have."""
        return self.total_limit - len(self.tokens)

    @property
    def reply_ids(self) -> Row[int]:
        return self.tokens[self.turn_start :]

    def kept_sets(self) -> KeptSets | None:
        """The action sets over all tokens, None when nothing was ever filtered."""
        if not self.kept:
            return None
        sizes = np.zeros(len(self.tokens) + 1, dtype=np.int64)
        for position, ids in self.kept:
            sizes[position + 1] = len(ids)
        return KeptSets(
            indptr=np.cumsum(sizes), token_ids=np.concatenate([ids for _, ids in self.kept]).astype(np.int32)
        )

    def index_record(self, k: int, layers: tuple[int, ...], dtype: np.dtype | type) -> IndexRecord:
        """The sets of every query from position k on; the last token was never a query."""
        rows = max(0, len(self.tokens) - 1 - k)
        parts = [array[:, start:end] for array, start, end in self.records]
        indices = np.concatenate(parts, axis=1) if parts else np.zeros((len(layers), 0, k), dtype=dtype)
        assert indices.shape[1] == rows, f"{indices.shape[1]} recorded rows for {len(self.tokens)} tokens at k = {k}"
        return IndexRecord(first=k, k=k, layers=layers, indices=indices)

    def expert_record(self, layers: tuple[int, ...]) -> ExpertRecord:
        """The experts of every token but the last, which was never an input."""
        experts = np.concatenate([array[:, start:end] for array, start, end in self.routes], axis=1)
        assert experts.shape[1] == len(self.tokens) - 1, f"{experts.shape[1]} routed rows for {len(self.tokens)} tokens"
        return ExpertRecord(layers=layers, experts=experts)
