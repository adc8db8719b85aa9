"""What a diagnosis found, and its files, diagnosis.json and averages.npz, for the report."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
from torch import Tensor

from fd_large.files import replacing, write_json


@dataclass(frozen=True)
class Findings:
    """What was found.

    Attributes:
        models: The figures of each model, as plain values.
        cka: {"layers": names by model, "matrix": rows of all models' layers, one after the other}.
        averages: The average attention of each model by layer, (P, P) float64.
    """

    models: list[dict[str, Any]]
    cka: dict[str, Any]
    averages: list[dict[str, Tensor]]


def write_findings(folder: Path, findings: Findings, facts: dict[str, Any]) -> dict[str, Any]:
    """Writes both files; returns the content of diagnosis.json.

    Args:
        folder: Folder of the diagnosis; it exists.
        findings: What was found.
        facts: Further plain values for diagnosis.json, such as the number of images.
    """
    arrays = {}
    for number, (model, averages) in enumerate(
        zip(findings.models, findings.averages, strict=True)
    ):
        for place, layer in enumerate(model["attention"]):
            if layer["layer"] in averages:
                average = averages[layer["layer"]].numpy().astype(numpy.float32)
                arrays[f"model_{number}_layer_{place}"] = average
    with replacing(folder / "averages.npz") as aside, aside.open("wb") as file:
        numpy.savez_compressed(file, **arrays)
    diagnosis = {**facts, "models": findings.models, "cka": findings.cka}
    write_json(folder / "diagnosis.json", diagnosis)
    return diagnosis
