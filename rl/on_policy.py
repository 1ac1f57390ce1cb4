"""On-policy distillation: the student samples, the specialist of each sample's domain scores every token, reverse KL per token is the loss.

    TaskSampler.requests(step) ─> generate ─> trajectories ─ Teachers.logprobs ─> make_distillation_batch ─> Learner.step ─> push weights

The batch is RL's batch with teacher log-probabilities instead of advantages: packing, index replay, indexer KL, clipping and refusal are
the same code (losses.distillation_loss: KL(student || teacher), estimated without bias on the student's own tokens; GKD, 2306.13649).
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from winnow.rl.cluster import Cluster
from winnow.rl.config import Config
from winnow.rl.sampler import TaskSampler, domain_tasks


def distill_on_policy(
    config: Config,
    cluster: Cluster,
    teachers: Mapping[str, str],
    steps: int,
    log: Path,
    progress: Callable[[str], object] = print,
    seconds: float | None = None,
) -> list[float]:
    """`steps` updates of the model that `cluster` holds towards `teachers` (domain -> model folder); the KL at each step.

    `seconds`: no step begins after so many; at least one is made. A step draws the domains' quotas with rollout.samples each. Raises ValueError for a domain without a teacher before anything is drawn.
    """
    missing = [domain.name for domain in config.domains if domain.name not in teachers]
    if missing:
        raise ValueError(
            f"domains {missing} have no teacher (there are {sorted(teachers)}): on-policy distillation needs the stage specialists for each"
        )
    sampler = TaskSampler(domain_tasks(config, "train"), config)
    absolute = {domain: str(Path(path).resolve()) if Path(path).exists() else path for domain, path in teachers.items()}
    log.parent.mkdir(parents=True, exist_ok=True)
    log.write_text("")  # the stage begins anew when it was interrupted
    found: list[float] = []
    begin = time.monotonic()
    for step in range(1, steps + 1):
        if seconds is not None and found and time.monotonic() - begin > seconds:
            break
        groups = cluster.generate(sampler.requests(step))
        report = cluster.learner.distill_step([t for g in groups for t in g.trajectories], absolute, step)
        cluster.pool.push_weights(cluster.learner.weights(step), step)
        found.append(float(report.metrics["loss/distillation"]))
        with log.open("a") as file:
            file.write(json.dumps({"step": step, **report.metrics}) + "\n")
        progress(f"on-policy step {step}/{steps}  KL to the teachers {found[-1]:.4f} a token")
    return found
