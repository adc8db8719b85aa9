"""Computes the utilisation that a run reports: TFLOP/s, MFU, hardware utilisation.

MFU is the FLOPs that the run needs (student forward and backward, teacher forward) over the card's
peak; hardware utilisation also counts recomputation. Each of several students counts its own
FLOPs and an equal part of the shared frozen models' forward, over the seconds of the common step,
so that the students' numbers add up to that of the card.
"""

from __future__ import annotations

from collections.abc import Iterable

from fd_large.plan.counts import StepFlops
from fd_large.plan.rates import CARDS


def peak_flops(device_name: str) -> float | None:
    """Returns the peak FLOP/s of a card by its driver's name, or None if unknown."""
    words = device_name.replace("-", " ").split()
    # H100s on a PCIe card (756 TFLOP/s, NVL 835) are slower than the SXM module; A100s are not.
    if "A100" not in words and {"PCIe", "PCIE", "NVL"} & set(words):
        return None
    return next((card.peak for card in CARDS.values() if card.name.split()[0] in words), None)


def shares(
    steps: Iterable[StepFlops], peak: float | None, *, micro_batches: int, seconds: float
) -> dict[str, float]:
    """Returns tflops_per_gpu, mfu and hardware_utilisation, as far as known.

    Args:
        steps: FLOPs of one micro-batch on one rank in each step; empty if unknown.
        peak: Peak FLOP/s of the card; None if it is unknown, as on CPUs.
        micro_batches: Micro-batches of a rank in a step.
        seconds: Seconds in which the rank took the steps.
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
