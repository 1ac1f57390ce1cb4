"""Rows of the training kernels: each checks its result, times it beside its peer in the same process, and says what it compared.

`python -m winnow.kernels.bench_train [--sets FOLDER] [--json FILE] [NAME ...]` prints the table; a GPU only. FOLDER holds index sets recorded
from a trained indexer (`winnow.rl.recorded_sets`): <length>-layer<i>.pt, of 16384 and 65536 tokens. Without it the sets are synthetic:
`bench_sets.local_sets` has a trained indexer's kind of locality (its docstring says how). `uniform_sets` has none and stands beside either.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from winnow.kernels import ops
from winnow.kernels.bench_sets import TOP_K, Sets, density, uniform_sets
from winnow.kernels.bench_timing import WrongKernelError
from winnow.kernels.selection import Selection


@dataclass(frozen=True)
class Row:
    """One line: what was run, milliseconds, the peer's, their ratio (ours / peer unless `name` says otherwise), and notes."""

    name: str
    ms: float
    peer: str
    peer_ms: float
    ratio: float
    note: str = ""

    def __str__(self) -> str:
        return f"{self.name:58s} {self.ms:9.2f} ms | {self.peer:38s} {self.peer_ms:9.2f} ms | {self.ratio:5.2f} | {self.note}"


def draw(*size: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    generator = torch.Generator("cuda").manual_seed(seed)
    return (torch.randn(*size, generator=generator, device="cuda") * scale).to(torch.bfloat16)


def median_ms(call: Callable[[], Any], runs: int = 5) -> float:
    """Median of device times after one call that warms up. The tensors exceed the L2 cache in every row."""
    call()
    times = []
    for _ in range(runs):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end))
    return sorted(times)[len(times) // 2]


def extra_bytes(call: Callable[[], Any]) -> int:
    """Peak of the allocator above what was held before, the call's results included."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    return torch.cuda.max_memory_allocated() - before


def similarity(a: Tensor, b: Tensor) -> float:
    """1 - 2ab / (a^2 + b^2): 0 where equal."""
    a, b = a.double(), b.double()
    return float(1 - 2 * (a * b).sum() / (a * a + b * b).sum())


def check(name: str, got: Tensor, want: Tensor, limit: float = 1e-4) -> None:
    found = similarity(got, want)
    if not found <= limit:
        raise WrongKernelError(
            f"{name}: similarity {found:.2e} to the reference, more than {limit:.0e}: no time is worth printing"
        )


def dense_attention(length: int) -> tuple[str, float]:
    """(name, ms) of forward and backward of the fastest dense SDPA, 32/8 heads of 128."""
    q, k, v, grad = (draw(1, h, length, 128, seed=i) for i, h in enumerate((32, 8, 8, 32)))
    leaves = [x.requires_grad_() for x in (q, k, v)]
    times = {}
    for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION):
        with sdpa_kernel(backend):
            times[backend.name.split("_")[0].lower()] = median_ms(
                lambda: torch.autograd.grad(
                    F.scaled_dot_product_attention(leaves[0], leaves[1], leaves[2], is_causal=True, enable_gqa=True), leaves, grad
                ), 3,
            )  # fmt: skip
    best = min(times, key=lambda name: times[name])
    return f"SDPA {best} (" + ", ".join(f"{n} {t:.1f}" for n, t in times.items()) + ")", times[best]


def gqa_rows(source: Sets) -> Iterator[Row]:
    """Forward and backward with indexer (16 heads of 64) and selection, 32/8 heads of 128; deterministic against atomic."""
    from winnow.kernels.key_lists import Lists, all_kept
    from winnow.kernels.sparse_backward import sparse_backward
    from winnow.kernels.sparse_prefill import sparse_prefill

    for length in (16384, 65536):
        peer, peer_ms = dense_attention(length)
        q, k, v, grad = (draw(length, h, 128, seed=i) for i, h in enumerate((32, 8, 8, 32)))
        index = (draw(length, 16, 64, seed=5), draw(length, 64, seed=6), draw(length, 16, seed=7).float())
        cu = torch.tensor([0, length], dtype=torch.int32, device="cuda")
        positions, scale = torch.arange(length, device="cuda"), 128**-0.5
        choose = median_ms(lambda: ops.select_packed(*index, cu, positions, TOP_K), 3)  # noqa: B023
        for name, sets in _with_uniform(source, length):
            lists: list[Lists] = []
            out, lse = sparse_prefill(q, k, v, cu, sets, scale, lists)
            _check_rows(out, q, k, v, sets, scale)
            forward = median_ms(lambda: sparse_prefill(q, k, v, cu, sets, scale), 3)  # noqa: B023
            run = (grad, q, k, v, out, lse, cu, sets, scale)
            kept = all_kept(lists)  # as autograd keeps them
            backward = median_ms(lambda: sparse_backward(*run, kept=kept), 3)  # noqa: B023
            atomic = median_ms(lambda: sparse_backward(*run, atomic=True, kept=kept), 3)  # noqa: B023
            for got, want in zip(sparse_backward(*run), sparse_backward(*run, atomic=True), strict=True):
                check("gradients, deterministic and atomic", got, want)
            total = forward + backward + choose
            note = (
                f"forward {forward:.2f}, backward {backward:.2f}, indexer and selection {choose:.2f}; {density(sets)}; "
                f"lists {'kept' if kept else 'made again'}"
            )
            yield Row(f"GQA forward + backward {length}, {name}", total, peer, peer_ms, total / peer_ms, note)
            yield Row(f"GQA backward {length}, {name}", backward, "ours with atomics", atomic, backward / atomic)


def _with_uniform(source: Sets, length: int) -> Iterator[tuple[str, Selection]]:
    yield from source.of(length)
    yield "uniform_sets", uniform_sets(length)


def _check_rows(out: Tensor, q: Tensor, k: Tensor, v: Tensor, sets: Selection, scale: float) -> None:
    """A few queries against a gather in float64."""
    group = q.shape[1] // k.shape[1]
    for t in range(len(q) // 7, len(q), len(q) // 7):
        at = sets.indices[t][sets.indices[t] >= 0].long()
        keys, values = (x[at].double().repeat_interleave(group, 1) for x in (k, v))
        weights = torch.softmax(torch.einsum("hd,nhd->hn", q[t].double(), keys) * scale, 1)
        check(f"output of token {t}", out[t], torch.einsum("hn,nhd->hd", weights, values))


def mla_rows(source: Sets, tokens: int = 4096, length: int = 32768) -> Iterator[Row]:
    """Absorbed MLA, sets of 2048 of 32K, every row full, as FlashMLA is timed; rates count 2176 and 5504 flop a pair and head."""
    from winnow.kernels.mla_backward import mla_backward
    from winnow.kernels.mla_prefill import mla_prefill

    generator = torch.Generator("cuda").manual_seed(3)
    uniform = torch.rand(tokens, length, device="cuda", generator=generator).topk(TOP_K, 1).indices.sort(1).values.int()
    kinds = [("uniform", uniform)]
    kinds += [(name, sets.indices[-tokens:].contiguous()) for name, sets in source.of(length)]
    kv, scale = draw(length, 576, seed=2), 576**-0.5
    peer = _flash_mla()
    for name, rows in kinds:
        for heads in (128, 64):
            q = draw(tokens, heads, 576, seed=1)
            flop = 2176e-9 * heads * tokens * TOP_K
            theirs = (q, kv[:, None], rows[:, None].contiguous(), scale, 512, None, None, None)
            out, lse = mla_prefill(q, kv, rows, scale)
            ms = median_ms(lambda: mla_prefill(q, kv, rows, scale))  # noqa: B023
            if peer is not None:
                check("MLA prefill", out, peer(*theirs)[0])
            other = median_ms(lambda: peer(*theirs)) if peer else float("nan")  # noqa: B023
            note = f"ratio of rates: {flop / ms:.0f} TF, peer {flop / other:.0f} TF"
            title = f"MLA prefill H {heads}, {tokens} x 2048 of {length}, {name}"
            yield Row(title, ms, "FlashMLA sparse prefill", other, other / ms, note)
        grad = draw(tokens, 64, 512, seed=4)
        run = (grad, q, kv, out, lse, rows, scale)
        for got, want in zip(mla_backward(*run), mla_backward(*run, atomic=True), strict=True):
            check("MLA gradients, deterministic and atomic", got, want)
        ms = median_ms(lambda: mla_backward(*run))  # noqa: B023
        atomic = median_ms(lambda: mla_backward(*run, atomic=True))  # noqa: B023
        rate = 5504e-9 * 64 * tokens * TOP_K / ms
        title = f"MLA backward H 64, {tokens} x 2048 of {length}, {name}"
        yield Row(title, ms, "ours with atomics", atomic, ms / atomic, f"{rate:.0f} TF")


def _flash_mla() -> Any:
    """FlashMLA's sparse prefill out of vLLM, or of the library that FLASHMLA names; None when there is neither."""
    try:
        if "FLASHMLA" in os.environ:
            torch.ops.load_library(os.environ["FLASHMLA"])
        else:
            import vllm._flashmla_C  # type: ignore[import-not-found]  # noqa: F401
        return torch.ops._flashmla_C.sparse_prefill_fwd
    except (ImportError, OSError) as error:
        print(f"FlashMLA is not here ({error}): its rows stand alone")
        return None


def kl_rows(source: Sets, length: int = 32768) -> Iterator[Row]:
    """Dense warm-up loss with gradients, indexer 16 x 128, against dense attention; and over sets; each for both targets."""
    from winnow.kernels.indexer_kl import kl_and_gradients
    from winnow.kernels.omission import omission
    from winnow.kernels.sparse_prefill import sparse_prefill

    peer, peer_ms = dense_attention(length)
    weight = draw(2048, 32 * 128, seed=8, scale=0.02)
    q, k, v = (draw(length, h, 128, seed=i) for i, h in enumerate((32, 8, 8)))
    index = (draw(length, 16, 128, seed=5), draw(length, 128, seed=6), draw(length, 16, seed=7, scale=0.02).float())
    cu = torch.tensor([0, length], dtype=torch.int32, device="cuda")
    kinds: list[tuple[str, Selection | None]] = [("dense", None)]
    kinds += [(f"over S_t, {name}", sets) for name, sets in _with_uniform(source, length)]
    for name, sets in kinds:
        out, lse = sparse_prefill(q, k, v, cu, sets, 128**-0.5)
        for target, cost in (("attention", None), ("output", omission(v, out, weight))):
            run = (*index, q, k, lse, cu, sets, 128**-0.5, cost)
            memory = extra_bytes(lambda: kl_and_gradients(*run)) / 1e9  # noqa: B023
            ms = median_ms(lambda: kl_and_gradients(*run), 3)  # noqa: B023
            yield Row(
                f"indexer KL forward + backward {length}, {name}, target {target}",
                ms,
                peer,
                peer_ms,
                ms / peer_ms,
                f"extra memory {memory:.2f} GB",
            )


def logprob_rows(_: Sets, tokens: int = 32768, vocabulary: int = 151936, width: int = 2048) -> Iterator[Row]:
    """No sets. Forward and backward of log-probabilities and entropies; torch: chunks of 2048 tokens, recomputed in the backward."""
    hidden, weight = (
        draw(tokens, width, seed=1).requires_grad_(),
        draw(vocabulary, width, seed=2, scale=0.02).requires_grad_(),
    )
    targets = torch.randint(0, vocabulary, (tokens,), device="cuda")

    def torch_chunk(x: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        log_p = torch.log_softmax((x @ weight.T).float(), -1)
        return log_p.gather(1, target[:, None])[:, 0], -(log_p.exp() * log_p).sum(1)

    def plain() -> tuple[Tensor, Tensor]:
        parts = [
            checkpoint(torch_chunk, hidden[a : a + 2048], targets[a : a + 2048], use_reentrant=False)
            for a in range(0, tokens, 2048)
        ]
        return torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])

    def step(call: Callable[[], tuple[Tensor, Tensor]]) -> tuple[Tensor, ...]:
        logprob, entropy = call()
        return (logprob.detach(), *torch.autograd.grad(logprob.sum() + 0.01 * entropy.sum(), (hidden, weight)))

    def ours() -> tuple[Tensor, Tensor]:
        return ops.token_logprobs(hidden, weight, targets)

    for name, got, want in zip(("log-probabilities", "d hidden", "d weight"), step(ours), step(plain), strict=True):
        check(name, got, want, 1e-3)
    memory = (
        extra_bytes(lambda: step(ours)) - 2 * width * (tokens + vocabulary)
    ) / 1e9  # the gradients themselves aside
    ms, other = median_ms(lambda: step(ours), 3), median_ms(lambda: step(plain), 3)
    name = f"logprobs forward + backward {tokens} x {vocabulary} x {width}"
    yield Row(name, ms, "torch, chunks of 2048 tokens", other, ms / other, f"extra memory {memory:.2f} GB")


ROWS: dict[str, Callable[[Sets], Iterator[Row]]] = {
    "gqa": gqa_rows,
    "mla": mla_rows,
    "kl": kl_rows,
    "logprobs": logprob_rows,
}


def measure_training(only: Sequence[str] = (), source: Sets | None = None) -> Iterator[Row]:
    """The rows of the named groups (all of them by default), as they are measured. A wrong kernel raises WrongKernelError."""
    if not torch.cuda.is_available():
        raise ValueError("the training rows need a GPU: torch finds none here")
    unknown = set(only) - set(ROWS)
    if unknown:
        raise ValueError(f"unknown rows {sorted(unknown)}; there are {sorted(ROWS)}")
    for name in only or ROWS:
        yield from ROWS[name](source or Sets())
        torch.cuda.empty_cache()


TRAINING = {f"train-{name}": call for name, call in ROWS.items()}  # the names of `winnow bench kernels --only`


def training_results(name: str, source: Sets | None = None) -> list[dict[str, Any]]:
    """A group of TRAINING as the rows of kernels/bench.py; a wrong kernel ends its group with a row that says so."""
    results: list[dict[str, Any]] = []
    try:
        for row in TRAINING[name](source or Sets()):
            peer = {row.peer: {"us": round(row.peer_ms * 1e3, 2), "ratio": round(row.ratio, 3)}}
            results.append({"row": row.name, "us": round(row.ms * 1e3, 2), "peers": peer, "note": row.note})
    except WrongKernelError as error:
        results.append({"row": name, "wrong": str(error)})
    torch.cuda.empty_cache()
    return results


def main(words: Sequence[str]) -> None:
    """Prints rows as they come; --json FILE has the same after every row."""
    parser = argparse.ArgumentParser(prog="python -m winnow.kernels.bench_train")
    parser.add_argument("names", nargs="*", help=f"of {', '.join(ROWS)}; all of them by default")
    parser.add_argument("--sets", type=Path, help="a folder of recorded sets")
    parser.add_argument("--json", type=Path, help="where the rows go as well")
    given = parser.parse_args(list(words))
    rows = []
    for row in measure_training(given.names, Sets(given.sets)):
        print(row, flush=True)
        rows.append(asdict(row))
        if given.json:
            given.json.write_text(json.dumps({"device": torch.cuda.get_device_name(), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
