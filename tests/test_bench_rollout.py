"""`winnow bench rollout --lengths`: every row names what was timed, and the figures fit together."""

import json

import pytest

from winnow.rl.bench_suite import ratios
from winnow.rl.cli import main


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


def test_the_suite_measures_what_its_rows_say(capsys):
    arguments = ["bench", "rollout", "--model", "tiny", "--lengths", "96", "130", "--batch", "3", "--suite"]
    assert main([*arguments, "decode", "share", "prefill", "small", "exact"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith('{"engine"')]
    names = [(row["engine"], row["row"]) for row in rows]
    assert names[:5] == [(e, f"decode 3x{n}") for n in (96, 130) for e in ("sparse", "dense")] + [
        ("shared", "decode 3x96")
    ]
    assert names[5:] == [
        *[(e, f"prefill 1x{n}") for n in (96, 130) for e in ("sparse", "dense")],
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
        for e, r in (("sparse", 9.0), ("vllm", 3.0), ("shared", 18.0))
    ]
    assert ratios([*rows, {"engine": "vllm", "row": "x", "failed": "?"}]) == {
        "sparse / vllm, decode 2x8": 3.0,
        "shared / own indexers, decode 2x8": 2.0,
    }
