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


def save_checkpoint(
    root: Path, step: int, fill: Callable[[Path], object], *, keep: int, meta: Mapping[str, Any] | None = None
) -> Path:
    """Calls `fill(folder)` to write files, then makes `root/step-NNNNNN` of them in one rename; keeps the newest `keep`.

    An existing folder of the same step is replaced. When anything fails, no folder of that name appears and the old ones stay.
    """
    root.mkdir(parents=True, exist_ok=True)
    for stale in root.glob(".*tmp-*"):
        shutil.rmtree(stale)
    target, temporary = root / f"step-{step:06d}", root / f".tmp-step-{step:06d}"
    temporary.mkdir()
    fill(temporary)
    files = {name: _fingerprint(temporary / name) for name in _file_names(temporary)}
    manifest = {"step": step, "meta": dict(meta or {}), "files": files}
    (temporary / MANIFEST).write_text(json.dumps(manifest, indent=1))
    for name in (*files, MANIFEST):
        _sync(temporary / name)
    _sync(temporary)
    if target.exists():
        shutil.rmtree(target)
    os.replace(temporary, target)
    _sync(root)
    for old in list_checkpoints(root)[:-keep]:
        shutil.rmtree(old)
    return target


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
