"""Routing replay: experts recorded by the engine whatever happened to a sample, replayed by the learner, gradients at the recorded experts."""

from __future__ import annotations

import io
import json
import pickle
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import DeepseekV32Config, DeepseekV32ForCausalLM, GlmMoeDsaConfig, GlmMoeDsaForCausalLM

from winnow.models import load as folders
from winnow.models.attach import indexer_calls, use_winnow_attention
from winnow.models.context import train_context
from winnow.models.forward import hidden_states
from winnow.models.routing import routers, routing_choices
from winnow.rewards import grader_pool
from winnow.rewards.demonstrations import pretraining_texts
from winnow.rl.advantages import Sample
from winnow.rl.base import make_tokenizer
from winnow.rl.batching import TrainBatch, make_batch
from winnow.rl.config import ConfigError, make_config
from winnow.rl.learner import Learner, StepRefused
from winnow.rl.metrics import record_metrics
from winnow.rl.schedule import _Groups
from winnow.rl.train import train
from winnow.rollout import records
from winnow.rollout.engine import Engine, EngineConfig
from winnow.rollout.schema import ExpertRecord, Group, Request, Sampling, Task, Trajectory
from winnow.rollout.sequence import Sequence as Live

TOP_K, EXPERTS, CHOSEN, VOCAB = 8, 16, 3, 61
SHAPE = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "max_position_embeddings": 256, "initializer_range": 0.2,
    "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 4, "moe_intermediate_size": 16, "n_routed_experts": EXPERTS,
    "num_experts_per_tok": CHOSEN, "n_group": 4, "topk_group": 2, "kv_lora_rank": 16, "q_lora_rank": 24, "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 12, "v_head_dim": 10, "index_topk": TOP_K, "index_head_dim": 16, "index_n_heads": 2, "first_k_dense_replace": 1,
    "eos_token_id": None, "bos_token_id": None, "pad_token_id": None,
}  # fmt: skip
FAMILIES: dict[str, Any] = {
    "deepseek": lambda: DeepseekV32ForCausalLM(DeepseekV32Config(**SHAPE)),
    "glm": lambda: GlmMoeDsaForCausalLM(GlmMoeDsaConfig(**SHAPE, indexer_types=["full", "shared", "full"])),
}


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def make(family: str = "deepseek", seed: int = 0, opened: bool = True) -> Any:
    torch.manual_seed(seed)
    model = FAMILIES[family]().eval()
    for layer in model.model.layers[1:]:
        layer.mlp.gate.e_score_correction_bias.normal_(std=0.05)
    if opened:
        use_winnow_attention(model)
    return model


def make_engine(model: Any, **changes: Any) -> Engine:
    sizes = {"page_size": 4, "num_pages": 200, "max_batch": 8, "prefill_chunk": 16}
    return Engine(model, None, EngineConfig(**{**sizes, "record_indices": True, "record_experts": True, **changes}))


def prompt_of(length: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(0, VOCAB, length).tolist()


@torch.no_grad()
def trained_experts(model: Any, tokens: Sequence[int]) -> np.ndarray:
    """[2 layers, tokens, CHOSEN]: what the routers choose in one training pass over the whole sequence."""
    out: dict[int, torch.Tensor] = {}
    hidden_states(model, torch.tensor(list(tokens)), train_context([len(tokens)], experts_out=out))
    assert sorted(out) == [1, 2]
    return torch.stack([out[1], out[2]]).numpy()


def check(model: Any, sample: Live) -> None:
    """Every input of a sample went, as recorded, to the experts that one training pass over it chooses."""
    record = sample.expert_record((1, 2))
    assert record.num_rows == len(sample.tokens) - 1 > 3 * TOP_K and record.experts.dtype == np.uint8
    np.testing.assert_array_equal(record.experts, trained_experts(model, sample.tokens)[:, :-1])


# The routers


@pytest.mark.parametrize("family", FAMILIES)
def test_the_routers_choose_and_weigh_as_those_of_transformers(family: str) -> None:
    ours, theirs = make(family), make(family, opened=False)
    hidden = torch.randn(200, 32, generator=torch.Generator().manual_seed(1))
    assert list(routers(ours)) == [1, 2] and ours.state_dict().keys() == theirs.state_dict().keys()
    for layer, router in routers(ours).items():
        logits, gates, experts = router(hidden)
        want_logits, want_gates, want = routers(theirs)[layer](hidden)
        order = want.sort(-1)
        assert torch.equal(logits, want_logits) and torch.equal(experts, order[0])
        torch.testing.assert_close(gates, want_gates.gather(1, order[1]), rtol=1e-6, atol=0)
    assert routing_choices(ours) == 2


# The record


@pytest.mark.parametrize("family", FAMILIES)
def test_experts_are_recorded_whatever_happened_to_the_sample(family: str) -> None:
    """Prefills in chunks, samples of one prompt, prompts found in the cache, samples pushed out and computed again, a second turn."""
    model = make(family)
    roomy, tight = make_engine(model), make_engine(model, num_pages=34, prefill_chunk=9)
    common = prompt_of(24)
    prompts = [common + prompt_of(9 + i, i) for i in range(3)] + [common[:21]]
    for engine in (roomy, tight, tight):  # the last time over what the time before left
        for group in engine.generate(prompts, Sampling(max_tokens=20, seed=2), 2):
            for sample in group:
                check(model, sample)
    assert tight.stats["reused_tokens"] > 100
    assert tight.scheduler.preemptions > 0 and roomy.scheduler.preemptions == 0
    [sample] = roomy.add(prompt_of(30, 9), Sampling(max_tokens=8, seed=1), 1, "turns")
    for _ in range(3):
        while sample.finish is None:
            roomy.step()
        roomy.extend(sample, prompt_of(7, 5))
    while sample.finish is None:
        roomy.step()
    roomy.release(sample)
    assert len(sample.tokens) == 30 + 4 * 8 + 3 * 7
    check(model, sample)


def test_after_an_update_the_record_is_of_the_new_weights() -> None:
    """A sample that goes on under new weights is computed anew, and so are its experts; pages of the old ones are not found any more."""
    model, after = make(), make(seed=5)
    engine = make_engine(model)
    [sample] = engine.add(prompt_of(30), Sampling(max_tokens=40, seed=1), 1, "a")
    while len(sample.tokens) < 50:
        engine.step()
    assert not np.array_equal(trained_experts(model, sample.tokens), trained_experts(after, sample.tokens))
    engine.load_weights({name: tensor.clone() for name, tensor in after.state_dict().items()}, 1)
    while sample.finish is None:
        engine.step()
    engine.release(sample)
    assert set(sample.versions[30:]) == {0, 1}
    check(after, sample)


def test_a_record_is_small_whole_and_exact() -> None:
    rng = np.random.default_rng(0)
    layers, rows = 58, 200  # the layers of DeepSeek-V3.2 that have experts: 8 of 256 each
    chosen = np.sort(
        rng.permuted(np.broadcast_to(np.arange(256, dtype=np.uint8), (layers, rows, 256)), axis=-1)[..., :8]
    )
    record = ExpertRecord(layers=tuple(range(3, 61)), experts=chosen)
    assert np.array_equal(record.experts, chosen) and record.experts.dtype == np.uint8 and record.k == 8
    assert (
        0.757 * 464 < record.nbytes / rows < 0.81 * 464
    )  # a byte each would be 464 a token; log2 of the sets is 0.757 of that
    part = _Groups(io.BytesIO(pickle.dumps([record.cut(7)]))).load()[
        0
    ]  # as it comes from a worker, or out of a checkpoint
    assert part.num_rows == 7 and np.array_equal(part.experts, chosen[:, :7]) and record.num_rows == rows
    wide = np.sort(rng.permuted(np.broadcast_to(np.arange(300, dtype=np.uint16), (2, 5, 300)), axis=-1)[..., :8])
    assert np.array_equal(ExpertRecord(layers=(0, 1), experts=wide).experts, wide)
    with pytest.raises(ValueError, match="not ascending"):
        ExpertRecord(layers=(0, 1), experts=wide[..., ::-1])
    with pytest.raises(ValueError, match="want uint8 or uint16"):
        ExpertRecord(layers=(0, 1), experts=wide.astype(np.int64))
    other = ExpertRecord(layers=(0, 2), experts=wide)
    for given, lengths, message in (
        ([other, None], [5, 5], "sequence 1 has none"),
        ([other], [6], "5 rows for 6 inputs"),
        ([other, ExpertRecord(layers=(0, 1), experts=wide)], [5, 5], "different models"),
    ):
        with pytest.raises(ValueError, match=message):
            records.decode_experts(given, lengths)
    with pytest.raises(ValueError, match="the expert record has 5 rows, want 4"):
        replace(bare_trajectory(5), expert_record=other)


# The learner


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Experts in pairs with equal router rows, three of them chosen: at the end of every choice stands a tie, which the bias decides."""
    model = make(opened=False)
    with torch.no_grad():
        for router in routers(model).values():
            router.weight[1::2] = router.weight[::2]
            router.e_score_correction_bias.zero_()[::2] = 1e-6
    path = tmp_path_factory.mktemp("model") / "moe"
    model.save_pretrained(path)
    return path


def learner_for(folder: Path, tmp_path: Path, *overrides: str) -> Learner:
    values = {"runs_dir": str(tmp_path), "model": {"path": str(folder)}, "domains": [{"name": "d", "source": "x"}]}
    learner = Learner(make_config({**values, "learner": {"lr": 1e-3, "micro_tokens": 100}}, overrides))
    learner.load()
    return learner


def bare_trajectory(length: int) -> Trajectory:
    return Trajectory(
        request_id="r", sample=0, task_id="t", domain="d", tokens=np.zeros(length, np.int32), loss_mask=np.zeros(length, bool),
        rollout_logprobs=np.zeros(length, np.float32), policy_versions=np.full(length, -1, np.int32), finish_reason="stop", messages=(),
    )  # fmt: skip


def rollout_of(folder: Path) -> list[Trajectory]:
    """Samples of 45 to 63 tokens, far beyond top_k, with what the engine recorded of them."""
    engine = make_engine(folders.load(folder))
    groups = engine.generate([prompt_of(33), prompt_of(15, 1)], Sampling(max_tokens=30, seed=3), 2)
    made = []
    for number, sample in enumerate(s for group in groups for s in group):
        versions = np.array(sample.versions, np.int32)
        made.append(
            replace(
                bare_trajectory(len(versions)),
                request_id=f"r{number}",
                tokens=np.array(sample.tokens, np.int32),
                loss_mask=versions >= 0,
                rollout_logprobs=np.array(sample.logprobs, np.float32),
                policy_versions=versions,
                index_record=sample.index_record(TOP_K, engine.layers, np.uint16),
                expert_record=sample.expert_record((1, 2)),
            )
        )
    return made


def batch_of(trajectories: Sequence[Trajectory]) -> TrainBatch:
    samples = [
        Sample(trajectory=t, group=i // 2, advantage=1.0 if i % 2 else -0.5, beta=0.0)
        for i, t in enumerate(trajectories)
    ]
    return make_batch(samples, step=1, micro_tokens=100)


def turn_the_ties(learner: Learner) -> None:
    for router in routers(learner.model).values():
        router.e_score_correction_bias.zero_()[1::2] = 1e-6


def test_replay_sends_every_token_where_the_rollout_did(folder: Path, tmp_path: Path) -> None:
    made = rollout_of(folder)
    same = learner_for(folder, tmp_path)
    metrics = same.step(batch_of(made)).metrics
    assert (
        metrics["routing/tokens_differ"] == metrics["routing/choices_differ"] == 0
        and metrics["mismatch/max_abs"] < 1e-5
    )

    with pytest.raises(StepRefused, match="mismatch/k3_kl"):  # so far apart are the probabilities that a run stops
        refused = learner_for(folder, tmp_path)
        turn_the_ties(refused)
        refused.step(batch_of(made))
    own = learner_for(folder, tmp_path, "algorithm.max_mismatch=10")
    turn_the_ties(own)
    metrics = own.step(batch_of(made)).metrics
    assert metrics["routing/tokens_differ"] == metrics["routing/choices_differ"] == 1.0  # every choice ends in a tie
    assert metrics["mismatch/max_abs"] > 1e-2

    replay = learner_for(folder, tmp_path, "learner.routing=replay", "indexer.selection=replay")
    turn_the_ties(replay)
    seen: dict[int, list[np.ndarray]] = {1: [], 2: []}
    for layer, router in routers(replay.model).items():
        router.register_forward_hook(lambda _, __, result, layer=layer: seen[layer].append(result[2].numpy()))
    chosen, scored = routing_choices(replay.model), indexer_calls(replay.model)
    metrics = replay.step(batch_of(made)).metrics
    assert routing_choices(replay.model) == chosen and indexer_calls(replay.model) == scored  # nothing was chosen
    assert metrics["mismatch/max_abs"] < 1e-5 and "routing/tokens_differ" not in metrics
    micros = [m for update in batch_of(made).updates for m in update.micro_batches]
    assert len(micros) > 1
    for place, micro in enumerate(micros):
        of_key = {t.key: t.expert_record for t in made}
        want = np.concatenate(
            [of_key[key].experts[:, :n] for key, n in zip(micro.keys, np.diff(micro.cu_seqlens), strict=True)], 1
        )  # type: ignore[union-attr]
        for slab, layer in enumerate((1, 2)):
            np.testing.assert_array_equal(seen[layer][place], want[slab])


@pytest.mark.parametrize(
    "overrides", [(), ("learner.checkpointing=true",), ("algorithm.recompute_old=true", "learner.updates_per_batch=2")]
)
def test_replaying_what_would_have_been_chosen_changes_no_bit(
    folder: Path, tmp_path: Path, overrides: tuple[str, ...]
) -> None:
    made = rollout_of(folder)
    after = []
    for routing in ("own", "replay"):
        learner = learner_for(folder, tmp_path, f"learner.routing={routing}", *overrides)
        before = routing_choices(learner.model)
        learner.step(batch_of(made))
        after.append(learner.model.state_dict())
        assert (routing_choices(learner.model) == before) == (routing == "replay")
        old, replayed = (learner.logprobs(made, replay=flag) for flag in (False, True))
        assert [len(x) for x in old] == [len(x) for x in replayed]
    assert all(torch.equal(after[0][name], after[1][name]) for name in after[0])
    assert not torch.equal(
        after[0]["model.layers.1.mlp.gate.weight"], folders.load(folder).state_dict()["model.layers.1.mlp.gate.weight"]
    )


def block(x: torch.Tensor, p: dict[str, torch.Tensor], experts: torch.Tensor, scale: float) -> torch.Tensor:
    """A layer of experts by its definition, token by token: the gates of the chosen ones times their outputs, and the shared expert."""
    rows = []
    for token, chosen in zip(x, experts.tolist(), strict=True):
        scores = torch.stack([torch.sigmoid((p["gate.weight"][e] * token).sum()) for e in chosen])
        gates = scale * scores / (scores.sum() + 1e-20)
        up = p["shared_experts.up_proj.weight"] @ token
        total = p["shared_experts.down_proj.weight"] @ (F.silu(p["shared_experts.gate_proj.weight"] @ token) * up)
        for gate, e in zip(gates, chosen, strict=True):
            both = p["experts.gate_up_proj"][e] @ token
            half = len(both) // 2
            total = total + gate * (p["experts.down_proj"][e] @ (F.silu(both[:half]) * both[half:]))
        rows.append(total)
    return torch.stack(rows)


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_at_replayed_experts_equal_a_float64_reference(family: str) -> None:
    """Experts that no router would have chosen: with the own ones the same gradients are far away."""
    mlp = make(family).model.layers[1].mlp
    rng = np.random.default_rng(2)
    given = torch.from_numpy(np.sort(rng.permuted(np.tile(np.arange(EXPERTS), (40, 1)), axis=1)[:, :CHOSEN], axis=1))
    x = torch.from_numpy(rng.standard_normal((40, 32))).float()
    weight = torch.from_numpy(rng.standard_normal((40, 32)))
    names = [name for name, _ in mlp.named_parameters()]
    assert names == ["experts.gate_up_proj", "experts.down_proj", "gate.weight", *(f"shared_experts.{n}_proj.weight" for n in ("gate", "up", "down"))]  # fmt: skip

    def run(replayed: bool) -> list[torch.Tensor]:
        mlp.zero_grad(set_to_none=True)
        inputs = x.clone().requires_grad_()
        mlp.gate.winnow_context = train_context([40], experts_in={1: given}) if replayed else None
        out = mlp(inputs[None])[0]
        (out * weight.float()).sum().backward()
        return [out.detach(), inputs.grad, *(p.grad for p in mlp.parameters())]

    wide = {name: p.detach().double().requires_grad_() for name, p in mlp.named_parameters()}
    inputs = x.double().requires_grad_()
    out = block(inputs, wide, given, float(mlp.gate.routed_scaling_factor))
    (out * weight).sum().backward()
    want = [out.detach(), inputs.grad, *(p.grad for p in wide.values())]
    before = routing_choices_of(mlp.gate)
    for name, got, right in zip(["out", "x", *names], run(replayed=True), want, strict=True):
        assert got is not None and right is not None and right.abs().max() > 1e-3
        torch.testing.assert_close(got.double(), right, rtol=0, atol=float(2e-6 * right.abs().max()), msg=name)
    assert routing_choices_of(mlp.gate) == before
    for got, right in list(zip(run(replayed=False), want, strict=True))[:5]:
        assert right is not None and (got.double() - right).abs().max() > 0.1 * right.abs().max()


def routing_choices_of(router: Any) -> int:
    return int(router.winnow_choices)


# Refusals


def test_what_cannot_be_replayed_is_refused(folder: Path, tmp_path: Path) -> None:
    for override, message in (
        ("rollout.record_experts=false", "record_experts is false: set it to true"),
        ("rollout.engine=vllm", "set rollout.engine to native"),
    ):
        with pytest.raises(ConfigError, match=message):
            learner_for(folder, tmp_path, "learner.routing=replay", override)
    made = rollout_of(folder)
    learner = learner_for(folder, tmp_path, "learner.routing=replay")
    with pytest.raises(ValueError, match=r"trajectory r1/0 carries no expert record"):
        learner.step(batch_of([made[0], replace(made[1], expert_record=None)]))
    record = made[0].expert_record
    assert record is not None
    with pytest.raises(ValueError, match=r"no experts for layer 2, only for \[0, 1\]"):
        learner.step(batch_of([replace(made[0], expert_record=ExpertRecord(layers=(0, 1), experts=record.experts))]))
    with pytest.raises(ValueError, match=r"layer 1 has experts \(\d+, 2\)"):
        fewer = ExpertRecord(layers=(1, 2), experts=np.ascontiguousarray(record.experts[..., :2]))
        learner.step(batch_of([replace(made[0], expert_record=fewer)]))
    learner.sft_step([(made[0].tokens, made[0].loss_mask)])  # examples have no rollout: their experts are chosen
    from transformers import LlamaConfig, LlamaForCausalLM

    LlamaForCausalLM(
        LlamaConfig(vocab_size=9, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    ).save_pretrained(tmp_path / "dense")
    with pytest.raises(ConfigError, match="a llama model without experts"):  # before any process is started
        learner_for(tmp_path / "dense", tmp_path, "learner.routing=replay")
    dense = Learner(learner.config)
    with pytest.raises(ValueError, match="a llama model without experts"):
        dense.load(tmp_path / "dense")  # as a pipeline does, whose config has no path yet
    assert make_engine(folders.load(tmp_path / "dense"), record_experts=True).expert_layers == ()


def test_records_are_counted_by_the_token(folder: Path) -> None:
    made = rollout_of(folder)
    task = Task(id="t", domain="d", messages=({"role": "user", "content": "x"},), reward="number")
    groups = [Group(request=Request(request_id=t.request_id, task=task, num_samples=1, sampling=Sampling(max_tokens=9)), trajectories=(t,)) for t in made]  # fmt: skip
    sizes = [t.expert_record.nbytes for t in made if t.expert_record is not None]
    assert record_metrics(groups)["expert_record/bytes_per_token"] == sum(sizes) / sum(t.num_generated for t in made)
    bare = [replace(g, trajectories=(replace(g.trajectories[0], expert_record=None),)) for g in groups]
    assert "expert_record/bytes_per_token" not in record_metrics(bare)


def test_a_run_replays_its_rollouts_experts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole program; the learner's biases are moved, so that it would choose other experts from the first step on."""
    tokenizer = make_tokenizer(pretraining_texts(12, 0), 400, 512)
    (tmp_path / "routing_reward.py").write_text(
        "from winnow.rollout.schema import Score\n\n"
        "def by_turns(task, trajectory):\n    return Score(value=float(trajectory.sample % 2))\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    grader_pool.shared().close()  # its nursery, if there is one, does not know the folder
    rows = [
        {"prompt": " ".join(f"{name} {n} ." for name in ("flo", "abe", "gus", "kim")), "answer": "1"} for n in range(40)
    ]
    (tmp_path / "tasks.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    torch.manual_seed(0)
    model = DeepseekV32ForCausalLM(DeepseekV32Config(**{**SHAPE, "vocab_size": len(tokenizer)}))
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    values: dict[str, Any] = {
        "runs_dir": str(tmp_path), "model": {"path": str(tmp_path / "model")}, "rollout": {"samples": 4, "num_pages": 256},
        "learner": {"lr": 1e-3, "routing": "replay"}, "indexer": {"selection": "replay"}, "cluster": {"address": "here"},
        "schedule": {"steps": 2, "save_every": 0}, "algorithm": {"max_failures": 0.0, "truncated": "keep"},
        "domains": [{"name": "a", "source": str(tmp_path / "tasks.jsonl"), "count": 4, "holdout": 2, "quota": 2, "max_tokens": 4, "reward": "routing_reward:by_turns"}],
    }  # fmt: skip
    adopt = Learner._adopt

    def moved(learner: Learner, model: Any, path: str) -> dict[str, Any]:
        found = adopt(learner, model, path)
        for router in routers(learner.model).values():
            router.winnow_choices = 0
            router.e_score_correction_bias.add_(torch.linspace(0, 0.5, EXPERTS))
        kept.append(learner)
        return found

    kept: list[Learner] = []
    monkeypatch.setattr(Learner, "_adopt", moved)
    assert train(make_config(values), progress=lambda text: None)["status"] == "done"
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert rows[0]["mismatch/max_abs"] < 1e-5 < rows[0]["grad_norm"] and rows[1]["mismatch/max_abs"] < 1e-5
    assert all(row["expert_record/bytes_per_token"] > 0 for row in rows)
    assert len(kept) == 1 and routing_choices(kept[0].model) == 0
