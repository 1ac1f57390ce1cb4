"""Which tasks a step gets: a fixed quota per domain, epochs shuffled by seed.

The position is a pure function of the step: step s takes draws s*quota ... (s+1)*quota - 1 of an endless sequence of epochs. There is
no state to save or to lose, and a resumed run sees exactly the tasks that the uninterrupted one would have seen.
"""

from __future__ import annotations

import zlib
from collections.abc import Collection, Mapping, Sequence

import numpy as np

from winnow.rl.config import Config
from winnow.rl.config_sections import DomainConfig
from winnow.rollout.schema import Request, Sampling, Task


class TaskSampler:
    """Deals tasks and wraps them as requests. Raises ValueError when a domain has fewer tasks than its quota."""

    def __init__(self, tasks: Mapping[str, Sequence[Task]], config: Config) -> None:
        self.tasks = tasks
        self.config = config
        for domain in config.domains:
            have = len(tasks.get(domain.name, ()))
            if have < domain.quota:
                raise ValueError(
                    f"domain {domain.name!r} has {have} tasks for a quota of {domain.quota} prompts per step: lower the quota"
                )

    def requests(self, step: int) -> list[Request]:
        """The requests of step `step` (from 1), domain by domain."""
        made = []
        for domain in self.config.domains:
            first = (step - 1) * domain.quota
            for draw in range(first, first + domain.quota):
                made.append(self._request(domain, self._draw(domain, draw), step, str(draw)))
        return made

    def extra(self, step: int, number: int, name: str, count: int, seen: Collection[str]) -> list[Request]:
        """At most `count` further requests of a domain for the step, round `number`, of tasks whose ids are not in `seen`."""
        domain = next(domain for domain in self.config.domains if domain.name == name)
        fresh = [task for task in self.tasks[name] if task.id not in seen]
        key = [self.config.seed, zlib.crc32(name.encode()), step, number]  # a function of the step, as everything here
        chosen = np.random.default_rng(key).permutation(len(fresh))[:count]
        return [self._request(domain, fresh[int(i)], step, f"extra-{number}-{n}") for n, i in enumerate(chosen)]

    def _request(self, domain: DomainConfig, task: Task, step: int, draw: str) -> Request:
        key = draw if draw.isdigit() else f"{step}/{draw}"
        return Request(
            request_id=f"step-{step}/{domain.name}/{draw}",
            task=task,
            num_samples=self.config.rollout.samples,
            sampling=make_sampling(self.config, domain, seed=_seed(self.config.seed, domain.name, key)),
            max_turns=domain.max_turns,
            max_total_tokens=domain.max_total_tokens,
            template=domain.template,
        )

    def _draw(self, domain: DomainConfig, draw: int) -> Task:
        tasks = self.tasks[domain.name]
        epoch, position = divmod(draw, len(tasks))
        order = np.random.default_rng([self.config.seed, zlib.crc32(domain.name.encode()), epoch]).permutation(
            len(tasks)
        )
        return tasks[int(order[position])]


def domain_tasks(config: Config, split: str) -> dict[str, list[Task]]:
    """Every domain's tasks: split "train" (its `count`) or "heldout" (its `holdout`, at most evaluation.limit; domains without any are
    left out). Raises ValueError, naming the domain's source."""
    from winnow.rewards.data import load_tasks

    made = {}
    for domain in config.domains:
        wanted = domain.count if split == "train" else min(domain.holdout, config.evaluation.limit)
        if wanted:
            made[domain.name] = load_tasks(
                domain.source, domain.name, wanted, config.seed, split, domain.level,
                fields=domain.fields or None, reward=domain.reward, path=domain.path,
                environment=domain.environment,
            )  # fmt: skip
    return made


def make_sampling(config: Config, domain: DomainConfig, seed: int) -> Sampling:
    """How training samples of a domain are drawn."""
    rollout = config.rollout
    return Sampling(
        max_tokens=domain.max_tokens,
        temperature=rollout.temperature,
        top_k=rollout.top_k,
        top_p=rollout.top_p,
        min_p=rollout.min_p,
        seed=seed,
    )


def _seed(seed: int, name: str, draw: str) -> int:
    """A seed of its own for every request, the same in every run of the config."""
    return zlib.crc32(f"{seed}/{name}/{draw}".encode())
