"""The training kernels compile for SM80, SM86, SM89 and SM90 without a GPU, within each chip's shared memory.

Runs itself in a fresh process, as test_kernels_aot.py does. `python test_kernels_train_aot.py sm90 NAME` prints what a kernel uses.
"""

# ruff: noqa: C408
import os
import sys
from pathlib import Path

import pytest

SHARED = {80: 163 * 1024, 86: 99 * 1024, 89: 99 * 1024, 90: 227 * 1024}
I32, BF16, FP32 = "*i32", "*bf16", "*fp32"


def list_kernels(sm):
    from winnow.kernels import byte_copies, segments
    from winnow.kernels import list_kernels as kernels

    yield "copy", byte_copies._copy, dict(table="*i64", pieces="i32"), {"BLOCK": 2048}, 4, 2
    yield "sums", byte_copies._sums, dict(words="*i64", columns="*i64", total="*i64", rows="i32", per="i32"), {
        "WIDTH": byte_copies.COLUMNS, "ROWS": 8}, 4, 2  # fmt: skip
    yield "mark", kernels._mark, dict(
        indices=I32, row_origin=I32, bitmap=I32, first_row="i32", index_stride="i32", words="i32"
    ), {"K": 2048, "BLOCK": 1024}, 4, 2  # fmt: skip
    for k, words in ((32, 4), (2048, 16)):
        yield f"choose {k}", kernels._choose, dict(
            indices=I32, first=I32, rows=I32, row_origin=I32, offsets=I32, stops=I32, bits=I32, begin="i32", index_stride="i32"
        ), {"K": k, "SIZE": 32, "BLOCK_K": min(64, k), "BLOCK_W": words}, 1, 2  # fmt: skip
    yield "union", kernels._union, dict(
        bitmap=I32, first=I32, rows=I32, union=I32, counts=I32, begin="i32", first_row="i32", words="i32"
    ), {"SIZE": 32, "BLOCK_W": 128}, 4, 2  # fmt: skip
    yield "fill", kernels._fill, dict(
        union=I32, origin=I32, offsets=I32, stops=I32, keys=I32, begin="i32", words="i32"
    ), {"BLOCK_W": 128, "UNIT": 64}, 8, 2  # fmt: skip
    yield "members", kernels._members, dict(
        bitmap=I32, first=I32, rows=I32, origin=I32, offsets=I32, stops=I32, keys=I32, bits=I32, begin="i32", first_row="i32", words="i32"
    ), {"SIZE": 64, "CHUNK": 512}, 4, 2  # fmt: skip
    yield "sum_rows", segments._sum_rows, dict(parts=BF16, order="*i64", bounds=I32, out=FP32), {
        "WIDTH": 2048, "BLOCK_C": 512, "ROWS": 4, "ADD": True}, 2, 1  # fmt: skip


def row_kernels(sm):
    from winnow.kernels import train_rows

    numbers = {"eps": "fp32", "rows": "i32"}
    for width, kind in ((576, BF16), (8192, BF16), (128, FP32)):
        block = 1 << (width - 1).bit_length()
        shape = {"C": width, "BLOCK": block, "ROWS": max(1, train_rows.TILE // block), "ADD": width > 128}
        warps = 4 if block <= 4096 else 8
        yield f"norm {width}", train_rows._norm, dict(
            x=kind, residual=kind, weight=kind, total=kind, y=kind, scales=FP32) | numbers, shape, warps, 2  # fmt: skip
        yield f"norm gradient {width}", train_rows._norm_grad, dict(
            grad=kind, grad_total=kind, total=kind, weight=kind, scales=FP32, dx=kind, shares=FP32, rows="i32", per="i32"
        ), shape | {"WEIGHT": True}, warps, 2  # fmt: skip
    for back, pairs, kind in ((False, False, BF16), (True, True, FP32)):
        yield f"turn {back}", train_rows._turn, dict(x=FP32, cos=kind, sin=kind, y=kind, rows="i32", x_stride="i32", angle_stride="i32"), {
            "HEADS": 8, "D": 128, "ROPE": 64, "STEP": 2, "PAIRS": pairs, "BLOCK": 128, "ROWS": 16, "BACK": back}, 4, 2  # fmt: skip
        yield f"split_heads {back}", train_rows._split_heads, dict(
            qkv=BF16, cos=BF16, sin=BF16, q=BF16, k=BF16, v=BF16, rows="i32", angle_stride="i32"
        ), {"H": 9, "HKV": 3, "D": 64, "BLOCK": 64, "ROWS": 32, "BACK": back}, 4, 2  # fmt: skip
    sizes = {"width": "i32", "stride": "i32"}
    yield "silu_mul", train_rows._silu_mul, dict(gate=BF16, up=BF16, y=BF16) | sizes, {"BLOCK": 1024}, 4, 2
    yield "silu_mul gradient", train_rows._silu_mul_grad, dict(
        grad=BF16, gate=BF16, up=BF16, dgate=BF16, dup=BF16) | sizes, {"BLOCK": 1024}, 4, 2  # fmt: skip


def attention_kernels(sm):
    from winnow.kernels import sparse_backward, sparse_prefill

    cases = [(128, 4, False), (128, 4, True)] if sm == 90 else [(128, 4, False)]
    for dim, group, dense in cases + [(192, 1, False)] * (sm == 86):  # the widest where memory is shortest
        plan = sparse_prefill.tile_plan(group, dim, sm)
        shape = dict(
            HKV=8, GROUP=group, PACK=4 if group > 1 else 1, D=dim, BLOCK_D=256 if dim == 192 else dim, BLOCK_Q=plan[0], DENSE=dense, UPCAST=False
        )  # fmt: skip
        lists = dict(
            offsets=I32,
            stops=I32,
            first=I32,
            rows=I32,
            origin=I32,
            shift=I32,
            begin="i32",
            blocks="i32",
            keys=I32,
            bits=I32,
        )
        tensors = dict(q=BF16, k=BF16, v=BF16, out=BF16, lse=FP32)
        name = f"D {dim} group {group} dense {dense}"
        yield (
            f"forward {name}",
            sparse_prefill._forward,
            tensors | lists | {"scale_log2": "fp32"},
            shape | {"BLOCK_N": plan[1], "WHOLE": dense},
            *plan[2:],
        )
        block_n, warps, stages = sparse_backward._backward_plan(plan, sm, dim)
        yield f"backward {name}", sparse_backward._backward, tensors | lists | dict(
            grad=BF16, dq=BF16, parts=BF16, sums=FP32, shift="i32", scale="fp32"
        ), shape | {"BLOCK_N": block_n, "ATOMIC": False}, warps, stages  # fmt: skip


def gluon_attention_kernels(sm):
    if sm != 90:
        return
    from winnow.kernels import gqa_prefill_sm90 as gluon

    types = dict.fromkeys(("q", "k", "v", "out"), BF16) | dict(lse=FP32, begin="i32", blocks="i32", scale_log2="fp32")
    types |= dict.fromkeys(("keys", "bits", "offsets", "stops", "first", "rows", "origin", "shift"), I32)
    for listed, dim in ((False, 128), (True, 128), (True, 64)):
        rows = dict.fromkeys(("k_rows", "v_rows"), f"tensordesc<bf16[128, {dim}],{gluon.TILE.value!r}>")
        yield f"gqa prefill {dim} listed={listed}", gluon._gqa_prefill_sm90, types | ({} if listed else rows), {
            "HKV": 8, "GROUP": 3, "PACK": 4, "D": dim, "LISTED": listed,
        } | (dict.fromkeys(rows) if listed else {}), 4, 1  # fmt: skip


def mla_kernels(sm):
    from winnow.kernels import mla_backward

    if sm == 90:
        from winnow.kernels import mla_prefill_sm90

        yield "mla prefill", mla_prefill_sm90._mla_prefill_sm90, dict(
            q=BF16, kv=BF16, rows=I32, out=BF16, lse=FP32, scale_log2="fp32", K="i32"
        ), {"H": 128, "STEPS": 16}, 8, 1  # fmt: skip
    yield "mla delta", mla_backward._delta, dict(grad=BF16, out=BF16, delta=FP32), {"LATENT": 512}, 4, 2
    for name, kernel, options in zip(
        ("shares", "queries"),
        (mla_backward._shares, mla_backward._queries),
        mla_backward.backward_plan(sm, 64),
        strict=True,
    ):
        constants = {"H": 64, "UPCAST": False} | {k: v for k, v in options.items() if k.isupper()}
        types = dict(
            q=BF16, kv=BF16, grad=BF16, lse=FP32, delta=FP32, rows=I32, slopes=BF16, parts=BF16, sums=FP32, dq=BF16, first="i32", K="i32", scale="fp32"
        )  # fmt: skip
        types = {k: v for k, v in types.items() if k in kernel.arg_names}
        extra = {"ATOMIC": False} if name == "shares" else {}
        yield f"mla {name}", kernel, types, constants | extra, options["num_warps"], options["num_stages"]


def kl_kernels(sm):
    from winnow.kernels import indexer_kl

    both = sm in (86, 90)  # dense and sparse tiles; elsewhere the sparse ones stand for both
    for dense in (True, False) if both else (False,):
        size, pack, block_n, warps, stages = indexer_kl.kl_plan(sm, dense, 4)
        types = dict(
            q=BF16, k=BF16, w=FP32, keys=I32, bits=I32, offsets=I32, stops=I32, owner=I32, first=I32, rows=I32, scores=FP32, slope=BF16, parts=BF16,
            norm=FP32, dq=FP32, dw=FP32, attn_q=BF16, attn_k=BF16, lse=FP32, loss=FP32, begin="i32", shift="i32", blocks="i32", scale="fp32",
            costs=FP32, whole=FP32, values=BF16, pull=BF16, own=FP32, theirs=FP32,
        )  # fmt: skip
        shape = dict(
            HEADS=16, HKV=8, GROUP=4, D=128, CHUNK=128, BLOCK_D=128, PACK=pack, BLOCK_Q=size, BLOCK_N=block_n, DENSE=dense, UPCAST=False,
            COST=False, DV=128, CHUNK_V=128, REST=0.01, TINY=1e-20,
        )  # fmt: skip
        names = ("_scores", "_compare", "_costs", "_query_gradient", "_key_gradient")
        for name in names if dense == both else names[1:3] + names[4:]:
            kernel = getattr(indexer_kl, name)
            mine = [{k: v for k, v in x.items() if k in kernel.arg_names} for x in (types, shape)]
            yield f"kl {name[1:]} dense {dense}", kernel, *mine, warps, 1 if name == "_costs" else stages
            if name == "_compare":
                yield f"kl compare costs dense {dense}", kernel, mine[0], mine[1] | {"COST": True}, warps, stages
        if dense:
            continue
        kernel = indexer_kl._normalise
        mine = [
            {k: v for k, v in x.items() if k in kernel.arg_names}
            for x in (types, shape | {"ROWS": 16, "BLOCK_N": 64, "COST": True})
        ]
        yield f"kl normalise dense {dense}", kernel, *mine, 4, 3


def logprob_kernels(sm):
    from winnow.kernels import logprobs

    types = dict(
        logits=FP32, bitmap=I32, targets="*i64", temperature=FP32, top=FP32, total=FP32, mean=FP32, chosen=FP32, lse=FP32, entropy=FP32,
        grad_logprob=FP32, grad_entropy=FP32, grad=BF16, first_row="i32", low="i32", high="i32", width="i32", words="i32", indptr="*i64", ids="*i64",
    )  # fmt: skip
    for name, constants in (
        ("_fold", {"BLOCK": 1024, "KEPT": True}),
        ("_slope", {"BLOCK": 1024, "KEPT": True}),
        ("_mark_kept", {"BLOCK": 128}),
    ):
        kernel = getattr(logprobs, name)
        yield f"logprobs {name}", kernel, {k: v for k, v in types.items() if k in kernel.arg_names}, constants, 4, 2


def kernels(sm):
    """(name, kernel, types of the pointer and scalar arguments, constants, warps, stages)."""
    yield from list_kernels(sm)
    yield from row_kernels(sm)
    yield from attention_kernels(sm)
    yield from gluon_attention_kernels(sm)
    yield from mla_kernels(sm)
    yield from kl_kernels(sm)
    yield from logprob_kernels(sm)


def compile_kernel(kernel, types, constants, warps, stages, sm):
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    if kernel.is_gluon():
        from triton.experimental.gluon._runtime import GluonASTSource as ASTSource
    signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(kernel.arg_names)
        if types.get(name, "")[:1] == "*" or (name in types and name.endswith("_stride"))
    }
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
    options = {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": True}
    return triton.compile(source, target=GPUTarget("cuda", sm, 32), options=options)


def main(sm, only=""):
    failures = []
    for name, kernel, types, constants, warps, stages in kernels(sm):
        if only not in name:
            continue
        built = compile_kernel(kernel, types, constants, warps, stages, sm)
        if not built.asm["cubin"] or built.metadata.shared > SHARED[sm]:
            failures.append(f"{name} on SM{sm}: {built.metadata.shared} bytes of shared memory, {SHARED[sm]} are there")
        ptx = built.asm["ptx"]
        counts = {x: ptx.count(x) for x in ("wgmma.mma_async.sync", "mma.sync", "cp.async.c")}
        print(name, sm, built.metadata.shared, counts, flush=True)
        if os.environ.get("DUMP"):
            for kind in ("ttgir", "ptx", "cubin"):
                data = built.asm[kind]
                path = Path(os.environ["DUMP"]) / f"{name.replace(' ', '_')}.{sm}.{kind}"
                path.write_bytes(data if isinstance(data, bytes) else data.encode())
    assert not failures, "\n".join(failures)


@pytest.mark.parametrize("sm", SHARED)
def test_compiles(sm, compilers):
    said = compilers[sm].communicate(timeout=170)[1]
    assert compilers[sm].returncode == 0, said[-2000:]


if __name__ == "__main__":
    main(int(sys.argv[1].removeprefix("sm")), sys.argv[2] if len(sys.argv) > 2 else "")
