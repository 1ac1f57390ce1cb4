"""The configuration of `winnow pipeline`: which stages there are and what each may cost.

`run` holds what every RL run shares (the sections of `winnow train`); `specialist`, `student`, `mixed` and `evaluation` are laid over
it, so a stage names only what differs. Everything, the resolved config of every stage included, is checked before anything starts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from winnow.rl.config import Config, make_config, read_values, typed
from winnow.rl.config_fields import ConfigError, check_ranges, choice, number

OF_PIPELINE = ("name", "runs_dir", "seed", "resume")  # of a specialist's config file: the pipeline's own go before
CONTROLS = ("student", "mixed")  # the student by the other method; the mixed stage from the base, without specialists
STAGES = ("base", "convert", "specialists", "data", "student", "mixed", "evaluation")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """How the specialists' verified data are made."""

    tasks: int = number(128, low=1)  # training prompts per domain
    samples: int = number(4, low=1)  # per prompt
    temperature: float = number(1.0, low=0, open_low=True)
    threshold: float = number(1.0, low=0)  # least reward of a row
    best: int = number(2, low=1)  # rows kept per prompt
    diverse: bool = False  # after the best reply the least similar one, instead of the next best
    near: float = number(
        1.0, low=0, high=1, open_low=True
    )  # so alike (Jaccard) rows are duplicates; 1: equal ones only
    min_pass_rate: float = number(0.0, low=0, high=1)  # of a prompt: drops what the specialist solves by luck
    max_pass_rate: float = number(1.0, low=0, high=1)  # drops what it always solves
    limit: int | None = number(None, low=1)  # rows per domain
    benchmarks: dict[str, str] = field(default_factory=dict)  # name -> file (or ""): what evaluation uses, kept out
    ngram: int = number(13, low=5)  # words that a prompt and a benchmark's item share in a row
    overlap: float = number(0.5, low=0, high=1, open_low=True)  # share of the item's n-grams that makes a leak
    max_contaminated: float = number(0.05, low=0, high=1)  # of a domain's verified prompts; more is an error
    shard: int = number(16, low=1)  # prompts that are written together while sampling


@dataclass(frozen=True, kw_only=True)
class StudentConfig:
    """What makes the base a student: fine-tuning on those data, the specialists as teachers of its own samples, or one after the other."""

    method: str = choice("sft", "sft", "on_policy", "both")
    epochs: int = number(2, low=1)  # sft
    batch_tokens: int = number(4096, low=1)
    balance: str = choice("none", "none", "smallest")  # as many rows of every domain as the smallest has
    rows: list = field(default_factory=list)  # further rows files, or folders of them
    steps: int = number(20, low=1)  # on_policy: the domains' quotas of student_run a step


@dataclass(frozen=True, kw_only=True)
class PipelineConfig:
    name: str = "pipeline"
    seed: int = number(0, low=0)
    runs_dir: str = "runs"
    stages: list = field(default_factory=lambda: list(STAGES))
    seconds: float | None = number(
        None, low=0, open_low=True
    )  # for everything: stages that train end early, so that evaluation is made in time; not part of what a stage was made from
    model: str = ""  # a model folder or spec; empty: the base stage trains a small one from scratch
    base_model: dict = field(default_factory=dict)  # rl/base.py's options
    convert: dict = field(default_factory=dict)  # rl/convert.py's options
    convert_data: str = choice(
        "tasks", "tasks", "options"
    )  # tasks: conversations of the domains' own kind; options: convert.data
    run: dict = field(default_factory=dict)
    specialist: dict = field(default_factory=dict)
    specialists: dict = field(default_factory=dict)  # domain -> keys over `specialist`, or a config of `winnow train`
    data: DataConfig = field(default_factory=DataConfig)
    student: StudentConfig = field(default_factory=StudentConfig)
    student_run: dict = field(default_factory=dict)
    mixed: dict = field(default_factory=dict)
    parallel: int = number(
        1, low=1
    )  # stages at a time, each with a learner and workers of its own, where the cluster has room
    controls: list = field(default_factory=list)  # of CONTROLS: what the result is compared with, at equal GPU seconds
    floors: str = (
        ""  # the domain that is also evaluated with random and with recent positions instead of the index; empty: none
    )

    @property
    def folder(self) -> Path:
        return Path(self.runs_dir) / self.name

    @property
    def domains(self) -> list[str]:
        return [domain["name"] for domain in self.run["domains"]]

    def stage_run(self, stage: str, model: str, domain: str | None = None) -> Config:
        """The config of an RL run within the pipeline: `run`, the stage's own keys over it, one domain or all."""
        over = {"specialist": self.specialist, "mixed": self.mixed, "student": self.student_run}.get(stage, {})
        values = merged(self.run, over)
        if stage == "specialist" and domain is not None:
            values = merged(values, self._own(domain))
        values["model"] = {**values.get("model", {}), "path": model}
        values |= {"name": f"{stage}-{domain}" if domain else stage, "runs_dir": str(self.folder), "seed": self.seed}
        if domain is not None:
            values["domains"] = [section for section in values["domains"] if section["name"] == domain]
        return make_config(values)

    def _own(self, domain: str) -> dict[str, Any]:
        """A specialist's own keys: a section of `specialists`, or what a config file of `winnow train` says."""
        own = self.specialists.get(domain, {})
        if isinstance(own, str):
            own = specialist_values(own)
            listed = [section for section in own.get("domains", []) if section.get("name") == domain]
            own["domains"] = listed
        return {key: value for key, value in own.items() if key not in OF_PIPELINE}

    def specialist_base(self, domain: str) -> str:
        """The model.path that a specialist's own config names; empty for none."""
        return str(self._own(domain).get("model", {}).get("path") or "")


def specialist_values(name: str) -> dict[str, Any]:
    """What a specialist's config file says: a path, or the name of a shipped one. Raises ConfigError where there is none."""
    from winnow.rl.verbs import find_config

    try:
        return read_values(find_config(name))
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"specialists: {error}") from None


def load_pipeline(path: str | Path, overrides: Sequence[str] = ()) -> PipelineConfig:
    """The pipeline in a YAML file (over its `base:` files) with `key=value` overrides. Raises ConfigError."""
    values = read_values(path)
    if of_run := [key for key in ("domains", "rollout", "learner", "algorithm") if key in values]:
        raise ConfigError(
            f"{path} is the config of one run (it has {of_run[0]!r}): winnow train {path}. A pipeline has such sections below `run:`"
        )
    return make_pipeline(values, overrides)


def make_pipeline(values: Mapping[str, Any], overrides: Sequence[str] = ()) -> PipelineConfig:
    """Builds and checks the pipeline and every config within it. Raises ConfigError."""
    pipeline = typed(PipelineConfig, values, overrides)
    check_ranges(pipeline)
    check(pipeline)
    return pipeline


def check(pipeline: PipelineConfig) -> None:
    """Raises ConfigError for stages out of order, missing domains, and anything wrong in a stage's own config."""
    unknown = [stage for stage in pipeline.stages if stage not in STAGES]
    if unknown:
        raise ConfigError(f"stages holds {unknown[0]!r}, but a pipeline's stages are {', '.join(STAGES)}")
    if pipeline.stages != [stage for stage in STAGES if stage in pipeline.stages]:
        raise ConfigError(f"stages are {pipeline.stages}, but they run in the order {', '.join(STAGES)}: sort the list")
    method, files = pipeline.student.method, pipeline.student.rows
    needs_rows = [] if files or method == "on_policy" else [("student", "data")]
    needs_teachers = [] if method == "sft" else [("student", "specialists")]
    for needs, needed in (("data", "specialists"), *needs_rows, *needs_teachers, ("mixed", "student")):
        if needs in pipeline.stages and needed not in pipeline.stages:
            raise ConfigError(f"stages has {needs!r} without {needed!r}, which it works on: add {needed!r}")
    _check_controls(pipeline)
    if not pipeline.model and "base" not in pipeline.stages:
        raise ConfigError(
            "model is empty and stages has no 'base': set model to a model folder or add 'base' to the stages"
        )
    if not isinstance(pipeline.run.get("domains"), list) or not pipeline.run["domains"]:
        raise ConfigError(
            "run.domains is empty: a pipeline needs at least one domain, e.g. run: {domains: [{name: maths, source: lookup}]}"
        )
    _check_specialists(pipeline)
    for stage in ("specialist", "student", "mixed"):
        pipeline.stage_run(stage, pipeline.model or "base")
    for domain in pipeline.domains:
        pipeline.stage_run("specialist", pipeline.model or "base", domain)
    _check_student(pipeline)
    if pipeline.floors and pipeline.floors not in pipeline.domains:
        raise ConfigError(f"floors is {pipeline.floors!r}, but the domains are {', '.join(pipeline.domains)}")
    convert_options(pipeline)
    if not pipeline.model:
        base_options(pipeline)


def _check_controls(pipeline: PipelineConfig) -> None:
    for control in pipeline.controls:
        if control not in CONTROLS:
            raise ConfigError(f"controls holds {control!r}, but it must be one of {', '.join(CONTROLS)}")
        if control not in pipeline.stages:
            raise ConfigError(
                f"controls has {control!r}, but stages has not, so there is nothing to compare it with: add {control!r} to it"
            )
    if "student" in pipeline.controls and (pipeline.student.method == "both" or "specialists" not in pipeline.stages):
        raise ConfigError(
            "controls has 'student', the student by the other method of sft and on_policy, which needs the stage specialists and "
            f"student.method sft or on_policy (it is {pipeline.student.method})"
        )
    if "student" in pipeline.controls and "data" not in pipeline.stages and not pipeline.student.rows:
        raise ConfigError(
            "controls has 'student', but stages has no 'data' that one of the two students learns from: add 'data'"
        )


def _check_specialists(pipeline: PipelineConfig) -> None:
    for domain, own in pipeline.specialists.items():
        if domain not in pipeline.domains:
            raise ConfigError(f"specialists.{domain} is no domain: the domains are {', '.join(pipeline.domains)}")
        if not isinstance(own, str | Mapping):
            raise ConfigError(f"specialists.{domain} is {own!r}, but it must be a section of keys or a config file")
        if isinstance(own, str) and domain not in [d.get("name") for d in specialist_values(own).get("domains", [])]:
            raise ConfigError(
                f"specialists.{domain} is {own}, which has no domain called {domain!r}: name the same domain in both"
            )
        theirs = pipeline.stage_run("specialist", pipeline.model or "base", domain).domains[0].template
        ours = pipeline.stage_run("evaluation", pipeline.model or "base", domain).domains[0].template
        if theirs != ours:
            raise ConfigError(
                f"specialists.{domain} asks with template options {theirs}, run.domains with {ours}: the student would be trained and "
                f"evaluated in another mode than its specialist; give domain {domain!r} the same `template` in both"
            )


def _check_student(pipeline: PipelineConfig) -> None:
    data = pipeline.data
    if data.min_pass_rate > data.max_pass_rate:
        raise ConfigError(
            f"data.min_pass_rate is {data.min_pass_rate}, above data.max_pass_rate {data.max_pass_rate}: no prompt could be kept"
        )
    sampling = pipeline.stage_run("student", pipeline.model or "base").rollout
    if pipeline.student.method != "sft" and (sampling.top_p < 1 or sampling.top_k or sampling.min_p):
        raise ConfigError(
            f"student.method is {pipeline.student.method}, which compares whole distributions, but the student's rollout cuts the vocabulary: "
            "set student_run.rollout.top_p=1, top_k=0 and min_p=0"
        )


def convert_options(pipeline: PipelineConfig) -> Any:
    """The conversion's options. Raises ConfigError."""
    from winnow.rl.convert_options import ConvertOptions

    return _options(ConvertOptions, {"seed": pipeline.seed, "report": "short", **pipeline.convert}, "convert.")


def base_options(pipeline: PipelineConfig) -> Any:
    """The options of the base model, which learns the domains' own kinds of task. Raises ConfigError."""
    from winnow.rewards.demonstrations import PRETRAINING_KINDS
    from winnow.rl.base import BaseOptions

    kinds = [domain["source"] for domain in pipeline.run["domains"] if domain.get("source") in PRETRAINING_KINDS]
    if not kinds:
        raise ConfigError(
            f"model is empty, but the base stage can only learn the kinds {', '.join(PRETRAINING_KINDS)}, which no domain has as its source: "
            "set model to a model folder"
        )
    options = _options(BaseOptions, {"seed": pipeline.seed, **pipeline.base_model}, "base_model.")
    return replace(options, kinds=tuple(kinds))


def _options(kind: type, values: Mapping[str, Any], prefix: str) -> Any:
    try:
        return typed(kind, values, prefix=prefix)
    except ConfigError:
        raise
    except ValueError as error:  # the dataclass's own checks
        raise ConfigError(str(error)) from None


def merged(under: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Nested mappings, `over` winning. Domains are matched by name, so that a stage changes one key of one domain."""
    result: dict[str, Any] = {key: dict(value) if isinstance(value, Mapping) else value for key, value in under.items()}
    for key, value in over.items():
        if key == "domains":
            result[key] = _merged_domains(result.get(key, []), value)
        elif isinstance(value, Mapping) and isinstance(result.get(key), Mapping):
            result[key] = merged(result[key], value)
        else:
            result[key] = value
    return result


def _merged_domains(under: Sequence[Mapping[str, Any]], over: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    changes = {section.get("name"): section for section in over}
    strangers = set(changes) - {section.get("name") for section in under}
    if strangers:
        raise ConfigError(f"domains {sorted(map(str, strangers))} are not in run.domains: add them there")
    return [{**section, **changes.get(section.get("name"), {})} for section in under]
