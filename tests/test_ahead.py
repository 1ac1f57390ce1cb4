"""Decode steps that are launched before the one under way has landed: the same tokens, whatever happens in between."""

import numpy as np
import pytest
import torch
from test_decoding import GPU, TOP_K, VOCAB, make_engine, make_model

from winnow.rollout.schema import Sampling

pytestmark = [pytest.mark.gpu] if GPU else []


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def pair(**changes):
    """An engine that decodes at fixed shapes, and therefore ahead, and one that does neither."""
    return make_engine(make_model(), True, True, **changes), make_engine(make_model(), False, False, **changes)


def prompts(count=6, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, VOCAB, int(n)).tolist() for n in rng.integers(2, 30, count)]


def landed(engine):
    """Counts the steps that were launched ahead, and the rows of them that counted for nothing."""
    seen = {"ahead": 0, "wasted": 0}
    launch, land = engine._launch_ahead, engine._land

    def counted_launch(flight):
        made = launch(flight)
        seen["ahead"] += made is not None
        return made

    def counted_land():
        flight = engine._flight
        seen["wasted"] += flight.alive.count(False)
        return land()

    engine._launch_ahead, engine._land = counted_launch, counted_land
    return seen


def check(ahead, plain, drive, samples=True):
    """`drive(engine)` gives sequences: equal tokens, log-probabilities and versions."""
    left, right = drive(ahead), drive(plain)
    assert len(left) == len(right) > 0
    for one, other in zip(left, right, strict=True):
        assert (one.tokens, one.versions, one.finish) == (other.tokens, other.versions, other.finish)
        np.testing.assert_allclose(one.logprobs, other.logprobs, atol=1e-4)
    for engine in (ahead, plain):
        assert not engine.scheduler.live and engine.cache.num_free == engine.cache.num_pages


def run_out(engine, sequences):
    while engine.has_work:
        for sequence in engine.step():
            engine.release(sequence)
    return sequences


def test_steps_are_launched_ahead_while_nobody_waits():
    ahead, plain = pair()
    seen = landed(ahead)
    check(ahead, plain, lambda e: [s for g in e.generate(prompts(), Sampling(max_tokens=20, seed=2), 2) for s in g])
    steps = ahead.stats["decode_steps"]
    assert steps - 8 <= seen["ahead"] < steps, (seen, steps)  # all but the first of each shape
    assert seen["wasted"] == 0  # the ends of turns by their length are known
    assert ahead.stats["decode_tokens"] == plain.stats["decode_tokens"]


def test_ends_that_nobody_foresaw_cost_a_row_and_change_nothing():
    """Half of the tokens end a turn, so that most steps run for sequences that have ended meanwhile."""
    ahead, plain = pair()
    seen = landed(ahead)
    for engine in (ahead, plain):
        engine._ends, engine._end_ids = np.arange(0, VOCAB, 9), frozenset(range(0, VOCAB, 9))
    check(ahead, plain, lambda e: [s for g in e.generate(prompts(), Sampling(max_tokens=40, seed=4), 2) for s in g])
    assert seen["wasted"] > 3


def test_turns_that_go_on_after_an_end():
    """The token after an end was drawn already when the environment's answer is appended."""
    ahead, plain = pair()
    seen = landed(ahead)
    for engine in (ahead, plain):
        engine._ends, engine._end_ids = np.arange(0, VOCAB, 7), frozenset(range(0, VOCAB, 7))

    def drive(engine):
        made = [engine.add(p, Sampling(max_tokens=9, seed=1), 1, str(i))[0] for i, p in enumerate(prompts())]
        turns = dict.fromkeys(made, 0)
        while engine.has_work:
            for sequence in engine.step():
                turns[sequence] += 1
                if turns[sequence] < 4:
                    engine.extend(sequence, [turns[sequence], 5, 6])
                else:
                    engine.release(sequence)
        return made

    check(ahead, plain, drive)
    assert seen["wasted"] > 3 and seen["ahead"] > 3


def test_requests_that_come_between_two_steps_begin_with_the_next_but_one():
    ahead, plain = pair()

    def drive(engine):
        made = [engine.add(p, Sampling(max_tokens=30, seed=1), 2, str(i)) for i, p in enumerate(prompts(3))]
        for number, prompt in enumerate(prompts(3, seed=1)):
            for _ in range(5):
                for sequence in engine.step():
                    engine.release(sequence)
            made.append(engine.add(prompt, Sampling(max_tokens=12, seed=1), 1, f"late {number}"))
        late = made[-1][0]
        for _ in range(3):
            assert not [s for s in engine.step() if engine.release(s)]
        assert len(late.tokens) > late.turn_start, "a request waits for those that decode"
        return run_out(engine, [s for group in made for s in group])

    check(ahead, plain, drive)


@pytest.mark.parametrize("num_pages", [26, 31])
def test_a_crowded_cache_with_records(num_pages):
    """Pages run out, sequences are pushed out and prefilled again; the recorded sets are those of the tokens that counted."""
    ahead, plain = pair(record_indices=True, num_pages=num_pages)
    seen = landed(ahead)
    for engine in (ahead, plain):
        engine._ends, engine._end_ids = np.arange(0, VOCAB, 19), frozenset(range(0, VOCAB, 19))
    made = {}

    def drive(engine):
        each = [Sampling(max_tokens=50, seed=3)] * 6
        made[engine] = [s for g in engine.generate(prompts(), each, 2) for s in g]
        return made[engine]

    check(ahead, plain, drive)
    assert ahead.scheduler.preemptions > 0 and seen["ahead"] > 3 and seen["wasted"] > 0
    for one, other in zip(made[ahead], made[plain], strict=True):
        left, right = (s.index_record(TOP_K, ahead.layers, np.uint16).indices for s in (one, other))
        np.testing.assert_array_equal(left, right)


def test_weights_that_arrive_under_way_leave_no_token_of_the_old_ones():
    """The step under way was computed under the old weights: none of its tokens may carry the new version."""
    ahead, plain = pair()
    other = {name: tensor.clone() for name, tensor in make_model(seed=1).state_dict().items()}

    def drive(engine):
        made = [engine.add(p, Sampling(max_tokens=20, seed=7), 1, str(i))[0] for i, p in enumerate(prompts())]
        while len(made[-1].tokens) < made[-1].turn_start + 6:
            engine.step()
        engine.load_weights(other, 1)
        return run_out(engine, made)

    check(ahead, plain, drive)


def test_abort_score_and_pause_with_a_step_under_way():
    ahead, plain = pair()
    scores = {}

    def drive(engine):
        made = [engine.add(p, Sampling(max_tokens=20, seed=7), 1, str(i))[0] for i, p in enumerate(prompts())]
        while len(made[-1].tokens) < made[-1].turn_start + 6:
            engine.step()
        engine.pause()
        assert engine.step() == []
        scores[engine] = engine.score(prompts(1, seed=5)[0])
        engine.resume()
        engine.step()
        first = engine.abort()
        assert set(first) == set(made)
        again = engine.add(prompts(1)[0], Sampling(max_tokens=15, seed=8), 3, "again")
        return run_out(engine, [*made, *again])

    check(ahead, plain, drive)
    np.testing.assert_allclose(scores[ahead], scores[plain], atol=1e-4)


def test_an_error_under_way_does_not_stay():
    """The tokens of a step that failed are drawn again once the weights are whole."""
    model = make_model()
    engine = make_engine(model, True, True)
    [sequence] = engine.add(list(range(20)), Sampling(max_tokens=12, seed=1))
    whole = model.model.norm.weight.detach().clone()
    for _ in range(4):
        engine.step()
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    with pytest.raises(ValueError, match=r"NaN|not finite"):
        for _ in range(2):
            engine.step()
    with torch.no_grad():
        model.model.norm.weight.copy_(whole)
    run_out(engine, [sequence])
    [[want]] = make_engine(make_model(), False, False).generate(
        [list(range(20))], Sampling(max_tokens=12, seed=1), 1, [""]
    )
    assert sequence.tokens == want.tokens
