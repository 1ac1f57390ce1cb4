"""Batch generation: a file of prompts in, a line of JSON for every answer out."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from winnow.rewards.data import PROMPT_FIELDS, SUFFIXES, read_jsonl
from winnow.rollout.schema import Generate, Message, Request, Sampling, Task


def read_prompts(file: str, arguments: argparse.Namespace) -> list[Request]:
    """One request for every prompt in a JSONL file (a field prompt, question, messages, ...) or for every line of a text file.

    Arguments: max_tokens, temperature, seed, samples, template_option. Raises ValueError naming file and line, and for a file without prompts.
    """
    path = Path(file).expanduser()
    if path.suffix in SUFFIXES:
        prompts = [(where, as_messages(row, where)) for where, row in read_jsonl(path)]
    elif not path.is_file():
        raise ValueError(
            f"there is no file {file}: give a JSONL file with prompt or messages, or a text file with a prompt a line"
        )
    else:
        lines = enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        prompts = [(f"{path}:{n}", ({"role": "user", "content": line},)) for n, line in lines if line.strip()]
    if not prompts:
        raise ValueError(f"{file} holds no prompts")
    options = template_options(arguments.template_option)
    sampling = Sampling(max_tokens=arguments.max_tokens, temperature=arguments.temperature, seed=arguments.seed)
    return [
        Request(
            request_id=where,
            task=Task(id=where, domain="prompts", messages=messages, reward="none"),
            num_samples=arguments.samples,
            sampling=sampling,
            template=options,
        )
        for where, messages in prompts
    ]


def template_options(words: Sequence[str]) -> dict[str, Any]:
    """KEY=VALUE words (the value is YAML) as options of the chat template. Raises ValueError for one that is not of this form."""
    import yaml

    options = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not key or not equals:
            raise ValueError(f"--template-option {word!r} is not of the form KEY=VALUE, e.g. enable_thinking=false")
        options[key] = yaml.safe_load(value)
    return options


def as_messages(row: Any, where: str) -> tuple[Message, ...]:
    field = next((name for name in PROMPT_FIELDS if row.get(name)), None)
    if field is None:
        raise ValueError(
            f"{where}: no field is a prompt; give one of {', '.join(PROMPT_FIELDS)}, the line has {', '.join(row)}"
        )
    value = row[field]
    if isinstance(value, str):
        return ({"role": "user", "content": value},)
    if isinstance(value, list) and all(isinstance(m, dict) and {"role", "content"} <= m.keys() for m in value):
        return tuple({"role": str(m["role"]), "content": str(m["content"])} for m in value)
    raise ValueError(f"{where}: field {field!r} must be a text or a list of messages with role and content")


def answer_prompts(generate: Generate, requests: Sequence[Request]) -> Iterator[dict[str, Any]]:
    """Answers as they finish, not in the prompts' order: `prompt` names the line each belongs to."""
    for group in generate(requests):
        for trajectory in group.trajectories:
            drawn = trajectory.rollout_logprobs[trajectory.loss_mask]
            yield {
                "prompt": trajectory.task_id,
                "sample": trajectory.sample,
                "messages": [dict(message) for message in trajectory.messages],
                "reply": trajectory.reply,
                "finish_reason": trajectory.finish_reason,
                "num_tokens": trajectory.num_generated,
                "logprob": float(drawn.sum()),
            }
