"""`winnow bench sparse-dense`: the same model, seed and task with sparse and with dense attention in rollout and learner, at long context.

    --text ─ needle_tasks ─> OUT/tasks-N-HASH.jsonl ─ the ablation's runs, variants sparse and dense ─> OUT/table.md, table.json, *.svg

The table has the reward curves' difference, prompt by prompt with its interval, the seconds of a step by part, and reward by generated tokens.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

VARIANTS = ("sparse", "dense")
CONFIG = "sparse_dense"
FACTS = 16  # in a text, or one for every hundred tokens
SPARE = 1.5  # rows over tasks: one in five is held out, whatever is asked
CHARACTERS = 400_000  # of a text that are read at most


def bench_sparse_dense(arguments: Any, say: Callable[[str], object]) -> dict[str, Any]:
    """By parsed arguments: `--lengths N` is the longest sequence (the model's context), prompt and reply together."""
    from winnow.rl.bench_ablation import Ablation, overrides_of
    from winnow.rl.verbs import find_config

    a = arguments
    if not (a.model and a.text and a.out):
        raise ValueError(
            "bench sparse-dense needs --model (a converted folder), --text (any plain text, the facts' haystack) and --out (a folder)"
        )
    config = find_config(a.config or CONFIG)
    length = a.lengths[0] if a.lengths else context_of(a.model)
    tasks = tasks_of(config, a.model, Path(a.text), Path(a.out), length, overrides_of(a), say)
    return Ablation(
        config=config, out=Path(a.out), variants=a.only or VARIANTS, seeds=a.seeds or (0, 1), device=a.device, parallel=a.parallel,
        overrides=[f"domains.0.source={tasks}", *overrides_of(a)], limit_s=a.limit_s, say=say,
    ).run()  # fmt: skip


def context_of(model: str) -> int:
    from winnow.models.load import read_config, resolve

    return int(read_config(resolve(model)).max_position_embeddings)


def tasks_of(
    config: Path, model: str, text: Path, out: Path, length: int, overrides: list[str], say: Callable[[str], object]
) -> Path:
    """The tasks' file for these sizes; written unless it is there. ValueError for lengths that are not above top_k."""
    from winnow.models.load import load_tokenizer
    from winnow.rl.ablation_table import top_k_of
    from winnow.rl.config import make_config, read_values
    from winnow.rl.lineage import tokenizer_hash
    from winnow.rl.needle_tasks import NeedleTasks, write_tasks

    (domain,) = make_config(read_values(config), ["domains.0.source=tasks", *overrides]).domains
    top_k = top_k_of(model)
    if not top_k or length - domain.max_tokens <= top_k:
        raise ValueError(
            f"bench sparse-dense: {model} has top_k {top_k} and sequences have {length} tokens, so nothing would be sparse: give a converted "
            "folder, or longer --lengths"
        )
    room, count = length - domain.max_tokens, int(SPARE * (domain.count + domain.holdout))
    options = NeedleTasks(tokens=room, facts=max(2, min(FACTS, room // 100)))
    read, tokenizer = text.read_text(encoding="utf-8", errors="replace")[:CHARACTERS], load_tokenizer(model)
    made_of = hashlib.sha256(f"{options} {count} {tokenizer_hash(tokenizer)} {read}".encode()).hexdigest()
    path = out / f"tasks-{length}-{made_of[:8]}.jsonl"
    if not path.is_file():
        say(f"{count} tasks of at most {options.tokens} tokens")
        write_tasks(tokenizer, read, options, count, path)
    return path
