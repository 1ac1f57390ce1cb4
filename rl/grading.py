"""Rewards as a run's config asks for them: the registry's, a judge for rubrics that ask questions, penalties, the held-out judge."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from threading import Lock
from typing import Any

import numpy as np

from winnow.rewards.alignment import Shaping, shape
from winnow.rewards.contract import grade
from winnow.rewards.judge import Judge, JudgedRubric, held_out_check
from winnow.rewards.registry import get_reward, prepare
from winnow.rl.config import Config
from winnow.rl.config_sections import DomainConfig, JudgeConfig
from winnow.rl.sampler import domain_tasks
from winnow.rollout.schema import Group, Reward, Task


def grade_groups(config: Config, groups: Sequence[Group], pool: Any) -> list[Group]:
    """The step's groups with their scores. `pool` scores tokens for a judge that is the policy itself."""
    penalties = {domain.name: domain.length_penalty for domain in config.domains}
    graded = grade(reward_finder(config, pool), groups, penalties)
    return shape(graded, {domain.name: shaping_of(domain) for domain in config.domains})


def prepared_tasks(config: Config, progress: Callable[[str], object]) -> dict[str, list[Task]]:
    """The tasks to train on. Their rewards are found now: one that cannot run here stops the run before a process is started."""
    tasks = domain_tasks(config, "train")
    for line in prepare(task for of_domain in tasks.values() for task in of_domain):
        progress(line)
    return tasks


def reward_finder(config: Config, pool: Any) -> Callable[[str], Reward]:
    """`get_reward`, with the judge behind reward `rubric` where the config names one."""
    if not config.judge.model:
        return get_reward
    judge = (
        policy_judge(config, pool) if config.judge.model == "policy" else model_judge(config.judge, config.judge.model)
    )
    rubric = JudgedRubric(judge)
    return lambda name: rubric if name == "rubric" else get_reward(name)


def shaping_of(domain: DomainConfig) -> Shaping:
    return Shaping(
        script=domain.script,
        language=domain.language_penalty,
        repetition=domain.repetition_penalty,
        token_budget=domain.token_budget,
        budget=domain.budget_penalty,
    )


def policy_judge(config: Config, pool: Any) -> Judge:
    from winnow.models.load import load_tokenizer

    return Judge(pool.score, load_tokenizer(config.model.path), "policy", config.judge.min_mass)


@lru_cache(maxsize=2)
def model_judge(judge: JudgeConfig, model: str) -> Judge:
    """A judge that runs another checkpoint on an engine in this process."""
    from winnow.models.load import load_tokenizer
    from winnow.rollout.engine import EngineConfig
    from winnow.rollout.local_pool import LocalPool
    from winnow.rollout.worker import WorkerSpec

    engine = EngineConfig(max_batch=1, num_pages=judge.num_pages)
    pool = LocalPool(
        WorkerSpec(model=model, dtype=judge.dtype, device=judge.device, engine=engine, threads=judge.threads)
    )
    lock = Lock()

    def score(sequences: Sequence[Sequence[int]]) -> list[np.ndarray]:
        with lock:  # stages side by side share the judge
            return pool.score(sequences)

    return Judge(score, load_tokenizer(model), model, judge.min_mass)


def held_out_metrics(config: Config, groups: Sequence[Group]) -> dict[str, float]:
    """judge/gap, judge/agreement, ... of the held-out judge on this step's samples; empty where none is set."""
    if not config.judge.holdout:
        return {}
    graded = [
        (group.request.task, trajectory, score)
        for group in groups
        for trajectory, score in zip(group.trajectories, group.scores, strict=True)
        if group.request.task.reward == "rubric"
    ]
    found = held_out_check(model_judge(config.judge, config.judge.holdout), graded, config.judge.holdout_samples)
    return {f"judge/{name}": value for name, value in found.items()}
