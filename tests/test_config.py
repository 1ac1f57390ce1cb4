"""Configs: every mistake is an error that names the key and what to set; a good one survives a round trip."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from winnow.rl.config import Config, ConfigError, config_hash, load_config, make_config, to_yaml
from winnow.rl.config_fields import leaf_names

GOOD = {"model": {"path": "m"}, "domains": [{"name": "math", "source": "lookup"}, {"name": "agent", "source": "tool"}]}

MISTAKES = {
    "learner.lrr=1": "unknown key learner.lrr: did you mean learner.lr?",
    "lerner.lr=1": "did you mean learner?",
    "lr=1": "did you mean learner.lr or indexer.lr?",
    "domains.0.quta=3": "did you mean domains.0.quota?",
    "model.colour=1": "model has path, dtype, reference",
    "learner.lr=fast": "learner.lr is 'fast', but it must be a number >= 0",
    "learner.lr=-1": "learner.lr is -1.0, but it must be >= 0",
    "learner.lr=.nan": "learner.lr is nan",
    "learner.betas=[0.9]": "a list of 2 numbers",
    "learner.betas=[0.9,1.0]": "must be in [0, 1)",
    "learner=null": "learner is None, but it must be a section",
    "learner.updates_per_batch=17": "lower it or raise a quota",
    "learner.updates_per_batch=3": "cannot be divided by it",
    "learner.ranks=129": "a step has only 128 samples",
    "schedule.kind=asynch": "did you mean async?",
    "schedule.max_staleness=0": "must be >= 1",
    "domains.0.parts={right: much}": "a mapping of names to numbers",
    "rollout.record_indices=maybe": "true or false",
    "rollout.samples=1": "rollout.samples is 1, but it must be >= 2",
    "rollout.samples=2.5": "a whole number >= 2",
    "rollout.top_p=0": "must be in (0, 1]",
    "rollout.temperature=0": "rollout.temperature is 0.0, but it must be > 0",
    "algorithm.name=grpoo": "did you mean grpo?",
    "algorithm.aggregate=mean": "one of sequence, token",
    "algorithm.correction=tis": "set algorithm.recompute_old to true",
    "indexer.train=yes": "indexer.train is True, but it must be one of frozen, kl",
    "rollout.engine=vlm": "did you mean vllm?",
    "domains.0.quota=0": "domains.0.quota is 0, but it must be >= 1",
    "domains.math.quota=300": "quota is 300, but the domain has count = 256",
    "domains.maths.quota=3": "no domain is called 'maths'; the config has ['math', 'agent']",
    "domains.2.quota=3": "there are 2 domains",
    "domains=[]": "domains is empty",
    "domains=math": "a list of sections",
    "domains.1.name=math": "is used twice",
    "domains.1.name=''": "metrics are named after it",
    "domains.1.source=''": "domains.1.source is empty",
    "model.path=''": "model.path is empty",
    "name=a/b": "names a folder",
    "seed": "not of the form key=value",
    "seed=[": "not YAML",
}


@pytest.mark.parametrize("override", MISTAKES)
def test_every_mistake_is_explained(override: str) -> None:
    with pytest.raises(ConfigError) as error:
        make_config(GOOD, [override])
    assert MISTAKES[override] in str(error.value)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["indexer.selection=replay", "rollout.record_indices=false"], "rollout.record_indices is false"),
        (["schedule.kind=async", "algorithm.recompute_old=true"], "nothing corrects for samples"),
        (["domains.math.beta=0.1", "model.reference=null"], "domains ['math'] have beta > 0"),
    ],
)
def test_combinations_are_checked_at_the_root(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match="set") as error:
        make_config(GOOD, overrides)
    assert message in str(error.value)


def test_reference_is_the_initial_model_only_where_something_pulls_towards_it() -> None:
    assert make_config(GOOD).reference_path is None
    assert make_config(GOOD, ["domains.agent.beta=0.1"]).reference_path == "m"
    assert make_config(GOOD, ["domains.agent.beta=0.1", "model.reference=other"]).reference_path == "other"


def test_files_compose_and_overrides_win(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text(yaml.safe_dump({**GOOD, "learner": {"lr": 1e-4, "threads": 2}}))
    (tmp_path / "run.yaml").write_text("base: base.yaml\nlearner: {lr: 2e-4}\nname: x\n")
    config = load_config(
        tmp_path / "run.yaml", ["learner.warmup_steps=3", "domains.agent.quota=2", "learner.max_grad_norm=1e-1"]
    )
    assert (config.learner.lr, config.learner.threads, config.learner.warmup_steps) == (2e-4, 2, 3)
    assert config.domains[1].quota == 2 and config.domains[0].quota == 8 and config.learner.max_grad_norm == 0.1
    assert config.prompts_per_step == 10


def test_bad_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.yaml does not exist"):
        load_config(tmp_path / "none.yaml")
    (tmp_path / "a.yaml").write_text("base: b.yaml\n")
    (tmp_path / "b.yaml").write_text("base: a.yaml\n")
    with pytest.raises(ConfigError, match=r"includes itself: a\.yaml -> b\.yaml -> a\.yaml"):
        load_config(tmp_path / "a.yaml")
    (tmp_path / "list.yaml").write_text("- 1\n")
    with pytest.raises(ConfigError, match="mapping of sections"):
        load_config(tmp_path / "list.yaml")
    (tmp_path / "broken.yaml").write_text("a: [")
    with pytest.raises(ConfigError, match="not readable YAML"):
        load_config(tmp_path / "broken.yaml")


def test_the_resolved_config_makes_the_same_config(tmp_path: Path) -> None:
    config = make_config(GOOD, ["learner.lr=3e-6"])
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    again = load_config(tmp_path / "config.yaml")
    assert again == config and isinstance(again, Config)
    assert (
        config_hash(again) == config_hash(config) == config_hash(make_config(GOOD, ["learner.lr=3e-6", "resume=true"]))
    )
    assert config_hash(config) != config_hash(make_config(GOOD))


def test_nothing_of_omegaconf_leaves_and_keys_stay_few() -> None:
    config = make_config(GOOD)
    assert type(config.domains) is list and type(config.learner.betas) is tuple
    assert len(list(leaf_names(Config))) < 120


def test_shipped_train_config_loads() -> None:
    import winnow.configs

    config = load_config(Path(next(iter(winnow.configs.__path__))) / "train.yaml", ["model.path=somewhere"])
    assert config.domains
