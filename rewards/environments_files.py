"""A folder of text files, kept in memory: nothing of the machine can be reached through it, and every episode starts from the same files."""

from __future__ import annotations

from collections.abc import Sequence
from posixpath import normpath
from random import Random
from typing import Any

from winnow.rewards.toolbox import Tool, Toolbox, ToolError, call_text, metadata, tool
from winnow.rollout.schema import Message, Task

MAX_FILES = 200
MAX_SIZE = 20_000  # characters of one file

WORDS_TEXT = "lamp rope kite bell drum cake boat ring leaf rose fish bird wolf bear milk salt corn"
WORDS = WORDS_TEXT.split()
FOLDERS = ("archive", "done", "later", "old")


def clean_path(path: str) -> str:
    """The path inside the folder. Raises ToolError for one that leads out of it."""
    found = normpath(path.strip() or ".")
    if found.startswith(("/", "..")) or "\0" in found or len(found) > 200:
        raise ToolError(f"{path[:60]!r} is outside the folder: use a path such as notes/a.txt")
    return found


class Files(Toolbox):
    """Tools to list, read, write, move and delete. `metadata["files"]` is the start, `metadata["goal"]` what the files must become."""

    def begin(self, task: Task) -> None:
        self.files: dict[str, str] = dict(metadata(task, "files", "files"))

    def tools(self) -> Sequence[Tool]:
        path = "string: e.g. notes/a.txt"
        return (
            tool(
                "list_files",
                "names all files below a folder",
                self.list_files,
                folder={"type": "string", "default": "."},
            ),
            tool("read_file", "the text of a file", self.read_file, path=path),
            tool(
                "write_file",
                "writes a file, replacing what was there",
                self.write_file,
                path=path,
                text="string: all of it",
            ),
            tool("move_file", "moves or renames a file", self.move_file, source=path, target=path),
            tool("delete_file", "deletes a file", self.delete_file, path=path),
        )

    def list_files(self, folder: str) -> str:
        inside = clean_path(folder)
        names = sorted(name for name in self.files if inside == "." or name.startswith(inside + "/"))
        return "\n".join(names) or "no files"

    def existing(self, path: str) -> str:
        name = clean_path(path)
        if name not in self.files:
            raise ToolError(f"there is no file {name[:80]!r}")
        return name

    def free(self, path: str) -> str:
        name = clean_path(path)
        if name == "." or any(other.startswith(name + "/") for other in self.files):
            raise ToolError(f"{name[:80]!r} is a folder")
        if any(name.startswith(other + "/") for other in self.files):
            raise ToolError(f"{name[:80]!r} is below a file")
        return name

    def read_file(self, path: str) -> str:
        return self.files[self.existing(path)] or "(empty)"

    def write_file(self, path: str, text: str) -> str:
        name = self.free(path)
        if len(text) > MAX_SIZE or (name not in self.files and len(self.files) >= MAX_FILES):
            raise ToolError(f"the limits are {MAX_SIZE} characters a file and {MAX_FILES} files")
        self.files[name] = text
        return "written"

    def move_file(self, source: str, target: str) -> str:
        old, new = self.existing(source), self.free(target)
        if new in self.files:
            raise ToolError(f"{new[:80]!r} exists already")
        self.files[new] = self.files.pop(old)
        return "moved"

    def delete_file(self, path: str) -> str:
        del self.files[self.existing(path)]
        return "deleted"

    def score(self, task: Task) -> tuple[float, dict[str, float]]:
        goal = metadata(task, "goal", "files")
        found = {name: text.strip() for name, text in self.files.items()}
        right = sum(found.get(name) == text.strip() for name, text in goal.items())
        share = right / max(1, len(goal.keys() | found.keys()))
        return float(share == 1), {"files_right": share, "finished": float(self.answer is not None)}


def generate(rng: Random, level: int) -> dict[str, Any]:
    """Level 1: move the files with a word; 2: also delete the empty ones; 3: also write the sum of the numbers in them."""
    word, folder = rng.choice(WORDS), rng.choice(FOLDERS)
    others = [w for w in WORDS if w != word]
    names = [f"inbox/{name}{number}.txt" for number, name in enumerate(rng.sample(others, 6), 1)]
    amounts = {name: rng.randint(10, 99) for name in names}
    chosen = set(rng.sample(names, rng.randint(2, 3)))
    files = {
        name: " ".join([*rng.sample(others, 4), *([word] if name in chosen else []), "costs", str(amounts[name])])
        for name in names
    }
    if level >= 2:
        files |= {f"inbox/{rng.choice(others)}{number}.txt": "" for number in (7, 8)}
    text = f"Move every file in inbox that contains the word {word} to the folder {folder}, keeping its name."
    goal = {
        name.replace("inbox", folder) if name in chosen else name: content for name, content in files.items() if content
    }
    steps = [("move_file", {"source": name, "target": name.replace("inbox", folder)}) for name in sorted(chosen)]
    if level >= 2:
        text += " Delete the empty files."
        steps += [("delete_file", {"path": name}) for name, content in files.items() if not content]
    if level >= 3:
        text += f" Then write the sum of the numbers in the moved files to {folder}/sum.txt."
        goal[f"{folder}/sum.txt"] = str(sum(amounts[name] for name in chosen))
        steps.append(("write_file", {"path": f"{folder}/sum.txt", "text": goal[f"{folder}/sum.txt"]}))
    return {"text": text, "metadata": {"files": files, "goal": goal, "solution": steps}}


def expert(task: Task, messages: Sequence[Message]) -> str:
    turn = sum(message["role"] == "assistant" for message in messages)
    if turn == 0:
        return call_text("list_files")
    if turn == 1:
        return " ".join(call_text("read_file", path=path) for path in sorted(task.metadata["files"]))
    if turn == 2:
        return " ".join(call_text(name, **arguments) for name, arguments in task.metadata["solution"])
    return "All done."
