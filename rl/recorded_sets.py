"""Index sets of a trained indexer, recorded for the kernels' benchmark: python -m winnow.rl.recorded_sets MODEL OUT --text HELD [...]

    load a converted model ─> its RoPE stretched to the longest text ─> a warm-up of its indexers there ─> sets of whole texts ─> OUT

The model attends densely while the sets are chosen, so that stretched positions, which it was not trained on sparsely, do not feed on
themselves. RoPE is stretched by its base, theta * s^(D / (D - 2)) with s = longest / the model's context ("NTK-aware" scaling), and the
warm-up trains the indexers only, on texts of the longest length. OUT/<length>-layer<i>.pt holds {"indices" int32 [length, k], "about"}:
what `python -m winnow.kernels.bench_train --sets OUT` reads; OUT/about.json says how all of it was made.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from winnow.kernels.selection import Selection
from winnow.models.attach import freeze, indexer_config, indexer_parameters
from winnow.models.context import LayerInputs, train_context
from winnow.models.forward import hidden_states
from winnow.models.load import load, load_tokenizer
from winnow.rl import convert_data
from winnow.rl.convert_options import ConvertOptions
from winnow.rl.retention import RecallMeter
from winnow.rl.stages import warm_up


def set_top_k(model: Any, top_k: int) -> None:
    """Every indexer of the model keeps `top_k` positions from now on."""
    shape = indexer_config(model)
    assert shape is not None, "sets are recorded from a converted model"
    for layer in model.get_decoder().layers:
        indexer = getattr(layer.self_attn, "indexer", None)
        if indexer is not None:
            indexer.config = dataclasses.replace(indexer.config, top_k=top_k)
    model.config.winnow = {**model.config.winnow, "top_k": top_k}


def stretch_rope(model: Any, length: int) -> float:
    """Raise the base of RoPE so that contexts of `length` tokens turn no further than the model's own; returns the factor of the base."""
    factor = length / model.config.max_position_embeddings
    if factor <= 1:
        return 1.0
    rope = model.get_decoder().rotary_emb
    width = 2 * len(rope.inv_freq)
    places = torch.arange(0, width, 2, dtype=torch.float32, device=rope.inv_freq.device) / width
    grown = factor ** (width / (width - 2))
    with torch.no_grad():
        rope.inv_freq.mul_(grown**-places)
    model.config.max_position_embeddings = length
    return float(grown)


class Recorder(RecallMeter):
    """Keeps the sets of some layers of a dense pass, and measures their recall."""

    def __init__(self, layers: Sequence[int]) -> None:
        super().__init__(selectors=("indexer",))
        self.layers, self.sets = set(layers), {}

    sets: dict[int, Selection]

    def observe(self, inputs: LayerInputs, projected: tuple[Tensor, Tensor, Tensor] | None) -> None:
        if inputs.layer in self.layers:
            super().observe(inputs, projected)

    def chosen(self, selector: str, projected: Any, x: LayerInputs, positions: Tensor, top_k: int) -> Selection:
        found = super().chosen(selector, projected, x, positions, top_k)
        self.sets[x.layer] = found
        return found


def record(
    model: Any, train: Sequence[Sequence[int]], held: Sequence[int], out: Path, lengths: Sequence[int], layers: Sequence[int],
    options: ConvertOptions, progress: Callable[[str], object],
) -> dict[str, Any]:  # fmt: skip
    """Stretch, warm up, record; returns what about.json says. held: tokens of one text, at least as long as the longest length."""
    if len(held) < max(lengths):
        raise ValueError(
            f"the text to record has {len(held)} tokens, but --lengths asks for {max(lengths)}: give a longer one"
        )
    set_top_k(model, options.top_k)
    context = model.config.max_position_embeddings
    grown = stretch_rope(model, max(lengths))
    curves = warm_up(model, convert_data.batches(train, options.warmup_tokens, options.seed), options, progress)
    freeze(indexer_parameters(model))
    about: dict[str, Any] = {
        "top_k": options.top_k, "context": context, "rope_base_times": grown, "warmup": dataclasses.asdict(options),
        "kl": curves["kl"], "recall": {},
    }  # fmt: skip
    out.mkdir(parents=True, exist_ok=True)
    for length in lengths:
        watch = Recorder(layers)
        ctx = train_context([length], options.device, selector="dense", indexer_loss=watch)
        with torch.no_grad():
            hidden_states(model, torch.tensor(held[:length]).to(options.device), ctx)
        recall = dict(zip(sorted(watch.sets), watch.by_layer("indexer"), strict=True))
        about["recall"][length] = recall
        for layer, found in sorted(watch.sets.items()):
            note = f"{length} tokens, layer {layer}, recall {recall[layer]:.3f}"
            torch.save({"indices": found.indices.cpu(), "about": note}, out / f"{length}-layer{layer}.pt")
            progress(f"recorded {note}")
    (out / "about.json").write_text(json.dumps(about, indent=1) + "\n")
    return about


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m winnow.rl.recorded_sets", description=str(__doc__).splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("out", type=Path)
    parser.add_argument("--text", required=True, help="the text whose sets are recorded")
    parser.add_argument("--train", required=True, help="texts of the indexers' warm-up, as data= of winnow convert")
    parser.add_argument("--lengths", default="16384,65536")
    parser.add_argument("--layers", default="0,15,29")
    parser.add_argument("--k", type=int, default=2048)
    parser.add_argument("--batches", type=int, default=8, help="of one text each, two passes over each (8)")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", default="bfloat16")
    given = parser.parse_args(list(arguments))
    lengths = sorted(int(n) for n in given.lengths.split(","))
    begin = time.monotonic()

    def progress(text: str) -> None:
        print(f"[{time.monotonic() - begin:6.1f} s] {text}", file=sys.stderr, flush=True)

    options = ConvertOptions(
        top_k=given.k, seq_len=lengths[-1], warmup_batches=given.batches, warmup_tokens=lengths[-1], warmup_micro=lengths[-1],
        warmup_passes=2, warmup_lr=1e-3, device=given.device, dtype=given.dtype,
    )  # fmt: skip
    model, tokenizer = load(given.model, given.dtype, given.device), load_tokenizer(given.model)

    def tokens(source: str) -> list[list[int]]:
        texts = convert_data.read_documents(source)
        return [list(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts]

    train = [w for w in convert_data.windows(tokens(given.train), lengths[-1]) if len(w) == lengths[-1]]
    if not train:
        raise ValueError(f"--train holds no text of {lengths[-1]} tokens: give a longer one")
    progress(f"{len(train)} texts of {lengths[-1]} tokens for the warm-up")
    held = max(tokens(given.text), key=len)
    record(model, train, held, given.out, lengths, [int(n) for n in given.layers.split(",")], options, progress)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
