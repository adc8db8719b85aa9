"""Scores a file of detections in COCO's results format, without a model and without torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fd_large.errors import ConfigError
from fd_large.files import check_out, kind_of, write_json
from fd_large.tasks.detection.scores.results import read_results
from fd_large.tasks.detection.scores.scoring import read_ground_truth, score
from fd_large.tasks.detection.scores.tables import classes_table, numbers_table
from fd_large.tasks.detection.section import ScoredFiles


def score_files(files: ScoredFiles) -> tuple[Sequence[Any], Sequence[Path]]:
    """Scores a file of detections against annotations; writes the scores if `files.json` is set.

    Args:
        files: The flags of `evaluate` that name the files.

    Returns: the tables for the terminal, and the paths of the written files.
    Raises: FDError: if a file is missing, cannot be scored, or cannot be written.
    """
    if not (files.detections and files.annotations):
        raise ConfigError(
            "--detections: scored against --annotations; got one of the two flags, expected both. "
            "Set both flags."
        )
    if files.json and kind_of(Path(files.json).resolve().parent, where="--json") != "folder":
        raise ConfigError(
            f"--json: no folder to write into; got {files.json!r}, expected a file in a folder "
            "that exists. Make the folder, or choose another one."
        )
    if files.json:
        check_out(files.json, where="--json", holds="file")
    scores = score(read_ground_truth(files.annotations), read_results(files.detections))
    written = [Path(files.json)] if files.json else []
    for path in written:
        write_json(path, scores.to_dict())
    return (numbers_table(scores), classes_table(scores)), written
