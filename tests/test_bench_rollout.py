"""`winnow bench rollout --lengths`: every row names what was timed, and the figures fit together."""

import json

import pytest

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
