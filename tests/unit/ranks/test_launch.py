"""Launch environments as recorded from each launcher."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from fd_large.errors import LaunchError
from fd_large.ranks.launch import (
    Launch,
    check_accelerator,
    find_launch,
    first_slurm_host,
    read_token,
)

ROOT = Path(__file__).resolve().parents[3]

TORCHRUN = {
    "TORCHELASTIC_RUN_ID": "none",
    "RANK": "3",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "GROUP_RANK": "1",
    "MASTER_ADDR": "10.0.0.1",
    "MASTER_PORT": "29611",
}
DEEPSPEED = {
    "RANK": "3",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "1",
    "LOCAL_SIZE": "2",
    "CROSS_RANK": "1",
    "CROSS_SIZE": "2",
    "MASTER_ADDR": "10.0.0.1",
    "MASTER_PORT": "29612",
    "CUDA_VISIBLE_DEVICES": "0,1",
}
HYDRA = {
    "PMI_RANK": "3",
    "PMI_SIZE": "4",
    "MPI_LOCALRANKID": "1",
    "MPI_LOCALNRANKS": "2",
    "MASTER_ADDR": "10.0.0.1",
    "MASTER_PORT": "29613",
}
OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    "MASTER_ADDR": "10.0.0.1",
    "MASTER_PORT": "29614",
}
# srun -N2 -n4 on Slurm 24.11, second node
SRUN = {
    "SLURM_GTIDS": "2,3",
    "SLURM_JOB_ID": "20007",
    "SLURM_LAUNCH_NODE_IPADDR": "10.9.9.9",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_NTASKS": "4",
    "SLURM_PROCID": "3",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NODELIST": "127.0.0.[1-2]",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
}
MEETING = {"MASTER_ADDR": "h", "MASTER_PORT": "7"}
# the shell of a batch script on the same allocation
BATCH = {
    "SLURM_GTIDS": "0",
    "SLURM_JOB_ID": "20007",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "0",
    "SLURM_NTASKS": "4",
    "SLURM_PROCID": "0",
}


def launch(launcher: str, **changes: object) -> Launch:
    fields = {
        "rank": 3,
        "world_size": 4,
        "local_rank": 1,
        "local_world_size": 2,
        "master_addr": "10.0.0.1",
        "node_rank": 1,
    }
    return Launch(launcher=launcher, **(fields | changes))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        (TORCHRUN, launch("torchrun", master_port=29611)),
        (DEEPSPEED, launch("deepspeed", master_port=29612)),
        (HYDRA, launch("mpirun", master_port=29613, node_rank=None)),
        (OPEN_MPI, launch("mpirun", master_port=29614, node_rank=None)),
        (SRUN, launch("srun", master_addr="127.0.0.1", master_port=10007)),
        (
            SRUN | {"SLURM_RESTART_COUNT": "1"},
            launch("srun", master_addr="127.0.0.1", master_port=11016),
        ),
        (SRUN | MEETING, launch("srun", master_addr="h", master_port=7)),
        # the inner launcher wins
        (SRUN | TORCHRUN, launch("torchrun", master_port=29611)),
        (SRUN | DEEPSPEED, launch("deepspeed", master_port=29612)),
        (SRUN | HYDRA, launch("mpirun", master_port=29613, node_rank=None)),
        # srun --mpi=pmi2 leaves PMI variables, but is no mpirun
        (
            SRUN | {"PMI_RANK": "3", "PMI_SIZE": "4"},
            launch("srun", master_addr="127.0.0.1", master_port=10007),
        ),
    ],
)
def test_find_launch_reads_each_launcher(environ: dict[str, str], expected: Launch) -> None:
    assert find_launch(environ) == expected


@pytest.mark.parametrize("environ", [TORCHRUN, DEEPSPEED, HYDRA, OPEN_MPI, SRUN])
def test_find_launch_is_the_same_after_start_wrote_the_environment(environ: dict[str, str]) -> None:
    found = find_launch(environ)
    written = {
        "RANK": str(found.rank),
        "WORLD_SIZE": str(found.world_size),
        "LOCAL_RANK": str(found.local_rank),
        "LOCAL_WORLD_SIZE": str(found.local_world_size),
        "MASTER_ADDR": found.master_addr,
        "MASTER_PORT": str(found.master_port),
    }
    assert find_launch(environ | written) == found


@pytest.mark.parametrize(
    "environ",
    [
        {},
        {"MASTER_ADDR": "elsewhere", "MASTER_PORT": "1"},
        BATCH,
        # the shell that salloc opens on the first node is an interactive step
        SRUN | {"SLURM_STEP_ID": str(0xFFFFFFFA)},
    ],
)
def test_find_launch_without_a_launcher_is_a_single_process(environ: dict[str, str]) -> None:
    found = find_launch(environ)
    assert (found.launcher, found.rank, found.world_size) == ("python", 0, 1)
    assert (found.local_rank, found.local_world_size, found.master_addr) == (0, 1, "127.0.0.1")
    assert 0 < found.master_port < 65536


def test_a_single_process_in_a_batch_job_of_several_tasks_warns(
    caplog: pytest.LogCaptureFixture,
) -> None:
    find_launch(BATCH)
    assert "not under srun" in caplog.text


def test_a_single_rank_under_mpirun_asks_no_mpi() -> None:
    one = {"PMI_RANK": "0", "PMI_SIZE": "1", "MPI_LOCALRANKID": "0", "MPI_LOCALNRANKS": "1"}
    found = find_launch(one)
    assert (found.launcher, found.world_size, found.master_addr) == ("mpirun", 1, "127.0.0.1")


def test_ranks_set_by_hand_are_plain_python_on_one_node() -> None:
    environ = {
        "RANK": "1",
        "WORLD_SIZE": "2",
        "LOCAL_RANK": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "29500",
    }
    found = find_launch(environ)
    assert (found.launcher, found.rank, found.local_world_size) == ("python", 1, 2)


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        ({"RANK": "0"}, "WORLD_SIZE: .* got ''"),
        ({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}, "MASTER_ADDR: .* got nothing"),
        (
            {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "h"},
            "MASTER_PORT: .* got ''",
        ),
        (DEEPSPEED | {"RANK": "4"}, "rank under deepspeed: .* got 4, expected 0 to 3"),
        (DEEPSPEED | {"LOCAL_RANK": "2"}, "local rank under deepspeed: .* got 2, expected 0 to 1"),
        (TORCHRUN | {"WORLD_SIZE": "four"}, "WORLD_SIZE: not an integer; got 'four'"),
        (TORCHRUN | {"MASTER_PORT": "70000"}, "master port under torchrun: .* got 70000"),
        (SRUN | {"RANK": "0"}, "RANK contradicts srun; got 0, expected 3"),
        (OPEN_MPI | {"WORLD_SIZE": "1"}, "WORLD_SIZE contradicts mpirun; got 1, expected 4"),
        (
            {k: v for k, v in SRUN.items() if k != "SLURM_PROCID"},
            "SLURM_PROCID: not an integer; got ''",
        ),
        # --distribution=cyclic
        (SRUN | {"SLURM_GTIDS": "1,3"}, "got ranks 1,3 on node 1, expected 2,3"),
        (SRUN | {"SLURM_STEP_TASKS_PER_NODE": "2"}, r"got \[2\] on its nodes, expected 4 in all"),
        (SRUN | {"SLURM_STEP_TASKS_PER_NODE": "2(2)"}, r"got '2\(2\)', expected a form like"),
        (
            SRUN | {"SLURM_STEP_NODELIST": "no-such-host.invalid,x", "PATH": ""},
            "does not resolve; got 'no-such-host.invalid'",
        ),
    ],
)
def test_find_launch_refuses_what_cannot_work(environ: dict[str, str], message: str) -> None:
    with pytest.raises(LaunchError, match=message):
        find_launch(environ)


def test_a_node_that_only_slurm_can_name_is_asked_of_slurm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scontrol = tmp_path / "scontrol"
    scontrol.write_text('#!/bin/sh\necho "NodeName=$3 NodeAddr=10.1.2.3 NodeHostName=$3"\n')
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    found = find_launch(SRUN | {"SLURM_STEP_NODELIST": "no-such-host-[07-08].invalid"})
    assert found.master_addr == "10.1.2.3"


def test_srun_on_one_node_asks_no_resolver() -> None:
    environ = SRUN | {
        "SLURM_GTIDS": "0,1,2,3",
        "SLURM_LOCALID": "3",
        "SLURM_NODEID": "0",
        "SLURM_STEP_NODELIST": "no-such-host.invalid",
        "SLURM_STEP_TASKS_PER_NODE": "4",
    }
    found = find_launch(environ)
    assert (found.master_addr, found.local_rank, found.local_world_size) == ("127.0.0.1", 3, 4)


@pytest.mark.parametrize(
    ("nodelist", "host"),
    [
        ("n[1-2]", "n1"),
        ("gpu-[003-004,9],login1", "gpu-003"),
        ("a.example,b[1-2]", "a.example"),
        ("rack[2-3]n[10,12]", "rack2n10"),
        ("n[7]", "n7"),
        ("", ""),
    ],
)
def test_first_slurm_host(nodelist: str, host: str) -> None:
    assert first_slurm_host(nodelist) == host


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, True),
        (DEEPSPEED, False),
        (DEEPSPEED | {"LOCAL_SIZE": "4"}, True),
        (TORCHRUN | {"LOCAL_WORLD_SIZE": "4"}, True),
        # Set by hand: whether they share a host is told by the address alone.
        ({"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"} | MEETING, False),
        (
            {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}
            | {"MASTER_ADDR": "localhost", "MASTER_PORT": "7"},
            True,
        ),
        (SRUN | MEETING, False),
    ],
)
def test_whether_all_ranks_share_a_host(environ: dict[str, str], expected: bool) -> None:
    assert find_launch(environ).is_on_one_host is expected


def test_the_token_of_a_job(tmp_path: Path) -> None:
    assert read_token({}) == ""
    file = tmp_path / "token"
    file.write_text("0123456789abcdef\n")
    assert read_token({"FD_LARGE_TOKEN_FILE": str(file)}) == "0123456789abcdef"


@pytest.mark.parametrize("text", [None, b"", b"short", b"a/b" * 20, b"\xff" * 20])
def test_a_token_that_is_none_is_refused(text: bytes | None, tmp_path: Path) -> None:
    file = tmp_path / "token"
    if text is not None:
        file.write_bytes(text)
    with pytest.raises(LaunchError, match="FD_LARGE_TOKEN_FILE"):
        read_token({"FD_LARGE_TOKEN_FILE": str(file)})


@pytest.mark.parametrize("name", ["bogus", "", "xpu"])
def test_a_device_that_nothing_runs_on_is_refused(name):
    with pytest.raises(LaunchError, match=r"^DS_ACCELERATOR: "):
        check_accelerator({"DS_ACCELERATOR": name})


def test_devices_that_runs_are_trained_on():
    for environ in ({}, {"DS_ACCELERATOR": "cpu"}, {"DS_ACCELERATOR": "cuda"}):
        check_accelerator(environ)
