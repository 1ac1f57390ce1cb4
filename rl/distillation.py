"""The two stages between specialists and the mixed stage: a specialist's verified rows, and the student trained on all of them."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from winnow.distill.data import Provenance, Summary, select
from winnow.distill.store import read_rows, write_rows
from winnow.distill.student import batches, domain_counts, make_examples
from winnow.models.load import load_tokenizer
from winnow.rewards.contract import grade
from winnow.rewards.registry import get_reward
from winnow.rl.cluster import Cluster
from winnow.rl.config import Config, config_hash
from winnow.rl.evaluate import make_requests
from winnow.rl.pipeline_config import DataConfig, StudentConfig
from winnow.rl.rendering import TrainingTemplate
from winnow.rl.sampler import domain_tasks


def generate_rows(
    config: Config, options: DataConfig, cluster: Cluster, folder: Path, name: str
) -> tuple[Path, Summary]:
    """Samples the domain's training tasks with the model that `cluster` holds and writes the verified rows to FOLDER/NAME.jsonl.

    `config` is the run whose model this is. Raises ValueError where nothing passes the threshold.
    """
    tasks = [task for members in domain_tasks(config, "train").values() for task in members[: options.tasks]]
    requests = make_requests(
        tasks,
        samples=options.samples,
        temperature=options.temperature,
        max_tokens={domain.name: domain.max_tokens for domain in config.domains},
        max_turns={domain.name: domain.max_turns for domain in config.domains},
        seed=config.seed + 1,
        prefix=f"data-{name}",
    )
    groups = grade(get_reward, list(cluster.pool.generate(requests)))
    provenance = Provenance(specialist=config.name, checkpoint=config.model.path, config_hash=config_hash(config))
    rows, found = select(groups, provenance, threshold=options.threshold, best=options.best)
    return write_rows(rows, folder, name, found), found


def train_student(
    config: Config,
    options: StudentConfig,
    cluster: Cluster,
    files: Sequence[str | Path],
    folder: Path,
    progress: Callable[[str], object] = print,
) -> dict[str, Any]:
    """Supervised fine-tuning, with the sparse forward, of the model that `cluster` holds; the student's folder and its loss curve."""
    template = TrainingTemplate(load_tokenizer(config.model.path))
    examples, too_long = make_examples([row for file in files for row in read_rows(file)], template)
    counts = ", ".join(f"{domain} {count}" for domain, count in domain_counts(examples).items())
    progress(f"{len(examples)} examples ({counts}), {options.epochs} epochs")
    losses: list[float] = []
    for epoch in range(options.epochs):
        for batch in batches(examples, options.batch_tokens, config.seed, epoch):
            report = cluster.learner.sft_step(batch, len(losses) + 1)
            losses.append(float(report.metrics["loss/ce"]))
        progress(f"epoch {epoch + 1}/{options.epochs}  loss {losses[-1]:.4f}")
    cluster.learner.save(folder, state=False)
    (folder.parent / "losses.json").write_text(json.dumps(losses))
    return {"model": str(folder), "losses": losses, "examples": len(examples), "too_long": too_long}
