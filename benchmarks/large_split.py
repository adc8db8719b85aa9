"""What does it take to score a large test split beside training: time, memory, and rank 0's own?

    python benchmarks/large_split.py [--quick] [--images 1500 3000 6000]

A made-up split as Objects365's: 365 classes, 16 objects an image, boxes alone. Eight ranks have
found 100 boxes in each image: its objects, moved, and others. Rank 0 does what it does in a run:
it starts the process that scores, waits, and shows the watchdog about once a second that it lives.
Recorded are the seconds from start to numbers, processor time and peak memory of the process, the
longest time between two signs of life, and what of its own processor time rank 0 has spent. For
80,000 images processor time is extrapolated by the line through the two largest splits, and memory
between that line and proportion. Writes benchmarks/results/large_split.json.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import harness
import numpy as np
from harness import RESULTS, ROOT

sys.path.insert(0, str(ROOT))
from fd_large.tasks.detection.scores.results import shard_of, write_results
from fd_large.tasks.detection.scores.score_shards import NOTE, Note
from fd_large.tasks.detection.scores.scoring_process import ScoringProcess

CLASSES, OBJECTS, FOUND, RANKS = 365, 16, 100, 8
WHOLE = 80_000


def parse() -> argparse.Namespace:
    """Reads the flags."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="250 and 500 images")
    parser.add_argument("--images", type=int, nargs="+", default=[1500, 3000, 6000])
    parser.add_argument("--json", type=Path, default=RESULTS / "large_split.json")
    flags = parser.parse_args()
    if flags.quick:
        flags.images = [250, 500]
    return flags


def make_files(folder: Path, num_images: int) -> Path:
    """Writes the shards of all ranks and their note; returns the annotations."""
    rng = np.random.default_rng(0)
    images, annotations = [], []
    shards: list[list[dict[str, Any]]] = [[] for _ in range(RANKS)]
    for number in range(1, num_images + 1):
        images.append({"id": number, "file_name": f"{number}.jpg", "height": 600, "width": 800})
        corners = rng.uniform(0, 400, (FOUND, 2))
        boxes = np.hstack([corners, rng.uniform(8, 200, (FOUND, 2))]).round(2)
        classes = rng.integers(1, CLASSES + 1, FOUND).tolist()
        for place in range(OBJECTS):
            entry = {"image_id": number, "category_id": classes[place], "iscrowd": 0}
            entry |= {"id": len(annotations) + 1, "bbox": boxes[place].tolist()}
            annotations.append(entry)
        moved = (boxes * rng.normal(1, 0.05, boxes.shape)).round(3).tolist()
        scores = rng.uniform(0.05, 1, FOUND).tolist()
        shards[number % RANKS] += [
            {"image_id": number, "category_id": label, "bbox": box, "score": score}
            for label, box, score in zip(classes, moved, scores, strict=True)
        ]
    for rank, shard in enumerate(shards):
        write_results(shard_of(folder, rank), shard)
    (folder / NOTE).write_text(json.dumps(Note(RANKS, 0, "made up")._asdict()))
    categories = [{"id": number, "name": str(number)} for number in range(1, CLASSES + 1)]
    truth = folder / "truth.json"
    truth.write_text(
        json.dumps({"images": images, "annotations": annotations, "categories": categories})
    )
    return truth


def measure(num_images: int) -> dict[str, Any]:
    """Scores a split of so many images."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        truth = make_files(folder, num_images)
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        begin, spent = time.perf_counter(), time.process_time()
        signs = [begin]
        scoring = ScoringProcess(folder, str(truth), images={}, max_pixels=0)
        numbers = scoring.wait(lambda: signs.append(time.perf_counter()))
        signs.append(time.perf_counter())
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return {
            "images": num_images,
            "detections": num_images * FOUND,
            "seconds": round(signs[-1] - begin, 1),
            "processor_seconds": round(
                after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, 1
            ),
            # The largest of all processes so far: splits come by rising size.
            "peak_bytes": after.ru_maxrss * 1024,
            "longest_seconds_between_signs_of_life": round(float(np.diff(signs).max()), 2),
            "processor_seconds_of_rank_0": round(time.process_time() - spent, 2),
            "box_AP": numbers["box_AP"],
        }


def extrapolated(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """Returns what a whole split would take, from the two largest that were measured."""

    def by_the_line(part: str) -> int:
        rise = (above[part] - below[part]) / (above["images"] - below["images"])
        return round(above[part] + rise * (WHOLE - above["images"]))

    return {
        "images": WHOLE,
        "processor_seconds": by_the_line("processor_seconds"),
        # Some classes are counted at a time, fewer where there are more images: the line is too
        # low, as it also shows how their part of the memory shrinks.
        "peak_bytes_at_least": by_the_line("peak_bytes"),
        "peak_bytes_at_most": round(above["peak_bytes"] * WHOLE / above["images"]),
    }


def main(flags: argparse.Namespace) -> None:
    """Measures by rising size and writes the results."""
    splits = []
    for num_images in sorted(flags.images):
        splits.append(measure(num_images))
        print(splits[-1], flush=True)
    record = {
        **harness.conditions(__file__, __doc__, ("faster-coco-eval", "numpy")),
        "splits": splits,
        "extrapolated": extrapolated(*splits[-2:]),
    }
    harness.write(record, flags.json)
    print(record["extrapolated"])


if __name__ == "__main__":
    main(parse())
