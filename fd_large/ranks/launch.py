"""Finds the launcher that started this process, and the address where the ranks meet.

`find_launch` reads the environment variables that the deepspeed launcher, torchrun, srun, mpirun or
plain python left. This file does not import torch.
"""

from __future__ import annotations

import logging
import os
import re
import socket
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from fd_large.errors import LaunchError
from fd_large.files import read_bytes

log = logging.getLogger(__name__)

Launcher = Literal["deepspeed", "torchrun", "srun", "mpirun", "python"]

ACCELERATORS = ("cpu", "cuda")
"""Devices of DeepSpeed that runs are trained on, as DS_ACCELERATOR names them."""

# Variables of the rank, the number of ranks, and both on this node.
_OPEN_MPI = (
    *("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
    *("OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"),
)
_HYDRA = ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS")

LOOPBACK = "127.0.0.1"
# A single rank meets nobody: nothing listens there.
_PORT_OF_ONE = 29500
TOKEN_FILE = "FD_LARGE_TOKEN_FILE"
"""The variable that names a file with the ranks' secret; slurm/launch.sh sets it."""

# Every launcher sets one of these.
RANK_VARIABLES = ("RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK", "SLURM_PROCID")
_LOCAL_RANK_VARIABLES = ("LOCAL_RANK", _OPEN_MPI[2], _HYDRA[2], "SLURM_LOCALID")


@dataclass(frozen=True, kw_only=True)
class Launch:
    """The launcher of this rank, and the address where the ranks meet.

    Attributes:
        launcher: The program that started the ranks.
        rank: Number of this rank, from 0.
        world_size: Number of ranks.
        local_rank: Number of this rank on its node, from 0.
        local_world_size: Number of ranks on its node.
        master_addr: Host name or address of rank 0.
        master_port: Port at which rank 0 waits for the other ranks.
        node_rank: Number of the node, from 0; None if the launcher does not say.
    """

    launcher: Launcher
    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    master_addr: str
    master_port: int
    node_rank: int | None = None

    @property
    def is_on_one_host(self) -> bool:
        """Whether all ranks share a host, as far as address and launcher tell.

        For ranks whose variables were set by hand (launcher "python") only the address decides,
        because a local size that was not set was taken to be the number of all ranks.
        """
        if self.master_addr == "localhost" or self.master_addr.startswith("127."):
            return True
        return self.launcher != "python" and self.world_size == self.local_world_size


def read_token(environ: Mapping[str, str] = os.environ) -> str:
    """Returns the launcher's secret for the ranks of a job.

    Args:
        environ: The environment, in which FD_LARGE_TOKEN_FILE may name the file with the secret.

    Returns: the secret, or "" if the variable is not set.
    Raises: LaunchError: if the file cannot be read or holds no token.
    """
    if not (name := environ.get(TOKEN_FILE)):
        return ""
    where = f"launch: {TOKEN_FILE}"
    remedy = "Put it where all nodes (and containers) see it: slurm/launch.sh writes it to LOG_DIR."
    token = read_bytes(name, where=where, of=LaunchError, remedy=remedy).decode(errors="replace")
    if not re.fullmatch("[0-9A-Za-z]{16,256}", token.strip()):
        raise LaunchError(
            f"{where}: {name}: not a token; got another text, expected at least 16 letters or "
            f"digits. {remedy}"
        )
    return token.strip()


def find_rank(environ: Mapping[str, str] = os.environ) -> int:
    """Returns this process's rank, or 0 without a launcher.

    Args:
        environ: The environment, with the launcher's variables. They are not checked here.
    """
    texts = (environ.get(name, "") for name in RANK_VARIABLES)
    return next((int(text) for text in texts if text.isdigit()), 0)


def is_first_of_node() -> bool:
    """Returns whether this is the first rank of its node.

    The launcher's environment variables decide this; they are not checked here.
    """
    texts = (os.environ.get(name, "") for name in _LOCAL_RANK_VARIABLES)
    return next((int(text) for text in texts if text.isdigit()), 0) == 0


def check_accelerator(environ: Mapping[str, str] = os.environ) -> None:
    """Checks that this package supports the device that DS_ACCELERATOR names, if it is set.

    Args:
        environ: The environment, which may have the variable DS_ACCELERATOR.

    Raises: LaunchError: if DS_ACCELERATOR names an unsupported device.
    """
    name = environ.get("DS_ACCELERATOR", ACCELERATORS[0])
    if name not in ACCELERATORS:
        raise LaunchError(
            f"DS_ACCELERATOR: unsupported device; got {name!r}, expected "
            f"{' or '.join(ACCELERATORS)}. Correct the variable, or unset it."
        )


def find_launch(environ: Mapping[str, str] = os.environ) -> Launch:
    """Finds the launcher, this process's rank and the meeting address from environment variables.

    An inner launcher wins over an outer launcher (torchrun or deepspeed inside srun or mpirun). A
    batch script of Slurm is no step, so plain python in it is a single process. Under mpirun
    without MASTER_ADDR and MASTER_PORT, this function starts MPI (mpi4py) for one broadcast and
    ends MPI again.

    Raises:
        LaunchError: If variables are missing, contradict one another or are out of range, or if
            the ranks have no address where they can meet.
    """
    if "TORCHELASTIC_RUN_ID" in environ:
        return _from_rank_variables(environ, "torchrun", node_rank="GROUP_RANK")
    if "CROSS_RANK" in environ and "LOCAL_SIZE" in environ:
        return _from_rank_variables(environ, "deepspeed", node_rank="CROSS_RANK")
    if "OMPI_COMM_WORLD_RANK" in environ:
        return _agreeing(environ, _from_mpi(environ, _OPEN_MPI))
    # `srun --mpi=pmi2` sets PMI_RANK too, but not hydra's local rank.
    if "PMI_RANK" in environ and "MPI_LOCALRANKID" in environ:
        return _agreeing(environ, _from_mpi(environ, _HYDRA))
    # The shells of sbatch (no step id) and of an interactive salloc (step ids from 0xfffffff0 on
    # are Slurm's own) carry SLURM_PROCID too, but are not ranks.
    step = environ.get("SLURM_STEP_ID", "")
    if step.isdigit() and int(step) < 0xFFFFFFF0:
        return _agreeing(environ, _from_slurm(environ))
    if any(name in environ for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")):
        return _from_rank_variables(environ, "python", node_rank="GROUP_RANK")
    if _integer(environ, "SLURM_NTASKS", 1) > 1:
        log.warning(
            "a Slurm job of %s tasks, but not under srun: running as a single process",
            environ["SLURM_NTASKS"],
        )
    alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "GROUP_RANK": "0"}
    return _from_rank_variables(alone, "python", node_rank="GROUP_RANK")


def _integer(environ: Mapping[str, str], name: str, default: int | None = None) -> int:
    text = environ.get(name, "")
    if not text and default is not None:
        return default
    try:
        return int(text)
    except ValueError:
        raise LaunchError(
            f"launch: {name}: not an integer; got {text!r}, expected a whole number. Start all "
            "ranks with one of deepspeed, torchrun, srun or mpirun, or unset RANK, WORLD_SIZE and "
            "LOCAL_RANK to run a single process."
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
                f"launch: {name} under {launch.launcher}: out of range; got {value}, expected "
                f"{low} to {high}. If a script sets RANK, WORLD_SIZE, LOCAL_RANK, "
                "LOCAL_WORLD_SIZE or MASTER_PORT, leave these variables to the launcher."
            )
    return launch


def _agreeing(environ: Mapping[str, str], launch: Launch) -> Launch:
    """Returns `launch`, of srun or mpirun, if the environment does not contradict it.

    Args:
        environ: The environment. srun and mpirun do not set RANK, WORLD_SIZE and LOCAL_RANK, but
            the user may have set them.
        launch: The launch that srun's or mpirun's own variables state.

    Raises:
        LaunchError: if RANK, WORLD_SIZE or LOCAL_RANK contradicts the launch, or if a number of the
            launch is out of range.
    """
    for name, value in (
        ("RANK", launch.rank),
        ("WORLD_SIZE", launch.world_size),
        ("LOCAL_RANK", launch.local_rank),
    ):
        if (number := _integer(environ, name, value)) != value:
            raise LaunchError(
                f"launch: {name} contradicts {launch.launcher}; got {number}, expected {value}. "
                f"Unset {name} before {launch.launcher} starts the ranks."
            )
    return _checked(launch)


def _from_rank_variables(
    environ: Mapping[str, str], launcher: Launcher, *, node_rank: str
) -> Launch:
    world_size = _integer(environ, "WORLD_SIZE")
    if world_size > 1 and not environ.get("MASTER_ADDR"):
        raise LaunchError(
            f"launch: MASTER_ADDR: not set; got nothing, expected the address of rank 0 for "
            f"{world_size} ranks. Set MASTER_ADDR and MASTER_PORT."
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
            master_addr=environ.get("MASTER_ADDR") or LOOPBACK,
            master_port=_integer(environ, "MASTER_PORT", _PORT_OF_ONE if world_size == 1 else None),
            node_rank=_integer(environ, node_rank) if node_rank in environ else None,
        )
    )


def _from_mpi(environ: Mapping[str, str], names: tuple[str, ...]) -> Launch:
    rank, world_size, local_rank, local_world_size = (_integer(environ, name) for name in names)
    one_node = world_size == local_world_size
    if environ.get("MASTER_ADDR") and environ.get("MASTER_PORT"):
        address, port = environ["MASTER_ADDR"], _integer(environ, "MASTER_PORT")
    elif world_size == 1:
        address, port = LOOPBACK, _PORT_OF_ONE
    else:
        address, port = _meet_over_mpi(world_size, one_node=one_node)
    return Launch(
        launcher="mpirun",
        rank=rank,
        world_size=world_size,
        local_rank=local_rank,
        local_world_size=local_world_size,
        master_addr=address,
        master_port=port,
        node_rank=0 if one_node else None,
    )


def _meet_over_mpi(world_size: int, *, one_node: bool) -> tuple[str, int]:
    """Returns an address of rank 0 and a free port there, which rank 0 sends to all ranks over MPI.

    All ranks must call this function, which also ends MPI.

    Args:
        world_size: Number of ranks.
        one_node: Whether all ranks are on one node, so that the loopback address is enough.

    Raises: LaunchError: if mpi4py does not work, or states another number of ranks.
    """
    remedy = (
        "Install an mpi4py that is built for this mpirun (the mpi extra brings one with mpich), "
        "or set MASTER_ADDR and MASTER_PORT for all ranks."
    )
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        raise LaunchError(
            f"launch: mpi4py does not work; got {error} under mpirun, expected no error. {remedy}"
        ) from error
    world = MPI.COMM_WORLD
    if world.size != world_size:
        raise LaunchError(
            f"launch: mpi4py and mpirun disagree on the number of ranks; got {world.size}, "
            f"expected {world_size}. {remedy}"
        )
    place = None
    if world.rank == 0:
        place = (LOOPBACK if one_node else _own_address(), free_port())
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
            f"launch: rank 0 finds no address of its host; got {error}, expected an address that "
            "other hosts can reach. Set MASTER_ADDR and MASTER_PORT for all ranks."
        ) from error


def free_port() -> int:
    """Returns a free port of the loopback interface."""
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        return int(probe.getsockname()[1])


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
                f"launch: SLURM_STEP_TASKS_PER_NODE: not numbers of tasks per node; got {part!r}, "
                "expected a form like 8(x2),4. Start the ranks with srun."
            )
        counts += [int(match[1])] * int(match[2] or 1)
    if sum(counts) != world_size or node_rank >= len(counts):
        raise LaunchError(
            f"launch: the tasks of this Slurm step do not add up; got {counts} on its nodes, "
            f"expected {world_size} in all. Start the ranks with srun and leave SLURM_* alone."
        )
    first = sum(counts[:node_rank])
    expected = ",".join(str(first + task) for task in range(counts[node_rank]))
    # The ranks of the whole node, so that all of it refuses and nobody waits for the others.
    if (placed := environ.get("SLURM_GTIDS", expected)) != expected or first + local_rank != rank:
        raise LaunchError(
            f"launch: Slurm has not placed the ranks node by node; got ranks {placed} on node "
            f"{node_rank}, expected {expected}. Add --distribution=block to srun: the ranks of a "
            "node must be consecutive."
        )
    return Launch(
        launcher="srun",
        rank=rank,
        world_size=world_size,
        local_rank=local_rank,
        local_world_size=counts[node_rank],
        master_addr=environ.get("MASTER_ADDR") or _slurm_address(environ, len(counts)),
        master_port=_integer(environ, "MASTER_PORT", _slurm_port(environ)),
        node_rank=node_rank,
    )


def _slurm_port(environ: Mapping[str, str]) -> int:
    """Returns a port that all ranks can compute without communication.

    Jobs on the same node get different ports. After a restart a job gets another port too, since a
    rank from before the restart may still hold its port.

    Args:
        environ: The environment, with Slurm's number of the job and of its restarts.
    """
    starts = _integer(environ, "SLURM_RESTART_COUNT", 0)
    return 10000 + (_integer(environ, "SLURM_JOB_ID") + 1009 * starts) % 20000


def first_slurm_host(nodelist: str) -> str:
    """Returns the first host of the Slurm node list `nodelist`.

    For example, "gpu[003-004,9],login1" gives gpu003.
    """
    match = re.match(r"(?:[^,\[]|\[[^\]]*\])+", nodelist)
    return re.sub(r"\[([^\],-]*)[^\]]*\]", r"\1", match[0]) if match else ""


def ask_slurm(*command: str, seconds: float = 30.0) -> str:
    """Runs a Slurm program, and returns what it writes.

    Args:
        command: The program and its arguments.
        seconds: Time after which the program is ended.

    Returns: the program's standard output, or, if this is empty, its error output; "" if the
        program cannot start or takes longer than `seconds`.
    """
    try:
        shown = subprocess.run(command, capture_output=True, text=True, timeout=seconds)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return shown.stdout or shown.stderr


def _slurm_address(environ: Mapping[str, str], num_nodes: int) -> str:
    if num_nodes == 1:
        return LOOPBACK
    # Not SLURM_LAUNCH_NODE_IPADDR: that is where srun was called, often a login node.
    host = first_slurm_host(environ.get("SLURM_STEP_NODELIST", ""))
    try:
        socket.getaddrinfo(host, None)
        return host
    except OSError:
        # Slurm may know a node by a name that no resolver does.
        shown = ask_slurm("scontrol", "show", "node", host)
        if (match := re.search(r"\bNodeAddr=(\S+)", shown)) and match[1] != host:
            return match[1]
        raise LaunchError(
            f"launch: the name of the Slurm step's first node does not resolve; got {host!r}, "
            "expected a host name or address. Set MASTER_ADDR to an address of that node."
        ) from None
