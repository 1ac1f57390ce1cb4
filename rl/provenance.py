"""`winnow report RUN --provenance`: walks every row of a run's data back to the samples, the checkpoint, the configs and the base it comes from.

    row ─┬─ id ──────────── its own messages          row ─ checkpoint ─ whole, by its checksums ─ config of that RL run ─ base model
         ├─ config_hash ─── NAME.config.yaml               └─ tokenizer hash
         └─ request, sample ─ shard, by its checksum  NAME.parquet, NAME.summary.json ─ the same rows, the same counts

The first thing that is not there, or not what the row says, is an error that names file and line. Nothing is written.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from winnow.distill.data import Row, conversation_id
from winnow.distill.shards import read_shard
from winnow.distill.store import read_rows
from winnow.rl.checkpoints import read_checkpoint
from winnow.rl.config import values_hash
from winnow.rl.lineage import tokenizer_hash


@dataclass(frozen=True, kw_only=True)
class Traced:
    """One data file whose every row was walked back."""

    name: str
    rows: int
    sampled: int
    passed: int
    dropped: Mapping[str, int]
    sources: tuple[str, ...]  # "checkpoint (config hash) from base"


def trace_run(run: Path) -> list[Traced]:
    """One entry a data file of the run. Raises ValueError, naming file and line, for the first row that does not lead back."""
    files = sorted((run / "data").glob("*.jsonl"))
    if not files:
        raise ValueError(f"{run} has no data/*.jsonl: give the folder of a pipeline that made data (RUNS_DIR/NAME)")
    return [trace_file(file, run) for file in files]


def trace_file(file: Path, run: Path) -> Traced:
    rows, name = read_rows(file), file.stem
    noted = config_of(file.with_name(f"{name}.config.yaml"))
    samples = sampled_rows(file.parent / "shards", name)
    sources: dict[tuple[str, str], str] = {}
    for number, row in enumerate(rows, 1):
        where = f"{file}:{number}"
        if conversation_id(row.messages) != row.id:
            raise ValueError(f"{where}: the messages do not have the row's id {row.id}: they were changed")
        if row.config_hash != noted[0]:
            raise ValueError(
                f"{where}: made under config {row.config_hash}, but {name}.config.yaml is config {noted[0]}"
            )
        check_sample(row, samples, where)
        key = (row.checkpoint, row.tokenizer)
        if key not in sources:
            sources[key] = checkpoint_source(row, run, where)
    summary = check_tables(file, rows)
    reasons = [reason for reasons in summary["dropped"].values() for reason in reasons.items()]
    dropped: dict[str, int] = {}
    for reason, count in reasons:
        dropped[reason] = dropped.get(reason, 0) + count
    sampled = sum(summary["sampled"].values())
    passed = sampled - sum(
        n for r, n in dropped.items() if r in ("low_reward", "truncated") or r.startswith("failure_")
    )
    return Traced(
        name=name, rows=len(rows), sampled=sampled, passed=passed, dropped=dropped, sources=tuple(sources.values())
    )


def config_of(path: Path) -> tuple[str, dict[str, Any]]:
    """(hash, values) of a resolved config that names its hash in the first line. Raises ValueError where the two do not agree."""
    import yaml

    if not path.is_file():
        raise ValueError(f"the config {path} is not there")
    text = path.read_text()
    words = text.partition("\n")[0].replace(",", " ").split()
    values = yaml.safe_load(text)
    if words[:2] != ["#", "config"] or len(words) < 3 or not isinstance(values, dict):
        raise ValueError(f"{path} is not a resolved config: its first line does not name a hash")
    if values_hash(values) != words[2]:
        raise ValueError(
            f"{path} says config {words[2]}, but its values are config {values_hash(values)}: it was changed"
        )
    return words[2], values


def sampled_rows(folder: Path, name: str) -> dict[tuple[str, int], Row]:
    """Every scored sample in the shards of a data file, by request and number. Raises ValueError for none and for a damaged shard."""
    shards = sorted(folder.glob(f"{name}@*/[0-9]*.jsonl"))
    if not shards:
        raise ValueError(f"the samples that {name} was chosen from are not there: {folder}/{name}@*/*.jsonl")
    found = [one for shard in shards for one in read_shard(shard)]
    return {(row.request_id, row.sample): row for one in found for row in one.rows if row is not None}


def check_sample(row: Row, samples: Mapping[tuple[str, int], Row], where: str) -> None:
    drawn = samples.get((row.request_id, row.sample))
    if drawn is None:
        raise ValueError(f"{where}: sample {row.request_id}/{row.sample} is in no shard")
    plain = {key: value for key, value in asdict(row).items() if key != "selection"}
    other = asdict(drawn)
    wrong = [key for key, value in plain.items() if json.dumps(value) != json.dumps(other[key])]
    if wrong:
        raise ValueError(f"{where}: {wrong[0]} is {plain[wrong[0]]!r}, but in its shard {other[wrong[0]]!r}")


def checkpoint_source(row: Row, run: Path, where: str) -> str:
    """The checkpoint of a row, whole, with the tokenizer and the run that the row names, and the base that this run began from."""
    from winnow.models.load import load_tokenizer

    folder = located(row.checkpoint, run)
    if folder is None:
        raise ValueError(f"{where}: the checkpoint {row.checkpoint} is not there")
    try:
        checkpoint = read_checkpoint(folder)
        hash_, values = config_of(folder.parent.parent / "config.yaml")
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    if checkpoint.meta.get("config") != hash_:
        raise ValueError(
            f"{where}: {folder} was saved by config {checkpoint.meta.get('config')}, but its run is config {hash_}"
        )
    if values["name"] != row.specialist:
        raise ValueError(f"{where}: made by {row.specialist}, but {folder} is of run {values['name']}")
    if row.tokenizer and (mine := tokenizer_hash(load_tokenizer(str(folder)))) != row.tokenizer:
        raise ValueError(f"{where}: made with tokenizer {row.tokenizer}, but {folder} has tokenizer {mine}")
    base = values["model"]["path"]
    if located(base, run) is None and "/" in base:
        raise ValueError(f"{where}: {folder} began from {base}, which is not there")
    return f"{row.checkpoint} (config {hash_}, from {base})"


def located(path: str, run: Path) -> Path | None:
    """A path that a run noted, also where the run's folder was moved since; None where it is not there."""
    parts = Path(path).parts
    moved = [run.joinpath(*parts[i + 1 :]) for i, part in enumerate(parts) if part == run.resolve().name]
    return next((place for place in (*moved, Path(path)) if place.exists()), None)


def check_tables(file: Path, rows: list[Row]) -> dict[str, Any]:
    """The summary, once Parquet and summary are found to hold what the JSONL holds. Raises ValueError."""
    summary = json.loads(file.with_name(f"{file.stem}.summary.json").read_text())
    for domain, count in summary["sampled"].items():
        own = sum(row.domain == domain for row in rows)
        left = sum(summary["dropped"].get(domain, {}).values())
        if not own == summary["kept"].get(domain, 0) == count - left:
            raise ValueError(
                f"{file}: {own} rows of {domain}, but the summary keeps {summary['kept'].get(domain, 0)} and drops {left} of {count}"
            )
    parquet = file.with_suffix(".parquet")
    if parquet.is_file():
        import pyarrow.parquet

        try:
            ids = pyarrow.parquet.read_table(parquet, columns=["id"]).column("id").to_pylist()
        except (OSError, ValueError, KeyError) as error:  # pyarrow's own errors are of these kinds
            raise ValueError(f"{parquet} is damaged: {error}. Delete it; {file.name} holds the same rows") from None
        if ids != [row.id for row in rows]:
            raise ValueError(f"{parquet} does not hold the rows of {file.name}")
    return summary


def trace_lines(run: Path) -> Iterator[str]:
    """What `winnow report RUN --provenance` prints."""
    for one in trace_run(run):
        share = one.passed / max(1, one.sampled)
        left = ", ".join(f"{count} {reason}" for reason, count in sorted(one.dropped.items())) or "nothing"
        yield f"{one.name}: {one.rows} rows, each from a sample, a config and a checkpoint that are there"
        yield f"  verified {one.passed} of {one.sampled} samples ({share:.1%}); left out: {left}"
        yield from (f"  {source}" for source in one.sources)
