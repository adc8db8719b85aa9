"""TF32 is off, whatever was set before, and its switches stay readable."""

import logging

import pytest
import torch

from fd_large.kernels.precision import full_float32


@pytest.fixture
def allowed():
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def test_tf32_is_off_and_said_on_a_gpu(allowed, caplog):
    caplog.set_level(logging.DEBUG)
    full_float32(torch.device("cpu"))
    assert not caplog.records
    full_float32(torch.device("cuda", 0))
    assert "TF32 is off" in caplog.text
    assert not torch.backends.cuda.matmul.allow_tf32
    assert not torch.backends.cudnn.allow_tf32
    assert torch.get_float32_matmul_precision() == "highest"
    # Raises where the old and the new switches disagree.
    with torch.backends.cudnn.flags(enabled=True):
        assert torch.backends.cudnn.enabled
