"""Forks commands from processes that have imported them already, and measures what each takes.

    with CommandServer(environ) as server:
        ended = server.run(["report", "/no/run"], cwd=folder)
        ended.code, ended.output, ended.seconds, ended.with_torch

A command starts in a process without torch, so that its processor time is that of a user's mistake.
One that imports torch starts again in a process that has torch already: the import takes seconds.
Every command runs without the capabilities by which root passes a file's mode.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import IO, Any, NamedTuple

# Modules of the commands, which a first process imports, and of what they call with torch.
COMMANDS = (
    *("main", "train", "init", "recipes", "models", "statistics", "cache", "plan", "report"),
    *("checkpoint", "weights", "export", "doctor", "replay", "predict", "evaluate", "transfer"),
    *("diagnose", "runs", "output"),
)
WITH_TORCH = (
    *("torch", "torch._dynamo", "torchvision", "torchvision.transforms.v2", "deepspeed", "timm"),
    *("matplotlib.pyplot", "matplotlib.backends.backend_agg", "transformers"),
    *("fd_large.engine.run", "fd_large.tasks.jobs", "fd_large.tasks.distillation.job"),
    *("fd_large.tasks.classification.job", "fd_large.tasks.segmentation.job"),
    *("fd_large.tasks.depth.job", "fd_large.report.make", "fd_large.weights.read"),
)
_NEEDS_TORCH = 99
# Bounds of a command that follows a path without end.
PROCESSOR_SECONDS, MEMORY_BYTES = 60, 8 << 30
# From <linux/capability.h>: version 3, which has 64 bits of each set.
_CAPABILITIES = 0x20080522


class Ended(NamedTuple):
    """A command that has ended.

    Attributes:
        code: Its exit code; negative for a signal.
        output: What it printed, stdout and stderr.
        seconds: Processor time, with that of its children and, without torch, of the imports.
        with_torch: Whether it imported torch.
    """

    code: int
    output: str
    seconds: float
    with_torch: bool


class CommandServer:
    """The caller's end of the two processes, which end with it.

    Args:
        environ: The environment of every command.
    """

    def __init__(self, environ: dict[str, str]) -> None:
        self._servers = [
            subprocess.Popen(
                [sys.executable, __file__, *more],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env=environ,
                text=True,
            )
            for more in ((), ("torch",))
        ]

    def __enter__(self) -> CommandServer:
        return self

    def __exit__(self, *_: object) -> None:
        for server in self._servers:
            assert server.stdin
            server.stdin.close()
            server.wait(30)

    def run(self, arguments: list[str], *, cwd: Path, timeout: float = 60.0) -> Ended:
        """Runs `python -m fd_large ARGUMENTS` to its end; SIGKILL ends it after `timeout`."""
        request = json.dumps({"arguments": arguments, "cwd": str(cwd), "timeout": timeout})
        without, with_torch = self._servers
        answer = self._answer(without, request)
        if answer["code"] != _NEEDS_TORCH:
            return Ended(**answer, with_torch=False)
        return Ended(**self._answer(with_torch, request), with_torch=True)

    def _answer(self, server: subprocess.Popen[str], request: str) -> dict[str, Any]:
        assert server.stdin is not None
        assert server.stdout is not None
        server.stdin.write(f"{request}\n")
        server.stdin.flush()
        return json.loads(server.stdout.readline())


# ------------------------------------------------------------------------------------------------


class _RefusesTorch:
    """Ends the process where torch is to be imported."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        if name == "torch":
            os._exit(_NEEDS_TORCH)


def _serve(with_torch: bool) -> None:
    from fd_large.cli import arguments  # noqa: F401  The greatest part of every command's imports.

    for name in COMMANDS:
        importlib.import_module(f"fd_large.cli.{name}")
    for name in WITH_TORCH if with_torch else ():
        importlib.import_module(name)
    assert with_torch or "torch" not in sys.modules
    own = sum(resource.getrusage(resource.RUSAGE_SELF)[:2])
    answers, sys.stdout = sys.stdout, sys.stderr
    for line in sys.stdin:
        request = json.loads(line)
        with tempfile.TemporaryFile() as output:
            pid = os.fork()
            if not pid:
                _command(request, output, with_torch)
            code, seconds = _reaped(pid, request["timeout"])
            output.seek(0)
            text = output.read().decode(errors="replace")
        answer = {"code": code, "output": text, "seconds": seconds + (0 if with_torch else own)}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def _reaped(pid: int, timeout: float) -> tuple[int, float]:
    deadline = time.monotonic() + timeout
    while True:
        ended, status, usage = os.wait4(pid, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status), usage.ru_utime + usage.ru_stime
        if time.monotonic() > deadline:
            os.killpg(pid, signal.SIGKILL)
            deadline = float("inf")
        time.sleep(0.005)


def _command(request: dict[str, Any], output: IO[bytes], with_torch: bool) -> None:
    """Runs a command in this new process; never returns."""
    code = 1
    try:
        os.setsid()
        signal.pthread_sigmask(signal.SIG_SETMASK, [])
        nothing = os.open(os.devnull, os.O_RDONLY)
        for source, target in ((nothing, 0), (output.fileno(), 1), (output.fileno(), 2)):
            os.dup2(source, target)
        resource.setrlimit(resource.RLIMIT_CPU, (PROCESSOR_SECONDS,) * 2)
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES,) * 2)
        os.chdir(request["cwd"])
        sys.stdin = open(0)  # noqa: SIM115
        sys.stdout, sys.stderr = (open(n, "w", buffering=1) for n in (1, 2))  # noqa: SIM115
        _drop_capabilities()
        if not with_torch:
            sys.meta_path.insert(0, _RefusesTorch())
        from fd_large.cli.main import main

        sys.argv = ["fd_large", *request["arguments"]]
        code = main()
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _drop_capabilities() -> None:
    """Gives up all that root may do beyond a file's mode; nothing happens to another user."""
    header = (ctypes.c_uint32 * 2)(_CAPABILITIES, 0)
    if ctypes.CDLL(None, use_errno=True).capset(header, (ctypes.c_uint32 * 6)()):
        raise OSError(ctypes.get_errno(), "capset")


if __name__ == "__main__":
    _serve(sys.argv[1:] == ["torch"])
