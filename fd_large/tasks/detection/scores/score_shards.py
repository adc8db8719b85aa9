"""A program that merges and scores all ranks' detections of an evaluation, without torch.

    python -m fd_large.tasks.detection.scores.score_shards ANSWER < request.json

`ScoringProcess` starts the program, so that training continues meanwhile. ANSWER is the descriptor
of an open file, to which the answer is written. Standard output is not used, since libraries may
print to it.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import signal
import sys
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fd_large.data.decode_with_pillow import decode_with_pillow
from fd_large.errors import DataError, FDError
from fd_large.files import parse_json, read_json, write_json
from fd_large.probes.redrawn import write as write_redrawn
from fd_large.tasks.detection.scores.evaluation_pictures import draw_evaluation
from fd_large.tasks.detection.scores.results import merge, read_results, shard_of, write_results
from fd_large.tasks.detection.scores.scoring import Scores, read_ground_truth, redrawn_aps, score

RESULTS, SCORES, NOTE = "results.json", "scores.json", "scoring.json"
# Value of the pixels that are drawn for an image that cannot be read.
GREY = 128
# From <sys/prctl.h>.
PR_SET_PDEATHSIG = 1


class Request(NamedTuple):
    """The request to score the detections in a folder.

    Attributes:
        folder: Folder with each rank's result file, and with the `Note`.
        annotations: Path of the ground truth.
        images: {id as text: path} of the images, of which some are drawn; if empty, nothing is
            drawn.
        max_pixels: Images with more pixels are drawn as grey.
        only: The ids of the images that count; empty for all.
    """

    folder: str
    annotations: str
    images: Mapping[str, str]
    max_pixels: int
    only: Sequence[int] = ()


class Note(NamedTuple):
    """The contents of scoring.json, a file in the folder of an evaluation that is not scored yet.

    Attributes:
        ranks: Number of ranks, each of which has written a result file.
        unread: Number of images that could not be read; their objects count as missed.
        tested: Description of the test settings.
    """

    ranks: int
    unread: int
    tested: str


class Scored(NamedTuple):
    """The outcome of scoring an evaluation.

    Attributes:
        scores: COCO's metrics.
        written: Paths of the written files.
        problem: Traceback of the error because of which some files were not written, or "".
    """

    scores: Scores
    written: tuple[Path, ...]
    problem: str


def score_shards(request: Request) -> Scored:
    """Merges and scores the ranks' results in a folder; writes results.json and scores.json.

    If `request.images` is not empty, bootstrap scores and plots are written too. An error while
    files are written is returned in `Scored.problem`. The ranks' result files are kept; the caller
    deletes them when it has recorded the scores.

    Args:
        request: The folder, the ground truth, and the images to draw.

    Raises: DataError: if a result file cannot be read, or the results cannot be scored.
    """
    folder = Path(request.folder)
    note = Note(**read_json(folder / NOTE, where="scores", holds=dict, of=DataError))
    results = merge(read_results(shard_of(folder, rank)) for rank in range(note.ranks))
    truth = read_ground_truth(request.annotations, request.only)
    scores = score(truth, results)
    written: list[Path] = []
    problem = ""
    try:
        write_results(folder / RESULTS, results)
        more = {"unread_images": note.unread, "tested": note.tested}
        write_json(folder / SCORES, {**more, **scores.to_dict()})
        written += [folder / RESULTS, folder / SCORES]
        if request.images:
            names = sorted(image["id"] for image in truth["images"])
            images = hashlib.sha256(json.dumps(names).encode()).hexdigest()
            if redrawn := redrawn_aps(truth, results, scores):
                written.append(write_redrawn(folder, images, redrawn))
            sizes = {image["id"]: (image["height"], image["width"]) for image in truth["images"]}

            def read(number: int) -> NDArray[np.uint8]:
                path, size = request.images[str(number)], sizes[number]
                return _pixels(path, size, request.max_pixels)

            written += draw_evaluation(truth, results, scores, read, folder)
    except Exception:
        # The scores are valid even if a disk is full or a font is missing.
        problem = traceback.format_exc()
    return Scored(scores, tuple(written), problem)


def _pixels(path: str, size: tuple[int, int], max_pixels: int) -> NDArray[np.uint8]:
    """Returns the pixels (H, W, 3) uint8 of the image file `path`.

    All pixels are grey if the image cannot be read, has more pixels than `max_pixels`, or has
    another (height, width) than `size`.
    """
    try:
        image = decode_with_pillow(Path(path).read_bytes(), path, max_pixels=max_pixels)
    except (DataError, OSError):  # The evaluation has logged the reason.
        image = None
    if image is None or image.shape[:2] != size:
        return np.full((*size, 3), GREY, dtype=np.uint8)
    return image


def main() -> None:
    """Reads a `Request` from standard input, and writes an answer to the open file ANSWER.

    The answer, in JSON, has the fields of `Scored`, or "error" with a message. The request also has
    the process id of the parent; if the parent ends, this process ends too.
    """
    request = parse_json(sys.stdin.read())
    _end_with(request.pop("parent"))
    answer: dict[str, Any]
    try:
        scored = score_shards(Request(**request))
        written = list(map(str, scored.written))
        answer = {"scores": scored.scores.to_dict(), "written": written, "problem": scored.problem}
    except FDError as error:
        answer = {"error": str(error)}
    with open(int(sys.argv[-1]), "w", encoding="utf-8") as file:
        json.dump(answer, file)


def _end_with(parent: int) -> None:
    """Ties this process to its parent: the kernel kills it when the parent ends.

    Without its parent, the process could write into the folder of a run that was launched again.
    Signals that a launcher sends to all processes of a job are ignored here, since the ranks handle
    them. The process also gets a lower priority than the training.

    Args:
        parent: The parent's process id. If the parent has already ended, this process exits.
    """
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)
    # The threads of the training have priority.
    os.nice(10)


if __name__ == "__main__":
    main()
