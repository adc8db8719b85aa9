"""A tiny run on a few labelled images."""

import pytest


@pytest.fixture
def root(tmp_path):
    """Labelled images, red and green."""
    import numpy as np
    from PIL import Image

    for split, count in (("train", 8), ("val", 4)):
        for number in range(count):
            color = number % 2
            folder = tmp_path / split / ("red", "green")[color]
            folder.mkdir(parents=True, exist_ok=True)
            levels = np.zeros((40, 48, 3), np.uint8)
            levels[..., color] = 200 + number
            Image.fromarray(levels).save(folder / f"{number}.png")
    return tmp_path


@pytest.fixture
def run(root):
    """A random ViT teaches them to a Swin V2, four at a time."""
    import tiny_runs

    from fd_large.recipes.fields import override

    fields = {"batch.global_batch_size": 4, "data.workers": 0, "eval.views": 3, "eval.root": ""}
    return override(tiny_runs.tiny_run(str(root / "train")), fields)
