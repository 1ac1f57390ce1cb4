"""A pipeline's seconds: how they are shared, and that a pipeline without any left still trains a little, evaluates, and is done."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from pipelines import Here, pipeline_config

from winnow.rl import budget, restarts
from winnow.rl import manifest as manifests
from winnow.rl.budget import CONTROL, EVALUATION, MARGIN, Budget, least, weights
from winnow.rl.config import ConfigError, make_config
from winnow.rl.manifest import Manifest
from winnow.rl.pipeline import Pipeline
from winnow.rl.remote_learner import LearnerDied

STAGES = [
    "specialist-a",
    "specialist-b",
    "data-a",
    "data-b",
    "student",
    "mixed",
    "student-on_policy",
    "mixed-from-base",
]
EVALUATIONS = [f"evaluation-{name}" for name in ("base", "specialist-a", "student", "mixed", "mixed-from-base")]


def test_what_is_left_is_shared_by_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr(budget.time, "monotonic", lambda: now)
    one = Budget(100.0, [*STAGES, *EVALUATIONS], 2, begin=now)
    total, done = sum(one.weights.values()), list[str]()
    for name in [*STAGES, *EVALUATIONS]:  # whoever takes just its share leaves theirs to the others
        assert one.share(name, done) == pytest.approx(100 * (1 - MARGIN) * one.weights[name] / total)
        now += one.share(name, done) or 0.0
        done.append(name)
    assert now == pytest.approx(1000 + 100 * (1 - MARGIN))
    now += 500
    assert one.share("evaluation-base", STAGES) == 0.0, "never negative"
    assert Budget(None, STAGES, 2, now).share("mixed", []) is None
    again = Budget(100.0, [*STAGES, *EVALUATIONS], 2, begin=now)  # a restart: what is done was paid for before it
    late = [name for name in STAGES if name != "mixed"]
    assert again.share("mixed", late, earlier=80.0) == pytest.approx(
        (100 * (1 - MARGIN) - 80)
        * again.weights["mixed"]
        / sum(again.weights[name] for name in ("mixed", *EVALUATIONS))
    )


def test_a_control_may_take_what_it_is_compared_with() -> None:
    found = weights(STAGES, 2)
    assert found["mixed-from-base"] == pytest.approx(CONTROL * sum(found[name] for name in STAGES[:6]))
    assert found["student-on_policy"] == pytest.approx(CONTROL * sum(found[n] for n in ("data-a", "data-b", "student")))
    assert weights(["evaluation-student", "evaluation-specialist-a"], 3) == pytest.approx(
        {"evaluation-student": 3 * EVALUATION, "evaluation-specialist-a": EVALUATION}
    )
    assert (least(None, None), least(3.0, None), least(None, 2.0, 5.0)) == (None, 3.0, 2.0)


def test_without_time_every_stage_makes_one_update_and_all_is_evaluated(babbler: Path, tmp_path: Path) -> None:
    short = (
        "floors=''",
        "stages=[specialists, data, student, mixed, evaluation]",
        "controls=[student, mixed]",
        "data.tasks=8",
    )
    own = (
        "run.indexer={train: frozen, selection: own}",
        "run.schedule.steps=50",
        "student={epochs: 9, batch_tokens: 400, steps: 50}",
    )
    config = pipeline_config(tmp_path, babbler, *short, *own, "seconds=0.001")
    lines: list[str] = []
    result = Pipeline(config, lines.append, Here()).run()
    models = [
        "base",
        "specialist-lookup",
        "specialist-sums",
        "student",
        "mixed",
        "student-on_policy",
        "mixed-from-base",
    ]
    assert list(result["models"]) == list(result["evaluation"]) == models
    folder = tmp_path / "p"
    for name in ("specialist-lookup", "specialist-sums", "mixed", "mixed-from-base"):
        made: dict[str, Any] = json.loads((folder / name / "result.json").read_text())
        assert (made["status"], made["step"]) == ("done", 1) and made["steps"] >= 50
    assert len(json.loads((folder / "student" / "losses.json").read_text())) == 1
    assert len((folder / "student-on_policy" / "on_policy.jsonl").read_text().splitlines()) == 1
    assert any("s are over in epoch 1, after 1 updates" in line for line in lines)
    again: list[str] = []
    longer = pipeline_config(tmp_path, babbler, *short, *own, "seconds=900")
    Pipeline(longer, again.append, Here()).run()
    assert not [line for line in again if ": done in " in line], (
        "the seconds are no input of a stage: nothing is done again"
    )


def test_seconds_are_checked(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"seconds is 0(\.0)?, but it must be > 0"):
        pipeline_config(tmp_path, tmp_path / "m", "seconds=0")


def test_a_stopped_attempt_counts_to_the_cost_of_its_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(manifests.time, "monotonic", lambda: now)

    def takes(seconds: float, fails: bool = False) -> Any:
        def make() -> dict[str, Any]:
            nonlocal now
            now += seconds
            if fails:
                raise KeyboardInterrupt
            return {}

        return make

    def stage(key: int, make: Any) -> float:
        manifest = Manifest(tmp_path, "1", lambda text: None, gpus=2.0)
        manifest.stage("a", {"key": key}, make)
        assert manifest.spent("a") == 2 * manifest.notes["a"]["seconds"]
        return float(manifest.notes["a"]["seconds"])

    for key in (1, 1, 2):
        with pytest.raises(KeyboardInterrupt):
            stage(key, takes(5.0, fails=True))
    with (tmp_path / "stages.jsonl").open("a") as file:
        file.write('{"time": 1, "sta\n')
    assert stage(1, takes(3.0)) == 13.0, "both attempts with these inputs, and not the one with others"
    assert stage(2, takes(1.0)) == 6.0
    (tmp_path / "manifest.json").unlink()
    assert stage(2, takes(4.0)) == 4.0, "done anew: what was spent before the last time is over"


def test_a_restart_has_what_is_left_of_the_seconds_and_of_a_controls_cost(
    babbler: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = (
        "floors=''", "stages=[specialists, data, student, mixed]", "controls=[mixed]", "data.tasks=8", "run.schedule.steps=1",
        "run.indexer={train: frozen, selection: own}", "student={epochs: 1, batch_tokens: 400, steps: 1}",
    )  # fmt: skip
    config = pipeline_config(tmp_path, babbler, *own)
    Pipeline(config, lambda text: None, Here()).run()
    manifest = Manifest(tmp_path / "p", "", lambda text: None)
    del manifest.notes["mixed-from-base"]
    for note in manifest.notes.values():
        note["seconds"] = note["gpu_seconds"] = 1000.0
    manifest._write()
    monkeypatch.setattr(Manifest, "stopped", lambda self, stage, inputs: 4000.0 if stage == "mixed-from-base" else 0.0)
    lines: list[str] = []
    Pipeline(pipeline_config(tmp_path, babbler, *own, "seconds=90000"), lines.append, Here()).run()
    (said,) = [line for line in lines if "mixed-from-base: " in line and " within " in line]
    assert 1990 <= int(said.split(" within ")[1].removesuffix(" s")) <= 2000, "six stages of 1000 s, 4000 spent"


def test_a_learner_that_is_started_again_has_what_is_left_of_the_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(restarts.time, "monotonic", lambda: now)
    given: list[float | None] = []

    @restarts.restarted
    def dies(config: Any, cluster: Any, progress: Any, seconds: float | None) -> dict[str, Any]:
        nonlocal now
        given.append(seconds)
        now += 30.0
        if len(given) % 2:
            raise LearnerDied("killed")
        return {}

    config = make_config(
        {"model": {"path": "m"}, "domains": [{"name": "a", "source": "lookup"}]}, ["learner.restarts=1"]
    )
    dies(config, None, lambda text: None, 40.0)
    dies(config, None, lambda text: None, None)
    assert given == [40.0, 10.0, None, None]
