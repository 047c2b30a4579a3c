"""What kernels/ promises: every public op means what its reference says, on any shape.

attention is softmax over the keys of a query's own segment, and nothing of another segment ever
reaches it, neither a number nor a gradient; it never makes a mask over the whole row. linear is
F.linear, whether it runs oneDNN's private operators or not, and still is where those operators are
missing, fail, or compute something else. Which kind runs is one choice for the process.
"""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import kernels
from kernels import attention, attention_ref, linear, linear_ref, repack
from tests.conftest import ROOT

# The name kernels.linear is the function; the files are found under their full names.
attention_file = sys.modules["kernels.attention"]
linear_file = sys.modules["kernels.linear"]


@pytest.fixture(autouse=True)
def fast():
    """The fast operators, whatever the environment of the tests says."""
    with kernels.forced("cpu"):
        yield


def cumulative(lengths):
    return torch.tensor([0, *lengths]).cumsum(0).int()


def packed(lengths, heads=4, groups=2, size=8, dtype=torch.float32, seed=0):
    """Random q, k, v and bounds of segments: lengths = [(queries, keys), ...]."""
    dice = torch.Generator().manual_seed(seed)
    queries, keys = (list(part) for part in zip(*lengths))
    shapes = ((sum(queries), heads, size), *[(sum(keys), groups, size)] * 2)
    q, k, v = (torch.randn(s, generator=dice, dtype=torch.float64).to(dtype) for s in shapes)
    return q, k, v, cumulative(queries), cumulative(keys)


def written_out(q, k, v, cu_q, cu_k, causal):
    """Attention by its formula, one segment, one query, one head at a time, in float64."""
    o = torch.zeros_like(q, dtype=torch.float64)
    shared = q.shape[1] // k.shape[1]
    q, k, v = q.double(), k.double(), v.double()
    for s in range(len(cu_q) - 1):
        queries, keys = range(cu_q[s], cu_q[s + 1]), range(cu_k[s], cu_k[s + 1])
        for i, row in enumerate(queries):
            seen = keys[: max(0, len(keys) - len(queries) + i + 1)] if causal else keys
            for h in range(q.shape[1] if len(seen) else 0):
                scores = k[seen, h // shared] @ q[row, h] / q.shape[2] ** 0.5
                o[row, h] = scores.softmax(0) @ v[seen, h // shared]
    return o


def off(a, b) -> float:
    """The largest difference; infinite if anything is not a number."""
    assert a.shape == b.shape
    return torch.nan_to_num((a.double() - b.double()).abs(), nan=torch.inf).max().item()


# ------------------------------------------------------------------------------------------------
# attention

SEGMENTS = {
    "one": [(7, 7)],
    "one query, one key": [(1, 1)],
    "equal neighbours": [(5, 5), (5, 5), (5, 5), (2, 2), (2, 2)],
    "all different": [(1, 1), (9, 9), (2, 2), (17, 17)],
    "one new token each": [(1, 9), (1, 1), (1, 30)],
    "cached past": [(3, 8), (4, 4), (2, 31)],
    "fewer keys than queries": [(6, 2), (3, 3), (5, 1)],
    "empty segments": [(0, 0), (3, 3), (0, 0), (0, 5), (2, 4), (0, 0)],
    "no key": [(3, 0), (2, 2), (4, 0)],
    "perceiver": [(8, 3), (8, 20), (8, 1)],
}
SEGMENTS_TO_LEARN = [
    "equal neighbours", "cached past", "fewer keys than queries", "empty segments", "no key",
]  # fmt: skip
PRECISION = {torch.float64: 1e-14, torch.float32: 2e-6, torch.bfloat16: 0.03}


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("name", SEGMENTS)
@pytest.mark.parametrize("dtype", PRECISION)
def test_attention_is_softmax_over_the_own_segment(name, causal, dtype):
    given = packed(SEGMENTS[name], dtype=dtype)
    o = attention(*given, causal)
    assert o.dtype == dtype
    assert off(o, written_out(*given, causal)) <= PRECISION[dtype]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("size", [8, 12, 16, 64, 80, 128])
@pytest.mark.parametrize("heads", [(4, 4), (4, 1), (6, 2), (7, 1), (1, 1)])
def test_attention_of_any_heads(heads, size, causal):
    given = packed([(5, 5), (3, 11), (1, 4), (2, 2), (2, 2)], *heads, size)
    assert off(attention(*given, causal), written_out(*given, causal)) <= 2e-6


@pytest.mark.parametrize("past", [-599, -300, -254, 0, 1, 40, 300])
@pytest.mark.parametrize("new", [255, 256, 257, 600])
def test_long_causal_segments_in_blocks_of_queries(new, past):
    """Behind a cached past the queries are taken some hundred at a time; no seam may show. With
    keys missing instead (past < 0), the first queries see nothing."""
    past = max(past, -new)
    q, k, v, cu_q, cu_k = given = packed([(new, new + past)], 2, 1)
    scores = torch.einsum("qhd,kd->hqk", q.double(), k[:, 0].double()) / 8**0.5
    ahead = torch.ones(new, new + past).triu(past + 1).bool()
    weights = scores.masked_fill(ahead, -torch.inf).softmax(-1).nan_to_num(0)
    expected = (weights @ v[:, 0].double()).transpose(0, 1)
    assert off(attention(*given, True), expected) <= 2e-6


def test_rows_without_a_key_are_zero():
    o = attention(*packed([(5, 2), (3, 0), (2, 2)]), True)
    assert (o[:3] == 0).all()  # the last query meets the last key: three have none
    assert (o[5:8] == 0).all()
    assert (o[3:5] != 0).all()
    assert (o[8:] != 0).all()


def test_attention_of_nothing():
    q, k, v, _, _ = packed([(0, 0)])
    none = torch.zeros(1, dtype=torch.int32)
    assert attention(q, k, v, none, none, True).shape == (0, 4, 8)
    assert attention(*packed([(0, 0), (0, 0)]), False).shape == (0, 4, 8)


@pytest.mark.parametrize("causal", [False, True])
def test_attention_reads_strided_tensors(causal):
    """Cached keys come as a transposed view."""
    q, k, v, *bounds = packed([(3, 9), (5, 5), (5, 5)])
    expected = attention(q, k, v, *bounds, causal)
    views = [x.permute(2, 1, 0).contiguous().permute(2, 1, 0) for x in (q, k, v)]
    assert not views[0].is_contiguous()
    assert off(attention(*views, *bounds, causal), expected) <= 1e-6
    wide = [torch.stack([x, x], -1)[..., 0] for x in (q, k, v)]
    assert off(attention(*wide, *bounds, causal), expected) <= 1e-6


def test_attention_leaves_its_arguments_alone():
    given = packed([(3, 9), (6, 2), (5, 5)])
    kept = [x.clone() for x in given]
    attention(*given, True)
    assert all(torch.equal(a, b) for a, b in zip(given, kept))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("name", SEGMENTS_TO_LEARN)
def test_the_gradient_of_attention_is_that_of_differences(name, causal):
    q, k, v, *bounds = packed(SEGMENTS[name], size=2, dtype=torch.float64)
    for x in (q, k, v):
        x.requires_grad_(True)
    assert torch.autograd.gradcheck(lambda *x: attention(*x, *bounds, causal), (q, k, v))


def test_the_gradient_through_blocks_of_queries(monkeypatch):
    monkeypatch.setattr(attention_file, "QUERY_BLOCK", 2)
    q, k, v, *bounds = packed([(5, 8), (3, 3)], size=2, dtype=torch.float64)
    for x in (q, k, v):
        x.requires_grad_(True)
    assert torch.autograd.gradcheck(lambda *x: attention(*x, *bounds, True), (q, k, v))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    "lengths", [[(4, 4)] * 3, [(4, 4), (6, 6), (3, 3)], [(2, 7), (3, 5), (2, 7)], [(1, 5)] * 3]
)
def test_nothing_of_another_segment_is_read(lengths, causal):
    """The middle segment holds NaN: it would spoil whatever reads it, times zero or not."""
    q, k, v, cu_q, cu_k = packed(lengths)
    clean = attention(q, k, v, cu_q, cu_k, causal)
    own_q, own_k = slice(cu_q[1], cu_q[2]), slice(cu_k[1], cu_k[2])
    for x, own in ((q, own_q), (k, own_k), (v, own_k)):
        x[own] = torch.nan
        x.requires_grad_(True)
    o = attention(q, k, v, cu_q, cu_k, causal)
    assert o[own_q].isnan().all()
    others = [i for i in range(len(o)) if not own_q.start <= i < own_q.stop]
    assert off(o[others], clean[others]) <= 1e-6
    o[others].sum().backward()
    for x, own in ((q, own_q), (k, own_k), (v, own_k)):
        rest = torch.cat([x.grad[: own.start], x.grad[own.stop :]])
        assert rest.isfinite().all()
    assert v.grad[: own_k.start].abs().sum() > 0


def spoil(place, value):
    """The arguments of a good call, one of them replaced."""
    given = [*packed([(3, 3), (2, 2)]), True]
    given[place] = value(given[place])
    return given


WRONG_CALLS = {
    "q of two dimensions": (0, lambda q: q[0], "q .Tq, H, K."),
    "k of two dimensions": (1, lambda k: k[0], "k, v .Tk, G, K."),
    "v of another length": (2, lambda v: v[1:], "k, v .Tk, G, K."),
    "heads of another size": (0, lambda q: q[..., :4], "q .Tq, H, K."),
    "heads that do not divide": (0, lambda q: q[:, :3], "3 heads cannot share 2"),
    "no heads to share": (0, lambda q: q[:, :1], "1 heads cannot share 2"),
    "bounds of another type": (3, lambda cu: cu.long(), "cu_q: expected int32"),
    "bounds that start late": (3, lambda cu: cu + 1, "cu_q: expected to rise from 0 to 5"),
    "bounds that end early": (4, lambda cu: cu - cu // 5, "cu_k: expected to rise from 0 to 5"),
    "bounds that fall": (4, lambda cu: torch.tensor([0, 6, 5]).int(), "cu_k: expected to rise"),
    "bounds of fewer segments": (4, lambda cu: cu[[0, 2]], "cu_k: .*one more than"),
    "bounds of two dimensions": (3, lambda cu: cu[None], "cu_q: expected int32"),
    "no bounds at all": (3, lambda cu: cu[:0], "cu_q"),
}


@pytest.mark.parametrize("name", WRONG_CALLS)
def test_a_wrong_call_is_refused_in_words(name):
    place, value, message = WRONG_CALLS[name]
    with pytest.raises(ValueError, match=message):
        attention(*spoil(place, value))


def test_attention_without_any_key_head_is_refused():
    q, k, v, *bounds = packed([(3, 3)])
    with pytest.raises(ValueError, match="attention"):
        attention(q, k[:, :0], v[:, :0], *bounds, True)


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that any operator inside makes."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                made = leaf.untyped_storage().nbytes() // leaf.element_size()
                self.elements = max(self.elements, made)
        return out


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("past", [0, 500])
def test_attention_never_makes_a_mask_over_the_row(causal, past):
    """Twenty segments of 500 queries: a mask over the row would hold 10000 x 10000."""
    given = packed([(500, 500 + past)] * 20, 4, 4)
    with Largest() as seen:
        o = attention(*given, causal)
    assert seen.elements >= o.numel()
    assert seen.elements <= 20 * (4 * 256 * (500 + past))  # a block of queries of each segment
    assert seen.elements < len(given[0]) * len(given[1]) / 4


def test_a_long_prompt_behind_a_long_past_makes_no_mask_over_both():
    given = packed([(3000, 6000)], 4, 2)
    with Largest() as seen:
        attention(*given, True)
    assert seen.elements <= 4 * 256 * 6000 < 3000 * 6000 / 2


def test_the_measure_sees_a_mask():
    with Largest() as seen:
        torch.ones(200, 200).tril()
    assert seen.elements == 200 * 200


def test_attentions_own_check():
    found = list(attention_file.check())
    assert len(found) > 20
    assert all(errors["output"] <= 2 and max(errors.values()) <= 3 for _, errors in found)


# ------------------------------------------------------------------------------------------------
# linear

KINDS = [torch.float32, torch.bfloat16]


def layer(rows, inputs, outputs, dtype=torch.float32, bias=True, seed=0):
    dice = torch.Generator().manual_seed(seed)
    shapes = ((rows, inputs), (outputs, inputs), (outputs,))
    x, weight, b = (torch.randn(shape, generator=dice).to(dtype) for shape in shapes)
    return x, weight / inputs**0.5, b if bias else None


def close(y, x, weight, bias):
    """Whether y is x W^T + b as exactly as its type allows, against float64."""
    wide = [None if part is None else part.double() for part in (x, weight, bias)]
    expected = F.linear(*wide)
    allowed = {torch.float32: 1e-5, torch.bfloat16: 0.01, torch.float64: 1e-13}[y.dtype]
    scale = expected.abs().max().item() if expected.numel() else 1.0
    return y.dtype == x.dtype and (y.numel() == 0 or off(y, expected) <= allowed * scale)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(1, 1), (33, 7), (64, 160), (160, 64), (3, 257), (257, 3)])
@pytest.mark.parametrize("rows", [0, 1, 2, 16, 17, 300])
@pytest.mark.parametrize("dtype", KINDS)
def test_linear_is_f_linear(dtype, rows, shape, bias):
    """Also from the second copy of the weights, which few rows are read from."""
    x, weight, b = layer(rows, *shape, dtype, bias)
    y = linear(x, weight, b)
    assert y.shape == (rows, shape[1])
    assert close(y, x, weight, b)
    assert close(linear(x, weight, b, repack(weight)), x, weight, b)
    with kernels.forced("ref"):
        assert torch.equal(linear(x, weight, b, repack(weight)), F.linear(x, weight, b))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_types_that_onednn_does_not_know(dtype):
    x, weight, b = layer(3, 20, 10, dtype)
    assert torch.equal(linear(x, weight, b), F.linear(x, weight, b))
    assert repack(weight) is None


@pytest.mark.parametrize("dtype", KINDS)
def test_linear_reads_strided_tensors(dtype):
    x, weight, b = layer(6, 20, 10, dtype)
    wide = torch.stack([x, -x], -1)
    assert close(linear(wide[..., 0], weight, b), x, weight, b)
    assert close(linear(x.T.contiguous().T, weight, b), x, weight, b)
    assert close(linear(x[::2], weight, b), x[::2], weight, b)
    assert close(linear(x[:1].expand(4, -1), weight, b), x[:1].expand(4, -1), weight, b)
    assert close(linear(x, weight.T.contiguous().T, b), x, weight, b)
    assert close(linear(x, torch.stack([weight, weight], 1)[:, 0], b), x, weight, b)
    assert close(linear(x, weight, torch.stack([b, -b], 1)[:, 0]), x, weight, b)


def test_linear_on_more_or_fewer_dimensions():
    x, weight, b = layer(6, 20, 10)
    assert torch.equal(linear(x.view(2, 3, 20), weight, b), F.linear(x.view(2, 3, 20), weight, b))
    assert torch.equal(linear(x[0], weight, b), F.linear(x[0], weight, b))


def test_linear_with_nothing_to_sum_is_the_bias():
    x, weight, b = torch.zeros(2, 0), torch.zeros(3, 0), torch.ones(3)
    assert torch.equal(linear(x, weight, b), F.linear(x, weight, b))


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 2), (0, 1, 2)])
def test_the_gradient_of_linear(wanted):
    """Whoever learns, input, weight or bias alone: oneDNN's operator would give no gradient."""
    given = layer(5, 20, 10)
    copies = layer(5, 20, 10)
    for i in wanted:
        given[i].requires_grad_(True)
        copies[i].requires_grad_(True)
    linear(*given).square().sum().backward()
    F.linear(*copies).square().sum().backward()
    for i in wanted:
        assert given[i].grad is not None
        assert off(given[i].grad, copies[i].grad) <= 1e-4


def test_without_learning_the_fast_operator_runs(monkeypatch):
    """So that the tests above are tests of it; under no_grad a trainable weight is fast too."""
    if not linear_file.usable(torch.float32):
        pytest.skip("this torch has no oneDNN")
    calls = []
    real = linear_file.onednn
    monkeypatch.setattr(linear_file, "onednn", lambda *args: calls.append(1) or real(*args))
    x, weight, b = layer(5, 20, 10)
    linear(x, weight, b)
    assert len(calls) == 1
    weight.requires_grad_(True)
    linear(x, weight, b)
    assert len(calls) == 1
    with torch.no_grad():
        linear(x, weight, b)
    assert len(calls) == 2
    with kernels.forced("ref"):
        linear(x, weight.detach(), b)
    assert len(calls) == 2


def test_few_rows_read_the_second_copy_and_many_the_first(monkeypatch):
    """The copy is taken from another matrix here, so that one sees which of the two was read."""
    if not linear_file.usable(torch.bfloat16):
        pytest.skip("this torch has no oneDNN")
    x, weight, _ = layer(40, 64, 64, torch.bfloat16, bias=False)
    other = repack(-weight)
    few, many = linear_file.FEW, linear_file.FEW + 1
    assert close(linear(x[:few], weight, None, other), x[:few], -weight, None)
    assert close(linear(x[:many], weight, None, other), x[:many], weight, None)


@pytest.fixture
def forget():
    """Whether oneDNN is usable is found out once; these tests need it found out again."""
    linear_file.usable.cache_clear()
    yield
    linear_file.usable.cache_clear()


def no_operators(patch):
    patch.setattr(torch.ops, "mkldnn", SimpleNamespace())


def no_onednn(patch):
    patch.setattr(torch.backends.mkldnn, "is_available", lambda: False)


def failing(patch):
    def fail(*args):
        raise RuntimeError("could not create a primitive")

    patch.setattr(linear_file, "onednn", fail)


def other_arguments(patch):
    def fail(*args):
        raise TypeError("unexpected keyword")

    patch.setattr(linear_file, "onednn", fail)


def slightly_wrong(patch):
    real = linear_file.onednn
    patch.setattr(linear_file, "onednn", lambda *args: 1.03 * real(*args))


def without_bias(patch):
    real = linear_file.onednn
    patch.setattr(linear_file, "onednn", lambda x, weight, bias: real(x, weight, None))


def not_numbers(patch):
    real = linear_file.onednn
    patch.setattr(linear_file, "onednn", lambda *args: real(*args) * torch.nan)


@pytest.mark.parametrize("dtype", KINDS)
@pytest.mark.parametrize(
    "broken",
    [no_operators, no_onednn, failing, other_arguments, slightly_wrong, without_bias, not_numbers],
)
def test_where_the_operators_do_not_serve_it_is_f_linear(monkeypatch, forget, broken, dtype):
    if not linear_file.usable(dtype):
        pytest.skip("this torch has no oneDNN")
    linear_file.usable.cache_clear()
    broken(monkeypatch)
    x, weight, b = layer(5, 20, 10, dtype)
    assert not linear_file.usable(dtype)
    assert torch.equal(linear(x, weight, b), F.linear(x, weight, b))
    assert repack(weight) is None


def test_the_reference_is_f_linear():
    x, weight, b = layer(5, 20, 10)
    assert torch.equal(linear_ref(x, weight, b), F.linear(x, weight, b))


# ------------------------------------------------------------------------------------------------
# Which kind runs, and what an import costs.


def python(code, **env):
    env = {**os.environ, "PYTHONPATH": str(ROOT), **env}
    return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)


@pytest.mark.parametrize("kind", kernels.KINDS)
def test_the_environment_chooses_the_kind(kind):
    done = python("import kernels; print(kernels.chosen())", POLYAUDIO_KERNELS=kind)
    assert (done.returncode, done.stdout) == (0, kind + "\n")


def test_an_unknown_kind_is_refused():
    done = python("import kernels; kernels.chosen()", POLYAUDIO_KERNELS="fastest")
    assert done.returncode != 0
    message = "ValueError: POLYAUDIO_KERNELS: expected .*ref.*, found 'fastest'"
    assert re.search(message, done.stderr)


def test_a_kind_can_be_forced_for_a_while():
    before = kernels.chosen()
    with kernels.forced("ref"):
        assert kernels.chosen() == "ref"
        with kernels.forced("cpu"):
            assert kernels.chosen() == "cpu"
        assert kernels.chosen() == "ref"
    assert kernels.chosen() == before


def test_a_forced_kind_ends_with_its_block_even_when_that_fails():
    before = kernels.chosen()
    with pytest.raises(ZeroDivisionError), kernels.forced("ref"):
        1 / 0
    assert kernels.chosen() == before
    with pytest.raises(ValueError, match="kernels.forced: expected .*ref"), kernels.forced("best"):
        pass
    assert kernels.chosen() == before


def test_forced_before_the_first_choice_does_not_become_the_choice():
    code = "import kernels\nwith kernels.forced('ref'): kernels.chosen()\nprint(kernels.chosen())"
    assert python(code, POLYAUDIO_KERNELS="cpu").stdout == "cpu\n"


@pytest.mark.parametrize("dtype", KINDS + [torch.float64])
def test_all_kinds_give_the_same(dtype):
    given = packed([(3, 9), (5, 5), (4, 4)], size=16, dtype=dtype)
    x, weight, b = layer(5, 20, 10, dtype)
    for kind in kernels.KINDS:
        if kind == "triton" and dtype == torch.bfloat16 and kernels.INTERPRETED:
            continue  # whose products are wrong in that type
        with kernels.forced(kind):
            assert off(attention(*given, True), attention_ref(*given, True)) <= PRECISION[dtype]
            assert close(linear(x, weight, b), x, weight, b)


def test_each_public_name_is_a_function_and_has_its_meaning_beside_it():
    ops = {"attention", "linear"}
    names = {*ops, *(f"{op}_ref" for op in ops), "repack", "chosen", "forced"}
    assert names <= set(kernels.__all__)
    assert all(callable(getattr(kernels, name)) for name in kernels.__all__)


def test_kernels_import_without_triton_and_at_once():
    """Torch takes seconds; what kernels adds to it is nothing to wait for."""
    code = (
        "import sys, time\n"
        "sys.modules['triton'] = None\n"  # an import of it now fails
        "import torch\n"
        "start = time.perf_counter()\n"
        "import kernels\n"
        "print(time.perf_counter() - start)\n"
    )
    done = python(code)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 0.5


@pytest.mark.long
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to run on")
def test_triton_is_imported_only_where_it_may_run():
    """A quarter of a second of every start."""
    code = "import sys, kernels; print('triton' in sys.modules, kernels.chosen())"
    assert python(code, TRITON_INTERPRET="", POLYAUDIO_KERNELS="").stdout == "False cpu\n"
    if importlib.util.find_spec("triton"):
        found = python(code, TRITON_INTERPRET="", POLYAUDIO_KERNELS="triton")
        assert (found.stdout, "as cpu" in found.stderr) == ("True triton\n", True)
    code = "import kernels\nwith kernels.forced('triton'): pass"
    found = python(code, TRITON_INTERPRET="", POLYAUDIO_KERNELS="")
    assert "expected triton, and a GPU or TRITON_INTERPRET=1" in found.stderr


# ------------------------------------------------------------------------------------------------
# What torch.compile makes of the plain meanings.


@pytest.mark.long
@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile wants a C++ compiler")
def test_what_is_compiled_computes_the_same():
    """Values and gradients, of several lengths, on their own and under autocast."""
    dice = torch.Generator().manual_seed(0)

    def numbers(*shape):
        return torch.randn(shape, generator=dice).requires_grad_()

    angle = torch.randn(21, 1, 4, generator=dice)
    for n in (21, 7, 1):
        problems = {
            kernels.rms_norm: (numbers(n, 16), numbers(16), 1e-6),
            kernels.swiglu: (numbers(n, 24), numbers(n, 24)),
            kernels.rope: (numbers(n, 3, 8), numbers(n, 1, 8), angle[:n].cos(), angle[:n].sin()),
        }
        for op, given in problems.items():
            learned = [x for x in given if torch.is_tensor(x) and x.requires_grad]
            found = {}
            for kind in ("ref", "compiled"):
                with kernels.forced(kind):
                    out = op(*given)
                parts = out if isinstance(out, tuple) else (out,)
                loss = sum((part * part.detach().cos()).sum() for part in parts)
                found[kind] = [*parts, *torch.autograd.grad(loss, learned)]
            for one, other in zip(*found.values()):
                assert torch.allclose(one, other, atol=1e-5), op.__name__


def test_only_what_is_forced_is_compiled():
    assert kernels.chosen() != "compiled"
    assert kernels.plain(linear_ref) is linear_ref
    with kernels.forced("compiled"):
        assert kernels.plain(linear_ref) is not linear_ref
        assert kernels.plain(linear_ref) is kernels.plain(linear_ref), "compiled once"


@pytest.mark.parametrize("learning", [True, False])
def test_under_autocast_gradients_go_through_float32(monkeypatch, learning):
    """SDPA's gradient in bfloat16 is several times as slow on a CPU, and autocast would have it."""
    seen, plain = [], F.scaled_dot_product_attention

    def spy(q, k, v, **how):
        seen.append((q.dtype, torch.is_autocast_enabled("cpu")))
        return plain(q, k, v, **how)

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    q, k, v = (torch.randn(9, 2, 8, requires_grad=learning) for _ in range(3))
    cu = torch.tensor([0, 4, 9], dtype=torch.int32)
    with torch.autocast("cpu", torch.bfloat16), kernels.forced("ref"):
        o = attention(q, k, v.bfloat16(), cu, cu, True)
    if learning:
        assert set(seen) == {(torch.float32, False)}
        assert o.dtype == torch.bfloat16
        o.float().sum().backward()
        assert all(x.grad is not None for x in (q, k, v))
    expected = attention_ref(q, k, v, cu, cu, True)
    assert (o.float() - expected).abs().max() < 0.05
