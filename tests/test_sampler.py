"""Draws: their distribution, their kept sets, their log-probabilities, and their independence of the batch."""

import numpy as np
import pytest
import torch

from winnow.rollout.sampler import RowParams, sample, stream_seed, uniforms


def params(rows, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, stream=None, position=None):
    def full(value, dtype):
        return np.broadcast_to(np.asarray(value, dtype=dtype), (rows,)).copy()

    return RowParams(
        temperature=full(temperature, np.float32),
        top_k=full(top_k, np.int64),
        top_p=full(top_p, np.float32),
        min_p=full(min_p, np.float32),
        stream=full(7 if stream is None else stream, np.uint64),
        position=full(np.arange(rows) if position is None else position, np.int64),
    )


def kept_by_definition(logits, temperature, top_k, top_p, min_p):
    """The filters spelled out on one row, in fp64: the sorted ids that stay and their renormalised probabilities."""
    p = np.exp((logits / temperature).astype(np.float64))
    p /= p.sum()
    keep = np.ones(len(p), dtype=bool)
    if top_k:
        keep &= p >= np.sort(p)[-min(top_k, len(p))]
    if top_p < 1:
        q = np.where(keep, p, 0) / p[keep].sum()
        order = np.argsort(-q, kind="stable")
        before = np.cumsum(q[order]) - q[order]
        keep &= q >= q[order][before < top_p].min()
    if min_p:
        keep &= p >= min_p * p.max()
    return np.flatnonzero(keep), p[keep] / p[keep].sum()


FILTERS = [
    {"temperature": 0.7},
    {"top_k": 5},
    {"top_p": 0.8},
    {"min_p": 0.2},
    {"temperature": 1.7, "top_k": 9, "top_p": 0.7, "min_p": 0.05},
]


@pytest.mark.parametrize("options", FILTERS)
def test_distribution_and_kept_set(options):
    logits = torch.randn(13, generator=torch.Generator().manual_seed(2)) * 1.5
    everything = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, **options}
    ids, probabilities = kept_by_definition(logits.numpy(), **everything)
    rows = 20_000
    drawn = sample(logits.expand(rows, -1), params(rows, **options))
    counts = np.bincount(drawn.tokens, minlength=13)
    assert counts.sum() == counts[ids].sum() == rows
    np.testing.assert_allclose(counts[ids] / rows, probabilities, atol=5 * 0.5 / rows**0.5)
    want = dict(zip(ids.tolist(), np.log(probabilities), strict=True))
    np.testing.assert_allclose(drawn.logprobs[:50], [want[t] for t in drawn.tokens[:50].tolist()], atol=1e-5)
    if set(options) == {"temperature"}:
        assert drawn.kept is None
    else:
        assert drawn.kept is not None and all(np.array_equal(k, ids) for k in drawn.kept[:50])


def test_filters_match_their_definition_on_a_large_vocabulary():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(6, 5000, generator=generator)
    logits[3] = (logits[3] * 2).round()  # plateaus of ties
    logits[4] = 0.0  # one plateau: nothing can be cut
    options = [
        (1.0, 0, 0.9, 0.0),
        (0.5, 50, 0.9, 0.0),
        (1.0, 3000, 0.999, 0.0),
        (1.0, 10, 0.5, 0.0),
        (1.0, 3, 0.3, 0.5),
        (2.0, 0, 1.0, 0.3),
    ]
    t, k, p, m = (np.array(column) for column in zip(*options, strict=True))
    drawn = sample(logits, params(6, t, k, p, m))
    assert drawn.kept is not None
    for row in range(6):
        ids, _ = kept_by_definition(logits[row].numpy(), *options[row])
        got = drawn.kept[row]
        assert (
            got is not None and abs(len(set(got.tolist()) ^ set(ids.tolist()))) <= 1
        )  # fp32 mass against fp64 at the boundary
        assert drawn.tokens[row] in got


def test_a_row_does_not_depend_on_its_batch():
    logits = torch.randn(9, 300, generator=torch.Generator().manual_seed(1))
    temperature = np.array([0, 1, 0.3, 1, 1, 2, 1, 0, 1.0])
    top_k = np.array([0, 0, 7, 0, 20, 0, 0, 5, 0])
    top_p = np.array([1, 1, 1, 0.5, 0.9, 1, 1, 1, 1.0])
    stream = np.arange(9) * 1000
    together = sample(logits, params(9, temperature, top_k, top_p, 0.0, stream, np.full(9, 4)))
    for row in range(9):
        alone = sample(logits[row : row + 1], params(1, temperature[row], top_k[row], top_p[row], 0.0, stream[row], 4))
        assert alone.tokens[0] == together.tokens[row]
        np.testing.assert_allclose(alone.logprobs[0], together.logprobs[row], atol=1e-6)


def test_greedy_takes_the_first_maximum_and_scores_it_at_temperature_one():
    logits = torch.tensor([[1.0, 3.0, 3.0, 0.0]])
    drawn = sample(logits, params(1, temperature=0.0, top_k=1))
    assert drawn.tokens[0] == 1 and drawn.kept is None
    np.testing.assert_allclose(drawn.logprobs[0], float(logits.log_softmax(1)[0, 1]), rtol=1e-6)


def test_impossible_tokens_are_never_drawn():
    logits = torch.full((2000, 8), -torch.inf)
    logits[:, 3] = 0.0
    assert set(sample(logits, params(2000)).tokens) == {3}
    with pytest.raises(ValueError, match="row 1 peak at nan"):
        sample(torch.tensor([[0.0, 1.0], [torch.nan, 0.0]]), params(2))


def test_uniforms_are_uniform_and_counted():
    values = uniforms(np.full(100_000, stream_seed(0, "r", 1), dtype=np.uint64), np.arange(100_000))
    assert values.min() >= 0 and values.max() < 1
    assert np.abs(np.histogram(values, 20, (0, 1))[0] - 5000).max() < 350
    assert abs(np.corrcoef(values[:-1], values[1:])[0, 1]) < 0.02
    assert len({stream_seed(0, "r", 1), stream_seed(1, "r", 1), stream_seed(0, "r", 2), stream_seed(0, "s", 1)}) == 4
