"""Thinking and non-thinking by the chat template's own switch: in episodes, in training data, in evaluation, and refused where it does nothing."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from winnow.distill.data import Provenance, examine
from winnow.distill.store import read_rows, write_rows
from winnow.distill.student import make_examples
from winnow.models.load import load_tokenizer
from winnow.rewards.contract import grade
from winnow.rewards.demonstrations import pretraining_texts
from winnow.rewards.registry import get_reward
from winnow.rl.base import make_tokenizer
from winnow.rl.cli import main
from winnow.rl.cluster import worker_spec
from winnow.rl.config import Config, ConfigError, make_config
from winnow.rl.distillation import data_requests
from winnow.rl.generate import template_options
from winnow.rl.holdout import holdout_requests
from winnow.rl.pipeline_config import DataConfig, load_pipeline, make_pipeline
from winnow.rl.rendering import TrainingTemplate, check_templates
from winnow.rl.sampler import TaskSampler, domain_tasks
from winnow.rl.verbs import find_config
from winnow.rollout.local_pool import LocalPool
from winnow.rollout.template import ChatTemplate

# As Qwen3's: thinking is left open, or closed at once; the reasoning of a reply is taken out once another question follows.
SWITCHED = """{%- for m in messages -%}
{%- if m.role == 'assistant' -%}
{%- set said = m.content.split('</think>')[-1] if not loop.last else m.content -%}
a {{ said }}{{ eos_token }}
{% else -%}
q {{ m.content }}
{% endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}a {% if enable_thinking is defined and enable_thinking is false %}<think></think>{% endif %}{%- endif -%}"""
CLOSED = "<think></think>"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny random model whose template has the switch."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    folder = tmp_path_factory.mktemp("models") / "thinker"
    torch.manual_seed(0)
    tokenizer = make_tokenizer(pretraining_texts(12, 0), 400, 512)
    tokenizer.chat_template = SWITCHED
    shape = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
    }
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id, "bos_token_id": None}
    Qwen2ForCausalLM(
        Qwen2Config(vocab_size=len(tokenizer), max_position_embeddings=512, **shape, **ends)
    ).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def two_modes(model: str) -> Config:
    same = {"source": "addition", "count": 4, "holdout": 2, "quota": 2, "max_tokens": 4}
    off = {"name": "off", "template": {"enable_thinking": False}, **same}
    domains = [off, {"name": "on", "template": {"enable_thinking": True}, **same}, {"name": "plain", **same}]
    return make_config({"model": {"path": model}, "domains": domains, "rollout": {"samples": 2, "num_pages": 128}})


def test_every_kind_of_request_is_asked_in_its_domains_mode(model: str, tmp_path: Path) -> None:
    config, tokenizer = two_modes(model), load_tokenizer(model)
    sampler = TaskSampler(domain_tasks(config, "train"), config)
    asked = {
        "episodes": [*sampler.requests(1), *sampler.extra(1, 0, "off", 1, ())],
        "data": data_requests(config, DataConfig(tasks=2, samples=2), "x"),
        "evaluation": holdout_requests(config, "e"),
    }
    with LocalPool(worker_spec(config)) as pool:
        for kind, requests in asked.items():
            groups = list(pool.generate(requests))
            for group in groups:
                drawn = group.trajectories[0]
                prompt = tokenizer.decode(drawn.tokens[: int(drawn.loss_mask.argmax())])
                assert prompt.endswith(CLOSED) == (drawn.domain == "off"), (kind, drawn.domain, prompt)
            assert {group.request.task.domain for group in groups} == {"off", "on", "plain"}, kind
    graded = grade(get_reward, list(groups))
    rows = [
        row
        for g in graded
        for row in examine(g, Provenance(specialist="s", checkpoint="c", config_hash="h")).rows
        if row
    ]
    assert {row.domain: dict(row.template) for row in rows}["off"] == {"enable_thinking": False}
    back = read_rows(write_rows(rows, tmp_path))
    assert [row.template for row in back] == [row.template for row in rows]
    examples, _ = make_examples(back, TrainingTemplate(tokenizer))
    for example, row in zip(examples, back, strict=True):
        prompt = tokenizer.decode(example.tokens[: int(example.loss_mask.argmax())])
        assert prompt.endswith(CLOSED) == (row.domain == "off"), (
            "the student learns in the mode that the row was drawn in"
        )


@pytest.mark.parametrize("options", [{"enable_thinking": False}, {"enable_thinking": True}, {}])
def test_training_data_are_the_tokens_of_a_rollout_with_the_reasoning_in_them(
    model: str, options: dict[str, Any]
) -> None:
    tokenizer = load_tokenizer(model)
    chat, question = ChatTemplate(tokenizer), [{"role": "user", "content": "What is 7 + 5?"}]
    reply = "12" if options.get("enable_thinking") is False else "<think>7 and 5</think>12"
    expected = chat.prompt_ids(question, options)
    drawn = [*tokenizer(reply, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    ids, mask = TrainingTemplate(tokenizer).render([*question, {"role": "assistant", "content": reply}], options)
    assert ids == expected + drawn and [i for i, m in zip(ids, mask, strict=True) if m] == drawn
    longer = [*question, {"role": "assistant", "content": reply}, *question, {"role": "assistant", "content": "13"}]
    both, _ = TrainingTemplate(tokenizer).render(longer, options)
    between = chat.observation_ids(longer[:2], question, drawn[-1], options)
    assert both[: len(ids) + len(between)] == ids + between, "past replies stay as they were drawn, as in an episode"


def test_an_option_that_does_nothing_is_refused_before_anything_starts(model: str) -> None:
    chat = ChatTemplate(load_tokenizer(model))
    question = [{"role": "user", "content": "?"}]
    assert chat.prompt_ids(question, {"enable_thnking": False}) == chat.prompt_ids(question), "absent anyway"
    with pytest.raises(
        ValueError, match=r"'enable_thnking' ?=?.*would do nothing|enable_thnking=True would do nothing"
    ):
        chat.prompt_ids(question, {"enable_thnking": True})
    with pytest.raises(ValueError, match="set by the rollout itself"):
        chat.prompt_ids(question, {"tokenize": True})
    other = {"chat_template": "{{ messages[0].content }} {{ mood }}", "mood": "kind"}
    assert chat.tokenizer.decode(chat.prompt_ids(question, other)) == "? kind"
    config = two_modes(model)
    check_templates(model, config.domains)
    strange = dataclasses.replace(config.domains[0], template={"reasoning_effort": "high"})
    with pytest.raises(ValueError, match=r"domain 'off': template option reasoning_effort='high' would do nothing"):
        check_templates(model, [strange])


def test_the_command_line_reads_options() -> None:
    assert template_options(["enable_thinking=false", "mood=kind"]) == {"enable_thinking": False, "mood": "kind"}
    with pytest.raises(ValueError, match="not of the form KEY=VALUE"):
        template_options(["enable_thinking"])


def test_a_specialist_of_another_mode_than_the_pipelines_is_refused() -> None:
    domain = {"name": "sums", "source": "addition", "template": {"enable_thinking": False}}
    values: dict[str, Any] = {"model": "m", "stages": ["specialists"], "run": {"domains": [domain]}}
    make_pipeline(values)
    own = {"sums": {"domains": [{"name": "sums", "template": {"enable_thinking": True}}]}}
    with pytest.raises(ConfigError, match=r"specialists\.sums asks with template options .*True.*another mode"):
        make_pipeline({**values, "specialists": own})


SPECIALISTS = ("maths", "logic", "coding", "agent", "alignment")


@pytest.mark.parametrize("name", [f"{name}{mode}" for name in SPECIALISTS for mode in ("", "_thinking")])
def test_every_specialist_has_a_config_of_each_mode(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", name, "model.path=m", "--dry-run"]) == 0
    wanted = "true" if name.endswith("_thinking") else "false"
    assert f"enable_thinking: {wanted}" in capsys.readouterr().out


@pytest.mark.slow
def test_the_pipeline_of_all_specialists_has_both_modes_of_each(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["pipeline", "specialists", "--dry-run"]) == 0
    config = load_pipeline(find_config("specialists"))
    modes = {d: config.stage_run("specialist", "m", d).domains[0].template for d in config.domains}
    assert len(modes) == 2 * len(SPECIALISTS)
    assert all(options == {"enable_thinking": name.endswith("-thinking")} for name, options in modes.items()), modes
