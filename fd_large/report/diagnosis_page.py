"""The page of a diagnosis: a table, then each picture with two sentences."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fd_large.report import html

SENTENCES = {
    "attention_distance": (
        "Attention distance",
        "How far a head looks: the distance from a patch to what it attends to, weighted by the "
        "attention, in pixels of the images that the model gets (CLS and other prefix tokens left "
        "out); a dot is a head, the line their mean. Short distances are local heads, long ones "
        "global; in windows none is longer than a window.",
    ),
    "head_similarity": (
        "Similarity of heads",
        "The cosine between the attention maps of two heads of a layer, the mean over pairs and "
        "images. At 1 all heads do the same; the lower, the more they differ.",
    ),
    "average_attention": (
        "Average attention",
        "Attention from every patch (rows) to every patch (columns), the mean over heads and "
        "images; patches run row by row through the image, or through the window. Diagonal stripes "
        "mean that a patch looks at a fixed offset, vertical ones that all patches look at the "
        "same place.",
    ),
    "translation_score": (
        "Translation score",
        "How much of the average attention depends on the offset between two patches alone: the "
        "share of its variance that the nearest map of that kind explains. 1 is a model whose "
        "attention, on average, is the same everywhere in the image, noise has about 0; hollow "
        "points are layers of nearly uniform attention, where there is little to explain.",
    ),
    "landscape": (
        "Loss landscape, curves",
        "The loss as the weights move along random directions, each filter as far as it is long; "
        "a line is a direction, the dot the model itself, and models with the same loss have one "
        "scale. Flat around the dot means that small changes of the weights do little harm, which "
        "is thought to ease fine-tuning.",
    ),
    "landscape_map": (
        "Loss landscape, map",
        "The same over the plane of two such directions, the model in the middle. Wide, round "
        "contours are an even valley; narrow or ragged ones a hard one.",
    ),
    "cka": (
        "Similarity of layers",
        "Linear CKA between the features of two blocks: 1 where one is a rotated copy of the "
        "other, 0 where they have nothing in common. A panel compares two models, or a model with "
        "itself; the last row and column are the model's final map.",
    ),
}


def write_page(folder: Path, diagnosis: dict[str, Any], pictures: list[Path]) -> Path:
    """Writes index.md beside the pictures; returns its path."""
    models = diagnosis["models"]
    lines = [
        "# Diagnosis",
        "",
        f"{diagnosis['images']} images of `{diagnosis['root']}`, {diagnosis['seconds']:.0f} s on "
        f"{diagnosis['device']}. Numbers: `diagnosis.json`, `averages.npz`.",
        "",
        *_table(models),
        "",
        *_losses(models),
    ]
    for picture in pictures:
        heading, text = SENTENCES[picture.stem]
        lines += ["", f"## {heading}", "", f"![{heading}]({picture.name})", "", text]
    path = folder / "index.md"
    path.write_text("\n".join(lines) + "\n")
    return path


def write_html(folder: Path, diagnosis: dict[str, Any], pictures: list[Path]) -> Path:
    """Writes report.html, with the pictures inside; returns its path."""
    models = diagnosis["models"]
    of_models = [summary(model) for model in models]
    rows = [(name, *(figures[name] for figures in of_models)) for name in of_models[0]]
    losses = [(m["label"], f"{m['landscape']['loss']}, {m['landscape']['images']} images")
              for m in models]  # fmt: skip
    return html.write(
        folder / "report.html",
        "Diagnosis",
        (
            html.section("Models", html.table(rows, head=("", *(m["label"] for m in models)))),
            *(
                html.section(heading, html.picture(picture, heading, words))
                for picture in pictures
                for heading, words in (SENTENCES[picture.stem],)
            ),
            html.section("The loss of each model", html.table(losses)),
            html.section("Sources", html.table([(m["label"], m["source"]) for m in models])),
        ),
        below=f"{diagnosis['images']} images of {diagnosis['root']}, {diagnosis['seconds']:.0f} s "
        f"on {diagnosis['device']}",
    )


def summary(model: dict[str, Any]) -> dict[str, str]:
    """Returns a model's figures in words: means over its attention layers, and its loss."""
    layers, landscape = model["attention"], model["landscape"]
    deep = layers[-max(1, len(layers) // 3) :]
    distance = _mean([sum(x["distance_pixels"]) / x["heads"] for x in layers])
    return {
        "parameters": f"{model['parameters'] / 1e6:.2f} M",
        "images": f"{model['image_size']} px",
        "attention distance": "none" if distance is None else f"{distance:.1f} px",
        "similarity of heads": _number(_mean([x["head_similarity"] for x in layers])),
        "- in its deep third": _number(_mean([x["head_similarity"] for x in deep])),
        "- among patches": _number(_mean([x.get("patch_similarity") for x in layers])),
        "- both": _number(_mean([x.get("patch_similarity") for x in deep])),
        "translation score": _number(_mean([x["translation_score"] for x in layers])),
        "loss": f"{landscape['value']:.4f}",
        "loss at 0.1": _number(_near(landscape), 4),
    }


def _table(models: list[dict[str, Any]]) -> list[str]:
    rows = [{"": f"`{model['source']}`", **summary(model)} for model in models]
    return [
        f"| {' | '.join(rows[0])} |",
        f"|{'---|' * len(rows[0])}",
        *(f"| {' | '.join(row.values())} |" for row in rows),
    ]


def _losses(models: list[dict[str, Any]]) -> list[str]:
    seen = [(model["label"], model["landscape"]) for model in models]
    said = [f"- {label}: {of['loss']}, on {of['images']} images" for label, of in seen]
    return ["The loss of each model (docs/diagnose.md says why):", "", *said]


def _near(landscape: dict[str, Any]) -> float | None:
    """Returns the mean over directions of the loss at steps of a tenth, both ways."""
    near = [i for i, step in enumerate(landscape["steps"]) if abs(abs(step) - 0.1) < 1e-6]
    return _mean([curve[i] for curve in landscape["curves"] for i in near])


def _mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _number(value: float | None, digits: int = 2) -> str:
    return "none" if value is None else f"{value:z.{digits}f}"
