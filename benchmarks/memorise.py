"""Do the dense tasks learn: can they memorise 8 real images in 20 minutes?

    python benchmarks/memorise.py [TASK] [--quick] [--ranks 2] [--updates 400] [--keep FOLDER]

Trains a narrow version of a recipe under ZeRO-3 on 8 images of FD_DATA's coco_tiny and tests it on
the same images. TASK is `detection` (boxes and masks of the images whose smallest object is
largest, coco_mask_rcnn_swinv2_tiny at 256 px), `heads_mask_rcnn`, `heads_cascade`, `heads_htc` or
`heads_htc_giou` (the same at 160 px, to compare heads at equal steps; begin with the first, whose
AP stands in the curves of the others), `segmentation_swinv2` or `segmentation_vit` (the category of
each pixel, smaller objects on top, all else ignored, of images that show at least two; UPerNet at
128 px), `depth_swinv2` or `depth_vit` (the depth of 8 parts of the stereo pair that scikit-image
brings, random crops of 96 px, MIM-Depth's decoder). Writes benchmarks/results/memorise.json or
memorise_TASK.json, the curves, and the images with what is seen in them. --keep leaves data and run
in a folder, for detection_views.py.
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
import numpy as np
from harness import RESULTS, ROOT
from PIL import Image

NUM_IMAGES = 8
COMMON = """
--data.workers 0 --student.drop_path_rate 0
--batch.global_batch_size 8 --runtime.log_every 10 --runtime.save_every 100000
"""
DETECTION = """
--recipe coco_mask_rcnn_swinv2_tiny --data.image_size 256
--student.architecture.embed_dim 48 --student.architecture.depths 2 2 2 2
--student.architecture.num_heads 3 6 12 24 --student.architecture.window_size 8
--task.detection.head_width 64 --task.detection.rois_per_image 64
--task.detection.anchors_per_image 128 --task.detection.proposals_per_image 200
--task.detection.scale_range 1 1 --task.detection.test_size 0 0
--optim.base_lr 0.064 --optim.warmup_lr 1e-4 --optim.min_lr 6.4e-4
--optim.warmup_epochs 20
"""
SEGMENTATION = """
--data.image_size 128
--task.segmentation.reduce_zero_label False --task.segmentation.num_classes 90
--task.segmentation.head_width 64 --task.segmentation.scale_range 1 1
--task.segmentation.cat_max_ratio 1 --task.segmentation.photometric False
--optim.base_lr 0.128 --optim.warmup_lr 1e-4 --optim.warmup_epochs 20
"""
DEPTH = """
--data.image_size 96 --task.depth.head_width 32
--task.depth.colors False --task.depth.cut_depth 0
--task.depth.test_crop none --task.depth.test_flip False
--optim.schedule cosine --optim.base_lr 0.128 --optim.warmup_lr 1e-4 --optim.warmup_epochs 20
"""
SWINV2 = """
--student.architecture.embed_dim 48
--student.architecture.depths 2 2 2 2 --student.architecture.num_heads 3 6 12 24
--student.architecture.window_size 8
"""
VIT = """
--student.architecture.embed_dim 192
--student.architecture.depths 6 --student.architecture.num_heads 3
--student.architecture.patch_size 8 --optim.layer_decay 1
"""
# At half of the cost.
HEADS = f"""{DETECTION}
--data.image_size 160 --student.architecture.window_size 5
--task.detection.rois_per_image 32 --task.detection.proposals_per_image 100
"""
# Flags, what is aimed at, and a word for it.
TASKS = {
    "detection": (DETECTION, {"box_AP50": 0.9, "mask_AP50": 0.8}, "AP50"),
    "heads_mask_rcnn": (HEADS, {}, "AP"),
    "heads_cascade": (f"{HEADS} --task.detection.heads cascade", {}, "AP"),
    "heads_htc": (f"{HEADS} --task.detection.heads htc", {}, "AP"),
    "heads_htc_giou": (
        f"{HEADS} --task.detection.heads htc --task.detection.box_loss giou",
        {},
        "AP",
    ),
    "segmentation_swinv2": (
        f"--recipe ade20k_upernet_swinv2_base {SWINV2} {SEGMENTATION}",
        {"val_mIoU": 90.0},
        "mIoU (%)",
    ),
    "segmentation_vit": (
        f"--recipe ade20k_upernet_vit_base {VIT} {SEGMENTATION}",
        {"val_mIoU": 90.0},
        "mIoU (%)",
    ),
    "depth_swinv2": (
        f"--recipe nyuv2_swinv2_base {SWINV2} {DEPTH} --student.stage_windows 8 6 6 3",
        {"val_d1": 0.9},
        "share within a factor of 1.25",
    ),
    "depth_vit": (
        f"--recipe nyuv2_vit_base {VIT} {DEPTH} --optim.base_lr 0.064",
        {"val_d1": 0.9},
        "share within a factor of 1.25",
    ),
}
COLOURS = ("#4477aa", "#cc6677", "#117733")
IGNORED = 255


def parse() -> argparse.Namespace:
    """Reads the flags."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("task", nargs="?", choices=TASKS, default="detection")
    parser.add_argument("--quick", action="store_true", help="a few steps, to see that it runs")
    parser.add_argument("--ranks", type=int, default=2, help="CPU ranks where there is no GPU")
    parser.add_argument("--updates", type=int, default=400, help="steps of training")
    parser.add_argument("--every", type=int, default=100, help="steps between evaluations")
    parser.add_argument("--keep", type=Path, help="folder for data and run, which then stay")
    parser.add_argument("--out", type=Path)
    task = parser.parse_args().task
    tail = "" if task == "detection" else f"_{task}"
    parser.set_defaults(out=RESULTS / f"memorise{tail}.json")
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


def paint(root: Path) -> None:
    """Makes label files of the images that show most of the smallest of two or more categories."""
    source = json.loads((root / "annotations/instances_val.json").read_text())
    of_image = defaultdict(list)
    for annotation in source["annotations"]:
        of_image[annotation["image_id"]].append(annotation)
    labels = {
        image["file_name"]: painted(image, of_image[image["id"]]) for image in source["images"]
    }

    def smallest(name: str) -> float:
        counts = np.unique(labels[name][labels[name] != IGNORED], return_counts=True)[1]
        return counts.min() / labels[name].size if len(counts) > 1 else 0.0

    for name in sorted(labels, key=smallest, reverse=True)[:NUM_IMAGES]:
        for split in ("train", "val"):
            image, label = (root / f"chosen/{kind}/{split}/{name}" for kind in ("images", "labels"))
            for path in (image, label):
                path.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(root / "images/val" / name, image)
            Image.fromarray(labels[name]).save(label.with_suffix(".png"))
    names = {category["id"]: category["name"] for category in source["categories"]}
    listed = [names.get(number, f"unused {number}") for number in range(1, 91)]
    (root / "chosen/classes.json").write_text(json.dumps(listed))


def painted(image: dict, annotations: list[dict]) -> np.ndarray:
    """The category of each pixel, counted from 0, small objects on top; all else is ignored."""
    from fd_large.tasks.detection.data import masks

    labels = np.full((image["height"], image["width"]), IGNORED, np.uint8)
    for annotation in sorted(annotations, key=lambda annotation: -annotation["area"]):
        if not annotation["iscrowd"]:
            polygons = [np.array(part).reshape(-1, 2) for part in annotation["segmentation"]]
            inside = masks.from_polygons(polygons, *labels.shape) > 0
            labels[inside] = annotation["category_id"] - 1  # COCO's numbers begin at 1.
    return labels


def measure(root: Path) -> None:
    """Writes 8 overlapping parts of the scene of scikit-image, 96 px high, and their depths.

    Source: Middlebury 2014, "Motorcycle", a quarter of its size; its calibration stands in the
    docstring of skimage.data.stereo_motorcycle.
    """
    from skimage.data import stereo_motorcycle

    image, _, disparity = stereo_motorcycle()
    known = np.isfinite(disparity)
    metres = np.where(known, 994.978 * 0.193001 / (np.where(known, disparity, 0) + 31.086), 0)
    for number in range(NUM_IMAGES):
        top, left = 200 * (number // 4), 136 * (number % 4)
        part = np.s_[top : top + 288 : 3, left : left + 333 : 3]
        for split in ("train", "val"):
            for kind, values in (
                ("images", image[part]),
                ("depths", np.rint(1000 * metres[part]).astype(np.uint16)),
            ):
                path = root / kind / split / f"{number}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(values).save(path)


def peers(flags: argparse.Namespace) -> list[dict]:
    """The recorded evaluations of Mask R-CNN after as many steps, for other heads."""
    path = flags.out.with_name("memorise_heads_mask_rcnn.json")
    if flags.task == "heads_mask_rcnn" or not path.is_file():
        return []
    recorded = json.loads(path.read_text())
    return recorded["evaluations"] if recorded["updates"] == flags.updates else []


def draw_heads(rows: list[dict], evaluations: list[dict], others: list[dict], path: Path) -> None:
    """Draws the loss, and the AP of boxes and of masks, dashed those of Mask R-CNN."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 3.6), layout="constrained")
    loss, *panels = figure.subplots(1, 3)
    loss.plot([r["update"] for r in rows], [r["loss"] for r in rows], color=COLOURS[0])
    loss.set(xlabel="step", ylabel="loss", yscale="log", title="training")
    for panel, kind, title in zip(panels, ("box", "mask"), ("boxes", "masks"), strict=True):
        for colour, name in zip(COLOURS, ("AP", "AP50", "AP75"), strict=True):
            for found, style, label in (
                (others, {"linestyle": "--", "linewidth": 1}, f"{name}, Mask R-CNN"),
                (evaluations, {"marker": "o", "markersize": 3}, name),
            ):
                values = [e[f"{kind}_{name}"] for e in found]
                steps = [e["update"] for e in found]
                if found:
                    panel.plot(steps, values, color=colour, label=label, **style)
        panel.set(xlabel="step", ylim=(0, 1.02), title=f"{title} of the same images")
    panels[1].legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    harness.save(figure, path)


def draw(
    rows: list[dict], evaluations: list[dict], aims: dict[str, float], what: str, path: Path
) -> None:
    """Draws the loss, and what is aimed at, over the steps."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    loss, score = figure.subplots(1, 2)
    loss.plot([r["update"] for r in rows], [r["loss"] for r in rows], color=COLOURS[0])
    loss.set(xlabel="step", ylabel="loss", yscale="log", title="training")
    for colour, (name, aim) in zip(COLOURS, aims.items(), strict=False):
        values = [e[name] for e in evaluations]
        updates = [e["update"] for e in evaluations]
        label = name.partition("_")[0]
        score.plot(updates, values, marker="o", markersize=3, color=colour, label=label)
        score.axhline(aim, color=colour, linewidth=0.8, linestyle="--")
    top = 1.02 if max(aims.values()) <= 1 else 102
    score.set(xlabel="step", ylabel=what, ylim=(0, top), title="the same images; aims")
    if len(aims) > 1:
        score.legend(loc="lower right", frameon=False)
    harness.save(figure, path)


def main() -> int:
    """Trains, evaluates on the way, and keeps the results."""
    flags = parse()
    of_task, aims, what = TASKS[flags.task]
    given = [*of_task.split(), *COMMON.split()]
    data = Path(os.environ.get("FD_DATA", ROOT / "../shared/data")) / "coco_tiny.tar"
    of_depth = flags.task.startswith("depth")
    of_heads = flags.task.startswith("heads")
    of_objects = of_heads or flags.task == "detection"
    if not of_depth and not data.is_file():
        sys.exit(f"{data}: not there; set FD_DATA to the folder with coco_tiny.tar")
    with tempfile.TemporaryDirectory(prefix="memorise_") as passing:
        folder = flags.keep or Path(passing)
        root, run_dir = folder / "data", folder / "run"
        if of_depth:
            measure(root)
        else:
            with tarfile.open(data) as archive:
                archive.extractall(root, filter="data")
        if of_objects:
            choose(root)
        elif not of_depth:
            paint(root)
            root = root / "chosen"
            given += ["--task.segmentation.classes", str(root / "classes.json")]
        begin = time.monotonic()
        code = harness.start(
            str(ROOT / "fd_large/train.py"),
            *("--deepspeed_config", ROOT / "ds_configs/zero3.json", *given),
            *("--batch.micro_batch_size", NUM_IMAGES // flags.ranks),
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
                drawn.save(flags.out.with_name(f"{flags.out.stem}_{name}.jpg"), quality=80)
        others = peers(flags) if of_heads else []
        if of_heads:
            draw_heads(rows, evaluations, others, flags.out.with_suffix(".png"))
        else:
            draw(rows, evaluations, aims, what, flags.out.with_suffix(".png"))
        reached = {
            name: next((e["update"] for e in evaluations if e[name] >= aim), None)
            for name, aim in aims.items()
        }
        result = {
            **harness.conditions(__file__, __doc__),
            "flags": [*of_task.split(), *COMMON.split()],
            "ranks": flags.ranks,
            "updates": flags.updates,
            "seconds": seconds,
            "updates_to_aim": reached,
            "above_mask_rcnn": {
                name: evaluations[-1][name] - others[-1][name]
                for name in ("box_AP", "box_AP75", "mask_AP", "mask_AP75")
                if others
            },
            "final": evaluations[-1],
            "evaluations": evaluations,
        }
        harness.write(result, flags.out)
        print(f"{seconds:.0f} s; {json.dumps(evaluations[-1])}; aims reached after {reached}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
