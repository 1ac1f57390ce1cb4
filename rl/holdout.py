"""Evaluation inside a run: the held-out tasks of every domain, greedy by default, as metrics of the step."""

from __future__ import annotations

from pathlib import Path

from winnow.rl.config import Config
from winnow.rl.evaluate import evaluate, make_requests
from winnow.rl.sampler import domain_tasks
from winnow.rollout.schema import Generate, Request


def holdout_requests(config: Config, prefix: str) -> list[Request]:
    """One request for every held-out task of the config's domains; their ids begin with `prefix`."""
    return make_requests(
        [task for members in domain_tasks(config, "heldout").values() for task in members],
        samples=config.evaluation.samples,
        temperature=config.evaluation.temperature,
        max_tokens={domain.name: domain.max_tokens for domain in config.domains},
        max_turns={domain.name: domain.max_turns for domain in config.domains},
        templates={domain.name: domain.template for domain in config.domains},
        seed=config.seed,
        prefix=prefix,
    )


def holdout_metrics(config: Config, generate: Generate, step: int) -> dict[str, float]:
    """eval/<domain>, its reward, 95 % interval and the best constant reply; every answer goes to evaluations/ in the run folder."""
    requests = holdout_requests(config, f"eval-{step}")
    if not requests:
        return {}
    answers = Path(config.folder) / "evaluations" / f"step-{step:06d}.jsonl"
    metrics: dict[str, float] = {}
    for name, result in evaluate(generate, requests, answers=answers).items():
        metrics |= {f"eval/{name}": result.mean, f"eval/{name}_low": result.low, f"eval/{name}_high": result.high}
        metrics |= {f"eval/{name}_reward": result.reward, f"eval/{name}_length": result.length}
        if result.constant is not None:
            metrics[f"eval/{name}_constant"] = result.constant
    return metrics
