"""The `Family` of timm's backbones; timm is imported only when needed."""

from __future__ import annotations

from functools import partial

from fd_large.backbones.exports import Export
from fd_large.backbones.family import Family, Scheme
from fd_large.backbones.later import later
from fd_large.backbones.timm.architecture import TimmArchitecture
from fd_large.backbones.translation import FEATURE_DISTILLATION, table

_RANDOM = "=random"
_OWN = table("* net.*")
_IN_STUDENT = table("encoder.* net.*") + FEATURE_DISTILLATION


def _untrained(rest: str) -> str | None:
    return rest.removesuffix(_RANDOM) if rest.endswith(_RANDOM) else None


# timm's import imports Weights & Biases for its training log, in a third of the second that it
# takes.
_later = partial(later, "timm", hides=("wandb",))


TIMM = Family(
    architecture=TimmArchitecture,
    build=_later("timm_backbone", "build"),
    matched=_later("published", "matched"),
    facts_of=_later("published", "facts_of"),
    of_config=_later("published", "of_config"),
    exports={
        "timm": Export(
            names=lambda a: f"those of timm's {a.timm_name}",
            rows=lambda a: _OWN,
            lacks=_later("export", "lacks"),
            added=_later("export", "added"),
            config=_later("export", "config"),
            class_name=_later("export", "class_name"),
            lacks_place=_later("export", "lacks"),
        ),
        "fd": Export(
            names=lambda a: f"Feature-Distillation's, around those of timm's {a.timm_name}",
            rows=lambda a: _IN_STUDENT,
        ),
    },
    scheme=Scheme(
        settle=_later("published", "settle"),
        load=_later("published", "load"),
        fetch=_later("published", "fetch"),
        save=_later("published", "save"),
        weightless=_later("published", "weightless"),
        untrained=_untrained,
    ),
    resizes=_later("published", "resizes"),
)
