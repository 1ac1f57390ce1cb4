"""The alignment domain: the judge's probabilities against a model's own, its failures, held-out checks, and the shaping terms."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from winnow.rewards.alignment import Shaping, repetition, shape
from winnow.rewards.baseline import play
from winnow.rewards.contract import grade, success
from winnow.rewards.judge import Judge, JudgedRubric, held_out_check
from winnow.rewards.registry import get_reward
from winnow.rollout.schema import Failure, Group, Request, Sampling, Score, Task

RUBRIC = (
    {"type": "use_word", "value": "kite", "weight": 1},
    {"question": "Is it polite?", "name": "polite", "weight": 3},
    {"question": "Is it short?", "weight": 1},
)


class Letters:
    """A tokenizer of single characters with a template."""

    chat_template, eos_token_id, all_special_ids = "letters", 1, (1,)

    def apply_chat_template(self, messages: list, tokenize: bool, add_generation_prompt: bool) -> str:
        return "".join(f"{m['role']}: {m['content']}\x01" for m in messages) + "assistant: " * add_generation_prompt

    def __call__(self, text: str, add_special_tokens: bool) -> dict[str, list[int]]:
        return {"input_ids": [ord(c) for c in text]}

    def decode(self, ids: list[int], skip_special_tokens: bool = False) -> str:
        return "".join(map(chr, ids))


def scorer(rule: Any) -> Any:
    """A `score` that gives the word after the last "assistant: " the log-probability rule(prompt, word), on its last token."""

    def score(sequences: list[list[int]]) -> list[np.ndarray]:
        out = []
        for tokens in sequences:
            prompt, word = "".join(map(chr, tokens)).rsplit("assistant: ", 1)
            row = np.full(len(tokens), -7.0, np.float32)
            row[-len(word) :] = 0
            row[-1] = rule(prompt, word)
            out.append(row)
        return out

    return score


def likes(word: str) -> Any:
    """Yes with 0.6, No with 0.2 (0.05 in other spelling) where the reply holds the word; the other way round elsewhere."""

    def rule(prompt: str, answer: str) -> float:
        reply = prompt.split("[Reply]\n")[1].split("\n\n[Criterion]")[0]
        big = (answer.lower() == "yes") == (word in reply)
        return float(np.log((0.6 if big else 0.2) if answer[0].isupper() else 0.05))

    return scorer(rule)


def task_for(rubric: Any = RUBRIC) -> Task:
    return Task(
        id="t",
        domain="d",
        messages=({"role": "user", "content": "Write of kites."},),
        reward="rubric",
        metadata={"rubric": rubric},
    )


def group_of(*replies: str, task: Task | None = None) -> Group:
    task = task or task_for()
    request = Request(request_id="r", task=task, num_samples=len(replies), sampling=Sampling(max_tokens=8))
    made = [play(task, lambda _, r=reply: r, request_id="r", sample=i) for i, reply in enumerate(replies)]
    return Group(request=request, trajectories=tuple(made))


def test_a_rubric_weighs_the_judge_beside_the_programmatic_criteria() -> None:
    judge = Judge(likes("please"), Letters())
    (graded,) = grade({"rubric": JudgedRubric(judge)}, [group_of("kite please", "kite now", "please")])
    yes, no = 0.65 / 0.9, 0.25 / 0.9
    assert [s.value for s in graded.scores] == pytest.approx([(1 + 4 * yes) / 5, (1 + 4 * no) / 5, 4 * yes / 5])
    assert graded.scores[0].parts == pytest.approx({"use_word": 1, "polite": yes, "judge": yes, "all": 1})
    assert [success(s) for s in graded.scores] == [1, 0, 0]


def test_the_engines_own_log_probabilities_are_what_it_reads() -> None:
    """A random model through `Engine.score`, against a softmax over the whole vocabulary computed here."""
    torch = pytest.importorskip("torch")
    from transformers import LlamaConfig, LlamaForCausalLM

    from winnow.rollout.engine import Engine, EngineConfig

    torch.manual_seed(0)
    shape_of = lambda: LlamaConfig(  # noqa: E731
        vocab_size=128, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=1024, initializer_range=0.3, eos_token_id=1, bos_token_id=None,
    )  # fmt: skip
    model = LlamaForCausalLM(shape_of()).eval()
    plain = LlamaForCausalLM(shape_of()).eval()
    plain.load_state_dict(model.state_dict())
    from winnow.models.attach import attach
    from winnow.models.indexer import IndexerConfig

    tokenizer = Letters()
    attached = attach(model, IndexerConfig(top_k=1024, num_heads=2, head_dim=16, rope_dim=8))
    engine = Engine(attached, tokenizer, EngineConfig(page_size=16, num_pages=80, max_batch=2))
    judge = Judge(lambda sequences: [engine.score(tokens) for tokens in sequences], tokenizer, min_mass=0.0)
    (verdict,) = judge.ask(task_for(), "kite", ["Is it short?"])
    prompt = judge.prompt(task_for(), "kite", "Is it short?")
    totals = []
    for word in ("Yes", "yes", "No", "no"):
        ids = [*prompt, *map(ord, word)]
        with torch.no_grad():
            logprobs = plain(torch.tensor([ids])).logits[0].log_softmax(-1)
        totals.append(float(sum(logprobs[i - 1, ids[i]] for i in range(len(prompt), len(ids)))))
    yes, no = np.exp(totals[0]) + np.exp(totals[1]), np.exp(totals[2]) + np.exp(totals[3])
    assert not isinstance(verdict, Failure)
    assert verdict.yes == pytest.approx(yes / (yes + no), rel=1e-3) and verdict.mass == pytest.approx(
        yes + no, rel=1e-3
    )


def broken(sequences: Any) -> Any:
    raise ValueError("the prompt is longer than the context")


@pytest.mark.parametrize(
    ("score", "detail"),
    [
        (broken, "longer than the context"),
        (scorer(lambda prompt, word: -30.0), "does not answer the question"),
        (scorer(lambda prompt, word: float("nan")), "does not answer the question"),
    ],
)
def test_a_judge_that_fails_is_no_zero(score: Any, detail: str) -> None:
    (graded,) = grade({"rubric": JudgedRubric(Judge(score, Letters(), "policy"))}, [group_of("kite", "please")])
    for verdict in graded.scores:
        assert isinstance(verdict, Failure) and verdict.kind == "judge" and detail in verdict.detail


def test_questions_without_a_judge_and_too_few_results_are_named() -> None:
    (graded,) = grade(get_reward, [group_of("kite")])
    assert isinstance(graded.scores[0], Failure) and "set judge.model" in graded.scores[0].detail
    with pytest.raises(ValueError, match="0 results for 8 sequences"):
        Judge(lambda sequences: [], Letters(), "policy").ask(task_for(), "kite", ["a?", "b?"])
    plain = task_for(RUBRIC[:1])
    judge = Judge(broken, Letters())  # never asked
    (graded,) = grade({"rubric": JudgedRubric(judge)}, [group_of("a kite", task=plain)])
    assert graded.scores[0] == Score(value=1.0, parts={"use_word": 1.0, "all": 1.0})


def test_a_long_reply_is_shown_to_the_judge_without_its_middle() -> None:
    judge = Judge(likes("x"), Letters())
    text = "".join(map(chr, judge.prompt(task_for(), "start" + "y" * 50_000 + "end", "q?")))
    assert len(text) < 22_000 and "start" in text and "end\n" in text and "[...]" in text


def test_the_held_out_judge_sees_a_policy_that_games_the_first_one() -> None:
    gamed, honest = Judge(likes("best"), Letters()), Judge(likes("good"), Letters())
    group = group_of("best kite", "best kite of all", "good best kite", "a good kite")
    (graded,) = grade({"rubric": JudgedRubric(gamed)}, [group])
    rows = [(group.request.task, t, s) for t, s in zip(graded.trajectories, graded.scores, strict=True)]
    found = held_out_check(honest, rows)
    assert (
        found["count"] == 8 and found["agreement"] == 0.25 and found["gap"] == pytest.approx(0.25 * 0.4 / 0.9, abs=1e-6)
    )
    assert held_out_check(gamed, rows)["gap"] == pytest.approx(0) and held_out_check(gamed, rows)["agreement"] == 1
    assert held_out_check(Judge(broken, Letters()), rows) == {"count": 0.0, "failures": 8.0}
    plain = [(task_for(RUBRIC[:1]), graded.trajectories[0], Score(value=1.0, parts={"use_word": 1.0}))]
    assert held_out_check(honest, plain) == {}


def test_shaping_terms_are_parts_and_failures_stay() -> None:
    assert repetition("a b c d e f g h") == 0 and repetition("a b") == 0
    assert repetition("a b c d " * 5) == pytest.approx(1 - 4 / 17)
    task = replace(task_for(), reward="number", answer="4", metadata={})
    group = group_of("it is 4", "a b c d " * 5 + "4", "\u044d\u0442\u043e 4", task=task)
    (graded,) = grade(get_reward, [group])
    graded = replace(graded, scores=(*graded.scores[:2], Failure(kind="timeout")))
    rule = Shaping(script="latin", language=0.5, repetition=0.5, token_budget=10, budget=1.0)
    (shaped,) = shape([graded], {"d": rule})
    fresh, repeated, failed = shaped.scores
    assert fresh.value == 1 and fresh.parts["language"] == 0 and success(fresh) == 1
    assert repeated.parts["repetition"] < -0.3 and repeated.parts["budget"] == -1.0 and success(repeated) == 1
    assert repeated.value == pytest.approx(
        1 + sum(repeated.parts[name] for name in ("language", "repetition", "budget"))
    )
    assert failed == Failure(kind="timeout")
    (shaped,) = shape(grade(get_reward, [group]), {"d": rule})
    assert shaped.scores[2].parts["language"] == -0.5, "all letters are Cyrillic"
    assert shape([graded], {}) == [graded] == shape([graded], {"d": Shaping()})
