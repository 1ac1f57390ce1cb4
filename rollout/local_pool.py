"""The pool's interface without Ray: one engine in this process. For tests, small evaluations and `winnow generate`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from time import monotonic
from typing import Any

import numpy as np

from winnow.rollout.schema import Group, Request
from winnow.rollout.weights import WeightUpdate
from winnow.rollout.worker import WorkerSpec, build_runner, drained, load_update


class LocalPool:
    """Same methods as `pool.Pool`. Nothing runs between two calls of the iterator that `generate` returns."""

    def __init__(self, spec: WorkerSpec) -> None:
        import torch

        torch.set_num_threads(spec.threads)
        self.runner = build_runner(spec)
        self._finished: dict[str, Group | Exception] = {}  # until the iterator of their call asks

    def generate(self, requests: Sequence[Request]) -> Iterator[Group]:
        """Each request's group once, as it finishes. A request that cannot be run raises, and cancels the others."""
        added: set[str] = set()
        try:
            for request in requests:
                self.runner.add(request)
                added.add(request.request_id)
        except BaseException:
            for request_id in added:
                self.runner.cancel(request_id)
            raise
        return self._drain(added)

    def _drain(self, missing: set[str]) -> Iterator[Group]:
        try:
            while missing:
                for request_id in [name for name in self._finished if name in missing]:
                    missing.discard(request_id)
                    result = self._finished.pop(request_id)
                    if isinstance(result, Exception):
                        raise result
                    yield result
                if missing:
                    self._finished.update(self.runner.step())
        finally:
            for request_id in missing:
                self.runner.cancel(request_id)
                self._finished.pop(request_id, None)

    def push_weights(self, update: WeightUpdate, version: int | None = None) -> dict[int, int]:
        """Replaces the weights; {worker 0: version}. WeightError names a bad tensor and leaves the old weights.

        With on_update drain the samples that have begun end first; TimeoutError where that takes longer than drain_timeout_s.
        """
        engine, since = self.runner.engine, monotonic()
        if engine.config.on_update == "recompute":
            return {0: load_update(engine, update)}
        engine.drain()
        try:
            while not drained(engine, update.version, since):
                self._finished.update(self.runner.step())
            return {0: load_update(engine, update)}
        finally:
            engine.resume()

    def score(self, sequences: Sequence[Sequence[int]], temperature: float = 1.0) -> list[np.ndarray]:
        return [self.runner.engine.score(tokens, temperature) for tokens in sequences]

    def stats(self) -> dict[int, dict[str, Any]]:
        return {0: self.runner.engine.stats}

    def shutdown(self) -> None:
        self.runner.cancel_all()

    def __enter__(self) -> LocalPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
