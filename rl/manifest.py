"""Which stages of a pipeline are done, and from what: manifest.json. A stage whose inputs did not change is not done twice.

stages.jsonl beside it is the history, a line an event: every time a stage began, was stopped by an error or Ctrl-C, or was done. A stage
that was killed has more beginnings than ends; two `done` with one key would be a stage done twice. A stage's seconds are those of all its
attempts but the ones that were killed, which nobody could note.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

FILE = "manifest.json"
HISTORY = "stages.jsonl"


class Manifest:
    """`notes[stage]` = {"key": hash of its inputs, "inputs", "seconds", "gpu_seconds", "output": JSON values; values that name files must
    exist}. `gpus`: how many a stage holds while it runs. Threads may run stages of different names at a time."""

    def __init__(self, folder: Path, version: str, say: Callable[[str], object], gpus: float = 0.0) -> None:
        self.path, self.version, self.say, self.gpus = folder / FILE, version, say, gpus
        self.earlier = 0.0  # seconds that other processes spent on what this one has found done or goes on with
        self.notes: dict[str, dict[str, Any]] = {}
        self._lock = threading.RLock()  # stages may run side by side
        if self.path.is_file():
            try:
                self.notes = json.loads(self.path.read_text())
            except json.JSONDecodeError as error:
                raise ValueError(f"{self.path} is damaged ({error}): delete it to do every stage again") from None

    def stage(self, name: str, inputs: Mapping[str, Any], make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The stage's output: the noted one where its inputs are the same and its files are still there, else `make()`'s."""
        key = self.key(inputs)
        with self._lock:
            note = self.notes.get(name)
        if note and note["key"] == key and all(Path(file).exists() for file in self._files(note["output"])):
            self.say(f"{name}: done before ({note['seconds']:.0f} s then)")
            with self._lock:
                self.earlier += note["seconds"]
            return dict(note["output"])
        if note:
            self.say(f"{name}: its inputs changed or its files are gone, doing it again")
            with self._lock:
                del self.notes[name]
        begin, before = time.monotonic(), self.stopped(name, inputs)
        with self._lock:
            self.earlier += before
        self._event(name, key, "begin")
        try:
            output = json.loads(json.dumps(make()))  # as a later run will read it: lists, not tuples
        except BaseException:
            self._event(name, key, "stopped", seconds=round(time.monotonic() - begin, 1))
            raise
        seconds = time.monotonic() - begin + before
        with self._lock:
            self.notes[name] = {
                "key": key,
                "inputs": json.loads(json.dumps(inputs, default=str)),
                "seconds": round(seconds, 1),
                "gpu_seconds": round(seconds * self.gpus, 1),
                "output": output,
            }
            self._write()  # first: an event without its note would be a stage that is done again
        self._event(name, key, "done", seconds=round(seconds, 1))
        self.say(f"{name}: done in {self.notes[name]['seconds']:.1f} s")
        return output

    def _write(self) -> None:
        """manifest.json, whole or not at all, also when the machine goes down."""
        temporary = self.path.with_name(f".{FILE}")
        temporary.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("w") as file:
            file.write(json.dumps(self.notes, indent=1))
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(self.path)

    def _event(self, stage: str, key: str, event: str, **more: Any) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        line = {"time": round(time.time(), 3), "stage": stage, "key": key, "event": event, **more}
        with self._lock, (self.path.parent / HISTORY).open("a") as file:
            file.write(json.dumps(line) + "\n")

    def stopped(self, stage: str, inputs: Mapping[str, Any]) -> float:
        """Seconds that this stage took before, in attempts that were stopped: an RL run goes on where it was, and cost them too."""
        key = self.key(inputs)
        own = [event for event in self._history() if event["stage"] == stage and event["key"] == key]
        last = max((number for number, event in enumerate(own) if event["event"] == "done"), default=-1)
        return sum(event["seconds"] for event in own[last + 1 :] if event["event"] == "stopped")

    def _history(self) -> list[dict[str, Any]]:
        file, events = self.path.parent / HISTORY, []
        with self._lock:
            lines = file.read_text().splitlines() if file.is_file() else []
        for line in lines:
            with contextlib.suppress(json.JSONDecodeError):  # the machine went down in the middle of this line
                events.append(json.loads(line))
        return events

    def key(self, inputs: Mapping[str, Any]) -> str:
        """16 hex digits of the inputs and of the code's version."""
        text = json.dumps([self.version, inputs], sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def maker(self, path: str) -> str | None:
        """The key of the stage that made this file or folder; None where none did."""
        with self._lock:
            return next((note["key"] for note in self.notes.values() if path in self._files(note["output"])), None)

    def spent(self, *stages: str) -> float:
        """GPU seconds of the stages, by name or by the beginning of a name that ends in "-"; seconds where the pipeline has no GPU."""
        unit = "gpu_seconds" if self.gpus else "seconds"
        with self._lock:
            return sum(
                note[unit]
                for name, note in self.notes.items()
                if any(name == stage or (stage.endswith("-") and name.startswith(stage)) for stage in stages)
            )

    @staticmethod
    def _files(output: Mapping[str, Any]) -> list[str]:
        return [str(output[name]) for name in ("model", "rows", "run") if output.get(name)]
