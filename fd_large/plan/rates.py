"""Rates of a GPU and its links, for GPUs with a name here or from a file of measured rates.

These are rates of single operations, and `plan.step_time` has the fractions that whole steps reach.
`peak` is the data sheet's dense bfloat16 rate, the denominator of MFU. For the H100, the rates of
large matrix products (800 of 989 TFLOP/s) and of memory (3.0 of 3.35 TB/s) are published
measurements. For other GPUs these two rates are the data sheet's times the same fractions, 0.81 and
0.90. The rate of a link inside a node is the data sheet's rate per direction times 0.78, as the
H100 reaches 350 of 450 GB/s.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields, replace
from math import inf
from pathlib import Path
from typing import Any

from fd_large.errors import ConfigError, nearest
from fd_large.files import read_json

# Rates that may be 0: what they stand for costs nothing.
MAY_BE_0 = ("launch_seconds", "start_seconds", "hooked_share")


@dataclass(frozen=True, kw_only=True)
class Rates:
    """Rates of a GPU, or of a rank on a CPU.

    Attributes:
        name: Name for tables.
        memory_bytes: Memory of a rank, in bytes.
        peak: Peak FLOP/s, the denominator of MFU.
        matmul: FLOP/s that large matrix products reach.
        bandwidth: Bytes/s that a copy in memory reaches, where bytes read and bytes written are
            added.
        link: Bytes/s that a rank sends inside its node in collectives.
        network_share: Fraction of the network cards' rate that collectives reach.
        bfloat16: Whether parameters and matrix products are in bfloat16; otherwise in float32.
        overlap: Whether communication runs at the same time as computation: True on a GPU, False on
            a CPU, whose cores do both.
        capability: Compute capability of an NVIDIA GPU, such as "9.0", which determines the
            kernels; empty if no fused kernel runs.
        launch_seconds: Seconds to start an operation from Python. For the GPUs with a name here the
            value is an assumption, not a measurement.
        start_seconds: Seconds to start a collective. For the GPUs with a name here the value is an
            assumption, not a measurement.
        hooked_share: Factor by which the planned cost of DeepSpeed's hooks around modules with
            gathered parameters is multiplied; 0 for software without hooks.
    """

    name: str
    memory_bytes: float
    peak: float
    matmul: float
    bandwidth: float
    link: float
    network_share: float = 0.8
    bfloat16: bool = True
    overlap: bool = True
    capability: str = ""
    launch_seconds: float = 5e-6
    start_seconds: float = 30e-6
    hooked_share: float = 1.0

    def to_dict(self) -> dict[str, Any]:
        """Returns the rates as a dict of JSON types, for a file that `--rates` reads."""
        return asdict(self)


def of_data_sheet(
    name: str, capability: str, gigabytes: float, teraflops: float, terabytes: float, link: float
) -> Rates:
    """Returns the rates of a GPU from the numbers in its data sheet.

    Args:
        name: Name for tables.
        capability: Compute capability, such as "9.0".
        gigabytes: Memory in GB.
        teraflops: Dense bfloat16 (or float16) rate in TFLOP/s.
        terabytes: Bandwidth of the memory in TB/s.
        link: Rate of the link to other GPUs of the node, in GB/s per direction.
    """
    return Rates(
        name=name,
        capability=capability,
        memory_bytes=gigabytes * 1e9,
        peak=teraflops * 1e12,
        matmul=0.81 * teraflops * 1e12,
        bandwidth=0.90 * terabytes * 1e12,
        link=0.78 * link * 1e9,
    )


# From data sheets: GB of memory, TFLOP/s (dense bfloat16), TB/s of memory, GB/s per direction
# inside a node (NVLink; PCIe for the L40S).
CARDS = {
    "h100": of_data_sheet("H100 SXM 80 GB", "9.0", 80, 989, 3.35, 450),
    "h200": of_data_sheet("H200 SXM 141 GB", "9.0", 141, 989, 4.8, 450),
    "b200": of_data_sheet("B200 180 GB", "10.0", 180, 2250, 7.7, 900),
    "a100": of_data_sheet("A100 SXM 80 GB", "8.0", 80, 312, 2.039, 300),
    "a100_40": of_data_sheet("A100 SXM 40 GB", "8.0", 40, 312, 1.555, 300),
    "l40s": of_data_sheet("L40S 48 GB", "8.9", 48, 362, 0.864, 32),
}


def rates_of(gpu: str, file: str = "") -> Rates:
    """Returns the rates of a GPU, in which rates from a file replace those of the named GPU.

    Args:
        gpu: A key of `CARDS`.
        file: File with a JSON object that has any fields of `Rates`; empty for no file.

    Raises: ConfigError: if the GPU or a field is unknown, or a rate is invalid.
    """
    if gpu not in CARDS:
        raise ConfigError(
            f"--gpu: unknown GPU; got {gpu!r}, {nearest(gpu, CARDS)}. Use one of these, or "
            "measure yours: plan --probe writes a file for --rates."
        )
    if not file:
        return CARDS[gpu]
    measured = read_json(Path(file), where="--rates", holds=dict, remedy="Correct the file.")
    # Those of single tasks; `plan.phases` reads them.
    measured.pop("phases", None)
    known = {field.name: field.type for field in fields(Rates)}
    for key, value in measured.items():
        if key not in known:
            raise ConfigError(
                f"--rates: {key}: no such rate; {nearest(key, known)}. Correct {file}."
            )
        least = ("a number of 0 or more", 0.0) if key in MAY_BE_0 else ("a number above 0", 5e-324)
        if known[key] == "float" and not (type(value) in (int, float) and least[1] <= value < inf):
            raise ConfigError(
                f"--rates: {key}: invalid; got {value!r}, expected {least[0]}. Correct {file}."
            )
        for kind, type_, expected in (("bool", bool, "true or false"), ("str", str, "a name")):
            if known[key] == kind and type(value) is not type_:
                raise ConfigError(
                    f"--rates: {key}: invalid; got {value!r}, expected {expected}. Correct {file}."
                )
    return replace(CARDS[gpu], **measured)
