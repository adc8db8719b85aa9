"""Models of the user's own, as the package sees them."""

from __future__ import annotations

from fd_large.backbones.custom.architecture import CustomArchitecture
from fd_large.backbones.custom.custom import build_own
from fd_large.backbones.family import Family

CUSTOM = Family(
    architecture=CustomArchitecture,
    build=lambda architecture, options: build_own(architecture.function),
)
