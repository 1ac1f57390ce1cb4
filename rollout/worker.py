"""One engine and the thread that drives it: the body of a Ray actor, and what LocalPool holds in-process.

Calls arrive on any thread and are run by the engine's thread between two steps, in order of arrival. So requests that arrive while
others run join their batch, and new weights take effect at a token boundary.
"""

from __future__ import annotations

import asyncio
import os
import pickle
import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from functools import partial
from importlib import metadata
from typing import Any

import numpy as np

from winnow.rollout.engine import Engine, EngineConfig
from winnow.rollout.episode import EnvironmentFactory, EpisodeRunner
from winnow.rollout.schema import Group, Request, Trajectory
from winnow.rollout.template import ChatTemplate
from winnow.rollout.transfer import Receiver
from winnow.rollout.transport import Ticket, own_device
from winnow.rollout.weights import WeightUpdate, unpack

_POLL_S = 0.02  # between two looks whether a drain is over, or a sample done
_IDLE_S = 60.0  # how long the engine's thread waits for a call at a time


def code_version() -> str:
    """The installed distribution's version; "source" in a source tree that was never installed."""
    try:
        return metadata.version("winnow-rl")
    except metadata.PackageNotFoundError:
        return "source"


def log_file() -> str | None:
    """Where this process's error output goes, when that is a file: the pool quotes its end if the process dies."""
    try:
        path = os.path.realpath("/proc/self/fd/2")
    except OSError:  # a system without /proc
        return None
    return path if os.path.isfile(path) else None


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkerSpec:
    """What a worker is built from. model: a folder or a model spec of `models.load`; environments: picklable, name -> Environment."""

    model: str
    kind: str = "native"  # or "vllm": whose engine
    dtype: str = "float32"
    engine: EngineConfig = field(default_factory=EngineConfig)
    threads: int = 1
    device: str = "cpu"
    environments: EnvironmentFactory | None = None


def build_runner(spec: WorkerSpec) -> EpisodeRunner:
    """Loads the model and tokenizer and puts an engine around them."""
    from winnow.models.load import load, load_tokenizer

    tokenizer = load_tokenizer(spec.model)
    template = ChatTemplate(tokenizer)
    engine: Engine
    if spec.kind == "vllm":
        from winnow.rollout.vllm_engine import VllmEngine

        engine = VllmEngine(spec.model, tokenizer, spec.engine, template.end_ids, spec.dtype, spec.device)
    else:
        engine = Engine(load(spec.model, spec.dtype, spec.device), tokenizer, spec.engine, template.end_ids)
    return EpisodeRunner(engine, template, spec.environments)


def load_update(engine: Engine, update: WeightUpdate) -> int:
    """Verifies every tensor, then overwrites the engine's weights. Returns the version now in use; WeightError names a bad tensor."""
    engine.load_weights(unpack(update), update.version)
    return engine.version


def load_tensors(engine: Engine, tensors: Mapping[str, Any], version: int) -> int:
    """Overwrites the engine's weights with tensors that were verified, which may be freed afterwards. Returns the version now in use."""
    engine.load_weights(tensors, version)
    if engine.device.type == "cuda":
        import torch

        torch.cuda.current_stream().synchronize()  # they were made on another stream
    return engine.version


def drained(engine: Engine, version: int, since: float) -> bool:
    """Whether the samples that had begun are done. TimeoutError for an update that has waited too long for them, monotonic `since`."""
    if engine.drained:
        return True
    limit = engine.config.drain_timeout_s
    if time.monotonic() - since > limit:
        count = len(engine.scheduler.started)
        raise TimeoutError(
            f"weights of version {version} waited {limit:g} s for {count} samples of version {engine.version} to end, which still run: "
            "raise rollout.drain_timeout_s, lower max_tokens, or set rollout.on_update to recompute"
        )
    return False


class RolloutWorker:
    """All methods but `__init__` are coroutines: a Ray actor runs any number of them at once. The model is loaded by the engine's thread,
    so that `ping` answers from the first moment on; every other call waits for it."""

    def __init__(self, spec: WorkerSpec, number: int, driver_version: str) -> None:
        import torch

        mine = code_version()
        if mine != driver_version:
            raise RuntimeError(
                f"rollout worker {number} runs winnow {mine}, the driver {driver_version}: install the same version on every node, "
                "or submit with the built wheel"
            )
        self.number, self.threads = number, spec.threads
        torch.set_num_threads(spec.threads)
        self.spec, self.device = spec, "cpu"
        self.receiver, self._receiving = Receiver(), asyncio.Lock()
        self._built: Future[EpisodeRunner] = Future()
        self._built.set_running_or_notify_cancel()  # nobody who waits for it may cancel it
        if spec.kind == "vllm":  # which wants the main thread, for signal handlers
            self._build()
        self._inbox: queue.SimpleQueue[tuple[Callable[[], Any], Future]] = queue.SimpleQueue()
        self._results: dict[str, Future] = {}
        self._outbox: queue.SimpleQueue[tuple[int, tuple[Trajectory, ...] | Exception]] = queue.SimpleQueue()
        threading.Thread(target=self._drive, name="winnow-engine", daemon=True).start()

    async def ping(self) -> dict[str, Any]:
        """Who this is. Answers while the model is loaded (the version is -1 then) and while the engine works."""
        return {
            "worker": self.number,
            "pid": os.getpid(),
            "host": os.uname().nodename,
            "log": log_file(),
            "version": self.runner.engine.version if self._built.done() else -1,
            "device": self.device,
        }

    async def ready(self) -> dict[str, Any]:
        """As `ping`, once the model is loaded. Raises what went wrong with it."""
        await asyncio.wrap_future(self._built)
        return await self.ping()

    @property
    def runner(self) -> EpisodeRunner:
        """Waits for the model."""
        return self._built.result()

    async def generate(self, requests: Sequence[Request]) -> list[Group]:
        """Samples the requests together with whatever else is running here; all groups, in the order of the requests."""
        futures = [self._submit(request) for request in requests]
        return [await asyncio.wrap_future(future) for future in futures]

    async def start(self, request: Request, tickets: Mapping[int, int]) -> None:
        """Begins samples of a request: sample number -> the ticket under which `finished` will return it."""
        for sample, ticket in tickets.items():
            result = self._submit(replace(request, num_samples=1, first_sample=sample))
            result.add_done_callback(partial(self._hand_over, ticket))

    async def finished(self) -> list[tuple[int, tuple[Trajectory, ...] | Exception]]:
        """(ticket, its sample or why there is none) of what ended since the last call; waits for something to, at most a minute."""
        until = time.monotonic() + _IDLE_S
        while self._outbox.empty() and time.monotonic() < until:
            await asyncio.sleep(_POLL_S)
        return [self._outbox.get_nowait() for _ in range(self._outbox.qsize())]

    async def cancel(self, keys: Sequence[str]) -> None:
        """Drops requests, by `Request.key`; their `generate` calls raise."""
        await self._call(lambda: self._cancel(keys))

    async def load_weights(self, update: WeightUpdate | Ticket) -> int:
        """The version in use afterwards. Generation goes on while the weights of a ticket travel. With on_update drain, the samples that
        have begun end then and no other begins; TimeoutError, and they go on, when that takes longer than drain_timeout_s."""
        await self.ready()
        engine, version = self.runner.engine, update.version
        if isinstance(update, Ticket):
            async with self._receiving:
                tensors = await asyncio.to_thread(self.receiver.receive, update, engine.model)
            load = partial(load_tensors, engine, tensors, version)
        else:
            load = partial(load_update, engine, update)
        if engine.config.on_update == "recompute":
            return await self._call(load)
        since = time.monotonic()
        await self._call(engine.drain)
        try:
            while not await self._call(lambda: drained(engine, version, since)):
                await asyncio.sleep(_POLL_S)
            return await self._call(load)
        finally:
            await self._call(engine.resume)

    async def pause(self) -> None:
        """Stops generating at this token; requests may still come."""
        await self._call(lambda: self.runner.engine.pause())

    async def resume(self) -> None:
        await self._call(lambda: self.runner.engine.resume())

    async def score(self, sequences: Sequence[Sequence[int]], temperature: float = 1.0) -> list[np.ndarray]:
        """The engine's own log-probabilities of given tokens: the rollout side of a parity check."""
        return await self._call(lambda: [self.runner.engine.score(tokens, temperature) for tokens in sequences])

    async def stats(self) -> dict[str, int]:
        await self.ready()
        return self.runner.engine.stats

    def _call(self, function: Callable[[], Any]) -> asyncio.Future:
        future: Future = Future()
        self._inbox.put((function, future))
        return asyncio.wrap_future(future)

    def _submit(self, request: Request) -> Future:
        result: Future = Future()

        def start() -> None:
            self.runner.add(request)
            self._results[request.key] = result

        admitted: Future = Future()
        admitted.add_done_callback(lambda f: _resolve(result, f.exception()) if f.exception() else None)
        self._inbox.put((start, admitted))
        return result

    def _hand_over(self, ticket: int, done: Future) -> None:
        self._outbox.put((ticket, outcome_of(done)))

    def _cancel(self, keys: Sequence[str]) -> None:
        for key in keys:
            self.runner.cancel(key)
            if (future := self._results.pop(key, None)) is not None:
                _resolve(future, RuntimeError(f"request {key!r} was cancelled"))

    def _build(self) -> None:
        """Loads the model; what goes wrong is for whoever asks."""
        try:
            runner = build_runner(self.spec)
            self.device = own_device(self.spec.device)
        except Exception as error:
            self._built.set_exception(error)
        else:
            self._built.set_result(runner)

    def _drive(self) -> None:
        """The engine's thread: calls first, then one step, for as long as the process lives."""
        import torch

        torch.set_num_threads(self.threads)
        if not self._built.done():
            self._build()
        while (error := self._built.exception()) is not None:
            _resolve(self._inbox.get()[1], error)
        while True:
            while not (self._inbox.empty() and self.runner.has_work):
                try:
                    function, future = self._inbox.get(timeout=_IDLE_S)
                except (
                    queue.Empty
                ):  # nothing was asked for: the actor's process ends this thread, whatever it waits for
                    continue
                try:
                    outcome = function()
                except Exception as error:
                    outcome = error
                _resolve(future, outcome)
            try:
                finished = self.runner.step()
            except Exception as error:  # the engine itself failed: nothing that runs can be trusted to go on
                finished = [(key, error) for key in self._results]
                self.runner.cancel_all()
            for key, result in finished:
                _resolve(self._results.pop(key), result)


def _resolve(future: Future, outcome: Any) -> None:
    if not future.set_running_or_notify_cancel():
        return  # whoever waited has gone
    if isinstance(outcome, Exception):
        future.set_exception(outcome)
    else:
        future.set_result(outcome)


def outcome_of(done: Future) -> tuple[Trajectory, ...] | Exception:
    """The trajectories of a request that ended, or its error in a form that can travel."""
    error = done.exception()
    if error is None:
        return done.result().trajectories
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # whatever its class does there
        return RuntimeError(repr(error))
    return error if isinstance(error, Exception) else RuntimeError(repr(error))
