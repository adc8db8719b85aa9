"""The batch scripts with stand-ins for srun and scontrol: arguments, settings, exit codes."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from waiting import until

from fd_large import doors
from fd_large.cli import init
from fd_large.ranks.launch import read_token
from fd_large.recipes import registry
from fd_large.recipes.batch_sizes import check_division
from fd_large.recipes.left import LEFT

ROOT = Path(__file__).resolve().parents[2]
# The check of the nodes runs here; of that of the settings, and of the ranks' start, only the
# arguments are kept.
SRUN = """#!/bin/bash
if [[ ${@: -2:1} == --check ]]; then
    printf '%s\\0' "$@" >"$SCRATCH/checked"
    exit "${CHECK:-0}"
fi
for word; do
    if [[ $word == bash ]]; then shift $skip; exec "$@"; fi
    skip=$((skip + 1))
done
printf '%s\\0' "$@" >"$SCRATCH/ranks"
eval "${RANKS:-exit 0}"
"""
SCONTROL = """#!/bin/bash
case $1 in
    show)
        case $2 in
            partition) echo " PreemptMode=${MODE:-REQUEUE}" ;;
            config) echo "MaxBatchRequeue         = 3" ;;
            job) echo "JobId=7 ${JOB:-$RUNNING} x=y" ;;
        esac ;;
    requeue) echo "$2" >>"$SCRATCH/requeued" ;;
    update) echo "${@:2}" >>"$SCRATCH/updated" ;;
esac
"""
MODULE = """#!/bin/bash
[[ $2 == a ]] && exit 1
echo "$@" >"$SCRATCH/modules"
"""
PYTHON = "#!/bin/sh\necho fd_large\n"
# sleep: the pauses between two tries of a requeue.
STAND_INS = {"srun": SRUN, "scontrol": SCONTROL, "sleep": "#!/bin/sh\n", "module": MODULE}
STAND_INS |= {"python": PYTHON}


class Script:
    """A batch script in a scratch folder."""

    def __init__(self, scratch: Path) -> None:
        self.scratch = scratch
        for name, text in STAND_INS.items():
            (scratch / name).write_text(text)
            (scratch / name).chmod(0o755)
        self.environ = {
            "PATH": f"{scratch}{os.pathsep}{os.environ['PATH']}",
            "SCRATCH": str(scratch),
            "SLURM_SUBMIT_DIR": str(ROOT),
            "SLURM_JOB_ID": "7",
            "SLURM_JOB_NAME": "x",
            "LOG_DIR": str(scratch / "logs"),
            "DATA_ROOT": str(scratch),
            "TEACHER_SOURCE": "random",
            "ADE_ROOT": str(scratch),
            "NYU_ROOT": str(scratch),
            "COCO_ROOT": str(scratch),
            "STUDENT_INIT": str(scratch),
            "RUNNING": "JobState=RUNNING Reason=None Requeue=1 PreemptTime=None",
            "skip": "0",
        }
        self.run_dir = scratch / "run"

    def start(self, *args: str, name: str = "fd_swinv2g", **environ: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            ["bash", str(ROOT / f"slurm/{name}.sh"), *args],
            env=self.environ | environ,
            cwd=self.scratch,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run(self, *args: str, name: str = "fd_swinv2g", **environ: str) -> tuple[int, str]:
        if name != "resume":
            args = (*args, "--runtime.run_dir", str(self.run_dir))
        process = self.start(*args, name=name, **environ)
        said, _ = process.communicate(timeout=60)
        return process.returncode, said

    def record(self, command: list[str], data: str, teacher: str) -> None:
        """What a run leaves in its folder."""
        self.run_dir.mkdir()
        recipe = {"data": {"root": data}, "teacher": {"source": teacher}}
        for name, found in (("environment", {"command": command}), ("recipe", recipe)):
            (self.run_dir / f"{name}.json").write_text(json.dumps(found, indent=1))

    def resume(self, *args: str, **environ: str) -> tuple[int, str]:
        given = {"PYTHON": sys.executable, "DATA_ROOT": "", "TEACHER_SOURCE": ""} | environ
        return self.run(str(self.run_dir), *args, name="resume", **given)

    def words(self) -> list[str]:
        return (self.scratch / "ranks").read_text().split("\0")[:-1]

    def requeues(self) -> int:
        path = self.scratch / "requeued"
        return len(path.read_text().splitlines()) if path.exists() else 0

    def checkpoint(self, update: int) -> None:
        (self.run_dir / f"checkpoints/step_{update:08d}").mkdir(parents=True)

    def summary(self, status: str) -> str:
        self.run_dir.mkdir(exist_ok=True)
        text = json.dumps({"status": status, "recipe": "x"}, indent=1)
        return f"echo '{text}' >{self.run_dir}/summary.json"


@pytest.fixture
def script(tmp_path: Path) -> Script:
    return Script(tmp_path)


def test_recipe_site_and_overrides_reach_the_ranks(script: Script, tmp_path: Path) -> None:
    python = str(tmp_path / "python")
    code, said = script.run(
        "--optim.epochs", "3", "--x=a b", SLURM_CPUS_PER_TASK="12", PYTHON=python
    )
    assert code == 0, said
    words = script.words()
    command = words.index(python)
    assert words[command:] == [
        *(python, "fd_large/train.py"),
        *("--data.root", str(tmp_path), "--teacher.source", "random"),
        *("--recipe", "fd_swinv2g", "--deepspeed_config", "zero2"),
        *("--teacher.placement", "replicated", "--student.activation_checkpointing", "off"),
        *("--runtime.notice_seconds", "300"),
        *("--optim.epochs", "3", "--x=a b", "--runtime.run_dir", str(script.run_dir)),
    ]
    assert words[:command] == [
        *("--nodes=1", "--ntasks=1", "--ntasks-per-node=1"),
        *("--export=ALL", "--distribution=block", "--kill-on-bad-exit=0", "--wait=60"),
        *("--cpus-per-task=12", "--open-mode=append"),
        *(f"--output={tmp_path}/logs/slurm-x-7-rank_%t.log", "env"),
    ]


@pytest.mark.parametrize(
    ("config", "placement", "keeps"),
    [
        ("", "replicated", True),
        ("zero1", "replicated", True),
        ("zero3", "sharded", False),
        ("ds_configs/zero3.json", "sharded", False),
        ("zero3_hpz", "node", False),
    ],
)
def test_the_teacher_of_the_large_run_lies_as_the_configuration_needs(
    config: str, placement: str, keeps: bool, script: Script
) -> None:
    code, said = script.run(FD_CONFIG=config)
    assert code == 0, said
    words = script.words()
    assert words[words.index("--deepspeed_config") + 1] == (config or "zero2")
    assert words[words.index("--teacher.placement") + 1] == placement
    assert ("--student.activation_checkpointing" in words) == keeps


@pytest.mark.parametrize(
    ("environ", "layout"),
    [
        ({}, (1, 1, 1)),
        ({"SLURM_GPUS_ON_NODE": "8", "SLURM_CPUS_ON_NODE": "96"}, (1, 8, 12)),
        # SBATCH_GRES=gpu:4, and fewer cores than GPUs.
        ({"SLURM_GPUS_ON_NODE": "4", "SLURM_CPUS_ON_NODE": "3"}, (1, 4, 1)),
        (
            {"SLURM_GPUS_ON_NODE": "4", "SLURM_CPUS_ON_NODE": "50", "SLURM_JOB_NUM_NODES": "2"},
            (2, 4, 12),
        ),
        # What sbatch was told wins.
        ({"SLURM_GPUS_ON_NODE": "8", "SLURM_NTASKS_PER_NODE": "2"}, (1, 2, 1)),
        ({"SLURM_JOB_GPUS": "2", "SLURM_NTASKS_PER_NODE": "2"}, (1, 2, 1)),
        # Slurm names the GPUs, and does not count them.
        ({"SLURM_JOB_GPUS": "0,1,4,5", "SLURM_CPUS_ON_NODE": "48"}, (1, 4, 12)),
        ({"CUDA_VISIBLE_DEVICES": "GPU-8f,GPU-3a"}, (1, 2, 1)),
        ({"CUDA_VISIBLE_DEVICES": "NoDevFiles"}, (1, 1, 1)),
    ],
)
def test_a_node_has_a_rank_for_each_gpu(
    environ: dict[str, str], layout: tuple[int, int, int], script: Script
) -> None:
    code, said = script.run(**environ)
    assert code == 0, said
    nodes, ranks, cores = layout
    words = {f"--nodes={nodes}", f"--ntasks={nodes * ranks}", f"--ntasks-per-node={ranks}"}
    assert words | {f"--cpus-per-task={cores}"} <= set(script.words())
    checked = (script.scratch / "checked").read_text().split("\0")
    assert checked[-3:-1] == ["--check", str(nodes * ranks)]
    assert f"--cpus-per-task={cores}" in checked
    counted = {"SLURM_NTASKS_PER_NODE", "SLURM_GPUS_ON_NODE", "SLURM_JOB_GPUS"} & environ.keys()
    assert ("one rank on each" in said) == (not counted and ranks == 1)


@pytest.mark.parametrize("code", [2, 1])
def test_settings_that_are_refused_start_no_rank(code: int, script: Script) -> None:
    got, said = script.run(CHECK=str(code), SLURM_RESTART_COUNT="1")
    assert got == code, said
    assert not (script.scratch / "ranks").exists()
    assert script.requeues() == (code == 1)


def test_the_batch_divides_on_all_nodes_that_the_large_script_names() -> None:
    rows = re.findall(
        r"^#   ([\d, ]+?)  +(--\S+ \S+)?", (ROOT / "slurm/fd_swinv2g.sh").read_text(), re.M
    )
    counts = [int(number) for row, _ in rows for number in row.split(",")]
    assert counts == [1, 2, 4, 8, 16, 32, 64]
    for row, words in rows:
        name, value = words[2:].split() if words else ("batch.global_batch_size", "2048")
        batch = registry.get("fd_swinv2g").with_fields({name: int(value)}).batch
        for number in row.split(","):
            check_division(
                global_batch_size=batch.global_batch_size,
                micro_batch_size=int(batch.micro_batch_size),
                world_size=8 * int(number),
            )


def test_from_a_folder_of_their_own_the_scripts_start_the_installed_package(
    script: Script,
) -> None:
    init.write(script.scratch / "cluster")
    where = {"SLURM_SUBMIT_DIR": str(script.scratch / "cluster"), "PYTHON": sys.executable}
    code, said = script.run(**where, PYTHONPATH=str(ROOT))
    assert code == 0, said
    words = script.words()
    command = words.index(sys.executable)
    assert words[command + 1 : command + 3] == ["-m", "fd_large.train"]
    code, said = script.run(**where, DATA_ROOT="")
    assert code == 2
    assert "./site.sh: DATA_ROOT is empty" in said


@pytest.mark.parametrize("place", ["clone", "init"])
@pytest.mark.parametrize("python", ["absent", "bare", "old", "no torch"])
def test_a_python_that_cannot_run_the_package_is_named(
    python: str, place: str, script: Script, tmp_path: Path
) -> None:
    if place == "init":
        init.write(tmp_path / "cluster")
        script.environ["SLURM_SUBMIT_DIR"] = str(tmp_path / "cluster")
    site = tmp_path / "site"
    site.mkdir()
    (site / "sitecustomize.py").write_text("import sys\nsys.modules['torch'] = None\n")
    path = site / "python"
    shut_out = {
        # Without the packages of any folder.
        "bare": f'exec {sys.executable} -E -s -S "$@"',
        "old": "echo SyntaxError: invalid syntax >&2; exit 1",
        "no torch": f'exec env PYTHONPATH={site}:{ROOT} {sys.executable} "$@"',
    }
    if python != "absent":
        path.write_text(f"#!/bin/sh\n{shut_out[python]}\n")
        path.chmod(0o755)
    code, said = script.run(PYTHON=str(path))
    assert code == 2, said
    told = said.splitlines()[-1]
    assert told.startswith(f"PYTHON: cannot run fd_large; got {path} on node "), said
    assert f"Set PYTHON in {'slurm' if place == 'clone' else '.'}/site.sh" in told
    reason = {"absent": "no such program", "bare": "No module named", "old": "SyntaxError"}
    assert reason.get(python, "No module named torch") in told
    assert "Traceback" not in said
    assert not (tmp_path / "ranks").exists()
    assert script.requeues() == 0


def test_other_scripts_and_arguments_that_win(script: Script) -> None:
    code, said = script.run("--recipe", "fd_dino_vit_base", name="fd_vit")
    assert code == 0, said
    words = script.words()
    assert "zero1" in words
    recipes = [words[i + 1] for i, word in enumerate(words) if word == "--recipe"]
    assert recipes == ["fd_clip_vit_base", "fd_dino_vit_base"], "train.py takes the last"
    code, said = script.run(name="coco_swinv2g")
    assert code == 0, said
    words, root = script.words(), str(script.scratch)
    first = words.index("--data.root")
    assert words[first : first + 4] == ["--data.root", root, "--student.init", root]
    assert "--teacher.source" not in words
    given = ("--data-root=builtin:photographs", "--teacher.source", "package:x")
    code, said = script.run(*given, DATA_ROOT="", TEACHER_SOURCE="")
    assert code == 2, said  # --data-root is no spelling of --data.root
    code, said = script.run("--data.root=builtin:photographs", *given[1:], DATA_ROOT="")
    assert code == 0, said


@pytest.mark.parametrize(
    ("name", "words", "environ", "told"),
    [
        ("fd_swinv2g", (), {"DATA_ROOT": ""}, "slurm/site.sh: DATA_ROOT is empty;"),
        ("fd_swinv2g", (), {"TEACHER_SOURCE": ""}, "slurm/site.sh: TEACHER_SOURCE is empty;"),
        ("fd_vit", (), {"DATA_ROOT": ""}, "slurm/site.sh: DATA_ROOT is empty;"),
        ("coco_swinv2g", (), {"COCO_ROOT": ""}, "slurm/site.sh: COCO_ROOT is empty;"),
        ("finetune_swinv2g", (), {"DATA_ROOT": ""}, "slurm/site.sh: DATA_ROOT is empty;"),
        ("ade20k_swinv2g", (), {"ADE_ROOT": ""}, "slurm/site.sh: ADE_ROOT is empty;"),
        ("nyuv2_swinv2g", (), {"NYU_ROOT": ""}, "slurm/site.sh: NYU_ROOT is empty;"),
        ("coco_swinv2g", (), {"STUDENT_INIT": ""}, "slurm/site.sh: STUDENT_INIT is empty;"),
        ("fd_swinv2g", (), {"SLURM_SUBMIT_DIR": "/"}, "slurm: got /, "),
        ("fd_swinv2g", ("--fresh",), {}, "--fresh: "),
        ("fd_swinv2g", (), {"DATA_ROOT": "/no/such"}, "node "),
        ("fd_swinv2g", ("--teacher.source", "/no/such.pth#teacher"), {}, "node "),
        ("fd_swinv2g", (), {"LOG_DIR": "/proc/none"}, "LOG_DIR: cannot be made; got /proc/none"),
        ("fd_swinv2g", (), {"MODULES": "a b"}, 'slurm/site.sh: MODULES; got "a b"'),
        ("resume", (), {}, 'slurm/resume.sh: not a run; got ""'),
    ],
)
def test_what_is_found_before_the_ranks_start_is_one_sentence(
    name: str, words: tuple[str, ...], environ: dict[str, str], told: str, script: Script
) -> None:
    code, said = script.run(*words, name=name, **environ)
    assert code == 2
    assert said.splitlines()[-1].startswith(told)
    assert not (script.scratch / "ranks").exists()
    assert script.requeues() == 0


def test_nodes_with_different_sources_are_named(script: Script) -> None:
    srun = "#!/bin/bash\nprintf 'n1\\t12\\t\\nn2\\t34\\t\\n'\n"
    (script.scratch / "srun").write_text(srun)
    code, said = script.run(SLURM_JOB_NUM_NODES="2")
    assert code == 2
    assert "fd_large: the nodes see different sources; got n1=12 n2=34" in said


@pytest.mark.parametrize(("kind", "told"), [("lustre", True), ("nfs", True), ("xfs", False)])
def test_a_python_on_a_network_file_system_is_told(kind: str, told: bool, script: Script) -> None:
    srun = f"#!/bin/bash\nprintf 'n1\\t12\\t\\txfs\\nn2\\t12\\t\\t{kind}\\n'\n"
    (script.scratch / "srun").write_text(srun)
    code, said = script.run(SLURM_JOB_NUM_NODES="2")
    assert code == 0
    assert (f"PYTHON is on a network file system ({kind})" in said) == told


PREEMPTED = "JobState=RUNNING Reason=None Requeue=1 PreemptTime=2030-01-01T00:00:00"


@pytest.mark.parametrize(
    ("ranks", "status", "environ", "code", "requeues"),
    [
        ("exit 0", "", {}, 0, 0),
        ("exit 2", "", {}, 2, 0),
        ("exit 3", "", {}, 3, 0),
        ("exit 75", "", {}, 75, 1),
        ("exit 1", "", {}, 1, 1),
        ("exit 137", "", {}, 137, 1),
        # The run knows what srun does not.
        ("exit 134", "done", {}, 0, 0),
        ("exit 134", "preempted", {}, 75, 1),
        ("exit 134", "not saved", {}, 3, 0),
        ("exit 134", "guard", {}, 3, 0),
        ("exit 134", "teacher changed", {}, 3, 0),
        # No second requeue beside Slurm's own.
        ("exit 75", "", {"JOB": PREEMPTED}, 75, 0),
        ("exit 75", "", {"JOB": PREEMPTED, "MODE": "CANCEL"}, 75, 1),
        ("exit 75", "", {"JOB": PREEMPTED.replace("Requeue=1", "Requeue=0")}, 75, 0),
        ("exit 75", "", {"JOB": "JobState=COMPLETING Reason=None Requeue=1"}, 75, 0),
        ("exit 75", "", {"JOB": "JobState=COMPLETING Reason=TimeLimit Requeue=1"}, 75, 1),
        ("exit 75", "", {"JOB": "JobState=RUNNING Reason=None Requeue=0"}, 75, 0),
    ],
)
def test_what_an_exit_code_leads_to(
    ranks: str, status: str, environ: dict[str, str], code: int, requeues: int, script: Script
) -> None:
    ranks = f"{script.summary(status)}; {ranks}" if status else ranks
    got, said = script.run(RANKS=ranks, **environ)
    assert (got, script.requeues()) == (code, requeues), said
    of_the_job = " Requeue=0" in environ.get("JOB", "") and "PreemptTime" not in environ["JOB"]
    assert ("not requeued: the job may not be requeued (Requeue=0)" in said) == of_the_job


@pytest.mark.parametrize(
    ("ranks", "codes", "code", "requeues"),
    [
        # srun had to kill the peers of the rank that failed.
        ("exit 137", {2: 2, 0: 1, 1: 1}, 2, 0),
        ("exit 137", {5: 3}, 3, 0),
        ("exit 1", {0: 1, 3: 2}, 2, 0),
        ("exit 137", {0: 75, 1: 1}, 137, 1),
        ("exit 137", {0: 1}, 137, 1),
        ("exit 3", {0: 3, 1: 2}, 2, 0),
    ],
)
def test_the_rank_that_failed_decides_and_not_what_srun_returns(
    ranks: str, codes: dict[int, int], code: int, requeues: int, script: Script
) -> None:
    write = "".join(
        f"RANK={rank} {sys.executable} -c 'from fd_large.ranks.failures import write_exit_file; "
        f'write_exit_file({left}, "data.root: damaged.")\'; '
        for rank, left in codes.items()
    )
    got, said = script.run(RANKS=f"{write} {ranks}", PYTHONPATH=str(ROOT))
    assert (got, script.requeues()) == (code, requeues), said
    if code in (2, 3) and code != int(ranks.split()[1]):
        assert f"left {code}: data.root: damaged." in said
    # The next start is not judged by these.
    got, said = script.run(RANKS="exit 1", SLURM_RESTART_COUNT="1")
    assert got == 1, said


def test_ranks_get_what_the_site_sets_for_nccl_and_memory(script: Script) -> None:
    shows = 'env >"$SCRATCH/environ"'
    code, said = script.run(RANKS=shows, TORCH_NCCL_ASYNC_ERROR_HANDLING="1")
    assert code == 0, said
    lines = (script.scratch / "environ").read_text().splitlines()
    environ = dict(line.partition("=")[::2] for line in lines)
    assert environ["TORCH_FR_BUFFER_SIZE"] == "2000"
    assert environ["TORCH_NCCL_DUMP_ON_TIMEOUT"] == "1"
    assert environ["TORCH_FR_DUMP_TEMP_FILE"].endswith("logs/slurm-x-7-collectives_of_rank_")
    assert environ["FD_LARGE_EXITS"].endswith("logs/slurm-x-7-exits/start_1")
    assert environ["PYTORCH_CUDA_ALLOC_CONF"] == "expandable_segments:True"
    assert not {"TORCH_NCCL_ASYNC_ERROR_HANDLING", "CUDA_DEVICE_MAX_CONNECTIONS"} & environ.keys()
    # What is set already wins, nothing at all too.
    script.run(RANKS=shows, PYTORCH_CUDA_ALLOC_CONF="")
    assert "PYTORCH_CUDA_ALLOC_CONF=\n" in (script.scratch / "environ").read_text()


def test_no_array_that_may_be_empty_is_expanded() -> None:
    """bash before 4.4 (RHEL 7) takes an empty array for an unset one, and has no mapfile -d."""
    # Each of these has a first element where it is made.
    filled = {"learns_from", "site", "arguments", "on_nodes", "inside", "files", "paths", "before"}
    filled |= {"program", "memory"}
    for path in (ROOT / "slurm").glob("*.sh"):
        text = path.read_text()
        assert "mapfile -d" not in text
        assert set(re.findall(r"\$\{(\w+)\[@\]", text)) <= filled, path
    text = (ROOT / "slurm/launch.sh").read_text()
    assert re.search(r"on_nodes=\(srun\) inside=\(env\)", text)
    assert "paths=(.)" in text


def test_an_old_summary_says_nothing_of_this_start(script: Script) -> None:
    subprocess.run(script.summary("done"), shell=True, check=True)
    assert script.run(RANKS="exit 1")[0] == 1
    assert script.requeues() == 1


@pytest.mark.parametrize("ranks", ["exit 0", "exit 2", "exit 75", "exit 1"])
def test_slurm_is_told_when_a_restarted_job_is_not_to_come_back(ranks: str, script: Script) -> None:
    told = script.scratch / "updated"
    script.run(RANKS=ranks)
    assert not told.exists()
    script.run(RANKS=ranks, SLURM_RESTART_COUNT="1", MAX_RESTARTS="1")
    # The first start's requeue used up the one that is allowed.
    assert told.read_text() == "JobId=7 Requeue=0\n"
    told.unlink()
    script.run(RANKS="exit 75", JOB=PREEMPTED, SLURM_RESTART_COUNT="1")
    assert not told.exists()


@pytest.mark.parametrize(
    ("name", "environ"),
    [
        ("fd_swinv2g", {"DATA_ROOT": ""}),
        ("fd_swinv2g", {"DATA_ROOT": "/no/such"}),
        ("resume", {}),
    ],
)
def test_a_restarted_job_that_is_refused_does_not_come_back(
    name: str, environ: dict[str, str], script: Script
) -> None:
    told = script.scratch / "updated"
    for restarts in ("0", "1"):
        assert not told.exists()
        code, said = script.run(name=name, SLURM_RESTART_COUNT=restarts, **environ)
        assert code == 2, said
    assert told.read_text() == "JobId=7 Requeue=0\n"


def test_a_pre_empted_job_leaves_early_until_slurm_would_hold_it(script: Script) -> None:
    script.run(RANKS="exit 1")  # a requeue of its own between them is not counted
    for start in (1, 2):
        code, _ = script.run(RANKS="exit 75", JOB=PREEMPTED, SLURM_RESTART_COUNT=str(start))
        assert code == 75
    # The third would be held.
    process = script.start(
        *("--runtime.run_dir", str(script.run_dir)),
        **{"RANKS": "exit 75", "JOB": PREEMPTED, "SLURM_RESTART_COUNT": "3"},
    )
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(2)
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 75
    assert process.stdout is not None
    assert "left early 2 times, MaxBatchRequeue is 3: waits" in process.stdout.read()
    assert script.requeues() == 1
    # Restarts without progress are still counted from before.
    assert (script.scratch / "logs/slurm-x-7.restarts").read_text() == "1 none 2\n"


@pytest.mark.parametrize("ranks", ["exit 1", "exit 75"])
def test_without_a_newer_checkpoint_a_job_is_given_up(ranks: str, script: Script) -> None:
    counts = []
    for start in range(9):
        if start == 2:
            script.checkpoint(10)
        if start == 4:
            script.checkpoint(20)
            (script.run_dir / "checkpoints/step_00000030.part").mkdir()
        _, said = script.run(RANKS=ranks, SLURM_RESTART_COUNT=str(start))
        counts.append(script.requeues())
    # Two restarts from nothing, two from 10, three from 20; then none.
    assert counts == [1, 2, 3, 4, 5, 6, 7, 7, 7]
    assert "given up: no newer checkpoint than step_00000020 after 3 restarts." in said
    # Another job counts from the beginning.
    script.run(RANKS=ranks)
    assert script.requeues() == 8


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGUSR1, 75), (signal.SIGTERM, 75), (signal.SIGUSR1, 0)]
)
def test_a_signal_is_handed_on_and_srun_waited_for(number: int, code: int, script: Script) -> None:
    wait = 'trap "echo got >>$SCRATCH/got; ended=1" USR1; touch $SCRATCH/up; '
    wait += "while [[ ! ${ended:-} ]]; do /bin/sleep 0.05; done; /bin/sleep 0.3; "
    run_dir = ("--runtime.run_dir", str(script.run_dir))
    process = script.start(*run_dir, RANKS=f"{wait} exit {code}")
    until((script.scratch / "up").exists, 30, "srun is up")
    process.send_signal(number)
    said, _ = process.communicate(timeout=30)
    assert process.returncode == code, said
    assert (script.scratch / "got").read_text() == "got\n"
    assert script.requeues() == (code == 75)


def test_modules_are_loaded(script: Script) -> None:
    code, said = script.run(MODULES="cuda/12.8 nccl")
    assert code == 0, said
    assert (script.scratch / "modules").read_text() == "load cuda/12.8 nccl\n"


def test_a_container_holds_the_ranks_and_the_check(script: Script) -> None:
    apptainer = script.scratch / "apptainer"
    apptainer.write_text("#!/bin/bash\nexit 9\n")
    apptainer.chmod(0o755)
    given = {"CONTAINER": "/images/fd.sif", "CONTAINER_MOUNTS": "/data:/data"}
    code, said = script.run(**given)
    assert code == 0, said
    words = script.words()
    start = words.index("apptainer")
    logs = script.scratch / "logs"
    mounts = f"{ROOT}:{ROOT},/data:/data,{logs}:{logs}"
    inside = ["--nv", "--pwd", str(ROOT), "--bind", mounts, "/images/fd.sif", "python"]
    assert words[start : start + 9] == ["apptainer", "exec", *inside]
    code, said = script.run(CONTAINER="/images/fd.sqsh")
    assert code == 0, said
    assert script.words()[:3] == [
        "--container-image=/images/fd.sqsh",
        f"--container-workdir={ROOT}",
        f"--container-mounts={ROOT}:{ROOT},{logs}:{logs}",
    ]


def test_without_the_command_module_its_cure_is_said(script: Script, tmp_path: Path) -> None:
    (script.scratch / "module").unlink()
    code, said = script.run(MODULES="cuda/12.8", SLURM_RESTART_COUNT="1")
    assert code == 2, said
    told = said.splitlines()[-1]
    assert told.startswith("slurm/site.sh: MODULES: no command `module` on node ")
    assert "Source the script that makes it in site.sh" in told
    assert "command not found" not in said
    assert not (tmp_path / "ranks").exists()


@pytest.mark.parametrize("image", ["fd.sif", "fd.sqsh"])
@pytest.mark.parametrize("absent", [True, False])
def test_a_node_that_cannot_run_containers_is_a_mistake_and_a_lost_one_is_not(
    absent: bool, image: str, script: Script
) -> None:
    """srun fails either way; where the program is there, the job starts again."""
    srun = """#!/bin/bash
if [[ $1 == --help ]]; then echo "$HELP"; exit; fi
if [[ $* == *.sif* || $* == *--container-image* ]]; then
    echo "srun: error" >&2
    exit 2
fi
while [[ $1 != bash ]]; do shift; done
exec "$@"
"""
    (script.scratch / "srun").write_text(srun)
    if not absent:
        (script.scratch / "apptainer").write_text("#!/bin/sh\n")
        (script.scratch / "apptainer").chmod(0o755)
    code, said = script.run(
        CONTAINER=f"/images/{image}", HELP="" if absent else "  --container-image=IMAGE"
    )
    assert (code, script.requeues()) == ((2, 0) if absent else (1, 1)), said
    lacks = "has no apptainer" if image == "fd.sif" else "srun has no --container-image"
    told = [line for line in said.splitlines() if line.startswith("slurm/site.sh: CONTAINER: ")]
    assert [lacks in line for line in told] == [True] * absent, said


def test_the_ranks_are_handed_a_token_that_no_command_line_shows(script: Script) -> None:
    keep = (
        'stat -c "%a %s" "$FD_LARGE_TOKEN_FILE" >$SCRATCH/mode; cp "$FD_LARGE_TOKEN_FILE" $SCRATCH'
    )
    tokens = []
    for restart in ("0", "1"):
        code, said = script.run(RANKS=keep, SLURM_RESTART_COUNT=restart)
        assert code == 0, said
        assert (script.scratch / "mode").read_text() == "600 64\n"
        tokens.append((script.scratch / "token").read_text())
        assert read_token({"FD_LARGE_TOKEN_FILE": str(script.scratch / "token")}) == tokens[-1]
        assert tokens[-1] not in " ".join(script.words()) + said
        assert not list((script.scratch / "logs").rglob("token")), "gone with the ranks"
    assert tokens[0] != tokens[1]


@pytest.mark.parametrize(
    "command",
    [["fd_large/train.py", "--local_rank=0"], ["/x/fd_large/__main__.py", "train"]],
    ids=["launcher", "module"],
)
@pytest.mark.parametrize("more", [(), ("--data.root", "builtin:photographs", "--fresh", "--x=a b")])
def test_resume_takes_arguments_data_and_teacher_from_the_runs_folder(
    command: list[str], more: tuple[str, ...], script: Script
) -> None:
    script.record([*command, *more], "builtin:photographs", "package:x y")
    elsewhere = "/site/of/others" if more else ""
    code, said = script.resume("--a", "9", DATA_ROOT=elsewhere, TEACHER_SOURCE=elsewhere)
    assert code == 0, said
    words = script.words()
    assert words[words.index("fd_large/train.py") + 1 :] == [
        *("--data.root", "builtin:photographs", "--teacher.source", "package:x y"),
        *(word for word in more if word != "--fresh"),
        *("--runtime.run_dir", str(script.run_dir), "--a", "9"),
    ]


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """A folder of files whose names are hard on a shell."""
    for name in ("a.png", "b c/ü 1.png", "b c/-n.png", "d/e.tar"):
        path = tmp_path / "the images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode() * 1000)
    return tmp_path / "the images"


def contents(folder: Path) -> dict[str, bytes]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def test_images_are_copied_to_the_node_and_read_there(
    script: Script, images: Path, tmp_path: Path
) -> None:
    local = tmp_path / "local"
    local.mkdir()
    given = {"DATA_ROOT": str(images), "STAGE_TO": str(local)}
    code, said = script.run("--x", "1", **given)
    assert code == 0, said
    assert "4 files copied" in said
    *_, source, flag, copy = script.words()
    assert (source, flag) == (str(images), "--data.root")
    assert Path(copy).name == images.name
    assert contents(Path(copy)) == contents(images)
    assert Path(copy, "a.png").stat().st_mtime == (images / "a.png").stat().st_mtime
    # The next start finds it, and does not read it as long as nothing has touched it.
    code, said = script.run(**given)
    assert (code, "all 4 files are there" in said) == (0, True), said
    Path(copy, "a.png").touch()
    code, said = script.run(**given)
    assert (code, "all 4 files are there" in said) == (0, True), said
    Path(copy, "b c/-n.png").write_bytes(b"x" * 6000)
    code, said = script.run(**given)
    assert code == 0, said
    assert "DAMAGED, copied again" in said
    assert contents(Path(copy)) == contents(images)
    (images / "new.png").write_bytes(b"new")
    code, said = script.run(**given)
    assert (code, "has changed since" in said, "5 files copied" in said) == (0, True, True), said
    assert contents(Path(copy)) == contents(images)
    # resume.sh goes on from the images themselves, and copies them where they are not yet.
    words = script.words()
    script.record(words[words.index("fd_large/train.py") :], copy, "random")
    code, said = script.resume(STAGE_TO="")
    assert code == 0, said
    words = script.words()
    assert copy not in words
    assert words[words.index("--data.root") + 1] == str(images)


def test_what_cannot_be_copied_is_one_sentence(
    script: Script, images: Path, tmp_path: Path
) -> None:
    given = {"DATA_ROOT": str(images), "STAGE_TO": str(tmp_path / "none")}
    code, said = script.run(**given)
    assert code == 2
    assert f"{tmp_path}/none: does not exist there" in said.splitlines()[-1]
    # A node that reads other bytes.
    srun = """#!/bin/bash
[[ $* != *" stage "* ]] || printf 'n1\t12\t\nn2\t34\t\n'
"""
    (tmp_path / "none").mkdir()
    (script.scratch / "srun").write_text(srun)
    code, said = script.run(**given)
    assert code == 2, said
    assert "STAGE_TO: the copies differ; got n1=12 n2=34" in said


def test_a_disk_that_does_not_give_back_what_was_written_is_named(
    script: Script, images: Path, tmp_path: Path
) -> None:
    tee = script.scratch / "tee"
    tee.write_text('#!/bin/sh\necho other >"$2"; cat\n')
    tee.chmod(0o755)
    code, said = script.run(DATA_ROOT=str(images), STAGE_TO=str(tmp_path))
    assert code == 2, said
    assert f"{images}: cannot be copied to {tmp_path}/fd_large_staged-" in said.splitlines()[-1]


def test_a_disk_without_room_is_named(script: Script, images: Path, tmp_path: Path) -> None:
    df = script.scratch / "df"
    df.write_text("#!/bin/sh\necho Avail\necho 1000\n")
    df.chmod(0o755)
    code, said = script.run(DATA_ROOT=str(images), STAGE_TO=str(tmp_path))
    assert code == 2, said
    assert "too little room, 0 MB for 0. Mend that" in said.splitlines()[-1]


def test_what_is_no_folder_is_read_where_it_is(script: Script, tmp_path: Path) -> None:
    given = {"DATA_ROOT": "builtin:photographs", "STAGE_TO": str(tmp_path)}
    code, said = script.run(**given)
    assert code == 0, said
    assert "only a folder is copied" in said
    assert script.words().count("--data.root") == 1


def test_resume_takes_what_is_masked_from_the_recipe(script: Script) -> None:
    url, masked = "https://u:PW@h/x.tar?a=b c", "https://***@h/x.tar?***"
    given = ("--batch", "3", "--data.root", masked, f"--data.root={masked}")
    script.record(["fd_large/train.py", *given], url, "random")
    code, said = script.resume()
    assert code == 0, said
    words = script.words()
    assert words[words.index("--batch") :][:5] == [*given[:3], url, f"--data.root={url}"]


def test_a_run_folder_allows_no_code_when_it_is_resumed(script: Script, tmp_path: Path) -> None:
    code_file = tmp_path / "theirs.py"
    code_file.write_text("raise SystemExit('ran')\n")
    loss, tracker = f"module:{code_file}:loss", f"module:{code_file}:tracker"
    words = ["fd_large/train.py", "--objective.loss", loss, f"--runtime.trackers={tracker}"]
    words += ["--allow_code", str(code_file), str(code_file), f"--allow-code={code_file}"]
    words += ["--x", "1"]
    script.record(words, "builtin:photographs", f"module:{code_file}:teacher")
    code, said = script.resume()
    assert code == 0, said
    reached = script.words()
    reached = reached[reached.index("fd_large/train.py") + 1 :]
    doors.reset()
    doors.allow_named(reached)
    named = {name: name for name in (loss, tracker, f"module:{code_file}:teacher")}
    for name in named:
        assert not doors.is_allowed(name)
    assert not {"--allow_code", f"--allow-code={code_file}", str(code_file)} & set(reached)
    plain = doors.plain_names(reached)
    assert plain[:4] == [
        *("--data.root", "builtin:photographs"),
        *("--teacher.source", f"module:{code_file}:teacher"),
    ]
    assert plain[4:8] == ["--objective.loss", loss, f"--runtime.trackers={tracker}", "--x"]
    # What stands after the folder is the user's.
    code, said = script.resume("--objective.loss", loss)
    assert code == 0, said
    doors.allow_named(script.words())
    assert doors.is_allowed(loss)
    doors.reset()


def test_resume_leaves_out_fields_that_left(script: Script) -> None:
    gone = [word for name in LEFT for word in (f"--{name}", "9", f"--{name}=9")]
    given = ("--batch", "3", *gone, "--x", "1")
    script.record(["fd_large/train.py", *given], "builtin:photographs", "random")
    code, said = script.resume()
    assert code == 0, said
    words = script.words()
    assert words[words.index("--batch") :][:4] == ["--batch", "3", "--x", "1"]
    assert not [word for word in words for name in LEFT if name in word]


@pytest.mark.parametrize("damaged", ["environment.json", "recipe.json"])
@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"command": 3, "data": 3}'])
def test_resume_of_a_damaged_run_is_one_sentence(damaged: str, text: str, script: Script) -> None:
    script.record(["fd_large/train.py"], "builtin:photographs", "package:x")
    (script.run_dir / damaged).write_text(text)
    code, said = script.resume()
    assert (code, said.count("\n")) == (2, 1), said
    assert said.startswith(f"{script.run_dir}: cannot be read; got ")
    assert not (script.scratch / "ranks").exists()


def test_resume_of_a_run_without_teacher_needs_none(script: Script) -> None:
    script.record(["fd_large/train.py"], "builtin:photographs", "")
    code, said = script.resume()
    assert code == 0, said
    assert "--teacher.source" not in script.words()
