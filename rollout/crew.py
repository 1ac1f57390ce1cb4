"""The pool's workers: started, given work and weights, watched, replaced.

    starting -> loading (current weights) -> ready -> (dead, hung or late) -> starting ... | failed
                  ^ waiting, where the learner is asked for them once more
    ledger's line -> dispatch -> [ready worker with the least to do] -> collect -> ledger

A request goes to one worker, whose samples share its prefill, and each sample comes back as it finishes. A worker that dies, stops
answering pings or works past its limit is named in the log with its cause, what it has not delivered goes back to the ledger and another process takes its place. Nothing here waits: the pool's thread calls `collect` for what Ray has finished, then `check`.
Not locked: the pool calls it under its own lock.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from itertools import count
from typing import Any

from winnow.rollout.handles import PoolLimits, Sent, Worker, cause_of, last_lines, options_of
from winnow.rollout.ledger import Call, Job, Ledger
from winnow.rollout.offers import Offer, StoreOffer
from winnow.rollout.transport import LinkBroken
from winnow.rollout.worker import WorkerSpec, code_version

log = logging.getLogger("winnow.rollout")
_PING_EVERY_S = 5.0


class Crew:
    """One actor of `worker_class` for each entry of `options`."""

    def __init__(
        self,
        spec: WorkerSpec,
        options: Sequence[Mapping[str, Any]],
        limits: PoolLimits,
        worker_class: type,
        ledger: Ledger,
    ) -> None:
        self.spec, self.limits, self.ledger = spec, limits, ledger
        self.error: Exception | None = None  # why the crew as a whole cannot go on
        self.weights: Offer | None = None  # what every worker must have
        self.refusals: dict[int, Exception] = {}  # version -> a worker's refusal of that update
        self._options = [options_of(each, spec.threads) for each in options]
        self._class, self._up = worker_class, False
        self._stuck = 0.0  # since when requests wait for workers that all wait for weights; 0: they do not
        self._tickets = count()  # of samples that were sent: a late answer to one that was cancelled fits no other
        self.workers = [Worker(number) for number in range(len(options))]
        for worker in self.workers:
            self._start(worker)

    @property
    def ready(self) -> list[Worker]:
        return [worker for worker in self.workers if worker.state == "ready"]

    def references(self) -> list[Any]:
        """Everything that a worker still owes an answer to."""
        calls = [ref for w in self.workers for ref in (w.awaited, w.ping, w.poll, *w.asked)]
        return [ref for ref in calls if ref is not None]

    def dispatch(self) -> None:
        """Sends requests, oldest first, each to the ready worker with the fewest samples under way, up to 1.5 batches."""
        room = self.spec.engine.max_batch * 3 // 2
        while self.ledger.line:
            need = len(self.ledger.line[0].waiting)
            free = [w for w in self.ready if not w.sent or w.load + need <= room]
            if not free:
                return
            worker = min(free, key=lambda w: (w.load, w.number))
            job, samples = self.ledger.take()
            tickets = {sample: next(self._tickets) for sample in samples}
            worker.sent |= {ticket: Sent(job, sample, time.monotonic()) for sample, ticket in tickets.items()}
            worker.asked[worker.actor.start.remote(job.request, tickets)] = list(tickets.values())

    def load(self, weights: Offer) -> Offer | None:
        """From now on every worker must have these; the ones that are up get them now. Returns what they replace."""
        here = [worker for worker in self.workers if worker.state in ("ready", "waiting")]
        arguments = weights.begin([worker.member for worker in here])
        before, self.weights = self.weights, weights
        self.refusals.pop(weights.version, None)
        for worker in here:
            self._load(worker, arguments[worker.number])
        return before

    def collect(self, ref: Any) -> None:
        """Takes in one finished reference."""
        import ray

        worker = next((w for w in self.workers if ref in (w.awaited, w.ping, w.poll) or ref in w.asked), None)
        if worker is None:
            return  # of a worker replaced since
        try:
            value = ray.get(ref, timeout=self.limits.load_timeout_s)
        except ray.exceptions.RayError as error:
            if worker.state != "waiting" or ref != worker.awaited:
                self._call_failed(worker, ref, error)
                return
            worker.awaited = None  # the learner failed, not the worker, which waits for the next version
            log.warning("%s waits for weights that the learner could not send: %s", str(worker), cause_of(error))
            if self.weights is not None and not isinstance(error, ray.exceptions.RayActorError):
                self.refusals[self.weights.version] = getattr(error, "cause", None) or error
            return
        except Exception as error:
            self._call_failed(worker, ref, error)
            return
        if ref == worker.poll:
            worker.poll = worker.actor.finished.remote()
            self._take_in(worker, value)
        elif ref in worker.asked:
            del worker.asked[ref]
        elif ref == worker.ping:
            worker.ping, worker.pinged = None, time.monotonic()
            worker.introduce(value)
        else:
            worker.progress = time.monotonic()
            self._advance(worker, value)

    def _call_failed(self, worker: Worker, ref: Any, error: Exception) -> None:
        """A call of a worker ended in an error, its own or its process's."""
        import ray

        if isinstance(error, ray.exceptions.RayActorError):
            stage = "generating" if worker.sent and worker.state == "ready" else worker.state
            why = f"died while {stage}: {cause_of(error)}{last_lines(worker.log)}"
            self._replace(worker, why, killed=not error.actor_init_failed)
            return
        cause = getattr(error, "cause", None) or error
        if ref == worker.poll:  # nobody knows which samples were in it
            self._replace(worker, f"could not hand over what it generated: {cause_of(error)}")
        elif ref in worker.asked:
            self._take_in(worker, [(ticket, cause) for ticket in worker.asked.pop(ref)])
        else:
            self._answer_failed(worker, cause)

    def check(self) -> None:
        """Asks who is still there, and replaces whoever is past a limit."""
        now = time.monotonic()
        limits = self.limits
        waits = {"starting": limits.start_timeout_s, "loading": limits.load_timeout_s}
        for worker in self.workers:
            since = now - worker.since
            oldest = now - min((max(each.at, worker.progress) for each in worker.sent.values()), default=now)
            if worker.state in waits and since > waits[worker.state]:
                hint = "; are there free CPUs or GPUs in the cluster for it?" if worker.state == "starting" else ""
                self._replace(worker, f"did not finish {worker.state} within {since:.0f} s{hint}", TimeoutError)
            elif oldest > limits.request_timeout_s:
                self._replace(worker, f"did not answer while {worker.task} for {oldest:.0f} s", TimeoutError)
            elif worker.state == "failed" or not worker.born:
                continue
            elif worker.ping is not None and now - worker.pinged > limits.ping_timeout_s:
                why = f"did not answer a ping while {worker.task} for {now - worker.pinged:.0f} s"
                self._replace(worker, why, TimeoutError, killed=True)
            elif worker.ping is None and now - worker.pinged > min(_PING_EVERY_S, limits.ping_timeout_s):
                worker.ping, worker.pinged = worker.actor.ping.remote(), now
        if not self.ledger.line or any(worker.state not in ("waiting", "failed") for worker in self.workers):
            self._stuck = 0.0
        elif not self._stuck:
            self._stuck = now
        elif now - self._stuck > limits.weights_timeout_s:
            version = self.weights.version if self.weights is not None else -1
            self.error = TimeoutError(
                f"all rollout workers have waited {now - self._stuck:.0f} s for weights of version {version} or newer, which the learner does "
                "not send, and requests wait for them"
            )
            self.fail(self.error)

    def cancel(self, call: Call) -> None:
        """Forgets what is left of a call, here and on the workers."""
        self.ledger.drop(call)
        for worker in self.workers:
            mine = [ticket for ticket, each in worker.sent.items() if each.job.call is call]
            keys = [worker.sent.pop(ticket).key for ticket in mine]
            if keys and worker.state in ("ready", "loading", "waiting"):
                worker.actor.cancel.remote(keys)

    def fail(self, error: Exception) -> None:
        """Ends every call with `error`."""
        self.ledger.fail(error)
        for worker in self.workers:
            worker.sent.clear()

    def kill(self, worker: Worker) -> None:
        import ray

        worker.awaited = worker.ping = worker.poll = None
        if worker.actor is not None:
            try:
                ray.kill(worker.actor, no_restart=True)
            except Exception as error:  # it is gone already, or Ray itself is
                log.debug("%s could not be killed: %r", str(worker), error)
            worker.actor = None

    def _start(self, worker: Worker) -> None:
        import ray

        actor_class: Any = ray.remote(self._class)
        options = self._options[worker.number]
        worker.actor = actor_class.options(**options).remote(self.spec, worker.number, code_version())
        worker.state, worker.since, worker.version = "starting", time.monotonic(), -1
        worker.awaited, worker.where, worker.log = worker.actor.ready.remote(), "not up yet", None
        worker.ping, worker.born = (
            worker.actor.ping.remote(),
            False,
        )  # which its process answers while the model is loaded

    def _load(self, worker: Worker, what: Any) -> None:
        """what: the argument of `load_weights`, an update by reference or a ticket."""
        assert self.weights is not None
        worker.state, worker.since, worker.loading = "loading", time.monotonic(), self.weights.version
        worker.awaited = worker.actor.load_weights.remote(what)

    def _load_late(self, worker: Worker) -> None:
        """For a worker that was not there when the current weights were sent, or did not get them: through the object store."""
        assert self.weights is not None
        if isinstance(self.weights, StoreOffer):
            self._load(worker, self.weights.reference)
            return
        worker.state, worker.since, worker.awaited = "waiting", time.monotonic(), self.weights.late()

    def _advance(self, worker: Worker, value: Any) -> None:
        """The awaited answer of a starting or loading worker has come."""
        worker.awaited, worker.pinged = None, time.monotonic()
        if worker.state == "waiting":
            if value is not None:
                self._load(worker, value[0])
            return
        if worker.state == "starting":
            worker.introduce(value)
            worker.version = value["version"]
        else:
            worker.version = value
        if self.weights is not None and worker.version != self.weights.version:
            self._load_late(worker)
            return
        if worker.state == "starting" or worker.failures:
            log.info("%s is ready with weights of version %d", str(worker), worker.version)
        worker.state, worker.failures, self._up = "ready", 0, True
        if worker.poll is None:
            worker.poll = worker.actor.finished.remote()

    def _take_in(self, worker: Worker, results: Sequence[tuple[int, Any]]) -> None:
        """Samples that a worker finished, or why it could not."""
        for ticket, outcome in results:
            sent = worker.sent.pop(ticket, None)
            if sent is None:
                continue  # cancelled meanwhile
            worker.progress = time.monotonic()
            if isinstance(outcome, Exception):
                self._lost(sent.job, [sent.sample], outcome, f"failed on {worker}")
            else:
                self.ledger.deliver(sent.job, sent.sample, outcome)

    def _answer_failed(self, worker: Worker, cause: Exception) -> None:
        if worker.state == "loading" and isinstance(
            cause, ValueError | TimeoutError
        ):  # a bad update, or no end of a drain
            self.refusals[worker.loading] = type(cause)(f"{worker} refused the update: {cause}")
            worker.awaited, worker.state = None, "ready"
            return
        if worker.state == "loading" and isinstance(cause, LinkBroken):
            log.warning("%s did not get weights of version %d: %s; once more", str(worker), worker.loading, cause)
            self._load_late(worker)
            return
        self._replace(worker, f"failed while {worker.state}: {cause}")

    def _lost(self, job: Job, samples: Sequence[int], error: Exception, how: str) -> None:
        failed = self.ledger.lost(job, samples, error, how)
        if failed is not None:
            self.cancel(failed)

    def _replace(self, worker: Worker, why: str, kind: type[Exception] = RuntimeError, killed: bool = False) -> None:
        """Names a worker that is lost, starts another in its place with the current weights, and sends what it owes elsewhere.

        Before any worker has been up, only one whose process was `killed` is started again: whatever else goes wrong then is a mistake
        in the set-up, and would go wrong again.
        """
        missing = worker.take_back()
        was_up = worker.state == "ready"
        if worker.state == "loading" and self.weights is not None:
            self.weights.lost(worker.number, f"{worker} {why.partition(':')[0]}")
        error = kind(f"{worker} {why}")  # as text now: a record may be formatted when the worker is another process
        count = sum(map(len, missing.values()))
        log.error("%s; %d samples of %d requests are sent again", error, count, len(missing))
        self.kill(worker)
        for job, samples in reversed(missing.items()):
            self._lost(job, samples, error, "was lost")
        worker.failures = 0 if was_up else worker.failures + 1
        if (self._up or killed) and worker.failures < self.limits.max_restarts:
            self._start(worker)
            return
        worker.state = "failed"
        if not self._up or all(w.state == "failed" for w in self.workers):
            self.error = error
            self.fail(error)
