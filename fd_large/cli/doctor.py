"""`python -m fd_large doctor`: what a run needs, is it here; one screen.

Alone it looks at this node. Started as a run is (srun, mpirun, torchrun, deepspeed) it also has the
ranks meet, and compares their nodes.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fd_large.cli import doctor_machine, doctor_software
from fd_large.cli.arguments import parse
from fd_large.cli.doctor_finding import SEVERITY, Finding, look
from fd_large.errors import LaunchError
from fd_large.launch import Launch, find_launch, find_rank
from fd_large.runtime import terminal

WIDTH = 100
_MEET_SECONDS = 120.0
_MESSAGE_BYTES = 64 << 20
_STYLES = {"ok": "green", "-": "dim", "STOPS": "bold red"}
# What belongs together, in the order in which it is looked for when a run does not start.
_ORDER = (
    ("packages", "code", "torch", "devices", "CPU/memory", "limits"),
    ("launcher", "ranks meet", "interfaces", "InfiniBand", "NCCL/gloo"),
    ("run folder", "local disk", "/dev/shm", "listings"),
    ("DeepSpeed ops", "compiler", "Triton", "NVIDIA apex", "fairscale"),
)


@dataclass(frozen=True, kw_only=True)
class Doctor:
    """Say what a run finds here, and what to fix; exit code 1 if training cannot start.

    Alone it looks at this node. Started like a run (srun, mpirun, torchrun, or deepspeed
    --no_local_rank --module) it has the ranks meet, and names the nodes that differ.
    """

    # Folder that runs are written to.
    run_dir: str = "runs"
    # Folder that data.stage_to would copy to; empty: SLURM_TMPDIR, TMPDIR or /tmp.
    local_disk: str = ""


def main(arguments: list[str]) -> int:
    """Looks, has the ranks meet, and prints the table."""
    given = parse(Doctor, arguments, command="doctor")
    return doctor(given.run_dir, given.local_disk, speaks=find_rank() == 0)


def doctor(run_dir: str, local_disk: str = "", *, speaks: bool = True) -> int:
    """Looks, has the ranks meet, and prints the table; returns the exit code.

    Args:
        run_dir: Folder that runs are written to.
        local_disk: Folder that data.stage_to would copy to; empty: SLURM_TMPDIR, TMPDIR or /tmp.
        speaks: Whether this is rank 0, as far as its environment shows.
    """
    terminal.take()
    # What libraries print meanwhile is not the image.
    terminal.hand_over(Path(os.devnull))
    local_disk = local_disk or os.environ.get("SLURM_TMPDIR") or tempfile.gettempdir()
    first, launch = _launcher()
    found = [first]
    if speaks or (launch is not None and launch.local_rank == 0):
        # Before the meeting, which sets variables of its own.
        found += doctor_software.findings()
        found += doctor_machine.findings(run_dir, local_disk)
    met = _meet(launch) if launch is not None else Finding("ranks meet", "not tried", "-")
    found.append(met)
    together = launch is not None and launch.world_size > 1 and met.verdict != "STOPS"
    if not (together or speaks):
        return 0  # Rank 0 tells what kept them apart.
    if together:
        from fd_large import distributed

        looked = found if distributed.local_rank() == 0 else []
        told = [t for t in distributed.gather_objects((distributed.node_name(), looked)) if t[1]]
        found = merged(told)
    stops = any(finding.verdict == "STOPS" for finding in found)
    if speaks:
        _show(found)
    if together:
        return distributed.leave(int(stops))
    return int(stops)


def merged(told: Sequence[tuple[str, Sequence[Finding]]]) -> list[Finding]:
    """The lines of the first node, with what other nodes have differently.

    A node is named where its verdict is worse, or where what must be alike is not: that stops a
    run only for code and packages.

    Args:
        told: Names and lines of the nodes, those of the first rank first.
    """
    first, *others = told
    lines = []
    for own in first[1]:
        # Nodes with one verdict share a mention, whatever their speeds.
        odd: dict[tuple[str, str, str], tuple[Finding, list[str]]] = {}
        for node, findings in others:
            other = next(finding for finding in findings if finding.what == own.what)
            worse = SEVERITY[other.verdict] > SEVERITY[own.verdict]
            if worse or other.alike != own.alike:
                key = (other.verdict, other.remedy, other.alike)
                odd.setdefault(key, (other, []))[1].append(node)
        line = own
        for other, nodes in odd.values():
            verdict = max((line.verdict, other.verdict), key=SEVERITY.__getitem__)
            remedy = other.remedy or line.remedy
            if other.alike != own.alike:
                if own.what in ("packages", "code", "torch"):
                    verdict, remedy = "STOPS", "Use one checkout and one environment on all nodes."
                elif SEVERITY[verdict] == 0:
                    verdict, remedy = "check", "The slowest node decides the pace of all."
            said = f"{line.found}; {_some(nodes)}: {other.found}"
            line = Finding(own.what, said, verdict, remedy, own.alike)
        lines.append(line)
    return lines


# ------------------------------------------------------------------------------------------------


def _launcher() -> tuple[Finding, Launch | None]:
    commands = ("deepspeed", "torchrun", "srun", "mpirun")
    # Scripts of an environment that is not activated lie beside its Python.
    path = os.pathsep.join([os.environ.get("PATH", ""), str(Path(sys.executable).parent)])
    there = [name for name in commands if shutil.which(name, path=path)]
    try:
        launch = find_launch()
    except LaunchError as error:
        text = str(error).removeprefix("launch: ")
        return Finding("launcher", text, "STOPS", "Mend how the ranks are started."), None
    at_hand = f"at hand: {', '.join(there) or 'none'}"
    if launch.world_size == 1:
        return Finding("launcher", f"one process; {at_hand}"), launch
    nodes = "" if launch.node_rank is None else f", {launch.local_world_size} on the first node"
    said = (
        f"{launch.launcher}: {launch.world_size} ranks{nodes}, meeting at "
        f"{launch.master_addr}:{launch.master_port}; {at_hand}"
    )
    return Finding("launcher", said), launch


def _meet(launch: Launch) -> Finding:
    if launch.world_size == 1:
        said = "one process; several: srun -N2 python -m fd_large doctor"
        return Finding("ranks meet", said, "-")
    try:
        from fd_large import distributed

        start = time.perf_counter()
        distributed.start(launch, timeout_seconds=_MEET_SECONDS)
        took = time.perf_counter() - start
    except LaunchError as error:
        text, _, remedy = str(error).removeprefix("launch: ").partition(" Choose ")
        return Finding("ranks meet", text, "STOPS", f"Choose {remedy}")
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        return Finding("ranks meet", reason, "STOPS", "Look at interfaces and variables below.")
    return look("ranks meet", lambda: _sum(took))


def _sum(took: float) -> Finding:
    import torch

    from fd_large import distributed

    nodes = len(set(distributed.gather_objects(distributed.node_name())))
    device = distributed.device()
    message = torch.ones(_MESSAGE_BYTES // 4, device=device)
    fastest = float("inf")
    for _ in range(4):  # The first one makes the connections.
        distributed.barrier()
        start = time.perf_counter()
        # Reading a number back waits for the device.
        right = float(distributed.sum_tensor(message)[0]) == distributed.world_size()
        fastest = min(fastest, time.perf_counter() - start)
    if not distributed.any_rank(not right):
        return Finding(
            "ranks meet",
            f"{distributed.world_size()} ranks on {nodes} node{'s' if nodes > 1 else ''} met in "
            f"{took:.1f} s; {'NCCL' if device.type == 'cuda' else 'gloo'} adds up 64 MiB in "
            f"{1e3 * fastest:.0f} ms",
        )
    return Finding("ranks meet", "a sum came out wrong", "STOPS", "Have the network looked at.")


def _show(found: Sequence[Finding]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    out = terminal.out()
    width = WIDTH
    if out.isatty():
        # shutil would ask descriptor 1, which was handed over; 0 is a terminal without a size.
        width = min(WIDTH, os.get_terminal_size(out.fileno()).columns or WIDTH)
    by_name = {finding.what: finding for finding in found}
    table = Table(box=None, padding=(0, 1), show_header=False, pad_edge=False)
    table.add_column(no_wrap=True, style="bold")
    table.add_column(no_wrap=True)
    table.add_column(ratio=1, overflow="fold")
    for group in _ORDER:
        for name in group:
            if (finding := by_name.get(name)) is None:
                continue
            said = Text(finding.found)
            if finding.remedy and SEVERITY[finding.verdict]:
                said.append(f"\n-> {finding.remedy}", style="yellow")
            style = _STYLES.get(finding.verdict, "yellow")
            table.add_row(finding.what, Text(finding.verdict, style=style), said)
        table.add_section()
    console = Console(file=out, width=width, highlight=False, markup=False, emoji=False)
    console.print(table)
    stops = [finding.what for finding in found if finding.verdict == "STOPS"]
    last = (
        f"Training cannot start: {', '.join(stops)}." if stops else "Nothing stops training here."
    )
    console.print(last, style="bold red" if stops else "bold green")


def _some(nodes: Sequence[str]) -> str:
    named = ", ".join(nodes[:4])
    return f"{named} and {len(nodes) - 4} more" if len(nodes) > 4 else named
