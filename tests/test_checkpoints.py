"""Checkpoints are whole or absent, and damage is found when they are read."""

from __future__ import annotations

import multiprocessing
import resource
import shutil
from pathlib import Path

import pytest
import torch

from winnow.rl.checkpoints import (
    CheckpointError,
    best_checkpoint,
    latest_checkpoint,
    list_checkpoints,
    read_checkpoint,
    save_checkpoint,
)


def fill(text: str):
    def write(folder: Path) -> None:
        (folder / "model").mkdir()
        (folder / "model" / "weights").write_text(text)
        (folder / "state").write_text(text * 2)

    return write


def test_save_list_prune_and_read(tmp_path: Path) -> None:
    for step in (1, 2, 10):
        save_checkpoint(tmp_path, step, fill(f"s{step}"), keep=2, meta={"seed": 3})
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-000002", "step-000010"]
    newest = latest_checkpoint(tmp_path)
    assert newest is not None
    checkpoint = read_checkpoint(newest)
    assert checkpoint.step == 10 and checkpoint.meta == {"seed": 3}
    assert (checkpoint.path / "model" / "weights").read_text() == "s10"
    assert latest_checkpoint(tmp_path / "none") is None


def test_a_failing_write_leaves_the_old_ones_and_no_half_one(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, 1, fill("x"), keep=1)

    def fails(folder: Path) -> None:
        (folder / "half").write_text("x")
        raise OSError("disk full")

    for step in (1, 2):
        with pytest.raises(CheckpointError, match="disk full"):
            save_checkpoint(tmp_path, step, fails, keep=1)
        assert [path.name for path in list_checkpoints(tmp_path)] == ["step-000001"]
        assert read_checkpoint(tmp_path / "step-000001").step == 1
    save_checkpoint(tmp_path, 2, fill("y"), keep=5)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000001", "step-000002"]


@pytest.mark.parametrize("damage", ["changed", "missing", "truncated", "manifest"])
def test_damage_is_named(tmp_path: Path, damage: str) -> None:
    path = save_checkpoint(tmp_path, 1, fill("weights"), keep=1)
    file = path / "model" / "weights"
    if damage == "changed":
        file.write_text("weighty")
    elif damage == "missing":
        file.unlink()
    elif damage == "truncated":
        file.write_text("w")
    else:
        (path / "manifest.json").write_text('{"step": 1')
    with pytest.raises(ValueError, match="delete this folder to resume from the one before") as error:
        read_checkpoint(path)
    assert ("manifest.json is damaged" if damage == "manifest" else "model/weights") in str(error.value)


def test_a_folder_without_manifest_is_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "step-000005").mkdir()
    assert latest_checkpoint(tmp_path) is None
    with pytest.raises(ValueError, match="is not a checkpoint"):
        read_checkpoint(tmp_path / "step-000005")


def fill_the_disk(root: Path, said: Path) -> None:
    """A process whose files may not grow past 64 KiB, as on a disk that is full there."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, 1 << 16))
    try:
        save_checkpoint(
            root, 2, lambda folder: torch.save({"weights": torch.zeros(1 << 18)}, folder / "learner.pt"), keep=1
        )
    except CheckpointError as error:
        said.write_text(str(error))


def test_a_full_disk_in_a_real_process_is_explained_and_leaves_nothing_half(tmp_path: Path) -> None:
    root, said = tmp_path / "checkpoints", tmp_path / "said"
    save_checkpoint(root, 1, fill("x"), keep=1)
    process = multiprocessing.get_context("fork").Process(target=fill_the_disk, args=(root, said))
    process.start()
    process.join(60)
    assert process.exitcode == 0
    for part in (
        "step 2 could not be written",
        "GiB free there",
        "lower schedule.keep",
        "step-000001 is whole, resume=true",
    ):
        assert part in said.read_text()
    assert [path.name for path in root.iterdir()] == ["step-000001"] and read_checkpoint(root / "step-000001").step == 1


def test_the_best_one_outlives_newer_ones_until_a_better_one_comes(tmp_path: Path) -> None:
    for step, held_out in ((1, 0.4), (2, None), (3, 0.2), (4, 0.4), (5, 0.1)):
        save_checkpoint(tmp_path, step, fill("x"), keep=1, meta={} if held_out is None else {"held_out": held_out})
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-000004", "step-000005"]
    assert best_checkpoint(tmp_path) == tmp_path / "step-000004"
    shutil.rmtree(tmp_path / "step-000004")
    assert best_checkpoint(tmp_path) == tmp_path / "step-000005" and best_checkpoint(tmp_path / "none") is None
