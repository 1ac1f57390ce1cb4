"""math-verify and sympy, for the grader processes. Imported by their nursery only: two seconds that every fork of it then has behind it."""

from __future__ import annotations

import logging

from math_verify import parse, verify

logging.getLogger("math_verify").setLevel(logging.CRITICAL)  # it warns at every call that its own timeouts are off


def compare(gold: str, answer: str) -> bool:
    """Whether math-verify finds the two equal. Raises ValueError where it cannot read the gold answer; may take for ever."""
    wanted = parse(f"$\\boxed{{{gold}}}$", parsing_timeout=None) or parse(f"${gold}$", parsing_timeout=None)
    if not wanted:
        raise ValueError(f"the gold answer cannot be parsed: {gold[-80:]}")
    found = parse(f"$\\boxed{{{answer}}}$", parsing_timeout=None) or parse(answer, parsing_timeout=None)
    return bool(found and verify(wanted, found, timeout_seconds=None))


compare("\\frac{1}{2}+\\sqrt{x}", "0.5+x^{1/2}")  # sympy's parser and printer load more on their first use
