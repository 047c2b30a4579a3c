"""Rotary positions: each head's two halves are the coordinates of K / 2 planes, and a token at
position p turns plane i by the angle p theta^(-2i / K).

    a', b' = a cos - b sin, b cos + a sin          (a, b) = the halves of a head

  q (T, H, K)   k (T, G, K)   cos, sin (T, 1, K / 2)   ->   q', k', the same shapes

6 FLOPs for two numbers: memory again. q and k are read and written once, in one launch,
2 T (H + G) K numbers; plain PyTorch writes the four products and their sums one by one.

Turning back is turning by the negative angle, so the backward pass is the forward kernel with
sin negated; nothing but cos and sin has to be kept for it.
"""

import torch
from torch.autograd.function import once_differentiable

from . import on_its_device, plain, three_way, tl, triton, triton_runs


def turned(x, cos, sin):
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


def rope_ref(q, k, cos, sin):
    return turned(q, cos, sin), turned(k, cos, sin)


ROWS = 32  # heads, of one token or of several, that a program turns


@triton.jit(do_not_specialize=["q_tiles", "tokens"])
def turn_kernel(
    q, k, q_out, k_out, cos, sin, q_tiles, tokens, H, G, half,
    SIGN: tl.constexpr, ROWS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """The first q_tiles programs take the heads of q, the others those of k. SIGN: 1 or -1."""
    tile = tl.program_id(0)
    heads = H
    if tile >= q_tiles:
        tile, heads, q, q_out = tile - q_tiles, G, k, k_out
    row, i = tile * ROWS + tl.arange(0, ROWS), tl.arange(0, HALF)
    mine = (row < tokens * heads)[:, None] & (i < half)[None, :]
    angle = (row // heads)[:, None] * half + i[None, :]
    place = row.to(tl.int64)[:, None] * (2 * half) + i[None, :]
    c = tl.load(cos + angle, mine, 0.0).to(tl.float32)
    s = tl.load(sin + angle, mine, 0.0).to(tl.float32) * SIGN
    a = tl.load(q + place, mine, 0.0).to(tl.float32)
    b = tl.load(q + place + half, mine, 0.0).to(tl.float32)
    tl.store(q_out + place, (a * c - b * s).to(q_out.dtype.element_ty), mine)
    tl.store(q_out + place + half, (b * c + a * s).to(q_out.dtype.element_ty), mine)


def turn(q, k, cos, sin, sign):
    q, k, cos, sin = (x.contiguous() for x in (q, k, cos, sin))
    (tokens, heads, size), groups = q.shape, k.shape[1]
    outs = torch.empty_like(q), torch.empty_like(k)
    tiles = [triton.cdiv(tokens * n, ROWS) for n in (heads, groups)]
    shape = (tiles[0], tokens, heads, groups, size // 2)
    turn_kernel[(sum(tiles),)](
        q, k, *outs, cos, sin, *shape, sign, ROWS, triton.next_power_of_2(size // 2)
    )
    return outs


class Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, cos, sin):
        ctx.save_for_backward(cos, sin)
        return turn(q, k, cos, sin, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx, dq, dk):
        return *turn(dq, dk, *ctx.saved_tensors, -1), None, None


@on_its_device
def rope(q, k, cos, sin):
    """The public face: see the top of this file. cos and sin are constants. -> q', k'"""
    angles = (len(q), 1, q.shape[-1] // 2)
    fine = q.ndim == k.ndim == 3 and (len(q), q.shape[2]) == (len(k), k.shape[2])
    if not fine or q.shape[2] % 2 or not cos.shape == sin.shape == angles:
        found = ", ".join(str(tuple(x.shape)) for x in (q, k, cos, sin))
        raise ValueError(
            f"rope: expected q (T, H, K), k (T, G, K), cos and sin (T, 1, K / 2), found {found}"
        )
    if q.numel() and k.numel() and triton_runs("rope", q, k, cos, sin):
        return Rope.apply(q, k, cos, sin)
    return plain(rope_ref)(q, k, cos, sin)


# ------------------------------------------------------------------------------------------------


def angles(tokens, size, device, dtype):
    speed = 1e4 ** (-torch.arange(0, size, 2, device=device) / size)
    angle = (torch.arange(tokens, device=device)[:, None] * speed)[:, None]
    return angle.cos().to(dtype), angle.sin().to(dtype)


def check(device="cpu", dtype=torch.float32):
    """(what, errors as multiples of plain code's) for odd shapes; see three_way."""
    dice = torch.Generator(device).manual_seed(0)
    for tokens, heads, groups, size in ((1, 1, 1, 2), (33, 4, 2, 16), (5, 7, 1, 64), (9, 3, 3, 24)):
        q, k = (
            torch.randn(tokens, n, size, generator=dice, device=device, dtype=torch.float64)
            for n in (heads, groups)
        )
        at = angles(tokens, size, device, dtype)
        run = lambda op: lambda q, k: torch.cat(op(q, k, *(x.to(q.dtype) for x in at)), 1)
        found = three_way(run(rope), run(rope_ref), (q, k), dtype)
        yield f"rope {(tokens, heads, groups, size)}", found


SHAPES = {"AF3": (28, 4, 128), "Qwen2-Audio": (32, 32, 128), "tiny": (6, 6, 32)}


def time(clock, device, dtype):
    tokens = clock.choose(8192, 512)
    for title, (heads, groups, size) in SHAPES.items():
        q, k = (
            torch.randn(tokens, n, size, device=device, dtype=dtype, requires_grad=True)
            for n in (heads, groups)
        )
        at = angles(tokens, size, device, dtype)
        runs = {"ours": lambda: rope(q, k, *at), "plain": lambda: rope_ref(q, k, *at)}
        moved = 2 * (q.nbytes + k.nbytes)
        clock(
            f"rope {title} {tokens} x {heads} + {groups} x {size}",
            runs,
            [q, k],
            moved=(moved, moved),
        )
