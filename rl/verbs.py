"""What each verb of the command line does. Every function takes the parsed arguments and returns an exit code (None is 0).

Heavy imports stand inside the functions, so that `winnow --help` answers at once.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any


def convert(arguments: argparse.Namespace) -> None:
    from winnow.rl.config import typed
    from winnow.rl.convert import convert as run
    from winnow.rl.convert_options import ConvertOptions

    section = convert_section(arguments.config)
    options = typed(ConvertOptions, section, arguments.overrides)
    if arguments.vary and not arguments.table:
        raise ValueError("--vary makes rows of a table: add --table")
    if arguments.table:
        from winnow.rl.ablation import convert_table
        from winnow.rl.conversion_table import as_markdown

        ks = arguments.k or [options.top_k]
        varied = {}
        for change in changes(arguments.vary):
            varied[change.replace("=", " ")] = typed(ConvertOptions, section, [*arguments.overrides, change])
        limit, only = arguments.limit_s, arguments.recipe_only
        made = convert_table(arguments.model, arguments.out, options, ks, say, limit, only, varied)
        print(as_markdown(made))
        return
    run(arguments.model, arguments.out, options, progress=say)


def changes(vary: str | None) -> list[str]:
    """ "KEY=A,B" as ["KEY=A", "KEY=B"]. ValueError unless it is the sparse stage that reads KEY: what comes before it is shared."""
    if not vary:
        return []
    key, _, values = vary.partition("=")
    found = [f"{key}={value}" for value in values.split(",") if value]
    if not key.startswith("sparse_") or not found:
        raise ValueError(
            f"--vary is {vary!r}, but it must be KEY=A,B,... with a KEY of the sparse stage (sparse_model_lr, sparse_steps, ...): the rows "
            "share their data, needles and warm-up"
        )
    return found


def convert_section(config: str) -> Mapping[str, Any]:
    """What a YAML file, a pipeline's or one that holds nothing else, says of a conversion; nothing where none is named."""
    from winnow.rl.config import read_values

    if not config:
        return {}
    values = read_values(find_config(config))
    if not isinstance(values.get("convert"), dict):
        raise ValueError(
            f"{config} has no section `convert`, only {', '.join(values)}: put the conversion's options there"
        )
    return values["convert"]


def train(arguments: argparse.Namespace) -> int:
    from winnow.rl.config import load_config

    resume = ["resume=true"] if arguments.resume else []
    config = load_config(find_config(arguments.config), [*arguments.overrides, *resume])
    if arguments.dry_run:
        from winnow.rl.plan import describe_plan

        print(describe_plan(config))
        return 0
    from winnow.models.load import read_config, resolve
    from winnow.rl.rendering import check_templates
    from winnow.rl.report import write_report
    from winnow.rl.train import train as run

    read_config(resolve(config.model.path))  # before any process is started
    check_templates(config.model.path, config.domains)

    result = run(config, progress=say)
    say(f"run folder {config.folder}, report {write_report(config.folder)}")
    if result["status"] != "done":
        say(f"{result['status']}: the same command with --resume goes on from step {result['step']}")
        return 130
    return 0


def distill(arguments: argparse.Namespace) -> None:
    arguments.overrides = [*arguments.overrides, "stages=[base, convert, specialists, data, student]"]
    pipeline(arguments)


def pipeline(arguments: argparse.Namespace) -> None:
    from winnow.rl.pipeline_config import load_pipeline

    config = load_pipeline(find_config(arguments.config), arguments.overrides)
    if arguments.dry_run:
        print(describe_pipeline(config))
        return
    from winnow.models.load import read_config, resolve
    from winnow.rl.pipeline import run_pipeline
    from winnow.rl.rendering import check_templates

    if config.model:
        read_config(resolve(config.model))
        check_templates(config.model, config.stage_run("evaluation", config.model).domains)
    if getattr(arguments, "mixing", False):
        from winnow.rl.mixing import Mixing

        Mixing(config, say).run()
        return
    run_pipeline(config, say)


def describe_pipeline(config: Any) -> str:
    from winnow.rl.config import to_yaml
    from winnow.rl.plan import memory, placement

    model = config.model or str(config.folder / "sparse")
    lines = ["# resolved pipeline", to_yaml(config).rstrip(), "", "# stages"]
    for stage in config.stages:
        if stage == "specialists":
            runs = [config.stage_run("specialist", model, domain) for domain in config.domains]
            lines += [
                f"  {run.name}: {run.schedule.steps} steps of {run.prompts_per_step} prompts x {run.rollout.samples}"
                for run in runs
            ]
        elif stage == "mixed":
            run = config.stage_run("mixed", model)
            lines.append(
                f"  mixed: {run.schedule.steps} steps of {run.prompts_per_step} prompts x {run.rollout.samples}"
            )
        else:
            lines.append(f"  {stage}")
    shared = config.stage_run("mixed", model)
    return "\n".join(
        [*lines, "", "# placement (one cluster for all stages)", *placement(shared), "", "# memory", *memory(shared)]
    )


def eval(arguments: argparse.Namespace) -> None:
    from winnow.rl.local import settle

    settle(arguments)
    if arguments.retention:
        from winnow.rl.retention_eval import evaluate_retention

        print(evaluate_retention(arguments, say))
        return
    from winnow.rewards.benchmarks import load_benchmark
    from winnow.rewards.registry import prepare
    from winnow.rl.evaluate import details, evaluate, make_requests, table
    from winnow.rl.generate import template_options
    from winnow.rl.local import local_pool

    options = template_options(arguments.template_option)
    names = [name.strip() for name in arguments.tasks.split(",") if name.strip()]
    tasks = []
    for name in names:
        found = load_benchmark(
            name,
            arguments.limit or None,
            arguments.seed,
            arguments.level,
            arguments.data,
            arguments.shots,
            template(arguments),
        )
        tasks += [renamed(task, Path(name).stem) for task in found]
    for line in prepare(tasks):
        say(line)
    requests = make_requests(
        tasks,
        samples=arguments.samples,
        temperature=arguments.temperature,
        max_tokens=arguments.max_tokens,
        max_turns={Path(name).stem: arguments.max_turns for name in names},
        seed=arguments.seed,
        templates={task.domain: options for task in tasks},
    )
    answers = Path(arguments.out or f"{Path(arguments.model).name}.answers.jsonl")
    model = (
        f"{Path(arguments.model).resolve() if Path(arguments.model).exists() else arguments.model} {arguments.selector} {arguments.dtype}"
        + (f" {options}" if options else "")
    )
    with local_pool(arguments, requests) as pool:
        start = time.monotonic()
        tokenizer = pool.runner.engine.tokenizer
        results = evaluate(pool.generate, requests, answers=answers, tokenizer=tokenizer, model=model)
    print("\n".join(text for text in (table(results), details(results)) if text))
    say(
        f"{time.monotonic() - start:.1f} s for {sum(request.num_samples for request in requests)} samples on {arguments.device}"
    )
    say(f"every answer: {answers}")


def template(arguments: argparse.Namespace) -> str | None:
    """The text of --template: given on the command line, or in a file."""
    given = arguments.template
    return Path(given).read_text(encoding="utf-8") if given and Path(given).is_file() else given


def renamed(task: Any, domain: str) -> Any:
    """The task under the benchmark's name, so that two benchmarks of one domain stay apart in the table."""
    import dataclasses

    return dataclasses.replace(task, domain=domain)


def generate(arguments: argparse.Namespace) -> None:
    from winnow.rl.generate import answer_prompts, read_prompts
    from winnow.rl.local import local_pool, settle

    settle(arguments)
    requests = read_prompts(arguments.prompts, arguments)
    with local_pool(arguments, requests) as pool:
        rows = answer_prompts(pool.generate, requests)
        if arguments.out:
            count = write_lines(Path(arguments.out), rows)
            say(f"{count} answers: {arguments.out}")
        else:
            for row in rows:
                print(json.dumps(row, ensure_ascii=False), flush=True)


def write_lines(path: Path, rows: Iterator[dict[str, Any]]) -> int:
    count = 0
    with path.open("w", encoding="utf-8") as stream:
        for row in rows:
            stream.write(json.dumps(row, ensure_ascii=False) + "\n")
            stream.flush()
            count += 1
    return count


def submit(arguments: argparse.Namespace) -> int:
    from winnow.rl.submit import follow_job, list_jobs, stop_job, submit_job

    if arguments.list:
        print("\n".join(list_jobs(arguments.address, arguments.timeout)) or "the cluster has no job")
        return 0
    if arguments.stop:
        return stop_job(arguments.address, arguments.stop, arguments.timeout, say)
    if arguments.follow:
        return follow_job(arguments.address, arguments.follow, arguments.timeout, say)
    command = (
        [word for word in arguments.command if word != "--"] if arguments.command[:1] == ["--"] else arguments.command
    )
    return submit_job(command, arguments.address, arguments.timeout, say, arguments.python, not arguments.no_wait)


def bench(arguments: argparse.Namespace) -> None:
    from winnow.rl.bench_verb import measure_what

    measure_what(arguments)


def export(arguments: argparse.Namespace) -> None:
    from winnow.rl.export import export_checkpoint

    a = arguments
    print(export_checkpoint(Path(a.run), Path(a.out), step=a.step, best=a.best, dense=a.dense, dtype=a.dtype))


def report(arguments: argparse.Namespace) -> None:
    if arguments.provenance:
        from winnow.rl.provenance import trace_lines

        for line in trace_lines(Path(arguments.run)):
            print(line)
        return
    from winnow.rl.report import write_report

    print(write_report(Path(arguments.run), Path(arguments.out) if arguments.out else None))


def find_config(name: str) -> Path:
    """A YAML file, or a shipped one by its name. Raises ValueError listing the shipped ones."""
    path = Path(name)
    if path.is_file():
        return path
    shipped = shipped_configs()
    if path.stem in shipped and path.parent.name in ("", "configs"):
        return shipped[path.stem]
    raise ValueError(f"config file {name} does not exist, and the shipped configs are {', '.join(shipped)}")


def shipped_configs() -> dict[str, Path]:
    """Name -> file of every YAML in winnow.configs."""
    import winnow.configs as package

    # importlib.resources cannot read this one: an editable install adds an entry to the path that is no folder
    folders = [Path(place) for place in package.__path__ if Path(place).is_dir()]
    return {file.stem: file for folder in folders for file in sorted(folder.glob("*.yaml"))}


def say(text: str) -> None:
    """Progress, on standard error: standard output is for results."""
    print(text, file=sys.stderr, flush=True)


__all__: Sequence[str] = (
    "bench",
    "convert",
    "distill",
    "eval",
    "export",
    "generate",
    "pipeline",
    "report",
    "submit",
    "train",
)
