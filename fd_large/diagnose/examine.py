"""All figures of some models, in one pass over the images and a landscape each."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fd_large import distributed
from fd_large.backbones.statistics import normalise
from fd_large.backbones.token_positions import TokenPositions
from fd_large.diagnose.attention_maps import maps_to
from fd_large.diagnose.attention_measures import LayerFigures
from fd_large.diagnose.cka import LEAST_IMAGES, Similarity, gram
from fd_large.diagnose.findings import Findings
from fd_large.diagnose.landscape import curve, random_direction, surface
from fd_large.diagnose.models import LoadedModel
from fd_large.diagnose.sample import Sample

MAP = "map"
Progress = Callable[[str], None]
"""Called after every step with what is being done."""


@dataclass(frozen=True)
class Extent:
    """How much of the loss landscape is measured.

    Attributes:
        reach: Length of the longest step, as a multiple of the weights' own length.
        points: Points of a curve; odd, so that one of them is the model itself.
        seeds: Number of curves.
        side: Points of the map in each direction; odd.
    """

    reach: float = 0.5
    points: int = 21
    seeds: int = 3
    side: int = 9

    def line(self, points: int) -> list[float]:
        """Returns steps from -reach to reach; the one in the middle is exactly 0."""
        half = points // 2
        return [self.reach * (i - half) / half for i in range(points)]

    @property
    def losses(self) -> int:
        """Losses that are computed for each model."""
        return self.seeds * self.points + self.side**2


def num_batches(images: int, batch_size: int) -> int:
    """Returns the number of batches of at most that size, but none smaller than CKA needs."""
    return max(1, min(math.ceil(images / batch_size), images // LEAST_IMAGES))


def num_steps(models: int, images: int, batch_size: int, extent: Extent) -> int:
    """Returns how often `examine` reports a step."""
    return models * (num_batches(images, batch_size) + extent.losses)


def examine(
    models: Sequence[LoadedModel],
    sample: Sample,
    *,
    batch_size: int,
    extent: Extent,
    progress: Progress,
) -> Findings:
    """Measures attention, CKA and the loss landscape of models side by side.

    Args:
        models: One or more.
        sample: The images.
        batch_size: Images at a time; the landscape sees the first batch only.
        extent: Size of the landscape.
        progress: Called after every step.
    """
    device = distributed.device()
    sizes = sorted({model.image_size for model in models})
    layers: list[dict[str, LayerFigures]] = [{} for _ in models]
    similarity, names, first = Similarity(), [], None
    for views in sample.batches(num_batches(len(sample), batch_size), sizes):
        first = first or views
        grams: dict[tuple[int, str], Tensor] = {}
        for number, model in enumerate(models):
            images = views[model.image_size].to(device)
            for name, matrix in _look(model, images, layers[number]).items():
                grams[number, name] = matrix
            progress(f"{model.label}: attention and features")
        if len(next(iter(views.values()))) >= LEAST_IMAGES:
            similarity.add(list(grams.values()))
            names = list(grams)
    figures = []
    for model, of_model in zip(models, layers, strict=True):
        landscape = _landscape(model, first[model.image_size].to(device), extent, progress)
        attention = [layer.figures() for layer in of_model.values()]
        figures.append(_facts(model) | {"attention": attention, "landscape": landscape})
    averages = [
        {name: average for name, layer in of.items() if (average := layer.average()) is not None}
        for of in layers
    ]
    by_model = [[name for owner, name in names if owner == n] for n in range(len(models))]
    matrix = similarity.matrix().tolist() if names else []
    cka = {"layers": by_model, "matrix": [[_plain(v) for v in row] for row in matrix]}
    return Findings(figures, cka, averages)


def blocks_of(model: nn.Module) -> dict[str, nn.Module]:
    """Returns a model's blocks in order: the outermost numbered modules with several weights.

    A sequence of blocks, or a stage that owns one as `blocks`, is itself no block.
    """
    found: dict[str, nn.Module] = {}

    def descend(name: str, module: nn.Module) -> None:
        holds_blocks = isinstance(module, nn.Sequential | nn.ModuleList) or isinstance(
            getattr(module, "blocks", None), nn.Module
        )
        numbered = re.search(r"(^|\.)\d+$", name) is not None
        owners = sum(any(True for _ in m.parameters(recurse=False)) for m in module.modules())
        if numbered and not holds_blocks and owners > 1:
            found[name] = module
            return
        for child, inner in module.named_children():
            descend(f"{name}.{child}" if name else child, inner)

    descend("", model)
    return found


# ------------------------------------------------------------------------------------------------


def _look(model: LoadedModel, images: Tensor, layers: dict[str, LayerFigures]) -> dict[str, Tensor]:
    """One forward: attention is added to the figures of the layers, Gram matrices are returned."""
    grid = model.backbone.grid(*images.shape[-2:])
    grams: dict[str, Tensor] = {}

    def note(name: str, attention: Tensor, positions: TokenPositions) -> None:
        stride = images.shape[-1] / positions.grid[1]
        layers.setdefault(name, LayerFigures(name, stride)).add(attention, positions)

    with torch.no_grad(), maps_to(note, model.backbone, grid), _outputs(model.backbone, grams):
        tokens = model.backbone(normalise(images, model.statistics)).tokens
        grams[MAP] = gram(tokens).cpu()
    return grams


@contextmanager
def _outputs(model: nn.Module, grams: dict[str, Tensor]) -> Iterator[None]:
    with ExitStack() as stack:
        for name, block in blocks_of(model).items():

            def hook(module: nn.Module, inputs: Any, output: Any, name: str = name) -> None:
                tensor = output if isinstance(output, Tensor) else output[0]
                grams[name] = gram(tensor.detach()).cpu()

            stack.callback(block.register_forward_hook(hook).remove)
        yield


def _landscape(
    model: LoadedModel, images: Tensor, extent: Extent, progress: Progress
) -> dict[str, Any]:
    loss = model.loss_on(images)
    with torch.no_grad():
        own = float(loss())

    def step() -> None:
        progress(f"{model.label}: loss landscape")

    def direction(seed: int) -> dict[str, Tensor]:
        return random_direction(model.trained, seed)

    line, side = extent.line(extent.points), extent.line(extent.side)
    curves = [
        curve(model.trained, loss, direction(seed), line, step) for seed in range(extent.seeds)
    ]
    plane = surface(model.trained, loss, (direction(0), direction(1)), side, step)
    return {
        "loss": model.loss_name,
        "images": len(images),
        "value": own,
        "steps": line,
        "curves": [[_plain(v) for v in values] for values in curves],
        "map_steps": side,
        "map": [[_plain(v) for v in row] for row in plane],
    }


def _facts(model: LoadedModel) -> dict[str, Any]:
    size = model.image_size
    return {
        "label": model.label,
        "source": model.source,
        "net": type(model.backbone).__name__,
        "parameters": sum(p.numel() for p in model.backbone.parameters()),
        "image_size": size,
        "grid": list(model.backbone.grid(size, size)),
        "statistics": {"mean": model.statistics.mean, "std": model.statistics.std},
    }


def _plain(value: float) -> float | None:
    """JSON knows no NaN and no infinity: a loss that overflowed is None."""
    return value if math.isfinite(value) else None
