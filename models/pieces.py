"""A training step of a small model as CUDA graphs: everything that concerns a token alone, between one layer's attention and the next's.

    embedding ─> [norm, q k v, turn] ─> attention ─> [o, sum, norm, MLP, sum, norm, q k v, turn] ─> attention ─> ... ─> [... sum, norm] ─> states
                      piece 0                                        piece 1                                              piece L

A layer is some seventy launches forward and back; at a few microseconds of the device each the host cannot follow, and a model of 135M waits for
it three quarters of a step. Of these a piece is two. Attention stays as it is: what it launches depends on the sequences.

An indexer that does not learn is part of its layer's piece. Graphs have one number of rows, `capacity`; tokens fill the first of them. What
the others hold goes nowhere: their gradients are zero, and no piece looks from one row to another. Numbers lie where they are until the next
step, so nothing else may run forward between a forward pass and its backward; passes without gradients take the other way
(`hidden_states`). With a larger batch everything is captured anew; much smaller ones have pieces of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from winnow.kernels import ops
from winnow.kernels.branch import captured
from winnow.models import training
from winnow.models.context import ForwardContext
from winnow.models.forward import hidden_states
from winnow.models.inference import takes

STEP = 1024  # rows by which a capacity grows
ROOM = 1.125  # a capacity over the tokens that it is made for
LEAST = 8  # a batch of less than an eighth of the capacity takes smaller pieces


Run = Callable[..., tuple[Tensor, ...]]


class Piece:
    """One piece: `run` as it is; inputs, outputs and gradients where its graphs have them."""

    def __init__(self, run: Run, inputs: Sequence[Tensor], parameters: Sequence[Tensor]) -> None:
        self.run = run
        self.inputs = [x.detach().requires_grad_() for x in inputs]
        self.parameters = list(parameters)
        self.outputs: tuple[Tensor, ...] = ()
        self.into: tuple[Tensor, ...] = ()  # the gradients of the outputs that have any
        self.back: tuple[Tensor | None, ...] = ()  # of inputs and parameters
        self.forward: Any = None
        self.backward: Any = None
        self.passes = 0  # how often it ran forward: what lies here is the last one's


class _Replay(torch.autograd.Function):
    """A piece's graphs. Its parameters are given for their gradients alone."""

    @staticmethod
    def forward(ctx: Any, piece: Piece, *given: Tensor) -> tuple[Tensor, ...]:
        for static, x in zip(piece.inputs, given, strict=False):
            _move(static.data, x)
        piece.forward.replay()
        piece.passes += 1
        ctx.piece, ctx.number = piece, piece.passes
        ctx.set_materialize_grads(False)
        outputs = tuple(x.detach() for x in piece.outputs)
        ctx.mark_non_differentiable(
            *(x for x, kept in zip(outputs, piece.outputs, strict=True) if not kept.requires_grad)
        )
        return outputs

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        piece: Piece = ctx.piece
        if ctx.number != piece.passes:
            raise RuntimeError(
                "a backward pass through graphs whose numbers are those of a later forward pass: run each backward before the next forward, "
                "or set learner.cuda_graphs to false"
            )
        wanted = [g for g, x in zip(grads, piece.outputs, strict=True) if x.requires_grad]
        for static, grad in zip(piece.into, wanted, strict=True):
            if grad is None:
                static.zero_()
            else:
                _move(static, grad)
        piece.backward.replay()
        # In 16 bits they are taken into fp32 sums before the next pass (`Optimizer.absorb`); in fp32 they are those sums, and are given away.
        return None, *(g if g is None else g.clone() if g.dtype == torch.float32 else g.detach() for g in piece.back)


class _Fill(torch.autograd.Function):
    """x [T, ...] into the first rows of a static tensor, which is the result."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, static: Tensor) -> Tensor:
        ctx.tokens = len(x)
        static[: len(x)] = x
        return static.data  # of versions of its own: what another layer writes beside it changes nothing here

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0][: ctx.tokens], None


class _Cut(torch.autograd.Function):
    """The first rows of x; their gradient goes into the first rows of a static tensor, whose others are zero."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, tokens: int, static: Tensor) -> Tensor:
        ctx.static, ctx.tokens = static, tokens
        return x[:tokens].data

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        ctx.static[: ctx.tokens] = grads[0]
        return ctx.static.data, None, None


def _move(static: Tensor, x: Tensor) -> None:
    if x.data_ptr() != static.data_ptr():
        static.copy_(x)


class Pieces:
    """The pieces of a model of `inference.FAMILIES` on one device. capture False: without graphs, which is how a CPU tests it; least: rows that
    they have at any rate."""

    def __init__(self, model: Any, capture: bool, least: int = 0) -> None:
        assert takes(model), f"no pieces are known of a {model.config.model_type} model"
        self.decoder, self.model, self.capture, self.least = model.get_decoder(), model, capture, least
        self.captures = self._made = 0
        self.smaller: Pieces | None = None
        self._indexing = False  # whether they hold the indexers
        self._tokens = 0  # rows that hold something
        self._pieces: list[Piece] = []

    @property
    def capacity(self) -> int:
        """Rows that the pieces have, or will have from their first batch on unless it is larger."""
        return max(self._made, self.least)

    @property
    def sizes(self) -> list[int]:
        """The capacities of these pieces and of the smaller ones. A product of another number of rows rounds elsewhere: a run that goes on with
        other sizes goes on with other bits."""
        return [self.capacity, *(self.smaller.sizes if self.smaller is not None else [])]

    def reserve(self, sizes: Sequence[int]) -> None:
        """Takes over the `sizes` of another run, before the first batch."""
        assert self._made == 0, "these pieces have run already"
        self.least = sizes[0]
        if len(sizes) > 1:
            self.smaller = Pieces(self.model, self.capture)
            self.smaller.reserve(sizes[1:])

    def states(self, model: Any, input_ids: Tensor, ctx: ForwardContext) -> Tensor:
        """`hidden_states`, through the pieces where they can: with gradients, of this model, with enough tokens."""
        layers, tokens = self.decoder.layers, len(input_ids)
        rows = ops.train_rows_of(self.decoder.embed_tokens.weight)
        fits = 0 < tokens == len(ctx.positions)
        if model is not self.model or rows is None or not torch.is_grad_enabled() or ctx.coupled or not fits:
            return hidden_states(model, input_ids, ctx)
        if tokens * LEAST < self.capacity and self.capacity > STEP:
            least = -(-self.capacity // (LEAST * STEP)) * STEP
            self.smaller = self.smaller or Pieces(model, self.capture, least)
            return self.smaller.states(model, input_ids, ctx)
        x = torch.nn.functional.embedding(input_ids, self.decoder.embed_tokens.weight)
        cos, sin = (angle[0] for angle in self.decoder.rotary_emb(x[None], ctx.positions[None]))  # [T, D]
        if not all(training.knows(layer, x[None], cos, ctx) for layer in layers):
            return hidden_states(model, input_ids, ctx)
        indexing = ctx.scores and ctx.selection_in is None and self._frozen()
        wanted = self.capacity if tokens <= self.capacity else -(-int(tokens * ROOM) // STEP) * STEP
        if wanted != self._made or indexing != self._indexing:
            self._indexing = indexing
            self._make(wanted, x, cos, rows)
        self._enter(tokens, cos, sin)
        residual = _Fill.apply(x, self._first)
        y, q, k, v, *projected = self._run(0, residual)
        for number, layer in enumerate(layers):
            q, k, v = (
                _Cut.apply(part, tokens, grads[number]) for part, grads in zip((q, k, v), self._heads_back, strict=True)
            )
            scored = tuple(part[:tokens] for part in projected)
            out = training.attend(layer.self_attn, y[:tokens], q, k, v, cos, sin, ctx, scored)
            out = _Fill.apply(out, self._out[number])
            if number + 1 < len(layers):
                residual, y, q, k, v, *projected = self._run(number + 1, residual, out)
            else:
                (y,) = self._run(number + 1, residual, out)
        ctx.check_faults()
        return _Cut.apply(y, tokens, self._last_back)

    def _frozen(self) -> bool:
        """Whether no indexer learns."""
        indexers = (getattr(layer.self_attn, "indexer", None) for layer in self.decoder.layers)
        return not any(p.requires_grad for indexer in indexers if indexer is not None for p in indexer.parameters())

    def _run(self, number: int, *inputs: Tensor) -> tuple[Tensor, ...]:
        piece = self._pieces[number]
        if not self.capture:
            return piece.run(*inputs)
        return _Replay.apply(piece, *inputs, *piece.parameters)

    def _enter(self, tokens: int, cos: Tensor, sin: Tensor) -> None:
        """Angles, and zeros in the rows that the last batch filled and this one does not."""
        self._cos[:tokens], self._sin[:tokens] = cos, sin
        if tokens < self._tokens:
            for static in (*self._heads_back, self._out, self._first[None], self._last_back[None]):
                static[:, tokens : self._tokens] = 0
        self._tokens = tokens

    def _make(self, capacity: int, like: Tensor, cos: Tensor, rows: Any) -> None:
        """Static tensors and pieces for `capacity` rows; the old ones go first."""
        self._pieces.clear()
        self._made = self._tokens = 0  # until all of them are there: a capture may run out of memory halfway
        layers, config = self.decoder.layers, self.model.config
        attention = layers[0].self_attn
        dim, kv = attention.head_dim, attention.k_proj.out_features // attention.head_dim
        number = attention.q_proj.out_features // dim

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=like.dtype, device=like.device)

        self._cos, self._sin = (torch.zeros(capacity, dim, dtype=cos.dtype, device=cos.device) for _ in range(2))
        self._first, self._last_back = zeros(capacity, config.hidden_size), zeros(capacity, config.hidden_size)
        self._out = zeros(len(layers), capacity, number, dim)
        self._heads_back = tuple(zeros(len(layers), capacity, heads, dim) for heads in (number, kv, kv))
        angles = (self._cos, self._sin)

        def read(attention: Any, y: Tensor) -> tuple[Tensor, ...]:
            """What a layer's attention takes: its input, heads, and what its indexer makes of it."""
            indexer = getattr(attention, "indexer", None) if self._indexing else None
            made = training.heads(attention, y, *angles, rows)
            if indexer is None:
                return y.detach(), *made
            with torch.no_grad():
                projected = indexer(y.detach(), *angles)
            indexer.calls -= 1  # counted where it chooses: `training.attend`
            return y.detach(), *made, *projected

        def begin(x: Tensor) -> tuple[Tensor, ...]:
            return read(layers[0].self_attn, training.normed(layers[0].input_layernorm, x, rows))

        def between(index: int) -> Run:
            def run(x: Tensor, out: Tensor) -> tuple[Tensor, ...]:
                x, y = training.behind(layers[index - 1], x, out, layers[index].input_layernorm, rows)
                return x, *read(layers[index].self_attn, y)

            return run

        def end(x: Tensor, out: Tensor) -> tuple[Tensor, ...]:
            return (training.behind(layers[-1], x, out, self.decoder.norm, rows)[1],)

        runs: list[Run] = [begin, *(between(index) for index in range(1, len(layers))), end]
        if not self.capture:
            self._pieces = [Piece(run, (), ()) for run in runs]
        else:
            self._capture(runs, [self._reads(index) for index in range(len(runs))])
        self._made = capacity

    def _reads(self, index: int) -> list[Tensor]:
        """The parameters with gradients that a piece reads."""
        layers = self.decoder.layers
        modules: list[Any] = []
        if index > 0:
            before = layers[index - 1]
            modules += [before.self_attn.o_proj, before.post_attention_layernorm, before.mlp]
        if index < len(layers):
            attention = layers[index].self_attn
            modules += [layers[index].input_layernorm, attention.q_proj, attention.k_proj, attention.v_proj]
            modules += [attention.q_norm, attention.k_norm] if hasattr(attention, "q_norm") else []
        else:
            modules.append(self.decoder.norm)
        return [p for module in modules for p in module.parameters() if p.requires_grad]

    def _capture(self, runs: Sequence[Run], parameters: Sequence[Sequence[Tensor]]) -> None:
        """Every piece twice: once as it is, for compilers and libraries, then forward in their order and backward in the other, in one pool of
        memory, as they will always run."""
        stream, pool = torch.cuda.Stream(), torch.cuda.graph_pool_handle()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for index in (0, 1, len(runs) - 1):
                inputs = [x.detach().requires_grad_() for x in (self._first, self._out[0])[: 1 + (index > 0)]]
                outputs = [x for x in runs[index](*inputs) if x.requires_grad]
                torch.autograd.grad(
                    outputs, [*inputs, *parameters[index]], [torch.zeros_like(x) for x in outputs], allow_unused=True
                )
        torch.cuda.synchronize()
        residual = self._first
        for index, run in enumerate(runs):
            piece = Piece(run, (residual, self._out[index - 1]) if index else (residual,), parameters[index])

            def ahead(piece: Piece = piece) -> tuple[Tensor, ...]:
                return piece.run(*piece.inputs)

            piece.forward, piece.outputs = _captured(ahead, stream, pool)
            residual = piece.outputs[0] if index > 0 else residual
            self._pieces.append(piece)
        following: Tensor | None = None  # the gradient of the residual, as the piece behind leaves it
        for index in reversed(range(len(runs))):
            piece = self._pieces[index]
            heads = (
                [grads[index] for grads in self._heads_back] if index < len(self.decoder.layers) else [self._last_back]
            )
            piece.into = (*([following] if following is not None and index else []), *heads)
            outputs = [x for x in piece.outputs if x.requires_grad]
            assert len(outputs) == len(piece.into), f"piece {index} has {len(outputs)} outputs with gradients"

            def back(piece: Piece = piece, outputs: list[Tensor] = outputs) -> tuple[Tensor | None, ...]:
                return torch.autograd.grad(outputs, [*piece.inputs, *piece.parameters], piece.into, allow_unused=True)

            piece.backward, piece.back = _captured(back, stream, pool)
            following = piece.back[0]
            # Which of them have gradients is all that is asked of outputs from here on; what they were made of may go.
            piece.outputs = tuple(x.detach().requires_grad_(x.requires_grad) for x in piece.outputs)
        torch.cuda.current_stream().wait_stream(stream)
        self.captures += 1


def _captured(run: Callable[[], Any], stream: Any, pool: Any) -> tuple[Any, Any]:
    with torch.enable_grad():
        return captured(run, stream, pool)
