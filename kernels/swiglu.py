"""The gate of the decoder's MLP.

    y = silu(gate) up = gate s up        s = 1 / (1 + e^-gate)

  gate, up, y (T, F), any shape

About 6 FLOPs a number and no sharing between numbers: read two, write one, 3 T F moved. Plain
PyTorch writes silu(gate) out in between and keeps it for the backward pass; here gate and up are
enough, from which backward computes s again: read gate, up and g, write two, 5 T F.

    dup = g gate s        dgate = g up s (1 + gate (1 - s))
"""

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from . import on_its_device, plain, three_way, tl, triton, triton_runs


def swiglu_ref(gate, up):
    return F.silu(gate) * up


BLOCK = 4096  # numbers that a program takes


@triton.jit
def forward_kernel(gate, up, y, n, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    a = tl.load(gate + i, i < n, 0.0).to(tl.float32)
    b = tl.load(up + i, i < n, 0.0).to(tl.float32)
    tl.store(y + i, (a * tl.sigmoid(a) * b).to(y.dtype.element_ty), i < n)


@triton.jit
def backward_kernel(gate, up, g, dgate, dup, n, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    a = tl.load(gate + i, i < n, 0.0).to(tl.float32)
    b = tl.load(up + i, i < n, 0.0).to(tl.float32)
    above = tl.load(g + i, i < n, 0.0).to(tl.float32)
    s = tl.sigmoid(a)
    tl.store(dup + i, (above * a * s).to(dup.dtype.element_ty), i < n)
    tl.store(dgate + i, (above * b * s * (1 + a * (1 - s))).to(dgate.dtype.element_ty), i < n)


class SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate, up):
        gate, up = gate.contiguous(), up.contiguous()
        y = torch.empty_like(gate)
        forward_kernel[(triton.cdiv(y.numel(), BLOCK),)](gate, up, y, y.numel(), BLOCK, num_warps=8)
        ctx.save_for_backward(gate, up)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        gate, up = ctx.saved_tensors
        g, dgate, dup = g.contiguous(), torch.empty_like(gate), torch.empty_like(up)
        grid = (triton.cdiv(g.numel(), BLOCK),)
        backward_kernel[grid](gate, up, g, dgate, dup, g.numel(), BLOCK, num_warps=8)
        return dgate, dup


@on_its_device
def swiglu(gate, up):
    """The public face: see the top of this file. -> (T, F)"""
    if gate.shape != up.shape or gate.dtype != up.dtype:
        raise ValueError(
            f"swiglu: expected gate and up of one shape and type, found "
            f"{tuple(gate.shape)} {gate.dtype}, {tuple(up.shape)} {up.dtype}"
        )
    if gate.numel() and triton_runs("swiglu", gate, up):
        return SwiGLU.apply(gate, up)
    return plain(swiglu_ref)(gate, up)


# ------------------------------------------------------------------------------------------------


def check(device="cpu", dtype=torch.float32):
    """(what, errors as multiples of plain code's) for odd shapes; see three_way."""
    dice = torch.Generator(device).manual_seed(0)
    for shape in ((1, 1), (7, 33), (3, 5, 100), (2, 4100)):
        gate, up = 4 * torch.randn(2, *shape, generator=dice, device=device, dtype=torch.float64)
        yield f"swiglu {shape}", three_way(swiglu, swiglu_ref, (gate, up), dtype)


WIDTHS = {"AF3": 18944, "Qwen2-Audio": 11008, "tiny": 512}


def time(clock, device, dtype):
    for title, width in WIDTHS.items():
        shape = (clock.choose(8192, 512), width)
        gate, up = (
            torch.randn(shape, device=device, dtype=dtype, requires_grad=True) for _ in range(2)
        )
        runs = {"ours": lambda: swiglu(gate, up), "plain": lambda: swiglu_ref(gate, up)}
        moved = (3 * gate.nbytes, 5 * gate.nbytes)
        clock(f"swiglu {title} {shape[0]} x {shape[1]}", runs, [gate, up], moved=moved)
