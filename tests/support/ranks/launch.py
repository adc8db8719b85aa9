"""Starts real ranks for tests: a program under plain python, deepspeed, torchrun or mpirun.

fd_large starts ranks too, of its own commands: there the program is train.py.

Under plain python a rank is forked from a process that has torch and DeepSpeed imported already
(rank_server.py), unless its imports belong to what is tested.

A program gets its arguments after those of the launcher (deepspeed adds `--local_rank=N`), and
leaves its findings with `write_result(folder, value)` as its last act; the test reads them with
`read_results(folder, ranks)`. Ranks run on the CPU with as many threads each as OMP_NUM_THREADS
says, by default one.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Literal

from rank_server import ForkedRank, RankServer
from waiting import until

ROOT = Path(__file__).resolve().parents[3]
HELPERS = [str(path) for path in (ROOT / "tests/support").iterdir() if path.is_dir()]
HIDDEN = Path(__file__).with_name("hidden")
BESIDE = Path(sys.executable).parent
Launcher = Literal["plain", "deepspeed", "torchrun", "mpirun", "fd_large"]

# What an outer launcher, a batch job or another start would leave for the ranks to stumble over.
_FOREIGN = ("SLURM_", "OMPI_", "PMI", "MPI_", "HYDRA_", "TORCHELASTIC_", "CROSS_", "FD_TEST_MARK")
_RANK = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "GROUP_RANK")
# A DeepSpeed process now and then aborts in its last moment, all work done; cause unknown.
_LATE_ABORT = "terminate called without an active exception"
# The pytest processes of one run share their servers.
RUN = os.environ.get("PYTEST_XDIST_TESTRUNUID") or uuid.uuid4().hex
_servers: dict[str, RankServer] = {}


def free_ports(count: int) -> list[int]:
    """Returns so many TCP ports that nobody listens on now.

    Below those that the system gives to clients, one of which might take a port before its server.
    """
    found: set[int] = set()
    while len(found) < count:
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", random.randrange(16_000, 32_000)))
            found.add(int(probe.getsockname()[1]))
    return list(found)


def free_port() -> int:
    """Returns a TCP port that nobody listens on now."""
    return free_ports(1)[0]


def write_result(folder: str | Path, value: Any) -> None:
    """Writes this rank's findings as FOLDER/rank_R.json, whole or not at all."""
    # `distributed.start` sets RANK under every launcher; it outlives `distributed.stop`.
    path = Path(folder) / f"rank_{os.environ.get('RANK', '0')}.json"
    aside = path.with_suffix(".tmp")
    aside.write_text(json.dumps(value))
    aside.rename(path)


def read_results(folder: str | Path, ranks: int) -> list[Any]:
    """Returns what each rank wrote, in rank order."""
    return [json.loads((Path(folder) / f"rank_{r}.json").read_text()) for r in range(ranks)]


@dataclass
class Started:
    """Running commands: one per rank under "plain", else the launcher alone."""

    mark: str
    processes: list[subprocess.Popen[bytes] | ForkedRank] = field(default_factory=list)
    logs: list[IO[bytes]] = field(default_factory=list)

    def outputs(self) -> list[str]:
        """Returns what each command and its children have said so far."""
        # pread, since the child writes at the offset of the same open file.
        return [
            os.pread(log.fileno(), os.fstat(log.fileno()).st_size, 0).decode(errors="replace")
            for log in self.logs
        ]

    def pids(self) -> list[int]:
        """Returns every live process that descends from this start, launchers and ranks."""
        found = []
        # A forked rank has its server's first environment, but leads a session.
        sessions = {process.pid for process in self.processes}
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                marked = self.mark.encode() in (folder / "environ").read_bytes()
                stat = (folder / "stat").read_text(errors="replace")
            except OSError:
                continue
            state, _parent, _group, session = stat[stat.rindex(")") + 2 :].split()[:4]
            if (marked or int(session) in sessions) and state not in "ZX":
                found.append(int(folder.name))
        return found

    def until(self, condition: Callable[[], object], seconds: float = 120.0) -> None:
        """Waits for a condition; fails with the outputs if a command ends first, or time."""

        def holds() -> bool:
            if condition():
                return True
            codes = [process.poll() for process in self.processes]
            assert codes == [None] * len(codes), f"{codes}\n" + "\n".join(self.outputs())
            return False

        until(holds, seconds, lambda: "\n".join(self.outputs()))

    def kill(self) -> list[str]:
        """Kills all that is left and returns the outputs.

        By mark, since launchers move ranks to groups of their own.
        """
        for pid in self.pids():
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        for process in self.processes:
            process.kill()
            process.wait()
        outputs = self.outputs()
        for log in self.logs:
            log.close()
        return outputs


def base_environ() -> dict[str, str]:
    """Returns this process's environment as ranks get it, before what tells them apart."""
    inherited = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(_FOREIGN) and name not in _RANK
    }
    return inherited | {
        "PYTHONPATH": os.pathsep.join(
            filter(None, [str(ROOT), *HELPERS, str(ROOT / "tests"), os.environ.get("PYTHONPATH")])
        ),
        "PYTHONWARNINGS": "ignore::FutureWarning",
        "PYTHONUNBUFFERED": "1",
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
        "DS_ACCELERATOR": "cpu",
        "PATH": os.pathsep.join([str(BESIDE), os.environ.get("PATH", "")]),
    }


def rank_server(rank: int, run: str = RUN) -> RankServer:
    """Returns the server of a run of tests that forks even, or odd, ranks.

    Two that are forked from one process share the seed of Python's hashes, and what differs between
    ranks by the order of a set would not show.
    """
    name = f"{run} {'odd' if rank % 2 else 'even'}"
    if name not in _servers:
        # A second thread of the server's own would not live on in the ranks.
        _servers[name] = RankServer(name, base_environ() | {"OMP_NUM_THREADS": "1"})
    return _servers[name]


def start_ranks(
    program: str | Path,
    *args: object,
    ranks: int,
    env: dict[str, str] | None = None,
    launcher: Launcher = "plain",
    forked: bool = True,
) -> Started:
    """Starts the ranks and returns at once; the caller must `kill` what it started.

    With `forked` plain ranks begin with torch and DeepSpeed imported; see `run_ranks`.
    """
    started = Started(mark=f"FD_TEST_MARK={uuid.uuid4().hex}")
    port = str(free_port())
    words = [str(program), *map(str, args)]
    base = base_environ()
    mark = dict([started.mark.split("=")])
    commands: list[tuple[list[str], dict[str, str]]]
    if launcher == "plain":
        meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        sizes = {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
        commands = [
            ([sys.executable, *words], meeting | sizes | {"RANK": str(r), "LOCAL_RANK": str(r)})
            for r in range(ranks)
        ]
    elif launcher == "deepspeed":
        head = [str(BESIDE / "deepspeed"), "--num_accelerators", str(ranks), "--master_port", port]
        path = {"PYTHONPATH": os.pathsep.join([str(HIDDEN), base["PYTHONPATH"]])}
        commands = [([*head, *words], path)]
    elif launcher == "torchrun":
        head = [str(BESIDE / "torchrun"), "--nproc_per_node", str(ranks), "--master_port", port]
        commands = [([*head, *words], {})]
    elif launcher == "fd_large":
        assert Path(program) == ROOT / "fd_large/train.py"
        head = [sys.executable, "-m", "fd_large", "--ranks", str(ranks), "train"]
        commands = [([*head, *words[1:]], {})]
    else:
        commands = [([str(BESIDE / "mpirun"), "-n", str(ranks), sys.executable, *words], {})]
    for index, (command, more) in enumerate(commands):
        log = tempfile.TemporaryFile()  # noqa: SIM115 (closed by `kill`)
        started.logs.append(log)
        environ = base | mark | more | (env or {})
        if launcher == "plain" and forked:
            rank = rank_server(index).start(words, environ=environ, cwd=ROOT, log=log)
            started.processes.append(rank)
            continue
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environ,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        started.processes.append(process)
    return started


@dataclass(frozen=True)
class Finished:
    """Return codes and outputs, one per rank under "plain", else the launcher's alone."""

    returncodes: list[int]
    outputs: list[str]


def run_ranks(
    program: str | Path,
    *args: object,
    ranks: int,
    env: dict[str, str] | None = None,
    timeout: float = 120.0,
    launcher: Launcher = "plain",
    results: str | Path | None = None,
    check: bool = True,
    forked: bool = True,
) -> Finished:
    """Runs a program on real ranks to its end.

    Args:
        program: A Python file.
        args: Its arguments.
        ranks: How many processes take part.
        env: Variables on top of (and winning over) those that the harness sets.
        timeout: Seconds until all are killed. Ranks that survive another rank's failure get five.
        launcher: Who starts them.
        results: The folder that the program was told to write to. Where it is complete, a rank
            that aborts at interpreter exit does not fail the test.
        check: Whether a return code other than 0 is a failure.
        forked: Whether plain ranks begin with torch and DeepSpeed imported, which saves seconds;
            False where `env` has something for the imports to see.

    Returns: codes and outputs; -9 for a rank that was killed after another one failed.
    Raises:
        AssertionError: On failure or expiry, with the last lines of every rank.
    """
    started = start_ranks(program, *args, ranks=ranks, env=env, launcher=launcher, forked=forked)
    deadline = time.monotonic() + timeout
    try:
        while None in (codes := [process.poll() for process in started.processes]):
            if any(codes):
                deadline = min(deadline, time.monotonic() + 5.0)
            if time.monotonic() > deadline:
                break
            time.sleep(0.05)
    finally:
        outputs = started.kill()
    finished = Finished([process.returncode for process in started.processes], outputs)
    complete = results is not None and all(
        (Path(results) / f"rank_{r}.json").exists() for r in range(ranks)
    )
    late_abort = complete and any(_LATE_ABORT in output for output in outputs)
    failed = any(codes)  # before the kill
    expired = None in codes and not failed
    if expired or (check and failed and not late_abort):
        why = f"did not end in {timeout:g} s" if expired else "failed"
        tails = "".join(
            f"\n--- {'rank' if launcher == 'plain' else launcher} {index}: returned {code}\n"
            + "\n".join(output.splitlines()[-25:])
            for index, (code, output) in enumerate(zip(finished.returncodes, outputs, strict=True))
        )
        raise AssertionError(f"{Path(program).name} on {ranks} ranks {why}{tails}")
    return finished
