"""The README.md of an exported student: where it comes from, how good it is, how to load it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from fd_large.backbones.registry import parameter_shapes
from fd_large.backbones.statistics import Statistics
from fd_large.recipes.family import FamilyArchitecture
from fd_large.recipes.run import Run
from fd_large.weights.export_config import hugging_face_class, naming, timm_class

_LIBRARIES = {"timm": "timm", "hf": "transformers", "fd": "fd_large"}
_SCHEMES = ("package:", "hf:", "open_clip:", "timm:", "module:", "random", "builtin:")
_METRICS = {
    "loss_start": "training loss, first step",
    "loss_end": "training loss, last step",
    "held_out_loss_start": "held-out loss before training",
    "held_out_loss": "held-out loss",
    "loss_best_constant": "held-out loss of the best constant map",
    "held_out_cosine": "held-out cosine to the teacher's map",
}


def card(
    run: Run,
    architecture: FamilyArchitecture,
    to: str,
    *,
    manifest: dict[str, Any],
    summary: dict[str, Any],
    statistics: Statistics,
    sharded: bool,
) -> str:
    """Returns the text, in Markdown, with no path of the machine that it was made on.

    Args:
        run: As its recipe.json has it.
        architecture: Of the student, with the image size of the run.
        to: Format.
        manifest: Of the checkpoint: steps, samples, teacher, images.
        summary: Of the run's summary.json; empty where the run has not ended.
        statistics: By which images are normalised.
        sharded: Whether the tensors are in several files.
    """
    sections = [
        f"---\nlibrary_name: {_LIBRARIES[to]}\npipeline_tag: image-feature-extraction\n"
        "tags:\n- feature-distillation\n---",
        f"# {run.student.model}, distilled from {run.teacher.model}",
        "An image backbone that learned the feature map of a frozen teacher (feature distillation, "
        "arXiv 2205.14141): no labels, no head. Made by fd_large.",
        _table("Student", _student(run, architecture, to)),
        _table("Teacher", _teacher(run, manifest)),
        _table("Recipe", _recipe(run, manifest)),
        _table("Data", _data(run, manifest)),
        _metrics(manifest, summary),
        "## Images\n\n"
        f"RGB in 0..1, {architecture.image_size} x {architecture.image_size} pixels, normalised by "
        f"mean {list(statistics.mean)} and standard deviation {list(statistics.std)} (ImageNet's).",
        f"## Loading\n\n{_loading(architecture, to, sharded=sharded)}",
    ]
    return "\n\n".join(sections) + "\n"


def without_folders(source: str) -> str:
    """Returns a source as it may be told to others: of a path the last name alone."""
    return source if source.startswith(_SCHEMES) else Path(source).name


def _table(title: str, rows: dict[str, Any]) -> str:
    lines = [f"| {name} | {value} |" for name, value in rows.items()]
    return "\n".join([f"## {title}\n", "| | |", "|---|---|", *lines])


def _student(run: Run, a: FamilyArchitecture, to: str) -> dict[str, Any]:
    rows = {
        "model": f"{run.student.model} ({a.family})",
        "parameters": f"{sum(map(math.prod, parameter_shapes(a).values())):,}, float32",
        "width, depths, heads": f"{a.embed_dim}, {_text(a.depths)}, {_text(a.num_heads)}",
        "patch": a.patch_size,
        "names": naming(a, to),
    }
    if a.is_hierarchical:
        rows["window"] = a.window_size
    if run.student.init:
        rows["started from"] = without_folders(run.student.init)
    return rows


def _teacher(run: Run, manifest: dict[str, Any]) -> dict[str, Any]:
    source = run.teacher.source
    told = without_folders(source)
    if source == "random":
        told = "**random weights**: a test or a throughput run, nothing was learned from it"
    return {
        "model": run.teacher.model,
        "weights": told,
        "hash of its weights": manifest.get("teacher_hash", "not recorded"),
    }


def _recipe(run: Run, manifest: dict[str, Any]) -> dict[str, Any]:
    optim = run.optim
    total = f"of {optim.max_steps:,}" if optim.max_steps else f"of {optim.epochs} epochs"
    return {
        "name": run.name,
        "steps": f"{manifest['update']:,} ({total})",
        "images per step": f"{run.batch.global_batch_size:,}",
        "AdamW": f"base rate {optim.base_lr:g} per 512 images, weight decay "
        f"{optim.weight_decay:g}, betas {_text(optim.betas)}, clip {optim.clip_norm:g}",
        "drop path": f"{run.student.drop_path_rate:g}",
        "loss": f"smooth L1 (beta {run.objective.beta:g}) to the whitened map",
        "seed": run.runtime.seed,
        "commit of fd_large": manifest.get("commit") or "not recorded",
    }


def _data(run: Run, manifest: dict[str, Any]) -> dict[str, Any]:
    return {
        "images": without_folders(run.data.root) or "not recorded",
        "fingerprint of their listing": manifest.get("pictures", "not recorded"),
        "samples seen": f"{_samples(run, manifest):,}",
        "crops": f"{run.data.image_size} px, {run.data.min_crop_scale:g} to 1 of the area, flipped",
    }


def _samples(run: Run, manifest: dict[str, Any]) -> int:
    return manifest.get("samples", manifest["update"] * run.batch.global_batch_size)


def _metrics(manifest: dict[str, Any], summary: dict[str, Any]) -> str:
    found = {what: summary.get(key) for key, what in _METRICS.items()}
    rows = {what: f"{value:.4f}" for what, value in found.items() if value is not None}
    if not rows:
        return "## Metrics\n\nThe run had not ended when this was exported: none are recorded."
    text = _table("Metrics", rows)
    if summary.get("updates") != manifest["update"]:
        text += (
            f"\n\nAfter {summary.get('updates')} steps; the weights are of {manifest['update']}."
        )
    return text


def _loading(a: FamilyArchitecture, to: str, *, sharded: bool) -> str:
    if to == "hf":
        theirs = hugging_face_class(a)
        bare = ", add_pooling_layer=False" if theirs == "ViTModel" else ""
        return _code(
            f"from transformers import {theirs}\n\n"
            f'model = {theirs}.from_pretrained("FOLDER"{bare})\n'
            "tokens = model(pixel_values=images).last_hidden_state  # (B, N, C)"
        )
    ours = "With fd_large: `--teacher.source FOLDER` or `--student.init FOLDER`."
    if to == "fd":
        return ours + "\n`python -m fd_large weights inspect FOLDER` tells what it holds."
    classes = f"It is a `{timm_class(a)}` with the arguments `model_args` of config.json. {ours}"
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
    return f"{_code(code)}\n\n{classes}"


def _code(text: str) -> str:
    return f"```python\n{text}\n```"


def _text(values: tuple[float, ...]) -> str:
    return " ".join(f"{value:g}" for value in values)
