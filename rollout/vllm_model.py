"""The model class that vLLM runs: this project's own module (`models.load`), with its ForwardContext made from vLLM's batch.

One module serves learner, native engine and vLLM, so the three compute the same numbers, every family that `models.load` opens works
here, and weights keep the learner's names. No layer of vLLM holds a weight: what vLLM prepares from weights once (fused projections,
a prepacked copy of a tied output embedding that goes stale after an update on a CPU) does not exist. One device; no tensor parallelism.
Only vLLM's processes import this.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.forward_context import get_forward_context

from winnow.kernels.packing import known, round_up
from winnow.models import inference, joined
from winnow.models.attach import cache_shape, indexer_config
from winnow.models.context import ForwardContext, train_context
from winnow.models.forward import hidden_states, lm_head_weight
from winnow.models.load import load
from winnow.models.native import NATIVE
from winnow.rollout.decoding import LEAST
from winnow.rollout.records import compact
from winnow.rollout.vllm_backend import BatchMetadata, CacheLayer
from winnow.rollout.vllm_plugin import VllmError
from winnow.rollout.weights import copy_into

NULL_BLOCK = 0  # vLLM gives this block to nobody: rows that only fill up a batch write there, and nobody reads it


def transformers_own_configs() -> None:
    """vLLM registers config classes of its own with transformers, for deepseek_v32 one of another architecture: native models are opened
    with transformers' own class again. vLLM has read its configs by now, and registers anew for the next engine."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    registered: Any = getattr(CONFIG_MAPPING, "_extra_content", None)
    assert isinstance(registered, dict), "transformers keeps registered configs elsewhere now: see AutoConfig.register"
    for kind in NATIVE:
        registered.pop(kind, None)


@dataclass
class BoundCache:
    """What ForwardContext wants of a cache, over the rows that vLLM holds: see `rollout.cache.PagedCache`."""

    k: list[Tensor] = field(default_factory=list)
    v: list[Tensor] = field(default_factory=list)
    index: dict[int, Tensor] = field(default_factory=dict)


@dataclass
class Batch:
    """What the last forward saw, request by request in the order of vLLM's batch, for the engine that drives it.

    bounds: the queries of request i are rows bounds[i] .. bounds[i + 1]; lengths: contexts, these queries included; sets: index sets
    [layers, rows, k] where they are recorded and any context is longer than k; hidden [rows, C] where it is asked for.
    """

    bounds: list[int]
    lengths: list[int]
    decode: bool
    sets: np.ndarray | None
    hidden: Tensor | None


class WinnowForCausalLM(nn.Module):
    opens_its_folder = True

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        if vllm_config.parallel_config.world_size != 1:
            raise VllmError(
                f"winnow's model runs on one device, but vLLM was asked for {vllm_config.parallel_config.world_size}: leave tensor and "
                "pipeline parallelism at 1 and start one engine a device (rollout.workers)"
            )
        if vllm_config.quant_config is not None:
            raise VllmError(
                "winnow's model cannot be quantized by vLLM: its weights are the policy's own; drop the quantization"
            )
        model_config = vllm_config.model_config
        transformers_own_configs()
        with torch.device("cpu"):  # vLLM builds models under its device, which transformers would take for a device map
            self.module = load(model_config.model, model_config.dtype, vllm_config.device_config.device)
        assert not any(hasattr(module, "quant_method") for module in self.module.modules()), (
            "no weight may be in vLLM's layers"
        )
        self.module.requires_grad_(False)
        self.fused = torch.device(vllm_config.device_config.device).type == "cuda" and inference.takes(self.module)
        if self.fused:
            joined.join(self.module)
        indexer, shape = indexer_config(self.module), cache_shape(self.module)
        self.heads, self.head_dim = shape["num_kv_heads"], shape["head_dim"]
        self.latent = shape.get("latent_dim", 0)
        self.num_layers, self.index_k = shape["num_layers"], indexer.top_k if indexer else 0
        self.vocab = len(lm_head_weight(self.module))
        self.context = model_config.max_model_len
        width = self.latent or 2 * self.heads * self.head_dim
        names = {i: f"{prefix}{'.' if prefix else ''}layers.{i}" for i in range(self.num_layers)}
        keys = shape.get("index_dtype", torch.float32)
        self.kv: Any = nn.ModuleList(
            CacheLayer(f"{names[i]}.kv", width, model_config.dtype, vllm_config) for i in names
        )
        self.index: Any = nn.ModuleDict(
            {
                str(i): CacheLayer(f"{names[i]}.index", shape["index_dim"], keys, vllm_config)
                for i in shape["index_layers"]
            }
        )
        self.selector, self.record, self.keep_hidden = "indexer", False, False
        self.last: Batch | None = None
        self._bound: tuple[int, BoundCache] | None = None

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        embeddings: Any = self.module
        return embeddings.get_input_embeddings()(input_ids)

    @torch.no_grad()
    def forward(
        self,
        input_ids: Tensor,
        positions: Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: Tensor | None = None,
    ) -> Tensor:
        """input_ids and positions int64 [T] -> hidden states [T, C]; rows past the batch's own tokens stay 0."""
        assert inputs_embeds is None and intermediate_tensors is None, "tokens in: no embeddings, no pipeline"
        described = get_forward_context().attn_metadata
        if described is None:  # vLLM measures memory: as many tokens as a step may have, without a cache
            whole, rest = divmod(len(input_ids), self.context)
            lengths = [self.context] * whole + [rest] * (rest > 0)
            return hidden_states(self.module, input_ids.long(), train_context(lengths, input_ids.device))
        batch = described[self.kv[0].prefix]
        assert isinstance(batch, BatchMetadata), f"vLLM's metadata is a {type(batch).__name__}: another backend's"
        rows, bounds, lengths = batch.num_tokens, batch.bounds, batch.lengths
        record = self.record and self.index_k > 0 and max(lengths) > self.index_k
        out: dict[int, Any] | None = {} if record else None
        ids, context = self._context(input_ids[:rows].long(), positions[:rows].long(), batch, bounds, lengths, out)
        hidden = hidden_states(self.module, ids, context)[:rows]
        if context.faults is not None and int(context.faults):
            raise ValueError("a decode step has a score that is NaN: the weights or the cache are not finite")
        sets = None
        if out is not None:
            assert sorted(out) == list(range(self.num_layers)), f"only layers {sorted(out)} left a selection"
            sets = compact(torch.stack([out[layer].indices[:rows] for layer in sorted(out)]), self.context)
        kept = hidden.clone() if self.keep_hidden else None
        self.last = Batch(bounds=bounds, lengths=lengths, decode=batch.decode, sets=sets, hidden=kept)
        return nn.functional.pad(hidden, (0, 0, 0, len(input_ids) - rows)) if len(input_ids) > rows else hidden

    def compute_logits(self, hidden_states: Tensor) -> Tensor:
        """hidden [rows, C] -> fp32 [rows, V], through the live weight, as the native engine does it."""
        rows = len(hidden_states)
        if hidden_states.device.type == "cpu":
            hidden_states = nn.functional.pad(hidden_states, (0, 0, 0, round_up(rows) - rows))
        return nn.functional.linear(hidden_states, lm_head_weight(self.module)).float()[:rows]

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Overwrites every weight in place, by the module's own names; WeightError names one that is unknown, missing or misshapen."""
        copy_into(self.module, dict(weights), version=-1)

    def _context(
        self, ids: Tensor, positions: Tensor, batch: BatchMetadata, bounds: list[int], lengths: list[int],
        out: dict[int, Any] | None,
    ) -> tuple[Tensor, ForwardContext]:  # fmt: skip
        """The batch in winnow's terms; on a CPU filled up to whole blocks of rows, as the native engine does it."""
        cu_seqlens, seq_lens, slots = batch.cu_seqlens, batch.seq_lens, batch.slot_mapping
        page, on_cpu = self.kv[0].rows.shape[1], ids.device.type == "cpu"
        # vLLM's rows are as wide as the longest context there may be: operations work over what they are given
        capacity = max(lengths) if on_cpu else self._capacity(max(lengths))
        table = batch.block_table[:, : -(-capacity // page)].contiguous()
        extra = round_up(len(ids)) - len(ids) if on_cpu else 0
        if extra:
            assert int(slots.min()) >= page, "vLLM gave block 0 to a request: it is not the null block of this version"
            more = torch.arange(extra)
            ids, positions = torch.cat((ids, 0 * more)), torch.cat((positions, 0 * more))
            bounds, lengths = [*bounds, *(bounds[-1] + 1 + more).tolist()], lengths + [1] * extra
            cu_seqlens = torch.tensor(bounds, dtype=cu_seqlens.dtype)
            seq_lens = torch.tensor(lengths, dtype=seq_lens.dtype)
            table = torch.cat((table, table.new_full((extra, table.shape[1]), NULL_BLOCK)))
            slots = torch.cat((slots, torch.zeros(extra, dtype=slots.dtype)))
        context = ForwardContext(
            mode="decode" if batch.decode else "prefill",
            positions=positions,
            cu_seqlens=known(cu_seqlens, bounds),
            seq_lens=known(seq_lens, lengths),
            block_table=table,
            slot_mapping=slots,
            cache=self._cache(),
            selector=self.selector,
            selection_out=out,
            max_seq_len=max(lengths),
            fresh=not batch.decode and all(b - a == n for (a, b), n in zip(pairwise(bounds), lengths, strict=True)),
            faults=None if on_cpu or not batch.decode else torch.zeros(1, dtype=torch.int32, device=ids.device),
            fused=self.fused,
        )
        return ids, context

    def _capacity(self, longest: int) -> int:
        """The next of the capacities that `rollout.decoding` decodes at: a GPU's kernels are compiled for each of them."""
        capacity = self.index_k or LEAST
        while capacity < longest:
            capacity *= 2
        return min(capacity, self.context)

    def _cache(self) -> BoundCache:
        """Views of vLLM's caches, made anew when it has bound others."""
        place = self.kv[0].rows.data_ptr()
        if self._bound is None or self._bound[0] != place:
            cache, half = BoundCache(), self.heads * self.head_dim
            for layer in self.kv:
                rows = layer.rows
                if self.latent:
                    cache.k.append(rows)
                    cache.v.append(rows[..., :0])
                    continue
                cache.k.append(rows[..., :half].unflatten(-1, (self.heads, self.head_dim)))
                cache.v.append(rows[..., half:].unflatten(-1, (self.heads, self.head_dim)))
            cache.index = {int(i): layer.rows for i, layer in self.index.items()}
            self._bound = (place, cache)
        return self._bound[1]
