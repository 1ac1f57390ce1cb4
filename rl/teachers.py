"""Specialists as teachers: the log-probability of every token that the student drew, by the teacher of the sample's domain."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from winnow.models import load as model_folders
from winnow.rl import scoring
from winnow.rl.batching import pack, trajectory_sequence
from winnow.rollout.schema import Trajectory


class Teachers:
    """One frozen model a domain, loaded when its first sample comes; domains with the same folder share it."""

    def __init__(self, paths: Mapping[str, str], dtype: str = "float32", device: str = "cpu") -> None:
        self.paths, self.dtype, self.device = dict(paths), dtype, device
        self._models: dict[str, Any] = {}

    @torch.no_grad()
    def logprobs(
        self, trajectories: Sequence[Trajectory], micro_tokens: int, selector: str = "indexer"
    ) -> list[np.ndarray]:
        """fp32 [generated tokens] of each trajectory, at its own temperature, each teacher on its own index sets.

        Raises ValueError for a domain without a teacher and for a teacher of another vocabulary than the student's tokens.
        """
        found: dict[str, np.ndarray] = {}
        for domain in sorted({t.domain for t in trajectories}):
            model = self._model(domain)
            own = [t for t in trajectories if t.domain == domain]
            largest = max(int(t.tokens.max()) for t in own)
            if largest >= model.config.vocab_size:
                raise ValueError(
                    f"teacher {self.paths[domain]} of domain {domain!r} has {model.config.vocab_size} tokens, but the student drew token "
                    f"{largest}: a teacher must have the student's tokenizer, so take a specialist of its base"
                )
            for micro in pack([trajectory_sequence(t) for t in own], micro_tokens):
                with scoring.scored(model, micro, selector=selector) as result:
                    values = result.logprobs.float().cpu().numpy()
                found |= {key: values[micro.sequence_ids == number] for number, key in enumerate(micro.keys)}
        return [found[t.key] for t in trajectories]

    def _model(self, domain: str) -> Any:
        if domain not in self.paths:
            raise ValueError(
                f"domain {domain!r} has no teacher; there are teachers for {', '.join(sorted(self.paths)) or 'no domain'}: train a "
                "specialist for it, or take the domain out of the student's run"
            )
        path = str(Path(self.paths[domain]))
        if path not in self._models:
            model = model_folders.load(path, dtype=self.dtype, device=self.device)
            self._models[path] = model.requires_grad_(False).eval()
        return self._models[path]
