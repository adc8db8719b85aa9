"""The image embedding of a CLIP teacher: its summary, projected into the space of its texts.

The projection stands in the teacher's weights after its final norm, where no map needs it.
"""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from fd_large.backbones.vit.published import TEXT_PROJECTIONS
from fd_large.errors import ConfigError
from fd_large.recipes.architectures import resolve
from fd_large.recipes.sections import RANDOM
from fd_large.tasks.distillation.section import EMBEDDING, SUMMARY, NamedTeacher, cached_folder
from fd_large.tasks.distillation.teacher_grids import source_flag
from fd_large.weights.resolve import Sources


def with_embedding(name: str, entry: NamedTeacher, sources: Sources) -> NamedTeacher:
    """Returns a settled entry with the width of its embedding, if that is learnt.

    Raises: ConfigError: if its weights have no embedding.
    """
    if entry.summary.layer != EMBEDDING or SUMMARY not in entry.targets:
        return entry
    if entry.layer != "last":
        raise ConfigError(
            f"teachers.{name}.summary.layer: an embedding follows the final norm; got {EMBEDDING} "
            f"with layer {entry.layer}, expected last. Leave one of them out."
        )
    tensor, is_transposed = _named(name, entry, sources)
    shape = sources.resolve(entry.source).tensors.shape(tensor)
    width = shape[1] if is_transposed else shape[0]
    return replace(entry, summary=replace(entry.summary, width=width))


def projection_of(name: str, entry: NamedTeacher, sources: Sources) -> Tensor:
    """Returns the projection, (channels of the embedding, channels of the map).

    Raises: ConfigError: if the weights have none.
    """
    tensor, is_transposed = _named(name, entry, sources)
    found = sources.resolve(entry.source).tensors[tensor]
    return found.T if is_transposed else found


def _named(name: str, entry: NamedTeacher, sources: Sources) -> tuple[str, bool]:
    """The name of the projection in the teacher's weights, and whether it is transposed."""
    got = f"{entry.source or 'none'}"
    if entry.source and entry.source != RANDOM and not cached_folder(entry.source):
        tensors = sources.resolve(entry.source, where=source_flag(name)).tensors
        named = next((one for one in TEXT_PROJECTIONS if one in tensors), None)
        if named is not None:
            is_transposed = TEXT_PROJECTIONS[named]
            into = tensors.shape(named)[0 if is_transposed else 1]
            width = getattr(resolve(entry.model, entry.architecture), "width", 0)
            if into == width:
                return named, is_transposed
            got = f"{named} of {into} channels for a map of {width}"
    raise ConfigError(
        f"teachers.{name}.summary.layer: no projection into the space of texts in the teacher's "
        f"weights; got {got}, expected the file or folder of a CLIP ViT with "
        f"{' or '.join(TEXT_PROJECTIONS)}. Name one, for example open_clip:ViT-B-16/openai, or "
        f"leave {EMBEDDING} out."
    )
