"""Images for the tests of this room: made here, or real ones from FD_DATA."""

from __future__ import annotations

import os
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

REPOSITORY = Path(__file__).resolve().parents[3]


def find_data_file(name: str) -> Path:
    folder = Path(os.environ.get("FD_DATA", REPOSITORY / ".." / "shared" / "data"))
    if not (folder / name).is_file():
        pytest.skip(f"FD_DATA has no {name}")
    return folder / name


def make_photograph(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Smooth shapes and some grain, (H, W, 3) uint8: compresses and resizes like a photograph."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width]
    image = np.zeros((height, width, 3))
    for _ in range(6):
        wave = np.sin(x * rng.uniform(-0.1, 0.1) + y * rng.uniform(-0.1, 0.1) + rng.uniform(0, 6))
        image += wave[..., None] * rng.uniform(0, 40, 3)
    image += rng.normal(128, 6, image.shape)
    return image.clip(0, 255).astype(np.uint8)


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder of the test's own."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("FD_CACHE", str(folder))
    return folder


@pytest.fixture(scope="session")
def data_file() -> Callable[[str], Path]:
    """Finds a file of FD_DATA, or skips the test."""
    return find_data_file


@pytest.fixture(scope="session")
def photograph() -> Callable[..., np.ndarray]:
    """Makes an image of a given height and width."""
    return make_photograph


@pytest.fixture(scope="session")
def picture_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """26 small images in sub folders: JPEG, PNG, greyscale, EXIF-turned, palette, BMP."""
    root = tmp_path_factory.mktemp("pictures")
    for number in range(26):
        folder = root / "abc"[number % 3]
        folder.mkdir(exist_ok=True)
        picture = Image.fromarray(make_photograph(40 + number, 72 - number, seed=number))
        if number % 13 == 3:
            picture.convert("L").save(folder / f"{number}.jpg")
        elif number % 13 == 5:
            exif = Image.Exif()
            exif[0x0112] = 6
            picture.save(folder / f"{number}.JPEG", exif=exif)
        elif number % 13 == 7:
            picture.convert("P").save(folder / f"{number}.png")
        elif number % 13 == 9:
            picture.save(folder / f"{number}.bmp")
        elif number % 2:
            picture.save(folder / f"{number}.png")
        else:
            picture.save(folder / f"{number}.jpg", quality=90)
    return root


@pytest.fixture
def shards(tmp_path: Path, picture_folder: Path) -> Path:
    """The image folder in three shards, its order shuffled, with members of other kinds."""
    folder = tmp_path / "shards"
    folder.mkdir()
    names = sorted(str(path.relative_to(picture_folder)) for path in picture_folder.rglob("*.*"))
    names = names[::-2] + names[-2::-2]
    label = tmp_path / "label.cls"
    label.write_text("7")
    for number in range(3):
        with tarfile.open(folder / f"train-{number:03}.tar", "w") as archive:
            for name in names[number::3]:
                archive.add(picture_folder / name, f"./{name}" if number == 1 else name)
                archive.add(label, os.path.splitext(name)[0] + ".cls")
            archive.add(label, ".hidden.jpg")
            archive.add(label, "__MACOSX/._a.jpg")
    return folder


@pytest.fixture(scope="session")
def photo_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 ImageNet images, among them greyscale ones and the one that EXIF turns."""
    root = tmp_path_factory.mktemp("photos")
    with tarfile.open(find_data_file("imagenet_sample256.tar")) as archive:
        members = [member for member in archive if member.name.endswith(".JPEG")]
        turned = [member for member in members if "can_opener" in member.name]
        for member in turned + [m for m in members if m not in turned][:: len(members) // 23][:23]:
            archive.extract(member, root, filter="data")
    return root


@pytest.fixture
def tables(tmp_path: Path, picture_folder: Path) -> Path:
    """The image folder as parquet files as on Hugging Face's hub: two parts, seven row groups."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    names = sorted(str(path.relative_to(picture_folder)) for path in picture_folder.rglob("*.*"))
    cells = [{"bytes": (picture_folder / name).read_bytes(), "path": name} for name in names]
    kind = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    table = pa.table({"image": pa.array(cells, kind), "label": [name[0] for name in names]})
    folder = tmp_path / "tables" / "data"
    folder.mkdir(parents=True)
    for part, rows in (("train", table[:22]), ("validation", table[22:])):
        pq.write_table(rows, folder / f"{part}-00000-of-00001.parquet", row_group_size=4)
    return tmp_path / "tables"
