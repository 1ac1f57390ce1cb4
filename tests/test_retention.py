"""What a conversion reports and what can interrupt it: resuming, shared indexers, needles, cost, memory, the table, the page."""

import dataclasses
import itertools
import json
import math
import random
from xml.etree import ElementTree

import pytest
import torch
from transformers import (
    DeepseekV32Config,
    DeepseekV32ForCausalLM,
)
from word_models import tiny_model, words

from winnow.models.attach import attach, base_parameters, indexer_parameters, use_winnow_attention
from winnow.models.context import IndexerLoss, train_context
from winnow.models.forward import hidden_states, lm_head_weight
from winnow.models.indexer import IndexerConfig
from winnow.models.load import load, save
from winnow.rl import bench_models, convert_data, cost_figure, memory, needles, share
from winnow.rl.cli import main
from winnow.rl.convert import attach_indexers, convert
from winnow.rl.convert_options import ConvertOptions
from winnow.rl.cost import CostOptions, break_even, cost_curves
from winnow.rl.retention import bucket_edges, perplexities, perplexity, recall
from winnow.rl.stages import LayerwiseWarmup, MasterAdamW, last_served

SHAPE = {"num_heads": 2, "head_dim": 16, "rope_dim": 8}
OPTIONS = ConvertOptions(
    top_k=6, index_heads=2, index_dim=16, index_rope_dim=8, seq_len=40, warmup_batches=4, warmup_tokens=200, warmup_micro=100,
    sparse_steps=3, sparse_tokens=100, holdout_tokens=100, warmup_lr=1e-2, sparse_model_lr=1e-3, report="short",
)  # fmt: skip


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def documents(count=30):
    rng = random.Random(0)
    return [[rng.randrange(3, 50) for _ in range(rng.randrange(20, 60))] for _ in range(count)]


# Interruptions


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("resume")
    save(tiny_model(), None, root / "dense")
    convert(root / "dense", root / "whole", OPTIONS, documents(), lambda line: None)
    return root


@pytest.mark.parametrize("where", ["warm-up 2/4", "warm-up 4/4", "sparse 1/3"])
def test_an_interrupted_conversion_goes_on_to_the_same_weights(uninterrupted, tmp_path, where):
    def stop(line):
        if line.startswith(where):
            raise KeyboardInterrupt

    dense, out = uninterrupted / "dense", tmp_path / "part"
    with pytest.raises(KeyboardInterrupt):
        convert(dense, out, OPTIONS, documents(), stop)
    assert not out.exists() and (tmp_path / "part.partial").exists()
    lines = []
    convert(dense, out, OPTIONS, documents(), lines.append)
    assert any("going on after step" in line for line in lines) and not (tmp_path / "part.partial").exists()
    whole, part = load(uninterrupted / "whole").state_dict(), load(out).state_dict()
    assert all(torch.equal(t, part[n]) for n, t in whole.items())
    a, b = (json.loads((folder / "conversion.json").read_text()) for folder in (uninterrupted / "whole", out))
    assert a["warmup"] == b["warmup"] and a["sparse"] == b["sparse"] and a["retention"] == b["retention"]


@pytest.mark.parametrize("average", [0.0, 0.8])
def test_a_conversion_that_goes_on_has_the_teacher_it_began_with(uninterrupted, tmp_path, average):
    """The teacher is the model before the sparse stage, not the half-trained student that was left; the mean holds all steps."""
    options = dataclasses.replace(OPTIONS, sparse_teacher="dense", sparse_model_lr=1e-2, sparse_average=average)
    convert(uninterrupted / "dense", tmp_path / "whole", options, documents(), lambda line: None)

    def stop(line):
        if line.startswith("sparse 2/3"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(uninterrupted / "dense", tmp_path / "part", options, documents(), stop)
    convert(uninterrupted / "dense", tmp_path / "part", options, documents(), lambda line: None)
    whole, part = load(tmp_path / "whole").state_dict(), load(tmp_path / "part").state_dict()
    assert all(torch.equal(t, part[n]) for n, t in whole.items())
    text = load(uninterrupted / "whole").state_dict()
    assert any(not torch.equal(t, text[n]) for n, t in whole.items())


def test_what_another_conversion_left_is_not_used(uninterrupted, tmp_path):
    dense = uninterrupted / "dense"

    def stop(line):
        if line.startswith("warm-up 2"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(dense, tmp_path / "out", OPTIONS, documents(), stop)
    lines = []
    convert(dense, tmp_path / "out", OPTIONS, documents(29), lines.append)
    assert not any("going on" in line for line in lines)


# Shared indexers


def test_leaders_are_the_best_of_all_runs():
    rng = random.Random(1)
    layers, budget = 7, 3
    overlap = {(i, j): rng.random() if i < j else 1.0 for i in range(layers) for j in range(i, layers)}

    def kept(leaders):
        return sum(overlap[max(i for i in leaders if i <= layer), layer] for layer in range(layers))

    tried = [(0, *rest) for n in range(budget) for rest in itertools.combinations(range(1, layers), n)]
    best = share.choose_leaders(overlap, layers, budget)
    assert kept(best) == pytest.approx(max(map(kept, tried))) and best in tried
    assert (
        share.choose_leaders({}, 20, 1)[0] == 0 and len(share.choose_leaders({}, 20, 1)) == 3
    )  # no run longer than REACH
    assert share.every_nth(7, 3) == (0, 3, 6) and share.every_nth(7, 1) == ()


def test_measured_overlap_is_largest_with_a_layers_own_sets():
    model = attach(tiny_model(3), IndexerConfig(top_k=6, **SHAPE))
    overlap = share.measure_overlap(model, documents(3), 6)
    assert sorted(overlap) == [(0, 0), (0, 1), (0, 2), (1, 1), (1, 2), (2, 2)]
    assert all(0 < overlap[i, j] <= overlap[j, j] + 1e-6 <= 1 + 1e-5 for i, j in overlap)
    options = ConvertOptions(**{**vars(OPTIONS), "index_share": 2, "index_share_by": "overlap"})
    leaders = attach_indexers(tiny_model(3), options, documents(3))
    assert leaders[0] == 0 and len(leaders) == 2


def test_layerwise_steps_on_a_shared_indexer_equal_ordinary_training():
    batch = convert_data.pack(documents(5))
    sparse = [attach(tiny_model(3), IndexerConfig(top_k=6, **SHAPE, leaders=(0, 2))) for _ in range(2)]
    for p, q in zip(indexer_parameters(sparse[0]).values(), indexer_parameters(sparse[1]).values(), strict=True):
        q.data.copy_(p.data)
    assert last_served(sparse[0]) == {0: 1, 2: 2}
    watch = LayerwiseWarmup(lr=1e-2, passes=1, micro_tokens=10**6, max_grad_norm=1e9, last=last_served(sparse[0]))
    with torch.no_grad():
        hidden_states(sparse[0], batch.tokens, train_context(batch.lengths, selector="dense", indexer_loss=watch))
    loss = IndexerLoss()
    hidden_states(sparse[1], batch.tokens, train_context(batch.lengths, selector="dense", indexer_loss=loss))
    optimizer = torch.optim.Adam(indexer_parameters(sparse[1]).values(), lr=1e-2, betas=(0.9, 0.99))
    (((loss.kl[0] + loss.kl[1]) / 2 + loss.kl[2]) / loss.rows).backward()
    optimizer.step()
    assert sorted(watch.losses) == [0, 1, 2] and watch.losses[1][0] == pytest.approx(loss.per_layer()[1], rel=1e-5)
    for p, q in zip(indexer_parameters(sparse[0]).values(), indexer_parameters(sparse[1]).values(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-4)


def test_bf16_weights_are_stepped_on_fp32_masters():
    weight = torch.nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    optimizer = MasterAdamW({"w": weight}, 1e-3)
    for _ in range(20):  # each step is below half a unit in the last place of 1.0
        weight.grad = torch.ones_like(weight)
        optimizer.step(1.0, 10.0)
    assert weight[0].item() == pytest.approx(0.98, abs=0.003)


# The report


def test_perplexity_by_position_adds_up():
    model = attach(tiny_model(), IndexerConfig(top_k=6, **SHAPE))
    edges = bucket_edges(60, 6)
    assert edges == [0, 6, 12, 24, 48, 60] and bucket_edges(5, 6) == [0, 5]
    whole, each = perplexities(model, documents(), "indexer", edges)
    counts = [sum(max(0, min(len(d) - 1, b) - a) for d in documents()) for a, b in itertools.pairwise(edges)]
    total = sum(n * math.log(p) for n, p in zip(counts, each, strict=True))
    assert whole == pytest.approx(math.exp(total / sum(counts)), rel=1e-6)
    assert each[0] == pytest.approx(
        perplexities(model, documents(), "dense", edges)[1][0], rel=1e-6
    )  # below k nothing is left out
    assert each[3] != pytest.approx(perplexities(model, documents(), "dense", edges)[1][3], rel=1e-6)
    assert recall(model, documents(3), selectors=("recent",)).keys() == {"recent"}


def test_haystacks_hold_their_needles():
    tokenizer, rng = words(), random.Random(0)
    hay = tokenizer("a red fox ran over old hills and a red fox ran", add_special_tokens=False)["input_ids"]
    made = needles.make_haystack(tokenizer, hay, 200, 5, rng)
    assert len(made.tokens) == 200 and len(made.answers) == 5
    text = tokenizer.convert_ids_to_tokens(made.tokens)
    for (a, b), depth in zip(made.answers, made.depths, strict=True):
        number, place = "".join(text[a:b]), text[a - 2]
        assert len(number) == 4 and place in needles.PLACES and text[a - 1] == "is"
        first = text.index(place)  # the fact stands before the question, and says the same
        assert first < a - 2 and "".join(text[first + 2 : first + 6]) == number
        assert abs(first / 160 - depth) < 0.25
    with pytest.raises(ValueError, match="more than a text of 80 has"):
        needles.make_haystack(tokenizer, hay, 80, 5, rng)


def test_found_is_what_greedy_decoding_would_write():
    tokenizer = words()
    model = attach(tiny_model(vocab=len(tokenizer)), IndexerConfig(top_k=16, **SHAPE))
    hay = tokenizer("a red fox ran over old hills", add_special_tokens=False)["input_ids"]
    made = needles.make_haystack(tokenizer, hay, 120, 3, random.Random(0))
    ids = torch.tensor(made.tokens)
    with torch.no_grad():
        best = (hidden_states(model, ids, train_context([120], selector="dense")) @ lm_head_weight(model).T).argmax(-1)
    for n, (a, b) in enumerate(made.answers):  # a text whose second number is what this model writes
        if n == 1:
            for i in range(a, b):
                with torch.no_grad():
                    rows = hidden_states(model, ids, train_context([120], selector="dense")) @ lm_head_weight(model).T
                ids[i] = rows[i - 1].argmax()
    found = needles.found(model, needles.Haystack(ids.tolist(), made.answers, made.depths), "dense")
    assert found[1] and found == [
        bool((best[a - 1 : b - 1] == ids[a:b]).all()) or n == 1 for n, (a, b) in enumerate(made.answers)
    ]


def test_needle_report_and_needles_in_training_data():
    tokenizer = words()
    model = attach(tiny_model(vocab=len(tokenizer)), IndexerConfig(top_k=16, **SHAPE))
    held = [[3 + i % 20 for i in range(300)]]
    report = needles.needle_report(model, tokenizer, held, [30, 200], 3, 2, 0)
    assert [row["length"] for row in report["lengths"]] == [200]  # 30 tokens have no room
    assert report["lengths"][0]["needles"] == 6 and set(report["lengths"][0]) >= {"dense", "sparse", "random", "recent"}
    assert report["kept"] is None  # this model finds none
    sequences = [[5] * 200 for _ in range(20)] + [[5] * 10]
    mixed = convert_data.with_needles(sequences, tokenizer, 0.5, 3, 0)
    changed = [s != t for s, t in zip(mixed, sequences, strict=True)]
    assert (
        4 <= sum(changed) <= 16
        and not changed[-1]
        and all(len(s) == len(t) for s, t in zip(mixed, sequences, strict=True))
    )


@pytest.mark.parametrize("native", [False, True])
def test_cost_curves(native):
    if native:
        torch.manual_seed(0)
        model = DeepseekV32ForCausalLM(DeepseekV32Config(
            vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
            kv_lora_rank=16, q_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8, index_topk=16, index_head_dim=16,
            index_n_heads=2, first_k_dense_replace=1, max_position_embeddings=512,
        )).eval()  # fmt: skip
        use_winnow_attention(model)
    else:
        model = attach(tiny_model(), IndexerConfig(top_k=16, **SHAPE))
    found = cost_curves(model, CostOptions(lengths=[32, 64], chunk=16, decode_tokens=128, page_size=8, repeats=1))
    assert found["batch"] == [4, 2] and found["chunk"] == [16, 16]
    assert all(value > 0 for kind in ("prefill", "decode") for curve in found[kind].values() for value in curve)


def test_the_figure_of_costs_is_one_svg(tmp_path):
    curves = {"shape": "s & t", "lengths": [2048, 4096]} | {
        k: {"dense": [2.0, 4.0], "sparse": [2.0, 1.0]} for k in ("prefill", "decode")
    }
    (tmp_path / "a.json").write_text(json.dumps(curves))
    assert cost_figure.main([str(tmp_path / "cost.svg"), str(tmp_path / "a.json")]) == 0
    texts = ["".join(node.itertext()) for node in ElementTree.parse(tmp_path / "cost.svg").iter()]
    assert any("s & t, 4: 4" in text for text in texts) and any("published, 128: 8.64" in text for text in texts)
    assert cost_figure.main([]) == 2


def test_break_even_is_where_sparse_wins_for_good():
    lengths = [1, 2, 4, 8]
    assert break_even(lengths, {"dense": [1, 3, 3, 9], "sparse": [2, 2, 4, 5]}) == 8
    assert break_even(lengths, {"dense": [1, 3, 3, 9], "sparse": [2, 2, 2, 5]}) == 2
    assert break_even(lengths, {"dense": [1, 3, 3, 4], "sparse": [0, 2, 2, 5]}) is None


def test_saved_activations_are_foretold_from_short_passes():
    model = attach(tiny_model(), IndexerConfig(top_k=16, **SHAPE))
    for indexer in (False, True):
        assert memory.activation_bytes(model, 500, indexer) == pytest.approx(
            memory.saved_bytes(model, 500, indexer), rel=0.02
        )
    assert all(p.grad is None for p in base_parameters(model).values())
    stages = memory.conversion_memory(model, OPTIONS)
    assert stages.keys() == {"warm-up", "sparse"} and "memory, sparse (estimate)" in memory.describe(stages)[1]


def test_benches_of_whole_models(tmp_path, capsys):
    rows = bench_models.bench_warmup([100], "cpu", torch.float32, 1, (4, 2, 16), (2, 16))["rows"]
    assert rows[0]["streaming"]["kl"] == pytest.approx(
        rows[0]["materialising"]["kl"], rel=1e-4
    )  # the same loss both ways
    file = tmp_path / "cost.json"
    assert main(["bench", "cost", "--model", "tiny-mla", "--layers", "1", "--lengths", "96", "--out", str(file)]) == 0
    assert json.loads(file.read_text())["decode"]["sparse"][0] > 0 and capsys.readouterr().out
    figures = bench_models.bench_memory("tiny", 128, 1, "cpu", torch.float32, checkpointing=True)
    assert figures["warm-up"]["estimate_gib"] > 0 and figures["sparse"]["peak_gib"] >= 0


# The command line


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    tokenizer = words()
    root = tmp_path_factory.mktemp("table")
    save(tiny_model(layers=3, vocab=len(tokenizer)), tokenizer, root / "dense")
    rng = random.Random(0)
    plain = ["a", "red", "fox", "ran", "over", "old", "hills", "and"]
    for name in ("a.txt", "b.txt", "held.txt"):
        (root / name).write_text(" ".join(rng.choice(plain) for _ in range(1500)))
    return root


SMALL = "seq_len=128 index_heads=2 index_dim=16 index_rope_dim=8 warmup_batches=1 warmup_tokens=256 sparse_steps=1 sparse_tokens=256 needles=2 needle_texts=1"


def test_the_table_has_every_row(folder, capsys):
    words_ = ["convert", str(folder / "dense"), str(folder / "table"), "--table", "--k", "8,16"]
    data = [f"data={folder}/a.txt,{folder}/b.txt", f"holdout={folder}/held.txt", "holdout_tokens=256"]
    assert main([*words_, *SMALL.split(), *data]) == 0
    table = json.loads((folder / "table" / "table.json").read_text())
    names = [row["name"] for row in table["rows"]]
    assert names == [
        "dense, same training", "recipe, k 8", "random 8", "recent 8", "recipe, k 16", "random 16", "recent 16", "warm-up only", "no warm-up",
        "coupled gradients", "IndexShare 1:2",
    ]  # fmt: skip
    assert capsys.readouterr().out.count("\n| ") == len(names) + 2
    rows = {row["name"]: row for row in table["rows"]}
    apart = {rows[n]["perplexity"] for n in ("recipe, k 8", "warm-up only", "no warm-up", "coupled gradients")}
    assert len(apart) == 4
    assert table["held_tokens"] == 256 and table["train_tokens"] >= 700
    model = load(folder / "table" / "k8")
    assert model.config.winnow["top_k"] == 8
    assert perplexity(model, [[5] * 100], "indexer") > 0


def test_eval_retention_of_a_converted_folder(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    options = [f"data={folder}/a.txt", "top_k=16", "index_share=2", "needle_share=0.3", "holdout_tokens=256"]
    assert main(["convert", str(folder / "dense"), "sparse", *SMALL.split(), *options]) == 0
    report = json.loads((tmp_path / "sparse" / "conversion.json").read_text())
    assert (
        report["leaders"] == [0, 2]
        and report["retention"]["needles"]["lengths"]
        and report["retention"]["cost"]["batch"]
    )
    assert [step for step, _ in report["warmup"]["recall"]] == [0, 1]
    page = (tmp_path / "sparse" / "report.html").read_text()
    assert all(
        f"<h2>{name}</h2>" in page
        for name in ("Conversion to sparse attention", "Perplexity by position", "Needles", "Cost")
    )
    command = ["eval", "sparse", "--retention", "--length", "100", "--threads", "1"]
    assert main([*command, "--text", str(folder / "held.txt")]) == 0
    assert "recall of attention mass" in capsys.readouterr().out
    kept = json.loads((tmp_path / "sparse.retention.json").read_text())["retention"]
    assert kept["top_k"] == 16 and kept["positions"][-1]["to"] == 100 and (tmp_path / "sparse.retention.html").is_file()
    assert main(command) == 1 and "needs --text" in capsys.readouterr().err
    assert main(["eval", str(folder / "dense"), "--retention", "--text", str(folder / "held.txt")]) == 1
    assert "is a dense model" in capsys.readouterr().err
