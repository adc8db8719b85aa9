"""What do several views, their merges and soft-NMS change in a detector's scores?

    for heads in mask_rcnn cascade htc; do
        python benchmarks/memorise.py heads_$heads --keep FOLDER/$heads
    done
    python benchmarks/detection_views.py FOLDER/* [--out FILE]

Each folder holds a run and its data, as `memorise.py --keep` leaves them. `evaluate` scores every
run in every way, by its flags. The detectors have seen their images at one size, and know them by
heart: the figures show what each way changes there, not what it gives on COCO.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import sys
import tempfile
from pathlib import Path

from harness import RESULTS, ROOT, conditions, write

sys.path[:0] = [str(ROOT)]

from fd_large.cli.main import main as fd_large  # noqa: E402

LOW = "--task.detection.least_score 0.001"
FLIP = f"{LOW} --task.detection.test_flip True"
VIEWS = f"{FLIP} --task.detection.test_scales 0.8 1 1.25 --task.detection.test_merge"
AREAS = f"{VIEWS} areas --task.detection.test_areas l ml sm"
LINEAR = "--task.detection.nms linear"
# Flags of `evaluate` for each way.
WAYS = {
    "one view, scores above 0.05": "",
    "one view": LOW,
    "one view, linear": f"{LOW} {LINEAR}",
    "one view, gaussian": f"{LOW} --task.detection.nms gaussian",
    "one view, rescored by masks": f"{LOW} --task.detection.rescore_by_masks True",
    "mirrored too, average": FLIP,
    "six views, average": f"{VIEWS} average",
    "six views, average, linear": f"{VIEWS} average {LINEAR}",
    "six views, areas": AREAS,
    "six views, areas, linear": f"{AREAS} {LINEAR}",
    "six views, union": f"{VIEWS} union",
    "six views, union, linear": f"{VIEWS} union {LINEAR}",
}
NUMBERS = ("AP", "AP50", "AP75")


def score(folder: Path, way: str) -> dict:
    """Scores a run by `evaluate`; returns how it was tested, and its numbers."""
    with tempfile.TemporaryDirectory() as out:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            code = fd_large(
                [
                    *("evaluate", str(folder / "run"), "--data.root", str(folder / "data")),
                    *("--data.workers", "0", "--out", out, *WAYS[way].split()),
                ]
            )
        if code:
            sys.exit(f"detection_views: evaluate ended with {code}\n{printed.getvalue()}")
        scores = json.loads((Path(out) / "scores.json").read_text())
    kinds = {k: {n: scores[k]["numbers"][n] for n in NUMBERS} for k in ("box", "mask")}
    return {"tested": scores["tested"], "num_results": scores["num_results"], **kinds}


def show(found: dict[str, dict[str, dict]]) -> None:
    """Prints box and mask AP, in percent, and AP75 behind each."""
    width = max(map(len, WAYS))
    print(" " * width, *(f"{name:>25}" for name in found), sep=" | ")
    for way in WAYS:
        cells = []
        for ways in found.values():
            of = ways[way]
            cells += [
                "   ".join(
                    f"{100 * of[kind]['AP']:4.1f} ({100 * of[kind]['AP75']:5.1f})"
                    for kind in ("box", "mask")
                )
            ]
        print(f"{way:{width}}", *(f"{cell:>25}" for cell in cells), sep=" | ")
    print("AP of boxes and of masks (AP75)")


def main() -> int:
    """Scores each run in each way, and writes."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("folders", nargs="+", type=Path, help="folders of memorise.py --keep")
    parser.add_argument("--out", type=Path, default=RESULTS / "detection_views.json")
    given = parser.parse_args()
    found = {folder.name: {way: score(folder, way) for way in WAYS} for folder in given.folders}
    write({**conditions(__file__, __doc__), "flags": WAYS, "scores": found}, given.out)
    show(found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
