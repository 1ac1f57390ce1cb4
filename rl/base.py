"""The demo's base model, made on the spot: its own tokenizer, a small Llama-shaped network, a short supervised training.

First lists of facts that are repeated (dense supervision of recall), then documents with many questions about one list
(`pretraining_texts`: right answers), then single tasks of which a share is answered wrongly (`noisy_demonstration`): the model then has the skill and the format but is right only part of the
time, as a base model is, and reinforcement learning has something to sharpen.

A transformer this small needs thousands of steps to discover the two-step circuit that looks a name up in its context (previous-token
head, then match and copy: Olsson et al. 2022, arXiv 2209.11895). `mimetic_init` starts it close to that circuit instead, in the spirit
of Trockman & Kolter 2023 (arXiv 2305.09828): queries aligned with keys, values with outputs, and in the first layer a few heads whose
biases look a fixed number of tokens back. Nothing in it knows a word, a task or an answer; those are learned.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import count
from pathlib import Path
from random import Random
from typing import Any

import torch
import torch.nn.functional as F

from winnow.rewards.demonstrations import noisy_demonstration, pretraining_texts
from winnow.rewards.language import DIGITS, NAMES, NUM_FACTS, THINGS
from winnow.rewards.tasks import generate_tasks
from winnow.rl.rendering import TrainingTemplate
from winnow.rl.threads import torch_threads
from winnow.rollout.schema import Message

END, PAD = "<|end|>", "<|pad|>"
LOOK_BACK = 3  # heads of the first layer that begin by looking 1, 2, 3 tokens back
ROLES = ("user", "assistant", "tool", "system")
CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)

MASTERED = 0.4  # nats per recalled value at which lists of facts grow
Rendered = tuple[list[int], list[bool]]  # token ids and the mask of what is learned
Batch = list[Rendered]


@dataclass(frozen=True, kw_only=True)
class BaseOptions:
    """What the base model is and how long it is trained."""

    seed: int = 0
    vocab_size: int = 768
    hidden: int = 128
    layers: int = 2
    heads: int = 4
    context: int = 1024
    kinds: tuple[str, ...] = ("lookup", "rubric", "tool", "rubric")  # in turn: rubrics need twice the examples
    level: int = 1
    recitals: int = 300  # steps on repeated lists of facts, at most
    documents: int = 40  # steps on documents with many questions
    tasks: int = 64  # steps on single, partly wrong demonstrations
    batch: int = 16  # conversations a step
    lr: float = 3e-3
    noise: float = 0.5  # share of wrong demonstrations
    threads: int = 1  # small matrices: a second thread gains little, and spins where the machine is busy

    def __post_init__(self) -> None:
        for name in ("vocab_size", "hidden", "layers", "heads", "recitals", "documents", "tasks", "batch", "threads"):
            if getattr(self, name) < 1:
                raise ValueError(f"base_model.{name} is {getattr(self, name)}, but it must be at least 1")
        if self.hidden % (2 * self.heads):
            raise ValueError(
                f"base_model.hidden {self.hidden} is not a multiple of twice the {self.heads} heads: rotary halves need it"
            )


def make_base(out: str | Path, options: BaseOptions, progress: Callable[[str], object] = print) -> dict[str, Any]:
    """Trains the model and saves it with its tokenizer as a plain Hugging Face folder. Returns its loss curve and size."""
    torch.manual_seed(options.seed)
    with torch_threads(options.threads):
        rng = Random(options.seed)
        documents = pretraining_texts(options.documents * options.batch, options.seed, options.kinds, options.level)
        tokenizer = make_tokenizer(documents, options.vocab_size, options.context)
        model = make_model(tokenizer, options)
        template = TrainingTemplate(tokenizer)
        conversations = [template.render(c) for c in (*documents, *make_demonstrations(options, rng))]
        curve = fit(model, lessons(tokenizer, conversations, options, rng), tokenizer.pad_token_id, options, progress)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    return {"parameters": sum(p.numel() for p in model.parameters()), "loss": curve, "options": asdict(options)}


def make_tokenizer(documents: Sequence[Sequence[Message]], vocab_size: int, context: int) -> Any:
    """Byte-level BPE trained on the texts: lossless on any text, about one token a word on these."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    special = [PAD, END, *(f"<|{role}|>" for role in ROLES)]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator((m["content"] for document in documents[:1500] for m in document), trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END,
        model_max_length=context,
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def make_model(tokenizer: Any, options: BaseOptions) -> Any:
    """A Llama-shaped model with attention biases, which carry the look-back heads of `mimetic_init`."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=options.hidden, intermediate_size=2 * options.hidden,
        num_hidden_layers=options.layers, num_attention_heads=options.heads, num_key_value_heads=options.heads,
        max_position_embeddings=options.context, tie_word_embeddings=False, attention_bias=True, rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, bos_token_id=None, initializer_range=0.05,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    mimetic_init(model, options)
    return model


@torch.no_grad()
def mimetic_init(model: Any, options: BaseOptions) -> None:
    """Predictions aligned with embeddings, values with outputs in every head, queries with keys in every layer but the first, whose heads look 1, 2, ... back."""
    head = options.hidden // options.heads
    frequency = 10000.0 ** (-torch.arange(0, head, 2) / head)  # radians per token of each rotary pair
    slow = (
        (frequency * 150 < 1.5).repeat(2).nonzero()[:, 0]
    )  # pairs that barely turn over a prompt: they can match content
    model.model.embed_tokens.weight.normal_(0, 1)
    model.lm_head.weight.copy_(0.1 * model.model.embed_tokens.weight)  # what a head copies is also what is predicted
    for number, layer in enumerate(model.model.layers):
        attention = layer.self_attn
        layer.mlp.down_proj.weight *= 0.2
        for h in range(options.heads):
            rows = slice(h * head, (h + 1) * head)
            values = orthogonal(head, options.hidden)
            attention.v_proj.weight[rows] = values
            attention.o_proj.weight[:, rows] = values.T
            if number == 0 and h < LOOK_BACK:
                look_back(attention, rows, h + 1, frequency)
            elif number > 0:
                aligned = torch.zeros(head, options.hidden)
                aligned[slow] = 1.3 * orthogonal(len(slow), options.hidden)
                for projection in (attention.q_proj, attention.k_proj):
                    projection.weight[rows] = aligned + 0.01 * torch.randn_like(aligned)


def look_back(attention: Any, rows: slice, distance: int, frequency: torch.Tensor) -> None:
    """Biases whose rotary product peaks `distance` tokens back: cos(f (t - s - distance)) summed over the six fastest pairs."""
    amplitude = torch.zeros_like(frequency)
    amplitude[:6] = 5.0
    still, phase = torch.zeros_like(frequency), frequency * distance
    attention.q_proj.weight[rows] = 0
    attention.k_proj.weight[rows] = 0
    attention.k_proj.bias[rows] = torch.cat([amplitude, still])
    attention.q_proj.bias[rows] = torch.cat([amplitude * phase.cos(), -amplitude * phase.sin()])


def orthogonal(rows: int, columns: int) -> torch.Tensor:
    """[rows, columns], orthonormal rows."""
    return torch.linalg.qr(torch.randn(columns, rows))[0].T


def recitals(tokenizer: Any, options: BaseOptions, rng: Random) -> Generator[Batch, float, list[Rendered]]:
    """Lists of facts, said twice more in another order; only the repeated values are learned, so every third token asks for recall.

    Short lists first: matching among few facts is found sooner, and then holds among many. The lists grow when the loss that is sent
    back says that their length is mastered. Returns the last ones, for review.
    """
    values = (*THINGS, *map(str, DIGITS))
    ids = {word: tokenizer(f" {word}")["input_ids"] for word in (*NAMES, *values, ".")}
    review: list[Rendered] = []
    steps = 0
    for num_facts, lists in ((4, 64), (8, 40), (16, 20), (NUM_FACTS[1], 12)):
        smooth = 4.0
        while smooth > MASTERED and steps < options.recitals:
            review = [*review[-100:], *(recital(ids, values, num_facts, rng) for _ in range(lists))]
            smooth = 0.7 * smooth + 0.3 * (yield review[-lists:])
            steps += 1
    return review


def recital(
    words: Mapping[str, list[int]], values: Sequence[str], num_facts: int, rng: Random
) -> tuple[list[int], list[bool]]:
    """One list and its two repetitions as tokens, with a mask that is True on the repeated values."""
    names = rng.sample(NAMES, num_facts)
    facts = [(name, rng.choice(values)) for name in names]
    ids: list[int] = []
    mask: list[bool] = []
    for turn in range(3):
        for fact in facts if turn == 0 else rng.sample(facts, num_facts):
            head, value, end = (words[part] for part in (*fact, "."))
            ids += [*head, *value, *end]
            mask += [False] * len(head) + [turn > 0] * len(value) + [False] * len(end)
    return ids, mask


def make_demonstrations(options: BaseOptions, rng: Random) -> list[list[Message]]:
    """`tasks * batch` single tasks of all kinds in turn, answered wrongly `noise` of the time."""
    count = options.tasks * options.batch
    pools = [
        generate_tasks(kind, options.level, count // len(options.kinds) + 1, options.seed + 1) for kind in options.kinds
    ]
    tasks = [pool[i] for i in range(len(pools[0])) for pool in pools][:count]
    return [noisy_demonstration(task, rng, options.noise) for task in tasks]


def lessons(
    tokenizer: Any, conversations: Sequence[Rendered], options: BaseOptions, rng: Random
) -> Generator[tuple[Batch, float], float, None]:
    """Every batch with its share of the learning rate, given the loss of the one before: recitals, then the conversations in order.

    A few recitals stay in every batch of conversations: what was learned first is not forgotten at the switch.
    """
    first = recitals(tokenizer, options, rng)
    batch = next(first)
    try:
        for step in count():
            batch = first.send((yield batch, min(1.0, (step + 1) / 20)))
    except StopIteration as end:
        review = end.value
    for start in range(0, len(conversations), options.batch):
        left = 1 - start / len(conversations)
        rate = min(1.0, (start // options.batch + 1) / 10) * (0.05 + 0.75 * left)
        yield [*conversations[start : start + options.batch], *rng.sample(review, 4)], rate


def fit(
    model: Any,
    source: Generator[tuple[Batch, float], float, None],
    pad_id: int,
    options: BaseOptions,
    progress: Callable[[str], object],
) -> list[float]:
    """Next-token training by AdamW on what `source` gives. Replies count fully, everything else a little."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.lr, betas=(0.9, 0.95), weight_decay=0.01, fused=True)
    curve: list[float] = []
    started = time.perf_counter()
    lesson = next(source, None)
    while lesson is not None:
        batch, rate = lesson
        for group in optimizer.param_groups:
            group["lr"] = options.lr * rate
        tokens, trained = pad(batch, pad_id)
        hidden = model.model(input_ids=tokens).last_hidden_state[:, :-1]
        targets, mask = tokens[:, 1:], trained[:, 1:]
        loss = F.cross_entropy(model.lm_head(hidden[mask]).float(), targets[mask])
        rest = (targets != pad_id) & ~mask
        rest &= torch.rand(rest.shape) < 0.1  # a tenth of the prompt's tokens: the language itself, cheaply
        objective = loss + 0.05 * F.cross_entropy(model.lm_head(hidden[rest]).float(), targets[rest])
        optimizer.zero_grad()
        objective.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        curve.append(round(loss.item(), 4))
        if len(curve) % 40 == 0:
            progress(f"base: step {len(curve)}  loss {curve[-1]:.3f}  {time.perf_counter() - started:.0f} s")
        try:
            lesson = source.send(curve[-1])
        except StopIteration:
            lesson = None
    return curve


def pad(rendered: Sequence[tuple[list[int], list[bool]]], pad_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """tokens int64 and reply mask bool, both [batch, longest], padded on the right: causal attention never looks there."""
    longest = max(len(ids) for ids, _ in rendered)
    tokens = torch.full((len(rendered), longest), pad_id)
    mask = torch.zeros(len(rendered), longest, dtype=torch.bool)
    for row, (ids, trained) in enumerate(rendered):
        tokens[row, : len(ids)] = torch.tensor(ids)
        mask[row, : len(ids)] = torch.tensor(trained)
    return tokens, mask
