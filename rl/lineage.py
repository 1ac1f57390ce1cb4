"""What a model and a tokenizer are, as hashes: so that specialists of one base, and data of one tokenizer, meet no others."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from winnow.distill.data import Row

CHUNK = 1 << 22


def weights_hash(model: str | Path) -> str:
    """12 hex digits of every weight file's bytes; a copy of a model has the same. Raises ValueError for a folder without weights."""
    from winnow.models.load import resolve

    folder = resolve(model)
    files = sorted([*folder.glob("*.safetensors"), *folder.glob("*.bin")])
    if not files:
        raise ValueError(
            f"model {model} has no weight files (*.safetensors) in {folder}: give a folder that holds a model"
        )
    digest = hashlib.sha256()
    for path in files:
        digest.update(path.name.encode() + b"\0")
        with path.open("rb") as file:
            while block := file.read(CHUNK):
                digest.update(block)
    return digest.hexdigest()[:12]


def tokenizer_hash(tokenizer: Any) -> str:
    """12 hex digits of vocabulary, end mark and chat template: what decides which tokens a conversation becomes."""
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda pair: (pair[1], pair[0]))
    text = json.dumps([vocabulary, tokenizer.eos_token_id, tokenizer.chat_template])
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def check_same_base(specialist: str, its_base: str, student_base: str) -> None:
    """Raises ValueError, with both hashes, where a specialist starts from other weights than the student."""
    if Path(its_base) == Path(student_base):
        return
    its, own = weights_hash(its_base), weights_hash(student_base)
    if its != own:
        raise ValueError(
            f"specialist {specialist!r} starts from {its_base} (weights {its}), the student from {student_base} (weights {own}): a "
            "student can take over only what was learned from its own base. Leave model.path out of the specialist's config, or make both "
            "from one base"
        )


def check_tokenizer(rows: Iterable[Row], wanted: str, where: str, model: str) -> None:
    """Raises ValueError, with both hashes, for a row that was made with another tokenizer. Rows that name none pass."""
    for row in rows:
        if row.tokenizer and row.tokenizer != wanted:
            raise ValueError(
                f"{where}: row {row.id} was made with tokenizer {row.tokenizer}, but {model} has tokenizer {wanted}: its replies would not "
                "end where that model ends them. Make the rows with a specialist of this base, or take them out of student.rows"
            )


def fingerprint(path: str) -> str:
    """A hash of names, sizes and times of a folder's files; of the name alone for a model spec."""
    folder = Path(path).expanduser()
    files = sorted(folder.glob("*")) if folder.is_dir() else [folder] if folder.is_file() else []
    listed = [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files if file.is_file()]
    return hashlib.sha256(json.dumps([str(path), listed]).encode()).hexdigest()[:16]
