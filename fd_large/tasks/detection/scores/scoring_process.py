"""Scores the detections of an evaluation in a separate process on rank 0's machine.

A thread of rank 0 would not suffice, since faster-coco-eval and JSON parsing hold Python's global
lock, for minutes if there are many images, and all ranks would wait for rank 0.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path

from fd_large.engine.evaluation import Pending, awaited
from fd_large.errors import DataError
from fd_large.files import parse_json
from fd_large.imports import environ_of_program
from fd_large.ranks import distributed
from fd_large.tasks.detection.scores.results import SHARDS
from fd_large.tasks.detection.scores.score_shards import NOTE, Request, Scored
from fd_large.tasks.detection.scores.scoring import Scores

log = logging.getLogger(__name__)

PROGRAM = ("-m", "fd_large.tasks.detection.scores.score_shards")
STDERR = 2


class ScoringProcess(Pending):
    """A separate process that scores the detections of all ranks.

    All ranks construct the object, but only rank 0 starts the process.

    Args:
        folder: Folder with each rank's result file, and with the `Note`.
        annotations: Path of the ground truth.
        images: {id: path} of the images, of which some are drawn; if empty, nothing is drawn.
        max_pixels: Images with more pixels are drawn as grey.
        only: The ids of the images that count; empty for all.
    """

    def __init__(
        self,
        folder: Path,
        annotations: str,
        *,
        images: Mapping[int, str],
        max_pixels: int,
        only: Sequence[int] = (),
    ) -> None:
        self._folder = folder
        self._process: subprocess.Popen[str] | None = None
        self._scored: Future[Scored] | None = None
        if not distributed.is_main():
            return
        request = Request(
            str(folder), annotations, {str(n): p for n, p in images.items()}, max_pixels, only
        )
        text = json.dumps({**request._asdict(), "parent": os.getpid()})
        # The answer is a file in memory, since a library may write to the standard output.
        self._file = open(os.memfd_create("answer"), "w+", encoding="utf-8")  # noqa: SIM115
        answer = self._file.fileno()
        self._process = subprocess.Popen(
            [sys.executable, *PROGRAM, str(answer)],
            stdin=subprocess.PIPE,
            stdout=STDERR,
            text=True,
            pass_fds=[answer],
            env=environ_of_program(),
        )
        self._scored = Future()
        # A daemon: after an exception it must not keep this process alive.
        threading.Thread(target=self._ask, args=(text,), name="scoring", daemon=True).start()

    def _ask(self, text: str) -> None:
        assert self._process is not None
        assert self._scored is not None
        try:
            with self._file:
                self._process.communicate(text)
                self._file.seek(0)
                self._scored.set_result(self._answer(self._file.read()))
        except BaseException as error:
            self._scored.set_exception(error)

    def _answer(self, text: str) -> Scored:
        assert self._process is not None
        if code := self._process.returncode:
            raise DataError(
                f"{self._folder}: the detections were not scored; got exit code {code} of the "
                "scoring process, expected 0 (-9: it was killed, usually because memory was "
                "short). Start the same command again, on a machine with more memory: it first "
                "scores the stored detections."
            )
        try:
            answer = parse_json(text)
        except ValueError as error:
            raise DataError(
                f"{self._folder}: the detections were not scored; got {text[:80]!r} from the "
                "scoring process, expected an answer in JSON. Start the same command again: it "
                "first scores the stored detections."
            ) from error
        if error := answer.get("error"):
            raise DataError(error)
        written = tuple(map(Path, answer["written"]))
        return Scored(Scores.from_dict(answer["scores"]), written, answer["problem"])

    @property
    def done(self) -> bool:
        """Whether the process has ended; always False on ranks other than 0."""
        return self._scored is not None and self._scored.done()

    def scored(self, meanwhile: Callable[[], None] = lambda: None) -> Scored | None:
        """Waits for the process, and returns the scores on rank 0, and None on other ranks.

        All ranks must call this method.

        Args:
            meanwhile: Called repeatedly on all ranks during the wait; may raise to end the wait.

        Raises: DataError: on all ranks, if the scoring failed.
        """
        scored = awaited(self._scored, meanwhile)
        if scored is not None and scored.problem:
            log.error("%s: NOT WRITTEN: results or pictures: %s", self._folder, scored.problem)
        return scored

    def wait(self, meanwhile: Callable[[], None]) -> dict[str, float]:
        """Waits for COCO's metrics, and returns them on all ranks, by names like `box_AP`.

        All ranks must call this method.

        Args:
            meanwhile: Called repeatedly on all ranks during the wait; may raise to end the wait.

        Raises: DataError: on all ranks, if the scoring failed.
        """
        scored = self.scored(meanwhile)
        return distributed.broadcast_object(scored.scores.named() if scored else {})

    def forget(self) -> None:
        """Deletes, on rank 0, the result files of all ranks.

        The file that marks the evaluation as not yet scored is deleted too.
        """
        if distributed.is_main():
            forget_shards(self._folder)

    def give_up(self) -> None:
        """Kills the scoring process, which only rank 0 has.

        The detections of all ranks stay in the folder, together with a file that marks them as not
        yet scored. When the run is launched again, they are scored.
        """
        if self._process is not None:
            self._process.kill()


def forget_shards(folder: Path) -> None:
    """Deletes all ranks' result files from the folder of an evaluation.

    The file that marks the evaluation as not yet scored is deleted too.
    """
    (folder / NOTE).unlink(missing_ok=True)
    # Also those that an evaluation on more ranks left here when it was killed.
    for shard in folder.glob(SHARDS):
        shard.unlink()
