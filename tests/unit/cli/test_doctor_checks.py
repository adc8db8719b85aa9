from __future__ import annotations

import errno
import importlib.metadata
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement
from small_disk import mounted

from fd_large.cli import doctor, doctor_checks
from fd_large.cli.doctor_checks import Finding, look
from fd_large.runtime import disks

pytestmark = pytest.mark.usefixtures("plain_environment")


def test_a_disk_in_memory_and_a_full_one_are_low(tiny_disk, monkeypatch):
    found = doctor_checks.disk(str(tiny_disk / "not" / "made"), needed=False)
    assert found.verdict == "missing"  # 4 MB do not even take the test
    assert "No space left" in found.found
    assert os.listdir(tiny_disk) == []
    assert doctor_checks.disk(str(tiny_disk), needed=True).verdict == "STOPS"
    monkeypatch.setattr(disks, "write_speed", lambda folder: 1e9)
    full = doctor_checks.disk(str(tiny_disk), needed=False)
    assert (full.verdict, "Make room" in full.remedy) == ("low", True)
    monkeypatch.setattr(doctor_checks, "_LOW_DISK", 0)
    in_memory = doctor_checks.disk(str(tiny_disk), needed=False)
    assert (in_memory.verdict, "tmpfs" in in_memory.found) == ("low", True)
    assert "take memory" in in_memory.remedy


def test_a_disk_for_state_is_a_local_one(tmp_path, monkeypatch):
    assert doctor_checks.state_disk("").verdict == "-"
    monkeypatch.setattr(disks, "write_speed", lambda folder: 1e9)
    monkeypatch.setattr(disks, "file_system", lambda path: "lustre")
    assert doctor_checks.state_disk(str(tmp_path)).verdict == "STOPS"


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
    monkeypatch.setattr(doctor_checks, "_FABRIC", tmp_path)
    assert doctor_checks.infiniband().verdict == "-"
    for number, state in enumerate(["4: ACTIVE", "4: ACTIVE", "1: DOWN"]):
        port = tmp_path / f"mlx5_{number}" / "ports" / "1"
        port.mkdir(parents=True)
        (port / "state").write_text(f"{state}\n")
        (port / "rate").write_text("400 Gb/sec (4X NDR)\n")
    assert doctor_checks.infiniband() == Finding("2 x 400 Gb/sec", alike="2 x 400 Gb/sec")
    monkeypatch.setenv("NCCL_IB_DISABLE", "1")
    assert doctor_checks.infiniband().verdict == "slow"
    for number in range(2):
        (tmp_path / f"mlx5_{number}" / "ports" / "1" / "state").write_text("2: INIT\n")
    assert doctor_checks.infiniband().found == "no port is active"


def test_the_limit_of_open_files_is_judged_by_the_ranks(monkeypatch):
    unlimited = doctor_checks.resource.RLIM_INFINITY
    limits = {
        doctor_checks.resource.RLIMIT_NOFILE: (1024, 5000),
        doctor_checks.resource.RLIMIT_MEMLOCK: (unlimited, unlimited),
    }
    monkeypatch.setattr(doctor_checks.resource, "getrlimit", limits.__getitem__)
    # The soft limit is raised to the hard one at start.
    assert doctor_checks.limits(8).verdict == "ok"
    found = doctor_checks.limits(1024)
    assert found.verdict == "low"
    assert "5000 open files" in found.found
    assert "Rank 0 of 1024 may need 6144" in found.remedy


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
    listed = map(Requirement, importlib.metadata.requires("fd_large") or [])
    (bound,) = (one.specifier for one in listed if one.name == "deepspeed")
    assert f"deepspeed 0.1.0, not {bound}" in found.found


def test_a_gpu_machine_whose_torch_sees_none(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert doctor_checks.devices().verdict == "slow"
    monkeypatch.setattr(doctor_checks, "kind_of", lambda path: "file" if "nvidia" in path else None)
    found = doctor_checks.devices()
    assert (found.verdict, "an NVIDIA driver, but no GPU" in found.found) == ("missing", True)


def test_a_gpu_that_does_not_compute_stops(monkeypatch):
    def fails(*_: object, **__: object) -> None:
        raise RuntimeError("CUDA error: uncorrectable ECC error encountered\nmore")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.setattr(torch, "ones", fails)
    found = doctor_checks.devices()
    assert found.verdict == "STOPS"
    assert found.found == "GPU 0 does not compute: CUDA error: uncorrectable ECC error encountered"


def test_a_deepspeed_that_cannot_be_imported_stops(monkeypatch):
    monkeypatch.setitem(sys.modules, "fd_large.engine.zero.compiled_ops", None)
    assert doctor_checks.fused_code().verdict == "STOPS"


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


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    yield from mounted(tmp_path, "4m")
