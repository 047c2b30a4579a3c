"""Every kernel compiles for the GPUs it is meant for, which needs no GPU.

Triton turns a kernel into machine code for whatever target its driver names. So a driver that names
one and launches nothing lets the public faces run on the CPU's tensors up to each launch; there the
kernel is compiled instead, and what came out is looked at: whether the products use Hopper's wgmma,
how much shared memory a program takes, and how many registers did not fit (the stack).

Results mean nothing on this way; tests/test_triton.py has the same kernels in the interpreter. This
file is its own program too, since the interpreter is chosen when triton is imported:

    python tests/test_compile.py '{"capability": 90, "dtype": "bfloat16", "what": "faces"}'
"""

import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
SHARED_MEMORY = 227 * 1024  # that a program can have on Hopper
STACK = 128  # bytes of a thread that did not fit into registers; more slows a kernel down
STACK_WIDE = 768  # for attention's heads of 128, where not every candidate has to be quick
STACK_FLOAT32 = 4096  # for products in float32, which are there to be checked, not to be quick
NAMES = {
    "attention.forward_kernel", "attention.dq_kernel", "attention.dkdv_kernel",
    "cross_entropy.row_kernel", "decode.share_kernel", "decode.join_kernel",
    "norm.forward_kernel", "norm.backward_kernel", "pack.pack_kernel", "pack.pool_kernel",
    "pack.splice_kernel", "rope.turn_kernel", "swiglu.forward_kernel", "swiglu.backward_kernel",
}  # fmt: skip


# ------------------------------------------------------------------------------------------------
# In a process without the interpreter: compile, and print a line of JSON for each kernel.


class Driver:
    """What Triton asks of a GPU before it compiles."""

    utils = None

    def __init__(self, capability):
        from triton.backends.compiler import GPUTarget

        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return 0

    def get_current_stream(self, device=0):
        return 0

    def get_active_torch_device(self):
        return torch.device("cpu")

    def set_current_device(self, device):
        pass


def cuobjdump() -> Path:
    import triton

    return Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


def look_at(kernel, name) -> dict:
    """What a compiled kernel needs."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        command = [str(cuobjdump()), "--dump-resource-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())
    return {
        "name": name, "registers": registers, "stack": stack, "shared": kernel.metadata.shared,
        "warps": kernel.metadata.num_warps, "wgmma": "wgmma" in kernel.asm["ptx"],
    }  # fmt: skip


def compile_instead(capability, say):
    """From here on a launch compiles the kernel for that GPU and says what came out."""
    from triton.runtime import driver, jit

    import kernels

    driver.set_active(Driver(capability))
    kernels.INTERPRETED = True  # so that the faces take the CPU's tensors
    real, seen = jit.JITFunction.run, set()

    def run(self, *args, grid, warmup=False, **how):
        name = f"{self.fn.__module__.removeprefix('kernels.')}.{self.fn.__name__}"
        try:
            kernel = real(self, *args, grid=grid, warmup=True, **how)
        except Exception as error:  # of whatever kind: the test shows it
            say({"name": name, "failed": f"{type(error).__name__}: {error}"})
            return
        if kernel.hash not in seen:
            seen.add(kernel.hash)
            say(look_at(kernel, name))

    jit.JITFunction.run = run


def attention_kernels(size, causal, tiles, dtype):
    """With those tiles, at AF3's seven heads to a key."""
    file = sys.modules["kernels.attention"]
    qkv, *bounds = file.example([(300, 300), (7, 7)], 14, 2, size, "cpu", dtype)
    o = file.Attention.apply(*(x.requires_grad_() for x in qkv), *bounds, causal, tiles)
    o.backward(torch.ones_like(o))


def faces(dtype, say):
    """Each public face at AF3's shapes, as far as they shape a kernel, with its backward pass."""
    import kernels

    def run(op, *args):
        out = op(*args)
        for part in out if isinstance(out, tuple) else (out,):
            part.sum().backward(retain_graph=True)

    def wide(*shape):
        return torch.zeros(shape, dtype=dtype, requires_grad=True)

    def whole(*numbers):
        return torch.tensor(numbers, dtype=torch.int32)

    q, k = wide(9, 28, 128), wide(9, 4, 128)
    run(kernels.attention, q, k, wide(9, 4, 128), whole(0, 9), whole(0, 9), True)
    run(kernels.rope, q, k, *torch.zeros(2, 9, 1, 64, dtype=dtype))
    run(kernels.rms_norm, wide(9, 3584), wide(3584), 1e-6)
    run(kernels.rms_norm, wide(9, 4, 128), wide(128), 1e-6)
    run(kernels.layer_norm, wide(9, 1280), wide(1280), wide(1280), 1e-5)
    run(kernels.layer_norm, wide(9, 1280), *torch.zeros(2, 1280, dtype=dtype), 1e-5)
    run(kernels.swiglu, wide(9, 18944), wide(9, 18944))
    run(kernels.cross_entropy, wide(9, 64), wide(152064, 64), torch.zeros(9, dtype=torch.int64))
    run(kernels.pack, wide(128, 9), whole(0, 9), whole(0, 10), 10)
    run(kernels.pool, wide(9, 1280), whole(0, 9), whole(0, 4), 4)
    run(kernels.splice, wide(9, 3584), wide(2, 3584), whole(-1, 0, 1, *[-1] * 6))
    cache = torch.zeros(2, 4, 300, 128, dtype=dtype)
    kernels.decode(q[:2].detach(), cache, cache, whole(0, 1), whole(300, 7))


def tiles(dtype, say, every=False):
    """Attention's candidates at head sizes 64 and 128, causal and not: the first, or every one."""
    from kernels.attention import LONG, SHORT

    for lists in (LONG, SHORT):
        for i in range(max(map(len, lists)) if every else 1):
            three = tuple(candidates[min(i, len(candidates) - 1)] for candidates in lists)
            for size in (64, 128):
                for causal in (False, True):
                    say({"tiles": three, "size": size, "causal": causal})
                    attention_kernels(size, causal, three, dtype)


def main(order):
    import kernels

    order = json.loads(order)
    say = lambda line: print(json.dumps(line), flush=True)
    compile_instead(order["capability"], say)
    with kernels.forced("triton"):
        dtype = getattr(torch, order["dtype"])
        if order["what"] == "faces":
            faces(dtype, say)
        else:
            tiles(dtype, say, order["what"] == "every tile")


# ------------------------------------------------------------------------------------------------
# The tests.


def compiled(folder, capability, dtype, what) -> list[dict]:
    """What the kernels of one order came out as, each with the case that asked for it."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("no Triton here")
    if not cuobjdump().exists():
        pytest.skip("this Triton comes without cuobjdump")
    env = {
        k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "POLYAUDIO_KERNELS")
    }
    env |= {"TRITON_CACHE_DIR": str(folder), "PYTHONPATH": str(ROOT)}
    env["POLYAUDIO_KERNELS"] = "triton"  # or it is not imported where there is no GPU
    order = json.dumps({"capability": capability, "dtype": dtype, "what": what})
    command = [sys.executable, __file__, order]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    found, case = [], {}
    for line in map(json.loads, done.stdout.splitlines()):
        if "tiles" in line:
            case = line
        else:
            found.append({**case, **line, "dtype": dtype})
    return found


def stack_limit(kernel) -> int:
    if kernel["dtype"] == "float32" and kernel["name"].startswith(("attention.", "decode.")):
        return STACK_FLOAT32
    return STACK_WIDE if kernel.get("size") == 128 else STACK


def unfit(found) -> list[dict]:
    """Those that failed or do not fit."""
    return [
        kernel
        for kernel in found
        if "failed" in kernel
        or kernel["stack"] > stack_limit(kernel)
        or kernel["shared"] > SHARED_MEMORY
    ]


@pytest.mark.long
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_every_kernel_compiles_for_hopper(tmp_path, dtype):
    found = compiled(tmp_path, 90, dtype, "faces")
    assert unfit(found) == []
    assert {kernel["name"] for kernel in found} == NAMES


@pytest.mark.long
def test_every_kernel_compiles_for_ampere(tmp_path):
    found = compiled(tmp_path, 80, "bfloat16", "faces")
    assert unfit(found) == []
    assert {kernel["name"] for kernel in found} == NAMES
    assert not any(kernel["wgmma"] for kernel in found)


@pytest.mark.long
def test_attention_in_bf16_uses_hoppers_products(tmp_path):
    found = compiled(tmp_path, 90, "bfloat16", "tiles")
    assert unfit(found) == []
    assert len(found) == 2 * 2 * 2 * 3  # long and short, sizes, causal or not, kernels
    assert [kernel for kernel in found if not kernel["wgmma"]] == []


@pytest.mark.slow
def test_every_candidate_in_bf16_fits(tmp_path):
    """And for every kernel and case there is one that keeps everything in registers."""
    found = compiled(tmp_path, 90, "bfloat16", "every tile")
    assert unfit(found) == []
    assert all(kernel["wgmma"] for kernel in found if kernel["tiles"][0][0] >= 64)
    least = {}
    for kernel in found:
        case = (kernel["name"], kernel["size"], kernel["causal"])
        least[case] = min(least.get(case, STACK_WIDE), kernel["stack"])
    assert len(least) == 3 * 2 * 2
    assert max(least.values()) <= STACK


def test_what_does_not_fit_is_noticed():
    fine = {"name": "attention.dq_kernel", "dtype": "bfloat16", "stack": 0, "shared": 1000}
    assert unfit([fine]) == []
    for wrong in ({"stack": STACK + 1}, {"shared": SHARED_MEMORY + 1}, {"failed": "no"}):
        assert unfit([fine | wrong]) == [fine | wrong]
    wide = fine | {"size": 128, "stack": STACK_WIDE}
    assert unfit([wide]) == []
    assert unfit([wide | {"stack": STACK_WIDE + 1}]) != []
    assert unfit([fine | {"dtype": "float32", "stack": STACK_FLOAT32 + 1}]) != []


def test_a_kernel_that_does_not_compile_is_noticed(tmp_path):
    """A tile that is no power of two."""
    code = (
        "import sys, torch; sys.argv = ['']; from tests import test_compile as t\n"
        "found = []; t.compile_instead(90, found.append)\n"
        "tiles = (48, 64, 4, 2)\n"
        "t.attention_kernels(64, True, (tiles,) * 3, torch.bfloat16)\n"
        "assert len(found) == 3 and all('failed' in kernel for kernel in found), found\n"
    )
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    env["POLYAUDIO_KERNELS"] = "triton"
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


if __name__ == "__main__":
    main(sys.argv[1])
