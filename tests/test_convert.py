"""Conversion: the warm-up changes nothing but indexers and teaches them; the stages stay decoupled; the data loaders refuse with places."""

import json
import random
from dataclasses import replace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from winnow.models.attach import attach, base_parameters, indexer_parameters, is_indexer_name, strip
from winnow.models.context import IndexerLoss, train_context
from winnow.models.forward import hidden_states
from winnow.models.indexer import IndexerConfig
from winnow.models.load import load, save
from winnow.rl import convert_data
from winnow.rl.convert import convert
from winnow.rl.convert_options import ConvertOptions
from winnow.rl.retention import perplexity, recall
from winnow.rl.stages import LayerwiseWarmup, _micro_bounds, dense_control, schedule, sparse_stage, warm_up
from winnow.rl.teacher import Teacher, summed_kl

OPTIONS = ConvertOptions(
    top_k=6, index_heads=2, index_dim=16, index_rope_dim=8, seq_len=40, warmup_batches=8, warmup_tokens=400, warmup_micro=100,
    sparse_steps=3, sparse_tokens=200, holdout_tokens=200, warmup_lr=1e-2, sparse_model_lr=1e-3,
)  # fmt: skip


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def tiny_model():
    """Large attention weights: a random model attends evenly, and then there is nothing to learn."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=128, tie_word_embeddings=True, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.q_proj.weight.mul_(12)
            layer.self_attn.k_proj.weight.mul_(12)
    return model


def documents(count=40):
    rng = random.Random(0)
    return [[rng.randrange(3, 50) for _ in range(rng.randrange(20, 60))] for _ in range(count)]


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("convert")
    save(tiny_model(), None, root / "dense")
    lines = []
    report = convert(root / "dense", root / "sparse", OPTIONS, documents(), lines.append)
    return root, report, lines


def test_report(converted):
    root, report, lines = converted
    assert json.loads((root / "sparse" / "conversion.json").read_text()) == json.loads(json.dumps(report))
    assert len(report["warmup"]["kl"]) == 8 and len(report["sparse"]["kl"]) == len(report["sparse"]["loss"]) == 3
    assert report["warmup"]["kl"][-1] < 0.7 * report["warmup"]["kl"][0]
    kept = report["retention"]["recall"]
    assert kept["indexer"]["mean"] > kept["random"]["mean"] + 0.1 and len(kept["indexer"]["layers"]) == 2
    assert set(report["retention"]["perplexity"]) == {"dense", "sparse", "random", "recent"}
    assert sum(line.startswith("warm-up") for line in lines) == 8 and "recall of attention mass" in lines[-1]


def test_the_folder_opens_sparse(converted):
    root, _, _ = converted
    model = load(root / "sparse")
    assert model.config.winnow["top_k"] == 6 and indexer_parameters(model)
    with pytest.raises(ValueError, match="converted already"):
        convert(root / "sparse", root / "again", OPTIONS, documents())


def test_warm_up_leaves_the_model_alone_and_strip_gives_it_back():
    model = tiny_model()
    original = {name: t.clone() for name, t in model.state_dict().items()}
    attach(model, OPTIONS.indexer)
    before = {name: p.clone() for name, p in indexer_parameters(model).items()}
    warm_up(model, convert_data.batches(documents(), 400, 0), OPTIONS, lambda line: None)
    assert all(not torch.equal(p, before[name]) for name, p in indexer_parameters(model).items())
    strip(model)
    assert all(torch.equal(t, original[name]) for name, t in model.state_dict().items())


def test_layerwise_steps_equal_ordinary_training():
    """One pass, one micro-batch: the same update as backward through the summed loss and one optimizer a layer."""
    batch = convert_data.pack(documents(6))
    models = [attach(tiny_model(), IndexerConfig(top_k=6, num_heads=2, head_dim=16, rope_dim=8)) for _ in range(2)]
    torch.manual_seed(3)
    for p, q in zip(indexer_parameters(models[0]).values(), indexer_parameters(models[1]).values(), strict=True):
        q.data.copy_(p.data)
    watch = LayerwiseWarmup(lr=1e-2, passes=1, micro_tokens=10**6, max_grad_norm=1e9)
    with torch.no_grad():
        hidden_states(models[0], batch.tokens, train_context(batch.lengths, selector="dense", indexer_loss=watch))
    loss = IndexerLoss()
    hidden_states(models[1], batch.tokens, train_context(batch.lengths, selector="dense", indexer_loss=loss))
    optimizer = torch.optim.Adam(indexer_parameters(models[1]).values(), lr=1e-2, betas=(0.9, 0.99))
    (loss.sum() / loss.rows).backward()
    optimizer.step()
    assert watch.losses[0][0] == pytest.approx(loss.per_layer()[0], rel=1e-5)
    for p, q in zip(indexer_parameters(models[0]).values(), indexer_parameters(models[1]).values(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-4)


@pytest.mark.parametrize("model_lr", [0.0, 1e-3])
def test_sparse_stage_moves_what_it_should(model_lr):
    model = attach(tiny_model(), OPTIONS.indexer)
    before = {name: p.clone() for name, p in model.named_parameters()}
    for p in base_parameters(model).values():
        p.requires_grad_(False)
    options = ConvertOptions(**{**vars(OPTIONS), "sparse_model_lr": model_lr})
    sparse_stage(model, convert_data.batches(documents(), 200, 0), options, lambda line: None)
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) == (model_lr == 0 and not is_indexer_name(name)), name


@pytest.mark.parametrize(("total", "rise"), [(1, 3), (40, 3), (480, 24)])
def test_the_rate_rises_for_a_twentieth_of_the_steps_and_ends_near_a_tenth(total, rise):
    rates = [schedule(step, total) for step in range(total)]
    risen = min(rise, total) - 1
    assert rates[0] == pytest.approx(1 / rise) and rates.index(max(rates)) == risen
    assert max(rates) == pytest.approx(min(1.0, total / rise) * (1 - 0.9 * risen / total))
    assert total == 1 or rates[-1] == pytest.approx(0.1 + 0.9 / total)


def test_perplexity_and_recall_agree_with_a_full_set():
    model = attach(tiny_model(), IndexerConfig(top_k=30, num_heads=2, head_dim=16, rope_dim=8))
    short = [d[:30] for d in documents(5)]
    assert (
        perplexity(model, short, "indexer") == perplexity(model, short, "dense") == perplexity(model, short, "random")
    )
    assert recall(model, short)["indexer"] == []
    figures = recall(model, [d + d for d in documents(3)])
    assert all(0 < r <= 1 + 1e-5 for layers in figures.values() for r in layers)


def test_micro_bounds_cover_everything():
    bounds = [0, 10, 30, 100, 105, 110, 200]
    runs = list(_micro_bounds(bounds, 40))
    assert [r[0] for r in runs] + [200] == [0, *(r[1] for r in runs)]
    assert all(r[2][0] == 0 and r[2][-1] == r[1] - r[0] for r in runs)
    assert [x for a, _, cu in runs for x in (a + c for c in cu[1:])] == bounds[1:]


def test_next_token_rows_stop_at_the_ends():
    assert convert_data.pack([[1, 2, 3], [4, 5], [6]]).next_token_rows.tolist() == [0, 1, 3]


def test_batches_use_every_sequence_each_epoch():
    sequences = [[i] * 10 for i in range(20)]
    stream = convert_data.batches(sequences, 50, 0)
    seen = [next(stream).tokens.tolist()[::10] for _ in range(4)]
    assert sorted(x for batch in seen for x in batch) == list(range(20))


def test_later_epochs_are_cut_elsewhere():
    documents = [list(range(100, 135)), list(range(200, 210))]  # three windows and a tail; one window without a rest
    windows = convert_data.windows(documents, 10)
    stream = convert_data.batches([*windows, [1, 2, 3]], 10, 0)
    texts = [text for _ in range(60) for batch in [next(stream)] for text in _texts(batch)]
    first, later = texts[: len(windows) + 1], texts[len(windows) + 1 :]
    assert sorted(first) == sorted([*map(list, windows), [1, 2, 3]]), "the first epoch has the windows as they are"
    assert [1, 2, 3] in later, "a sequence that is no window stays whole"
    for text in later:
        whole = next(d for d in [*documents, [1, 2, 3]] if text[0] in d)
        start = whole.index(text[0])
        assert text == whole[start : start + len(text)], "a window is one piece of its document, wherever it begins"
    begins = {text[0] for text in later if len(text) == 10}
    assert len(begins - {100, 110, 120, 200}) > 10
    assert all(len(text) in (3, 5, 10) for text in later), "as long as it was"
    again = convert_data.batches([*windows, [1, 2, 3]], 10, 0)
    assert [text for _ in range(60) for text in _texts(next(again))] == texts


def test_windows_cut_elsewhere_show_nothing_that_is_held_out():
    windows = convert_data.windows([list(range(1000)), list(range(2000, 2050))], 10)
    train, held = convert_data.split_holdout(windows, 150, 3)
    unseen = {token for window in held for token in window}
    stream = convert_data.batches(train, 10, 0)
    seen = {token for _ in range(20 * len(train)) for token in next(stream).tokens.tolist()}
    assert len(held) >= 15 and not seen & unseen
    assert seen == {token for window in train for token in window}


def _texts(batch):
    return [part.tolist() for part in batch.tokens.split(batch.lengths)]


def test_documents(tmp_path):
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "b.jsonl").write_text('{"text": "two"}\n\n{"text": "three"}\n')
    assert convert_data.read_documents(str(tmp_path)) == ["one", "two", "three"]
    (tmp_path / "b.jsonl").write_text('{"text": "two"}\n{"body": 1}\n')
    with pytest.raises(ValueError, match=r"b.jsonl:2: no text field 'text'"):
        convert_data.read_documents(str(tmp_path / "b.jsonl"))
    (tmp_path / "b.jsonl").write_text("{\n")
    with pytest.raises(ValueError, match=r"b.jsonl:1: not JSON"):
        convert_data.read_documents(str(tmp_path / "b.jsonl"))
    with pytest.raises(ValueError, match="does not exist"):
        convert_data.read_documents(str(tmp_path / "nothing.txt"))


def test_options_and_data_are_checked(tmp_path):
    with pytest.raises(ValueError, match="several times top_k"):
        ConvertOptions(top_k=32, seq_len=32)
    with pytest.raises(ValueError, match="warmup_lr"):
        ConvertOptions(warmup_lr=-1)
    save(tiny_model(), None, tmp_path / "dense")
    with pytest.raises(ValueError, match="no sequence of the data is longer"):
        convert(
            tmp_path / "dense", tmp_path / "out", ConvertOptions(top_k=32, index_rope_dim=8, seq_len=64), [[1] * 20] * 9
        )
    with pytest.raises(ValueError, match="the model's context is 128 tokens"):
        convert(tmp_path / "dense", tmp_path / "out", ConvertOptions(top_k=32), [[1] * 20] * 9)
    with pytest.raises(ValueError, match="no tokenizer"):
        convert(tmp_path / "dense", tmp_path / "out", OPTIONS, ["some text"])


def test_a_conversion_keeps_to_its_threads_and_gives_them_back(tmp_path):
    save(tiny_model(), None, tmp_path / "dense")
    before, during = torch.get_num_threads(), []
    options = replace(OPTIONS, threads=before + 1)
    convert(
        tmp_path / "dense", tmp_path / "out", options, documents(), lambda line: during.append(torch.get_num_threads())
    )
    assert set(during) == {before + 1} and torch.get_num_threads() == before
    with pytest.raises(ValueError, match="none"):
        convert(tmp_path / "dense", tmp_path / "again", replace(options, holdout=str(tmp_path / "none")), documents())
    assert torch.get_num_threads() == before
    with pytest.raises(ValueError, match="threads"):
        replace(OPTIONS, threads=-1)


def test_own_samples():
    engine = pytest.importorskip("winnow.rollout.engine", reason="the rollout engine")
    assert engine

    class Tokenizer:
        bos_token_id, eos_token_id, chat_template = 1, 2, None

        def decode(self, ids, **_):
            return " ".join(map(str, ids))

    from winnow.models.attach import use_winnow_attention

    model = tiny_model()
    use_winnow_attention(model)
    samples = convert_data.own_samples(model, Tokenizer(), 300, 40, 0)
    assert sum(map(len, samples)) >= 300 and all(s[0] == 1 and len(s) <= 40 for s in samples)
    assert len({tuple(s) for s in samples}) > 1


def test_a_teachers_kl_and_gradient_equal_their_definition():
    torch.manual_seed(0)
    rows, width, vocab = 2500, 12, 40  # more rows than two chunks
    teacher, student = torch.randn(rows, width), torch.randn(rows, width, requires_grad=True)
    old, new = torch.randn(vocab, width), torch.randn(vocab, width, requires_grad=True)
    found = summed_kl(teacher, old, student, new)
    found.backward()
    p = (teacher.double() @ old.double().T).softmax(-1)
    x, w = student.detach().double().requires_grad_(), new.detach().double().requires_grad_()
    wanted = (p * (p.log() - (x @ w.T).softmax(-1).log())).sum()
    wanted.backward()
    torch.testing.assert_close(found.detach().double(), wanted.detach(), rtol=1e-6, atol=0)
    torch.testing.assert_close(student.grad.double(), x.grad, rtol=0, atol=1e-5)
    torch.testing.assert_close(new.grad.double(), w.grad, rtol=1e-4, atol=1e-3)
    same = summed_kl(teacher, old, teacher.clone().requires_grad_(), old)
    assert 0 <= float(same.detach()) < 1e-3 < float(found.detach()), "a model that agrees has nothing to learn"
    with pytest.raises(ValueError, match="2500 rows and 40 tokens cannot teach 2500 rows and 41"):
        summed_kl(teacher, old, student, torch.randn(41, width))


def test_a_dense_teacher_brings_the_sparse_model_back_to_the_dense_one():
    """Against its own dense self at L >> k; the teacher does not move with its student, and the indexers learn as ever."""
    torch.manual_seed(0)
    model = attach(tiny_model(), IndexerConfig(top_k=3, num_heads=2, head_dim=16, rope_dim=8))
    texts = [d + d for d in documents(8)]
    batch, before = convert_data.pack(texts), {name: p.clone() for name, p in model.named_parameters()}
    teacher = Teacher(model)

    def gap() -> float:
        with torch.no_grad():
            ctx = train_context(batch.lengths, selector="indexer")
            total, rows = teacher.loss(batch, model, hidden_states(model, batch.tokens, ctx))
        return float(total) / rows

    untrained = gap()
    options = ConvertOptions(
        **{**vars(OPTIONS), "top_k": 3, "sparse_model_lr": 3e-3, "sparse_steps": 30, "sparse_teacher": "dense"}
    )
    curves = sparse_stage(model, convert_data.batches(texts, 400, 0), options, lambda line: None)
    assert untrained > 1e-4 and gap() < 0.5 * untrained
    assert curves["loss"][-1] < 0.6 * curves["loss"][0]
    assert all(torch.equal(p, before[name]) for name, p in teacher.model.named_parameters())
    assert any(not torch.equal(p, before[name]) for name, p in indexer_parameters(model).items())
    assert dense_control(model, iter(()), options, lambda line: None) == [], (
        "a dense model has nothing to learn from itself"
    )


@pytest.mark.parametrize(("share", "counted"), [(0.5, 3), (1.0, 6), (0.05, 0)])
def test_the_mean_of_the_last_steps_weights_is_what_the_stage_leaves(share, counted):
    """Against what stood in the model after every step, in float64."""
    torch.manual_seed(0)
    model = attach(tiny_model(), IndexerConfig(top_k=3, num_heads=2, head_dim=16, rope_dim=8))
    options = ConvertOptions(
        **{**vars(OPTIONS), "top_k": 3, "sparse_model_lr": 1e-2, "sparse_steps": 6, "sparse_average": share}
    )
    seen: list = []

    def look(line: str) -> None:
        seen.append({name: p.detach().double().clone() for name, p in model.named_parameters()})

    sparse_stage(model, convert_data.batches(documents(8), 400, 0), options, look)
    assert len(seen) == 6
    kept = seen[-counted:] if counted else seen[-1:]
    for name, p in model.named_parameters():
        mean = sum(weights[name] for weights in kept) / len(kept)
        torch.testing.assert_close(p.detach().double(), mean, rtol=0, atol=1e-6)
    name = next(iter(base_parameters(model)))
    moved = (seen[-1][name] - dict(model.named_parameters())[name].detach().double()).abs().max()
    assert moved > 1e-4 if counted else moved == 0
