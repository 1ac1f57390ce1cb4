"""The driver, end to end and in-process: a pool that samples with the real weights it was pushed, a real learner, a tiny model."""

from __future__ import annotations

import ast
import errno
import json
import os
import shutil
import signal
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from winnow.models import attach
from winnow.models.context import train_context
from winnow.models.forward import hidden_states, lm_head_weight
from winnow.models.indexer import IndexerConfig
from winnow.models.load import load, save
from winnow.rl import train as driver
from winnow.rl.checkpoints import list_checkpoints, read_checkpoint
from winnow.rl.cluster import Cluster
from winnow.rl.config import Config, ConfigError, load_config, make_config
from winnow.rl.interrupts import Interrupts
from winnow.rl.learner import Learner
from winnow.rl.metrics import engine_metrics
from winnow.rl.remote_learner import LearnerDied
from winnow.rl.sampler import TaskSampler, domain_tasks
from winnow.rl.train import train
from winnow.rollout import records
from winnow.rollout.schema import Group, Request, Trajectory
from winnow.rollout.weights import WeightUpdate, copy_into, unpack

VOCAB, PROMPT = 24, 9


class FakePool:
    """Samples token by token with whole forward passes; the reply is the last token's number, modulo 3."""

    def __init__(self, folder: Path) -> None:
        self.model = load(folder)
        self.versions: list[int] = []
        self.closed = 0
        self.reused = 0
        self.on_generate: Callable[[int], None] = lambda call: None
        self.calls = 0

    def push_weights(self, update: WeightUpdate, version: int) -> None:
        assert update.version == version
        copy_into(self.model, dict(unpack(update)), version)
        self.versions.append(version)

    def generate(self, requests: Sequence[Request]) -> Iterator[Group]:
        self.calls += 1
        self.on_generate(self.calls)
        for request in reversed(requests):  # any order is allowed
            yield Group(
                request=request, trajectories=tuple(self._sample(request, n) for n in range(request.num_samples))
            )

    @torch.no_grad()
    def score(self, sequences: Sequence[Sequence[int]]) -> list[np.ndarray]:
        found = []
        for tokens in map(torch.tensor, sequences):
            hidden = hidden_states(self.model, tokens, train_context([len(tokens)]))
            all_logprobs = (hidden[:-1] @ lm_head_weight(self.model).T).log_softmax(-1)
            found.append(all_logprobs.gather(1, tokens[1:, None])[:, 0].numpy())
        return found

    def stats(self) -> dict[int, dict[str, int]]:
        self.reused += 7  # since the last step
        return {0: {"reused_tokens": self.reused, "prefill_tokens": 2 * self.reused, "preemptions": 0}}

    def shutdown(self) -> None:
        self.closed += 1

    @torch.no_grad()
    def _sample(self, request: Request, number: int) -> Trajectory:
        seed = zlib.crc32(request.task.messages[0]["content"].encode())
        tokens = torch.randint(0, VOCAB, (PROMPT,), generator=torch.Generator().manual_seed(seed))
        generator = torch.Generator().manual_seed(request.sampling.seed * 100 + number)
        logprobs, sets = [0.0] * PROMPT, {}
        for _ in range(request.sampling.max_tokens):
            sets = {}
            hidden = hidden_states(self.model, tokens, train_context([len(tokens)], selection_out=sets))
            distribution = (hidden[-1] @ lm_head_weight(self.model).T).log_softmax(-1)
            greedy = request.sampling.temperature == 0
            token = (
                distribution.argmax()[None] if greedy else torch.multinomial(distribution.exp(), 1, generator=generator)
            )
            tokens = torch.cat([tokens, token])
            logprobs.append(float(distribution[token]))
        mask = np.arange(len(tokens)) >= PROMPT
        return Trajectory(
            request_id=request.request_id,
            sample=number,
            task_id=request.task.id,
            domain=request.task.domain,
            tokens=tokens.numpy().astype(np.int32),
            loss_mask=mask,
            rollout_logprobs=np.array(logprobs, np.float32),
            policy_versions=np.where(mask, self.versions[-1], -1).astype(np.int32),
            finish_reason="stop",
            messages=(*request.task.messages, {"role": "assistant", "content": str(int(tokens[-1]) % 3)}),
            temperature=request.sampling.temperature or 1.0,
            index_record=records.encode(sets, len(tokens)),
        )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape = LlamaConfig(
        vocab_size=VOCAB, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        max_position_embeddings=64,
    )  # fmt: skip
    model = attach.attach(LlamaForCausalLM(shape), IndexerConfig(top_k=4, num_heads=2, head_dim=8, rope_dim=4))
    return save(model, None, tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture
def make(folder: Path, tmp_path: Path) -> Callable[..., tuple[Config, Cluster, FakePool]]:
    tasks = tmp_path / "tasks.jsonl"
    tasks.write_text("".join(json.dumps({"prompt": f"question {i}", "answer": str(i % 3)}) + "\n" for i in range(40)))

    def build(*overrides: str) -> tuple[Config, Cluster, FakePool]:
        domain = {"source": str(tasks), "count": 12, "holdout": 4, "quota": 3, "max_tokens": 2, "reward": "number"}
        values = {
            "name": "r", "runs_dir": str(tmp_path / "runs"), "model": {"path": str(folder)}, "rollout": {"samples": 4},
            "domains": [{"name": "math", **domain}, {"name": "agent", **domain}], "learner": {"lr": 1e-2},
            "schedule": {"steps": 4, "save_every": 2, "keep": 2},
        }  # fmt: skip
        config = make_config(values, overrides)
        pool = FakePool(folder)
        return config, Cluster(Learner(config), pool, lambda: None), pool

    return build


def lines(config: Config) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (config.folder / "metrics.jsonl").read_text().splitlines()]


def test_a_run_leaves_its_whole_folder(make: Callable[..., Any]) -> None:
    config, cluster, pool = make("schedule.eval_every=2")
    said: list[str] = []
    result = train(config, cluster, said.append)
    assert result["status"] == "done" and result["step"] == 4 and len(said) == 5 and "reward" in said[1]
    assert (
        pool.versions == [0, 0, 1, 2, 3, 4] and result["drift"] == 0.0 and pool.closed == 0
    )  # a lent cluster stays up
    folder = config.folder
    assert json.loads((folder / "result.json").read_text()) == result
    assert load_config(folder / "config.yaml") == config
    before, *rows = lines(config)
    assert [row["step"] for row in rows] == [1, 2, 3, 4] and before["step"] == 0 and "eval/math" in before
    wanted = {
        "reward/mean", "reward/math", "reward/agent", "length/math", "mismatch/k3_kl", "mismatch/max_abs", "index/jaccard", "loss/policy",
        "grad_norm", "time/rollout_s", "time/learn_s", "time/sync_s", "tokens/rollout_per_s", "samples_per_s", "failures/timeout",
        "entropy", "clip_fraction", "staleness/max", "dropped/zero_variance", "token_share/math", "index/sparse_rows",
    }  # fmt: skip
    assert all(wanted <= set(row) for row in rows), wanted - set(rows[0])
    assert all(
        row["mismatch/max_abs"] < 1e-4 and row["index/jaccard"] == 1.0 and row["staleness/max"] == 0 for row in rows
    )
    assert "eval/math" in rows[1] and "eval/math" not in rows[0]
    samples = [json.loads(line) for line in (folder / "samples" / "step-000003.jsonl").read_text().splitlines()]
    assert len(samples) == 2 * 3 * 4 and {
        "task_id",
        "domain",
        "messages",
        "tokens",
        "reward",
        "parts",
        "finish_reason",
    } <= set(samples[0])
    checkpoint = read_checkpoint(Path(result["checkpoint"]))
    assert checkpoint.step == 4 and checkpoint.meta["seed"] == 0
    from transformers import AutoModelForCausalLM

    assert (
        AutoModelForCausalLM.from_pretrained(checkpoint.path).config.hidden_size == 16
    )  # the dense model, for everybody
    assert attach.is_converted(load(checkpoint.path))


def timeless(config: Config) -> list[dict[str, Any]]:
    """The run's metrics without those of a clock."""
    clocks = ("time/", "tokens/rollout", "samples_per_s", "learner/idle")
    return [{k: v for k, v in row.items() if not k.startswith(clocks)} for row in lines(config)]


def test_weights_that_change_on_their_way_end_the_run_before_its_first_step(make: Callable[..., Any]) -> None:
    """The second push of version 0 is an update that changes nothing; an engine whose head moves with every push is found by it."""
    config, cluster, pool = make()
    push = pool.push_weights

    def altered(update: WeightUpdate, version: int) -> None:
        push(update, version)
        with torch.no_grad():
            lm_head_weight(pool.model).mul_(1 + 1e-3 * len(pool.versions))

    pool.push_weights = altered
    with pytest.raises(RuntimeError, match="an update that changes nothing moved the rollout's log-probabilities by"):
        train(config, cluster, lambda text: None)
    assert pool.calls == 0, "nothing was sampled"
    result = json.loads((config.folder / "result.json").read_text())
    assert result["status"] == "failed" and "changes nothing" in result["error"]
    pool.push_weights = push
    pool.score = lambda sequences: [np.full(len(sequences[0]) - 1, np.nan)]
    with pytest.raises(RuntimeError, match="by nan nats"):
        train(replace(config, name="second"), cluster, lambda text: None)


def test_the_drift_check_reads_more_than_k_positions_and_fits_the_cache(make: Callable[..., Any]) -> None:
    config, cluster, pool = make()
    read: list[int] = []
    score = pool.score
    pool.score = lambda sequences: read.append(len(sequences[0])) or score(sequences)
    info = cluster.start(config)
    assert cluster.check_drift(config, info) == 0.0 and read == [64, 64], "k is 4, 64 the least"
    cluster.check_drift(replace(config, rollout=replace(config.rollout, num_pages=1)), info)
    assert read[2:] == [16, 16]
    cluster.check_drift(config, {**info, "context": 40})
    assert read[4:] == [40, 40]
    drawn = replace(config, indexer=replace(config.indexer, selector="random_ties"))
    assert cluster.check_drift(drawn, info) is None and len(read) == 6, "no two readings of it are alike"


def test_a_run_resumed_at_any_step_equals_the_uninterrupted_one(make: Callable[..., Any]) -> None:
    """Six steps are an epoch and a half (12 tasks, 3 a step): the stops lie in its middle, at its end and beyond it."""
    options = ("schedule.steps=6", "schedule.save_every=1", "schedule.keep=6", "algorithm.dynamic_rounds=1")
    config, cluster, _ = make("name=straight", *options)
    straight = load(train(config, cluster, lambda text: None)["checkpoint"]).state_dict()
    whole = timeless(config)
    assert any(row["dynamic/extra_prompts"] for row in whole)
    state = (config.folder / "checkpoints" / "step-000006" / "learner.pt").read_bytes()
    for stop in range(1, 6):
        again = make(f"name=from-{stop}", "resume=true", *options)[0]
        again.folder.mkdir(parents=True)
        shutil.copytree(
            config.folder / "checkpoints" / f"step-{stop:06d}", again.folder / "checkpoints" / f"step-{stop:06d}"
        )
        rows = (config.folder / "metrics.jsonl").read_text().splitlines(keepends=True)
        (again.folder / "metrics.jsonl").write_text(
            "".join(rows[: stop + 1])
        )  # one more than was saved: it is made again
        _, cluster, pool = make(f"name=from-{stop}", "resume=true", *options)
        result = train(again, cluster, lambda text: None)
        assert pool.versions == [stop, *range(stop, 7)] and result["step"] == 6
        tensors = load(result["checkpoint"]).state_dict()
        assert all(torch.equal(straight[name], tensors[name]) for name in straight), stop
        assert timeless(again) == whole, stop
        assert (Path(result["checkpoint"]) / "learner.pt").read_bytes() == state, stop


def test_a_full_disk_leaves_the_last_checkpoint_whole(
    make: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    config, cluster, _ = make("schedule.save_every=1")
    real, calls = torch.save, []

    def save_until_full(value: Any, path: Any, *rest: Any, **options: Any) -> None:
        calls.append(path)
        if len(calls) == 3:
            Path(path).write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        real(value, path, *rest, **options)

    monkeypatch.setattr(torch, "save", save_until_full)
    with pytest.raises(OSError, match="No space left"):
        train(config, cluster, lambda text: None)
    folder = config.folder / "checkpoints"
    assert [path.name for path in list_checkpoints(folder)] == ["step-000001", "step-000002"]
    assert read_checkpoint(folder / "step-000002").step == 2
    assert json.loads((config.folder / "result.json").read_text())["status"] == "failed"
    config, cluster, pool = make("schedule.save_every=1", "resume=true")
    assert train(config, cluster, lambda text: None)["step"] == 4 and pool.versions[0] == 2


@pytest.mark.parametrize(("kind", "bound"), [("one_step_off", 1), ("async", 3)])
def test_a_run_ahead_of_the_learner_trains_and_reports_its_staleness(
    make: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, kind: str, bound: int
) -> None:
    config, cluster, pool = make(f"schedule.kind={kind}", "schedule.max_staleness=3", "schedule.steps=6")
    lazily = pool.generate
    monkeypatch.setattr(
        pool, "generate", lambda requests: iter(list(lazily(requests)))
    )  # drawn when they are asked for
    assert train(config, cluster, lambda text: None)["step"] == 6
    rows = lines(config)
    assert [row["staleness/max"] for row in rows] == [min(step, bound) for step in range(6)]
    assert rows[0]["mismatch/max_abs"] < 1e-4 < rows[-1]["mismatch/max_abs"]  # the learner has moved on since
    assert all(0 <= row["learner/idle_share"] <= 1 for row in rows)


class Early:
    """Groups drawn when they are asked for, and an iterator that says so, as a real pool's does."""

    def __init__(self, groups: list[Group]) -> None:
        self.groups = groups

    def __iter__(self) -> Any:
        return self

    def __next__(self) -> Group:
        if not self.groups:
            raise StopIteration
        return self.groups.pop()

    def ready(self) -> list[Group]:
        return list(self.groups)


@pytest.mark.parametrize("stop", [2, 5])
def test_a_run_ahead_resumes_in_mid_buffer_to_the_bit(make: Callable[..., Any], stop: int) -> None:
    """Two further steps' groups are drawn and untrained at every checkpoint: the resumed run trains them as they are, and draws none again."""
    options = (
        "schedule.kind=async",
        "schedule.max_staleness=2",
        "schedule.steps=6",
        "schedule.save_every=1",
        "schedule.keep=6",
    )

    def eager(pool: FakePool) -> list[str]:
        asked, draw = [], pool.generate

        def generate(requests: Sequence[Request]) -> Early:
            asked.extend(r.request_id for r in requests)
            return Early(list(draw(requests)))

        pool.generate = generate  # type: ignore[method-assign, assignment]
        return asked

    config, cluster, pool = make("name=straight", *options)
    first = eager(pool)
    straight = load(train(config, cluster, lambda text: None)["checkpoint"]).state_dict()
    again, cluster, pool = make("name=again", "resume=true", *options)
    second = eager(pool)
    name = f"checkpoints/step-{stop:06d}"
    shutil.copytree(config.folder / name, again.folder / name)
    (again.folder / "metrics.jsonl").write_text((config.folder / "metrics.jsonl").read_text())
    tensors = load(train(again, cluster, lambda text: None)["checkpoint"]).state_dict()
    assert all(torch.equal(straight[name], tensors[name]) for name in straight)
    assert timeless(again) == timeless(config)
    assert second == [name for name in first if int(name.split("/")[0].removeprefix("step-")) > stop + 2]


def test_the_best_checkpoint_by_held_out_reward_is_kept_beside_the_newest(
    make: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = iter((0.1, 0.2, 0.9, 0.3, 0.3))
    monkeypatch.setattr(driver, "holdout_metrics", lambda config, generate, step: {"eval/math_reward": next(found)})
    config, cluster, _ = make("schedule.eval_every=1", "schedule.save_every=0", "schedule.keep=1")
    result = train(config, cluster, lambda text: None)
    names = [path.name for path in list_checkpoints(config.folder / "checkpoints")]
    assert names == ["step-000002", "step-000004"] and result["best"].endswith("step-000002")
    assert read_checkpoint(Path(result["best"])).meta["held_out"] == 0.9


class Dying:
    """A learner whose process is gone at a step, once."""

    def __init__(self, learner: Learner, at: int) -> None:
        self.learner, self.at = learner, at

    def __getattr__(self, name: str) -> Any:
        return getattr(self.learner, name)

    def step(self, batch: Any) -> Any:
        if batch.step == self.at:
            self.at = -1
            raise LearnerDied("the learner's rank 1 of 2 died during step")
        return self.learner.step(batch)


def test_a_dead_learner_is_replaced_where_asked_and_the_run_is_the_same(make: Callable[..., Any]) -> None:
    config, cluster, _ = make("name=straight", "schedule.save_every=1", "schedule.keep=4", "schedule.eval_every=4")
    straight = load(train(config, cluster, lambda text: None)["checkpoint"]).state_dict()
    for at in (1, 3):  # before the first checkpoint, and after one
        config2, plain, pool = make(
            f"name=dies-{at}", "schedule.save_every=2", "learner.restarts=1", "schedule.eval_every=4"
        )
        revived: list[int] = []
        dying = Dying(plain.learner, at)

        def revive(dying: Any = dying, revived: list[int] = revived) -> Any:
            revived.append(1)
            return dying

        lent = Cluster(dying, pool, lambda: None, revive)  # type: ignore[arg-type]
        said: list[str] = []
        result = train(config2, lent, said.append)
        assert (
            revived == [1]
            and result["status"] == "done"
            and any("started again (restart 1 of 1)" in text for text in said)
        )
        tensors = load(result["checkpoint"]).state_dict()
        assert all(torch.equal(straight[name], tensors[name]) for name in straight)
        assert [row["step"] for row in lines(config2)] == [0, 1, 2, 3, 4]
    config3, plain, pool = make("name=fails")
    with pytest.raises(LearnerDied, match="rank 1 of 2"):
        train(config3, Cluster(Dying(plain.learner, 2), pool), lambda text: None)  # type: ignore[arg-type]


def test_ctrl_c_in_a_rollout_saves_and_resume_goes_on(make: Callable[..., Any]) -> None:
    config, cluster, pool = make("schedule.save_every=0")
    pool.on_generate = lambda call: os.kill(os.getpid(), signal.SIGINT) if call == 3 else None
    before = signal.getsignal(signal.SIGINT)
    result = train(config, cluster, lambda text: None)
    assert (
        result["status"] == "interrupted"
        and result["step"] == 2
        and read_checkpoint(Path(result["checkpoint"])).step == 2
    )
    assert signal.getsignal(signal.SIGINT) is before and [row["step"] for row in lines(config)] == [1, 2]
    config, cluster, _ = make("resume=true")
    assert train(config, cluster, lambda text: None)["status"] == "done"
    assert [row["step"] for row in lines(config)] == [1, 2, 3, 4]


def test_a_signal_waits_for_the_end_of_a_held_block() -> None:
    reached = []
    with pytest.raises(KeyboardInterrupt), Interrupts() as interrupts, interrupts.held():
        os.kill(os.getpid(), signal.SIGTERM)
        reached.append("end")
    assert reached == ["end"]


def test_a_failure_is_written_and_raised(make: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    config, cluster, pool = make()

    def fail(call: int) -> None:
        if call == 2:
            raise RuntimeError("worker 1 is gone")

    pool.on_generate = fail
    with pytest.raises(RuntimeError, match="worker 1 is gone"):
        train(config, cluster, lambda text: None)
    result = json.loads((config.folder / "result.json").read_text())
    assert result["status"] == "failed" and result["step"] == 1 and "worker 1 is gone" in result["error"]
    assert len(lines(config)) == 1


def test_an_existing_run_is_not_overwritten(make: Callable[..., Any]) -> None:
    config, cluster, _ = make("schedule.steps=1")
    train(config, cluster, lambda text: None)
    with pytest.raises(ConfigError, match="already holds a run: set resume=true"):
        train(config, cluster, lambda text: None)


def test_an_owned_cluster_is_closed_also_after_a_failure(
    make: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    config, cluster, pool = make("schedule.steps=1")
    monkeypatch.setattr(driver, "connect", lambda config: cluster)
    pool.on_generate = lambda call: 1 / 0  # type: ignore[assignment, return-value]
    with pytest.raises(ZeroDivisionError):
        train(config, None, lambda text: None)
    assert pool.closed == 1


def test_tasks_cover_each_epoch_and_depend_only_on_the_step(make: Callable[..., Any]) -> None:
    config, _, _ = make()
    sampler = TaskSampler(domain_tasks(config, "train"), config)
    steps = [sampler.requests(step) for step in range(1, 9)]
    for epoch in (steps[:4], steps[4:]):
        names = [request.task.id for requests in epoch for request in requests if request.task.domain == "math"]
        assert len(names) == len(set(names)) == 12
    assert [r.task.id for r in steps[0]] != [r.task.id for r in steps[4]]
    assert sampler.requests(3) == steps[2]
    assert len({request.sampling.seed for requests in steps for request in requests}) == 8 * 6
    held = {task.id for tasks in domain_tasks(config, "heldout").values() for task in tasks}
    assert held and not held & {task.id for tasks in sampler.tasks.values() for task in tasks}
    with pytest.raises(ValueError, match="lower the quota"):
        TaskSampler({"math": [], "agent": []}, config)


def test_the_driver_stays_readable() -> None:
    source = Path(driver.__file__).read_text()
    assert len(source.splitlines()) <= 100
    assert "──>" in (ast.get_docstring(ast.parse(source)) or "")


def test_metrics_of_the_engines_and_of_the_records(make: Callable[..., Any]) -> None:
    """Packed bytes by trained token, and what was found in the cache since the step before, also after a worker was replaced."""
    config, cluster, _ = make("schedule.steps=2")
    train(config, cluster, lambda text: None)
    for line in lines(config):
        assert line["engine/reused_tokens"] == 7 and line["engine/reused_share"] == pytest.approx(1 / 3, abs=1e-5)
        rows, samples = json_rows(config, line["step"]), 24
        assert len(rows) == samples
        packed, trained = sum(row["index_record_bytes"] for row in rows), sum(sum(row["loss_mask"]) for row in rows)
        assert line["index_record/bytes_per_token"] == pytest.approx(packed / trained, rel=1e-5)
        raw = sum(4 * 2 * (len(row["tokens"]) - 1 - 4) * 4 for row in rows)  # 2 layers, k 4
        assert line["index_record/share_of_int32"] == pytest.approx(packed / raw, rel=1e-5)
    before, now = {0: {"reused_tokens": 90}}, {0: {"reused_tokens": 5, "prefill_tokens": 15}, 1: {"reused_tokens": 5}}
    assert engine_metrics(before, now)["engine/reused_tokens"] == 10  # worker 0 is another process now


def json_rows(config: Config, step: int) -> list[dict[str, Any]]:
    path = config.folder / "samples" / f"step-{step:06d}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()]
