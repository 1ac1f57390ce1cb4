"""The learner over gloo ranks: any split gives the same loss, gradients and update; faults and checkpoints are the whole run's."""

from __future__ import annotations

import json
import multiprocessing
import pickle
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from winnow.models import attach
from winnow.models.indexer import IndexerConfig
from winnow.models.load import load, save
from winnow.rl.advantages import Sample
from winnow.rl.batching import make_batch, make_sft_batch
from winnow.rl.config import make_config
from winnow.rl.learner import Learner, StepRefused
from winnow.rl.ranks import Ranks, free_address, join_ranks, whole
from winnow.rollout.schema import Trajectory
from winnow.rollout.weights import unpack

VOCAB, LR = 48, 0.1


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape = LlamaConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=128, tie_word_embeddings=True,
    )  # fmt: skip
    model = attach.attach(LlamaForCausalLM(shape), IndexerConfig(top_k=6, num_heads=2, head_dim=8, rope_dim=4))
    return save(model, None, tmp_path_factory.mktemp("ranks") / "tiny")


def samples_of(poison: int = -1) -> list[Sample]:
    """Five sequences of unequal lengths, domains and advantages; sample `poison` has a NaN."""
    rng = np.random.default_rng(0)
    made = []
    for number, length in enumerate((40, 23, 9, 31, 14)):
        mask = np.arange(length) >= 4
        logprobs = np.where(mask, -3.9, 0).astype(np.float32)
        if number == poison:
            logprobs[-1] = np.nan
        trajectory = Trajectory(
            request_id=f"r{number}", sample=0, task_id="t", domain="d", tokens=rng.integers(0, VOCAB, length).astype(np.int32),
            loss_mask=mask, rollout_logprobs=logprobs, policy_versions=np.where(mask, 0, -1).astype(np.int32), finish_reason="stop",
            messages=(),
        )  # fmt: skip
        made.append(Sample(trajectory=trajectory, group=number, advantage=number - 1.7, beta=0.1))
    return made


def config_of(folder: Path, runs: Path) -> Any:
    return make_config(
        {
            "runs_dir": str(runs), "model": {"path": str(folder)}, "domains": [{"name": "d", "source": "x", "beta": 0.1}],
            "learner": {"lr": 1e-3, "max_grad_norm": 0.5}, "indexer": {"train": "kl"}, "algorithm": {"max_mismatch": 100},
        }
    )  # fmt: skip


def learned(ranks: Ranks, folder: str, runs: str, micro_tokens: int) -> dict[str, Any]:
    """One step with plain SGD in the optimizer's place: metrics, whole gradients after clipping and whole weights after the update."""
    learner = Learner(config_of(Path(folder), Path(runs)), ranks)
    learner.load()
    gradients: dict[str, torch.Tensor] = {}

    def descend() -> None:
        for name, parameter in learner.model.named_parameters():
            assert parameter.grad is not None, name
            gradients[name] = whole(parameter.grad).clone()
            with torch.no_grad():
                parameter.sub_(LR * parameter.grad)
        learner.optimizer.zero_grad()

    learner.optimizer.step = descend  # type: ignore[method-assign]
    metrics = learner.step(make_batch(samples_of(), step=1, micro_tokens=micro_tokens, ranks=ranks.world)).metrics
    held = sum(
        p.numel() if not hasattr(p, "to_local") else p.to_local().numel() for p in learner.model.parameters()
    )  # what this rank keeps between steps
    update = learner.weights(3)
    return {
        "metrics": dict(metrics), "gradients": gradients, "held": held,
        "weights": {name: tensor.clone() for name, tensor in unpack(update)},
    }  # fmt: skip


def resumed(ranks: Ranks, folder: str, runs: str, _: int) -> dict[str, Any]:
    """Two steps, a checkpoint between them, and the second step again from the checkpoint."""
    learner = Learner(config_of(Path(folder), Path(runs)), ranks)
    learner.load()
    batch = make_batch(samples_of(), step=1, micro_tokens=30, ranks=ranks.world)
    learner.step(batch)
    learner.save(Path(runs) / "saved")
    ranks.gather(None)  # the first rank has written
    learner.step(batch)
    straight = {name: tensor.clone() for name, tensor in unpack(learner.weights(2))}
    again = Learner(config_of(Path(folder), Path(runs)), ranks)
    again.resume(Path(runs) / "saved")
    again.step(batch)
    other = dict(unpack(again.weights(2)))
    return {"equal": all(torch.equal(straight[name], other[name]) for name in straight), "count": len(straight)}


def narrow(ranks: Ranks, folder: str, runs: str, _: int) -> dict[str, Any]:
    """The masters of a model in bf16; whether a step at learning rate 0 leaves the weights, and one at another rounds its masters."""
    config = config_of(Path(folder), Path(runs))
    found: dict[str, Any] = {}
    for lr in (0.0, 1e-3):
        model, options = replace(config.model, dtype="bfloat16"), replace(config.learner, lr=lr)
        learner = Learner(replace(config, model=model, learner=options), ranks)
        learner.load()
        named = {name: p for name, p in learner.model.named_parameters() if p.dtype == torch.bfloat16}
        before = {name: whole(p).clone() for name, p in named.items()}
        found["masters"] = {name: whole(learner.optimizer.target(p)).clone() for name, p in named.items()}
        learner.step(make_batch(samples_of(), step=1, micro_tokens=30, ranks=ranks.world))
        found[f"still at {lr}"] = all(torch.equal(whole(p), before[name]) for name, p in named.items())
        found["rounded"] = all(
            torch.equal(whole(p), whole(learner.optimizer.target(p)).bfloat16()) for p in named.values()
        )
    return found


def refused(ranks: Ranks, folder: str, runs: str, _: int) -> dict[str, Any]:
    """A NaN in one sequence, that is, on one rank."""
    learner = Learner(config_of(Path(folder), Path(runs)), ranks)
    learner.load()
    before = [whole(p).clone() for p in learner.model.parameters()]
    try:
        learner.step(make_batch(samples_of(poison=3), step=7, micro_tokens=30, ranks=ranks.world))
        said = ""
    except StepRefused as error:
        said = str(error)
    learner.step(make_batch(samples_of(), step=8, micro_tokens=30, ranks=ranks.world))  # the ranks still work together
    moved = any(not torch.equal(whole(p), old) for p, old in zip(learner.model.parameters(), before, strict=True))
    return {"said": said, "moved": moved}


def work(rank: int, world: int, address: str, job: Callable[..., Any], out: str, *arguments: Any) -> None:
    torch.set_num_threads(1)
    result = job(join_ranks(rank, world, address, 60), *arguments)
    Path(out, f"{rank}.pkl").write_bytes(pickle.dumps(result))
    torch.distributed.destroy_process_group()


def over_ranks(world: int, job: Callable[..., Any], tmp_path: Path, folder: Path, micro_tokens: int = 30) -> list[Any]:
    """The job's result on every rank."""
    out = tmp_path / f"{job.__name__}-{world}-{micro_tokens}"
    out.mkdir()
    arguments = (world, free_address(), job, str(out), str(folder), str(out), micro_tokens)
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=work, args=(rank, *arguments)) for rank in range(world)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        if process.is_alive():
            process.kill()
    assert [process.exitcode for process in processes] == [0] * world
    return [pickle.loads(Path(out, f"{rank}.pkl").read_bytes()) for rank in range(world)]


@pytest.mark.parametrize(
    ("world", "micro_tokens", "target"),
    [
        (1, 30, "attention"),
        (1, 1, "attention"),
        (2, 1000, "attention"),
        (4, 30, "attention"),
        (1, 30, "output"),
        (2, 30, "output"),
    ],
)
def test_any_split_gives_the_same_loss_gradients_and_sgd_update(
    world: int, micro_tokens: int, target: str, folder: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(folder, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    config["winnow"]["target"] = target  # "output" reads a projection's weights, which FSDP splits
    (folder / "config.json").write_text(json.dumps(config))
    want = learned(Ranks(), str(folder), str(tmp_path), 1000)
    if world == 1:
        got = learned(Ranks(), str(folder), str(tmp_path), micro_tokens)
    else:
        found = over_ranks(world, learned, tmp_path, folder, micro_tokens)
        got = found[0]
        assert all(other["metrics"] == got["metrics"] for other in found)  # every rank knows the whole step
        assert all(other["held"] < 0.8 * want["held"] for other in found)  # the model is split, not copied
        assert [len(other["weights"]) > 0 for other in found] == [True] + [False] * (world - 1)
    assert want["metrics"]["grad_norm"] > 0.5  # the clip does something
    for name in (
        "loss/policy",
        "loss/kl",
        "loss/indexer_kl",
        "grad_norm",
        "grad_norm/indexer",
        "entropy",
        "mismatch/k3_kl",
    ):
        assert got["metrics"][name] == pytest.approx(want["metrics"][name], rel=1e-5, abs=1e-6), name
    assert got["metrics"].keys() == want["metrics"].keys()
    for kind in ("gradients", "weights"):
        assert got[kind].keys() == want[kind].keys()
        for name, tensor in want[kind].items():
            assert (got[kind][name] - tensor).abs().max() <= 1e-6, (kind, name)
    start = load(folder).state_dict()
    assert any((want["weights"][name] - start[name]).abs().max() > 1e-4 for name in want["weights"])


def test_a_resumed_run_over_ranks_is_bitwise_and_its_checkpoint_is_a_model(folder: Path, tmp_path: Path) -> None:
    results = over_ranks(2, resumed, tmp_path, folder)
    assert results[0]["equal"] and results[0]["count"] > 10
    saved = tmp_path / "resumed-2-30" / "saved"
    model = load(saved)
    assert attach.is_converted(model) and model.config.architectures == ["LlamaForCausalLM"]
    alone = Learner(config_of(folder, tmp_path))
    alone.resume(saved)  # and another number of ranks goes on from it
    assert alone.optimizer.num_updates == 1
    alone.step(make_batch(samples_of(), step=2, micro_tokens=1000))


def test_masters_are_the_same_for_every_split(folder: Path, tmp_path: Path) -> None:
    want = narrow(Ranks(), str(folder), str(tmp_path), 30)
    for got in over_ranks(2, narrow, tmp_path, folder):
        for each in (got, want):
            assert each["still at 0.0"] and not each["still at 0.001"] and each["rounded"]
        assert got["masters"].keys() == want["masters"].keys() and len(want["masters"]) > 10
        assert all(torch.equal(got["masters"][name], tensor) for name, tensor in want["masters"].items())


def test_a_fault_on_one_rank_is_refused_by_all_and_named(folder: Path, tmp_path: Path) -> None:
    results = over_ranks(2, refused, tmp_path, folder)
    for result in results:
        assert "step 7" in result["said"] and "the loss is nan" in result["said"] and "r3/0" in result["said"]
        assert result["moved"]
    assert (tmp_path / "refused-2-30" / "run" / "refused" / "step-000007.pkl").stat().st_size > 0


def test_micro_batches_are_dealt_evenly_and_every_rank_has_as_many_passes() -> None:
    class Micro:
        def __init__(self, length: int) -> None:
            self.tokens = [0] * length

    for lengths, world in (((9, 8, 3, 3, 2, 1), 2), ((5, 4, 3), 4), ((7,), 3), ((), 2)):
        dealt = [Ranks(rank, world).deal([Micro(n) for n in lengths]) for rank in range(world)]
        assert sorted(i for share in dealt for i, counts in share if counts) == list(range(len(lengths)))
        assert len({len(share) for share in dealt}) == 1
    loads = [
        sum((9, 8, 3, 3, 2, 1)[i] for i, _ in Ranks(r, 2).deal([Micro(n) for n in (9, 8, 3, 3, 2, 1)])) for r in (0, 1)
    ]
    assert sorted(loads) == [13, 13]


def dealt(lengths: list[int], micro_tokens: int, world: int) -> tuple[list[int], list[int]]:
    """Inputs that each rank goes through, repeats included, and of each micro-batch."""
    rng = np.random.default_rng(0)
    examples = [(rng.integers(1, 9, n + 1), np.ones(n + 1, bool)) for n in lengths]
    micro = make_sft_batch(examples, step=0, micro_tokens=micro_tokens, ranks=world).updates[0].micro_batches
    keys = [key for m in micro for key in m.keys]
    assert len(keys) == len(set(keys)) == len(lengths)  # each once
    assert all(len(m.tokens) <= micro_tokens or len(m.keys) == 1 for m in micro)
    loads = [sum(len(micro[i].tokens) for i, _ in Ranks(rank, world).deal(micro)) for rank in range(world)]
    return loads, [len(m.tokens) for m in micro]


def test_ranks_get_equal_shares_of_a_batch() -> None:
    """Each rank waits for the slowest: of 256 samples of 356 tokens one rank had 59 thousand, which one alone goes through 65 thousand in."""
    loads, _ = dealt([356] * 256, 32768, 2)
    assert loads == [356 * 128] * 2
    loads, sizes = dealt([356] * 256, 16384, 4)
    assert loads == [356 * 64] * 4 and len(sizes) == 8
    rng = np.random.default_rng(1)
    for world in (2, 3, 4):
        for micro_tokens in (512, 2048, 16384):
            lengths = rng.integers(20, 500, 200).tolist()
            loads, sizes = dealt(lengths, micro_tokens, world)
            assert max(loads) <= 1.05 * sum(lengths) / world
            assert len(sizes) % world == 0  # nobody goes through one twice
            # As few passes as there can be, but for what whole sequences leave over.
            assert len(sizes) <= world * (
                1 + -(-sum(lengths) // (world * (micro_tokens - 500 if micro_tokens > 999 else 200)))
            )


def test_shares_of_odd_batches() -> None:
    assert dealt([40_000, *[100] * 100], 32768, 2) == (
        [40_000, 10_000],
        [40_000, 10_000],
    )  # a longer sequence goes alone
    assert dealt([7], 32, 4)[1] == [7]  # the other ranks repeat it
    assert sorted(dealt([9, 8, 3], 32, 2)[0]) == [9, 11]
    assert sorted(dealt([9, 8, 3], 9, 2)[0]) == [
        11,
        12,
    ]  # 8 and 3 do not fit together: three micro-batches, one repeated
