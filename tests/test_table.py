"""What stands around a conversion: the needle stage, a table that goes on and ends in time, recorded index sets, memory."""

import dataclasses
import gc
import json
import random
import weakref

import pytest
import torch
from word_models import tiny_model, words

from winnow.kernels import ops
from winnow.models.attach import attach, base_parameters, indexer_parameters
from winnow.models.context import train_context
from winnow.models.forward import hidden_states
from winnow.models.indexer import IndexerConfig
from winnow.models.load import save
from winnow.rl import ablation, bench_models, convert_data, memory, needles, recorded_sets
from winnow.rl.cli import main
from winnow.rl.convert_options import ConvertOptions
from winnow.rl.needle_stage import needle_batch, teach_needles

SHAPE = {"num_heads": 2, "head_dim": 16, "rope_dim": 8}
OPTIONS = ConvertOptions(
    top_k=8, index_heads=2, index_dim=16, index_rope_dim=8, seq_len=128, warmup_batches=1, warmup_tokens=256, sparse_steps=2,
    sparse_tokens=256, holdout_tokens=256, sparse_model_lr=1e-3, needle_steps=2, needle_tokens=300, needles=2, needle_texts=1,
)  # fmt: skip


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


# Needles


def test_a_needle_batch_marks_the_answers_and_nothing_else():
    tokenizer, hay = words(), [20, 21, 22, 23, 24] * 40
    each = needles.room_needed(tokenizer, 1)
    for seed in range(5):
        batch, answers = needle_batch(tokenizer, hay, OPTIONS, each, random.Random(seed))
        assert len(answers) == len(batch.tokens) == sum(batch.lengths) and set(batch.lengths) <= {128, 64, 32, 16}
        begin, facts = 0, {}
        for length in batch.lengths:
            text = tokenizer.convert_ids_to_tokens(batch.tokens[begin : begin + length].tolist())
            marked = answers[begin : begin + length].tolist()
            runs = [i for i in range(length) if marked[i] and not marked[i - 1]]
            assert runs and sum(marked) == 4 * len(runs)  # numbers have four digits
            for i in runs:
                place = text.index(text[i - 2])  # the fact, which comes before
                facts[text[i - 2]] = text[i : i + 4]
                assert place < i - 2 and text[place + 2 : place + 6] == text[i : i + 4] and all(marked[i : i + 4])
            assert not any(marked[place] for place in range(length) if not text[place].isdigit())
            begin += length
        assert facts
    with pytest.raises(ValueError, match="too many for texts of seq_len=20; set a larger one"):
        needle_batch(tokenizer, hay, dataclasses.replace(OPTIONS, seq_len=20, top_k=4), each, random.Random(0))


def test_a_share_of_the_needles_is_asked_for_in_conversations():
    """Prompts as the sparse-dense tasks have them; what is learned is the whole reply with its end mark, the facts in the order asked."""
    tokenizer, hay = words(), [20, 21, 22, 23, 24] * 40
    tokenizer.chat_template = (
        "{% for m in messages %}<u>{{ m['content'] }}<u>{% endfor %}{% if add_generation_prompt %}<u>{% endif %}"
    )
    each = needles.room_needed(tokenizer, 1)
    plain = [dataclasses.replace(OPTIONS, needle_chat=share) for share in (0.0, 0.99)]
    seen = 0
    for seed in range(6):
        batch, answers = needle_batch(tokenizer, hay, plain[1], each, random.Random(seed))
        assert set(batch.lengths) != {16}  # where nothing fits, plain texts
        begin = 0
        for length in batch.lengths:
            text = tokenizer.convert_ids_to_tokens(batch.tokens[begin : begin + length].tolist())
            marked = answers[begin : begin + length].tolist()
            begin += length
            runs = [i for i in range(1, length) if marked[i] and not marked[i - 1]]
            if text[runs[0]] != "The":
                continue  # a plain one
            assert len(runs) == 1 and marked[-1] and text[-1] == "<u>" and length <= 128
            reply, prompt = text[runs[0] : -1], text[: runs[0]]
            assert len(reply) % 11 == 0
            for i in range(0, len(reply), 11):  # The secret number of X is d d d d .
                fact = reply[i : i + 11]
                assert fact[:4] == ["The", "secret", "number", "of"] and any(
                    prompt[j : j + 11] == fact for j in range(len(prompt) - 10)
                )
            seen += 1
    assert seen > 4
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="no chat template"):
        needle_batch(tokenizer, hay, plain[1], each, random.Random(0))
    with pytest.raises(ValueError, match="set needle_steps, or needle_chat to 0"):
        dataclasses.replace(OPTIONS, needle_chat=0.1, needle_steps=0)
    without = [needle_batch(tokenizer, hay, plain[0], each, random.Random(s))[0].tokens.tolist() for s in range(3)]
    again = [needle_batch(tokenizer, hay, OPTIONS, each, random.Random(s))[0].tokens.tolist() for s in range(3)]
    assert without == again


def test_teaching_lowers_the_loss_of_the_answers():
    tokenizer = words()
    model = tiny_model(vocab=len(tokenizer))
    before = {name: p.detach().clone() for name, p in base_parameters(model).items()}
    lines = []
    options = dataclasses.replace(OPTIONS, needle_steps=12, needle_lr=1e-2)
    curve = teach_needles(model, tokenizer, [[20, 21, 22] * 40], options, lines.append)
    assert len(curve) == len(lines) == 12 and lines[-1].startswith("needles 12/12")
    assert curve[-1][1] < 0.8 * curve[0][1]  # guessing digits evenly is already better than any word
    assert all(not torch.equal(before[name], p) for name, p in base_parameters(model).items())
    still = tiny_model(vocab=len(tokenizer))
    teach_needles(still, tokenizer, [[20, 21, 22] * 40], dataclasses.replace(options, needle_lr=0.0), lines.append)
    assert all(torch.equal(before[name], p) for name, p in base_parameters(still).items())


def test_training_texts_hold_more_needles_than_the_report():
    tokenizer = words()
    most = needles.densest(tokenizer, 400, 2)
    assert 2 < most <= 400 // (4 * needles.room_needed(tokenizer, 1))
    assert needles.densest(tokenizer, 10**6, 2) == len(needles.PLACES) and needles.densest(tokenizer, 40, 2) == 2
    mixed = convert_data.with_needles([[20] * 400 for _ in range(40)], tokenizer, 0.5, 2, 0)
    facts = [tokenizer.convert_ids_to_tokens(s).count("secret") / 2 for s in mixed]
    counts = {n for n in facts if n}
    assert len(counts) > 2 and min(counts) >= 2 and max(counts) <= most and 8 <= facts.count(0) <= 32


# The table


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.set_num_threads(1)
    tokenizer, rng = words(), random.Random(0)
    root = tmp_path_factory.mktemp("table")
    save(tiny_model(vocab=len(tokenizer)), tokenizer, root / "dense")
    plain = ["a", "red", "fox", "ran", "over", "old", "hills", "and"]
    for name in ("a.txt", "held.txt"):
        (root / name).write_text(" ".join(rng.choice(plain) for _ in range(1500)))
    table(root, "whole")
    return root


def table(root, name, progress=lambda line: None, limit_s=None, varied=None, **changed):
    places = {"data": str(root / "a.txt"), "holdout": str(root / "held.txt")}
    varied = {change: dataclasses.replace(options, **places) for change, options in (varied or {}).items()}
    options = dataclasses.replace(OPTIONS, **places, **changed)
    return ablation.convert_table(
        str(root / "dense"), root / name, options, [8, 16], progress, limit_s, recipe_only=True, varied=varied
    )


def figures(result):
    """All that does not depend on the clock."""
    clocks = ("seconds", "train_seconds", "warmup_seconds", "report_seconds", "peak_bytes")
    return [{key: value for key, value in row.items() if key not in clocks} for row in result["rows"]]


def noting(seen, name, of):
    """`of`, with `name` appended to `seen` at every call."""

    def spy(*given):
        seen.append(name)
        return of(*given)

    return spy


def test_an_interrupted_table_goes_on_with_what_is_done(folder, monkeypatch):
    trained = []
    for name in ("dense_control", "warm_up", "sparse_stage", "teach_needles"):
        monkeypatch.setattr(ablation, name, noting(trained, name, getattr(ablation, name)))

    def stop(line):
        if "ROW recipe, k 8" in line:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        table(folder, "part", stop)
    assert trained == ["teach_needles", "dense_control", "warm_up", "sparse_stage"]
    so_far = json.loads((folder / "part" / "table.json").read_text())
    assert [row["name"] for row in so_far["rows"]] == ["dense, same training", "recipe, k 8"]
    trained.clear()
    again = table(folder, "part")
    assert trained == ["sparse_stage"]  # of k 16: the base, the warm-up and two rows were there
    whole = json.loads((folder / "whole" / "table.json").read_text())
    assert json.loads(json.dumps(figures(again))) == figures(whole) and len(figures(whole)) == 3
    assert (folder / "part" / "k8" / "model.safetensors").is_file()
    trained.clear()
    other = table(folder, "part", sparse_model_lr=2e-3)  # another recipe: nothing of the first is used
    assert trained == ["teach_needles", "dense_control", "warm_up", "sparse_stage", "sparse_stage"]
    assert figures(other)[1]["perplexity"] != figures(whole)[1]["perplexity"]


def test_with_a_dense_teacher_the_control_is_the_taught_model_itself(folder):
    lines = []
    made = table(folder, "teacher", lines.append, sparse_teacher="dense")
    control, recipe, _ = made["rows"]
    assert control["perplexity"] == made["before"] and not any(" dense 1/" in line for line in lines)
    text = json.loads((folder / "whole" / "table.json").read_text())["rows"]
    assert recipe["perplexity"] != text[1]["perplexity"] and control["perplexity"] != text[0]["perplexity"]
    assert figures(table(folder, "teacher", sparse_teacher="dense")) == json.loads(json.dumps(figures(made)))


def test_one_key_varies_and_the_rest_is_shared(folder, monkeypatch, capsys):
    trained, stage, seen = [], ablation.sparse_stage, []

    def heard(model, stream, options, *rest):
        seen.append((options.sparse_model_lr, options.top_k))
        return stage(model, stream, options, *rest)

    monkeypatch.setattr(ablation, "sparse_stage", heard)
    monkeypatch.setattr(
        ablation, "warm_up", lambda *a, made=ablation.warm_up, **k: trained.append("warm_up") or made(*a, **k)
    )
    varied = {f"lr {lr}": dataclasses.replace(OPTIONS, sparse_model_lr=lr) for lr in (1e-3, 5e-2)}
    made = table(folder, "varied", varied=varied)
    assert seen == [(1e-3, 8), (5e-2, 8)] and trained == ["warm_up"]
    assert [row["name"] for row in made["rows"]] == ["dense, same training", "k 8, lr 0.001", "k 8, lr 0.05"]
    same = next(row for row in table(folder, "plain")["rows"] if row["name"] == "recipe, k 8")
    first, second = made["rows"][1:]
    assert first["perplexity"] == same["perplexity"] != second["perplexity"]
    for asked, message in (
        (["--vary", "sparse_steps=1"], "add --table"),
        (["--table", "--vary", "index_dim=8,16"], "share their data, needles and warm-up"),
        (["--table", "--vary", "sparse_steps"], "it must be KEY=A,B"),
        (["--table", "--vary", "sparse_stepz=1,2"], "did you mean sparse_steps"),
    ):
        assert main(["convert", "x", "y", *asked]) == 1
        assert message in capsys.readouterr().err


def test_a_limit_leaves_rows_out_and_names_them(folder):
    lines = []
    short = table(folder, "short", lines.append, limit_s=1e-3)
    assert [row["name"] for row in short["rows"]] == ["dense, same training"]  # the first is always made
    assert short["missing"] == ["recipe, k 8", "recipe, k 16"]
    assert sum("left out" in line for line in lines) == 2
    assert "not made, for lack of time: recipe, k 8, recipe, k 16" in (folder / "short" / "table.md").read_text()
    full = table(folder, "short", limit_s=1e4)
    assert full["missing"] == [] and len(full["rows"]) == 3


def test_the_command_line_asks_for_the_recipe_only(folder, monkeypatch, capsys):
    asked = []

    def made(*given):
        asked.append(given)
        return {"rows": [{"name": "dense", "k": None, "perplexity": 2.0}], "before": 2.0, "seconds": 1.0}

    monkeypatch.setattr(ablation, "convert_table", made)
    command = ["convert", "MODEL", "OUT", "--table", "--k", "8,16", "--limit-s", "30", "seq_len=128"]
    assert main([*command, "--recipe-only"]) == 0 and main(command) == 0
    assert [(list(given[3]), *given[5:]) for given in asked] == [([8, 16], 30, True, {}), ([8, 16], 30, False, {})]
    assert "| dense | - | 2.000 | +0.00 %" in capsys.readouterr().out


# Recorded sets


def test_recorded_sets_are_those_of_a_dense_pass_at_the_longest_context(tmp_path):
    model = attach(tiny_model(), IndexerConfig(top_k=6, **SHAPE))
    model.config.max_position_embeddings = 64
    options = dataclasses.replace(OPTIONS, top_k=20, seq_len=256, warmup_tokens=256, warmup_micro=256)
    rng = random.Random(0)
    train, held = [[rng.randrange(50) for _ in range(256)]], [rng.randrange(50) for _ in range(256)]
    before = {name: p.detach().clone() for name, p in indexer_parameters(model).items()}
    about = recorded_sets.record(model, train, held, tmp_path, [100, 256], [1], options, lambda line: None)
    assert all(not torch.equal(before[name], p) for name, p in indexer_parameters(model).items())
    kept = torch.load(tmp_path / "256-layer1.pt")
    indices, rows = kept["indices"], torch.arange(256)[:, None]
    assert indices.shape == (256, 20) and indices.dtype == torch.int32
    assert ((indices <= rows) & (indices >= -1)).all()
    assert ((indices >= 0).sum(1) == torch.arange(1, 257).clamp(max=20)).all()
    short = torch.load(tmp_path / "100-layer1.pt")["indices"]
    assert torch.equal(short, indices[:100])  # sets are causal, and a longer text changes none
    watch = recorded_sets.Recorder([1])
    with torch.no_grad():
        hidden_states(model, torch.tensor(held), train_context([256], selector="dense", indexer_loss=watch))
    assert torch.equal(watch.sets[1].indices, indices)
    assert 20 / 256 < about["recall"][256][1] <= 1 and f"recall {about['recall'][256][1]:.3f}" in kept["about"]
    assert json.loads((tmp_path / "about.json").read_text())["top_k"] == 20
    with pytest.raises(ValueError, match="has 256 tokens, but --lengths asks for 300"):
        recorded_sets.record(model, train, held, tmp_path, [300], [1], options, lambda line: None)


def test_stretched_rope_turns_its_slowest_pair_no_further_than_before():
    model = tiny_model()
    model.config.max_position_embeddings = 64
    before = model.get_decoder().rotary_emb.inv_freq.clone()
    assert recorded_sets.stretch_rope(model, 64) == 1.0
    assert recorded_sets.stretch_rope(model, 512) == pytest.approx(8 ** (8 / 6))  # heads of 8
    after = model.get_decoder().rotary_emb.inv_freq
    assert after[0] == before[0] and after[-1] * 8 == pytest.approx(float(before[-1]), rel=1e-5)
    assert model.config.max_position_embeddings == 512


# Memory


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_checkpointed_layer_lets_go_of_its_sets(checkpointing, monkeypatch):
    model = attach(tiny_model(layers=3), IndexerConfig(top_k=6, **SHAPE)).train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    made, choose = [], ops.select_packed

    def spy(*given):
        chosen = choose(*given)
        made.append(weakref.ref(chosen.indices))
        return chosen

    monkeypatch.setattr(ops, "select_packed", spy)
    out = hidden_states(model, torch.arange(40), train_context([40]))
    gc.collect()
    alive = sum(ref() is not None for ref in made)
    assert len(made) == 3 and alive == (0 if checkpointing else 3)
    out.square().sum().backward()
    assert len(made) == (6 if checkpointing else 3)


def test_the_estimate_of_a_gpu_is_near_a_measured_peak():
    """Qwen3-0.6B's shape, 32768 tokens, on an H200: 3.417 GiB in the warm-up's step, of which weights and Adam's states are known."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    shape = dict(bench_models.SHAPES["qwen3-0.6b"][1], num_hidden_layers=1, vocab_size=64)
    model = attach(Qwen3ForCausalLM(Qwen3Config(**shape)), IndexerConfig(top_k=2048, num_heads=16, head_dim=64))
    options = ConvertOptions(seq_len=32768, warmup_tokens=32768, warmup_micro=32768)
    passed = memory.gpu_warmup_bytes(model.bfloat16(), options)
    assert passed == pytest.approx(3.417 * memory.GIB - 1318729728 - 8 * 31657472, rel=0.15)
    longer = dataclasses.replace(options, warmup_tokens=65536)
    assert passed < memory.gpu_warmup_bytes(model, longer) < 2 * passed  # the indexer's part is that of a micro batch
