"""TRL's GRPOTrainer on the prompts, the reward and the sizes of `bench_step`: the peer, where it is installed.

On a GPU it samples with vLLM colocated where that is installed, else with `generate`; on a CPU with `generate`. Weights are the dense
ones of the same folder: TRL knows no sparse attention.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from winnow.rl.bench_step import StepBench


def bench_trl(
    bench: StepBench, model: str, scratch: Path, begin: float, progress: Callable[[str], object]
) -> dict[str, Any]:
    """Figures as those of ours. begin: seconds of this process's life that came before TRL's. ImportError: TRL, or what it needs, is missing."""
    from winnow.rl.bench_step import timing

    trainer, fast, ends, curve = _trainer(bench, model, scratch, progress)
    trainer.train()
    import trl

    return {
        "version": trl.__version__,
        "rollouts": "vLLM, colocated" if fast else "generate",
        **timing(bench, begin, ends[: len(curve)], curve),
    }


def _trainer(
    bench: StepBench, model: str, scratch: Path, progress: Callable[[str], object]
) -> tuple[Any, bool, list[float], list[tuple[float, float]]]:
    """The trainer, whether vLLM samples for it, and the lists that fill as it steps: ends in seconds; mean rewards with tokens of a reply.

    fp32 weights in the trainer, which computes under bf16 autocast on a GPU; vLLM's are bf16.
    """
    import torch
    from datasets import Dataset
    from transformers import AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    from winnow.rl.bench_step import over, seconds_alive, step_config
    from winnow.rl.grading import prepared_tasks

    gpu = bench.device.startswith("cuda")
    dense = dense_folder(model, scratch, "bfloat16" if gpu else "float32")
    tasks = prepared_tasks(step_config(bench, model, scratch), lambda text: None)["addition"]
    rows = [{"prompt": [dict(m) for m in task.messages], "answer": task.answer} for task in tasks]
    ends: list[float] = []
    curve: list[tuple[float, float]] = []

    class Clock(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if gpu:
                torch.cuda.synchronize()
            ends.append(seconds_alive())
            if over(bench, ends):
                control.should_training_stop = True

        def on_log(self, *_: Any, logs: Any = None, **__: Any) -> None:
            if logs and "reward" in logs:
                curve.append((float(logs["reward"]), float(logs["completions/mean_length"])))
                progress(f"trl: {ends[-1]:.2f} s after the start, step {len(curve)}: reward {curve[-1][0]:.3f}")

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
        model=str(dense), reward_funcs=last_number, args=config, train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(dense), callbacks=[Clock()],
    )  # fmt: skip
    return trainer, fast, ends, curve


def dense_folder(model: str, scratch: Path, served: str) -> Path:
    """`model` without indexers, as vLLM and TRL open it; `model` itself where it is dense already. served: the dtype that vLLM is told."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    settings = json.loads((Path(model) / "config.json").read_text())
    if "winnow" not in settings and settings.get("dtype") == served:
        return Path(model)
    dense = scratch / "dense"
    loaded: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    if hasattr(loaded.config, "winnow"):
        del loaded.config.winnow
    loaded.save_pretrained(dense)
    AutoTokenizer.from_pretrained(model).save_pretrained(dense)
    settings = json.loads((dense / "config.json").read_text())
    (dense / "config.json").write_text(json.dumps({**settings, "dtype": served}, indent=1))
    return dense


def last_number(completions: list[Any], answer: list[str], **_: Any) -> list[float]:
    """1 where the last number of the reply is the answer: what reward `number` asks."""
    replies = [c[0]["content"] if isinstance(c, list) else c for c in completions]
    found = [re.findall(r"-?\d+(?:\.\d+)?", text) for text in replies]
    return [float(bool(numbers) and numbers[-1] == gold) for numbers, gold in zip(found, answer, strict=True)]
