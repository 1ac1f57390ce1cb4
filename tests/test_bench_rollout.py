"""`winnow bench rollout --lengths`: every row names what was timed, and the figures fit together."""

import json
import sys
import time
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch

from winnow.rl import bench_parity
from winnow.rl.bench_models import random_model
from winnow.rl.bench_peer import read_peer
from winnow.rl.bench_suite import ratios
from winnow.rl.cli import main
from winnow.rollout.engine import Engine


def test_dense_and_sparse_rows_of_one_run(capsys):
    arguments = ["bench", "rollout", "--model", "tiny", "--lengths", "40", "90", "--batch", "3", "--seconds", "1"]
    assert main(arguments) == 0
    result = json.loads(capsys.readouterr().out)
    rows = result["figures"]["rows"]
    assert [row["row"] for row in rows] == ["dense 3x40", "sparse 3x40", "dense 3x90", "sparse 3x90"]
    for row in rows:
        assert row["k"] == 64 and row["steps"] >= 8 and row["step_ms"]["max"] >= row["step_ms"]["median"] > 0
        assert row["decode_tokens_per_s"] == pytest.approx(3e3 / row["step_ms"]["median"], rel=0.01)
    assert rows[2]["cache_bytes"] > rows[0]["cache_bytes"] > 0 and result["weight_bytes"] > 0 and result["load_s"] > 0


def test_an_unknown_shape_is_refused(capsys):
    assert main(["bench", "rollout", "--model", "no-such", "--lengths", "8"]) == 1
    assert "neither a model folder nor a shape: tiny, small" in capsys.readouterr().err


@pytest.mark.slow
def test_the_suite_measures_what_its_rows_say(capsys):
    arguments = ["bench", "rollout", "--model", "tiny", "--lengths", "96", "130", "--batch", "3", "--suite"]
    assert main([*arguments, "decode", "share", "prefill", "small", "exact"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith('{"engine"')]
    names = [(row["engine"], row["row"]) for row in rows]
    assert names[:5] == [(e, f"decode 3x{n}") for n in (96, 130) for e in ("sparse", "dense")] + [
        ("shared", "decode 3x96")
    ]
    assert names[5:] == [
        *[(e, f"prefill 1x{n}") for n in (96, 130) for e in ("sparse", "local", "dense")],
        *[(e, f"prefill 1x{n}") for n in (96, 130) for e in ("shared", "shared local")],
        ("sparse", "small 6x5"),
        ("fast", "parity"),
    ]
    for row in rows[:5]:
        assert row["steps"] >= 24 and row["tokens_per_s"] == pytest.approx(3e3 / row["ms"], rel=0.01)
    assert rows[-1]["past_k"] > 0.5 and rows[-1]["max_abs_logprob_difference"] < 1e-4
    assert main([*arguments, "decoed"]) == 1
    assert "the parts are decode, share" in capsys.readouterr().err


def test_ratios_divide_rows_of_one_name():
    rows = [
        {"engine": e, "row": "decode 2x8", "tokens_per_s": r}
        for e, r in (("sparse", 9.0), ("vllm", 3.0), ("shared", 18.0), ("exact", 8.1))
    ]
    assert ratios([*rows, {"engine": "vllm", "row": "x", "failed": "?"}]) == {
        "sparse / vllm, decode 2x8": 3.0,
        "shared / vllm, decode 2x8": 6.0,
        "exact / vllm, decode 2x8": 2.7,
        "shared / own indexers, decode 2x8": 2.0,
        "exact / fast, decode 2x8": 0.9,
    }


def tiny(**indexer):
    model = random_model(
        "tiny", None, torch.float32, "cpu", changes={"eos_token_id": None}, indexer_changes={"top_k": 8, **indexer}
    )
    with torch.no_grad():  # without this the replies are one token over and over
        for p in model.parameters():
            p.mul_(3.0 if p.ndim > 1 else 1.0)
    return model


def test_greedy_rows_count_replies_that_differ_before_a_near_tie():
    model, rng = tiny(), np.random.default_rng(0)
    prompts = [rng.integers(0, 1024, 20 + 3 * i).tolist() for i in range(3)]
    make = partial(Engine, model, None)
    given = bench_parity.token_by_token(model, prompts, 5)
    assert len({tuple(reply) for reply in given["tokens"]}) == 3 and all(
        gap >= 0 for gaps in given["gaps"] for gap in gaps
    )
    row = bench_parity.compare_greedy(make, given, "float32")
    assert (row["equal"], row["of"], row["row"]) == (3, 3, "greedy 3x5") and row["past_k"] > 0.5
    given["tokens"][1][2] ^= 1
    given["gaps"] = [[1.0] * 5] * 3
    row = bench_parity.compare_greedy(make, given, "float32")
    assert row["equal"] == 2 and row["first_differences"][0] == {"prompt": 1, "token": 2, "gap": 1.0}
    given["gaps"] = [[1.0, 1.0, 1e-4, 1.0, 1.0]] * 3  # as near as that, either token is right
    assert bench_parity.compare_greedy(make, given, "float32")["equal"] == 3


def test_record_rows_of_own_and_shared_indexers():
    prompt = np.random.default_rng(0).integers(0, 1024, 40).tolist()
    own = bench_parity.record_row(tiny(), prompt, 56)
    shared = bench_parity.record_row(tiny(leaders=(0,)), prompt, 56, 1)
    assert own["engine"] == "own" and shared["engine"] == "shared" and (own["indexers"], shared["indexers"]) == (2, 1)
    for row in (own, shared):
        assert row["sets"] == 2 * (56 - 1 - 8)
        assert row["share"] == pytest.approx(row["bytes_per_token_and_layer"] / (4 * 8), abs=2e-4)
    assert 0 < shared["share"] < 0.75 * own["share"] < 0.75  # the second layer's sets cost next to nothing


def test_parts_about_trained_models_want_a_folder_and_a_text(capsys, tmp_path):
    assert main(["bench", "rollout", "--model", "tiny", "--suite", "records"]) == 1
    assert "is about a trained model: --model 'tiny' is no folder" in capsys.readouterr().err
    assert main(["bench", "rollout", "--model", str(tmp_path), "--suite", "records"]) == 1
    assert "set --text FILE" in capsys.readouterr().err


ORPHAN = """
import json, os, sys, time
child = os.fork()
if child == 0:
    time.sleep(60)  # an engine's process: it keeps the output open
print("ROW", json.dumps({"row": "a", "pid": child}), flush=True)
print("a line of its log", flush=True)
print("ROW", json.dumps({"row": "b"}), flush=True)
how = sys.argv[1]
if how == "END":
    print("END", flush=True)
if how == "dies":
    os.kill(child, 9)
    raise SystemExit("out of memory")
os._exit(0)
"""


@pytest.mark.parametrize(
    ("how", "why"), [("END", None), ("dies", "exit code 1: out of memory"), ("silent", "stopped after 2 s")]
)
def test_a_peer_is_read_to_its_end_and_leaves_nothing_behind(tmp_path, how, why):
    """Its child outlives it with the output in its hands: neither do we wait for that, nor does it stay."""
    rows: list[dict[str, Any]] = []
    begin = time.monotonic()
    found = read_peer([sys.executable, "-c", ORPHAN, how], tmp_path / "log", 2 if how == "silent" else 50, rows.append)
    assert time.monotonic() - begin < 20
    assert (found or "").startswith(why or "") and (found is None) == (why is None)
    assert [row["row"] for row in rows] == ["a", "b"]
    deadline = time.monotonic() + 10
    while _alive(rows[0]["pid"]) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not _alive(rows[0]["pid"])


def _alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rsplit(")", 1)[1].split()[0] != "Z"  # nobody may be there to bury it
    except FileNotFoundError:
        return False
