"""Answers on their way to the answers file: what an interrupted evaluation has already sampled is kept and not sampled again.

    Generate ─> group ─> FILE.partial (a line a group, at once) ─ the end ─> FILE (every sample, graded, in the order of the tasks)

A line counts for a request only when everything that decides its samples is the same: the model, the messages, the sampling.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from winnow.rollout.schema import Generate, Group, Request, Trajectory


def fingerprint(request: Request, model: str) -> str:
    """16 hex digits of all that decides the samples of a request."""
    task = request.task
    said = [
        model,
        request.num_samples,
        request.max_turns,
        request.max_total_tokens,
        asdict(request.sampling),
        task.id,
        task.environment,
    ]
    text = json.dumps([*said, list(map(dict, task.messages)), dict(task.metadata)], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def resumed(generate: Generate, requests: Sequence[Request], file: Path | None, model: str) -> Iterator[Group]:
    """Every request's group once: those in FILE.partial first, then the others as they finish, each written there at once.

    Without a file it is `generate` itself. The partial file is left for the caller to remove when the answers are safe.
    """
    if file is None:
        yield from generate(requests)
        return
    partial = partial_file(file)
    marks = {request.request_id: fingerprint(request, model) for request in requests}
    kept = read_groups(partial, requests, marks)
    yield from kept.values()
    missing = [request for request in requests if request.request_id not in kept]
    if not missing:
        return
    partial.parent.mkdir(parents=True, exist_ok=True)
    with partial.open("a", encoding="utf-8") as stream:
        for group in generate(missing):
            name = group.request.request_id
            row = {"request": name, "fingerprint": marks[name], "trajectories": [as_row(t) for t in group.trajectories]}
            stream.write(json.dumps(row, ensure_ascii=False, default=str) + "\n")
            stream.flush()
            yield group


def partial_file(file: Path) -> Path:
    return file.with_name(file.name + ".partial")


def read_groups(partial: Path, requests: Sequence[Request], marks: dict[str, str]) -> dict[str, Group]:
    """The groups in a partial file that belong to these requests; a line cut short by a crash is left out."""
    if not partial.is_file():
        return {}
    by_name = {request.request_id: request for request in requests}
    kept = {}
    for line in partial.read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
            name = row["request"]
            if name in by_name and row["fingerprint"] == marks[name]:
                kept[name] = Group(request=by_name[name], trajectories=tuple(from_row(r) for r in row["trajectories"]))
        except (ValueError, KeyError, TypeError):
            continue
    return kept


PLAIN = ("request_id", "sample", "task_id", "domain", "finish_reason", "turns", "temperature", "environment_state")


def as_row(trajectory: Trajectory) -> dict[str, Any]:
    """What grading and the answers file need of a trajectory. Index sets and kept sets are not kept: they would be gigabytes."""
    return {
        **{name: getattr(trajectory, name) for name in PLAIN},
        "messages": [dict(message) for message in trajectory.messages],
        "tokens": trajectory.tokens.tolist(),
        "loss_mask": trajectory.loss_mask.astype(int).tolist(),
        "policy_versions": trajectory.policy_versions.tolist(),
    }


def from_row(row: dict[str, Any]) -> Trajectory:
    return Trajectory(
        **{name: row[name] for name in PLAIN},
        messages=tuple(row["messages"]),
        tokens=np.array(row["tokens"], np.int32),
        loss_mask=np.array(row["loss_mask"], bool),
        policy_versions=np.array(row["policy_versions"], np.int32),
        rollout_logprobs=np.zeros(len(row["tokens"]), np.float32),
    )
