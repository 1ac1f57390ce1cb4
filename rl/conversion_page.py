"""A conversion as a page, and as a section of a pipeline's page: stages, perplexity by position, recall, needles, cost."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from winnow.rl.charts import Series, line_chart
from winnow.rl.report import card, details, grid, section, table
from winnow.rl.report_style import page

NAMES = ("dense", "sparse", "random", "recent")


def write_page(path: Path, report: Mapping[str, Any]) -> Path:
    """The page of a conversion's or a retention report."""
    kept = report.get("retention", report)
    facts = [f"top_k {kept['top_k']}", f"{kept['tokens']:,} held-out tokens"]
    if "seconds" in report:
        facts.append(f"{report['seconds']:.0f} s")
    path.write_text(page(str(report["model"]), " · ".join(facts), "\n".join(sections(report))), encoding="utf-8")
    return path


def sections(report: Mapping[str, Any]) -> Iterator[str]:
    """What `report` has of them; a pipeline's short report has stages, perplexity and recall."""
    kept = report.get("retention", report)
    yield section(
        "Conversion to sparse attention",
        grid([*stage_cards(report), *recall_cards(kept)]) + perplexity_table(report, kept),
    )
    if kept.get("positions"):
        yield section("Perplexity by position", positions_table(kept["positions"]))
    if kept.get("needles", {}).get("lengths"):
        yield section("Needles", needles(kept["needles"]))
    if kept.get("cost"):
        yield section("Cost", cost(kept["cost"]))


def stage_cards(report: Mapping[str, Any]) -> Iterator[str]:
    warm, sparse = report.get("warmup", {}), report.get("sparse", {})
    for title, note, values in (
        ("Warm-up", "KL of the indexer to dense attention, per batch", warm.get("kl", [])),
        ("Sparse stage, indexer", "KL over the chosen set", sparse.get("kl", [])),
        ("Sparse stage, model", "language loss", sparse.get("loss", [])),
    ):
        if values:
            yield card(title, note, line_chart([Series("", range(1, len(values) + 1), values)], label=title))
    points = [
        Series(name, [s for s, _ in curve], [r for _, r in curve])
        for name, curve in (("warm-up", warm.get("recall", [])), ("sparse", sparse.get("recall", [])))
        if curve
    ]
    if points:
        yield card(
            "Recall while training",
            "of one held-out text, mean over layers",
            line_chart(points, label="recall by step"),
        )


def recall_cards(kept: Mapping[str, Any]) -> Iterator[str]:
    layers = [Series(name, range(len(r["layers"])), r["layers"]) for name, r in kept["recall"].items() if r["layers"]]
    worst = ", ".join(f"{w['layer']} ({w['recall']:.3f})" for w in kept.get("worst_layers", []))
    note = "what the chosen positions hold of dense attention" + (f"; worst layers {worst}" if worst else "")
    yield card("Recall of attention mass by layer", note, line_chart(layers, label="recall by layer"))


def perplexity_table(report: Mapping[str, Any], kept: Mapping[str, Any]) -> str:
    rows = []
    if "dense_before" in report:
        rows.append(["before (dense)", f"{report['dense_before']['perplexity']:.3f}", "-"])
    for name, value in kept["perplexity"].items():
        mean = (kept["recall"].get("indexer" if name == "sparse" else name) or {}).get("mean")
        rows.append([name, f"{value:.3f}", f"{mean:.3f}" if mean is not None else "-"])
    return table(("attention", "perplexity", "recall"), rows)


def positions_table(positions: list[Mapping[str, Any]]) -> str:
    def cell(value: float | None) -> str:
        return "-" if value is None else f"{value:.3f}"

    rows = []
    for bucket in positions:
        dense, sparse = bucket.get("dense"), bucket.get("sparse")
        cost = f"{100 * (sparse / dense - 1):+.2f} %" if dense and sparse else "-"
        rows.append([f"{bucket['from']} – {bucket['to']}", *(cell(bucket.get(name)) for name in NAMES), cost])
    return table(("positions", *NAMES, "sparse over dense"), rows)


def needles(found: Mapping[str, Any]) -> str:
    rows = found["lengths"]
    lines = [
        Series(name, [r["length"] for r in rows], [r[name]["mean"] for r in rows if name in r])
        for name in NAMES
        if name in rows[0]
    ]
    last = rows[-1]
    depths = [Series(name, range(len(last[name]["depths"])), last[name]["depths"]) for name in NAMES if name in last]
    cells = [[r["length"], r["needles"], *(f"{r[n]['mean']:.3f}" if n in r else "-" for n in NAMES)] for r in rows]
    kept = (
        "dense attention finds less than half everywhere"
        if found["kept"] is None
        else f"least share of dense: {found['kept']:.3f}"
    )
    return (
        f"<p>{found['num_needles']} numbered facts in a text, all asked for at its end; found when greedy decoding writes the number. "
        f"Where dense attention finds half: {kept}.</p>"
        + grid([card("By length", "share found", line_chart(lines, bounds=(0, 1), label="needles found by length")),
                card("By depth", f"share found, {last['length']} tokens", line_chart(depths, bounds=(0, 1), label="needles by depth"))])
        + details("The figures", table(("length", "needles", *NAMES), cells))
    )  # fmt: skip


def cost(curves: Mapping[str, Any]) -> str:
    cards, rows = [], []
    for kind in ("prefill", "decode"):
        lines = [Series(name, curves["lengths"], curves[kind][name]) for name in ("dense", "sparse")]
        even = curves["break_even"][kind]
        note = f"sparse costs less from {even} tokens on" if even else "dense costs less at every length measured"
        cards.append(
            card(kind.capitalize(), f"µs per token; {note}", line_chart(lines, label=f"{kind} cost by length"))
        )
    for i, length in enumerate(curves["lengths"]):
        row = [length]
        for kind in ("prefill", "decode"):
            dense, sparse = curves[kind]["dense"][i], curves[kind]["sparse"][i]
            row += [f"{dense:.1f}", f"{sparse:.1f}", f"{dense / sparse:.2f}"]
        rows.append([*row, curves["batch"][i]])
    head = ("length", "prefill dense µs", "sparse", "ratio", "decode dense µs", "sparse", "ratio", "batch of decode")
    return grid(cards) + details("The figures", table(head, rows))
