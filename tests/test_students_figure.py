"""The table and the figure that a page of the docs takes from a pipeline's result.json."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from winnow.rewards.data import load_tasks
from winnow.rl.pair_tasks import COMPARISONS, SUMS
from winnow.rl.pair_tasks import main as write_tasks
from winnow.rl.students_figure import difference, equal_costs, main, table


def result() -> dict[str, Any]:
    def one(mean: float) -> dict[str, Any]:
        return {"mean": mean, "low": mean - 0.03, "high": mean + 0.04, "num_tasks": 640}

    means = {"base": 0.1, "specialist-sums": 0.6, "student": 0.57, "mixed": 0.7, "mixed-from-base": 0.65}
    return {
        "domains": {"sums": {"constant": 0.05}},
        "evaluation": {name: {"sums": one(mean)} for name, mean in means.items()},
        "spent": {"base": 0.0, "specialist-sums": 30.4, "student": 41.0, "mixed": 70.0, "mixed-from-base": 70.2},
        "spent_unit": "GPU seconds",
    }


def test_the_table_and_the_figure_say_what_was_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "result.json").write_text(json.dumps(result()))
    assert main([str(tmp_path / "result.json"), str(tmp_path / "out.svg")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "| model | sums | GPU seconds |"
    assert "| specialist | 0.600 (0.570 to 0.640) | 30 |" in lines and "| base | 0.100 (0.070 to 0.140) |  |" in lines
    assert [line for line in lines if line.startswith("sums: ")] == [
        "sums: student - specialist = -3.0 points (-7.9 to +1.9)",
        "sums: mixed - specialist = +10.0 points (+5.1 to +14.9)",
        "sums: mixed - from the base = +5.0 points (+0.1 to +9.9)",
    ]
    text = ElementTree.fromstring((tmp_path / "out.svg").read_text())
    written = " ".join(text.itertext())
    assert "0.570" in written and "from the base" in written and "640 tasks" in written
    assert main([]) == 2


def test_a_column_that_was_not_evaluated_is_left_out() -> None:
    short = result()
    del short["evaluation"]["mixed"]
    assert not [line for line in table(short) if "| mixed |" in line or "mixed -" in line]
    assert difference({"mean": 0.5, "low": 0.4, "high": 0.6}, {"mean": 0.5, "low": 0.5, "high": 0.5}) == "+0.0 points (-10.0 to +10.0)"  # fmt: skip


def test_a_control_that_ran_short_of_its_seconds_is_said_to_be_no_equal() -> None:
    spent = {"student": 50.0, "student-on_policy": 51.0, "mixed": 100.0, "mixed-from-base": 90.0}
    assert list(equal_costs(spent)) == [
        "cost of on-policy over student: 1.02",
        "cost of from the base over mixed: 0.90 NOT EQUAL",
    ]
    assert list(equal_costs({"student": 50.0, "student-on_policy": 0.0})) == []


def test_every_pair_is_asked_once_and_a_fifth_is_held_out(tmp_path: Path) -> None:
    assert write_tasks([]) == 2
    assert write_tasks([str(tmp_path)]) == 0
    for name, pairs, right in (("sums", SUMS, sum), ("comparison", COMPARISONS, max)):
        text = (tmp_path / f"{name}.jsonl").read_text()
        rows = [json.loads(line) for line in text.splitlines()]
        asked = [tuple(int(n) for n in re.findall(r"\d+", row["prompt"])) for row in rows]
        assert {tuple(sorted(pair, reverse=True)) for pair in asked} == set(pairs) and len(asked) == len(pairs)
        assert all(row["answer"] == str(right(pair)) for row, pair in zip(rows, asked, strict=True))
        train, held = (load_tasks(str(tmp_path / f"{name}.jsonl"), split=split) for split in ("train", "heldout"))
        assert len(held) >= 600 and len(train) + len(held) == len(pairs)
