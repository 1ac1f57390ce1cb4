"""What a conversion trains on: text files, JSONL, a hub data set, the model's own samples, or token lists given by a caller."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Packed:
    """Whole sequences back to back: tokens int64 [T], lengths of the sequences."""

    tokens: Tensor
    lengths: list[int]

    @property
    def next_token_rows(self) -> Tensor:
        """Rows int64 whose next token is in the same sequence."""
        ends = torch.tensor(self.lengths).cumsum(0) - 1
        keep = torch.ones(len(self.tokens), dtype=torch.bool)
        keep[ends] = False
        return keep.nonzero()[:, 0]


def read_documents(source: str, field: str = "text") -> list[str]:
    """The texts of a .txt or .md file, a .jsonl file (its `field`), a folder of those, or a hub data set "hub:name[:split]"; several
    with commas between them."""
    if "," in source and not Path(source).exists():
        return [text for part in source.split(",") for text in read_documents(part.strip(), field)]
    if source.startswith("hub:"):
        return _hub_documents(source, field)
    path = Path(source).expanduser()
    if path.is_dir():
        files = sorted(p for p in path.iterdir() if p.suffix in (".txt", ".md", ".jsonl"))
        if not files:
            raise ValueError(f"data folder {source} holds no .txt, .md or .jsonl file")
        return [text for file in files for text in read_documents(str(file), field)]
    if not path.exists():
        raise ValueError(
            f"data {source!r} does not exist: give a text file, a JSONL file, a folder, 'hub:name' or 'self'"
        )
    if path.suffix != ".jsonl":
        return [path.read_text(encoding="utf-8", errors="replace")]
    texts = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{source}:{number}: not JSON: {error}") from error
        if not isinstance(row, dict) or not isinstance(row.get(field), str):
            names = sorted(row) if isinstance(row, dict) else type(row).__name__
            raise ValueError(f"{source}:{number}: no text field {field!r} (the row has {names}); set data_field")
        texts.append(row[field])
    return texts


def _hub_documents(source: str, field: str) -> list[str]:
    from datasets import load_dataset

    name, _, split = source.removeprefix("hub:").partition(":")
    rows = load_dataset(name, split=split or "train")
    if field not in rows.column_names:
        raise ValueError(f"hub data set {name!r} has no column {field!r}, only {rows.column_names}; set data_field")
    return [str(text) for text in rows[field]]


def tokenize(texts: Sequence[str], tokenizer: Any, num_tokens: int, seed: int, longest: int = 0) -> list[list[int]]:
    """About `num_tokens` tokens of the texts: short ones whole, a long one in pieces drawn from all over it, each of two sequences of
    `longest` tokens or more."""
    rng = random.Random(seed)
    total = sum(len(text) for text in texts)
    size = max(20_000, 10 * longest)  # characters
    pieces = [text[i : i + size] for text in texts for i in range(0, len(text), size)]
    if total > 12 * num_tokens or (
        len(texts) > 1 and total > 3 * num_tokens
    ):  # a page of a library, and not of its first book
        rng.shuffle(pieces)
    documents: list[list[int]] = []
    count = 0
    for piece in pieces:
        if count >= num_tokens:
            break
        documents.append(list(tokenizer(piece, add_special_tokens=False)["input_ids"]))
        count += len(documents[-1])
    return documents


class Window(list[int]):
    """A part of a document. rest: what follows there, as many tokens at most."""

    rest: Sequence[int] = ()

    def elsewhere(self, rng: random.Random) -> list[int]:
        """As many tokens that begin somewhere within it; itself where the document ends with it."""
        start = rng.randint(0, min(len(self.rest), len(self) - 1))
        return [*self[start:], *self.rest[:start]]


def windows(documents: Sequence[Sequence[int]], length: int, shortest: int = 8) -> list[list[int]]:
    """Cut documents into `Window`s of at most `length` tokens; tails below `shortest` tokens are dropped."""
    cut: list[list[int]] = []
    for document in documents:
        for i in range(0, len(document), length):
            window = Window(document[i : i + length])
            window.rest = document[i + length : i + 2 * length]
            if len(window) >= shortest:
                cut.append(window)
    return cut


def pack(sequences: Sequence[Sequence[int]]) -> Packed:
    return Packed(
        torch.tensor([token for s in sequences for token in s], dtype=torch.int64), [len(s) for s in sequences]
    )


def split_holdout(sequences: list[list[int]], tokens: int, seed: int) -> tuple[list[list[int]], list[list[int]]]:
    """(train, held out): about `tokens` held out, never more than a fifth, at least one sequence of two."""
    if len(sequences) < 2:
        raise ValueError(
            f"a conversion needs at least two sequences, got {len(sequences)}: give more text or a smaller seq_len"
        )
    order = list(range(len(sequences)))
    random.Random(seed).shuffle(order)
    held: list[list[int]] = []
    count = 0
    while order and (not held or (count < tokens and len(held) + 1 <= len(sequences) // 5)):
        held.append(sequences[order.pop()])
        count += len(held[-1])
    train, unseen = [sequences[i] for i in order], {tuple(window) for window in held}
    for window in train:
        if isinstance(window, Window) and tuple(window.rest) in unseen:  # or a window cut elsewhere would show it
            window.rest = ()
    return train, held


def first_tokens(sequences: list[list[int]], tokens: int) -> list[list[int]]:
    """Whole sequences from the front, about `tokens` tokens, at least one. ValueError when there are none."""
    if not sequences:
        raise ValueError("the held-out data hold no sequence: give more text")
    kept: list[list[int]] = []
    count = 0
    for sequence in sequences:
        if kept and count >= tokens:
            break
        kept.append(sequence)
        count += len(sequence)
    return kept


def with_needles(
    sequences: list[list[int]], tokenizer: Any, share: float, num_needles: int, seed: int
) -> list[list[int]]:
    """The sequences, `share` of those with room for it made into texts with facts and questions (`needles.py`).

    Each holds `num_needles` of them or more, up to a quarter of its tokens: only the questions' rows teach an indexer to find a fact, and
    with 16 of them they are one row in forty of a text of 8K.
    """
    from winnow.rl.needles import densest, make_haystack, room_needed

    rng = random.Random(seed + 17)
    room = 2 * room_needed(tokenizer, num_needles)
    mixed = []
    for s in sequences:
        if len(s) >= room and rng.random() < share:
            count = rng.randint(num_needles, densest(tokenizer, len(s), num_needles))
            s = make_haystack(tokenizer, s, len(s), count, rng).tokens
        mixed.append(s)
    return mixed


def batches(sequences: Sequence[Sequence[int]], tokens: int, seed: int) -> Iterator[Packed]:
    """Packed batches of about `tokens` tokens for ever, each epoch in another order, and from the second on cut elsewhere: what is far from
    a token, and so what a set of keys leaves out for it, is not the same twice (docs/experiments.md)."""
    rng = random.Random(seed)
    batch: list[Sequence[int]] = []
    count = 0
    for epoch in itertools.count():
        order = [s.elsewhere(rng) if epoch and isinstance(s, Window) else s for s in sequences]
        rng.shuffle(order)
        for sequence in order:
            if batch and count + len(sequence) > tokens:
                yield pack(batch)
                batch, count = [], 0
            batch.append(sequence)
            count += len(sequence)


def own_samples(model: Any, tokenizer: Any, num_tokens: int, length: int, seed: int) -> list[list[int]]:
    """About `num_tokens` tokens that the model wrote itself at temperature 1, prompts included, drawn with the rollout engine.

    A chat model answers `TOPICS`; another continues its first token.
    """
    from winnow.rollout.engine import Engine, EngineConfig
    from winnow.rollout.schema import Sampling

    prompts = _openings(tokenizer, length)
    page, most = 16, 64
    config = EngineConfig(
        page_size=page, num_pages=(most + len(prompts)) * (length // page + 2), max_batch=most, selector="dense"
    )
    engine = Engine(model, tokenizer, config)
    samples: list[list[int]] = []
    for turn in range(8):  # a model that stops early needs more turns; one that stops at once must not hold us for ever
        missing = num_tokens - sum(map(len, samples))
        if missing <= 0:
            break
        each = min(most, -(-missing // (length * len(prompts))))
        rows = [Sampling(max_tokens=length - len(prompt), seed=seed + turn) for prompt in prompts]
        groups = engine.generate(prompts, rows, each, request_ids=[f"self-{turn}-{i}" for i in range(len(prompts))])
        samples += [[int(token) for token in sequence.tokens] for group in groups for sequence in group]
    return samples


TOPICS = (
    "Tell me about the history of the printing press.",
    "Explain to a child how a plant grows.",
    "Write a short story about a lighthouse keeper.",
    "A train leaves at 9:40 and arrives at 13:15. How long does the journey take? Think step by step.",
    "Write a Python function that counts the vowels in a text, and explain it.",
    "What should I think of before I adopt a dog?",
    "Compare the climates of Norway and Spain.",
    "Give me a recipe for a vegetable soup for six people.",
)


def _openings(tokenizer: Any, length: int) -> list[list[int]]:
    if getattr(tokenizer, "chat_template", None):
        chats = [[{"role": "user", "content": topic}] for topic in TOPICS]
        texts = [tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) for chat in chats]
        prompts = [list(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts]
        if max(map(len, prompts)) <= length // 2:
            return prompts
    first = next((t for t in (tokenizer.bos_token_id, tokenizer.eos_token_id) if t is not None), 0)
    return [[first]]
