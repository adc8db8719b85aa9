from __future__ import annotations

import json
import pickle
import shutil

import pytest

from fd_large.data import roots, saved_dataset
from fd_large.data.folder import ImageFolder
from fd_large.data.labelled import open_split
from fd_large.data.loader import ViewBatches, build_loader
from fd_large.data.sampler import Portion
from fd_large.data.saved_dataset import SavedDataset
from fd_large.data.source import open_images
from fd_large.data.views import ViewSettings
from fd_large.errors import DataError

datasets = pytest.importorskip("datasets")


@pytest.fixture(scope="module")
def saved(tmp_path_factory, picture_folder):
    """The images as datasets saves them, in two parts."""
    folder = ImageFolder(picture_folder)
    labels, names = folder.labels()
    features = datasets.Features(
        image=datasets.Image(), label=datasets.ClassLabel(names=list(names))
    )
    cells = [{"bytes": bytes(folder.read(i)), "path": None} for i in range(26)]
    cells[25] = {"bytes": None, "path": folder[25]}
    whole = datasets.Dataset.from_dict(
        {"image": cells, "label": labels.tolist()}, features=features
    )
    root = tmp_path_factory.mktemp("saved")
    parts = {"train": whole, "test": whole.select(range(0, 26, 2))}
    datasets.DatasetDict(parts).save_to_disk(root)
    return root


def test_the_rows_are_the_images_of_the_folder(saved, picture_folder):
    folder, source = ImageFolder(picture_folder), open_images(f"{saved}/train")
    assert isinstance(source, SavedDataset)
    copy = pickle.loads(pickle.dumps(source))
    assert len(source) == len(copy) == 26
    for index in range(26):
        assert source.read(index) == copy.read(index) == folder.read(index)
    assert source[3] == f"{saved}/train/3"
    with pytest.raises(IndexError):
        source[26]
    assert open_images(f"{saved}/train").fingerprint == source.fingerprint
    assert open_images(f"{saved}/test").fingerprint != source.fingerprint


def test_order_and_pixels_are_those_of_the_folder(saved, picture_folder):
    def load(source, workers):
        loader = build_loader(
            ViewBatches(source, ViewSettings(16, 0.5), 1, 2),
            len(source),
            Portion(2, 0, 4, 0, 1),
            global_batch_size=8,
            workers=workers,
        )
        return [(b.indices.tolist(), b.images.numpy().tobytes(), b.bad) for b in loader]

    assert load(open_images(f"{saved}/train"), 2) == load(ImageFolder(picture_folder), 0)


def test_its_parts_and_classes_are_known(saved):
    train = open_split(str(saved), "train")
    test = open_split(str(saved), "val", train.classes)
    assert train.classes == ("a", "b", "c")
    assert test.labels.tolist() == train.labels[::2].tolist()


def test_mistakes_are_one_sentence(saved, tmp_path, monkeypatch):
    with pytest.raises(DataError, match=r"with test, train"):
        open_images(str(saved))
    for name in ("state.json", "dataset_info.json"):
        (tmp_path / name).write_text("{}")
    with pytest.raises(DataError, match=r"^data\.root: .*opened; got "):
        open_images(str(tmp_path))
    monkeypatch.setattr(roots, "find_spec", lambda name: None)
    with pytest.raises(DataError, match="install datasets"):
        open_images(f"{saved}/train")


def test_no_file_outside_and_no_cell_larger_than_a_file_is_read(saved, tmp_path, monkeypatch):
    (tmp_path / "private.png").write_bytes(b"private")
    names = ["../private.png", str(tmp_path / "private.png"), f"/{tmp_path}/private.png"]
    cells = [{"bytes": None, "path": name} for name in names]
    cells.append({"bytes": b"1" * 5000, "path": None})
    # Of an `Image`, the library itself would store the bytes.
    cell = {"bytes": datasets.Value("binary"), "path": datasets.Value("string")}
    whole = datasets.Dataset.from_dict({"image": cells}, features=datasets.Features(image=cell))
    whole.save_to_disk(tmp_path / "own")
    source = open_images(str(tmp_path / "own"))
    for index in range(3):
        with pytest.raises(DataError, match="private"):
            source.read(index)
    # The same name is found below the dataset.
    shutil.copy(tmp_path / "private.png", tmp_path / "own")
    assert source.read(1) == b"private"
    assert source.read(3) == b"1" * 5000
    monkeypatch.setattr(saved_dataset, "MAX_FILE_BYTES", 4999)
    with pytest.raises(DataError, match="5000 bytes"):
        source.read(3)


@pytest.mark.parametrize("name", ["/etc/passwd", "../other/data-00000-of-00001.arrow", "a/b", 7])
def test_a_file_of_another_folder_is_not_read(saved, tmp_path, name):
    shutil.copytree(saved / "train", tmp_path / "train")
    file = tmp_path / "train" / "state.json"
    state = json.loads(file.read_text())
    state["_data_files"] = [{"filename": name}]
    file.write_text(json.dumps(state))
    with pytest.raises(DataError, match=r"^data\.root: .*opened"):
        open_images(str(tmp_path / "train"))
