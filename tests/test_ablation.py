"""`winnow bench ablation`, and the two experiments that it needs: a top-k with random ties, and a rollout whose weights come late."""

from __future__ import annotations

import json
import os
import re
import signal
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from winnow.kernels import ops
from winnow.kernels.selection import exact_topk, with_random_ties
from winnow.models.attach import attach
from winnow.models.indexer import IndexerConfig
from winnow.models.load import save
from winnow.rewards.demonstrations import pretraining_texts
from winnow.rewards.language import NAMES
from winnow.rl import bench_ablation
from winnow.rl.ablation_page import as_markdown
from winnow.rl.ablation_table import write_table
from winnow.rl.base import BaseOptions, make_model, make_tokenizer
from winnow.rl.bench_ablation import FINAL, Ablation, Running
from winnow.rl.cli import main
from winnow.rl.config import Config, ConfigError, load_config, make_config
from winnow.rl.train import train

CONFIG = """
name: a
learner: {lr: 1.0e-2}
rollout: {samples: 4, num_pages: 256}
evaluation: {limit: 2}
algorithm: {truncated: keep}
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One layer whose indexer's weights are 0: every score is a tie."""
    torch.manual_seed(0)
    tokenizer = make_tokenizer(pretraining_texts(12, 0), 400, 512)
    made = attach(
        make_model(tokenizer, BaseOptions(hidden=32, layers=1, heads=2, context=512)),
        IndexerConfig(top_k=8, num_heads=2, head_dim=16, rope_dim=8),
    )
    with torch.no_grad():
        made.model.layers[0].self_attn.indexer.ww.weight.zero_()
    return save(made, tokenizer, tmp_path_factory.mktemp("m") / "tiny")


@pytest.fixture
def config(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run that learns something: its reward differs between samples of a random model."""
    (tmp_path / "uneven_reward.py").write_text(
        "from winnow.rollout.schema import Score\n"
        "def parity(task, trajectory):\n    return Score(value=float(int(trajectory.tokens.sum()) % 2))\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.syspath_prepend(tmp_path)
    file = tmp_path / "a.yaml"
    texts = [" ".join(f"{name} {(number + i) % 10} ." for i, name in enumerate(NAMES[:30])) for number in range(40)]
    rows = tmp_path / "facts.jsonl"
    rows.write_text("".join(json.dumps({"prompt": text, "answer": "1"}) + "\n" for text in texts))
    domain = (
        f"{{name: a, source: {rows}, count: 8, holdout: 2, quota: 2, max_tokens: 3, reward: 'uneven_reward:parity'}}"
    )
    file.write_text(f"{CONFIG}model: {{path: {model}}}\ndomains: [{domain}]\n")
    return file


# ------------------------------------------------------------------------------------------------------------------------ random ties


def test_random_ties_keep_the_order_of_scores_that_differ_in_16_bits() -> None:
    torch.manual_seed(0)
    scale = torch.tensor([1e-30, 1.0, 1e30])[torch.arange(64) % 3, None]
    scores = (torch.randn(64, 200) * scale).to(torch.bfloat16).float()
    scores[:, ::7] = 0.0
    scores[:, 3::7] = -0.0
    drawn = with_random_ties(scores)
    below, above = scores[:, :, None] < scores[:, None], drawn[:, :, None] < drawn[:, None]
    assert bool(above[below].all()), "a smaller score must stay smaller"
    assert not torch.equal(drawn, with_random_ties(scores)) and drawn.dtype == torch.float64
    special = torch.tensor([[float("inf"), -float("inf"), float("nan")]])
    assert with_random_ties(special).tolist()[0][:2] == [float("inf"), -float("inf")]
    assert bool(with_random_ties(special)[0, 2].isnan())


def test_near_ties_of_16_bits_and_zeros_of_both_signs_are_drawn_evenly() -> None:
    torch.manual_seed(0)
    plateau = torch.tensor([0.0, -0.0, 0.0, -0.0, 1.0, -1.0]).repeat(4000, 1)
    chosen = exact_topk(with_random_ties(plateau), torch.full((4000,), 6), 2).indices  # 1.0, and one of four zeros
    assert bool((chosen[:, 1] == 4).all())
    counts = torch.bincount(chosen[:, 0], minlength=4)
    assert counts.shape == (4,) and bool((counts > 850).all()), counts
    near = torch.tensor([1.0, 1.0 + 2**-10]).repeat(400, 1)  # apart in fp32, equal in bfloat16
    first = exact_topk(with_random_ties(near), torch.full((400,), 2), 1).indices.float().mean()
    assert 0.4 < float(first) < 0.6


def test_every_mode_of_selection_draws_ties_and_obeys_the_causal_bound() -> None:
    torch.manual_seed(0)
    length, k = 40, 4
    q, keys, w = torch.randn(length, 2, 16), torch.randn(length, 16), torch.zeros(length, 2)
    bounds, positions = torch.tensor([0, length], dtype=torch.int32), torch.arange(length)
    table, lens = torch.tensor([[0]], dtype=torch.int32), torch.tensor([length], dtype=torch.int32)
    pages = keys[None]

    def packed() -> torch.Tensor:
        return ops.select_packed(q, keys, w, bounds, positions, k, "random_ties").indices

    def paged() -> torch.Tensor:
        return ops.select_prefill(q, pages, w, bounds, positions, table, lens, k, "random_ties").indices

    def decode() -> torch.Tensor:
        return ops.select_paged(q[-1:], pages, w[-1:], table, lens, k, "random_ties").indices

    for select in (packed, paged, decode):
        found = select()
        bound = positions if len(found) > 1 else positions[-1:]
        assert bool((found <= bound[:, None]).all()) and not torch.equal(found, select())
        assert bool((found[-1].diff() > 0).all()), "ascending, none twice"
    exact = ops.select_packed(q, keys, w, bounds, positions, k).indices
    assert torch.equal(exact[-1], torch.arange(4)), "the rule elsewhere: the lowest positions win"


# ------------------------------------------------------------------------------------------------------------------------- late weights


def test_weights_that_come_every_third_step_make_samples_that_much_older(tmp_path: Path, config: Path) -> None:
    run = load_config(
        config,
        [
            f"runs_dir={tmp_path}",
            "cluster.address=here",
            "schedule.sync_every=3",
            "schedule.steps=5",
            "schedule.keep=0",
        ],
    )
    result = train(run, progress=lambda text: None)
    rows = [json.loads(line) for line in (tmp_path / "a" / "metrics.jsonl").read_text().splitlines()]
    assert [row["staleness/max"] for row in rows] == [0, 1, 2, 0, 1]
    assert all(row["tokens/trained"] for row in rows), "each step must have something to compare"
    for row in rows:
        assert (row["mismatch/max_abs"] < 1e-5) == (row["staleness/max"] == 0), row["step"]
    assert result["checkpoint"] is None and not (tmp_path / "a" / "checkpoints").exists()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["indexer.selector=random_ties", "indexer.selection=replay"], "indexer.selector is random_ties"),
        (["schedule.sync_every=2", "schedule.kind=async"], "has a staleness of its own"),
        (["schedule.sync_every=2", "algorithm.recompute_old=true"], "sync_every is 2, but"),
    ],
)
def test_experiments_that_would_show_nothing_are_refused(overrides: list[str], message: str) -> None:
    good = {"model": {"path": "m"}, "domains": [{"name": "a", "source": "lookup"}]}
    with pytest.raises(ConfigError, match="set") as error:
        make_config(good, overrides)
    assert message in str(error.value)
    assert make_config(good, ["schedule.sync_every=2", "algorithm.recompute_old=true", "algorithm.correction=tis"])


# ---------------------------------------------------------------------------------------------------------------------------- the bench


def test_variants_run_beside_each_other_and_one_that_fails_is_named(
    tmp_path: Path, config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(bench_ablation.VARIANTS, "broken", ("model.path=no/such/model",))
    out = tmp_path / "out"
    command = [
        "bench",
        "ablation",
        "--config",
        str(config),
        "--out",
        str(out),
        "--steps",
        "2",
        "--seeds",
        "3",
        "--parallel",
        "3",
    ]
    assert main([*command, "--only", "deterministic", "random_ties", "broken"]) == 1
    said = capsys.readouterr()
    assert "1 of 3 runs failed: broken-s3: " in said.err and "no/such/model" in said.err
    found = json.loads((out / "table.json").read_text())
    assert {name: run["status"] for name, run in found["runs"].items()} == {
        "deterministic-s3": "done", "random_ties-s3": "done", "broken-s3": "failed",
    }  # fmt: skip
    assert "broken" not in found["variants"] and "broken-s3" not in found["figures"], "a failure is no score of 0"
    assert found["steps"] == 2 and "broken-s3: failed after 0 steps" in (out / "table.md").read_text()
    exact, drawn = (found["figures"][f"{name}-s3"] for name in ("deterministic", "random_ties"))
    assert exact["jaccard_fresh"] == 1 and exact["k3_fresh"] < 1e-9
    assert drawn["jaccard_fresh"] < 0.5 and drawn["k3_fresh"] > 1e-6, "all scores are ties: nearly disjoint sets"
    assert exact["length_over_k"]["min"] >= 8 and exact["held_out"] is not None
    assert "<polyline" in (out / "selection.svg").read_text()
    lines: list[str] = []
    again = Ablation(
        config=config,
        out=out,
        variants=("deterministic",),
        seeds=(3,),
        overrides=("schedule.steps=2",),
        say=lines.append,
    )
    assert again.run()["runs"]["deterministic-s3"]["status"] == "done" and lines == ["deterministic-s3: done before"]


def fake_run(
    folder: Path, variant: str, seed: int, rewards: list[list[float]], tasks: str = "", **changes: Any
) -> Running:
    """A run that has ended: rewards[step][prompt] of two equal samples, each of two tokens after a prompt of 70. tasks: a name a prompt."""
    config: Config = make_config(
        {
            "model": {"path": "m"},
            "domains": [{"name": "a", "source": "lookup"}],
            "name": f"{variant}-s{seed}",
            "runs_dir": str(folder),
            "seed": seed,
        }
    )
    run = Running(f"{variant}-s{seed}", config, status="done")
    (run.folder / "samples").mkdir(parents=True)
    with (run.folder / "metrics.jsonl").open("w") as stream:
        for step, of_step in enumerate(rewards, 1):
            row = {
                "step": step, "reward/mean": sum(of_step) / len(of_step), "entropy": 1.0, "mismatch/k3_kl": 1e-4 * step, "index/jaccard": 0.9,
                "clip_fraction": 0.0, "grad_norm": float(step), "staleness/max": 0.0, "time/learn_s": 0.5, "time/rollout_s": 0.25,
                "tokens/trained": 4.0, **changes,
            }  # fmt: skip
            stream.write(json.dumps(row) + "\n")
            samples = [
                {
                    "request_id": f"{step}/{n}",
                    "task_id": tasks[n] if tasks else str(n),
                    "reward": value,
                    "loss_mask": [0] * 70 + [1, 1],
                }
                for n, value in enumerate(of_step)
                for _ in range(2)
            ]
            samples.append(
                {"request_id": f"{step}/0", "task_id": "0", "failure": {"kind": "error"}, "loss_mask": [0] * 9 + [1]}
            )
            (run.folder / "samples" / f"step-{step:06d}.jsonl").write_text("\n".join(map(json.dumps, samples)))
    (run.folder / FINAL).write_text(
        json.dumps({"status": "done", "eval": {"eval/a": 0.5, "eval/a_low": 0.4, "eval/a_high": 0.6}})
    )
    return run


def test_figures_are_those_of_the_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("winnow.rl.ablation_table.top_k_of", lambda path: 10)
    runs = [
        fake_run(tmp_path, "deterministic", 0, [[0.0, 0.5], [0.5, 1.0]]),
        fake_run(tmp_path, "deterministic", 1, [[0.5, 0.5], [0.5, 0.5]]),
        fake_run(tmp_path, "tis", 0, [[0.25, 0.75], [0.75, 1.25], [9.0, 9.0]], **{"masked/tis_capped": 0.1}),
        fake_run(tmp_path, "opsm", 0, [[1.0, 1.0], [1.0, 1.0]]),
    ]
    runs[-1].status, runs[-1].why = "failed", "a reason"
    found = write_table(tmp_path, runs)
    assert found["steps"] == 2, "the third step of one run is nobody else's"
    exact, tis = found["variants"]["deterministic"], found["variants"]["tis"]
    assert exact["reward_all"] == [0.5, 0.5, 0.5] and exact["seeds"] == 2 and exact["masked"] == [0, 0, 0]
    assert tis["reward_all"][0] == 0.75 and tis["masked"][0] == pytest.approx(0.1) and tis["step_s"][0] == 0.75
    assert tis["k3"][0] == pytest.approx(1.5e-4) and tis["grad_norm_max"][0] == 2
    assert tis["difference"]["all"][0] == 0.25 and tis["difference"]["prompts"] == 4, (
        "seed 0 against seed 0, prompt by prompt"
    )
    assert found["figures"]["tis-s0"]["length_over_k"] == {"k": 10, "min": 7.0, "median": 7.1}
    assert found["by_length"]["tis"] == {"2": [8, 0.75]}, "the failed samples count nowhere"
    curves = [json.loads(line) for line in (tmp_path / "curves.jsonl").read_text().splitlines()]
    assert len(curves) == 6 and curves[0]["run"] == "deterministic-s0" and curves[0]["reward"][0] == 0.25
    assert curves[0]["reward"][1] <= 0.25 <= curves[0]["reward"][2] and curves[1]["mismatch/k3_kl"] == 2e-4
    text = as_markdown(found)
    assert (
        "NOT ALL rows see 8 k" in text and "opsm-s0: failed after 2 steps. a reason" in text and "| opsm |" not in text
    )


def test_runs_that_end_in_the_same_moment_are_all_settled_as_what_they_are(
    tmp_path: Path, config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("winnow.rl.ablation_table.top_k_of", lambda path: 10)
    said: list[str] = []
    ablation = Ablation(config=config, out=tmp_path, variants=("deterministic",), seeds=(), say=said.append)
    for variant, code in (("deterministic", 0), ("tis", 0), ("opsm", -9)):
        run = fake_run(tmp_path, variant, 0, [[0.0, 1.0]])
        run.status, run.process = "running", SimpleNamespace(poll=lambda code=code: code)  # type: ignore[assignment]
        ablation.runs.append(run)
    (ablation.runs[2].folder / FINAL).unlink()
    (ablation.runs[2].folder / "run.log").write_text("a line\nMemory is full\n\n")
    found = ablation.write()
    assert {name: run["status"] for name, run in found["runs"].items()} == {
        "deterministic-s0": "done", "tis-s0": "done", "opsm-s0": "failed",
    }  # fmt: skip
    assert found["runs"]["opsm-s0"]["why"] == "killed by signal 9: Memory is full" and len(said) == 3


def test_prompts_are_paired_by_their_task_and_every_seed_is_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("winnow.rl.ablation_table.top_k_of", lambda path: 10)
    runs = [
        fake_run(tmp_path, "sparse", 0, [[0.5, 0.5]], tasks="ab"),
        fake_run(tmp_path, "dense", 0, [[0.25, 0.75]], tasks="ac"),  # the second prompt of the step is another task
        fake_run(tmp_path, "sparse", 1, [[1.0, 0.0]], tasks="xy"),
        fake_run(tmp_path, "dense", 1, [[0.0, 0.5]], tasks="xy"),
    ]
    for run in runs[:1]:
        metrics = run.folder / "metrics.jsonl"
        metrics.write_text(metrics.read_text().replace('"mismatch/k3_kl": 0.0001', '"mismatch/k3_kl": null'))
    found = write_table(tmp_path, runs, at_a_time=2)
    assert "not finite" in (tmp_path / "table.md").read_text(), "what blew up is shown, and the table is written"
    apart = found["variants"]["sparse"]["difference"]
    assert apart["prompts"] == 3 and apart["seeds"] == {"0": 0.25, "1": 0.25}
    assert apart["all"][0] == pytest.approx(0.25) and apart["windows"] == [[1, 1, *apart["all"]]]
    assert "difference" not in found["variants"]["dense"], "sparse minus dense, not the other way round"
    equal = found["at_equal_length"]["sparse"]
    assert equal["difference"][0] == pytest.approx(0.5 - 0.375) and equal["lengths"] == 1 and equal["share"] == 1
    # rewards of 8 samples each, [.5 x4, 1, 1, 0, 0] and [.25, .25, .75, .75, 0, 0, .5, .5]
    variance = (1.0 / 7 + 0.625 / 7) / 8
    assert equal["difference"][2] - equal["difference"][0] == pytest.approx(1.96 * variance**0.5)
    text = as_markdown(found)
    assert "0: +0.250, 1: +0.250" in text and "2 runs shared the device" in text and "| sparse | 0.5 | 0.25 |" in text
    assert "sparse minus dense: +0.125" in text and "reward minus dense's" in text
    assert (tmp_path / "difference.svg").read_text().count("<polyline") >= 2


def test_a_run_that_is_left_out_and_sets_that_were_not_recorded_are_said_to_be_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("winnow.rl.ablation_table.top_k_of", lambda path: 10)
    runs = [fake_run(tmp_path, "sparse", 0, [[1.0]] * 4), fake_run(tmp_path, "dense", 0, [[0.0]])]
    bare = replace(runs[0].config.rollout, record_indices=False)
    runs[0].config = replace(runs[0].config, rollout=bare)
    runs[1].status = "cut"
    found = write_table(tmp_path, runs)
    assert found["steps"] == 4 and list(found["variants"]) == ["sparse"]
    assert found["figures"]["sparse-s0"]["jaccard"] is None, "1.0 would be the figure of sets that were compared"
    assert "dense-s0: cut after 1 steps. left out of the table" in as_markdown(found).replace("  ", " ")


@pytest.mark.slow
def test_a_run_that_was_cut_goes_on_where_it_was(tmp_path: Path, config: Path) -> None:
    lines: list[str] = []

    def ablation() -> Ablation:
        return Ablation(
            config=config, out=tmp_path, variants=("deterministic",), seeds=(0,), overrides=("schedule.steps=30",), say=lines.append
        )  # fmt: skip

    first = ablation()
    (run,) = first.runs
    first._go, first._leader = tmp_path / "go", run
    first._start_some()
    assert run.process is not None
    deadline = time.monotonic() + 120
    while len(run.rows()) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    run.process.send_signal(signal.SIGTERM)
    run.process.wait(60)
    first.write()
    done = len(run.rows())
    assert run.status == "cut" and 2 <= done < 30 and bench_ablation.read_final(run.folder)["eval"], run.why
    again = ablation().run()
    assert f"deterministic-s0: goes on after step {done}" in lines and again["runs"]["deterministic-s0"]["steps"] == 30
    assert [row["step"] for row in run.rows()] == list(range(1, 31)) and again["steps"] == 30
    assert not (run.folder / "checkpoints").exists() and bench_ablation.status_before(run.config) == "done"
    (Path(run.config.model.path) / "note").write_text("another model now")
    assert bench_ablation.status_before(run.config) is None
    (Path(run.config.model.path) / "note").unlink()


def test_sparse_and_dense_are_compared_on_facts_in_long_texts(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "text.txt"
    text.write_text(" ".join(f"{name} saw {number} ." for number, name in enumerate(NAMES * 20)))
    command = [
        "bench", "sparse-dense", "--model", str(model), "--text", str(text), "--out", str(tmp_path / "out"), "--seeds", "0", "--steps", "2",
        "--lengths", "480", "--set", "domains.0.count=8", "domains.0.holdout=2", "domains.0.quota=1", "domains.0.max_tokens=4",
        "domains.0.reward=each_number", "rollout.samples=2", "rollout.num_pages=256", "learner.micro_tokens=2048",
    ]  # fmt: skip
    assert main([*command, "--lengths", "12"]) == 1 and "nothing would be sparse" in capsys.readouterr().err
    assert main(command) == 0
    found = json.loads((tmp_path / "out" / "table.json").read_text())
    assert list(found["variants"]) == ["sparse", "dense"] and found["steps"] == 2
    assert found["variants"]["sparse"]["difference"]["prompts"] == 2, "the same prompts for both"
    assert "Median seconds of the parts of a step" in capsys.readouterr().out
    (tasks,) = (tmp_path / "out").glob("tasks-480-*.jsonl")
    rows = [json.loads(line) for line in tasks.read_text().splitlines()]
    assert len(rows) == 15 and all(476 - 24 <= row["tokens"] <= 476 for row in rows)
    for row in rows[:3]:
        numbers = row["answer"].split()
        names = re.findall(r"secret number of (\w+) is \.\.\.", row["prompt"])
        assert len(names) == 2 and [
            f"number of {n} is {v}." in row["prompt"] for n, v in zip(names, numbers, strict=True)
        ]


def test_a_variant_that_nobody_knows_is_refused(config: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="choose among kl, deterministic"):
        Ablation(config=config, out=tmp_path, variants=("nothing",))
    with pytest.raises(ConfigError, match=r"variant kl: learner\.lr is -1"):
        Ablation(config=config, out=tmp_path, variants=("kl",), overrides=("learner.lr=-1",))
