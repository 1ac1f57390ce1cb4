"""Verified rows on disk: JSONL for people and tools, Parquet for `datasets`, summary and card beside them. Written whole or not at all."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import MISSING, asdict, fields
from pathlib import Path
from typing import Any

from winnow.distill.card import data_card
from winnow.distill.data import Row, Summary
from winnow.distill.files import atomically

TEXTS = ("id", "domain", "task_id", "specialist", "checkpoint", "config_hash", "request_id")
COUNTS = ("prompt_messages", "policy_version", "seed", "sample", "turns", "num_tokens", "num_generated")
NESTED = ("parts", "index", "selection")
REQUIRED = tuple(f.name for f in fields(Row) if f.default is MISSING and f.default_factory is MISSING)


def write_rows(rows: Sequence[Row], folder: str | Path, name: str = "rows", summary: Summary | None = None) -> Path:
    """FOLDER/NAME.jsonl (returned), NAME.parquet where pyarrow is installed; NAME.summary.json and NAME.card.md with a summary.

    Each file appears under its name only when it is complete. Raises ValueError for no rows.
    """
    if not rows:
        raise ValueError(f"there are no rows to write to {folder}: an empty data set would train nothing")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    plain = [asdict(row) | {"messages": [dict(m) for m in row.messages]} for row in rows]
    path = folder / f"{name}.jsonl"
    atomically(
        path,
        lambda file: file.write_text(
            "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in plain), encoding="utf-8"
        ),
    )
    write_parquet(plain, folder / f"{name}.parquet")
    if summary is not None:
        text = json.dumps(summary.as_dict(), indent=1, sort_keys=True) + "\n"
        atomically(folder / f"{name}.summary.json", lambda file: file.write_text(text, encoding="utf-8"))
        card = data_card(rows, summary, name)
        atomically(folder / f"{name}.card.md", lambda file: file.write_text(card, encoding="utf-8"))
    return path


def write_parquet(plain: Sequence[dict[str, Any]], path: Path) -> bool:
    """The same rows as Parquet; False where pyarrow is not installed. Parts that a domain lacks are null."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        return False
    structs = (*NESTED, "template")
    columns = {key: [row[key] or None if key in structs else row[key] for row in plain] for key in plain[0]}
    # a struct without fields cannot be stored: a column that is empty in every row is left out
    table = pyarrow.table(
        {key: column for key, column in columns.items() if any(value is not None for value in column)}
    )
    atomically(path, lambda file: pyarrow.parquet.write_table(table, file))
    return True


def read_rows(path: str | Path) -> list[Row]:
    """The rows of a JSONL file that `write_rows` made (by hand or by other tools, too). Raises ValueError naming `file:line`."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(
            f"there is no file {path}: run the distillation's generation first, or give the path of a rows file"
        )
    rows = [
        read_row(line, f"{path}:{number}")
        for number, line in enumerate(path.read_bytes().splitlines(), 1)
        if line.strip()
    ]
    if not rows:
        raise ValueError(f"{path} holds no rows")
    return rows


def read_row(line: bytes, where: str) -> Row:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{where}: the line is not JSON ({error})") from error
    if not isinstance(row, dict):
        raise ValueError(f"{where}: the line is a JSON {type(row).__name__}, but it must be an object")
    names = [f.name for f in fields(Row)]
    missing = [key for key in REQUIRED if key not in row]
    if missing:
        raise ValueError(f"{where}: field {missing[0]!r} is missing; the row has {', '.join(row)}")
    for key in row:
        if key not in names:
            raise ValueError(f"{where}: field {key!r} is unknown; a row has {', '.join(names)}")
    problem = fault(row)
    if problem:
        raise ValueError(f"{where}: {problem}")
    return Row(**row | {"messages": tuple(row["messages"])})


def fault(row: dict[str, Any]) -> str | None:
    """What is wrong with the values of a row that has all its fields, or None."""
    for key in TEXTS:
        if not isinstance(row[key], str):
            return f"field {key!r} is {row[key]!r}, but it must be a text"
    for key in COUNTS:
        if not isinstance(row[key], int) or isinstance(row[key], bool):
            return f"field {key!r} is {row[key]!r}, but it must be a whole number"
    for key in NESTED:
        if not isinstance(row.get(key, {}), dict):
            return f"field {key!r} is {row[key]!r}, but it must be an object of numbers"
    if not isinstance(row.get("template", {}), dict):
        return f"field 'template' is {row['template']!r}, but it must be an object of options"
    if not isinstance(row.get("tokenizer", ""), str):
        return f"field 'tokenizer' is {row['tokenizer']!r}, but it must be a text"
    if not isinstance(row["reward"], int | float) or not math.isfinite(row["reward"]):
        return f"field 'reward' is {row['reward']!r}, but it must be a finite number"
    messages = row["messages"]
    if not isinstance(messages, list) or not all(
        isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str) for m in messages
    ):
        return "field 'messages' must be a list of objects with the texts role and content"
    if not any(m["role"] == "assistant" for m in messages[row["prompt_messages"] :]):
        return "the messages hold no reply of the assistant after the prompt: nothing to learn from"
    return None
