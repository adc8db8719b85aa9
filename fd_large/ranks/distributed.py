"""Makes the process group of all ranks, and wraps torch's small collectives.

This is the only wrapper of torch.distributed. The wrapper does not use DeepSpeed, whose
`init_distributed` keeps the process group that `start` made. All functions but `node_group` and
`neighbours` also work before `start`, as on rank 0 of 1.
"""

from __future__ import annotations

import os
import resource
import socket
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist

from fd_large.errors import ConfigError, FDError, LaunchError, first_line
from fd_large.files import parse_json
from fd_large.ranks import failures
from fd_large.ranks.launch import LOOPBACK, Launch, find_launch, read_token
from fd_large.ranks.processes import nearest_launcher, watch_launcher

T = TypeVar("T")

SECONDS_BETWEEN_MOVES = 1.0
_PEER_IS_GONE = (
    # Messages of gloo.
    *("Connection closed by peer", "Connection reset by peer"),
    # Messages of NCCL: where it notices the loss, and for a communicator that was aborted.
    *("remote process exited", "ncclRemoteError", "NCCL communicator was aborted"),
    # A message of the store over which NCCL's ranks meet.
    "Connection was likely closed",
)

_ALLOCATOR = {"PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF"}
_launch: Launch | None = None
_is_guest = False
_moves = 0
_neighbours: dict[int, dist.ProcessGroup] = {}
# Sizes of nodes that were compared with the names of the ranks' hosts.
_nodes: set[int] = set()


def open_files_needed(num_ranks: int) -> int:
    """Returns how many file descriptors rank 0 of `num_ranks` ranks may hold at once.

    The other ranks hold fewer. Each rank has two connections to the store of rank 0. The other
    descriptors are files, tens of connections of collectives, and tensors from loading processes.
    """
    return 2 * num_ranks + 4096


def start(
    launch: Launch | None = None,
    *,
    timeout_seconds: float = failures.LONGEST_WAIT_SECONDS,
    is_guest: bool = False,
) -> Launch:
    """Makes the process group of all ranks and starts the watch over the other ranks.

    If `start` has made the group before, this call changes nothing. Collectives run over NCCL on
    CUDA tensors and gloo on CPU tensors; ranks of one host use only its loopback interface, and a
    single rank opens no socket. The launch is also written to the environment variables that torch
    and DeepSpeed read.

    Args:
        launch: This process's rank and launcher, and the address where the ranks meet; None for
            the result of `find_launch`.
        timeout_seconds: Time that a collective waits for a rank before it fails.
        is_guest: Whether the process belongs to other code, such as a notebook, and is never ended.

    Returns: the launch with which this call or an earlier call made the group.
    Raises:
        LaunchError: If the ranks do not meet, or this rank has no GPU of its own.
    """
    global _launch, _is_guest
    if _launch is not None and dist.is_initialized():
        return _launch
    launch = launch or find_launch()
    if os.environ.get("DS_ACCELERATOR") == "cuda" and not torch.cuda.is_available():
        raise LaunchError(
            "DS_ACCELERATOR: no GPU that torch can use on this node; got 'cuda', expected a GPU. "
            "Unset the variable to train on CPUs, or run python -m fd_large doctor and read its "
            "line on devices."
        )
    # As early as possible: a launcher that ends before this is not noticed.
    watch_launcher(failures.tell, failures.LONGEST_WAIT_SECONDS)
    raise_open_files()
    # gloo connects two ranks when one first sends to the other. Otherwise every rank would hold a
    # connection to every other, once for each group of all ranks.
    os.environ.setdefault("TORCH_GLOO_LAZY_INIT", "1")
    os.environ |= {
        "RANK": str(launch.rank),
        "WORLD_SIZE": str(launch.world_size),
        "LOCAL_RANK": str(launch.local_rank),
        "LOCAL_WORLD_SIZE": str(launch.local_world_size),
        "MASTER_ADDR": launch.master_addr,
        "MASTER_PORT": str(launch.master_port),
    }
    name = _name_of(launch) if launch.world_size > 1 else ""
    if launch.world_size > 1:
        first = launch.rank - launch.local_rank
        node = range(first, first + launch.local_world_size)
        failures.watch(
            lambda seconds: _store_of(launch, name, seconds),
            launch.rank,
            launch.world_size,
            meeting_seconds=timeout_seconds,
            neighbours=[rank for rank in node if rank != launch.rank],
        )
    if _has_cuda():
        _take_gpu(launch)
    if launch.world_size > 1:
        _meet(launch, name, timeout_seconds)
    else:
        _make_group_of_one()
    _launch, _is_guest = launch, is_guest
    return launch


def is_guest() -> bool:
    """Whether this process belongs to other code, such as a notebook.

    Code of this package then never ends the process.
    """
    return _is_guest


def raise_open_files() -> tuple[int, int]:
    """Raises this process's soft limit of open files to the hard limit.

    Returns: the previous soft limit, and the hard limit.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return soft, hard


def stop() -> None:
    """Destroys the process group, if any, without waiting for other ranks."""
    global _launch, _is_guest
    failures.stop_watching()
    _neighbours.clear()
    _nodes.clear()
    _launch, _is_guest = None, False
    if dist.is_initialized():
        dist.destroy_process_group()


def leave(code: int) -> int:
    """Ends a rank whose work is done.

    If there are several ranks, the process ends here with the exit code `code`, after a barrier. A
    single rank destroys its process group and returns `code`. With offload on CPUs (DeepSpeed
    0.19.8) a rank now and then aborted while the interpreter shut down, when all work was done;
    ending the process at once avoids that.
    """
    if world_size() == 1:
        stop()
        return code
    barrier()
    if code:
        failures.write_exit_file(code, "all ranks end with it")
    failures.stop_watching()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _take_gpu(launch: Launch) -> None:
    """Makes this rank's GPU the current device.

    Memory segments become expandable, unless the environment configures torch's allocator already.

    Args:
        launch: Place of this rank among all ranks.

    Raises:
        LaunchError: if this rank has no GPU of its own, or if CUDA_DEVICE_MAX_CONNECTIONS puts the
            collectives of all process groups into one queue.
    """
    if os.environ.get("CUDA_DEVICE_MAX_CONNECTIONS") == "1" and launch.world_size > 1:
        raise LaunchError(
            "CUDA_DEVICE_MAX_CONNECTIONS: collectives of several process groups in one queue may "
            "deadlock; got 1, expected 2 or more. Unset the variable."
        )
    # Images of many sizes and gathered weights leave gaps in segments of fixed sizes. torch reads
    # this when it first allocates on the GPU.
    if not _ALLOCATOR & os.environ.keys():
        os.environ["PYTORCH_CUDA_ALLOC_CONF"] = "expandable_segments:True"
    if launch.local_rank >= (visible := torch.cuda.device_count()):
        raise LaunchError(
            f"launch: local rank {launch.local_rank} has no GPU; got {visible} visible GPUs, "
            f"expected {launch.local_world_size}. Start no more ranks than a node has GPUs and "
            "let each see all of them (srun: --gres=gpu:N, not --gpus-per-task). With MIG a "
            "process sees only one slice: start one rank per node, or turn MIG off."
        )
    torch.cuda.set_device(launch.local_rank)


def _meet(launch: Launch, name: str, timeout_seconds: float) -> None:
    """Makes the process group of several ranks.

    Args:
        launch: Place of this rank among all ranks.
        name: Prefix of this job's keys in the store at which the ranks meet.
        timeout_seconds: Time that a collective waits for a rank before it fails.

    Raises: LaunchError: if the ranks do not meet.
    """
    if launch.is_on_one_host and "lo" in (interface for _, interface in socket.if_nameindex()):
        # Ranks of one host need no network, nor a host name that resolves.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        os.environ.setdefault("NCCL_SOCKET_IFNAME", "lo")
    try:
        # AMD GPUs go by the same names: torch's "cuda" is ROCm there, "nccl" is RCCL (docs/amd.md).
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if _has_cuda() else "gloo",
            store=_store_of_group(launch, name, timeout_seconds),
            rank=launch.rank,
            world_size=launch.world_size,
            timeout=timedelta(seconds=timeout_seconds),
        )
        # Connects each rank to the next one on the ring: from here on, a rank's end is noticed.
        dist.all_reduce(torch.zeros(1))
    except (RuntimeError, OSError) as error:
        message = first_line(error).rstrip(".")
        raise LaunchError(
            f"launch: rank {launch.rank} of {launch.world_size} did not meet the other ranks at "
            f"{launch.master_addr}:{launch.master_port}; got {message}. Choose a free port "
            "(MASTER_PORT, or the launcher's --master_port) on an address that all ranks reach."
        ) from error


def _make_group_of_one() -> None:
    """Makes the process group of a single rank, whose collectives copy within the process.

    gloo and NCCL listen on a socket even for one rank. torch's "fake" group ignores other ranks'
    data, which is right for a single rank.

    Raises: LaunchError: if a collective of the group does not copy its input.
    """
    # Its import makes the group known.
    import torch.testing._internal.distributed.fake_pg

    dist.init_process_group("fake", store=dist.HashStore(), rank=0, world_size=1)
    sent, gathered, scattered = torch.ones(2), torch.zeros(2), torch.zeros(2)
    dist.all_gather_single(gathered, sent)
    dist.reduce_scatter_single(scattered, sent)
    if not gathered.equal(sent) or not scattered.equal(sent):
        raise LaunchError(
            f"launch: collectives of one rank are wrong; got {gathered.tolist()} and "
            f"{scattered.tolist()}, expected {sent.tolist()} from torch {torch.__version__}. Start "
            "two ranks, or install torch 2.13."
        )


def _store_of(
    launch: Launch, name: str, timeout_seconds: float, *, for_group: bool = False
) -> dist.Store:
    """Connects to the store at which the ranks meet, as soon as it exists.

    Ranks of one host meet on a socket that is bound to the loopback interface, whereas the stores
    of torch and torchrun listen on all interfaces. If torchrun has a store, these ranks use it only
    to pass on the port of the socket.

    Args:
        launch: Place of this rank among all ranks.
        name: Prefix of this job's keys in the store.
        timeout_seconds: Time after which connecting fails.
        for_group: True for the process group's connection, for which rank 0 opens the store; False
            for a further connection.
    """
    timeout = timedelta(seconds=timeout_seconds)
    has_agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    opens = for_group and launch.rank == 0
    address, port, listening = launch.master_addr, launch.master_port, None
    if launch.is_on_one_host:
        address, agent = LOOPBACK, None
        if has_agent:
            torchrun = dist.TCPStore(
                launch.master_addr, port, timeout=timeout, wait_for_workers=False
            )
            agent = dist.PrefixStore(name, torchrun)
        if opens:
            listening, port = _listen(0 if agent else port)
            if agent:
                agent.set("port", str(port))
        elif agent:
            port = int(agent.get("port"))
    store = dist.TCPStore(
        address,
        port,
        launch.world_size,
        is_master=opens and (launch.is_on_one_host or not has_agent),
        wait_for_workers=for_group,
        timeout=timeout,
        master_listen_fd=listening,
    )
    return dist.PrefixStore(name, store)


def _listen(port: int) -> tuple[int, int]:
    """Opens a socket that listens on the loopback interface, at a free port if `port` is 0.

    Returns: the file descriptor of the socket, and the port.
    Raises: OSError: if another socket listens at the port.
    """
    with socket.socket() as listening:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((LOOPBACK, port))
        listening.listen(socket.SOMAXCONN)
        number = int(listening.getsockname()[1])
        return listening.detach(), number


def _store_of_group(launch: Launch, name: str, timeout_seconds: float) -> dist.Store:
    """Returns the store for the process group, once rank 0 of this job has opened it.

    If another job has taken the port, this rank finds that job's store, where rank 0 of this job
    never registers. This rank then waits, without writing entries that the other job reads, until
    rank 0 has failed at the port and the launcher ends all ranks, or until the timeout.

    Args:
        launch: Place of this rank among all ranks.
        name: Prefix of this job's keys in the store.
        timeout_seconds: Time after which connecting or waiting fails.
    """
    store = _store_of(launch, name, timeout_seconds, for_group=True)
    if launch.rank == 0:
        store.set("met", "")
    store.wait(["met"])
    return dist.PrefixStore("default_pg", store)


def _name_of(launch: Launch) -> str:
    """Returns a prefix for this job's keys in the store at which the ranks meet.

    A second job that uses the port of a running job finds the store of the running job. Thanks to
    the prefix, entries of the second job do not end the first. Jobs that cannot be distinguished
    have the same prefix. If the launcher has a token, the token is part of the prefix, so that
    others cannot guess the prefix.

    Args:
        launch: Place of this rank among all ranks.
    """
    if launch.launcher == "srun":
        job = f"{os.environ.get('SLURM_JOB_ID')}.{os.environ.get('SLURM_STEP_ID')}"
    else:
        # Several nodes have several launchers, and ranks set by hand may state no local size: then
        # they count as one node.
        one_node = launch.launcher != "python" and launch.world_size == launch.local_world_size
        job = str(nearest_launcher()) if one_node else ""
    # torchrun's own store lives on when it starts the ranks again.
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    token = read_token()
    return f"fd_large/{job}/{attempt}" + (f"/{token}" if token else "")


def _has_cuda() -> bool:
    # DeepSpeed's own switch: with it, ranks on a GPU machine stay on the CPU.
    return os.environ.get("DS_ACCELERATOR") != "cpu" and torch.cuda.is_available()


def rank() -> int:
    """Returns this process's rank, or 0 if there is no process group."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Returns the number of ranks, or 1 if there is no process group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def local_rank() -> int:
    """Returns this process's rank within its node, or 0 before `start`."""
    return _launch.local_rank if _launch else 0


def local_world_size() -> int:
    """Returns the number of ranks on this node, or 1 before `start`."""
    return _launch.local_world_size if _launch else 1


def node_name() -> str:
    """Returns this node's name: its name in Slurm if Slurm started the rank, else its host name."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def is_main() -> bool:
    """Returns whether this is rank 0, which writes files and prints."""
    return rank() == 0


def device() -> torch.device:
    """Returns the device of this rank: its GPU, or the CPU if no GPU is used."""
    return torch.device("cuda", local_rank()) if _has_cuda() else torch.device("cpu")


def moved() -> None:
    """Records a sign of life of this rank for the watchdog.

    Most collectives of this file call this function; long work without collectives has to call it.
    """
    global _moves
    _moves += 1


@contextmanager
def moving() -> Iterator[None]:
    """Records a sign of life every second during a block that may take long but ends."""
    over = threading.Event()

    def move() -> None:
        while not over.wait(SECONDS_BETWEEN_MOVES):
            moved()

    threading.Thread(target=move, name="moving", daemon=True).start()
    try:
        yield
    finally:
        over.set()


def moves() -> int:
    """Returns how many signs of life this rank has recorded, for the watchdog."""
    return _moves


def collectives_under_way() -> list[str]:
    """Describes each unfinished collective in words, from torch's flight recorders.

    The collectives of NCCL come before those of gloo, and older collectives before newer ones.
    """
    collectives = []
    # The first is NCCL's recorder, which torch for GPUs has; the second is gloo's.
    for name in ("_dump_nccl_trace_json", "_dump_fr_trace_json"):
        with suppress(AttributeError, RuntimeError, ValueError, KeyError):
            trace = parse_json(getattr(torch._C._distributed_c10d, name)())
            collectives += [
                f"{entry['profiling_name']} {entry['collective_seq_id']} of "
                f"{entry['process_group'][1] or 'a group'}, sizes {entry['input_sizes']}"
                for entry in trace.get("entries", [])
                if not entry["retired"]
            ]
    return collectives


def barrier() -> None:
    """Waits until all ranks have called this function."""
    if dist.is_initialized():
        dist.barrier(device_ids=[local_rank()] if _has_cuda() else None)
        moved()


def max_rank(value: float) -> float:
    """Returns the largest `value` of all ranks, exact for integers below 2**53.

    All ranks must call this function.
    """
    if not dist.is_initialized():
        return value
    largest = max_tensor(torch.tensor(value, dtype=torch.float64, device=device()))
    return type(value)(largest.item())


def any_rank(flag: bool) -> bool:
    """Returns whether `flag` is true on any rank, so that all ranks decide the same.

    All ranks must call this function.
    """
    return bool(max_rank(int(flag)))


def max_tensor(value: torch.Tensor) -> torch.Tensor:
    """Returns the elementwise maximum of `value` over all ranks, as a new tensor.

    All ranks must call this function, with tensors of the same shape.
    """
    largest = value.detach().clone()
    if dist.is_initialized():
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)
        moved()
    return largest


def sum_tensor(value: torch.Tensor, group: dist.ProcessGroup | None = None) -> torch.Tensor:
    """Returns the sum of `value` over the ranks of `group`, or over all ranks if `group` is None.

    All of these ranks must call this function. The result is a new tensor. Integers that overflow
    wrap around. For a tensor on the meta device, the result is not summed.
    """
    total = value.detach().clone()
    # On the meta device, on which one rank alone counts, there are no values to add.
    if dist.is_initialized() and not total.is_meta:
        dist.all_reduce(total, group=group)
        moved()
    return total


def all_gather(shard: torch.Tensor) -> torch.Tensor:
    """Returns the tensors `shard` of all ranks, concatenated in rank order.

    All ranks must call this function, with flat tensors of the same length.
    """
    if not dist.is_initialized():
        return shard
    parts = [torch.empty_like(shard) for _ in range(world_size())]
    dist.all_gather(parts, shard)
    return torch.cat(parts)


def broadcast_object(value: T) -> T:
    """Returns rank 0's `value` on all ranks.

    All ranks must call this function. The value must be picklable; the values of other ranks are
    ignored.
    """
    if not dist.is_initialized():
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0, device=device())
    moved()
    return box[0]


def of_main(make: Callable[[], T]) -> T:
    """Calls `make` on rank 0 alone, and returns its picklable result on all ranks.

    All ranks must call this function.

    Raises: FDError: on all ranks, if `make` raises it.
    """
    return cast(T, broadcast_object(together(lambda: make() if is_main() else None)))


def tensors_of_main(
    items: Iterable[tuple[str, torch.Tensor]],
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields rank 0's pairs (name, tensor) on all ranks, one by one.

    All ranks must iterate over the result together. Only rank 0 iterates over `items`, so that
    only rank 0 reads the tensors' files. Each rank gets the tensors on its own device; a single
    rank gets them as they are.

    Args:
        items: Pairs (name, tensor) of rank 0; ignored on the other ranks.

    Raises: FDError: on all ranks, if iterating over `items` on rank 0 raises it.
    """
    if world_size() == 1:
        yield from items
        return
    iterator = iter(items) if is_main() else iter(())
    while True:
        head: tuple[str, torch.Size, torch.dtype] | FDError | None = None
        tensor = torch.empty(0)
        try:
            if (item := next(iterator, None)) is not None:
                name, tensor = item
                head = (name, tensor.shape, tensor.dtype)
        except FDError as error:
            head = error
        head = broadcast_object(head)
        if isinstance(head, FDError):
            raise head
        if head is None:
            return
        name, shape, dtype = head
        if is_main():
            tensor = tensor.detach().to(device()).contiguous()
        else:
            tensor = torch.empty(shape, dtype=dtype, device=device())
        dist.broadcast(tensor, src=0)
        yield name, tensor


def gather_objects(value: T) -> list[T]:
    """Returns the picklable `value` of each rank, in rank order, on all ranks.

    All ranks must call this function.
    """
    if not dist.is_initialized():
        return [value]
    gathered: list[Any] = [None] * world_size()
    dist.all_gather_object(gathered, value)
    moved()
    return gathered


def together(check: Callable[[], T]) -> T:
    """Runs a check on every rank; if it fails on any rank, all ranks raise the same error.

    The error is that of the first rank whose check failed. Unless all ranks have this error, the
    message names the nodes of the ranks that have it, or, if there is one node, the first rank.

    Args:
        check: Raises an FDError, or returns a value, without collectives.

    Returns: this rank's value.
    """
    value, error = None, None
    try:
        value = check()
    except FDError as caught:
        error = caught
    ranks = gather_objects((error, node_name()))
    for number, (failure, _) in enumerate(ranks):
        if failure is not None:
            nodes = [node for other, node in ranks if str(other) == str(failure)]
            failure.agreed = True
            if len(nodes) == len(ranks):
                raise failure
            one_node = len({node for _, node in ranks}) == 1
            where = f"rank {number}" if one_node else ", ".join(dict.fromkeys(nodes))
            failure.args = (f"{where}: {failure}",)
            raise failure
    return value  # type: ignore[return-value]


def peer_is_gone(error: BaseException) -> bool:
    """Returns whether `error`, which a collective raised, says that another rank has ended."""
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _PEER_IS_GONE)


def node_group(node_size: int) -> dist.ProcessGroup:
    """Returns the process group of this rank's node: the ranks with equal rank // node_size.

    All ranks must call this function with the same argument; the group is made once.

    Raises:
        ConfigError: If `node_size` does not divide the number of ranks.
        LaunchError: If ranks that should share a node run on several hosts.
    """
    if node_size < 1 or world_size() % node_size:
        raise ConfigError(
            f"engine.node_size: does not divide the ranks; got {node_size}, expected a divisor of "
            f"{world_size()} ranks. Set engine.node_size to the number of ranks on each node."
        )
    if node_size not in _nodes:
        assert dist.is_initialized(), "node_group comes after start"
        hosts = gather_objects(socket.gethostname())
        first = rank() // node_size * node_size
        if len(set(hosts[first : first + node_size])) > 1:
            raise LaunchError(
                f"engine.node_size: ranks {first} to {first + node_size - 1} are not on the same "
                f"node; got hosts {', '.join(sorted(set(hosts[first : first + node_size])))}, "
                "expected a single host. Place ranks block by block (mpirun --map-by, srun "
                "--distribution=block), or correct --engine.node_size."
            )
        _nodes.add(node_size)
    return neighbours(node_size)


def neighbours(number: int) -> dist.ProcessGroup:
    """Returns the process group of this rank and its neighbours: ranks with equal rank // number.

    All ranks must call this function with the same argument; the group is made once.

    Args:
        number: A divisor of the number of ranks.
    """
    if number not in _neighbours:
        first = rank() // number * number
        # By its own ranks alone: with thousands of nodes, all groups on all ranks take long.
        _neighbours[number] = dist.new_group(
            list(range(first, first + number)), use_local_synchronization=True
        )
    return _neighbours[number]
