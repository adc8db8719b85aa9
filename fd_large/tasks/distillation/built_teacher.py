"""A recipe's teacher with its weights, where the recipe wants them held."""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch

from fd_large.engine.frozen import Frozen, frozen_weights
from fd_large.ranks import distributed
from fd_large.recipes.architectures import resolve
from fd_large.recipes.sections import RANDOM
from fd_large.tasks.distillation.embedding import projection_of
from fd_large.tasks.distillation.section import NamedTeacher
from fd_large.tasks.distillation.teacher import PlacedTeacher, place
from fd_large.tasks.distillation.teacher_grids import called, source_flag
from fd_large.weights.resolve import Sources

log = logging.getLogger(__name__)


def built_teacher(
    name: str,
    entry: NamedTeacher,
    make: Callable[[], Frozen],
    sources: Sources,
    *,
    student_type: str,
    seed: int,
    node_size: int,
    persistence_threshold: int,
) -> PlacedTeacher:
    """Builds a teacher, as `place` does, and says in the log what came of it; a collective.

    Args:
        name: The teacher's name; "" for an only one.
        entry: What the settled recipe says of it.
        make: Constructs it with random weights.
        sources: Opens its weights.
        student_type: Data type of the student's matrix products, which is the teacher's unless its
            entry names one.
        seed: Seed of random weights.
        node_size: Number of ranks per node.
        persistence_threshold: Tensors of at most so many elements stay whole.
    """
    where, title = source_flag(name), called(name)
    weights = frozen_weights(entry, sources, where=where)
    if entry.source == RANDOM:
        log.warning("%s: RANDOM weights (%s random): there is nothing to learn", title, where)
    teacher = place(
        make,
        placement=entry.placement,
        dtype=getattr(torch, student_type if entry.dtype == "auto" else entry.dtype),
        seed=seed,
        node_size=node_size,
        persistence_threshold=persistence_threshold,
        weights=weights,
        whole_first=resolve(entry.model, entry.architecture).whole_first,
        where=where,
    )
    log.debug(
        "%s: %s, %s, %.1f MB on this rank, hash %s",
        title,
        entry.model,
        entry.placement,
        teacher.held_bytes() / 1e6,
        teacher.fingerprint,
    )
    if entry.embedding_width:
        found = projection_of(name, entry, sources)
        teacher.projection = found.float().to(distributed.device())
    return teacher
