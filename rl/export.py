"""A checkpoint as a plain model folder: weights, config and tokenizer, nothing of the run. `winnow export RUN OUT`.

RUN/checkpoints/step-N (verified) -> the model -> without indexers where asked -> OUT, with export.json that says where it came from
"""

from __future__ import annotations

import json
from pathlib import Path

from winnow.rl.checkpoints import MANIFEST, best_checkpoint, latest_checkpoint, list_checkpoints, read_checkpoint
from winnow.rl.run import code_version


def export_checkpoint(
    run: Path, out: Path, *, step: int | None = None, best: bool = False, dense: bool = False, dtype: str = "float32"
) -> Path:
    """Writes the folder `out` and returns it. Raises ValueError where there is no such checkpoint, it is damaged, or `out` is taken."""
    from winnow.models import attach
    from winnow.models.load import load, load_tokenizer, save

    checkpoint = read_checkpoint(find_checkpoint(run, step, best))
    if out.exists() and any(out.iterdir()):
        raise ValueError(f"{out} exists and is not empty: choose another output folder")
    model = load(checkpoint.path, dtype)
    if dense and attach.is_converted(model):
        attach.strip(model)
    has_tokenizer = any(checkpoint.path.glob("tokenizer*.json"))
    save(model, load_tokenizer(checkpoint.path) if has_tokenizer else None, out)
    origin = {
        "checkpoint": str(checkpoint.path),
        "step": checkpoint.step,
        "dense": dense,
        "dtype": dtype,
        "version": code_version(),
    }
    (out / "export.json").write_text(json.dumps({**origin, **checkpoint.meta}, indent=1) + "\n")
    return out


def find_checkpoint(run: Path, step: int | None, best: bool) -> Path:
    """The checkpoint that is meant. ValueError lists the ones there are."""
    if (run / MANIFEST).is_file() and step is None and not best:
        return run
    root = run / "checkpoints"
    there = list_checkpoints(root)
    if step is not None:
        chosen = next((path for path in there if path.name == f"step-{step:06d}"), None)
    else:
        chosen = best_checkpoint(root) if best else latest_checkpoint(root)
    if chosen is None:
        wanted = f"step {step}" if step is not None else "a held-out reward" if best else "any"
        names = ", ".join(path.name for path in there) or "none"
        raise ValueError(f"{run} has no checkpoint of {wanted}; there are: {names}")
    return chosen
