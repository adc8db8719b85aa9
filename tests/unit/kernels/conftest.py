"""Where the kernels run, and how close they must come."""

from __future__ import annotations

import os

import pytest
import torch

from fd_large.kernels import choose


@pytest.fixture(scope="session")
def device() -> str:
    """Where Triton can run: a GPU, or the CPU in Triton's interpreter."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        return "cpu"
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device or TRITON_INTERPRET=1")
    return "cuda"


@pytest.fixture
def chosen():
    """Which operations ran on what, in order; fresh choices for a test that changes the wish."""
    choose.reset()
    with choose.hearing() as heard:
        yield heard
    choose.reset()
