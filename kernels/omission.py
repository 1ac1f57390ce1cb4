"""What leaving a key out of a query's set does to the attention's output.

Without key s a head's output moves by p_s (v_s - o) / (1 - p_s), exactly. Behind the output projection W = [W_1 ... W_H], all heads:

    A(t, s) = sum over h of p_h(t, s) / (1 - p_h(t, s)) |W_h (v_h(s) - o_h(t))|

An indexer that learns A, its rows divided by their sums, keeps the keys whose absence is seen: not those of heads that move little, nor those
whose value comes out anyway (docs/experiments.md). |W_h (v - o)|^2 = theirs + own - 2 pull . v, so nothing of width E is made for a pair of
tokens, and nothing of size [L, L] at all.

A key that a head attends to alone *is* the output: the quotient is that of two small numbers, of which 16 bits leave little. So 1 - p counts as
REST at least, and the whole as p^2 |W_h (v, o)| at least, about what the head would lose.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from winnow.kernels.packing import Batch

REST = 0.01
TINY = 1e-20  # added to every squared distance: a query that sees one key only has no distance to it, and still a set


class Omission(NamedTuple):
    """values [T, Hkv, D_v]: v; pull [T, H, D_v]: W_h^T W_h o_h; own, theirs fp32 [T, H]: |W_h o_h|^2, and |W_h v_h|^2 of each token as a key."""

    values: Tensor
    pull: Tensor
    own: Tensor
    theirs: Tensor

    def rows(self, a: int, b: int) -> Omission:
        return Omission(*(x[a:b] for x in self))

    def padded(self, batch: Batch) -> Omission:
        """[N, L, ...] of a batch's sequences."""
        return Omission(*(batch.pad(x) for x in self))

    def tile(self, a: int, b: int, keys: int) -> Omission:
        """Of a padded batch: queries a to b, and the first keys."""
        return Omission(self.values[:, :keys], self.pull[:, a:b], self.own[:, a:b], self.theirs[:, :keys])


@torch.no_grad()
def omission(values: Tensor, out: Tensor, weight: Tensor) -> Omission:
    """values [T, Hkv, D_v], out [T, H, D_v] of an attention over the sets in question, weight [E, H * D_v] of its output projection.

    ValueError where the projection takes other heads.
    """
    tokens, heads, dim = out.shape
    kv_heads = values.shape[1]
    if weight.shape[1] != heads * dim or values.shape[2] != dim:
        raise ValueError(
            f"omission: an output projection of {weight.shape[1]} inputs does not take {heads} heads of {dim} whose values have "
            f"{values.shape[2]}: set the indexer's target to 'attention'"
        )
    wide = torch.promote_types(out.dtype, torch.float32)
    split = weight.to(wide).view(-1, heads, dim).permute(1, 2, 0)  # [H, D, E]
    gram = split @ split.mT  # [H, D, D]
    o = out.to(wide).transpose(0, 1)  # [H, T, D]
    pull = o @ gram
    v = values.to(wide).transpose(0, 1)[:, None]  # [Hkv, 1, T, D]
    theirs = ((v @ gram.view(kv_heads, -1, dim, dim)) * v).sum(-1).view(heads, tokens)
    own = (pull * o).sum(-1)
    return Omission(values.detach(), pull.transpose(0, 1).to(out.dtype), own.T.contiguous(), theirs.T.contiguous())
