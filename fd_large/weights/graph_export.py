"""Exports a student as a graph that runs without this package: ONNX or a `torch.export` program.

The graph maps any number of normalised images of a fixed size to tokens. The graph consists of
torch's own operations (the references of `kernels/`), without drop path. The whole model is in
memory, unlike in `export.py`.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fd_large.backbones.feature_map import FeatureMap
from fd_large.backbones.registry import build
from fd_large.backbones.statistics import Statistics
from fd_large.errors import ConfigError
from fd_large.files import new_folder, write_json
from fd_large.kernels import choose
from fd_large.recipes.family import FamilyArchitecture
from fd_large.weights.coverage import check_finite
from fd_large.weights.libraries import LIBRARIES, To
from fd_large.weights.load import fill
from fd_large.weights.origin import CARD
from fd_large.weights.sidecar import own_config

INPUT, OUTPUT = "images", "tokens"
_PACKAGES: dict[To, tuple[str, ...]] = {"onnx": ("onnx", "onnxscript", "onnxruntime")}
# Relative to the largest value: far above rounding errors, far below the errors of a wrong graph.
_TOLERANCE = 1e-3


def check_packages(to: To) -> None:
    """Raises ConfigError if an export to the format `to` needs packages that are not installed."""
    if missing := [name for name in _PACKAGES.get(to, ()) if find_spec(name) is None]:
        raise ConfigError(
            f"export: --to {to}: packages are not installed; got no {', '.join(missing)}, expected "
            f"{', '.join(_PACKAGES[to])}. Run pip install 'fd_large[{to}]', or use --to program, "
            "which needs torch alone."
        )


def export_graph(
    items: Iterable[tuple[str, Tensor]],
    architecture: FamilyArchitecture,
    to: To,
    out: Path,
    *,
    sizes: Mapping[str, Any],
    statistics: Statistics,
    card: str,
    code_hash: str = "",
    trained_by: Sequence[Mapping[str, Any]] = (),
) -> list[Path]:
    """Writes the graph, config.json and the model card to a new folder.

    The graph's output is compared with the model's before the folder appears.

    Args:
        items: (our name, tensor) pairs of the student.
        architecture: The student, with the image size of the export.
        to: "onnx" or "program".
        out: The folder, which must not exist yet.
        sizes: The student's rules for sizes that do not fit (`Student.sizes`).
        card: Text of the model card.
        statistics, code_hash, trained_by: As in `sidecar.own_config`.

    Returns: the paths of the graph's files.
    Raises:
        ConfigError: If the model cannot be traced, the graph's output differs from the model's, or
            `out` exists.
        WeightsError: For a tensor that contains NaN or infinity.
        ShapeError: If the image size does not fit.
    """
    with new_folder(out, where="export") as part, choose.references(), torch.no_grad(), _quiet():
        net = build(architecture, initialization="none", **sizes)
        fill(net, _finite(items))
        net.requires_grad_(False).eval()
        side = architecture.image_size
        images = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(0))
        # The call also fills the modules' caches, which become constants of the graph.
        feature_map = net(images)
        file = part / LIBRARIES[to].graph
        try:
            program = torch.export.export(
                _Tokens(net),
                (images,),
                dynamic_shapes={INPUT: {0: torch.export.Dim("batch", min=1)}},
            )
            run = _WRITERS[to](program, images, file, _metadata(side, feature_map, statistics))
        except Exception as error:  # A tracer or a translator may raise anything.
            logging.getLogger(__name__).debug("export", exc_info=True)
            raise _untraced(architecture, to, error) from error
        _compare(run, images[:1], feature_map.tokens[:1], architecture, to)
        write_json(
            part / "config.json",
            own_config(architecture, statistics, code_hash=code_hash, trained_by=trained_by),
        )
        (part / CARD).write_text(card)
        names = sorted(path.name for path in part.glob(f"{LIBRARIES[to].graph}*"))
    return [out / name for name in names]


class _Tokens(nn.Module):
    """A module that runs a backbone and returns only the tokens of the feature map."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, images: Tensor) -> Tensor:
        """Maps normalised images (B, 3, H, W) to tokens (B, N, C), prefix tokens included."""
        return self.net(images).tokens


def _write_program(
    program: torch.export.ExportedProgram, images: Tensor, file: Path, metadata: dict[str, str]
) -> Callable[[Tensor], Tensor]:
    del images
    torch.export.save(program, file, extra_files=metadata)
    return torch.export.load(file).module()


def _write_onnx(
    program: torch.export.ExportedProgram, images: Tensor, file: Path, metadata: dict[str, str]
) -> Callable[[Tensor], Tensor]:
    import onnxruntime

    graph = torch.onnx.export(
        program,
        (images,),
        dynamo=True,
        input_names=[INPUT],
        output_names=[OUTPUT],
        verbose=False,
    )
    assert graph is not None
    graph.model.metadata_props.update(metadata)
    # Weights of more than two gigabytes are in a second file.
    graph.save(file)
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    return lambda pixels: torch.from_numpy(session.run([OUTPUT], {INPUT: pixels.numpy()})[0])


_WRITERS = {"onnx": _write_onnx, "program": _write_program}


def _metadata(side: int, feature_map: FeatureMap, statistics: Statistics) -> dict[str, str]:
    """Returns {key: text} for the graph's file, which describes the graph's input and output.

    The feature map is that of the backbone for images of `side` pixels.
    """
    return {
        "image_size": str(side),
        "image_mean": " ".join(map(str, statistics.mean)),
        "image_std": " ".join(map(str, statistics.std)),
        "grid": " ".join(map(str, feature_map.grid)),
        "prefix_tokens": str(feature_map.num_prefix_tokens),
    }


def _compare(
    run: Callable[[Tensor], Tensor],
    images: Tensor,
    expected: Tensor,
    architecture: FamilyArchitecture,
    to: To,
) -> None:
    got = run(images)
    error = (got - expected).abs().max() / expected.abs().max()
    # Not `error > bound`, which is false for NaN.
    if got.shape != expected.shape or not bool(error <= _TOLERANCE):
        raise ConfigError(
            f"export: --to {to}: the graph of this {architecture.family} model differs from the "
            f"model; got an error of {error:.2g} of the largest value for one image, expected at "
            f"most {_TOLERANCE:g}. The forward depends on more than the images: correct it, or "
            "use --to fd."
        )


def _untraced(architecture: FamilyArchitecture, to: To, error: Exception) -> ConfigError:
    lines = [line.strip(" -") for line in str(error).splitlines() if line.strip()]
    # The first line of a specialised batch is a heading.
    message = next((line for line in lines if "specialized" in line), (lines or [""])[0])
    return ConfigError(
        f"export: --to {to}: this {architecture.family} model cannot be traced; got "
        f"{type(error).__name__} {message[:200].rstrip('.')}, expected a forward whose steps "
        "depend neither on values nor on the number of images. Use --to fd, or --to timm or --to "
        "hf if that library has the model."
    )


def _finite(items: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in items:
        check_finite(name, tensor, "the checkpoint", "export")
        yield name, tensor


@contextmanager
def _quiet() -> Iterator[None]:
    """Hides all Python warnings in the `with` block, such as those of torch's exporters."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
