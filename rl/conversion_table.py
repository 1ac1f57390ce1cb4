"""The table of `winnow convert --table` as text: a line of progress a row, and table.md."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def needle_means(found: Mapping[str, Any] | None) -> str:
    """Share found by length, of each selector."""
    if found is None:
        return "-"
    kinds = [name for name in ("dense", "sparse", "random", "recent") if any(name in r for r in found["lengths"])]
    return "; ".join(
        f"{name} " + " ".join(f"{r['length']}: {r[name]['mean']:.3f}" for r in found["lengths"]) for name in kinds
    )


def as_line(row: Mapping[str, Any], control: Mapping[str, Any]) -> str:
    """A row in one line of progress."""
    over = 100 * (row["perplexity"] / control["perplexity"] - 1)
    kept = kept_needles(row, control)
    parts = [f"{row['name']}: perplexity {row['perplexity']:.3f} ({over:+.2f} %)"]
    parts += [f"recall {row['recall']:.3f}"] if row.get("recall") is not None else []
    parts += [f"needles {needle_means(row.get('needles'))}", f"kept {'-' if kept is None else format(kept, '.3f')}"]
    parts += [f"{key} {row[key]}" for key in ("warmup_seconds", "train_seconds", "report_seconds") if key in row]
    return ", ".join(parts)


def as_sparse(found: Mapping[str, Any] | None, name: str) -> dict[str, Any] | None:
    """The needles of a floor, in the place of the sparse model's."""
    if found is None:
        return None
    return {**found, "lengths": [{**row, "sparse": row[name]} for row in found["lengths"]]}


def kept_needles(row: Mapping[str, Any], control: Mapping[str, Any]) -> float | None:
    """The smallest share, over lengths, of the needles that the dense control finds where it finds at least half."""
    if not row.get("needles") or not control.get("needles"):
        return None
    dense = {r["length"]: r["dense"]["mean"] for r in control["needles"]["lengths"]}
    shares = [
        r["sparse"]["mean"] / dense[r["length"]]
        for r in row["needles"]["lengths"]
        if "sparse" in r and dense.get(r["length"], 0) >= 0.5
    ]
    return min(shares) if shares else None


def as_markdown(result: Mapping[str, Any]) -> str:
    """The table, each row against the dense control."""
    control = result["rows"][0]
    lines = [
        f"held-out perplexity before anything {result['before']:.3f}; {result['seconds']} s in all",
        "",
        "| | k | perplexity | over dense | recall | needles, share of dense | worst layers | s |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in result["rows"]:
        over = f"{100 * (row['perplexity'] / control['perplexity'] - 1):+.2f} %"
        recall = f"{row['recall']:.3f}" if row.get("recall") is not None else "-"
        kept = kept_needles(row, control)
        worst = ", ".join(f"{w['layer']} ({w['recall']:.2f})" for w in row.get("worst_layers", [])) or "-"
        share_text = "-" if kept is None else f"{kept:.3f}"
        cells = [
            row["name"],
            row["k"] or "-",
            f"{row['perplexity']:.3f}",
            over,
            recall,
            share_text,
            worst,
            round(sum(row.get(part, 0.0) for part in ("train_seconds", "report_seconds")), 1) or "-",
        ]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    if result.get("missing"):
        lines += ["", "not made, for lack of time: " + ", ".join(result["missing"])]
    found = (control.get("needles") or {}).get("lengths", [])
    if found:
        lines += ["", "dense needles: " + ", ".join(f"{r['length']} tokens {r['dense']['mean']:.3f}" for r in found)]
    return "\n".join(lines) + "\n"
