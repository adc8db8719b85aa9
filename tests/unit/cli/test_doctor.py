"""The doctor's table: one screen, a verdict a line, what stops a run stops it with 1."""

from __future__ import annotations

import errno
import fcntl
import importlib.metadata
import os
import re
import struct
import subprocess
import sys
import termios
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from fd_large.cli import doctor, doctor_checks
from fd_large.cli import main as cli
from fd_large.cli.doctor_checks import Finding, look


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in list(os.environ):
        if name.startswith(("NCCL_", "GLOO_", "SLURM_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("FD_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(disk)], capture_output=True
    )
    if mounted.returncode:
        pytest.skip("needs the right to mount a tmpfs")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_one_screen_where_everything_needed_is_here(tmp_path, capsys):
    assert cli.main(["doctor", "--run_dir", str(tmp_path / "runs")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert 18 <= len(lines) <= 40
    assert max(map(len, lines)) <= 100
    assert lines[-1] == "Nothing stops training here."
    names = [name for group in doctor.GROUPS for name in group]
    # Every line has its place, and every place its line.
    starts = [text for text in lines[:-1] if not text.startswith(" ")]
    assert len(starts) == len(names)
    for name, text in zip(names, starts, strict=True):
        assert text.startswith(f"{name} ")
        assert text[len(name) :].split()[0] in ("ok", "-", "slow", "low", "missing", "check")
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(("columns", "width"), [(60, 60), (90, 90), (200, 100), (0, 100)])
def test_lines_are_as_wide_as_the_terminal(columns, width, monkeypatch):
    ours, theirs = os.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    with os.fdopen(theirs, "w") as out:
        monkeypatch.setattr(doctor.terminal, "out", lambda: out)
        monkeypatch.delenv("COLUMNS", raising=False)
        doctor._print({"packages": Finding("word " * 60)})
        text = os.read(ours, 1 << 16).decode()
    os.close(ours)
    lines = re.sub(r"\x1b\[[0-9;]*m", "", text).splitlines()
    assert max(len(line.rstrip()) for line in lines) in range(width - 5, width + 1)


def test_a_run_folder_that_cannot_be_written_stops_and_the_remedy_is_told(capsys):
    assert cli.main(["doctor", "--run_dir", "/proc/runs"]) == 1
    out = capsys.readouterr().out
    assert "Training cannot start: run folder." in out
    assert "/proc/runs (proc)" in out
    assert "-> Name a folder that can be written: --run_dir" in out


def test_help_needs_no_torch():
    code = (
        "import sys; from fd_large.cli.main import main\n"
        "main(['doctor', '--help'])\n"
        "assert 'torch' not in sys.modules"
    )
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "--local_disk" in told.stdout


def test_half_an_environment_of_ranks_is_told_in_the_table(monkeypatch, capsys, tmp_path):
    # DeepSpeed leaves them behind where a test before has started it in this process.
    for name in ("WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RANK", "0")
    assert cli.main(["doctor", "--run_dir", str(tmp_path)]) == 1
    out = capsys.readouterr().out
    assert "WORLD_SIZE" in out
    assert "Training cannot start: launcher." in out


def test_a_disk_in_memory_and_a_full_one_are_low(tiny_disk):
    found = doctor_checks.disk(str(tiny_disk / "not" / "made"), needed=False)
    assert found.verdict == "missing"  # 4 MB do not even take the test
    assert "No space left" in found.found
    assert os.listdir(tiny_disk) == []
    assert doctor_checks.disk(str(tiny_disk), needed=True).verdict == "STOPS"
    shared = doctor_checks.disk("/dev/shm", needed=False)
    assert (shared.verdict, "tmpfs" in shared.found) == ("low", True)


@pytest.mark.parametrize(
    ("name", "value", "verdict"),
    [
        ("NCCL_SOCKET_IFNAME", "ib77", "STOPS"),
        ("NCCL_SOCKET_IFNAME", "^docker,lo", "ok"),
        ("NCCL_SOCKET_IFNAME", "=lo", "ok"),
        ("NCCL_SOCKET_IFNAME", "l", "ok"),  # a beginning
        ("GLOO_SOCKET_IFNAME", "l", "STOPS"),  # gloo wants the whole name
        ("GLOO_SOCKET_IFNAME", "lo", "ok"),
        ("NCCL_P2P_DISABLE", "1", "slow"),
        ("NCCL_DEBUG", "INFO", "ok"),
    ],
)
def test_variables_of_the_network(name, value, verdict, monkeypatch):
    monkeypatch.setenv(name, value)
    found = doctor_checks.collective_variables()
    assert found.verdict == verdict
    assert f"{name}={value}" in found.found
    assert bool(found.remedy) == (verdict != "ok")


def test_infiniband(tmp_path, monkeypatch):
    assert doctor_checks.infiniband().verdict == "-"
    for number, state in enumerate(["4: ACTIVE", "4: ACTIVE", "1: DOWN"]):
        port = tmp_path / f"mlx5_{number}" / "ports" / "1"
        port.mkdir(parents=True)
        (port / "state").write_text(f"{state}\n")
        (port / "rate").write_text("400 Gb/sec (4X NDR)\n")
    monkeypatch.setattr(doctor_checks, "_FABRIC", tmp_path)
    assert doctor_checks.infiniband() == Finding("2 x 400 Gb/sec", alike="2 x 400 Gb/sec")
    monkeypatch.setenv("NCCL_IB_DISABLE", "1")
    assert doctor_checks.infiniband().verdict == "slow"
    for number in range(2):
        (tmp_path / f"mlx5_{number}" / "ports" / "1" / "state").write_text("2: INIT\n")
    assert doctor_checks.infiniband().found == "no port is active"


def test_packages_that_are_missing_or_too_old_stop(monkeypatch):
    real = importlib.metadata.version

    def other(name: str) -> str:
        if name == "timm":
            raise importlib.metadata.PackageNotFoundError(name)
        return "0.1.0" if name == "deepspeed" else real(name)

    monkeypatch.setattr(doctor_checks, "version", other)
    found = doctor_checks.packages()
    assert found.verdict == "STOPS"
    assert "no timm" in found.found
    assert "deepspeed 0.1.0, not >=" in found.found


def test_a_gpu_machine_with_a_torch_for_cpus(monkeypatch):
    if torch.version.cuda:
        pytest.skip("a torch with CUDA")
    real = os.path.exists
    monkeypatch.setattr(os.path, "exists", lambda p: "nvidia" in str(p) or real(p))
    found = doctor_checks.torch_build()
    assert (found.verdict, "beside an NVIDIA driver" in found.found) == ("missing", True)


def test_a_gpu_that_does_not_compute_stops(monkeypatch):
    def fails(*_: object, **__: object) -> None:
        raise RuntimeError("CUDA error: uncorrectable ECC error encountered\nmore")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.setattr(torch, "ones", fails)
    found = doctor_checks.devices()
    assert found.verdict == "STOPS"
    assert found.found == "GPU 0 does not compute: CUDA error: uncorrectable ECC error encountered"


def test_without_a_compiler(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    found = doctor_checks.compiler()
    assert found.verdict == "missing"
    assert found.found == "none; no C++, ninja"


def test_listings_that_cannot_be_kept(monkeypatch):
    monkeypatch.setenv("FD_CACHE", "/proc/cache")
    found = doctor_checks.listings()
    assert (found.verdict, "FD_CACHE" in found.remedy) == ("slow", True)


def test_a_look_that_fails_is_told_and_judges_nothing():
    def fails() -> Finding:
        raise OSError(errno.EACCES, "Permission denied")

    found = look(fails)
    assert found.verdict == "-"
    assert "Permission denied" in found.found


def test_nodes_that_differ_are_named():
    def node(hash_: str, devices: str, disk: Finding) -> dict[str, Finding]:
        return {
            "code": Finding(hash_, alike=hash_),
            "devices": Finding(devices, alike=devices),
            "run folder": disk,
        }

    fast, faster = (Finding(f"{n} GB/s") for n in (1, 2))
    slow = Finding("0.05 GB/s", "slow", "Name another disk.")
    slower = slow._replace(found="0.04 GB/s")
    same = doctor.merged([("n1", node("a", "8 x H", fast)), ("n2", node("a", "8 x H", faster))])
    assert same == node("a", "8 x H", fast)
    code, devices, disk = doctor.merged(
        [
            ("n1", node("a", "8 x H", fast)),
            ("n2", node("a", "8 x H", slow)),
            ("n3", node("b", "7 x H", slower)),
        ]
    ).values()
    assert (code.verdict, code.found) == ("STOPS", "a; n3: b")
    assert (devices.verdict, devices.found) == ("check", "8 x H; n3: 7 x H")
    assert disk == slow._replace(found="1 GB/s; n2, n3: 0.05 GB/s")
    # A first node that is worse than the others speaks for itself.
    assert doctor.merged([("n1", {"a": slow}), ("n2", {"a": fast})]) == {"a": slow}
