"""The hot loops of model.py, one file an op, each beside its plain PyTorch meaning.

Every file has the same seven parts in the same order, so that whoever has read one can read all:
what it computes and what that costs; <op>_ref, the same in plain PyTorch; the forward kernel; the
backward kernels; the autograd.Function that joins them; the public face, which checks its arguments
and chooses; `check` and `time`, which bench.py calls. decode.py has no gradient, and linear.py no
kernel: its product is left to the libraries. swiglu.py is the shortest, attention.py the heart.

What has to be known of Triton to read them: a kernel is one function that runs many times at once,
kernel[(a, b)](...) a x b times. Each run is a program and asks tl.program_id which one it is. It
holds small arrays (tiles, whose sizes are powers of two) in the GPU's registers. A tensor arrives
as the address of its first number: tl.load(x + offsets, mask, 0.0) reads the numbers at those
offsets, and 0 where the mask is false; tl.store writes. [:, None] and [None, :] make rows and
columns meet in a table of offsets, as in numpy. What is marked tl.constexpr is fixed when the
kernel is compiled, and tl.static_range is a loop written out then. A program runs on `num_warps`
groups of 32 threads, and `num_stages` tiles are read ahead in its loops. tl.dot multiplies tiles;
"ieee" asks for full float32 where the numbers are float32.

Which kind runs is decided once per process, when it is first asked: POLYAUDIO_KERNELS if it is set,
else the default for the machine. An op that has no implementation of the chosen kind for its
tensors runs its reference.

    import kernels
    print(kernels.chosen())            # "triton" where there is a GPU, "cpu" elsewhere
    with kernels.forced("ref"):        # the plain meaning of every op, for comparing
        ...

Without a GPU the same kernels run in Triton's interpreter, slowly and exactly, in float32:

    TRITON_INTERPRET=1 python -m kernels.bench

The name kernels.attention is the function; the file is sys.modules["kernels.attention"].
"""

import contextlib
import os
import sys
from functools import lru_cache, wraps
from importlib.util import find_spec
from types import SimpleNamespace

import torch

asked_for = os.environ.get("TRITON_INTERPRET") or os.environ.get("POLYAUDIO_KERNELS") == "triton"
if (asked_for or torch.cuda.is_available()) and find_spec("triton"):
    import triton  # a quarter of a second, worth it where kernels can run
    import triton.language as tl
else:  # there are no wheels for macOS and Windows; nothing below is compiled then
    triton = SimpleNamespace(jit=lambda kernel=None, **_: kernel or (lambda k: k), __version__=None)
    tl = SimpleNamespace(constexpr=lambda value: value)

KINDS = {
    "ref": "plain PyTorch",
    "cpu": "plain PyTorch, and oneDNN's own operators where torch's default is slower",
    "compiled": "as cpu, and torch.compile's code for what lies between two products",
    "triton": "the kernels on a GPU, or in Triton's interpreter; elsewhere as cpu",
}
INTERPRETED = bool(triton.__version__) and triton.knobs.runtime.interpret
KERNEL_TYPES = (torch.float32, torch.bfloat16, torch.float16)

_choice = []


def known(kind: str, source: str) -> str:
    if kind not in KINDS:
        raise ValueError(f"{source}: expected {' or '.join(KINDS)}, found {kind!r}")
    if kind == "triton" and not triton.__version__:
        wanted = "triton, and a GPU or TRITON_INTERPRET=1"
        raise ValueError(f"{source}: expected {wanted}, found none")
    return kind


@lru_cache(maxsize=None)
def say_once(message: str):
    print(f"kernels: {message}", file=sys.stderr)


def chosen() -> str:
    """The kind that runs, decided at the first call."""
    if not _choice:
        default = "triton" if triton.__version__ and torch.cuda.is_available() else "cpu"
        kind = known(os.environ.get("POLYAUDIO_KERNELS") or default, "POLYAUDIO_KERNELS")
        if kind == "triton" and not (torch.cuda.is_available() or INTERPRETED):
            say_once("triton is chosen, but there is no GPU and no TRITON_INTERPRET=1: as cpu")
        _choice.append(kind)
    return _choice[-1]


@contextlib.contextmanager
def forced(kind: str):
    """Run everything inside with that kind."""
    _choice.append(known(kind, "kernels.forced"))
    try:
        yield
    finally:
        _choice.pop()


def describe() -> str:
    """The choice in a line, for the head of a log."""
    kind = chosen()
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    where = "the interpreter" if INTERPRETED else where
    return f"{kind}: {KINDS[kind]}" + f" (Triton {triton.__version__}, {where})" * (
        kind == "triton"
    )


def triton_runs(op: str, *tensors, unless: str = "") -> bool:
    """Whether an op's kernel runs on these tensors. `unless` names what it cannot do with them;
    that, and number types that differ or that no kernel knows, is said once."""
    if chosen() != "triton":
        return False
    if not all(x.is_cuda or INTERPRETED and x.device.type == "cpu" for x in tensors):
        return False
    if len({x.device for x in tensors}) > 1:
        unless = unless or "tensors on several devices"
    types = {x.dtype for x in tensors if x.is_floating_point()}
    if not unless and (len(types) > 1 or not types <= set(KERNEL_TYPES)):
        unless = " with ".join(sorted(str(kind) for kind in types))
    if unless:
        say_once(f"{op}: no kernel for {unless}: the plain path runs")
    return not unless


@lru_cache(maxsize=None)
def compiled(ref):
    return torch.compile(ref, dynamic=True)


def plain(ref):
    """An op's reference; or, of the kind "compiled", one pass over the memory that does the same.
    It needs a C++ compiler and half a minute, and is worth both where a small model is trained."""
    return compiled(ref) if chosen() == "compiled" else ref


def on_its_device(face):
    """Triton starts a kernel on the current GPU; this makes the first tensor's the current one."""

    @wraps(face)
    def run(x, *rest, **how):
        with torch.cuda.device_of(x):  # does nothing for a CPU's tensor
            return face(x, *rest, **how)

    return run


LIMITS = (2.0, 3.0)  # of an error over plain code's: outputs, gradients


def passed(found: dict) -> bool:
    """What three_way found is rounding, not a mistake. NaN does not pass."""
    return all(ratio <= LIMITS[part != "output"] for part, ratio in found.items())


def three_way(op, plain, tensors, dtype=torch.float32, learns=True) -> dict[str, float]:
    """How far op(*tensors) and its gradients are from the truth, as multiples of how far plain code
    in the same number type is. The truth is `plain` in float64 on the same rounded numbers.

    No tolerance has to be picked: up to 2 for the output and 3 for gradients is rounding in another
    order, a wrong kernel is at hundreds. Plain code, however lucky, counts as two roundings of the
    largest number, among gradients of any of them."""
    given = [x.to(dtype) for x in tensors]
    weights = None
    results = []
    for run, kind in ((plain, torch.float64), (plain, dtype), (op, dtype)):
        leaves = [x.to(kind, copy=True).requires_grad_(learns) for x in given]
        out = run(*leaves)
        if weights is None:  # what comes from above: any numbers, the same for all three
            dice = torch.Generator(out.device).manual_seed(1)
            weights = torch.randn(out.shape, generator=dice, device=out.device).to(dtype)
        if learns:
            out.backward(weights.to(out.dtype))
        results.append([out.detach(), *(x.grad for x in leaves if learns)])
    found, eps = {}, torch.finfo(dtype).eps
    sizes = [exact.abs().max().item() if exact.numel() else 0.0 for exact in results[0]]
    for i, (exact, usual, ours) in enumerate(zip(*results)):
        floor = 2 * eps * (max(sizes[1:]) if i else sizes[0])  # a gradient of 0 is a difference
        off, limit = ((exact - x.double()).abs() for x in (ours, usual))
        off = off.nan_to_num(torch.inf, torch.inf).max().item() if off.numel() else 0.0
        limit = max(floor, 1e-300, limit.max().item() if limit.numel() else 0.0)
        found[f"gradient {i}" if i else "output"] = off / limit
    return found


# What the files ask for stands above their import.
from .attention import attention, attention_ref  # noqa: E402
from .cross_entropy import cross_entropy, cross_entropy_ref  # noqa: E402
from .decode import decode, decode_ref  # noqa: E402
from .linear import linear, linear_ref, repack  # noqa: E402
from .norm import layer_norm, layer_norm_ref, rms_norm, rms_norm_ref  # noqa: E402
from .pack import pack, pack_ref, pool, pool_ref, splice, splice_ref  # noqa: E402
from .rope import rope, rope_ref  # noqa: E402
from .swiglu import swiglu, swiglu_ref  # noqa: E402

__all__ = [
    "attention", "attention_ref", "chosen", "cross_entropy", "cross_entropy_ref", "decode",
    "decode_ref", "describe", "forced", "layer_norm", "layer_norm_ref", "linear", "linear_ref",
    "pack", "pack_ref", "pool", "pool_ref", "repack", "rms_norm", "rms_norm_ref", "rope",
    "rope_ref", "splice", "splice_ref", "swiglu", "swiglu_ref",
]  # fmt: skip
