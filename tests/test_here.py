"""A run in one process, through the command line: the same program without Ray, and the weights checked after every copy."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from winnow.models.attach import attach, is_converted
from winnow.models.indexer import IndexerConfig
from winnow.models.load import load, load_tokenizer, save
from winnow.rewards.demonstrations import pretraining_texts
from winnow.rl import here
from winnow.rl.base import BaseOptions, make_model, make_tokenizer
from winnow.rl.cli import main
from winnow.rl.here import check_equal
from winnow.rollout.weights import WeightError


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    tokenizer = make_tokenizer(pretraining_texts(12, 0), 400, 512)
    made = make_model(tokenizer, BaseOptions(hidden=32, layers=1, heads=2, context=512))
    return save(
        attach(made, IndexerConfig(top_k=8, num_heads=2, head_dim=16, rope_dim=8)),
        tokenizer,
        tmp_path_factory.mktemp("m") / "tiny",
    )


def test_a_run_without_ray_trains_resumes_and_exports(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import ray

    monkeypatch.setattr(ray, "init", lambda **options: pytest.fail("Ray was started"))
    file = tmp_path / "run.yaml"
    file.write_text(
        f"name: r\nruns_dir: {tmp_path}\nmodel: {{path: {model}}}\nlearner: {{lr: 1.0e-3}}\n"
        "rollout: {samples: 4, num_pages: 256}\ncluster: {address: here}\n"
        "schedule: {steps: 2, save_every: 1, keep: 1, eval_every: 1}\nalgorithm: {max_failures: 1.0}\n"
        "domains: [{name: a, source: lookup, count: 8, holdout: 2, quota: 2, max_tokens: 4}]\n"
    )
    assert main(["train", str(file)]) == 0
    assert main(["train", str(file), "schedule.steps=3", "--resume"]) == 0
    rows = [json.loads(line) for line in (tmp_path / "r" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 1, 2, 3]
    assert all(
        row["mismatch/max_abs"] < 1e-5 and row["staleness/max"] == 0 for row in rows[1:]
    )  # the engine has the new weights
    assert main(["train", str(file), "--dry-run"]) == 0
    assert "by turns in this process, without a GPU; no Ray" in capsys.readouterr().out
    run, out = tmp_path / "r", tmp_path / "plain"
    assert main(["export", str(run), str(out), "--best", "--dtype", "bfloat16"]) == 0
    assert not (out / "learner.pt").exists() and is_converted(load(out)) and load_tokenizer(out) is not None
    origin = json.loads((out / "export.json").read_text())
    assert origin["checkpoint"] == json.loads((run / "result.json").read_text())["best"] and "held_out" in origin
    assert main(["export", str(run), str(tmp_path / "dense"), "--step", "3", "--dense"]) == 0
    dense, trained = load(tmp_path / "dense"), load(run / "checkpoints" / "step-000003").state_dict()
    assert not is_converted(dense) and all(
        torch.equal(value, trained[name]) for name, value in dense.state_dict().items()
    )
    for command, message in (("--step 9", "there are: step-"), ("", "exists and is not empty")):
        capsys.readouterr()
        assert main(["export", str(run), str(out), *command.split()]) == 1 and message in capsys.readouterr().err
    damaged = run / "checkpoints" / "step-000003" / "config.json"
    damaged.write_text(damaged.read_text() + " ")
    assert main(["export", str(run), str(tmp_path / "x"), "--step", "3"]) == 1
    assert "config.json is" in capsys.readouterr().err


@pytest.mark.parametrize(
    "override", ["schedule.kind=async", "rollout.workers=2", "learner.ranks=2", "learner.restarts=1"]
)
def test_what_needs_other_processes_is_refused(
    tmp_path: Path, model: Path, override: str, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(f"model: {{path: {model}}}\ndomains: [{{name: a, source: lookup}}]\ncluster: {{address: here}}\n")
    assert main(["train", str(file), override]) == 1
    assert "cluster.address is here" in capsys.readouterr().err


def test_a_tensor_that_differs_after_the_copy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    sent = {"a": torch.ones(3), "b": torch.arange(3.0)}
    check_equal({"a": torch.ones(3), "b": torch.arange(3.0)}, sent, 4)
    check_equal({"a": torch.ones(3, dtype=torch.bfloat16), "b": torch.arange(3.0)}, sent, 4)
    with pytest.raises(WeightError, match=r"version 4: tensor 'b' differs after the copy \(1 of 2 do\)"):
        check_equal({"a": torch.ones(3), "b": torch.zeros(3)}, sent, 4)
    monkeypatch.setattr(here, "LOT", 40)  # five lots, the third tensor alone in one that is too small for it
    names = ("a", "b", "c", "d", "e", "f")
    sizes = (2, 2, 99, 5, 5, 5)
    sent = {name: torch.randn(size).bfloat16() for name, size in zip(names, sizes, strict=True)}
    check_equal({name: tensor.clone() for name, tensor in sent.items()}, sent, 5)
    for name in names:
        for value in (float("nan"), sent[name][-1].item() * (1 + 2**-7)):  # and the next number of bf16
            held = {each: tensor.clone() for each, tensor in sent.items()}
            held[name][-1] = value
            with pytest.raises(WeightError, match=f"tensor '{name}' differs"):
                check_equal(held, sent, 5)
