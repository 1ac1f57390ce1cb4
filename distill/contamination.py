"""Rows whose prompt is a benchmark's: found by shared runs of words, as GPT-3 did (2005.14165, appendix C: 13-grams), and taken out.

    Contamination(ngram=13, overlap=0.5); .add("gsm8k", prompts) ; .add("heldout", prompts, exact=True) ; .find(prompt) -> Leak | None

An item leaks into a prompt that holds at least `overlap` of the item's n-grams. Runs that many items of a benchmark share are its template
("put your answer in a box"): they say nothing and do not count. An item shorter than n words leaks where all of it stands in the prompt
in one piece; one of fewer than SHORT words, only where the prompt is nothing else.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

from winnow.distill.similarity import words

NGRAM = 13
SHORT = 5  # "what is 7 + 5" stands in many prompts that ask something else
TEMPLATE = (3, 0.02)  # a run in more items than this, and in a larger share of them, belongs to the template

Run = tuple[str, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Leak:
    benchmark: str
    item: str  # the item's prompt, its beginning
    overlap: float  # share of the item's n-grams that the prompt holds


class Contamination:
    """The benchmarks' prompts, ready to be looked for."""

    def __init__(self, ngram: int = NGRAM, overlap: float = 0.5) -> None:
        if ngram < SHORT:
            raise ValueError(f"ngram is {ngram}, but shorter runs than {SHORT} words are shared by chance: 13 is usual")
        self.ngram, self.overlap = ngram, overlap
        self.items: list[tuple[str, str, int]] = []  # benchmark, prompt, number of n-grams that count
        self.counts: Counter[str] = Counter()  # items by benchmark
        self._runs: dict[Run, set[int]] = defaultdict(set)
        self._lengths: set[int] = set()
        self._whole: dict[Run, int] = {}

    def add(self, benchmark: str, prompts: Iterable[str], exact: bool = False) -> None:
        """One benchmark. `exact`: only prompts of the very same words leak (procedural tasks share their template by design)."""
        split = [(prompt, tuple(words(prompt))) for prompt in prompts]
        runs = [set() if exact else self._of_item(tokens) for _, tokens in split]
        shared = Counter(run for found in runs for run in found)
        ceiling = max(TEMPLATE[0], math.ceil(TEMPLATE[1] * len(split)))
        for (prompt, tokens), found in zip(split, runs, strict=True):
            number = len(self.items)
            own = {run for run in found if shared[run] <= ceiling}
            self.items.append((benchmark, prompt, len(own)))
            self.counts[benchmark] += 1
            self._whole.setdefault(tokens, number)
            for run in own:
                self._runs[run].add(number)
                self._lengths.add(len(run))

    def find(self, prompt: str) -> Leak | None:
        """The item that leaks most into this prompt, or None. Of equals, the one added first."""
        tokens = tuple(words(prompt))
        whole = self._whole.get(tokens)
        if whole is not None and tokens:
            return self._leak(whole, 1.0)
        runs = {tokens[i : i + n] for n in self._lengths for i in range(len(tokens) - n + 1)}
        held = Counter(number for run in runs for number in self._runs.get(run, ()))
        shares = [(count / self.items[number][2], -number) for number, count in held.items()]
        share, number = max(shares, default=(0.0, 0))
        return self._leak(-number, share) if shares and share >= self.overlap else None

    def _of_item(self, tokens: Run) -> set[Run]:
        if len(tokens) < SHORT:
            return set()
        size = min(self.ngram, len(tokens))
        return {tokens[i : i + size] for i in range(len(tokens) - size + 1)}

    def _leak(self, number: int, share: float) -> Leak:
        benchmark, prompt, _ = self.items[number]
        return Leak(benchmark=benchmark, item=prompt[:160], overlap=round(share, 3))
