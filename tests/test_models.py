"""DSA inside Hugging Face models: the three modes against one another, gradients, folders, refusals. See also test_families.py."""

import threading
from types import SimpleNamespace

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from winnow.kernels.packing import on_host
from winnow.kernels.selection import Selection
from winnow.models import attach as A
from winnow.models import load as L
from winnow.models.context import ForwardContext, IndexerLoss, current_context, forward_context, train_context
from winnow.models.forward import hidden_states, lm_head_weight
from winnow.models.indexer import IndexerConfig

FAMILIES = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
    "mistral": (MistralConfig, MistralForCausalLM),
}
SHAPE = {
    "vocab_size": 97, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 8,
    "max_position_embeddings": 256, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def dense_model(family="llama", seed=0, **changes):
    torch.manual_seed(seed)
    config, model = FAMILIES[family]
    extra = {"sliding_window": None} if family == "mistral" else {}
    return model(config(**{**SHAPE, "tie_word_embeddings": False, **extra, **changes})).eval()


def sparse_model(top_k=8, family="llama", layout="half", **changes):
    model = dense_model(family, **changes)
    torch.manual_seed(1)
    return A.attach(model, IndexerConfig(top_k=top_k, num_heads=3, head_dim=16, rope_dim=4, rope_layout=layout))


def tokens(n, seed=2):
    return torch.randint(3, 97, (n,), generator=torch.Generator().manual_seed(seed))


def logits(model, ids, ctx):
    return hidden_states(model, ids, ctx) @ lm_head_weight(model).T


@pytest.mark.parametrize("family", FAMILIES)
def test_short_contexts_are_the_dense_model_bit_for_bit_and_leave_the_indexer_alone(family):
    length = (
        3 * 16
    )  # whole blocks of rows on every CPU (packing.ROW_MULTIPLE): ours computes no row that theirs does not
    ids = tokens(length)
    with torch.no_grad():
        want = dense_model(family)(ids[None]).logits[0]  # transformers' own sdpa
        model = sparse_model(length, family)
        got = model.lm_head(hidden_states(model, ids, train_context([length])))
        assert A.indexer_calls(model) == 0
        forced = model.lm_head(hidden_states(model, ids, train_context([length], force_sparse=True)))
    assert A.indexer_calls(model) == 2
    assert torch.equal(got, want)
    torch.testing.assert_close(forced, want, rtol=0, atol=1e-5)


def test_packed_equals_unpacked():
    model = sparse_model()
    parts = [tokens(n, n) for n in (30, 5, 61, 30)]
    with torch.no_grad():
        whole = logits(model, torch.cat(parts), train_context([len(p) for p in parts])).split([len(p) for p in parts])
        for part, got in zip(parts, whole, strict=True):
            torch.testing.assert_close(logits(model, part, train_context([len(part)])), got, rtol=0, atol=2e-5)


# The three modes


SCHEDULES = {"at once": [64], "sixteens": [16] * 4, "sevens": [7] * 9, "mixed": [20, *[1] * 30, 14], "tokens": [1] * 60}


@pytest.mark.parametrize(
    "name, selector", [*((name, "indexer") for name in SCHEDULES), ("mixed", "random"), ("mixed", "recent")]
)
def test_chunked_prefill_and_decode_equal_training(name, selector, run_cached):
    schedule, model = SCHEDULES[name], sparse_model()
    parts = [tokens(60, 5), tokens(23, 6), tokens(6, 7)]
    got, sets = run_cached(model, parts, schedule, selector=selector)
    recorded = {}
    lengths = [len(p) for p in parts]
    with torch.no_grad():
        ctx = train_context(lengths, selection_out=recorded, selector=selector)
        want = logits(model, torch.cat(parts), ctx).split(lengths)
    stacked = torch.stack([recorded[i].indices for i in (0, 1)]).split(lengths, 1)
    for a, b, chosen, other in zip(got, want, sets, stacked, strict=True):
        assert torch.equal(chosen, other)
        torch.testing.assert_close(a, b, rtol=0, atol=2e-5)


@pytest.mark.parametrize("kind", ["dense folder", "dense selector"])
def test_dense_models_decode_without_indexers(kind, run_cached):
    model = dense_model() if kind == "dense folder" else sparse_model()
    A.use_winnow_attention(model)
    parts = [tokens(30, 5), tokens(12, 6)]
    options = {} if kind == "dense folder" else {"selector": "dense"}
    got, _ = run_cached(model, parts, [16, 4, *[1] * 10], **options)
    model.set_attn_implementation("sdpa")
    with torch.no_grad():
        for part, out in zip(parts, got, strict=True):
            torch.testing.assert_close(out, model(part[None]).logits[0], rtol=0, atol=2e-5)
    assert A.indexer_calls(model) == 0


def test_decode_of_short_contexts_does_not_score_but_keeps_keys(run_cached):
    model = sparse_model(8)
    run_cached(model, [tokens(8)], [1] * 8)
    assert A.indexer_calls(model) == 0
    run_cached(model, [tokens(9)], [1] * 9)
    assert A.indexer_calls(model) == 2  # one token, two layers


# Gradients


def test_model_and_indexer_never_share_a_gradient():
    model = sparse_model().train()
    ids = tokens(60)
    loss = IndexerLoss()
    out = logits(model, ids, train_context([60], indexer_loss=loss))
    loss.total().backward(retain_graph=True)
    assert all(p.grad is None or not p.grad.any() for p in A.base_parameters(model).values())
    assert all(p.grad is not None and p.grad.any() for p in A.indexer_parameters(model).values())
    model.zero_grad(set_to_none=True)
    out.square().mean().backward()
    assert all(p.grad is None for p in A.indexer_parameters(model).values())
    assert all(p.grad is not None and p.grad.any() for p in A.base_parameters(model).values())


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_changes_nothing(reentrant):
    grads = []
    for checkpointing in (False, True):
        model = sparse_model().train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        loss = None if reentrant else IndexerLoss()
        with forward_context(train_context([40, 20], indexer_loss=loss)) as ctx:
            out = logits(model, tokens(60), ctx).square().mean()
            (out if loss is None else out + loss.total()).backward()
        if loss is not None:
            assert loss.rows == 60 and len(loss.kl) == 2
        grads.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, rtol=0, atol=1e-6, msg=name)


def test_replay_uses_the_given_sets_and_not_the_indexer():
    model, ids, recorded = sparse_model(), tokens(50), {}
    with torch.no_grad():
        want = logits(model, ids, train_context([50], selection_out=recorded))
        calls = A.indexer_calls(model)
        again = logits(model, ids, train_context([50], selection_in=recorded))
        assert A.indexer_calls(model) == calls and torch.equal(want, again)
        first = recorded[0].indices.clone()
        first[40:, 0] = 0  # another set
        other = logits(
            model, ids, train_context([50], selection_in={**recorded, 0: Selection(first, recorded[0].counts)})
        )
        assert torch.equal(other[:40], want[:40]) and not torch.equal(other[40:], want[40:])
        with pytest.raises(ValueError, match="no index sets for layer 1"):
            logits(model, ids, train_context([50], selection_in={0: recorded[0]}))


def test_frozen_indexers_stay_out_of_the_optimizer():
    model = sparse_model()
    A.freeze(A.indexer_parameters(model))
    assert not A.trainable(A.indexer_parameters(model)) and len(A.trainable(A.base_parameters(model))) == len(
        A.base_parameters(model)
    )
    loss = IndexerLoss()
    logits(model, tokens(30), train_context([30], indexer_loss=loss)).mean().backward()
    assert float(loss.total()) > 0 and not loss.total().requires_grad


# Folders


@pytest.mark.parametrize("tied", [True, False])
def test_save_load_strip(tmp_path, tied):
    original = {name: t.clone() for name, t in dense_model(tie_word_embeddings=tied).state_dict().items()}
    model = sparse_model(tie_word_embeddings=tied)
    L.save(model, None, tmp_path / "model")
    L.save(model, None, tmp_path / "model")  # replaces
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model"]
    again = L.load(tmp_path / "model")
    ids = tokens(50)
    with torch.no_grad():
        assert torch.equal(logits(again, ids, train_context([50])), logits(model, ids, train_context([50])))
        plain = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
        assert plain.config._attn_implementation == "sdpa" and plain.config.winnow["top_k"] == 8
        assert torch.equal(plain(ids[None]).logits, dense_model(tie_word_embeddings=tied)(ids[None]).logits)
    stripped = A.strip(again)
    assert not A.is_converted(stripped) and not hasattr(stripped.config, "winnow")
    assert stripped.state_dict().keys() == original.keys()
    assert all(torch.equal(t, original[name]) for name, t in stripped.state_dict().items())
    half = L.load(tmp_path / "model", dtype="bfloat16")
    assert lm_head_weight(half).dtype == torch.bfloat16
    assert all(p.dtype == torch.float32 for p in A.indexer_parameters(half).values())
    with torch.no_grad():
        whole = logits(model, ids, train_context([50], selector="dense"))
        coarse = logits(half, ids, train_context([50], selector="dense")).float()
    torch.testing.assert_close(coarse, whole, rtol=0, atol=0.1)
    stored = A.indexer_state(model)
    assert all(torch.equal(p, stored[name]) for name, p in A.indexer_parameters(half).items())


def test_load_refuses(tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        L.load(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"no config\.json"):
        L.load(tmp_path / "empty")
    with pytest.raises(ValueError, match="not a model folder"):
        (tmp_path / "empty" / "notes.txt").write_text("keep me")
        L.save(dense_model(), None, tmp_path / "empty")
    model = sparse_model()
    model.config.winnow = {**model.config.winnow, "head_dim": 8}
    L.save(model, None, tmp_path / "edited")
    with pytest.raises(ValueError, match=r"config\.json says"):
        L.load(tmp_path / "edited")
    model.config.winnow = {"topk": 8}
    L.save(model, None, tmp_path / "strange")
    with pytest.raises(ValueError, match="top_k is required"):
        L.load(tmp_path / "strange")
    dense = dense_model()
    dense.config.winnow = IndexerConfig(top_k=8, rope_dim=4).to_dict()
    L.save(dense, None, tmp_path / "missing")
    with pytest.raises(ValueError, match="missing"):
        L.load(tmp_path / "missing")


def test_attach_refuses_with_reasons():
    cases = [
        (SimpleNamespace(config=BertConfig()), {}, "encoder"),
        (SimpleNamespace(config=GPT2Config(architectures=["GPT2LMHeadModel"])), {}, "no rotary"),
        (SimpleNamespace(config=SimpleNamespace(model_type="mixtral", rope_theta=1e4)), {}, "families"),
        (dense_model("mistral", sliding_window=32), {}, "sliding-window"),
        (dense_model("qwen2", use_sliding_window=True, sliding_window=16, max_window_layers=1), {}, "sliding-window"),
        (sparse_model(), {}, "indexers already"),
        (dense_model(), {"top_k": 500}, "larger than the model's context"),
        (dense_model(), {"top_k": 0}, "must be an integer >= 1"),
        (dense_model(), {"rope_dim": 6}, "divide"),
    ]
    for model, changes, reason in cases:
        with pytest.raises(ValueError, match=reason):
            A.attach(model, IndexerConfig(**{"top_k": 8, "rope_dim": 4, **changes}))


def test_gpt2_is_refused_by_load(tmp_path):
    GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=16, n_head=2, vocab_size=50)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="rotary"):
        L.load(tmp_path)


def test_each_thread_reads_in_the_context_that_it_opened():
    """Two learners in threads of one process: neither attends as the other's sequences would have it."""
    first, second = train_context([30, 10]), train_context([7])
    both, seen = threading.Barrier(2, timeout=20), {}

    def read(name, ctx):
        with forward_context(ctx):
            both.wait()  # both are open now
            seen[name] = current_context()
            both.wait()

    others = [threading.Thread(target=read, args=pair) for pair in (("first", first), ("second", second))]
    [thread.start() for thread in others]
    [thread.join() for thread in others]
    assert seen == {"first": first, "second": second}
    with forward_context(first), forward_context(second):  # as one of autograd's threads would
        alone = threading.Thread(target=lambda: seen.update(alone=current_context()))
        alone.start(), alone.join()
    assert seen["alone"] is second


def test_a_thread_that_cannot_know_its_context_is_refused():
    both, problems = threading.Barrier(3, timeout=20), []

    def hold():
        with forward_context(train_context([3])):
            both.wait(), both.wait()

    others = [threading.Thread(target=hold) for _ in range(2)]
    [thread.start() for thread in others]
    both.wait()
    try:
        current_context()
    except RuntimeError as error:
        problems.append(str(error))
    both.wait()
    [thread.join() for thread in others]
    assert problems and "2 threads have a forward context open" in problems[0]


@pytest.mark.parametrize("length", [7, 9])
def test_a_batch_in_the_context_of_another_is_refused(length):
    """One token less or more: none of it may be attended to by the other's sequences."""
    model = sparse_model()
    with (
        forward_context(train_context([8])),
        pytest.raises(ValueError, match=f"{length} tokens in a forward context of 8"),
    ):
        model.get_decoder()(input_ids=tokens(length)[None], position_ids=torch.arange(length)[None], use_cache=False)


def test_a_bad_score_that_a_layer_noted_ends_the_pass():
    """What a GPU's layers write down instead of waiting."""
    model = sparse_model(top_k=4)
    ctx = train_context([10])
    object.__setattr__(ctx, "faults", torch.ones(1, dtype=torch.int32))
    with pytest.raises(ValueError, match="NaN"):
        hidden_states(model, torch.arange(10), ctx)
    hidden_states(model, torch.arange(10), ctx)  # said once


def test_a_train_context_knows_its_lengths():
    """Layers ask for bounds and lengths: on a GPU each question that the tensors have to answer waits for the device."""
    ctx = train_context([3, 5])
    assert on_host(ctx.cu_seqlens) == tuple(ctx.cu_seqlens.tolist()) == (0, 3, 8)
    assert on_host(ctx.seq_lens) == tuple(ctx.seq_lens.tolist()) == (3, 5)
    assert hasattr(ctx.cu_seqlens, "_winnow_values") and hasattr(ctx.seq_lens, "_winnow_values")
    assert (ctx.max_seq_len, ctx.fresh, ctx.positions.tolist()) == (5, True, [0, 1, 2, 0, 1, 2, 3, 4])


def test_contexts_are_checked():
    with pytest.raises(RuntimeError, match="no forward context"):
        current_context()
    with pytest.raises(ValueError, match="needs block_table"):
        ForwardContext(
            mode="decode", positions=torch.zeros(1), cu_seqlens=torch.tensor([0, 1]), seq_lens=torch.tensor([1])
        )
    with pytest.raises(ValueError, match="packed tokens"):
        hidden_states(sparse_model(), tokens(4), train_context([5]))
