"""The driver: one RL run, a specialist or the mixed stage, which differ only in their config.

    TaskSampler.requests(step) ──> Rollouts.take ──> groups ── grade ──> scored groups ── compute_advantages ──> samples
            ^                           ^                                                                           |
            |                           | push_weights(version = step)                                         make_batch
            |                           |                                                                           v
        next step <── log, evaluate, save <── StepReport <───────────────── Learner.step <──────────────────── TrainBatch

The schedule says how far rollouts run ahead (schedule.py). Every wait is bounded. Ctrl-C saves the run, `resume=true` continues it.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

from winnow.rewards.contract import check_failures
from winnow.rl.advantages import compute_advantages
from winnow.rl.batching import make_batch
from winnow.rl.checkpoints import read_latest
from winnow.rl.cluster import Cluster, connect
from winnow.rl.config import Config
from winnow.rl.dynamic import refill
from winnow.rl.grading import grade_groups, held_out_metrics, prepared_tasks
from winnow.rl.holdout import holdout_metrics
from winnow.rl.interrupts import Interrupts
from winnow.rl.metrics import group_metrics, speed_metrics
from winnow.rl.restarts import Say, restarted
from winnow.rl.run import Run, Stopwatch
from winnow.rl.sampler import TaskSampler
from winnow.rl.schedule import Rollouts, read_in_flight
from winnow.rollout.schema import Group


@restarted
def train(
    config: Config, cluster: Cluster | None = None, progress: Say = print, seconds: float | None = None
) -> dict[str, Any]:
    """Runs the config, at most for `seconds`: what result.json holds. `cluster` lends running processes, else they are started here."""
    sampler = TaskSampler(prepared_tasks(config, progress), config)
    start = read_latest(config.folder / "checkpoints") if config.resume else None
    run = Run(config, start.step if start else 0, start.path if start else None)
    rollouts = Rollouts(sampler.requests, config.schedule, read_in_flight(run.checkpoint))
    lent = connect(config) if cluster is None else nullcontext(cluster)
    with run, rollouts, Interrupts() as interrupts, lent as cluster:
        run.drift = cluster.check_drift(config, cluster.start(config, start))
        try:
            if config.schedule.eval_every and run.step == 0:  # what the run starts from
                run.log(0, holdout_metrics(config, cluster.pool.generate, 0))
                progress(run.flush())
            for step in run.steps(seconds):
                watch = Stopwatch()
                with watch("rollout"):
                    groups = rollouts.take(step, cluster.pool)
                with interrupts.held():
                    run.log(step, learn(config, cluster, sampler, step, groups, watch, run))
                    run.step = step
                if config.schedule.eval_every and step % config.schedule.eval_every == 0:
                    run.log(step, holdout_metrics(config, cluster.pool.generate, step))
                progress(run.flush())
                if run.save_due:
                    with interrupts.held():
                        run.save(cluster.learner, rollouts)
        except KeyboardInterrupt:
            run.status = "interrupted"
            progress(f"interrupted after step {run.step}: saving; resume=true continues")
        run.save(cluster.learner, rollouts)
    return run.result


def learn(
    config: Config, cluster: Cluster, sampler: TaskSampler, step: int, groups: list[Group], watch: Stopwatch, run: Run
) -> dict[str, float]:
    """From ungraded groups to new weights in the pool: the step's metrics."""
    with watch("reward"):
        groups = grade_groups(config, groups, cluster.pool)
        groups, dynamic = refill(
            config, sampler, step, groups, lambda more: grade_groups(config, cluster.generate(more), cluster.pool)
        )
        run.save_samples(step, groups)
        check_failures(groups, config.algorithm.max_failures)
    with watch("learn"):
        advantages = compute_advantages(groups, config.algorithm, config.domains)
        batch = make_batch(
            advantages.samples, step=step, micro_tokens=config.learner.micro_tokens, updates=config.learner.updates_per_batch,
            keep_idle=config.indexer.train == "kl", kept_sets=config.algorithm.keep_kept_sets, ranks=config.learner.ranks,
        )  # fmt: skip
        report = cluster.learner.step(batch)
    with watch("sync"):
        if config.schedule.pushes(step):
            cluster.pool.push_weights(cluster.learner.weights(step), step)
    return {
        **group_metrics(groups, step - 1),
        **dynamic,
        **advantages.metrics,
        **held_out_metrics(config, groups),
        **report.metrics,
        **cluster.engine_metrics(),
        **speed_metrics(watch.times, groups),
    }
