"""`winnow bench scaling` and `bench sync`: what they run, on GPUs too, and what they make of it; slow: whole, with gloo and mapped memory."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from winnow.rl import bench_scaling, placement
from winnow.rl.bench_scaling import PLACES, Made, ScalingBench, coin, curve, schedule, throughput
from winnow.rl.cli import main
from winnow.rl.grading import prepared_tasks
from winnow.rl.transports import transport_of

SMALL = ["--prompts", "2", "--samples", "4", "--tokens", "8"]


def made_for(tmp_path: Path, **options: Any) -> Made:
    bench = ScalingBench(
        **{"model": str(tmp_path / "m"), "prompts": 2, "samples": 4, "tokens": 8, "steps": 5, **options}
    )
    return Made(bench, tmp_path, 60.0, lambda text: None)


@pytest.mark.parametrize(("place", "gpus"), [("one", [1.0]), ("two", [1.0, 1.0]), ("apart", [1.0, 1.0])])
def test_every_place_is_one_that_auto_would_take_the_same_way(place: str, gpus: list[float], tmp_path: Path) -> None:
    config = made_for(tmp_path, device="cuda").config("x", place)
    assert [bundle["GPU"] for bundle in placement.bundles(config)] == gpus
    free = made_for(tmp_path, device="cuda").config("x", place, "cluster.transport=auto")
    assert transport_of(config) == transport_of(free) == ("nccl" if place == "apart" else "ipc")
    assert config.prompts_per_step == 2 * PLACES[place][1] and config.model.dtype == "bfloat16"
    here = made_for(tmp_path).config("x", place)
    assert here.cluster.learner_gpus == 0 and transport_of(here) == transport_of(config)
    assert len(prepared_tasks(here, print)["coin"]) == 4 * here.prompts_per_step


def test_the_coin_falls_both_ways_and_on_the_sample_alone() -> None:
    samples = [SimpleNamespace(tokens=np.array([3, n], np.int32)) for n in range(8)]
    assert [coin(None, sample).value for sample in samples] == [1.0, 0.0] * 4


def test_what_cannot_be_compared_is_refused(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for arguments, message in (
        (["scaling", "--suite", "speed"], "part 'speed' is unknown: the parts are throughput, schedule, curve, kills"),
        (["scaling", "--suite", "curve"], "name it by --config"),
        (["scaling", "--device", "cuda"], "cuda has 1 GPUs here, and this compares two with one"),
        (["sync", "--suite", "mpi"], "'mpi' is unknown: the transports are nccl, ipc, store"),
        (["sync", "--model", "gpt"], "shape 'gpt' is unknown"),
    ):
        assert main(["bench", *arguments]) == 1
        assert message in capsys.readouterr().err


def test_rows_are_medians_of_the_counted_steps_and_ratios_of_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two GPUs sample twice and learn 1.5 times as fast; a run ahead takes 0.6 of a step; the third part's second run fails."""
    clock = [0.0]
    monkeypatch.setattr(bench_scaling.time, "perf_counter", lambda: clock[0])

    def fake(config: Any, progress: Any, seconds: float) -> None:
        assert seconds == 60.0
        if config.name == "curve-two":
            raise RuntimeError("no such GPU\nand more")
        two, ahead = config.learner.ranks == 2, config.schedule.kind != "sync"
        config.folder.mkdir(parents=True)
        with (config.folder / "metrics.jsonl").open("w") as file:
            for step in range(1, 6):
                clock[0] += 20.0 if step < 3 else 0.6 if ahead else 1.0
                row = {
                    "step": step, "time/rollout_s": 0.5, "time/reward_s": 0.0, "time/learn_s": 0.4, "time/sync_s": 0.1,
                    "tokens/rollout_per_s": 1.0 if step < 3 else 200.0 if two else 100.0, "tokens/trained": 60.0 if two else 40.0,
                    "loss/policy": 0.25 + (config.name == "curve-apart") / 8, "entropy": 2.0, "grad_norm": 1.0, "reward/mean": step / 10,
                }  # fmt: skip
                file.write(json.dumps(row) + "\n")
                progress(f"step {step}/5 and so on")

    monkeypatch.setattr("winnow.rl.train.train", fake)
    rows: list[dict[str, Any]] = []
    made = made_for(tmp_path, config="smollm2")

    def add(row: dict[str, Any]) -> dict[str, Any]:
        rows.append(row)
        return row

    for part in (throughput, schedule, curve):
        part(made, add)
    by_name = {row["row"]: row for row in rows}
    one = by_name["throughput one"]
    assert one["step_s"] == 1.0 and one["rollout_tokens_per_s"] == 100.0 and one["trained_tokens_per_s"] == 100.0
    assert by_name["two over one"] == {"row": "two over one", "rollout": 2.0, "learner": 1.5}
    assert by_name["one step off over sync"]["step"] == 0.6
    assert by_name["curve two"]["failed"] == "RuntimeError: no such GPU" and "curve two against one" not in by_name
    apart = by_name["curve apart against one"]
    assert apart["first_step_difference"] == {"loss/policy": 0.125, "entropy": 0.0, "grad_norm": 0.0}
    assert apart["reward_of_last_5"] == {"one": 0.3, "apart": 0.3}


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_bench_scaling_runs_and_survives_its_kills(tmp_path: Path) -> None:
    parts, out = ["throughput", "schedule", "kills"], tmp_path / "figures.json"
    assert (
        main(["bench", "scaling", "--suite", *parts, *SMALL, "--steps", "3", "--limit-s", "600", "--out", str(out)])
        == 0
    )
    rows = {row["row"]: row for row in json.loads(out.read_text())["figures"]["rows"]}  # Ray prints of the deaths, too
    assert not [row for row in rows.values() if "failed" in row]
    assert rows["two over one"]["learner"] > 0 and rows["one step off over sync"]["step"] > 0
    killed = rows["kills"]
    assert killed["status"] == "done" and killed["missing"] == [] and killed["twice"] == 0
    assert 0 < killed["engine_named_after_s"] < 60 and 0 < killed["rank_named_after_s"] < 60


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_bench_sync_compares_every_way_with_the_broadcast(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "sync", "--model", "tiny", "--layers", "1"]) == 0
    rows = json.loads(capsys.readouterr().out)["figures"]["rows"]
    assert [row["row"] for row in rows] == ["sync nccl", "sync ipc", "sync store"]
    for row in rows:
        assert row["equal"] and row["gb_per_s"] > 0 and set(row["engine_s"]) == {"receive", "load"}, row
        assert row["share_of_nccl"] == pytest.approx(row["gb_per_s"] / rows[0]["raw_gb_per_s"], rel=0.5)
