"""The contract between processes: frozen data types and the protocols Reward, Environment and Generate.

    Task -> Trajectory -> Group -> TrainBatch -> LossInputs -> LossOutput -> StepReport

Everything that crosses a process boundary is one of these (the last four live in `rl/batching.py` and `rl/losses.py`). Arrays are
numpy: they travel through Ray's object store without a copy. Lengths are checked on construction, so that a wrong one fails where it
was made. Log-probabilities never share a name: `rollout_logprobs` (behaviour, from the engine), `old_logprobs` (the learner before this
batch's updates), `logprobs` (the learner now), `ref_logprobs`, `teacher_logprobs`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import numpy as np

from winnow.rollout.index_codec import pack_experts, pack_sets, unpack_experts, unpack_sets

Message = Mapping[str, str]  # {"role": "system" | "user" | "assistant" | "tool", "content": text}
FINISH_REASONS = (
    "stop",
    "length",
    "done",
    "abort",
)  # end token or stop text | token budget | environment said done | cancelled


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """One problem: what the model is shown and what its reward needs to know.

    `answer` is the gold answer where there is one; `metadata` holds whatever the domain's reward or environment reads (JSON values
    only); `reward` and `environment` are names in `winnow.rewards.registry`.
    """

    id: str
    domain: str
    messages: tuple[Message, ...]
    reward: str
    answer: str | None = None
    environment: str | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.messages:
            raise ValueError(f"task {self.id!r} has no messages: a task needs at least one, e.g. a user message")


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampling:
    """How tokens are drawn. `temperature` 0 is greedy. Filters apply in the order top_k, top_p, min_p; 0, 1 and 0 switch them off."""

    max_tokens: int  # new tokens per turn
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    stop: tuple[str, ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        checks = {
            "max_tokens": (self.max_tokens >= 1, ">= 1"),
            "temperature": (self.temperature >= 0, ">= 0"),
            "top_k": (self.top_k >= 0, ">= 0 (0 switches it off)"),
            "top_p": (0 < self.top_p <= 1, "in (0, 1] (1 switches it off)"),
            "min_p": (0 <= self.min_p < 1, "in [0, 1) (0 switches it off)"),
        }
        for name, (fine, rule) in checks.items():
            if not fine:
                raise ValueError(f"sampling.{name} is {getattr(self, name)!r}, but it must be {rule}")
        if isinstance(self.stop, str) or not all(isinstance(text, str) and text for text in self.stop):
            raise ValueError(f"sampling.stop is {self.stop!r}, but it must be a tuple of non-empty strings")

    @property
    def filters(self) -> bool:
        """Whether the kept set of a token can be smaller than the vocabulary."""
        return self.temperature > 0 and (self.top_k > 0 or self.top_p < 1 or self.min_p > 0)


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """A task to be sampled `num_samples` times. Delivered exactly once, whole, under `request_id`.

    first_sample: set by the pool, which asks a worker for one sample at a time: samples first_sample .. first_sample + num_samples - 1.
    """

    request_id: str
    task: Task
    num_samples: int
    sampling: Sampling
    max_turns: int = 1
    max_total_tokens: int | None = None  # prompt + every turn; None: the engine's context
    template: Mapping[str, Any] = field(default_factory=dict)  # options of the chat template, e.g. enable_thinking
    first_sample: int | None = None

    @property
    def key(self) -> str:
        """What a worker knows it by: `request_id`, for a part of a request with its first sample's number."""
        return self.request_id if self.first_sample is None else f"{self.request_id}/{self.first_sample}"


@dataclass(frozen=True, kw_only=True, slots=True)
class KeptSets:
    """The action set of each generated token, where the sampler cut the vocabulary. CSR over the trajectory's tokens.

    indptr int64 [tokens + 1]; token_ids int32 [indptr[-1]]. An empty row means the whole vocabulary was kept.
    """

    indptr: np.ndarray
    token_ids: np.ndarray

    def __post_init__(self) -> None:
        if self.indptr[0] != 0 or self.indptr[-1] != len(self.token_ids):
            raise ValueError(
                f"kept sets: indptr ends at {self.indptr[-1]} but there are {len(self.token_ids)} token ids"
            )


class IndexRecord:
    """The index sets that the rollout attended to: what `indexer.selection: replay` feeds to the learner. Packed from the start.

    indices: uint16 or int32 [layers, rows, k]: logical positions, ascending; the tail of a short row is padded with the dtype's
    maximum. Row i belongs to the query at position `first + i`; every query before `first` sees at most k positions, so its set is
    the identity and is not stored. `layers[i]` names the model layer of slab i. The last token of a trajectory was never a query and
    has no row. Reading `indices` unpacks them anew: keep the array while you work on it, and the record while it waits or travels.
    """

    __slots__ = ("_packed", "first", "k", "layers", "num_rows")

    def __init__(self, *, first: int, k: int, layers: tuple[int, ...], indices: np.ndarray) -> None:
        if indices.ndim != 3 or indices.shape[0] != len(layers) or indices.shape[2] != k:
            raise ValueError(f"index record: indices are {indices.shape}, want [{len(layers)} layers, rows, k={k}]")
        self.first, self.k, self.layers, self.num_rows = first, k, layers, indices.shape[1]
        self._packed = pack_sets(indices, first)

    @property
    def indices(self) -> np.ndarray:
        return unpack_sets(self._packed, self.num_rows)

    def cut(self, num_rows: int) -> IndexRecord:
        """The record of the first `num_rows` queries; the bytes are shared, not cut."""
        other = copy(self)
        other.num_rows = min(self.num_rows, num_rows)
        return other

    @property
    def nbytes(self) -> int:
        """Bytes it travels with."""
        return self._packed.nbytes


class ExpertRecord:
    """The experts that the rollout sent each token to: what `learner.routing: replay` feeds to the learner. Packed from the start.

    experts: uint8 (up to 256 experts) or uint16 [layers, rows, k], each row ascending. Row i belongs to the token at position i; the last
    token of a trajectory was never an input and has no row. `layers[i]` names the model layer of slab i, one that has experts.
    Reading `experts` unpacks them anew.
    """

    __slots__ = ("_dtype", "_packed", "_shape", "layers", "num_rows")

    def __init__(self, *, layers: tuple[int, ...], experts: np.ndarray) -> None:
        if experts.ndim != 3 or experts.shape[0] != len(layers) or experts.dtype not in (np.uint8, np.uint16):
            raise ValueError(
                f"expert record: experts are {experts.dtype} {experts.shape}, want uint8 or uint16 [{len(layers)} layers, rows, k]"
            )
        if (experts[..., 1:] <= experts[..., :-1]).any():
            raise ValueError(
                "expert record: a row is not ascending: every token goes to k different experts, named in order"
            )
        self.layers, self.num_rows, self._shape, self._dtype = (
            layers,
            experts.shape[1],
            experts.shape,
            experts.dtype.name,
        )
        self._packed = pack_experts(experts)

    @property
    def k(self) -> int:
        return self._shape[2]

    @property
    def experts(self) -> np.ndarray:
        return unpack_experts(self._packed, self._dtype, self._shape)[:, : self.num_rows]

    def cut(self, num_rows: int) -> ExpertRecord:
        """The record of the first `num_rows` tokens; the bytes are shared, not cut."""
        other = copy(self)
        other.num_rows = min(self.num_rows, num_rows)
        return other

    @property
    def nbytes(self) -> int:
        """Bytes it travels with."""
        return len(self._packed)


@dataclass(frozen=True, kw_only=True, slots=True)
class Trajectory:
    """One sample of a task, from its first prompt token to its last generated one, over every turn. Tokens in, tokens out.

    tokens int32 [tokens]; loss_mask bool [tokens], True on generated tokens (never on prompt or observation tokens);
    rollout_logprobs fp32 [tokens], natural log, of tokens[t] given tokens[<t] under the distribution it was drawn from (temperature
    and filters applied), 0 where the mask is False; policy_versions int32 [tokens], the weights that drew the token, -1 elsewhere.
    """

    request_id: str
    sample: int
    task_id: str
    domain: str
    tokens: np.ndarray
    loss_mask: np.ndarray
    rollout_logprobs: np.ndarray
    policy_versions: np.ndarray
    finish_reason: str
    messages: tuple[Message, ...]
    turns: int = 1
    temperature: float = 1.0
    kept_sets: KeptSets | None = None
    index_record: IndexRecord | None = None
    expert_record: ExpertRecord | None = None
    environment_state: Mapping[str, Any] = field(default_factory=dict)  # what the environment leaves for the reward

    def __post_init__(self) -> None:
        for name in ("loss_mask", "rollout_logprobs", "policy_versions"):
            if len(getattr(self, name)) != len(self.tokens):
                raise ValueError(
                    f"trajectory {self.key}: {name} has {len(getattr(self, name))} entries for {len(self.tokens)} tokens"
                )
        if self.finish_reason not in FINISH_REASONS:
            raise ValueError(f"trajectory {self.key}: finish_reason {self.finish_reason!r} is none of {FINISH_REASONS}")
        if self.kept_sets is not None and len(self.kept_sets.indptr) != len(self.tokens) + 1:
            raise ValueError(
                f"trajectory {self.key}: kept sets cover {len(self.kept_sets.indptr) - 1} of {len(self.tokens)} tokens"
            )
        record = self.index_record
        if record is not None and record.num_rows != max(0, len(self.tokens) - 1 - record.first):
            raise ValueError(
                f"trajectory {self.key}: the index record has {record.num_rows} rows from position {record.first}, "
                f"want {max(0, len(self.tokens) - 1 - record.first)} for {len(self.tokens)} tokens"
            )
        routed = self.expert_record
        if routed is not None and routed.num_rows != len(self.tokens) - 1:
            raise ValueError(
                f"trajectory {self.key}: the expert record has {routed.num_rows} rows, want {len(self.tokens) - 1} for {len(self.tokens)} tokens"
            )

    @property
    def key(self) -> str:
        return f"{self.request_id}/{self.sample}"

    @property
    def reply(self) -> str:
        """The text of the last assistant message."""
        return next((m["content"] for m in reversed(self.messages) if m["role"] == "assistant"), "")

    @property
    def num_generated(self) -> int:
        return int(self.loss_mask.sum())


@dataclass(frozen=True, kw_only=True, slots=True)
class Score:
    """A reward: `value` and the named parts it was made of. Finite, checked on construction."""

    value: float
    parts: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, number in {"value": self.value, **self.parts}.items():
            if not np.isfinite(number):
                raise ValueError(
                    f"reward {name} is {number}: a score must be finite; return a Failure when there is no score"
                )


@dataclass(frozen=True, kw_only=True, slots=True)
class Failure:
    """Why there is no score. Not a score of 0: the sample is dropped and counted under `kind`."""

    kind: str  # e.g. "timeout", "error", "invalid"
    detail: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Group:
    """A request's samples with their scores, in sample order."""

    request: Request
    trajectories: tuple[Trajectory, ...]
    scores: tuple[Score | Failure, ...] = ()

    def __post_init__(self) -> None:
        if self.scores and len(self.scores) != len(self.trajectories):
            raise ValueError(
                f"group {self.request.request_id}: {len(self.scores)} scores for {len(self.trajectories)} trajectories"
            )
        strangers = [t.key for t in self.trajectories if t.request_id != self.request.request_id]
        if strangers:
            raise ValueError(f"group {self.request.request_id} holds trajectories of other requests: {strangers}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """An environment's answer to one reply: messages to append, and whether the episode is over."""

    messages: tuple[Message, ...] = ()
    done: bool = False


@runtime_checkable
class Environment(Protocol):
    """One episode's world. A fresh one is made for every sample; `state` is what the reward sees at the end (JSON values).

    Two keys of the state are read by name: `reward` with `parts`, where the world grades itself (reward `environment`), and `failure`
    ({"kind", "detail"}), where it broke. An environment whose attribute `slow` is true is stepped in a thread of its own.
    `rewards/toolbox.py` is a base class with tools, JSON schemas and parallel calls.
    """

    def reset(self, task: Task) -> tuple[Message, ...]:
        """Messages to append to the task's own before the first turn (often none)."""

    def step(self, reply: str) -> Step:
        """What the world answers to the model's reply."""

    def state(self) -> Mapping[str, Any]:
        """The final state, copied into `Trajectory.environment_state`."""


class Reward(Protocol):
    """Grades one trajectory. Raising is a Failure of kind "error", never a score of 0."""

    def __call__(self, task: Task, trajectory: Trajectory) -> Score | Failure: ...


class Generate(Protocol):
    """Samples requests; yields each exactly once, as it finishes, in no particular order. Scores are empty."""

    def __call__(self, requests: Sequence[Request]) -> Iterator[Group]: ...
