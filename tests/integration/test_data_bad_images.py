"""Every odd file and shard of `bad_images.tar` ends as its manifest says, in bounded memory.

Each goes through the loader in a process of its own: a crash, a hang or a gigabyte would show.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
MOST_BYTES = 10**9
TIMEOUT_SECONDS = 60

# A fork for each image, so that torch is imported once; prints a line of JSON for each.
PROGRAM = """
import json, os, resource, sys, logging
import torch
torch.set_num_threads(1)
from fd_large.data.decode import decode
from fd_large.data.loader import ViewBatches, build_loader
from fd_large.data.sampler import Portion
from fd_large.data.source import open_images
from fd_large.data.views import ViewSettings
from fd_large.errors import DataError
logging.disable()

def try_one(path):
    try:
        source = open_images(path)
    except DataError as error:
        return {"error": str(error)}
    decoded, skipped = 0, []
    for index in range(len(source)):
        try:
            image = decode(source.read(index), source[index])
        except DataError as error:
            skipped.append(str(error))
            continue
        decoded += 1
        shape, dtype = list(image.shape), str(image.dtype)
        mean = image.double().mean(dim=(1, 2)).tolist()
    batches = list(build_loader(
        ViewBatches(source, ViewSettings(224, 0.08), 0, 0), len(source), Portion(0, 0, 1, 0, 1),
        global_batch_size=1, workers=0,
    ))
    result = {
        "num": len(source), "decoded": decoded, "skipped": skipped,
        "torn": list(getattr(source, "torn", ())),
        "bad": sum(bool(batch.bad) for batch in batches),
        "views": [list(batch.images.shape) for batch in batches],
    }
    if decoded:
        result |= {"shape": shape, "dtype": dtype, "mean": mean}
    return result

for path in sys.argv[1:]:
    pid = os.fork()
    if not pid:
        result = try_one(path)
        result["peak"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        print(json.dumps({"path": path, **result}), flush=True)
        os._exit(0)
    _, status = os.waitpid(pid, 0)
    if status:
        print(json.dumps({"path": path, "crashed": status}), flush=True)
"""


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[dict, dict]]:
    """Name to (manifest, what happened)."""
    data = Path(os.environ.get("FD_DATA", REPOSITORY / ".." / "shared" / "data"))
    if not (data / "bad_images.tar").is_file():
        pytest.skip("FD_DATA has no bad_images.tar")
    root = tmp_path_factory.mktemp("bad")
    with tarfile.open(data / "bad_images.tar") as archive:
        archive.extractall(root, filter="data")
    manifest = json.loads((root / "manifest.json").read_text())["files"]
    paths = []
    for name in manifest:
        if name.endswith(".tar"):
            paths.append(root / name)
        else:  # a folder of its own
            folder = root / "one" / str(len(paths))
            folder.mkdir(parents=True)
            (root / name).rename(folder / name)
            paths.append(folder)
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *map(str, paths)],
        capture_output=True,
        text=True,
        timeout=TIMEOUT_SECONDS * 3,
        env={**os.environ, "FD_CACHE": str(root / "cache")},
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""  # nothing that the decoders print comes through
    results = [json.loads(line) for line in done.stdout.splitlines()]
    assert [result["path"] for result in results] == list(map(str, paths))
    return dict(zip(manifest, zip(manifest.values(), results, strict=True), strict=True))


def test_pictures_end_as_their_manifest_says(outcomes):
    wrong, num = {}, 0
    for name, (facts, result) in outcomes.items():
        if name.endswith(".tar"):
            continue
        num += 1
        decoded = result.get("decoded")
        ended = not {"crashed", "error"} & set(result) and result["views"] == [[1, 3, 224, 224]]
        as_expected = facts["expect"] in ("any", "ok" if decoded else "skip")
        sound = not decoded or (
            result["shape"][0] == 3
            and result["dtype"] == "torch.uint8"
            and result["shape"][:0:-1] == facts["size_after_exif"]
        )
        if not (ended and as_expected and sound and result["bad"] == 1 - decoded):
            wrong[name] = result
    assert not wrong
    assert num == 45


def test_pictures_have_the_colors_that_pillow_sees(outcomes):
    for name, (facts, result) in outcomes.items():
        if facts["expect"] == "ok" and "pil_rgb_mean" in facts:
            # where Pillow clips to white
            wanted = [125.25] * 3 if name == "gray16.png" else facts["pil_rgb_mean"]
            assert result["mean"] == pytest.approx(wanted, abs=1), name


def test_shards_end_as_their_manifest_says(outcomes):
    found = {
        name: (result["num"], result["decoded"], len(result["skipped"]), len(result["torn"]))
        for name, (_, result) in outcomes.items()
        if name.endswith(".tar")
    }
    assert found == {
        "shard_good.tar": (4, 4, 0, 0),
        "shard_cut.tar": (3, 3, 0, 1),
        "shard_bad_checksum.tar": (2, 2, 0, 1),
        "shard_mixed.tar": (4, 2, 2, 0),
    }


def test_bombs_and_the_picture_over_the_limit_are_refused_by_their_size(outcomes):
    for name in ("bomb_65000.jpg", "bomb_30000.png", "warn_12000x10000.png"):
        assert "too large; got" in outcomes[name][1]["skipped"][0]


def test_none_takes_a_gigabyte(outcomes):
    peaks = {name: result["peak"] for name, (_, result) in outcomes.items()}
    assert max(peaks.values()) < MOST_BYTES, peaks
