"""What each part of the recipe is worth, as one table: `winnow convert MODEL OUT --table [key=value ...]`.

    warm-up (shared by every k: it is dense)
      ├─ sparse stage at each k          the recipe
      ├─ stop                            warm-up only
      └─ sparse stage, coupled           the KL's gradient reaches the model
    no warm-up ── sparse stage           random indexers
    IndexShare 1:2, 1:4 ── warm-up of their own ── sparse stage
    control: the dense model on the sparse stage's data and schedule: what every row is compared with
    floors: the recipe's model, attending to random and to the last k positions

With needle_steps= the dense model learns to find needles before all of this. Every row sees the same data in the same order.
OUT/table.json and OUT/table.md hold the table as far as it has come, OUT/k<first> the converted model. What is done lies in OUT/done, and
the same command goes on after it; --limit-s ends the table before a row that would not be done in time, and names the rows that are missing.
With --recipe-only there are the control and the recipe at each k, and no more. With --vary sparse_model_lr=5e-5,1e-4,2e-4 there are the
control and a row for each value: the sparse stage at the first k, from the same needles and warm-up.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from winnow.models.attach import base_parameters, indexer_parameters, strip
from winnow.models.load import save
from winnow.rl import convert_data, memory, share
from winnow.rl.conversion_table import as_line, as_markdown, as_sparse, needle_means
from winnow.rl.convert import (
    Progress,
    attach_indexers,
    conversion_key,
    load_dense,
    needles_that_fit,
    open_tokenizer,
    sequences,
    write_report_files,
)
from winnow.rl.convert_options import ConvertOptions
from winnow.rl.needle_stage import teach_needles
from winnow.rl.needles import needle_report
from winnow.rl.partial import make_key
from winnow.rl.retention import perplexity, retention_report
from winnow.rl.stages import dense_control, sparse_stage, warm_up
from winnow.rl.threads import torch_threads

SHARES = (2, 4)


class Table:
    """One model on one device, put back to its dense weights before every row."""

    def __init__(
        self, model_path: str, out: Path, options: ConvertOptions, ks: Sequence[int], progress: Progress, limit_s: float | None = None,
        recipe_only: bool = False, varied: Mapping[str, ConvertOptions] | None = None,
    ) -> None:  # fmt: skip
        if not ks or max(ks) >= options.seq_len:
            raise ValueError(
                f"the table's k are {list(ks)}, but each must be below seq_len={options.seq_len}, or nothing is selected"
            )
        self.begin, self.say, self.limit = time.monotonic(), progress, limit_s
        self.recipe_only, self.varied = recipe_only, dict(varied or {})
        self.name, self.out, self.ks = str(model_path), out, list(ks)
        self.options = dataclasses.replace(options, top_k=self.ks[0])
        torch.manual_seed(options.seed)
        self.model = load_dense(model_path, self.options)
        self.tokenizer = open_tokenizer(model_path, None)
        train, self.held = sequences(self.model, self.tokenizer, self.options, None, self.progress)
        self.train = whole(train, options.seq_len)
        self.done = Done(out / "done", make_key(of=conversion_key(model_path, self.options, None), ks=self.ks))
        self.original: dict[str, Tensor] = {}
        self.rows: list[dict[str, Any]] = []
        self.missing: list[str] = []
        self.before, self.slowest = 0.0, 0.0  # perplexity of the dense model; seconds of the slowest row

    @property
    def elapsed(self) -> float:
        return time.monotonic() - self.begin

    def progress(self, text: str) -> None:
        self.say(f"[{self.elapsed:6.1f} s] {text}")

    def run(self) -> dict[str, Any]:
        self.progress(f"{len(self.train)} sequences to train on, {len(self.held)} held out")
        self.base()
        self.before = perplexity(self.model, self.held, "dense")
        self.progress(f"dense perplexity {self.before:.3f}")
        for name, make in self.plan():
            self.take(name, make)
        return self.write()

    def plan(self) -> Iterator[tuple[str, Callable[[], list[dict[str, Any]]]]]:
        """Names and makers of the rows, the ones that matter most first."""
        first = self.options
        yield "dense, same training", self.control
        for change, options in self.varied.items():
            name = f"k {first.top_k}, {change}"
            yield name, partial(self.trained_row, name, dataclasses.replace(options, top_k=first.top_k))
        if self.varied:
            return
        for k in self.ks:
            yield f"recipe, k {k}", partial(self.recipe_rows, dataclasses.replace(first, top_k=k))
        if self.recipe_only:
            return
        yield "warm-up only", partial(self.trained_row, "warm-up only", first, sparse=False)
        yield "no warm-up", partial(self.trained_row, "no warm-up", first, warm=False)
        yield (
            "coupled gradients",
            partial(self.trained_row, "coupled gradients", dataclasses.replace(first, coupled=True)),
        )
        for n in SHARES:
            if n < self.model.config.num_hidden_layers:
                options = dataclasses.replace(first, index_share=n)
                yield f"IndexShare 1:{n}", partial(self.trained_row, f"IndexShare 1:{n}", options)

    def take(self, name: str, make: Callable[[], list[dict[str, Any]]]) -> None:
        """A row and its floors: out of OUT/done, or made now if the time allows."""
        found = self.done.read(name)
        if found is None:
            if self.limit is not None and self.rows and self.elapsed + 1.1 * self.slowest > self.limit:
                self.missing.append(name)
                self.progress(f"{name}: left out, its {self.slowest:.0f} s would pass the limit of {self.limit:.0f} s")
                return
            begin = time.monotonic()
            found = make()
            self.slowest = max(self.slowest, time.monotonic() - begin)
            self.done.write(name, found)
        self.rows += found
        self.write()
        for row in found:
            self.progress("ROW " + as_line(row, self.rows[0]))

    def write(self) -> dict[str, Any]:
        result = {
            "model": self.name, "before": self.before, "options": dataclasses.asdict(self.options),
            "train_tokens": sum(map(len, self.train)), "held_tokens": sum(map(len, self.held)), "rows": self.rows,
            "missing": self.missing, "seconds": round(self.elapsed, 1),
        }  # fmt: skip
        self.out.mkdir(parents=True, exist_ok=True)
        (self.out / "table.json").write_text(json.dumps(result, indent=1) + "\n")
        (self.out / "table.md").write_text(as_markdown(result))
        return result

    def base(self) -> None:
        """The common starting point: the dense model, taught the needle task where that is asked for."""
        if self.options.needle_steps:
            kept = self.done.tensors("base", self._taught)
            with torch.no_grad():
                for name, p in base_parameters(self.model).items():
                    p.copy_(kept[name])
        self.original = {name: p.detach().clone() for name, p in base_parameters(self.model).items()}

    def _taught(self) -> dict[str, Tensor]:
        if self.tokenizer is None:
            raise ValueError("convert.needle_steps needs a tokenizer, and the model's folder has none")
        self.progress(f"needles before: {needle_means(self.needles(('dense',)))}")
        teach_needles(self.model, self.tokenizer, self.train, self.options, self.progress)
        self.progress(f"needles after: {needle_means(self.needles(('dense',)))}")
        return {name: p.detach() for name, p in base_parameters(self.model).items()}

    def control(self) -> list[dict[str, Any]]:
        """The dense model, given the same extra training."""
        self.restore()
        stream = convert_data.batches(self.train, self.options.sparse_tokens, self.options.seed + 1)
        begin = time.monotonic()
        memory.reset_peak(self.options.device)
        dense_control(self.model, stream, self.options, self.progress)
        trained = time.monotonic() - begin
        row = {
            "name": "dense, same training", "k": None, "perplexity": perplexity(self.model, self.held, "dense"),
            "needles": self.needles(("dense",)), "peak_bytes": memory.measured_peak(self.options.device),
            "train_seconds": round(trained, 1), "seconds": round(time.monotonic() - begin, 1),
        }  # fmt: skip
        return [row]

    def warmed(self, options: ConvertOptions) -> tuple[Mapping[str, Any], float]:
        """Dense weights and indexers after their warm-up, which every k shares; returns its curves and seconds."""
        name = f"warm-up 1:{options.index_share}"
        self.fresh(options)
        indexers = indexer_parameters(self.model)
        curves: Mapping[str, Any] = {}
        begin = time.monotonic()

        def make() -> dict[str, Tensor]:
            stream = convert_data.batches(self.train, options.warmup_tokens, options.seed)
            found = warm_up(self.model, stream, options, lambda text: self.progress(f"1:{options.index_share} {text}"))
            self.done.write(name, [found | {"seconds": round(time.monotonic() - begin, 1)}])
            return {key: p.detach() for key, p in indexers.items()}

        kept = self.done.tensors(name, make)
        with torch.no_grad():
            for key, p in indexers.items():
                p.copy_(kept[key])
        curves = (self.done.read(name) or [{}])[0]
        return curves, float(curves.get("seconds", 0.0))

    def fresh(self, options: ConvertOptions) -> None:
        """Dense weights and new indexers."""
        self.restore()
        torch.manual_seed(options.seed)
        attach_indexers(self.model, options, self.held)

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

    def recipe_rows(self, options: ConvertOptions) -> list[dict[str, Any]]:
        """The recipe at one k, and its floors; the first k's model is saved."""
        name, k = f"recipe, k {options.top_k}", options.top_k
        warm, _ = self.warmed(options)
        curves, times = self.sparse(name, options)
        floors = () if self.recipe_only else ("random", "recent")
        row, kept = self.report(name, options, ("dense", "indexer", *floors))
        rows = [row | times]
        for floor in floors:
            rows.append({"name": f"{floor} {k}", "k": k, "perplexity": kept["perplexity"][floor],
                         "recall": kept["recall"][floor]["mean"], "needles": as_sparse(kept["needles"], floor)})  # fmt: skip
        if k == self.options.top_k:
            folder = save(self.model, self.tokenizer, self.out / f"k{k}")
            about = {"model": name, "options": dataclasses.asdict(options), "warmup": warm, "sparse": curves}
            write_report_files(folder, about | {"retention": kept})
        return rows

    def trained_row(
        self, name: str, options: ConvertOptions, *, warm: bool = True, sparse: bool = True
    ) -> list[dict[str, Any]]:
        if warm:
            self.warmed(options)
        else:
            self.fresh(options)
        times = self.sparse(name, options)[1] if sparse else {}
        if not warm:
            times.pop("warmup_seconds")
        return [self.report(name, options, ("dense", "indexer"))[0] | times]

    def sparse(self, name: str, options: ConvertOptions) -> tuple[dict[str, Any], dict[str, Any]]:
        """The sparse stage; returns its curves, and its seconds and peak."""
        begin = time.monotonic()
        memory.reset_peak(options.device)
        stream = convert_data.batches(self.train, options.sparse_tokens, options.seed + 1)
        curves = sparse_stage(self.model, stream, options, lambda text: self.progress(f"{name}: {text}"))
        peak, seconds = memory.measured_peak(options.device), round(time.monotonic() - begin, 1)
        warm = (self.done.read(f"warm-up 1:{options.index_share}") or [{}])[0].get("seconds", 0.0)
        return curves, {"peak_bytes": peak, "train_seconds": seconds, "warmup_seconds": warm}

    def report(
        self, name: str, options: ConvertOptions, selectors: Sequence[str]
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """(the row, the whole retention report with needles) of the model as it is."""
        begin = time.monotonic()
        kept = retention_report(self.model, self.held, selectors)
        kept["needles"] = self.needles(selectors)
        row = {
            "name": name, "k": options.top_k, "perplexity": kept["perplexity"]["sparse"], "recall": kept["recall"]["indexer"]["mean"],
            "own_dense": kept["perplexity"]["dense"], "recall_layers": kept["recall"]["indexer"]["layers"],
            "worst_layers": kept["worst_layers"], "positions": kept["positions"], "needles": kept["needles"],
            "report_seconds": round(time.monotonic() - begin, 1),
        }  # fmt: skip
        return row, kept

    def needles(self, selectors: Sequence[str]) -> dict[str, Any] | None:
        if self.tokenizer is None:
            return None
        longest = self.options.seq_len
        lengths = [n for n in (longest // 4, longest // 2, longest) if n > max(self.ks)]
        count = needles_that_fit(self.tokenizer, self.options)
        return needle_report(
            self.model, self.tokenizer, self.held, lengths, count, self.options.needle_texts, self.options.seed, selectors=selectors
        )  # fmt: skip


class Done:
    """What is finished, under a key of all that it was made from: rows as JSON, weights as torch files."""

    def __init__(self, folder: Path, key: str) -> None:
        self.folder, self.key = folder, key

    def read(self, name: str) -> list[dict[str, Any]] | None:
        file = self._file(name, "json")
        if not file.is_file():
            return None
        found = json.loads(file.read_text())
        return found["rows"] if found["key"] == self.key else None

    def write(self, name: str, rows: list[dict[str, Any]]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        scratch = self.folder / "scratch"
        scratch.write_text(json.dumps({"key": self.key, "rows": rows}) + "\n")
        os.replace(scratch, self._file(name, "json"))

    def tensors(self, name: str, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """What `make` returned the first time."""
        file = self._file(name, "pt")
        if file.is_file():
            found = torch.load(file, map_location="cpu", weights_only=True)
            if found["key"] == self.key:
                return dict(found["tensors"])
        made = make()
        self.folder.mkdir(parents=True, exist_ok=True)
        scratch = self.folder / "scratch"
        torch.save({"key": self.key, "tensors": made}, scratch)
        os.replace(scratch, file)
        return made

    def _file(self, name: str, suffix: str) -> Path:
        return self.folder / f"{re.sub(r'[^a-z0-9]+', '-', name.lower())}.{suffix}"


def whole(texts: list[list[int]], length: int) -> list[list[int]]:
    """The sequences of full length, where leaving out the others costs less than a quarter of the tokens: all steps are alike then."""
    full = [s for s in texts if len(s) == length]
    return full if sum(map(len, full)) > 0.75 * sum(map(len, texts)) else texts


def convert_table(
    model_path: str, out: str | Path, options: ConvertOptions, ks: Sequence[int], progress: Progress = print,
    limit_s: float | None = None, recipe_only: bool = False, varied: Mapping[str, ConvertOptions] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Runs the table, whole, down to the recipe, or over `varied` options by name; see the module's docstring. Raises ValueError before
    anything is trained."""
    assert max(SHARES) <= share.REACH
    with torch_threads(options.threads):
        return Table(model_path, Path(out), options, ks, progress, limit_s, recipe_only, varied).run()
