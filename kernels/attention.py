"""Attention over packed segments: many sequences end to end in one row, none sees another.

    o[i] = sum_j softmax_j(q[i] . k[j] / sqrt(K)) v[j]      over the keys j of i's own segment

  q, o   (Tq, H, K)   all segments' queries, one after another
  k, v   (Tk, G, K)   their keys and values; H / G neighbouring query heads share one of G
  cu_q   (segments + 1,) int32: segment s owns queries cu_q[s] .. cu_q[s + 1] - 1; cu_k likewise

Causal: the last query of a segment is aligned with its last key ("bottom right"), so that with
cached keys before it, a new query sees all of the past and itself. A query with no key gives zeros.

Cost of one segment of Lq queries and Lk keys: 4 Lq Lk H K FLOPs (half of it when causal), and
2 (Lq H + Lk G) K numbers moved. Padding every segment to the longest would cost the square of the
padding; a mask over the packed row would be Tq x Tk. Neither is ever built here.
"""

import torch
import torch.nn.functional as F

QUERY_BLOCK = 256  # queries at a time where a mask is needed, which is then QUERY_BLOCK x Lk


def attention_ref(q, k, v, cu_q, cu_k, causal):
    """One scaled_dot_product_attention for each run of neighbouring segments of equal lengths."""
    starts_q, starts_k = cu_q.tolist(), cu_k.tolist()
    lengths = [
        (starts_q[s + 1] - starts_q[s], starts_k[s + 1] - starts_k[s])
        for s in range(len(starts_q) - 1)
    ]
    outs, first = [], 0
    while first < len(lengths):
        last = first + 1
        while last < len(lengths) and lengths[last] == lengths[first]:
            last += 1
        rows_q = slice(starts_q[first], starts_q[last])
        rows_k = slice(starts_k[first], starts_k[last])
        outs.append(equal_segments(q[rows_q], k[rows_k], v[rows_k], last - first, causal))
        first = last
    return torch.cat(outs) if outs else q.clone()


def equal_segments(q, k, v, n, causal):
    """n segments of one shape: q (n Lq, H, K), k and v (n Lk, G, K) -> (n Lq, H, K)."""
    heads, size, groups = q.shape[1], q.shape[2], k.shape[1]
    queries, keys = len(q) // n, len(k) // n
    q = q.view(n, queries, heads, size).transpose(1, 2)  # (n, H, Lq, K)
    k = k.unflatten(0, (n, keys)).transpose(1, 2)  # (n, G, Lk, K)
    v = v.unflatten(0, (n, keys)).transpose(1, 2)
    blind = max(0, queries - keys) if causal else queries * (keys == 0)  # queries without a key
    if queries == 0 or blind == queries:
        o = torch.zeros_like(q) + 0 * q  # zeros that a gradient can pass
    elif blind:
        o = F.pad(visible(q[:, :, blind:], k, v, causal), (0, 0, blind, 0))
    elif queries == 1 or not causal and groups < heads:
        # Without a mask the heads that share a key are just more queries: no key is copied.
        shared = q.reshape(n, groups, heads // groups * queries, size)
        o = F.scaled_dot_product_attention(shared, k, v).view(n, heads, queries, size)
    else:
        o = visible(q, k, v, causal)
    return o.transpose(1, 2).reshape(n * queries, heads, size)


def visible(q, k, v, causal):
    """SDPA on (n, H, Lq, K) and (n, G, Lk, K) where every query has at least one key."""
    queries, keys = q.shape[2], k.shape[2]
    shared = {"enable_gqa": q.shape[1] != k.shape[1]}
    if not causal or queries == keys:
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal, **shared)
    blocks = []
    for start in range(0, queries, QUERY_BLOCK):  # fewer queries than keys: the past is cached
        stop = min(start + QUERY_BLOCK, queries)
        seen = keys - queries + stop
        mask = torch.ones(stop - start, seen, dtype=torch.bool, device=q.device)
        mask = mask.tril(keys - queries + start)
        blocks.append(
            F.scaled_dot_product_attention(
                q[:, :, start:stop], k[:, :, :seen], v[:, :, :seen], attn_mask=mask, **shared
            )
        )
    return torch.cat(blocks, dim=2)


def attention(q, k, v, cu_q, cu_k, causal):
    """The public face: see the top of this file. -> (Tq, H, K)"""
    if q.ndim != 3 or k.ndim != 3 or k.shape != v.shape or q.shape[2] != k.shape[2]:
        raise ValueError(
            f"attention: expected q (Tq, H, K) and k, v (Tk, G, K), "
            f"found {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}"
        )
    if not k.shape[1] or q.shape[1] % k.shape[1]:
        raise ValueError(f"attention: {q.shape[1]} heads cannot share {k.shape[1]} keys evenly")
    for name, cu, rows in (("cu_q", cu_q, len(q)), ("cu_k", cu_k, len(k))):
        if cu.ndim != 1 or not 0 < len(cu) == len(cu_q) or cu.dtype != torch.int32:
            raise ValueError(f"attention: {name}: expected int32, one more than there are segments")
        bounds = cu.tolist() if cu.device.type == "cpu" else [0, rows]  # a GPU would have to wait
        if bounds[0] != 0 or bounds[-1] != rows or bounds != sorted(bounds):
            raise ValueError(f"attention: {name}: expected to rise from 0 to {rows}")
    return attention_ref(q, k, v, cu_q, cu_k, causal)


def check():
    """The packed op against each segment alone, written out as softmax in float64."""
    torch.manual_seed(0)
    worst = 0.0
    for causal in (False, True):
        lengths = [(7, 7), (1, 9), (5, 12), (300, 310), (3, 3), (3, 3)]
        q, k, v = (
            torch.randn(sum(n[i] for n in lengths), g, 16) for i, g in ((0, 6), (1, 2), (1, 2))
        )
        cu_q, cu_k = (torch.tensor([0, *(n[i] for n in lengths)]).cumsum(0).int() for i in (0, 1))
        o = attention(q, k, v, cu_q, cu_k, causal)
        for s, (queries, keys) in enumerate(lengths):
            qs = q[cu_q[s] : cu_q[s + 1]].double()
            ks, vs = (x[cu_k[s] : cu_k[s + 1]].double().repeat_interleave(3, 1) for x in (k, v))
            scores = torch.einsum("qhd,khd->hqk", qs, ks) / 4
            if causal:
                ahead = torch.ones(queries, keys).triu(keys - queries + 1).bool()
                scores = scores.masked_fill(ahead, -torch.inf)
            expected = torch.einsum("hqk,khd->qhd", scores.softmax(-1), vs)
            worst = max(worst, (o[cu_q[s] : cu_q[s + 1]] - expected).abs().max().item())
    return worst
