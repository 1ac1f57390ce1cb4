"""What the pool keeps about one worker, the limits it holds workers to, and what it reads out of one that died."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from winnow.rollout.ledger import Job
from winnow.rollout.transport import Member


@dataclass(frozen=True, kw_only=True, slots=True)
class PoolLimits:
    """How long and how often, before something counts as broken."""

    request_timeout_s: float = 600.0  # since a worker got the request or last delivered anything
    start_timeout_s: float = 300.0  # a place in the cluster, process, imports and model
    load_timeout_s: float = 120.0  # one weight update
    weights_timeout_s: float = (
        3720.0  # for the learner, in the midst of an update maybe, to have weights for workers that wait for some
    )
    ping_timeout_s: float = 45.0  # a process that is up answers a ping, whatever its engine does
    max_attempts: int = 3  # times a request may fail or be lost before its error is raised
    max_restarts: int = 3  # starts in a row of one worker that may fail


@dataclass(eq=False, slots=True)
class Sent:
    """One sample of a job at a worker, and when it was sent (monotonic seconds)."""

    job: Job
    sample: int
    at: float

    @property
    def key(self) -> str:
        """Its name at the worker, see `Request.key`."""
        return replace(self.job.request, first_sample=self.sample).key


@dataclass(eq=False, slots=True)
class Worker:
    number: int
    actor: Any = None
    state: str = "starting"  # starting | loading | waiting (for weights) | ready | failed
    since: float = 0.0
    awaited: Any = None  # what the state waits for
    loading: int = -1  # the version being loaded
    version: int = -1
    sent: dict[int, Sent] = field(default_factory=dict)  # by ticket
    asked: dict[Any, list[int]] = field(default_factory=dict)  # calls of `start` under way -> tickets
    poll: Any = None  # the call of `finished` under way
    progress: float = 0.0  # when it last delivered
    ping: Any = None  # a heartbeat that was asked for, and when the last one was asked for or answered
    pinged: float = 0.0
    born: bool = (
        False  # whether its process has answered a ping; until then it may be waiting for a place in the cluster
    )
    failures: int = 0  # failed starts in a row
    where: str = "not up yet"
    host: str = ""
    device: str = "cpu"  # a GPU's uuid where it has one
    log: str | None = None  # the file of its error output, readable only on its own host

    @property
    def load(self) -> int:
        """Samples under way."""
        return len(self.sent)

    def introduce(self, said: Mapping[str, Any]) -> None:
        """Takes in what a ping answers."""
        self.born, self.where, self.log = True, f"pid {said['pid']} on {said['host']}", said.get("log")
        if said["version"] >= 0:  # its model is loaded, so its device is known; an older answer may come later
            self.host, self.device = said["host"], said.get("device", "cpu")

    @property
    def member(self) -> Member:
        """It as a transfer of weights knows it."""
        key = self.actor._actor_id.hex()
        return Member(number=self.number, name=str(self), key=key, host=self.host, device=self.device)

    def take_back(self) -> dict[Job, list[int]]:
        """The samples it has not delivered, by request, oldest first; it has none from here on."""
        missing: dict[Job, list[int]] = {}
        for each in self.sent.values():
            missing.setdefault(each.job, []).append(each.sample)
        self.sent.clear()
        self.asked.clear()
        return missing

    @property
    def task(self) -> str:
        """What it is busy with, in words."""
        if not self.sent:
            return self.state if self.state != "ready" else "idle"
        names = sorted({each.job.request.request_id for each in self.sent.values()})
        return f"generating {names[0]!r} ({len(names)} requests)"

    def __str__(self) -> str:
        return f"rollout worker {self.number} ({self.where})"


def options_of(options: Mapping[str, Any], threads: int) -> dict[str, Any]:
    """Ray would set OMP_NUM_THREADS to 1, and torch would compute on one core whatever is asked of it later."""
    merged = {"num_cpus": threads, "max_restarts": 0, **options}
    environment = dict(merged.get("runtime_env") or {})
    environment["env_vars"] = {"OMP_NUM_THREADS": str(threads), **environment.get("env_vars", {})}
    return {**merged, "runtime_env": environment}


def cause_of(error: Exception) -> str:
    """The lines of Ray's report that say why, on one line."""
    cause = getattr(error, "cause", None)
    lines = [line.strip() for line in str(cause or error).splitlines() if line.strip()]
    if len(lines) > 12:  # a traceback: its end says what happened
        lines = lines[:2] + lines[-4:]
    return " | ".join(lines)[:1500]


def last_lines(path: str | None, count: int = 5) -> str:
    """ " The last lines of its log: ..." of a dead worker; empty where there are none, or the file is on another host."""
    if path is None:
        return ""
    try:
        with open(path, "rb") as file:
            file.seek(0, os.SEEK_END)
            file.seek(max(0, file.tell() - 4096))
            text = file.read().decode(errors="replace")
    except OSError:
        return ""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return f". The last lines of its log: {' | '.join(lines[-count:])}" if lines else ""
