"""Attention over packed segments: many sequences end to end in one row, none sees another.

    o[i] = sum_j softmax_j(q[i] . k[j] / sqrt(K)) v[j]      over the keys j of i's own segment

  q, o   (Tq, H, K)   all segments' queries, one after another
  k, v   (Tk, G, K)   their keys and values; H / G neighbouring query heads share one of G
  cu_q   (segments + 1,) int32: segment s owns queries cu_q[s] .. cu_q[s + 1] - 1; cu_k likewise

Causal: the last query of a segment is aligned with its last key ("bottom right"), so that with
cached keys before it, a new query sees all of the past and itself. A query with no key gives zeros.

Cost of one segment of Lq queries and Lk keys: 4 Lq Lk H K FLOPs (half of it when causal) for two
products. The gradients need five; here seven, since two kernels compute the scores again, each for
itself. At least 2 (Lq H + Lk G) K numbers are moved. Padding every segment to the longest would
cost the square of the padding; a mask over the packed row would be Tq x Tk; even one segment's
scores are Lq x Lk. None of them is ever built in the kernels.

Online softmax is what makes it possible. A program keeps a tile of queries and walks over its keys
tile by tile. For each query it carries three things: `top`, the largest score so far; `total`, the
sum of e^(score - top); `acc`, the sum of e^(score - top) v. When a new tile raises top by d, both
sums shrink by e^-d and go on as if the new top had been known from the start. At the end
o = acc / total. All the backward pass needs to know of the softmax is one number per query,
lse = top + log total, for then e^(score - lse) is the probability itself.

The hardware has 2^x but no e^x. So scores are multiplied by log2 e, together with the 1 / sqrt(K),
and in the code top and lse are logarithms of base 2: lse = top + log2(total), p = 2^(score - lse).
"""

import contextlib
import math
from collections import namedtuple
from functools import lru_cache
from itertools import groupby, pairwise

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from . import on_its_device, passed, say_once, three_way, tl, triton, triton_runs

# ------------------------------------------------------------------------------------------------
# The plain meaning, arranged for a CPU: neighbours of equal lengths go into one call, and a mask is
# made for a block of queries at a time where the past is longer than what is new.

QUERY_BLOCK = 256  # queries at a time where a mask is needed, which is then QUERY_BLOCK x Lk


def attention_ref(q, k, v, cu_q, cu_k, causal):
    """One scaled_dot_product_attention for each run of neighbouring segments of equal lengths."""
    lengths = zip(*([b - a for a, b in pairwise(cu.tolist())] for cu in (cu_q, cu_k)))
    runs = [(*shape, len(list(run))) for shape, run in groupby(lengths)]
    parts = zip(  # by split, whose gradient is one joining; each slice's is as long as the row
        q.split([n * queries for queries, _, n in runs]),
        *(x.split([n * keys for _, keys, n in runs]) for x in (k, v)),
    )
    outs = [equal_segments(*part, n, causal) for part, (_, _, n) in zip(parts, runs)]
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
    half = q.dtype == torch.bfloat16 or torch.is_autocast_enabled("cpu")
    if half and q.requires_grad and q.device.type == "cpu":
        # SDPA's gradient takes several times as long there in bfloat16 as in float32.
        with torch.autocast("cpu", enabled=False):
            return visible(q.float(), k.float(), v.float(), causal).to(v.dtype)
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


# ------------------------------------------------------------------------------------------------
# Forward: a program for every tile of BM queries of one segment, and for every head.

LOG2E = tl.constexpr(math.log2(math.e))
COUNTS = ["segments", "all_rows"]  # compiled once for any; else again where one is 1 or 16 n


@triton.jit
def find_tile(cu, other_cu, segments, SIZE: tl.constexpr):
    """The segment to which a program's tile belongs, found without asking the host for lengths:
    where it begins in both rows, how long it is there, and which of its tiles this is.

    Segment s gets the tiles from cu[s] // SIZE + s on, so cu[s + 1] // SIZE - cu[s] // SIZE + 1 of
    them: at least as many as it has rows for, and at most one more, which has nothing to do. With
    SIZE 4 and cu 0 3 10: tile 0 is segment 0's, tiles 1 to 3 are segment 1's, which needs two."""
    tile = tl.program_id(0)
    low = 0
    high = segments
    while high - low > 1:
        middle = (low + high) // 2
        after = tl.load(cu + middle) // SIZE + middle <= tile
        low = tl.where(after, middle, low)
        high = tl.where(after, high, middle)
    first, other_first = tl.load(cu + low), tl.load(other_cu + low)
    length, other_length = tl.load(cu + low + 1) - first, tl.load(other_cu + low + 1) - other_first
    return first, length, other_first, other_length, tile - first // SIZE - low


@triton.jit
def visible_keys(tile, past, keys, CAUSAL: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    """How many keys, in whole tiles, all queries of a tile see, and how many any of them sees.
    Query m is the (m + past)th of its segment, and in a causal one sees the keys up to there."""
    by_all, by_any = keys, keys
    if CAUSAL:
        by_all = tl.maximum(tl.minimum(keys, tile * BM + past + 1), 0)
        by_any = tl.maximum(tl.minimum(keys, tile * BM + past + BM), 0)
    return by_all // BN * BN, by_any


# q_row, q_head, kv_row, kv_head are strides; all_rows is Tq, inv_root 1 / sqrt(K), SHARED H / G;
# `past` is how many more keys than queries a segment has, below 0 if there are fewer.


@triton.jit(do_not_specialize=COUNTS)
def forward_kernel(
    q, k, v, o, lse, cu_q, cu_k, segments, all_rows, q_row, q_head, kv_row, kv_head, inv_root,
    SHARED: tl.constexpr, K: tl.constexpr, CAUSAL: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    first_q, queries, first_k, keys, tile = find_tile(cu_q, cu_k, segments, BM)
    tile = tl.cdiv(queries, BM) - 1 - tile  # the last first: in a triangle it has most to do
    if tile < 0:
        return
    head, heads = tl.program_id(1).to(tl.int64), tl.num_programs(1)
    m, d = tile * BM + tl.arange(0, BM), tl.arange(0, K)
    mine, place = (m < queries)[:, None], (first_q + m).to(tl.int64)[:, None]
    q_tile = tl.load(q + place * q_row + head * q_head + d[None, :], mine, 0.0)
    shared = first_k.to(tl.int64) * kv_row + head // SHARED * kv_head + d[None, :]

    past, scale = keys - queries, inv_root * LOG2E
    by_all, by_any = visible_keys(tile, past, keys, CAUSAL, BM, BN)
    acc = tl.zeros((BM, K), tl.float32)
    total = tl.zeros((BM,), tl.float32)
    top = tl.zeros((BM,), tl.float32) - 1e30  # below any score, yet a number: -inf - -inf is NaN
    # Two loops, written once: whole tiles that every query sees need no mask. Only the diagonal
    # and the last tile, where a key may lie in some query's future or not exist, come with one.
    for MASKED in tl.static_range(2):
        for start in range(by_all if MASKED else 0, by_any if MASKED else by_all, BN):
            n = start + tl.arange(0, BN)
            there = (n < keys)[:, None] if MASKED else None
            zero = 0.0 if MASKED else None
            k_tile = tl.load(k + shared + n[:, None] * kv_row, there, zero)
            scores = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee")  # (BM, BN)
            if MASKED:
                last = m[:, None] + past if CAUSAL else keys - 1
                scores = tl.where(n[None, :] <= tl.minimum(last, keys - 1), scores, float("-inf"))
            higher = tl.maximum(top, tl.max(scores, 1) * scale)
            p = tl.exp2(scores * scale - higher[:, None])  # one fused instruction, then 2^x
            shrink = tl.exp2(top - higher)
            top, total = higher, total * shrink + tl.sum(p, 1)
            v_tile = tl.load(v + shared + n[:, None] * kv_row, there, zero)
            p = p.to(v_tile.dtype)
            acc = tl.dot(p, v_tile, acc * shrink[:, None], input_precision="ieee")
    blind = total == 0  # a query without a key gets zeros, and in the backward pass p = 0
    total = tl.where(blind, 1.0, total)
    acc = acc / total[:, None]
    tl.store(o + (place * heads + head) * K + d[None, :], acc.to(o.dtype.element_ty), mine)
    lses = tl.where(blind, float("inf"), top + tl.log2(total))
    tl.store(lse + head * all_rows + first_q + m, lses, m < queries)


# ------------------------------------------------------------------------------------------------
# Backward. With p the probabilities and g the gradient of o, the gradient of p is dp = g v^T, and
# that of the scores, through the softmax, ds_j = p_j (dp_j - sum_i p_i dp_i). The sum is g . o, one
# number a query, called delta. So
#
#   dv = p^T g      ds = p (g v^T - delta)      dq = ds k / sqrt(K)      dk = ds^T q / sqrt(K)
#
# p is computed again from lse. One kernel walks over the keys of a tile of queries and gives dq,
# another over the queries of a tile of keys and gives dk and dv, for all query heads that share
# them: so every number is summed by one program, in one order, and no atomic addition is needed.
# The second works on p^T and ds^T from the start (keys in rows). Transposing ds before the product
# would be shorter, and is what Triton 3.4 to 3.7.0 have been reported to compile wrongly.


@triton.jit(do_not_specialize=COUNTS)
def dq_kernel(
    q, k, v, o, g, lse, delta, dq, cu_q, cu_k, segments, all_rows, q_row, q_head, kv_row, kv_head,
    inv_root, SHARED: tl.constexpr, K: tl.constexpr, CAUSAL: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """dq of a tile of queries, and their delta, which the kernel after this one reads."""
    first_q, queries, first_k, keys, tile = find_tile(cu_q, cu_k, segments, BM)
    tile = tl.cdiv(queries, BM) - 1 - tile
    if tile < 0:
        return
    head, heads = tl.program_id(1).to(tl.int64), tl.num_programs(1)
    m, d = tile * BM + tl.arange(0, BM), tl.arange(0, K)
    mine, place = (m < queries)[:, None], (first_q + m).to(tl.int64)[:, None]
    q_tile = tl.load(q + place * q_row + head * q_head + d[None, :], mine, 0.0)
    shared = first_k.to(tl.int64) * kv_row + head // SHARED * kv_head + d[None, :]
    own, stat = (place * heads + head) * K + d[None, :], head * all_rows + first_q + m
    o_tile, g_tile = tl.load(o + own, mine, 0.0), tl.load(g + own, mine, 0.0)
    deltas = tl.sum(o_tile.to(tl.float32) * g_tile.to(tl.float32), 1)
    tl.store(delta + stat, deltas, m < queries)
    lses = tl.load(lse + stat, m < queries, float("inf"))

    past, scale = keys - queries, inv_root * LOG2E
    by_all, by_any = visible_keys(tile, past, keys, CAUSAL, BM, BN)
    acc = tl.zeros((BM, K), tl.float32)
    for MASKED in tl.static_range(2):
        for start in range(by_all if MASKED else 0, by_any if MASKED else by_all, BN):
            n = start + tl.arange(0, BN)
            there = (n < keys)[:, None] if MASKED else None
            zero = 0.0 if MASKED else None
            k_tile = tl.load(k + shared + n[:, None] * kv_row, there, zero)
            v_tile = tl.load(v + shared + n[:, None] * kv_row, there, zero)
            scores = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee") * scale  # (BM, BN)
            p = tl.exp2(scores - lses[:, None])
            if MASKED:
                last = m[:, None] + past if CAUSAL else keys - 1
                p = tl.where(n[None, :] <= tl.minimum(last, keys - 1), p, 0.0)
            dp = tl.dot(g_tile, tl.trans(v_tile), input_precision="ieee")
            ds = (p * (dp - deltas[:, None])).to(k_tile.dtype)
            acc = tl.dot(ds, k_tile, acc, input_precision="ieee")
    tl.store(dq + own, (acc * inv_root).to(dq.dtype.element_ty), mine)


@triton.jit(do_not_specialize=COUNTS)
def dkdv_kernel(
    q, k, v, g, lse, delta, dk, dv, cu_q, cu_k, segments, all_rows, q_row, q_head, kv_row, kv_head,
    inv_root, SHARED: tl.constexpr, K: tl.constexpr, CAUSAL: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    first_k, keys, first_q, queries, tile = find_tile(cu_k, cu_q, segments, BN)
    if tile * BN >= keys:
        return
    group, groups = tl.program_id(1).to(tl.int64), tl.num_programs(1)
    n, d = tile * BN + tl.arange(0, BN), tl.arange(0, K)
    mine, place = (n < keys)[:, None], (first_k + n).to(tl.int64)[:, None]
    k_tile = tl.load(k + place * kv_row + group * kv_head + d[None, :], mine, 0.0)
    v_tile = tl.load(v + place * kv_row + group * kv_head + d[None, :], mine, 0.0)
    dk_acc, dv_acc = tl.zeros((BN, K), tl.float32), tl.zeros((BN, K), tl.float32)

    past, scale = keys - queries, inv_root * LOG2E
    seen_from, full_from = 0, 0  # the first tile of queries that see any of these keys, see all
    if CAUSAL:
        seen_from = tl.maximum(tile * BN - past, 0) // BM * BM
        full_from = tl.cdiv(tl.maximum(tile * BN + BN - 1 - past, 0), BM) * BM
    bounds = (seen_from, full_from, tl.maximum(queries // BM * BM, full_from), queries)
    start_q, g_row = first_q.to(tl.int64), groups * SHARED * K
    for PART in tl.static_range(3):  # the diagonal, whole tiles, the last tile
        for head in range(group * SHARED, group * SHARED + SHARED):
            q_rows = q + start_q * q_row + head * q_head + d[None, :]
            g_rows = g + start_q * g_row + head * K + d[None, :]
            stat = head * all_rows + start_q
            for start in range(bounds[PART], bounds[PART + 1], BM):
                m = start + tl.arange(0, BM)
                there = None if PART == 1 else m < queries
                mask, zero = (None, None) if PART == 1 else (there[:, None], 0.0)
                q_tile = tl.load(q_rows + m[:, None] * q_row, mask, zero)
                g_tile = tl.load(g_rows + m[:, None] * g_row, mask, zero)
                deltas = tl.load(delta + stat + m, there, zero)
                lses = tl.load(lse + stat + m, there, None if PART == 1 else float("inf"))  # p = 0
                scores = tl.dot(k_tile, tl.trans(q_tile), input_precision="ieee") * scale
                p = tl.exp2(scores - lses[None, :])  # (BN, BM)
                if PART != 1 and CAUSAL:
                    p = tl.where(n[:, None] <= m[None, :] + past, p, 0.0)
                dv_acc = tl.dot(p.to(g_tile.dtype), g_tile, dv_acc, input_precision="ieee")
                dp = tl.dot(v_tile, tl.trans(g_tile), input_precision="ieee")
                ds = (p * (dp - deltas[None, :])).to(q_tile.dtype)
                dk_acc = tl.dot(ds, q_tile, dk_acc, input_precision="ieee")
    own = (place * groups + group) * K + d[None, :]
    tl.store(dk + own, (dk_acc * inv_root).to(dk.dtype.element_ty), mine)
    tl.store(dv + own, dv_acc.to(dv.dtype.element_ty), mine)


# ------------------------------------------------------------------------------------------------
# Both together.


class Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, cu_q, cu_k, causal, tiles):
        (rows, heads, size), groups, segments = q.shape, k.shape[1], len(cu_q) - 1
        q, k, v = (x if x.stride(2) == 1 else x.contiguous() for x in (q, k, v))
        if k.stride() != v.stride():
            k, v = k.contiguous(), v.contiguous()
        o = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        lse = torch.empty(heads, rows, dtype=torch.float32, device=q.device)
        ctx.numbers = (*q.stride()[:2], *k.stride()[:2], size**-0.5, heads // groups, size, causal)
        ctx.tiles, (own, walked, warps, stages) = tiles, tiles[0]
        forward_kernel[(rows // own + segments, heads)](
            q, k, v, o, lse, cu_q, cu_k, segments, rows, *ctx.numbers,
            BM=own, BN=walked, num_warps=warps, num_stages=stages,
        )  # fmt: skip
        ctx.save_for_backward(q, k, v, o, lse, cu_q, cu_k)
        return o

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        q, k, v, o, lse, cu_q, cu_k = ctx.saved_tensors
        g, delta = g.contiguous(), torch.empty_like(lse)
        dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
        segments, rows = len(cu_q) - 1, len(q)
        rest = (cu_q, cu_k, segments, rows, *ctx.numbers)
        own, walked, warps, stages = ctx.tiles[1]
        dq_kernel[(rows // own + segments, q.shape[1])](
            q, k, v, o, g, lse, delta, dq, *rest,
            BM=own, BN=walked, num_warps=warps, num_stages=stages,
        )  # fmt: skip
        own, walked, warps, stages = ctx.tiles[2]
        dkdv_kernel[(len(k) // own + segments, k.shape[1])](
            q, k, v, g, lse, delta, dk, dv, *rest,
            BM=walked, BN=own, num_warps=warps, num_stages=stages,
        )  # fmt: skip
        return dq, dk, dv, None, None, None, None


# Candidates for the three kernels: rows of a program's own tile, rows of the tiles that it walks
# over, warps, stages. On a device, the first use for a kind of problem keeps the quickest of those
# whose results are right there; a candidate has to be 5 % quicker than one before it in the list.
LONG = (
    ((128, 64, 8, 3), (128, 64, 4, 3), (128, 128, 8, 2), (64, 64, 4, 3)),
    ((128, 64, 8, 3), (128, 64, 8, 2), (64, 64, 4, 2)),
    ((128, 64, 8, 2), (128, 32, 8, 3), (64, 64, 8, 2), (64, 32, 4, 2)),
)
SHORT = (((64, 64, 4, 2), (64, 32, 4, 2), (32, 32, 4, 2)),) * 3  # for segments shorter than 128
SIZES = (16, 32, 64, 128)  # of heads
TRIAL = ((300, 300), (7, 7), (1, 1), (33, 170), (129, 64))  # odd ends, a past, blind queries
Problem = namedtuple("Problem", "size shared causal dtype device short")


def example(lengths, heads, groups, size, device, dtype=torch.float64):
    """Random q, k, v and the bounds of segments of these lengths: ((queries, keys), ...)."""
    dice = torch.Generator(device).manual_seed(0)
    how = {"generator": dice, "device": device, "dtype": dtype}
    q = torch.randn(sum(n for n, _ in lengths), heads, size, **how)
    k, v = torch.randn(2, sum(n for _, n in lengths), groups, size, **how)
    bounds = (torch.tensor([0, *side], device=device).cumsum(0).int() for side in zip(*lengths))
    return (q, k, v), *bounds


def right(tiles, kernel, problem) -> bool:
    """Whether what the kernel-th kernel computes with these tiles is right on that device."""
    qkv, *bounds = example(TRIAL, 2 * problem.shared, 2, problem.size, problem.device)
    ours = lambda q, k, v: Attention.apply(q, k, v, *bounds, problem.causal, tiles)
    plain = lambda q, k, v: attention_ref(q, k, v, *bounds, problem.causal)
    found = three_way(ours, plain, qkv, problem.dtype, learns=kernel > 0)
    parts = (["output"], ["gradient 1"], ["gradient 2", "gradient 3"])[kernel]
    fine = passed({part: found[part] for part in parts})
    if not fine:
        say_once(f"attention: tiles {tiles[kernel]} give wrong results here and are left out")
    return fine


def milliseconds(tiles, kernel, problem) -> float:
    lengths = [(60, 60)] * 128 if problem.short else [(1500, 1500)] * 8
    groups = max(2, 16 // problem.shared)
    heads = groups * problem.shared
    qkv, *bounds = example(lengths, heads, groups, problem.size, problem.device, problem.dtype)
    run = lambda: Attention.apply(*qkv, *bounds, problem.causal, tiles)
    if kernel:
        [x.requires_grad_() for x in qkv]
        o = run()
        run = lambda: torch.autograd.grad(o, qkv, o, retain_graph=True)
    return triton.testing.do_bench(run, warmup=5, rep=25)


@lru_cache(maxsize=None)
def chosen_tiles(problem):
    """Tiles for the three kernels; None if one of them is right with no candidate."""
    lists = SHORT if problem.short else LONG
    if problem.device.type != "cuda" or problem.dtype == torch.float32:  # for checking, not speed
        lists = [candidates[-1:] for candidates in SHORT]
    tiles = [candidates[-1] for candidates in lists]
    if problem.device.type != "cuda":
        return tuple(tiles)  # the interpreter computes what is written, at one speed
    say_once(f"attention: trying tiles for heads of {problem.size}, {problem.dtype}")
    plain = torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x)
    # Whoever asks first may want no gradients, or may be counting saved tensors; the trial is ours.
    with torch.inference_mode(False), torch.enable_grad(), plain:
        for kernel, candidates in enumerate(lists):
            taken = {}
            for candidate in candidates:
                tiles[kernel] = candidate
                with contextlib.suppress(triton.errors.TritonError):  # too large for this device
                    if right(tuple(tiles), kernel, problem):
                        taken[candidate] = milliseconds(tuple(tiles), kernel, problem)
            if not taken:
                return say_once("attention: no tiles pass on this device: the plain path runs")
            limit = 1.05 * min(taken.values())
            tiles[kernel] = next(candidate for candidate in taken if taken[candidate] <= limit)
    return tuple(tiles)


@on_its_device
def attention(q, k, v, cu_q, cu_k, causal):
    """The public face: see the top of this file. Bounds on a GPU are believed. -> (Tq, H, K)"""
    if q.ndim != 3 or k.ndim != 3 or k.shape != v.shape or q.shape[2] != k.shape[2]:
        raise ValueError(
            f"attention: expected q (Tq, H, K) and k, v (Tk, G, K), "
            f"found {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}"
        )
    if not k.shape[1] or q.shape[1] % k.shape[1]:
        raise ValueError(
            f"attention: {q.shape[1]} heads cannot share {k.shape[1]} key heads evenly"
        )
    for name, cu, rows in (("cu_q", cu_q, len(q)), ("cu_k", cu_k, len(k))):
        if cu.ndim != 1 or not 0 < len(cu) == len(cu_q) or cu.dtype != torch.int32:
            found = f"{cu.dtype} {tuple(cu.shape)} beside {tuple(cu_q.shape)}"
            raise ValueError(
                f"attention: {name}: expected int32, one more than segments, found {found}"
            )
        bounds = cu.tolist() if cu.device.type == "cpu" else [0, rows]  # a GPU would have to wait
        if bounds[0] != 0 or bounds[-1] != rows or bounds != sorted(bounds):
            raise ValueError(
                f"attention: {name}: expected to rise from 0 to {rows}: {bounds!r:.60}"
            )
    size = q.shape[2]
    odd = "" if size in SIZES else f"heads of {size}"
    if len(q) and len(k) and triton_runs("attention", q, k, v, cu_q, cu_k, unless=odd):
        shared, short = q.shape[1] // k.shape[1], len(q) < 128 * (len(cu_q) - 1)
        tiles = chosen_tiles(Problem(size, shared, causal, q.dtype, q.device, short))
        if tiles:
            return Attention.apply(q, k, v, cu_q, cu_k, causal, tiles)
    return attention_ref(q, k, v, cu_q, cu_k, causal)


# ------------------------------------------------------------------------------------------------

LENGTHS = {
    "odd lengths": [(37, 37), (7, 7), (1, 1), (64, 64)],
    "a past": [(1, 9), (5, 40), (33, 100)],
    "blind queries": [(40, 12), (3, 0), (2, 2)],
    "unasked keys": [(3, 3), (0, 20), (4, 4)],
}


def check(device="cpu", dtype=torch.float32):
    """(what, errors as multiples of plain code's) for odd shapes; see three_way."""
    for title, lengths in LENGTHS.items():
        for heads, groups, size in ((4, 2, 16), (3, 1, 32), (1, 1, 64), (2, 2, 128)):
            for causal in (False, True):
                qkv, *bounds = example(lengths, heads, groups, size, device)
                run = lambda op: lambda q, k, v: op(q, k, v, *bounds, causal)
                found = three_way(run(attention), run(attention_ref), qkv, dtype)
                yield f"{title}, {heads}/{groups} x {size}" + ", causal" * causal, found


CLIPS = [51 + 350 * i % 1450 for i in range(40)]  # positions of forty clips of 1 to 30 s
EXAMPLES = [700, 1500, 400, 2000, 900, 1100, 300, 1292]  # of a packed row of 8192
SHAPES = {  # lengths, H, G, K, causal
    "encoder, 16 of 30 s": ([1500] * 16, 20, 20, 64, False),
    "encoder, 40 of 1 to 30 s": (CLIPS, 20, 20, 64, False),
    "encoder, 96 of 5 s": ([250] * 96, 20, 20, 64, False),
    "AF3 decoder, 8192": ([8192], 28, 4, 128, True),
    "AF3 decoder, 8192 packed": (EXAMPLES, 28, 4, 128, True),
    "Qwen2-Audio decoder, 8192 packed": (EXAMPLES, 32, 32, 128, True),
    "tiny decoder, 8192 packed": (EXAMPLES, 6, 6, 32, True),
}
SMALL = {
    "encoder, 20 of 1 to 5 s": ([50 + 350 * i % 200 for i in range(20)], 20, 20, 64, False),
    "AF3 decoder, 1024 packed": ([500, 300, 224], 28, 4, 128, True),
}


def time(clock, device, dtype):
    for title, (lengths, heads, groups, size, causal) in clock.choose(SHAPES, SMALL).items():
        pairs = [(n, n) for n in lengths]
        (q, k, v), cu, _ = example(pairs, heads, groups, size, device, dtype)
        inputs = [x.requires_grad_() for x in (q, k, v)]
        runs = {"ours": lambda: attention(q, k, v, cu, cu, causal)}
        runs |= clock.attention_peers(q, k, v, cu, lengths, causal)
        flops = sum(4 * n * n * heads * size for n in lengths) / (1 + causal)
        clock(
            title, runs, inputs, flops=(flops, 2.5 * flops)
        )  # of use: what is computed twice is not
        if q.is_cuda:
            short = len(q) < 128 * len(lengths)
            tiles = chosen_tiles(Problem(size, heads // groups, causal, dtype, q.device, short))
            clock.say(f"\nTiles: {tiles}" if tiles else "\nNo tiles are right here: ours is plain.")
