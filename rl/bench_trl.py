"""TRL's GRPOTrainer on the prompts, the reward and the sizes of `bench_step`: the peer, where it is installed.

On a GPU it samples with vLLM colocated where that is installed, else with `generate`; on a CPU with `generate`. Weights are the dense
ones of the same folder: TRL knows no sparse attention.
"""

from __future__ import annotations

import itertools
import re
import time
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from winnow.rl.bench_step import StepBench


def bench_trl(bench: StepBench, model: str, scratch: Path) -> dict[str, Any]:
    """Figures as those of ours, but `first_step_s` counts from here: imports are done by now. Raises ImportError where TRL, or what it needs, is missing."""
    from winnow.rl.bench_step import WARM_UP, seconds_alive, spread

    begin = time.perf_counter()
    trainer, fast, ends, rewards = _trainer(bench, model, scratch)
    trainer.train()
    times = [b - a for a, b in itertools.pairwise(ends)]
    counted = times[max(0, WARM_UP - 1) :] or times
    import trl

    total = bench.prompts * bench.samples
    return {
        "version": trl.__version__,
        "rollouts": "vLLM, colocated" if fast else "generate",
        "first_step_s": round(ends[0] - begin, 2) if ends else seconds_alive(),
        "steps_counted": len(counted),
        "samples_per_s": spread([total / seconds for seconds in counted]),
        "step_s": spread(counted),
        "rewards": rewards,
    }


def _trainer(bench: StepBench, model: str, scratch: Path) -> tuple[Any, bool, list[float], list[float]]:
    """The trainer, whether vLLM samples for it, and the lists that fill as it steps: ends of steps in seconds, mean rewards."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    from winnow.rewards.tasks import generate_tasks

    gpu = bench.device.startswith("cuda")
    dense = scratch / "dense"  # without indexers: vLLM refuses tensors that it does not know
    loaded: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16 if gpu else torch.float32)
    if hasattr(loaded.config, "winnow"):
        del loaded.config.winnow
    loaded.save_pretrained(dense)
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.save_pretrained(dense)
    tasks = generate_tasks("addition", count=70, seed=bench.seed)
    rows = [{"prompt": [dict(m) for m in task.messages], "answer": task.answer} for task in tasks]
    ends: list[float] = []
    rewards: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            if gpu:
                torch.cuda.synchronize()
            ends.append(time.perf_counter())

        def on_log(self, *_: Any, logs: Any = None, **__: Any) -> None:
            if logs and "reward" in logs:
                rewards.append(round(float(logs["reward"]), 3))

    fast = gpu and find_spec("vllm") is not None
    options: dict[str, Any] = (
        {"use_vllm": True, "vllm_mode": "colocate", "vllm_gpu_memory_utilization": 0.3} if fast else {}
    )
    config = GRPOConfig(
        output_dir=str(scratch / "trl"), per_device_train_batch_size=bench.prompts * bench.samples, num_generations=bench.samples,
        max_completion_length=bench.tokens, learning_rate=1e-5, lr_scheduler_type="constant", beta=0.0, max_steps=bench.steps, logging_steps=1,
        save_strategy="no", report_to=[], use_cpu=not gpu, bf16=gpu, temperature=1.0, seed=bench.seed, gradient_checkpointing=False,
        disable_tqdm=True, **options,
    )  # fmt: skip
    trainer = GRPOTrainer(
        model=str(dense), reward_funcs=last_number, args=config, train_dataset=Dataset.from_list(rows), processing_class=tokenizer,
        callbacks=[Clock()],
    )  # fmt: skip
    return trainer, fast, ends, rewards


def last_number(completions: list[Any], answer: list[str], **_: Any) -> list[float]:
    """1 where the last number of the reply is the answer: what reward `number` asks."""
    replies = [c[0]["content"] if isinstance(c, list) else c for c in completions]
    found = [re.findall(r"-?\d+(?:\.\d+)?", text) for text in replies]
    return [float(bool(numbers) and numbers[-1] == gold) for numbers, gold in zip(found, answer, strict=True)]
