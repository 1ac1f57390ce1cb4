"""Every Triton kernel compiles for SM80, SM86, SM89 and SM90 without a GPU, within each chip's shared memory.

Runs itself in a fresh process: kernels imported under the interpreter cannot be compiled. `python test_kernels_aot.py sm90` prints
what each kernel uses.
"""

# ruff: noqa: C408
import itertools
import os
import sys

import pytest

SHARED = {80: 163 * 1024, 86: 99 * 1024, 89: 99 * 1024, 90: 227 * 1024}


def kernels(sm):
    """(name, kernel, types of the pointer and scalar arguments, constants, warps, stages) of the shapes that are timed."""
    from winnow.kernels import (
        draw,
        gqa_decode,
        indexer_logits,
        invariant,
        mla_decode,
        quant,
        rows,
        select_short,
        topk,
        topk_rows,
    )

    i32, f8 = "*i32", sm >= 89
    split, block_n, stages = gqa_decode.plan(128, 8, 256, SHARED[sm] // 1024)  # what a batch of 128 takes on this chip
    gqa = {
        "HKV": 8,
        "GROUP": 4,
        "JOIN": 1,
        "D": 128,
        "PAGE": 64,
        "SPLITS": 4,
        "CHUNK": split,
        "STEPS": split // block_n,
        "BLOCK_H": 16,
        "BLOCK_N": block_n,
        "BLOCK_D": 128,
        "UNROLL": 4,
    }
    yield "gqa_decode", gqa_decode._gqa_decode, dict(
        q="*bf16", k_cache="*bf16", v_cache="*bf16", table=i32, indices=i32, counts=i32, seq_lens=i32, sink="*fp32", out="*bf16", lse="*fp32",
        part_out="*fp32", part_lse="*fp32", arrivals=i32, scale_log2="fp32", capacity="i32", index_stride="i32", table_stride="i32",
        token_stride="i32", head_stride="i32",
    ), gqa | {"IDENTITY": False, "SINK": True, "UPCAST": False}, 4, stages  # fmt: skip
    block_h, block_n, warps, stages = mla_decode.plan_for(sm, 4096)
    mla = {
        "H": 128,
        "PAGE": 64,
        "SPLITS": 4,
        "CHUNK": 512,
        "STEPS": 512 // block_n,
        "BLOCK_H": block_h,
        "BLOCK_N": block_n,
        "IDENTITY": False,
        "SINK": True,
        "UPCAST": False,
    }
    mla_types = dict(
        table=i32, indices=i32, counts=i32, seq_lens=i32, sink="*fp32", part_out="*fp32", part_lse="*fp32", scale_log2="fp32", capacity="i32",
        index_stride="i32", table_stride="i32",
    )  # fmt: skip
    for fp8 in (False, True):
        caches = (
            dict(cache="*u8", scales="*fp32", rope_cache="*bf16")
            if fp8
            else dict(cache="*bf16", scales="*bf16", rope_cache="*bf16")
        )
        yield f"mla_decode fp8={fp8}", mla_decode._mla_decode, dict(q="*bf16") | caches | mla_types, mla | {
            "TOKEN": 656 if fp8 else 576, "FP8": fp8, "SOFT": not f8}, warps, stages  # fmt: skip
    block_h, block_n, warps, stages = mla_decode.plan_for(sm, 1)  # a small batch, or few heads
    if (block_h, block_n) != (mla["BLOCK_H"], mla["BLOCK_N"]):
        few = mla | {"H": 16, "BLOCK_H": block_h, "BLOCK_N": block_n, "CHUNK": 2048, "STEPS": 2048 // block_n}
        yield "mla_decode small", mla_decode._mla_decode, mla_types | dict.fromkeys(("q", "cache", "scales", "rope_cache"), "*bf16"), few | {
            "TOKEN": 576, "FP8": False, "SOFT": False}, warps, stages  # fmt: skip
    yield "mla_merge", mla_decode._mla_merge, dict(part_out="*fp32", part_lse="*fp32", sink="*fp32", out="*bf16", lse="*fp32"), {
        "H": 128, "SPLITS": 4, "UNROLL": 4, "SINK": True}, 4, 2  # fmt: skip
    for fp8 in (False, True) if sm == 90 else ():
        from winnow.kernels import mla_decode_sm90

        stored = dict(cache="*u8", scales="*fp32") if fp8 else dict(cache="*bf16", scales="*bf16")
        yield f"mla_decode_sm90 fp8={fp8}", mla_decode_sm90._mla_decode_sm90, dict(q="*bf16", rope_cache="*bf16") | stored | mla_types, {
            "H": 128, "PAGE": 64, "SPLITS": 1, "CHUNK": 2048, "STEPS": 32, "FP8": fp8, "IDENTITY": False, "SINK": True}, 8, 2  # fmt: skip
    chunk = {"CHUNKS": 16, "CHUNK": 8192, "GROUP": 32}
    yield (
        "topk maxima",
        topk._maxima,
        dict(scores="*fp32", lengths=i32, maxima=i32, score_stride="i32", maxima_stride="i32"),
        chunk,
        8,
        2,
    )
    for local, cut in ((False, chunk), (True, {"CHUNKS": 1, "CHUNK": 32768, "GROUP": 8})):
        yield f"topk select local={local}", topk._select, dict(
            scores="*fp32", lengths=i32, maxima=i32, found=i32, pairs="*i64", listed="*i64", arrivals=i32, bad=i32, out=i32,
            counts=i32, k="i32", score_stride="i32", wide_stride="i32", maxima_stride="i32", list_stride="i32", out_stride="i32",
        ), cut | {"BLOCK": 8192, "SPAN": 64, "FOLD": 4096, "TILE": 4096, "K_BLOCK": 2048, "LOCAL": local, "SKIPPED": False, "SOFT": False}, 16, 2  # fmt: skip
    for fp8 in (False, True):
        value, head = (
            ("*u8" if fp8 else "*bf16"),
            {"H": 64, "D": 128, "PAGE": 64, "BLOCK_N": 64, "BLOCK_H": 64, "FP8": fp8, "SOFT": not f8, "UPCAST": False},
        )
        yield f"indexer decode fp8={fp8}", indexer_logits._decode, dict(
            q=value, cache=value, scales="*fp32" if fp8 else value, w="*fp32", table=i32, seq_lens=i32, out="*fp32", maxima=i32,
            skip="i32", table_stride="i32", page_stride="i32", out_stride="i32", maxima_stride="i32",
        ), head | {"CHUNKS": 64, "CHUNK": 512, "MAXIMA": True}, 4, 3  # fmt: skip
        yield f"indexer prefill fp8={fp8}", indexer_logits._prefill, dict(
            q=value, cache=value, scales="*fp32" if fp8 else value, w="*fp32", table=i32, ends=i32, out="*fp32",
            tokens="i32", keys="i32", page_stride="i32", out_stride="i32",
        ), head | {"QUERIES": 128, "BLOCK_N": 256 if sm >= 90 else 64, "GROUP": 1, "ENDS": True}, 4, 3  # fmt: skip
    yield "indexer prefill, four queries in one product", indexer_logits._prefill, dict(
        q="*bf16", cache="*bf16", scales="*bf16", w="*fp32", table=i32, ends=i32, out="*fp32", tokens="i32", keys="i32",
        page_stride="i32", out_stride="i32",
    ), {"H": 16, "D": 64, "PAGE": 64, "QUERIES": 128, "BLOCK_N": 256 if sm >= 90 else 64, "BLOCK_H": 16, "GROUP": indexer_logits.GROUPED,
        "FP8": False, "SOFT": False, "UPCAST": False, "ENDS": True}, 4, 3  # fmt: skip
    for heads, dim in ((16, 64), (8, 128), (4, 32)) if sm == 90 else ():
        from winnow.kernels import indexer_prefill_sm90

        yield f"indexer prefill sm90 {heads} {dim}", indexer_prefill_sm90._prefill_sm90, dict(
            q="*bf16", cache="*bf16", w="*fp32", table=i32, ends=i32, out="*fp32", tokens="i32", keys="i32", page_stride="i32", out_stride="i32",
        ), {"H": heads, "D": dim, "PAGE": 64, "QUERIES": 128, "WARPS": 4, "ENDS": True} | indexer_prefill_sm90.layouts(heads, 4), 4, 1  # fmt: skip
    yield "write_index_keys", quant._write_index_keys, dict(k="*bf16", slots="*i64", cache="*u8", scales="*fp32", tokens="i32", page_stride="i32"), {
        "D": 128, "PAGE": 64, "BLOCK": 16}, 4, 2  # fmt: skip
    yield (
        "quantise_query",
        quant._quantise_query,
        dict(q="*bf16", w="*fp32", out="*u8", w_out="*fp32", rows="i32"),
        {"D": 128, "BLOCK": 32},
        4,
        2,
    )
    yield "write_mla", quant._write_mla, dict(latent="*bf16", rope="*bf16", slots="*i64", cache="*u8", scales="*fp32", rope_cache="*bf16", page_stride="i32"), {
        "PAGE": 64}, 1, 2  # fmt: skip
    for fold in ("last", "here"):
        yield f"linear {fold}", invariant._linear, dict(
            x="*bf16", weight="*bf16", bias="*bf16", y="*bf16", parts="*fp32", arrivals=i32, tokens="i32", N="i32", K="i32", x_stride="i32", weight_stride="i32",
        ), {"PIECES": 4, "PIECE": 512, "BLOCK_N": 64, "BLOCK_T": 64, "BLOCK_K": 128, "FOLD": fold, "BIAS": True, "UPCAST": False, "PRECISION": "ieee"}, 4, 4 if SHARED[sm] > 100 * 1024 else 3  # fmt: skip
    for precision, fold in itertools.product(("tf32", "ieee"), ("last", "here", "later")):  # the indexer's products
        yield f"linear fp32 {precision} {fold}", invariant._linear, dict(
            x="*fp32", weight="*fp32", bias="*fp32", y="*fp32", parts="*fp32", arrivals=i32, tokens="i32", N="i32", K="i32", x_stride="i32",
            weight_stride="i32",
        ), {"PIECES": 8, "PIECE": 256, "BLOCK_N": 64, "BLOCK_T": 64, "BLOCK_K": 32, "FOLD": fold, "BIAS": False, "UPCAST": False, "PRECISION": precision}, 4, 4 if precision == "tf32" else 3  # fmt: skip
    yield (
        "rms_norm",
        invariant._rms_norm,
        dict(x="*bf16", weight="*bf16", y="*bf16", residual="*bf16", wide="*fp32", eps="fp32", C="i32"),
        {"BLOCK": 2048, "RESIDUAL": True, "WIDE": True},
        4,
        2,
    )
    yield "softmax", invariant._softmax, dict(x="*bf16", y="*bf16", C="i32"), {"LOG": True, "BLOCK": 4096}, 8, 2
    yield "split_heads", rows._split_heads, dict.fromkeys(("qkv", "q_weight", "k_weight", "cos", "sin", "q_out", "k_out", "k_cache", "v_cache"), "*bf16") | dict(
        slots="*i64", eps="fp32", row_stride="i32", angle_stride="i32", token_stride="i32", head_stride="i32",
    ), {"HQ": 16, "HKV": 8, "D": 128, "BLOCK_H": 8, "BLOCK_D": 128, "NORM": True, "KEEP": True}, 2, 2  # fmt: skip
    yield "index_rows", rows._index_rows, dict.fromkeys(("cos", "sin", "q_out", "k_out", "cache"), "*bf16") | dict(
        proj="*fp32", gamma="*fp32", beta="*fp32", slots="*i64", w_out="*fp32", eps="fp32", w_scale="fp32", piece_stride="i32", row_stride="i32",
        angle_stride="i32",
    ), {"PIECES": 8, "H": 16, "D": 64, "ROPE": 32, "STEP": 4, "PAIRS": False, "BLOCK_H": 16, "KEY": 1024, "HEADS": True, "KEEP": True}, 2, 2  # fmt: skip
    yield "silu_mul", rows._silu_mul, dict(x="*bf16", y="*bf16", width="i32", row_stride="i32"), {"BLOCK": 1024}, 4, 2
    drawn = dict(
        logits="*bf16",
        temperature="*fp32",
        peaks="*fp32",
        sums="*fp64",
        best=i32,
        vocab="i32",
        row_stride="i32",
        pieces="i32",
    )
    yield "draw pieces", draw._pieces, drawn, {"BLOCK": draw.BLOCK}, 8, 2
    for given in (False, True):
        yield f"draw choose given={given}", draw._choose, drawn | dict(uniform="*fp64", tokens="*i64", logprobs="*fp32", bad=i32), {
            "BLOCK": draw.BLOCK, "PIECES": 64, "GIVEN": given}, 8, 2  # fmt: skip
    row = dict(scores="*fp32", lengths=i32, limits=i32, k="i32", score_stride="i32")
    yield "topk rows limits", topk_rows._limits, row | dict(bad=i32), {"FOLD": 4096, "VECTOR": 4}, 8, 1
    yield "topk rows flag", topk_rows._flag, row | dict(words=i32, word_stride="i32"), {
        "CHUNKS": 16, "CHUNK": topk_rows.FLAGGED, "VECTOR": 4}, 4, 1  # fmt: skip
    yield "topk rows pick", topk_rows._pick, row | dict(
        words=i32, places=i32, keys=i32, out=i32, counts=i32, word_stride="i32", place_stride="i32", out_stride="i32",
    ), {"BLOCK": topk_rows.WORDS, "TILE": topk_rows.TILE, "STEP": topk_rows.STEP, "K_BLOCK": 2048, "SOFT": False}, 8, 1  # fmt: skip
    for dtype, heads, dim, width in (("*bf16", 4, 32, 128), ("*fp32", 16, 64, 1024)):
        yield f"select short {dtype} {width}", select_short._select_short, dict(
            q=dtype, cache=dtype, w="*fp32", table=i32, owner=i32, ends=i32, scores="*fp32", bad=i32, out=i32, counts=i32, k="i32",
            table_stride="i32", page_stride="i32",
        ), {"H": heads, "D": dim, "PAGE": width, "WIDTH": width, "K_BLOCK": 64, "BLOCK_N": 64, "BLOCK_H": 16, "OWNED": width > 128, "UPCAST": False}, 4, 1  # fmt: skip


def compile_kernel(kernel, types, constants, warps, stages, sm):
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(kernel.arg_names)
        if name in types
        and (
            types[name][0] == "*"
            or (name.endswith("_stride") and name not in ("score_stride", "list_stride"))
            or name == "K"
        )
    }
    if kernel.is_gluon():
        from triton.experimental.gluon._runtime import GluonASTSource as ASTSource
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
    return triton.compile(
        source,
        target=GPUTarget("cuda", sm, 32),
        options={"num_warps": warps, "num_stages": stages, "enable_fp_fusion": True},
    )


def main(sm, only=""):
    for name, kernel, types, constants, warps, stages in kernels(sm):
        if only in name:
            built = compile_kernel(kernel, types, constants, warps, stages, sm)
            assert built.asm["cubin"] and built.metadata.shared <= SHARED[sm], (
                f"{name} on SM{sm}: {built.metadata.shared} bytes of shared memory"
            )
            ptx = built.asm["ptx"]
            print(
                name,
                sm,
                built.metadata.shared,
                "wgmma",
                ptx.count("wgmma.mma_async.sync"),
                "mma",
                ptx.count("mma.sync"),
                "cp.async",
                ptx.count("cp.async.c"),
                flush=True,
            )
            if os.environ.get("DUMP"):
                for kind in ("ttgir", "ptx", "cubin"):
                    data = built.asm[kind]
                    with open(f"{os.environ['DUMP']}/{name.replace(' ', '_')}.{sm}.{kind}", "wb") as f:
                        f.write(data if isinstance(data, bytes) else data.encode())


@pytest.mark.parametrize("sm", SHARED)
def test_compiles(sm, compilers):
    said = compilers[sm].communicate(timeout=170)[1]
    assert compilers[sm].returncode == 0, said[-2000:]


if __name__ == "__main__":
    main(int(sys.argv[1].removeprefix("sm")), sys.argv[2] if len(sys.argv) > 2 else "")
