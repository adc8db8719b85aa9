"""Writes the model card's text on a distilled student's teachers, losses and crops."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, replace
from typing import Any

import torch

from fd_large.backbones.registry import build
from fd_large.errors import FDError
from fd_large.recipes.architectures import changed_words, full_name, image_side_of, resolve
from fd_large.recipes.sections import Data
from fd_large.tasks.distillation.section import (
    SUMMARY,
    NamedTeacher,
    Objective,
    cached_folder,
    labels_of,
)
from fd_large.weights.model_card import LOSSES, Learned, map_of
from fd_large.weights.origin import is_random, origin_of, without_folders

_RANDOM = "**random weights**: a test or a throughput run, nothing was learned from it"
_METRICS = {
    "held_out_loss_start": "held-out loss before training",
    "held_out_loss": "held-out loss",
    "loss_best_constant": "held-out loss of the constant-prediction baseline",
    "held_out_cosine": "held-out cosine to the teacher's map",
}


def learned(
    entries: Mapping[str, NamedTeacher], facts: Mapping[str, Mapping[str, Any]], data: Data
) -> Learned:
    """Returns what the model card of a distilled student says on its teachers and their losses.

    Args:
        entries: The teachers by name; "" names a single teacher.
        facts: What the manifest records on each teacher, by the teacher's name
            (`facts_by_teacher`).
        data: The recipe's section `data`.
    """
    entries = {
        # The source of cached targets is a folder; the manifest names the teacher.
        name: replace(entry, source=facts.get(name, {}).get("teacher_source", entry.source))
        if cached_folder(entry.source)
        else entry
        for name, entry in entries.items()
    }
    models = {name: without_folders(full_name(asdict(entry))) for name, entry in entries.items()}
    alike = len(set(models.values())) < len(models)
    titles = [f"{model} ({name})" if alike else model for name, model in models.items()]
    return Learned(
        title=f"distilled from {' and '.join(titles)}",
        intro="An image backbone that learned the feature "
        + ("map of a frozen teacher" if "" in entries else "maps of frozen teachers")
        + " (feature distillation, arXiv 2205.14141) without labels. With a folder `heads`, "
        "`fd_large.load_student(FOLDER).teacher_map(NAME, images)` guesses a teacher's map.",
        tag="feature-distillation",
        tables={
            f"Teacher {name}".strip(): {
                "model": models[name],
                **_shape(entry, data.image_size),
                "weights": _RANDOM if is_random(entry.source) else without_folders(entry.source),
                "hash of its weights": facts.get(name, {}).get("teacher_hash", "not recorded"),
            }
            for name, entry in entries.items()
        },
        recipe={
            f"loss of {name}" if name else "loss": _losses(entry) for name, entry in entries.items()
        },
        data={"crops": f"{data.image_size} px, {data.min_crop_scale:g} to 1 of the area, flipped"},
        metrics=LOSSES | _METRICS | _metrics_of(entries),
        origins={
            f"the weights of {name}" if name else "the teacher's weights": origin_of(
                entry.source, entry.model, resolve(entry.model, entry.architecture)
            )
            for name, entry in entries.items()
        },
    )


def _shape(entry: NamedTeacher, image_size: int) -> dict[str, str]:
    """Returns rows of the model card's table on a teacher, as {label: words}.

    The rows are on the teacher's map, on the images that the teacher gets, and on changed fields of
    the teacher's architecture. Rows for default settings are left out.

    Args:
        entry: The teacher.
        image_size: Side of the student's images, in pixels.
    """
    rows, section = {}, asdict(entry)
    if changed := changed_words(section):
        rows["changed fields"] = changed
    if side := image_side_of(section, image_size):
        architecture = resolve(entry.model, entry.architecture)
        # A model whose code may not be imported here is left out.
        with suppress(FDError), torch.device("meta"):
            rows["map"] = map_of(build(architecture, initialization="none"), side)
    if entry.mosaic:
        rows["mosaic"] = f"{entry.mosaic} x {entry.mosaic} images at once"
    if entry.layer != Objective.layer:
        rows["layer"] = entry.layer
    if entry.statistics:
        rows["mean and deviation of its images"] = " ".join(
            f"{value:g}" for value in entry.statistics
        )
    return rows


def _metrics_of(entries: Mapping[str, NamedTeacher]) -> dict[str, str]:
    """Returns {name of a held-out metric of a target: its label}, for the loss and the cosine.

    The result is empty for a single teacher, whose target has no label.

    Args:
        entries: The teachers by name; "" names a single teacher.
    """
    return {
        f"held_out_{label}_{metric}": f"held-out {metric} of {label.replace('_', ' ')}"
        for label in labels_of(entries)
        if label
        for metric in ("loss", "cosine")
    }


def _losses(entry: NamedTeacher) -> str:
    """Returns the losses of a teacher's targets in words, with the weights that are not 1.

    Args:
        entry: The teacher.
    """
    words = []
    for kind in entry.targets:
        weight = entry.weight_of(kind)
        words.append(f"{weight:g} x " * (weight != 1) + _loss(entry, kind))
    return "; ".join(words)


def _loss(entry: NamedTeacher, kind: str) -> str:
    """Returns a target's loss in words.

    The words describe the paper's loss; for another loss they are the names of loss, normaliser and
    head.

    Args:
        entry: The target's teacher.
        kind: "map" or "summary".
    """
    names = {name: entry.setting(name, kind) for name in ("loss", "normaliser", "head")}
    if tuple(names.values()) == ("smooth_l1", "whitening", "linear"):
        return f"smooth L1 (beta {entry.beta:g}) to the whitened {kind}"
    words = ", ".join(f"{name} {without_folders(value)}" for name, value in names.items())
    return f"{kind}: {words}" if kind == SUMMARY else words
