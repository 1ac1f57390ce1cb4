"""The sizes of a conversion: `key=value` of `winnow convert`, `convert:` of a pipeline."""

from __future__ import annotations

from dataclasses import dataclass

from winnow.models.indexer import TARGETS, IndexerConfig
from winnow.rl.share import REACH

REPORTS = ("full", "short")  # short: perplexity and recall only
TEACHERS = ("text", "dense")


@dataclass(frozen=True, kw_only=True)
class ConvertOptions:
    """Sizes are in tokens. The defaults convert SmolLM2-135M in a few minutes on two cores."""

    top_k: int = 32
    index_heads: int = 4
    index_dim: int = 32
    index_rope_dim: int = 16
    index_target: str = "attention"  # what indexers learn: the "attention", or what the "output" loses without a key
    index_share: int = 1  # layers that one indexer serves
    index_share_by: str = "every"  # which layers lead: "every" n-th, or chosen by measured "overlap"
    data: str = (
        "self"  # a text file, JSONL, folder, "hub:name[:split]", several of them, or "self": the model's own samples
    )
    data_field: str = "text"
    holdout: str = ""  # where the held-out texts come from; empty: a part of data
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
    sparse_teacher: str = (
        "text"  # what the model learns in the sparse stage: the "text", or what the "dense" model says to it
    )
    sparse_average: float = 0.0  # share of the steps, the last ones, whose mean weights are left; 0: the last step's
    coupled: bool = False  # ablation: the KL's gradient reaches the model too, against DSA's recipe
    checkpointing: bool = False  # recompute activations in the sparse stage's backward
    holdout_tokens: int = 1536
    needle_steps: int = 0  # steps that teach the dense model to find needles, before anything else
    needle_tokens: int = 4096  # of one of them
    needle_lr: float = 1e-4
    needle_chat: float = 0.0  # of the texts of those steps: asked as a user does, in the model's chat template
    needle_share: float = 0.0  # of the training sequences: texts with needles and questions after them
    needles: int = 8  # in one text of the report
    needle_texts: int = 4  # of each length
    report: str = "full"
    max_grad_norm: float = 1.0
    dtype: str = "float32"
    device: str = "cpu"
    threads: int = 0  # of torch; 0: as many as it takes by itself
    seed: int = 0

    def __post_init__(self) -> None:
        sizes = (
            "top_k",
            "index_heads",
            "index_dim",
            "seq_len",
            "warmup_tokens",
            "warmup_passes",
            "warmup_micro",
            "sparse_tokens",
            "holdout_tokens",
            "needle_tokens",
        )
        for name in sizes:
            if getattr(self, name) < 1:
                raise ValueError(f"convert.{name} is {getattr(self, name)}, but it must be >= 1")
        for name in (
            "warmup_batches",
            "sparse_steps",
            "needle_steps",
            "warmup_lr",
            "sparse_indexer_lr",
            "sparse_model_lr",
            "needle_lr",
            "threads",
        ):
            if getattr(self, name) < 0:
                raise ValueError(f"convert.{name} is {getattr(self, name)}, but it must be >= 0")
        for name, allowed in (
            ("index_share_by", ("every", "overlap")),
            ("index_target", TARGETS),
            ("report", REPORTS),
            ("sparse_teacher", TEACHERS),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"convert.{name} is {getattr(self, name)!r}, but it must be one of {allowed}")
        if not 1 <= self.index_share <= REACH:
            raise ValueError(f"convert.index_share is {self.index_share}, but one indexer serves 1 to {REACH} layers")
        if not 0 <= self.sparse_average <= 1:
            raise ValueError(f"convert.sparse_average is {self.sparse_average}, but it must be from 0 to 1")
        for name in ("needle_share", "needle_chat"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"convert.{name} is {getattr(self, name)}, but it must be at least 0 and below 1")
        if self.needle_chat and not self.needle_steps:
            raise ValueError(
                f"convert.needle_chat is {self.needle_chat}, a share of the texts of needle_steps, and there are none: set needle_steps, or "
                "needle_chat to 0"
            )
        _ = self.indexer  # its own checks: before any data are read or sampled
        if self.seq_len <= self.top_k:
            raise ValueError(
                f"convert.seq_len is {self.seq_len} and top_k {self.top_k}: no set would ever be smaller than its context; "
                "set seq_len to several times top_k"
            )

    @property
    def indexer(self) -> IndexerConfig:
        """With an indexer in every layer."""
        return IndexerConfig(
            top_k=self.top_k,
            num_heads=self.index_heads,
            head_dim=self.index_dim,
            rope_dim=self.index_rope_dim,
            target=self.index_target,
        )

    @property
    def num_tokens(self) -> int:
        """Distinct tokens that every stage together could use, the held-out ones included."""
        return self.warmup_batches * self.warmup_tokens + self.sparse_steps * self.sparse_tokens + self.holdout_tokens
