"""Measures models for a diagnosis: attention and CKA on the images, and loss landscapes."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor, nn

from fd_large.backbones.statistics import Statistics, normalise
from fd_large.backbones.token_positions import TokenPositions
from fd_large.evaluation.diagnosis.attention_maps import maps_to
from fd_large.evaluation.diagnosis.attention_measures import LayerFigures
from fd_large.evaluation.diagnosis.cka import LEAST_IMAGES, Similarity, gram
from fd_large.evaluation.diagnosis.landscape import curve, random_direction, surface
from fd_large.evaluation.diagnosis.models import LoadedModel, Loss
from fd_large.evaluation.diagnosis.sample import Sample, Views
from fd_large.files import replacing, write_json
from fd_large.ranks import distributed

MAP = "map"
MOST_BATCHES = 4
"""Largest number of batches on which the losses of a landscape are computed."""
Layers = dict[str, LayerFigures]
"""Measures of a model's attention layers, by the name of the layer."""
Progress = Callable[[str], None]
"""Function that is called after every unit of work, with a description of the work."""


@dataclass(frozen=True)
class Extent:
    """Size and resolution of a loss landscape.

    Attributes:
        reach: Largest distance from the trained weights, as a multiple of each filter's norm.
        points: Number of points of a curve; odd, so that the middle point is the model itself.
        seeds: Number of curves, each along a random direction of its own.
        side: Number of points of the two-dimensional map in each direction; odd.
    """

    reach: float = 0.5
    points: int = 21
    seeds: int = 3
    side: int = 9

    def line(self, points: int) -> list[float]:
        """Returns equidistant steps from the trained weights, with 0 in the middle.

        The steps go from -`reach` to `reach`, the largest distance that the landscape covers.

        Args:
            points: Number of steps; odd.
        """
        half = points // 2
        return [self.reach * (i - half) / half for i in range(points)]

    @property
    def losses(self) -> int:
        """Number of points at which a loss is computed for one model.

        These are the points of all curves and of the two-dimensional map.
        """
        return self.seeds * self.points + self.side**2


@dataclass(frozen=True)
class Findings:
    """Results of a diagnosis.

    Attributes:
        models: The measures of each model, as plain values.
        cka: {"layers": the names of each model's layers, "matrix": the CKA of all pairs of layers,
            with the layers of all models one after another}.
        averages: For each model the average attention map of each layer, (P, P) float64, by the
            layer's name.
    """

    models: list[dict[str, Any]]
    cka: dict[str, Any]
    averages: list[dict[str, Tensor]]


def num_batches(images: int, batch_size: int) -> int:
    """Returns the number of batches in which images are examined.

    Args:
        images: Number of images.
        batch_size: Largest number of images in a batch. Batches may be larger so that each has the
            `LEAST_IMAGES` that CKA needs.
    """
    return max(1, min(math.ceil(images / batch_size), images // LEAST_IMAGES))


def num_steps(models: Sequence[LoadedModel], images: int, batch_size: int, extent: Extent) -> int:
    """Returns how often `examine` will call its function `progress`.

    Args:
        models: The models.
        images: Number of images.
        batch_size: Largest number of images in a batch, as for `num_batches`.
        extent: Size and resolution of the landscapes.
    """
    batches = num_batches(images, batch_size)
    looks = sum(1 + (model.scratch is not None) for model in models)
    return looks * batches + sum(len(model.losses) for model in models) * extent.losses


def examine(
    models: Sequence[LoadedModel],
    sample: Sample,
    *,
    batch_size: int,
    extent: Extent,
    progress: Progress,
) -> Findings:
    """Measures attention, CKA and the loss landscapes of models side by side.

    Args:
        models: One or more models.
        sample: The images.
        batch_size: Largest batch size; the landscapes use the first `MOST_BATCHES` batches.
        extent: Size and resolution of the landscapes.
        progress: Function that is called after every unit of work.
    """
    device, count = distributed.device(), num_batches(len(sample), batch_size)
    sizes = sorted({model.image_size for model in models})
    layers: list[Layers] = [{} for _ in models]
    similarity, names, first = Similarity(), [], []
    for batch in sample.batches(count, sizes):
        first += [batch] if len(first) < MOST_BATCHES else []
        grams: dict[tuple[int, str], Tensor] = {}
        for number, model in enumerate(models):
            images = batch.of_size[model.image_size].to(device)
            layer_grams = _look(model.backbone, model.statistics, images, layers[number])
            grams |= {(number, name): matrix for name, matrix in layer_grams.items()}
            progress(f"{model.label}: attention and features")
        if len(batch.numbers) >= LEAST_IMAGES:
            similarity.add(list(grams.values()))
            names = list(grams)
    figures = []
    for model, of_model in zip(models, layers, strict=True):
        random = _look_at_scratch(model, sample, count, progress)
        landscapes = [
            part
            for loss in model.losses
            for part in _landscapes(model, loss, first, extent, progress)
        ]
        figures.append(
            _facts(model)
            | {
                "attention": [layer.figures() for layer in of_model.values()],
                "scratch": [layer.figures() for layer in random.values()],
                "landscapes": landscapes,
            }
        )
    averages = [
        {name: average for name, layer in of.items() if (average := layer.average()) is not None}
        for of in layers
    ]
    by_model = [[name for owner, name in names if owner == n] for n in range(len(models))]
    matrix = similarity.matrix().tolist() if names else []
    cka = {"layers": by_model, "matrix": [[_plain(v) for v in row] for row in matrix]}
    return Findings(figures, cka, averages)


def write_findings(folder: Path, findings: Findings, facts: dict[str, Any]) -> dict[str, Any]:
    """Writes averages.npz and diagnosis.json; returns the content of diagnosis.json.

    Args:
        folder: Folder of the diagnosis; it exists.
        findings: Results of the diagnosis.
        facts: Further plain values for diagnosis.json, such as the number of images.
    """
    arrays = {}
    for number, (model, averages) in enumerate(
        zip(findings.models, findings.averages, strict=True)
    ):
        for place, layer in enumerate(model["attention"]):
            if layer["layer"] in averages:
                average = averages[layer["layer"]].numpy().astype(numpy.float32)
                arrays[f"model_{number}_layer_{place}"] = average
    with replacing(folder / "averages.npz") as aside, aside.open("wb") as file:
        numpy.savez_compressed(file, **arrays)
    diagnosis = {**facts, "models": findings.models, "cka": findings.cka}
    write_json(folder / "diagnosis.json", diagnosis)
    return diagnosis


def blocks_of(model: nn.Module) -> dict[str, nn.Module]:
    """Returns a model's blocks by name, in order.

    A block is an outermost module whose name ends in a number and in which several modules have
    parameters. A sequence of modules, or a stage with an attribute `blocks`, is no block.
    """
    blocks: dict[str, nn.Module] = {}

    def descend(name: str, module: nn.Module) -> None:
        holds_blocks = isinstance(module, nn.Sequential | nn.ModuleList) or isinstance(
            getattr(module, "blocks", None), nn.Module
        )
        numbered = re.search(r"(^|\.)\d+$", name) is not None
        owners = sum(any(True for _ in m.parameters(recurse=False)) for m in module.modules())
        if numbered and not holds_blocks and owners > 1:
            blocks[name] = module
            return
        for child, inner in module.named_children():
            descend(f"{name}.{child}" if name else child, inner)

    descend("", model)
    return blocks


# ------------------------------------------------------------------------------------------------


def _look(
    backbone: nn.Module, statistics: Statistics, images: Tensor, layers: Layers
) -> dict[str, Tensor]:
    """Runs a model on a batch, and adds the model's attention maps to `layers`.

    Args:
        backbone: The model.
        statistics: Normalisation of the model's images.
        images: (B, 3, S, S) uint8.
        layers: Measures of the attention layers, to which the batch is added.

    Returns: the Gram matrices of the blocks' outputs and of the feature map, by name.
    """
    grid = backbone.grid(*images.shape[-2:])
    grams: dict[str, Tensor] = {}

    def note(name: str, attention: Tensor, positions: TokenPositions) -> None:
        stride = images.shape[-1] / positions.grid[1]
        layers.setdefault(name, LayerFigures(name, stride)).add(attention, positions)

    with torch.no_grad(), maps_to(note, backbone, grid), _outputs(backbone, grams):
        tokens = backbone(normalise(images, statistics)).tokens
        grams[MAP] = gram(tokens).cpu()
    return grams


def _look_at_scratch(model: LoadedModel, sample: Sample, count: int, progress: Progress) -> Layers:
    """Returns the attention measures of a model's architecture with random weights.

    The result is empty if `model.scratch` is None.

    Args:
        model: The model.
        sample: The images.
        count: Number of batches.
        progress: Function that is called after every batch.
    """
    layers: Layers = {}
    if model.scratch is None:
        return layers
    backbone, _ = model.scratch.build()
    backbone.eval()
    for batch in sample.batches(count, [model.image_size]):
        images = batch.of_size[model.image_size].to(distributed.device())
        _look(backbone, model.statistics, images, layers)
        progress(f"{model.label}: attention of random weights")
    return layers


@contextmanager
def _outputs(model: nn.Module, grams: dict[str, Tensor]) -> Iterator[None]:
    with ExitStack() as stack:
        for name, block in blocks_of(model).items():

            def hook(module: nn.Module, inputs: Any, output: Any, name: str = name) -> None:
                tensor = output if isinstance(output, Tensor) else output[0]
                grams[name] = gram(tensor.detach()).cpu()

            stack.callback(block.register_forward_hook(hook).remove)
        yield


def _landscapes(
    model: LoadedModel, loss: Loss, batches: Sequence[Views], extent: Extent, progress: Progress
) -> list[dict[str, Any]]:
    """Returns the landscapes of a loss, and of other values that are computed with the loss.

    Such a value may be an accuracy. Each landscape is a dict of plain values for diagnosis.json.

    Args:
        model: The model.
        loss: The loss.
        batches: The images.
        extent: Size and resolution of the landscapes.
        progress: Function that is called after every point.
    """
    device = distributed.device()
    measures = [
        loss.on(batch.of_size[model.image_size].to(device), batch.numbers) for batch in batches
    ]
    with torch.no_grad():
        values = [measure() for measure in measures]
    name = next(iter(values[0]))

    def step() -> None:
        progress(f"{model.label}: landscape of {name}")

    def direction(seed: int) -> dict[str, Tensor]:
        return random_direction(loss.module, seed)

    def all_batches() -> list[Mapping[str, float]]:
        return [measure() for measure in measures]

    line, side = extent.line(extent.points), extent.line(extent.side)
    curves = [
        curve(loss.module, all_batches, direction(seed), line, step) for seed in range(extent.seeds)
    ]
    plane = surface(loss.module, measures[0], (direction(0), direction(1)), side, step)
    return [
        {
            "loss": measured,
            "comparable": loss.comparable,
            "images": [len(batch.numbers) for batch in batches],
            "value": [_plain(of_batch[measured]) for of_batch in values],
            "steps": line,
            # Indexed by direction, batch and step.
            "curves": [
                [[_plain(at[n][measured]) for at in along] for n in range(len(batches))]
                for along in curves
            ],
            "map_steps": side,
            # On the first batch. An accuracy on a few images takes few values: no map is drawn.
            "map": [[_plain(at[measured]) for at in row] for row in plane]
            if measured == name
            else [],
        }
        for measured in values[0]
    ]


def _facts(model: LoadedModel) -> dict[str, Any]:
    size = model.image_size
    return {
        "label": model.label,
        "source": model.source,
        "net": type(model.backbone).__name__,
        "parameters": sum(p.numel() for p in model.backbone.parameters()),
        "image_size": size,
        "grid": list(model.backbone.grid(size, size)),
        "positions": model.positions,
        "is_supervised": model.is_supervised,
        "left_out": model.left_out,
        "statistics": {"mean": model.statistics.mean, "std": model.statistics.std},
    }


def _plain(value: float) -> float | None:
    """Returns `value` if it is finite, and None for NaN and infinity, which JSON cannot hold."""
    return value if math.isfinite(value) else None
