"""The README.md of an exported student: where it comes from, how good it is, how to use it.

A task adds its own part (`Learned`). No path of the machine is in the text.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
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

# Made from the recipe as recipe.json has it, and from `_facts`.
_RECIPE = {
    "name": "{name}",
    "steps": "{steps:,} (of {total})",
    "images per step": "{batch[global_batch_size]:,}",
    "optimiser": "{optimiser}, base learning rate {optim[base_lr]:g} per 512 images, weight decay "
    "{optim[weight_decay]:g}, clip {optim[clip_norm]:g}",
    "drop path": "{student[drop_path_rate]:g}",
    "seed": "{runtime[seed]}",
    "commit of fd_large": "{commit}",
}
_DATA = {
    "images": "{images}",
    "fingerprint of their listing": "{fingerprint}",
    "samples seen": "{samples:,}",
}
LOSSES = {"loss_start": "training loss, first step", "loss_end": "training loss, last step"}
"""Numbers of summary.json that every task has, in words."""


@dataclass(frozen=True, kw_only=True)
class ExportedStudent:
    """What a model card says about an exported student, besides its recipe.

    Attributes:
        architecture: The student, with the image size of the export.
        statistics: The normalisation that it was trained with.
        into: What it becomes in the library's files; None if it goes out as a graph.
        to: The library.
        parameters: Number of its elements.
        manifest: The checkpoint's manifest: steps, samples, facts of the job.
        summary: Content of the run's summary.json; empty where the run has not ended.
        sharded: Whether the tensors are in several files.
        repository: OWNER/NAME on the Hugging Face Hub where it goes; empty: it stays here.
        licence: Its licence, as the Hub names it; empty: unknown.
        base_model: OWNER/NAME of the model on the Hub that it learned from, where the user says it.
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


@dataclass(frozen=True, kw_only=True)
class Learned:
    """What a task says of a student on its card.

    Attributes:
        title: The heading, after the student's name.
        intro: What the model is, in a sentence or two.
        tag: Tag on the Hugging Face Hub.
        tables: Tables of its own, {heading: {row: text}}.
        recipe: Rows that it adds to the table of the recipe.
        data: Rows that it adds to the table of the images.
        metrics: Numbers of summary.json that are shown, {key: words}.
        origins: Weights that it learned from besides the student's own, {whose: origin}.
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
    """Returns the text, in Markdown.

    Args:
        recipe: The recipe as recipe.json has it.
        exported: The student, its checkpoint and its files.
        learned: The task's part.
    """
    architecture, manifest = exported.architecture, exported.manifest
    recipe = masked(recipe)
    values = {**recipe, **_facts(recipe, manifest)}
    name, init = without_folders(recipe["student"]["model"]), recipe["student"]["init"]
    with torch.device("meta"):
        sizes = {name: recipe["student"][name] for name in SIZE_FIELDS}
        net = build(architecture, initialization="none", **sizes)
    side = architecture.image_size
    rows, columns = net.grid(side, side)
    prefix = net.num_prefix_tokens
    student = {
        "model": f"{name} ({architecture.family})",
        "parameters": f"{exported.parameters:,}, float32",
        **architecture.summary(),
        "map": map_of(net, side),
    }
    if exported.into:
        student["names"] = exported.into.names(architecture)
    origins = dict(learned.origins)
    if init:
        student["started from"] = without_folders(init)
        origins["weights that it started from"] = origin_of(init, name, architecture)
    tables = {
        "Student": student,
        **learned.tables,
        "Recipe": _filled(_RECIPE, values) | learned.recipe,
        "Data": _filled(_DATA, values) | learned.data,
    }
    sections = [
        _metadata(exported, learned, origins),
        f"# {escaped(name)}, {escaped(learned.title)}",
        f"{learned.intro} Made by fd_large.",
        f"## Use\n\n{_use(exported, architecture, sizes, rows * columns, prefix, net.width)}",
        _images(side, exported.statistics),
        *(_table(title, rows) for title, rows in tables.items()),
        _metrics(manifest["update"], exported.summary, learned.metrics),
        _table("Licence", {"this model": _own_licence(exported)} | _licences(origins)),
    ]
    return "\n\n".join(sections) + "\n"


def map_of(net: nn.Module, side: int) -> str:
    """Returns the words for the map that a backbone gives of images of so many pixels a side."""
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


def _own_licence(exported: ExportedStudent) -> str:
    if exported.licence:
        return exported.licence
    return f"{UNKNOWN}: whoever exported it did not say; what it learned from may bind it"


def _licences(origins: Mapping[str, Origin]) -> dict[str, str]:
    return {
        whose: origin.licence + (f" ({origin.repository})" if origin.repository else "")
        for whose, origin in origins.items()
    }


def _facts(recipe: Mapping[str, Any], manifest: Mapping[str, Any]) -> dict[str, Any]:
    """What the checkpoint's manifest adds to the recipe."""
    steps, optim = manifest["update"], recipe["optim"]
    seen = manifest.get("samples", steps * recipe["batch"]["global_batch_size"])
    return {
        "steps": steps,
        "total": _length(optim, manifest),
        "samples": seen,
        "commit": manifest.get("commit") or "not recorded",
        "images": without_folders(recipe["data"]["root"]) or "not recorded",
        "optimiser": f"AdamW (betas {optim['betas'][0]:g} {optim['betas'][1]:g})"
        if optim["name"] == "adamw"
        else without_folders(optim["name"]),
        "fingerprint": manifest.get("pictures", "not recorded"),
    }


def _length(optim: Mapping[str, Any], manifest: Mapping[str, Any]) -> str:
    """How long the whole run is, by its recipe or by what fitted into its time."""
    if decided := decided_steps(manifest):
        return f"{decided:,}, as many as its time limit allowed"
    most = optim["max_steps"]
    return f"{most:,}" if most else f"{optim['epochs']} epochs"


def _filled(rows: Mapping[str, str], values: Mapping[str, Any]) -> dict[str, str]:
    return {name: text.format_map(values) for name, text in rows.items()}


def _table(title: str, rows: Mapping[str, Any]) -> str:
    lines = [f"| {escaped(name)} | {escaped(value)} |" for name, value in rows.items()]
    return "\n".join([f"## {escaped(title)}\n", "| | |", "|---|---|", *lines])


def _metrics(steps: int, summary: Mapping[str, Any], metrics: Mapping[str, str]) -> str:
    found = {what: summary.get(key) for key, what in metrics.items()}
    rows = {what: f"{value:.4f}" for what, value in found.items() if value is not None}
    if not rows:
        return "## Metrics\n\nThe run had not ended when this was exported: none are recorded."
    text, recorded = _table("Metrics", rows), summary.get("updates")
    if recorded != steps:
        text += f"\n\nAfter {recorded} steps; the weights are of step {steps}."
    return text


def _images(side: int, statistics: Statistics) -> str:
    whose = " (ImageNet's)" if statistics[:2] == IMAGENET[:2] else ""
    return (
        f"## Images\n\nRGB in 0..1, {side} x {side} pixels, normalised by mean "
        f"{list(statistics.mean)} and standard deviation {list(statistics.std)}{whose}."
    )


# --- how it is used: code that runs as it stands, but for the names in capitals ---

_TIMM_FORWARD = """\
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
image = Image.open("IMAGE.jpg").convert("RGB")
with torch.inference_mode():
    tokens = model.forward_features(transform(image)[None])"""
_TIMM = f"""
import timm
import torch
from PIL import Image

{{folder}}
model = timm.create_model(f"local-dir:{{{{folder}}}}", pretrained=True).eval()
{_TIMM_FORWARD}
"""
# timm itself reads single files only.
_TIMM_SHARDED = f"""
from pathlib import Path

import timm
import torch
from PIL import Image
from safetensors.torch import load_file

{{folder}}
model = timm.create_model(f"local-dir:{{{{folder}}}}").eval()
files = Path(folder).glob("*.safetensors")
model.load_state_dict({{{{name: t for file in files for name, t in load_file(file).items()}}}})
{_TIMM_FORWARD}
"""
_HUGGING_FACE = """
import torch
from PIL import Image
from transformers import AutoImageProcessor, {name}

{folder}
processor = AutoImageProcessor.from_pretrained(folder)
model = {name}.from_pretrained(folder{options}).eval()
image = Image.open("IMAGE.jpg").convert("RGB")
pixels = processor(image, return_tensors="pt").pixel_values
with torch.inference_mode():
    tokens = model(pixel_values=pixels).last_hidden_state
"""
_UPERNET = """
import torch
from PIL import Image
from transformers import AutoImageProcessor, {name}

{folder}
processor = AutoImageProcessor.from_pretrained(folder)
model = {name}.from_pretrained(folder).eval()
image = Image.open("IMAGE.jpg").convert("RGB")
pixels = processor(image, return_tensors="pt").pixel_values
with torch.inference_mode():
    logits = model(pixel_values=pixels).logits
"""
_PIXELS = """image = Image.open("IMAGE.jpg").convert("RGB").resize(({side}, {side}), Image.BICUBIC)
pixels = np.asarray(image, dtype="float32") / 255
pixels = (pixels - np.float32({mean})) / np.float32({std})
pixels = pixels.transpose(2, 0, 1)[None]"""
_OURS = f"""
import numpy as np
import torch
from PIL import Image

from fd_large.weights.load import load_model

{{folder}}
{_PIXELS}
model, statistics = load_model(folder{{rules}})
with torch.inference_mode():
    tokens = model(torch.from_numpy(pixels)).tokens
"""
# Only for a backbone that mmsegmentation has: config.json holds none for another.
_MMSEG = f"""
import json
from pathlib import Path

import numpy as np
import torch
from mmseg.registry import MODELS
from mmseg.utils import register_all_modules
from safetensors.torch import load_file

from PIL import Image

{{folder}}
{_PIXELS}
register_all_modules()
model = MODELS.build(json.loads(Path(folder, "config.json").read_text())["mmsegmentation"]).eval()
files = Path(folder).glob("*.safetensors")
held = {{{{name: t for file in files for name, t in load_file(file).items()}}}}
model.load_state_dict(held, strict=False)  # Without tables of indices and counts of batches.
with torch.inference_mode():
    logits = model(torch.from_numpy(pixels))
"""
_TENSORS = """
from pathlib import Path

from safetensors.torch import load_file

{folder}
files = Path(folder).glob("*.safetensors")
tensors = {{name: t for file in files for name, t in load_file(file).items()}}
"""
_ONNX = f"""
import numpy as np
import onnxruntime
from PIL import Image

{{folder}}
{_PIXELS}
session = onnxruntime.InferenceSession(f"{{{{folder}}}}/{{graph}}")
(tokens,) = session.run(["tokens"], {{{{"images": pixels}}}})
"""
_PROGRAM = f"""
import numpy as np
import torch
from PIL import Image

{{folder}}
{_PIXELS}
model = torch.export.load(f"{{{{folder}}}}/{{graph}}").module()
with torch.inference_mode():
    tokens = model(torch.from_numpy(pixels))
"""


def _use(
    exported: ExportedStudent,
    architecture: FamilyArchitecture,
    sizes: Mapping[str, Any],
    places: int,
    prefix: int,
    width: int,
) -> str:
    to, into = exported.to, exported.into
    name = into.class_name(architecture) if into else ""
    texts = {
        "hf": _HUGGING_FACE,
        "fd": _OURS,
        "mmseg": _MMSEG,
        "upernet": _UPERNET,
        "onnx": _ONNX,
        "program": _PROGRAM,
    }
    text = texts.get(to, _TIMM_SHARDED if exported.sharded else _TIMM)
    if to == "mmseg" and into and not into.config:
        text = _TENSORS
    statistics, folder = exported.statistics, 'folder = "FOLDER"'
    if exported.repository:
        text = text.replace("from PIL", "from huggingface_hub import snapshot_download\nfrom PIL")
        folder = f"folder = snapshot_download({json.dumps(exported.repository)})"
    if to == "fd" and architecture.code:  # The user's own code is imported only where allowed.
        file = without_folders(architecture.code).removeprefix(doors.PREFIX).rpartition(":")[0]
        text = text.replace("from fd_large.w", "from fd_large import doors\nfrom fd_large.w")
        text = text.replace("model, ", f"doors.allow({json.dumps(file)})\nmodel, ")
    usual = Student(model="").sizes()
    code = text.format(
        folder=folder,
        side=architecture.image_size,
        mean=list(statistics.mean),
        std=list(statistics.std),
        graph=LIBRARIES[to].graph,
        name=name,
        # Its pooler is a head that no student has.
        options=", add_pooling_layer=False" if name == "ViTModel" else "",
        rules="".join(
            f", {name}={json.dumps(value) if isinstance(value, str) else tuple(value)}"
            for name, value in sizes.items()
            if value and value != usual[name]
        ),
    )
    tokens = ("", "the class token, then ", f"{prefix} class tokens, then ")[min(prefix, 2)]
    shape = f"`tokens` is (1, {prefix + places}, {width}): {tokens}the map, row by row."
    ours = "With fd_large: `--teacher.source FOLDER` or `--student.init FOLDER`."
    whole = (
        "`logits` is (1, classes, rows, columns). With fd_large: `--student.init FOLDER "
        "--task.segmentation.head_init FOLDER`."
    )
    after = {
        "mmseg": whole
        if text is not _TENSORS
        else "mmsegmentation has no such backbone: its "
        "tensors are under `backbone.`, those of the heads have mmsegmentation's names.",
        "upernet": whole,
        "timm": f"It is a `{name}` with config.json's `model_args`; `tokens` is what timm's "
        f"`forward_features` returns. {ours}",
        "hf": f"{shape} {ours}",
        "fd": f"{shape} {ours} `python -m fd_large weights inspect FOLDER` says what it holds.",
    }
    graph = f"{shape} It takes any number of images, of this one size."
    names = "`IMAGE.jpg` is an image of yours"
    if not exported.repository:
        names = f"`FOLDER` is the folder of this card, {names}"
    return f"{names}.\n\n```python\n{code.strip()}\n```\n\n{after.get(to, graph)}"
