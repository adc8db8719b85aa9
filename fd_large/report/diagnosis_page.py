"""Writes the page of a diagnosis, with a table and an explanation of each plot."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy

from fd_large.files import unlinked
from fd_large.markdown import code, escaped
from fd_large.recipes.file_names import PAGE
from fd_large.report import html
from fd_large.report.diagnosis import (
    Landscape,
    Model,
    changes,
    deep_layers,
    kinds_of,
    landscape_of,
    own_losses,
)

SENTENCES = {
    "attention_distance": (
        "Attention distance",
        "How far a head looks: the distance from a patch to what it attends to, weighted by the "
        "attention, in pixels of the images that the model gets (CLS and other prefix tokens left "
        "out); a dot is a head, the line their mean. Short distances are local heads, long ones "
        "global; in windowed models no distance is longer than a window.",
    ),
    "head_similarity": (
        "Similarity of heads",
        "The cosine between the attention maps of two heads of a layer, averaged over pairs of "
        "heads and over images: for whole maps, and (dashed) for attention among patches, without "
        "CLS and other prefix tokens. At 1 all heads do the same; where all heads attend to CLS, "
        "their whole maps are alike; grey is the deep third of the layers, in which the paper's "
        "students have more diverse heads than a CLIP teacher.",
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
        "share of its variance that the nearest map of that kind explains, with the same model of "
        "random weights beside it (grey); hollow points are layers of nearly uniform attention, "
        "where there is little to explain. A table of relative positions adds the same term to the "
        "attention of every patch and raises the score by itself, so compare models of the same "
        "kind of positions, and with their random weights.",
    ),
    "landscape": (
        "Loss landscapes, curves",
        "The loss as the weights move along random directions (at step 1 each filter has moved by "
        "its own norm): a line is the mean over batches along one direction, its band the "
        "standard deviation between batches of the change in loss, and the dot the model itself. "
        "Flat around the dot means that small changes of the weights do little harm; panels of a "
        "row whose losses can be compared (see the list below the table) have vertical axes that "
        "cover equally large ranges (the panel of a model that is far steeper or flatter than the "
        "others says so), and losses of different rows cannot be compared.",
    ),
    "landscape_map": (
        "Loss landscapes, maps",
        "The same over the plane of two such directions, on the first batch, the model in the "
        "middle. Wide, round contours are an even valley, narrow or ragged contours a hard "
        "valley; a model that is far steeper or flatter than the others has a scale of its own "
        "here too.",
    ),
    "cka": (
        "Similarity of layers",
        "Linear CKA between the features of two blocks: 1 where one is a rotated copy of the "
        "other, 0 where they have nothing in common. A panel compares two models, or a model with "
        "itself; the last row and column are the model's final map.",
    ),
}


def write_page(folder: Path, diagnosis: dict[str, Any], pictures: list[Path]) -> Path:
    """Writes index.md, the page of a diagnosis, into `folder`; returns its path.

    Args:
        folder: Folder of the plots.
        diagnosis: Content of diagnosis.json.
        pictures: Paths of the plots.
    """
    models = diagnosis["models"]
    rows = table(models)
    head = ["", *(code(model["source"]) for model in models)]
    lines = [
        "# Diagnosis",
        "",
        f"{diagnosis['images']} images of {code(diagnosis['root'])}, {diagnosis['seconds']:.0f} s "
        f"on {diagnosis['device']}. Numbers: `diagnosis.json`, `averages.npz`.",
        "",
        f"| {' | '.join(head)} |",
        f"|{'---|' * len(head)}",
        *(f"| {' | '.join(map(escaped, row))} |" for row in rows),
        "",
        *(f"- {escaped(words)}" for words in notes(models)),
    ]
    for picture in pictures:
        heading, text = SENTENCES[picture.stem]
        lines += ["", f"## {heading}", "", f"![{heading}]({picture.name})", "", text]
    path = folder / "index.md"
    unlinked(path).write_text("\n".join(lines) + "\n")
    return path


def write_html(folder: Path, diagnosis: dict[str, Any], pictures: list[Path]) -> Path:
    """Writes report.html, the page of a diagnosis with embedded plots, into `folder`.

    Args:
        folder: Folder of the diagnosis.
        diagnosis: Content of diagnosis.json.
        pictures: Paths of the plots.

    Returns: the path of report.html.
    """
    models = diagnosis["models"]
    return html.write(
        folder / PAGE,
        "Diagnosis",
        (
            html.section(
                "Models",
                html.table(table(models), head=("", *(m["label"] for m in models))),
                *map(html.paragraph, notes(models)),
            ),
            *(
                html.section(heading, html.picture(picture, heading, words))
                for picture in pictures
                for heading, words in (SENTENCES[picture.stem],)
            ),
            html.section("Sources", html.table([(m["label"], m["source"]) for m in models])),
        ),
        below=f"{diagnosis['images']} images of {diagnosis['root']}, {diagnosis['seconds']:.0f} s "
        f"on {diagnosis['device']}",
    )


def table(models: list[Model]) -> list[list[str]]:
    """Returns the rows of the table, each with a label and a text for every model.

    The rows are the models' sizes, means of the attention measures over layers, and losses. A
    measure that no model has is left out.
    """
    heads = {"head_similarity": "similarity of heads", "patch_similarity": "- among patches alone"}
    rows = [
        ["parameters", *(f"{model['parameters'] / 1e6:.2f} M" for model in models)],
        ["images", *(f"{model['image_size']} px" for model in models)],
        ["positions", *(model["positions"] for model in models)],
        ["attention distance", *(_distance(model["attention"]) for model in models)],
    ]
    for name, words in heads.items():
        for part, take in (("", list), (", deep third", deep_layers)):
            rows.append([words + part, *(_mean(take(m["attention"]), name) for m in models)])
    for words, where in (("translation score", "attention"), ("- of random weights", "scratch")):
        rows.append([words, *(_mean(model[where], "translation_score") for model in models)])
    for kind in kinds_of(models):
        parts = [landscape_of(model, kind) for model in models]
        if any(value for part in parts if part for value in part["value"]):
            rows.append([kind, *(_of_batches(part, own_losses) for part in parts)])
            rows.append(["- change at step 0.1", *(_of_batches(part, _near) for part in parts)])
        else:  # The change of a map is 0 at the model's own weights.
            rows.append([f"{kind} at 0.1", *(_of_batches(part, _near) for part in parts)])
    return [row for row in rows if set(row[1:]) != {"none"}]


def notes(models: list[Model]) -> list[str]:
    """Returns sentences for below the table, on which of its numbers can be compared.

    Args:
        models: The entries of the models in diagnosis.json.
    """
    sentences = []
    images = models[0]["landscapes"][0]["images"]
    if len(images) > 1:
        sentences.append(
            f"Losses are means over {len(images)} batches, {sum(images)} images in all, +- the "
            "standard deviation from batch to batch; steps are in norms of the weights, to both "
            f"sides along {len(models[0]['landscapes'][0]['curves'])} random directions."
        )
    groups: dict[str, tuple[list[str], list[str]]] = {}
    for model in models:
        for part in model["landscapes"]:
            kinds, labels = groups.setdefault(part["comparable"], ([], []))
            kinds += [] if part["loss"] in kinds else [part["loss"]]
            labels += [] if model["label"] in labels else [model["label"]]
    for kinds, labels in groups.values():
        alike = "can be compared" if len(labels) > 1 else "can be compared with no other here"
        sentences.append(f"{_and(kinds)} of {_and(labels)} {alike}.")
    sentences += [f"{model['label']}: {model['left_out']}" for model in models if model["left_out"]]
    if any(model["attention"] for model in models):
        sentences.append(
            "Translation score: compare it with that of random weights of the same model, and "
            "between models of the same kind of positions only, since a relative table alone "
            "raises it."
        )
        sentences += _supervised_controls(models)
    return sentences


# ------------------------------------------------------------------------------------------------


def _supervised_controls(models: list[Model]) -> list[str]:
    """Returns a note for each model with relative positions, on supervised models to compare with.

    Models to compare with have the same kinds of position encodings, and were trained on labels
    from random weights. If no such model is in the diagnosis, the note says so.
    """
    sentences = []
    for model in models:
        beside = [
            other["label"]
            for other in models
            if other["is_supervised"] and other["positions"] == model["positions"]
        ]
        if model["is_supervised"] or "relative" not in model["positions"] or not model["attention"]:
            continue
        if beside:
            sentences.append(
                f"{model['label']}: compare its score with that of {_and(beside)}, with "
                f"{model['positions']} positions too and trained on labels from random weights: "
                "the positions alone do not explain a higher score."
            )
        else:
            sentences.append(
                f"{model['label']}: no run with {model['positions']} positions that was trained "
                "on labels from random weights is compared here; without such a run the score "
                "does not show what the model learnt otherwise."
            )
    return sentences


def _distance(layers: list[dict[str, Any]]) -> str:
    means = [sum(layer["distance_pixels"]) / layer["heads"] for layer in layers]
    return f"{sum(means) / len(means):.1f} px" if means else "none"


def _mean(layers: list[dict[str, Any]], name: str) -> str:
    known = [layer[name] for layer in layers if layer[name] is not None]
    return f"{sum(known) / len(known):z.2f}" if known else "none"


def _of_batches(part: Landscape | None, values_of: Callable[[Landscape], numpy.ndarray]) -> str:
    """Returns a value's mean over batches and its standard deviation, as text.

    Args:
        part: The landscape; for None, the text is "none".
        values_of: Function from a landscape to the value of each batch, (batches,). If one of these
            is NaN or infinity, the text is "not finite".
    """
    if part is None:
        return "none"
    values = values_of(part)
    if not numpy.isfinite(values).all():
        return "not finite"
    mean, spread = values.mean(), values.std(ddof=1) if len(values) > 1 else 0.0
    # The larger of the two is shown with three figures.
    size = max(abs(mean), spread)
    digits = min(4, max(0, 2 - math.floor(math.log10(size)))) if size else 4
    return f"{mean:z.{digits}f}" + (f" +- {spread:.{digits}f}" if len(values) > 1 else "")


def _near(part: Landscape) -> numpy.ndarray:
    """Returns the change of the loss on each batch, (batches,), at a distance of 0.1.

    The distance from the trained weights is a multiple of each filter's norm. The change is
    averaged over all directions and both signs of the step.
    """
    near = [i for i, step in enumerate(part["steps"]) if abs(abs(step) - 0.1) < 1e-6]
    return numpy.mean([changes(part, along)[:, near].mean(1) for along in part["curves"]], axis=0)


def _and(labels: list[str]) -> str:
    return " and ".join(filter(None, [", ".join(labels[:-1]), labels[-1]]))
