"""Checks of one node by `doctor`: software, devices, limits, network and disks.

They find out whether a run can start, and what would make it slow. Versions, compilers and
DeepSpeed's operations are in the reports of torch and DeepSpeed, which `doctor --full` prints.
"""

from __future__ import annotations

import os
import platform
import resource
import shutil
import socket
import tempfile
from collections import Counter
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, requires, version
from importlib.util import find_spec
from pathlib import Path
from typing import Literal, NamedTuple

from fd_large.errors import ConfigError, FDError, first_line
from fd_large.files import kind_of
from fd_large.runtime import disks

Verdict = Literal["ok", "-", "slow", "low", "missing", "check", "STOPS"]

# 0: fine, 1: worth a look, 2: training cannot start. "-" means that there is nothing to judge.
SEVERITY: dict[Verdict, int] = {"ok": 0, "-": 0, "slow": 1, "low": 1, "missing": 1, "check": 1}
SEVERITY |= {"STOPS": 2}

_SLOW_DISK, _LOW_DISK = 100e6, 10e9  # Bytes/s, bytes.
# Docker's default of 64 MB ends loader processes with a bus error.
_LOW_SHARED_MEMORY = 1e9
_FABRIC = Path("/sys/class/infiniband")
# Packages whose versions are shown, and must be the same on every node.
_SHOWN = ("torch", "torchvision", "deepspeed", "timm", "numpy")


class Finding(NamedTuple):
    """Result of a check.

    Attributes:
        found: What was found, in a few words.
        verdict: Seriousness of the result: "ok"; "-" if nothing was checked; "slow", "low",
            "missing" or "check" for something to look at; or "STOPS" if training cannot start.
        remedy: What the user can do, if the verdict is not "ok".
        alike: Facts that should be the same on every node, as text; "" for none.
    """

    found: str
    verdict: Verdict = "ok"
    remedy: str = ""
    alike: str = ""


def look(check: Callable[[], Finding]) -> Finding:
    """Returns the finding of a check; if it raises, the exception's text with the verdict "-"."""
    try:
        return check()
    except Exception as error:
        return Finding(f"cannot look: {first_line(error)}", "-")


def check_node(
    run_dir: str, local_disk: str, world_size: int = 1, *, nvme_path: str = ""
) -> dict[str, Finding]:
    """Returns the findings of all checks of this node, by the name of the check.

    Args:
        run_dir: Folder that runs are written to.
        local_disk: Folder for copies of images (STAGE_TO of slurm/site.sh).
        world_size: Number of ranks of the process group.
        nvme_path: Folder that `engine.nvme_path` would name; "" for none.
    """
    checks: dict[str, Callable[[], Finding]] = {
        "packages": packages,
        "code": code,
        "devices": devices,
        "CPU/memory": cpu_and_memory,
        "limits": lambda: limits(world_size),
        "interfaces": interfaces,
        "InfiniBand": infiniband,
        "NCCL/gloo": collective_variables,
        "run folder": lambda: disk(run_dir, needed=True),
        "local disk": lambda: disk(local_disk, needed=False),
        "state disk": lambda: state_disk(nvme_path),
        "/dev/shm": shared_memory,
        "listings": listings,
        "fused code": fused_code,
    }
    return {name: look(check) for name, check in checks.items()}


# --- software ---


def packages() -> Finding:
    """Checks that the packages in pyproject.toml are installed, in accepted versions."""
    from packaging.requirements import Requirement

    try:
        requirements = [Requirement(line) for line in requires("fd_large") or []]
    except PackageNotFoundError:
        return Finding("fd_large is not installed", "missing", "pip install -e . in its checkout.")
    wrong, versions = [], [f"Python {platform.python_version()}"]
    for requirement in requirements:
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            has = version(requirement.name)
        except PackageNotFoundError:
            wrong.append(f"no {requirement.name}")
            continue
        if not requirement.specifier.contains(has, prereleases=True):
            wrong.append(f"{requirement.name} {has}, not {requirement.specifier}")
        elif requirement.name in _SHOWN:
            versions.append(f"{requirement.name} {has}")
    if wrong:
        return Finding("; ".join(wrong), "STOPS", "pip install -e . in the checkout.")
    return Finding(", ".join(versions), alike=", ".join(versions))


def code() -> Finding:
    """Reports the version of fd_large, its commit and the hash of its files."""
    import fd_large
    from fd_large.engine.node_consistency import code_hash
    from fd_large.runtime.run_folder import source_commit

    commit = source_commit()
    at = f"commit {commit[:9]}" if commit else "no checkout"
    text = f"fd_large {fd_large.__version__}, {at}, the files' hash {code_hash()[:8]}"
    return Finding(text, alike=text)


def fused_code() -> Finding:
    """Checks that DeepSpeed's fused optimiser can be built, and reports the installed kernels."""
    from fd_large.kernels.choose import has_nvidia_apex

    try:
        from fd_large.engine.zero.compiled_ops import ops
    except Exception as error:
        return Finding(f"DeepSpeed: {first_line(error)}", "STOPS", "Install deepspeed again.")
    adam = ops()[0]
    state = "is built" if adam.built else "can be built" if adam.buildable else "cannot be built"
    parts = [f"{adam.name} {state}"]
    parts += [f"{name} {version(name)}" for name in ("triton", "fairscale") if find_spec(name)]
    parts += ["NVIDIA apex"] if has_nvidia_apex() else []
    if wish := os.environ.get("FD_KERNELS"):
        parts.append(f"FD_KERNELS={wish}")
    text = ", ".join(parts)
    if _has_gpu() and not (adam.built or adam.buildable):
        remedy = "Install nvcc of torch's CUDA version, a C++ compiler and ninja."
        return Finding(text, "slow", remedy)
    if _has_gpu() and not find_spec("triton"):
        return Finding(f"{text}, no triton", "slow", "pip install triton: fused kernels on GPUs.")
    return Finding(text)


# --- the machine ---


def devices() -> Finding:
    """Checks each GPU by computing a small sum on it."""
    try:
        import torch
    except Exception as error:
        return Finding(f"torch: {first_line(error)}", "STOPS", "Install torch again.")
    if not torch.cuda.is_available():
        if kind_of("/proc/driver/nvidia/version"):
            remedy = "Install a torch that is built for CUDA, and check nvidia-smi."
            text = "an NVIDIA driver, but no GPU that torch can use"
            return Finding(text, "missing", remedy, "no GPU")
        remedy = "Fine for the quick start. A big model needs GPUs."
        return Finding("no GPU", "slow", remedy, "no GPU")
    names = []
    for index in range(torch.cuda.device_count()):
        try:
            float(torch.ones(8, device=f"cuda:{index}").sum())
        except RuntimeError as error:
            text = f"GPU {index} does not compute: {first_line(error)}"
            return Finding(text, "STOPS", "Have the node checked, or train without it.")
        facts = torch.cuda.get_device_properties(index)
        names.append(f"{facts.name} ({facts.total_memory / 2**30:.0f} GiB)")
    text = ", ".join(f"{count} x {name}" for name, count in Counter(names).items())
    return Finding(text, alike=text)


def cpu_and_memory() -> Finding:
    """Reports usable cores and free memory."""
    import psutil

    cores, memory = len(os.sched_getaffinity(0)), psutil.virtual_memory()
    free = f"{memory.available / 2**30:.0f} of {memory.total / 2**30:.0f} GiB free"
    text = f"{cores} of {os.cpu_count()} cores, {free}"
    if cores == 1 and (os.cpu_count() or 1) > 1:
        return Finding(text, "slow", "Ask the queue for more: srun --cpus-per-task=N.")
    return Finding(text)


def limits(world_size: int) -> Finding:
    """Checks the hard limit of open files for so many ranks, and the soft limit of locked memory.

    A run raises its soft limit of open files up to the hard limit.
    """
    from fd_large.ranks.distributed import open_files_needed

    _, files = resource.getrlimit(resource.RLIMIT_NOFILE)
    locked, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    unlimited = locked == resource.RLIM_INFINITY
    text = f"{files} open files, locked memory {'unlimited' if unlimited else f'{locked >> 20} MB'}"
    if files < (needed := open_files_needed(world_size)):
        remedy = (
            f"Rank 0 of {world_size} may need {needed} open files: have the hard limit raised "
            "(ulimit -Hn; slurmd's LimitNOFILE; docker run --ulimit nofile)."
        )
        return Finding(text, "low", remedy)
    if not unlimited and _active_ports():
        return Finding(text, "low", "InfiniBand needs ulimit -l unlimited.")
    return Finding(text)


# --- network ---


def interfaces() -> Finding:
    """Reports the network interfaces, and warns if the host's name has no address but loopback.

    A set GLOO_SOCKET_IFNAME suppresses the warning.
    """
    import psutil

    up = {name: facts for name, facts in psutil.net_if_stats().items() if facts.isup}
    links = []
    for name, addresses in psutil.net_if_addrs().items():
        numbers = [a.address for a in addresses if a.family == socket.AF_INET]
        if name in up and numbers and name != "lo":
            speed = f" {up[name].speed / 1000:g} Gb/s" if up[name].speed > 0 else ""
            links.append(f"{name} {numbers[0]}{speed}")
    host = socket.gethostname()
    try:
        address = socket.gethostbyname(host)
    except OSError:
        address = ""
    text = f"{', '.join(links) or 'no interface but lo'}; {host} is {address or 'not resolved'}"
    if links and (not address or address.startswith("127.")) and not _named("GLOO_SOCKET_IFNAME"):
        remedy = (
            "Several nodes need GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME, or a host name that "
            "the other nodes can reach."
        )
        return Finding(text, "check", remedy)
    return Finding(text)


def infiniband() -> Finding:
    """Reports the active InfiniBand ports, and warns if none is active or NCCL ignores them."""
    if not any(_FABRIC.glob("*")):
        return Finding("no device", "-")
    rates = Counter(_active_ports())
    if not rates:
        return Finding("no port is active", "slow", "Have the node's InfiniBand checked.")
    text = ", ".join(f"{count} x {rate}" for rate, count in rates.items())
    if os.environ.get("NCCL_IB_DISABLE") == "1":
        return Finding(f"{text}, unused", "slow", "unset NCCL_IB_DISABLE.", text)
    return Finding(text, alike=text)


def _active_ports() -> list[str]:
    """Returns the rates of active InfiniBand ports, such as "400 Gb/sec"."""
    return [
        " ".join((port / "rate").read_text().split()[:2])
        for port in sorted(_FABRIC.glob("*/ports/*"))
        if "ACTIVE" in (port / "state").read_text()
    ]


def collective_variables() -> Finding:
    """Reports the variables of NCCL and gloo, and checks that the named interfaces exist."""
    variables = {
        name: value
        for name, value in sorted(os.environ.items())
        if name.startswith(("NCCL_", "TORCH_NCCL_")) or name == "GLOO_SOCKET_IFNAME"
    }
    text = ", ".join(f"{name}={value}" for name, value in variables.items()) or "no variables set"
    present = os.listdir("/sys/class/net")
    for name in ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME"):
        # NCCL takes the beginning of a name, gloo the whole name.
        exists = str.startswith if name[0] == "N" else str.__eq__
        named = _named(name)
        if named and not any(exists(there, prefix) for prefix in named for there in present):
            return Finding(text, "STOPS", f"{name} names no interface here: {', '.join(present)}.")
    if variables.get("NCCL_P2P_DISABLE") == "1":
        return Finding(text, "slow", "unset NCCL_P2P_DISABLE: GPUs of a node talk directly.")
    return Finding(text)


def _named(variable: str) -> list[str]:
    """Returns the network interfaces that the environment variable of the name `variable` selects.

    The result is [] if the variable is not set or empty, or if its value begins with `^`, which
    excludes the interfaces after it.
    """
    text = os.environ.get(variable, "")
    return [] if text.startswith("^") else [name for name in text.lstrip("=").split(",") if name]


# --- disks ---


def state_disk(folder: str) -> Finding:
    """Checks whether ZeRO can keep the optimiser's state in `folder` (`engine.nvme_path`).

    For each parameter, the disk stores 16 bytes of state, or 20 with `optim.ema_decay`, and a step
    moves at most 32 bytes (read and written together). An empty `folder` is not checked, and the
    verdict is then "-".
    """
    if not folder:
        return Finding("no folder given; --nvme_path FOLDER checks one", "-")
    try:
        unfit = disks.unfit_for_state(folder, 1)
    except ConfigError as error:
        return Finding(str(error), "STOPS", "")
    if unfit:
        got, expected = unfit
        remedy = f"Name {expected}: --nvme_path here, --engine.nvme_path of the run."
        return Finding(f"{folder}: {got}", "STOPS", remedy)
    return disk(folder, needed=False)


def disk(folder: str, *, needed: bool) -> Finding:
    """Checks a disk's free space, and its speed in writing and flushing 256 MB.

    Args:
        folder: Folder on the disk; if it does not exist, its nearest existing parent is checked.
        needed: Whether a run cannot start without this folder.
    """
    flags = "--run_dir, and --runtime.run_dir of the run" if needed else "--local_disk"
    remedy = f"Name a folder that can be written: {flags}."
    verdict: Verdict = "STOPS" if needed else "missing"
    path = Path(folder).absolute()
    try:
        there = kind_of(folder)
        while not kind_of(path):
            path = path.parent
    except FDError as error:
        return Finding(str(error), verdict, remedy)
    if there not in (None, "folder"):
        return Finding(f"{folder}: a {there}", verdict, remedy)
    free, kind = shutil.disk_usage(path).free, disks.file_system(path)
    text = f"{folder} ({kind}): {free / 1e9:,.1f} GB free"
    try:
        speed = disks.write_speed(path)
    except OSError as error:
        return Finding(f"{text}, cannot be written: {error.strerror}", verdict, remedy)
    text += f", writes {speed / 1e9:.2f} GB/s"
    if free < _LOW_DISK:
        return Finding(text, "low", "A checkpoint takes 12 bytes a parameter. Make room.")
    if not needed and kind in disks.IN_MEMORY:
        return Finding(text, "low", "Copies there take memory: name a disk with --local_disk.")
    if speed < _SLOW_DISK:
        return Finding(
            text, "slow", "A stop waits for its checkpoint to be written. Name a faster disk."
        )
    return Finding(text)


def shared_memory() -> Finding:
    """Checks the free shared memory, through which loader processes pass batches."""
    usage = shutil.disk_usage("/dev/shm")
    text = f"{usage.free / 1e9:.1f} of {usage.total / 1e9:.1f} GB free"
    if usage.free < _LOW_SHARED_MEMORY:
        remedy = "Loader processes pass batches there: docker run --shm-size=16g or --ipc=host."
        return Finding(text, "low", remedy)
    return Finding(text)


def listings() -> Finding:
    """Checks that the lists of datasets' files can be stored in the cache folder."""
    from fd_large.data.listing import cache_folder

    folder = cache_folder() / "listings"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return Finding(f"kept in {folder}")
    except OSError as error:
        text = f"{folder} cannot be written: {error.strerror}"
        remedy = "Every start lists the dataset again. Set FD_CACHE to a writable folder."
        return Finding(text, "slow", remedy)


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()
