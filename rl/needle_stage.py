"""Teaches a dense model the needle task before it is converted: `needle_steps=` of `winnow convert`.

A model that cannot find needles with dense attention shows nothing about what sparse attention loses. Texts of many lengths with facts and
questions (`needles.py`); the loss is the language loss of the whole text plus that of the answers alone, each a mean, so that the
answers count and the language is kept. A share of them, `needle_chat`, asks as a user does, in the model's chat template
(`needle_tasks.py`): without it a model that finds every fact says none of them when it is asked in a conversation.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from winnow.models.attach import base_parameters, unfreeze
from winnow.rl.convert_data import Packed, pack
from winnow.rl.convert_options import ConvertOptions
from winnow.rl.needle_tasks import NeedleTasks, answered, question_tokens
from winnow.rl.needles import PLACES, Haystack, make_haystack, room_needed
from winnow.rl.retention import token_losses
from winnow.rl.stages import MasterAdamW, checkpointed, schedule
from winnow.rollout.template import ChatTemplate

SHORTEST = 8  # texts are 1/8, 1/4, 1/2 and the whole of seq_len long


def teach_needles(
    model: Any, tokenizer: Any, sequences: Sequence[Sequence[int]], options: ConvertOptions, progress: Callable[[str], object]
) -> list[list[float]]:  # fmt: skip
    """Trains all weights of the dense `model`; returns [language loss, loss of the answers] of every step.

    ValueError when not even one needle fits into seq_len tokens.
    """
    base = base_parameters(model)
    unfreeze(base)
    adamw, rng = MasterAdamW(base, options.needle_lr), random.Random(options.seed + 31)
    text = [token for sequence in sequences for token in sequence]
    each = max(1, room_needed(tokenizer, 1))
    curve: list[list[float]] = []
    with checkpointed(model, options.checkpointing):
        for number in range(options.needle_steps):
            begin = time.monotonic()
            batch, answers = needle_batch(tokenizer, text, options, each, rng)
            losses, _ = token_losses(model, batch, selector="dense")
            asked = answers[batch.next_token_rows + 1].to(losses.device)
            language, answered = losses.mean(), losses[asked].mean()
            (language + answered).backward()
            adamw.step(schedule(number, options.needle_steps), options.max_grad_norm)
            curve.append([float(language.detach()), float(answered.detach())])
            progress(
                f"needles {number + 1}/{options.needle_steps}  loss {curve[-1][0]:.4f}  answers {curve[-1][1]:.4f}  "
                f"{time.monotonic() - begin:.1f} s"
            )
    return curve


def needle_batch(
    tokenizer: Any, text: Sequence[int], options: ConvertOptions, each: int, rng: random.Random
) -> tuple[Packed, Tensor]:
    """About needle_tokens tokens of texts of several lengths, and bool [T]: which tokens are answers. each: room of one needle."""
    stacks: list[Haystack] = []
    template = ChatTemplate(tokenizer) if options.needle_chat else None
    missing = options.needle_tokens
    while missing > 0 or not stacks:
        lengths = [n for n in (options.seq_len >> i for i in range(SHORTEST.bit_length())) if n >= 4 * each]
        fitting = [n for n in lengths if n <= missing] or lengths[-1:]
        if not fitting:
            raise ValueError(
                f"convert.needle_steps: a needle takes {each} tokens, too many for texts of seq_len={options.seq_len}; set a larger one"
            )
        length = rng.choice(fitting)
        stack = None
        if template is not None and rng.random() < options.needle_chat:
            stack = chat_haystack(template, text, length, each, rng)
        if stack is None:
            count = max(1, min(len(PLACES), rng.randint(4, 4 + length // (4 * each)), length // (2 * each)))
            stack = make_haystack(tokenizer, text, length, count, rng)
        stacks.append(stack)
        missing -= length
    batch = pack([stack.tokens for stack in stacks])
    answers = torch.zeros(len(batch.tokens), dtype=torch.bool)
    start = 0
    for stack in stacks:
        for a, b in stack.answers:
            answers[start + a : start + b] = True
        start += len(stack.tokens)
    return batch, answers


def chat_haystack(
    template: ChatTemplate, text: Sequence[int], length: int, each: int, rng: random.Random
) -> Haystack | None:
    """A conversation of at most `length` tokens that asks for one to three facts of a text; its answer is the whole reply. None where the
    question and its template leave no room for a text."""
    asked = rng.randint(1, 3)
    room = (
        length - (asked + 1) * each - question_tokens(template, asked)
    )  # behind the reply, the question and the template
    most = min(len(PLACES), room // (2 * each))
    if most < asked:
        return None
    options = NeedleTasks(
        tokens=length - (asked + 1) * each, facts=max(asked, min(most, rng.randint(4, 4 + length // (4 * each)))), asked=asked
    )  # fmt: skip
    tokens, reply = answered(template, text, options, rng)
    return Haystack(tokens, [reply], [])
