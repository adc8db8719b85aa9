from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from multiprocessing import util
from pathlib import Path

import psutil
from waiting import until

from fd_large.data.folder import ImageFolder
from fd_large.data.loader import ViewBatches, build_loader
from fd_large.data.sampler import Portion
from fd_large.data.views import ViewSettings

# Prints its workers once they load, then waits in the middle of the epoch, its pipes full.
TRAINING = """
import sys, time, psutil, torch
from fd_large.data.folder import ImageFolder
from fd_large.data.loader import ViewBatches, build_loader
from fd_large.data.sampler import Portion
from fd_large.data.views import ViewSettings
torch.set_num_threads(2)
source = ImageFolder(sys.argv[1])
batches = iter(build_loader(
    ViewBatches(source, ViewSettings(512, 0.3), 0, 0), len(source), Portion(0, 0, 2, 0, 1),
    global_batch_size=2, workers=3,
))
next(batches)
print(*(child.pid for child in psutil.Process().children()), flush=True)
if len(sys.argv) > 2:
    sys.exit(0)
time.sleep(100)
"""


def load(source, workers: int):
    views = ViewBatches(source, ViewSettings(32, 0.3), 0, 0)
    portion = Portion(0, 0, 2, 0, 1)
    return iter(build_loader(views, len(source), portion, global_batch_size=2, workers=workers))


def gone(pids: list[int], within_seconds: float) -> bool:
    processes = [psutil.Process(pid) for pid in pids if psutil.pid_exists(pid)]
    _, alive = psutil.wait_procs(processes, timeout=within_seconds)
    return not [p for p in alive if p.status() != psutil.STATUS_ZOMBIE]


def start(
    picture_folder, *arguments: str, temporary: Path | None = None
) -> tuple[subprocess.Popen, list[int]]:
    training = subprocess.Popen(
        [sys.executable, "-c", TRAINING, str(picture_folder), *arguments],
        env=os.environ | ({"TMPDIR": str(temporary)} if temporary else {}),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    workers = [int(pid) for pid in training.stdout.readline().split()]
    assert len(workers) == 3
    return training, workers


def test_workers_do_not_outlive_their_parent(picture_folder, tmp_path):
    training, workers = start(picture_folder, temporary=tmp_path)
    until(lambda: len([*tmp_path.glob("*/listener*")]) == len(workers), 30, "a socket of each")
    training.kill()
    training.wait(10)
    assert gone(workers, 10)
    # Nor do their sockets.
    assert not list(tmp_path.iterdir())


def test_folders_for_temporary_files_may_have_long_paths(picture_folder, tmp_path):
    """Longer than a socket's name may be."""
    long = tmp_path / ("a" * 100)
    long.mkdir()
    training, workers = start(picture_folder, "leave", temporary=long)
    assert training.wait(30) == 0
    assert gone(workers, 10)


def test_a_parent_that_ends_in_the_middle_of_an_epoch_ends(picture_folder):
    training, workers = start(picture_folder, "leave")
    _, err = training.communicate(timeout=30)
    assert training.returncode == 0
    assert "Error" not in err
    assert gone(workers, 10)


def test_signals_to_the_group_are_the_parents_affair(picture_folder):
    """Batches still come after Ctrl-C, SIGTERM and the like reached all workers."""
    before = set(psutil.Process().children())
    batches = load(ImageFolder(picture_folder), 2)
    next(batches)
    workers = [worker.pid for worker in set(psutil.Process().children()) - before]
    assert len(workers) == 2
    # from another process, as a launcher or a scheduler would
    kill = f"import os\nfor pid in {workers}:\n for number in (1, 2, 10, 15): os.kill(pid, number)"
    subprocess.run([sys.executable, "-c", kill], check=True)
    time.sleep(0.3)
    assert len(list(batches)) == 12
    del batches
    assert gone(workers, 10)


def test_no_thread_of_a_worker_takes_a_signal(picture_folder):
    """torch starts some in it, where the parent has several, before it can ignore any signal."""
    training, workers = start(picture_folder)
    for pid in workers:
        for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGINT):
            os.kill(pid, number)
    try:
        assert not [pid for pid in workers if gone([pid], 0.5)]
    finally:
        training.kill()
    assert gone(workers, 10)


def test_a_worker_obeys_its_parent(picture_folder):
    # It removes no folder of sockets but its own.
    folder = Path(util.get_temp_dir())
    before = set(psutil.Process().children())
    batches = load(ImageFolder(picture_folder), 1)
    next(batches)
    (worker,) = set(psutil.Process().children()) - before
    worker.terminate()
    # The code is gone with the process if torch has asked for it first.
    assert worker.wait(10) in (0, None)
    assert folder.is_dir()
