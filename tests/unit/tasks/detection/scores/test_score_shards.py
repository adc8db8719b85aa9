"""What the program does with shards; `test_evaluation.py` starts it."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from coco import annotation, write_set

from fd_large.data.image_header import MAX_PIXELS
from fd_large.errors import DataError
from fd_large.tasks.detection.scores.results import read_results, shard_of, write_results
from fd_large.tasks.detection.scores.score_shards import NOTE, Note, Request, score_shards

BOX = [4.0, 4.0, 30.0, 30.0]


def found(image, box=BOX):
    return {"image_id": image, "category_id": 3, "bbox": box, "score": 0.5}


@pytest.fixture
def request_of(tmp_path):
    """Makes a request of the shards of several ranks."""
    annotations = [annotation(number, number, BOX) for number in (1, 2)]
    root = write_set(
        tmp_path / "set", annotations, sizes=dict.fromkeys((1, 2), (40, 40)), split="val"
    )

    def make(*shards, images=()):
        for rank, shard in enumerate(shards):
            write_results(shard_of(tmp_path, rank), shard)
        (tmp_path / NOTE).write_text(json.dumps(Note(len(shards), 0, "")._asdict()))
        truth = str(root / "annotations/instances_val2017.json")
        return Request(str(tmp_path), truth, {str(n): f"{n}.png" for n in images}, MAX_PIXELS)

    return make


def test_of_a_part_its_own_images_alone_count(request_of):
    request = request_of([found(2)], [])
    assert score_shards(request).scores.kinds["box"].numbers["AP"] < 1, "image 1 has an object"
    scored = score_shards(request._replace(only=[2])).scores
    assert scored.kinds["box"].numbers["AP"] == 1
    assert scored.num_images == 1


def test_the_shards_of_all_ranks_are_scored_as_one(request_of, tmp_path):
    filler = [found(2)]  # The last batch of a rank is filled up with an image of another's.
    scored = score_shards(request_of([found(2)], [found(1), *filler]))
    assert scored.scores.kinds["box"].numbers["AP"] == 1
    assert read_results(tmp_path / "results.json") == [found(1), found(2)]
    assert scored.written == (tmp_path / "results.json", tmp_path / "scores.json")
    assert not scored.problem


def test_scores_stand_without_the_files(request_of, tmp_path):
    request = request_of([found(1), found(2)])
    (tmp_path / "scores.json").mkdir()
    scored = score_shards(request)
    assert scored.scores.kinds["box"].numbers["AP"] == 1
    assert "IsADirectoryError" in scored.problem
    assert scored.written == ()


def test_a_shard_that_is_gone_is_named(request_of, tmp_path):
    request = request_of([], [])
    shard_of(tmp_path, 1).unlink()
    with pytest.raises(DataError, match="results_of_rank_1"):
        score_shards(request)


def test_results_of_other_images_are_refused(request_of):
    with pytest.raises(DataError, match=r"^detections: .*\(3\)"):
        score_shards(request_of([found(3)]))


def test_it_scores_and_draws_without_torch(request_of, tmp_path):
    """Torch would take seconds and hundreds of megabytes beside training."""
    request = request_of([found(1), found(2)], images=(1, 2))
    program = (
        "import json, sys\n"
        "sys.modules['torch'] = None\n"
        "from fd_large.tasks.detection.scores.score_shards import Request, score_shards\n"
        "print(score_shards(Request(**json.load(sys.stdin))).problem)\n"
    )
    asked = json.dumps(request._asdict())
    done = subprocess.run(
        [sys.executable, "-c", program], input=asked, capture_output=True, text=True, timeout=60
    )
    assert done.stdout.strip() == "", done.stdout + done.stderr
    assert done.returncode == 0
    assert (tmp_path / "curves.png").is_file()


def test_a_process_ends_with_the_one_that_started_it():
    """Whoever waits for its output waits for ever otherwise."""
    scorer = (
        "import os, sys, time\n"
        "from fd_large.tasks.detection.scores.score_shards import _end_with\n"
        "_end_with(os.getppid())\n"
        "print('lives', flush=True)\n"
        "time.sleep(1000)\n"
    )
    starter = (
        "import subprocess, sys\n"
        f"process = subprocess.Popen([sys.executable, '-c', {scorer!r}], stdout=subprocess.PIPE)\n"
        "print(process.stdout.readline().decode())\n"
        "process.stdout.close()\n"
        "import os; os.kill(os.getpid(), 9)\n"
    )
    ended = subprocess.run([sys.executable, "-c", starter], capture_output=True, timeout=60)
    assert ended.returncode == -9, ended.stderr.decode()
