"""The learner on a tiny model: split invariance, frozen indexer, KL apart, replay, refusal, exact resume."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from winnow.kernels.selection import Selection
from winnow.models import attach
from winnow.models.context import train_context
from winnow.models.forward import hidden_states, lm_head_weight
from winnow.models.indexer import IndexerConfig
from winnow.models.load import save
from winnow.rl.advantages import Sample
from winnow.rl.batching import TrainBatch, make_batch
from winnow.rl.config import Config, make_config, to_mapping
from winnow.rl.config_sections import IndexerConfig as IndexerOptions
from winnow.rl.config_sections import LearnerConfig
from winnow.rl.flips import explain_flips
from winnow.rl.learner import Learner, StepRefused
from winnow.rl.metrics import Tally
from winnow.rl.optimizer import Optimizer
from winnow.rl.step_report import Drift
from winnow.rollout import records
from winnow.rollout.schema import KeptSets, Trajectory
from winnow.rollout.weights import unpack

TOP_K = 6
VOCAB = 48


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape = LlamaConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=128, tie_word_embeddings=True,
    )  # fmt: skip
    model = attach.attach(LlamaForCausalLM(shape), IndexerConfig(top_k=TOP_K, num_heads=2, head_dim=8, rope_dim=4))
    return save(model, None, tmp_path_factory.mktemp("model") / "tiny")


def config_for(folder: Path, tmp_path: Path, *overrides: str) -> Config:
    values = {"runs_dir": str(tmp_path), "model": {"path": str(folder)}, "domains": [{"name": "d", "source": "x"}]}
    return make_config({**values, "learner": {"lr": 1e-3, "micro_tokens": 64}}, overrides)


def learner_for(folder: Path, tmp_path: Path, *overrides: str) -> Learner:
    learner = Learner(config_for(folder, tmp_path, *overrides))
    learner.load()
    return learner


def trajectories_of(
    learner: Learner, lengths: Sequence[int] = (30, 21, 9, 26), seed: int = 0, prompt: int = 5
) -> list[Trajectory]:
    """Random tokens with the log-probabilities and index sets that the learner's own model gives them: an exact rollout."""
    rng = np.random.default_rng(seed)
    made = []
    for number, length in enumerate(lengths):
        tokens = rng.integers(0, VOCAB, length).astype(np.int32)
        mask = np.arange(length) >= prompt
        sets: dict[int, Selection] = {}
        with torch.no_grad():
            context = train_context([length], selection_out=sets)
            hidden = hidden_states(learner.model, torch.as_tensor(tokens).long(), context)
            logits = (hidden @ lm_head_weight(learner.model).T).float().log_softmax(-1)
        logprobs = np.zeros(length, np.float32)
        logprobs[1:] = logits[:-1].gather(1, torch.as_tensor(tokens[1:]).long()[:, None])[:, 0].numpy()
        made.append(
            Trajectory(
                request_id=f"r{number}",
                sample=0,
                task_id="t",
                domain="d",
                tokens=tokens,
                loss_mask=mask,
                rollout_logprobs=np.where(mask, logprobs, 0).astype(np.float32),
                policy_versions=np.where(mask, 0, -1).astype(np.int32),
                finish_reason="stop",
                messages=(),
                index_record=records.encode(sets, length),
            )
        )
    return made


def batch_of(
    trajectories: Sequence[Trajectory], step: int = 1, micro_tokens: int = 64, updates: int = 1, **options: bool
) -> TrainBatch:
    samples = [
        Sample(trajectory=t, group=i // 2, advantage=1.0 if i % 2 else -0.5, beta=0.0)
        for i, t in enumerate(trajectories)
    ]
    return make_batch(samples, step=step, micro_tokens=micro_tokens, updates=updates, **options)


def state(learner: Learner) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in learner.model.state_dict().items()}


def changed(before: dict[str, torch.Tensor], learner: Learner) -> set[str]:
    return {name for name, tensor in learner.model.state_dict().items() if not torch.equal(tensor, before[name])}


def test_a_step_trains_the_model_and_the_rollout_agrees_with_the_learner(folder: Path, tmp_path: Path) -> None:
    learner = learner_for(folder, tmp_path)
    before, batch = state(learner), batch_of(trajectories_of(learner))
    metrics = learner.step(batch).metrics
    assert metrics["mismatch/max_abs"] < 1e-5 and metrics["index/jaccard"] == 1.0
    assert metrics["index/sparse_rows"] > 0.5 and 0 < metrics["index/selected_share"] < 1  # the test does go sparse
    assert metrics["grad_norm"] > 0 and np.isfinite(metrics["loss/policy"])
    assert any("q_proj" in name for name in changed(before, learner))


def test_the_policy_moves_the_way_the_advantages_say(folder: Path, tmp_path: Path) -> None:
    learner = learner_for(folder, tmp_path)
    made = trajectories_of(learner)
    before = learner.logprobs(made)
    learner.step(batch_of(made))
    gains = [(b - a).mean() for a, b in zip(before, learner.logprobs(made), strict=True)]
    assert gains[1] > 0 and gains[3] > 0 and gains[1] > gains[0] and gains[3] > gains[2]


@pytest.mark.parametrize(
    "overrides", [(), ("indexer.train=kl",), ("algorithm.aggregate=token", "indexer.selection=replay")]
)
def test_any_split_into_micro_batches_gives_the_same_gradient(
    folder: Path, tmp_path: Path, overrides: tuple[str, ...]
) -> None:
    grads = []
    for micro_tokens in (1, 40, 500):
        learner = learner_for(folder, tmp_path, *overrides)
        batch = batch_of(trajectories_of(learner), micro_tokens=micro_tokens, keep_idle=True)
        learner._accumulate(0, batch.updates[0], {}, Tally(), Drift(), {})
        learner.optimizer.collect()
        grads.append({name: p.grad.clone() for name, p in learner.model.named_parameters() if p.grad is not None})
    assert any("indexer" in name for name in grads[0]) == ("indexer.train=kl" in overrides)
    for other in grads[1:]:
        for name, grad in grads[0].items():
            torch.testing.assert_close(other[name], grad, atol=1e-6, rtol=1e-4, msg=lambda text, n=name: f"{n}: {text}")


def test_a_frozen_indexer_is_bit_identical_after_steps_with_decay(folder: Path, tmp_path: Path) -> None:
    learner = learner_for(folder, tmp_path, "learner.weight_decay=0.5", "learner.lr=0.01")
    before, made = state(learner), trajectories_of(learner)
    for step in (1, 2, 3):
        learner.step(batch_of(made, step))
        made = trajectories_of(learner, seed=step)
    moved = changed(before, learner)
    assert moved and not any("indexer" in name for name in moved)


def test_kl_trains_only_the_indexer_and_the_policy_only_the_model(folder: Path, tmp_path: Path) -> None:
    plain = learner_for(folder, tmp_path)
    both = learner_for(folder, tmp_path, "indexer.train=kl", "indexer.lr=0.01")
    made = trajectories_of(plain)
    first = both.step(batch_of(made, keep_idle=True)).metrics
    plain.step(batch_of(made, 1, keep_idle=True))
    moved = changed(state(plain), both)
    assert moved and all("indexer" in name for name in moved)  # the model took the very same step
    silent = learner_for(folder, tmp_path, "indexer.train=kl", "indexer.lr=0.01")
    before = state(silent)
    flat = make_batch(
        [Sample(trajectory=t, group=0, advantage=0.0) for t in made], step=1, micro_tokens=64, keep_idle=True
    )
    kls = [silent.step(replace(flat, step=step)).metrics["loss/indexer_kl"] for step in range(1, 13)]
    assert all("indexer" in name for name in changed(before, silent)) and kls[-1] < kls[0]
    assert first["loss/indexer_kl"] == pytest.approx(kls[0], rel=1e-4)


def test_replay_uses_the_rollouts_sets_and_never_calls_the_indexer(folder: Path, tmp_path: Path) -> None:
    own = learner_for(folder, tmp_path)
    made = trajectories_of(own)
    learner = learner_for(folder, tmp_path, "indexer.selection=replay")
    with torch.no_grad():  # another indexer: with its own sets the learner would not reproduce the rollout
        for parameter in attach.indexer_parameters(learner.model).values():
            parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    calls = attach.indexer_calls(learner.model)
    metrics = learner.step(batch_of(made)).metrics
    assert attach.indexer_calls(learner.model) == calls
    assert metrics["mismatch/max_abs"] < 1e-5 and metrics["index/jaccard"] == 1.0

    stranger = learner_for(folder, tmp_path)
    with torch.no_grad():
        for parameter in attach.indexer_parameters(stranger.model).values():
            parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    metrics = stranger.step(batch_of(made)).metrics
    assert metrics["index/jaccard"] < 0.99 and metrics["mismatch/max_abs"] > 1e-5
    assert metrics["index/jaccard_layer/0"] <= 1.0


def test_replay_with_kl_trains_the_indexer_on_the_replayed_sets(folder: Path, tmp_path: Path) -> None:
    learner = learner_for(folder, tmp_path, "indexer.selection=replay", "indexer.train=kl")
    before = state(learner)
    metrics = learner.step(batch_of(trajectories_of(learner), keep_idle=True)).metrics
    assert metrics["loss/indexer_kl"] > 0 and any("indexer" in name for name in changed(before, learner))


def test_replay_without_records_names_the_trajectory(folder: Path, tmp_path: Path) -> None:
    learner = learner_for(folder, tmp_path, "indexer.selection=replay")
    made = [replace(t, index_record=None) for t in trajectories_of(learner)]
    with pytest.raises(ValueError, match=r"trajectory r0/0 carries no index record"):
        learner.step(batch_of(made))


def test_low_overlap_stops_the_run(folder: Path, tmp_path: Path) -> None:
    learner = learner_for(folder, tmp_path, "indexer.min_overlap=0.999")
    made = trajectories_of(learner)
    with torch.no_grad():
        for parameter in attach.indexer_parameters(learner.model).values():
            parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    before = state(learner)
    with pytest.raises(StepRefused, match=r"below indexer\.min_overlap"):
        learner.step(batch_of(made))
    assert not changed(before, learner)


def test_resume_is_bitwise_equal_to_the_uninterrupted_run(folder: Path, tmp_path: Path) -> None:
    options = ("learner.warmup_steps=4", "learner.weight_decay=0.1", "indexer.train=kl")
    straight = learner_for(folder, tmp_path, *options)
    batches = [batch_of(trajectories_of(straight, seed=seed), seed, keep_idle=True) for seed in range(4)]
    for batch in batches[:2]:
        straight.step(batch)
    straight.save(tmp_path / "saved")
    for batch in batches[2:]:
        straight.step(batch)
    again = Learner(config_for(folder, tmp_path, *options))
    again.resume(tmp_path / "saved")
    for batch in batches[2:]:
        again.step(batch)
    assert not changed(state(straight), again)
    assert again.optimizer.lr == straight.optimizer.lr


def test_a_resumed_learner_has_the_sizes_of_its_graphs(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Products of another number of rows would round elsewhere. A learner without graphs saves none, and leaves theirs alone."""
    from winnow.models.pieces import Pieces

    learner = learner_for(folder, tmp_path)
    learner.save(tmp_path / "plain")
    learner.pieces = Pieces(learner.model, capture=False)
    learner.pieces.reserve([3072, 1024])
    learner.save(tmp_path / "graphs")
    without = Learner(config_for(folder, tmp_path))
    without.resume(tmp_path / "graphs")
    assert without.pieces is None
    adopt = Learner._adopt

    def with_graphs(self: Learner, model: Any, path: str) -> dict[str, Any]:
        info = adopt(self, model, path)
        self.pieces = Pieces(model, capture=False)
        return info

    monkeypatch.setattr(Learner, "_adopt", with_graphs)
    for name, sizes in (("plain", [0]), ("graphs", [3072, 1024])):
        again = Learner(config_for(folder, tmp_path))
        again.resume(tmp_path / name)
        assert again.pieces is not None and again.pieces.sizes == sizes


@pytest.mark.parametrize("where", ["loss", "gradient", "mismatch"])
def test_a_bad_step_is_refused_and_kept_for_inspection(folder: Path, tmp_path: Path, where: str) -> None:
    learner = learner_for(folder, tmp_path, "algorithm.recompute_old=true")
    made = trajectories_of(learner)
    if where == "loss":
        made[1] = replace(made[1], rollout_logprobs=np.where(made[1].loss_mask, np.nan, 0).astype(np.float32))
        learner = learner_for(folder, tmp_path)
    elif where == "mismatch":
        made = [replace(t, rollout_logprobs=t.rollout_logprobs - 2 * t.loss_mask.astype(np.float32)) for t in made]
    else:
        next(iter(learner.model.parameters())).register_hook(lambda grad: grad * float("nan"))
    before = state(learner)
    words = {
        "loss": "the loss is nan",
        "gradient": "the gradient is not finite",
        "mismatch": "above algorithm.max_mismatch",
    }
    with pytest.raises(StepRefused, match=words[where]) as error:
        learner.step(batch_of(made, step=7))
    assert "step 7, update 1 of 1" in str(error.value)
    assert (tmp_path / "run" / "refused" / "step-000007.pkl").stat().st_size > 0
    assert not changed(before, learner) and all(p.grad is None for p in learner.model.parameters())


def test_kl_to_the_reference_pulls_back_and_is_zero_at_the_start(folder: Path, tmp_path: Path) -> None:
    learner = learner_for(folder, tmp_path, "domains.0.beta=1.0")
    made = trajectories_of(learner)
    batch = make_batch([Sample(trajectory=t, group=0, advantage=0.0, beta=1.0) for t in made], step=1, micro_tokens=64)
    assert learner.step(batch).metrics["kl/reference"] == pytest.approx(0, abs=1e-6)
    with torch.no_grad():
        for parameter in attach.base_parameters(learner.model).values():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)))
    learner.config = config_for(folder, tmp_path, "domains.0.beta=1.0", "algorithm.max_mismatch=100")
    values = [learner.step(replace(batch, step=step)).metrics["kl/reference"] for step in range(2, 8)]
    assert values[-1] < values[0]


def test_kept_sets_are_the_action_set_of_the_learner_too(folder: Path, tmp_path: Path) -> None:
    learner = learner_for(folder, tmp_path)
    plain = trajectories_of(learner, lengths=(20,))[0]
    rows = [
        [] if not trained else sorted({int(token), 1, 2})
        for token, trained in zip(plain.tokens, plain.loss_mask, strict=True)
    ]
    kept = KeptSets(
        indptr=np.cumsum([0, *map(len, rows)]).astype(np.int64),
        token_ids=np.array([i for row in rows for i in row], np.int32),
    )
    cut = learner.logprobs([replace(plain, kept_sets=kept)])[0]
    assert (cut > learner.logprobs([plain])[0]).all() and (cut <= 0).all()


def test_several_updates_with_old_logprobs_recomputed_clip_what_moved(folder: Path, tmp_path: Path) -> None:
    learner = learner_for(
        folder, tmp_path, "algorithm.recompute_old=true", "learner.updates_per_batch=2", "learner.lr=0.05"
    )
    metrics = learner.step(batch_of(trajectories_of(learner), updates=2)).metrics
    assert learner.optimizer.num_updates == 2 and metrics["clip_fraction"] > 0


def test_a_batch_with_nothing_to_learn_changes_nothing(folder: Path, tmp_path: Path) -> None:
    learner = learner_for(folder, tmp_path)
    before = state(learner)
    flat = [Sample(trajectory=t, group=0, advantage=0.0) for t in trajectories_of(learner)]
    for batch in (make_batch(flat, step=1, micro_tokens=64), make_batch([], step=2, micro_tokens=64)):
        assert learner.step(batch).metrics["grad_norm"] == 0.0
    assert not changed(before, learner)


def test_sft_steps_lower_the_cross_entropy(folder: Path, tmp_path: Path) -> None:
    learner = learner_for(folder, tmp_path, "learner.lr=0.01")
    examples = [(t.tokens, t.loss_mask) for t in trajectories_of(learner)]
    losses = [learner.sft_step(examples, step).metrics["loss/ce"] for step in range(1, 8)]
    assert losses[0] == pytest.approx(np.log(VOCAB), rel=0.2) and losses[-1] < 0.8 * losses[0]


def test_activation_checkpointing_changes_no_number(folder: Path, tmp_path: Path) -> None:
    results = []
    for flag in ("false", "true"):
        learner = learner_for(folder, tmp_path, f"learner.checkpointing={flag}", "indexer.train=kl")
        results.append((learner.step(batch_of(trajectories_of(learner), keep_idle=True)).metrics, state(learner)))
    assert results[0][0]["loss/indexer_kl"] == pytest.approx(results[1][0]["loss/indexer_kl"], rel=1e-5)
    for name, tensor in results[0][1].items():
        torch.testing.assert_close(results[1][1][name], tensor, atol=1e-5, rtol=1e-4, msg=name)


def test_weights_carry_every_tensor_once(folder: Path, tmp_path: Path) -> None:
    learner = learner_for(folder, tmp_path)
    update = learner.weights(5)
    sent = dict(unpack(update))
    assert (update.version == 5 and "lm_head.weight" not in sent) or "model.embed_tokens.weight" not in sent
    assert all(torch.equal(learner.model.state_dict()[name], tensor) for name, tensor in sent.items())


def test_bf16_weights_are_stepped_on_fp32_masters(folder: Path, tmp_path: Path) -> None:
    learner = learner_for(folder, tmp_path, "model.dtype=bfloat16", "learner.lr=1e-6")
    parameter = attach.base_parameters(learner.model)["model.layers.0.self_attn.q_proj.weight"]
    master = learner.optimizer._masters[parameter]
    before = master.clone()
    learner.step(batch_of(trajectories_of(learner, lengths=(12, 12))))
    assert parameter.dtype == torch.bfloat16 and not torch.equal(
        master, before
    )  # too small a step for bf16, kept in the master
    assert torch.equal(parameter, master.bfloat16())


def test_gradients_of_bf16_weights_are_summed_in_fp32() -> None:
    """A hundred small gradients beside a large one vanish in bf16, one by one."""
    weight = torch.nn.Parameter(torch.zeros(4, 4, dtype=torch.bfloat16))
    optimizer = Optimizer([weight], [], LearnerConfig(max_grad_norm=100.0), IndexerOptions())
    for number in range(101):
        weight.grad = torch.full_like(weight, 1.0 if number == 0 else 1e-3)
        optimizer.absorb()
        if number == 50:
            optimizer.end_part()
    optimizer.collect()
    gradient = optimizer.target(weight).grad
    assert gradient is not None and weight.grad is None
    torch.testing.assert_close(gradient, torch.full((4, 4), 1.1), atol=1e-3, rtol=0)
    optimizer.zero_grad()
    assert not optimizer.has_gradients


@pytest.mark.parametrize("overrides", [(), ("model.dtype=bfloat16", "algorithm.max_mismatch=9")])
def test_the_gradient_of_each_domain_is_measured_beside_that_of_the_whole(
    folder: Path, tmp_path: Path, overrides: tuple[str, ...]
) -> None:
    domains = [{"name": "d", "source": "x"}, {"name": "e", "source": "x"}]
    config = make_config({**to_mapping(config_for(folder, tmp_path, *overrides)), "domains": domains})

    def metrics(silent: str) -> dict[str, float]:
        learner = Learner(config)
        learner.load()
        samples = [
            Sample(
                trajectory=replace(t, domain="de"[i % 2]),
                group=i // 2,
                advantage=0.0 if "de"[i % 2] == silent else (1.5, -1)[i % 2],
            )
            for i, t in enumerate(trajectories_of(learner))
        ]
        return dict(learner.step(make_batch(samples, step=1, micro_tokens=20)).metrics)

    both, only = metrics(""), {"d": metrics("e"), "e": metrics("d")}  # idle samples stay in the denominators
    for name in "de":
        assert both[f"grad_norm_of/{name}"] == pytest.approx(
            only[name]["grad_norm"], rel=1e-5 if not overrides else 1e-2
        )
        assert f"grad_norm_of/{name}" not in only[name]  # one domain's norm is the whole's
    assert both["grad_share/d"] + both["grad_share/e"] == pytest.approx(1)
    assert both["grad_norm"] < both["grad_norm_of/d"] + both["grad_norm_of/e"]  # directions differ
    assert both["grad_norm"] > 0.1 * max(both["grad_norm_of/d"], both["grad_norm_of/e"])


def test_a_dense_model_cannot_replay(folder: Path, tmp_path: Path) -> None:
    from winnow.models.load import load

    save(attach.strip(load(folder)), None, tmp_path / "dense")
    learner = Learner(config_for(tmp_path / "dense", tmp_path, "indexer.selection=replay"))
    with pytest.raises(ValueError, match="is a dense model"):
        learner.load()


def test_flips_at_a_tie_are_explained_and_others_are_not() -> None:
    scores = torch.tensor([[0.5, 0.5, 0.9], [0.1, 0.8, 0.9]])
    own = Selection(torch.tensor([[0, 2], [1, 2]], dtype=torch.int32), torch.tensor([2, 2], dtype=torch.int32))
    tie = Selection(torch.tensor([[1, 2], [1, 2]], dtype=torch.int32), torch.tensor([2, 2], dtype=torch.int32))
    report = explain_flips(scores, own, tie)
    assert (report.flipped_rows, report.flipped_positions, report.max_gap, report.explained) == (1, 1, 0.0, 1.0)
    other = Selection(torch.tensor([[0, 2], [0, 2]], dtype=torch.int32), torch.tensor([2, 2], dtype=torch.int32))
    report = explain_flips(scores, own, other)
    assert report.explained == 0.0 and report.max_gap == pytest.approx(0.7)
    assert explain_flips(scores, own, own).flipped_rows == 0
