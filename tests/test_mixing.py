"""What training costs elsewhere: paired changes, the distance from the base, and the comparison of one mixed run with runs alone."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from winnow.models.attach import attach
from winnow.models.indexer import IndexerConfig
from winnow.models.load import save
from winnow.rewards.demonstrations import pretraining_texts
from winnow.rl.base import BaseOptions, make_model, make_tokenizer
from winnow.rl.forgetting import (
    base_replies,
    forgetting,
    forward_kl,
    lines,
    mean_interval,
    paired_change,
    solved_by_task,
)
from winnow.rl.mixing import Mixing
from winnow.rl.pipeline_config import make_pipeline


def write(folder: Path, name: str, solved: dict[str, dict[str, list[float]]]) -> None:
    rows = [
        {"domain": domain, "task_id": task, "solved": value, "request_id": f"{domain}/{task}", "sample": n, "tokens": [1, 2, 3],
         "loss_mask": [0, 1, 1], "finish_reason": "stop"}
        for domain, tasks in solved.items() for task, values in tasks.items() for n, value in enumerate(values)
    ]  # fmt: skip
    rows.append({"domain": "a", "task_id": "broken", "failure": {"kind": "timeout"}, "request_id": "a/b", "sample": 0,
                 "tokens": [1], "loss_mask": [0], "finish_reason": "stop"})  # fmt: skip
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_changes_are_paired_by_task_and_a_failure_is_no_zero(tmp_path: Path) -> None:
    write(tmp_path, "base", {"a": {"1": [1, 0], "2": [1], "3": [0]}, "b": {"9": [0]}})
    write(tmp_path, "specialist-a", {"a": {"1": [1], "2": [1], "3": [1]}})
    write(tmp_path, "mixed", {"a": {"1": [1], "2": [0], "3": [0], "4": [1]}, "b": {"9": [1]}})
    assert solved_by_task(tmp_path / "base.jsonl") == {"a": {"1": 0.5, "2": 1.0, "3": 0.0}, "b": {"9": 0.0}}
    report = forgetting(tmp_path, ["base", "specialist-a", "mixed", "absent"])
    assert set(report) == {"specialist-a", "mixed"} and set(report["specialist-a"]["a"]) == {"over_base"}
    found = report["mixed"]["a"]["over_base"]  # +0.5, -1, 0: the fourth task was never asked of the base
    assert found["mean"] == pytest.approx(-1 / 6) and found["count"] == 3
    half = 4.303 * np.std([0.5, -1, 0], ddof=1) / np.sqrt(3)
    assert found["high"] == pytest.approx(min(1, -1 / 6 + half)) and found["low"] == -1
    assert mean_interval([0.1, 0.3])["high"] == pytest.approx(0.2 + 12.706 * np.std([0.1, 0.3], ddof=1) / np.sqrt(2))
    assert report["mixed"]["a"]["over_specialist"]["mean"] == pytest.approx(-2 / 3)
    assert report["mixed"]["b"]["over_base"]["mean"] == 1 and report["mixed"]["b"]["over_base"]["high"] == 1
    assert any(line.startswith("a: mixed -0.667") and line.endswith("over specialist") for line in lines(report))
    with pytest.raises(ValueError, match="no task in common"):
        paired_change({"1": 1.0}, {"2": 1.0})
    replies = base_replies(tmp_path / "base.jsonl")
    assert len(replies) == 5 and all(reply.num_generated == 2 for reply in replies)
    base = [np.array([-1.0, -2.0], np.float32)] * 5
    found_kl = forward_kl(replies, base, [value - 0.25 for value in base])
    assert found_kl["a"]["mean"] == pytest.approx(0.25) and found_kl["a"]["count"] == 4


def test_mixed_and_alone_at_equal_compute_end_to_end(tmp_path: Path) -> None:
    torch.manual_seed(0)
    tokenizer = make_tokenizer(pretraining_texts(12, 0), 400, 512)
    tiny = make_model(tokenizer, BaseOptions(hidden=32, layers=1, heads=2, context=512))
    model = save(attach(tiny, IndexerConfig(top_k=8, num_heads=2, head_dim=16, rope_dim=8)), tokenizer, tmp_path / "m")
    domain = {"count": 8, "holdout": 3, "quota": 2, "max_tokens": 3}
    values = {
        "name": "x", "runs_dir": str(tmp_path), "model": str(model), "stages": ["specialists", "data", "student", "mixed", "evaluation"],
        "run": {
            "domains": [{"name": "a", "source": "lookup", **domain}, {"name": "b", "source": "rubric", **domain}],
            "rollout": {"samples": 2, "num_pages": 256}, "cluster": {"address": "here"}, "schedule": {"steps": 9, "save_every": 0},
            "learner": {"lr": 1e-2}, "evaluation": {"temperature": 1.0},
        },
        "specialist": {"schedule": {"steps": 2}},
    }  # fmt: skip
    said: list[str] = []
    result = Mixing(make_pipeline(values), said.append).run()
    assert list(result["evaluation"]) == ["base", "alone-a", "alone-b", "mixed"]
    assert all(set(found) == {"a", "b"} for found in result["evaluation"].values())  # each on every domain
    cost = result["compute"]
    assert (
        cost["mixed"]["steps"] == 2
        and cost["mixed"]["samples"] == cost["alone-a"]["samples"] + cost["alone-b"]["samples"] == 16
    )
    assert set(result["kl"]) == {"alone-a", "alone-b", "mixed"} and "over_base" in result["forgetting"]["alone-a"]["b"]
    text = (tmp_path / "x" / "mixing.md").read_text()
    assert text in said and "| mixed |" in text and "| base |" in text
    again: list[str] = []
    assert Mixing(make_pipeline(values), again.append).run() == json.loads((tmp_path / "x" / "result.json").read_text())
    assert not any("training" in line for line in again)  # nothing twice
