"""The README.md of an exported student: where it comes from, how good it is, how to load it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fd_large import doors
from fd_large.backbones.registry import FAMILIES
from fd_large.engine.job import ExportedStudent
from fd_large.weights.libraries import LIBRARIES
from fd_large.weights.locate import HUB, OPEN_CLIP, PACKAGE

_SCHEMES = (
    *(PACKAGE, HUB, OPEN_CLIP, "random", "builtin:"),
    *(family.architecture.prefix for family in FAMILIES.values() if family.scheme),
)
_RANDOM = "**random weights**: a test or a throughput run, nothing was learned from it"
# Made from the recipe as recipe.json has it, and from `_facts`.
_TEACHER = {"model": "{teacher[model]}", "weights": "{taught}", "hash of its weights": "{hash}"}
_RECIPE = {
    "name": "{name}",
    "steps": "{steps:,} (of {total})",
    "images per step": "{batch[global_batch_size]:,}",
    "optimiser": "{optimiser}, base learning rate {optim[base_lr]:g} per 512 images, weight decay "
    "{optim[weight_decay]:g}, clip {optim[clip_norm]:g}",
    "drop path": "{student[drop_path_rate]:g}",
    "loss": "{loss}",
    "seed": "{runtime[seed]}",
    "commit of fd_large": "{commit}",
}
_DATA = {
    "images": "{images}",
    "fingerprint of their listing": "{fingerprint}",
    "samples seen": "{samples:,}",
    "crops": "{data[image_size]} px, {data[min_crop_scale]:g} to 1 of the area, flipped",
}
_METRICS = {
    "loss_start": "training loss, first step",
    "loss_end": "training loss, last step",
    "held_out_loss_start": "held-out loss before training",
    "held_out_loss": "held-out loss",
    "loss_best_constant": "held-out loss of the constant-prediction baseline",
    "held_out_cosine": "held-out cosine to the teacher's map",
}


def card(recipe: Mapping[str, Any], exported: ExportedStudent) -> str:
    """Returns the text, in Markdown, with no path of the machine that it was made on.

    Args:
        recipe: The recipe as recipe.json has it.
        exported: The student, its checkpoint and its files.
    """
    architecture, statistics = exported.student.architecture, exported.student.statistics
    into, to, manifest = exported.into, exported.to, exported.manifest
    values = {**recipe, **_facts(recipe, manifest)}
    name = without_folders(recipe["student"]["model"])
    student = {
        "model": f"{name} ({architecture.family})",
        "parameters": f"{exported.parameters:,}, float32",
        **architecture.summary(),
        "names": into.names(architecture),
    }
    if init := recipe["student"]["init"]:
        student["started from"] = without_folders(init)
    size = architecture.image_size
    sections = [
        f"---\nlibrary_name: {LIBRARIES[to].package}\npipeline_tag: image-feature-extraction\n"
        "tags:\n- feature-distillation\n---",
        f"# {name}, distilled from {without_folders(recipe['teacher']['model'])}",
        "An image backbone that learned the feature map of a frozen teacher (feature distillation, "
        "arXiv 2205.14141): no labels, no head. Made by fd_large.",
        _table("Student", student),
        *(
            _table(title, {name: text.format_map(values) for name, text in rows.items()})
            for title, rows in (("Teacher", _TEACHER), ("Recipe", _RECIPE), ("Data", _DATA))
        ),
        _metrics(manifest["update"], exported.summary),
        f"## Images\n\nRGB in 0..1, {size} x {size} pixels, normalised by mean "
        f"{list(statistics.mean)} and standard deviation {list(statistics.std)} (ImageNet's).",
        f"## Loading\n\n{_loading(into.class_name(architecture), to, sharded=exported.sharded)}",
    ]
    return "\n\n".join(sections) + "\n"


def without_folders(source: str) -> str:
    """Returns a source as others may see it: of a path the last name alone."""
    if doors.is_own(source):
        return doors.PREFIX + Path(source.removeprefix(doors.PREFIX)).name
    return source if source.startswith(_SCHEMES) else Path(source).name


def _facts(recipe: Mapping[str, Any], manifest: Mapping[str, Any]) -> dict[str, Any]:
    """What the checkpoint's manifest adds to the recipe."""
    steps, optim, taught = manifest["update"], recipe["optim"], recipe["teacher"]["source"]
    seen = manifest.get("samples", steps * recipe["batch"]["global_batch_size"])
    total = f"{optim['max_steps']:,}" if optim["max_steps"] else f"{optim['epochs']} epochs"
    return {
        "steps": steps,
        "total": total,
        "samples": seen,
        "taught": _RANDOM if taught == "random" else without_folders(taught),
        "hash": manifest.get("teacher_hash", "not recorded"),
        "commit": manifest.get("commit") or "not recorded",
        "images": without_folders(recipe["data"]["root"]) or "not recorded",
        "optimiser": f"AdamW (betas {optim['betas'][0]:g} {optim['betas'][1]:g})"
        if optim["name"] == "adamw"
        else without_folders(optim["name"]),
        "loss": _loss(recipe["objective"]),
        "fingerprint": manifest.get("pictures", "not recorded"),
    }


def _loss(objective: Mapping[str, Any]) -> str:
    """The loss in words: the published one, or the names in the recipe."""
    names = {name: objective[name] for name in ("loss", "normaliser", "head")}
    if tuple(names.values()) == ("smooth_l1", "whitening", "linear"):
        return f"smooth L1 (beta {objective['beta']:g}) to the whitened map"
    return ", ".join(f"{name} {without_folders(value)}" for name, value in names.items())


def _table(title: str, rows: Mapping[str, Any]) -> str:
    lines = [f"| {name} | {value} |" for name, value in rows.items()]
    return "\n".join([f"## {title}\n", "| | |", "|---|---|", *lines])


def _metrics(steps: int, summary: Mapping[str, Any]) -> str:
    found = {what: summary.get(key) for key, what in _METRICS.items()}
    rows = {what: f"{value:.4f}" for what, value in found.items() if value is not None}
    if not rows:
        return "## Metrics\n\nThe run had not ended when this was exported: none are recorded."
    text, recorded = _table("Metrics", rows), summary.get("updates")
    if recorded != steps:
        text += f"\n\nAfter {recorded} steps; the weights are of step {steps}."
    return text


def _loading(theirs: str, to: str, *, sharded: bool) -> str:
    if to == "hf":
        bare = ", add_pooling_layer=False" if theirs == "ViTModel" else ""
        return _code(
            f"from transformers import {theirs}\n\n"
            f'model = {theirs}.from_pretrained("FOLDER"{bare})\n'
            "tokens = model(pixel_values=images).last_hidden_state  # (B, N, C)"
        )
    ours = "With fd_large: `--teacher.source FOLDER` or `--student.init FOLDER`."
    if to == "fd":
        return ours + "\n`python -m fd_large weights inspect FOLDER` says what it holds."
    code = (
        "import timm\n\n"
        'model = timm.create_model("local-dir:FOLDER", pretrained=True)\n'
        "tokens = model.forward_features(images)"
    )
    if sharded:  # timm itself reads single files only.
        code = (
            "from pathlib import Path\n\nimport timm\nfrom safetensors.torch import load_file\n\n"
            'model = timm.create_model("local-dir:FOLDER")\n'
            'files = sorted(Path("FOLDER").glob("*.safetensors"))\n'
            "model.load_state_dict({n: t for file in files for n, t in load_file(file).items()})\n"
            "tokens = model.forward_features(images)"
        )
    return f"{_code(code)}\n\nIt is a `{theirs}` with config.json's `model_args`. {ours}"


def _code(text: str) -> str:
    return f"```python\n{text}\n```"
