"""Ranks: which launcher started this process, the process group, small collectives, the watch.

The only wrapper of torch.distributed; it knows nothing of DeepSpeed's engine, whose
`init_distributed` finds the group that `start` made and keeps it. Everything but `start`,
`barrier` and `node_group` also works before `start`, as rank 0 of 1.
"""

from __future__ import annotations

import logging
import os
import re
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist

from fd_large.errors import ConfigError, LaunchError

log = logging.getLogger(__name__)

Launcher = Literal["deepspeed", "torchrun", "srun", "mpirun", "python"]
T = TypeVar("T")

ORPHAN_GRACE_SECONDS = 20.0
"""From SIGTERM to the end of a rank whose launcher is gone, unless a `hold` is active."""

WATCH_INTERVAL_SECONDS = 1.0


@dataclass(frozen=True, kw_only=True)
class Launch:
    """Who started this rank, and where the ranks meet."""

    launcher: Launcher
    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    master_addr: str
    master_port: int
    node_rank: int | None = None


# ------------------------------------------------------------------ who started this process


def find_launch(environ: Mapping[str, str] = os.environ) -> Launch:
    """Finds the launcher from the environment that it left.

    An inner launcher wins over an outer one (torchrun or deepspeed inside srun or mpirun). A
    batch script of Slurm is no step, so plain python in it is a single process. Under mpirun
    without MASTER_ADDR and MASTER_PORT this starts MPI (mpi4py) for one broadcast and ends it.

    Raises:
        LaunchError: If the environment is half set, contradicts itself, or names no meeting place.
    """
    if "TORCHELASTIC_RUN_ID" in environ:
        return _from_rank_variables(environ, "torchrun", node_rank="GROUP_RANK")
    if "CROSS_RANK" in environ and "LOCAL_SIZE" in environ:
        return _from_rank_variables(environ, "deepspeed", node_rank="CROSS_RANK")
    if "OMPI_COMM_WORLD_RANK" in environ:
        return _agreeing(environ, _from_mpi(environ, "OMPI_COMM_WORLD_", local="LOCAL_"))
    # `srun --mpi=pmi2` sets PMI_RANK too, hydra's local rank it does not.
    if "PMI_RANK" in environ and "MPI_LOCALRANKID" in environ:
        return _agreeing(environ, _from_mpi(environ, "PMI_", local=""))
    if _is_slurm_step(environ):
        return _agreeing(environ, _from_slurm(environ))
    if any(name in environ for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")):
        return _from_rank_variables(environ, "python", node_rank="GROUP_RANK")
    if _integer(environ, "SLURM_NTASKS", 1) > 1:
        log.warning(
            "a Slurm job of %s tasks, but not under srun: running as a single process",
            environ["SLURM_NTASKS"],
        )
    return Launch(
        launcher="python",
        rank=0,
        world_size=1,
        local_rank=0,
        local_world_size=1,
        master_addr="127.0.0.1",
        master_port=_free_port(),
        node_rank=0,
    )


def _integer(environ: Mapping[str, str], name: str, default: int | None = None) -> int:
    text = environ.get(name, "")
    if not text and default is not None:
        return default
    try:
        return int(text)
    except ValueError:
        raise LaunchError(
            f"launch: {name}; got {text!r}, expected an integer. Start all ranks with one of "
            "deepspeed, torchrun, srun or mpirun, or unset RANK, WORLD_SIZE and LOCAL_RANK "
            "to run a single process."
        ) from None


def _checked(launch: Launch) -> Launch:
    for name, value, low, high in (
        ("rank", launch.rank, 0, launch.world_size - 1),
        ("local rank", launch.local_rank, 0, launch.local_world_size - 1),
        ("ranks on this node", launch.local_world_size, 1, launch.world_size),
        ("master port", launch.master_port, 1, 65535),
    ):
        if not low <= value <= high:
            raise LaunchError(
                f"launch: {name} under {launch.launcher}; got {value}, expected {low} to {high}. "
                "Unset RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE and MASTER_PORT where a "
                "script set them and let the launcher set them."
            )
    return launch


def _agreeing(environ: Mapping[str, str], launch: Launch) -> Launch:
    """Refuses RANK and the like where they contradict srun or mpirun, which set none of them."""
    for name, value in (
        ("RANK", launch.rank),
        ("WORLD_SIZE", launch.world_size),
        ("LOCAL_RANK", launch.local_rank),
    ):
        if (given := _integer(environ, name, value)) != value:
            raise LaunchError(
                f"launch: {name} contradicts {launch.launcher}; got {given}, expected {value}. "
                f"Unset {name} before {launch.launcher} starts the ranks."
            )
    return _checked(launch)


def _from_rank_variables(
    environ: Mapping[str, str], launcher: Launcher, *, node_rank: str
) -> Launch:
    world_size = _integer(environ, "WORLD_SIZE")
    if world_size > 1 and not environ.get("MASTER_ADDR"):
        raise LaunchError(
            f"launch: MASTER_ADDR; got nothing, expected the address of rank 0 for {world_size} "
            "ranks. Set MASTER_ADDR and MASTER_PORT."
        )
    return _checked(
        Launch(
            launcher=launcher,
            rank=_integer(environ, "RANK"),
            world_size=world_size,
            local_rank=_integer(environ, "LOCAL_RANK"),
            # deepspeed calls it LOCAL_SIZE; ranks set by hand are taken to share one node.
            local_world_size=_integer(
                environ, "LOCAL_WORLD_SIZE", _integer(environ, "LOCAL_SIZE", world_size)
            ),
            master_addr=environ.get("MASTER_ADDR") or "127.0.0.1",
            master_port=_integer(environ, "MASTER_PORT", _free_port() if world_size == 1 else None),
            node_rank=_integer(environ, node_rank) if node_rank in environ else None,
        )
    )


def _from_mpi(environ: Mapping[str, str], prefix: str, *, local: str) -> Launch:
    world_size = _integer(environ, f"{prefix}SIZE")
    if local:
        local_rank = _integer(environ, f"{prefix}LOCAL_RANK")
        local_world_size = _integer(environ, f"{prefix}LOCAL_SIZE")
    else:
        local_rank = _integer(environ, "MPI_LOCALRANKID")
        local_world_size = _integer(environ, "MPI_LOCALNRANKS")
    one_node = world_size == local_world_size
    if environ.get("MASTER_ADDR") and environ.get("MASTER_PORT"):
        address, port = environ["MASTER_ADDR"], _integer(environ, "MASTER_PORT")
    else:
        address, port = _meet_over_mpi(world_size, one_node=one_node)
    return Launch(
        launcher="mpirun",
        rank=_integer(environ, f"{prefix}RANK"),
        world_size=world_size,
        local_rank=local_rank,
        local_world_size=local_world_size,
        master_addr=address,
        master_port=port,
        node_rank=0 if one_node else None,
    )


def _meet_over_mpi(world_size: int, *, one_node: bool) -> tuple[str, int]:
    """Broadcasts rank 0's address and a free port of its node to all ranks of COMM_WORLD."""
    remedy = (
        "Install an mpi4py that is built for this mpirun (the mpi extra brings one with mpich), "
        "or set MASTER_ADDR and MASTER_PORT for all ranks."
    )
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        raise LaunchError(
            f"launch: mpi4py under mpirun; got {error}, expected a working one. {remedy}"
        ) from error
    world = MPI.COMM_WORLD
    if world.size != world_size:
        raise LaunchError(
            f"launch: MPI ranks; mpi4py sees {world.size}, mpirun started {world_size}. {remedy}"
        )
    place = None
    if world.rank == 0:
        place = ("127.0.0.1" if one_node else _own_address(), _free_port())
    address, port = world.bcast(place)
    # A rank that later leaves by os._exit or a signal must not look to MPI like a crash of all.
    MPI.Finalize()
    return str(address), int(port)


def _own_address() -> str:
    """Returns an address of this host that other hosts can reach."""
    try:
        address = socket.gethostbyname(socket.gethostname())
        if not address.startswith("127."):
            return address
        # Connecting a datagram socket sends nothing: it asks which interface faces outwards.
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect(("192.0.2.1", 9))
            return str(probe.getsockname()[0])
    except OSError as error:
        raise LaunchError(
            f"launch: address of rank 0; got {error}, expected one that other hosts can reach. "
            "Set MASTER_ADDR and MASTER_PORT for all ranks."
        ) from error


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _is_slurm_step(environ: Mapping[str, str]) -> bool:
    # The shells of sbatch (no step id) and of an interactive salloc (step ids from 0xfffffff0 on
    # are Slurm's own) carry SLURM_PROCID too, but are not ranks.
    step = environ.get("SLURM_STEP_ID", "")
    return step.isdigit() and int(step) < 0xFFFFFFF0


def _from_slurm(environ: Mapping[str, str]) -> Launch:
    rank = _integer(environ, "SLURM_PROCID")
    world_size = _integer(environ, "SLURM_STEP_NUM_TASKS", _integer(environ, "SLURM_NTASKS", 1))
    node_rank = _integer(environ, "SLURM_NODEID")
    local_rank = _integer(environ, "SLURM_LOCALID")
    counts: list[int] = []
    for part in environ.get("SLURM_STEP_TASKS_PER_NODE", str(world_size)).split(","):
        # "8(x2),4" is 8, 8, 4
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        if match is None:
            raise LaunchError(
                f"launch: SLURM_STEP_TASKS_PER_NODE; got {part!r}, expected a form like 8(x2),4. "
                "Start the ranks with srun."
            )
        counts += [int(match[1])] * int(match[2] or 1)
    if sum(counts) != world_size or node_rank >= len(counts):
        raise LaunchError(
            f"launch: the tasks of this Slurm step; got {counts} on its nodes, expected "
            f"{world_size} in all. Start the ranks with srun and leave SLURM_* alone."
        )
    first = sum(counts[:node_rank])
    expected = ",".join(str(first + task) for task in range(counts[node_rank]))
    # The ranks of the whole node, so that all of it refuses and nobody waits for the others.
    if (placed := environ.get("SLURM_GTIDS", expected)) != expected or first + local_rank != rank:
        raise LaunchError(
            f"launch: placement of Slurm tasks; got ranks {placed} on node {node_rank}, expected "
            f"{expected}. Add --distribution=block to srun: the ranks of a node must be "
            "consecutive."
        )
    return Launch(
        launcher="srun",
        rank=rank,
        world_size=world_size,
        local_rank=local_rank,
        local_world_size=counts[node_rank],
        master_addr=environ.get("MASTER_ADDR") or _slurm_address(environ, len(counts)),
        # The port must be known to all ranks without a message; jobs that share a node differ.
        master_port=_integer(
            environ, "MASTER_PORT", 10000 + _integer(environ, "SLURM_JOB_ID") % 20000
        ),
        node_rank=node_rank,
    )


def first_slurm_host(nodelist: str) -> str:
    """Returns the first host of a Slurm node list: "gpu[003-004,9],login1" gives gpu003."""
    match = re.match(r"(?:[^,\[]|\[[^\]]*\])+", nodelist)
    return re.sub(r"\[([^\],-]*)[^\]]*\]", r"\1", match[0]) if match else ""


def _slurm_address(environ: Mapping[str, str], num_nodes: int) -> str:
    if num_nodes == 1:
        return "127.0.0.1"
    # Not SLURM_LAUNCH_NODE_IPADDR: that is where srun was called, often a login node.
    host = first_slurm_host(environ.get("SLURM_STEP_NODELIST", ""))
    try:
        socket.getaddrinfo(host, None)
        return host
    except OSError:
        # Slurm may know a node by a name that no resolver does.
        command = ["scontrol", "show", "node", host]
        try:
            shown = subprocess.run(command, capture_output=True, text=True, timeout=30).stdout
        except (OSError, subprocess.TimeoutExpired):
            shown = ""
        if (match := re.search(r"\bNodeAddr=(\S+)", shown)) and match[1] != host:
            return match[1]
        raise LaunchError(
            f"launch: first node of the Slurm step; got {host!r}, which does not resolve, expected "
            "a host name or address. Set MASTER_ADDR to an address of that node."
        ) from None


# ------------------------------------------------------------------ the process group

_launch: Launch | None = None
_node_groups: dict[int, dist.ProcessGroup] = {}


def start(launch: Launch | None = None, *, timeout_seconds: float = 1800.0) -> Launch:
    """Makes the process group of all ranks and starts the watch; once, at the start of a run.

    Collectives run over NCCL on CUDA tensors and gloo on CPU tensors. The launch is also written
    to the environment, in the variables that torch and DeepSpeed read.

    Args:
        launch: Where this rank stands; None asks `find_launch`.
        timeout_seconds: A collective that waits longer for a rank fails.

    Returns: the launch that was used, also when the group existed before.
    Raises:
        LaunchError: If the ranks do not meet, or this rank has no GPU of its own.
    """
    global _launch
    if _launch is not None and dist.is_initialized():
        return _launch
    launch = launch or find_launch()
    # As early as possible: a launcher that ends before this is not noticed.
    watch_launcher()
    os.environ |= {
        "RANK": str(launch.rank),
        "WORLD_SIZE": str(launch.world_size),
        "LOCAL_RANK": str(launch.local_rank),
        "LOCAL_WORLD_SIZE": str(launch.local_world_size),
        "MASTER_ADDR": launch.master_addr,
        "MASTER_PORT": str(launch.master_port),
    }
    if _has_cuda():
        if launch.local_rank >= (visible := torch.cuda.device_count()):
            raise LaunchError(
                f"launch: GPUs that local rank {launch.local_rank} sees; got {visible}, expected "
                f"{launch.local_world_size}. Start no more ranks than a node has GPUs and let "
                "each see all of them (srun: --gpus-per-node, not --gpus-per-task)."
            )
        torch.cuda.set_device(launch.local_rank)
    elif launch.world_size == launch.local_world_size and "lo" in dict(
        (name, index) for index, name in socket.if_nameindex()
    ):
        # Ranks of one host need no network, nor a host name that resolves.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    try:
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if _has_cuda() else "gloo",
            timeout=timedelta(seconds=timeout_seconds),
        )
    except dist.DistError as error:
        raise LaunchError(
            f"launch: rank {launch.rank} of {launch.world_size} did not meet the others at "
            f"{launch.master_addr}:{launch.master_port}; got {str(error).splitlines()[0]} "
            "Choose a free port (MASTER_PORT, or the launcher's --master_port) on an address "
            "that all ranks reach."
        ) from error
    _launch = launch
    return launch


def stop() -> None:
    """Destroys the process group without waiting for other ranks; harmless when there is none."""
    global _launch
    _node_groups.clear()
    _launch = None
    if dist.is_initialized():
        dist.destroy_process_group()


def _has_cuda() -> bool:
    # DeepSpeed's own switch: with it, ranks on a GPU machine stay on the CPU.
    return os.environ.get("DS_ACCELERATOR") != "cpu" and torch.cuda.is_available()


def rank() -> int:
    """Returns this process's rank, 0 without a group."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Returns the number of ranks, 1 without a group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def local_rank() -> int:
    """Returns the rank among those of this node, 0 before `start`."""
    return _launch.local_rank if _launch else 0


def local_world_size() -> int:
    """Returns the number of ranks on this node, 1 before `start`."""
    return _launch.local_world_size if _launch else 1


def is_main() -> bool:
    """Says whether this is rank 0, the one that writes and speaks."""
    return rank() == 0


def device() -> torch.device:
    """Returns the device of this rank: its GPU, or the CPU where there is none."""
    return torch.device("cuda", local_rank()) if _has_cuda() else torch.device("cpu")


def barrier() -> None:
    """Waits until all ranks are here."""
    if dist.is_initialized():
        dist.barrier(device_ids=[local_rank()] if _has_cuda() else None)


def mean(value: T) -> T:
    """Averages a tensor of any shape or a number over the ranks; the argument is not changed.

    Sums run in the tensor's type, but at least in float32; numbers in float64.
    """
    if not isinstance(value, torch.Tensor):
        return float(mean(torch.tensor(value, dtype=torch.float64, device=device())))  # type: ignore[return-value]
    total = value.detach().to(torch.promote_types(value.dtype, torch.float32), copy=True)
    if dist.is_initialized():
        dist.all_reduce(total)
    return (total / world_size()).to(value.dtype)  # type: ignore[return-value]


def max_rank(value: float) -> float:
    """Returns the largest of the ranks' numbers, exact for integers below 2**53."""
    if not dist.is_initialized():
        return value
    largest = torch.tensor(value, dtype=torch.float64, device=device())
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return type(value)(largest.item())


def min_rank(value: float) -> float:
    """Returns the smallest of the ranks' numbers, exact for integers below 2**53."""
    return -max_rank(-value)


def any_rank(flag: bool) -> bool:
    """Says whether the flag is true on any rank: how ranks take a decision together."""
    return bool(max_rank(int(flag)))


def any_flags(flags: Sequence[bool]) -> list[bool]:
    """Says of each flag whether it is true on any rank, in one collective."""
    if not dist.is_initialized():
        return list(flags)
    seen = torch.tensor(flags, dtype=torch.int32, device=device())
    dist.all_reduce(seen, op=dist.ReduceOp.MAX)
    return [bool(flag) for flag in seen.tolist()]


def sum_tensor(value: torch.Tensor, group: dist.ProcessGroup | None = None) -> torch.Tensor:
    """Adds a tensor up over the ranks of a group, all by default; integers wrap around."""
    total = value.detach().clone()
    if dist.is_initialized():
        dist.all_reduce(total, group=group)
    return total


def broadcast_object(value: T, source: int = 0) -> T:
    """Returns the picklable object of rank `source` on all ranks."""
    if not dist.is_initialized():
        return value
    box = [value]
    dist.broadcast_object_list(box, src=source, device=device())
    return box[0]


def gather_objects(value: T) -> list[T]:
    """Returns the picklable objects of all ranks, in rank order, on all ranks."""
    if not dist.is_initialized():
        return [value]
    gathered: list[Any] = [None] * world_size()
    dist.all_gather_object(gathered, value)
    return gathered


def node_group(node_size: int) -> dist.ProcessGroup:
    """Returns the process group of this rank's node, where node = rank // node_size.

    All ranks must call it alike: each makes the groups of all nodes, in the same order, once.

    Raises:
        ConfigError: If nodes of this size do not fill the ranks.
    """
    if node_size < 1 or world_size() % node_size:
        raise ConfigError(
            f"engine.node_size: ranks of a node; got {node_size}, expected a divisor of the "
            f"{world_size()} ranks. Set engine.node_size to the number of ranks on each node."
        )
    if node_size not in _node_groups:
        assert dist.is_initialized(), "node_group comes after start"
        groups = [
            dist.new_group(list(range(first, first + node_size)))
            for first in range(0, world_size(), node_size)
        ]
        _node_groups[node_size] = groups[rank() // node_size]
    return _node_groups[node_size]


# ------------------------------------------------------------------ the watch

_DEEPSPEED_RUNNERS = frozenset({"deepspeed", "ds", "deepspeed.pt", "deepspeed.launcher.runner"})
_DEEPSPEED_LAUNCH = "deepspeed.launcher.launch"
_TORCHRUN = frozenset({"torchrun", "torch.distributed.run", "torch.distributed.launch"})
_MPIRUN = frozenset(
    {"mpirun", "mpiexec", "prterun", "orterun", "prte", "prted", "orted"}
    | {"mpirun.hydra", "mpiexec.hydra", "hydra_pmi_proxy", "hydra_bstrap_proxy"}
)
_LAUNCHERS = _DEEPSPEED_RUNNERS | {_DEEPSPEED_LAUNCH} | _TORCHRUN | _MPIRUN

_watcher: threading.Thread | None = None
_holds = 0
_holds_lock = threading.Lock()


@dataclass(frozen=True)
class _Process:
    """A process as /proc shows it; the start time tells it from a later one with its id."""

    pid: int
    start_time: int
    parent: int
    group: int
    state: str

    @classmethod
    def read(cls, pid: int) -> _Process | None:
        try:
            stat = Path(f"/proc/{pid}/stat").read_text(errors="replace")
        except OSError:
            return None
        # proc(5): state, parent and group are fields 3 to 5, the start time is field 22; the
        # name before them may hold blanks and parentheses.
        fields = stat[stat.rindex(")") + 2 :].split()
        return cls(pid, int(fields[19]), int(fields[1]), int(fields[2]), fields[0])

    def is_running(self) -> bool:
        now = _Process.read(self.pid)
        return now is not None and now.start_time == self.start_time and now.state not in "ZX"

    def arguments(self) -> list[str]:
        try:
            text = Path(f"/proc/{self.pid}/cmdline").read_text(errors="replace")
        except OSError:
            return []
        return text.rstrip("\0").split("\0")


def _launcher_name(arguments: list[str]) -> str | None:
    """Returns the known launcher that a command line runs, seen through python's own options."""
    words = iter(arguments)
    program = os.path.basename(next(words, ""))
    if program.startswith("python"):
        program = ""
        for word in words:
            if word in ("-m", "-c"):
                program = next(words, "") if word == "-m" else ""
                break
            if word in ("-X", "-W"):
                next(words, None)
            elif not word.startswith("-"):
                program = os.path.basename(word)
                break
    return program if program in _LAUNCHERS else None


def _ancestors() -> dict[str, _Process]:
    """Returns the launchers among this process's ancestors, by name, nearest first."""
    found: dict[str, _Process] = {}
    process = _Process.read(os.getppid())
    while process is not None and process.pid > 0:
        if name := _launcher_name(process.arguments()):
            found.setdefault(name, process)
        process = _Process.read(process.parent)
    return found


def _lost_its_runner(launchers: Mapping[str, _Process]) -> bool:
    """Says whether the deepspeed command ended before this rank could see it.

    Its launch.py then has no runner above it and lives on in a process group without a leader;
    one that was started by hand or over ssh leads its own group or has a shell that does.
    """
    launch = launchers.get(_DEEPSPEED_LAUNCH)
    if launch is None or not _DEEPSPEED_RUNNERS.isdisjoint(launchers):
        return False
    leader = _Process.read(launch.group)
    return leader is None or leader.state in "ZX"


def watch_launcher() -> None:
    """Starts the thread that ends this rank once a command that started it is gone; once.

    The `deepspeed` command does not hand a SIGTERM on to its ranks, and a launcher that is killed
    hands on nothing: without the watch, ranks would go on and hold their GPUs. An orphaned rank
    sends itself SIGTERM, so that a handler may save, and leaves with code 143 after
    ORPHAN_GRACE_SECONDS, later only while a `hold` is active. Ranks under srun are ended by
    Slurm. Only on Linux, where /proc names the ancestors.
    """
    global _watcher
    if _watcher is not None:
        return
    if not Path("/proc/self/stat").exists():
        log.debug("no /proc here: ranks do not notice when their launcher is gone")
        return
    if launchers := _ancestors():
        _watcher = threading.Thread(
            target=_watch, args=(launchers,), name="watch_launcher", daemon=True
        )
        _watcher.start()


def _watch(launchers: Mapping[str, _Process]) -> None:
    gone = "deepspeed" if _lost_its_runner(launchers) else ""
    while not gone:
        time.sleep(WATCH_INTERVAL_SECONDS)
        gone = next((name for name, p in launchers.items() if not p.is_running()), "")
    log.error("rank %d: %s, which started this rank, is gone; stopping", rank(), gone)
    os.kill(os.getpid(), signal.SIGTERM)
    deadline = time.monotonic() + ORPHAN_GRACE_SECONDS
    while time.monotonic() < deadline or _holds:
        time.sleep(0.1)
    os._exit(128 + signal.SIGTERM)


@contextmanager
def hold() -> Iterator[None]:
    """Keeps an orphaned rank alive past its grace, for as long as a save takes."""
    global _holds
    with _holds_lock:
        _holds += 1
    try:
        yield
    finally:
        with _holds_lock:
            _holds -= 1
