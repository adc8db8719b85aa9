"""How long does the COCO evaluation of 5,000 images take: ours, faster-coco-eval's, pycocotools'?

    python benchmarks/coco_protocol.py [--quick] [--images 5000] [--per-image 40] [--rounds 3]

The images and objects of `coco_tiny.tar` (FD_DATA, default ../shared/data) are repeated under new
ids until there are 5,000 images. The detections of an image are made up: its objects shifted and
resized, some of another class, and copies of them elsewhere, forty in all with boxes and masks.
All three evaluate the same two files, boxes and masks, in turn and each in a fresh process; ratios
are taken within a round, of seconds and of processor seconds, in which other work shows less.
fd_large counts with faster-coco-eval, which stands beside it by itself: what it costs beyond that
is checks, classes and curves. The twelve numbers must agree to 1e-6. Writes
benchmarks/results/coco_protocol.json.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import resource
import subprocess
import sys
import tarfile
import tempfile
import time
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import harness
import numpy as np
from harness import RESULTS, ROOT

sys.path.insert(0, str(ROOT))
CONTENDERS = ("fd_large", "faster_coco_eval", "pycocotools")
# So many different masks are made for each image, and repeated: making them is not timed.
VARIANTS = 2


def parse() -> argparse.Namespace:
    """Reads the flags."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="250 images, one round")
    parser.add_argument("--images", type=int, default=5000, help="number of images")
    parser.add_argument("--per-image", type=int, default=40, help="detections per image")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, default=RESULTS / "coco_protocol.json")
    parser.add_argument("--measure", choices=CONTENDERS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    flags = parser.parse_args()
    if flags.quick:
        flags.images, flags.rounds = 250, 1
    return flags


def make_files(folder: Path, num_images: int, per_image: int) -> dict[str, int]:
    """Writes truth.json and results.json; returns counts of what they hold."""
    from fd_large.tasks.detection.data.annotations import open_coco

    data = Path(os.environ.get("FD_DATA", ROOT / ".." / "shared" / "data")) / "coco_tiny.tar"
    if not data.is_file():
        sys.exit("coco_protocol: no coco_tiny.tar. Set FD_DATA to its folder.")
    with tarfile.open(data) as archive:
        archive.extractall(folder, filter="data")
    rng = np.random.default_rng(0)
    samples = []
    for split in ("val", "train"):
        content = json.loads((folder / "annotations" / f"instances_{split}.json").read_text())
        opened = open_coco(str(folder), split)
        annotations: dict[int, list[dict[str, Any]]] = {}
        for entry in content["annotations"]:
            annotations.setdefault(entry["image_id"], []).append(entry)
        images = {image["id"]: image for image in content["images"]}
        for index in range(len(opened)):
            number = opened.image_id(index)
            made = [made_detections(opened, index, per_image, rng) for _ in range(VARIANTS)]
            samples.append((images[number], annotations.get(number, []), made))
    truth: dict[str, Any] = {"images": [], "annotations": [], "categories": content["categories"]}
    results = []
    for number in range(1, num_images + 1):
        image, entries, made = samples[number % len(samples)]
        truth["images"].append({**image, "id": number})
        for entry in entries:
            identity = len(truth["annotations"]) + 1
            truth["annotations"].append({**entry, "id": identity, "image_id": number})
        for detection in made[number // len(samples) % VARIANTS]:
            score = round(float(np.clip(detection["score"] + rng.normal(0, 0.05), 0, 1)), 4)
            results.append({**detection, "image_id": number, "score": score})
    (folder / "truth.json").write_text(json.dumps(truth))
    (folder / "results.json").write_text(json.dumps(results))
    return {
        "images": num_images,
        "objects": len(truth["annotations"]),
        "detections": len(results),
        "results_bytes": (folder / "results.json").stat().st_size,
    }


def made_detections(
    opened: Any, index: int, count: int, rng: np.random.Generator
) -> list[dict[str, Any]]:
    """Returns made-up detections of one image, correct ones mostly with higher scores."""
    from fd_large.tasks.detection.data import masks

    target = opened.target(index)
    boxes, labels, filled = (part.numpy() for part in target[:3])
    made, moved = [], []
    for number in range(count):
        place = number % len(boxes)
        near = number < len(boxes)
        reach = 0.08 if near else 0.6
        left, top, right, bottom = boxes[place]
        sides = np.array([right - left, bottom - top])
        step = rng.normal(0, reach, 2) * sides
        size = sides * np.exp(rng.normal(0, reach / 2, 2))
        label = labels[place] if rng.random() < 0.9 else rng.integers(len(opened.category_ids))
        made.append(
            {
                "category_id": int(opened.category_ids[label]),
                "bbox": [round(float(x), 3) for x in (left + step[0], top + step[1], *size)],
                "score": float(rng.beta(5, 2) if near else rng.beta(1, 6)),
            }
        )
        moved.append(np.roll(filled[place], (int(step[1]), int(step[0])), (0, 1)))
    for detection, packed in zip(made, masks.encode(np.stack(moved)), strict=True):
        detection["segmentation"] = packed
    return made


def measure(contender: str, folder: Path) -> dict[str, Any]:
    """Reads and evaluates in this process; returns seconds and numbers."""
    clock, parts = time.perf_counter(), {}
    truth_file, results_file = folder / "truth.json", folder / "results.json"

    def lap(name: str) -> None:
        nonlocal clock
        now = time.perf_counter()
        parts[name], clock = now - clock, now

    if contender == "fd_large":
        from fd_large.tasks.detection.scores.results import read_results
        from fd_large.tasks.detection.scores.scoring import read_ground_truth, score

        lap("import")
        truth, results = read_ground_truth(str(truth_file)), read_results(results_file)
        lap("read")
        scores = score(truth, results)
        lap("evaluate")
        numbers = {kind: list(of.numbers.values()) for kind, of in scores.kinds.items()}
    else:
        if contender == "pycocotools":
            from pycocotools.coco import COCO
            from pycocotools.cocoeval import COCOeval
        else:
            from faster_coco_eval import COCO
            from faster_coco_eval import COCOeval_faster as COCOeval

        lap("import")
        numbers = {}
        with redirect_stdout(io.StringIO()):
            truth = COCO(str(truth_file))
            results = json.loads(results_file.read_text())
            lap("read")
            for kind, iou_type, key in (("box", "bbox", "bbox"), ("mask", "segm", "segmentation")):
                # A mask beside its box would have the box's size, as pycocotools sees it.
                kept = ("image_id", "category_id", "score", key)
                found = truth.loadRes([{name: r[name] for name in kept} for r in results])
                evaluation = COCOeval(truth, found, iou_type)
                evaluation.evaluate()
                evaluation.accumulate()
                evaluation.summarize()
                numbers[kind] = [float(number) for number in evaluation.stats[:12]]
        lap("evaluate")
    used = resource.getrusage(resource.RUSAGE_SELF)
    return {
        "seconds": {"total": sum(parts.values()), **parts},
        "processor_seconds": used.ru_utime + used.ru_stime,
        "numbers": numbers,
    }


def in_process(contender: str, folder: Path) -> dict[str, Any]:
    """Runs `measure` in a fresh process."""
    command = [sys.executable, __file__, "--measure", contender, "--folder", str(folder)]
    environment = {**os.environ, "PYTHONWARNINGS": "ignore"}
    answer = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    return json.loads(answer.stdout)


def main(flags: argparse.Namespace) -> None:
    """Measures in turn and writes the results."""
    samples: dict[str, list[dict[str, Any]]] = {name: [] for name in CONTENDERS}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = make_files(folder, flags.images, flags.per_image)
        for turn, order in enumerate(harness.turns(CONTENDERS, flags.rounds)):
            for contender in order:
                samples[contender].append(in_process(contender, folder))
                print(turn, contender, samples[contender][-1]["seconds"], flush=True)
    numbers = {name: of[0]["numbers"] for name, of in samples.items()}
    ours = numbers["fd_large"]
    largest = max(
        abs(a - b)
        for theirs in numbers.values()
        for kind in ours
        for a, b in zip(ours[kind], theirs[kind], strict=True)
    )
    assert largest <= 1e-6, f"the numbers differ by {largest}"

    def of(contender: str, part: str) -> list[float]:
        return [sample.get(part) or sample["seconds"][part] for sample in samples[contender]]

    parts = ("processor_seconds", "total", "read", "evaluate")
    record = {
        **harness.conditions(__file__, __doc__, ("faster-coco-eval", "pycocotools", "numpy")),
        "data": data,
        "seconds": {
            name: {part: harness.spread(of(name, part)) for part in parts} for name in CONTENDERS
        },
        "times_fd_large": {
            name: {part: harness.paired(of(name, part), of("fd_large", part)) for part in parts}
            for name in CONTENDERS[1:]
        },
        "largest_difference_of_the_numbers": largest,
        "numbers": ours,
    }
    harness.write(record, flags.json)
    for name, ratios in record["times_fd_large"].items():
        for part in ("processor_seconds", "total"):
            print(f"{name}, {part}: {ratios[part]['median']:.2f} times ours")


if __name__ == "__main__":
    arguments = parse()
    if arguments.measure:
        print(json.dumps(measure(arguments.measure, arguments.folder)))
    else:
        main(arguments)
