"""The engine against a token-by-token recompute with the learner's own forward pass, far beyond k."""

import contextlib

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from winnow.kernels.ops import token_logprobs
from winnow.models import attach as A
from winnow.models.context import train_context
from winnow.models.forward import hidden_states, lm_head_weight
from winnow.models.indexer import IndexerConfig
from winnow.rollout import records
from winnow.rollout.cache import OutOfPagesError, PagedCache
from winnow.rollout.engine import Engine, EngineConfig
from winnow.rollout.schema import Sampling
from winnow.rollout.weights import WeightError

TOP_K, VOCAB = 8, 61


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


class Letters:
    """Token i is the character 40 + i."""

    eos_token_id = None

    def decode(self, ids, skip_special_tokens=True):
        return "".join(chr(40 + int(i)) for i in ids)


def make_model(seed=0, sparse=True, **changes):
    torch.manual_seed(seed)
    shape = {
        "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 160, "eos_token_id": None, "bos_token_id": None,
        "pad_token_id": None, "tie_word_embeddings": True, "initializer_range": 0.2,
    }  # fmt: skip
    model = LlamaForCausalLM(LlamaConfig(**{**shape, **changes})).eval()
    if not sparse:
        A.use_winnow_attention(model)
        return model
    return A.attach(model, IndexerConfig(top_k=TOP_K, num_heads=2, head_dim=16, rope_dim=8))


def make_engine(model=None, **changes):
    config = EngineConfig(**{"page_size": 4, "num_pages": 200, "max_batch": 8, "prefill_chunk": 32, **changes})
    return Engine(model if model is not None else make_model(), Letters(), config)


def prompt_of(length, seed=0):
    return np.random.default_rng(seed).integers(0, VOCAB, length).tolist()


@torch.no_grad()
def recompute(model, tokens, out=None):
    """Logits [T, V] of the learner's forward pass over one whole sequence; `out` collects its selections."""
    hidden = hidden_states(model, torch.tensor(tokens), train_context([len(tokens)], selection_out=out))
    return hidden @ lm_head_weight(model).T


GREEDY = Sampling(max_tokens=30, temperature=0.0)


@pytest.mark.parametrize("sparse", [True, False])
@pytest.mark.parametrize("length", [TOP_K - 1, TOP_K, TOP_K + 1, 75])
def test_greedy_equals_token_by_token_recompute(length, sparse):
    model = make_model(sparse=sparse)
    prompt = prompt_of(length)
    [[sequence]] = make_engine(model).generate([prompt], GREEDY)
    tokens = list(prompt)
    for _ in range(30):
        tokens.append(int(recompute(model, tokens)[-1].argmax()))
    assert sequence.tokens == tokens and sequence.finish == "length"
    logprobs = recompute(model, tokens).log_softmax(-1)
    want = [float(logprobs[i - 1, tokens[i]]) for i in range(length, len(tokens))]
    np.testing.assert_allclose(sequence.logprobs[length:], want, atol=1e-4)
    assert sequence.logprobs[:length] == [0.0] * length and sequence.versions == [-1] * length + [0] * 30


def test_draws_do_not_depend_on_the_batch():
    prompts = [prompt_of(n, n) for n in (5, 30, 41, 70)]
    sampling = Sampling(max_tokens=20, temperature=0.9, top_p=0.95, seed=3)
    names = ["a", "b", "c", "d"]
    together = make_engine().generate(prompts, sampling, 3, names)
    for prompt, name, group in zip(prompts, names, together, strict=True):
        alone = make_engine(max_batch=1, prefill_chunk=7).generate([prompt], sampling, 3, [name])[0]
        assert [s.tokens for s in alone] == [s.tokens for s in group]
        for one, other in zip(alone, group, strict=True):
            np.testing.assert_allclose(one.logprobs, other.logprobs, atol=1e-4)
    assert len({tuple(s.tokens) for s in together[1]}) == 3  # samples differ from each other


@pytest.mark.parametrize("threads", [1, 2])
def test_a_sampled_tokens_logprob_is_the_learners_however_many_share_the_batch(threads):
    """Replies of very different lengths: the last steps decode a few rows, which a matrix library computes differently, and sharp
    attention (scores near 100) turns a difference in the last bits of q and k into one of 1e-5."""
    torch.set_num_threads(threads)
    model = make_model(hidden_size=128, intermediate_size=256, num_attention_heads=8, vocab_size=64)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.q_proj.weight.mul_(3)
    prompts = [prompt_of(5 + 7 * seed, seed) for seed in range(11)]
    budgets = [Sampling(max_tokens=3 + 7 * seed, seed=seed) for seed in range(11)]
    sequences = [s for group in make_engine(model, max_batch=12).generate(prompts, budgets) for s in group]
    tokens = torch.tensor([t for s in sequences for t in s.tokens])
    with torch.no_grad():
        hidden = hidden_states(model, tokens, train_context([len(s.tokens) for s in sequences]))
    start = 0
    for prompt, sequence in zip(prompts, sequences, strict=True):
        scored = slice(start + len(prompt) - 1, start + len(sequence.tokens) - 1)
        targets = torch.tensor(sequence.tokens[len(prompt) :])
        learner, _ = token_logprobs(hidden[scored], lm_head_weight(model), targets, 1.0, None)
        np.testing.assert_allclose(sequence.logprobs[len(prompt) :], learner.detach().numpy(), rtol=0, atol=1e-6)
        start += len(sequence.tokens)


def test_samples_of_one_prompt_share_its_prefill_and_equal_unshared_ones():
    prompt = prompt_of(42)
    sampling = Sampling(max_tokens=12)
    engine = make_engine(record_indices=True)
    [group] = engine.generate([prompt], sampling, 6, ["x"])
    assert engine.counters["prefill_tokens"] == 42
    assert engine.cache.num_free == engine.cache.num_pages
    for number, sequence in enumerate(group):
        alone = make_engine(record_indices=True)
        [other] = alone.add(prompt, sampling, 1, "x", first_sample=number)
        while alone.has_work:
            alone.step()
        assert other.tokens == sequence.tokens
        np.testing.assert_array_equal(
            other.index_record(TOP_K, (0, 1), np.uint16).indices,
            sequence.index_record(TOP_K, (0, 1), np.uint16).indices,
        )


@pytest.mark.parametrize("selector", ["indexer", "random", "recent"])
def test_index_records_equal_the_learners_own_selections(selector):
    model = make_model()
    prompt = prompt_of(50)
    engine = make_engine(model, record_indices=True, prefill_chunk=17, selector=selector)
    [[sequence]] = engine.generate([prompt], Sampling(max_tokens=25, seed=1))
    record = sequence.index_record(engine.index_k, engine.layers, engine.record_dtype)
    assert record.indices.dtype == np.uint16 and record.indices.shape == (2, 75 - 1 - TOP_K, TOP_K)
    again = {}
    with torch.no_grad():
        context = train_context([75], selection_out=again, selector=selector)
        hidden_states(model, torch.tensor(sequence.tokens), context)
    decoded = records.decode([record], [75])
    for layer in (0, 1):
        assert torch.equal(decoded[layer].indices[:-1], again[layer].indices[:-1])  # the last token was never a query
        assert torch.equal(decoded[layer].counts, again[layer].counts)
    encoded = records.encode(again, 75)
    np.testing.assert_array_equal(encoded.indices, record.indices)


def test_bad_records_are_refused():
    model = make_model()
    engine = make_engine(model, record_indices=True)
    [[sequence]] = engine.generate([prompt_of(20)], Sampling(max_tokens=10))
    record = sequence.index_record(TOP_K, (0, 1), np.uint16)

    def changed(edit):
        indices = record.indices.copy()
        edit(indices)
        return type(record)(first=TOP_K, k=TOP_K, layers=(0, 1), indices=indices)

    with pytest.raises(ValueError, match="layer 1, position 10 names a position after"):
        records.decode([changed(lambda x: x.__setitem__((1, 2, -1), 29))], [30])
    with pytest.raises(ValueError, match="layer 0, position 8 is not ascending"):
        records.decode([changed(lambda x: x.__setitem__((0, 0, 1), x[0, 0, 0]))], [30])
    with pytest.raises(ValueError, match="padding before its end"):
        records.decode([changed(lambda x: x.__setitem__((0, 0, 1), 65535))], [30])
    with pytest.raises(ValueError, match="21 rows, 31 tokens need 22"):
        records.decode([record], [31])
    with pytest.raises(ValueError, match="but no record"):
        records.decode([record, None], [30, 12])
    short = records.decode([record, None], [30, 5])[0]
    assert short.indices[-1].tolist() == [0, 1, 2, 3, 4, -1, -1, -1] and short.counts[-1] == 5
    assert records.jaccard(short, short).min() == 1


def test_stop_texts_end_tokens_and_budgets():
    engine = make_engine()
    prompt = prompt_of(12)
    [[free]] = engine.generate([prompt], Sampling(max_tokens=20, seed=5))
    text = Letters().decode(free.reply_ids)
    stop = text[6:9]
    [[stopped]] = make_engine().generate([prompt], Sampling(max_tokens=20, seed=5, stop=("never\n", stop)))
    assert stopped.finish == "stop" and stopped.tokens == free.tokens[: 12 + text.index(stop) + 3]
    end = Engine(make_model(), Letters(), engine.config, end_ids=[free.tokens[15]])
    [[ended]] = end.generate([prompt], Sampling(max_tokens=20, seed=5))
    assert ended.finish == "stop" and ended.tokens == free.tokens[: free.tokens.index(free.tokens[15], 12) + 1]
    [[full]] = engine.generate([prompt_of(157)], Sampling(max_tokens=20))
    assert full.finish == "length" and len(full.tokens) == 160  # the context


def test_a_crowded_cache_preempts_and_changes_nothing():
    prompts = [prompt_of(20 + i, i) for i in range(6)]
    sampling = Sampling(max_tokens=40, seed=2)
    roomy = make_engine(record_indices=True)
    tight = make_engine(record_indices=True, num_pages=24, prefill_chunk=9)
    want = roomy.generate(prompts, sampling, 2)
    got = tight.generate(prompts, sampling, 2)
    assert tight.scheduler.preemptions > 0 and tight.cache.num_free == 24
    for a, b in zip((s for g in want for s in g), (s for g in got for s in g), strict=True):
        assert a.tokens == b.tokens
        left, right = (s.index_record(TOP_K, (0, 1), np.uint16).indices for s in (a, b))
        np.testing.assert_array_equal(left, right)


def test_new_weights_take_effect_at_once_and_by_version():
    model, other = make_model(), make_model(seed=1)
    prompt = prompt_of(40)
    engine = make_engine(model)
    [sequence] = engine.add(prompt, GREEDY)
    for _ in range(10):
        engine.step()
    drawn = len(sequence.tokens)
    new = {name: tensor.clone() for name, tensor in other.state_dict().items()}
    engine.load_weights(new, 7)
    while engine.has_work:
        engine.step()
    assert sequence.versions[40:drawn] == [0] * (drawn - 40) and set(sequence.versions[drawn:]) == {7}
    tokens = sequence.tokens[:drawn]
    for _ in range(30 - (drawn - 40)):  # no key of the old weights is read any more
        tokens.append(int(recompute(other, tokens)[-1].argmax()))
    assert sequence.tokens == tokens
    engine.release(sequence)
    [[again]] = engine.generate([prompt], GREEDY)
    assert again.tokens != make_engine(make_model()).generate([prompt], GREEDY)[0][0].tokens


def test_one_indexer_tensor_changes_the_selections():
    model = make_model()
    engine = make_engine(model, record_indices=True)
    [[before]] = engine.generate([prompt_of(60)], GREEDY)
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    name = next(n for n in weights if "layers.0" in n and "indexer.wq" in n)
    weights[name] = torch.randn(weights[name].shape, generator=torch.Generator().manual_seed(4))
    engine.load_weights(weights, 1)
    [[after]] = engine.generate([prompt_of(60)], GREEDY)
    left, right = (s.index_record(TOP_K, (0, 1), np.uint16).indices[:, : 59 - TOP_K] for s in (before, after))
    assert (left[0] != right[0]).any()


def test_an_update_that_does_not_fit_is_refused_by_name_and_changes_nothing():
    model = make_model()
    engine = make_engine(model)
    state = {name: tensor.clone() + 1 for name, tensor in model.state_dict().items()}
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    last = next(n for n in reversed(state) if "indexer" in n)
    with pytest.raises(WeightError, match=f"no tensor for '{last}'"):
        engine.load_weights({n: t for n, t in state.items() if n != last}, 1)
    with pytest.raises(WeightError, match=r"no tensor 'model\.extra'"):
        engine.load_weights({**state, "model.extra": torch.zeros(1)}, 1)
    with pytest.raises(WeightError, match=f"'{last}' has shape"):
        engine.load_weights({**state, last: torch.zeros(3, 3)}, 1)
    assert engine.version == 0 and all(torch.equal(before[n], t) for n, t in model.state_dict().items())


def test_scoring_agrees_with_what_was_sampled():
    engine = make_engine()
    [[sequence]] = engine.generate([prompt_of(33)], Sampling(max_tokens=20, temperature=0.8))
    scored = engine.score(sequence.tokens, 0.8)
    np.testing.assert_allclose(scored[33:], sequence.logprobs[33:], atol=1e-4)
    assert engine.cache.num_free == engine.cache.num_pages


def test_extending_a_turn_keeps_the_cache():
    engine = make_engine()
    [sequence] = engine.add(prompt_of(30), Sampling(max_tokens=6, temperature=0.0), max_total_tokens=60)
    while sequence.finish is None:
        engine.step()
    engine.extend(sequence, prompt_of(9, 4))
    prefilled = engine.counters["prefill_tokens"]
    while sequence.finish is None:
        engine.step()
    assert engine.counters["prefill_tokens"] - prefilled == 10  # the last drawn token and nine given ones
    assert sequence.turn_start == 45 and len(sequence.reply_ids) == 6
    logits = recompute(engine.model, sequence.tokens)
    assert [int(i) for i in logits[44:50].argmax(-1)] == list(sequence.reply_ids)
    with pytest.raises(ValueError, match="no room"):
        engine.extend(sequence, prompt_of(9))


def test_bad_input():
    engine = make_engine(num_pages=20)
    with pytest.raises(ValueError, match="empty prompt"):
        engine.generate([[]], GREEDY)
    with pytest.raises(ValueError, match=r"prompt of 160 tokens, but the context is 160"):
        engine.generate([prompt_of(160)], GREEDY)
    with pytest.raises(ValueError, match=f"token id {VOCAB}, outside"):
        engine.generate([[1, VOCAB]], GREEDY)
    with pytest.raises(ValueError, match=r"takes 25 cache pages .* set rollout\.num_pages >= 25"):
        engine.generate([prompt_of(70)], GREEDY)
    with pytest.raises(ValueError, match="max_total_tokens is 10"):
        engine.add(prompt_of(12), GREEDY, 1, "r", 10)
    with pytest.raises(ValueError, match=r"rollout\.max_batch is 0"):
        EngineConfig(max_batch=0)
    assert not engine.has_work and engine.cache.num_free == 20


def test_cache_pages():
    cache = PagedCache(num_layers=2, num_pages=3, page_size=2, num_kv_heads=1, head_dim=2, index_dim=3)
    pages = cache.allocate(2)
    cache.k[1][pages[0]] = 5.0
    cache.share(pages[:1])
    [copy] = cache.allocate(1)
    cache.copy([pages[0]], [copy])
    assert (cache.k[1][copy] == 5).all() and (cache.k[0][copy] == 0).all() and cache.num_free == 0
    with pytest.raises(OutOfPagesError):
        cache.allocate(1)
    cache.free(pages)
    assert cache.num_free == 1  # the shared one is still held
    cache.free(pages[:1])
    assert cache.num_free == 2
    with pytest.raises(AssertionError, match="freed twice"):
        cache.free(pages[:1])


def test_a_score_noted_in_a_prefill_is_raised_before_its_pages_serve_anybody(monkeypatch):
    """On a GPU nobody waits in a layer: the pass looks once, at its end. A decode step's flag is its graph's, read elsewhere."""
    from winnow.models import forward
    from winnow.models.context import ForwardContext

    monkeypatch.setattr(forward, "inference_states", lambda model, ids, ctx: torch.zeros(len(ids), 4))
    ends = torch.tensor([0, 3], dtype=torch.int32)
    given = {
        "positions": torch.arange(3),
        "cu_seqlens": ends,
        "seq_lens": ends[1:],
        "block_table": ends,
        "slot_mapping": ends,
        "cache": ends,
    }
    for mode, value, heard in (("prefill", 1, True), ("prefill", 0, False), ("decode", 1, False)):
        faults = torch.tensor([value], dtype=torch.int32)
        ctx = ForwardContext(mode=mode, faults=faults, fused=True, **given)
        with pytest.raises(ValueError, match="NaN") if heard else contextlib.nullcontext():
            forward.hidden_states(None, torch.zeros(3, dtype=torch.int64), ctx)
