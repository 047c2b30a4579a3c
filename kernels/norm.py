"""Normalising rows, as the decoder does it (RMSNorm) and as the encoder does (LayerNorm).

    rms_norm    y = w x / sqrt(mean(x^2) + eps)
    layer_norm  y = w (x - m) / sqrt(mean((x - m)^2) + eps) + b        m = mean(x)

  x, y (..., D)   w, b (D,)     means are over D, in float32 whatever x is

RMSNorm is LayerNorm that leaves out the centring and b, so one kernel does both. About 5 FLOPs a
number: what counts is the memory. Forward reads and writes x once, 2 T D numbers; plain PyTorch
writes each step out, four times that. Backward reads x and g and writes dx: 3 T D.

With n = (x - m) r the normalised row, r = 1 / sqrt(...), and h = w g, the gradient is what is left
of h when the parts that normalising takes away are taken away: its share along n and its mean,

    dx = r (h - n mean(h n) - mean(h))     dw = sum over rows of g n     db = sum over rows of g

(the last mean of dx only where the row is centred).
"""

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from . import on_its_device, plain, three_way, tl, triton, triton_runs


def rms_norm_ref(x, weight, eps):
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return weight * wide.to(x.dtype)


def layer_norm_ref(x, weight, bias, eps):
    return F.layer_norm(x, weight.shape, weight, bias, eps)


# ------------------------------------------------------------------------------------------------
# A tile is ROWS whole rows: 4096 numbers, or one row where that is longer.


@triton.jit(do_not_specialize=["rows"])
def forward_kernel(
    x, weight, bias, y, means, rs, rows, width, eps,
    CENTRED: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    row, d = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, WIDTH)
    mine = (row < rows)[:, None] & (d < width)[None, :]
    place = row.to(tl.int64)[:, None] * width + d[None, :]
    n = tl.load(x + place, mine, 0.0).to(tl.float32)
    w = tl.load(weight + d, d < width, 0.0).to(tl.float32)
    if CENTRED:
        mean = tl.sum(n, 1) / width
        tl.store(means + row, mean, row < rows)
        n = tl.where(mine, n - mean[:, None], 0.0)
    r = tl.rsqrt(tl.sum(n * n, 1) / width + eps)
    tl.store(rs + row, r, row < rows)
    out = n * r[:, None] * w[None, :]
    if CENTRED:
        out += tl.load(bias + d, d < width, 0.0).to(tl.float32)[None, :]
    tl.store(y + place, out.to(y.dtype.element_ty), mine)


@triton.jit(do_not_specialize=["rows"])
def backward_kernel(
    x, weight, g, dx, dw, db, means, rs, rows, width,
    LEARNS: tl.constexpr, CENTRED: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Each program takes every `programs`-th tile and keeps its own sums for dw and db, which are
    (programs, D) and added up afterwards. So no two programs write to the same place."""
    program, programs, d = tl.program_id(0), tl.num_programs(0), tl.arange(0, WIDTH)
    w = tl.load(weight + d, d < width, 0.0).to(tl.float32)
    dw_sum, db_sum = tl.zeros((WIDTH,), tl.float32), tl.zeros((WIDTH,), tl.float32)
    for tile in range(program, tl.cdiv(rows, ROWS), programs):
        row = tile * ROWS + tl.arange(0, ROWS)
        mine = (row < rows)[:, None] & (d < width)[None, :]
        place = row.to(tl.int64)[:, None] * width + d[None, :]
        g_tile = tl.load(g + place, mine, 0.0).to(tl.float32)
        r = tl.load(rs + row, row < rows, 0.0)[:, None]
        n = tl.load(x + place, mine, 0.0).to(tl.float32)
        if CENTRED:
            n = tl.where(mine, n - tl.load(means + row, row < rows, 0.0)[:, None], 0.0)
        n, h = n * r, g_tile * w[None, :]
        if LEARNS:
            dw_sum += tl.sum(g_tile * n, 0)
            db_sum += tl.sum(g_tile, 0)
        along = tl.sum(h * n, 1)[:, None] / width
        off = h - n * along
        if CENTRED:
            off -= tl.sum(h, 1)[:, None] / width
        tl.store(dx + place, (off * r).to(dx.dtype.element_ty), mine)
    if LEARNS:
        tl.store(dw + program * width + d, dw_sum, d < width)
        tl.store(db + program * width + d, db_sum, d < width)


PROGRAMS = 512  # of the backward pass where weights learn: a few for each of a GPU's processors


class Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, eps):
        rows, width = x.numel() // x.shape[-1], x.shape[-1]
        wide = triton.next_power_of_2(width)
        tall = max(1, 4096 // wide)
        x, weight = x.contiguous(), weight.contiguous()
        y = torch.empty_like(x)
        means, rs = torch.empty(2, rows, dtype=torch.float32, device=x.device)
        how = (bias is not None, tall, wide)  # CENTRED, ROWS, WIDTH
        warps = {"num_warps": min(16, max(4, wide // 512))}
        args = (x, weight, weight if bias is None else bias.contiguous(), y, means, rs)
        forward_kernel[(triton.cdiv(rows, tall),)](*args, rows, width, eps, *how, **warps)
        ctx.save_for_backward(x, weight, means, rs)
        ctx.how = (how, warps)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        (x, weight, means, rs), (how, warps) = ctx.saved_tensors, ctx.how
        rows, width = len(rs), len(weight)
        learns = any(ctx.needs_input_grad[1:3])
        tiles = triton.cdiv(rows, how[1])
        programs = min(PROGRAMS, tiles) if learns else tiles
        g, dx = g.contiguous(), torch.empty_like(x)
        sums = (2, programs, width) if learns else (2, 0)
        dw, db = torch.empty(sums, dtype=torch.float32, device=x.device)
        args = (x, weight, g, dx, dw, db, means, rs, rows, width)
        backward_kernel[(programs,)](*args, learns, *how, **warps)
        if not learns:
            return dx, None, None, None
        dw, db = (part.sum(0).to(weight.dtype) for part in (dw, db))
        return dx, dw, db if how[0] else None, None


WIDEST = 16384  # a row has to fit into one program's registers


def norm(name, x, weight, bias, eps):
    """Norm or None: what both faces check."""
    given = [weight] if bias is None else [weight, bias]
    if x.ndim == 0 or any(part.shape != x.shape[-1:] for part in given):
        found = ", ".join(str(tuple(part.shape)) for part in (x, *given))
        raise ValueError(f"{name}: expected x (..., D) and weights (D,), found {found}")
    odd = f"rows of {x.shape[-1]}" if x.shape[-1] > WIDEST else ""
    if x.numel() and triton_runs(name, x, *given, unless=odd):
        return Norm.apply(x, weight, bias, eps)


@on_its_device
def rms_norm(x, weight, eps):
    """The public face: see the top of this file. -> x's shape and type"""
    y = norm("rms_norm", x, weight, None, eps)
    return plain(rms_norm_ref)(x, weight, eps) if y is None else y


@on_its_device
def layer_norm(x, weight, bias, eps):
    """The public face: see the top of this file. -> x's shape and type"""
    y = norm("layer_norm", x, weight, bias, eps)
    return layer_norm_ref(x, weight, bias, eps) if y is None else y


# ------------------------------------------------------------------------------------------------


def check(device="cpu", dtype=torch.float32):
    """(what, errors as multiples of plain code's) for odd shapes; see three_way."""
    dice = torch.Generator(device).manual_seed(0)
    for shape in ((1, 1), (7, 33), (5, 3, 16), (130, 192), (3, 1280)):
        parts = [shape, shape[-1:], shape[-1:]]
        x, w, b = (
            torch.randn(part, generator=dice, device=device, dtype=torch.float64) for part in parts
        )
        rms = lambda x, w: rms_norm(x, w, 1e-6)
        rms_plain = lambda x, w: rms_norm_ref(x, w, 1e-6)
        yield f"rms_norm {shape}", three_way(rms, rms_plain, (3 * x + 1, w), dtype)
        layer = lambda x, w, b: layer_norm(x, w, b, 1e-5)
        layer_plain = lambda x, w, b: layer_norm_ref(x, w, b, 1e-5)
        yield f"layer_norm {shape}", three_way(layer, layer_plain, (3 * x + 1, w, b), dtype)


SHAPES = {  # rows and width, of the decoder for RMSNorm and the encoder for LayerNorm
    "rms_norm": {"AF3 decoder": (8192, 3584), "Qwen2-Audio decoder": (8192, 4096),
                 "tiny": (8192, 192)},
    "layer_norm": {"AF3 encoder": (30000, 1280), "tiny encoder": (30000, 192)},
}  # fmt: skip


def time(clock, device, dtype):
    for op, shapes in SHAPES.items():
        for title, (rows, width) in shapes.items():
            rows = clock.choose(rows, 512)
            x = torch.randn(rows, width, device=device, dtype=dtype, requires_grad=True)
            w, b = torch.randn(2, width, device=device, dtype=dtype)
            if op == "rms_norm":
                runs = {
                    "ours": lambda: rms_norm(x, w, 1e-6),
                    "F.rms_norm": lambda: F.rms_norm(x, (width,), w, 1e-6),
                    "plain": lambda: rms_norm_ref(x, w, 1e-6),
                }
            else:
                runs = {
                    "ours": lambda: layer_norm(x, w, b, 1e-5),
                    "F.layer_norm": lambda: layer_norm_ref(x, w, b, 1e-5),
                }
            clock(f"{op} {title} {rows} x {width}", runs, [x], moved=(2 * x.nbytes, 3 * x.nbytes))
