"""The attention's kernels against float64, where Triton runs; started by test_triton.py."""

from __future__ import annotations

import pytest
import torch
from aot_cases import COMPARED, COMPARED_IMAGES
from closeness import assert_close
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from triton.runtime.interpreter import interpreter_builder

from fd_large.kernels.window_attention import image_attention, window_attention
from fd_large.kernels.window_attention_reference import Layout, position_index, reference

NAMES = ("out", "qkv", "bias", "table", "scale")
# Cases of COMPARED that take minutes in the interpreter in bfloat16; smaller windows run the same
# code.
SLOW = ("17", "24, padded", "31", "33, padded")
CASES = [(name, torch.float32) for name in COMPARED] + [
    (name, torch.bfloat16) for name in COMPARED if name not in SLOW or torch.cuda.is_available()
]
# What the interpreter does in seconds: whole, padded and shifted windows, every width's class once.
QUICK = {
    *(("4", torch.bfloat16), ("6", torch.float32), ("8, narrow heads", torch.float32)),
    ("9, padded", torch.bfloat16),
}


def windows(batch, height, width, window, shift, heads, head_width, *, dtype, scale, seed, cosine):
    """Tensors of a call, and what else it is given; the largest scale is `scale`."""
    generator = torch.Generator().manual_seed(seed)
    channels = heads * head_width

    def normal(*shape):
        return torch.randn(shape, generator=generator)

    tensors = (
        normal(batch, height * width, 3 * channels).to(dtype),
        normal(2, channels).to(dtype),
        normal((2 * window - 1) ** 2, heads) * 3,
        torch.linspace(scale / 3, scale, heads + 1)[1:],
    )
    geometry = {
        "num_heads": heads,
        "height": height,
        "width": width,
        "window": (window, window),
        "shift": shift,
        "cosine": cosine,
    }
    return tensors, normal(batch, height * width, channels).to(dtype), geometry


def run(function, tensors, cotangent, device, dtype=None):
    """Output and gradients of a function of (qkv, bias, table, scale), None where there is none."""
    leaves = [
        None if t is None else t.to(device, dtype or t.dtype).clone().requires_grad_()
        for t in tensors
    ]
    out = function(*leaves)
    out.backward(cotangent.to(device, dtype or cotangent.dtype))
    return [out.detach(), *(None if leaf is None else leaf.grad for leaf in leaves)]


def compare(kernel, plain, tensors, cotangent, device):
    got = run(kernel, tensors, cotangent, device)
    eager = run(plain, tensors, cotangent, device)
    exact = run(plain, tensors, cotangent, device, torch.float64)
    narrow = got[0].dtype == torch.bfloat16
    for name, a, b, c in zip(NAMES, got, exact, eager, strict=True):
        if c is None:
            assert a is None, name
        elif name not in ("table", "scale"):
            assert_close(name, a, b, c)
        else:
            # Sums over many windows: 1e-4 of 1 or of the largest. In bfloat16 twice eager torch's
            # largest error in the two, since one number's may be small by chance; four times for
            # the table: delta = sum(do * o) has the rounding of o, where eager torch takes
            # sum(p * dp) of what it has. (With o in float32 the table too keeps to twice; but that
            # is half as many bytes again for o, each way.)
            limit = 1e-4 * max(1.0, b.abs().max().item())
            if narrow:
                sums = [i for i in (3, 4) if exact[i] is not None]
                errors = [(eager[i].double() - exact[i]).abs().max().item() for i in sums]
                factor = 4 if name == "table" else 2
                limit = max(limit, factor * max(errors))
            assert a.dtype == c.dtype, name
            assert (a.double() - b).abs().max() <= limit, name


def in_windows(geometry):
    """The two functions to compare, of tensors as `windows` makes them."""
    size = (geometry["height"], geometry["width"])

    def kernel(qkv, bias, table, scale):
        return window_attention(
            qkv.unflatten(1, size),
            num_heads=geometry["num_heads"],
            window=geometry["window"][0],
            shift=geometry["shift"],
            scale=scale,
            cosine=geometry["cosine"],
            bias=bias,
            table=table,
        ).flatten(1, 2)

    return kernel, lambda *tensors: reference(*tensors, Layout(**geometry))


@pytest.mark.sweep
@settings(
    deadline=None,
    max_examples=6,
    derandomize=True,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    window=st.integers(4, 8),
    shifted=st.booleans(),
    more=st.tuples(st.integers(0, 4), st.integers(0, 2)),
    batch=st.integers(1, 2),
    heads=st.integers(1, 2),
    head_width=st.sampled_from([16, 24, 32, 64, 88, 128]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    scale=st.sampled_from([1.0, 10.0, 30.0]),
    seed=st.integers(0, 1000),
)
def test_windows(window, shifted, more, batch, heads, head_width, dtype, scale, seed, device):
    height, width = window + more[0], window + more[1]
    shift = window // 2 if shifted and min(more) > 0 else 0
    size = (batch, height, width, window, shift, heads, head_width)
    tensors, cotangent, geometry = windows(*size, dtype=dtype, scale=scale, seed=seed, cosine=True)
    compare(*in_windows(geometry), tensors, cotangent, device)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [pytest.param(*case, marks=() if case in QUICK else pytest.mark.sweep) for case in CASES],
)
def test_windows_of_every_class(name, dtype, device):
    tensors, cotangent, geometry = windows(
        *COMPARED[name], dtype=dtype, scale=30.0, seed=0, cosine=True
    )
    compare(*in_windows(geometry), tensors, cotangent, device)


@pytest.mark.parametrize(
    "window", [(5, 16), *(pytest.param(w, marks=pytest.mark.sweep) for w in ((4, 47), (47, 5)))]
)
def test_windows_that_are_no_squares(window, device):
    """The operation itself takes them for whole images: long rows, shift and padding."""
    height, width, heads, head_width, shift = window[0] + 3, window[1] + 2, 1, 16, 2
    generator = torch.Generator().manual_seed(9)
    shapes = ((1, height * width, 48), (2, 16), ((2 * window[0] - 1) * (2 * window[1] - 1), 1))
    tensors = (*(torch.randn(s, generator=generator) for s in shapes), torch.tensor([20.0]))
    cotangent = torch.randn(1, height * width, head_width, generator=generator)
    numbers = (heads, height, width, *window, shift, 1)
    geometry = {
        "num_heads": heads,
        "height": height,
        "width": width,
        "window": window,
        "shift": shift,
        "cosine": True,
    }
    compare(
        lambda *tensors: torch.ops.fd_large.window_attention(*tensors, numbers)[0],
        lambda *tensors: reference(*tensors, Layout(**geometry)),
        tensors,
        cotangent,
        device,
    )


@pytest.mark.parametrize(
    ("size", "shift", "cosine"),
    [
        ((5, 10), 0, False),
        ((7, 5), 0, True),
        ((10, 8), 2, False),
        pytest.param((10, 15), 0, True, marks=pytest.mark.sweep),
        pytest.param((12, 11), 0, False, marks=pytest.mark.sweep),
        pytest.param((10, 8), 2, True, marks=pytest.mark.sweep),
    ],
)
def test_windows_without_a_table(size, shift, cosine, device):
    # A ViT's in detection: whole, padded; and shifted.
    (qkv, bias, _, scale), cotangent, geometry = windows(
        1, *size, 5, shift, 2, 16, dtype=torch.bfloat16, scale=10.0, seed=10, cosine=cosine
    )
    kernel, plain = in_windows(geometry)
    fixed = None if cosine else 0.25
    compare(
        lambda q, b, t, s: kernel(q, b, t, fixed or s),
        lambda q, b, t, s: plain(q, b, t, fixed or s),
        (qkv, bias, None, scale if cosine else None),
        cotangent,
        device,
    )


@pytest.mark.parametrize("wide", ["qkv", "bias"])
def test_a_bias_of_another_dtype(wide, device):
    (qkv, bias, table, scale), cotangent, geometry = windows(
        1, 5, 10, 5, 0, 2, 16, dtype=torch.bfloat16, scale=10.0, seed=11, cosine=True
    )
    if wide == "qkv":
        qkv = qkv.float()
    else:
        bias = bias.float()
    tensors = (qkv, bias, table, scale)
    compare(*in_windows(geometry), tensors, cotangent.to(qkv.dtype), device)


def test_small_tensors_in_any_layout_and_dtype(device):
    (qkv, bias, table, scale), cotangent, geometry = windows(
        1, 5, 5, 5, 0, 2, 16, dtype=torch.float32, scale=10.0, seed=12, cosine=True
    )
    plain = [t.to(device) for t in (qkv, bias, table.bfloat16().float(), scale)]
    odd = [
        plain[0],
        torch.stack([plain[1], plain[1]], dim=-1)[..., 0],
        plain[2].bfloat16().t().contiguous().t(),
        torch.stack([plain[3], plain[3]], dim=-1).double()[:, 0],
    ]
    kernel, _ = in_windows(geometry)
    got, expected = (run(kernel, tensors, cotangent, device) for tensors in (odd, plain))
    for name, a, b in zip(NAMES, got, expected, strict=True):
        if name == "table":
            a, b = a.float(), b.bfloat16().float()
        assert torch.equal(a.to(b.dtype), b), name


def test_the_largest_scale(device):
    # At the clamp a logit is 100 times a cosine, whose float32 rounding is 100 times as large in it
    # too: 1e-4 of the largest for outputs, 1e-3 for gradients.
    tensors, cotangent, geometry = windows(
        1, 8, 8, 8, 0, 2, 32, dtype=torch.float32, scale=100.0, seed=3, cosine=True
    )
    kernel, plain = in_windows(geometry)
    got = run(kernel, tensors, cotangent, device)
    exact = run(plain, tensors, cotangent, device, torch.float64)
    for name, a, b in zip(NAMES, got, exact, strict=True):
        limit = (1e-4 if name == "out" else 1e-3) * max(1.0, b.abs().max().item())
        assert (a.double() - b).abs().max() <= limit, name


def test_dot_product_without_bias_of_its_own(device):
    # Swin's first version: a table, no bias beside the projection's, a constant scale.
    (qkv, _, table, _), cotangent, geometry = windows(
        1, 7, 14, 7, 0, 2, 16, dtype=torch.bfloat16, scale=1.0, seed=4, cosine=False
    )
    kernel, plain = in_windows(geometry)
    compare(
        lambda q, b, t, s: kernel(q, b, t, 0.25),
        lambda q, b, t, s: plain(q, b, t, 0.25),
        (qkv, None, table, None),
        cotangent,
        device,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("grid", "prefix", "table", "heads", "channels"),
    [
        ((4, 5), 1, True, 2, 64),
        ((4, 4), 0, True, 1, 32),
        ((1, 20), 2, False, 1, 32),
        # Those of the models of record, one head.
        *(
            pytest.param(grid, prefix, grid[0] > 1, 1, width, marks=pytest.mark.sweep)
            for grid, prefix, width in sorted(COMPARED_IMAGES)
        ),
    ],
)
def test_whole_images(grid, prefix, table, heads, channels, dtype, device):
    generator = torch.Generator().manual_seed(5)
    tokens = prefix + grid[0] * grid[1]
    offsets = (2 * grid[0] - 1) * (2 * grid[1] - 1) + 3 * prefix
    tensors = (
        torch.randn(heads, tokens, 3 * channels, generator=generator).to(dtype),
        torch.randn(2, channels, generator=generator).to(dtype),
        torch.randn(offsets, heads, generator=generator) if table else None,
        None,
    )
    cotangent = torch.randn(heads, tokens, channels, generator=generator).to(dtype)

    def kernel(qkv, bias, table, scale):
        return image_attention(qkv, num_heads=heads, grid=grid, scale=0.2, bias=bias, table=table)

    def plain(qkv, bias, table, scale):
        # The twin written once more, without its detours.
        q, k, v = qkv.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
        q = q + bias[0].view(heads, 1, -1)
        v = v + bias[1].view(heads, 1, -1)
        wide = torch.promote_types(qkv.dtype, torch.float32)
        logits = (q @ k.transpose(-2, -1)).to(wide) * 0.2
        if table is not None:
            index = position_index(*grid, prefix > 0, table.device)
            logits = logits + table[index].permute(2, 0, 1)
        return (logits.softmax(-1).to(v.dtype) @ v).transpose(1, 2).flatten(2)

    compare(kernel, plain, tensors, cotangent, device)


def test_the_same_bits_every_time_and_in_any_order_of_programs(device, monkeypatch):
    # On a card more windows than programs, in several tiles.
    batch, heads, side, window, shift = (32, 4, 48, 12, 6) if device == "cuda" else (3, 2, 4, 4, 0)
    tensors, cotangent, _ = windows(
        batch, side, side, window, shift, heads, 16 if device == "cuda" else 24,
        dtype=torch.bfloat16, scale=20.0, seed=6, cosine=True,
    )  # fmt: skip
    numbers = (heads, side, side, window, window, shift, 1)
    tensors, cotangent = [t.to(device) for t in tensors], cotangent.to(device)
    results = torch.ops.fd_large.window_attention(*tensors, numbers)

    def gradients():
        return torch.ops.fd_large.window_attention_backward(cotangent, *tensors, *results, numbers)

    first = gradients()
    if device == "cpu":  # One after the other: from now on the last one first.
        set_place = interpreter_builder.set_grid_idx

        def from_the_last(*place):
            set_place(
                *(n - 1 - i for n, i in zip(interpreter_builder.grid_dim, place, strict=True))
            )

        monkeypatch.setattr(interpreter_builder, "set_grid_idx", from_the_last)
    for _ in range(20 if device == "cuda" else 1):
        for name, a, b in zip(NAMES[1:], gradients(), first, strict=True):
            assert torch.equal(a, b), name


def test_the_operation_is_registered_as_torch_wants_it(device):
    tensors, _, _ = windows(
        1, 4, 4, 4, 0, 1, 16, dtype=torch.float32, scale=5.0, seed=7, cosine=True
    )
    leaves = [t.to(device).requires_grad_() for t in tensors]
    torch.library.opcheck(
        torch.ops.fd_large.window_attention.default, (*leaves, (1, 4, 4, 4, 4, 0, 1))
    )


def test_a_view_and_a_gradient_that_is_one(device):
    tensors, _, geometry = windows(
        2, 4, 4, 4, 0, 1, 16, dtype=torch.float32, scale=5.0, seed=8, cosine=True
    )
    kernel, plain = in_windows(geometry)
    wide = torch.cat([tensors[0], tensors[0]], dim=-1).to(device)
    results = []
    for function in (kernel, plain):
        leaf = wide.clone().requires_grad_()
        out = function(leaf[..., :48], *(t.to(device) for t in tensors[1:]))
        # A sum's gradient is one number, seen everywhere.
        results.append(torch.autograd.grad(out.sum(), leaf)[0])
    torch.testing.assert_close(*results, atol=1e-5, rtol=1e-5)
