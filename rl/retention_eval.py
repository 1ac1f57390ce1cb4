"""`winnow eval MODEL --retention --text FILE`: the report that a conversion ends with, for any converted or native model and any text."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from winnow.models.attach import indexer_config
from winnow.models.load import load, load_tokenizer
from winnow.rl import convert_data
from winnow.rl.conversion_page import write_page
from winnow.rl.convert import full_report, summary
from winnow.rl.convert_options import ConvertOptions

TOKENS = 16  # texts of --length tokens that are read


def evaluate_retention(arguments: argparse.Namespace, progress: Callable[[str], object]) -> str:
    """Writes NAME.retention.json and .html beside it (or at --out); returns a summary. ValueError for a dense model or too short a text."""
    begin = time.monotonic()
    if not arguments.text:
        raise ValueError(
            "--retention needs --text: a text file, JSONL, a folder or hub:name that the model was not trained on"
        )
    torch.set_num_threads(arguments.threads)
    model = load(arguments.model, arguments.dtype, arguments.device)
    shape = indexer_config(model)
    if shape is None:
        raise ValueError(f"{arguments.model} is a dense model: there is nothing to compare; run `winnow convert` first")
    if arguments.length <= shape.top_k:
        raise ValueError(
            f"--length is {arguments.length}, but the model keeps top_k={shape.top_k} positions: every set would be the whole context; "
            "give a length of several times top_k"
        )
    tokenizer = load_tokenizer(arguments.model)
    texts = convert_data.read_documents(arguments.text)
    documents = convert_data.tokenize(texts, tokenizer, TOKENS * arguments.length, arguments.seed, arguments.length)
    held = [w for w in convert_data.windows(documents, arguments.length) if len(w) > shape.top_k][:TOKENS]
    if not held:
        raise ValueError(f"{arguments.text} holds no text of more than top_k={shape.top_k} tokens: give a longer one")
    options = ConvertOptions(top_k=shape.top_k, seq_len=arguments.length, seed=arguments.seed, device=arguments.device)
    report: dict[str, Any] = {
        "model": str(arguments.model),
        "retention": full_report(model, tokenizer, held, options, progress),
    }
    report["seconds"] = round(time.monotonic() - begin, 1)
    out = Path(arguments.out or f"{Path(arguments.model).name}.retention.json")
    out.write_text(json.dumps(report, indent=1) + "\n")
    return f"{summary(report)}\n{out}, {write_page(out.with_suffix('.html'), report)}"
