"""The same program under every launcher, and no rank left behind when the launcher is ended."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch.distributed as dist
import twin
from labelled_folder import labelled_folder
from launch import HELPERS, ROOT, Launcher, Started, free_port, read_results, run_ranks, start_ranks
from pictures import write_pictures
from waiting import until

PROGRAMS = Path(__file__).parent / "programs"
needs_proc = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")


@pytest.mark.parametrize("launcher", ["plain", "deepspeed", "torchrun", "mpirun"])
def test_ranks_meet_under_every_launcher(launcher: Launcher, tmp_path: Path) -> None:
    run_ranks(
        *(PROGRAMS / "reductions.py", tmp_path),
        ranks=2,
        launcher=launcher,
        results=tmp_path,
    )
    for rank, result in enumerate(read_results(tmp_path, 2)):
        launch = result.pop("launch")
        assert launch["launcher"] == {"plain": "python"}.get(launcher, launcher)
        assert launch["rank"] == launch["local_rank"] == rank
        assert launch["world_size"] == launch["local_world_size"] == 2
        assert launch["master_addr"] == "127.0.0.1"
        assert result == {
            "again": True,
            "found_again": True,
            "environment": {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank)},
            "rank": rank,
            "world_size": 2,
            "is_main": rank == 0,
            "device": "cpu",
            "sum": [1.0, 1.0, 1.0],
            "argument": [float(rank)] * 3,
            "max": 1,
            "any": [True, False],
            "broadcast": {"from": 0},
            "gather": ["", "r"],
            "group": [rank],
            "group_again": True,
            "groups_made": [[rank]],
            # Where it listens. Every pair of ranks would have a connection besides.
            "sockets_of_an_unused_group": 1,
            # The store of rank 0, and gloo.
            "listens_on": ["127.0.0.1"],
            "open_files": True,
            "stopped": [0, 1],
        }


def test_a_taken_port_is_one_sentence(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        finished = run_ranks(
            PROGRAMS / "reductions.py",
            tmp_path,
            ranks=2,
            env={"MASTER_PORT": str(taken.getsockname()[1])},
            check=False,
        )
    assert finished.returncodes[0] == 1
    assert "LaunchError: launch: rank 0 of 2 did not meet the other ranks" in finished.outputs[0]


def ready(folder: Path, ranks: int) -> Callable[[], bool]:
    return lambda: all((folder / f"rank_{r}.json").exists() for r in range(ranks))


def runs(pid: int, words: str) -> bool:
    try:
        return words.encode() in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False


def ends_without_ranks(started: Started, pid: int) -> None:
    os.kill(pid, signal.SIGTERM)
    # The killed command is not reaped here: a zombie, as under a careless parent, counts as gone.
    until(
        lambda: not started.pids(),
        120.0,
        lambda: f"still there: {started.pids()}\n" + "\n".join(started.outputs()),
    )


@needs_proc
def test_a_second_job_at_the_port_of_a_running_one_ends_alone(tmp_path: Path) -> None:
    program, first, second = PROGRAMS / "same_port.py", tmp_path / "first", tmp_path / "second"
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    running = start_ranks(program, first, ranks=2, launcher="mpirun", env=meeting)
    try:
        running.until(ready(first, 2), 60)
        failed = run_ranks(program, second, ranks=2, launcher="mpirun", env=meeting, check=False)
        assert failed.returncodes != [0]
        assert "launch: rank 0 of 2 did not meet the other ranks" in failed.outputs[0]
        assert not second.exists()
        (first / "go").touch()
        assert running.processes[0].wait(60) == 0
    finally:
        outputs = running.kill()
    assert read_results(first, 2) == [None, None], outputs


@needs_proc
@pytest.mark.parametrize(
    ("launcher", "victim"),
    [
        ("torchrun", "bin/torchrun"),
        # A training run under deepspeed: test_training.py.
        pytest.param("deepspeed", "bin/deepspeed", marks=pytest.mark.sweep),
        pytest.param("deepspeed", "deepspeed.launcher.launch", marks=pytest.mark.sweep),
        pytest.param("mpirun", "bin/mpirun", marks=pytest.mark.sweep),
    ],
)
def test_sigterm_to_the_launcher_leaves_no_rank(
    launcher: Launcher, victim: str, tmp_path: Path
) -> None:
    started = start_ranks(PROGRAMS / "waits.py", "default", tmp_path, ranks=2, launcher=launcher)
    try:
        started.until(ready(tmp_path, 2), 60)
        ranks = read_results(tmp_path, 2)
        assert set(ranks) <= set(started.pids())
        [pid] = [pid for pid in started.pids() if runs(pid, victim) and pid not in ranks]
        ends_without_ranks(started, pid)
    finally:
        started.kill()


@needs_proc
def test_sigterm_to_deepspeed_before_its_ranks_exist_leaves_no_rank(tmp_path: Path) -> None:
    started = start_ranks(PROGRAMS / "waits.py", "default", tmp_path, ranks=2, launcher="deepspeed")
    try:
        # launch.py is there, and still importing.
        started.until(
            lambda: any(runs(pid, "deepspeed.launcher.launch") for pid in started.pids()), 60
        )
        ends_without_ranks(started, started.processes[0].pid)
    finally:
        outputs = started.kill()
    assert "deepspeed, which started this rank, is gone; stopping" in outputs[0]


@needs_proc
@pytest.mark.parametrize("handler", ["deaf", "saves"])
def test_an_orphan_with_a_handler_leaves_after_its_grace_or_its_save(
    handler: str, tmp_path: Path
) -> None:
    # A stand-in for a launcher, which is known by its name and, killed, hands nothing on.
    launcher = tmp_path / "mpirun"
    launcher.write_text("import subprocess, sys; sys.exit(subprocess.call(sys.argv[1:]))")
    program = [sys.executable, str(PROGRAMS / "waits.py"), handler, str(tmp_path)]
    command = [sys.executable, str(launcher), *program]
    started = Started(mark=f"FD_TEST_MARK={tmp_path}")
    paths = os.pathsep.join([str(ROOT), *HELPERS])
    environ = os.environ | {"PYTHONPATH": paths, "FD_TEST_MARK": str(tmp_path)}
    environ |= {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(command, env=environ, stdout=log, stderr=log)
    started.processes.append(process)
    try:
        until(ready(tmp_path, 1), 60, lambda: (tmp_path / "log").read_text())
        process.kill()
        until(lambda: not started.pids(), 15, lambda: (tmp_path / "log").read_text())
    finally:
        started.kill()
    said = (tmp_path / "log").read_text()
    assert "rank 0: mpirun, which started this rank, is gone; stopping" in said
    assert (tmp_path / "saved_0").exists() == (handler == "saves")


@needs_proc
def test_one_rank_listens_nowhere(tmp_path: Path) -> None:
    """Neither training nor evaluating opens a socket that anybody could reach."""
    pictures, run = write_pictures(tmp_path / "pictures", 16), tmp_path / "run"
    root = labelled_folder(tmp_path / "labelled")
    steps = ("--optim.max_steps", "2", "--runtime.save_every", "1")
    commands = [
        ["train", *twin.words(pictures, run, *twin.WITH_LOADERS, *steps, ranks=1)],
        [
            "evaluate",
            str(run),
            "--task",
            "knn",
            "--data.root",
            str(root),
            "--data.image_size",
            "32",
        ],
        ["doctor"],
    ]
    run_ranks(
        *(PROGRAMS / "listening.py", tmp_path, json.dumps(commands)), ranks=1, results=tmp_path
    )
    [found] = read_results(tmp_path, 1)
    assert found["codes"][:2] == [0, 0]
    assert found["listened"] == []


@needs_proc
def test_ranks_of_several_hosts_speak_under_a_name_that_nobody_guesses(tmp_path: Path) -> None:
    """Who reaches their store and knows all but the token ends nobody."""
    token = tmp_path / "token"
    token.write_text("0123456789abcdef" * 4)
    port = free_port()
    # The loopback interface, in a form that the ranks take for another host's address.
    meeting = {"MASTER_ADDR": "2130706433", "MASTER_PORT": str(port)}
    run = tmp_path / "run"
    started = start_ranks(
        *(PROGRAMS / "same_port.py", run),
        ranks=2,
        env=meeting | {"FD_LARGE_TOKEN_FILE": str(token), "GLOO_SOCKET_IFNAME": "lo"},
    )
    try:
        started.until(ready(run, 2), 60)
        store = dist.TCPStore("127.0.0.1", port, wait_for_workers=False)
        guessed = dist.PrefixStore("fd_large//0", store)
        ending = json.dumps([1, 2, "your disk is on fire"])
        assert guessed.compare_set("end", "", ending) == ending.encode()
        # It is heard by who knows the token: the ranks look once a second.
        time.sleep(2.5)
        (run / "go").touch()
        assert [process.wait(60) for process in started.processes] == [0, 0]
    finally:
        outputs = started.kill()
    assert read_results(run, 2) == [None, None], outputs
