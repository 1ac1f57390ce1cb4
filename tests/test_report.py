"""The page: whole, self-contained, safe to open, and right about a run that is unfinished, empty or full of odd texts."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from winnow.rl.charts import Interval, Series, interval_chart, line_chart, strip
from winnow.rl.report import write_report

VOID = {"meta", "circle", "line", "rect", "polyline", "br"}


class Checker(HTMLParser):
    """Fails on tags that do not match; gathers texts and what would be fetched."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.texts: list[str] = []
        self.fetched: list[str] = []
        self.headings: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.fetched += [
            value or "" for name, value in attributes if name in ("src", "href", "srcset", "data", "xlink:href")
        ]
        self.fetched += [tag] if tag in ("script", "link", "img", "iframe") else []
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open and self.open.pop() == tag, f"</{tag}> closes {self.open[-1:]}"

    def handle_data(self, data: str) -> None:
        self.texts.append(data)
        if self.open and self.open[-1] == "h2":
            self.headings.append(data)


def check(path: Path) -> Checker:
    page = path.read_text()
    checker = Checker()
    checker.feed(page)
    assert checker.open == [], "tags left open"
    assert checker.fetched == [], "the page must fetch nothing"
    assert "url(" not in page and "@import" not in page
    assert "prefers-color-scheme: dark" in page
    assert "nan" not in re.sub(r"<style>.*?</style>", "", page, flags=re.DOTALL).lower().split()
    return checker


def sample(domain: str, reward: float | None, text: str = "how many ?") -> dict[str, Any]:
    row: dict[str, Any] = {
        "task_id": "t", "domain": domain, "request_id": "r", "sample": 0, "finish_reason": "stop",
        "messages": [{"role": "user", "content": text}, {"role": "assistant", "content": "7"}],
    }  # fmt: skip
    return row | (
        {"reward": reward, "parts": {"right": reward}}
        if reward is not None
        else {"failure": {"kind": "timeout", "detail": ""}}
    )


def write_run(folder: Path, steps: int = 5) -> Path:
    (folder / "samples").mkdir(parents=True)
    lines = [
        {"step": n, "reward/mean": n / 9, "reward/math": n / 9, "length/math": 20 - n, "mismatch/k3_kl": 10.0**-n, "index/jaccard": 1.0,
         "grad_norm": None if n == 2 else 0.3, "time/rollout_s": 1.0, "loss/indexer_kl": 0.5}
        for n in range(1, steps + 1)
    ]  # fmt: skip
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    rows = [sample("math", 1.0), sample("math", 0.0, "<script>alert(1)</script> & friends"), sample("math", None)]
    (folder / "samples" / "step-000005.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_the_page_of_a_run(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "maths")
    (folder / "result.json").write_text(json.dumps({"status": "done", "step": 5, "steps": 5, "version": "0.1"}))
    path = write_report(folder)
    assert path == folder / "report.html"
    checker = check(path)
    assert "done · step 5 of 5 · winnow 0.1" in checker.texts
    assert {"Curves", "Samples of step-000005"} <= set(checker.headings)
    assert any("<script>alert(1)</script>" in text for text in checker.texts), "shown as text, not run"
    page = path.read_text()
    assert page.count("<polyline") >= 5 and "math, 3: 0.333" in page


def test_a_run_that_has_just_begun_or_was_cut_short(tmp_path: Path) -> None:
    folder = tmp_path / "young"
    folder.mkdir()
    (folder / "metrics.jsonl").write_text("")
    assert "no step yet" in check(write_report(folder, tmp_path / "page.html")).texts
    torn = write_run(tmp_path / "torn")
    with (torn / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 6, "rew')
    check(write_report(torn))


def write_pipeline(folder: Path) -> Path:
    write_run(folder / "specialist-math")
    write_run(folder / "mixed")
    (folder / "evaluation").mkdir()
    excerpt = {
        "length": 6,
        "k": 2,
        "tokens": ["<b>", " has", " 7", "?", "7", "."],
        "queries": [{"position": 3, "layers": {"0": [0, 2], "1": [2, 3]}}],
    }
    rows = [sample("math", 1.0) | {"answer": "7", "index_excerpt": excerpt}, sample("math", 0.0)]
    (folder / "evaluation" / "mixed.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = {"mean": 0.5, "low": 0.4, "high": 0.6, "num_tasks": 64, "reward": 0.5, "length": 3.0, "truncated": 0.0, "failures": 0, "constant": 0.1,
             "attention": {"mean_selected": 2.0, "mean_available": 9.0, "sparse_rows": 0.8}}  # fmt: skip
    evaluation = {name: {"math": found} for name in ("base", "specialist-math", "student", "mixed", "mixed-random")}
    result = {
        "status": "done",
        "seconds": 9.0,
        "stages": {"mixed": 5.0},
        "domains": {"math": {"constant": 0.1}},
        "evaluation": evaluation,
    }
    (folder / "result.json").write_text(json.dumps(result))
    data = {
        "sampled": {"math": 8},
        "pass_rate": {"math": 0.5},
        "kept": {"math": 4},
        "dropped": {"math": {"low_reward": 4}},
    }
    notes = {"base": {"loss": [2.0, 1.0]}, "data-math": data, "student": {"losses": [1.0, 0.5, 0.2]}}
    manifest = {name: {"key": "k", "seconds": 1.5, "output": output} for name, output in notes.items()}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    report = {"warmup": {"kl": [1.0, 0.5]}, "sparse": {"kl": [0.5, 0.4], "loss": [2.0, 1.9]}, "dense_before": {"perplexity": 9.0},
              "retention": {"perplexity": {"dense": 9.0, "sparse": 9.5, "random": 30.0},
                            "recall": {"indexer": {"mean": 0.9, "layers": [0.9, 0.9]}, "random": {"mean": None, "layers": []}}}}  # fmt: skip
    (folder / "sparse").mkdir()
    (folder / "sparse" / "conversion.json").write_text(json.dumps(report))
    return folder


def test_the_page_of_a_pipeline(tmp_path: Path) -> None:
    checker = check(write_report(write_pipeline(tmp_path / "demo")))
    wanted = {
        "Held-out tasks solved",
        "What the index chose",
        "Specialist: math",
        "Mixed stage",
        "Conversion to sparse attention",
    }
    assert wanted | {"Supervised training", "Stages"} <= set(checker.headings)
    texts = " ".join(checker.texts)
    assert "0.400 – 0.600" in texts and "2.0 of 9.0, 80%" in texts and "low_reward 4" in texts
    assert "math: 2 of 4 positions" in texts and "<b>" in checker.texts
    assert "mixed, random" in texts


def test_a_pipeline_that_has_just_begun(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text("{}")
    check(write_report(tmp_path))


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="neither metrics"):
        write_report(tmp_path)
    with pytest.raises(ValueError, match="no run folder"):
        write_report(tmp_path / "x")


def coordinates(svg: str) -> list[tuple[float, float]]:
    points = re.search(r'points="([^"]+)"', svg)
    assert points
    return [(float(x), float(y)) for x, y in (pair.split(",") for pair in points[1].split())]


def test_a_line_goes_where_its_values_are() -> None:
    points = coordinates(line_chart([Series("a", [1, 2, 3], [0.0, 0.5, 1.0])]))
    assert points[0][0] < points[1][0] < points[2][0]
    assert points[1][1] == pytest.approx((points[0][1] + points[2][1]) / 2) and points[2][1] < points[0][1], (
        "up is more"
    )
    logged = coordinates(line_chart([Series("a", [1, 2, 3], [1e-8, 1e-6, 1e-4])], log=True))
    assert logged[1][1] == pytest.approx((logged[0][1] + logged[2][1]) / 2)


def test_charts_of_nothing_one_value_and_gaps() -> None:
    assert "no values yet" in line_chart([])
    assert "no values yet" in line_chart([Series("a", [], [])])
    assert "<circle" in line_chart([Series("a", [1], [3.0])])
    assert line_chart([Series("a", [1, 2, 3], [1.0, None, 2.0])]).count("<circle") == 2
    assert "exactly 0" in line_chart([Series("a", [1, 2], [0.0, 0.0])], log=True)
    assert "<svg" in line_chart([Series("a", [1, 2], [0.0, 0.0])])


def test_whiskers_and_strips_hold_their_numbers() -> None:
    svg = interval_chart([Interval("m", 0.5, 0.25, 0.75)], mark=0.1, mark_label="constant")
    assert "95 % interval 0.250 to 0.750" in svg and "stroke-dasharray" in svg
    assert strip(10, [("layer 0", [1, 5]), ("layer 1", [2])], 7).count("<rect") == 2 + 3


def test_the_page_shows_the_parts_of_each_domains_reward_and_its_failures(tmp_path: Path) -> None:
    lines = [
        {
            "step": step, "reward/mean": 0.5, "reward/maths": 0.1 * step, "reward/tools": 0.5, "part/maths/right": 0.1 * step,
            "part/maths/length": -0.1, "part/tools/clean": 1.0, "failures/timeout": 2.0, "failures/tools/timeout": 2.0,
        }
        for step in range(1, 5)
    ]  # fmt: skip
    run = tmp_path / "run"
    run.mkdir()
    (run / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    checker = check(write_report(run))
    assert "Rewards by part" in checker.headings
    texts = " ".join(checker.texts)
    assert "timeout 8" in texts and "0.200" in texts and "0.300" in texts and "-0.100" in texts
    for name in ("right", "length", "clean"):
        assert name in checker.texts
    pipeline = tmp_path / "pipeline"
    (pipeline / "mixed").mkdir(parents=True)
    (pipeline / "manifest.json").write_text("{}")
    (pipeline / "mixed" / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert "Mixed stage: rewards by part" in check(write_report(pipeline)).headings
    (run / "metrics.jsonl").write_text(json.dumps({"step": 1, "grad_norm": 1.0}))
    assert "Rewards by part" not in check(write_report(run)).headings
