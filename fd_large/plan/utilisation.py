"""Computes the utilisation that a run reports: TFLOP/s, MFU and hardware utilisation.

MFU is the FLOP/s that the run requires (student forward and backward, teacher forward), divided by
the GPU's peak. Hardware utilisation also counts recomputation. If several students train together,
a student's number counts its own FLOPs and an equal part of the frozen models' FLOPs, over the
seconds of the common step. So the numbers of all students add up to the utilisation of the GPU.
"""

from __future__ import annotations

from collections.abc import Iterable

from fd_large.plan.counts import StepFlops
from fd_large.plan.rates import CARDS


def peak_flops(device_name: str) -> float | None:
    """Returns the peak FLOP/s of a GPU, or None if it is not known.

    Args:
        device_name: Name of the GPU, as its driver returns it.
    """
    words = device_name.replace("-", " ").split()
    # H100s on a PCIe card (756 TFLOP/s, NVL 835) are slower than the SXM module; A100s are not.
    if "A100" not in words and {"PCIe", "PCIE", "NVL"} & set(words):
        return None
    return next((card.peak for card in CARDS.values() if card.name.split()[0] in words), None)


def shares(
    steps: Iterable[StepFlops], peak: float | None, *, micro_batches: int, seconds: float
) -> dict[str, float]:
    """Computes the utilisation of a rank in some steps.

    Args:
        steps: FLOPs of one micro-batch on one rank in each step; empty if they are not known.
        peak: Peak FLOP/s of the GPU; None if it is not known, as on CPUs.
        micro_batches: Number of micro-batches of a rank in a step.
        seconds: Seconds in which the rank took the steps.

    Returns: a dict with `tflops_per_gpu`, and, if the peak is known, `mfu` and
        `hardware_utilisation` as fractions of it; empty if the FLOPs are not known.
    """
    counted = list(steps)
    if not counted or seconds <= 0:
        return {}
    model, hardware = (
        sum(getattr(step, name) for step in counted) * micro_batches / seconds
        for name in ("model", "hardware")
    )
    known = {"tflops_per_gpu": model / 1e12}
    if peak:
        known["mfu"] = model / peak
        known["hardware_utilisation"] = hardware / peak
    return known
