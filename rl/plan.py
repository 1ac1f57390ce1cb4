"""What `--dry-run` prints: the resolved config, where its processes go, and how much memory they will want. Starts nothing."""

from __future__ import annotations

import json
import math
import os
import struct
from pathlib import Path
from typing import Any

from winnow.rl.cluster import HERE
from winnow.rl.config import Config, to_yaml
from winnow.rl.placement import bundles
from winnow.rl.transports import transport_of

BYTES = {"float32": 4, "bfloat16": 2}
ACTIVATIONS = 40  # numbers kept for the backward pass per token, layer and hidden unit; a dozen with checkpointing
CHECKPOINTED = 2
HEAD_BYTES = 3 << 28  # a chunk's logits, probabilities and gradient; the head never holds more
GIB = 1 << 30


def describe_plan(config: Config) -> str:
    """The whole plan as text. A model that is not there (yet) is said to be so instead of estimated."""
    return "\n".join(
        [
            "# resolved config",
            to_yaml(config).rstrip(),
            "",
            "# placement",
            *placement(config),
            "",
            "# memory",
            *memory(config),
        ]
    )


def placement(config: Config) -> list[str]:
    """One line a process."""
    ranks = config.learner.ranks
    learners = ["learner"] if ranks == 1 else [f"learner rank {i}" for i in range(ranks)]
    workers = [f"rollout worker {i}" for i in range(config.rollout.workers)]
    names = [*learners, *workers]
    if config.cluster.colocate:
        count = len(bundles(config))
        names = [" with ".join([*learners[number::count], *workers[number::count]]) for number in range(count)]
    if config.cluster.address == HERE:
        device = "on the GPU" if config.cluster.worker_gpus else "without a GPU"
        return [f"learner and engine by turns in this process, {device}; no Ray"]
    address = os.environ.get("RAY_ADDRESS") or config.cluster.address
    where = "Ray started on this machine" if address == "local" else f"the Ray cluster at {address}"
    lines = [
        f"{where}, placement group {config.cluster.strategy}, {sum(b.get('CPU', 0) for b in bundles(config)):.0f} CPUs in all"
    ]
    for name, bundle in zip(names, bundles(config), strict=True):
        lines.append(f"  {name}: " + ", ".join(f"{amount:g} {kind}" for kind, amount in bundle.items()))
    return [*lines, f"  weights travel by {transport_of(config)} (cluster.transport: {config.cluster.transport})"]


def memory(config: Config) -> list[str]:
    """Estimates of the learner's and of one worker's memory, with what they are made of."""
    shape = read_shape(config.model.path)
    if shape is None:
        return [f"  not known: {config.model.path} is not a folder on this machine yet"]
    size = BYTES[config.model.dtype]
    weights = shape["parameters"] * size
    kept = CHECKPOINTED if config.learner.checkpointing else ACTIVATIONS
    activations = config.learner.micro_tokens * shape["layers"] * shape["hidden"] * kept * size
    masters = 0 if size == 4 else shape["parameters"] * 4
    sums = shape["parameters"] * 4 * (1 + (len(config.domains) > 1))  # fp32; one more of each domain by itself
    learner = {
        "weights": weights, "masters": masters, "gradients": sums + (0 if size == 4 else weights), "AdamW": shape["parameters"] * 8,
        "activations": activations, "head": min(HEAD_BYTES, 12 * config.learner.micro_tokens * shape["vocabulary"]),
    }  # fmt: skip
    if config.reference_path:
        learner["reference"] = weights
    split = config.learner.ranks
    whole = ("activations", "head")  # a rank's micro-batches are its own, the rest is split
    learner = {part: amount if part in whole else amount / split for part, amount in learner.items() if amount}
    tokens = config.rollout.cache_tokens
    cache = tokens * shape["layers"] * (2 * shape["kv_width"] * size + shape["index_width"] * 4)
    worker = {"weights": weights, f"cache of {tokens:,} tokens": cache}
    lines = [
        f"  {shape['parameters'] / 1e6:.1f} M parameters, {shape['layers']} layers, hidden {shape['hidden']} (an estimate, not a measurement)"
    ]
    for name, parts in (("learner" if split == 1 else "each learner rank", learner), ("each rollout worker", worker)):
        total = " + ".join(f"{part} {amount / GIB:.2f}" for part, amount in parts.items())
        lines.append(f"  {name}: {sum(parts.values()) / GIB:.2f} GiB = {total}")
    share = config.cluster.learner_gpus + config.cluster.worker_gpus
    if config.cluster.worker_gpus and (share <= 1 or config.cluster.address == HERE):
        both = (sum(learner.values()) + sum(worker.values())) / GIB
        lines.append(
            f"  one GPU holds both: {both:.2f} GiB; rollout.num_pages and learner.micro_tokens divide it between them"
        )
    return lines


def read_shape(path: str) -> dict[str, Any] | None:
    """Sizes of the model in a folder, from config.json and the safetensors headers; None where there is no such folder."""
    folder = Path(path).expanduser()
    if not (folder / "config.json").is_file():
        return None
    config = json.loads((folder / "config.json").read_text())
    heads = config.get("num_attention_heads", 1)
    head = config.get("head_dim") or config["hidden_size"] // heads
    return {
        "parameters": sum(count_parameters(file) for file in folder.glob("*.safetensors")),
        "layers": config["num_hidden_layers"],
        "hidden": config["hidden_size"],
        "vocabulary": config.get("vocab_size", 0),
        "kv_width": kv_width(config, head),
        "index_width": (config.get("winnow") or {}).get("head_dim") or config.get("index_head_dim", 0),
    }


def kv_width(config: dict[str, Any], head: int) -> float:
    """Half the numbers that a token takes in the cache of one layer: those of K, or half of MLA's latent."""
    if "kv_lora_rank" in config:
        return (config["kv_lora_rank"] + config["qk_rope_head_dim"]) / 2
    return head * (config.get("num_key_value_heads") or config.get("num_attention_heads", 1))


def count_parameters(file: Path) -> int:
    """The numbers in a safetensors file, from its header alone: 8 bytes of length, then JSON with every tensor's shape."""
    with file.open("rb") as stream:
        header = json.loads(stream.read(struct.unpack("<Q", stream.read(8))[0]))
    return sum(math.prod(entry["shape"]) for name, entry in header.items() if name != "__metadata__")
