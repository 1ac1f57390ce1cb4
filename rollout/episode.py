"""Requests to groups: the multi-turn loop over an engine.

    Request -> prompt tokens -> [engine turn -> reply -> environment -> observation tokens]* -> Trajectory -> Group

Every live sample of every request advances in the same engine batch: a sample whose environment has answered rejoins the batch at the
next step, its cache still filled. Tokens are appended, never rebuilt: what was generated is not tokenised again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from winnow.rollout.engine import Engine
from winnow.rollout.schema import Environment, Group, Message, Request, Trajectory
from winnow.rollout.sequence import Sequence as Sample
from winnow.rollout.template import ChatTemplate

EnvironmentFactory = Callable[[str], Environment]


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


@dataclass(eq=False, slots=True, kw_only=True)
class _Job:
    request: Request
    episodes: list[_Episode] = field(default_factory=list)
    trajectories: dict[int, Trajectory] = field(default_factory=dict)


class EpisodeRunner:
    """Runs requests on one engine: `add` any number at any time, `step` until `has_work` is False."""

    def __init__(self, engine: Engine, template: ChatTemplate, environments: EnvironmentFactory | None = None) -> None:
        self.engine, self.template, self.environments = engine, template, environments
        self._jobs: dict[str, _Job] = {}
        self._episodes: dict[Sample, _Episode] = {}

    @property
    def has_work(self) -> bool:
        return bool(self._jobs)

    def add(self, request: Request) -> None:
        """Starts a request. ValueError, leaving nothing behind: a repeated id, no environments, a prompt that does not fit."""
        if request.request_id in self._jobs:
            raise ValueError(f"request {request.request_id!r} is already running: every request needs an id of its own")
        if request.num_samples < 1 or request.max_turns < 1:
            raise ValueError(
                f"request {request.request_id!r} asks for {request.num_samples} samples of {request.max_turns} turns: both must be >= 1"
            )
        job = self._jobs[request.request_id] = _Job(request=request)
        try:
            for number in range(request.num_samples):
                self._open(job, number)
        except BaseException:
            self.cancel(request.request_id)
            raise

    def cancel(self, request_id: str) -> None:
        """Drops a request and all its samples; unknown ids are ignored."""
        job = self._jobs.pop(request_id, None)
        for episode in job.episodes if job else ():
            if episode.sample is not None:
                self._episodes.pop(episode.sample, None)
                self.engine.release(episode.sample)

    def cancel_all(self) -> None:
        for request_id in list(self._jobs):
            self.cancel(request_id)

    def step(self) -> list[tuple[str, Group | Exception]]:
        """One engine step and the environments' answers to it: (request id, group or why there is none) of what ended."""
        results: list[tuple[str, Group | Exception]] = []
        for sample in self.engine.step():
            episode = self._episodes.get(sample)
            if episode is None:  # its request failed in this very loop
                continue
            request = episode.job.request
            try:
                self._after_turn(episode, sample)
            except Exception as error:
                self.cancel(request.request_id)
                results.append((request.request_id, error))
                continue
            if len(episode.job.trajectories) == request.num_samples:
                del self._jobs[request.request_id]
                ordered = tuple(episode.job.trajectories[i] for i in range(request.num_samples))
                results.append((request.request_id, Group(request=request, trajectories=ordered)))
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
        prompt = self.template.prompt_ids(messages)
        total = request.max_total_tokens
        [episode.sample] = self.engine.add(prompt, request.sampling, 1, request.request_id, total, first_sample=number)
        self._episodes[episode.sample] = episode

    def _after_turn(self, episode: _Episode, sample: Sample) -> None:
        """Takes the reply of a finished turn, asks the environment, and opens the next turn or ends the episode."""
        request = episode.job.request
        reply = cut_after(self.template.text(sample.reply_ids), request.sampling.stop)
        episode.messages.append({"role": "assistant", "content": reply})
        episode.turns += 1
        assert sample.finish is not None
        episode.reason = sample.finish
        if episode.environment is not None:
            answer = episode.environment.step(reply)
            if answer.done:
                episode.reason = "done"
            elif episode.reason != "length" and episode.turns < request.max_turns:
                observation = self.template.observation_ids(episode.messages, answer.messages, sample.tokens[-1])
                if len(observation) < sample.room:
                    before = len(sample.tokens)
                    self.engine.extend(sample, observation)
                    assert len(sample.tokens) == before + len(observation), "a turn must only ever append"
                    episode.messages += answer.messages
                    return
                episode.reason = "length"
        episode.job.trajectories[episode.number] = self._trajectory(episode, sample)
        del self._episodes[sample]
        self.engine.release(sample)

    def _trajectory(self, episode: _Episode, sample: Sample) -> Trajectory:
        request, engine = episode.job.request, self.engine
        versions = np.array(sample.versions, dtype=np.int32)
        record = sample.index_record(engine.index_k, engine.layers, engine.record_dtype) if engine.records else None
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
            environment_state=dict(episode.environment.state()) if episode.environment is not None else {},
        )


def cut_after(text: str, stops: Sequence[str]) -> str:
    """The text up to and including the first stop text in it: an environment needs to see, e.g., that a call was closed."""
    ends = [text.index(stop) + len(stop) for stop in stops if stop in text]
    return text[: min(ends)] if ends else text
