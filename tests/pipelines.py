"""What the tests of the pipeline share: a tiny model that says random digits, a config with two domains, a cluster in this process."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from winnow.rewards.demonstrations import pretraining_texts
from winnow.rl.base import make_tokenizer
from winnow.rl.cluster import Cluster, worker_spec
from winnow.rl.config import Config
from winnow.rl.learner import Learner
from winnow.rl.pipeline_config import PipelineConfig, make_pipeline
from winnow.rollout.local_pool import LocalPool


def make_babbler(folder: Path) -> Path:
    """A model whose hidden state has one constant coordinate, from which the head reads: a digit or the end, whatever the prompt."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    tokenizer = make_tokenizer(pretraining_texts(12, 0), 400, 512)
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id, "bos_token_id": None}
    shape = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
    }
    model = Qwen2ForCausalLM(
        Qwen2Config(vocab_size=len(tokenizer), max_position_embeddings=512, tie_word_embeddings=False, **shape, **ends)
    )
    with torch.no_grad():
        model.model.embed_tokens.weight.normal_(0, 1)  # what attention and index can tell apart
        model.model.embed_tokens.weight[:, 0] = 8
        digits = [tokenizer(f"{digit}", add_special_tokens=False)["input_ids"][-1] for digit in range(10)]
        model.lm_head.weight[:, 0] = 0
        model.lm_head.weight[digits, 0] = 2.4
        model.lm_head.weight[tokenizer.eos_token_id, 0] = 2.6
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def pipeline_config(root: Path, model: Path, *overrides: str) -> PipelineConfig:
    domain = {"count": 24, "holdout": 6, "quota": 4, "max_tokens": 10, "max_turns": 1}
    values: dict[str, Any] = {
        "name": "p",
        "runs_dir": str(root),
        "model": str(model),
        "floors": "lookup",
        "convert": {
            "top_k": 8, "index_heads": 2, "index_dim": 8, "index_rope_dim": 4, "seq_len": 96, "warmup_batches": 2, "warmup_tokens": 400,
            "warmup_passes": 1, "sparse_steps": 1, "sparse_tokens": 300, "holdout_tokens": 200,
        },
        "run": {
            "domains": [{"name": "lookup", "source": "lookup", **domain}, {"name": "sums", "source": "addition", **domain}],
            "rollout": {"samples": 8, "num_pages": 512, "max_batch": 16},
            "learner": {"lr": 1e-4},
            "indexer": {"train": "kl", "selection": "replay"},
            "schedule": {"steps": 2, "save_every": 0},
            "evaluation": {"limit": 6},
        },
        "data": {"tasks": 16, "samples": 16},
        "student": {"epochs": 1, "batch_tokens": 800},
    }  # fmt: skip
    return make_pipeline(values, overrides)


class Here:
    """Stands for `connect`: learner and pool in this process. Counts how often it was asked."""

    def __init__(self) -> None:
        self.connections = 0

    @contextmanager
    def __call__(self, config: Config) -> Iterator[Cluster]:
        self.connections += 1
        yield Cluster(Learner(config), LocalPool(worker_spec(config)))
