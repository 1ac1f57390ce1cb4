"""What an earlier request left in the cache: found by its tokens, with its records, and never after a weight update."""

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from winnow.models import attach as A
from winnow.models.context import train_context
from winnow.models.forward import hidden_states, lm_head_weight
from winnow.models.indexer import IndexerConfig
from winnow.rollout import records
from winnow.rollout.cache import PagedCache
from winnow.rollout.engine import Engine, EngineConfig
from winnow.rollout.schema import Sampling

TOP_K, VOCAB = 8, 61
GREEDY, SHORT = Sampling(max_tokens=30, temperature=0.0), Sampling(max_tokens=8, temperature=0.0)


def make_model(seed=0, sparse=True):
    torch.manual_seed(seed)
    shape = LlamaConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=160, eos_token_id=None, bos_token_id=None, pad_token_id=None, initializer_range=0.2,
    )  # fmt: skip
    model = LlamaForCausalLM(shape).eval()
    if not sparse:
        A.use_winnow_attention(model)
        return model
    return A.attach(model, IndexerConfig(top_k=TOP_K, num_heads=2, head_dim=16, rope_dim=8))


def make_engine(model=None, **changes):
    config = EngineConfig(**{"page_size": 4, "num_pages": 200, "max_batch": 8, "prefill_chunk": 32, **changes})
    return Engine(model if model is not None else make_model(), None, config)


def prompt_of(length, seed=0):
    return np.random.default_rng(seed).integers(0, VOCAB, length).tolist()


@torch.no_grad()
def recompute(model, tokens, out):
    """Logits [T, V] of the learner's forward pass over one whole sequence; `out` collects its selections."""
    hidden = hidden_states(model, torch.tensor(tokens), train_context([len(tokens)], selection_out=out))
    return hidden @ lm_head_weight(model).T


def sets_of(engine, sequence):
    return records.decode(
        [sequence.index_record(engine.index_k, engine.layers, engine.record_dtype)], [len(sequence.tokens)]
    )


def check_against_the_learner(engine, sequence):
    """The tokens are greedy, and every recorded set is what the learner's own forward pass selects."""
    again = {}
    logits = recompute(engine.model, sequence.tokens, again)
    start = sequence.turn_start
    assert logits[start - 1 : -1].argmax(-1).tolist() == list(sequence.reply_ids)
    for layer, found in sets_of(engine, sequence).items():
        assert torch.equal(found.indices[:-1], again[layer].indices[:-1])
        assert torch.equal(found.counts[:-1], again[layer].counts[:-1])


def test_a_second_request_starts_behind_what_the_first_left():
    engine = make_engine(record_indices=True)
    first, second = prompt_of(42), prompt_of(42)[:30] + prompt_of(15, 9)
    [[one]] = engine.generate([first], GREEDY)
    assert engine.stats["prefill_tokens"] == 42 and engine.stats["reused_tokens"] == 0
    [[two]] = engine.generate([second], GREEDY)
    assert engine.stats["reused_tokens"] == 28 and engine.stats["prefill_tokens"] == 42 + 45 - 28  # pages of 4
    [[again]] = engine.generate([first], GREEDY)
    assert engine.stats["reused_tokens"] == 28 + 40  # 42 // 4 pages, and the last tokens for their logits
    assert again.tokens == one.tokens and again.records[0][0].base is None
    for sequence in (two, again):
        fresh = make_engine(record_indices=True)
        [[want]] = fresh.generate([sequence.tokens[: sequence.turn_start]], GREEDY)
        assert sequence.tokens == want.tokens
        np.testing.assert_allclose(sequence.logprobs, want.logprobs, atol=1e-5)
        left, right = (sets_of(engine, s) for s in (sequence, want))
        assert all(torch.equal(left[layer].indices, right[layer].indices) for layer in left)
    check_against_the_learner(engine, two)


def test_a_finished_turn_is_a_prefix_too():
    """Another request that holds the first one's prompt and reply: the pages that decode wrote, and the sets it chose, are used."""
    engine = make_engine(record_indices=True)
    [[one]] = engine.generate([prompt_of(21)], GREEDY)
    assert len(one.tokens) == 51
    longer = one.tokens + prompt_of(6, 3)
    [[two]] = engine.generate([longer], Sampling(max_tokens=9, temperature=0.0))
    assert engine.stats["reused_tokens"] == 48  # 50 tokens were cached: the last one drawn was never a query
    check_against_the_learner(engine, two)
    whole = [[[*longer, 1]], [longer[:48]]]  # exactly whole pages: the last page is prefilled again, for its logits
    for prompts in whole:
        before = engine.stats["prefill_tokens"]
        [[more]] = engine.generate(prompts, Sampling(max_tokens=5, temperature=0.0))
        assert engine.stats["prefill_tokens"] - before == len(prompts[0]) - (len(prompts[0]) - 1) // 4 * 4
        check_against_the_learner(engine, more)


def test_a_weight_update_leaves_no_page_of_the_old_policy():
    """The same prompt is answered as a fresh engine with the new weights answers it, at once, though everything of it was cached."""
    prompt = prompt_of(60)
    engine = make_engine(make_model(), record_indices=True)
    [[old]] = engine.generate([prompt], GREEDY)
    [running] = engine.add(prompt, GREEDY, 1, "r")  # holds old pages while the update comes
    for _ in range(4):
        engine.step()
    reused = engine.stats["reused_tokens"]
    assert reused == 56
    new = {name: tensor.clone() for name, tensor in make_model(seed=1).state_dict().items()}
    engine.load_weights(new, 1)
    assert not engine.cache._page_of and not engine.cache._kept
    while engine.has_work:
        engine.step()
    engine.release(running)
    [[after]] = engine.generate([prompt], GREEDY, request_ids=["z"])
    [[fresh]] = make_engine(make_model(seed=1), record_indices=True).generate([prompt], GREEDY)
    assert after.tokens == fresh.tokens != old.tokens and set(after.versions[60:]) == {1}
    assert engine.stats["reused_tokens"] >= reused + 56, "what the running sample left under the new weights is used"
    check_against_the_learner(engine, after)


def test_kept_pages_never_stand_in_the_way_and_the_oldest_go_first():
    engine = make_engine(num_pages=20, record_indices=True)
    prompts = [prompt_of(30, seed) for seed in range(5)]
    for prompt in prompts:
        [[sequence]] = engine.generate([prompt], SHORT)
    check_against_the_learner(engine, sequence)
    assert engine.cache.num_free == 20 and engine.scheduler.preemptions == 0
    assert len(engine.cache._page_of) == len(engine.cache._key_of) <= 20 and set(engine.cache._records) <= set(
        engine.cache._key_of
    )
    before = engine.stats["reused_tokens"]
    engine.generate([prompts[-1]], SHORT)
    assert engine.stats["reused_tokens"] == before + 28
    engine.generate([prompts[0]], SHORT)
    assert engine.stats["reused_tokens"] == before + 28, "reclaimed long ago"


def test_a_crowded_cache_with_common_prefixes_changes_nothing():
    common = prompt_of(24)
    prompts = [common[: 8 + 4 * (i % 5)] + prompt_of(9 + i, i) for i in range(5)]
    sampling = Sampling(max_tokens=24, seed=2)
    plain = make_engine(record_indices=True, reuse_prefixes=False)
    tight = make_engine(record_indices=True, num_pages=22, prefill_chunk=9)
    assert plain.stats["reused_tokens"] == 0
    for _ in range(2):  # the second time over what the first left
        want, got = (engine.generate(prompts, sampling, 2) for engine in (plain, tight))
        for a, b in zip((s for g in want for s in g), (s for g in got for s in g), strict=True):
            assert a.tokens == b.tokens
            left, right = (s.index_record(TOP_K, (0, 1), np.uint16).indices for s in (a, b))
            np.testing.assert_array_equal(left, right)
    assert tight.scheduler.preemptions > 0 and tight.stats["reused_tokens"] > 0 and tight.cache.num_free == 22
    assert not plain.cache._page_of and plain.stats["reused_tokens"] == 0


def test_sets_that_are_still_on_their_way_are_waited_for_before_a_page_takes_them():
    """Steps at fixed shapes copy their sets later: a sample that is pushed out just then publishes complete ones all the same."""
    engine = make_engine(record_indices=True)
    engine.decoding = engine.static_decoding(capture=False)
    [sequence] = engine.add(prompt_of(21), GREEDY)
    while sequence.num_cached != 32:
        engine.step()
    assert engine.decoding._copying is not None, "the last step's sets have not arrived"
    engine.scheduler._evict(sequence)
    again = {}
    recompute(engine.model, sequence.tokens, again)
    page = engine.cache._page_of[sequence.keys[7]]  # positions 28 to 31, the last of them just drawn
    for layer, found in enumerate(engine.cache._records[page]["records"].astype(np.int32)):
        assert found.tolist() == again[layer].indices[28:32].tolist()


def test_published_pages_of_the_cache():
    cache = PagedCache(num_layers=1, num_pages=3, page_size=2, num_kv_heads=1, head_dim=2)
    keys = cache.extend_keys([], [5, 6, 7, 8, 9], 2)
    assert keys == cache.extend_keys(keys[:1], [5, 6, 7, 8], 2) and keys[1] != cache.extend_keys([], [7, 8], 1)[0]
    with pytest.raises(AssertionError, match="page 2 is not full"):
        cache.extend_keys(keys, [5, 6, 7, 8, 9], 3)
    pages = cache.allocate(2)
    assert cache.publish(keys[0], pages[0]) and cache.publish(keys[1], pages[1], {"records": np.ones((1, 2, 1))})
    cache.free(pages)
    assert cache.num_free == 3
    found, notes = cache.match(keys)
    assert found == pages and len(notes) == 1 and cache.num_free == 1
    [other] = cache.allocate(1)
    assert not cache.publish(keys[0], other), "the first of equals is found"
    cache.free([*found, other])
    cache.allocate(2)  # the free page, and the end of the prefix
    assert cache.match(keys) == ([pages[0]], [])
    with pytest.raises(AssertionError, match="is free and cannot be published"):
        cache.free([pages[0]])
        cache.publish(b"x", pages[0])
    cache.forget()
    assert cache.match(keys) == ([], []) and cache.num_free == 1


def test_records_of_published_pages_are_bounded():
    """Where they have no room the pages are not reused, and every record is complete all the same."""
    roomy, tight = make_engine(record_indices=True), make_engine(record_indices=True)
    tight.cache._record_limit = 40 * TOP_K * 2 * 2  # 40 rows of 2 layers, uint16
    for prompt in [prompt_of(42), prompt_of(50, 1), prompt_of(42), prompt_of(42)]:
        want, got = (engine.generate([prompt], SHORT)[0][0] for engine in (roomy, tight))
        assert want.tokens == got.tokens
        left, right = (sets_of(tight, sequence) for sequence in (want, got))
        assert all(torch.equal(left[layer].indices, right[layer].indices) for layer in left)
        held = sum(array.nbytes for record in tight.cache._records.values() for array in record.values())
        assert held == tight.cache._record_bytes <= tight.cache._record_limit
    assert 0 < tight.stats["reused_tokens"] < roomy.stats["reused_tokens"] and tight.cache.num_free == 200


def test_pause_resume_drain_and_abort():
    engine = make_engine(max_batch=2)
    engine.pause()
    early = engine.add(prompt_of(20), GREEDY, 1, "a")
    assert engine.step() == [] and not engine.has_work and early[0].tokens == prompt_of(20)
    engine.resume()
    for _ in range(5):
        engine.step()
    late = engine.add(prompt_of(25, 1), GREEDY, 3, "b")
    engine.step()  # one of them gets the second slot
    engine.drain()
    assert not engine.drained and len(engine.scheduler.started) == 2
    while engine.has_work:
        for sequence in engine.step():
            engine.release(sequence)
    begun = [s for s in [*early, *late] if len(s.versions) > s.turn_start or s.finish]
    assert engine.drained and len(begun) == 2 and {s.finish for s in begun} == {"length"}
    new = {name: tensor.clone() for name, tensor in make_model(seed=1).state_dict().items()}
    engine.load_weights(new, 1)
    assert engine.step() == []
    engine.resume()
    while engine.has_work:
        for sequence in engine.step():
            engine.release(sequence)
    stamps = [set(s.versions[s.turn_start :]) for s in [*early, *late]]
    assert [len(s) for s in stamps] == [1] * 4 and stamps.count({0}) == 2 and stamps.count({1}) == 2
    [held] = engine.add(prompt_of(20), GREEDY)
    engine.step()
    drawn = len(held.tokens)
    assert engine.abort() == [held] and held.finish == "abort" and len(held.tokens) == drawn
    assert not engine.has_work and engine.cache.num_free == engine.cache.num_pages
    with pytest.raises(ValueError, match="on_update is 'drop', but it must be one of recompute, drain"):
        EngineConfig(on_update="drop")


def test_a_dense_model_reuses_prefixes_without_records():
    engine = make_engine(make_model(sparse=False), record_indices=True)
    [[one]] = engine.generate([prompt_of(40)], GREEDY)
    [[two]] = engine.generate([prompt_of(40)], GREEDY)
    assert engine.stats["reused_tokens"] == 36 and one.tokens == two.tokens and not engine.cache._records
