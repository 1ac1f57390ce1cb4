"""Requests to groups: the multi-turn loop over an engine.

    Request -> prompt tokens -> [engine turn -> reply -> environment -> observation tokens]* -> Trajectory -> Group

Every live sample of every request advances in the same engine batch: a sample whose environment has answered rejoins the batch at the
next step, its cache still filled. Environments that may take long (`slow = True`, e.g. an interpreter) answer in threads, and the others
go on meanwhile. Tokens are appended, never rebuilt: what was generated is not tokenised again.

An environment that raises costs its sample, not the run: the state says `failure`, which a reward hands on as a Failure.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from winnow.rollout.engine import Engine
from winnow.rollout.schema import Environment, Group, Message, Request, Step, Trajectory
from winnow.rollout.sequence import Sequence as Sample
from winnow.rollout.template import ChatTemplate

EnvironmentFactory = Callable[[str], Environment]
SLOW_THREADS = 16  # environments that answer at the same time
SLOW_S = 600.0  # after which one of them counts as broken
IDLE_S = 0.05  # how long a step without work for the engine waits for one of them
DETAIL = 300  # characters of an exception that are kept


@dataclass(eq=False, slots=True, kw_only=True)
class _Episode:
    """One sample's conversation so far."""

    job: _Job
    number: int
    messages: list[Message]
    environment: Environment | None
    sample: Sample | None = None
    turns: int = 0
    reason: str = ""  # why it ended
    failure: str = ""  # what the environment raised


@dataclass(eq=False, slots=True, kw_only=True)
class _Job:
    request: Request
    episodes: list[_Episode] = field(default_factory=list)
    trajectories: dict[int, Trajectory] = field(default_factory=dict)
    opened: tuple[list[Message], list[int]] | None = None  # what the last sample began with, and its tokens

    @property
    def numbers(self) -> range:
        first = self.request.first_sample or 0
        return range(first, first + self.request.num_samples)


class EpisodeRunner:
    """Runs requests on one engine: `add` any number at any time, `step` until `has_work` is False."""

    def __init__(self, engine: Engine, template: ChatTemplate, environments: EnvironmentFactory | None = None) -> None:
        self.engine, self.template, self.environments = engine, template, environments
        self._jobs: dict[str, _Job] = {}
        self._episodes: dict[Sample, _Episode] = {}
        self._answering: dict[Future[Step], tuple[Sample, float]] = {}  # slow environments at work, and until when
        self._threads: ThreadPoolExecutor | None = None

    @property
    def has_work(self) -> bool:
        """Whether `step` would do anything: False without requests, and while the engine is paused or drained."""
        return bool(self._jobs) and (bool(self._answering) or self.engine.has_work)

    def add(self, request: Request) -> None:
        """Starts a request. ValueError, leaving nothing behind: a repeated id, no environments, a prompt that does not fit."""
        if request.key in self._jobs:
            raise ValueError(f"request {request.request_id!r} is already running: every request needs an id of its own")
        if request.num_samples < 1 or request.max_turns < 1:
            raise ValueError(
                f"request {request.request_id!r} asks for {request.num_samples} samples of {request.max_turns} turns: both must be >= 1"
            )
        job = self._jobs[request.key] = _Job(request=request)
        try:
            for number in job.numbers:
                self._open(job, number)
        except BaseException:
            self.cancel(request.key)
            raise

    def cancel(self, key: str) -> None:
        """Drops a request and all its samples; unknown keys (`Request.key`) are ignored."""
        job = self._jobs.pop(key, None)
        for episode in job.episodes if job else ():
            if episode.sample is not None:
                self._episodes.pop(episode.sample, None)
                self.engine.release(episode.sample)

    def cancel_all(self) -> None:
        for key in list(self._jobs):
            self.cancel(key)

    def step(self) -> list[tuple[str, Group | Exception]]:
        """One engine step and the environments' answers to it: (request's key, group or why there is none) of what ended."""
        results: list[tuple[str, Group | Exception]] = []
        if self._answering and not self.engine.has_work:
            wait(self._answering, IDLE_S, FIRST_COMPLETED)
        turns: list[tuple[Sample, Future[Step] | None]] = [(sample, None) for sample in self.engine.step()]
        for sample, future in [*self._answered(), *turns]:
            episode = self._episodes.get(sample)
            if episode is None:  # its request failed or was cancelled meanwhile
                continue
            request = episode.job.request
            try:
                if future is None:
                    self._after_turn(episode, sample)
                else:
                    self._after_answer(episode, sample, _outcome(episode, lambda: future.result(0)))  # noqa: B023
            except Exception as error:
                self.cancel(request.key)
                results.append((request.key, error))
                continue
            if len(episode.job.trajectories) == request.num_samples:
                del self._jobs[request.key]
                ordered = tuple(episode.job.trajectories[number] for number in episode.job.numbers)
                results.append((request.key, Group(request=request, trajectories=ordered)))
        return results

    def run(self, requests: Sequence[Request]) -> list[Group]:
        """All requests to their end, in order of finishing; the first failure is raised and ends the others."""
        groups = []
        try:
            for request in requests:
                self.add(request)
            while self.has_work:
                for _, result in self.step():
                    if isinstance(result, Exception):
                        raise result
                    groups.append(result)
        finally:
            self.cancel_all()
        return groups

    def _open(self, job: _Job, number: int) -> None:
        request, task = job.request, job.request.task
        messages: list[Message] = list(task.messages)
        environment = None
        if task.environment is not None:
            if self.environments is None:
                raise ValueError(
                    f"task {task.id!r} wants environment {task.environment!r}, but this pool was built without environments: "
                    "pass environments=make_environment"
                )
            environment = self.environments(task.environment)
            messages += environment.reset(task)
        episode = _Episode(job=job, number=number, messages=messages, environment=environment)
        job.episodes.append(episode)
        if job.opened is None or job.opened[0] != messages:  # samples of one task begin alike, mostly
            job.opened = [dict(message) for message in messages], self.template.prompt_ids(messages, request.template)
        prompt = job.opened[1]
        total = request.max_total_tokens
        [episode.sample] = self.engine.add(prompt, request.sampling, 1, request.request_id, total, first_sample=number)
        self._episodes[episode.sample] = episode

    def _answered(self) -> list[tuple[Sample, Future[Step]]]:
        """The slow environments that have answered, or had their time: their `result(0)` raises TimeoutError."""
        now = time.monotonic()
        ready = [future for future, (_, until) in self._answering.items() if future.done() or now > until]
        return [(self._answering.pop(future)[0], future) for future in ready]

    def _after_turn(self, episode: _Episode, sample: Sample) -> None:
        """Takes the reply of a finished turn and asks the environment, here or in a thread."""
        request, environment = episode.job.request, episode.environment
        reply = cut_after(self.template.text(sample.reply_ids), request.sampling.stop)
        episode.messages.append({"role": "assistant", "content": reply})
        episode.turns += 1
        assert sample.finish is not None
        episode.reason = sample.finish
        if environment is None:
            self._end(episode, sample)
        elif getattr(environment, "slow", False):
            self._threads = self._threads or ThreadPoolExecutor(SLOW_THREADS, thread_name_prefix="environment")
            self._answering[self._threads.submit(environment.step, reply)] = (sample, time.monotonic() + SLOW_S)
        else:
            self._after_answer(episode, sample, _outcome(episode, lambda: environment.step(reply)))

    def _after_answer(self, episode: _Episode, sample: Sample, answer: Step) -> None:
        """Opens the next turn with what the environment answered, or ends the episode."""
        if answer.done:
            episode.reason = "done"
        elif episode.reason != "length" and episode.turns < episode.job.request.max_turns:
            options = episode.job.request.template
            observation = self.template.observation_ids(episode.messages, answer.messages, sample.tokens[-1], options)
            if len(observation) < sample.room:
                before = len(sample.tokens)
                self.engine.extend(sample, observation)
                assert len(sample.tokens) == before + len(observation), "a turn must only ever append"
                episode.messages += answer.messages
                return
            episode.reason = "length"
        self._end(episode, sample)

    def _end(self, episode: _Episode, sample: Sample) -> None:
        episode.job.trajectories[episode.number] = self._trajectory(episode, sample)
        del self._episodes[sample]
        self.engine.release(sample)

    def _trajectory(self, episode: _Episode, sample: Sample) -> Trajectory:
        request, engine = episode.job.request, self.engine
        versions = np.array(sample.versions, dtype=np.int32)
        record = sample.index_record(engine.index_k, engine.layers, engine.record_dtype) if engine.records else None
        routed = sample.expert_record(engine.expert_layers) if engine.expert_layers else None
        return Trajectory(
            request_id=request.request_id,
            sample=episode.number,
            task_id=request.task.id,
            domain=request.task.domain,
            tokens=np.array(sample.tokens, dtype=np.int32),
            loss_mask=versions >= 0,
            rollout_logprobs=np.array(sample.logprobs, dtype=np.float32),
            policy_versions=versions,
            finish_reason=episode.reason,
            messages=tuple(episode.messages),
            turns=episode.turns,
            temperature=request.sampling.temperature,
            kept_sets=sample.kept_sets(),
            index_record=record,
            expert_record=routed,
            environment_state=_state(episode),
        )


def _outcome(episode: _Episode, ask: Callable[[], Step]) -> Step:
    """What the environment answers; the end of the episode where it raises instead."""
    try:
        return ask()
    except Exception as error:
        episode.failure = f"{type(episode.environment).__name__}: {type(error).__name__}: {error}"[:DETAIL]
        return Step(done=True)


def _state(episode: _Episode) -> dict[str, Any]:
    """The environment's final state, or why there is none."""
    if episode.environment is None:
        return {}
    if not episode.failure:
        try:
            return dict(episode.environment.state())
        except Exception as error:
            episode.failure = f"{type(episode.environment).__name__}.state: {type(error).__name__}: {error}"[:DETAIL]
    return {"failure": {"kind": "environment", "detail": episode.failure}}


def cut_after(text: str, stops: Sequence[str]) -> str:
    """The text up to and including the first stop text in it: an environment needs to see, e.g., that a call was closed."""
    ends = [text.index(stop) + len(stop) for stop in stops if stop in text]
    return text[: min(ends)] if ends else text
