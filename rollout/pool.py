"""N rollout workers as Ray actors that behave like one.

    generate -> pending -> [ready worker with the least to do] -> group -> the caller's iterator
    worker:  starting -> loading (current weights) -> ready -> (dead or hung) -> starting ...

One thread of the driver watches all of it, so requests keep flowing and a dead worker is replaced while the caller does other things.
A worker that dies or hangs is named in the log with its cause; its unfinished requests go to the others; each request id is delivered
once. Every wait has a limit, and the error says which worker, at what, for how long.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from winnow.rollout.handles import Call, Job, PoolLimits, Worker, cause_of, last_lines, options_of
from winnow.rollout.schema import Group, Request
from winnow.rollout.weights import WeightUpdate
from winnow.rollout.worker import RolloutWorker, WorkerSpec, code_version

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
        self._options = [options_of(options, spec.threads) for options in actor_options]
        self._class = worker_class
        self._weights: tuple[Any, int] | None = None  # (reference, version) that every worker must have
        self._pending: deque[Job] = deque()
        self._ids: set[str] = set()
        self._error: Exception | None = None  # why the pool as a whole cannot go on
        self._refusals: dict[int, Exception] = {}  # version -> a worker's refusal of that update
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)
        self._closed, self._up = False, False
        self._workers = [Worker(number) for number in range(len(actor_options))]
        with self._lock:
            for worker in self._workers:
                self._start(worker)
        self._thread = threading.Thread(target=self._watch, name="winnow-pool", daemon=True)
        self._thread.start()
        try:
            self._wait_ready()
        except BaseException:
            self.shutdown()
            raise

    # -- the caller's side

    def generate(self, requests: Sequence[Request]) -> Iterator[Group]:
        """Sends the requests now; the iterator yields each one's group once, as it finishes. Closing it cancels the rest.

        Raises what made a request fail: at once for a ValueError (the request itself is wrong), after `max_attempts` otherwise.
        """
        call = Call()
        with self._lock:
            self._check_usable()
            ids = [request.request_id for request in requests]
            repeated = sorted({i for i in ids if ids.count(i) > 1} | (self._ids & set(ids))) if ids else []
            if repeated:
                raise ValueError(
                    f"request id {repeated[0]!r} is used more than once: every request needs an id of its own"
                )
            call.open.update(ids)
            self._ids.update(ids)
            self._pending.extend(Job(request, call) for request in requests)
            self._dispatch()
        return self._drain(call)

    def push_weights(self, update: WeightUpdate | Any, version: int | None = None) -> dict[int, int]:
        """Gives every worker new weights: an update, or a reference to one and its version. Returns {worker: version} once all live
        workers have acknowledged; one that is just starting gets them before its first request. Raises the refusal of a bad update.
        """
        import ray

        if isinstance(update, WeightUpdate):
            version = update.version
            update = ray.put(update)
        if version is None:
            raise ValueError("push_weights of a reference needs the version of the update it stands for")
        limit = self.limits.load_timeout_s + self.limits.start_timeout_s
        deadline = time.monotonic() + limit
        with self._changed:
            self._check_usable()
            before, self._weights = self._weights, (update, version)
            self._refusals.pop(version, None)
            for worker in self._workers:
                if worker.state == "ready":
                    self._load(worker)
            while True:
                if (refusal := self._refusals.pop(version, None)) is not None:
                    self._weights = before
                    raise refusal
                self._check_usable()
                acknowledged = {
                    w.number: w.version for w in self._workers if w.state == "ready" and w.version == version
                }
                if acknowledged and all(w.state != "loading" for w in self._workers):
                    return acknowledged
                if time.monotonic() > deadline:
                    slow = ", ".join(f"{w} is {w.state}" for w in self._workers if w.version != version)
                    raise TimeoutError(
                        f"weights of version {version} were not acknowledged within {limit:.0f} s: {slow}"
                    )
                self._changed.wait(_TICK_S)

    def score(self, sequences: Sequence[Sequence[int]], temperature: float = 1.0) -> list[np.ndarray]:
        """Log-probabilities of given tokens by one worker's engine, for parity checks."""
        import ray

        worker = self._wait_ready(at_least=1)[0]
        return ray.get(worker.actor.score.remote(sequences, temperature), timeout=self.limits.request_timeout_s)

    def stats(self) -> dict[int, dict[str, Any]]:
        """Counters of the workers that are up."""
        import ray

        ready = [worker for worker in self._workers if worker.state == "ready"]
        values = ray.get([worker.actor.stats.remote() for worker in ready], timeout=self.limits.load_timeout_s)
        return {worker.number: value for worker, value in zip(ready, values, strict=True)}

    def describe(self) -> dict[int, str]:
        """{worker: "state, where"}."""
        with self._lock:
            return {worker.number: f"{worker.state}, {worker.where}" for worker in self._workers}

    def shutdown(self) -> None:
        """Kills all workers and ends all calls. May be called twice."""
        with self._changed:
            if self._closed:
                return
            self._closed = True
            self._fail_all(RuntimeError("the rollout pool was shut down"))
            for worker in self._workers:
                self._kill(worker)
            self._changed.notify_all()
        if threading.current_thread() is not self._thread:
            self._thread.join(timeout=10)

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()

    def _drain(self, call: Call) -> Iterator[Group]:
        missing = set(call.open)
        try:
            while missing:
                try:
                    result = call.outbox.get(timeout=1.0)
                except queue.Empty:
                    if not self._thread.is_alive():
                        raise RuntimeError(
                            f"the rollout pool stopped with {len(missing)} requests unfinished"
                        ) from self._error
                    continue
                if isinstance(result, Exception):
                    raise result
                missing.discard(result.request.request_id)
                yield result
        finally:
            if missing:
                with self._lock:
                    self._cancel(call)

    def _wait_ready(self, at_least: int | None = None) -> list[Worker]:
        """The ready workers, once there are `at_least` so many (default: all). The watching thread enforces the time limits."""
        with self._changed:
            while True:
                self._check_usable()
                ready = [worker for worker in self._workers if worker.state == "ready"]
                if len(ready) >= (at_least if at_least is not None else len(self._workers)):
                    return ready
                self._changed.wait(_TICK_S)

    def _check_usable(self) -> None:
        if self._error is not None:
            raise self._error
        if self._closed:
            raise RuntimeError("the rollout pool was shut down")

    # -- the watching thread; everything below runs under the lock

    def _watch(self) -> None:
        import ray

        while not self._closed:
            try:
                with self._lock:
                    refs = [
                        ref
                        for w in self._workers
                        for ref in ([w.awaited] if w.awaited is not None else []) + list(w.jobs)
                    ]
                done = ray.wait(refs, num_returns=1, timeout=_TICK_S)[0] if refs else []
                if not refs:
                    time.sleep(_TICK_S)
                elif done:
                    done = ray.wait(refs, num_returns=len(refs), timeout=0)[0]  # whatever else is there by now
                with self._changed:
                    if self._closed:
                        return
                    for ref in done:
                        self._collect(ref)
                    self._check_limits()
                    self._dispatch()
                    self._changed.notify_all()
            except Exception as error:
                if self._closed:
                    return
                log.exception("the rollout pool failed")
                with self._changed:
                    self._error = error
                    self._fail_all(error)
                    self._changed.notify_all()
                return

    def _dispatch(self) -> None:
        """Sends pending requests, oldest first, each to the ready worker with the fewest samples under way, up to 1.5 batches."""
        room = self.spec.engine.max_batch * 3 // 2
        while self._pending:
            need = self._pending[0].request.num_samples
            ready = [w for w in self._workers if w.state == "ready" and (not w.jobs or w.load + need <= room)]
            if not ready:
                return
            worker = min(ready, key=lambda w: (w.load, w.number))
            job = self._pending.popleft()
            job.sent = time.monotonic()
            worker.jobs[worker.actor.generate.remote([job.request])] = job

    def _start(self, worker: Worker) -> None:
        import ray

        actor_class: Any = ray.remote(self._class)
        worker.actor = actor_class.options(**self._options[worker.number]).remote(
            self.spec, worker.number, code_version()
        )
        worker.state, worker.since, worker.version = "starting", time.monotonic(), -1
        worker.awaited, worker.where, worker.log = worker.actor.ping.remote(), "not up yet", None

    def _load(self, worker: Worker) -> None:
        assert self._weights is not None
        ref, version = self._weights
        worker.state, worker.since, worker.loading = "loading", time.monotonic(), version
        worker.awaited = worker.actor.load_weights.remote(ref)

    def _collect(self, ref: Any) -> None:
        """Takes in one finished reference."""
        import ray

        worker = next((w for w in self._workers if ref == w.awaited or ref in w.jobs), None)
        if worker is None:
            return  # of a worker replaced since
        job = worker.jobs.get(ref)
        try:
            value = ray.get(ref, timeout=self.limits.load_timeout_s)
        except ray.exceptions.RayActorError as error:
            stage = "generating" if job is not None and worker.state == "ready" else worker.state
            why = f"died while {stage}: {cause_of(error)}{last_lines(worker.log)}"
            self._replace(worker, why, killed=not error.actor_init_failed)
            return
        except Exception as error:
            cause = getattr(error, "cause", None) or error
            if job is None:
                self._state_failed(worker, cause)
            else:
                del worker.jobs[ref]
                self._retry(job, cause, f"failed on {worker}")
            return
        worker.progress = time.monotonic()
        if job is not None:
            del worker.jobs[ref]
            self._deliver(job, value[0])
        else:
            self._advance(worker, value)

    def _advance(self, worker: Worker, value: Any) -> None:
        """The awaited answer of a starting or loading worker has come."""
        worker.awaited = None
        if worker.state == "starting":
            worker.where, worker.log = f"pid {value['pid']} on {value['host']}", value.get("log")
            worker.version = value["version"]
        else:
            worker.version = value
        if self._weights is not None and worker.version != self._weights[1]:
            self._load(worker)
            return
        if worker.state == "starting" or worker.failures:
            log.info("%s is ready with weights of version %d", str(worker), worker.version)
        worker.state, worker.failures, self._up = "ready", 0, True

    def _state_failed(self, worker: Worker, cause: Exception) -> None:
        if worker.state == "loading" and isinstance(
            cause, ValueError
        ):  # the update is bad, the worker keeps what it had
            self._refusals[worker.loading] = type(cause)(f"{worker} refused the update: {cause}")
            worker.awaited, worker.state = None, "ready"
            return
        self._replace(worker, f"failed while {worker.state}: {cause}")

    def _check_limits(self) -> None:
        now = time.monotonic()
        waits = {"starting": self.limits.start_timeout_s, "loading": self.limits.load_timeout_s}
        for worker in self._workers:
            if worker.state in waits and now - worker.since > waits[worker.state]:
                hint = "; are there free CPUs or GPUs in the cluster for it?" if worker.state == "starting" else ""
                self._replace(
                    worker, f"did not finish {worker.state} within {now - worker.since:.0f} s{hint}", TimeoutError
                )
                continue
            oldest = min((max(job.sent, worker.progress) for job in worker.jobs.values()), default=now)
            if now - oldest > self.limits.request_timeout_s:
                names = sorted(job.request.request_id for job in worker.jobs.values())
                waited = (
                    f"did not answer while generating {names[0]!r} ({len(names)} requests) for {now - oldest:.0f} s"
                )
                self._replace(worker, waited, TimeoutError)

    def _replace(self, worker: Worker, why: str, kind: type[Exception] = RuntimeError, killed: bool = False) -> None:
        """Names a worker that is lost, starts another in its place with the current weights, and sends its requests elsewhere.

        Before any worker has been up, only one whose process was `killed` is started again: whatever else goes wrong then is a mistake
        in the set-up, and would go wrong again.
        """
        jobs = list(worker.jobs.values())
        was_up = worker.state == "ready"
        error = kind(
            f"{worker} {why}"
        )  # as text now: a log record may be formatted when the worker is another process already
        log.error("%s; %d of its requests are sent again", error, len(jobs))
        self._kill(worker)
        worker.jobs.clear()
        for job in reversed(jobs):
            self._retry(job, error, "was lost")
        worker.failures = 0 if was_up else worker.failures + 1
        if (self._up or killed) and worker.failures < self.limits.max_restarts:
            self._start(worker)
            return
        worker.state = "failed"
        if not self._up or all(w.state == "failed" for w in self._workers):
            self._error = error
            self._fail_all(error)

    def _retry(self, job: Job, error: Exception, how: str) -> None:
        """Puts a request first in line again, or gives up and fails its call."""
        job.attempts += 1
        name = job.request.request_id
        if name not in job.call.open:
            self._ids.discard(name)
            return
        if isinstance(error, ValueError) or job.attempts >= self.limits.max_attempts:
            if not isinstance(error, ValueError):
                error = RuntimeError(
                    f"request {name!r} {how}, attempt {job.attempts} of {self.limits.max_attempts}: {error!r}"
                )
            self._cancel(job.call)
            self._ids.discard(name)
            job.call.outbox.put(error)
            return
        log.warning("request %r %s (attempt %d of %d): %r", name, how, job.attempts, self.limits.max_attempts, error)
        self._pending.appendleft(job)

    def _deliver(self, job: Job, group: Group) -> None:
        name = group.request.request_id
        self._ids.discard(name)
        if name in job.call.open:
            job.call.open.remove(name)
            job.call.outbox.put(group)

    def _cancel(self, call: Call) -> None:
        """Forgets what is left of a call, here and on the workers."""
        names, call.open = set(call.open), set()
        self._pending = deque(job for job in self._pending if job.call is not call)
        self._ids -= names
        for worker in self._workers:
            mine = [ref for ref, job in worker.jobs.items() if job.call is call]
            ids = [worker.jobs.pop(ref).request.request_id for ref in mine]
            if ids and worker.state in ("ready", "loading"):
                worker.actor.cancel.remote(ids)

    def _fail_all(self, error: Exception) -> None:
        calls = {id(job.call): job.call for w in self._workers for job in w.jobs.values()}
        calls |= {id(job.call): job.call for job in self._pending}
        for call in calls.values():
            call.open = set()
            call.outbox.put(error)
        self._pending.clear()
        self._ids.clear()
        for worker in self._workers:
            worker.jobs.clear()

    def _kill(self, worker: Worker) -> None:
        import ray

        worker.awaited = None
        if worker.actor is not None:
            try:
                ray.kill(worker.actor, no_restart=True)
            except Exception as error:  # it is gone already, or Ray itself is
                log.debug("%s could not be killed: %r", str(worker), error)
            worker.actor = None
