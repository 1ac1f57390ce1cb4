"""Settings of every test run: one thread for torch (tests are small, cores are shared), Triton's interpreter where there is no GPU, and no
Ray files in the home folder."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before any test imports triton: the kernels then run on the CPU

for name, value in {
    "OMP_NUM_THREADS": "1",
    "RAY_AUTH_MODE": "disabled",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
}.items():
    os.environ.setdefault(name, value)


@pytest.fixture(scope="module")
def compilers(request):
    """The module run as a script for every chip of its SHARED, all at once: chip -> process, whose end and stderr say how it went."""
    pytest.importorskip("triton")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    file, chips = request.module.__file__, request.module.SHARED
    processes = {sm: subprocess.Popen([sys.executable, file, str(sm)], env=environment, **pipes) for sm in chips}
    yield processes
    for process in processes.values():
        process.kill()
        process.communicate()


def feed_cached(model, parts, schedule, page=5, **options):
    """Runs each part through a paged cache poisoned with NaN, in pieces of schedule[step] tokens; decode mode where every piece is one
    token. Returns the logits and the index sets (None where no layer selects) of each part."""
    from winnow.models import attach
    from winnow.models.context import ForwardContext
    from winnow.models.forward import hidden_states, lm_head_weight
    from winnow.rollout.cache import PagedCache

    most = -(-max(map(len, parts)) // page)
    order = torch.randperm(most * len(parts), generator=torch.Generator().manual_seed(3))
    table = order.view(len(parts), most).to(torch.int32)
    cache = PagedCache(**attach.cache_shape(model), num_pages=most * len(parts), page_size=page)
    for store in (*cache.k, *cache.v, *cache.index.values()):
        store.fill_(torch.nan)
    outs, sets, start = [[] for _ in parts], [[] for _ in parts], 0
    for size in schedule:
        live = [i for i, part in enumerate(parts) if len(part) > start]
        if not live:
            break
        counts = [min(size, len(parts[i]) - start) for i in live]
        positions = torch.cat([torch.arange(start, start + n) for n in counts])
        owner = torch.tensor(live).repeat_interleave(torch.tensor(counts))
        recorded = {}
        ctx = ForwardContext(
            mode="decode" if size == 1 else "prefill", positions=positions,
            cu_seqlens=torch.tensor([0, *counts]).cumsum(0).to(torch.int32),
            seq_lens=torch.tensor([start + n for n in counts], dtype=torch.int32), block_table=table[live],
            slot_mapping=table[owner, positions // page].long() * page + positions % page, cache=cache, selection_out=recorded, **options,
        )  # fmt: skip
        pieces = torch.cat([parts[i][start : start + n] for i, n in zip(live, counts, strict=True)])
        out = hidden_states(model, pieces, ctx) @ lm_head_weight(model).T
        for i, rows in zip(live, out.split(counts), strict=True):
            outs[i].append(rows)
        if recorded:
            stacked = torch.stack([recorded[layer].indices for layer in sorted(recorded)])
            for i, rows in zip(live, stacked.split(counts, 1), strict=True):
                sets[i].append(rows)
        start += size
    return [torch.cat(o) for o in outs], [torch.cat(s, 1) if s else None for s in sets]


@pytest.fixture(scope="session")
def run_cached():
    """`feed_cached`, for the tests of several files."""
    return feed_cached


@pytest.fixture(scope="session")
def babbler(tmp_path_factory):
    """The folder of a tiny model that says random digits (`pipelines.make_babbler`); nobody writes into it."""
    from pipelines import make_babbler

    return make_babbler(tmp_path_factory.mktemp("models") / "babbler")
