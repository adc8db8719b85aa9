"""From FLOPs and seconds to the shares that a run reports; one definition for plan and meter.

MFU is what the run needs (student forward and backward, teacher forward) over the card's peak;
hardware utilisation also counts what is computed again.
"""

from __future__ import annotations

import logging

from fd_large.errors import ConfigError
from fd_large.plan import flops
from fd_large.plan.rates import CARDS
from fd_large.recipes.run import Run

log = logging.getLogger(__name__)


def step_flops(run: Run, micro_batch_size: int, *, on_gpu: bool) -> flops.StepFlops | None:
    """Returns the FLOPs of a micro batch; None, and a line in the log, if they are not countable.

    Args:
        run: The recipe, settled.
        micro_batch_size: Images.
        on_gpu: Whether attention's maps are made again in backward unless the recipe says.
    """
    memory = run.student.attention_memory
    again = on_gpu if memory == "auto" else memory != "keep"
    try:
        return flops.of_run(run, micro_batch_size=micro_batch_size, attention_recomputed=again)
    except ConfigError as error:
        log.info("no FLOPs, no utilisation: %s", error)
        return None


def peak_of(device_name: str) -> float | None:
    """Returns the peak FLOP/s of a card by the name that its driver gives; None: not listed."""
    words = device_name.replace("-", " ").split()
    # H100s on a PCIe card (756 TFLOP/s, NVL 835) are slower than the SXM module, A100s are not.
    if "A100" not in words and {"PCIe", "PCIE", "NVL"} & set(words):
        return None
    return next((card.peak for card in CARDS.values() if card.name.split()[0] in words), None)


def shares(
    step: flops.StepFlops | None, peak: float | None, *, micro_batches: int, seconds: float
) -> dict[str, float]:
    """Returns what is known of tflops_per_gpu, mfu and hardware_utilisation.

    Args:
        step: Of one micro batch on one rank.
        peak: FLOP/s of the card; None: unknown, as on CPUs.
        micro_batches: That a rank computed.
        seconds: In which it did.
    """
    if step is None or not micro_batches or seconds <= 0:
        return {}
    model = step.model * micro_batches / seconds
    known = {"tflops_per_gpu": model / 1e12}
    if peak:
        known["mfu"] = model / peak
        known["hardware_utilisation"] = step.hardware * micro_batches / seconds / peak
    return known
