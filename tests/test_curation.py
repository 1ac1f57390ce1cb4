"""Curation with planted cases: near copies, leaked benchmarks, difficulty, diversity, balance; shards that resume and name their damage."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from random import Random

import numpy as np
import pytest

from winnow.distill.card import data_card
from winnow.distill.contamination import Contamination
from winnow.distill.data import Row, Sampled
from winnow.distill.selection import Rules, balanced, choose, limited
from winnow.distill.shards import Shards, read_shard
from winnow.distill.similarity import NearIndex, jaccard, shingles, signature, words
from winnow.distill.store import read_rows, write_rows

WORDS = [f"w{number}" for number in range(400)]


def text(rng: Random, length: int = 60) -> str:
    return " ".join(rng.choice(WORDS) for _ in range(length))


def row_of(prompt: str, reply: str, reward: float = 1.0, domain: str = "d", request: str = "r", sample: int = 0) -> Row:
    from winnow.distill.data import conversation_id

    messages = ({"role": "user", "content": prompt}, {"role": "assistant", "content": reply})
    return Row(
        id=conversation_id(messages), domain=domain, task_id="t", messages=messages, prompt_messages=1, reward=reward, specialist="s",
        checkpoint="c", config_hash="h", policy_version=3, seed=1, request_id=request, sample=sample, turns=1,
        num_tokens=len(prompt.split()) + len(reply.split()), num_generated=len(reply.split()), tokenizer="abc",
    )  # fmt: skip


def sampled_of(prompt: str, replies: list[tuple[str, float]], request: str, domain: str = "d") -> Sampled:
    rows = tuple(row_of(prompt, reply, reward, domain, request, i) for i, (reply, reward) in enumerate(replies))
    n = len(rows)
    return Sampled(
        request_id=request, prompt=prompt, domain=domain, rows=rows, finish_reasons=("stop",) * n, failures=(None,) * n
    )


# ------------------------------------------------------------------------------------------------------------------------- similarity


def test_words_fold_case_spacing_and_punctuation_but_keep_the_sum() -> None:
    assert words("What  is 7 + 5?\n") == words("what is 7 +5") != words("What is 7 - 5?")
    assert words("\uff17 apples") == ["7", "apples"]


def test_signatures_estimate_the_similarity() -> None:
    rng = Random(0)
    for share in (0.3, 0.6, 0.9):
        common = [rng.getrandbits(32) for _ in range(int(400 * share))]
        one, other = (frozenset([*common, *(rng.getrandbits(32) for _ in range(400 - len(common)))]) for _ in range(2))
        agree = float(np.mean(signature(one) == signature(other)))
        assert abs(agree - jaccard(one, other)) < 4 * (0.25 / 128) ** 0.5


def test_a_planted_near_copy_is_found_among_many_and_nothing_else() -> None:
    rng = Random(1)
    texts = [text(rng) for _ in range(300)]
    index = NearIndex(0.8)
    for number, one in enumerate(texts):
        assert index.nearest(shingles(words(one))) is None
        index.add(str(number), shingles(words(one)))
    copy = texts[123].upper().replace("W", "w").split()
    copy[-1] = "other"  # one word of sixty
    name, likeness = index.nearest(shingles(words(" ".join(copy)))) or ("", 0.0)
    assert name == "123" and 0.9 < likeness < 1
    half = texts[123].split()[:30] + text(rng, 30).split()
    assert index.nearest(shingles(words(" ".join(half)))) is None
    with pytest.raises(ValueError, match="threshold is 0"):
        NearIndex(0)


# ---------------------------------------------------------------------------------------------------------------------- contamination


def test_planted_leaks_are_found_and_templates_are_not() -> None:
    rng = Random(2)
    template = (
        "solve the following problem step by step and put the final answer in a box at the very end of your reply"
    )
    items = [f"{template} {text(rng, 30)}" for _ in range(50)]
    bench = Contamination()
    bench.add("bench", items)
    leaked = items[17].removeprefix(template)
    assert (
        found := bench.find(f"Please help me! {leaked.upper().replace('W', 'w')} Thanks.")
    ) and found.benchmark == "bench"
    assert found.item.startswith(items[17][:40]) and found.overlap > 0.5
    assert (whole := bench.find(items[3].replace(" ", "  "))) and whole.overlap == 1
    assert bench.find(f"{template} {text(rng, 30)}") is None, "the template alone is no leak"
    assert bench.find(" ".join(leaked.split()[:14])) is None, "two runs of thirty words are less than half of them"
    assert all(bench.find(text(rng, 80)) is None for _ in range(50))


def test_short_items_leak_whole_and_the_shortest_only_alone() -> None:
    bench = Contamination()
    bench.add("sums", ["What is 7 + 5 of course?", "7 + 5?"])
    assert bench.find("Tell me: what is 7 + 5 of course") and bench.find("7 + 5")
    assert bench.find("what is 7 + 6 of course") is None and bench.find("is 7 + 5 prime and why") is None
    exact = Contamination()
    exact.add("held-out", ["a b c d e f g h i j k l m n"], exact=True)
    assert exact.find("A b c d e f g h i j k l m n!") and exact.find("a b c d e f g h i j k l m n o") is None
    with pytest.raises(ValueError, match="ngram is 3"):
        Contamination(ngram=3)


def test_leaking_rows_are_counted_and_many_of_them_refused() -> None:
    rng = Random(3)
    prompts = [text(rng, 40) for _ in range(30)]
    sampled = [sampled_of(p, [("yes", 1.0), ("no", 0.0)], f"r{i}") for i, p in enumerate(prompts)]
    bench = Contamination()
    bench.add("gsm", [prompts[4]])
    rows, summary = choose(sampled, "s", Rules(), bench)
    assert len(rows) == 29 and prompts[4] not in {row.messages[0]["content"] for row in rows}
    assert summary.contaminated == {"d": {"gsm": 1}} and summary.dropped["d"]["contaminated"] == 1
    bench.add("math", prompts[5:9])
    with pytest.raises(
        ValueError, match=r"domain 'd': 5 of 30 verified prompts stand in a benchmark.*'gsm': 1, 'math': 4"
    ):
        choose(sampled, "s", Rules(), bench)
    assert len(choose(sampled, "s", Rules(max_contaminated=0.5), bench)[0]) == 25


# -------------------------------------------------------------------------------------------------------------------------- selection


def test_near_replies_of_one_prompt_and_near_prompts_are_dropped() -> None:
    rng = Random(4)
    prompt, reply, other = text(rng, 40), text(rng, 60), text(rng, 60)
    copy = " ".join([*reply.split()[:-1], "end"])
    sampled = [sampled_of(prompt, [(reply, 1.0), (copy, 1.0), (other, 1.0)], "r0")]
    rows, summary = choose(sampled, "s", Rules(best=3, near=0.8))
    assert {row.messages[-1]["content"] for row in rows} == {
        min(reply, copy, key=lambda r: row_of(prompt, r).id),
        other,
    }
    assert summary.dropped == {"d": {"near_duplicate": 1}}
    assert len(choose(sampled, "s", Rules(best=3))[0]) == 3, "off by default"
    twin = " ".join([*prompt.split()[:-1], "end"])
    rows, summary = choose([sampled_of(p, [(reply, 1.0)], p) for p in (prompt, twin)], "s", Rules(near=0.8))
    assert len(rows) == 1 and summary.dropped == {"d": {"near_duplicate": 1}}


def test_diverse_replies_and_what_a_row_says_of_its_choice() -> None:
    reply = "one two three four five six seven eight nine ten"
    close, far = reply.replace("ten", "end more"), "something else entirely was said here and it was right after all"
    sampled = [sampled_of("p", [(reply, 1.0), (close, 1.0), (far, 1.0), ("bad", 0.0)], "r0")]
    best, _ = choose(sampled, "s", Rules())
    diverse, _ = choose(sampled, "s", Rules(diverse=True))
    assert [r.messages[-1]["content"] for r in best] == [reply, close]
    assert [r.messages[-1]["content"] for r in diverse] == [reply, far]
    assert dict(diverse[1].selection) == {"samples": 4, "passed": 3, "pass_rate": 0.75, "rank": 1, "alike": 0.0}
    assert best[1].selection["alike"] > 0.5


def test_difficulty_and_limits_and_balance() -> None:
    sampled = [
        sampled_of(
            f"prompt {i}", [(f"reply {i} {j}", float(j < passed)) for j in range(4)], f"r{i}", "a" if i < 30 else "b"
        )
        for i, passed in enumerate([4] * 10 + [2] * 10 + [1] * 10 + [4] * 5)
    ]
    a_only = sampled[:30]
    rows, summary = choose(a_only, "s", Rules(max_pass_rate=0.9, min_pass_rate=0.3, best=1))
    assert len(rows) == 10 and summary.dropped["a"] == {"low_reward": 50, "too_easy": 40, "too_hard": 10, "surplus": 10}
    assert summary.difficulty["a"] == [0, 10, 10, 0, 10]
    rows, summary = choose(sampled, "s", Rules(limit=12))
    a = [row for row in rows if row.domain == "a"]
    assert len(a) == 12 and len({row.messages[0]["content"] for row in a}) == 12, "every prompt once before any twice"
    assert sorted(row.selection["pass_rate"] for row in a) == [0.25] * 4 + [0.5] * 4 + [1.0] * 4, "difficulties in turn"
    assert summary.dropped["a"]["over_limit"] == 38
    for seed in range(3):
        assert choose(Random(seed).sample(sampled, 35), "s", Rules(limit=12))[0] == rows
    everything = choose(sampled, "s", Rules())[0]
    even = balanced(everything)
    assert {d: sum(r.domain == d for r in even) for d in "ab"} == {"a": 10, "b": 10}
    assert limited(everything, 1000) == everything and balanced([]) == []


@pytest.mark.parametrize("wrong", [{"best": 0}, {"near": 0}, {"min_pass_rate": 0.9, "max_pass_rate": 0.1}])
def test_rules_that_keep_nothing_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong)).split("_")[0]):
        Rules(**wrong)  # type: ignore[arg-type]


# ----------------------------------------------------------------------------------------------------------------------------- shards


def test_shards_resume_and_hold_every_sample(tmp_path: Path) -> None:
    first = [sampled_of(f"p{i}", [("yes", 1.0), ("no", 0.0)], f"r{i}") for i in range(3)]
    failed = replace(first[2], request_id="r9", rows=(None, first[2].rows[1]), failures=("timeout", None))
    shards = Shards(tmp_path / "s")
    shards.add(first)
    shards.add([failed])
    again = Shards(tmp_path / "s")
    assert again.sampled == [*first, failed] and again.done == {"r0", "r1", "r2", "r9"}
    with pytest.raises(ValueError, match="were sampled before"):
        again.add(first[:1])
    (tmp_path / "s" / ".00002.jsonl.77").write_text("{")  # what a kill leaves
    assert len(Shards(tmp_path / "s").sampled) == 4
    again.files[1].replace(tmp_path / "s" / "00007.jsonl")
    assert Shards(tmp_path / "s").add([sampled_of("q", [("a", 1.0)], "q")]).name == "00008.jsonl"


def test_a_damaged_shard_is_named(tmp_path: Path) -> None:
    shards = Shards(tmp_path / "s")
    path = shards.add([sampled_of(f"p{i}", [("yes", 1.0)], f"r{i}") for i in range(3)])
    good = path.read_bytes()
    lines = good.splitlines(keepends=True)
    for bad in (good[:-5], good.replace(b'"yes"', b'"nay"', 1), b"".join(lines[1:]), b"".join(lines[:-1]), b""):
        path.write_bytes(bad)
        with pytest.raises(ValueError, match=r"shard .*00000\.jsonl is damaged: .*Delete it"):
            read_shard(path)
    path.write_bytes(good.replace(b'"format": 1', b'"format": 9', 1))
    with pytest.raises(ValueError, match="has format 9"):
        Shards(tmp_path / "s")
    path.write_bytes(good)
    (path.parent / "00001.jsonl").write_bytes(good)
    with pytest.raises(ValueError, match="r0 is in two shards"):
        Shards(tmp_path / "s")


# ------------------------------------------------------------------------------------------------------------------------------ files


def test_card_and_tables_hold_the_counts_and_open_elsewhere(tmp_path: Path) -> None:
    sampled = [sampled_of(f"p{i}", [(f"yes {i}", 1.0), ("no", float(i > 3))], f"r{i}") for i in range(6)]
    rows, summary = choose(sampled, "s", Rules(best=1))
    path = write_rows(rows, tmp_path, "d", summary)
    assert read_rows(path) == rows
    card = (tmp_path / "d.card.md").read_text()
    assert card == data_card(rows, summary, "d") and "| d | 12 | 66.7% | 6 | 6 | low_reward 4, surplus 2 |" in card
    assert "| s | c | h | abc | 6 |" in card and "40-60 %  " + "#" * 30 + " 4" in card
    assert json.loads((tmp_path / "d.summary.json").read_text())["difficulty"] == {"d": [0, 0, 4, 0, 2]}
    pandas = pytest.importorskip("pandas", reason="pandas is not installed")
    table = pandas.read_parquet(tmp_path / "d.parquet")
    assert list(table["id"]) == [row.id for row in rows] and set(table["tokenizer"]) == {"abc"}
    assert [s["pass_rate"] for s in table["selection"]] == [row.selection["pass_rate"] for row in rows]
