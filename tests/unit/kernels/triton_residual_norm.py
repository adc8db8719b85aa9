"""The norms' kernels against float64, where Triton runs; started by test_triton.py."""

from __future__ import annotations

import math

import pytest
import torch
from closeness import assert_close
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import nn

from fd_large.kernels import add_norm as an
from fd_large.kernels import residual_norm as rn

DTYPES = (torch.float32, torch.bfloat16)
LIMIT = 9_000  # Elements of a map, so that an interpreted case stays short.
cases = settings(
    deadline=None,
    max_examples=25 if torch.cuda.is_available() else 6,
    derandomize=True,
    # Shrinking a failure would take minutes in the interpreter.
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@st.composite
def shapes(draw, widest=8192):
    odd, even = st.integers(32, 2048), st.integers(32 // 8, widest // 8).map(lambda n: 8 * n)
    width = draw(st.one_of(odd, even, st.sampled_from([32, 96, 2048, widest])))
    batch = draw(st.integers(1, min(4, max(1, LIMIT // width))))
    most = max(1, LIMIT // width // batch)
    middle = draw(st.sampled_from([(), (1,), (most,), (1, max(1, most // 2))]))
    return (batch, *middle, width)


def tensors(shape, stream, branch, weight, device, seed):
    generator = torch.Generator().manual_seed(seed)

    def normal(*size, dtype, factor=1.0, offset=0.0):
        values = torch.randn(*size, generator=generator) * factor + offset
        return values.to(dtype).to(device).requires_grad_()

    x = normal(*shape, dtype=stream)
    f = normal(*shape, dtype=branch, factor=3.0, offset=0.5)
    vectors = [normal(shape[-1], dtype=weight, factor=0.5, offset=o) for o in (1.0, 0.0, 0.1)]
    scale = (torch.rand(shape[0], generator=generator) < 0.7).float().to(device) * 1.25
    return [x, f, *vectors], scale


def compare(kernel, reference, inputs, seed):
    """Both, and the reference in float64: results and the gradients of all inputs."""
    outputs = {}
    for name, function, dtype in (
        ("kernel", kernel, None),
        ("eager", reference, None),
        ("exact", reference, torch.float64),
    ):
        leaves = [t.detach().to(dtype or t.dtype).requires_grad_() for t in inputs]
        results = [r for r in function(*leaves) if r is not None]
        generator = torch.Generator().manual_seed(seed)
        gradients = [torch.randn(r.shape, generator=generator) for r in results]
        if dtype is None:
            gradients = [g.to(r) for g, r in zip(gradients, results, strict=True)]
            given_gradients = gradients
        else:
            # The exact way is given the rounded gradients too.
            gradients = [g.double() for g in given_gradients]
        torch.autograd.backward(results, gradients)
        outputs[name] = [*results, *(leaf.grad for leaf in leaves)]
    for index, (got, eager, exact) in enumerate(
        zip(outputs["kernel"], outputs["eager"], outputs["exact"], strict=True)
    ):
        if exact is None:
            assert got is None
        else:
            assert_close(f"tensor {index}", got, exact, eager)


def add_norm_reference(x, f, w, b, scale, gamma, dtype=None):
    """In the dtypes given, or in float64 throughout."""
    y = an.add_branch_reference(x, f, scale, gamma)
    dtype = x.dtype if dtype is None or x.dtype == torch.float64 else dtype
    return y, rn.layer_norm_reference(y, w, b, 1e-6, dtype)


@cases
@given(
    shape=shapes(),
    stream=st.sampled_from(DTYPES),
    branch=st.sampled_from(DTYPES),
    weight=st.sampled_from(DTYPES),
    copy=st.sampled_from([None, *DTYPES]),
    scaled=st.booleans(),
    biased=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_residual_norm(shape, stream, branch, weight, copy, scaled, biased, seed, device):
    (x, f, w, b, last), scale = tensors(shape, stream, branch, weight, device, seed)
    scale, biased = scale if scaled else None, biased and shape[-1] <= 4096

    def kernel(x, f, w, b, last):
        y, copied = rn.residual_norm(
            x, f, w, b, 1e-5, scale, copy=copy, branch_bias=last if biased else None
        )
        return y, None if copied is y else copied

    def reference(x, f, w, b, last):
        y, _ = rn.residual_norm_reference(x, f, w, b, 1e-5, scale, last if biased else None)
        if copy is None:
            return y, None
        return y, y.to(copy) if y.dtype != torch.float64 else y.clone()

    compare(kernel, reference, (x, f, w, b, last), seed)


@cases
@given(
    shape=shapes(),
    dtype=st.sampled_from(DTYPES),
    out=st.sampled_from(DTYPES),
    weight=st.sampled_from(DTYPES),
    seed=st.integers(0, 1000),
)
def test_layer_norm(shape, dtype, out, weight, seed, device):
    (x, _, w, b, _), _ = tensors(shape, dtype, dtype, weight, device, seed)

    def reference(x, w, b):
        dtype = out if x.dtype != torch.float64 else x.dtype
        return (rn.layer_norm_reference(x, w, b, 1e-6, dtype),)

    def kernel(x, w, b):
        return (rn.layer_norm(x, w, b, 1e-6, dtype=out),)

    compare(kernel, reference, (x, w, b), seed)


@cases
@given(
    shape=shapes(widest=4096),
    stream=st.sampled_from(DTYPES),
    branch=st.sampled_from(DTYPES),
    weight=st.sampled_from(DTYPES),
    out=st.sampled_from(DTYPES),
    scaled=st.booleans(),
    with_gamma=st.booleans(),
    with_norm=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_add_norm(shape, stream, branch, weight, out, scaled, with_gamma, with_norm, seed, device):
    inputs, scale = tensors(shape, stream, branch, weight, device, seed)
    if not with_gamma and shape[-1] % 2:
        shape = (*shape[:-1], 8192)
        inputs, scale = tensors(shape, stream, branch, weight, device, seed)
    scale = scale if scaled else None

    def kernel(x, f, w, b, gamma):
        gamma = gamma if with_gamma else None
        if not with_norm:
            return (an.add_branch(x, f, scale, gamma),)
        return an.add_norm(x, f, w, b, 1e-6, scale, gamma, dtype=out)

    def reference(x, f, w, b, gamma):
        y, normed = add_norm_reference(x, f, w, b, scale, gamma if with_gamma else None, out)
        return (y, normed) if with_norm else (y,)

    compare(kernel, reference, inputs, seed)


@pytest.mark.parametrize("copy", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_norm_of_the_stream_in_two_dtypes(dtype, copy, device):
    (x, _, w, b, _), _ = tensors((2, 7, 100), torch.bfloat16, *[torch.bfloat16] * 2, device, 10)

    def reference(x, w, b):
        exact = x.dtype == torch.float64
        y = rn.layer_norm_reference(x, w, b, 1e-6, x.dtype if exact else dtype)
        return y, y.clone() if exact else y.to(copy)

    def kernel(x, w, b):
        return rn.stream_norm(x, w, b, 1e-6, dtype=dtype, copy=copy)

    compare(kernel, reference, (x, w, b), 11)
    with torch.no_grad():
        y, copied = kernel(x, w, b)
        assert (y is copied) == (dtype == copy)


@pytest.mark.sweep
@pytest.mark.parametrize(("width", "rows"), [(3000, 150), (8192, 130)])
def test_more_tiles_than_programs(width, rows, device):
    assert rows > rn.PARTIALS * rn.tile(width)["ROWS"]
    shape = (2, rows // 2, width)  # Some programs have two tiles, some one.
    (x, f, w, b, last), scale = tensors(shape, *[torch.float32] * 3, device, 1)
    gamma = last.detach() if width <= 4096 else None
    compare(
        lambda x, f, w, b: an.add_norm(x, f, w, b, 1e-6, scale, gamma),
        lambda x, f, w, b: add_norm_reference(x, f, w, b, scale, gamma),
        (x, f, w, b),
        2,
    )
    if width <= 4096:
        compare(
            lambda x, f, w, b, c: rn.residual_norm(x, f, w, b, 1e-6, scale, branch_bias=c)[:1],
            lambda x, f, w, b, c: rn.residual_norm_reference(x, f, w, b, 1e-6, scale, c)[:1],
            (x, f, w, b, last),
            2,
        )
    compare(
        lambda x, f, w, b: rn.residual_norm(x, f, w, b, 1e-6, scale)[:1],
        lambda x, f, w, b: rn.residual_norm_reference(x, f, w, b, 1e-6, scale)[:1],
        (x, f, w, b),
        2,
    )


def test_gradients_have_the_same_bits_every_time(device):
    # On a card more rows than its programs take at once.
    rows = 30_000 if device == "cuda" else 100
    (x, f, w, b, gamma), scale = tensors((2, rows, 96), *[torch.bfloat16] * 3, device, 3)

    def gradients():
        for leaf in (x, f, w, b, gamma):
            leaf.grad = None
        y, copy = rn.residual_norm(x, f, w, b, 1e-5, scale, copy=torch.float32, branch_bias=gamma)
        y, normed = an.add_norm(y, f, w, b, 1e-5, scale, gamma)
        (copy.float().sin() + y.float().cos() * normed.float()).sum().backward()
        return [leaf.grad.clone() for leaf in (x, f, w, b, gamma)]

    first = gradients()
    for _ in range(20 if device == "cuda" else 1):
        assert all(map(torch.equal, first, gradients()))


def test_statistics_of_rows_far_from_zero(device):
    """One pass over sums of squares would lose all digits here."""
    (_, f, w, b, _), _ = tensors((4, 5, 100), *[torch.float32] * 3, device, 4)
    f = (f.detach() + 1000.0).requires_grad_()
    y = rn.layer_norm(f, w, b, 1e-5)
    exact = rn.layer_norm_reference(f.double(), w.double(), b.double(), 1e-5, torch.float64)
    # A float32 near 1000 is itself 3e-5 off, which the norm divides by a deviation of 3.
    assert (y - exact).abs().max() < 1e-4
    constant = torch.full((3, 64), 7.0, device=device)
    ones = torch.ones(64, device=device)
    assert torch.equal(rn.layer_norm(constant, ones, ones, 1e-5), torch.ones_like(constant))


def test_gradients_of_one_result_alone(device):
    (x, f, w, b, _), scale = tensors((2, 6, 64), *[torch.float32] * 3, device, 5)
    bf16 = torch.bfloat16
    for index in range(2):
        compare(
            lambda *a, i=index: [an.add_norm(*a, 1e-6, scale)[i]],
            lambda *a, i=index: [add_norm_reference(*a, scale, None)[i]],
            (x, f, w, b),
            6,
        )
        y, copy = rn.residual_norm(x, f, w, b, 1e-5, scale, copy=bf16)
        (y, copy)[index].float().sum().backward()
        # Through the bfloat16 copy a gradient is rounded, and 1 is still 1.
        assert torch.equal(x.grad, torch.ones_like(x))
        x.grad = None


def test_maps_in_any_memory_layout(device):
    """Inputs that are views, and the stride-0 gradient that a sum hands down."""
    (x, f, w, b, _), scale = tensors((2, 64, 6), *[torch.float32] * 3, device, 7)
    w, b = (torch.randn(64, device=device).requires_grad_() for _ in range(2))
    y, _ = rn.residual_norm(x.mT, f.mT, w, b, 1e-5, scale)
    y.sum().backward()
    torch.testing.assert_close(y, rn.residual_norm_reference(x.mT, f.mT, w, b, 1e-5, scale)[0])
    torch.testing.assert_close(x.grad, torch.ones_like(x))


def test_vectors_in_any_layout_and_dtype(device):
    """Those of strided memory and of other dtypes give what plain ones give."""
    (x, f, w, b, c), scale = tensors((3, 4, 64), *[torch.float32] * 3, device, 12)
    w, b, c = (v.detach().bfloat16().float() for v in (w, b, c))
    plain, odd = (w, b, c, scale), [torch.stack([v, v], dim=-1)[:, 0] for v in (w, b, c)]
    odd = (odd[0], odd[1], odd[2].bfloat16(), torch.stack([scale, scale], dim=-1).double()[:, 0])
    for function in (
        lambda w, b, c, s: rn.residual_norm(x, f, w, b, 1e-5, s, branch_bias=c)[0],
        lambda w, b, c, s: an.add_norm(x, f, w, b, 1e-5, s, c)[1],
        lambda w, b, c, s: an.add_branch(x, f, s, c),
        lambda w, b, c, s: rn.layer_norm(x, w, b, 1e-5),
    ):
        assert torch.equal(function(*plain), function(*odd))


@pytest.mark.parametrize("name", ["residual_norm", "layer_norm", "add_norm", "add_branch"])
def test_registration(name, device):
    (x, f, w, b, gamma), scale = tensors((2, 5, 48), *[torch.float32] * 3, device, 8)
    bf16 = torch.bfloat16
    op, arguments = {
        "residual_norm": ("residual_norm", (x, f, w, b, gamma, scale, 1e-5, x.dtype, bf16)),
        "layer_norm": ("residual_norm", (None, f, w, b, None, None, 1e-5, bf16, None)),
        "add_norm": ("add_norm", (x, f, gamma, scale, w, b, 1e-5, bf16)),
        "add_branch": ("add_norm", (x, f, None, scale, None, None, 0.0, x.dtype)),
    }[name]
    torch.library.opcheck(getattr(torch.ops.fd_large, op).default, arguments)


def test_compiles_without_graph_breaks(device):
    (x, f, w, b, gamma), scale = tensors((2, 5, 48), *[torch.float32] * 3, device, 9)

    def block(x, f):
        y, copy = rn.residual_norm(x, f, w, b, 1e-5, scale, copy=torch.bfloat16)
        y, normed = an.add_norm(y, copy, w, b, 1e-5, scale, gamma)
        return rn.layer_norm(y, w, b, 1e-5) + normed

    eager = block(x, f)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")(x, f)
    assert torch.equal(eager, compiled)
    grads = [torch.autograd.grad(out.sum(), (x, f, w, gamma)) for out in (eager, compiled)]
    for a, c in zip(*grads, strict=True):
        torch.testing.assert_close(a, c)


def test_a_module_follows_its_input(device, chosen):
    """Widths and dtypes that were not tested run on the reference."""
    for width, dtype, made in (
        (32, torch.float32, "triton"),
        (31, torch.float32, "reference"),
        (64, torch.float64, "reference"),
        (64, torch.float16, "reference"),
        (2047, torch.float32, "triton"),
        (2049, torch.float32, "reference"),
        (8184, torch.float32, "triton"),
    ):
        norm = nn.LayerNorm(width, device=device, dtype=dtype)
        x = torch.randn(3, width, device=device, dtype=dtype)
        y = rn.layer_norm(x, norm.weight, norm.bias, norm.eps)
        assert chosen[-1] == ("layer_norm", made)
        torch.testing.assert_close(y, norm(x))
    assert math.isfinite(y.sum().item())
    for width, made in ((4096, "triton"), (4104, "reference")):
        x, vector = torch.randn(2, width, device=device), torch.ones(width, device=device)
        rn.residual_norm(x, x, vector, vector, 1e-5, branch_bias=vector)
        assert chosen[-1] == ("residual_norm", made)
        assert rn.takes_bias(x, width) == (made == "triton")
