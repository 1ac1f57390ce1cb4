"""Stages side by side: order, width, room, failures and interrupts; a whole pipeline in two lanes; a learner that dies."""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
from pipelines import pipeline_config

from winnow.rl import overlap
from winnow.rl.cluster import Cluster, worker_spec
from winnow.rl.config import Config, ConfigError, make_config
from winnow.rl.learner import Learner
from winnow.rl.manifest import Manifest
from winnow.rl.overlap import Job, Lanes, run_jobs
from winnow.rl.pipeline import Pipeline
from winnow.rl.remote_learner import LearnerDied
from winnow.rollout.local_pool import LocalPool


class Journal:
    """Jobs that note when they were at work, and how many others were."""

    def __init__(self) -> None:
        self.lock, self.working, self.most, self.order = threading.Lock(), 0, 0, []  # type: ignore[var-annotated]

    def job(self, name: str, *after: str, seconds: float = 0.05, error: BaseException | None = None) -> Job:
        def work() -> str:
            with self.lock:
                self.order.append(name)
                self.working += 1
                self.most = max(self.most, self.working)
            time.sleep(seconds)
            with self.lock:
                self.working -= 1
            if error is not None:
                raise error
            return name.upper()

        return Job(name=name, work=work, after=after)


def run(jobs: list[Job], width: int) -> dict[str, Any]:
    done: dict[str, Any] = {}
    run_jobs(jobs, width, done, lambda: None, lambda: None)
    return done


def test_jobs_wait_for_what_they_need_and_for_nothing_else() -> None:
    journal = Journal()
    made = [
        journal.job("a"),
        journal.job("b", seconds=0.3),
        journal.job("c", "a"),
        journal.job("d", "b", "c"),
        journal.job("e"),
    ]
    done = run(made, 2)
    assert done == {name: name.upper() for name in "abcde"} and journal.most == 2
    assert journal.order.index("c") < journal.order.index("d") == 4, "c and e do not wait for b"
    one = Journal()
    run([one.job("a"), one.job("b"), one.job("c", "a")], 1)
    assert one.order == ["a", "b", "c"] and one.most == 1


def test_a_failure_stops_what_is_under_way_and_starts_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    journal, stopped, ended = Journal(), threading.Event(), []
    monkeypatch.setattr(overlap, "STOP_S", 0.5)
    monkeypatch.setattr(overlap, "END_S", 0.5)

    def until_stopped() -> None:
        assert stopped.wait(20)
        raise KeyboardInterrupt

    jobs = [
        Job(name="long", work=until_stopped),
        journal.job("bad", error=ValueError("broken")),
        journal.job("later", "bad"),
    ]
    with pytest.raises(ValueError, match="broken"):
        run_jobs(jobs, 2, {}, stopped.set, lambda: ended.append(1))
    assert stopped.is_set() and not ended and journal.order == ["bad"], (
        "what stops by itself keeps its processes until then"
    )
    hangs = [Job(name="hangs", work=lambda: time.sleep(3)), journal.job("bad", error=ValueError("broken"))]
    begin = time.monotonic()
    with pytest.raises(ValueError, match="broken"):
        run_jobs(hangs, 2, {}, lambda: None, lambda: ended.append(1))
    assert ended == [1] and time.monotonic() - begin < 2.5, "the wait is bounded"


class Fake:
    """Counts the clusters that are open."""

    def __init__(self) -> None:
        self.open = self.ever = 0

    @contextmanager
    def connect(self, config: Config) -> Iterator[Any]:
        self.open, self.ever = self.open + 1, self.ever + 1
        try:
            yield object()
        finally:
            self.open -= 1


CONFIG = make_config({"model": {"path": "m"}, "domains": [{"name": "d", "source": "x"}]})


def test_a_further_lane_opens_only_where_there_is_room_and_a_late_node_makes_some() -> None:
    fake, room = Fake(), threading.Event()
    lanes, held, seen = (
        Lanes(3, fake.connect, lambda config: room.is_set(), lambda text: None),
        threading.Barrier(3),
        [],
    )

    def hold() -> None:
        with lanes.lane(CONFIG) as cluster:
            seen.append(cluster)
            held.wait(20)

    first = [threading.Thread(target=hold, daemon=True) for _ in range(2)]
    for thread in first:
        thread.start()
    time.sleep(1.2)
    assert fake.open == 1 and len(seen) == 1, "the second waits: there is no room"
    room.set()  # a node has joined
    held.wait(20)
    for thread in first:
        thread.join(20)
    assert fake.ever == 2 and len(set(map(id, seen))) == 2
    lanes.close()
    assert fake.open == 0


def test_a_lost_cluster_is_closed_and_never_lent_again() -> None:
    fake = Fake()
    lanes = Lanes(1, fake.connect, lambda config: True, lambda text: None)
    with pytest.raises(LearnerDied), lanes.lane(CONFIG):
        raise LearnerDied("gone")
    assert fake.open == 0
    with pytest.raises(ValueError, match="a mistake"), lanes.lane(CONFIG):
        raise ValueError("a mistake")
    with lanes.lane(CONFIG):
        assert fake.open == 1 and fake.ever == 2, "a mistake does not cost the cluster"
    lanes.close()


class Lane:
    """Stands for `connect`: each call a learner and a pool of its own in this process. May lose the learner of the n-th RL step."""

    def __init__(self, dies_at: int | None = None) -> None:
        self.connections, self.dies_at, self.steps = 0, dies_at, 0

    @contextmanager
    def __call__(self, config: Config) -> Iterator[Cluster]:
        self.connections += 1
        learner, whole = Learner(config), self

        class Mortal:
            alive = True

            def __getattr__(self, name: str) -> Any:
                return getattr(learner, name)

            def step(self, batch: Any) -> Any:
                whole.steps += 1
                if whole.steps == whole.dies_at:
                    raise LearnerDied("the learner's process died during step: its node is gone")
                return learner.step(batch)

        yield Cluster(Mortal(), LocalPool(worker_spec(config)))  # type: ignore[arg-type]


def whole_pipeline(config: Any, lane: Lane) -> tuple[dict[str, Any], list[str]]:
    lines: list[str] = []
    return Pipeline(config, lines.append, lane, lambda config, copies: nullcontext(), lambda config: True).run(), lines


def test_two_lanes_give_the_manifest_and_the_tables_of_one(babbler: Path, tmp_path: Path) -> None:
    found = []
    for width in (1, 2):
        lane = Lane()
        short = ("stages=[specialists, data, student, evaluation]", "run.indexer={train: frozen, selection: own}")
        config = pipeline_config(
            tmp_path / str(width),
            babbler,
            f"parallel={width}",
            "floors=''",
            "run.schedule.steps=1",
            "data.tasks=8",
            *short,
        )
        result, _ = whole_pipeline(config, lane)
        assert lane.connections == width
        folder = tmp_path / str(width) / "p"
        events = [json.loads(line) for line in (folder / "stages.jsonl").read_text().splitlines()]
        assert set(Counter((e["stage"], e["event"]) for e in events).values()) == {1}
        notes = json.loads((folder / "manifest.json").read_text())
        inputs = {name: sorted(note["inputs"]) for name, note in notes.items()}
        found.append(
            (result["domains"], list(result["models"]), inputs, [e["stage"] for e in events if e["event"] == "begin"])
        )
        _, again = whole_pipeline(config, Lane())
        assert not [line for line in again if ": done in " in line], "a restart does nothing twice"
    assert found[0][:3] == found[1][:3]
    order = found[1][3]
    assert set(order[:2]) == {"evaluation-base", "specialist-lookup"} and order[2] == "specialist-sums", "side by side"


def test_a_dead_learner_costs_the_steps_since_its_checkpoint(babbler: Path, tmp_path: Path) -> None:
    lane = Lane(dies_at=3)
    config = pipeline_config(
        tmp_path, babbler, "stages=[convert, specialists]", "run.schedule={steps: 3, save_every: 1}"
    )
    _, lines = whole_pipeline(config, lane)
    assert lane.connections == 2 and any("on to another cluster, attempt 2 of 3" in line for line in lines)
    assert any("specialist-lookup: resuming" in line for line in lines) and lane.steps == 7, (
        "three steps each, one of them twice"
    )
    rows = (tmp_path / "p" / "specialist-lookup" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(row)["step"] for row in rows] == [1, 2, 3]


@pytest.mark.slow
def test_controls_have_the_seconds_of_what_they_are_compared_with(babbler: Path, tmp_path: Path) -> None:
    controls = ("controls=[student, mixed]", "floors=''", "run.schedule.steps=1", "student.steps=50", "data.tasks=8")
    config = pipeline_config(tmp_path, babbler, *controls)
    result, _ = whole_pipeline(config, Lane())
    assert list(result["models"])[-3:] == ["mixed", "student-on_policy", "mixed-from-base"]
    assert {"student-on_policy", "mixed-from-base"} <= set(result["domains"]["sums"])
    notes = json.loads((tmp_path / "p" / "manifest.json").read_text())
    budget = sum(note["seconds"] for name, note in notes.items() if name.startswith("data-") or name == "student")
    took = [
        json.loads(line) for line in (tmp_path / "p" / "student-on_policy" / "on_policy.jsonl").read_text().splitlines()
    ]
    assert 1 <= len(took) < 50 and notes["student-on_policy"]["seconds"] < 3 * budget + 10, (
        "it stopped for the time, not for the steps"
    )
    steps = json.loads((tmp_path / "p" / "mixed-from-base" / "result.json").read_text())["steps"]
    whole = sum(
        n["seconds"]
        for name, n in notes.items()
        if name.startswith(("specialist-", "data-")) or name in ("student", "mixed")
    )
    assert steps == round(whole / notes["mixed"]["seconds"]) > 1
    assert result["spent_unit"] == "seconds" and result["spent"]["mixed"] == pytest.approx(whole, abs=0.3)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("parallel=0", "parallel is 0, but it must be >= 1"),
        ("controls=[all]", "must be one of student, mixed"),
        ("student.method=both,controls=[student]", "it is both"),
        ("stages=[specialists],controls=[mixed]", "stages has not"),
    ],
)
def test_bad_controls_are_refused(override: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        pipeline_config(tmp_path, tmp_path / "m", *override.split(","))


def test_gpu_seconds_count_where_there_are_gpus(tmp_path: Path) -> None:
    manifest = Manifest(tmp_path, "1", lambda text: None, gpus=0.5)
    manifest.notes = {n: {"seconds": 4.0, "gpu_seconds": 2.0} for n in ("data-a", "data-b", "student", "student-sft")}
    assert manifest.spent("data-", "student") == 6.0
