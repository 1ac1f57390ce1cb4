"""Names to rewards, environments and benchmarks. To add one: write it in a file of this folder, add its line here, and a test."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable

from winnow.rewards import agent, alignment, math_process, reasoning
from winnow.rewards.contract import BatchReward
from winnow.rollout.schema import Environment, Reward

KNOWN_REWARDS: dict[str, Reward] = {
    "number": reasoning.number,
    "gsm8k": reasoning.gsm8k,
    "exact": reasoning.exact,
    "choice": reasoning.choice,
    "math": reasoning.math,
    "tool_answer": agent.tool_answer,
    "rubric": alignment.rubric,
}
KNOWN_ENVIRONMENTS: dict[str, Callable[[], Environment]] = {"tool": agent.ToolEnvironment}


def get_reward(name: str) -> Reward:
    """The reward of this name, or `package.module:function` of the user's own: `f(task, trajectory)` or TRL's `f(completions, ...)`.

    Raises ValueError for an unknown name (listing the known ones) and for a reward whose package is not installed.
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
    parameters = inspect.signature(function).parameters
    return BatchReward(function, name) if "completions" in parameters else function


def make_environment(name: str) -> Environment:
    """A fresh environment of this name, for one episode. Picklable by reference: it is handed to the rollout workers."""
    if name not in KNOWN_ENVIRONMENTS:
        raise ValueError(f"environment {name!r} is unknown: known are {', '.join(KNOWN_ENVIRONMENTS)}")
    return KNOWN_ENVIRONMENTS[name]()
