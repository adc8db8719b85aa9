"""How many images per second and core do this package's loader and other loaders make?

    python benchmarks/data_pipeline.py [--quick]

Each pipeline reads the 256 images of `imagenet_sample256.tar` (FD_DATA, default ../shared/data)
from the page cache and makes random resized crops of 224 pixels with flips, in one thread of one
process: folders, tar shards, parquet files and a saved Hugging Face dataset from a disk; parquet
files and tar shards from an S3 server on the loopback (moto's, a process of its own), whose files
are kept on the disk between rounds or removed ("cold"). The pipelines take turns. Time is processor
time, since other programs share the machine, and a ratio is of times in the same round. Then the
opened files are counted, with the same images in 16 tar files. Finally 100,000 empty files are
listed, first without and then with the stored listing. Writes benchmarks/results/data_pipeline.json
and .png.
"""

from __future__ import annotations

import argparse
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import harness
import numpy as np
import torch
from harness import RESULTS, ROOT
from PIL import Image
from torchvision import transforms

from fd_large.data.blocks import keep_blocks_in
from fd_large.data.listing import SETTLED_SECONDS
from fd_large.data.loader import ViewBatches, build_loader
from fd_large.data.sampler import Portion
from fd_large.data.source import open_images
from fd_large.data.views import ViewSettings

SIZE, MIN_SCALE, BATCH, NUM_SHARDS = 224, 0.08, 32, 16
PIL = "PIL, folder"


def ours(root: str) -> Callable[[int], int]:
    """Returns a pipeline of this package's loader, without loader processes.

    A pipeline is a function of the epoch, which reads all images in the epoch's order and returns
    the number of images.

    Args:
        root: The images, as data.root.
    """
    source = open_images(root)

    def run(epoch: int) -> int:
        loader = build_loader(
            ViewBatches(source, ViewSettings(SIZE, MIN_SCALE), 0, epoch),
            len(source),
            Portion(epoch, 0, BATCH, 0, 1),
            global_batch_size=BATCH,
            workers=0,
        )
        return sum(len(batch.images) for batch in loader)

    return run


def cold(root: str, blocks: str) -> Callable[[int], int]:
    """Returns a pipeline of this package's loader that removes its stored blocks before each epoch.

    Args:
        root: The images, as data.root.
        blocks: Folder of the stored blocks.
    """

    def run(epoch: int) -> int:
        shutil.rmtree(blocks, ignore_errors=True)
        return ours(root)(epoch)

    return run


def in_tables(folder: Path, place: Path) -> None:
    """Writes the images below a folder as parquet files and as a saved Hugging Face dataset.

    Args:
        folder: Folder of the images.
        place: Folder for tables/, with 32 images in a row group, and saved/.
    """
    import datasets

    datasets.disable_progress_bars()
    paths = sorted(folder.rglob("*.JPEG"))
    cells = [{"bytes": path.read_bytes(), "path": path.name} for path in paths]
    features = datasets.Features(image=datasets.Image())
    table = datasets.Dataset.from_dict({"image": cells}, features=features)
    (place / "tables").mkdir()
    for number in range(4):
        part = table.shard(4, number)
        part.to_parquet(place / "tables" / f"train-{number:05}-of-00004.parquet", batch_size=32)
    table.save_to_disk(place / "saved")


@contextmanager
def bucket(folder: Path) -> Iterator[str]:
    """Serves the files of a folder by a local S3 server; yields the URL of the bucket."""
    import boto3

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    os.environ |= {
        "AWS_ACCESS_KEY_ID": "x",
        "AWS_SECRET_ACCESS_KEY": "x",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
    }
    server = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        while True:
            try:
                socket.create_connection(("127.0.0.1", port)).close()
                break
            except ConnectionRefusedError:
                if server.poll() is not None:
                    sys.exit("data_pipeline: moto's server does not start")
                time.sleep(0.1)
        client = boto3.client("s3")
        client.create_bucket(Bucket="images")
        for path in filter(Path.is_file, folder.rglob("*")):
            client.upload_file(str(path), "images", str(path.relative_to(folder)))
        yield "s3://images"
    finally:
        server.terminate()
        server.wait()


def pil_transform() -> transforms.Compose:
    """Returns a random resized crop and a random flip, from a PIL image to a float32 tensor."""
    return transforms.Compose([
        transforms.RandomResizedCrop(SIZE, scale=(MIN_SCALE, 1.0)),
        transforms.RandomHorizontalFlip(),
        transforms.ToTensor(),
    ])  # fmt: skip


def pil(root: str) -> Callable[[int], int]:
    """Returns a pipeline of PIL and torchvision, with batches of `BATCH` images.

    Args:
        root: Folder of the images (.JPEG).
    """
    paths = sorted(path for path in Path(root).rglob("*.JPEG"))
    transform = pil_transform()

    def run(epoch: int) -> int:
        done = 0
        order = np.random.default_rng(epoch).permutation(len(paths))
        for start in range(0, len(order), BATCH):
            views = []
            for index in order[start : start + BATCH]:
                with Image.open(paths[index]) as image:
                    views.append(transform(image.convert("RGB")))
            done += len(torch.stack(views))
        return done

    return run


def webdataset(pattern: str) -> Callable[[int], int] | None:
    """Returns a pipeline of webdataset, which reads tar files in their order.

    The result is None if webdataset is not installed.

    Args:
        pattern: Paths of the tar files with a range in braces, such as FOLDER/{00..15}.tar.
    """
    try:
        import webdataset as wds
    except ImportError:
        return None
    transform = pil_transform()

    def run(_: int) -> int:
        data = wds.WebDataset(pattern, shardshuffle=False).select(lambda sample: "jpeg" in sample)
        data = data.decode("pil").to_tuple("jpeg")
        return sum(len(x) for (x,) in data.map_tuple(transform).batched(BATCH))

    return run


def measure(
    pipelines: dict[str, Callable[[int], int]], repetitions: int
) -> dict[str, dict[str, list[float]]]:
    """Runs the pipelines in turns; returns the images per second of each in each round.

    Args:
        pipelines: {name: function of the epoch that reads all images and returns their number}.
        repetitions: Number of measured rounds; one more round before them is not measured.

    Returns: {name: {"processor": images per second of processor time, "wall": images per second of
        wall time}}, with a value for each round.
    """
    rates = {name: {"processor": [], "wall": []} for name in pipelines}
    for epoch in range(repetitions + 1):
        for name, run in pipelines.items():
            processor, wall = time.process_time(), time.perf_counter()
            num = run(epoch)
            processor, wall = time.process_time() - processor, time.perf_counter() - wall
            if epoch:
                rates[name]["processor"].append(num / processor)
                rates[name]["wall"].append(num / wall)
    return rates


def measure_opens(pipelines: dict[str, Callable[[int], int]]) -> dict[str, list[float]]:
    """Returns how many image and tar files each pipeline opens, divided by the number of images.

    Args:
        pipelines: {name: function of the epoch that reads all images and returns their number}.

    Returns: {name: [number in the first epoch, number in the second epoch]}.
    """
    opened, last = 0, ("", "")

    def audit(event: str, arguments: tuple[object, ...]) -> None:
        nonlocal opened, last
        if event == "open" and str(arguments[0]).endswith((".JPEG", ".tar")):
            path, mode = str(arguments[0]), str(arguments[1])
            # An `opener` that calls os.open, which has no mode, announces itself a second time.
            opened += not (mode == "None" and last[0] == path and last[1] != "None")
            last = path, mode

    sys.addaudithook(audit)
    opens: dict[str, list[float]] = {}
    for name, run in pipelines.items():
        opens[name] = []
        for epoch in range(2):
            before, num = opened, run(epoch)
            opens[name].append(round((opened - before) / num, 4))
    return opens


def in_shards(folder: Path, shards: Path) -> str:
    """Packs the images below `folder` into `NUM_SHARDS` tar files in the folder `shards`.

    Returns: the paths of the files as a pattern for webdataset, such as FOLDER/{00..15}.tar.
    """
    for number in range(NUM_SHARDS):
        with tarfile.open(shards / f"{number:02}.tar", "w") as archive:
            for path in sorted(folder.rglob("*.JPEG"))[number::NUM_SHARDS]:
                # webdataset takes what comes before the first dot for the sample.
                archive.add(path, path.stem.replace(".", "_") + ".jpeg")
    return f"{shards}/{{00..{NUM_SHARDS - 1:02}}}.tar"


def measure_listing(num: int) -> dict[str, float]:
    """Returns the seconds of listing a folder of empty files, without and with the stored listing.

    Args:
        num: Number of files.
    """
    with tempfile.TemporaryDirectory() as folder:
        os.environ["FD_CACHE"] = f"{folder}/cache"
        for number in range(num):
            place = Path(folder, "tree", f"{number % 100:03}")
            if number < 100:
                place.mkdir(parents=True)
            (place / f"{number:08}.jpg").touch()
        time.sleep(1.5 * SETTLED_SECONDS)
        seconds = []
        for _ in range(6):
            start = time.perf_counter()
            assert len(open_images(f"{folder}/tree")) == num
            seconds.append(time.perf_counter() - start)
        (listing,) = Path(folder, "cache", "listings").glob("*.listing")
        return {
            "files": num,
            "first_seconds": round(seconds[0], 3),
            "cached_seconds": round(statistics.median(seconds[1:]), 4),
            "bytes_per_file": round(listing.stat().st_size / num, 1),
        }


def summary(rates: dict[str, dict[str, list[float]]]) -> dict[str, dict[str, object]]:
    """Returns for each pipeline the median and quartiles of its rate and of its ratio to PIL's.

    The rates are per second of processor time, and a ratio is of rates in the same round.

    Args:
        rates: A result of `measure`.
    """
    result = {}
    for name, samples in rates.items():
        values = samples["processor"]
        ratios = [a / b for a, b in zip(values, rates[PIL]["processor"], strict=True)]
        result[name] = {
            "images_per_second_per_core": round(statistics.median(values), 1),
            "quartiles": [round(float(q), 1) for q in np.quantile(values, [0.25, 0.75])],
            "ratio_to_pil": round(statistics.median(ratios), 3),
            "ratio_quartiles": [round(float(q), 3) for q in np.quantile(ratios, [0.25, 0.75])],
            "wall_images_per_second": round(statistics.median(samples["wall"]), 1),
            "samples": [round(value, 1) for value in values],
        }
    return result


def draw(result: dict[str, dict[str, object]], path: Path) -> None:
    """Draws a bar for each pipeline, with median, quartiles and all samples."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    names = list(result)[::-1]
    figure, axes = plt.subplots(figsize=(7.5, 0.7 * len(names) + 1.3), layout="constrained")
    for place, name in enumerate(names):
        facts = result[name]
        median = facts["images_per_second_per_core"]
        low, high = facts["quartiles"]
        color = "tab:blue" if name.startswith("fd_large") else "tab:gray"
        axes.barh(place, median, color=color, alpha=0.8)
        axes.errorbar(
            median, place, xerr=[[median - low], [high - median]], color="black", capsize=4
        )
        axes.plot(facts["samples"], [place - 0.28] * len(facts["samples"]), "k.", markersize=3)
        label = f"{median:.0f}/s, {facts['ratio_to_pil']:.2f} x"
        axes.text(0.02 * median, place, label, va="center", color="white")
    axes.set_yticks(range(len(names)), names)
    axes.set_xlabel("images per second of processor time (median, quartiles, samples)")
    axes.set_title(f"{SIZE} px random resized crop and flip, one core")
    harness.save(figure, path)


def main() -> None:
    """Measures and writes the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="3 rounds instead of 15")
    options = parser.parse_args()
    torch.set_num_threads(1)
    tar = Path(os.environ.get("FD_DATA", ROOT / ".." / "shared" / "data"))
    tar = tar / "imagenet_sample256.tar"
    if not tar.is_file():
        sys.exit("data_pipeline: no imagenet_sample256.tar. Set FD_DATA to its folder.")
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as other:
        with tarfile.open(tar) as archive:
            archive.extractall(folder, filter="data")
        os.environ["FD_CACHE"] = f"{other}/cache"
        stored, warm, emptied = Path(other, "stored"), f"{other}/warm", f"{other}/emptied"
        (stored / "shards").mkdir(parents=True)
        in_tables(Path(folder), stored)
        in_shards(Path(folder), stored / "shards")
        with bucket(stored) as url:
            keep_blocks_in(warm, 10)
            pipelines = {
                "fd_large, folder": ours(folder),
                "fd_large, tar in place": ours(str(tar)),
                "fd_large, saved dataset": ours(f"{stored}/saved"),
                "fd_large, parquet": ours(f"{stored}/tables"),
                "fd_large, S3 tar": ours(f"{url}/shards/"),
                PIL: pil(folder),
            }
            keep_blocks_in(emptied, 10)
            pipelines["fd_large, parquet, cold"] = cold(f"{stored}/tables", emptied)
            pipelines["fd_large, S3 parquet, cold"] = cold(f"{url}/tables/", emptied)
            pipelines["fd_large, S3 tar, cold"] = cold(f"{url}/shards/", emptied)
            if run := webdataset(str(tar)):
                pipelines["webdataset, tar (PIL)"] = run
            rates = measure(pipelines, 3 if options.quick else 15)
        with tempfile.TemporaryDirectory() as place:
            pattern = in_shards(Path(folder), Path(place))
            counted = {
                "fd_large, folder": ours(folder),
                f"fd_large, {NUM_SHARDS} tar files": ours(pattern),
                PIL: pil(folder),
            }
            if run := webdataset(pattern):
                counted[f"webdataset, {NUM_SHARDS} tar files"] = run
            opens = measure_opens(counted)
    result = summary(rates)
    listing = measure_listing(100_000)
    record = {
        **harness.conditions(
            __file__,
            __doc__,
            (
                "torch",
                "torchvision",
                "pillow",
                "numpy",
                "webdataset",
                "pyarrow",
                "datasets",
                "s3fs",
            ),
        ),
        "data": "imagenet_sample256.tar, 256 images",
        "unit": "images per second of processor time, one thread",
        "pipelines": result,
        "opens_per_image": {"epochs": "the first, the second", **opens},
        "listing": listing,
    }
    harness.write(record, RESULTS / "data_pipeline.json")
    draw(result, RESULTS / "data_pipeline.png")
    for name, facts in result.items():
        print(
            f"{name:24} {facts['images_per_second_per_core']:7.1f} images/s "
            f"{facts['quartiles']}  {facts['ratio_to_pil']:.2f} x PIL {facts['ratio_quartiles']}"
        )
    for name, (first, second) in opens.items():
        print(f"{name:24} {first:.4f} files opened an image, {second:.4f} in the next epoch")
    print(
        f"listing of {listing['files']} files: {listing['first_seconds']} s, then "
        f"{listing['cached_seconds']} s from the cache"
    )


if __name__ == "__main__":
    main()
