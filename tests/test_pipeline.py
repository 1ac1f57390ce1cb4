"""The pipeline in one process, on a tiny model that says random digits: every stage, and what a restart does and does not do again."""

from __future__ import annotations

import dataclasses
import json
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from pipelines import Here, pipeline_config

from winnow.distill.store import read_rows, write_rows
from winnow.models.load import load, load_tokenizer, save
from winnow.rewards.demonstrations import demonstrations
from winnow.rewards.tasks import generate_tasks
from winnow.rl.batching import make_distillation_batch
from winnow.rl.cluster import Cluster, worker_spec
from winnow.rl.config import ConfigError, to_mapping
from winnow.rl.distillation import contamination, data_requests, generate_rows, rows_of
from winnow.rl.lineage import check_same_base, tokenizer_hash, weights_hash
from winnow.rl.manifest import Manifest
from winnow.rl.on_policy import distill_on_policy
from winnow.rl.pipeline import Pipeline
from winnow.rl.pipeline_config import DataConfig, PipelineConfig
from winnow.rl.provenance import trace_lines, trace_run
from winnow.rl.rendering import TrainingTemplate
from winnow.rl.results import result_table
from winnow.rl.sampler import TaskSampler, domain_tasks
from winnow.rl.teachers import Teachers
from winnow.rollout.local_pool import LocalPool
from winnow.rollout.template import ChatTemplate


def run(config: PipelineConfig, say: Any = None) -> tuple[dict[str, Any], list[str], Here]:
    lines: list[str] = []
    here = Here()
    result = Pipeline(config, lambda text: (lines.append(text), say(text) if say else None), here).run()
    return result, lines, here


def done_now(lines: list[str]) -> list[str]:
    return [line.split("] ")[1].split(":")[0] for line in lines if ": done in " in line]


@pytest.fixture(scope="module")
def finished(babbler: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], list[str], Here]:
    root = tmp_path_factory.mktemp("runs")
    return root, *run(pipeline_config(root, babbler))


STAGES = [
    "convert", "evaluation-base", "specialist-lookup", "specialist-sums", "data-lookup", "data-sums", "student", "mixed",
    "evaluation-specialist-lookup", "evaluation-specialist-sums", "evaluation-student", "evaluation-mixed", "evaluation-mixed-random",
    "evaluation-mixed-recent",
]  # fmt: skip


def test_every_stage_leaves_what_it_promises(finished: tuple[Path, dict[str, Any], list[str], Here]) -> None:
    root, result, lines, here = finished
    assert done_now(lines) == STAGES
    assert here.connections == 1, "one cluster serves all stages"
    assert set(result["domains"]) == {"lookup", "sums"}
    assert {"base", "specialist", "student", "mixed", "constant"} <= set(result["domains"]["sums"])
    assert {"mixed-random", "mixed-recent"} <= set(result["domains"]["lookup"]) - set(result["domains"]["sums"])
    assert json.loads((root / "p" / "result.json").read_text()) == result
    found = result["evaluation"]["mixed"]["lookup"]
    assert found["num_tasks"] == 6 and found["low"] <= found["mean"] <= found["high"]
    assert 0 < found["attention"]["mean_selected"] <= 8 < found["attention"]["mean_available"]
    assert found["attention"]["sparse_rows"] > 0.8
    assert "lookup with random positions" in result_table(result)
    assert (root / "p" / "report.html").stat().st_size > 10_000


def test_the_students_data_are_verified_and_name_their_specialist(
    finished: tuple[Path, dict[str, Any], list[str], Here],
) -> None:
    root, result, _, _ = finished
    rows = read_rows(root / "p" / "data" / "lookup.jsonl")
    assert rows and all(row.reward >= 1 and row.specialist == "specialist-lookup" for row in rows)
    assert {row.checkpoint for row in rows} == {result["models"]["specialist-lookup"]}
    assert all(row.index["mean_selected"] <= 8 for row in rows)


def test_every_model_differs_from_the_one_it_was_made_from(
    finished: tuple[Path, dict[str, Any], list[str], Here],
) -> None:
    _, result, _, _ = finished
    weights = {name: load(path).state_dict() for name, path in result["models"].items()}
    for name, origin in (("specialist-lookup", "base"), ("student", "base"), ("mixed", "student")):
        moved = [key for key in weights[name] if not torch.equal(weights[name][key], weights[origin][key])]
        assert any(".indexer." in key or "index" in key for key in moved), f"{name}: the indexer did not learn"
        assert any("lm_head" in key for key in moved), f"{name}: the model did not learn"


def test_a_restart_does_nothing_twice(finished: tuple[Path, dict[str, Any], list[str], Here], babbler: Path) -> None:
    root, result, _, _ = finished
    before = {file: file.stat().st_mtime_ns for file in (root / "p").rglob("*.safetensors")}
    again, lines, here = run(pipeline_config(root, babbler))
    assert done_now(lines) == [] and here.connections == 0
    assert again["domains"] == result["domains"]
    assert {file: file.stat().st_mtime_ns for file in (root / "p").rglob("*.safetensors")} == before


def test_a_changed_stage_is_done_again_with_all_that_follow_from_it(babbler: Path, tmp_path: Path) -> None:
    short = "stages=[convert, specialists, data, student]"
    run(pipeline_config(tmp_path, babbler, short))
    _, lines, _ = run(pipeline_config(tmp_path, babbler, short, "data.tasks=15"))
    assert done_now(lines) == ["data-lookup", "data-sums", "student"]
    (tmp_path / "p" / "data" / "sums.jsonl").unlink()
    _, lines, _ = run(pipeline_config(tmp_path, babbler, short, "data.tasks=15"))
    assert done_now(lines) == ["data-sums"], "the same inputs give the same rows, so the student need not be made again"
    events = [json.loads(line) for line in (tmp_path / "p" / "stages.jsonl").read_text().splitlines()]
    assert [e["event"] for e in events if e["stage"] == "student"] == ["begin", "done"] * 2
    one = "specialists={sums: {learner: {lr: 2.0e-4}}}"
    _, lines, _ = run(pipeline_config(tmp_path, babbler, short, "data.tasks=15", one))
    assert done_now(lines) == ["specialist-sums", "data-sums", "student"], "the other specialist is left alone"


def test_rows_lead_back_to_a_config_and_a_checkpoint_that_exist(
    finished: tuple[Path, dict[str, Any], list[str], Here], babbler: Path
) -> None:
    root, _, _, _ = finished
    for name in ("lookup", "sums"):
        noted = (root / "p" / "data" / f"{name}.config.yaml").read_text()
        for row in read_rows(root / "p" / "data" / f"{name}.jsonl"):
            assert (
                noted.startswith(f"# config {row.config_hash}\n") and (Path(row.checkpoint) / "config.json").is_file()
            )
            assert row.tokenizer == tokenizer_hash(load_tokenizer(babbler))
            assert 1 <= row.selection["passed"] <= row.selection["samples"] == 16 and row.selection["rank"] in (0, 1)
        assert (root / "p" / "data" / f"{name}.card.md").read_text().startswith("---")


class Counted:
    """A pool that notes what it was asked for, and dies after some groups."""

    def __init__(self, pool: Any, dies_after: int | None = None) -> None:
        self.pool, self.left, self.asked = pool, dies_after, []

    def generate(self, requests: Any) -> Iterator[Any]:
        self.asked += [request.request_id for request in requests]
        for number, group in enumerate(self.pool.generate(requests)):
            if number == self.left:
                raise KeyboardInterrupt
            yield group


def test_sampling_goes_on_with_the_missing_prompts_and_another_rule_needs_none(
    finished: tuple[Path, dict[str, Any], list[str], Here], tmp_path: Path
) -> None:
    root, result, _, _ = finished
    config = pipeline_config(root, Path(result["models"]["base"])).stage_run(
        "specialist", result["models"]["specialist-sums"], "sums"
    )
    options = DataConfig(tasks=16, samples=16, shard=4)
    with LocalPool(worker_spec(config)) as pool:
        whole, _ = generate_rows(config, options, Cluster(None, pool), tmp_path / "whole", "sums")  # type: ignore[arg-type]
        dying = Counted(pool, dies_after=10)
        with pytest.raises(KeyboardInterrupt):
            generate_rows(config, options, Cluster(None, dying), tmp_path / "cut", "sums")  # type: ignore[arg-type]
        again = Counted(pool)
        cut, _ = generate_rows(config, options, Cluster(None, again), tmp_path / "cut", "sums")  # type: ignore[arg-type]
        assert len(dying.asked) == 16 and len(again.asked) == 8, "two shards of four were kept"
        assert cut.read_bytes() == whole.read_bytes()
        strict, none = len(read_rows(cut)), Counted(pool)
        looser = dataclasses.replace(options, threshold=0.0, best=3)
        rows, found = generate_rows(config, looser, Cluster(None, none), tmp_path / "cut", "sums")  # type: ignore[arg-type]
        assert none.asked == [] and len(read_rows(rows)) > strict and found.sampled == {"sums": 256}
        generate_rows(config, options, Cluster(None, none), tmp_path / "cut", "sums", key="newer")  # type: ignore[arg-type]
        assert len(none.asked) == 16 and len(list((tmp_path / "cut" / "shards").iterdir())) == 1, (
            "stale samples are gone"
        )


def test_a_benchmark_that_leaks_into_the_prompts_is_refused(
    finished: tuple[Path, dict[str, Any], list[str], Here], tmp_path: Path
) -> None:
    root, result, _, _ = finished
    config = pipeline_config(root, Path("m")).stage_run("specialist", result["models"]["specialist-sums"], "sums")
    options = DataConfig(tasks=16, samples=16)
    tasks = data_requests(config, options, "sums")
    leak = tmp_path / "leak.jsonl"
    leak.write_text(
        "".join(json.dumps({"prompt": r.task.messages[-1]["content"].upper(), "answer": "1"}) + "\n" for r in tasks)
    )
    assert contamination(config, options).find(tasks[0].task.messages[-1]["content"]) is None, (
        "held-out tasks are others"
    )
    options = dataclasses.replace(options, benchmarks={str(leak): ""})
    with (
        LocalPool(worker_spec(config)) as pool,
        pytest.raises(ValueError, match=r"domain 'sums': .* stand in a benchmark"),
    ):
        generate_rows(config, options, Cluster(None, pool), tmp_path, "sums")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="unknown"):
        contamination(config, dataclasses.replace(options, benchmarks={"nothing": ""}))


def test_a_specialist_of_another_base_is_refused_with_both_hashes(babbler: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(babbler, other)
    wanted = [weights_hash(babbler), weights_hash(other)]
    assert wanted[0] == wanted[1], "a copy is the same base"
    check_same_base("sums", str(other), str(babbler))
    weights = other / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + b"\x01\x02\x03\x04")
    file = tmp_path / "sums.yaml"
    file.write_text(f"# another base\nmodel: {{path: {other}}}\ndomains: [{{name: sums, source: addition}}]\n")
    config = pipeline_config(tmp_path, babbler, f"specialists={{sums: {file}}}", "stages=[specialists]")
    with pytest.raises(ValueError, match=rf"'sums' starts from .*{weights_hash(other)}\).*{wanted[0]}\)"):
        run(config)
    file.write_text(
        f"model: {{path: {babbler}}}\nschedule: {{steps: 1}}\ndomains: [{{name: sums, source: addition, quota: 2}}]\n"
    )
    config = pipeline_config(tmp_path, babbler, f"specialists={{sums: {file}}}", "stages=[specialists]")
    own = config.stage_run("specialist", "m", "sums")
    assert (own.schedule.steps, own.domains[0].quota, own.domains[0].max_tokens) == (1, 2, 10)
    assert config.stage_run("specialist", "m", "lookup").schedule.steps == 2


def test_rows_of_another_tokenizer_are_refused_with_both_hashes(
    finished: tuple[Path, dict[str, Any], list[str], Here], tmp_path: Path
) -> None:
    root, _, _, _ = finished
    rows = read_rows(root / "p" / "data" / "sums.jsonl")
    write_rows([dataclasses.replace(row, tokenizer="0" * 12) for row in rows[1:]], tmp_path, "strange")
    assert rows_of(root / "p" / "data", rows[0].tokenizer, "m") and rows_of(tmp_path, "0" * 12, "m")
    with pytest.raises(
        ValueError, match=rf"strange\.jsonl: row .* tokenizer 0{{12}}, but m has tokenizer {rows[0].tokenizer}"
    ):
        rows_of(tmp_path, rows[0].tokenizer, "m")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"holds no \.jsonl file"):
        rows_of(tmp_path / "empty", "x", "m")


def test_a_student_of_teachers_and_of_rows_and_teachers(babbler: Path, tmp_path: Path) -> None:
    short = ("stages=[convert, specialists, data, student]", "run.schedule.steps=1", "student.steps=2")
    result, lines, _ = run(pipeline_config(tmp_path, babbler, *short, "student.method=both"))
    log = [json.loads(line) for line in (tmp_path / "p" / "student" / "on_policy.jsonl").read_text().splitlines()]
    assert [row["step"] for row in log] == [1, 2] and all(row["loss/distillation"] >= 0 for row in log)
    assert (tmp_path / "p" / "student" / "sft" / "config.json").is_file() and any(
        "on-policy step 2/2" in x for x in lines
    )
    sft, both = (load(p).state_dict() for p in (tmp_path / "p" / "student" / "sft", result["models"]["student"]))
    assert any(not torch.equal(sft[key], both[key]) for key in sft)
    only = ("stages=[convert, specialists, student]", *short[1:], "student.method=on_policy")
    result, lines, _ = run(pipeline_config(tmp_path, babbler, *only))
    assert done_now(lines) == ["student"], "no data are needed, and the specialists are the same"


def test_an_interrupted_run_goes_on_where_it_stopped(babbler: Path, tmp_path: Path) -> None:
    config = pipeline_config(tmp_path, babbler, "stages=[convert, specialists]", "run.schedule.steps=3")

    def interrupt(text: str) -> None:
        if "specialist-sums: step 2/3" in text:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(config, interrupt)
    assert json.loads((tmp_path / "p" / "specialist-sums" / "result.json").read_text())["status"] == "interrupted"
    _, lines, _ = run(config)
    assert done_now(lines) == ["specialist-sums"]
    assert any("specialist-sums: resuming" in line for line in lines)
    steps = [
        json.loads(line)["step"]
        for line in (tmp_path / "p" / "specialist-sums" / "metrics.jsonl").read_text().splitlines()
    ]
    assert steps == [1, 2, 3]


def test_a_stage_without_verified_rows_says_which_and_why(babbler: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"domain 'lookup' has no verified row: pass rate 0\.0%.*threshold 5"):
        run(pipeline_config(tmp_path, babbler, "data.threshold=5", "stages=[convert, specialists, data]"))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("dta.tasks=4", "unknown key dta: did you mean data"),
        ("data.task=4", "did you mean data.tasks"),
        ("data.best=0", "data.best is 0, but it must be >= 1"),
        ("stages=[student]", "'student' without 'data'"),
        ("stages=[mixed, student, data, specialists]", "in the order"),
        ("stages=[convrt]", "a pipeline's stages are base, convert"),
        ("run.learner.lr=-1", "learner.lr is -1"),
        ("specialist.domains=[{name: x}]", "not in run.domains"),
        ("mixed.schedule.step=1", "did you mean schedule.steps"),
        ("convert.topk=1", "did you mean convert.top_k"),
        ("convert.seq_len=4", "seq_len"),
        ("stages=[convert, data, student]", "'data' without 'specialists'"),
        ("specialists={x: {}}", "specialists.x is no domain"),
        ("specialists={sums: 3}", "a section of keys or a config file"),
        ("specialists={sums: {learner: {lr: -1}}}", "learner.lr is -1"),
        ("data.near=0", "data.near is 0"),
        ("data={min_pass_rate: 0.9, max_pass_rate: 0.1}", "above data.max_pass_rate"),
        ("student.method=opd", "sft, on_policy, both"),
        ("floors=maths", "the domains are lookup, sums"),
        ("run.domains=[]", "at least one domain"),
    ],
)
def test_a_config_that_cannot_work_is_refused_before_anything_starts(
    override: str, message: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message.replace("[", r"\[")):
        pipeline_config(tmp_path, tmp_path / "m", override)


def test_a_stage_changes_one_key_of_one_domain(tmp_path: Path) -> None:
    config = pipeline_config(tmp_path, tmp_path / "m", "mixed.domains=[{name: sums, beta: 0.5}]")
    betas = {domain.name: domain.beta for domain in config.stage_run("mixed", "m").domains}
    assert betas == {"lookup": 0.0, "sums": 0.5}
    assert [domain.name for domain in config.stage_run("specialist", "m", "sums").domains] == ["sums"]


def test_an_override_names_a_domain_within_a_section(tmp_path: Path) -> None:
    config = pipeline_config(tmp_path, tmp_path / "m", "run.domains.sums.quota=2", "run.domains.0.quota=1")
    assert [domain["quota"] for domain in config.run["domains"]] == [1, 2]
    with pytest.raises(ConfigError, match=r"run.domains.sum.quota=2': no domain is called 'sum'; the config has"):
        pipeline_config(tmp_path, tmp_path / "m", "run.domains.sum.quota=2")
    with pytest.raises(ConfigError, match="there are 2 domains, numbered from 0"):
        pipeline_config(tmp_path, tmp_path / "m", "run.domains.2.quota=2")


def test_a_damaged_manifest_is_named(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(ValueError, match=r"manifest\.json is damaged"):
        Manifest(tmp_path, "1", print)


def test_training_conversations_are_the_very_tokens_of_a_rollout(babbler: Path) -> None:
    tokenizer = load_tokenizer(babbler)
    template, chat = TrainingTemplate(tokenizer), ChatTemplate(tokenizer)
    task = generate_tasks("tool")[0]
    messages = demonstrations(task, Random(0))
    ids, mask = template.render(messages)
    expected, drawn = chat.prompt_ids(messages[:1]), []
    for number, message in enumerate(messages):
        if message["role"] == "assistant":
            reply = [*tokenizer(message["content"], add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
            drawn += list(range(len(expected), len(expected) + len(reply)))
            expected += reply
            following = messages[number + 1 : number + 2]
            if following:
                expected += chat.observation_ids(messages[: number + 1], following, expected[-1])
    assert ids == expected
    assert np.flatnonzero(mask).tolist() == drawn


def test_a_template_with_text_after_the_end_mark_is_not_learned() -> None:
    class Tokenizer:
        """One token a character; `.` ends a turn, a line break follows it."""

        chat_template, eos_token_id, all_special_ids = "x", ord("."), [ord(".")]

        def apply_chat_template(
            self, messages: list[dict[str, str]], tokenize: bool, add_generation_prompt: bool
        ) -> str:
            text = "".join(f"{m['role'][0]}:{m['content']}.\n" for m in messages)
            return text + ("a:" if add_generation_prompt else "")

        def __call__(self, text: str, add_special_tokens: bool) -> dict[str, list[int]]:
            return {"input_ids": [ord(c) for c in text]}

        def decode(self, ids: list[int], **_: Any) -> str:
            return "".join(map(chr, ids))

    talk = [
        {"role": r, "content": c} for r, c in (("user", "hi"), ("assistant", "yo"), ("user", "so"), ("assistant", "no"))
    ]
    ids, mask = TrainingTemplate(Tokenizer()).render(talk)
    assert "".join(map(chr, ids)) == "u:hi.\na:yo.\nu:so.\na:no."
    assert "".join(chr(i) if m else "_" for i, m in zip(ids, mask, strict=True)) == "_" * 8 + "yo." + "_" * 9 + "no."


# -------------------------------------------------------------------------------------------------------------- on-policy distillation


def teacher_that_says(digit: int, babbler: Path, folder: Path) -> str:
    """The babbler with one of its tokens made likelier, whatever the prompt."""
    model, tokenizer = load(babbler), load_tokenizer(babbler)
    with torch.no_grad():
        spoken = (model.lm_head.weight[:, 0] > 1).nonzero()[:, 0]
        model.lm_head.weight[spoken[digit], 0] += 0.6
    save(model, tokenizer, folder)
    return str(folder)


def test_the_student_comes_closer_to_the_teacher_of_each_domain(babbler: Path, tmp_path: Path) -> None:
    teachers = {
        "lookup": teacher_that_says(3, babbler, tmp_path / "t3"),
        "sums": teacher_that_says(7, babbler, tmp_path / "t7"),
    }
    config = pipeline_config(
        tmp_path, babbler, "run.indexer={train: frozen, selection: own}", "student_run={learner: {lr: 5.0e-3}}"
    ).stage_run("student", str(babbler))
    with Here()(config) as cluster:
        cluster.start(config)
        kl = distill_on_policy(config, cluster, teachers, 12, tmp_path / "log.jsonl", lambda _: None)
        assert np.mean(kl[-3:]) < 0.85 * np.mean(kl[:3]) and kl[0] > 0.05, kl
        rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
        assert rows[0]["mismatch/k3_kl"] < 1e-8, "the learner scores its own samples as the rollout did"
        drawn = [
            t
            for g in cluster.generate(TaskSampler(domain_tasks(config, "train"), config).requests(99))
            for t in g.trajectories
        ]
        own = cluster.learner.logprobs(drawn)  # type: ignore[attr-defined]
        right = Teachers(teachers).logprobs(drawn, 512)
        wrong = Teachers(dict(zip(teachers, reversed(teachers.values()), strict=True))).logprobs(drawn, 512)
        assert not np.allclose(np.concatenate(right), np.concatenate(wrong)), "each domain has its own teacher"
        assert [len(x) for x in right] == [len(x) for x in own] == [t.num_generated for t in drawn]
        with pytest.raises(ValueError, match=r"\['sums'\] have no teacher"):
            distill_on_policy(config, cluster, {"lookup": teachers["lookup"]}, 1, tmp_path / "x", lambda _: None)
        with pytest.raises(ValueError, match="domain 'lookup' has no teacher; there are teachers for sums"):
            Teachers({"sums": "x"}).logprobs([t for t in drawn if t.domain == "lookup"], 512)


def test_a_teacher_like_the_student_teaches_nothing_and_batches_are_checked(babbler: Path, tmp_path: Path) -> None:
    config = pipeline_config(tmp_path, babbler, "run.indexer={train: frozen, selection: own}").stage_run(
        "student", str(babbler)
    )
    with Here()(config) as cluster:
        cluster.start(config)
        drawn = [
            t
            for g in cluster.generate(TaskSampler(domain_tasks(config, "train"), config).requests(1))
            for t in g.trajectories
        ]
        report = cluster.learner.distill_step(drawn, {"lookup": str(babbler), "sums": str(babbler)}, 1)
        assert abs(report.metrics["loss/distillation"]) < 1e-8 and report.metrics["grad_norm"] < 1e-5
    scores = [np.zeros(t.num_generated, np.float32) for t in drawn]
    batch = make_distillation_batch(zip(drawn, scores, strict=True), step=1, micro_tokens=200)
    (update,) = batch.updates
    assert update.denominators.kl_tokens == sum(t.num_generated for t in drawn) and update.denominators.sequences == 0
    assert len(update.micro_batches) > 1 and all(m.teacher_logprobs is not None for m in update.micro_batches)
    long = max(drawn, key=lambda t: t.num_generated)
    with pytest.raises(ValueError, match="its teacher scored 1"):
        make_distillation_batch([(long, np.zeros(1, np.float32))], step=1, micro_tokens=9)
    greedy = dataclasses.replace(drawn[0], temperature=0.0)
    with pytest.raises(ValueError, match="temperatures"):
        make_distillation_batch([(greedy, scores[0])], step=1, micro_tokens=9)
    with pytest.raises(ValueError, match="no sample has a generated token"):
        make_distillation_batch([], step=1, micro_tokens=9)


# --------------------------------------------------------------------------------------------------------------------------- kill -9

CHILD = """
import json, sys
from contextlib import contextmanager, nullcontext
from winnow.rl.cluster import Cluster, worker_spec
from winnow.rl.learner import Learner
from winnow.rl.pipeline import Pipeline
from winnow.rl.pipeline_config import make_pipeline
from winnow.rollout.local_pool import LocalPool

@contextmanager
def connect(config):
    yield Cluster(Learner(config), LocalPool(worker_spec(config)))

config = make_pipeline(json.load(open(sys.argv[1])))
Pipeline(config, lambda text: print(text, flush=True), connect, lambda config, copies: nullcontext(), lambda config: True).run()
"""


@pytest.mark.slow
@pytest.mark.parametrize("width", [1, 2])
def test_killed_at_ten_random_points_it_completes_with_the_same_tables(
    babbler: Path, tmp_path: Path, width: int
) -> None:
    """SIGKILL after a random number of lines of progress and a random moment more, ten times; then to the end. `width`: stages at a time;
    the run that is not killed has one at a time."""
    for name, parallel in (("whole", 1), ("killed", width)):
        config = pipeline_config(
            tmp_path / name,
            babbler,
            f"parallel={parallel}",
            "run.schedule.save_every=1",
            "student={epochs: 2, batch_tokens: 400}",
        )
        (tmp_path / f"{name}.json").write_text(json.dumps(to_mapping(config)))

    def child(name: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", CHILD, str(tmp_path / f"{name}.json")]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    first = child("whole")
    whole, _ = first.communicate(timeout=600)
    assert first.returncode == 0, whole
    lines = len(whole.splitlines())
    rng, kills = Random(9), 0
    for _ in range(10):
        process = child("killed")
        assert process.stdout is not None
        for _ in range(rng.randint(1, max(2, lines // 6))):
            if not process.stdout.readline():
                break
        time.sleep(rng.uniform(0, 0.2))
        process.kill()
        kills += process.wait(60) == -signal.SIGKILL
    last = child("killed")
    output, _ = last.communicate(timeout=600)
    assert last.returncode == 0, output
    assert kills >= 8, "it must have been alive when it was killed"
    tables = [
        json.loads((tmp_path / name / "p" / "result.json").read_text())["domains"] for name in ("whole", "killed")
    ]
    assert tables[0] == tables[1]
    events = [json.loads(line) for line in (tmp_path / "killed" / "p" / "stages.jsonl").read_text().splitlines()]
    done = Counter(e["stage"] for e in events if e["event"] == "done")
    assert set(done.values()) == {1} and set(
        json.loads((tmp_path / "killed" / "p" / "manifest.json").read_text())
    ) == set(STAGES)
    begun = Counter(e["stage"] for e in events if e["event"] == "begin")
    assert sum(begun.values()) > len(STAGES), "some stage was interrupted"
    for name in ("lookup", "sums"):
        rows = [(tmp_path / way / "p" / "data" / f"{name}.jsonl").read_text() for way in ("whole", "killed")]
        assert [json.loads(x)["messages"] for x in rows[0].splitlines()] == [
            json.loads(x)["messages"] for x in rows[1].splitlines()
        ]


# -------------------------------------------------------------------------------------------------------------------------- provenance


def test_every_row_leads_back_and_what_was_tampered_with_is_named(
    finished: tuple[Path, dict[str, Any], list[str], Here], tmp_path: Path
) -> None:
    """On a copy elsewhere: paths that a run noted are looked for in the folder that it was moved to."""
    root, _, _, _ = finished
    run_folder = tmp_path / "moved" / "p"
    shutil.copytree(root / "p", run_folder)
    assert [(one.name, one.rows > 0, one.passed <= one.sampled) for one in trace_run(run_folder)] == [
        ("lookup", True, True),
        ("sums", True, True),
    ]
    lines = "\n".join(trace_lines(run_folder))
    assert "verified" in lines and "low_reward" in lines and "checkpoints/step-000002" in lines
    rows, data = read_rows(run_folder / "data" / "sums.jsonl"), run_folder / "data"
    [shard] = (run_folder / "data" / "shards").glob("sums@*/00000.jsonl")

    def broken(file: Path, change: Any, message: str) -> None:
        before = file.read_bytes()
        file.write_bytes(change(before))
        with pytest.raises(ValueError, match=message):
            trace_run(run_folder)
        file.write_bytes(before)

    last = f"sums\\.jsonl:{len(rows)}: "
    text = json.dumps(rows[-1].messages[-1]["content"]).encode()
    broken(
        data / "sums.jsonl",
        lambda b: b[: b.rindex(text)] + b'"12345"' + b[b.rindex(text) + len(text) :],
        last + "the messages do not",
    )
    reward = b'"reward": 1.0'
    broken(
        data / "sums.jsonl",
        lambda b: b[: b.rindex(reward)] + b'"reward": 2.0' + b[b.rindex(reward) + len(reward) :],
        last + "reward is 2.0",
    )
    broken(
        data / "sums.jsonl",
        lambda b: b.replace(b'"sample": ', b'"sample": 99', 1),
        r"sums\.jsonl:1: sample .* is in no shard",
    )
    broken(data / "sums.jsonl", lambda b: b.partition(b"\n")[2], r"rows of sums, but the summary keeps")
    broken(
        data / "sums.config.yaml",
        lambda b: b.replace(b"temperature: 1.0", b"temperature: 0.9", 1),
        r"sums\.config\.yaml says config",
    )
    broken(shard, lambda b: b[:-9] + b"\n", r"shard .*00000\.jsonl is damaged")
    broken(data / "sums.parquet", lambda b: b[: len(b) // 2], r"sums\.parquet is damaged")
    broken(data / "sums.parquet", lambda b: (data / "lookup.parquet").read_bytes(), r"sums\.parquet does not hold")
    weights = next((run_folder / "specialist-sums" / "checkpoints").glob("*/model.safetensors"))
    broken(weights, lambda b: b[:-1] + bytes([b[-1] ^ 1]), r"sums\.jsonl:1: .*model\.safetensors")
    broken(
        run_folder / "specialist-sums" / "config.yaml",
        lambda b: b.replace(b"seed: 0", b"seed: 1", 1),
        r"sums\.jsonl:1: .*it was changed",
    )
    trace_run(run_folder)  # everything is back
    gone = run_folder / "data" / "sums.jsonl"
    gone.write_text(gone.read_text().replace("step-000002", "step-000009"))
    with pytest.raises(ValueError, match=r"sums\.jsonl:1: checkpoint is .*step-000009"):
        trace_run(run_folder)
    shutil.rmtree(shard.parent)
    with pytest.raises(ValueError, match="the samples that sums was chosen from are not there"):
        trace_run(run_folder)
