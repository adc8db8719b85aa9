"""The README.md of an exported student: where it comes from, how good it is, how to load it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fd_large.backbones.exports import Export
from fd_large.backbones.statistics import Statistics
from fd_large.recipes.family import FamilyArchitecture
from fd_large.recipes.sections import Data, FrozenModel, Optim, Student

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
    name: str,
    architecture: FamilyArchitecture,
    into: Export,
    to: str,
    *,
    student: Student,
    teacher: FrozenModel,
    optim: Optim,
    data: Data,
    global_batch_size: int,
    beta: float,
    seed: int,
    parameters: int,
    manifest: dict[str, Any],
    summary: dict[str, Any],
    statistics: Statistics,
    sharded: bool,
) -> str:
    """Returns the text, in Markdown, with no path of the machine that it was made on.

    Args:
        name: Name of the recipe.
        architecture: The student, with the image size of the run.
        into: What it becomes in the library's files.
        to: "timm", "hf" or "fd".
        student: Section of the run's recipe, as are teacher, optim and data.
        teacher: See above.
        optim: See above.
        data: See above.
        global_batch_size: Images of a step.
        beta: Where the smooth L1 loss turns from a square to a line.
        seed: Seed of the run.
        parameters: Elements of the student.
        manifest: Of the checkpoint: steps, samples, teacher, images.
        summary: Contents of the run's summary.json; empty where the run has not ended.
        statistics: By which images are normalised.
        sharded: Whether the tensors are in several files.
    """
    steps, epochs = manifest["update"], optim.epochs
    sections = [
        f"---\nlibrary_name: {_LIBRARIES[to]}\npipeline_tag: image-feature-extraction\n"
        "tags:\n- feature-distillation\n---",
        f"# {student.model}, distilled from {teacher.model}",
        "An image backbone that learned the feature map of a frozen teacher (feature distillation, "
        "arXiv 2205.14141): no labels, no head. Made by fd_large.",
        _table("Student", _student(student, architecture, into.names(architecture), parameters)),
        _table(
            "Teacher",
            {
                "model": teacher.model,
                "weights": without_folders(teacher.source)
                if teacher.source != "random"
                else "**random weights**: a test or a throughput run, nothing was learned from it",
                "hash of its weights": manifest.get("teacher_hash", "not recorded"),
            },
        ),
        _table(
            "Recipe",
            {
                "name": name,
                "steps": f"{steps:,} (of "
                f"{f'{optim.max_steps:,}' if optim.max_steps else f'{epochs} epochs'})",
                "images per step": f"{global_batch_size:,}",
                "AdamW": f"base learning rate {optim.base_lr:g} per 512 images, weight decay "
                f"{optim.weight_decay:g}, betas {_text(optim.betas)}, clip {optim.clip_norm:g}",
                "drop path": f"{student.drop_path_rate:g}",
                "loss": f"smooth L1 (beta {beta:g}) to the whitened map",
                "seed": seed,
                "commit of fd_large": manifest.get("commit") or "not recorded",
            },
        ),
        _table(
            "Data",
            {
                "images": without_folders(data.root) or "not recorded",
                "fingerprint of their listing": manifest.get("pictures", "not recorded"),
                "samples seen": f"{manifest.get('samples', steps * global_batch_size):,}",
                "crops": f"{data.image_size} px, {data.min_crop_scale:g} to 1 of the area, flipped",
            },
        ),
        _metrics(steps, summary),
        "## Images\n\n"
        f"RGB in 0..1, {architecture.image_size} x {architecture.image_size} pixels, normalised by "
        f"mean {list(statistics.mean)} and standard deviation {list(statistics.std)} (ImageNet's).",
        f"## Loading\n\n{_loading(into.class_name(architecture), to, sharded=sharded)}",
    ]
    return "\n\n".join(sections) + "\n"


def without_folders(source: str) -> str:
    """Returns a source as it may be told to others: of a path the last name alone."""
    return source if source.startswith(_SCHEMES) else Path(source).name


def _table(title: str, rows: dict[str, Any]) -> str:
    lines = [f"| {name} | {value} |" for name, value in rows.items()]
    return "\n".join([f"## {title}\n", "| | |", "|---|---|", *lines])


def _student(student: Student, a: Any, names: str, parameters: int) -> dict[str, Any]:
    rows = {
        "model": f"{student.model} ({a.family})",
        "parameters": f"{parameters:,}, float32",
        "width, depths, heads": f"{a.embed_dim}, {_text(a.depths)}, {_text(a.num_heads)}",
        "patch": a.patch_size,
        "names": names,
    }
    if a.is_hierarchical:
        rows["window"] = a.window_size
    if student.init:
        rows["started from"] = without_folders(student.init)
    return rows


def _metrics(steps: int, summary: dict[str, Any]) -> str:
    found = {what: summary.get(key) for key, what in _METRICS.items()}
    rows = {what: f"{value:.4f}" for what, value in found.items() if value is not None}
    if not rows:
        return "## Metrics\n\nThe run had not ended when this was exported: none are recorded."
    text = _table("Metrics", rows)
    if summary.get("updates") != steps:
        text += f"\n\nAfter {summary.get('updates')} steps; the weights are of step {steps}."
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
        return ours + "\n`python -m fd_large weights inspect FOLDER` tells what it holds."
    classes = f"It is a `{theirs}` with the arguments `model_args` of config.json. {ours}"
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
