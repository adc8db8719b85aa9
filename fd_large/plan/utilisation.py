"""What a run reports of FLOPs and seconds: TFLOP/s, MFU and hardware utilisation.

MFU is the FLOPs that the run needs (student forward and backward, teacher forward) over the card's
peak; hardware utilisation also counts what is computed again. Of several students each counts its
own and an equal part of the frozen models' forward, which all share, over the seconds of the step
of all: the students' numbers add up to those of the card.
"""

from __future__ import annotations

from fd_large.plan.counts import StepFlops
from fd_large.plan.rates import CARDS


def peak_flops(device_name: str) -> float | None:
    """Returns the peak FLOP/s of a card by its driver's name; None if it is not listed."""
    words = device_name.replace("-", " ").split()
    # H100s on a PCIe card (756 TFLOP/s, NVL 835) are slower than the SXM module; A100s are not.
    if "A100" not in words and {"PCIe", "PCIE", "NVL"} & set(words):
        return None
    return next((card.peak for card in CARDS.values() if card.name.split()[0] in words), None)


def shares(
    step: StepFlops | None,
    peak: float | None,
    *,
    micro_batches: int,
    seconds: float,
    frozen: float | None = None,
) -> dict[str, float]:
    """Returns tflops_per_gpu, mfu and hardware_utilisation, as far as they are known.

    Args:
        step: FLOPs of one micro-batch on one rank; None if they are unknown.
        peak: Peak FLOP/s of the card; None if it is unknown, as on CPUs.
        micro_batches: Micro-batches that a rank computed.
        seconds: Seconds in which it did.
        frozen: Micro-batches of the frozen models that count: a half of each that two students
            share. None: all.
    """
    if step is None or not micro_batches or seconds <= 0:
        return {}
    of_others = step.frozen * (0 if frozen is None else micro_batches - frozen)
    model = (step.model * micro_batches - of_others) / seconds
    known = {"tflops_per_gpu": model / 1e12}
    if peak:
        known["mfu"] = model / peak
        hardware = step.hardware * micro_batches - of_others
        known["hardware_utilisation"] = hardware / seconds / peak
    return known
