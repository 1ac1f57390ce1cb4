"""The dense model as the teacher of its own sparse conversion: it learns to say under top-k what it said without.

    loss = sum over rows of KL(dense || sparse) over the vocabulary, in fp32, `CHUNK` rows at a time

DeepSeek-V3.2 (section 2.1) trains its sparse stage on text, trillions of tokens away from forgetting. A few megabytes of text make a small
model forget more than its sparse attention ever cost it (docs/experiments.md): the language loss of a book pulls it to that book, while
this loss is zero for the dense model itself and has its least where sparsity costs least. Knowledge distillation: Hinton et al. 2015.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from winnow.models.context import train_context
from winnow.models.forward import hidden_states, lm_head_weight
from winnow.rl.convert_data import Packed

CHUNK = 1024  # rows whose logits are alive at a time


class Teacher:
    """A frozen copy of the model as it is now, attending to everything."""

    def __init__(self, model: Any) -> None:
        self.model = copy.deepcopy(model).eval().requires_grad_(False)

    @torch.no_grad()
    def hidden(self, batch: Packed) -> Tensor:
        """What the dense model's head reads: [T, H]."""
        device = lm_head_weight(self.model).device
        return hidden_states(
            self.model, batch.tokens.to(device), train_context(batch.lengths, device, selector="dense")
        )

    def loss(self, batch: Packed, student: Any, student_hidden: Tensor) -> tuple[Tensor, int]:
        """Summed KL(dense || student) of a batch's next tokens, with gradient for the student, and their number."""
        rows = batch.next_token_rows.to(student_hidden.device)
        total = summed_kl(
            self.hidden(batch)[rows], lm_head_weight(self.model), student_hidden[rows], lm_head_weight(student)
        )
        return total, len(rows)


def summed_kl(teacher: Tensor, teacher_head: Tensor, student: Tensor, student_head: Tensor) -> Tensor:
    """Sum over rows of KL(softmax(teacher @ teacher_head.T) || softmax(student @ student_head.T)), fp32 scalar.

    teacher, student: hidden states [N, H]; heads [V, H]. Gradient for `student` and `student_head`; logits are made again in the
    backward, so no [N, V] tensor is kept. Raises ValueError when rows or vocabularies differ.
    """
    if len(teacher) != len(student) or len(teacher_head) != len(student_head):
        raise ValueError(
            f"a teacher with {len(teacher)} rows and {len(teacher_head)} tokens cannot teach {len(student)} rows and "
            f"{len(student_head)} tokens: both must read the same text with the same vocabulary"
        )
    total = student.new_zeros((), dtype=torch.float32)
    for a in range(0, len(student), CHUNK):
        piece = checkpoint(
            _piece, teacher[a : a + CHUNK], teacher_head, student[a : a + CHUNK], student_head, use_reentrant=False
        )
        assert isinstance(piece, Tensor)
        total = total + piece
    return total


def _piece(teacher: Tensor, teacher_head: Tensor, student: Tensor, student_head: Tensor) -> Tensor:
    with torch.no_grad():
        wanted = torch.log_softmax((teacher @ teacher_head.T).float(), dim=-1)
    said = torch.log_softmax((student @ student_head.T).float(), dim=-1)
    return torch.nn.functional.kl_div(said, wanted, reduction="sum", log_target=True)
