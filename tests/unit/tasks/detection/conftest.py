from __future__ import annotations

from pathlib import Path

import pytest
from coco import unpack_coco_tiny


@pytest.fixture(scope="session")
def coco_tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the real coco_tiny."""
    return unpack_coco_tiny(tmp_path_factory.mktemp("coco_tiny"))
