"""The command `fd-large doctor`, which checks a run's requirements and prints one screen.

As a single process it checks this node. If a launcher starts several ranks (srun, mpirun, torchrun
or deepspeed), it also forms their process group and compares their nodes.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from fd_large.cli.arguments import parse
from fd_large.cli.doctor_checks import SEVERITY, Finding, check_node, look
from fd_large.cli.output import tables
from fd_large.errors import LaunchError, first_line, first_names
from fd_large.ranks.launch import Launch, find_launch, find_rank
from fd_large.runtime import terminal

WIDTH = 100
_MEET_SECONDS = 120.0
_MESSAGE_BYTES = 64 << 20
_STYLES = {"ok": "green", "-": "dim", "STOPS": "bold red"}
# Groups of checks, in the order in which to look at them when a run does not start.
GROUPS = (
    ("packages", "code", "devices", "fused code", "CPU/memory", "limits"),
    ("launcher", "ranks meet", "interfaces", "InfiniBand", "NCCL/gloo"),
    ("run folder", "local disk", "state disk", "/dev/shm", "listings"),
)
REPORTS = ("torch.utils.collect_env", "deepspeed.env_report")
# Nodes that differ in these cannot train together.
_SAME = ("packages", "code")


@dataclass(frozen=True, kw_only=True)
class Doctor:
    """Check this machine for training, with remedies; exit code 1 if training cannot start.

    Started alone, the command checks this node. Started by the launcher of a run (srun, mpirun,
    torchrun, or deepspeed --no_local_rank --module), it also lets the ranks communicate, and names
    the nodes that differ from the others.
    """

    # Folder in which runs will be written.
    run_dir: str = "runs"
    # Folder on a local disk for copies of images (STAGE_TO of slurm/site.sh). Empty: SLURM_TMPDIR,
    # TMPDIR or /tmp.
    local_disk: str = ""
    # Folder for the optimiser's state, the value that engine.nvme_path will have. Empty: no such
    # folder is checked.
    nvme_path: str = ""
    # Print the reports of torch and DeepSpeed as well, which an issue should contain.
    full: bool = False


def main(arguments: list[str]) -> int:
    """Checks the nodes and their connection, and prints a table; 1 if training cannot start."""
    options = parse(Doctor, arguments, command="doctor")
    terminal.take()
    # Output of libraries is kept out of the table.
    terminal.hand_over(Path(os.devnull))
    local_disk = options.local_disk or os.environ.get("SLURM_TMPDIR") or tempfile.gettempdir()
    speaks = find_rank() == 0
    first, launch = _launcher()
    findings = {"launcher": first}
    if speaks or (launch is not None and launch.local_rank == 0):
        # Checked before the ranks meet, since that sets environment variables.
        ranks = launch.world_size if launch else 1
        findings |= check_node(options.run_dir, local_disk, ranks, nvme_path=options.nvme_path)
    findings["ranks meet"] = _meet(launch) if launch is not None else Finding("not tried", "-")
    meets = (
        launch is not None and launch.world_size > 1 and findings["ranks meet"].verdict != "STOPS"
    )
    if not (meets or speaks):
        return 0  # Rank 0 reports why the ranks did not meet.
    if meets:
        from fd_large.ranks import distributed

        node_findings = findings if distributed.local_rank() == 0 else {}
        nodes = distributed.gather_objects((distributed.node_name(), node_findings))
        findings = merged([node for node in nodes if node[1]])
    stops = any(finding.verdict == "STOPS" for finding in findings.values())
    if speaks:
        _print(findings)
        for module in REPORTS if options.full else ():
            subprocess.run([sys.executable, "-m", module], stdout=terminal.out(), check=False)
    return distributed.leave(int(stops)) if meets else int(stops)


def merged(nodes: Sequence[tuple[str, Mapping[str, Finding]]]) -> dict[str, Finding]:
    """Returns the first node's findings, extended by the findings of nodes that differ from it.

    A node differs in a check if its verdict is more serious than the first node's, or if a fact
    differs that should be the same on all nodes. Different packages or code give the verdict
    "STOPS", and other different facts at most "check".

    Args:
        nodes: Name of each node, and its findings by the name of the check. The node of rank 0
            comes first.
    """
    (_, first), *others = nodes
    lines = {}
    for name, finding in first.items():
        # Nodes with the same verdict, remedy and facts are named together, whatever their speeds.
        odd: dict[tuple[str, str, str], tuple[Finding, list[str]]] = {}
        for node, findings in others:
            other = findings[name]
            if SEVERITY[other.verdict] > SEVERITY[finding.verdict] or other.alike != finding.alike:
                odd.setdefault(other[1:], (other, []))[1].append(node)
        line = finding
        for other, named in odd.values():
            verdict = max((line.verdict, other.verdict), key=SEVERITY.__getitem__)
            remedy = other.remedy or line.remedy
            if other.alike != finding.alike:
                if name in _SAME:
                    verdict, remedy = "STOPS", "Use one checkout and one environment on all nodes."
                elif SEVERITY[verdict] == 0:
                    verdict, remedy = "check", "The slowest node sets the pace of all nodes."
            text = f"{line.found}; {first_names(named, 4)}: {other.found}"
            line = Finding(text, verdict, remedy, finding.alike)
        lines[name] = line
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
        return Finding(text, "STOPS", "Change how the ranks are started."), None
    at_hand = f"at hand: {', '.join(there) or 'none'}"
    if launch.world_size == 1:
        return Finding(f"one process; {at_hand}"), launch
    nodes = "" if launch.node_rank is None else f", {launch.local_world_size} on the first node"
    description = (
        f"{launch.launcher}: {launch.world_size} ranks{nodes}, meeting at "
        f"{launch.master_addr}:{launch.master_port}; {at_hand}"
    )
    return Finding(description), launch


def _meet(launch: Launch) -> Finding:
    if launch.world_size == 1:
        return Finding("one process; for several: srun -N2 python -m fd_large doctor", "-")
    try:
        from fd_large.ranks import distributed

        start = time.perf_counter()
        distributed.start(launch, timeout_seconds=_MEET_SECONDS)
        seconds = time.perf_counter() - start
    except LaunchError as error:
        text, choose, remedy = str(error).removeprefix("launch: ").partition(" Choose ")
        return Finding(text, "STOPS", f"Choose {remedy}" if choose else "")
    except Exception as error:
        return Finding(first_line(error), "STOPS", "Check the interfaces and variables below.")
    return look(lambda: _sum(seconds))


def _sum(meeting_seconds: float) -> Finding:
    import torch

    from fd_large.ranks import distributed

    nodes = len(set(distributed.gather_objects(distributed.node_name())))
    device = distributed.device()
    message = torch.ones(_MESSAGE_BYTES // 4, device=device)
    fastest = float("inf")
    for _ in range(4):  # The first round also makes the connections.
        distributed.barrier()
        start = time.perf_counter()
        # Reading a number back waits for the device.
        right = float(distributed.sum_tensor(message)[0]) == distributed.world_size()
        fastest = min(fastest, time.perf_counter() - start)
    if distributed.any_rank(not right):
        return Finding("an all-reduce returned a wrong sum", "STOPS", "Have the network checked.")
    return Finding(
        f"{distributed.world_size()} ranks on {nodes} node{'s' if nodes > 1 else ''} met in "
        f"{meeting_seconds:.1f} s; {'NCCL' if device.type == 'cuda' else 'gloo'} all-reduces 64 "
        f"MiB in {1e3 * fastest:.0f} ms"
    )


def _print(findings: Mapping[str, Finding]) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, padding=(0, 1), show_header=False, pad_edge=False)
    table.add_column(no_wrap=True, style="bold")
    table.add_column(no_wrap=True)
    table.add_column(ratio=1, overflow="fold")
    for group in GROUPS:
        for name in group:
            if (finding := findings.get(name)) is None:
                continue
            text = Text(finding.found)
            if finding.remedy and SEVERITY[finding.verdict]:
                text.append(f"\n-> {finding.remedy}", style="yellow")
            style = _STYLES.get(finding.verdict, "yellow")
            table.add_row(name, Text(finding.verdict, style=style), text)
        table.add_section()
    console = tables(most=WIDTH)
    console.print(table)
    stops = [name for name, finding in findings.items() if finding.verdict == "STOPS"]
    last = (
        f"Training cannot start: {', '.join(stops)}." if stops else "Nothing stops training here."
    )
    console.print(last, style="bold red" if stops else "bold green")
