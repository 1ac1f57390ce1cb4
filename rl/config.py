"""The configuration of a run: typed sections, one short YAML file, `key=value` overrides. Everything is checked before Ray starts.

    YAML file (its `base:` files first) -> overrides -> keys checked -> types -> ranges (beside each field) -> combinations -> Config

OmegaConf stays inside this module: everybody else sees plain frozen dataclasses. An override addresses a domain by its number or by its
name: `domains.math.quota=8`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar, cast

from winnow.rl.config_fields import ConfigError, check_keys, check_ranges, number
from winnow.rl.config_sections import (
    AlgorithmConfig,
    ClusterConfig,
    DomainConfig,
    EvaluationConfig,
    IndexerConfig,
    JudgeConfig,
    LearnerConfig,
    ModelConfig,
    RolloutConfig,
    ScheduleConfig,
)
from winnow.rl.transports import check_transport
from winnow.rollout.vllm_plugin import VllmError, check_version, installed_version

Section = TypeVar("Section")
PIPELINE_KEYS = (
    "run",
    "specialist",
    "specialists",
    "student",
    "mixed",
    "stages",
    "floors",
)  # no keys of one run's config


@dataclass(frozen=True, kw_only=True)
class Config:
    name: str = "run"
    seed: int = number(0, low=0)
    runs_dir: str = "runs"
    resume: bool = False
    model: ModelConfig = field(default_factory=ModelConfig)
    domains: list[DomainConfig] = field(default_factory=list)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    learner: LearnerConfig = field(default_factory=LearnerConfig)
    algorithm: AlgorithmConfig = field(default_factory=AlgorithmConfig)
    indexer: IndexerConfig = field(default_factory=IndexerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    judge: JudgeConfig = field(default_factory=JudgeConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)

    @property
    def folder(self) -> Path:
        """The run folder: runs_dir / name."""
        return Path(self.runs_dir) / self.name

    @property
    def reference_path(self) -> str | None:
        """The folder of the reference model, or None when no domain asks for a KL to it."""
        if all(domain.beta == 0 for domain in self.domains):
            return None
        return self.model.path if self.model.reference == "initial" else self.model.reference

    @property
    def prompts_per_step(self) -> int:
        return sum(domain.quota for domain in self.domains)

    @property
    def uses_kept_sets(self) -> bool:
        """Whether the sampler cuts the vocabulary and the learner scores on what was kept."""
        sampling = self.rollout
        return self.algorithm.keep_kept_sets and (sampling.top_p < 1 or sampling.top_k > 0 or sampling.min_p > 0)


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """The configuration in a YAML file with `key=value` overrides. Raises ConfigError naming the file, the key and the remedy."""
    values = read_values(path)
    if of_pipeline := [key for key in PIPELINE_KEYS if key in values]:
        raise ConfigError(f"{path} is the config of a pipeline (it has {of_pipeline[0]!r}): winnow pipeline {path}")
    if "convert" in values:
        raise ConfigError(f"{path} is the config of a conversion: winnow convert MODEL OUT --config {path}")
    return make_config(values, overrides)


def make_config(values: Mapping[str, Any], overrides: Sequence[str] = ()) -> Config:
    """The configuration made of a plain nested mapping and `key=value` overrides. Raises ConfigError."""
    return check(typed(Config, values, overrides))


def read_values(path: str | Path) -> dict[str, Any]:
    """The plain nested mapping of a YAML file and of its `base:` files. Raises ConfigError."""
    return _read(Path(path), ())


def typed(kind: type[Section], values: Mapping[str, Any], overrides: Sequence[str] = (), prefix: str = "") -> Section:
    """A configuration dataclass made of plain values and overrides, keys and types checked, ranges not yet. Raises ConfigError."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        raw = OmegaConf.create(dict(values))
        for override in overrides:
            _override(raw, override)
        plain = OmegaConf.to_container(raw, resolve=True)
        check_keys(plain, kind, prefix)
        built = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(kind), plain))
    except OmegaConfBaseException as error:
        raise ConfigError(
            f"{prefix}{error.full_key or 'the configuration'} cannot be read: {error.msg or error}"
        ) from None
    assert isinstance(built, kind)
    return built


def check(config: Config) -> Config:
    """Checks ranges and combinations of a built configuration and returns it. Raises ConfigError for the first fault."""
    check_ranges(config)
    _check_domains(config)
    if not config.name or re.search(r"[/\\]|^\.", config.name):
        raise ConfigError(
            f"name is {config.name!r}, but it names a folder below runs_dir: set it to a plain word such as maths-1"
        )
    if not config.model.path:
        raise ConfigError("model.path is empty: set it to a model folder, e.g. one made by `winnow convert`")
    pulled = [domain.name for domain in config.domains if domain.beta > 0]
    if pulled and not config.model.reference:
        raise ConfigError(
            f"domains {pulled} have beta > 0, which pulls towards a reference, but model.reference is empty: set model.reference to a "
            "model folder or to 'initial' for the model the run starts from, or set beta to 0"
        )
    if config.indexer.selection == "replay" and not config.rollout.record_indices:
        raise ConfigError(
            "indexer.selection is replay, but rollout.record_indices is false: set it to true, or selection to own"
        )
    if config.indexer.selection == "replay" and config.indexer.selector == "random_ties":
        raise ConfigError(
            "indexer.selector is random_ties, which measures what sets that differ between rollout and learner do, and with "
            "indexer.selection replay they cannot differ: set selection to own, or selector to indexer"
        )
    if config.rollout.engine == "vllm":
        try:
            check_version(installed_version())
        except VllmError as error:
            raise ConfigError(str(error)) from error
    if config.indexer.train == "kl" and config.indexer.selector != "indexer":
        raise ConfigError(
            f"indexer.train is kl, but indexer.selector {config.indexer.selector!r} does not use the indexer: set train to frozen"
        )
    if config.algorithm.correction in ("tis", "icepop") and not config.algorithm.recompute_old:
        raise ConfigError(
            f"algorithm.correction is {config.algorithm.correction}, which weighs by old/rollout probabilities, but without "
            "algorithm.recompute_old the two are the same numbers: set algorithm.recompute_old to true, or correction to none"
        )
    _check_routing(config)
    _check_schedule(config)
    _check_here(config)
    check_transport(config)
    if config.learner.updates_per_batch > config.prompts_per_step:
        raise ConfigError(
            f"learner.updates_per_batch is {config.learner.updates_per_batch}, but a step has {config.prompts_per_step} prompts (the sum "
            "of the domains' quotas) and an update needs at least one: lower it or raise a quota"
        )
    if config.prompts_per_step % config.learner.updates_per_batch:
        raise ConfigError(
            f"learner.updates_per_batch is {config.learner.updates_per_batch}, but a step's {config.prompts_per_step} prompts (the sum of "
            "the domains' quotas) cannot be divided by it, and updates of unequal size would weigh samples unequally: set it to a divisor "
            f"of {config.prompts_per_step}, or change a quota"
        )
    if config.learner.cuda_graphs and (config.learner.ranks > 1 or config.learner.checkpointing):
        other = "learner.ranks is above 1" if config.learner.ranks > 1 else "learner.checkpointing is set"
        raise ConfigError(
            f"learner.cuda_graphs is set, but {other}: graphs hold whole weights and what the backward pass reads; set it to false"
        )
    if config.learner.ranks > (samples := config.prompts_per_step * config.rollout.samples):
        raise ConfigError(
            f"learner.ranks is {config.learner.ranks}, but a step has only {samples} samples, and a rank needs at least one: lower ranks, "
            "or raise rollout.samples or a quota"
        )
    return config


def _check_routing(config: Config) -> None:
    """Replaying experts takes a model that has some, and an engine that records them."""
    if config.learner.routing != "replay":
        return
    why = None
    if not config.rollout.record_experts:
        why = "rollout.record_experts is false: set it to true"
    elif config.rollout.engine == "vllm":
        why = "the vllm engine files no experts of its steps: set rollout.engine to native"
    elif (described := Path(config.model.path) / "config.json").is_file():
        shape = json.loads(described.read_text())
        if not any(name in shape for name in ("n_routed_experts", "num_local_experts")):
            why = (
                f"{config.model.path} is a {shape.get('model_type')} model without experts: there is nothing to replay"
            )
    if why:
        raise ConfigError(f"learner.routing is replay, but {why}, or set learner.routing to own")


def _check_schedule(config: Config) -> None:
    """A rollout that runs ahead needs probabilities of its own time, and sets of its own time."""
    schedule = config.schedule
    if schedule.kind != "sync" and schedule.sync_every > 1:
        raise ConfigError(
            f"schedule.sync_every is {schedule.sync_every}, but schedule.kind {schedule.kind} has a staleness of its own: set sync_every "
            "to 1, or kind to sync"
        )
    late = schedule.kind != "sync" or schedule.sync_every > 1
    if late and config.algorithm.recompute_old and config.algorithm.correction == "none":
        name = f"sync_every is {schedule.sync_every}" if schedule.kind == "sync" else f"kind is {schedule.kind}"
        raise ConfigError(
            f"schedule.{name}, but with algorithm.recompute_old and correction none nothing corrects for samples "
            "of older weights: set recompute_old to false (the ratio then is to the rollout), or correction to tis or icepop"
        )


def _check_here(config: Config) -> None:
    """One process holds one learner and one engine, and they cannot run at once."""
    if config.cluster.address != "here":
        return
    for name, value, want in (
        ("learner.ranks", config.learner.ranks, 1),
        ("rollout.workers", config.rollout.workers, 1),
        ("schedule.kind", config.schedule.kind, "sync"),
        ("learner.restarts", config.learner.restarts, 0),
    ):
        if value != want:
            raise ConfigError(
                f"cluster.address is here, which keeps learner and engine in one process, but {name} is {value}: set it to {want}, or "
                "cluster.address to local"
            )


def _check_domains(config: Config) -> None:
    if not config.domains:
        raise ConfigError(
            "domains is empty: a run needs at least one, e.g. domains: [{name: reasoning, source: lookup}]"
        )
    seen: set[str] = set()
    for index, domain in enumerate(config.domains):
        if not domain.name or not re.fullmatch(r"[\w-]+", domain.name) or domain.name.isdigit():
            raise ConfigError(
                f"domains.{index}.name is {domain.name!r}, but metrics are named after it: set it to a word such as math"
            )
        if domain.name in seen:
            raise ConfigError(
                f"domains.{index}.name {domain.name!r} is used twice: each domain needs a name of its own"
            )
        if not domain.source:
            raise ConfigError(
                f"domains.{index}.source is empty: set it to a procedural kind (e.g. lookup) or to a JSONL path"
            )
        if domain.quota > domain.count:
            raise ConfigError(
                f"domains.{index}.quota is {domain.quota}, but the domain has count = {domain.count} tasks and a step would repeat some: "
                f"set quota <= {domain.count} or raise count"
            )
        seen.add(domain.name)


def to_mapping(config: Any) -> dict[str, Any]:
    """The configuration as plain nested dicts and lists, ready for YAML or JSON."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def to_yaml(config: Any) -> str:
    """The resolved configuration as YAML: `load_config` of it gives the same configuration."""
    import yaml

    return yaml.safe_dump(to_mapping(config), sort_keys=False)


def config_hash(config: Any) -> str:
    """12 hex digits that name the configuration; where a run is kept and whether it resumes do not count."""
    return values_hash(to_mapping(config))


def values_hash(mapping: Mapping[str, Any]) -> str:
    """`config_hash` of a configuration that was written as YAML, whatever keys this version has."""
    values = {key: value for key, value in mapping.items() if key not in ("runs_dir", "resume", "cluster")}
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:12]


def _read(path: Path, chain: tuple[Path, ...]) -> dict[str, Any]:
    """The mapping in a YAML file over the mappings of its `base:` file or files, which are found beside it."""
    from omegaconf import OmegaConf

    path = path.resolve()
    if path in chain:
        raise ConfigError(f"{path} includes itself: {' -> '.join(p.name for p in (*chain, path))}; remove one `base:`")
    if not path.is_file():
        raise ConfigError(
            f"config file {path} does not exist" + (f" (named as `base:` in {chain[-1]})" if chain else "")
        )
    try:
        values = OmegaConf.to_container(OmegaConf.load(path))
    except Exception as error:  # yaml raises several unrelated classes
        raise ConfigError(f"{path} is not readable YAML: {error}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path} holds a {type(values).__name__}, but a config file is a mapping of sections")
    bases = values.pop("base", None) or []
    merged: Any = OmegaConf.create({})
    for base in [bases] if isinstance(bases, str) else bases:
        merged = OmegaConf.merge(merged, _read(path.parent / base, (*chain, path)))
    return cast(dict[str, Any], OmegaConf.to_container(OmegaConf.merge(merged, values)))


def _override(raw: Any, override: str) -> None:
    """Applies one `key=value` (the value is YAML) to an OmegaConf node, in place."""
    import yaml
    from omegaconf import OmegaConf

    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"override {override!r} is not of the form key=value, e.g. learner.lr=1e-5")
    parts = key.split(".")
    if "domains" in parts[:-1]:  # also in a pipeline's sections: run.domains, mixed.domains
        at = parts.index("domains")
        parts[at + 1] = _domain_number(OmegaConf.select(raw, ".".join(parts[: at + 1])) or [], parts[at + 1], override)
    try:
        OmegaConf.update(raw, ".".join(parts), yaml.safe_load(text), merge=True)
    except yaml.YAMLError as error:
        raise ConfigError(f"override {override!r}: the value is not YAML: {error}") from None


def _domain_number(domains: Any, which: str, override: str) -> str:
    """The number of the domain that an override names, or its own number."""
    names = [domain.get("name") for domain in domains]
    if which.isdigit():
        if int(which) >= len(names):
            raise ConfigError(f"override {override!r}: there are {len(names)} domains, numbered from 0")
        return which
    if which not in names:
        raise ConfigError(f"override {override!r}: no domain is called {which!r}; the config has {names}")
    return str(names.index(which))
