"""Findings as files: diagnosis.json and averages.npz, from which the report draws."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy

from fd_large.diagnose.examine import Findings
from fd_large.runtime.run_folder import write_json


def write_findings(folder: Path, findings: Findings, facts: dict[str, Any]) -> dict[str, Any]:
    """Writes both files; returns what diagnosis.json says.

    Args:
        folder: Of the diagnosis; it is there.
        findings: What was seen.
        facts: Plain values that go in besides: how many images and the like.
    """
    arrays = {}
    for number, (model, averages) in enumerate(
        zip(findings.models, findings.averages, strict=True)
    ):
        for place, layer in enumerate(model["attention"]):
            if layer["layer"] in averages:
                average = averages[layer["layer"]].numpy().astype(numpy.float32)
                arrays[f"model_{number}_layer_{place}"] = average
    path = folder / "averages.npz"
    aside = path.with_name(path.name + ".part")
    with aside.open("wb") as file:
        numpy.savez_compressed(file, **arrays)
        file.flush()
        os.fsync(file.fileno())
    aside.replace(path)
    diagnosis = {**facts, "models": findings.models, "cka": findings.cka}
    write_json(folder / "diagnosis.json", diagnosis)
    return diagnosis
