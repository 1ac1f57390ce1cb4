"""The pipeline: specialists -> their verified data -> student -> one mixed GRPO stage -> evaluation. Restartable, no stage twice.

    base ─> convert ─┬─> specialist-D (RL, one run a domain) ─> data-D (verified, deduplicated rows) ─┐
                     └────────────────────────────────────────────────────────────> student <────────┘ ─> mixed (RL, all domains)
    student: SFT on those data, the specialists as teachers of its own samples (on-policy distillation), or one after the other
    evaluation: base, each specialist, student and mixed on the same held-out tasks; floors: the last model without its index

Every stage notes in manifest.json what it was made from, as a hash of its config, of the stages before it and of the code's version. A
stage whose note still holds is not done again; one whose inputs changed is done anew; an RL run that was interrupted is resumed. One
cluster (the learner's and the workers' processes) serves all stages.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from winnow.rl.cluster import Cluster, connect, worker_spec
from winnow.rl.config import Config, config_hash, to_yaml
from winnow.rl.forgetting import forgetting
from winnow.rl.forgetting import lines as forgetting_lines
from winnow.rl.holdout import holdout_requests
from winnow.rl.manifest import Manifest
from winnow.rl.pipeline_config import PipelineConfig, base_options, convert_options
from winnow.rl.run import code_version

MODELS = ("base", "specialist", "student", "mixed")  # columns of the result, in the order they are made
FLOORS = ("random", "recent")


class Pipeline:
    """One pipeline run in `config.folder`. `progress` gets lines of text with the seconds since the start."""

    def __init__(
        self,
        config: PipelineConfig,
        progress: Callable[[str], object] = print,
        connect: Callable[[Config], Any] = connect,
    ) -> None:
        self.config, self.folder = config, config.folder
        self._progress, self._connect = progress, connect
        self._start = time.monotonic()
        self._cluster: Cluster | None = None
        self._exits = ExitStack()
        cluster, workers = config.run.get("cluster", {}), config.run.get("rollout", {}).get("workers", 1)
        gpus = float(cluster.get("learner_gpus", 0)) + workers * float(cluster.get("worker_gpus", 0))
        self.manifest = Manifest(self.folder, code_version(), self.say, gpus)

    def say(self, text: str) -> None:
        self._progress(f"[{time.monotonic() - self._start:6.1f} s] {text}")

    def run(self) -> dict[str, Any]:
        """Does what is left to do; returns and writes result.json. KeyboardInterrupt leaves every finished stage in place."""
        from winnow.rl.report import write_report

        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "config.yaml").write_text(to_yaml(self.config))
        with self._exits:
            result = self._stages()
        result["forgetting"] = forgetting(self.folder / "evaluation", list(result["models"]))
        result |= {"status": "done", "seconds": round(time.monotonic() - self._start, 1), "version": code_version()}
        (self.folder / "result.json").write_text(json.dumps(result, indent=1))
        if result["evaluation"]:
            self._progress("\n" + result_table(result) + "\n")
        self.say(f"report: {write_report(self.folder)}")
        return result

    def _stages(self) -> dict[str, Any]:
        wanted = self.config.stages
        models: dict[str, str] = {}
        models["base"] = sparse = self._convert(self._base())
        if "specialists" in wanted:
            self._check_bases(sparse)
        for domain in self.config.domains if "specialists" in wanted else []:
            models[f"specialist-{domain}"] = self._reinforce("specialist", sparse, domain)
        rows = [
            self._data(domain, models[f"specialist-{domain}"]) for domain in self.config.domains if "data" in wanted
        ]
        if "student" in wanted:
            teachers = {d: models[f"specialist-{d}"] for d in self.config.domains if f"specialist-{d}" in models}
            models["student"] = self._student(sparse, rows, teachers)
        if "mixed" in wanted:
            models["mixed"] = self._reinforce("mixed", models["student"])
        evaluation: dict[str, Any] = {}
        if "evaluation" in wanted:
            for name, path in models.items():
                evaluation[name] = self._evaluate(name, path)
            if self.config.floors:
                for selector in FLOORS:
                    last = list(models)[-1]
                    evaluation[f"{last}-{selector}"] = self._floor(last, models[last], selector)
        return summary(models, evaluation, self.manifest)

    # -------------------------------------------------------------------------------------------------------------------- stages

    def _base(self) -> str:
        if self.config.model:
            return self.config.model

        options = base_options(self.config)

        def make() -> dict[str, Any]:
            from winnow.rl.base import make_base

            folder = self.folder / "base"
            return {"model": str(folder), **make_base(folder, options, self.say)}

        return str(self.manifest.stage("base", dataclasses.asdict(options), make)["model"])

    def _convert(self, model: str) -> str:
        if "convert" not in self.config.stages:
            return model
        inputs = {"model": self._identity(model), "options": dataclasses.asdict(convert_options(self.config))}

        def make() -> dict[str, Any]:
            from winnow.rl.convert import convert

            texts = self._texts(model) if self.config.convert_data == "tasks" else None
            folder = self.folder / "sparse"
            report = convert(model, folder, convert_options(self.config), texts, progress=self.say)
            kept = report["retention"]
            return {
                "model": str(folder),
                "perplexity": kept["perplexity"],
                "recall": {n: r["mean"] for n, r in kept["recall"].items()},
            }

        return str(self.manifest.stage("convert", inputs | {"data": self.config.convert_data}, make)["model"])

    def _texts(self, model: str) -> list[list[int]] | None:
        """Token lists of the domains' own conversations for the conversion; None where no domain has demonstrations."""
        from winnow.models.load import load_tokenizer
        from winnow.rewards.demonstrations import PRETRAINING_KINDS, pretraining_texts
        from winnow.rl.rendering import TrainingTemplate

        kinds = [d["source"] for d in self.config.run["domains"] if d["source"] in PRETRAINING_KINDS]
        if not kinds:
            return None
        options = convert_options(self.config)
        template = TrainingTemplate(load_tokenizer(model))
        count = max(16, options.num_tokens // options.seq_len)
        return [template.render(messages)[0] for messages in pretraining_texts(count, self.config.seed + 1, kinds)]

    def _check_bases(self, sparse: str) -> None:
        """Raises ValueError where a specialist's own config starts from other weights than the student will."""
        from winnow.rl.lineage import check_same_base

        for domain in self.config.domains:
            if base := self.config.specialist_base(domain):
                check_same_base(domain, base, sparse)

    def _reinforce(self, stage: str, model: str, domain: str | None = None) -> str:
        """One RL run; an interrupted one of the same config goes on where it stopped."""
        from winnow.rl.train import train

        config = self.config.stage_run(stage, model, domain)
        name = config.name

        def make() -> dict[str, Any]:
            resumed = resumable(config)
            if config.folder.exists() and not resumed:
                shutil.rmtree(config.folder)
            self.say(f"{name}: {'resuming' if resumed else 'training'}, {config.schedule.steps} steps")
            result = train(
                dataclasses.replace(config, resume=resumed),
                cluster=self._shared(config),
                progress=lambda t: self.say(f"{name}: {t}"),
            )
            if result["status"] != "done":
                raise KeyboardInterrupt
            return {"model": result["checkpoint"], "run": result["run"], "domains": result["domains"]}

        inputs = {"config": config_hash(config), "model": self._identity(model)}
        return str(self.manifest.stage(name, inputs, make)["model"])

    def _data(self, domain: str, model: str) -> str:
        options = self.config.data
        config = self.config.stage_run("specialist", model, domain)

        def make() -> dict[str, Any]:
            from winnow.rl.distillation import generate_rows

            key = self.manifest.key({"model": self._identity(model)})  # of the samples, not of what is chosen from them
            cluster = self._started(config)
            path, found = generate_rows(config, options, cluster, self.folder / "data", domain, key, self.say)
            rate, kept = found.pass_rate(domain), found.kept[domain]
            self.say(f"data-{domain}: {kept} verified rows of {found.sampled[domain]} samples (pass rate {rate:.1%})")
            return {"rows": str(path), **found.as_dict()}

        inputs = {"config": config_hash(config), "data": dataclasses.asdict(options), "model": self._identity(model)}
        return str(self.manifest.stage(f"data-{domain}", inputs, make)["rows"])

    def _student(self, model: str, rows: list[str], teachers: Mapping[str, str]) -> str:
        config, options = self.config.stage_run("student", model), self.config.student

        def make() -> dict[str, Any]:
            from winnow.rl.distillation import train_student

            folder, cluster = self.folder / "student" / "model", self._started(config)
            return train_student(config, options, cluster, rows, folder, lambda t: self.say(f"student: {t}"), teachers)

        inputs = {"config": config_hash(config), "student": dataclasses.asdict(options), "model": self._identity(model)}
        if options.method != "on_policy":
            inputs["rows"] = [self._identity(path) for path in [*rows, *options.rows]]
        if options.method != "sft":
            inputs["teachers"] = {domain: self._identity(path) for domain, path in teachers.items()}
        return str(self.manifest.stage("student", inputs, make)["model"])

    def _evaluate(self, name: str, model: str) -> dict[str, Any]:
        """One model on the held-out tasks: a specialist on its own domain, the others on all."""
        domain = name.removeprefix("specialist-") if name.startswith("specialist-") else None
        config = self.config.stage_run("evaluation", model, domain)

        def make() -> dict[str, Any]:
            pool = self._started(config).pool
            return {"results": self._score(config, pool.generate, name)}

        inputs = {"config": config_hash(config), "model": self._identity(model)}
        return dict(self.manifest.stage(f"evaluation-{name}", inputs, make)["results"])

    def _floor(self, name: str, model: str, selector: str) -> dict[str, Any]:
        """The model with the index replaced by a rule that does not look: what the trained index is worth."""
        config = self.config.stage_run("evaluation", model, self.config.floors)
        config = dataclasses.replace(config, indexer=dataclasses.replace(config.indexer, selector=selector))

        def make() -> dict[str, Any]:
            from winnow.rollout.local_pool import LocalPool

            with LocalPool(worker_spec(config)) as pool:
                return {"results": self._score(config, pool.generate, f"{name}-{selector}")}

        inputs = {"config": config_hash(config), "model": self._identity(model)}
        return dict(self.manifest.stage(f"evaluation-{name}-{selector}", inputs, make)["results"])

    def _score(self, config: Config, generate: Any, name: str) -> dict[str, Any]:
        from winnow.models.load import load_tokenizer
        from winnow.rl.evaluate import evaluate

        answers = self.folder / "evaluation" / f"{name}.jsonl"
        requests = holdout_requests(config, f"evaluation-{name}")
        found = evaluate(generate, requests, answers=answers, tokenizer=load_tokenizer(config.model.path))
        solved = ", ".join(
            f"{d} {r.mean:.3f} ({r.low:.3f} to {r.high:.3f}, {r.num_tasks} tasks)" for d, r in found.items()
        )
        self.say(f"evaluation of {name}: {solved}")
        return {d: r.as_dict() for d, r in found.items()}

    # -------------------------------------------------------------------------------------------------------------------- cluster

    def _shared(self, config: Config) -> Cluster:
        """The pipeline's one cluster, started when a stage first needs it."""
        if self._cluster is None:
            self.say("starting Ray, the learner and the rollout workers")
            self._cluster = self._exits.enter_context(self._connect(config))
            self.say("ready")
        return self._cluster

    def _started(self, config: Config) -> Cluster:
        """The cluster with the config's model in the learner and in the workers."""
        cluster = self._shared(config)
        cluster.start(config)
        return cluster

    def _identity(self, path: str) -> str:
        """What stands for a model or file in a stage's inputs: the stage that made it, or the files' own sizes and times."""
        return self.manifest.maker(path) or fingerprint(path)


def fingerprint(path: str) -> str:
    """A hash of names, sizes and times of a folder's files; of the name alone for a model spec."""
    folder = Path(path).expanduser()
    files = sorted(folder.glob("*")) if folder.is_dir() else [folder] if folder.is_file() else []
    listed = [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files if file.is_file()]
    return hashlib.sha256(json.dumps([str(path), listed]).encode()).hexdigest()[:16]


def resumable(config: Config) -> bool:
    """Whether the run's folder holds an unfinished run of this very config."""
    text = config.folder / "config.yaml"
    return text.is_file() and text.read_text().startswith(f"# config {config_hash(config)},")


def summary(models: Mapping[str, str], evaluation: Mapping[str, Any], manifest: Manifest) -> dict[str, Any]:
    """result.json: `domains` holds the share of held-out tasks solved; `evaluation` all figures by model and domain."""
    domains: dict[str, dict[str, float]] = {}
    for name, results in evaluation.items():
        for domain, result in results.items():
            column = "specialist" if name == f"specialist-{domain}" else name
            domains.setdefault(domain, {})[column] = result["mean"]
            if result["constant"] is not None:
                domains[domain].setdefault("constant", result["constant"])
    stages = {name: note["seconds"] for name, note in manifest.notes.items()}
    return {"domains": domains, "evaluation": dict(evaluation), "models": dict(models), "stages": stages}


def result_table(result: Mapping[str, Any]) -> str:
    """Held-out tasks solved and mean rewards by domain and model, with 95 % intervals; then the floors and what attention saw."""
    lines = figures(result, "solved", "mean", "low", "high")
    graded = [
        d for d, row in result["domains"].items() if _partly(result, d)
    ]  # elsewhere the reward is the share solved
    if graded:
        lines += [
            "",
            *figures(
                {**result, "domains": {d: result["domains"][d] for d in graded}},
                "mean reward",
                "reward",
                "reward_low",
                "reward_high",
            ),
        ]
    last = list(result["models"])[-1]
    changes = forgetting_lines({last: result.get("forgetting", {}).get(last, {})})
    lines += ["", *changes, ""] if changes else [""]
    for name, results in result["evaluation"].items():
        for domain, r in results.items():
            if name.endswith(FLOORS):
                rule = name.rsplit("-", 1)[1]
                lines.append(
                    f"{domain} with {rule} positions instead of the index: {r['mean']:.3f} ({r['low']:.2f}-{r['high']:.2f})"
                )
            elif name == list(result["models"])[-1] and r["attention"]:
                a = r["attention"]
                lines.append(
                    f"{domain}: {a['mean_selected']:.1f} of {a['mean_available']:.1f} positions attended to, "
                    f"{a['sparse_rows']:.0%} of the queries see more than they may choose"
                )
    return "\n".join(lines).rstrip()


def figures(result: Mapping[str, Any], title: str, middle: str, low: str, high: str) -> list[str]:
    """One table: a row a domain, a column a model."""
    columns = [c for c in MODELS if any(c in names for names in _columns(result))]
    solved = middle == "mean"
    rows = [[f"{title} (95 % interval)", *columns, *(["best constant"] if solved else []), "tasks"]]
    for domain in result["domains"]:
        cells, tasks = [], 0
        for column in columns:
            found = (
                result["evaluation"].get(f"specialist-{domain}" if column == "specialist" else column, {}).get(domain)
            )
            tasks = found["num_tasks"] if found else tasks
            cells.append(f"{found[middle]:.3f} ({found[low]:.2f}-{found[high]:.2f})" if found else "-")
        constant = [f"{result['domains'][domain].get('constant', 0.0):.3f}"] if solved else []
        rows.append([domain, *cells, *constant, str(tasks)])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _columns(result: Mapping[str, Any]) -> list[list[str]]:
    return [["specialist" if name.startswith("specialist-") else name] for name in result["evaluation"]]


def _partly(result: Mapping[str, Any], domain: str) -> bool:
    """Whether the domain's reward is not simply 1 for a solved task and 0 for another."""
    return any(
        abs(r[domain]["reward"] - r[domain]["mean"]) > 1e-9 for r in result["evaluation"].values() if domain in r
    )


def run_pipeline(config: PipelineConfig, progress: Callable[[str], object] = print) -> dict[str, Any]:
    """Runs the pipeline; returns what result.json holds."""
    return Pipeline(config, progress).run()
