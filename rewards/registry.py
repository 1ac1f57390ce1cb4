"""Names to rewards, environments and benchmarks. To add one: write it in a file of this folder, add its line here, and a test."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable

from winnow.rewards import (
    agent,
    alignment,
    environments,
    instructions,
    math_process,
    programs,
    reasoning,
    sandbox,
    toolbox,
)
from winnow.rewards.pooled import pooled
from winnow.rollout.schema import Environment, Reward, Task

KNOWN_REWARDS: dict[str, Reward] = {
    "number": reasoning.number,
    "gsm8k": reasoning.gsm8k,
    "each_number": reasoning.each_number,
    "exact": reasoning.exact,
    "choice": reasoning.choice,
    "math": reasoning.math,
    "reasoning_gym": reasoning.reasoning_gym,
    "code": programs.code,
    "code_share": programs.code_share,
    "tool_answer": agent.tool_answer,
    "environment": toolbox.environment_reward,
    "rubric": alignment.rubric,
    "ifeval": instructions.ifeval,
}
VERIFIERS = "verifiers:"  # before the name of an environment of that package
KNOWN_ENVIRONMENTS: dict[str, Callable[[], Environment]] = {
    "tool": agent.ToolEnvironment,
    **{name: kind.make for name, kind in environments.KINDS.items()},
}


def get_reward(name: str) -> Reward:
    """The reward of this name, or `package.module:function` of the user's own: `f(task, trajectory)` or TRL's `f(completions, ...)`.

    The user's own runs in a pool of processes that can be killed (pooled.py). Raises ValueError for an unknown name (listing the known
    ones) and for a reward whose package is not installed.
    """
    if name == "math" and not math_process.available():
        raise ValueError(
            "reward 'math' needs math-verify, which is not installed: pip install math-verify, or use reward 'number'"
        )
    if name in KNOWN_REWARDS:
        return KNOWN_REWARDS[name]
    if ":" in name:
        return imported_reward(name)
    raise ValueError(
        f"reward {name!r} is unknown: known are {', '.join(KNOWN_REWARDS)}, or package.module:function of your own"
    )


def imported_reward(name: str) -> Reward:
    module_name, _, attribute = name.partition(":")
    try:
        function = getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"reward {name!r} cannot be imported: {error}") from error
    if module_name.startswith("winnow."):  # ours: cheap, or in processes of its own
        return function
    return pooled(name, function)


def prepare(tasks: Iterable[Task]) -> list[str]:
    """Finds every reward that the tasks name, before anything is sampled for them; lines that a user should see.

    Raises ValueError for a reward that is not there, and for code to be run where no sandbox works.
    """
    names = {task.reward for task in tasks}
    lines = []
    for name in sorted(names):
        if isinstance(get_reward(name), programs.CodeReward):
            lines = [sandbox.shared().describe()]
    return lines


def make_environment(name: str) -> Environment:
    """A fresh environment of this name, for one episode. Picklable by reference: it is handed to the rollout workers."""
    if name.startswith(VERIFIERS):
        from winnow.rewards.environments_verifiers import VerifiersEnvironment, load_environment

        return VerifiersEnvironment(lambda: load_environment(name.removeprefix(VERIFIERS)))
    if name not in KNOWN_ENVIRONMENTS:
        raise ValueError(f"environment {name!r} is unknown: known are {', '.join(KNOWN_ENVIRONMENTS)}")
    return KNOWN_ENVIRONMENTS[name]()
