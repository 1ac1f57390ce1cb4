"""The lightning indexer (DeepSeek-V3.2, arXiv 2512.02556) as a module beside `self_attn`.

    q = RoPE(W_q x) [T, H_I, D_I]     k = RoPE(LayerNorm(W_k x)) [T, D_I]     w = W_w x * H_I^-1/2 * D_I^-1/2 [T, H_I]

One key per token serves every index head. RoPE turns the first `rope_dim` dims with the model's own angles. Weights and arithmetic are
fp32; q and k of a model in 16 bits are rounded to its dtype at the end, so that cache and tensor cores take them, learner and engine alike.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

from winnow.kernels import ops
from winnow.models import joined

ROPE_LAYOUTS = ("half", "interleaved")
TARGETS = ("attention", "output")


@dataclass(frozen=True)
class IndexerConfig:
    """Shape of the indexers of a model, and what they learn; kept in its config.json under "winnow".

    target: "attention", summed over heads, as DeepSeek-V3.2 has it; or what the layer's "output" loses without a key (kernels/omission.py).
    """

    top_k: int
    num_heads: int = 4
    head_dim: int = 32
    rope_dim: int = 16
    rope_layout: str = "half"
    norm_eps: float = 1e-6
    target: str = "attention"
    leaders: tuple[int, ...] = ()  # IndexShare: the layers with an indexer, the first among them; empty: every layer

    def __post_init__(self) -> None:
        for name in ("top_k", "num_heads", "head_dim"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise ValueError(f"indexer.{name} is {getattr(self, name)!r}, but it must be an integer >= 1")
        if self.rope_dim % 2 or not 0 <= self.rope_dim <= self.head_dim:
            raise ValueError(
                f"indexer.rope_dim is {self.rope_dim}, but it must be even and within 0..head_dim={self.head_dim}"
            )
        if self.rope_layout not in ROPE_LAYOUTS:
            raise ValueError(f"indexer.rope_layout is {self.rope_layout!r}, but it must be one of {ROPE_LAYOUTS}")
        if self.target not in TARGETS:
            raise ValueError(f"indexer.target is {self.target!r}, but it must be one of {TARGETS}")
        object.__setattr__(self, "leaders", tuple(self.leaders))  # a list in config.json
        if self.leaders and (self.leaders[0] != 0 or list(self.leaders) != sorted(set(self.leaders))):
            raise ValueError(
                f"indexer.leaders is {self.leaders}, but it must be ascending and begin with layer 0: a layer without an indexer "
                "uses that of an earlier one"
            )

    def leader_of(self, layer: int) -> int:
        """The layer whose indexer serves this one."""
        return max((leader for leader in self.leaders if leader <= layer), default=layer)

    def last_served(self, leader: int, num_layers: int) -> int:
        """The last layer that the indexer of `leader` serves."""
        if not self.leaders:
            return leader
        return min((other for other in self.leaders if other > leader), default=num_layers) - 1

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "leaders": list(self.leaders)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> IndexerConfig:
        known = {f.name for f in fields(cls)}
        strange = sorted(set(values) - known)
        if strange or "top_k" not in values:
            raise ValueError(
                f"the winnow section of config.json has {sorted(values)}; known keys are {sorted(known)}, top_k is required"
            )
        return cls(**values)


def rope_angles(cos: Tensor, sin: Tensor, rope_dim: int) -> tuple[Tensor, Tensor]:
    """The model's cos and sin [T, D] (both halves alike) -> [T, rope_dim / 2]: every (D / rope_dim)-th angle.

    That is RoPE of width rope_dim with the same base and scaling.
    """
    stride = cos.shape[-1] // rope_dim
    half = cos.shape[-1] // 2
    return cos[..., :half:stride].float(), sin[..., :half:stride].float()


def rotate(x: Tensor, cos: Tensor, sin: Tensor, layout: str) -> Tensor:
    """Turn the first 2 * cos.shape[-1] dims of x [..., D_I]; cos and sin broadcast against x[..., : rope_dim / 2]."""
    width = 2 * cos.shape[-1]
    head, rest = x[..., :width], x[..., width:]
    if layout == "half":
        a, b = head.chunk(2, dim=-1)
        turned = torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)
    else:
        a, b = head[..., 0::2], head[..., 1::2]
        turned = torch.stack((a * cos - b * sin, b * cos + a * sin), dim=-1).flatten(-2)
    return torch.cat((turned, rest), dim=-1)


def rounded(x: Tensor, like: Tensor) -> Tensor:
    """x fp32 in the dtype of the model's hidden states where that has 16 bits."""
    return x.to(like.dtype) if like.element_size() < 4 else x


@contextmanager
def tensor_cores(dtype: torch.dtype) -> Iterator[None]:
    """fp32 products in TF32 where the model computes in 16 bits: its numbers are exact in TF32, and the indexer's weights keep two bits
    more than the model's own have. On both sides, so both choose from the same scores. Nothing changes for an fp32 model.
    """
    settings = torch.backends.cuda.matmul
    before = settings.fp32_precision
    settings.fp32_precision = "tf32" if dtype in (torch.bfloat16, torch.float16) else before
    try:
        yield
    finally:
        settings.fp32_precision = before


class Indexer(nn.Module):
    """`calls` counts how often queries were scored, so that a test can see that short contexts and replay leave the indexer alone."""

    def __init__(self, hidden_size: int, config: IndexerConfig):
        super().__init__()
        self.config = config
        self.calls = 0
        self.wq = nn.Linear(hidden_size, config.num_heads * config.head_dim, bias=False, dtype=torch.float32)
        self.wk = nn.Linear(hidden_size, config.head_dim, bias=False, dtype=torch.float32)
        self.k_norm = nn.LayerNorm(config.head_dim, eps=config.norm_eps, dtype=torch.float32)
        self.ww = nn.Linear(hidden_size, config.num_heads, bias=False, dtype=torch.float32)

    def keys(self, hidden: Tensor, *rest: Tensor) -> Tensor:
        """hidden [T, C], cos and sin [T, D] -> [T, D_I]."""
        k = self.k_norm(_product(hidden, self.wk))
        return self._turned(k[:, None], hidden, *rest)[:, 0]

    def queries(self, hidden: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor]:
        """hidden [T, C], cos and sin [T, D] -> q [T, H_I, D_I], w [T, H_I]."""
        self.calls += 1
        q = _product(hidden, self.wq).view(-1, self.config.num_heads, self.config.head_dim)
        w = _product(hidden, self.ww) * (self.config.num_heads * self.config.head_dim) ** -0.5
        return self._turned(q, hidden, *rest), w

    def forward(self, *inputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The layer's inputs [T, ...], detached by the caller -> q [T, H_I, D_I], k [T, D_I], w [T, H_I]."""
        together = self._together(inputs[0])
        if together is None:
            q, w = self.queries(*inputs)
            return q, self.keys(*inputs), w
        self.calls += 1
        shape = self.config
        q, k, w = together.split([shape.num_heads * shape.head_dim, shape.head_dim, shape.num_heads], -1)
        q = self._turned(q.unflatten(-1, (shape.num_heads, shape.head_dim)), *inputs)
        k = self._turned(self.k_norm(k)[:, None], *inputs)[:, 0]
        return q, k, w * (shape.num_heads * shape.head_dim) ** -0.5

    def _together(self, hidden: Tensor) -> Tensor | None:
        """The products of hidden [T, C] side by side, fp32, as one; None where anything learns or the weights are not joined."""
        weights = [linear.weight for linear in joined.of_indexer(self)]
        learns = torch.is_grad_enabled() and any(x.requires_grad for x in (hidden, self.k_norm.weight, *weights))
        weight = None if learns else joined.whole(weights)
        if weight is None:
            return None
        with tensor_cores(hidden.dtype):
            return hidden.float() @ weight.T

    def _turned(self, x: Tensor, hidden: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """x fp32 [T, heads, D_I] after RoPE, `rounded`."""
        width, layout = self.config.rope_dim, self.config.rope_layout
        rows = ops.train_rows_of(x)
        if width and rows is not None:
            return rows.turn(x, cos, sin, width, layout, hidden.dtype if hidden.element_size() < 4 else x.dtype)
        if width:
            c, s = rope_angles(cos, sin, width)
            x = rotate(x, c[:, None], s[:, None], layout)
        return rounded(x, hidden)


def _product(hidden: Tensor, linear: nn.Linear) -> Tensor:
    """fp32 [T, N] of hidden [T, C], on the tensor cores where `tensor_cores` says so."""
    if hidden.is_cuda and hidden.element_size() < 4:
        return _TensorCores.apply(hidden, linear.weight)
    return linear(hidden.float())


class _TensorCores(torch.autograd.Function):
    """hidden weight^T and its gradients, all in TF32: torch's own would be computed when the setting is over, and in plain fp32."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(hidden, weight)
        with tensor_cores(hidden.dtype):
            return hidden.float() @ weight.T

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        hidden, weight = ctx.saved_tensors
        with tensor_cores(hidden.dtype):
            into = (grads[0] @ weight).to(hidden.dtype) if ctx.needs_input_grad[0] else None
            return into, grads[0].T @ hidden.float() if ctx.needs_input_grad[1] else None
