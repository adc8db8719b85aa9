from __future__ import annotations

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from fd_large.errors import ConfigError
from fd_large.kernels.attention import PADDING, attention, region_mask

G, HEADS, N, D = 6, 2, 5, 4


def inputs(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(G, HEADS, N, D, generator=generator).to(dtype).requires_grad_()
        for _ in range(3)
    )
    table = torch.randn(9, HEADS, generator=generator).requires_grad_()
    index = torch.randint(9, (N, N), generator=generator)
    scale = torch.rand(HEADS, 1, 1, generator=generator).add(1).requires_grad_()
    regions = torch.tensor([[0, 0, 1, 1, PADDING], [0, 0, 0, 0, 0], [2, 2, 2, PADDING, PADDING]])
    return q, k, v, table, index, scale, regions


def by_hand(q, k, v, table, index, scale, regions):
    """Group by group and query by query."""
    out = torch.zeros_like(v)
    for g in range(G):
        ids = regions[g % len(regions)]
        for h in range(HEADS):
            for i in range(N):
                logits = []
                for j in range(N):
                    cosine = torch.cosine_similarity(q[g, h, i], k[g, h, j], dim=0)
                    logit = cosine * scale[h, 0, 0] + table[index[i, j], h]
                    logit = logit - 100.0 * (ids[i] != ids[j])
                    logits.append(logit if ids[j] != PADDING else logit - torch.inf)
                out[g, h, i] = torch.stack(logits).softmax(0) @ v[g, h]
    return out


@pytest.mark.parametrize("memory", ["keep", "recompute"])
def test_cosine_attention_equals_loops(memory):
    q, k, v, table, index, scale, regions = inputs()
    out = attention(
        q,
        k,
        v,
        scale=scale,
        cosine=True,
        bias_table=table,
        bias_index=index,
        regions=regions,
        memory=memory,
    )
    with torch.no_grad():
        expected = by_hand(q, k, v, table, index, scale, regions)
    torch.testing.assert_close(out, expected, atol=2e-6, rtol=2e-6)


def test_dot_product_equals_torch():
    q, k, v, *_ = inputs()
    out = attention(q, k, v, scale=D**-0.5, cosine=False)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    torch.testing.assert_close(out, expected, atol=1e-6, rtol=1e-6)


def saved_maps(memory, nested=False):
    """Runs forward and backward; returns gradients and the (N, N) maps that autograd kept."""
    q, k, v, table, index, scale, regions = inputs()
    kept = []

    def pack(tensor):
        if tensor.shape[-2:] == (N, N) and tensor.dtype == torch.float32:
            kept.append(tuple(tensor.shape))
        return tensor

    def run(*tensors):
        return attention(
            *tensors[:3],
            scale=tensors[3],
            cosine=True,
            bias_table=tensors[4],
            bias_index=index,
            regions=regions,
            memory=memory,
        )

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        arguments = (q, k, v, scale, table)
        out = checkpoint(run, *arguments, use_reentrant=False) if nested else run(*arguments)
    out.square().sum().backward()
    return [t.grad for t in (q, k, v, table, scale)], kept


def test_recompute_keeps_no_map_and_changes_no_gradient():
    expected, kept = saved_maps("keep")
    assert kept  # The softmax at least.
    got, kept = saved_maps("recompute")
    assert kept == []
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a, b)


def test_recompute_works_inside_another_checkpoint():
    expected, _ = saved_maps("keep")
    got, _ = saved_maps("recompute", nested=True)
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a, b)


def test_recompute_under_no_grad():
    q, k, v, *_ = inputs()
    with torch.no_grad():
        out = attention(q, k, v, scale=1.0, cosine=False, memory="recompute")
    assert not out.requires_grad


def test_bfloat16_products_with_float32_softmax():
    q, k, v, table, index, scale, regions = inputs(torch.bfloat16)
    names = {"bias_table": table, "bias_index": index, "regions": regions}
    out = attention(q, k, v, scale=scale, cosine=True, **names)
    assert out.dtype == torch.bfloat16
    wide = attention(q.float(), k.float(), v.float(), scale=scale, cosine=True, **names)
    # One bfloat16 rounding of normalised q and k, of the logits, the weights and the sum.
    assert (out.float() - wide).abs().max() < 5 * 2**-8 * wide.abs().max()


def test_padding_is_minus_infinity_and_other_regions_minus_100():
    mask = region_mask(torch.tensor([[0, 1, PADDING]]), torch.float32)
    inf = float("inf")
    assert mask.tolist() == [[[0, -100, -inf], [-100, 0, -inf], [-100, -100, -inf]]]


def test_keep_is_refused_on_a_gpu():
    class OnGpu(torch.Tensor):
        is_cuda = True

    q = torch.zeros(1, 1, 2, 2).as_subclass(OnGpu)
    with pytest.raises(ConfigError, match="attention_memory"):
        attention(q, q, q, scale=1.0, cosine=False, memory="keep")
