"""What the decode kernels compute, in plain torch and float64: simple loops, no speed. The definition the tests compare with."""

import torch


def gather_pages(cache, block_table, length):
    """Rows of one sequence: cache [pages, page, ...], block_table [max_pages] -> [length, ...]."""
    page = cache.shape[1]
    pos = torch.arange(length, device=cache.device)
    return cache[block_table[pos // page].long(), pos % page]


def attend(q, k, v, positions, scale, sink=None):
    """q [H, Dk], k [S, Dk], v [S, Dv] (one kv head each); positions: list of int, repeated ones count again. -> out [H, Dv], lse [H]."""
    chosen = torch.tensor([p for p in positions if 0 <= p < len(k)], dtype=torch.long, device=k.device)
    if len(chosen) == 0:
        return q.new_zeros(q.shape[0], v.shape[1], dtype=torch.float64), torch.full(
            (q.shape[0],), -torch.inf, dtype=torch.float64, device=q.device
        )
    scores = (q.double() @ k[chosen].double().T) * scale
    lse = torch.logsumexp(scores, -1)
    full = lse if sink is None else torch.logaddexp(lse, sink.double())
    return torch.exp(scores - full[:, None]) @ v[chosen].double(), lse


def gqa_decode(q, k_cache, v_cache, block_table, seq_lens, indices=None, counts=None, scale=None, sink=None):
    """See kernels/gqa_decode.py; float64 out [B, H, D] and lse [B, H]."""
    batch, heads, dim = q.shape
    group = heads // k_cache.shape[2]
    scale = dim**-0.5 if scale is None else scale
    out = torch.zeros(q.shape, dtype=torch.float64, device=q.device)
    lse = torch.full((batch, heads), -torch.inf, dtype=torch.float64, device=q.device)
    for b in range(batch):
        length = int(seq_lens[b])
        k, v = gather_pages(k_cache, block_table[b], length), gather_pages(v_cache, block_table[b], length)
        positions = range(length) if indices is None else indices[b, : int(counts[b])].tolist()
        for h in range(k_cache.shape[2]):
            rows = slice(h * group, (h + 1) * group)
            out[b, rows], lse[b, rows] = attend(
                q[b, rows], k[:, h], v[:, h], positions, scale, None if sink is None else sink[rows]
            )
    return out, lse


def mla_decode(q, cache, block_table, seq_lens, indices=None, counts=None, scale=None, sink=None):
    """See kernels/mla_decode.py, either cache; float64 out [B, H, 512] and lse [B, H]."""
    if cache.dtype == torch.uint8:
        cache = dequantise_mla(cache)
    scale = 576**-0.5 if scale is None else scale
    results = []
    for b in range(len(q)):
        k = gather_pages(cache, block_table[b], int(seq_lens[b]))
        positions = range(int(seq_lens[b])) if indices is None else indices[b, : int(counts[b])].tolist()
        results.append(attend(q[b], k, k[:, :512], positions, scale, sink))
    return torch.stack([r[0] for r in results]), torch.stack([r[1] for r in results])


def indexer_logits(q, k, w):
    """q [T, H, D], k [S, D], w [T, H] -> float64 [T, S]: sum over heads of w * relu(q . k)."""
    return torch.einsum("th,ths->ts", w.double(), torch.relu(torch.einsum("thd,sd->ths", q.double(), k.double())))


def topk(scores, lengths, k):
    """Indices int32 [rows, k] ascending with a -1 tail, counts int32 [rows]; the lowest index wins a tie, -0 equals +0."""
    out = torch.full((len(scores), k), -1, dtype=torch.int32, device=scores.device)
    counts = torch.zeros(len(scores), dtype=torch.int32, device=scores.device)
    for r in range(len(scores)):
        row = scores[r, : int(lengths[r])] + 0.0  # -0 + 0 is +0
        if row.isnan().any():
            raise ValueError(f"topk: row {r} holds a NaN")
        best = torch.sort(row, descending=True, stable=True).indices[:k].sort().values
        out[r, : len(best)], counts[r] = best.int(), len(best)
    return out, counts


def quantise(x, group):
    """Groups of the last dimension -> (e4m3 values, fp32 scales [..., n / group])."""
    grouped = x.float().unflatten(-1, (-1, group))
    scale = grouped.abs().amax(-1).clamp_min(1e-10) / 448.0
    return (grouped / scale[..., None]).clamp(-448, 448).to(torch.float8_e4m3fn).flatten(-2), scale


def index_cache(k, page):
    """Keys [pages * page, D] -> uint8 [pages, page * (D + 4)]."""
    values, scales = quantise(k, k.shape[-1])
    pages = len(k) // page
    values = values.view(torch.uint8).reshape(pages, -1)
    return torch.cat([values, scales.reshape(pages, page).contiguous().view(torch.uint8)], 1).contiguous()


def dequantise_index(cache, dim):
    """uint8 [pages, page * (dim + 4)] -> fp32 [pages, page, dim]."""
    page = cache.shape[1] // (dim + 4)
    values = cache[:, : page * dim].contiguous().view(torch.float8_e4m3fn).float().reshape(-1, page, dim)
    return values * cache[:, page * dim :].contiguous().view(torch.float32)[..., None]


def mla_cache(latent, rope, page):
    """latent [pages * page, 512], rope [pages * page, 64] -> uint8 [pages, page, 656]."""
    values, scales = quantise(latent, 128)
    parts = [
        values.view(torch.uint8),
        scales.contiguous().view(torch.uint8),
        rope.bfloat16().contiguous().view(torch.uint8),
    ]
    return torch.cat(parts, -1).reshape(-1, page, 656).contiguous()


def dequantise_mla(cache):
    """uint8 [pages, page, 656] -> fp32 [pages, page, 576]."""
    values = cache[..., :512].contiguous().view(torch.float8_e4m3fn).float().unflatten(-1, (4, 128))
    scales = cache[..., 512:528].contiguous().view(torch.float32)
    rope = cache[..., 528:].contiguous().view(torch.bfloat16).float()
    return torch.cat([(values * scales[..., None]).flatten(-2), rope], -1)
