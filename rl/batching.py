"""From samples to a TrainBatch: updates of packed micro-batches, no padding, with denominators counted once for the whole batch.

A sequence of L tokens is trained on its first L-1 as inputs: the input at position t predicts token t+1, so every per-token array is
stored at the predicting position, and inputs past the last trained token are cut off. Only trained positions have log-probabilities;
they are listed in `rows`. Sequences that cannot move anything are left out of the micro-batches but stay in the denominators.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from winnow.rl.advantages import Sample
from winnow.rl.losses import Denominators
from winnow.rollout.schema import ExpertRecord, IndexRecord, KeptSets, Trajectory


@dataclass(frozen=True, kw_only=True, slots=True)
class MicroBatch:
    """n whole sequences packed: T inputs, N trained positions, in sequence order."""

    keys: tuple[str, ...]  # [n] request/sample, for error messages
    domains: tuple[str, ...]  # [n]
    tokens: np.ndarray  # int32 [T] inputs
    positions: np.ndarray  # int64 [T] within the sequence
    cu_seqlens: np.ndarray  # int32 [n + 1]
    loss_mask: np.ndarray  # bool [T] True where the next token is trained
    targets: np.ndarray  # int64 [N] the trained tokens
    sequence_ids: np.ndarray  # int64 [N]
    rollout_logprobs: np.ndarray  # fp32 [N]
    advantages: np.ndarray  # fp32 [n]
    weights: np.ndarray  # fp32 [n]
    betas: np.ndarray  # fp32 [n]
    ce_weights: np.ndarray | None = None  # fp32 [N] SFT tokens
    teacher_logprobs: np.ndarray | None = None  # fp32 [N], NaN where there is no teacher
    temperature: float = 1.0
    kept_sets: KeptSets | None = None  # over the N trained tokens
    index_records: tuple[IndexRecord | None, ...] = ()  # [n], rows cut to the sequence's inputs
    expert_records: tuple[ExpertRecord | None, ...] = ()  # [n], likewise

    def __post_init__(self) -> None:
        lengths = {"positions": len(self.tokens), "loss_mask": len(self.tokens), "sequence_ids": len(self.targets)}
        lengths |= {"rollout_logprobs": len(self.targets), "advantages": len(self.keys), "weights": len(self.keys)}
        for name, want in {**lengths, "betas": len(self.keys), "cu_seqlens": len(self.keys) + 1}.items():
            assert len(getattr(self, name)) == want, f"{name} has {len(getattr(self, name))} entries, want {want}"
        assert self.loss_mask.sum() == len(self.targets), (
            f"{self.loss_mask.sum()} trained positions, {len(self.targets)} targets"
        )

    @property
    def rows(self) -> np.ndarray:
        """int64 [N]: positions in the packed inputs whose next token is trained."""
        return np.flatnonzero(self.loss_mask)


@dataclass(frozen=True, kw_only=True, slots=True)
class Update:
    """The micro-batches of one optimizer update, with counts over all of them (and over the sequences left out as idle)."""

    micro_batches: tuple[MicroBatch, ...]
    denominators: Denominators

    @property
    def num_inputs(self) -> int:
        return sum(len(micro.tokens) for micro in self.micro_batches)


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainBatch:
    """Everything the learner needs for one step."""

    step: int
    updates: tuple[Update, ...]

    @property
    def num_trained_tokens(self) -> int:
        return sum(len(micro.targets) for update in self.updates for micro in update.micro_batches)


@dataclass(frozen=True, kw_only=True, slots=True)
class PackItem:
    """One sequence ready to be packed: L inputs, of which N predict a trained token."""

    key: str
    domain: str
    tokens: np.ndarray  # int32 [L]
    loss_mask: np.ndarray  # bool [L]
    targets: np.ndarray  # int64 [N]
    rollout_logprobs: np.ndarray  # fp32 [N]
    advantage: float = 0.0
    weight: float = 0.0
    beta: float = 0.0
    temperature: float = 1.0
    ce_weights: np.ndarray | None = None
    teacher_logprobs: np.ndarray | None = None  # fp32 [N]
    kept_sets: KeptSets | None = None
    index_record: IndexRecord | None = None
    expert_record: ExpertRecord | None = None


def make_batch(
    samples: Sequence[Sample],
    *,
    step: int,
    micro_tokens: int,
    updates: int = 1,
    keep_idle: bool = False,
    kept_sets: bool = True,
    ranks: int = 1,
) -> TrainBatch:
    """Packs samples into `updates` updates of micro-batches of at most `micro_tokens` inputs (a longer sequence goes alone).

    With more `ranks` each has as many micro-batches, of about equal size. A micro-batch is of one domain, so that the gradient of each can
    be told.

    The samples of one group stay in one update. `keep_idle` keeps sequences with zero advantage and zero beta, which only an
    indexer in training learns from. `kept_sets` False scores on the whole vocabulary. Raises ValueError for greedy samples and for
    samples drawn at different temperatures.
    """
    temperatures = {sample.trajectory.temperature for sample in samples}
    if len(temperatures) > 1 or 0.0 in temperatures:
        raise ValueError(
            f"samples were drawn at temperatures {sorted(temperatures)}; a batch needs one, greater than 0"
        )
    made = []
    for part in _split_groups(samples, updates):
        sequences = [sample_sequence(sample, kept_sets=kept_sets) for sample in part]
        counts = Denominators(sequences=len(sequences), tokens=sum(len(s.targets) for s in sequences))
        active = [s for s in sequences if keep_idle or s.advantage != 0 or s.beta != 0]
        micro = [m for name in sorted({s.domain for s in active}) for m in pack(_of(active, name), micro_tokens, ranks)]
        made.append(Update(micro_batches=tuple(micro), denominators=counts))
    return TrainBatch(step=step, updates=tuple(made))


def _of(sequences: Iterable[PackItem], domain: str) -> list[PackItem]:
    return [sequence for sequence in sequences if sequence.domain == domain]


def make_sft_batch(
    examples: Iterable[tuple[np.ndarray, np.ndarray]], *, step: int, micro_tokens: int, ranks: int = 1
) -> TrainBatch:
    """Packs (tokens int [L], loss_mask bool [L]) pairs into one cross-entropy update. Raises ValueError where nothing is trained."""
    sequences = []
    for number, (tokens, mask) in enumerate(examples):
        mask = np.array(mask, bool)
        mask[:1] = False  # nothing predicts the first token
        sequence = _sequence(f"example-{number}", "sft", np.asarray(tokens), mask)
        sequences.append(replace(sequence, ce_weights=np.ones(len(sequence.targets), np.float32)))
    total = sum(len(s.targets) for s in sequences)
    if not total:
        raise ValueError(f"{len(sequences)} examples hold no trained token: a loss mask must be True on the replies")
    update = Update(
        micro_batches=pack([s for s in sequences if len(s.targets)], micro_tokens, ranks),
        denominators=Denominators(ce_tokens=total),
    )
    return TrainBatch(step=step, updates=(update,))


def make_distillation_batch(
    pairs: Iterable[tuple[Trajectory, np.ndarray]], *, step: int, micro_tokens: int, ranks: int = 1
) -> TrainBatch:
    """Packs (trajectory, its teacher's log-probabilities fp32 [generated tokens]) into one update of KL(student || teacher).

    The student's and the teacher's are probabilities over the whole vocabulary: kept sets do not apply. Raises ValueError where lengths
    differ, where nothing was generated, and for samples that are greedy or of several temperatures.
    """
    sequences, temperatures = [], set()
    for trajectory, teacher in pairs:
        if len(teacher) != trajectory.num_generated:
            raise ValueError(
                f"trajectory {trajectory.key} has {trajectory.num_generated} generated tokens, its teacher scored {len(teacher)}"
            )
        if trajectory.kept_sets is not None:
            raise ValueError(
                f"trajectory {trajectory.key} was drawn from a cut vocabulary, which its teacher does not share: set rollout.top_p to 1, "
                "rollout.top_k and rollout.min_p to 0 for the student"
            )
        temperatures.add(trajectory.temperature)
        sequence = trajectory_sequence(trajectory)
        if len(sequence.targets):
            sequences.append(replace(sequence, teacher_logprobs=np.asarray(teacher, np.float32)))
    if len(temperatures) > 1 or 0.0 in temperatures:
        raise ValueError(
            f"samples were drawn at temperatures {sorted(temperatures)}; a batch needs one, greater than 0"
        )
    if not sequences:
        raise ValueError("no sample has a generated token: there is nothing to distil")
    counts = Denominators(kl_tokens=sum(len(s.targets) for s in sequences))
    return TrainBatch(
        step=step, updates=(Update(micro_batches=pack(sequences, micro_tokens, ranks), denominators=counts),)
    )


def sample_sequence(sample: Sample, *, kept_sets: bool = True) -> PackItem:
    """The sample shifted to predicting positions and cut after its last trained token."""
    trajectory = sample.trajectory
    base = trajectory_sequence(trajectory, kept_sets=kept_sets)
    return replace(base, advantage=sample.advantage, weight=sample.weight, beta=sample.beta)


def trajectory_sequence(trajectory: Trajectory, *, kept_sets: bool = True) -> PackItem:
    """The trajectory shifted to predicting positions: inputs tokens[:-1], targets tokens[1:] where the mask is True."""
    sequence = _sequence(trajectory.key, trajectory.domain, trajectory.tokens, trajectory.loss_mask)
    trained = np.flatnonzero(trajectory.loss_mask)
    record = trajectory.index_record
    if record is not None:
        record = record.cut(max(0, len(sequence.tokens) - record.first))
    routed = trajectory.expert_record
    return replace(
        sequence,
        rollout_logprobs=trajectory.rollout_logprobs[trained].astype(np.float32),
        temperature=trajectory.temperature,
        kept_sets=_take_rows(trajectory.kept_sets, trained) if kept_sets and trajectory.kept_sets is not None else None,
        index_record=record,
        expert_record=None if routed is None else routed.cut(len(sequence.tokens)),
    )


def pack(sequences: Sequence[PackItem], micro_tokens: int, ranks: int = 1) -> tuple[MicroBatch, ...]:
    """Micro-batches of at most `micro_tokens` inputs; sequences of like length come together, which keeps attention's padding small.

    With several ranks, as many for each of them and of about equal size: all wait for the slowest in every layer.
    """
    order = sorted(range(len(sequences)), key=lambda i: (-len(sequences[i].tokens), i))
    lengths = [len(sequences[i].tokens) for i in order]
    bins = _filled(lengths, micro_tokens) if ranks == 1 else _rounds(lengths, micro_tokens, ranks)
    return tuple(_join([sequences[order[i]] for i in members]) for members in bins)


def _filled(lengths: Sequence[int], micro_tokens: int) -> list[list[int]]:
    """Positions in `lengths`, in their order, one bin full after the other."""
    bins: list[list[int]] = []
    filled = 0
    for index, length in enumerate(lengths):
        if not bins or filled + length > micro_tokens:
            bins.append([])
            filled = 0
        bins[-1].append(index)
        filled += length
    return bins


def _rounds(lengths: Sequence[int], micro_tokens: int, ranks: int) -> list[list[int]]:
    """Positions in `lengths` (falling) in rounds of `ranks` bins: as few rounds as `micro_tokens` allows, and of those the smallest bins."""
    rounds = len(_rounds_of(lengths, micro_tokens, ranks))
    low, high = -(-sum(lengths) // (ranks * max(1, rounds))), micro_tokens
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if len(_rounds_of(lengths, middle, ranks)) <= rounds else (middle + 1, high)
    return [members for bins in _rounds_of(lengths, high, ranks) for members in bins if members]


def _rounds_of(lengths: Sequence[int], most: int, ranks: int) -> list[list[list[int]]]:
    """Each to the emptiest bin of its round, as long as none holds more than `most`; a longer one goes alone."""
    made: list[list[list[int]]] = []
    loads: list[int] = []
    for index, length in enumerate(lengths):
        least = loads.index(min(loads)) if loads else 0
        if not made or (made[-1][least] and loads[least] + length > most):
            made.append([[] for _ in range(ranks)])
            loads, least = [0] * ranks, 0
        made[-1][least].append(index)
        loads[least] += length
    return made


def _sequence(key: str, domain: str, tokens: np.ndarray, mask: np.ndarray) -> PackItem:
    if len(mask) and mask[0]:
        raise ValueError(
            f"{key}: the first token is marked as trained, but nothing precedes it: a prompt needs at least one token"
        )
    trained = np.flatnonzero(mask)
    length = int(trained[-1]) if len(trained) else 0  # inputs 0..last-1 predict tokens 1..last
    return PackItem(
        key=key,
        domain=domain,
        tokens=tokens[:length].astype(np.int32),
        loss_mask=np.ascontiguousarray(mask[1 : length + 1]),
        targets=tokens[trained].astype(np.int64),
        rollout_logprobs=np.zeros(len(trained), np.float32),
    )


def _join(members: Sequence[PackItem]) -> MicroBatch:
    lengths = np.array([len(s.tokens) for s in members], np.int32)
    with_ce = any(s.ce_weights is not None for s in members)
    with_teacher = any(s.teacher_logprobs is not None for s in members)
    return MicroBatch(
        keys=tuple(s.key for s in members),
        domains=tuple(s.domain for s in members),
        tokens=np.concatenate([s.tokens for s in members]),
        positions=np.concatenate([np.arange(n, dtype=np.int64) for n in lengths]),
        cu_seqlens=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32),
        loss_mask=np.concatenate([s.loss_mask for s in members]),
        targets=np.concatenate([s.targets for s in members]),
        sequence_ids=np.repeat(np.arange(len(members)), [len(s.targets) for s in members]),
        rollout_logprobs=np.concatenate([s.rollout_logprobs for s in members]),
        advantages=np.array([s.advantage for s in members], np.float32),
        weights=np.array([s.weight for s in members], np.float32),
        betas=np.array([s.beta for s in members], np.float32),
        ce_weights=np.concatenate([s.ce_weights for s in members if s.ce_weights is not None]) if with_ce else None,
        teacher_logprobs=np.concatenate(
            [
                np.full(len(s.targets), np.nan, np.float32) if s.teacher_logprobs is None else s.teacher_logprobs
                for s in members
            ]
        )
        if with_teacher
        else None,
        temperature=members[0].temperature,
        kept_sets=_join_kept([s.kept_sets for s in members], [len(s.targets) for s in members]),
        index_records=tuple(s.index_record for s in members),
        expert_records=tuple(s.expert_record for s in members),
    )


def _take_rows(kept: KeptSets, rows: np.ndarray) -> KeptSets:
    """The kept sets of some rows. CSR in, CSR out."""
    counts = np.diff(kept.indptr)[rows]
    parts = [kept.token_ids[kept.indptr[row] : kept.indptr[row + 1]] for row in rows]
    indptr = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    return KeptSets(indptr=indptr, token_ids=np.concatenate(parts) if parts else np.zeros(0, np.int32))


def _join_kept(sets: Sequence[KeptSets | None], counts: Sequence[int]) -> KeptSets | None:
    """Kept sets of adjacent sequences; one without any has empty rows, which mean the whole vocabulary."""
    if all(kept is None for kept in sets):
        return None
    sizes = [
        np.zeros(n, np.int64) if kept is None else np.diff(kept.indptr) for kept, n in zip(sets, counts, strict=True)
    ]
    indptr = np.concatenate([[0], np.cumsum(np.concatenate(sizes))]).astype(np.int64)
    return KeptSets(
        indptr=indptr, token_ids=np.concatenate([k.token_ids for k in sets if k is not None]).astype(np.int32)
    )


def _split_groups(samples: Sequence[Sample], parts: int) -> list[list[Sample]]:
    """Samples in at most `parts` lists of about equal numbers of groups, whole groups each; domains are dealt out in turn."""
    by_domain: dict[str, list[int]] = {}
    for sample in samples:
        groups = by_domain.setdefault(sample.trajectory.domain, [])
        if sample.group not in groups:
            groups.append(sample.group)
    dealt = [group for groups in by_domain.values() for group in groups]
    owner = {group: index % parts for index, group in enumerate(dealt)}
    split: list[list[Sample]] = [[] for _ in range(parts)]
    for sample in samples:
        split[owner[sample.group]].append(sample)
    return [part for part in split if part]
