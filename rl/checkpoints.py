"""Checkpoint folders that are whole or absent: written beside their place, synced, renamed; every file under a checksum.

<run>/checkpoints/step-000003/    model files, learner state, driver.json, manifest.json (written last)
<run>/checkpoints/.tmp-step-...   one that was interrupted; removed by the next write
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"
_NAME = re.compile(r"step-(\d+)")


@dataclass(frozen=True, kw_only=True, slots=True)
class Checkpoint:
    """A folder that was read and found whole."""

    path: Path
    step: int
    meta: Mapping[str, Any]  # what the driver stored with it


class CheckpointError(OSError):
    """A checkpoint that could not be written. The ones before it are whole."""


def save_checkpoint(
    root: Path, step: int, fill: Callable[[Path], object], *, keep: int, meta: Mapping[str, Any] | None = None
) -> Path:
    """Calls `fill(folder)` to write files, then makes `root/step-NNNNNN` of them in one rename; keeps the newest `keep`, and the one
    with the highest meta["held_out"] beside them.

    An existing folder of the same step is replaced. When anything fails, no folder of that name appears and the old ones stay; what
    the disk or the file system refused is a CheckpointError.
    """
    try:
        target = _write(root, step, fill, dict(meta or {}))
    except (OSError, RuntimeError) as error:  # torch's own writer raises a plain RuntimeError where the disk is full
        shutil.rmtree(root / f".tmp-step-{step:06d}", ignore_errors=True)
        if not isinstance(error, OSError) and type(error) is not RuntimeError:
            raise  # not the disk's: a learner that died, say
        last, free = latest_checkpoint(root), shutil.disk_usage(_existing(root)).free
        raise CheckpointError(
            f"the checkpoint of step {step} could not be written to {root} ({error}; {free / 2**30:.2f} GiB free there): free some space, "
            "or lower schedule.keep; "
            + (f"{last.name} is whole, resume=true goes on from it" if last else "no earlier one exists")
        ) from error
    best = best_checkpoint(root)
    for old in list_checkpoints(root)[:-keep]:
        if old != best:
            shutil.rmtree(old)
    return target


def best_checkpoint(root: Path) -> Path | None:
    """The checkpoint with the highest meta["held_out"], the later one of equals; None where none has been evaluated."""
    scored = []
    for path in list_checkpoints(root):
        try:
            value = json.loads((path / MANIFEST).read_text())["meta"].get("held_out")
        except (json.JSONDecodeError, KeyError, AttributeError):
            continue  # damaged: `read_checkpoint` will say so
        if value is not None:
            scored.append((float(value), _step(path), path))
    return max(scored)[2] if scored else None


def read_meta(path: Path) -> Mapping[str, Any]:
    """What the driver stored with a checkpoint, its files unread."""
    return dict(json.loads((Path(path) / MANIFEST).read_text())["meta"])


def _write(root: Path, step: int, fill: Callable[[Path], object], meta: dict[str, Any]) -> Path:
    root.mkdir(parents=True, exist_ok=True)
    for stale in root.glob(".*tmp-*"):
        shutil.rmtree(stale)
    target, temporary = root / f"step-{step:06d}", root / f".tmp-step-{step:06d}"
    temporary.mkdir()
    fill(temporary)
    files = {name: _fingerprint(temporary / name) for name in _file_names(temporary)}
    manifest = {"step": step, "meta": meta, "files": files}
    (temporary / MANIFEST).write_text(json.dumps(manifest, indent=1))
    for name in (*files, MANIFEST):
        _sync(temporary / name)
    _sync(temporary)
    if target.exists():
        shutil.rmtree(target)
    os.replace(temporary, target)
    _sync(root)
    return target


def _existing(path: Path) -> Path:
    """The path, or the nearest folder above it that exists."""
    return path if path.exists() else _existing(path.parent)


def list_checkpoints(root: Path) -> list[Path]:
    """Finished checkpoint folders, oldest first."""
    if not root.is_dir():
        return []
    found = [path for path in root.iterdir() if _NAME.fullmatch(path.name) and (path / MANIFEST).is_file()]
    return sorted(found, key=_step)


def latest_checkpoint(root: Path) -> Path | None:
    """The newest finished checkpoint folder, or None."""
    found = list_checkpoints(root)
    return found[-1] if found else None


def read_latest(root: Path) -> Checkpoint | None:
    """The newest checkpoint, verified; None where there is none."""
    newest = latest_checkpoint(root)
    return read_checkpoint(newest) if newest else None


def read_checkpoint(path: Path) -> Checkpoint:
    """Verifies every file of a checkpoint. Raises ValueError naming the first missing or damaged one."""
    manifest_path = Path(path) / MANIFEST
    if not manifest_path.is_file():
        raise ValueError(f"{path} is not a checkpoint: it has no {MANIFEST}")
    try:
        manifest = json.loads(manifest_path.read_text())
        files, step, meta = manifest["files"], manifest["step"], manifest["meta"]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(
            f"checkpoint {path}: {MANIFEST} is damaged ({error}); delete this folder to resume from the one before"
        ) from None
    for name, want in files.items():
        file = Path(path) / name
        got = _fingerprint(file) if file.is_file() else "missing"
        if got != want:
            raise ValueError(
                f"checkpoint {path}: {name} is {got}, the manifest says {want}; delete this folder to resume from the one before"
            )
    return Checkpoint(path=Path(path), step=int(step), meta=meta)


def _step(path: Path) -> int:
    match = _NAME.fullmatch(path.name)
    assert match, path
    return int(match[1])


def _file_names(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def _fingerprint(file: Path) -> dict[str, Any]:
    with file.open("rb") as stream:
        return {"bytes": file.stat().st_size, "sha256": hashlib.file_digest(stream, "sha256").hexdigest()}


def _sync(path: Path) -> None:
    """Waits until a file or a folder's entries are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
