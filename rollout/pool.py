"""N rollout workers as Ray actors that behave like one.

    generate -> ledger (what is owed) -> crew (who works, who died) -> ledger -> the caller's iterator

One thread of the driver watches all of it, so requests keep flowing and a dead worker is replaced while the caller does other things.
Ledger and crew are used under one lock. Every wait has a limit, and the error says which worker, at what, for how long.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from winnow.rollout.arrivals import Arrivals
from winnow.rollout.crew import Crew
from winnow.rollout.handles import PoolLimits, Worker
from winnow.rollout.ledger import Call, Ledger
from winnow.rollout.offers import Offer, StoreOffer, no_room
from winnow.rollout.schema import Request
from winnow.rollout.weights import WeightUpdate
from winnow.rollout.worker import RolloutWorker, WorkerSpec

log = logging.getLogger("winnow.rollout")
_TICK_S = 0.05


class Pool:
    """One actor for each entry of `actor_options`, built from one spec. An entry holds Ray options of that actor, e.g. its place in a
    placement group; `num_cpus` defaults to the spec's threads. `timeout_s` is short for `limits.request_timeout_s`.
    """

    def __init__(
        self,
        spec: WorkerSpec,
        actor_options: Sequence[Mapping[str, Any]] = ({},),
        timeout_s: float | None = None,
        limits: PoolLimits | None = None,
        worker_class: type = RolloutWorker,
    ) -> None:
        if not actor_options:
            raise ValueError("rollout.workers is 0, but a pool needs at least one worker")
        self.spec, self.limits = spec, limits or PoolLimits()
        if timeout_s is not None:
            self.limits = replace(self.limits, request_timeout_s=timeout_s)
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)
        self._closed, self._why = False, ""
        self._ledger = Ledger(self.limits.max_attempts)
        with self._lock:
            self._crew = Crew(spec, actor_options, self.limits, worker_class, self._ledger)
        self._thread = threading.Thread(target=self._watch, name="winnow-pool", daemon=True)
        self._thread.start()
        try:
            self._wait_ready()
        except BaseException:
            self.shutdown()
            raise

    def generate(self, requests: Sequence[Request]) -> Arrivals:
        """Sends the requests now; the iterator yields each one's group once, as it finishes. Closing it cancels the rest.

        Raises what made a request fail: at once for a ValueError (the request itself is wrong), after `max_attempts` otherwise.
        """
        with self._lock:
            self._check_usable()
            call = self._ledger.open(requests)
            self._crew.dispatch()
        return self._arrivals(call)

    def push_weights(self, update: WeightUpdate | Any, version: int | None = None) -> dict[int, int]:
        """Gives every worker new weights: an update, a reference to one and its version, or an `Offer`. Returns {worker: version} once all
        live workers have acknowledged; one that is just starting gets them before its first request. Raises the refusal of a bad update.
        """
        offer = _offered(update, version)
        version = offer.version
        limit = self.limits.load_timeout_s + self.limits.start_timeout_s
        deadline = time.monotonic() + limit
        crew = self._crew
        with self._changed:
            self._check_usable()
            before = crew.load(offer)
            while True:
                if (refusal := crew.refusals.pop(version, None)) is not None:
                    crew.weights = before
                    raise refusal
                self._check_usable()
                acknowledged = {w.number: w.version for w in crew.ready if w.version == version}
                through = offer.finished()
                if through and acknowledged and all(w.state not in ("loading", "waiting") for w in crew.workers):
                    return acknowledged
                if time.monotonic() > deadline:
                    slow = ", ".join(f"{w} is {w.state}" for w in crew.workers if w.version != version)
                    slow += "" if through else "; the learner is still sending"
                    raise TimeoutError(f"weights of version {version} not acknowledged within {limit:.0f} s: {slow}")
                self._changed.wait(_TICK_S)

    def score(self, sequences: Sequence[Sequence[int]], temperature: float = 1.0) -> list[np.ndarray]:
        """Log-probabilities of given tokens by one worker's engine, for parity checks. Another worker is asked where one dies."""
        import ray

        dead: list[Any] = []
        while True:
            worker = self._wait_ready(dead)[0]
            actor, name = worker.actor, str(worker)
            try:
                return ray.get(actor.score.remote(sequences, temperature), timeout=self.limits.request_timeout_s)
            except ray.exceptions.RayActorError:  # the watching thread names it and starts another
                dead.append(actor)
                if len(dead) == self.limits.max_attempts:
                    raise
            except ray.exceptions.GetTimeoutError:
                limit = self.limits.request_timeout_s
                raise TimeoutError(
                    f"{name} has not scored {len(sequences)} texts within {limit:g} s: see its log, or raise rollout.request_timeout_s"
                ) from None

    def stats(self) -> dict[int, dict[str, Any]]:
        """Counters of the workers that are up."""
        import ray

        asked = {worker.number: worker.actor.stats.remote() for worker in self._crew.ready}
        found = {}
        for number, ref in asked.items():
            try:
                found[number] = ray.get(ref, timeout=self.limits.load_timeout_s)
            except ray.exceptions.RayActorError:  # it died meanwhile: the watching thread names it and starts another
                continue
        return found

    def describe(self) -> dict[int, str]:
        """{worker: "state, where"}."""
        with self._lock:
            return {worker.number: f"{worker.state}, {worker.where}" for worker in self._crew.workers}

    def shutdown(self, why: str = "the rollout pool was shut down") -> None:
        """Kills all workers and ends all calls, with `why` as their error. May be called twice."""
        with self._changed:
            if self._closed:
                return
            self._closed = True
            self._why = why
            self._crew.fail(RuntimeError(why))
            for worker in self._crew.workers:
                self._crew.kill(worker)
            self._changed.notify_all()
        if threading.current_thread() is not self._thread:
            self._thread.join(timeout=10)

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()

    def _arrivals(self, call: Call) -> Arrivals:
        def check(missing: int) -> None:
            if not self._thread.is_alive():
                raise RuntimeError(f"the rollout pool stopped with {missing} requests unfinished") from self._crew.error

        def cancel() -> None:
            with self._lock:
                self._crew.cancel(call)

        return Arrivals(call, check, cancel)

    def _wait_ready(self, but: Sequence[Any] | None = None) -> list[Worker]:
        """All workers once they are ready; with `but`, the ready ones as soon as there is one with another actor than these. The watching
        thread enforces the time limits."""
        with self._changed:
            while True:
                self._check_usable()
                ready = [worker for worker in self._crew.ready if worker.actor not in (but or ())]
                if len(ready) >= (len(self._crew.workers) if but is None else 1):
                    return ready
                self._changed.wait(_TICK_S)

    def _check_usable(self) -> None:
        if self._crew.error is not None:
            raise self._crew.error
        if self._closed:
            raise RuntimeError(self._why)

    def _watch(self) -> None:
        """The thread: takes in what Ray has finished, checks limits, sends what can be sent."""
        import ray

        while not self._closed:
            try:
                with self._lock:
                    refs = self._crew.references()
                done = ray.wait(refs, num_returns=1, timeout=_TICK_S)[0] if refs else []
                if not refs:
                    time.sleep(_TICK_S)
                elif done:
                    done = ray.wait(refs, num_returns=len(refs), timeout=0)[0]  # whatever else is there by now
                with self._changed:
                    if self._closed:
                        return
                    for ref in done:
                        self._crew.collect(ref)
                    self._crew.check()
                    self._crew.dispatch()
                    self._changed.notify_all()
            except Exception as error:
                if self._closed:
                    return
                log.exception("the rollout pool failed")
                with self._changed:
                    self._crew.error = error
                    self._crew.fail(error)
                    self._changed.notify_all()
                return


def _offered(update: Any, version: int | None) -> Offer:
    """As an offer. ValueError for a reference without its version."""
    if isinstance(update, WeightUpdate):
        return StoreOffer(_store(update), update.version)
    if hasattr(update, "begin"):
        return update
    if version is None:
        raise ValueError("push_weights of a reference needs the version of the update it stands for")
    return StoreOffer(update, version)


def _store(update: WeightUpdate) -> Any:
    """A reference to the update; RuntimeError that says what to raise where it does not fit. Workers keep the weights they have."""
    import ray

    try:
        return ray.put(update)
    except (ray.exceptions.ObjectStoreFullError, ray.exceptions.OutOfDiskError) as error:
        raise no_room(update.version, error, update.nbytes) from error
