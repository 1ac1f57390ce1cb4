"""Several Ray nodes on this machine: the pipeline runs across them, nodes die in every stage, and nodes that join late are used. Slow."""

from __future__ import annotations

import json
import logging
import re
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from pipelines import Here, pipeline_config

from winnow.rl.cluster import Cluster, connect
from winnow.rl.config import Config
from winnow.rl.pipeline import Pipeline
from winnow.rollout.schema import Group, Request

pytestmark = pytest.mark.slow
WAIT_S = 240.0  # of a loaded machine: most of a test's time is processes that import torch and transformers, 7 CPU seconds each
# A dead node refuses connections and is noticed at the third check, a starved one has its time: Ray's own bounds cost 10 s a death.
HEALTH = {
    "health_check_initial_delay_ms": 1000, "health_check_period_ms": 1000, "health_check_timeout_ms": 5000,
    "health_check_failure_threshold": 3, "prestart_worker_first_driver": False,
}  # fmt: skip
PLAIN = ("floors=''", "run.indexer={train: frozen, selection: own}", "run.cluster.start_timeout_s=120")


@pytest.fixture(autouse=True)
def workers_as_eager_as_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_worker_niceness", "0")  # Ray's own default, 15, starves them on a busy machine


class Nodes:
    """A Ray cluster of processes on this machine, each node a raylet with resources of its own. The head has no CPUs to give."""

    def __init__(self, *cpus: int) -> None:
        from ray.cluster_utils import Cluster as RayCluster

        head = {"num_cpus": 0, "include_dashboard": False, "_system_config": HEALTH}
        self.cluster = RayCluster(initialize_head=True, head_node_args=head, shutdown_at_exit=False)  # closed below
        self.nodes = [self.join(count) for count in cpus]

    @property
    def address(self) -> str:
        return self.cluster.address

    def join(self, cpus: int) -> Any:
        return self.cluster.add_node(num_cpus=cpus, wait=False)

    def kill(self, node_id: str) -> None:
        node = next(node for node in self.cluster.worker_nodes if node.node_id == node_id)
        self.cluster.remove_node(node, allow_graceful=False)

    def close(self) -> None:
        self.cluster.shutdown()


def places() -> tuple[set[str], set[str]]:
    """Ids of the nodes that hold learners, and of those that hold rollout workers only."""
    from ray.util import placement_group_table

    groups = [group for group in placement_group_table().values() if group["state"] in ("CREATED", "RESCHEDULING")]
    learners = {node for g in groups if g["strategy"] == "PACK" for node in g["bundles_to_node_id"].values()}
    workers = {node for g in groups if g["strategy"] == "SPREAD" for node in g["bundles_to_node_id"].values()}
    return learners - {""}, workers - learners - {""}


def until(true: Any, what: str) -> None:
    deadline = time.monotonic() + WAIT_S
    while not true():
        assert time.monotonic() < deadline, f"{what} did not happen within {WAIT_S:.0f} s"
        time.sleep(0.2)


def ready(pool: Any) -> int:
    return sum(text.startswith("ready") for text in pool.describe().values())


class Saboteur:
    """A pool in whose every stage another node joins and, when its first group has come, the newest one with nothing but a worker dies."""

    def __init__(self, pool: Any, nodes: Nodes, stages: Path) -> None:
        self.pool, self.nodes, self.stages = pool, nodes, stages
        self.killed: dict[str, str] = {}  # kind of stage -> node
        self.answered: Counter[str] = Counter()
        self.asked: list[str] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.pool, name)

    def generate(self, requests: Sequence[Request]) -> Iterator[Group]:
        whole = json.loads(self.stages.read_text().splitlines()[-1])["stage"]
        stage = whole.partition("-")[0]
        fresh = stage not in self.killed
        if fresh:
            joining = threading.Thread(
                target=self.nodes.join, args=(1,)
            )  # while the last victim's worker starts elsewhere
            joining.start()
            until(lambda: ready(self.pool) == 2, "a second worker")
            joining.join(WAIT_S)
        self.asked += [f"{whole} {request.request_id}" for request in requests]
        return self.watched(self.pool.generate(requests), whole, stage if fresh else "")

    def watched(self, groups: Iterator[Group], whole: str, stage: str) -> Iterator[Group]:
        for group in groups:
            self.answered[f"{whole} {group.request.request_id}"] += 1
            yield group
            if stage and stage not in self.killed:
                _, others = places()
                order = [node.node_id for node in self.nodes.cluster.worker_nodes]
                victim = max(others, key=order.index)
                self.killed[stage] = victim
                self.nodes.kill(victim)


@pytest.mark.timeout(900)
def test_a_node_killed_in_each_stage_costs_its_unfinished_groups_and_late_nodes_take_over(
    babbler: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    short = (
        *PLAIN,
        "stages=[specialists, data, student, mixed, evaluation]",
        "student={method: both, steps: 2}",
        "data.tasks=12",
        "run.domains=[{name: sums, source: addition, count: 24, holdout: 6, quota: 4, max_tokens: 10}]",
    )
    one = ("run.rollout={workers: 2, samples: 8, num_pages: 512, max_batch: 16}", "run.cluster.strategy=SPREAD")
    whole = Pipeline(pipeline_config(tmp_path / "whole", babbler, *short, *one), lambda text: None, Here()).run()
    nodes = Nodes(1, 1, 1)
    config = pipeline_config(tmp_path / "nodes", babbler, *short, *one, f"run.cluster.address={nodes.address}")
    spoiled: list[Saboteur] = []
    lines: list[str] = []

    @contextmanager
    def sabotaged(run: Config) -> Iterator[Cluster]:
        with connect(run) as cluster:
            spoiled.append(Saboteur(cluster.pool, nodes, config.folder / "stages.jsonl"))
            yield Cluster(cluster.learner, spoiled[-1])

    try:
        with caplog.at_level(logging.INFO, logger="winnow.rollout"):
            result = Pipeline(config, lines.append, sabotaged).run()
    finally:
        nodes.close()
    [saboteur] = spoiled  # the learner lived: one cluster served all
    assert list(saboteur.killed) == ["evaluation", "specialist", "data", "student", "mixed"]
    assert len(set(saboteur.killed.values())) == 5, (
        "every victim but the first joined late, and was at work when it died"
    )
    assert saboteur.answered == Counter(saboteur.asked), "every group once"
    died = [record.getMessage() for record in caplog.records if "died" in record.getMessage()]
    assert len(died) >= 5, died  # a worker may be sent to the dead node's place once more before Ray has another
    events = [json.loads(line) for line in (config.folder / "stages.jsonl").read_text().splitlines()]
    assert set(Counter((e["stage"], e["event"]) for e in events).values()) == {1}, "no stage twice"
    assert result["domains"] == whole["domains"], "the tables of a run on which nothing happened"


@pytest.mark.timeout(900)
def test_a_late_node_makes_room_for_a_second_lane_and_the_first_ones_death_costs_steps_since_a_checkpoint(
    babbler: Path,
    tmp_path: Path,
) -> None:
    nodes, lines = Nodes(2), []
    short = (
        *PLAIN,
        "stages=[specialists]",
        "run.schedule={steps: 6, save_every: 1}",
        "run.cluster.strategy=SPREAD",
        "parallel=2",
    )
    config = pipeline_config(tmp_path, babbler, *short, f"run.cluster.address={nodes.address}")
    [first] = nodes.nodes
    begun: list[str] = []  # whichever stage had the only lane first

    def say(text: str) -> None:
        lines.append(text)
        stage = re.search(r"(specialist-\w+): step 2/6", text)
        if stage and not begun:
            begun.append(stage[1])
            nodes.join(2)
            until(lambda: any("lane 2: ready" in line for line in lines), "a second lane on the late node")
            nodes.kill(first.node_id)

    try:
        result = Pipeline(config, say).run()
    finally:
        nodes.close()
    text = "\n".join(lines)
    assert set(result["models"]) == {"base", "specialist-lookup", "specialist-sums"}
    [stage] = begun
    assert "on to another cluster, attempt 2 of 3" in text and f"{stage}: resuming" in text
    steps = [json.loads(x)["step"] for x in (config.folder / stage / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 4, 5, 6]
    assert text.count(f"{stage}: step 1/6") == 1, "what was saved is not done again"
