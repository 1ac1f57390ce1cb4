"""What a model must beat: the best reply that ignores the prompt; and episodes by a scripted agent, without an engine."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from random import Random

import numpy as np

from winnow.rewards.contract import success
from winnow.rewards.demonstrations import SOLVERS, demonstrations
from winnow.rewards.registry import get_reward, make_environment
from winnow.rollout.schema import Message, Task, Trajectory

Agent = Callable[[Sequence[Message]], str]  # the messages so far -> the next reply


def play(task: Task, agent: Agent, max_turns: int = 4, request_id: str = "scripted", sample: int = 0) -> Trajectory:
    """One episode with the agent in the model's place. Its tokens stand for words: enough to be graded, not to be learned from."""
    messages: list[Message] = list(task.messages)
    environment = make_environment(task.environment) if task.environment else None
    if environment:
        messages += environment.reset(task)
    generated: list[bool] = [False] * sum(len(m["content"].split()) for m in messages)
    turns, finish = 0, "stop"
    while True:
        reply = agent(messages)
        turns += 1
        messages.append({"role": "assistant", "content": reply})
        generated += [True] * (len(reply.split()) + 1)
        if environment is None:
            break
        step = environment.step(reply)
        messages += step.messages
        generated += [False] * sum(len(m["content"].split()) for m in step.messages)
        if step.done or turns >= max_turns:
            finish = "done" if step.done else "length"
            break
    mask = np.array(generated)
    return Trajectory(
        request_id=request_id,
        sample=sample,
        task_id=task.id,
        domain=task.domain,
        tokens=np.zeros(len(mask), np.int32),
        loss_mask=mask,
        rollout_logprobs=np.zeros(len(mask), np.float32),
        policy_versions=np.where(mask, 0, -1).astype(np.int32),
        finish_reason=finish,
        messages=tuple(messages),
        turns=turns,
        environment_state=environment.state() if environment else {},
    )


def constant_replies(tasks: Sequence[Task], limit: int = 64) -> list[str]:
    """Candidates for the best constant reply, the most frequent first: gold answers and the replies of right solutions."""
    counts: Counter[str] = Counter()
    for task in tasks:
        if task.answer is not None:
            counts[task.answer] += 1
        if task.metadata.get("kind") in SOLVERS:
            turns = demonstrations(task, Random(task.id))[len(task.messages) :]
            counts.update(turn["content"] for turn in turns if turn["role"] == "assistant")
    return [reply for reply, _ in counts.most_common(limit)]


def constant_baseline(tasks: Sequence[Task], limit: int = 64, max_turns: int = 4) -> tuple[str, float]:
    """The best of the constant replies, given at every turn, and the share of the tasks that it solves."""
    if not tasks:
        raise ValueError("the constant baseline needs at least one task")
    rates = {reply: solved_share(tasks, reply, max_turns) for reply in constant_replies(tasks, limit)}
    best = max(rates, key=lambda reply: rates[reply], default="")
    return best, rates.get(best, 0.0)


def solved_share(tasks: Sequence[Task], reply: str, max_turns: int) -> float:
    """The share of the tasks solved by saying `reply` at every turn."""
    solved = [success(get_reward(t.reward)(t, play(t, lambda _: reply, max_turns))) for t in tasks]
    return sum(solved) / len(tasks)
