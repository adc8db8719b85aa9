"""benchmarks/claim.py: images of either archive, intervals that hold, rows that are made once."""

from __future__ import annotations

import io
import json
import pickle
import sys
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "benchmarks"))

import claim
import claim_images
import claim_table

TRAIN, TEST = 60, 30
COUNTS = claim_images.Counts(unlabelled=35, labelled=20, held_out=10, test=20)


def put(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    archive.addfile(member, io.BytesIO(content))


@pytest.fixture
def images() -> dict[str, claim_images.Images]:
    """Every block of ten has one image of each class."""
    rng = np.random.default_rng(0)
    return {
        split: claim_images.Images(
            rng.integers(0, 256, (number, 32, 32, 3), np.uint8), np.arange(number) % 10
        )
        for split, number in (("train", TRAIN), ("test", TEST))
    }


@pytest.fixture
def listed(tmp_path: Path, images: dict[str, claim_images.Images]) -> Path:
    """A list of fifty of the training images."""
    names = [bytes.fromhex(name[:10]) for name in images["train"].names()[:50]]
    np.save(tmp_path / "images.npy", np.frombuffer(b"".join(names), np.uint8).reshape(-1, 5))
    return tmp_path / "images.npy"


def fd_data(folder: Path, images: dict[str, claim_images.Images]) -> Path:
    """The listed images as FD_DATA has them."""
    folder.mkdir()
    for split, number in (("train", 50), ("test", TEST)):
        pixels, labels = (part[:number] for part in images[split])
        with tarfile.open(folder / claim_images.ARCHIVES[split], "w") as archive:
            strip, numbers = io.BytesIO(), io.BytesIO()
            Image.fromarray(pixels.reshape(-1, 32, 3)).save(strip, "WEBP", lossless=True)
            np.save(numbers, labels.astype(np.uint8))
            put(archive, "strip_000.webp", strip.getvalue())
            put(archive, "labels.npy", numbers.getvalue())
            put(archive, "meta.json", json.dumps({"classes": claim_images.CLASSES}).encode())
    return folder


def official(path: Path, images: dict[str, claim_images.Images], form: str) -> Path:
    """All images in the layout of the official archive, in another order."""
    order = np.random.default_rng(1).permutation(TRAIN)
    splits = {
        "data_batch_1": (images["train"], order[:30]),
        "data_batch_2": (images["train"], order[30:]),
        "test_batch": (images["test"], np.arange(len(images["test"].labels))),
    }
    with tarfile.open(path, "w:gz") as archive:
        for name, (split, places) in splits.items():
            labels = split.labels[places]
            rows = split.pixels[places].transpose(0, 3, 1, 2).reshape(len(places), -1)
            if form == "python":
                batch = {b"data": rows, b"labels": labels.tolist(), b"batch_label": b"of n"}
                put(archive, f"cifar-10-batches-py/{name}", pickle.dumps(batch, protocol=2))
            else:
                both = np.concatenate([labels[:, None].astype(np.uint8), rows], 1)
                put(archive, f"cifar-10-batches-bin/{name}.bin", both.tobytes())
        put(archive, "cifar-10-batches/batches.meta", b"")
    return path


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*.png"))}


@pytest.mark.parametrize("form", ["python", "binary"])
def test_the_official_archive_gives_the_same_folders(tmp_path, images, listed, form):
    sources = {
        "own": fd_data(tmp_path / "data", images),
        "theirs": official(tmp_path / f"{form}.tar.gz", images, form),
    }
    for name, source in sources.items():
        claim_images.write_images(source, tmp_path / name, COUNTS, listed=listed)
    own, theirs = (files(tmp_path / name) for name in sources)
    assert own == theirs
    assert len(own) == sum(COUNTS)
    held_out = claim_images.is_held_out(tmp_path / "own")
    assert (len(held_out), held_out.sum()) == (COUNTS.held_out + COUNTS.test, COUNTS.held_out)
    assert held_out[:3].tolist() == [False, False, True]


def test_labels_and_held_out_images_are_apart_and_in_all_classes(tmp_path, images, listed):
    claim_images.write_images(fd_data(tmp_path / "data", images), tmp_path, COUNTS, listed=listed)
    places = [tmp_path / "labelled" / part for part in ("train", "test")]
    for place in places:
        assert sorted(p.name for p in place.iterdir()) == sorted(claim_images.CLASSES)
    trained, tested = (
        {path.stem.removeprefix(claim_images.HELD_OUT) for path in place.glob("*/*.png")}
        for place in places
    )
    assert not trained & tested


def test_an_archive_runs_nothing(tmp_path, listed):
    class Evil:
        def __reduce__(self):
            return exec, ("raise SystemExit('ran')",)

    with tarfile.open(tmp_path / "evil.tar", "w") as archive:
        put(archive, "x/data_batch_1", pickle.dumps(Evil()))
    with pytest.raises(SystemExit, match="exec: neither a plain value nor an array"):
        claim_images.read(tmp_path / "evil.tar", listed)


def test_a_source_that_is_not_cifar_is_refused(tmp_path, images, listed):
    (tmp_path / "text.tar.gz").write_text("no archive")
    whole = official(tmp_path / "whole.tar.gz", images, "binary").read_bytes()
    (tmp_path / "cut.tar.gz").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "empty").mkdir()
    for name in ("missing.tar.gz", "text.tar.gz", "cut.tar.gz", "empty"):
        with pytest.raises(SystemExit, match=f"{name}: not read as CIFAR-10.* Name by --data"):
            claim_images.read(tmp_path / name, listed)
    few = {**images, "test": claim_images.Images(*(part[:15] for part in images["test"]))}
    source = official(tmp_path / "few.tar.gz", few, "binary")
    with pytest.raises(SystemExit, match="too few test images of a class; got 1, expected 2"):
        claim_images.write_images(source, tmp_path / "images", COUNTS, listed=listed)
    assert not (tmp_path / "images").exists()


@pytest.mark.parametrize(
    ("control", "teacher", "expected"),
    [
        ((0.1, 0.9), (0.1, 3.0), "shown"),
        ((1.2, 3.0), (0.1, 3.0), "shown"),
        # Better than a control that became worse than the teacher.
        ((1.2, 3.0), (-0.1, 3.0), "open"),
        ((0.1, 0.9), (-0.1, 3.0), "refuted at this size"),
        ((-0.9, 0.9), (1.0, 3.0), "refuted at this size"),
        ((-3.0, -0.1), (1.0, 3.0), "refuted at this size"),
        ((-0.9, 1.1), (1.0, 3.0), "open"),
        ((-1.1, 0.9), (1.0, 3.0), "open"),
    ],
)
def test_the_judgement_is_the_registered_one(control, teacher, expected):
    assert claim_table.judgement(control, teacher) == expected


def rows_of(rng, *, gap: float, pairs: int = 6, seeds: int = 2, images: int = 2000):
    """Rows of models whose accuracy has a spread over teachers, seeds and images."""
    rows, hardness = {}, rng.normal(0, 1, images)
    taste = rng.normal(0, 0.2, (2, images))
    for pair in range(pairs):
        for kind, extra in (("teacher", 0.0), ("control", 0.0), ("student", gap)):
            skill = extra + rng.normal(0, 0.02) + rng.normal(0, 0.02, (2, seeds, 1))
            side = taste[int(kind == "student")]
            noise = rng.normal(0, 0.5, (2, seeds, images))
            rows[pair, kind] = {
                "right": skill - np.array([0, 1.0])[:, None, None] > hardness + side + noise,
                "held_out": np.arange(images) < images // 5,
                "cpu_hours": {"train": 1.0},
                "loss_end": 0.1,
            }
    return rows


def test_intervals_hold_teachers_seeds_and_images(monkeypatch):
    monkeypatch.setattr("fd_large.probes.paired.DRAWS", 300)
    rng, held = np.random.default_rng(0), 0
    for _ in range(60):
        # Students are no better than controls, whichever teachers, seeds and images are drawn.
        low, high = claim_table.table_of(rows_of(rng, gap=0.0), (1, 2), 6)["differences"][0][
            "interval"
        ]
        held += low <= 0 <= high
    assert held >= 0.9 * 60


def test_table_and_plot_of_some_rows(tmp_path):
    rows = rows_of(np.random.default_rng(1), gap=0.3)
    assert claim_table.table_of(rows, (0.002, 0.004), 6)["judgement"] == "shown"
    del rows[5, "student"]
    table = claim_table.table_of(rows, (0.002, 0.004), 6)
    assert {kind: row["pairs"] for kind, row in table["rows"].items()} == {
        **{"teacher": 6, "control": 6, "student": 5}
    }
    assert all(row["rate"] == 0.002 for row in table["rows"].values())
    first = table["differences"][0]
    assert (first["row"], first["other"]) == ("student", "control")
    assert len(first["of_pairs"]) == 5
    assert first["interval"][0] > 0
    assert table["judgement"].startswith("not judged without all 6")
    assert "student less control, 5 pairs: " in claim_table.text_of(table)
    claim_table.draw(table, tmp_path / "table.png")
    assert Image.open(tmp_path / "table.png").width > 1000
    one = {key: row for key, row in rows.items() if key[0] == 0}
    assert claim_table.table_of(one, (1, 2), 6)["differences"][0]["interval"] is None


def test_rows_of_the_second_registration_leave_the_judgement_as_it_is(tmp_path):
    rows = rows_of(np.random.default_rng(1), gap=0.3)
    judged = claim_table.table_of(rows, (0.002, 0.004), 6)
    for pair in (0, 1):
        rows[pair, "pooled"] = rows[pair, "teacher"]
    table = claim_table.table_of(rows, (0.002, 0.004), 6)
    assert table["judgement"] == judged["judgement"] == "shown"
    assert table["differences"][:3] == judged["differences"]
    compared = [(gap["row"], gap["other"]) for gap in table["differences"][3:]]
    assert compared == [("student", "pooled"), ("pooled", "teacher")]
    last = table["differences"][-1]
    assert (last["of_pairs"], last["mean"]) == ([0, 0], 0)
    # The accuracies beside a difference are of the two pairs that have both rows.
    of_two = np.mean(table["rows"]["teacher"]["test_of_pairs"][:2], 0)[0]
    assert last["accuracies"] == pytest.approx([of_two] * 2)
    claim_table.draw(table, tmp_path / "table.png")
    assert Image.open(tmp_path / "table.png").width > 1000


def test_a_finished_row_is_not_made_again(tmp_path, images, listed, monkeypatch, capsys):
    design = replace(claim.QUICK, pairs=2, images=COUNTS, rates=(1e-3, 2e-3))
    monkeypatch.setattr(claim_images.write_images, "__kwdefaults__", {"listed": listed})
    made, broken = [], [True]

    def call(self, folder, command, *words):
        words = [str(word) for word in words]
        with (folder / claim.CPU_SECONDS).open("a") as file:
            file.write(f"{command} 1800\n")
        made.append((command, words))
        if command == "train":
            folder = Path(words[words.index("--runtime.run_dir") + 1])
            folder.mkdir(exist_ok=True)
            (folder / "summary.json").write_text('{"loss_start": 2, "loss_end": 1}')
            if "pair_1/student" in str(folder) and broken:
                raise SystemExit("lost")
        elif command == "export":
            Path(words[1]).mkdir()
            (Path(words[1]) / "config.json").touch()
            save_file({"weight": torch.ones(3)}, Path(words[1]) / claim.WEIGHTS)
        elif command == "evaluate":
            out = Path(words[words.index("--out") + 1])
            out.mkdir(exist_ok=True)
            classes = np.zeros((design.seeds, COUNTS.held_out + COUNTS.test), np.int64)
            np.savez(out / "predictions.npz", **{"predicted/run": classes, "labels": classes[0]})

    monkeypatch.setattr(claim.Claim, "_call", call)
    data = fd_data(tmp_path / "data", images)
    explored = {"pooled": 1}
    first = claim.Claim(design, data, tmp_path / "work", tmp_path / "results", explored)
    with pytest.raises(SystemExit, match="some rows failed"):
        first.make(jobs=1)
    assert "pair 1, student: lost" in capsys.readouterr().err
    assert first.left() == [(1, "student")]
    trained = [words for command, words in made if command == "train"]
    seeds = [int(words[words.index("--runtime.seed") + 1]) for words in trained]
    assert seeds == [0, 1, 2, 3, 1000, 1001, 1002]
    teacher = str(tmp_path / "results/pair_0_teacher/weights")
    pooled = trained[3]
    assert pooled[pooled.index("--teachers.pooled.source") + 1] == teacher
    assert pooled[pooled.index("--teachers.pooled.targets") + 1] == "summary"
    # Another machine, to which only the results were carried over, one teacher's before its end.
    (tmp_path / "results/pair_1_teacher/row.json").unlink()
    broken.clear()
    made.clear()
    second = claim.Claim(design, data, tmp_path / "elsewhere", tmp_path / "results", explored)
    second.make(jobs=2)
    tests = ["evaluate", "evaluate"]
    assert [command for command, _ in made] == ["cache", *tests, "train", *tests]
    assert str(tmp_path / "results/pair_1_teacher/weights") in made[3][1]
    assert not second.left()
    rows = second.rows()
    assert rows[0, "control"]["right"].shape == (2, 1, 30)
    assert rows[0, "control"]["cpu_hours"] == {"train": 0.5, "evaluate": 1.0}
    stored = load_file(tmp_path / "results/pair_0_teacher/weights" / claim.WEIGHTS)
    assert stored["weight"].dtype == torch.float16
    another = replace(design, seeds=9)
    other = claim.Claim(another, data, tmp_path / "work", tmp_path / "results")
    for reading in (other.left, other.rows):
        with pytest.raises(SystemExit, match=r"got {'seeds': 1}, expected {'seeds': 9}.*--results"):
            reading()
    # A work folder, with its images, is of one design too.
    other = claim.Claim(another, data, tmp_path / "work", tmp_path / "empty")
    with pytest.raises(SystemExit, match=r"design\.json: of another design.*--work"):
        other.make(jobs=1)


def test_the_command_judges_no_quick_look(tmp_path, monkeypatch, capsys):
    rows = rows_of(np.random.default_rng(0), gap=0.3, pairs=claim.QUICK.pairs)
    monkeypatch.setattr(claim.Claim, "rows", lambda self: rows)
    # The name of the folder of rows has a dot.
    flags = ["claim.py", "--quick", "--table", "--results", str(tmp_path / "rows.1")]
    monkeypatch.setattr(sys, "argv", flags)
    monkeypatch.setattr(claim, "QUICK", replace(claim.QUICK, rates=(1, 2)))
    assert claim.main() == 0
    table = json.loads((tmp_path / "rows.1.json").read_text())
    assert table["judgement"].startswith("not judged without all 8")
    assert (tmp_path / "rows.1.png").is_file()
    rows.clear()
    with pytest.raises(SystemExit, match=r"rows\.1: no finished row.*--results"):
        claim.main()
    monkeypatch.setattr(sys, "argv", ["claim.py", "--jobs", "0"])
    with pytest.raises(SystemExit):
        claim.main()
    assert "--jobs: too few pairs at a time; got 0" in capsys.readouterr().err
