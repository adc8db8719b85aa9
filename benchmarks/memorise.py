"""Does the detector learn: can it memorise 8 real images, boxes and masks, in 20 minutes?

    python benchmarks/memorise.py [--quick] [--ranks 2] [--updates 400]

Trains a narrow version of the recipe coco_mask_rcnn_swinv2_tiny (256 px, 64 channels in the heads,
64 RoIs per image) under ZeRO-3 on the 8 images of FD_DATA's coco_tiny whose smallest object is
largest, and tests it on the same images. Writes benchmarks/results/memorise.json, the curves, and
the images with what is detected in them.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tarfile
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import harness
from harness import RESULTS, ROOT
from PIL import Image

NUM_IMAGES = 8
FLAGS = """
--recipe coco_mask_rcnn_swinv2_tiny --data.image_size 256 --data.workers 0
--student.architecture.embed_dim 48 --student.architecture.depths 2 2 2 2
--student.architecture.num_heads 3 6 12 24 --student.architecture.window_size 8
--student.drop_path_rate 0
--task.detection.head_width 64 --task.detection.rois_per_image 64
--task.detection.anchors_per_image 128 --task.detection.proposals_per_image 200
--task.detection.scale_range 1 1 --task.detection.test_size 0 0
--batch.global_batch_size 8 --batch.micro_batch_size 4
--optim.base_lr 0.064 --optim.warmup_lr 1e-4 --optim.min_lr 6.4e-4
--optim.warmup_epochs 20 --runtime.log_every 10 --runtime.save_every 100000
"""


def parse() -> argparse.Namespace:
    """Reads the flags."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a few steps, to see that it runs")
    parser.add_argument("--ranks", type=int, default=2, help="CPU ranks where there is no GPU")
    parser.add_argument("--updates", type=int, default=400, help="steps of training")
    parser.add_argument("--every", type=int, default=100, help="steps between evaluations")
    parser.add_argument("--out", type=Path, default=RESULTS / "memorise.json")
    if parser.parse_args().quick:
        parser.set_defaults(updates=4, every=2)
    return parser.parse_args()


def choose(root: Path) -> None:
    """Keeps the images of coco_tiny whose smallest object, at 256 px, is largest."""
    source = json.loads((root / "annotations/instances_val.json").read_text())
    of_image = defaultdict(list)
    for annotation in source["annotations"]:
        of_image[annotation["image_id"]].append(annotation)

    def smallest(image: dict) -> float:
        own = of_image[image["id"]]
        if not own or any(annotation["iscrowd"] for annotation in own):
            return 0.0
        return min(a["area"] for a in own) * (256 / max(image["height"], image["width"])) ** 2

    chosen = sorted(source["images"], key=smallest, reverse=True)[:NUM_IMAGES]
    kept = {
        "images": chosen,
        "annotations": [a for image in chosen for a in of_image[image["id"]]],
        "categories": source["categories"],
    }
    shutil.copytree(root / "images/val", root / "images/train", dirs_exist_ok=True)
    for split in ("train", "val"):
        (root / f"annotations/instances_{split}.json").write_text(json.dumps(kept))


def draw(rows: list[dict], evaluations: list[dict], path: Path) -> None:
    """Draws the loss, and AP50 of boxes and masks, over the steps."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    loss, precision = figure.subplots(1, 2)
    loss.plot([r["update"] for r in rows], [r["loss"] for r in rows], color="#4477aa")
    loss.set(xlabel="step", ylabel="loss", yscale="log", title="training")
    for kind, colour, aim in (("box", "#4477aa", 0.9), ("mask", "#cc6677", 0.8)):
        values = [e[f"{kind}_AP50"] for e in evaluations]
        updates = [e["update"] for e in evaluations]
        precision.plot(updates, values, marker="o", markersize=3, color=colour, label=kind)
        precision.axhline(aim, color=colour, linewidth=0.8, linestyle="--")
    precision.set(xlabel="step", ylabel="AP50", ylim=(0, 1.02), title="the same images; aims")
    precision.legend(loc="lower right", frameon=False)
    harness.save(figure, path)


def main() -> int:
    """Trains, evaluates on the way, and keeps the results."""
    flags = parse()
    data = Path(os.environ.get("FD_DATA", ROOT / "../shared/data")) / "coco_tiny.tar"
    if not data.is_file():
        sys.exit(f"{data}: not there; set FD_DATA to the folder with coco_tiny.tar")
    with tempfile.TemporaryDirectory(prefix="memorise_") as folder:
        root, run_dir = Path(folder) / "coco", Path(folder) / "run"
        with tarfile.open(data) as archive:
            archive.extractall(root, filter="data")
        choose(root)
        begin = time.monotonic()
        code = harness.start(
            str(ROOT / "fd_large/train.py"),
            *("--deepspeed_config", ROOT / "ds_configs/zero3.json", *FLAGS.split()),
            *("--data.root", root, "--runtime.run_dir", run_dir),
            *("--optim.max_steps", flags.updates, "--eval.every", flags.every),
            ranks=flags.ranks,
        )
        seconds = time.monotonic() - begin
        if code:
            sys.exit(f"memorise: the ranks ended with {code}")
        rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
        lines = (run_dir / "evaluations.jsonl").read_text().splitlines()
        evaluations = [json.loads(line) for line in lines]
        last = run_dir / f"evaluations/update_{flags.updates:08d}"
        flags.out.parent.mkdir(parents=True, exist_ok=True)
        for name in ("worst", "chosen"):
            if (last / f"{name}.png").is_file():
                drawn = Image.open(last / f"{name}.png").convert("RGB")
                drawn.save(flags.out.with_name(f"memorise_{name}.jpg"), quality=80)
        draw(rows, evaluations, flags.out.with_suffix(".png"))
        reached = {
            kind: next((e["update"] for e in evaluations if e[f"{kind}_AP50"] >= aim), None)
            for kind, aim in (("box", 0.9), ("mask", 0.8))
        }
        result = {
            **harness.conditions(__file__, __doc__),
            "flags": FLAGS.split(),
            "ranks": flags.ranks,
            "updates": flags.updates,
            "seconds": seconds,
            "updates_to_aim": reached,
            "final": evaluations[-1],
            "evaluations": evaluations,
        }
        harness.write(result, flags.out)
        print(f"{seconds:.0f} s; {json.dumps(evaluations[-1])}; aims reached after {reached}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
