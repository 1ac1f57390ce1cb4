"""Benchmarks: pass@k by enumeration, publishers' row formats, few-shot and templates, IFEval's instructions, evaluations that resume."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

from winnow.rewards.baseline import play
from winnow.rewards.benchmarks import BENCHMARKS, load_benchmark
from winnow.rewards.instructions import CHECKS, follows, ifeval
from winnow.rewards.question_benchmarks import FORMATS, load_questions
from winnow.rewards.registry import KNOWN_REWARDS, get_reward
from winnow.rewards.tasks import generate_tasks
from winnow.rl.answers import partial_file
from winnow.rl.evaluate import details, evaluate, make_requests, table
from winnow.rl.pass_at_k import pass_at_k
from winnow.rollout.schema import Group, Request, Score, Task


def test_pass_at_k_is_the_share_of_draws_with_a_right_one() -> None:
    for n in range(1, 8):
        for c in range(n + 1):
            for k in range(1, n + 1):
                draws = list(combinations([i < c for i in range(n)], k))
                assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, draws)) / len(draws))
    assert pass_at_k(200, 1, 100) == pytest.approx(0.5)


# ------------------------------------------------------------------------------------------------------------------------ row formats

ROWS: dict[str, list[dict[str, Any]]] = {
    "gsm8k": [{"question": f"{n} + 1?", "answer": f"{n} + 1 = {n + 1}\n#### {n + 1}"} for n in range(4)],
    "math": [
        {"problem": "Half of 1?", "solution": "It is $\\boxed{\\frac{1}{2}}$.", "level": "Level 1", "type": "Algebra"}
    ],
    "aime24": [{"id": 60, "problem": "Find it.", "solution": "long", "answer": "204"}],
    "mmlu": [{"question": "Which?", "choices": ["a", "b", "c", "d"], "answer": 2, "subject": "x"}],
    "gpqa": [
        {"Question": "Why?", "Correct Answer": "right", **{f"Incorrect Answer {i}": f"wrong {i}" for i in (1, 2, 3)}}
    ],
    "arc": [{"question": "Where?", "choices": {"text": ["p", "q", "r"], "label": ["1", "2", "3"]}, "answerKey": "2"}],
    "ifeval": [
        {
            "key": 1,
            "prompt": "Write it in lower case, of kites.",
            "instruction_id_list": ["change_case:english_lowercase", "keywords:existence"],
            "kwargs": [{"keywords": None}, {"keywords": ["kite"]}],
        }
    ],
}
REPLIES = {
    "gsm8k": "#### {a}",
    "ifeval": "a kite",
    "math": "so \\boxed{{0.5}}",
    "aime24": "It is 204.",
    "mmlu": "The answer is (C).",
}


def write_rows(folder: Path, name: str, stem: str = "test", rows: Any = None) -> Path:
    path = folder / name / f"{stem}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(json.dumps(row) for row in rows or ROWS[name]))
    return path


@pytest.mark.parametrize("name", ROWS)
def test_every_format_is_read_asked_and_graded(name: str, tmp_path: Path) -> None:
    file = write_rows(tmp_path, name)
    tasks = load_benchmark(name, data=tmp_path)
    assert tasks == load_benchmark(name, data=file) == load_benchmark(name, data=file.parent)
    assert len(tasks) == len(ROWS[name]) and len({t.id for t in tasks}) == len(tasks)
    for task in tasks:
        assert (
            task.domain == name
            and task.reward == FORMATS[name].reward
            and "{" not in task.messages[-1]["content"].replace("{}", "")
        )
        reply = REPLIES.get(name, "The answer is {a}.").format(a=task.answer)
        for text, value in ((reply, 1.0), ("", 0.0), ("THE ANSWER IS Z 999", 0.0)):
            score = get_reward(task.reward)(task, play(task, lambda _, t=text: t))
            assert isinstance(score, Score) and score.value == value, (text, score)


def test_choices_are_listed_and_gpqas_order_is_the_questions_own(tmp_path: Path) -> None:
    [task] = load_questions("gpqa", write_rows(tmp_path, "gpqa"))
    text = task.messages[-1]["content"]
    assert (
        f"{task.answer}. right" in text
        and all(f"wrong {i}" in text for i in (1, 2, 3))
        and task.metadata["choices"] == 4
    )
    [arc] = load_questions("arc", write_rows(tmp_path, "arc"))
    assert arc.answer == "B" and arc.metadata["choices"] == 3 and "C. r" in arc.messages[-1]["content"]


def test_shots_and_templates(tmp_path: Path) -> None:
    file = write_rows(tmp_path, "gsm8k")
    tasks = load_questions("gsm8k", file, shots=2, template="Q: {question}\nA:")
    assert len(tasks) == 2, "the rows shown are not asked"
    for task in tasks:
        assert [m["role"] for m in task.messages] == ["user", "assistant"] * 2 + ["user"]
        assert task.messages[1]["content"].endswith("#### 1") and task.messages[-1]["content"].startswith("Q: ")
    write_rows(tmp_path, "gsm8k", "train", [{"question": "train?", "answer": "#### 9"}])
    tasks = load_questions("gsm8k", file, shots=1)
    assert len(tasks) == 4 and tasks[0].messages[0]["content"].startswith("train?")
    for arguments, message in (
        ({"shots": 2}, "1 worked examples for 2 shots"),
        ({"template": "no place"}, r"has no \{question\}"),
        ({"path": tmp_path / "empty"}, "has no file below"),
    ):
        with pytest.raises(ValueError, match=message):
            load_questions("gsm8k", **{"path": file, **arguments})
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"question": "?", "choices": ["a"], "answer": "E"}')
    with pytest.raises(ValueError, match=r"bad\.jsonl:1: the gold letter is 'E'"):
        load_questions("mmlu", bad)
    with pytest.raises(ValueError, match="set shots to 0"):
        load_questions("ifeval", write_rows(tmp_path, "ifeval"), shots=1)


def test_whole_files_load() -> None:
    folder = os.environ.get("WINNOW_DATA")
    if not folder:
        pytest.skip("WINNOW_DATA names no folder of benchmark files")
    assert len(load_benchmark("gsm8k", data=folder)) == 1319 and len(load_benchmark("aime24", data=folder)) == 30
    assert len(load_benchmark("gsm8k", count=5, data=folder, shots=8)[0].messages) == 17


def test_every_benchmark_is_known_and_says_what_is_missing() -> None:
    assert set(FORMATS) <= set(BENCHMARKS) and {form.reward for form in FORMATS.values()} <= set(KNOWN_REWARDS)
    with pytest.raises(ValueError, match="give --data"):
        load_benchmark("math")


# ---------------------------------------------------------------------------------------------------------------------------- IFEval

INSTRUCTIONS: list[tuple[str, dict[str, Any], str, str]] = [
    ("keywords:existence", {"keywords": ["red", "kite"]}, "A red Kite.", "A redder kite."),
    ("keywords:forbidden_words", {"forbidden_words": ["red"]}, "A redder kite.", "So Red!"),
    ("keywords:frequency", {"keyword": "a", "frequency": 2, "relation": "at least"}, "a b A", "a b"),
    ("keywords:frequency", {"keyword": "a", "frequency": 2, "relation": "less than"}, "a b", "a b a"),
    ("keywords:letter_frequency", {"letter": "e", "let_frequency": 2, "let_relation": "at least"}, "Eel", "el"),
    ("language:response_language", {"language": "ru"}, "\u043f\u0440\u0438\u0432\u0435\u0442", "hello"),
    ("length_constraints:number_sentences", {"num_sentences": 2, "relation": "less than"}, "One only.", "One. Two."),
    ("length_constraints:number_paragraphs", {"num_paragraphs": 2}, "a\n***\nb", "a\n***\nb\n***\nc"),
    ("length_constraints:number_words", {"num_words": 3, "relation": "at least"}, "a b c", "a b"),
    (
        "length_constraints:nth_paragraph_first_word",
        {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "so"},
        "a\n\n*So* it is",
        "so\n\na",
    ),
    ("detectable_content:number_placeholders", {"num_placeholders": 2}, "[a] and [b]", "[a]"),
    ("detectable_content:postscript", {"postscript_marker": "P.S."}, "Hi\nP.S. more", "Hi PS"),
    ("detectable_format:number_bullet_lists", {"num_bullets": 2}, "* a\n* b", "* a\n* b\n* c"),
    ("detectable_format:constrained_response", {}, "My answer is yes.", "Yes."),
    ("detectable_format:number_highlighted_sections", {"num_highlights": 2}, "*a* and **b**", "*a*"),
    (
        "detectable_format:multiple_sections",
        {"section_spliter": "SECTION", "num_sections": 2},
        "SECTION 1\na\nSECTION 2\nb",
        "SECTION 1",
    ),
    ("detectable_format:json_format", {}, '```json\n{"a": 1}\n```', "{a: 1}"),
    ("detectable_format:title", {}, "<<A title>>\ntext", "<< >> text"),
    ("combination:two_responses", {}, "one\n******\ntwo", "one\n******\none"),
    ("combination:repeat_prompt", {"prompt_to_repeat": "Say it."}, "Say it. I do.", "I do."),
    ("startend:end_checker", {"end_phrase": "The end."}, "So. THE END.", "The end. No"),
    ("startend:quotation", {}, '"quoted"', '"half'),
    (
        "change_case:capital_word_frequency",
        {"capital_frequency": 2, "capital_relation": "at least"},
        "A BIG kite",
        "a BIG kite",
    ),
    ("change_case:english_capital", {}, "ALL BIG", "Not all"),
    ("change_case:english_lowercase", {}, "all small", "Not all"),
    ("punctuation:no_comma", {}, "none here", "one, here"),
]


@pytest.mark.parametrize(("name", "arguments", "right", "wrong"), INSTRUCTIONS)
def test_instructions(name: str, arguments: dict, right: str, wrong: str) -> None:
    assert follows(right, name, arguments) and not follows(wrong, name, arguments) and not follows(" ", name, arguments)


def test_every_instruction_is_tested_and_the_score_tells_strict_from_loose() -> None:
    assert {name for name, *_ in INSTRUCTIONS} == set(CHECKS) and len(CHECKS) == 25
    wanted = [["change_case:english_lowercase", {}], ["keywords:existence", {"keywords": ["kite"]}]]
    task = Task(
        id="t",
        domain="d",
        messages=({"role": "user", "content": "?"},),
        reward="ifeval",
        metadata={"instructions": wanted},
    )
    score = ifeval(task, play(task, lambda _: "Sure! Here it is:\na kite"))
    assert (
        score.value == 0.5
        and score.parts["all"] == 0
        and score.parts["loose"] == 1
        and score.parts["keywords:existence"] == 1
    )
    with pytest.raises(ValueError, match="'shout' is unknown"):
        follows("a", "shout", {})
    with pytest.raises(ValueError, match="has no argument 'keywords'"):
        follows("a", "keywords:existence", {})


# -------------------------------------------------------------------------------------------------------------------------- evaluation


class Sampler:
    """A Generate that counts what it samples and stops after `limit` groups, as a killed process would."""

    def __init__(self, limit: int = 10**6) -> None:
        self.limit, self.asked = limit, []

    def __call__(self, requests: Sequence[Request]) -> Iterator[Group]:
        for request in reversed(requests):
            if len(self.asked) == self.limit:
                raise KeyboardInterrupt
            self.asked.append(request.request_id)
            answers = [str(int(request.task.answer or 0) + (n >= 2)) + " so" * n for n in range(request.num_samples)]
            made = [play(request.task, lambda _, a=a: a, 1, request.request_id, n) for n, a in enumerate(answers)]
            yield Group(request=request, trajectories=tuple(made))


def test_an_interrupted_evaluation_goes_on_where_it_stopped(tmp_path: Path) -> None:
    requests = make_requests(generate_tasks("addition", count=10, split="heldout"), samples=4, temperature=1.0)
    file = tmp_path / "answers.jsonl"
    with pytest.raises(KeyboardInterrupt):
        evaluate(Sampler(6), requests, answers=file, model="m")
    with partial_file(file).open("a") as stream:
        stream.write('{"request": "eval/0", "finger')  # cut short by the crash
    second = Sampler()
    result = evaluate(second, requests, answers=file, model="m")["reasoning"]
    assert sorted(second.asked) == [f"eval/{n}" for n in range(4)], "six of ten were kept"
    assert not partial_file(file).exists()
    whole = evaluate(Sampler(), requests, answers=tmp_path / "other.jsonl", model="m")["reasoning"]
    assert result == whole and file.read_text() == (tmp_path / "other.jsonl").read_text()
    with pytest.raises(KeyboardInterrupt):
        evaluate(Sampler(6), requests, answers=file, model="m")
    other = Sampler()
    evaluate(other, requests, answers=file, model="another model")
    assert len(other.asked) == 10, "samples of another model are none of this one's"


def test_pass_at_k_lengths_and_parts_are_in_the_result() -> None:
    requests = make_requests(generate_tasks("addition", count=10, split="heldout"), samples=4, temperature=1.0)
    result = evaluate(Sampler(), requests)["reasoning"]
    assert result.mean == 0.5 and result.pass_at["1"][0] == pytest.approx(0.5) and result.pass_at["4"][0] == 1
    assert (
        result.pass_at["2"][0] == pytest.approx(1 - 1 / 6)
        and result.pass_at["2"][1] <= 1 - 1 / 6 <= result.pass_at["2"][2]
    )
    assert [share for _, _, share in result.by_length] == [1, 1, 0, 0] and sum(n for _, n, _ in result.by_length) == 40
    assert len({longest for longest, _, _ in result.by_length}) == len(result.by_length), (
        "samples of one length are together"
    )
    assert result.parts == {"right": 0.5, "answered": 1.0} and result.failure_kinds == {}
    text = details({"reasoning": result})
    assert "solved by tokens" in text and "pass@2 0.833" in table({"reasoning": result})
