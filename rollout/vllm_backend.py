"""The caches of a winnow model as vLLM wants them described: one row of numbers a token, layer by layer.

    kv     [pages, page, 2 * Hkv * D]   keys, then values (MLA: the latent, [pages, page, kv_lora_rank + rope])
    index  [pages, page, D_I]           indexer keys, in the layers that have an indexer

Every cache has the type of an MLA cache, a vector a token, whose width is free; all of them share pages and one block table. vLLM calls
the metadata builder once a step; attention itself runs inside the model, on `winnow.kernels.ops`. Only vLLM's processes import this.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.model_executor.model_loader.base_loader import BaseModelLoader
from vllm.v1.attention.backend import AttentionBackend, AttentionMetadata, AttentionMetadataBuilder
from vllm.v1.kv_cache_interface import MLAAttentionSpec


@dataclass
class BatchMetadata(AttentionMetadata):
    """One step's batch of n requests. cu_seqlens int32 [n + 1] bounds the queries; seq_lens int32 [n] counts contexts, these queries
    included; block_table int32 [n, max_pages]; slot_mapping int64 [num_tokens]: physical slots of the queries' own tokens. bounds and
    lengths: cu_seqlens and seq_lens on the host.
    """

    cu_seqlens: Tensor
    seq_lens: Tensor
    block_table: Tensor
    slot_mapping: Tensor
    bounds: list[int]
    lengths: list[int]
    num_tokens: int
    decode: bool  # one query a request


class BatchMetadataBuilder(AttentionMetadataBuilder):
    """Only says which parts of vLLM's buffers are in use."""

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: VllmConfig, device: torch.device):
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)

    def build(self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False) -> BatchMetadata:
        batch = common_attn_metadata
        n, tokens = batch.num_reqs, batch.num_actual_tokens
        # vLLM's own copies, which nothing waits for; the lengths are a bound where it drafts tokens, which this model never does
        on_host = batch.seq_lens_cpu_upper_bound
        return BatchMetadata(
            cu_seqlens=batch.query_start_loc[: n + 1],
            seq_lens=batch.seq_lens[:n],
            block_table=batch.block_table_tensor[:n],
            slot_mapping=batch.slot_mapping[:tokens],
            bounds=batch.query_start_loc_cpu[: n + 1].tolist(),
            lengths=(batch.seq_lens if on_host is None else on_host)[:n].tolist(),
            num_tokens=tokens,
            decode=batch.max_query_len == 1,
        )


class WinnowBackend(AttentionBackend):
    """No implementation class: vLLM's own attention layer is not used."""

    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float16, torch.bfloat16, torch.float32]

    @staticmethod
    def get_name() -> str:
        return "CUSTOM"

    @staticmethod
    def get_impl_cls() -> type:
        raise NotImplementedError("attention runs inside the model")

    @staticmethod
    def get_builder_cls() -> type[BatchMetadataBuilder]:
        return BatchMetadataBuilder

    @staticmethod
    def get_kv_cache_shape(
        num_blocks: int, block_size: int, num_kv_heads: int, head_size: int, cache_dtype_str: str = "auto"
    ) -> tuple[int, ...]:
        """vLLM 0.24; later versions shape caches themselves, [pages, 1, page, width]."""
        assert num_kv_heads == 1, "a cache of ours is one row a token"
        return num_blocks, block_size, head_size

    @classmethod
    def supported_kv_cache_layouts(cls) -> Any:
        """Layers one after another, pages back to back: what the kernels read."""
        from vllm.v1.kv_cache_layout import KVCacheLayout  # vLLM 0.24 has none, and does not ask

        return (KVCacheLayout.LBNHC, KVCacheLayout.LBHNC)


class CacheLayer(nn.Module, AttentionLayerBase):
    """A cache of one layer, known to vLLM by its prefix; `rows` [pages, page, width] once vLLM has bound it."""

    def __init__(self, prefix: str, width: int, dtype: torch.dtype, vllm_config: VllmConfig) -> None:
        super().__init__()
        self.prefix, self.width, self.dtype = prefix, width, dtype
        self.kv_cache: Any = torch.tensor([])
        known = vllm_config.compilation_config.static_forward_context
        assert prefix not in known, f"two layers of vLLM are called {prefix}"
        known[prefix] = self

    def bind_kv_cache(self, kv_cache: Tensor) -> None:
        self.kv_cache = kv_cache

    @property
    def rows(self) -> Tensor:
        cache = self.kv_cache[0] if isinstance(self.kv_cache, list) else self.kv_cache
        rows = cache.squeeze(1) if cache.ndim == 4 else cache
        assert rows.ndim == 3 and rows.shape[2] == self.width, f"{self.prefix}: vLLM bound a cache {tuple(cache.shape)}"
        assert rows.is_contiguous(), f"{self.prefix}: pages are not back to back, strides {rows.stride()}"
        return rows

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> MLAAttentionSpec:
        """model_version tells different caches apart: vLLM 0.24 compares it, and neither width nor dtype, before it gives all layers one shape."""
        return MLAAttentionSpec(
            block_size=vllm_config.cache_config.block_size, num_kv_heads=1, head_size=self.width, dtype=self.dtype,
            model_version=f"winnow {self.width} {self.dtype}",
        )  # fmt: skip

    def get_attn_backend(self) -> type[AttentionBackend]:
        return WinnowBackend

    def forward(self) -> None:
        raise NotImplementedError("a cache computes nothing")


class WinnowLoader(BaseModelLoader):
    """Load format "winnow": the model class has opened its folder itself, with this project's checks, so nothing is left to load."""

    def download_model(self, model_config: Any) -> None:
        pass

    def load_weights(self, model: nn.Module, model_config: Any) -> None:
        assert getattr(model, "opens_its_folder", False), (
            f"load format 'winnow' is for winnow's own model class, not {type(model).__name__}: add --hf-overrides "
            '\'{"architectures": ["WinnowForCausalLM"]}\''
        )
