"""Utilisation from FLOPs and seconds, and the peak of a card by its driver's name."""

import pytest

from fd_large.plan.counts import StepFlops
from fd_large.plan.utilisation import peak_flops, shares

STEP = StepFlops(model=390, hardware=490)


def test_shares_by_hand():
    found = shares([STEP, STEP], 1e3, micro_batches=2, seconds=2.0)
    assert found == {
        "tflops_per_gpu": pytest.approx(390 * 4 / 2 / 1e12),
        "mfu": pytest.approx(0.78),
        "hardware_utilisation": pytest.approx(0.98),
    }
    # One of two students: a half of each of the frozen models' passes.
    part = shares([STEP._replace(frozen=90).shared_by(2)], 1e3, micro_batches=4, seconds=2.0)
    assert part["mfu"] == pytest.approx((390 * 4 - 90 * 2) / 2e3)
    assert part["hardware_utilisation"] == pytest.approx((490 * 4 - 90 * 2) / 2e3)
    assert STEP._replace(frozen=90).shared_by(1) == STEP._replace(frozen=90)
    assert shares([STEP], None, micro_batches=4, seconds=2.0).keys() == {"tflops_per_gpu"}
    assert shares([], 1e3, micro_batches=4, seconds=0.0) == {}


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA A100-SXM4-40GB", 312e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA A100-PCIE-40GB", 312e12),
        ("NVIDIA H100 PCIe", None),
        ("NVIDIA H100 NVL", None),
        ("NVIDIA GH200 480GB", None),
        ("NVIDIA GeForce GTX 1080", None),
    ],
)
def test_peaks_by_name(name, peak):
    assert peak_flops(name) == peak
