"""What each part of the recipe is worth, as one table: `winnow convert MODEL OUT --table [key=value ...]`.

    warm-up (shared by every k: it is dense)
      ├─ sparse stage at each k          the recipe
      ├─ stop                            warm-up only
      └─ sparse stage, coupled           the KL's gradient reaches the model
    no warm-up ── sparse stage           random indexers
    IndexShare 1:2, 1:4 ── warm-up of their own ── sparse stage
    control: the dense model on the sparse stage's data and schedule: what every row is compared with
    floors: the recipe's model, attending to random and to the last k positions

Every row sees the same data in the same order. OUT/table.json and OUT/table.md hold the table, OUT/k<first> the converted model.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from winnow.models.attach import base_parameters, indexer_parameters, strip
from winnow.models.load import save
from winnow.rl import convert_data, memory, share
from winnow.rl.convert import (
    Progress,
    attach_indexers,
    fast_matmul,
    load_dense,
    needles_that_fit,
    open_tokenizer,
    sequences,
    write_report_files,
)
from winnow.rl.convert_options import ConvertOptions
from winnow.rl.needles import needle_report
from winnow.rl.retention import perplexity, retention_report
from winnow.rl.stages import dense_control, sparse_stage, warm_up

SHARES = (2, 4)


class Table:
    """One model on one device, put back to its dense weights before every row."""

    def __init__(
        self, model_path: str, out: Path, options: ConvertOptions, ks: Sequence[int], progress: Progress
    ) -> None:
        if not ks or max(ks) >= options.seq_len:
            raise ValueError(
                f"the table's k are {list(ks)}, but each must be below seq_len={options.seq_len}, or nothing is selected"
            )
        self.name, self.out, self.ks, self.progress = str(model_path), out, list(ks), progress
        self.options = dataclasses.replace(options, top_k=self.ks[0])
        self.begin = time.monotonic()
        torch.manual_seed(options.seed)
        self.model = load_dense(model_path, self.options)
        self.tokenizer = open_tokenizer(model_path, None)
        self.train, self.held = sequences(self.model, self.tokenizer, self.options, None, progress)
        self.original = {name: p.detach().clone() for name, p in base_parameters(self.model).items()}
        self.rows: list[dict[str, Any]] = []

    def run(self) -> dict[str, Any]:
        with fast_matmul(self.options.device):
            before = perplexity(self.model, self.held, "dense")
            self.control()
            trained, warm = self.recipe(self.options)
            self.shared_rows(trained, warm)
            for n in SHARES:
                if n < self.model.config.num_hidden_layers:
                    options = dataclasses.replace(self.options, index_share=n)
                    self.recipe(options)
                    self.row(f"IndexShare 1:{n}", options, sparse=True)
        result = {
            "model": self.name, "before": before, "options": dataclasses.asdict(self.options),
            "train_tokens": sum(map(len, self.train)), "held_tokens": sum(map(len, self.held)), "rows": self.rows,
            "seconds": round(time.monotonic() - self.begin, 1),
        }  # fmt: skip
        self.out.mkdir(parents=True, exist_ok=True)
        (self.out / "table.json").write_text(json.dumps(result, indent=1) + "\n")
        (self.out / "table.md").write_text(as_markdown(result))
        self.progress(as_markdown(result))
        return result

    def control(self) -> None:
        """The dense model, given the same extra training."""
        stream = convert_data.batches(self.train, self.options.sparse_tokens, self.options.seed + 1)
        begin = time.monotonic()
        dense_control(self.model, stream, self.options, self.progress)
        needles = self.needles(("dense",))
        row = {
            "name": "dense, same training",
            "k": None,
            "perplexity": perplexity(self.model, self.held, "dense"),
            "needles": needles,
        }
        self.rows.append(row | {"seconds": round(time.monotonic() - begin, 1)})

    def recipe(self, options: ConvertOptions) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Dense weights, new indexers, warm-up. Returns the indexers' weights and the curves."""
        self.restore()
        torch.manual_seed(options.seed)
        attach_indexers(self.model, options, self.held)
        stream = convert_data.batches(self.train, options.warmup_tokens, options.seed)
        curves = warm_up(self.model, stream, options, self.progress)
        return {name: p.detach().clone() for name, p in indexer_parameters(self.model).items()}, curves

    def shared_rows(self, trained: Mapping[str, Tensor], warm: Mapping[str, Any]) -> None:
        """All rows that start from one warm-up with an indexer in every layer, and the one that goes without."""
        for k in self.ks:
            options = dataclasses.replace(self.options, top_k=k)
            self.again(options, trained)
            self.row(f"recipe, k {k}", options, sparse=True, floors=True, warm=warm)
        first = self.options
        self.again(first, trained)
        self.row("warm-up only", first, sparse=False)
        self.again(first, None)
        self.row("no warm-up", first, sparse=True)
        self.again(first, trained)
        self.row("coupled gradients", dataclasses.replace(first, coupled=True), sparse=True)

    def again(self, options: ConvertOptions, indexers: Mapping[str, Tensor] | None) -> None:
        """Dense weights and these indexers, or new ones."""
        self.restore()
        torch.manual_seed(options.seed)
        attach_indexers(self.model, options, self.held)
        if indexers is not None:
            with torch.no_grad():
                for name, p in indexer_parameters(self.model).items():
                    p.copy_(indexers[name])

    def restore(self) -> None:
        from winnow.models.attach import is_converted, use_winnow_attention

        if is_converted(self.model):
            strip(self.model)
            use_winnow_attention(self.model)
        with torch.no_grad():
            for name, p in base_parameters(self.model).items():
                p.copy_(self.original[name])
                p.requires_grad_(True)
                p.grad = None

    def row(
        self,
        name: str,
        options: ConvertOptions,
        *,
        sparse: bool,
        floors: bool = False,
        warm: Mapping[str, Any] | None = None,
    ) -> None:
        begin = time.monotonic()
        curves: dict[str, Any] = {}
        memory.reset_peak(options.device)
        if sparse:
            stream = convert_data.batches(self.train, options.sparse_tokens, options.seed + 1)
            curves = sparse_stage(self.model, stream, options, lambda text: self.progress(f"{name}: {text}"))
        peak = memory.measured_peak(options.device)
        kept = retention_report(self.model, self.held)
        selectors = ("dense", "indexer", "random", "recent") if floors else ("dense", "indexer")
        kept["needles"] = self.needles(selectors)
        row = {
            "name": name,
            "k": options.top_k,
            "perplexity": kept["perplexity"]["sparse"],
            "recall": kept["recall"]["indexer"]["mean"],
        }
        row |= {
            "own_dense": kept["perplexity"]["dense"],
            "worst_layers": kept["worst_layers"],
            "needles": kept["needles"],
        }
        self.rows.append(row | {"peak_bytes": peak, "seconds": round(time.monotonic() - begin, 1)})
        if floors:
            for floor in ("random", "recent"):
                self.rows.append({"name": f"{floor} {options.top_k}", "k": options.top_k, "perplexity": kept["perplexity"][floor],
                                  "recall": kept["recall"][floor]["mean"], "needles": _as_sparse(kept["needles"], floor)})  # fmt: skip
        if warm is not None and options.top_k == self.options.top_k:
            folder = save(self.model, self.tokenizer, self.out / f"k{options.top_k}")
            report = {
                "model": name,
                "options": dataclasses.asdict(options),
                "warmup": warm,
                "sparse": curves,
                "retention": kept,
            }
            write_report_files(folder, report)

    def needles(self, selectors: Sequence[str]) -> dict[str, Any] | None:
        if self.tokenizer is None:
            return None
        longest = self.options.seq_len
        lengths = [n for n in (longest // 4, longest // 2, longest) if n > max(self.ks)]
        count = needles_that_fit(self.tokenizer, self.options)
        return needle_report(
            self.model,
            self.tokenizer,
            self.held,
            lengths,
            count,
            self.options.needle_texts,
            self.options.seed,
            selectors=selectors,
        )


def _as_sparse(found: Mapping[str, Any] | None, name: str) -> dict[str, Any] | None:
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
            row.get("seconds", "-"),
        ]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    found = (control.get("needles") or {}).get("lengths", [])
    if found:
        lines += ["", "dense needles: " + ", ".join(f"{r['length']} tokens {r['dense']['mean']:.3f}" for r in found)]
    return "\n".join(lines) + "\n"


def convert_table(
    model_path: str, out: str | Path, options: ConvertOptions, ks: Sequence[int], progress: Progress = print
) -> dict[str, Any]:
    """Runs the whole table; see the module's docstring. Raises ValueError before anything is trained."""
    assert max(SHARES) <= share.REACH
    return Table(model_path, Path(out), options, ks, progress).run()
