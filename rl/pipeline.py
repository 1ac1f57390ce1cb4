"""The pipeline: specialists -> their verified data -> student -> one mixed GRPO stage -> evaluation. Restartable, no stage twice.

    base ─> convert ─┬─> specialist-D (RL, one run a domain) ─> data-D (verified, deduplicated rows) ─┐
                     └────────────────────────────────────────────────────────────> student <────────┘ ─> mixed (RL, all domains)
    student: SFT on those data, the specialists as teachers of its own samples (on-policy distillation), or one after the other
    evaluation: base (before all else), each specialist, student and mixed on the same held-out tasks; floors: the last model without its
    index

Every stage notes in manifest.json what it was made from, as a hash of its config, of the stages before it and of the code's version. A
stage whose note still holds is not done again; one whose inputs changed is done anew; an RL run that was interrupted is resumed. One
cluster (the learner's and the workers' processes) serves all stages, or with `parallel: n` up to n of them, where there is room.

Controls, at equal GPU seconds: the student by the other method (in those of data and student), the mixed stage from the base (in those
of specialists, data, student and mixed). comparison.md and comparison.svg then set them beside each other.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext
from functools import partial
from typing import Any, TypeVar

from winnow.rl.budget import Budget, least
from winnow.rl.cluster import Cluster, connect, ray_session, worker_spec
from winnow.rl.config import Config, config_hash, to_yaml
from winnow.rl.forgetting import forgetting
from winnow.rl.holdout import holdout_requests
from winnow.rl.interrupts import Interrupts
from winnow.rl.lineage import fingerprint
from winnow.rl.manifest import Manifest
from winnow.rl.overlap import Job, Lanes, run_jobs
from winnow.rl.pipeline_config import PipelineConfig, base_options, convert_options
from winnow.rl.placement import has_room
from winnow.rl.remote_learner import LearnerDied
from winnow.rl.results import FLOORS, last_model, result_table, summary
from winnow.rl.run import code_version, resumable
from winnow.rl.students_figure import write_comparison

Found = TypeVar("Found")
ATTEMPTS = 3  # of a stage whose learner dies


class Pipeline:
    """One pipeline run in `config.folder`. `progress` gets lines of text with the seconds since the start."""

    def __init__(
        self,
        config: PipelineConfig,
        progress: Callable[[str], object] = print,
        connect: Callable[[Config], AbstractContextManager[Cluster]] = connect,
        session: Callable[[Config, int], AbstractContextManager[None]] = ray_session,
        room: Callable[[Config], bool] = has_room,
    ) -> None:
        """`connect` opens a learner with its pool; `session`, where several are open at a time, the Ray that they share."""
        self.config, self.folder = config, config.folder
        self._progress, self._connect, self._session = progress, connect, session
        self._start = time.monotonic()
        self._exits, self._has_session = ExitStack(), config.parallel == 1  # one lane brings its own
        self._stopping = threading.Event()
        self._share: Callable[[str], float | None] = lambda stage: None  # seconds that a stage may take
        self._lanes = Lanes(config.parallel, self._open, room, self.say)
        cluster, workers = config.run.get("cluster", {}), config.run.get("rollout", {}).get("workers", 1)
        gpus = float(cluster.get("learner_gpus", 0)) + workers * float(cluster.get("worker_gpus", 0))
        self.manifest = Manifest(self.folder, code_version(), self.say, gpus)

    def say(self, text: str) -> None:
        """A line of progress. Raises KeyboardInterrupt in a stage's thread when all are to stop: a point where an RL run can save."""
        self._progress(f"[{time.monotonic() - self._start:6.1f} s] {text}")
        if self._stopping.is_set() and threading.current_thread() is not threading.main_thread():
            raise KeyboardInterrupt

    def _stop(self) -> None:
        self._stopping.set()
        self._lanes.stop()

    def run(self) -> dict[str, Any]:
        """Does what is left to do; returns and writes result.json. KeyboardInterrupt leaves every finished stage in place."""
        from winnow.rl.report import write_report

        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "config.yaml").write_text(to_yaml(self.config))
        with self._exits:
            try:
                result = self._stages()
            finally:
                self._lanes.close()
        result["forgetting"] = forgetting(self.folder / "evaluation", list(result["models"]))
        result |= {"status": "done", "seconds": round(time.monotonic() - self._start, 1), "version": code_version()}
        (self.folder / "result.json").write_text(json.dumps(result, indent=1))
        if result["evaluation"]:
            self._progress("\n" + result_table(result) + "\n")
        if result["evaluation"] and self.config.controls:
            self.say(f"comparison: {write_comparison(self.folder, result)}")
        self.say(f"report: {write_report(self.folder)}")
        return result

    def _stages(self) -> dict[str, Any]:
        """Base and conversion, then the jobs (side by side where config.parallel says so), then the floors."""
        sparse = self._convert(self._base())
        if "specialists" in self.config.stages:
            self._check_bases(sparse)
        done: dict[str, Any] = {}
        jobs = self._jobs(sparse, done)
        budget = Budget(self.config.seconds, [job.name for job in jobs], len(self.config.domains), self._start)
        self._share = lambda stage: budget.share(stage, done, self.manifest.earlier / self.config.parallel)
        with Interrupts() if self.config.parallel > 1 else nullcontext():
            run_jobs(jobs, self.config.parallel, done, self._stop, self._lanes.close)
        models = {"base": sparse} | {job.name: done[job.name] for job in jobs if is_model(job.name)}
        found = {name: done[f"evaluation-{name}"] for name in models if f"evaluation-{name}" in done}
        if self.config.floors and found:
            last = last_model(models)
            for selector in FLOORS:
                found[f"{last}-{selector}"] = self._floor(last, models[last], selector)
        return summary(models, found, self.manifest)

    def _jobs(self, sparse: str, done: Mapping[str, Any]) -> list[Job]:
        """Every stage between conversion and floors, in the order of a run one after the other."""
        domains, wanted, controls = self.config.domains, self.config.stages, self.config.controls
        specialists = {domain: f"specialist-{domain}" for domain in domains if "specialists" in wanted}
        data = {domain: f"data-{domain}" for domain in domains if "data" in wanted}
        jobs = []
        if (
            "evaluation" in wanted
        ):  # first: what is wrong with the evaluation shows before anything is trained, and engines are warm
            jobs.append(Job(name="evaluation-base", work=lambda: self._evaluate("base", sparse)))
        jobs += [
            Job(name=name, work=partial(self._reinforce, "specialist", sparse, domain))
            for domain, name in specialists.items()
        ]
        for domain, name in data.items():
            work = partial(self._data_of, domain, done)
            jobs.append(Job(name=name, work=work, after=(specialists[domain],)))
        made = (*specialists.values(), *data.values())

        def student(**changes: Any) -> str:
            teachers = {domain: done[name] for domain, name in specialists.items()}
            return self._student(sparse, [done[name] for name in data.values()], teachers, **changes)

        if "student" in wanted:
            jobs.append(Job(name="student", work=student, after=made))
        if "mixed" in wanted:
            jobs.append(Job(name="mixed", work=lambda: self._reinforce("mixed", done["student"]), after=("student",)))
        if "student" in controls:
            other = "sft" if self.config.student.method == "on_policy" else "on_policy"
            again = partial(student, name=f"student-{other}", method=other)
            jobs.append(Job(name=f"student-{other}", work=again, after=(*made, "student")))
        if "mixed" in controls:
            jobs.append(Job(name="mixed-from-base", work=lambda: self._mixed_from_base(sparse), after=("mixed",)))
        if "evaluation" in wanted:
            for name in [job.name for job in jobs if is_model(job.name)]:
                jobs.append(Job(name=f"evaluation-{name}", work=partial(self._evaluated, name, done), after=(name,)))
        return jobs

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
        return self._run(self.config.stage_run(stage, model, domain), model)

    def _mixed_from_base(self, model: str) -> str:
        """The control: the mixed stage without specialists and student, for as many GPU seconds as all of them took."""
        config = self.config.stage_run("mixed", model)
        mixed = self.manifest.spent("mixed")
        ratio = 1 + self.manifest.spent("specialist-", "data-", "student") / max(mixed, 0.1)
        schedule = dataclasses.replace(config.schedule, steps=max(1, round(ratio * config.schedule.steps)))
        seconds = self.manifest.spent("specialist-", "data-", "student", "mixed") / (self.manifest.gpus or 1.0)
        return self._run(dataclasses.replace(config, name="mixed-from-base", schedule=schedule), model, seconds)

    def _run(self, config: Config, model: str, seconds: float | None = None) -> str:
        """An RL run of at most `seconds`, those of attempts that were stopped among them, and of its share of the pipeline's."""
        from winnow.rl.train import train

        name = config.name
        inputs = {"config": config_hash(config), "model": self._identity(model)}
        end = None if seconds is None else time.monotonic() + seconds - self.manifest.stopped(name, inputs)

        def attempt(cluster: Cluster) -> dict[str, Any]:
            resumed = resumable(config)
            if config.folder.exists() and not resumed:
                shutil.rmtree(config.folder)
            limit = least(None if end is None else max(0.0, end - time.monotonic()), self._share(name))
            within = "" if limit is None else f" within {limit:.0f} s"
            self.say(f"{name}: {'resuming' if resumed else 'training'}, {config.schedule.steps} steps{within}")
            again = dataclasses.replace(config, resume=resumed)
            return train(again, cluster=cluster, progress=lambda t: self.say(f"{name}: {t}"), seconds=limit)

        def make() -> dict[str, Any]:
            result = self._on_a_cluster(config, attempt, started=False)
            if result["status"] != "done":
                raise KeyboardInterrupt
            return {
                "model": result["checkpoint"], "run": result["run"], "domains": result["domains"], "steps": result["step"]
            }  # fmt: skip

        return str(self.manifest.stage(name, inputs, make)["model"])

    def _data_of(self, domain: str, done: Mapping[str, Any]) -> str:
        return self._data(domain, done[f"specialist-{domain}"])

    def _evaluated(self, name: str, done: Mapping[str, Any]) -> dict[str, Any]:
        return self._evaluate(name, done[name])

    def _data(self, domain: str, model: str) -> str:
        options = self.config.data
        config = self.config.stage_run("specialist", model, domain)

        def make() -> dict[str, Any]:
            from winnow.rl.distillation import generate_rows

            key = self.manifest.key({"model": self._identity(model)})  # of the samples, not of what is chosen from them
            path, found = self._on_a_cluster(
                config,
                lambda cluster: generate_rows(config, options, cluster, self.folder / "data", domain, key, self.say),
            )
            rate, kept = found.pass_rate(domain), found.kept[domain]
            self.say(f"data-{domain}: {kept} verified rows of {found.sampled[domain]} samples (pass rate {rate:.1%})")
            return {"rows": str(path), **found.as_dict()}

        inputs = {"config": config_hash(config), "data": dataclasses.asdict(options), "model": self._identity(model)}
        return str(self.manifest.stage(f"data-{domain}", inputs, make)["rows"])

    def _student(
        self, model: str, rows: list[str], teachers: Mapping[str, str], name: str = "student", method: str = ""
    ) -> str:
        """The student; with another `name`, the one of another method, at the cost of the student: by `on_policy` it needs no data, so
        that theirs is its own."""
        config = dataclasses.replace(self.config.stage_run("student", model), name=name)
        options = dataclasses.replace(self.config.student, method=method or self.config.student.method)
        seconds = None
        if method:
            equal = ("data-", "student") if method == "on_policy" else ("student",)
            seconds = self.manifest.spent(*equal) / (self.manifest.gpus or 1.0)

        def make() -> dict[str, Any]:
            from winnow.rl.distillation import train_student

            folder = self.folder / name / "model"
            limit = least(seconds, self._share(name))
            return self._on_a_cluster(
                config,
                lambda cluster: train_student(
                    config, options, cluster, rows, folder, lambda t: self.say(f"{name}: {t}"), teachers, limit
                ),
            )

        inputs = {"config": config_hash(config), "student": dataclasses.asdict(options), "model": self._identity(model)}
        if options.method != "on_policy":
            inputs["rows"] = [self._identity(path) for path in [*rows, *options.rows]]
        if options.method != "sft":
            inputs["teachers"] = {domain: self._identity(path) for domain, path in teachers.items()}
        return str(self.manifest.stage(name, inputs, make)["model"])

    def _evaluate(self, name: str, model: str) -> dict[str, Any]:
        """One model on the held-out tasks: a specialist on its own domain, the others on all."""
        domain = name.removeprefix("specialist-") if name.startswith("specialist-") else None
        config = self.config.stage_run("evaluation", model, domain)

        def make() -> dict[str, Any]:
            return {
                "results": self._on_a_cluster(config, lambda cluster: self._score(config, cluster.pool.generate, name))
            }

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

    def _open(self, config: Config) -> AbstractContextManager[Cluster]:
        if not self._has_session:
            self._exits.enter_context(self._session(config, self.config.parallel))
            self._has_session = True
        return self._connect(config)

    def _on_a_cluster(self, config: Config, work: Callable[[Cluster], Found], started: bool = True) -> Found:
        """`work` on a cluster that, where `started`, has the config's model in the learner and in the workers.

        Where the learner's process died (with its node, say) another cluster is opened and the work done again: an RL run goes on from
        its last checkpoint, sampling with the prompts that are in no shard.
        """
        for attempt in range(1, ATTEMPTS + 1):
            try:
                with self._lanes.lane(config) as cluster:
                    try:
                        if started:
                            cluster.start(config)
                        return work(cluster)
                    except RuntimeError as error:
                        if isinstance(error, LearnerDied) or cluster.alive:
                            raise
                        raise LearnerDied(
                            str(error)
                        ) from error  # e.g. the weights went with the learner that held them
            except LearnerDied as error:
                if attempt == ATTEMPTS:
                    raise
                self.say(f"{config.name}: {error}; on to another cluster, attempt {attempt + 1} of {ATTEMPTS}")
        raise AssertionError("unreachable")

    def _identity(self, path: str) -> str:
        """What stands for a model or file in a stage's inputs: the stage that made it, or the files' own sizes and times."""
        return self.manifest.maker(path) or fingerprint(path)


def is_model(stage: str) -> bool:
    """Whether a stage's result is a model's folder."""
    return not stage.startswith(("data-", "evaluation-"))


def run_pipeline(config: PipelineConfig, progress: Callable[[str], object] = print) -> dict[str, Any]:
    """Runs the pipeline; returns what result.json holds."""
    return Pipeline(config, progress).run()
