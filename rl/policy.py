"""The learner's model with its optimizer and reference: loaded, split over ranks, saved, resumed, handed over to the engines.

What is done with it in a step is in learner.py. Over several ranks (ranks.py) every rank calls the same methods with the same arguments.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from winnow.models import attach
from winnow.models import load as model_folders
from winnow.models.forward import hidden_states, lm_head_weight
from winnow.models.inference import takes
from winnow.models.joined import join
from winnow.models.pieces import Pieces
from winnow.models.routing import routers
from winnow.rl.config import Config
from winnow.rl.optimizer import Optimizer
from winnow.rl.ranks import Ranks, whole
from winnow.rl.scoring import States
from winnow.rl.teachers import Teachers
from winnow.rollout import weights

STATE_FILE = "learner.pt"


class Policy:
    """Call `load` (or `resume`) first; `load` again, with another config if wanted, to reuse the process for another run."""

    def __init__(self, config: Config, ranks: Ranks | None = None) -> None:
        self.config, self.ranks = config, ranks or Ranks()
        self.offered: int | None = None  # the version that these very weights were last handed over as

    def load(self, path: str | Path | None = None, config: Config | None = None) -> dict[str, Any]:
        """Loads the model at `path` (default: config.model.path) with a new optimizer, and the reference if a domain has beta > 0.

        Returns {"parameters": count, "indexer_parameters": count, "top_k": k or None, "vocab_size": count, "context": tokens}. Raises ValueError for replay or indexer
        training on a dense model, and for routing replay on one without experts.
        """
        self.config = config = config or self.config
        path = str(path or config.model.path)
        torch.set_num_threads(config.learner.threads)
        torch.manual_seed(config.seed)
        if config.cluster.learner_gpus > 0 and not torch.cuda.is_available():
            raise RuntimeError(
                f"cluster.learner_gpus is {config.cluster.learner_gpus:g}, but torch sees no GPU in the learner's process: install a torch "
                "built for CUDA there, or set cluster.learner_gpus to 0"
            )
        self.device = "cuda" if config.cluster.learner_gpus > 0 else "cpu"
        model: Any = model_folders.load(path, dtype=config.model.dtype, device=self.device)
        has_tokenizer = any(model_folders.resolve(path).glob("tokenizer*.json"))
        self.tokenizer = model_folders.load_tokenizer(path) if has_tokenizer else None
        return self._adopt(model, path)

    def _adopt(self, model: Any, path: str) -> dict[str, Any]:
        """Takes a loaded model, splits it over the ranks and makes its optimizer, reference and counts. `path` is what to call it."""
        config = self.config
        self.model, self.offered = model.train(), None
        if config.learner.checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        shape = attach.indexer_config(self.model)
        self.top_k = shape.top_k if shape else None
        if self.top_k is None and (config.indexer.train == "kl" or config.indexer.selection == "replay"):
            raise ValueError(
                f"{path} is a dense model, but the config has indexer.train={config.indexer.train} and indexer.selection="
                f"{config.indexer.selection}, which need an indexer: run `winnow convert` first, or set frozen and own"
            )
        if config.learner.routing == "replay" and not routers(model):
            raise ValueError(
                f"learner.routing is replay, but {path} is a {model.config.model_type} model without experts: set learner.routing to own"
            )
        self.ranks.shard(self.model, attach.indexer_parameters(self.model).values())
        self.states: States = hidden_states
        self.pieces: Pieces | None = None
        if self.device == "cuda" and self.ranks.world == 1 and takes(self.model):
            join(self.model)
            if config.learner.cuda_graphs:
                self.pieces = Pieces(self.model, capture=True)
                self.states = self.pieces.states
        base, indexer = attach.base_parameters(self.model).values(), attach.indexer_parameters(self.model).values()
        self.optimizer = Optimizer(base, indexer, config.learner, config.indexer)
        self.reference = None
        self.teachers: Teachers | None = None
        if config.reference_path:
            self.reference = model_folders.load(config.reference_path, dtype=config.model.dtype, device=self.device)
            self.reference.requires_grad_(False)
            self.ranks.shard(self.reference, attach.indexer_parameters(self.reference).values())
        counts = {"parameters": sum(p.numel() for p in base), "indexer_parameters": sum(p.numel() for p in indexer)}
        context = self.model.config.max_position_embeddings
        return {**counts, "top_k": self.top_k, "vocab_size": len(lm_head_weight(self.model)), "context": context}

    def save(self, folder: str | Path, state: bool = True) -> None:
        """Writes the model (a folder `from_pretrained` opens) and, with `state`, what an exact resume needs."""
        folder = Path(folder)
        tensors = self._tensors()
        optimizer = self.optimizer.state_dict() if state else None
        if self.ranks.rank == 0:
            model_folders.save(self.model, self.tokenizer, folder, None if self.ranks.world == 1 else tensors)
            if state:
                sizes = [] if self.pieces is None else self.pieces.sizes
                torch.save({"optimizer": optimizer, "rng": torch.get_rng_state(), "pieces": sizes}, folder / STATE_FILE)

    def resume(self, folder: str | Path, config: Config | None = None) -> dict[str, Any]:
        """Loads a checkpoint with its optimizer and random state: the next step is bit for bit that of the uninterrupted run."""
        info = self.load(folder, config)
        state = torch.load(Path(folder) / STATE_FILE, map_location=self.device, weights_only=True)
        self.optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["rng"].cpu())
        if self.pieces is not None and state.get("pieces"):
            self.pieces.reserve(state["pieces"])
        return info

    def weights(self, version: int) -> weights.WeightUpdate:
        """Every weight of the model, with checksums, for the rollout's engines. Ranks but the first return an empty update."""
        return weights.pack(self._tensors(), version)

    def named_weights(self) -> dict[str, Tensor]:
        """The model's weights by name, tied ones once. Over ranks they are parts: `ranks.whole` of one is every rank's to ask for."""
        if self.ranks.world == 1:
            return weights.untied(weights.state_of(self.model))
        named, seen = {}, set()
        for name, tensor in self.model.state_dict(keep_vars=True).items():
            if id(tensor) not in seen:
                seen.add(id(tensor))
                named[name] = tensor
        return named

    def _tensors(self) -> dict[str, Tensor]:
        """The model's weights by name. Over ranks they are gathered one by one, tied ones once, to the first rank's main memory."""
        if self.ranks.world == 1:
            return self.model.state_dict()
        gathered = {}
        for name, tensor in self.named_weights().items():
            full = whole(tensor)
            if self.ranks.rank == 0:
                gathered[name] = full.cpu()
        return gathered
