"""Computes products and convolutions of float32 on a GPU in full precision, without TF32."""

from __future__ import annotations

import logging
import warnings

import torch

log = logging.getLogger(__name__)


def full_float32(device: torch.device) -> None:
    """Turns off TF32, which keeps only 10 of float32's 23 mantissa bits.

    By default torch uses TF32 in cuDNN's convolutions (patch embedding, heads of detectors), and
    not in matrix products. Code that ran before in this process may have changed these defaults.

    Args:
        device: The device that will compute. If it is a GPU, a line in the log reports the change.
    """
    with warnings.catch_warnings():
        # torch 2.9 to 2.12 recommend `fp32_precision`. Once that is set, though, these two raise
        # where somebody reads them, as `torch.backends.cudnn.flags` does; and 2.8 lacks it.
        warnings.simplefilter("ignore", UserWarning)
        torch.backends.cuda.matmul.allow_tf32 = False
        torch.backends.cudnn.allow_tf32 = False
    if device.type == "cuda":
        log.debug(
            "float32 on the GPU: matrix products and convolutions in full precision (TF32 is off)"
        )
