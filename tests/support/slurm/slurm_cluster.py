"""A throw-away Slurm of one machine: munged, slurmctld and a slurmd per node, all in one folder.

    with Cluster(folder) as cluster:
        job = cluster.submit("slurm/fd_swinv2g.sh", "--optim.base_lr", "2e-4")
        cluster.wait(job, lambda shown: shown["JobState"] == "COMPLETED")

Nodes are n1, n2, ... and share the machine's processors, whatever they claim to have. Partition
`low` is the default one, its jobs are requeued for those of partition `high`. Needs root and
Debian's packages slurmctld, slurmd, slurm-client and munge; `missing()` says what is not there.
"""

from __future__ import annotations

import os
import random
import re
import shutil
import signal
import stat
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import waiting
from launch import free_ports

ROOT = Path(__file__).resolve().parents[3]
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel", "sinfo")
PATH = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"])
LONGEST_SOCKET = 107  # bytes of a unix socket's path

# No cgroups, accounts, mail or DNS. Scheduling runs at once instead of every 30 s, and what Slurm
# waits for (a silent node, a deaf job) is short. A requeued job starts after cred_expire + 1 s, and
# 5 s is the least: made to start before, nodes refuse it as one that they have killed.
CONFIG = """
ClusterName=throwaway
SlurmctldHost=localhost
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.sock,cred_expire=5
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
PlugStackConfig={folder}/plugstack.conf
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
MailProg=/bin/true
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=0,sched_min_interval=0
SlurmdParameters=config_overrides
ReturnToService=2
JobRequeue=1
SlurmctldTimeout=10
SlurmdTimeout=10
MessageTimeout=5
KillWait=5
MinJobAge=3600
FirstJobId={first_job}
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
GresTypes=gpu
PartitionName=low Nodes=ALL Default=YES DefaultTime=30 PriorityTier=1 GraceTime={grace}
PartitionName=high Nodes=ALL DefaultTime=30 PriorityTier=10 PreemptMode=OFF
"""
NODE = (
    "NodeName=n{number} NodeHostname=localhost NodeAddr=127.0.0.1 Port={port} CPUs={processors} "
    "RealMemory=4096 {gpus} State=UNKNOWN\n"
)


def missing() -> str:
    """Why no cluster can be started here; empty if one can."""
    absent = [name for name in PROGRAMS if shutil.which(name, path=PATH) is None]
    if absent:
        return f"Slurm is not installed: no {', '.join(absent)}"
    if os.geteuid() != 0:
        return "a Slurm of one's own needs root"
    return ""


class Cluster:
    """Nodes that start on entry and end on exit, with every job and process of theirs."""

    def __init__(
        self,
        folder: Path,
        *,
        nodes: int = 2,
        processors: int = 4,
        gpus: int = 0,
        grace_seconds: int = 60,
    ) -> None:
        """Writes the configuration; GPUs are device files without a device.

        Args:
            folder: Short, since it holds a socket; made if need be.
            nodes: How many slurmd.
            processors: Processors of each node, as Slurm is told.
            gpus: GPUs of each node, as Slurm is told.
            grace_seconds: From a pre-emption's SIGTERM to its end.
        """
        self.folder, self.nodes = folder.resolve(), nodes
        assert len(str(self.folder / "munge.sock.12345678")) <= LONGEST_SOCKET, self.folder
        for inner in ("state", "spool"):
            (self.folder / inner).mkdir(parents=True, exist_ok=True)
        self.config = self.folder / "slurm.conf"
        ports = free_ports(nodes + 1)
        devices = [self.folder / f"gpu{number}" for number in range(gpus)]
        # Ranks meet at a port made from the job's number: those of two clusters here must differ.
        first_job = random.randrange(1, 60000)
        text = CONFIG.format(
            port=ports[0], folder=self.folder, grace=grace_seconds, first_job=first_job
        )
        for number, port in enumerate(ports[1:], 1):
            count = f"Gres=gpu:{gpus}" if gpus else ""
            text += NODE.format(number=number, port=port, processors=processors, gpus=count)
        self.config.write_text(text)
        (self.folder / "plugstack.conf").touch()
        (self.folder / "cgroup.conf").write_text("CgroupPlugin=disabled\n")
        for device in devices:
            if not device.exists():
                # The null device: Slurm takes nothing but a device file.
                os.mknod(device, 0o666 | stat.S_IFCHR, os.makedev(1, 3))
        lines = "".join(f"Name=gpu File={device}\n" for device in devices)
        (self.folder / "gres.conf").write_text(lines)
        key = self.folder / "munge.key"
        key.touch(mode=0o600)
        key.write_bytes(os.urandom(128))
        self.environ = {
            name: value for name, value in os.environ.items() if not name.startswith("SLURM")
        }
        self.environ |= {"SLURM_CONF": str(self.config), "PATH": PATH}

    def __enter__(self) -> Cluster:
        try:
            self._start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def _start(self) -> None:
        inside = self.folder
        self.call(
            *("munged", "--force", f"--key-file={inside}/munge.key"),
            *(f"--socket={inside}/munge.sock", f"--pid-file={inside}/munged.pid"),
            *(f"--seed-file={inside}/munged.seed", f"--log-file={inside}/munged.log"),
        )
        self.call("slurmctld", "-f", str(self.config))
        for number in range(1, self.nodes + 1):
            self.start_node(f"n{number}")
        ready = f"{self.nodes} idle"

        def states() -> str:
            found = self.call("sinfo", "-h", "-p", "low", "-o", "%D %T", check=False)
            return found.strip()

        waiting.until(
            lambda: states() == ready, 30, lambda: f"nodes: {states()}\n{self.logs()}", pause=0.1
        )

    def __exit__(self, *unused: object) -> None:
        def all_gone() -> bool:
            found = list(self.processes())
            for pid, _node in found:
                _send(pid, signal.SIGKILL)
            return not found

        # All of it is thrown away: nobody needs a farewell, and a job may be deaf to one.
        waiting.until(all_gone, 10, lambda: f"still there: {list(self.processes())}", pause=0.1)

    def start_node(self, node: str) -> None:
        """Starts a node's daemon; a job that waits for the node starts at once."""
        (self.folder / "spool" / node).mkdir(exist_ok=True)
        self.call("slurmd", "-f", str(self.config), "-N", node)

    def kill_node(self, node: str) -> None:
        """Ends all of a node's processes as a power cut does: nobody has time to say a word.

        A forked rank (forked_python.py) ends a hundredth of a second after what stands for it.
        """
        victims = [pid for pid, of in self.processes() if of == node]
        # First all stand still; a dying srun or slurmstepd would still tell the controller.
        for signal_number in (signal.SIGSTOP, signal.SIGKILL):
            for pid in victims:
                _send(pid, signal_number)

    def processes(self) -> Iterator[tuple[int, str]]:
        """Every live process of this cluster and its node, "" for those of none."""
        for path in Path("/proc").iterdir():
            if not path.name.isdigit():
                continue
            try:
                state = (path / "stat").read_text().rpartition(")")[2].split()[0]
                words = (path / "cmdline").read_bytes().decode(errors="replace").split("\0")
                environ = (path / "environ").read_bytes().decode(errors="replace").split("\0")
                opened = [os.readlink(file) for file in (path / "fd").iterdir()]
            except OSError:
                continue
            if state in "ZX":
                continue
            node = re.search(rf"{re.escape(str(self.folder))}/slurmd\.(\w+)\.log", str(opened))
            program = os.path.basename(words[0])
            if f"SLURM_CONF={self.config}" in environ:
                # Ranks and batch scripts name their node; clients and the controller have none.
                mine = [word for word in environ if word.startswith("SLURMD_NODENAME=")]
                name = mine[0].partition("=")[2] if mine else ""
                yield int(path.name), node[1] if node and program == "slurmd" else name
            elif node and program.startswith(("slurmstepd", "slurmd")):
                # A step's daemon has an empty environment, but its node's log open.
                yield int(path.name), node[1]
            elif str(self.folder) in " ".join(words) and program == "munged":
                yield int(path.name), ""

    def call(self, *words: str, check: bool = True, environ: dict[str, str] | None = None) -> str:
        """Runs one of Slurm's commands in the repository; returns what it says."""
        done = subprocess.run(
            words,
            cwd=ROOT,
            env=self.environ | (environ or {}),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
            timeout=60,
        )
        assert done.returncode == 0 or not check, f"{words}: {done.stdout}\n{self.logs()}"
        return done.stdout

    def submit(self, *words: object, environ: dict[str, str] | None = None) -> int:
        """sbatch; returns the job's number."""
        said = self.call("sbatch", "--parsable", *map(str, words), environ=environ)
        return int(said.split()[-1])

    def show(self, job: int) -> dict[str, str]:
        """What scontrol tells of a job: JobState, Restarts, ExitCode, Reason, ..."""
        text = self.call("scontrol", "show", "job", "--oneliner", str(job))
        return dict(re.findall(r"(\S+?)=(\S*)", text))

    def wait(
        self, job: int, until: Callable[[dict[str, str]], object], seconds: float = 120
    ) -> dict[str, str]:
        """Looks at a job until a condition on what `show` tells of it holds; returns that."""

        def holds() -> bool:
            nonlocal shown
            shown = self.show(job)
            return bool(until(shown))

        shown: dict[str, str] = {}
        # Each look starts a process, beside the ranks that it waits for.
        waiting.until(holds, seconds, lambda: f"{shown}\n{self.logs()}", pause=0.4)
        return shown

    def until(self, condition: Callable[[], bool], seconds: float = 120) -> None:
        """Waits for what shows without Slurm, as files do."""
        waiting.until(condition, seconds, self.logs, pause=0.1)

    def logs(self) -> str:
        """The last words of the daemons."""
        return "\n".join(
            f"--- {path.name}\n" + "\n".join(path.read_text(errors="replace").splitlines()[-15:])
            for path in sorted(self.folder.glob("*.log"))
        )


def ended(shown: dict[str, str]) -> bool:
    """Whether Slurm is done with a job; PREEMPTED is said of one that ended by itself, too."""
    ends = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "REQUEUE_HOLD")
    return shown["JobState"] in ends


def _send(pid: int, signal_number: int) -> None:
    try:
        os.kill(pid, signal_number)
    except ProcessLookupError:
        return
