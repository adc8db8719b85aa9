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
from fd_large.diagnose.attention import maps_to
from fd_large.diagnose.cka import LEAST_IMAGES, Similarity, gram
from fd_large.diagnose.landscape import curve, random_direction, surface
from fd_large.diagnose.measures import LayerFigures
from fd_large.diagnose.nets import Subject
from fd_large.diagnose.places import Places
from fd_large.diagnose.sample import Sample

MAP = "map"
Told = Callable[[str], None]


@dataclass(frozen=True)
class Extent:
    """How much of the landscape is walked.

    Attributes:
        reach: The longest step, in lengths of the weights.
        points: Of a curve, odd, so that zero is one of them.
        seeds: Curves.
        side: Points of the map each way, odd.
    """

    reach: float = 0.5
    points: int = 21
    seeds: int = 3
    side: int = 9

    def line(self, points: int) -> list[float]:
        """Steps from -reach to reach; the one in the middle is exactly 0."""
        half = points // 2
        return [self.reach * (i - half) / half for i in range(points)]

    @property
    def losses(self) -> int:
        """Evaluations of a net."""
        return self.seeds * self.points + self.side**2


@dataclass(frozen=True)
class Findings:
    """What was seen.

    Attributes:
        models: A dict of plain values for each model.
        cka: {"layers": names by model, "matrix": rows of all models' layers, one after the other}.
        averages: The average attention of each model by layer, (P, P) float64.
    """

    models: list[dict[str, Any]]
    cka: dict[str, Any]
    averages: list[dict[str, Tensor]]


def num_batches(images: int, batch_size: int) -> int:
    """Batches of at most that size, but none of fewer images than CKA needs."""
    return max(1, min(math.ceil(images / batch_size), images // LEAST_IMAGES))


def num_steps(subjects: int, images: int, batch_size: int, extent: Extent) -> int:
    """How often `examine` will tell of a step."""
    return subjects * (num_batches(images, batch_size) + extent.losses)


def examine(
    subjects: Sequence[Subject], sample: Sample, *, batch_size: int, extent: Extent, told: Told
) -> Findings:
    """Looks at the models.

    Args:
        subjects: At least one.
        sample: The images.
        batch_size: Images at a time, for the landscape too, which sees the first batch only.
        extent: Of the landscape.
        told: Called after every step with what is being done.
    """
    device = distributed.device()
    sizes = sorted({subject.image_size for subject in subjects})
    layers: list[dict[str, LayerFigures]] = [{} for _ in subjects]
    similarity, names, first = Similarity(), [], None
    for views in sample.batches(num_batches(len(sample), batch_size), sizes):
        first = first or views
        grams: dict[tuple[int, str], Tensor] = {}
        for number, subject in enumerate(subjects):
            images = views[subject.image_size].to(device)
            for name, matrix in _look(subject, images, layers[number]).items():
                grams[number, name] = matrix
            told(f"{subject.label}: attention and features")
        if len(next(iter(views.values()))) >= LEAST_IMAGES:
            similarity.add(list(grams.values()))
            names = list(grams)
    models = []
    for number, subject in enumerate(subjects):
        landscape = _landscape(subject, first[subject.image_size].to(device), extent, told)
        figures = [layer.figures() for layer in layers[number].values()]
        models.append(_facts(subject) | {"attention": figures, "landscape": landscape})
    averages = [
        {name: average for name, layer in of.items() if (average := layer.average()) is not None}
        for of in layers
    ]
    by_net = [[name for owner, name in names if owner == n] for n in range(len(subjects))]
    matrix = similarity.matrix().tolist() if names else []
    cka = {"layers": by_net, "matrix": [[_plain(v) for v in row] for row in matrix]}
    return Findings(models, cka, averages)


def blocks_of(net: nn.Module) -> dict[str, nn.Module]:
    """The blocks of any model in order: the outermost numbered modules that hold several weights.

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

    descend("", net)
    return found


# ------------------------------------------------------------------------------------------------


def _look(subject: Subject, images: Tensor, layers: dict[str, LayerFigures]) -> dict[str, Tensor]:
    """One forward: attention is added to the figures of the layers, Gram matrices are returned."""
    grid = subject.net.grid(*images.shape[-2:])
    grams: dict[str, Tensor] = {}

    def note(name: str, attention: Tensor, places: Places) -> None:
        stride = images.shape[-1] / places.grid[1]
        layers.setdefault(name, LayerFigures(name, stride)).add(attention, places)

    with torch.no_grad(), maps_to(note, subject.net, grid), _outputs(subject.net, grams):
        tokens = subject.net(normalise(images, subject.statistics)).tokens
        grams[MAP] = gram(tokens).cpu()
    return grams


@contextmanager
def _outputs(net: nn.Module, grams: dict[str, Tensor]) -> Iterator[None]:
    with ExitStack() as stack:
        for name, block in blocks_of(net).items():

            def hook(module: nn.Module, inputs: Any, output: Any, name: str = name) -> None:
                tensor = output if isinstance(output, Tensor) else output[0]
                grams[name] = gram(tensor.detach()).cpu()

            stack.callback(block.register_forward_hook(hook).remove)
        yield


def _landscape(subject: Subject, images: Tensor, extent: Extent, told: Told) -> dict[str, Any]:
    loss = subject.loss_on(images)
    with torch.no_grad():
        own = float(loss())

    def step() -> None:
        told(f"{subject.label}: loss landscape")

    def direction(seed: int) -> dict[str, Tensor]:
        return random_direction(subject.moved, seed)

    line, side = extent.line(extent.points), extent.line(extent.side)
    curves = [
        curve(subject.moved, loss, direction(seed), line, step) for seed in range(extent.seeds)
    ]
    plane = surface(subject.moved, loss, (direction(0), direction(1)), side, step)
    return {
        "loss": subject.loss_words,
        "images": len(images),
        "value": own,
        "steps": line,
        "curves": [[_plain(v) for v in values] for values in curves],
        "map_steps": side,
        "map": [[_plain(v) for v in row] for row in plane],
    }


def _facts(subject: Subject) -> dict[str, Any]:
    size = subject.image_size
    return {
        "label": subject.label,
        "source": subject.source,
        "net": type(subject.net).__name__,
        "parameters": sum(p.numel() for p in subject.net.parameters()),
        "image_size": size,
        "grid": list(subject.net.grid(size, size)),
        "statistics": {"mean": subject.statistics.mean, "std": subject.statistics.std},
    }


def _plain(value: float) -> float | None:
    """JSON knows no NaN and no infinity: a loss that overflowed is None."""
    return value if math.isfinite(value) else None
