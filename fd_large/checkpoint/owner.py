"""Stores who owns a run's folder, and checks whether the owner is alive; imports no torch."""

from __future__ import annotations

import math
import os
import re
import socket
import time
from contextlib import suppress
from dataclasses import dataclass, fields
from typing import Any
from uuid import uuid4

from fd_large.errors import printable
from fd_large.files import parse_json
from fd_large.ranks import processes
from fd_large.ranks.launch import ask_slurm

SLURM_SECONDS = 30.0
"""Seconds that Slurm may take to answer, and for which an answer is reused."""
# Slurm's states of a job that it has suspended, which is silent now and goes on later.
ASLEEP = {"SUSPENDED", "STOPPED"}
# Slurm's states of a job that runs or may still have processes.
_ALIVE = {"RUNNING", "COMPLETING", "CONFIGURING", "SIGNALING"} | ASLEEP
_UNKNOWN = "unknown"


@dataclass(frozen=True, kw_only=True)
class Owner:
    """A launch of a run, as the owner of the run's folder; stored in owner.json.

    Attributes:
        start: ID of the launch.
        host: Name of rank 0's machine.
        boot: ID of the machine's boot; empty if the system has no such ID.
        pid_namespace: PID namespace in which `pid` is valid; containers may have their own.
        pid: Process ID of rank 0.
        pid_started: Time at which rank 0's process started, in ticks since the boot.
        cluster: Name of the Slurm cluster; empty outside of Slurm.
        job: Number of the Slurm job; empty outside of Slurm.
        restarts: Number of restarts of the Slurm job.
        since: Time at which the launch began, by rank 0's clock.
        folder: Absolute path of the owned folder; empty if an earlier version wrote the record.
    """

    start: str
    host: str = ""
    boot: str = ""
    pid_namespace: str = ""
    pid: int = 0
    pid_started: int = 0
    cluster: str = ""
    job: str = ""
    restarts: int = 0
    since: str = ""
    folder: str = ""

    @classmethod
    def here(cls) -> Owner:
        """Returns the record of a new launch whose rank 0 is this process.

        The attribute `folder` is left empty.
        """
        return cls(
            start=uuid4().hex,
            host=os.environ.get("SLURMD_NODENAME") or socket.gethostname(),
            boot=processes.kernel(),
            pid_namespace=processes.namespace(),
            pid=os.getpid(),
            pid_started=processes.started(os.getpid()) or 0,
            cluster=os.environ.get("SLURM_CLUSTER_NAME", ""),
            job=os.environ.get("SLURM_JOB_ID", ""),
            restarts=int(os.environ.get("SLURM_RESTART_COUNT") or 0),
            since=time.strftime("%Y-%m-%d %H:%M:%S"),
        )

    @classmethod
    def parse(cls, text: bytes) -> Owner:
        """Parses the contents of an owner.json.

        Values are checked, since anybody may have written the file, and the ID of a launch becomes
        a part of file names.

        Args:
            text: The contents.

        Returns: the owner; if the contents are invalid, an owner whose `start` is "unknown".
        """
        with suppress(ValueError):
            record = parse_json(text)
            if isinstance(record, dict) and "start" in record:
                known = {field.name for field in fields(cls)} & record.keys()
                if all(_may_be(name, record[name]) for name in known):
                    return cls(**{name: record[name] for name in known})
        return cls(start="unknown", since="an unknown time")

    def __str__(self) -> str:
        job = f", Slurm job {self.job}" if self.job else ""
        text = f"host {self.host}, process {self.pid}{job}, since {self.since}"
        return printable(text)  # Somebody else may have written the file.

    @property
    def is_near(self) -> bool:
        """Whether the owner's process ID means the same process here.

        This is so if the owner and this process have the same boot of a machine, which is known,
        and the same namespace of process IDs.
        """
        here = processes.kernel(), processes.namespace()
        return bool(self.boot) and (self.boot, self.pid_namespace) == here

    @property
    def is_seen(self) -> bool:
        """Whether this process can see if the owner's process has ended.

        The result is False on another machine, in another container, or if /proc hides the process.
        """
        return self.is_near and processes.started(self.pid) != processes.HIDDEN

    def why_dead(self, this_process: Owner) -> str:
        """Returns why the owner is dead, or "" if this process cannot see that the owner is dead.

        Args:
            this_process: The record of this process.
        """
        same_job = self.job and (self.cluster, self.job) == (this_process.cluster, this_process.job)
        if same_job and self.restarts < this_process.restarts:
            return f"Slurm has restarted job {self.job} since"
        if self.is_near:
            if self.pid == this_process.pid:
                return "its process id is now that of this process"
            if processes.started(self.pid) not in (processes.HIDDEN, self.pid_started):
                return f"process {self.pid} has ended"
        return ""


def _may_be(name: str, value: Any) -> bool:
    """Whether `value`, read from a file, is valid for the attribute `name` of an `Owner`."""
    if name in ("pid", "pid_started", "restarts"):
        # Of type int: True is one by inheritance. The kernel takes no larger number for a process.
        return type(value) is int and 0 <= value < (2**31 if name == "pid" else 2**63)
    if not isinstance(value, str) or len(value) > 4096 or "\0" in value:
        return False
    # "-end" marks a start that gives its folder back.
    return name != "start" or re.fullmatch("[0-9a-f]{32}(-end)?", value) is not None


class Slurm:
    """Asks Slurm about the jobs of other owners.

    An answer is reused for `SLURM_SECONDS`, so that a launch that waits does not keep
    Slurm's controller busy.
    """

    def __init__(self) -> None:
        self._said: dict[str, tuple[float, str]] = {}

    def state(self, owner: Owner, this_process: Owner) -> str:
        """Returns the state of an owner's job in Slurm's words, such as "RUNNING".

        Args:
            owner: The owner.
            this_process: The record of this process.

        Returns: the state; "unknown" if Slurm no longer knows the job; or "" if the owner has no
            job on this cluster, Slurm gives no answer, or the owner is on this machine or of this
            job, so that this process can see as much as Slurm knows.
        """
        known = owner.job and owner.cluster == this_process.cluster
        if not known or owner.is_near or owner.job == this_process.job:
            return ""
        asked_at, state = self._said.get(owner.job, (-math.inf, ""))
        if time.monotonic() - asked_at >= SLURM_SECONDS:
            state = _state(owner.job)
            self._said[owner.job] = time.monotonic(), state
        return state

    def why_dead(self, owner: Owner, this_process: Owner) -> str:
        """Returns why an owner is dead, according to Slurm, or "" if the owner may be alive.

        Args:
            owner: The owner.
            this_process: The record of this process.
        """
        state = self.state(owner, this_process)
        if state == _UNKNOWN:
            return f"Slurm no longer knows job {owner.job}"
        return f"Slurm calls job {owner.job} {state}" if state and state not in _ALIVE else ""


def _state(job: str) -> str:
    shown = ask_slurm("scontrol", "show", "job", "--oneliner", job, seconds=SLURM_SECONDS)
    if "Invalid job id" in shown:
        return _UNKNOWN
    state = re.search(r"\bJobState=(\w+)", shown)
    return state[1] if state else ""
