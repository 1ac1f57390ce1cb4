"""Loading tasks: field mappings, publishers' own names, splits by hash, and what a broken file says."""

from __future__ import annotations

import json
import os
import sys
import types
from pathlib import Path

import pytest

from winnow.rewards.baseline import play
from winnow.rewards.data import load_tasks
from winnow.rewards.registry import get_reward

ROWS = [
    {"question": f"How much is {i} and {i}?", "answer": f"Twice {i}.\n#### {2 * i:,}", "source": "made up"}
    for i in range(900, 1100)
]


def write(folder: Path, *lines: object, name: str = "tasks.jsonl") -> Path:
    path = folder / name
    path.write_text(
        "".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines), encoding="utf-8"
    )
    return path


def test_fields_are_mapped_and_the_rest_is_metadata(tmp_path):
    path = write(tmp_path, {"q": "2+2?", "a": 4, "hint": "even", "n": 7})
    (task,) = load_tasks(
        str(path), "maths", split="all", fields={"prompt": "q", "answer": "a", "id": "n"}, reward="exact"
    )
    assert task.messages == ({"role": "user", "content": "2+2?"},)
    assert (task.id, task.domain, task.answer, task.reward, dict(task.metadata)) == (
        "7",
        "maths",
        "4",
        "exact",
        {"hint": "even"},
    )


def test_publishers_fields_are_found(tmp_path):
    for row, reward, answer in (
        ({"question": "?", "answer": "so\n#### 1,042"}, "gsm8k", "1042"),
        ({"problem": "?", "answer": 204, "solution": "long"}, "number", "204"),
        ({"messages": [{"role": "user", "content": "?"}], "answer": "-3"}, "number", "-3"),
    ):
        (task,) = load_tasks(str(write(tmp_path, row)), split="all")
        assert (task.reward, task.answer, task.messages[0]["content"]) == (reward, answer, "?")
    (task,) = load_tasks(
        str(write(tmp_path, {"text": "write it", "code": "x", "test_list": []})), split="all", reward="rubric"
    )
    assert task.answer is None and task.metadata["code"] == "x"
    (task,) = load_tasks(
        str(write(tmp_path, {"prompt": "?", "s": "be brief", "answer": 1})), split="all", fields={"system": "s"}
    )
    assert [m["role"] for m in task.messages] == ["system", "user"]


def test_splits_seeds_and_counts(tmp_path):
    path = str(write(tmp_path, *ROWS))
    train, heldout, everything = (load_tasks(path, split=split) for split in ("train", "heldout", "all"))
    assert not {t.id for t in train} & {t.id for t in heldout} and len(train) + len(heldout) == len(everything) == 200
    assert 20 < len(heldout) < 60
    assert load_tasks(path, seed=3, count=10) == load_tasks(path, seed=3)[:10] != load_tasks(path, seed=4)[:10]
    reordered = str(write(tmp_path, *reversed(ROWS), name="again.jsonl"))
    assert {t.id for t in load_tasks(reordered, split="heldout")} == {t.id for t in heldout}, (
        "the prompt decides, not its place"
    )
    for task in train[:20]:
        reply = task.metadata["solution"]
        assert get_reward(task.reward)(task, play(task, lambda _, reply=reply: reply)).value == 1


def test_gsm8k_folder_and_file(tmp_path):
    write(tmp_path, *ROWS[:5], name="train.jsonl")
    test = write(tmp_path, *ROWS[5:8], name="test.jsonl")
    assert (
        len(load_tasks("gsm8k", path=tmp_path)) == 5 and len(load_tasks("gsm8k", path=tmp_path, split="heldout")) == 3
    )
    assert (
        len(load_tasks("gsm8k", path=tmp_path, split="all")) == 8
        and len(load_tasks("gsm8k", path=test, split="all")) == 3
    )
    with pytest.raises(ValueError, match="source 'gsm8k' needs its file"):
        load_tasks("gsm8k")


def test_procedural_kinds_come_through_the_same_door():
    tasks = load_tasks("lookup", "mine", count=5, seed=1, level=2)
    assert len(tasks) == 5 and tasks[0].domain == "mine" and tasks[0].metadata["level"] == 2
    assert load_tasks("tool", count=1)[0].domain == "agent"


@pytest.mark.parametrize(
    ("lines", "arguments", "message"),
    [
        (["", ROWS[0], '{"question": '], {}, r"tasks.jsonl:3: the line is not JSON"),
        ([ROWS[0], "[1]"], {}, r"tasks.jsonl:2: the line is a JSON list"),
        (["[" * 100_000], {}, r"tasks.jsonl:1: the line is not JSON"),
        ([ROWS[0], {"question": "?"}], {}, r"tasks.jsonl:2: there is no field 'answer'; the row has question"),
        (
            [ROWS[0]],
            {"fields": {"prompt": "query"}},
            r"tasks.jsonl:1: there is no field 'query'; the row has question, answer, source",
        ),
        ([ROWS[0]], {"fields": {"question": "prompt"}}, "fields maps 'question', but only prompt, answer, system, id"),
        ([{"a": 1}], {}, r"tasks.jsonl:1: no field looks like a prompt; set fields.prompt to one of a"),
        ([{"prompt": "?", "gold_label": 1}], {}, "needs an answer; set fields.answer to one of prompt, gold_label"),
        (
            [{"prompt": "?", "answer": "many"}],
            {},
            r"tasks.jsonl:1: gold answer 'many' holds no number.*set reward to exact or math",
        ),
        ([{"prompt": "?", "answer": " "}], {"reward": "exact"}, r"tasks.jsonl:1: the answer is empty"),
        ([{"prompt": ["?"], "answer": 1}], {}, r"tasks.jsonl:1: field 'prompt' must be a text or a list of messages"),
        ([{"prompt": " ", "answer": 1}], {}, r"tasks.jsonl:1: field 'prompt' must be"),
        ([], {}, r"tasks.jsonl is empty"),
        ([ROWS[0]], {"count": 0}, "count of .* is 0"),
        ([ROWS[0]], {"split": "test"}, "split is 'test'"),
    ],
)
def test_faults_name_file_and_line(tmp_path, lines, arguments, message):
    path = write(tmp_path, *lines)
    with pytest.raises(ValueError, match=message):
        load_tasks(str(path), **{"split": "all", **arguments})


def test_bytes_that_are_no_text_name_their_line(tmp_path):
    path = write(tmp_path, ROWS[0])
    path.write_bytes(path.read_bytes() + b'{"question": "\xff"}\n')
    with pytest.raises(ValueError, match=r"tasks.jsonl:2: the line is not JSON"):
        load_tasks(str(path), split="all")
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(ROWS[0]).encode())
    assert len(load_tasks(str(path), split="all")) == 1, "a byte order mark is no fault"


def test_missing_files_and_unknown_sources(tmp_path):
    write(tmp_path, ROWS[0], name="train.jsonl")
    with pytest.raises(ValueError, match=r"there is no file .*trian.jsonl; did you mean .*train.jsonl"):
        load_tasks(str(tmp_path / "trian.jsonl"))
    with pytest.raises(
        ValueError, match=r"'lookups' is no file here and no known kind .lookup, tool, rubric, addition, calculator"
    ):
        load_tasks("lookups")
    with pytest.raises(ValueError, match="there is no file"):
        load_tasks("gsm8k", path=tmp_path / "nowhere")


def test_hub_sources_go_through_datasets(monkeypatch):
    """The library is replaced: tests do not touch the network."""
    calls = []

    def load_dataset(name, config):
        calls.append((name, config))
        if name == "no/where":
            raise ConnectionError("offline")
        return {"train": ROWS[:3], "test": ROWS[3:5]}

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    assert len(load_tasks("openai/gsm8k:main")) == 3 and len(load_tasks("openai/gsm8k:main", split="heldout")) == 2
    assert (
        len(load_tasks("openai/gsm8k", split="all")) == 5
        and calls[0] == ("openai/gsm8k", "main")
        and calls[-1][1] is None
    )
    with pytest.raises(ValueError, match="cannot be loaded from the hub: ConnectionError: offline"):
        load_tasks("no/where")
    with pytest.raises(ValueError, match=r"openai/gsm8k\[train\]:0: there is no field 'q'"):
        load_tasks("openai/gsm8k", fields={"prompt": "q"})


def test_benchmark_files_of_the_data_folder():
    folder = os.environ.get("WINNOW_DATA")
    if not folder:
        pytest.skip("WINNOW_DATA does not name a folder with gsm8k, aime24, humaneval and mbpp")
    assert len(load_tasks("gsm8k", path=Path(folder) / "gsm8k", split="heldout")) == 1319
    assert len(load_tasks(f"{folder}/aime24/test.jsonl", split="all")) == 30
    assert len(load_tasks(f"{folder}/humaneval/test.jsonl", split="all", reward="rubric")) == 164
    assert len(load_tasks(f"{folder}/mbpp/test.jsonl", split="all", reward="rubric")) == 974
