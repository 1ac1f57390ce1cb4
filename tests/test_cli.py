"""The command line: messages and exit codes of wrong input, a dry run, and the verbs that work on a model folder, through main()."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from winnow.rewards.demonstrations import pretraining_texts
from winnow.rl import verbs
from winnow.rl.base import BaseOptions, make_model, make_tokenizer
from winnow.rl.cli import main


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("model") / "tiny"
    tokenizer = make_tokenizer(pretraining_texts(12, 0), 400, 512)
    make_model(tokenizer, BaseOptions(hidden=32, layers=1, heads=2, context=512)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def config(tmp_path: Path, model: Path) -> Path:
    file = tmp_path / "run.yaml"
    file.write_text(
        f"name: r\nruns_dir: {tmp_path}\nmodel: {{path: {model}}}\n"
        "domains: [{name: sums, source: addition, count: 8, holdout: 4, quota: 2, max_tokens: 4}]\n"
    )
    return file


BAD = [
    (
        "train nowhere.yaml",
        "config file nowhere.yaml does not exist, and the shipped configs are ablation, agent, agent_thinking",
    ),
    ("train demo", "is the config of a pipeline (it has 'run'): winnow pipeline "),
    ("pipeline train", "is the config of one run (it has 'domains'): winnow train "),
    ("pipeline CONFIG", "is the config of one run (it has 'domains'): winnow train "),
    ("train CONFIG learner.lrr=1", "unknown key learner.lrr: did you mean learner.lr?"),
    ("train CONFIG learner.lr=fast", "learner.lr is 'fast', but it must be a number"),
    ("train CONFIG rollout.samples=1", "rollout.samples is 1, but it must be >= 2"),
    ("train CONFIG algorithm.name=grppo", "did you mean grpo?"),
    ("train CONFIG domains.maths.quota=2", "no domain is called 'maths'"),
    ("train CONFIG indexer.selection=replay rollout.record_indices=false", "record_indices"),
    ("train CONFIG model.path=nowhere", "model folder 'nowhere' does not exist"),
    ("pipeline demo dta.tasks=1", "did you mean data?"),
    ("distill demo student.epoch=1", "did you mean student.epochs?"),
    ("convert nowhere out", "model folder 'nowhere' does not exist"),
    ("convert MODEL out topk=3", "unknown key topk: did you mean top_k?"),
    ("convert MODEL out top_k=300", "set seq_len to several times top_k"),
    ("convert MODEL out top_k=0", "convert.top_k is 0, but it must be >= 1"),  # before minutes of sampling, not after
    ("convert MODEL out top_k=-1", "convert.top_k is -1, but it must be >= 1"),
    ("convert MODEL out index_rope_dim=5", "indexer.rope_dim is 5, but it must be even"),
    ("convert MODEL out --config train", "train has no section `convert`, only "),
    ("convert MODEL out --config convert_8k top_k=9000", "convert.seq_len is 8192 and top_k 9000"),
    ("convert MODEL out --config convert_8k sparse_stepz=1", "unknown key sparse_stepz: did you mean sparse_steps?"),
    ("train convert_8k", "is the config of a conversion: winnow convert MODEL OUT --config "),
    ("eval nowhere --tasks lookup", "model folder 'nowhere' does not exist"),
    ("eval MODEL --tasks lokup", "benchmark 'lokup' is unknown: known are lookup, tool, rubric, addition, gsm8k"),
    ("eval MODEL --tasks gsm8k", "give --data"),
    ("eval MODEL --tasks lookup --samples 2", "temperature"),
    ("generate MODEL nowhere.jsonl", "there is no file nowhere.jsonl"),
    ("report nowhere", "there is no run folder nowhere"),
    ("report .", "is not a run folder"),
    ("submit --address 127.0.0.1:1 --timeout 1 train demo", "no Ray dashboard answers at http://127.0.0.1:1"),
]


@pytest.mark.parametrize(("command", "message"), BAD)
def test_bad_input_is_one_clear_message_and_exit_code_1(
    command: str,
    message: str,
    config: Path,
    model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("WINNOW_DEBUG", raising=False)
    words = [{"CONFIG": str(config), "MODEL": str(model)}.get(word, word) for word in command.split()]
    assert main(words) == 1
    error = capsys.readouterr().err
    assert message in error and error.startswith(f"winnow {words[0]}: ")
    assert "Traceback" not in error and error.count("\n") <= 3, error


@pytest.mark.parametrize(
    "command",
    [
        "",
        "frobnicate",
        "train",
        "train CONFIG lr",
        "eval MODEL",
        "eval MODEL --tasks x --limit 0",
        "bench nothing",
        "submit",
        "train CONFIG --fast",
    ],
)
def test_wrong_usage_is_exit_code_2(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(command.split())
    assert end.value.code == 2
    assert "usage: winnow" in capsys.readouterr().err


def test_overrides_may_follow_an_option_and_a_dry_run_starts_nothing(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", str(config), "--dry-run", "learner.lr=0.5", "domains.sums.quota=3", "rollout.workers=2"]) == 0
    plan = capsys.readouterr().out
    assert "lr: 0.5" in plan and "quota: 3" in plan
    assert "learner: 1 CPU" in plan and "rollout worker 1: 1 CPU" in plan and "GiB" in plan
    assert not (tmp_path / "r").exists()


def test_the_demo_can_be_planned_without_a_model(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["pipeline", "demo", "--dry-run"]) == 0
    plan = capsys.readouterr().out
    assert "specialist-lookup" in plan and "mixed" in plan and "# placement" in plan


def test_convert_eval_and_generate_on_a_folder(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "texts.txt").write_text("ann has 7 . bob keeps red . " * 300)
    (tmp_path / "small.yaml").write_text(
        "convert: {index_heads: 2, index_dim: 8, index_rope_dim: 4, seq_len: 64, sparse_steps: 9}"
    )
    options = "data=texts.txt top_k=8 warmup_batches=1 sparse_steps=1 holdout_tokens=128"
    assert main(["convert", str(model), "sparse", "--config", "small.yaml", *options.split()]) == 0
    report = json.loads(Path("sparse/conversion.json").read_text())
    assert report["retention"]["recall"]["indexer"]["mean"] > 0
    assert report["options"]["index_dim"] == 8 and len(report["sparse"]["kl"]) == 1  # the command wins over the file
    assert main(["convert", "sparse", "again"]) == 1
    capsys.readouterr()

    assert (
        main(["eval", "sparse", "--tasks", "lookup,addition", "--limit", "4", "--max-tokens", "4", "--threads", "1"])
        == 0
    )
    table = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in table] == ["domain", "lookup", "addition"]
    answers = [json.loads(line) for line in Path("sparse.answers.jsonl").read_text().splitlines()]
    assert len(answers) == 8 and answers[0]["index_excerpt"]["k"] == 8

    Path("prompts.jsonl").write_text(
        '{"prompt": "how many has ann ?"}\n{"messages": [{"role": "user", "content": "say red"}]}\n'
    )
    assert (
        main(
            [
                "generate",
                "sparse",
                "prompts.jsonl",
                "--samples",
                "2",
                "--max-tokens",
                "3",
                "--threads",
                "1",
                "--out",
                "replies.jsonl",
            ]
        )
        == 0
    )
    rows = [json.loads(line) for line in Path("replies.jsonl").read_text().splitlines()]
    assert sorted(row["prompt"] for row in rows) == ["prompts.jsonl:1"] * 2 + ["prompts.jsonl:2"] * 2
    assert all(row["logprob"] <= 0 and row["num_tokens"] <= 3 for row in rows)
    Path("broken.jsonl").write_text('{"prompt": "a"}\n{"promt": "b"}\n')
    assert main(["generate", "sparse", "broken.jsonl"]) == 1
    assert "broken.jsonl:2: no field is a prompt" in capsys.readouterr().err


def test_shipped_configs_are_found_by_name() -> None:
    assert verbs.find_config("demo") == verbs.find_config("configs/demo.yaml") or Path("configs/demo.yaml").is_file()
    assert verbs.find_config("demo").name == "demo.yaml"


def test_ctrl_c_ends_with_130_and_a_message(model: Path, tmp_path: Path) -> None:
    """Before anything is trained, while the engine generates: the process must end by itself, soon, without a traceback."""
    prompts = tmp_path / "p.txt"
    prompts.write_text("how many has ann ?\n" * 3000)
    command = [
        sys.executable,
        "-m",
        "winnow.rl.cli",
        "generate",
        str(model),
        str(prompts),
        "--max-tokens",
        "20",
        "--batch",
        "4",
    ]
    out = tmp_path / "out.jsonl"
    process = subprocess.Popen(
        [*command, "--out", str(out)], stderr=subprocess.PIPE, text=True, env=dict(os.environ),
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background job would hand down "ignored"
    )  # fmt: skip
    deadline = time.monotonic() + 90
    while not (out.exists() and out.stat().st_size) and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130, error
    assert "interrupted" in error and "Traceback" not in error
    assert all(json.loads(line)["prompt"] for line in out.read_text().splitlines())
