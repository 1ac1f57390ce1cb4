"""`winnow bench step | learner`: whole and honest on a tiny model; what only a GPU shows is tested on made-up records."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from winnow.rl import bench_learner, bench_step, bench_versus
from winnow.rl.cli import main
from winnow.rl.learner import Learner


def test_bench_step_times_the_program_by_stage(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "step", "--prompts", "2", "--samples", "2", "--tokens", "3", "--steps", "3"]) == 0
    printed = capsys.readouterr()
    figures = json.loads(printed.out)
    ours = figures["ours"]
    assert ours["steps_counted"] == 1 and len(ours["rewards"]) == 3 and "trl" not in figures
    assert ours["curve"][0][0] == 0.0 < ours["curve"][1][0] < ours["curve"][2][0]
    assert [round(row[1], 3) for row in ours["curve"]] == ours["rewards"] and printed.err.count("ours: ") == 4
    assert set(ours["stage_s"]) == {"rollout", "reward", "learn", "sync"}
    rate = ours["samples_per_s"]
    assert 0 < rate["min"] <= rate["median"] <= rate["max"]
    assert rate["median"] == pytest.approx(4 / ours["step_s"]["median"], rel=0.02)
    assert ours["first_step_s"] > ours["step_s"]["median"] and "samples/s" in printed.err


def test_a_run_of_so_many_seconds_ends_with_the_step_in_which_they_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    from winnow.rl import bench_step

    clock = iter(range(1, 100))
    monkeypatch.setattr(bench_step, "seconds_alive", lambda: float(next(clock)))
    bench = bench_step.StepBench(prompts=2, samples=2, tokens=3, steps=50, wall=2.0)
    ours = bench_step.bench_step(bench, ["trl"], ["ours"])["ours"]
    assert ours["first_step_s"] == 1.0 and [row[0] for row in ours["curve"]] == [0.0, 1.0, 2.0]
    with pytest.raises(ValueError, match="nothing to run"):
        bench_step.bench_step(bench, [], ["trl"])


def test_a_peer_that_is_not_there_is_said_to_be_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from winnow.rl import bench_step, bench_trl

    fake = {"samples_per_s": {"median": 8.0, "min": 7.0, "max": 9.0}, "step_s": {"median": 0.5}, "first_step_s": 1.0}
    monkeypatch.setattr(bench_step, "ours", lambda *arguments: fake)

    def missing(*arguments: object) -> None:
        raise ImportError("No module named 'trl'")

    monkeypatch.setattr(bench_trl, "_trainer", missing)
    assert bench_step.bench_step(bench_step.StepBench(model="m"), ["trl"])["trl"] == "not here: No module named 'trl'"
    monkeypatch.setattr(
        bench_trl, "bench_trl", lambda *arguments: {**fake, "samples_per_s": {"median": 2.0, "min": 2.0, "max": 2.0}}
    )
    figures = bench_step.bench_step(bench_step.StepBench(model="m"), ["trl"])
    assert figures["ours_over_trl"] == 4.0 and [line[:4] for line in bench_step.as_rows(figures)] == ["ours", "trl:"]
    with pytest.raises(ValueError, match="it knows trl"):
        bench_step.bench_step(bench_step.StepBench(model="m"), ["verl"])
    assert bench_trl.last_number([[{"content": "7 + 5 is 12."}], "12 or 13"], ["12", "12"]) == [1.0, 0.0]


def test_bench_learner_trains_each_row_of_a_shape(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    losses, step = [], Learner.sft_step

    def heard(self: Learner, *arguments: Any) -> Any:
        report = step(self, *arguments)
        losses.append(report.metrics["loss/ce"])
        return report

    monkeypatch.setattr(Learner, "sft_step", heard)
    out = tmp_path / "figures.json"
    assert main(["bench", "learner", "--model", "tiny", "--layers", "1", "--lengths", "96", "--out", str(out)]) == 0
    rows = json.loads(capsys.readouterr().out)["figures"]["rows"]
    assert losses[0] == pytest.approx(losses[len(losses) // 4], rel=1e-5), "torch's attention is the same function"
    assert [row["row"] for row in rows] == list(bench_learner.ROWS)
    assert all(row["length"] == 96 and row["tokens_per_s"] > 0 and row["peak_gib"] > 0 for row in rows)
    assert main(["bench", "learner", "--model", "v3.2"]) == 1
    assert "none of tiny, small, qwen3-0.6b, qwen3-1.7b" in capsys.readouterr().err
    measured = bench_learner.measure

    def full(learner: Learner, length: int, repeats: int) -> dict[str, Any]:
        if learner.config.indexer.train == "kl":
            raise torch.OutOfMemoryError("full")
        return measured(learner, length, 1)

    monkeypatch.setattr(bench_learner, "measure", full)
    assert main(["bench", "learner", "--model", "tiny", "--layers", "1", "--lengths", "64", "--out", str(out)]) == 0
    kept = json.loads(out.read_text())["figures"]["rows"]
    assert [row.get("failed") for row in kept] == [None, None, None, "full"], "and the others are not lost"


def test_the_row_of_torchs_attention_runs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Our layers, where they take part, call our attention whatever the model is told."""
    called = []
    attend = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        torch.nn.functional, "scaled_dot_product_attention", lambda *a, **k: called.append(1) or attend(*a, **k)
    )
    for row in ("dense, SDPA", "dense"):
        learner = bench_learner.make_learner("qwen3-0.6b", "cpu", 1, **bench_learner.ROWS[row])
        assert [bool("forward" in layer.__dict__) for layer in learner.model.model.layers] == [row == "dense"]
        called.clear()
        bench_learner.measure(learner, 48, 1)
        assert bool(called) == (row == "dense, SDPA")


@pytest.mark.parametrize("planted", [0, 2 * 4096 * 1024, 4096 * 4096])
def test_a_forbidden_tensor_in_the_allocators_record_is_a_wrong_row(
    monkeypatch: pytest.MonkeyPatch, planted: int
) -> None:
    class Model:
        config = type("C", (), {"vocab_size": 1024})
        weight = torch.nn.Parameter(torch.zeros(3 << 21, device="meta"))

        def parameters(self) -> list[torch.nn.Parameter]:
            return [self.weight]

    class Fake:
        device, model = "cuda", Model()

        def sft_step(self, examples: object) -> None:
            pass

    for name in ("reset_peak", "measured_peak"):
        monkeypatch.setattr(bench_learner.memory, name, lambda device: 0)
    monkeypatch.setattr(bench_learner, "_settle", lambda device: None)
    monkeypatch.setattr(bench_learner, "parts", lambda step: {})
    allowed = [12 << 21, 6 << 21, 4096 * 1024, 512]  # a parameter's own shape in fp32 and bf16 may be as large as it is
    made = [*((size, "a.py:f") for size in (*allowed, planted)), (1 << 31, "sparse_backward.py:_backward_slice")]
    monkeypatch.setattr(bench_learner, "allocations", lambda step: made)
    row = bench_learner.measure(Fake(), 4096, 1)  # type: ignore[arg-type]
    assert ("wrong" in row) == bool(planted) and row["largest_gib"] >= 0 and row["workspace_gib"] == 2.0
    made[-1] = ((1 << 31) + 1, made[-1][1])  # the same function, with more than its constant
    assert "wrong" in bench_learner.measure(Fake(), 4096, 1)  # type: ignore[arg-type]
    made[-1] = (1 << 31, "sparse_backward.py:sparse_backward")  # another function of the file
    assert "wrong" in bench_learner.measure(Fake(), 4096, 1)  # type: ignore[arg-type]


def test_who_asked_is_the_innermost_frame_outside_torch() -> None:
    frames = [
        {"filename": "??", "name": "c10::alloc", "line": 0},
        {"filename": "/x/torch/functional.py", "name": "empty", "line": 1},
        {"filename": "/y/kernels/sparse_backward.py", "name": "_backward_slice", "line": 2},
        {"filename": "/y/rl/learner.py", "name": "step", "line": 3},
    ]
    assert bench_learner.asked_by(frames) == "sparse_backward.py:_backward_slice" and bench_learner.asked_by([]) == ""
    assert bench_learner.is_workspace(1 << 31, bench_learner.asked_by(frames))


def test_kernels_are_told_apart_by_part() -> None:
    found = bench_learner.by_part(
        {
            "_forward": 1.0,
            "_select": 0.5,
            "_prefill": 0.25,
            "nvjet_tst_128x256": 2.0,
            "void at::native::vectorized": 0.125,
            "_forward_x": 4.0,
        }
    )
    assert found == {"other": 4.125, "matmul": 2.0, "attention forward": 1.0, "top-k": 0.5, "indexer scores": 0.25}


class Peers:
    """Stands for the processes: what each run's would say, and what it was asked."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.asked: list[tuple[str, float, float]] = []  # run, wall, seconds until it is ended
        self.failing: set[str] = set()
        monkeypatch.setattr(bench_versus, "read_peer", self.read)

    def read(self, command: list[str], log: Path, seconds: float, note: Any) -> str | None:
        plan = json.loads(Path(command[-1]).read_text())
        run = Path(command[-1]).name.removesuffix(".plan.json")
        self.asked.append((run, plan["bench"]["wall"], seconds))
        assert plan["bench"]["overrides"] == ["learner.lr=1e-4"]
        assert plan["bench"]["until"] == seconds - bench_versus.SPARE_S
        if run in self.failing:
            return "exit code 1: CUDA is out of memory"
        pace = 0.5 if plan["name"] == "ours" else 1.0
        ends = [10 + pace * i for i in range(1 + int(plan["bench"]["wall"] / pace))]
        bench = bench_step.StepBench(**plan["bench"])
        curve = [(min(1.0, 0.05 * i), 20.0) for i in range(len(ends))]
        note({"figures": bench_step.timing(bench, 0.0, ends, curve)})
        return None


def test_ours_and_a_peer_run_seed_by_seed_and_what_is_there_is_not_run_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    peers = Peers(monkeypatch)
    peers.failing = {"trl-s1"}
    command = ["bench", "step", "--seeds", "0", "1", "--peers", "trl", "--wall", "30", "--limit-s", "400", "--out", str(tmp_path),
               "--set", "learner.lr=1e-4"]  # fmt: skip
    assert main(command) == 1
    said = capsys.readouterr()
    assert "1 runs have no figures: trl-s1: exit code 1: CUDA" in said.err
    assert [run for run, *_ in peers.asked] == ["ours-s0", "trl-s0", "ours-s1", "trl-s1"]
    assert all(wall == pytest.approx(min(30, ends - bench_versus.START_S[run[:-3]])) for run, wall, ends in peers.asked)
    assert peers.asked[0][1] == 30 and peers.asked[1][2] <= 134, "the limit is shared by what is left"
    table = (tmp_path / "table.md").read_text()
    assert (
        "| ours-s0 | 10.0 | 512.0 (512.0-512.0) |" in table
        and "ours / trl, seed 0, until step 10: 2.00 times" in table
        and "all steps: 2.00" in table
    )
    assert "| 10 | 0.525 | 0.275 | 0.525 |" in table, "steps that ended in the ten seconds before"
    assert "trl-s1: exit code 1" in table and (tmp_path / "curves.svg").read_text().count("<polyline") == 6
    peers.failing, peers.asked = set(), []
    assert main(command) == 0 and [run for run, *_ in peers.asked] == ["trl-s1"]
    assert main([*command, "--tokens", "32", "--limit-s", "100"]) == 1 and len(peers.asked) == 1, "other sizes, no time"
    assert "not run: its share of the limit is 25 s" in capsys.readouterr().err


def test_a_run_whose_start_took_its_time_ends_with_what_it_has() -> None:
    bench = bench_step.StepBench(wall=40, until=126)
    starts = {20.0: [20.0, 59.9, 60.0], 100.0: [100.0, 125.9, 126.0], 130.0: [130.0]}
    for ends in starts.values():
        assert [bench_step.over(bench, ends[: i + 1]) for i in range(len(ends))] == [False] * (len(ends) - 1) + [True]
    assert not bench_step.over(bench_step.StepBench(), [1.0, 1e6])


def test_a_peers_process_says_what_it_found_and_ends(tmp_path: Path) -> None:
    from winnow.rl.bench_peer import read_peer

    plan = {"name": "ours", "bench": {"prompts": 2, "samples": 2, "tokens": 3, "steps": 2, "wall": 60}}
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    rows: list[dict[str, Any]] = []
    command = [sys.executable, "-m", "winnow.rl.bench_versus", str(tmp_path / "plan.json")]
    assert read_peer(command, tmp_path / "log", 240, rows.append) is None
    assert len(rows[0]["figures"]["curve"]) == 2 and rows[0]["figures"]["first_step_s"] > 0
