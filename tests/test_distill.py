"""Verified selection: what is kept, what is dropped and why, where a row comes from, and that files come back as they went."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from random import Random

import numpy as np
import pytest

from winnow.distill.data import Provenance, index_stats
from winnow.distill.selection import select
from winnow.distill.store import read_rows, write_rows
from winnow.distill.student import batches, domain_counts, make_example, make_examples, pack
from winnow.rewards.baseline import play
from winnow.rewards.contract import grade
from winnow.rewards.demonstrations import demonstrations
from winnow.rewards.registry import get_reward
from winnow.rewards.tasks import generate_tasks
from winnow.rollout.schema import Failure, Group, IndexRecord, Request, Sampling, Score

FROM = Provenance(specialist="reasoning", checkpoint="runs/a/checkpoints/step-000010", config_hash="abc123")


def group_of(task, replies, request_id="r0", scores=None, versions=None) -> Group:
    request = Request(
        request_id=request_id, task=task, num_samples=len(replies), sampling=Sampling(max_tokens=8, seed=17)
    )
    made = [
        play(task, lambda _, reply=reply: reply, request_id=request_id, sample=i) for i, reply in enumerate(replies)
    ]
    if versions is not None:
        made = [replace(t, policy_versions=np.where(t.loss_mask, versions, -1).astype(np.int32)) for t in made]
    group = Group(request=request, trajectories=tuple(made))
    return replace(group, scores=tuple(scores)) if scores else grade(get_reward, [group])[0]


@pytest.fixture
def task():
    return generate_tasks("lookup", count=1)[0]


def test_rows_carry_their_provenance(task):
    group = group_of(task, [task.answer, "x"], versions=7)
    record = IndexRecord(
        first=4, k=4, layers=(0, 1), indices=np.zeros((2, len(group.trajectories[0].tokens) - 5, 4), np.uint16)
    )
    group = replace(group, trajectories=(replace(group.trajectories[0], index_record=record), group.trajectories[1]))
    (row,), summary = select([group], FROM)
    assert (row.specialist, row.checkpoint, row.config_hash) == (
        "reasoning",
        "runs/a/checkpoints/step-000010",
        "abc123",
    )
    assert (row.policy_version, row.seed, row.request_id, row.sample, row.task_id, row.domain) == (
        7,
        17,
        "r0",
        0,
        task.id,
        "reasoning",
    )
    assert row.reward == 1 and dict(row.parts) == {"right": 1, "answered": 1} and row.turns == 1
    assert row.num_generated == group.trajectories[0].num_generated < row.num_tokens and row.prompt_messages == 1
    assert row.messages == group.trajectories[0].messages and row.index["mean_selected"] == 4
    assert summary.as_dict() == {
        "sampled": {"reasoning": 2},
        "pass_rate": {"reasoning": 0.5},
        "kept": {"reasoning": 1},
        "dropped": {"reasoning": {"low_reward": 1}},
        "contaminated": {},
        "difficulty": {"reasoning": [0, 0, 1, 0, 0]},
    }
    assert dict(row.selection) == {"samples": 2, "passed": 1, "pass_rate": 0.5, "rank": 0, "alike": 0.0}


def test_index_stats_count_what_is_not_padding():
    indices = np.array([[[0, 1, 2], [0, 3, 65535]], [[0, 1, 65535], [1, 2, 4]]], np.uint16)  # [2 layers, 2 rows, k = 3]
    stats = index_stats(IndexRecord(first=3, k=3, layers=(0, 1), indices=indices))
    assert stats == {
        "rows": 4,
        "mean_selected": 2.5,
        "mean_available": 4.5,
        "selected_share": pytest.approx((3 / 4 + 2 / 5 + 2 / 4 + 3 / 5) / 4),
    }
    assert index_stats(None) == {}


def test_threshold_truncation_failures_duplicates_and_best(task):
    a = task.answer
    replies = [a, a, f"it is {a}", f"so it is {a}", "wrong", a, a]
    group = group_of(task, replies)
    scores = list(group.scores)
    scores[5] = Failure(kind="timeout", detail="judge")
    cut = replace(group.trajectories[6], finish_reason="length")
    group = replace(group, scores=tuple(scores), trajectories=(*group.trajectories[:6], cut))
    rows, summary = select([group], FROM, best=2)
    assert [row.messages[-1]["content"] for row in rows] == [a, f"it is {a}"], "of equal rewards the shorter"
    assert summary.dropped == {
        "reasoning": {"low_reward": 1, "failure_timeout": 1, "truncated": 1, "duplicate": 1, "surplus": 1}
    }
    assert summary.pass_rate("reasoning") == pytest.approx(4 / 7)
    better = group_of(task, [a, "so " * 5 + a], scores=[Score(value=1.0), Score(value=1.5)])
    assert select([better], FROM, best=1)[0][0].reward == 1.5


def test_duplicates_across_requests_and_any_order(task):
    other = generate_tasks("lookup", count=2)[1]
    groups = [
        group_of(task, [task.answer, "no"], "r0"),
        group_of(task, [task.answer], "r1"),
        group_of(other, [other.answer], "r2"),
    ]
    rows, summary = select(groups, FROM)
    assert len(rows) == len({row.id for row in rows}) == 2 and summary.dropped["reasoning"]["duplicate"] == 1
    for seed in range(5):
        shuffled = Random(seed).sample(groups, 3)
        assert select(shuffled, FROM)[0] == rows


def test_the_same_reply_to_another_prompt_is_no_duplicate():
    tasks = [t for t in generate_tasks("lookup", count=60) if t.answer == "4"]
    rows, _ = select([group_of(t, ["4"], f"r{i}") for i, t in enumerate(tasks)], FROM)
    assert len(rows) == len(tasks) > 1


def test_nothing_verified_names_domain_and_pass_rate(task):
    with pytest.raises(
        ValueError, match=r"domain 'reasoning' has no verified row: pass rate 0.0% of 2 samples at threshold 1"
    ):
        select([group_of(task, ["x", "y"])], FROM)
    with pytest.raises(ValueError, match="specialist 'reasoning' has no samples"):
        select([], FROM)
    with pytest.raises(ValueError, match="is not graded"):
        select([replace(group_of(task, ["x"]), scores=())], FROM)
    with pytest.raises(ValueError, match="best is 0"):
        select([], FROM, best=0)
    rubric = generate_tasks("rubric", count=1)[0]
    with pytest.raises(ValueError, match="domain 'alignment' has no verified row"):
        select([group_of(task, [task.answer]), group_of(rubric, ["no"], "r1")], FROM)


@pytest.fixture
def rows():
    groups = []
    for kind in ("lookup", "tool", "rubric"):
        for number, task in enumerate(generate_tasks(kind, count=4)):
            replies = iter([m["content"] for m in demonstrations(task, Random(number)) if m["role"] == "assistant"])
            request = Request(request_id=f"{kind}{number}", task=task, num_samples=1, sampling=Sampling(max_tokens=8))
            trajectory = play(task, lambda _, replies=replies: next(replies), request_id=request.request_id)
            groups.append(Group(request=request, trajectories=(trajectory,)))
    return select(grade(get_reward, groups), FROM)


def test_files_come_back_as_they_went(tmp_path, rows):
    rows, summary = rows
    path = write_rows(rows, tmp_path / "data", "student", summary)
    assert read_rows(path) == rows and len(rows) == 12
    assert json.loads((tmp_path / "data" / "student.summary.json").read_text())["kept"] == {
        "reasoning": 4,
        "agent": 4,
        "alignment": 4,
    }
    assert sorted(p.suffix for p in path.parent.iterdir() if not p.name.startswith(".")) == [
        ".json",
        ".jsonl",
        ".md",
        ".parquet",
    ]
    assert not [p for p in path.parent.iterdir() if p.name.startswith(".")], "no temporary file stays"


def test_parquet_opens(tmp_path, rows):
    parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed")
    path = write_rows(rows[0], tmp_path)
    table = parquet.read_table(path.with_suffix(".parquet")).to_pylist()
    assert [row["id"] for row in table] == [row.id for row in rows[0]]
    assert table[-1]["messages"] == [dict(m) for m in rows[0][-1].messages]
    datasets = pytest.importorskip("datasets", reason="datasets is not installed")
    for builder, file in (("parquet", path.with_suffix(".parquet")), ("json", path)):
        data = datasets.load_dataset(builder, data_files=str(file), split="train", cache_dir=str(tmp_path / builder))
        assert data["task_id"] == [row.task_id for row in rows[0]]


def test_jsonl_without_pyarrow(tmp_path, rows, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    path = write_rows(rows[0], tmp_path)
    assert read_rows(path) == rows[0] and not path.with_suffix(".parquet").exists()


def test_a_failed_write_leaves_the_old_file(tmp_path, rows):
    path = write_rows(rows[0], tmp_path)
    before = path.read_bytes()
    with pytest.raises(TypeError):
        write_rows([replace(rows[0][0], parts={"x": object()})], tmp_path)
    assert path.read_bytes() == before and not [p for p in tmp_path.iterdir() if p.name.startswith(".")]
    with pytest.raises(ValueError, match="no rows to write"):
        write_rows([], tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda row: row.pop("reward"), "rows.jsonl:2: field 'reward' is missing"),
        (lambda row: row.update(extra=1), "rows.jsonl:2: field 'extra' is unknown"),
        (lambda row: row.update(reward=float("nan")), "rows.jsonl:2: field 'reward' is nan"),
        (lambda row: row.update(domain=None), "rows.jsonl:2: field 'domain' is None"),
        (lambda row: row.update(policy_version="3"), "rows.jsonl:2: field 'policy_version' is '3'"),
        (lambda row: row.update(messages=[{"role": "user"}]), "rows.jsonl:2: field 'messages' must be"),
        (lambda row: row.update(messages=row["messages"][:1]), "rows.jsonl:2: the messages hold no reply"),
    ],
)
def test_reading_names_file_and_line(tmp_path, rows, change, message):
    path = write_rows(rows[0], tmp_path)
    lines = path.read_text().splitlines()
    row = json.loads(lines[1])
    change(row)
    path.write_text("\n".join([lines[0], json.dumps(row), *lines[2:]]))
    with pytest.raises(ValueError, match=message):
        read_rows(path)


def test_reading_broken_and_missing_files(tmp_path):
    with pytest.raises(ValueError, match="there is no file"):
        read_rows(tmp_path / "rows.jsonl")
    (tmp_path / "rows.jsonl").write_text("{\n")
    with pytest.raises(ValueError, match=r"rows.jsonl:1: the line is not JSON"):
        read_rows(tmp_path / "rows.jsonl")
    (tmp_path / "rows.jsonl").write_text("\n\n")
    with pytest.raises(ValueError, match="holds no rows"):
        read_rows(tmp_path / "rows.jsonl")


# --------------------------------------------------------------------------------------------------------------------------- student


class WordTemplate:
    """Three tokens of frame a message and one a word; the reply's words and its end mark are learned."""

    def render(self, messages, options=()):
        ids, mask = [], []
        for message in messages:
            words = [len(word) for word in message["content"].split()]
            learned = message["role"] == "assistant"
            ids += [100, *words, 101]
            mask += [False, *[learned] * (len(words) + 1)]
        return ids, mask


def test_examples_learn_the_replies_only(rows):
    examples, too_long = make_examples(rows[0], WordTemplate())
    assert (
        len(examples) == 12
        and too_long == {}
        and domain_counts(examples) == {"reasoning": 4, "agent": 4, "alignment": 4}
    )
    for example, row in zip(examples, rows[0], strict=True):
        replies = [m["content"].split() for m in row.messages if m["role"] == "assistant"]
        assert example.loss_mask.sum() == sum(len(words) + 1 for words in replies)
        assert example.tokens.dtype == np.int32 and example.loss_mask.dtype == bool


def test_replies_within_the_prompt_are_not_learned():
    shots = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "bb"}, {"role": "user", "content": "c"}]
    example = make_example([*shots, {"role": "assistant", "content": "dddd"}], WordTemplate(), prompt_messages=3)
    assert example.tokens[example.loss_mask].tolist() == [4, 101]


def test_long_rows_are_counted_and_masked_ones_refused(rows):
    lengths = sorted(len(e) for e in make_examples(rows[0], WordTemplate())[0])
    examples, too_long = make_examples(rows[0], WordTemplate(), max_tokens=lengths[5])
    assert sum(too_long.values()) + len(examples) == 12 and too_long
    with pytest.raises(ValueError, match=rf"all 12 exceed max_tokens 3 \(the shortest has {lengths[0]}\)"):
        make_examples(rows[0], WordTemplate(), max_tokens=3)
    with pytest.raises(ValueError, match="nothing would be learned"):
        make_example([{"role": "user", "content": "a"}], WordTemplate())


def test_batches_keep_the_budget_and_every_example(rows):
    examples, _ = make_examples(rows[0], WordTemplate())
    made = list(batches(examples, 300, seed=1))
    assert all(sum(map(len, batch)) <= 300 for batch in made) and len(made) > 1
    assert sorted(e.row_id for batch in made for e in batch) == sorted(e.row_id for e in examples)

    def order(**seeds):
        return [[e.row_id for e in batch] for batch in batches(examples, 300, **seeds)]

    assert order(seed=1) == order(seed=1) != order(seed=1, epoch=1)
    assert [len(batch) for batch in batches(examples, 1)] == [1] * 12, "a longer example comes alone"
    packed = pack(made[0])
    assert packed.cu_seqlens[-1] == len(packed.tokens) == len(packed.loss_mask) and packed.cu_seqlens.dtype == np.int32
    first = made[0][0]
    assert np.array_equal(packed.tokens[: len(first)], first.tokens)
    with pytest.raises(ValueError, match="token_budget is 0"):
        next(batches(examples, 0))
