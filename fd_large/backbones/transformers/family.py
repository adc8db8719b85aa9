"""The `Family` of transformers' vision models; transformers is imported when needed."""

from __future__ import annotations

from functools import partial

from fd_large.backbones.family import Family
from fd_large.backbones.later import later
from fd_large.backbones.transformers.architecture import TransformersArchitecture

_later = partial(later, "transformers")


TRANSFORMERS = Family(
    architecture=TransformersArchitecture,
    build=_later("transformers_backbone", "build"),
    matched=_later("published", "matched"),
    facts_of=_later("published", "facts_of"),
    of_config=_later("published", "of_config"),
)
