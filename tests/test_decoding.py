"""Decode steps at fixed shapes, as CUDA graphs run them, against the engine's plain path: here without capture, and on a GPU with it."""

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

from winnow.models import attach as A
from winnow.models import inference, joined
from winnow.models.indexer import IndexerConfig
from winnow.rollout.engine import Engine, EngineConfig
from winnow.rollout.schema import Sampling

TOP_K, VOCAB = 8, 61
GPU = torch.cuda.is_available()
pytestmark = [pytest.mark.gpu] if GPU else []
DEVICE = "cuda" if GPU else "cpu"
FAMILIES = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
}


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def make_model(family="qwen3", sparse=True, leaders=(), seed=0):
    torch.manual_seed(seed)
    config_class, model_class = FAMILIES[family]
    shape = {
        "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "head_dim": 16,
        "num_key_value_heads": 2, "max_position_embeddings": 256, "eos_token_id": None, "bos_token_id": None, "pad_token_id": None,
        "tie_word_embeddings": True, "initializer_range": 0.2,
    }  # fmt: skip
    model = model_class(config_class(**shape)).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "norm" in name or "bias" in name:  # ones and zeros would hide a mistake
                p.uniform_(0.5, 1.5)
    if sparse:
        A.attach(model, IndexerConfig(top_k=TOP_K, num_heads=2, head_dim=16, rope_dim=8, leaders=leaders))
    else:
        A.use_winnow_attention(model)
    return model.to(DEVICE)


def make_engine(model, static, fused=None, **changes):
    """static: decode at fixed shapes; fused: through `models/inference.py` also where there is no GPU."""
    config = EngineConfig(
        **{"page_size": 4, "num_pages": 300, "max_batch": 12, "prefill_chunk": 32, "cuda_graphs": static, **changes}
    )
    engine = Engine(model, None, config)
    if fused is not None:
        engine.forward.fused = fused
        if fused:
            joined.join(model)
    if static and not GPU:
        engine.decoding = engine.static_decoding(capture=False)
    assert (engine.decoding is not None) == static
    if static:
        engine.decoding.patience = 0  # every shape at once
    return engine


SHORT, LONG = (3, TOP_K - 2, 5), (20, 41, TOP_K, 2, 5, 13, 70)


def prompts_and_budgets(lengths=LONG, budget=24):
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, VOCAB, n).tolist() for n in lengths]
    return prompts, [2 + (7 * i) % budget for i in range(len(prompts))]


def compare(engines, sampling, samples=1, lengths=LONG):
    prompts, budgets = prompts_and_budgets(lengths)
    each = [Sampling(**{**sampling, "max_tokens": budget}) for budget in budgets]
    groups = [[s for group in engine.generate(prompts, each, samples) for s in group] for engine in engines]
    for one, other in zip(*groups, strict=True):
        assert one.tokens == other.tokens
        np.testing.assert_allclose(one.logprobs, other.logprobs, atol=1e-4)
        assert len(one.kept) == len(other.kept)
    return groups


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize(
    "sampling", [{"temperature": 0.0}, {"temperature": 0.9, "seed": 3}, {"temperature": 0.8, "top_p": 0.9, "seed": 1}]
)
def test_fixed_shapes_draw_what_the_plain_path_draws(family, sampling):
    """Lengths cross k, the batch grows and shrinks through several buckets, rows are filled up; with and without filters."""
    plain, static = make_engine(make_model(family), False, False), make_engine(make_model(family), True, True)
    for lengths in (LONG, SHORT):
        compare((plain, static), sampling, 2, lengths)
    shapes = static.decoding._steps
    assert len({shape.rows for shape in shapes}) > 2, shapes
    assert {shape.capacity for shape in shapes} >= {TOP_K, 4 * TOP_K, 64, 128}, shapes
    assert all(shape.draws == ("top_p" not in sampling) for shape in shapes)
    assert static.cache.num_free == static.cache.num_pages


def test_a_shape_is_captured_once_it_was_asked_for_often_and_until_then_a_larger_one_does():
    """Three ends of a batch that shrinks one by one: its small shapes come when they have been wanted for 6 steps."""
    plain, static = make_engine(make_model(), False, False), make_engine(make_model(), True, True)
    decoding, ran = static.decoding, []
    decoding.patience = 6
    prepare, launch = decoding._prepare, decoding.launch
    captures = []  # (whether a larger one was there, how often it had been asked for)

    def prepared(shape):
        larger = [
            o for o in decoding._steps if o.rows >= shape.rows and shape.capacity <= o.capacity <= 4 * shape.capacity
        ]
        captures.append((bool(larger), decoding._asked[shape]))
        return prepare(shape)

    def launched(*args):
        step = launch(*args)
        if step is not None:
            ran.append((len(args[1]), step.shape.rows, int(args[2].max()), step.shape.capacity))
        return step

    decoding._prepare, decoding.launch = prepared, launched
    for _ in range(3):
        compare((plain, static), {"temperature": 0.9, "seed": 3}, 1, (5,) * 7)
    assert all(count <= rows and longest <= capacity for count, rows, longest, capacity in ran)
    assert {asked > 6 for larger, asked in captures if larger} == {True}, captures
    assert {larger for larger, _ in captures} == {True, False}


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("leaders", [(), (0, 2)])
def test_records_of_fixed_shapes_equal_those_of_the_plain_path(fused, leaders):
    models = [make_model(leaders=leaders) for _ in range(2)]
    plain = make_engine(models[0], False, False, record_indices=True)
    static = make_engine(models[1], True, fused, record_indices=True, num_pages=26)  # crowded: slots change hands
    for one, other in zip(*compare((plain, static), {"temperature": 1.0, "seed": 5}, samples=2), strict=True):
        left, right = (s.index_record(TOP_K, plain.layers, np.uint16).indices for s in (one, other))
        np.testing.assert_array_equal(left, right)
    assert static.scheduler.preemptions > 0
    assert any(shape.records for shape in static.decoding._steps)


def test_dense_models_and_selectors_decode_at_fixed_shapes():
    compare(
        (make_engine(make_model(sparse=False), False, False), make_engine(make_model(sparse=False), True, True)),
        {"temperature": 0.0},
    )
    compare(
        (
            make_engine(make_model(), False, False, selector="dense"),
            make_engine(make_model(), True, True, selector="dense"),
        ),
        {"temperature": 0.0},
    )


def test_an_update_keeps_the_addresses_that_graphs_hold_and_takes_effect():
    model, other = make_model(), make_model(seed=1)
    engine = make_engine(model, True, True)
    places = {name: p.data_ptr() for name, p in model.named_parameters()}
    prompt = prompts_and_budgets()[0][1]
    greedy = Sampling(max_tokens=12, temperature=0.0)
    [[before]] = engine.generate([prompt], greedy)
    engine.load_weights({name: tensor.clone() for name, tensor in other.state_dict().items()}, 1)
    assert places == {name: p.data_ptr() for name, p in model.named_parameters()}
    [[after]] = engine.generate([prompt], greedy)
    [[want]] = make_engine(other, False, False).generate([prompt], greedy)
    assert after.tokens == want.tokens != before.tokens


def test_joined_weights_are_one_product_and_keep_their_values():
    model = make_model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    attention = model.model.layers[0].self_attn
    linears = [attention.q_proj, attention.k_proj, attention.v_proj]
    assert joined.whole([linear.weight for linear in linears]) is None
    joined.join(model)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    whole = joined.whole([linear.weight for linear in linears])
    assert whole is not None and torch.equal(whole, torch.cat([linear.weight for linear in linears]))
    assert joined.whole([attention.q_proj.weight, attention.v_proj.weight]) is None


@pytest.mark.parametrize("name", ["indexer.wq.weight", "norm.weight"])
def test_numbers_that_are_not_finite_are_refused(name):
    model = make_model()
    engine = make_engine(model, True, True)
    sequence = engine.add(list(range(20)), Sampling(max_tokens=30))[0]
    for _ in range(3):
        engine.step()
    with torch.no_grad():
        [p for key, p in model.named_parameters() if key.endswith(name)][-1].fill_(float("nan"))
    with pytest.raises(ValueError, match=r"NaN|not finite"):
        for _ in range(2):  # the first takes in a step that was launched before
            engine.step()
    engine.release(sequence)


def test_models_that_the_fused_pass_does_not_know():
    assert inference.takes(make_model())
    model = make_model("llama")
    model.config.hidden_act = "gelu"
    assert not inference.takes(model)
    model = make_model("llama")
    model.model.rotary_emb.rope_type = "dynamic"  # angles that depend on the longest position
    assert not inference.takes(model)
