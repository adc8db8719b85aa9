from __future__ import annotations

import pytest
import torch

from fd_large.backbones.drop_path import branch_scales, linear_rates
from fd_large.backbones.swin.swin import Swin
from fd_large.backbones.swinv2.swinv2 import SwinV2
from fd_large.backbones.vit.vit import ViT
from fd_large.errors import ShapeError


def nets(rate):
    torch.manual_seed(0)
    yield SwinV2(8, (2, 2), (1, 2), window_size=4, patch_size=2, drop_path_rate=rate)
    yield Swin(8, (2, 2), (1, 2), window_size=4, patch_size=2, image_size=16, drop_path_rate=rate)
    yield ViT(8, 4, 2, patch_size=4, image_size=16, layer_scale=0.5, drop_path_rate=rate)


def test_rates_rise_linearly_two_sites_a_block():
    assert linear_rates(0.3, 4) == pytest.approx((0, 0, 0.1, 0.1, 0.2, 0.2, 0.3, 0.3))
    assert linear_rates(0.3, 1) == (0.0, 0.0)


def test_kept_branches_are_scaled_up():
    keep = torch.tensor([[True, False], [True, True]])
    scales = branch_scales(keep, (0.0, 0.2), 2, torch.device("cpu"))
    torch.testing.assert_close(scales, torch.tensor([[1.0, 0.0], [1.25, 1.25]]))
    assert branch_scales(None, (0.0, 0.2), 2, torch.device("cpu")) is None


def test_a_sample_depends_on_its_own_draws_only():
    images = torch.randn(3, 3, 16, 16)
    for net in nets(0.4):
        keep = torch.rand(len(net.drop_path_rates), 3, generator=torch.Generator().manual_seed(3))
        keep = keep > 0.4
        together = net(images, keep).tokens
        for b in range(3):
            alone = net(images[b : b + 1], keep[:, b : b + 1]).tokens
            torch.testing.assert_close(together[b : b + 1], alone, atol=1e-6, rtol=1e-5)


def test_dropping_every_branch_of_a_block_passes_the_stream():
    images = torch.randn(2, 3, 16, 16)
    for net in nets(0.4):
        inputs, outputs = [], []
        block = net.blocks()[3]

        def hook(module, given, output, inputs=inputs, outputs=outputs):
            inputs.append(given[0])
            # SwinV2's blocks return the stream in two dtypes.
            outputs.append(output[0] if isinstance(output, tuple) else output)

        block.register_forward_hook(hook)
        keep = torch.ones(len(net.drop_path_rates), 2, dtype=torch.bool)
        keep[6:8, 1] = False
        net(images, keep)
        assert torch.equal(inputs[0][1], outputs[0][1])
        assert not torch.equal(inputs[0][0], outputs[0][0])


def test_rate_zero_and_all_kept_is_no_drop_path():
    images = torch.randn(2, 3, 16, 16)
    for net in nets(0.0):
        keep = torch.ones(len(net.drop_path_rates), 2, dtype=torch.bool)
        assert torch.equal(net(images, keep).tokens, net(images).tokens)


def test_mean_over_draws_is_the_whole_branch():
    keep = torch.rand(1, 20000, generator=torch.Generator().manual_seed(0)) >= 0.3
    scales = branch_scales(keep, (0.3,), 20000, torch.device("cpu"))
    assert abs(scales.mean().item() - 1) < 0.02


def test_draws_of_another_shape_are_named():
    for net in nets(0.1):
        with pytest.raises(ShapeError, match=r"\(3, 2\), expected \(8, 2\)"):
            net(torch.zeros(2, 3, 16, 16), torch.ones(3, 2))
