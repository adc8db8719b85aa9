"""Forks ranks from a process that has imported torch and DeepSpeed already.

A rank's imports take some eight seconds on two busy cores, longer than most of what is tested. The
server imports other packages and fd_large, runs nothing of them but the check of DeepSpeed's
sources, and forks a process for each rank: the program starts as under `python PROGRAM ARGS`, with
an environment, an output and a session of its own, and nothing that one scenario leaves behind
reaches the next. Processes that give the same name share a server: the first one starts it, and it
ends with the last.

    server = RankServer("even ranks", environ)
    rank = server.start(["program.py", "argument"], environ=environ, cwd=ROOT, log=file)
    rank.poll()                                         # None while it runs, then its exit code

What a rank's environment should change at import (a device, an interpreter of kernels) comes too
late here: such a rank is started the plain way.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import IO, Any

# DeepSpeed's hooks import torch's dynamo when they are first called.
PRELOADED = (
    *("torch", "torch._dynamo", "torch.utils.tensorboard", "torchvision"),
    *("torchvision.transforms.v2", "deepspeed"),
    *("timm", "matplotlib.pyplot", "tyro", "rich.console", "rich.progress", "safetensors.torch"),
    # A DeepSpeed engine imports these as it is built, a report as it is drawn.
    *("deepspeed.ops.op_builder.all_ops", "deepspeed.runtime.superoffload.superoffload_stage3"),
    *("deepspeed.module_inject.auto_ep_layer", "setuptools", "matplotlib.backends.backend_agg"),
    *("fd_large.cli.main", "fd_large.cli.train", "fd_large.engine.run", "fd_large.report.make"),
    *("fd_large.tasks.distillation.job", "fd_large.tasks.detection.job"),
    *("fd_large.tasks.classification.job", "fd_large.tasks.jobs"),
)
# DeepSpeed imports it where it is installed, and with it pyarrow, whose allocator starts a thread.
WITHOUT = "mlflow"
# From <sys/prctl.h>.
PR_SET_PDEATHSIG = 1
_SECONDS_BETWEEN_LOOKS = 0.01
_LONGEST_MESSAGE = 1 << 20


class ForkedRank:
    """A rank that a server forked, with what tests use of `subprocess.Popen`."""

    def __init__(self, server: RankServer, pid: int) -> None:
        self.pid, self._server = pid, server
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """Returns the exit code, negative for a signal; None while the rank runs."""
        if self.returncode is None:
            self.returncode = self._server.take_code(self.pid)
        return self.returncode

    def wait(self, timeout: float = 60.0) -> int:
        """Waits for the rank's end and returns its exit code."""
        deadline = time.monotonic() + timeout
        while (code := self.poll()) is None:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired(f"rank {self.pid}", timeout)
            time.sleep(_SECONDS_BETWEEN_LOOKS)
        return code

    def kill(self) -> None:
        """Sends SIGKILL to a rank that still runs."""
        if self.poll() is None:
            # The server may have reaped it since.
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)


class RankServer:
    """The caller's end of a server. What it has started ends with the calling process.

    Args:
        name: Which server; whoever gives the same name shares it.
        environ: The environment of its imports, where it is not running yet.
    """

    def __init__(self, name: str, environ: dict[str, str]) -> None:
        self._codes: dict[int, int] = {}
        self._socket = _connected(name, environ)

    def start(
        self, words: list[str], *, environ: dict[str, str], cwd: Path, log: IO[bytes]
    ) -> ForkedRank:
        """Forks a rank that runs a Python file, the first of `words`, with the others as arguments.

        Args:
            words: The file and its arguments.
            environ: The whole environment.
            cwd: Where the rank runs.
            log: Where its output goes.
        """
        request = {"words": words, "environ": environ, "cwd": str(cwd)}
        socket.send_fds(self._socket, [json.dumps(request).encode()], [log.fileno()])
        while "started" not in (answer := self._receive()):
            pass
        return ForkedRank(self, answer["started"])

    def take_code(self, pid: int) -> int | None:
        """Returns a rank's exit code, once; None while the rank runs."""
        while pid not in self._codes and select.select([self._socket], [], [], 0)[0]:
            self._receive()
        return self._codes.pop(pid, None)

    def _receive(self) -> dict[str, int]:
        message = self._socket.recv(_LONGEST_MESSAGE)
        if not message:
            raise RuntimeError("the server of ranks has ended")
        answer = json.loads(message)
        if "ended" in answer:
            self._codes[answer["ended"]] = answer["code"]
        return answer


def _connected(name: str, environ: dict[str, str]) -> socket.socket:
    """Connects to the server of that name, which is started if need be."""
    # In Linux's abstract namespace: no file stays behind. The sockets keep messages apart.
    address = f"\0fd_large ranks {name}"
    own: subprocess.Popen[bytes] | None = None
    while True:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        # A server that is ending refuses, or hangs up before its greeting.
        with contextlib.suppress(ConnectionError):
            connection.connect(address)
            if connection.recv(_LONGEST_MESSAGE):
                return connection
        connection.close()
        if own is not None:
            raise RuntimeError(f"the server of ranks has ended before it began: {own.wait()}")
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
            try:
                listener.bind(address)
            except OSError:  # Somebody else is about to start it.
                time.sleep(_SECONDS_BETWEEN_LOOKS)
                continue
            listener.listen(64)
            own = subprocess.Popen(
                [sys.executable, __file__, str(listener.fileno())],
                env=environ,
                pass_fds=[listener.fileno()],
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )


# --- the server ----------------------------------------------------------------------------------


def serve(listener: socket.socket) -> tuple[dict[str, Any], int]:
    """Forks a rank for each request; returns only in a rank, with its request and output."""
    clients: list[socket.socket] = []
    ranks: dict[int, socket.socket] = {}  # By the rank's process, who has asked for it.
    while True:
        looks = _SECONDS_BETWEEN_LOOKS if ranks else None
        ready, _, _ = select.select([listener, *clients], [], [], looks)
        if listener in ready:
            clients.append(listener.accept()[0])
            _send(clients[-1], {})
        for client in [client for client in clients if client in ready]:
            message, files = b"", []
            with contextlib.suppress(ConnectionError):
                message, files, *_ = socket.recv_fds(client, _LONGEST_MESSAGE, 1)
            if not message or not files:  # The caller is gone.
                clients.remove(client)
                client.close()
                for pid in [pid for pid, asked in ranks.items() if asked is client]:
                    os.kill(pid, signal.SIGKILL)
                continue
            pid = os.fork()
            if not pid:
                for one in (listener, *clients):
                    one.close()
                return json.loads(message), files[0]
            os.close(files[0])
            ranks[pid] = client
            _send(client, {"started": pid})
        for pid in list(ranks):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                code = os.waitstatus_to_exitcode(status)
                _send(ranks.pop(pid), {"ended": pid, "code": code})
        if not clients and not ranks:
            os._exit(0)


def _send(client: socket.socket, message: dict[str, int]) -> None:
    with contextlib.suppress(OSError):  # It is gone.
        client.send(json.dumps(message).encode())


def become(request: dict[str, Any], output: int) -> None:
    """Makes this process what `python PROGRAM ARGS` would be, and runs the program."""
    # A server that is killed takes its ranks along.
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    os.setsid()
    for standard in (1, 2):
        os.dup2(output, standard)
    os.close(output)
    os.environ.clear()
    os.environ.update(request["environ"])
    # The server's imports have read its own number of threads.
    importlib.import_module("torch").set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    os.chdir(request["cwd"])
    sys.argv = request["words"]
    program = os.path.abspath(sys.argv[0])
    sys.path[0] = os.path.dirname(program)
    code = 1
    try:
        runpy.run_path(program, run_name="__main__")
        code = 0
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        else:
            code = end.code or 0
    except BaseException:
        traceback.print_exc()
    # The interpreter's own end, without the freeing of what the server imported.
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    gc.disable()  # Collections would take a quarter of the time.
    sys.modules[WITHOUT] = None  # type: ignore[assignment]
    for name in PRELOADED:
        with contextlib.suppress(ImportError):  # What is missing is for a test to say.
            importlib.import_module(name)
    del sys.modules[WITHOUT]
    # Only the forking thread would live on.
    assert len(os.listdir("/proc/self/task")) == 1, "an import has started a thread"
    with contextlib.suppress(Exception):  # What is wrong is for a rank to say.
        # The hashes of its sources are kept.
        importlib.import_module("fd_large.engine.zero.private_names").check()
    gc.collect()
    # The modules' objects are of no concern to a rank's collections, which would copy their pages.
    gc.freeze()
    gc.enable()
    become(*serve(socket.socket(fileno=int(sys.argv[1]))))
