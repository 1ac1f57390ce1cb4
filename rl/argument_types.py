"""What the numbers on a command line may be: argparse calls these, and says what they say."""

from __future__ import annotations

import argparse


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not above 0")
    return value


def count(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{text} is not a number from 0 on")
    return value


def limit(text: str) -> int:
    """A number of tasks; 0 stands for all."""
    return 0 if text == "all" else positive(text)


def positive_list(text: str) -> list[int]:
    return [positive(part) for part in text.split(",")]
