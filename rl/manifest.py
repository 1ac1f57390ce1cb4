"""Which stages of a pipeline are done, and from what: manifest.json. A stage whose inputs did not change is not done twice."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

FILE = "manifest.json"


class Manifest:
    """`notes[stage]` = {"key": hash of its inputs, "seconds", "output": JSON values; values that name files must exist}."""

    def __init__(self, folder: Path, version: str, say: Callable[[str], object]) -> None:
        self.path, self.version, self.say = folder / FILE, version, say
        self.notes: dict[str, dict[str, Any]] = {}
        if self.path.is_file():
            try:
                self.notes = json.loads(self.path.read_text())
            except json.JSONDecodeError as error:
                raise ValueError(f"{self.path} is damaged ({error}): delete it to do every stage again") from None

    def stage(self, name: str, inputs: Mapping[str, Any], make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The stage's output: the noted one where its inputs are the same and its files are still there, else `make()`'s."""
        key = self.key(inputs)
        note = self.notes.get(name)
        if note and note["key"] == key and all(Path(file).exists() for file in self._files(note["output"])):
            self.say(f"{name}: done before ({note['seconds']:.0f} s then)")
            return dict(note["output"])
        if note:
            self.say(f"{name}: its inputs changed or its files are gone, doing it again")
            del self.notes[name]
        begin = time.monotonic()
        output = make()
        self.notes[name] = {"key": key, "seconds": round(time.monotonic() - begin, 1), "output": output}
        temporary = self.path.with_name(f".{FILE}")
        temporary.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps(self.notes, indent=1))
        temporary.replace(self.path)
        self.say(f"{name}: done in {self.notes[name]['seconds']:.1f} s")
        return output

    def key(self, inputs: Mapping[str, Any]) -> str:
        """16 hex digits of the inputs and of the code's version."""
        text = json.dumps([self.version, inputs], sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def maker(self, path: str) -> str | None:
        """The key of the stage that made this file or folder; None where none did."""
        return next((note["key"] for note in self.notes.values() if path in self._files(note["output"])), None)

    @staticmethod
    def _files(output: Mapping[str, Any]) -> list[str]:
        return [str(output[name]) for name in ("model", "rows", "run") if output.get(name)]
