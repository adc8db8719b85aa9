"""A table of features is the same from one rank, from several, and after a kill."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from launch import run_ranks
from pictures import write_pictures

PROGRAM = Path(__file__).parent / "programs" / "embed_in_parts.py"


def test_two_ranks_that_are_killed_write_the_table_of_one(tmp_path: Path) -> None:
    images = write_pictures(tmp_path / "images", 19, size=40)

    def embed(name: str, ranks: int, **env: str) -> list[int]:
        words = ("timm:test_vit=random", "--data.root", images, "--out", tmp_path / name)
        words += ("--batch_size", 2, "--data.image_size", 32, "--data.workers", 0)
        return run_ranks(PROGRAM, *words, ranks=ranks, env=env, check=not env).returncodes

    assert embed("one.npz", 1) == [0]
    assert embed("two.npz", 2, KILLED_AT="3")[0] != 0
    parts = tmp_path / "two.npz.parts"
    whole = [path.name for path in sorted(parts.iterdir()) if path.is_dir() and not path.suffix]
    assert whole == ["000000000000", "000000000004"]
    assert not (tmp_path / "two.npz").exists()
    assert embed("two.npz", 2) == [0, 0]
    one, two = (np.load(tmp_path / name) for name in ("one.npz", "two.npz"))
    assert one["names"].tolist() == [f"{number:03d}.png" for number in range(19)]
    assert (one["names"] == two["names"]).all()
    assert (one["features"] == two["features"]).all()
    assert len(np.unique(one["features"], axis=0)) == 19
    assert not parts.exists()
