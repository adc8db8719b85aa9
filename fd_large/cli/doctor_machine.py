"""The doctor's look at a node: devices, memory, network, disks."""

from __future__ import annotations

import os
import resource
import shutil
import socket
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from fd_large.cli.doctor_finding import Finding, look

_GB = 1e9
# A test of writing ends at whichever comes first.
_WRITE_BYTES, _WRITE_SECONDS = 256 << 20, 2.0
_SLOW_DISK = 100e6
_LOW_DISK = 10e9
# Docker's default of 64 MB ends loading processes with a bus error.
_LOW_SHARED_MEMORY = 1e9
_IN_MEMORY = ("tmpfs", "ramfs")
_FABRIC = Path("/sys/class/infiniband")


def findings(run_dir: str, local_disk: str) -> Iterator[Finding]:
    """All lines of this node.

    Args:
        run_dir: Where runs are to be written.
        local_disk: Where `data.stage_to` would copy to.
    """
    yield look("devices", _devices)
    yield look("CPU/memory", _host)
    yield look("limits", _limits)
    yield look("interfaces", _interfaces)
    yield look("InfiniBand", _infiniband)
    yield look("NCCL/gloo", _collective_variables)
    yield look("run folder", lambda: disk("run folder", run_dir, needed=True))
    yield look("local disk", lambda: disk("local disk", local_disk, needed=False))
    yield look("/dev/shm", _shared_memory)
    yield look("listings", _listings)


def disk(what: str, folder: str, *, needed: bool) -> Finding:
    """Free space of a folder's disk, and how fast it takes a file of 256 MB, flushed.

    Args:
        what: The line's name.
        folder: Need not exist; its nearest parent that does is measured.
        needed: Whether a run cannot do without.
    """
    path = Path(folder).absolute()
    while not path.exists():
        path = path.parent
    free, kind = shutil.disk_usage(path).free, _kind(path)
    said = f"{folder} ({kind}): {free / _GB:,.1f} GB free"
    try:
        speed = _write_speed(path)
    except OSError as error:
        return Finding(
            what,
            f"{said}, cannot be written: {error.strerror}",
            "STOPS" if needed else "missing",
            "Name a folder that can be written: "
            f"{'--run_dir, and --runtime.run_dir of the run' if needed else '--local_disk'}.",
        )
    said += f", writes {speed / _GB:.2f} GB/s"
    if free < _LOW_DISK:
        return Finding(what, said, "low", "A checkpoint takes 12 bytes a parameter. Make room.")
    if not needed and kind in _IN_MEMORY:
        return Finding(
            what, said, "low", "Copies there take memory: name a disk with --local_disk."
        )
    if speed < _SLOW_DISK:
        return Finding(what, said, "slow", "Every checkpoint waits for it. Name another disk.")
    return Finding(what, said)


# ------------------------------------------------------------------------------------------------


def _devices() -> Finding:
    import torch

    if not torch.cuda.is_available():
        return Finding(
            "devices",
            "no GPU",
            "slow",
            "Fine for the quick start. A big model needs GPUs.",
            "no GPU",
        )
    names = []
    for index in range(torch.cuda.device_count()):
        try:
            float(torch.ones(8, device=f"cuda:{index}").sum())
        except RuntimeError as error:
            return Finding(
                "devices",
                f"GPU {index} does not compute: {str(error).splitlines()[0]}",
                "STOPS",
                "Have the node looked at, or leave it out.",
            )
        facts = torch.cuda.get_device_properties(index)
        names.append(f"{facts.name} ({facts.total_memory / 2**30:.0f} GiB)")
    said = ", ".join(f"{count} x {name}" for name, count in Counter(names).items())
    driver = Path("/proc/driver/nvidia/version")
    if driver.is_file():
        words = driver.read_text().split()
        said += f", driver {next((w for w in words if w[:1].isdigit() and '.' in w), '?')}"
    return Finding("devices", said, alike=said)


def _host() -> Finding:
    cores = len(os.sched_getaffinity(0))
    facts = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    total, available = (int(facts[name].split()[0]) << 10 for name in ("MemTotal", "MemAvailable"))
    memory = f"{available / 2**30:.0f} of {total / 2**30:.0f} GiB free"
    said = f"{cores} of {os.cpu_count()} cores, {memory}"
    if cores == 1 and (os.cpu_count() or 1) > 1:
        return Finding(
            "CPU/memory", said, "slow", "Ask the queue for more: srun --cpus-per-task=N."
        )
    return Finding("CPU/memory", said)


def _limits() -> Finding:
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    locked, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    unlimited = locked == resource.RLIM_INFINITY
    said = f"{files} open files, locked memory {'unlimited' if unlimited else f'{locked >> 20} MB'}"
    if files < 1024:
        return Finding("limits", said, "low", "ulimit -n 65536 before the start.")
    if not unlimited and _active_ports():
        return Finding("limits", said, "low", "InfiniBand needs ulimit -l unlimited.")
    return Finding("limits", said)


def _interfaces() -> Finding:
    import psutil

    up = {name: facts for name, facts in psutil.net_if_stats().items() if facts.isup}
    said = []
    for name, addresses in psutil.net_if_addrs().items():
        numbers = [a.address for a in addresses if a.family == socket.AF_INET]
        if name in up and numbers and name != "lo":
            speed = f" {up[name].speed / 1000:g} Gb/s" if up[name].speed > 0 else ""
            said.append(f"{name} {numbers[0]}{speed}")
    host = socket.gethostname()
    try:
        address = socket.gethostbyname(host)
    except OSError:
        address = ""
    found = f"{', '.join(said) or 'lo alone'}; {host} is {address or 'not resolved'}"
    if said and (not address or address.startswith("127.")) and not _named("GLOO_SOCKET_IFNAME"):
        return Finding(
            "interfaces",
            found,
            "check",
            "Several nodes need GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME, or a host name that "
            "the others reach.",
        )
    return Finding("interfaces", found)


def _active_ports() -> list[str]:
    found = []
    for port in sorted(_FABRIC.glob("*/ports/*")):
        if "ACTIVE" in (port / "state").read_text():
            rate = " ".join((port / "rate").read_text().split()[:2])
            found.append(f"{port.parent.parent.name} {rate}")
    return found


def _infiniband() -> Finding:
    ports = _active_ports()
    if not any(_FABRIC.glob("*")):
        return Finding("InfiniBand", "no device", "-")
    if not ports:
        return Finding(
            "InfiniBand", "no port is active", "slow", "Have the node's fabric looked at."
        )
    counts = Counter(port.split(" ", 1)[1] for port in ports)
    said = ", ".join(f"{count} x {rate}" for rate, count in counts.items())
    if os.environ.get("NCCL_IB_DISABLE") == "1":
        return Finding("InfiniBand", f"{said}, unused", "slow", "unset NCCL_IB_DISABLE.", said)
    return Finding("InfiniBand", said, alike=said)


def _collective_variables() -> Finding:
    found = {
        name: value
        for name, value in sorted(os.environ.items())
        if name.startswith(("NCCL_", "TORCH_NCCL_")) or name == "GLOO_SOCKET_IFNAME"
    }
    said = ", ".join(f"{name}={value}" for name, value in found.items()) or "no variables set"
    present = os.listdir("/sys/class/net")
    for name in ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME"):
        wanted = _named(name)
        # NCCL takes beginnings of names, gloo whole ones.
        if wanted and not any(
            there == one or (name[0] == "N" and there.startswith(one))
            for one in wanted
            for there in present
        ):
            return Finding(
                "NCCL/gloo",
                said,
                "STOPS",
                f"{name} names no interface here: {', '.join(present)}.",
            )
    if found.get("NCCL_P2P_DISABLE") == "1":
        return Finding("NCCL/gloo", said, "slow", "unset NCCL_P2P_DISABLE: GPUs of a node talk.")
    return Finding("NCCL/gloo", said)


def _named(variable: str) -> list[str]:
    """Interfaces that a variable asks for; none where it only leaves some out."""
    text = os.environ.get(variable, "")
    return [] if text.startswith("^") else [one for one in text.lstrip("=").split(",") if one]


def _shared_memory() -> Finding:
    usage = shutil.disk_usage("/dev/shm")
    said = f"{usage.free / _GB:.1f} of {usage.total / _GB:.1f} GB free"
    if usage.free < _LOW_SHARED_MEMORY:
        return Finding(
            "/dev/shm",
            said,
            "low",
            "Loading processes hand over batches there: docker run --shm-size=16g or --ipc=host.",
        )
    return Finding("/dev/shm", said)


def _listings() -> Finding:
    from fd_large.data.listing import cache_folder

    folder = cache_folder() / "listings"
    files = list(folder.glob("*.listing")) if folder.is_dir() else []
    size = sum(path.stat().st_size for path in files)
    said = f"{len(files)} kept, {size / 1e6:.0f} MB, in {folder}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        return Finding(
            "listings",
            f"{folder} cannot be written: {error.strerror}",
            "slow",
            "Every start walks over the data set. Set FD_CACHE to a folder that can be written.",
        )
    return Finding("listings", said)


def _kind(path: Path) -> str:
    """The type of the file system that holds a path."""
    best, kind = "", "?"
    real = os.path.realpath(path)
    for line in Path("/proc/mounts").read_text().splitlines():
        _, place, its_kind, *_ = line.split()
        place = place.replace("\\040", " ")
        inside = real == place or real.startswith(place.rstrip("/") + "/")
        if inside and len(place) >= len(best):
            best, kind = place, its_kind
    return kind


def _write_speed(folder: Path) -> float:
    """Bytes a second, flushed to the disk."""
    block = os.urandom(8 << 20)  # Zeros would be a test of compression.
    with tempfile.NamedTemporaryFile(prefix=".doctor-", dir=folder) as file:
        start, done = time.perf_counter(), 0
        while done < _WRITE_BYTES and time.perf_counter() - start < _WRITE_SECONDS:
            done += file.write(block)
            file.flush()
            os.fsync(file.fileno())
        return done / (time.perf_counter() - start)
