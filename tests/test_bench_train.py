"""`winnow bench step | learner`: whole and honest on a tiny model; what only a GPU shows is tested on made-up records."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from winnow.rl import bench_learner
from winnow.rl.cli import main


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


def test_bench_learner_trains_each_row_of_a_shape(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "learner", "--model", "tiny", "--layers", "1", "--lengths", "96"]) == 0
    rows = json.loads(capsys.readouterr().out)["figures"]["rows"]
    assert [row["row"] for row in rows] == list(bench_learner.ROWS)
    assert all(row["length"] == 96 and row["tokens_per_s"] > 0 and row["peak_gib"] > 0 for row in rows)
    assert main(["bench", "learner", "--model", "v3.2"]) == 1
    assert "none of tiny, small, qwen3-0.6b, qwen3-1.7b" in capsys.readouterr().err


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
    monkeypatch.setattr(bench_learner, "allocations", lambda step: [*allowed, planted])
    row = bench_learner.measure(Fake(), 4096, 1)  # type: ignore[arg-type]
    assert ("wrong" in row) == bool(planted) and row["largest_gib"] >= 0


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
