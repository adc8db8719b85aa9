"""The batch scripts in a real Slurm: pre-empted, out of time, a node dead, crashing, 64 ranks."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import NamedTuple

import detection_twin
import forked_python
import pytest
import transfer_toy
from launch import ROOT, read_results
from pictures import write_pictures
from slurm_cluster import Cluster, ended, missing
from slurm_run import Job, lines, start, updates_done
from twin import losses

pytestmark = [
    pytest.mark.slurm,
    pytest.mark.skipif(bool(missing()), reason=missing() or "runs"),
]
UPDATES = 36
# From a requeue to the next start: the cluster's cred_expire and a second (slurm_cluster.py), and
# as long again on busy cores.
REQUEUE_SECONDS = 12.0


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("slurm")
    write_pictures(folder / "pictures", 192)  # 24 steps an epoch
    return folder


@pytest.fixture(scope="module")
def cluster(folder: Path) -> Iterator[Cluster]:
    with Cluster(folder / "cluster") as cluster:
        yield cluster


class Interrupted(NamedTuple):
    """A run that was stopped three times; where each start but the first went on, and by whom."""

    job: Job
    shown: dict[str, str]
    resumed: list[int]


@pytest.fixture(scope="module")
def interrupted(cluster: Cluster, folder: Path) -> Interrupted:
    job = start(cluster, folder, "interrupted", updates=UPDATES)

    def after_some_updates(restarts: int) -> None:
        done = updates_done(job.run_dir)
        cluster.until(lambda: updates_done(job.run_dir) >= done + 3)
        assert cluster.show(job.number)["Restarts"] == str(restarts)

    def back(restarts: int) -> None:
        cluster.wait(
            job.number,
            lambda s: s["Restarts"] == str(restarts) and s["JobState"] == "RUNNING",
        )
        # Rows of steps that will be made again go when the run goes on.
        cluster.until(lambda: len(lines(job, "resumed after")) == restarts)

    after_some_updates(0)
    # What #SBATCH --signal=B:USR1@N does.
    cluster.call("scancel", "--batch", "--signal=USR1", str(job.number))
    back(1)
    after_some_updates(1)
    high = cluster.submit(
        *("--partition=high", "--nodes=2", "--exclusive", "--output=/dev/null"),
        *("--wrap", "sleep 1"),
    )
    cluster.wait(high, ended)
    back(2)
    after_some_updates(2)
    cluster.kill_node("n2")
    cluster.wait(job.number, lambda shown: shown["Restarts"] == "3")
    cluster.start_node("n2")
    back(3)
    shown = cluster.wait(job.number, ended)
    resumed = [
        int(line.split("resumed after step ")[1].split()[0]) for line in lines(job, "resumed after")
    ]
    return Interrupted(job, shown, resumed)


def test_stopped_three_times_a_run_ends_with_the_same_losses(
    cluster: Cluster, folder: Path, interrupted: Interrupted
) -> None:
    calm = start(cluster, folder, "calm", updates=UPDATES, forked=False)
    assert cluster.wait(calm.number, ended)["JobState"] == "COMPLETED", calm.said()
    assert len(losses(calm.run_dir)) == UPDATES
    assert losses(interrupted.job.run_dir) == losses(calm.run_dir), interrupted.job.said()


def test_it_went_on_in_mid_epoch_each_time(interrupted: Interrupted) -> None:
    assert len(interrupted.resumed) == 3
    assert interrupted.resumed == sorted(set(interrupted.resumed))
    assert all(0 < update < UPDATES for update in interrupted.resumed)
    assert any(update % 24 for update in interrupted.resumed)


def test_it_ran_once_after_each_requeue(cluster: Cluster, interrupted: Interrupted) -> None:
    # A requeued job waits before it starts: by now one requeue too many would have begun.
    ended_at = datetime.fromisoformat(interrupted.shown["EndTime"])
    passed = (datetime.now() - ended_at).total_seconds()
    time.sleep(max(0.0, REQUEUE_SECONDS - passed))
    shown, said = cluster.show(interrupted.job.number), interrupted.job.said()
    assert (shown["JobState"], shown["ExitCode"], shown["Restarts"]) == ("COMPLETED", "0:0", "3")
    assert said.count("the output of rank N is in") == 4
    # By itself after the signal; by Slurm after the other job, and for the dead node.
    assert said.count("; requeued (newest checkpoint: step_") == 1, said
    assert said.count("pre-empted by another job: Slurm requeues this one itself") == 1, said
    summary = json.loads((interrupted.job.run_dir / "summary.json").read_text())
    assert summary["status"] == "done"


def test_resume_finds_a_finished_run_from_its_folder(
    cluster: Cluster, interrupted: Interrupted
) -> None:
    before = (interrupted.job.run_dir / "metrics.jsonl").read_bytes()
    job = interrupted.job.again(cluster, "slurm/resume.sh", interrupted.job.run_dir)
    shown = cluster.wait(job.number, ended)
    assert (shown["JobState"], shown["Restarts"]) == ("COMPLETED", "0"), job.said()
    assert len(lines(job, "nothing to do")) == 1
    assert (job.run_dir / "metrics.jsonl").read_bytes() == before


def test_detection_starts_from_that_run_and_goes_on_after_a_signal(
    cluster: Cluster, folder: Path, interrupted: Interrupted
) -> None:
    job = start(
        cluster,
        folder,
        "coco",
        *("--batch.global_batch_size", "2", "--batch.micro_batch_size", "1"),
        updates=6,
        environ={
            "COCO_ROOT": str(detection_twin.pictures(folder / "coco")),
            "STUDENT_INIT": str(interrupted.job.run_dir),
        },
        script="slurm/coco_swinv2g.sh",
        flags=detection_twin.FLAGS.replace("window_size 4", "window_size 2"),
    )
    cluster.until(lambda: updates_done(job.run_dir) >= 2)
    cluster.call("scancel", "--batch", "--signal=USR1", str(job.number))
    shown = cluster.wait(job.number, ended)
    assert (shown["JobState"], shown["Restarts"]) == ("COMPLETED", "1"), job.said()
    assert len(losses(job.run_dir)) == 6
    assert len(lines(job, "resumed after step")) == 1
    summary = json.loads((job.run_dir / "summary.json").read_text())
    assert summary["status"] == "done"
    assert "box_AP" in summary


def test_a_table_is_made_of_jobs_once_they_have_ended(cluster: Cluster, folder: Path) -> None:
    toy, out = transfer_toy.write_toy(folder / "toy"), folder / "table"
    given = ("nodes=1", "ntasks-per-node=1", "gres=none", "cpus-per-task=1", "time=20")
    words = [*transfer_toy.words(toy, out), "--rows", "student", "--only", "linear", "ade20k"]

    def transfer() -> str:
        done = subprocess.run(
            [sys.executable, "-m", "fd_large", *words, "--slurm", "--sbatch", *given],
            cwd=ROOT,
            env=cluster.environ
            | forked_python.environment(folder)
            | {"PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu"}
            | {"LOG_DIR": str(folder / "table-logs"), "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, done.stderr + done.stdout
        return done.stdout

    said = transfer()
    *cells, table = map(int, re.findall(r": job (\d+)", said))
    assert len(cells) == 2
    assert cluster.show(table)["Dependency"].startswith("afterany:")
    shown = cluster.wait(table, ended, 240)
    logs = "\n".join(path.read_text() for path in out.rglob("slurm-*.out"))
    assert shown["JobState"] == "COMPLETED", logs
    summary = json.loads((out / "summary.json").read_text())
    assert [cell["status"] for cell in summary["cells"]] == ["done"] * 2, logs
    assert (out / "transfer.txt").is_file()
    assert "job" not in transfer().split("done before")[1], "nothing is left to submit"


def stand_in(folder: Path, name: str, text: str) -> Path:
    """A command in place of Python, which counts its starts in a file and finds nothing wrong."""
    program = folder / name
    checks = "[[ $1 == -c || ${@: -2:1} == --check ]] && exit 0"
    program.write_text(f"#!/bin/bash\n{checks}\necho start >>{program}.starts\n{text}\n")
    program.chmod(0o755)
    return program


def test_crash_mistake_and_time_limit(cluster: Cluster, folder: Path) -> None:
    """Jobs of one rank without training, side by side since the time limit takes a while."""
    ends: dict[str, tuple[str, str, str, int]] = {}
    programs = {
        # Until the signal that Slurm sends before the limit; then saved.
        "limit": "[[ $(wc -l <$0.starts) == 2 ]] && exit 0\n"
        "trap 'exit 75' USR1; while sleep 0.1; do :; done",
        "crash": "exit 1",
        "mistake": "exit 2",
        # srun returns 137: a rank is killed, as the peers of one that fails may be.
        "killed": "[[ $SLURM_PROCID == 0 ]] && kill -9 $$\n"
        """printf '{\\n "code": 2,\\n "reason": "damaged."\\n}\\n' """
        ">$FD_LARGE_EXITS/rank_1.json; exit 2",
        "guard": "exit 3",
        "site": "exit 0",
    }
    jobs: dict[str, Job] = {}
    for name, text in programs.items():
        program = stand_in(folder, name, text)
        jobs[name] = start(
            cluster,
            folder,
            name,
            updates=1,
            sbatch=(
                *("--nodes=1", f"--ntasks-per-node={1 + (name == 'killed')}"),
                # Slurm sends the signal up to 30 s early. A job whose limit is less than the notice
                # may have it before its script has set a trap, and dies.
                *(("--time=1", "--signal=B:USR1@20") if name == "limit" else ()),
            ),
            environ={"PYTHON": str(program), "MAX_RESTARTS": "2"}
            | ({"DATA_ROOT": ""} if name == "site" else {}),
        )
    for name, job in jobs.items():
        shown = cluster.wait(job.number, ended)
        starts = folder / f"{name}.starts"
        count = len(starts.read_text().splitlines()) if starts.exists() else 0
        ends[name] = (shown["JobState"], shown["ExitCode"], shown["Restarts"], count)
    assert ends == {
        "limit": ("COMPLETED", "0:0", "1", 2),
        "crash": ("FAILED", "1:0", "2", 3),
        "mistake": ("FAILED", "2:0", "0", 1),
        "killed": ("FAILED", "2:0", "0", 2),
        "guard": ("FAILED", "3:0", "0", 1),
        "site": ("FAILED", "2:0", "0", 0),
    }, "\n".join(job.said() for job in jobs.values())
    assert "got SIGUSR1" in jobs["limit"].said()
    assert "srun returned 137, rank_1 left 2: damaged." in jobs["killed"].said()
    assert "given up: no newer checkpoint than none after 2 restarts" in jobs["crash"].said()
    assert "slurm/site.sh: DATA_ROOT is empty" in jobs["site"].said()


def test_images_are_copied_to_each_node_once(cluster: Cluster, folder: Path) -> None:
    """Both nodes share this machine and its folder of copies: one copies, one finds the copy."""
    program = stand_in(folder, "staged", 'echo "${@: -1}" >>$0.roots')
    local = folder / "local"
    local.mkdir()
    images = write_pictures(folder / "to_stage", 40)

    def run(name: str) -> str:
        environ = {"PYTHON": str(program), "STAGE_TO": str(local), "DATA_ROOT": str(images)}
        job = start(cluster, folder, name, updates=1, environ=environ)
        shown = cluster.wait(job.number, ended)
        assert shown["JobState"] == "COMPLETED", job.said()
        return job.said()

    def same() -> bool:
        done = subprocess.run(["diff", "-r", images, copy], capture_output=True, check=False)
        return done.returncode == 0

    said = run("stage-first")
    copy = (folder / "staged.roots").read_text().splitlines()[-1]
    assert copy.startswith(f"{local}/fd_large_staged-")
    assert said.count(": 40 files copied") == said.count(": all 40 files are there") == 1, said
    assert same()
    said = run("stage-again")
    assert said.count(": all 40 files are there") == 2, said
    damaged = next(path for path in Path(copy).rglob("*") if path.is_file())
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"?")
    said = run("stage-damaged")
    assert said.count("DAMAGED, copied again") == said.count(": 40 files copied") == 1, said
    assert same()


@pytest.mark.parametrize(
    ("nodes", "gpus", "environ"),
    [(8, 8, {}), (2, 4, {"SBATCH_GRES": "gpu:4", "FD_CONFIG": "zero3"})],
)
def test_nodes_of_eight_gpus_and_of_four(
    nodes: int, gpus: int, environ: dict[str, str], folder: Path
) -> None:
    """fd_swinv2g.sh as it stands, on nodes that claim 96 processors and so many GPUs each."""
    ranks, name = nodes * gpus, f"layout-{gpus}"
    results = folder / f"{name}-results"
    results.mkdir()
    program = ROOT / "tests/integration/programs/slurm_layout.py"
    text = f'shift; exec {sys.executable} {program} {results} "$@"'
    python = stand_in(folder, f"{name}.sh", text)
    with Cluster(folder / f"cluster-{gpus}", nodes=nodes, processors=96, gpus=gpus) as cluster:
        job = start(
            cluster,
            folder,
            name,
            updates=1,
            nodes=(f"--nodes={nodes}",),
            environ={"PYTHON": str(python), **environ},
        )
        shown = cluster.wait(job.number, ended)
    assert shown["JobState"] == "COMPLETED", job.said()
    found = read_results(results, ranks)
    for rank, one in enumerate(found):
        assert (one["rank"], one["world_size"], one["launcher"]) == (rank, ranks, "srun")
        assert (one["local_rank"], one["local_world_size"]) == (rank % gpus, gpus)
        assert (one["node_rank"], one["node"]) == (rank // gpus, f"n{rank // gpus + 1}")
        # Every rank sees all of its node's devices, and finds its own by the local rank.
        assert one["devices"] == ",".join(map(str, range(gpus)))
        assert one["cores"] == str(96 // gpus)
        port = 10000 + job.number % 20000
        assert (one["master_addr"], one["master_port"]) == ("127.0.0.1", port)
    assert found[0]["heard"] == list(range(ranks))
    words = found[-1]["words"]
    assert words[words.index("--deepspeed_config") + 1] == environ.get("FD_CONFIG", "zero2")


def test_a_batch_that_does_not_divide_starts_no_rank(cluster: Cluster, folder: Path) -> None:
    words = ("--batch.global_batch_size", "9", "--batch.micro_batch_size", "3")
    job = start(cluster, folder, "odd-batch", *words, updates=1)
    shown = cluster.wait(job.number, ended)
    assert (shown["JobState"], shown["ExitCode"]) == ("FAILED", "2:0"), job.said()
    assert "batch.global_batch_size: does not divide" in job.said()
    assert not list(job.logs.glob("*-rank_*.log"))
