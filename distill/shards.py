"""What was sampled, kept as it arrives: an interrupted generation goes on with the prompts that are not in a shard yet.

    FOLDER/00000.jsonl   line 1: {"format", "prompts", "sha256" of the rest}; then one graded prompt a line, every sample of it

Shards hold samples before anything is chosen, so another threshold or another rule needs no new samples. A shard appears whole or not at
all; one that was changed afterwards is named, never skipped: its samples would be missing without a word.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from winnow.distill.data import Row, Sampled
from winnow.distill.files import atomically

FORMAT = 1


class Shards:
    """The shards of one folder. `sampled` holds what they hold; `add` writes the next one. Raises ValueError for a damaged shard."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files = sorted(folder.glob("[0-9]*.jsonl"))
        self.sampled: list[Sampled] = [one for file in self.files for one in read_shard(file)]
        seen: dict[str, str] = {}
        for one in self.sampled:
            if one.request_id in seen:
                raise ValueError(
                    f"{folder}: prompt {one.request_id} is in two shards: delete the folder to sample again"
                )
            seen[one.request_id] = one.prompt

    @property
    def done(self) -> set[str]:
        """Request ids that need no more samples."""
        return {one.request_id for one in self.sampled}

    def add(self, sampled: Sequence[Sampled]) -> Path:
        """Writes the next shard. Raises ValueError for a prompt that is in one already."""
        repeated = self.done & {one.request_id for one in sampled}
        if repeated:
            raise ValueError(f"{self.folder}: prompts {sorted(repeated)[:3]} were sampled before")
        self.folder.mkdir(parents=True, exist_ok=True)
        number = int(self.files[-1].stem) + 1 if self.files else 0
        path = self.folder / f"{number:05d}.jsonl"
        body = "".join(json.dumps(asdict(one), ensure_ascii=False) + "\n" for one in sampled).encode()
        head = {"format": FORMAT, "prompts": len(sampled), "sha256": hashlib.sha256(body).hexdigest()}
        atomically(path, lambda file: file.write_bytes(json.dumps(head).encode() + b"\n" + body))
        self.files.append(path)
        self.sampled += sampled
        return path


def read_shard(path: Path) -> list[Sampled]:
    """The prompts of one shard. Raises ValueError naming the file and what is wrong with it."""
    head, _, body = path.read_bytes().partition(b"\n")
    try:
        about = json.loads(head)
        wanted = about["sha256"]
    except (ValueError, KeyError, TypeError):
        raise ValueError(_damaged(path, "its first line is not the description of a shard")) from None
    if about.get("format") != FORMAT:
        raise ValueError(
            f"shard {path} has format {about.get('format')!r}, this version reads {FORMAT}: delete its folder"
        )
    if hashlib.sha256(body).hexdigest() != wanted:
        raise ValueError(_damaged(path, f"its {len(body)} bytes do not have the checksum that its first line names"))
    sampled = [_sampled(json.loads(line)) for line in body.splitlines()]
    if len(sampled) != about.get("prompts"):
        raise ValueError(_damaged(path, f"it holds {len(sampled)} prompts, its first line says {about.get('prompts')}"))
    return sampled


def _damaged(path: Path, what: str) -> str:
    return f"shard {path} is damaged: {what}. Delete it, and its prompts are sampled again"


def _sampled(values: dict[str, Any]) -> Sampled:
    names = {f.name for f in fields(Row)}
    rows = [
        None if row is None else Row(**{**{k: row[k] for k in names if k in row}, "messages": tuple(row["messages"])})
        for row in values["rows"]
    ]
    return Sampled(
        **values
        | {
            "rows": tuple(rows),
            "finish_reasons": tuple(values["finish_reasons"]),
            "failures": tuple(values["failures"]),
        }
    )
