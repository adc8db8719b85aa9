"""A state dict in our names, by the table of a published format."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from torch import Tensor

from fd_large.backbones.translation import translated
from fd_large.weights.published import FORMATS


def translate(form: str, items: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Yields (our name, tensor) for every tensor that is not dropped on purpose.

    The projection of a student's file comes as `projection.weight` (Ct, Cs) and `projection.bias`.
    """
    tensors = dict(items)
    for name, piece in translated(tensors, FORMATS[form].format.rows).pieces.items():
        yield name, piece.read(tensors)
