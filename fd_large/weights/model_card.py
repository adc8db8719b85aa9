"""The model card (README.md) of an exported student: its origin, quality and use.

A task adds its own part (`Learned`). Paths of the machine are left out of the text.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fd_large import doors, markdown
from fd_large.backbones.exports import Export
from fd_large.backbones.registry import build
from fd_large.backbones.statistics import IMAGENET, Statistics
from fd_large.errors import masked
from fd_large.markdown import escaped
from fd_large.recipes.family import FamilyArchitecture
from fd_large.recipes.left import decided_steps
from fd_large.recipes.sections import SIZE_FIELDS, Student
from fd_large.weights.libraries import LIBRARIES, To
from fd_large.weights.origin import UNKNOWN, Origin, origin_of, without_folders
from fd_large.weights.push import REPOSITORY

LOSSES = {"loss_start": "training loss, first step", "loss_end": "training loss, last step"}
"""{key in summary.json: label} of the numbers that every task has."""


@dataclass(frozen=True, kw_only=True)
class ExportedStudent:
    """Facts of an exported student for its model card, besides the recipe.

    Attributes:
        architecture: The student, with the image size of the export.
        statistics: Image statistics that the student was trained with.
        into: Names and configuration by which a library reads the student; None if `to` is a graph
            ("onnx" or "program").
        to: The export format.
        parameters: Number of elements in the student's tensors.
        manifest: The checkpoint's manifest: steps, samples, facts of the job.
        summary: Contents of the run's summary.json; empty if the run has not ended.
        sharded: Whether the tensors are in several files.
        repository: OWNER/NAME on the Hugging Face Hub, or "" without an upload.
        licence: Licence of the student by its name on the Hub; "" if unknown.
        base_model: OWNER/NAME on the Hub of the model that the student learned from; "" if the
            user did not give it.
        code_hash: SHA-256 of the user's code file that makes the student, or "".
        trained_by: Records of the training runs that led to the weights, the latest first.
    """

    architecture: FamilyArchitecture
    statistics: Statistics
    into: Export | None
    to: To
    parameters: int
    manifest: Mapping[str, Any]
    summary: Mapping[str, Any]
    sharded: bool
    repository: str = ""
    licence: str = ""
    base_model: str = ""
    code_hash: str = ""
    trained_by: Sequence[Mapping[str, Any]] = ()


@dataclass(frozen=True, kw_only=True)
class Learned:
    """The part of a model card that a task writes.

    Attributes:
        title: The heading, after the student's name.
        intro: Description of the model in a sentence or two.
        tag: Tag on the Hugging Face Hub.
        tables: {heading: {row: text}} of additional tables.
        recipe: {row: text} added to the table of the recipe.
        data: {row: text} added to the table of the images.
        metrics: {key in summary.json: label} of the entries to show.
        origins: {weights in words: their origin}, for the weights that the student learned from,
            such as "the teacher's weights"; its own initial weights are not among them.
    """

    title: str
    intro: str
    tag: str
    tables: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    recipe: Mapping[str, str] = field(default_factory=dict)
    data: Mapping[str, str] = field(default_factory=dict)
    metrics: Mapping[str, str] = field(default_factory=dict)
    origins: Mapping[str, Origin] = field(default_factory=dict)


def card(recipe: Mapping[str, Any], exported: ExportedStudent, learned: Learned) -> str:
    """Returns the text of a model card in Markdown; `recipe` has the contents of recipe.json."""
    architecture, manifest, into = exported.architecture, exported.manifest, exported.into
    recipe = masked(recipe)
    name, init = without_folders(recipe["student"]["model"]), recipe["student"]["init"]
    sizes = {name: recipe["student"][name] for name in SIZE_FIELDS}
    with torch.device("meta"):
        net = build(architecture, initialization="none", **sizes)
    side, optim, statistics = architecture.image_size, recipe["optim"], exported.statistics
    student = {
        "model": f"{name} ({architecture.family})",
        "parameters": f"{exported.parameters:,}, float32",
        **architecture.summary(),
        "map": map_of(net, side),
    }
    own_code = allowed_by(architecture.code)
    if exported.code_hash:
        student["code"] = f"{own_code or name}, SHA-256 {exported.code_hash}"
    if into:
        student["names"] = into.names(architecture)
    origins = dict(learned.origins)
    if init:
        student["started from"] = without_folders(init)
        origins["weights that it started from"] = origin_of(init, name, architecture)
    steps, without_model = manifest["update"], into is not None and not into.config
    return _template().render(
        head=_metadata(exported, learned, origins),
        name=name,
        learned=learned,
        # mmsegmentation's config.json holds no model for a backbone that it lacks.
        kind="tensors" if exported.to == "mmseg" and without_model else exported.to,
        sharded=exported.sharded,
        repository=exported.repository,
        class_name=into.class_name(architecture) if into else "",
        graph=LIBRARIES[exported.to].graph,
        own_code=own_code,
        rules=_rules(sizes),
        side=side,
        mean=list(statistics.mean),
        std=list(statistics.std),
        imagenet=statistics[:2] == IMAGENET[:2],
        prefix=net.num_prefix_tokens,
        places=math.prod(net.grid(side, side)),
        width=net.width,
        student=student,
        recipe=recipe,
        manifest=manifest,
        steps=steps,
        length=_length(optim, manifest),
        optimiser=f"AdamW (betas {optim['betas'][0]:g} {optim['betas'][1]:g})"
        if optim["name"] == "adamw"
        else without_folders(optim["name"]),
        images=without_folders(recipe["data"]["root"]),
        held_out=recipe["data"].get("val_fraction", 0),
        earlier=[
            (before["recipe"] or before["weights"], " and ".join(before["images"]) or "not known")
            for before in exported.trained_by[1:]
        ],
        samples=manifest.get("samples", steps * recipe["batch"]["global_batch_size"]),
        summary=exported.summary,
        metrics={
            words: f"{exported.summary[key]:.4f}"
            for key, words in learned.metrics.items()
            if exported.summary.get(key) is not None
        },
        licence=exported.licence,
        licences={
            whose: origin.licence + (f" ({origin.repository})" if origin.repository else "")
            for whose, origin in origins.items()
        },
    )


@cache
def _template() -> Any:
    """Returns the template model_card.md; it escapes printed values unless they are marked safe."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        finalize=lambda value: value if isinstance(value, Markup) else Markup(escaped(value)),
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        undefined=StrictUndefined,
    )
    environment.filters |= {"code": lambda value: Markup(json.dumps(value)), "ours": Markup}
    return environment.get_template("model_card.md")


def allowed_by(code: str) -> str:
    """Returns the value for `allow_code` of `load_model` that permits the code of a model.

    For `module:FOLDER/FILE.py:NAME` the result is FILE.py, and `module:PACKAGE.MODULE:NAME` is
    returned unchanged. For any other name the result is "", since an installed plugin and this
    package's own code need no permission.
    """
    name = without_folders(code) if doors.is_own(code) else ""
    file = name.removeprefix(doors.PREFIX).rpartition(":")[0]
    return file if file.endswith(".py") else name


def _rules(sizes: Mapping[str, Any]) -> str:
    """Returns arguments of `load_model`, such as ', size_rule="pad"', for the card's Python code.

    They are those of `sizes` (`Student.sizes`) that differ from the defaults; "" if none do.
    """
    usual = Student(model="").sizes()
    return "".join(
        f", {name}={json.dumps(value) if isinstance(value, str) else tuple(value)}"
        for name, value in sizes.items()
        if value and value != usual[name]
    )


def map_of(net: nn.Module, side: int) -> str:
    """Returns the map of a backbone for images of `side` pixels in words.

    For example, "14 x 14 tokens of 768 channels at 224 px, after 1 class token".
    """
    rows, columns = net.grid(side, side)
    prefix = net.num_prefix_tokens
    after = f", after {prefix} class token{'s' if prefix > 1 else ''}" if prefix else ""
    return f"{rows} x {columns} tokens of {net.width} channels at {side} px{after}"


def _metadata(exported: ExportedStudent, learned: Learned, origins: Mapping[str, Origin]) -> str:
    bases = [exported.base_model] if exported.base_model else []
    named = (origin.repository for origin in origins.values())
    bases += [repository for repository in named if REPOSITORY.fullmatch(repository)]
    kind = "segmentation" if LIBRARIES[exported.to].heads else "feature-extraction"
    return markdown.head(
        {
            "library_name": LIBRARIES[exported.to].package,
            "pipeline_tag": f"image-{kind}",
            "license": exported.licence or UNKNOWN,
            **({"base_model": list(dict.fromkeys(bases))} if bases else {}),
            "tags": [learned.tag],
        }
    )


def _length(optim: Mapping[str, Any], manifest: Mapping[str, Any]) -> str:
    """Returns the planned length of the run in words: a number of steps, or "30 epochs".

    If a time limit decided the number of steps, the text says so.
    """
    if decided := decided_steps(manifest):
        return f"{decided:,}, as many as its time limit allowed"
    most = optim["max_steps"]
    return f"{most:,}" if most else f"{optim['epochs']} epochs"
