"""What an interrupted conversion leaves, so that the same command goes on from there, bit for bit.

OUT.partial/state.pt    stage, step, weights, optimizers and curves, under a key of all that they were made from
OUT.partial/self.json   texts that the model wrote, where it trains on them; the folder is gone at the end
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from winnow.rl.interrupts import Interrupts

SAVE_SECONDS = 120.0  # between saves
WORTH_SAVING = 10.0  # seconds that a finished stage took, for it to be saved before what comes next


def make_key(**parts: Any) -> str:
    """A hash of everything that a conversion was made from."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


class Partial:
    """The state of one conversion. A state under another key is another conversion's, and ignored."""

    def __init__(self, out: Path, key: str, every: float = SAVE_SECONDS) -> None:
        self.folder = out.parent / f"{out.name}.partial"
        self.key, self.every, self._saved = key, every, time.monotonic()
        self.earlier: dict[str, Any] = {}  # curves of the stages before this one, saved with it

    def load(self) -> dict[str, Any] | None:
        """{"stage", "step", "state", "earlier"}; None where nothing of this key was left."""
        file = self.folder / "state.pt"
        if not file.is_file():
            return None
        found = torch.load(file, map_location="cpu", weights_only=True)
        return found if found["key"] == self.key else None

    def save(self, stage: str, step: int, state: dict[str, Any]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        scratch = self.folder / ".state.pt"
        found = {"key": self.key, "stage": stage, "step": step, "state": state, "earlier": self.earlier}
        torch.save(found, scratch)
        os.replace(scratch, self.folder / "state.pt")
        self._saved = time.monotonic()

    def kept(self, name: str, make: Callable[[], Any]) -> Any:
        """What `make` returned the first time under this key: JSON, kept with the state."""
        file = self.folder / f"{name}.json"
        if file.is_file():
            found = json.loads(file.read_text())
            if found["key"] == self.key:
                return found["value"]
        value = make()
        self.folder.mkdir(parents=True, exist_ok=True)
        scratch = self.folder / f".{name}.json"
        scratch.write_text(json.dumps({"key": self.key, "value": value}))
        os.replace(scratch, file)
        return value

    @property
    def due(self) -> bool:
        return time.monotonic() - self._saved >= self.every

    def remove(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)


def run_steps(
    stage: str, total: int, step: Callable[[int], str], holds: Any, stream: Iterator[Any], partial: Partial | None,
    progress: Callable[[str], object],
) -> None:  # fmt: skip
    """Runs step(0) .. step(total - 1), each on the next batch of `stream`, from where `partial` left this stage.

    Ctrl-C waits for the end of the step, saves and raises KeyboardInterrupt. holds: an object with state_dict and load_state_dict.
    """
    found = partial.load() if partial else None
    done, begin = 0, time.monotonic()
    if found is not None and found["stage"] == stage:
        holds.load_state_dict(found["state"])
        done = int(found["step"])
        progress(f"{stage}: going on after step {done} of {total}")
        for _ in itertools.islice(stream, done):
            pass
    try:
        with Interrupts() as interrupts:
            while done < total:
                with interrupts.held():
                    text = step(done)
                    done += 1
                progress(text)
                if partial is not None and partial.due and done < total:
                    partial.save(stage, done, holds.state_dict())
        if partial is not None and time.monotonic() - begin > WORTH_SAVING:
            partial.save(stage, done, holds.state_dict())
    except KeyboardInterrupt:
        if partial is not None:
            partial.save(stage, done, holds.state_dict())
            progress(f"{stage}: interrupted after step {done} of {total}; the same command goes on from there")
        raise
