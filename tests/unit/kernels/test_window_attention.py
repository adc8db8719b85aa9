from __future__ import annotations

import math

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from fd_large.errors import ConfigError, ShapeError
from fd_large.kernels import window_attention_reference as module
from fd_large.kernels.window_attention import (
    image_attention,
    untested,
    window_attention,
)
from fd_large.kernels.window_attention_launch import Geometry
from fd_large.kernels.window_attention_reference import (
    PADDING,
    Layout,
    position_index,
    reference,
    region_ids,
    region_mask,
)

CPU = torch.device("cpu")
HEADS, WIDTH = 2, 4
WINDOW, SHIFT, SIZE = 3, 1, (5, 7)


def inputs(dtype=torch.float32, size=SIZE):
    generator = torch.Generator().manual_seed(0)
    channels = HEADS * WIDTH
    qkv = torch.randn(2, *size, 3 * channels, generator=generator).to(dtype).requires_grad_()
    bias = torch.randn(2, channels, generator=generator).to(dtype).requires_grad_()
    table = torch.randn((2 * WINDOW - 1) ** 2, HEADS, generator=generator).requires_grad_()
    scale = torch.rand(HEADS, generator=generator).add(1).requires_grad_()
    return qkv, bias, table, scale


def attend(qkv, bias, table, scale, memory="keep"):
    return window_attention(
        qkv,
        num_heads=HEADS,
        window=WINDOW,
        shift=SHIFT,
        scale=scale,
        cosine=True,
        bias=bias,
        table=table,
        memory=memory,
    )


def by_hand(qkv, bias, table, scale):
    """Query by query over the pixels of the unpadded map."""
    batch, height, width, _ = qkv.shape
    q, k, v = qkv.unflatten(-1, (3, HEADS, WIDTH)).unbind(3)
    q, v = (x + b.unflatten(0, (HEADS, WIDTH)) for x, b in zip((q, v), bias, strict=True))
    rows, columns = -(-height // WINDOW) * WINDOW, -(-width // WINDOW) * WINDOW
    pixels = [(y, x) for y in range(height) for x in range(width)]

    def frame(position, length):
        return (position - SHIFT) % length

    def torn(a, b, length):
        """Whether two positions of the last window are from opposite edges."""
        return (a >= length - SHIFT) != (b >= length - SHIFT)

    out = torch.zeros(batch, height, width, HEADS, WIDTH)
    for y, x in pixels:
        fy, fx = frame(y, rows), frame(x, columns)
        logits, values = [], []
        for ky, kx in pixels:
            gy, gx = frame(ky, rows), frame(kx, columns)
            if (fy // WINDOW, fx // WINDOW) != (gy // WINDOW, gx // WINDOW):
                continue
            cosine = torch.cosine_similarity(q[:, y, x], k[:, ky, kx], dim=-1)
            offset = (fy - gy + WINDOW - 1) * (2 * WINDOW - 1) + fx - gx + WINDOW - 1
            logit = cosine * scale + table[offset]
            logits.append(logit - 100.0 * (torn(fy, gy, rows) or torn(fx, gx, columns)))
            values.append(v[:, ky, kx])
        weights = torch.stack(logits, -1).softmax(-1)  # (B, h, K)
        out[:, y, x] = torch.einsum("bhk,kbhd->bhd", weights, torch.stack(values))
    return out.flatten(-2)


@pytest.mark.parametrize("memory", ["keep", "recompute", "sequential"])
def test_cosine_attention_equals_loops(memory):
    tensors = inputs()
    with torch.no_grad():
        torch.testing.assert_close(
            attend(*tensors, memory), by_hand(*tensors), atol=2e-6, rtol=2e-6
        )


def test_dot_product_over_an_image_equals_torch():
    qkv = torch.randn(2, 5, 3 * HEADS * WIDTH)
    out = image_attention(qkv, num_heads=HEADS, grid=(2, 2), scale=WIDTH**-0.5)
    q, k, v = qkv.view(2, 5, 3, HEADS, WIDTH).permute(2, 0, 3, 1, 4)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    torch.testing.assert_close(out, expected.transpose(1, 2).flatten(2), atol=1e-6, rtol=1e-6)


def test_image_attention_takes_the_table_of_a_class_token():
    qkv = torch.zeros(1, 5, 3 * HEADS * WIDTH)
    qkv[..., 2 * HEADS * WIDTH :] = torch.eye(5, HEADS * WIDTH)  # Values tell the weights.
    table = torch.randn(9 + 3, HEADS)
    out = image_attention(qkv, num_heads=HEADS, grid=(2, 2), scale=1.0, table=table)
    weights = table[position_index(2, 2, True, CPU)].softmax(1)  # (N, N, h)
    torch.testing.assert_close(out[0, :, :WIDTH], weights[:, :WIDTH, 0])


def saved_maps(memory, nested=False):
    """Runs forward and backward; returns gradients and the maps that autograd kept."""
    tensors = inputs()
    kept = []

    def pack(tensor):
        if tensor.shape[-2:] == (WINDOW**2,) * 2 and tensor.dtype == torch.float32:
            kept.append(tuple(tensor.shape))
        return tensor

    def run(*tensors):
        return attend(*tensors, memory)

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = checkpoint(run, *tensors, use_reentrant=False) if nested else run(*tensors)
    out.square().sum().backward()
    return [t.grad for t in tensors], kept


@pytest.mark.parametrize("nested", [False, True])
def test_recompute_keeps_no_map_and_changes_no_gradient(nested):
    expected, kept = saved_maps("keep")
    assert kept  # The softmax at least.
    got, kept = saved_maps("recompute", nested)
    assert kept == []
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a, b)


def test_sequential_makes_few_windows_at_once(monkeypatch):
    expected, _ = saved_maps("keep")
    seen = []
    whole = module._group_attention

    def spy(q, *rest):
        seen.append(q.shape[0])
        return whole(q, *rest)

    monkeypatch.setattr(module, "_group_attention", spy)
    # Two images have 2 x 3 windows each: four windows of each image come first, then the last two.
    monkeypatch.setattr(module, "_SEQUENTIAL_ELEMENTS", 4 * 2 * HEADS * WINDOW**4)
    got, kept = saved_maps("sequential")
    assert seen == [8, 4, 4, 8] or seen == [8, 4, 8, 4]  # Forward, and again in backward.
    assert kept == []
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_recompute_under_no_grad():
    with torch.no_grad():
        assert not attend(*inputs(), "recompute").requires_grad


def test_bfloat16_products_with_float32_softmax():
    qkv, bias, table, scale = inputs(torch.bfloat16)
    out = attend(qkv, bias, table, scale)
    assert out.dtype == torch.bfloat16
    wide = attend(qkv.float(), bias.float(), table, scale)
    # One bfloat16 rounding of biased q and v, normalised q and k, logits, weights and the sum.
    assert (out.float() - wide).abs().max() < 6 * 2**-8 * wide.abs().max()


def test_keep_is_refused_on_a_gpu():
    class OnGpu(torch.Tensor):
        is_cuda = True

    qkv = torch.zeros(1, 2, 2, 6).as_subclass(OnGpu)
    with pytest.raises(ConfigError, match="attention_memory"):
        window_attention(qkv, num_heads=1, window=2, shift=0, scale=1.0, cosine=False)


# --- who may see whom ---


def test_padding_is_minus_infinity_and_other_regions_minus_100():
    mask = region_mask(torch.tensor([[0, 1, PADDING]]), torch.float32)
    inf = float("inf")
    assert mask.tolist() == [[[0, -100, -inf], [-100, 0, -inf], [-100, -100, -inf]]]


def test_shift_mask_hides_what_was_no_neighbour():
    mask = region_mask(region_ids(8, 8, (4, 4), 2, CPU), torch.float32)
    # Zeros of 256 in each window, as measured on the published mask.
    assert [(m == 0).sum().item() for m in mask] == [256, 128, 128, 64]


def test_padding_has_an_id_of_its_own():
    ids = region_ids(3, 5, (4, 4), 0, CPU).view(1, 2, 4, 4)
    assert (ids[0, :, 3] == PADDING).all()
    assert (ids[0, 1, :, 1:] == PADDING).all()
    assert (ids[0, 0, :3] == 0).all()


@pytest.mark.parametrize(("height", "width"), [(5, 7), (9, 6), (13, 21)])
def test_no_window_is_padding_alone(height, width):
    for shift in (0, 2):
        assert (region_ids(height, width, (4, 4), shift, CPU) != PADDING).any(dim=1).all()


def test_position_index_counts_offsets():
    index = position_index(2, 3, False, CPU)
    for query in range(6):
        for key in range(6):
            dy, dx = query // 3 - key // 3, query % 3 - key % 3
            assert index[query, key] == (dy + 1) * 5 + dx + 2


@pytest.mark.parametrize(("grid", "rows"), [(14, 732), (16, 964)])
def test_position_index_has_three_rows_for_cls(grid, rows):
    index = position_index(grid, grid, True, CPU)
    assert index.max() == rows - 1
    assert index[0, 0] == rows - 1
    assert (index[0, 1:] == rows - 3).all()
    assert (index[1:, 0] == rows - 2).all()
    assert (index[1:, 1:] < rows - 3).all()


def test_tables_made_under_inference_mode_serve_training():
    module._position_index.cache_clear()
    module._region_ids.cache_clear()
    with torch.inference_mode():
        assert not position_index(5, 5, False, CPU).is_inference()
        assert not region_ids(5, 5, (3, 3), 1, CPU).is_inference()


# --- the operation ---

CASE = {
    "window": (12, 12),
    "prefix": 0,
    "head_width": 32,
    "table": True,
    "shifted_product": False,
    "empty": False,
    "qkv": torch.bfloat16,
    "bias": torch.bfloat16,
}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({}, ""),
        ({"window": (48, 48)}, ""),
        ({"window": (1, 257), "table": False}, ""),
        ({"window": (2, 2)}, "window 2x2"),
        ({"window": (64, 64)}, "window 64x64"),
        ({"prefix": 2}, "window 12x12"),
        ({"head_width": 8}, "head width 8"),
        ({"window": (16, 16), "head_width": 128}, ""),
        ({"window": (17, 17), "head_width": 72}, "window 17x17 with head width 72"),
        ({"window": (24, 24), "head_width": 72, "table": False}, ""),
        ({"qkv": torch.float32, "head_width": 64}, "float32 with head width 64"),
        (
            {"shifted_product": True, "head_width": 64},
            "dot product in shifted windows with head width 64",
        ),
        ({"shifted_product": True}, ""),
        ({"qkv": torch.float64}, "qkv torch.float64"),
        ({"empty": True}, "no tokens"),
    ],
)
def test_what_was_not_tested_is_named(change, reason):
    assert untested(**CASE | change) == reason


@pytest.mark.parametrize("cosine", [True, False])
def test_operation_gives_shapes_and_gradients_on_the_meta_device(cosine, monkeypatch):
    monkeypatch.setenv("FD_KERNELS", "triton")
    heads, channels = 3, 48
    meta = {"device": "meta", "requires_grad": True}
    qkv = torch.empty(2, 9, 10, 3 * channels, dtype=torch.bfloat16, **meta)
    bias = torch.empty(2, channels, dtype=torch.bfloat16, **meta)
    table, scale = torch.empty(49, heads, **meta), torch.empty(heads, **meta)
    scales = scale if cosine else 0.25
    out = window_attention(
        qkv,
        num_heads=heads,
        window=4,
        shift=2,
        scale=scales,
        cosine=cosine,
        bias=bias,
        table=table,
    )
    assert out.shape == (2, 9, 10, channels)
    assert out.dtype == torch.bfloat16
    out.sum().backward()
    for tensor in (qkv, bias, table, *[scale] * cosine):
        assert tensor.grad.shape == tensor.shape
        assert tensor.grad.dtype == tensor.dtype


def test_partial_sums_are_small_beside_the_map():
    # Stage 3 of SwinV2-G at 192 pixels and window 12, 32 images.
    partials = Geometry(64, 32, 12, 12, (12, 12), 0, True, 0).partials(32)
    map_bytes = 32 * 144 * 2048 * 2
    # float32, written and read again.
    assert 2 * 4 * sum(math.prod(shape) for shape in partials) < 0.25 * map_bytes


@pytest.mark.parametrize("window", [4, 7, 12, 14, 16, 24, 48])
def test_partial_sums_of_the_table_are_no_map(window):
    g = Geometry(4, 32, window, window, (window, window), 0, True, 0)
    _, _, *shape = g.partials(8).table
    assert torch.Size(shape).numel() <= window**4 or window < 8
    assert shape[-2:] == [window, window]
    assert g.slots % g.row == 0


def test_reference_is_the_function_without_kernels():
    qkv, bias, table, scale = inputs()
    out = reference(
        qkv.flatten(1, 2),
        bias,
        table,
        scale,
        Layout(HEADS, *SIZE, window=(WINDOW, WINDOW), shift=SHIFT, cosine=True),
    )
    assert torch.equal(out.unflatten(1, SIZE), attend(qkv, bias, table, scale))


def test_a_window_as_large_as_the_map_may_be_shifted():
    """Against windows cut by hand: a rolled map, whose four parts do not see each other."""
    torch.manual_seed(0)
    side, shift, heads, head_width = 4, 2, 2, 16
    qkv = torch.randn(1, side * side, 3 * heads * head_width)
    layout = Layout(heads, side, side, (side, side), shift, cosine=False)
    out = reference(qkv, None, None, 0.25, layout)
    for rows in (slice(0, 2), slice(2, 4)):
        for columns in (slice(0, 2), slice(2, 4)):
            part = qkv.view(1, side, side, -1)[:, rows, columns].reshape(1, 4, -1)
            q, k, v = part.view(4, 3, heads, head_width).permute(1, 2, 0, 3)
            seen = (q @ k.transpose(1, 2) * 0.25).softmax(-1) @ v
            got = out.view(1, side, side, -1)[:, rows, columns].reshape(4, heads, head_width)
            torch.testing.assert_close(got.transpose(0, 1), seen, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["bias", "table", "scale"])
def test_what_a_kernel_would_read_past_the_end_of_is_refused(name, monkeypatch):
    monkeypatch.setenv("FD_KERNELS", "triton")
    meta = {"device": "meta"}
    tensors = {
        "bias": torch.empty(2, 32, **meta),
        "table": torch.empty(81, 2, **meta),
        "scale": torch.empty(2, **meta),
    }
    arguments = {"num_heads": 2, "window": 5, "shift": 0, "cosine": True}
    qkv = torch.empty(1, 5, 5, 96, **meta)
    window_attention(qkv, **arguments, **tensors)
    tensors[name] = tensors[name][:1]
    with pytest.raises(ShapeError, match=f": {name} "):
        window_attention(qkv, **arguments, **tensors)


def test_a_bias_of_another_dtype_leaves_that_of_qkv():
    qkv, bias, table, scale = inputs(torch.bfloat16)
    assert attend(qkv, bias.float(), table, scale).dtype == torch.bfloat16
