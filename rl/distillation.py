"""The two stages between specialists and the mixed stage: a specialist's verified rows, and the student made of all of them.

generate_rows:  training tasks ─ sample ─> shards (resumable) ─ choose ─> rows       train_student:  sft | on_policy | both
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

from winnow.distill.contamination import Contamination
from winnow.distill.data import Provenance, Row, Sampled, Summary, examine
from winnow.distill.selection import Rules, balanced, choose
from winnow.distill.shards import Shards
from winnow.distill.store import read_rows, write_rows
from winnow.distill.student import batches, domain_counts, make_examples
from winnow.models.load import load_tokenizer
from winnow.rl.cluster import Cluster
from winnow.rl.config import Config, config_hash, to_yaml
from winnow.rl.evaluate import make_requests
from winnow.rl.grading import grade_groups
from winnow.rl.lineage import check_tokenizer, tokenizer_hash
from winnow.rl.pipeline_config import DataConfig, StudentConfig
from winnow.rl.rendering import TrainingTemplate
from winnow.rl.sampler import domain_tasks
from winnow.rollout.schema import Group, Request, Task

Say = Callable[[str], object]


def generate_rows(
    config: Config, options: DataConfig, cluster: Cluster, folder: Path, name: str, key: str = "", say: Say = print
) -> tuple[Path, Summary]:
    """Samples the domain's training tasks with the model that `cluster` holds and writes the verified rows to FOLDER/NAME.jsonl.

    `config` is the run whose model this is; it is written beside the rows, which name its hash. `key` stands for the model and the code:
    samples of an interrupted generation with the same key are used again. Raises ValueError where nothing passes.
    """
    benchmarks = contamination(config, options)
    sampled = sample(config, options, cluster, folder / "shards", name, key, say)
    rules = Rules(
        threshold=options.threshold,
        best=options.best,
        diverse=options.diverse,
        near=options.near,
        min_pass_rate=options.min_pass_rate,
        max_pass_rate=options.max_pass_rate,
        limit=options.limit,
        max_contaminated=options.max_contaminated,
    )
    rows, found = choose(sampled, config.name, rules, benchmarks)
    (folder / f"{name}.config.yaml").write_text(f"# config {config_hash(config)}\n{to_yaml(config)}")
    return write_rows(rows, folder, name, found), found


def sample(
    config: Config, options: DataConfig, cluster: Cluster, folder: Path, name: str, key: str = "", say: Say = print
) -> list[Sampled]:
    """The graded samples of every prompt, each drawn once: those in shards are read, the others sampled, and kept as they arrive.

    Shards of other keys or other sampling of this NAME are removed: their samples are of another policy.
    """
    identity = f"{config_hash(config)}-{options.samples}-{options.temperature:g}" + (f"-{key}" if key else "")
    for stale in folder.glob(f"{name}@*"):
        if stale.name != f"{name}@{identity}":
            shutil.rmtree(stale)
    requests = data_requests(config, options, name)
    shards = Shards(folder / f"{name}@{identity}")
    done = shards.done
    missing = [request for request in requests if request.request_id not in done]
    if done and missing:
        say(f"data-{name}: {len(requests) - len(missing)} of {len(requests)} prompts were sampled before")
    tokenizer = tokenizer_hash(load_tokenizer(config.model.path))
    provenance = Provenance(
        specialist=config.name, checkpoint=config.model.path, config_hash=config_hash(config), tokenizer=tokenizer
    )
    arriving: Iterator[Group] = iter(cluster.pool.generate(missing)) if missing else iter(())
    if config.judge.model == "policy":  # the same engines judge: not in the middle of their sampling
        arriving = iter(list(arriving))
    while groups := list(islice(arriving, options.shard)):
        shards.add([examine(group, provenance) for group in grade_groups(config, groups, cluster.pool)])
    wanted = {request.request_id for request in requests}
    return [one for one in shards.sampled if one.request_id in wanted]


def data_requests(config: Config, options: DataConfig, name: str) -> list[Request]:
    tasks = [task for members in domain_tasks(config, "train").values() for task in members[: options.tasks]]
    return make_requests(
        tasks,
        samples=options.samples,
        temperature=options.temperature,
        max_tokens={domain.name: domain.max_tokens for domain in config.domains},
        max_turns={domain.name: domain.max_turns for domain in config.domains},
        templates={domain.name: domain.template for domain in config.domains},
        seed=config.seed + 1,
        prefix=f"data-{name}",
    )


def contamination(config: Config, options: DataConfig) -> Contamination:
    """The domains' own held-out tasks, word for word, and the benchmarks that the options name, by n-grams.

    Raises ValueError for an unknown benchmark and for one whose file is missing: unchecked data must not pass for clean.
    """
    from winnow.rewards.benchmarks import load_benchmark

    found = Contamination(options.ngram, options.overlap)
    for domain, tasks in domain_tasks(config, "heldout").items():
        found.add(f"held-out {domain}", map(prompt_text, tasks), exact=True)
    for benchmark, file in options.benchmarks.items():
        found.add(benchmark, map(prompt_text, load_benchmark(benchmark, data=file or None)))
    return found


def prompt_text(task: Task) -> str:
    return "\n".join(m["content"] for m in task.messages if m["role"] != "system")


def train_student(
    config: Config,
    options: StudentConfig,
    cluster: Cluster,
    files: Sequence[str | Path],
    folder: Path,
    progress: Say = print,
    teachers: Mapping[str, str] | None = None,
    seconds: float | None = None,
) -> dict[str, Any]:
    """The student's folder and its curves, from the model that `cluster` holds, by `options.method`.

    sft: on the rows of `files` and `options.rows`. on_policy: `teachers` (domain -> model folder) score its own samples. both: one, then
    the other. Neither begins an update after `seconds`. The model is written to `folder`, losses.json (and on_policy.jsonl) beside it.
    """
    result: dict[str, Any] = {"model": str(folder)}
    if options.method != "on_policy":
        result |= fine_tune(config, options, cluster, [*files, *options.rows], progress, seconds)
        (folder.parent / "losses.json").parent.mkdir(parents=True, exist_ok=True)
        (folder.parent / "losses.json").write_text(json.dumps(result["losses"]))
        cluster.learner.save(folder if options.method == "sft" else folder.parent / "sft", state=False)
    if options.method != "sft":
        from winnow.rl.on_policy import distill_on_policy

        if options.method == "both":  # a new optimizer: the moments of cross entropy say nothing about the KL
            config = replace(config, model=replace(config.model, path=str(folder.parent / "sft")))
            cluster.start(config)
        log = folder.parent / "on_policy.jsonl"
        result["kl"] = distill_on_policy(config, cluster, teachers or {}, options.steps, log, progress, seconds)
        cluster.learner.save(folder, state=False)
    return result


def fine_tune(
    config: Config,
    options: StudentConfig,
    cluster: Cluster,
    files: Sequence[str | Path],
    progress: Say,
    seconds: float | None = None,
) -> dict[str, Any]:
    """Supervised fine-tuning with the sparse forward: loss on the replies, no update after `seconds` but the first. Raises ValueError
    for rows of another tokenizer."""
    tokenizer = load_tokenizer(config.model.path)
    template = TrainingTemplate(tokenizer)
    rows = [row for file in files for row in rows_of(file, tokenizer_hash(tokenizer), config.model.path)]
    if options.balance == "smallest":
        rows = balanced(rows)
    examples, too_long = make_examples(rows, template)
    counts = ", ".join(f"{domain} {count}" for domain, count in domain_counts(examples).items())
    progress(f"{len(examples)} examples ({counts}), {options.epochs} epochs")
    losses: list[float] = []
    begin = time.monotonic()
    for epoch in range(options.epochs):
        for batch in batches(examples, options.batch_tokens, config.seed, epoch):
            if losses and seconds is not None and time.monotonic() - begin > seconds:
                progress(f"its {seconds:.0f} s are over in epoch {epoch + 1}, after {len(losses)} updates")
                return {"losses": losses, "examples": len(examples), "too_long": too_long}
            report = cluster.learner.sft_step(batch, len(losses) + 1)
            losses.append(float(report.metrics["loss/ce"]))
        progress(f"epoch {epoch + 1}/{options.epochs}  loss {losses[-1]:.4f}")
    return {"losses": losses, "examples": len(examples), "too_long": too_long}


def rows_of(place: str | Path, tokenizer: str, model: str) -> list[Row]:
    """The rows of a file, or of every JSONL file of a folder. Raises ValueError for none and for another tokenizer's."""
    path = Path(place).expanduser()
    files = sorted(path.glob("*.jsonl")) if path.is_dir() else [path]
    if not files:
        raise ValueError(
            f"the data folder {path} holds no .jsonl file: give the folder that `winnow distill` wrote its rows to"
        )
    found: list[Row] = []
    for file in files:
        rows = read_rows(file)
        check_tokenizer(rows, tokenizer, str(file), model)
        found += rows
    return found
