"""Checks that a file covers a model exactly: the file and the model have the same tensors.

Otherwise a WeightsError is raised. Names and shapes are compared before any tensor is read. Then
tensors are read one by one, checked for NaN and infinity, and resized if the model has another
grid.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fd_large.backbones.position_tables import resize_positions, resize_table, square_side
from fd_large.backbones.recognition import side_of
from fd_large.backbones.translation import Piece, Shape, Shapes
from fd_large.errors import WeightsError, first_names
from fd_large.weights.read import Tensors, files_of

log = logging.getLogger(__name__)

_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_POSITIONS = ("pos_embed", "absolute_pos_embed")
_TABLE = "relative_position_bias_table"


class Fitted:
    """The weights of a model from a file that covers the model.

    Iteration reads the file, and yields (name in the model, tensor) for each tensor of the model.

    Args:
        pieces: {name in the model: rule that makes the tensor}.
        file: Tensors of the file, from which the rules make tensors.
        expected: {name: shape} of every tensor of the model.
        allow: Patterns (*, ?) of names that may be missing in the file or in the model.
        label: Name of the file for messages and the log.
        margin, antialias: As in `resized`.
        notes: Descriptions of changes that the rules make, for the log.
        remedy: Remedy for tensors that do not fit, for messages.
        resize: Whether position tables of another grid in the file are accepted and resized.

    Attributes:
        match: The comparison of file and model.
        may_be_missing: Names of the model's tensors that the file lacks and that the user allowed
            to be missing.

    Raises: WeightsError: if the file does not cover the model, has unused tensors, or has tensors
        that are not floating-point.
    """

    def __init__(
        self,
        pieces: Mapping[str, Piece],
        file: Tensors,
        expected: Shapes,
        *,
        allow: tuple[str, ...] = (),
        label: str,
        where: str = "weights",
        margin: float = 0.0,
        antialias: bool = False,
        notes: Iterable[str] = (),
        remedy: str = "",
        resize: bool = True,
    ):
        self._file, self._expected = file, dict(expected)
        self._scaling: dict[str, Any] = {"margin": margin, "antialias": antialias}
        self._label, self._where, self._notes = label, where, list(notes)
        self._pieces = {name: piece for name, piece in pieces.items() if name in expected}
        shapes = {name: piece.shape(file.shape) for name, piece in pieces.items()}
        self.match = match(shapes, self._expected, allow=allow, resize=resize)
        self.may_be_missing = frozenset(self.match.allowed) & expected.keys()
        for name in self.match.allowed:
            side = "in the file alone" if name in pieces else "missing, and left as initialised"
            self._notes.append(f"{name}: {side} (allowed)")
        if complaints := self.match.complaints:
            raise WeightsError(
                f"{where}: {label}: {self.match.summary()}; got {'; '.join(complaints)}, expected "
                f"all {len(expected)} tensors of the model and no other. {remedy or _REMEDY}"
            )
        self._refuse_other_types()

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        """Reads the file and yields (name in the model, tensor of the model's shape).

        Raises: WeightsError: for a tensor that contains NaN or infinity.
        """
        for note in (f"{self._label}: {self.match.summary()}", *self._notes):
            log.info("%s: %s", self._where, note)
        changed: Counter[tuple[str, Shape, Shape]] = Counter()
        for name, piece in self._pieces.items():
            tensor, shape = piece.read(self._file), self._expected[name]
            check_finite(name, tensor, self._label, self._where)
            if tuple(tensor.shape) != shape:
                changed[name.rpartition(".")[2], tuple(tensor.shape), shape] += 1
                tensor = resized(
                    name, tensor, shape, self._expected, where=self._where, **self._scaling
                )
            yield name, tensor
        for (name, old, new), count in changed.items():
            how = "by geometric progression" if name == _TABLE else "bicubic"
            log.info(
                "%s: %d x %s resized from %s to %s, %s", self._where, count, name, old, new, how
            )

    @property
    def dtypes(self) -> tuple[str, ...]:
        """Names of the dtypes, such as "float32", of the file's tensors that the model uses."""
        sources = (name for piece in self._pieces.values() for name in piece.sources)
        return self._file.dtypes(sources)

    def is_file_of(self, dtype: torch.dtype) -> bool:
        """Whether the model's tensors all come from local files and have dtype `dtype` there."""
        return self._file.path is not None and self.dtypes == (str(dtype).removeprefix("torch."),)

    def files(self) -> list[Path]:
        """Returns the tensors' files after their index; [] if a library or checkpoint has them."""
        return files_of(self._file.path) if self._file.path else []

    def _refuse_other_types(self) -> None:
        for name in (name for piece in self._pieces.values() for name in piece.sources):
            dtype = self._file.dtype(name)
            if dtype not in _FLOATS:
                raise WeightsError(
                    f"{self._where}: {self._label}: a tensor of an unsupported type; got {name} in "
                    f"{str(dtype).removeprefix('torch.')}, expected float64, float32, float16 or "
                    "bfloat16. Use weights that are not quantised."
                )


_REMEDY = "Name the model that the file holds, or allow these tensors by name."


@dataclass
class Match:
    """The comparison of a file's tensors with a model's.

    Attributes:
        total: Number of elements in the model's tensors.
        parameters: Number of elements in the model's tensors that fit.
        matched: Names of the tensors that fit, unchanged or resized.
        to_resize: Names of the position tables that have another grid in the file and are resized.
        missing: Names of the model's tensors that the file lacks, except allowed names.
        left_over: Names of the file's tensors that the model lacks, except allowed names.
        misfits: Tensors whose shapes differ, as "name (file's shape) for (model's shape)".
        allowed: Names that are missing or left over with the user's permission.
    """

    total: int
    parameters: int = 0
    matched: list[str] = field(default_factory=list)
    to_resize: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    left_over: list[str] = field(default_factory=list)
    misfits: list[str] = field(default_factory=list)
    allowed: list[str] = field(default_factory=list)

    @property
    def complaints(self) -> list[str]:
        """The reasons, in words, why the weights do not fit the model; empty if they fit."""
        return _complaints(self.missing, self.left_over, self.misfits)

    def summary(self) -> str:
        """Returns how much of the model fits: "98.5% of the model's 100 numbers, 12 tensors".

        The numbers are the elements of all tensors of the model; the tensors are those that fit.
        """
        share = 100 * self.parameters / self.total if self.total else 0.0
        # An incomplete model must not round up to 100 %.
        share = share if self.parameters == self.total else min(share, 99.99)
        # The word is numbers, not parameters, since running statistics are counted too.
        return f"{share:.4g}% of the model's {self.total:,} numbers, {len(self.matched)} tensors"


def match(
    shapes: Shapes, expected: Shapes, *, allow: tuple[str, ...] = (), resize: bool = True
) -> Match:
    """Compares the shapes of a file's tensors with those of a model's, both by our names.

    Args:
        shapes: {our name: shape} of the file's tensors.
        expected: {our name: shape} of the model's tensors.
        allow, resize: As in `Fitted`.
    """
    outcome = Match(sum(map(math.prod, expected.values())))

    def sort(name: str, complaint: list[str]) -> None:
        (outcome.allowed if any(fnmatchcase(name, p) for p in allow) else complaint).append(name)

    for name, shape in expected.items():
        if name not in shapes:
            sort(name, outcome.missing)
        elif shapes[name] == tuple(shape):
            outcome.matched.append(name)
        elif resize and can_resize(name, shapes[name], tuple(shape)):
            outcome.matched.append(name)
            outcome.to_resize.append(name)
        else:
            outcome.misfits.append(f"{name} {shapes[name]} for {tuple(shape)}")
    for name in shapes:
        if name not in expected:
            sort(name, outcome.left_over)
    outcome.parameters = sum(math.prod(expected[name]) for name in outcome.matched)
    return outcome


def can_resize(name: str, old: Shape, new: Shape) -> bool:
    """Whether a tensor is a position table that only needs resizing from shape `old` to `new`."""
    last = name.rpartition(".")[2]
    if last in _POSITIONS:
        return len(old) == len(new) == 3 and old[::2] == new[::2]
    return last == _TABLE and len(old) == len(new) == 2 and old[1] == new[1]


def resized(
    name: str,
    tensor: Tensor,
    shape: Shape,
    expected: Shapes,
    *,
    margin: float = 0.0,
    antialias: bool = False,
    where: str = "weights",
) -> Tensor:
    """Returns the file's position table `tensor`, resized to its shape in the model.

    Args:
        name: Name of the tensor in the model.
        shape: Shape of the tensor in the model.
        expected: {name: shape} of the model's tensors, which show whether the model has class
            tokens.
        margin: Number added to the sides of the new grid when the scale factors of positions are
            computed (DINO's 0.1).
        antialias: Whether the filter is widened when positions are resized to a smaller grid.
    """
    where = f"{where}: {name}"
    if name.endswith(_TABLE):
        extra = 3 if expected.keys() & {"cls_token", "reg_token"} else 0
        return resize_table(tensor, shape[0], extra, where=where)
    prefix = sum(token in expected for token in ("cls_token", "dist_token"))
    if not side_of(shape[1] - prefix):
        prefix = 0  # The class token has no position.
    side = square_side(shape[1] - prefix, where=where)
    return resize_positions(tensor, prefix, side, margin=margin, antialias=antialias, where=where)


def check_finite(name: str, tensor: Tensor, label: str, where: str) -> None:
    """Raises WeightsError if an element of a tensor is NaN or infinite; copies no finite tensor.

    The message names the tensor by `name`, and its file by `label`.
    """
    if tensor.numel() == 0:
        return
    low, high = torch.aminmax(tensor)
    if not (math.isfinite(low.item()) and math.isfinite(high.item())):
        bad = int((~torch.isfinite(tensor)).sum())
        raise WeightsError(
            f"{where}: {label}: invalid numbers; got {bad} of {tensor.numel():,} elements NaN or "
            f"infinite in {name}, expected finite elements. Fetch the file again, or use an "
            "earlier file of the run that wrote it."
        )


def covered(
    expected: Shapes,
    items: Iterable[tuple[str, Tensor]],
    *,
    where: str,
    may_be_missing: frozenset[str] = frozenset(),
) -> Iterator[tuple[str, Tensor]]:
    """Yields the pairs of `items` that fit a model, and checks that the model lacks no tensor.

    Args:
        expected: {name: shape} of every tensor of the model.
        items: (our name, tensor) pairs.
        may_be_missing: Names of the model's tensors that may be missing.

    Raises: WeightsError: after the last pair, naming tensors that are missing, unused, duplicate or
        of another shape.
    """
    checked: set[str] = set()
    left_over, misfits, twice = [], [], []
    for name, tensor in items:
        if name not in expected:
            left_over.append(name)
        elif name in checked:
            twice.append(name)
        else:
            checked.add(name)
            if tuple(tensor.shape) == tuple(expected[name]):
                yield name, tensor
            else:
                misfits.append(f"{name} {tuple(tensor.shape)} for {tuple(expected[name])}")
    missing = [name for name in expected if name not in checked | may_be_missing]
    if complaints := _complaints(missing, left_over, misfits, twice):
        raise WeightsError(
            f"{where}: the weights do not fit the model; got {'; '.join(complaints)}, expected all "
            f"{len(expected)} tensors of the model and no other. Name the model that the file "
            "holds (--teacher.model, --teacher.architecture.*)."
        )


def _complaints(*groups: list[str]) -> list[str]:
    words = ("missing", "left over", "of another shape", "given twice")
    return [
        f"{word}: {first_names(names)}" for word, names in zip(words, groups, strict=False) if names
    ]
