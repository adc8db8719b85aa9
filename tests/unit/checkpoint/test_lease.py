"""One owner of a folder: refused, taken over, lost; races between real processes."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from waiting import until

from fd_large.checkpoint import lease as leases
from fd_large.checkpoint import owner as owners
from fd_large.checkpoint.lease import OWNER, Lease, OwnedError, claim, living_owner
from fd_large.checkpoint.owner import Owner
from fd_large.errors import ConfigError
from fd_large.ranks import processes

ELSEWHERE = {"boot": "another machine", "host": "n7", "pid": 4242}
# Ids of starts.
BEFORE, HALF_WAY = "be" * 16, "4a" * 16
# Claims, says what came of it, and owns until its input ends.
CLAIM = """
import sys
from pathlib import Path
from fd_large.checkpoint import lease
try:
    held = lease.claim(Path(sys.argv[1]), say=lambda text: print(text, flush=True))
except lease.OwnedError as error:
    print("refused", error, flush=True)
    sys.exit(2)
print("owns", held.start, held.taken_over, flush=True)
assert "torch" not in sys.modules
sys.stdin.read()
held.release()
"""
# Six processes find the same dead owner, or none, sixty times.
RACE = """
import json, multiprocessing, sys
from dataclasses import asdict, replace
from pathlib import Path
from fd_large.checkpoint import lease

def racer(folder, barrier, wins):
    for number in range(60):
        here = folder / str(number)
        barrier.wait()
        try:
            held = lease.claim(here, say=str)
            wins.put(held.start)
        except lease.OwnedError:
            held = None
        barrier.wait()
        barrier.wait()
        if held:
            held.release()

def no_links(*paths):
    raise PermissionError(1, "Operation not permitted")

if sys.argv[2] == "False":
    lease.os.link = no_links
context = multiprocessing.get_context("fork")
folder, barrier, wins = Path(sys.argv[1]), context.Barrier(7), context.SimpleQueue()
racers = [context.Process(target=racer, args=(folder, barrier, wins)) for _ in range(6)]
for one in racers:
    one.start()
for number in range(60):
    here = folder / str(number)
    here.mkdir(parents=True)
    if number % 3:
        dead = replace(lease.Owner.here(), start="d" * 32, pid=2**22)
        (here / lease.OWNER).write_text(json.dumps(asdict(dead)))
    if number % 3 == 2:
        dead = replace(dead, start="e" * 32)
        (here / f"owner.{'d' * 32}.next").write_text(json.dumps(asdict(dead)))
    barrier.wait()
    barrier.wait()
    owners = []
    while not wins.empty():
        owners.append(wins.get())
    left = sorted(path.name for path in here.iterdir())
    found = json.loads((here / lease.OWNER).read_text())["start"]
    print(json.dumps({"owners": len(owners), "in the file": [found] == owners, "left": left}))
    barrier.wait()
"""


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    for name in (*(n for n in os.environ if n.startswith("SLURM")), "SLURM_JOB_ID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(leases, "BEAT_SECONDS", 0.05)
    monkeypatch.setattr(leases, "WATCH_SECONDS", 0.2)


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "runs" / "a"


@pytest.fixture
def process(folder):
    """Starts processes that claim the folder."""
    started = []

    def start(**environ):
        one = subprocess.Popen(
            [sys.executable, "-c", CLAIM, str(folder)],
            env={**os.environ, **environ},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        started.append(one)
        return one

    yield start
    for one in started:
        one.kill()
        one.communicate()


def leave_owner(folder, *, silent=0.0, **facts):
    """An owner.json of a start that this process is not; returns the start."""
    folder.mkdir(parents=True, exist_ok=True)
    owner = replace(Owner.here(), start=BEFORE, **facts)
    (folder / OWNER).write_text(json.dumps(asdict(owner)))
    beat = time.time() - silent
    os.utime(folder / OWNER, (beat, beat))
    return owner


def files(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_second_start_is_refused_and_told_who_owns_it(folder, process):
    first = process()
    _, start, *_ = first.stdout.readline().split()
    with pytest.raises(OwnedError) as refused:
        claim(folder)
    said = str(refused.value)
    for part in (f"process {first.pid}", Owner.here().host, f"kill {first.pid}", "stop"):
        assert part in said
    assert files(folder) == [OWNER]
    assert living_owner(folder).start == start
    first.communicate()
    assert living_owner(folder) is None
    held = claim(folder)
    assert held.owned()
    assert held.taken_over == ""
    held.release()


def test_what_was_made_for_a_start_that_wrote_nothing_goes_again(folder):
    held = claim(folder)
    assert files(folder) == [OWNER]
    held.release()
    assert not folder.parent.exists()
    held = claim(folder)
    (folder / "recipe.json").touch()
    held.release()
    assert files(folder) == ["recipe.json"]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_the_folder_of_a_dead_process_is_taken_over_at_once(number, folder, process):
    first = process()
    first.stdout.readline()
    # Not waited for: a zombie is dead.
    first.send_signal(number)
    until(lambda: processes.started(first.pid) is None, 30, "the process has ended")
    held = claim(folder)
    assert f"process {first.pid} has ended" in held.taken_over
    assert files(folder) == [OWNER]
    held.release()


def test_another_process_of_the_same_number_is_not_the_owner(folder):
    pid = os.getppid()
    leave_owner(folder, pid=pid, pid_started=processes.started(pid))
    with pytest.raises(OwnedError):
        claim(folder)
    leave_owner(folder, pid=pid, pid_started=processes.started(pid) - 1)
    claim(folder).release()


def test_an_owner_elsewhere_is_judged_by_its_heartbeat(folder, monkeypatch):
    leave_owner(folder, **ELSEWHERE, silent=leases.STALE_SECONDS - 60)
    with pytest.raises(OwnedError, match=r"host n7, process 4242, "):
        claim(folder)
    leave_owner(folder, **ELSEWHERE, silent=leases.STALE_SECONDS + 60)
    said = []
    held = claim(folder, say=said.append)
    assert "no heartbeat for 180 s" in held.taken_over
    assert "watching it for" in said[0]
    held.release()
    # After a file system stood still every heartbeat is old: it is seen to beat again.
    leave_owner(folder, **ELSEWHERE, silent=leases.STALE_SECONDS + 60)
    monkeypatch.setattr(leases.time, "sleep", lambda seconds: os.utime(folder / OWNER))
    with pytest.raises(OwnedError):
        claim(folder, say=said.append)


def test_a_stopped_process_on_this_machine_is_alive(folder, process):
    first = process()
    first.stdout.readline()
    first.send_signal(signal.SIGSTOP)
    os.utime(folder / OWNER, (1, 1))
    with pytest.raises(OwnedError, match=f"kill {first.pid}"):
        claim(folder)


def test_a_process_that_proc_hides_is_judged_by_its_heartbeat(folder, monkeypatch):
    """As where /proc shows a user nothing of other users."""

    def hide(pid, number):
        raise PermissionError(1, "Operation not permitted")

    leave_owner(folder, pid=2**22)
    monkeypatch.setattr(os, "kill", hide)
    with pytest.raises(OwnedError, match="the folder is free"):
        claim(folder)
    assert living_owner(folder)
    os.utime(folder / OWNER, (1, 1))
    claim(folder, say=str).release()


@pytest.mark.parametrize(
    ("owner", "own", "answer", "taken"),
    [
        (("7", 0), ("7", "1"), "", "restarted job 7"),
        # The very same start of the job: as anybody else.
        (("7", 1), ("7", "1"), "", ""),
        (("7", 0), ("8", "0"), "JobId=7 JobState=RUNNING Reason=None", ""),
        (("7", 0), ("8", "0"), "JobId=7 JobState=COMPLETING Reason=None", ""),
        (("7", 0), ("8", "0"), "JobId=7 JobState=TIMEOUT Reason=None", "job 7 TIMEOUT"),
        (("7", 0), ("8", "0"), "slurm_load_jobs error: Invalid job id specified", "no longer"),
        # The controller does not answer.
        (("7", 0), ("8", "0"), "slurm_load_jobs error: Unable to contact", ""),
        (("7", 0), ("", ""), "JobId=7 JobState=FAILED Reason=None", "job 7 FAILED"),
    ],
)
def test_what_slurm_knows_of_the_owner(owner, own, answer, taken, folder, tmp_path, monkeypatch):
    scontrol = tmp_path / "bin" / "scontrol"
    scontrol.parent.mkdir()
    failed = "error" in answer
    scontrol.write_text(f"#!/bin/sh\necho '{answer}' >&{2 if failed else 1}\nexit {failed:d}\n")
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", f"{scontrol.parent}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_JOB_ID", own[0])
    monkeypatch.setenv("SLURM_RESTART_COUNT", own[1])
    job, restarts = owner
    leave_owner(folder, **ELSEWHERE, job=job, restarts=restarts)
    if taken:
        held = claim(folder)
        assert taken in held.taken_over
        held.release()
    else:
        with pytest.raises(OwnedError, match="Slurm job 7"):
            claim(folder)


def test_a_job_that_slurm_has_suspended_is_alive(folder, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "8")
    monkeypatch.setattr(owners, "_state", lambda job: "SUSPENDED")
    leave_owner(folder, **ELSEWHERE, job="7", silent=1e6)
    with pytest.raises(OwnedError, match="Slurm job 7"):
        claim(folder)


def test_slurm_is_asked_seldom_while_an_owner_leaves(folder, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "8")
    asked, slept = [], []
    monkeypatch.setattr(owners, "_state", lambda job: asked.append(job) or "RUNNING")

    def sleep(seconds):
        slept.append(seconds)
        if len(slept) == 20:
            (folder / OWNER).unlink()

    monkeypatch.setattr(leases.time, "sleep", sleep)
    leave_owner(folder, **ELSEWHERE, job="7")
    (folder / f"owner.{BEFORE}.leaving").touch()
    claim(folder, say=str).release()
    assert asked == ["7"]


@pytest.mark.parametrize("links", [True, False], ids=["links", "no links"])
def test_of_many_that_find_it_dead_exactly_one_wins(folder, links):
    """Each round all begin at once; the winner owns it until all have tried."""
    told = subprocess.run(
        [sys.executable, "-c", RACE, str(folder), str(links)],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert told.returncode == 0, told.stderr
    rounds = [json.loads(line) for line in told.stdout.splitlines()]
    assert rounds == [{"owners": 1, "in the file": True, "left": [OWNER]}] * 60


def test_a_taker_that_finds_out_late_undoes_nothing(folder, tmp_path):
    """It judged the owner dead, slept, and another has followed meanwhile."""
    leave_owner(folder, pid=2**22)
    held = claim(folder)
    late = tmp_path / "late"
    late.write_text(json.dumps(asdict(Owner.here())))
    assert not leases._succeed(folder, [BEFORE], "f" * 32, late)
    assert held.owned()
    assert files(folder) == [OWNER]
    held.release()


def test_who_dies_while_it_takes_over_is_followed(folder):
    leave_owner(folder, pid=2**22)
    owner = replace(Owner.here(), start=HALF_WAY, pid=2**22 + 1)
    (folder / f"owner.{BEFORE}.next").write_text(json.dumps(asdict(owner)))
    held = claim(folder)
    assert "process 4194305 has ended" in held.taken_over
    assert files(folder) == [OWNER]
    held.release()


def test_without_hard_links(folder, monkeypatch):
    def none(*arguments):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", none)
    claim(folder).release()
    leave_owner(folder, pid=2**22)
    held = claim(folder)
    assert held.owned()
    assert files(folder) == [OWNER]
    held.release()


def test_a_link_whose_answer_was_lost_was_made(tmp_path, monkeypatch):
    """NFS asks again where no answer came, and is then told that the name exists."""
    source, target = tmp_path / "source", tmp_path / "target"
    source.write_text("this start")
    made = os.link

    def answer_lost(one, other):
        made(one, other)
        raise FileExistsError

    def vanished(one, other):
        raise FileExistsError

    monkeypatch.setattr(os, "link", answer_lost)
    assert leases._link(source, target)
    target.unlink()
    target.write_text("another start")
    monkeypatch.setattr(os, "link", vanished)
    assert not leases._link(source, target)
    target.unlink()
    assert not leases._link(source, target)


def test_an_owner_that_leaves_is_waited_for(folder, process):
    first = process()
    first.stdout.readline()
    (folder / f"owner.{leases._read(folder / OWNER)[0].start}.leaving").touch()
    second = process()
    assert "waiting until its owner has saved" in second.stdout.readline()
    first.communicate()
    assert second.stdout.readline().startswith("owns")
    assert files(folder) == [OWNER]


def test_leaving_is_said_by_the_heartbeat(folder):
    held = claim(folder)
    Lease(folder, held.start).will_leave()  # Another rank's: it only answers.
    held.will_leave()
    marker = folder / f"owner.{held.start}.leaving"
    until(marker.exists, 30, "the heartbeat says that the owner leaves")
    held.release()
    assert not marker.exists()


@pytest.mark.parametrize("how", ["taken", "removed"])
def test_who_lost_the_folder_is_told_and_does_not_touch_the_new_owner(how, folder):
    told = []
    held = claim(folder, on_lost=told.append)
    (folder / "recipe.json").touch()
    other = Lease(folder, held.start)
    assert other.owned()
    if how == "taken":
        leave_owner(folder, silent=50, **ELSEWHERE)
    else:
        (folder / OWNER).unlink()
    until(lambda: told, 30, "the owner is told that it lost the folder")
    assert not held.owned()
    assert not other.owned()
    assert ("host n7" if how == "taken" else "is gone") in told[0]
    held.release()
    if how == "taken":
        assert leases._read(folder / OWNER)[0].start == BEFORE
        assert time.time() - (folder / OWNER).stat().st_mtime > 40, "no beat for another"


def test_the_heartbeat_is_the_time_of_the_file(folder):
    held = claim(folder)
    os.utime(folder / OWNER, (1, 1))
    until(lambda: (folder / OWNER).stat().st_mtime > time.time() - 20, 30, "a beat")
    held.release()


def test_a_fresh_start_moves_the_old_files_and_stays_the_owner(folder):
    held = claim(folder)
    assert held.start_anew() is None
    for number in (1, 2):
        (folder / "recipe.json").write_text(str(number))
        old = held.start_anew()
        assert old == folder.with_name(f"a.old-{number}")
        assert files(old) == ["recipe.json"]
        assert files(folder) == [OWNER]
        assert held.owned()
    assert files(folder.parent) == ["a", "a.old-1", "a.old-2"]
    held.release()


@pytest.mark.parametrize("name", ["thesis.tex", "logs/notes.txt", "metrics.jsonl"])
def test_a_fresh_start_moves_no_folder_that_is_not_a_run(name, folder):
    held = claim(folder)
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text("mine")
    with pytest.raises(leases.ConfigError, match=rf"got {name} "):
        held.start_anew()
    assert (folder / name).read_text() == "mine"
    assert files(folder.parent) == ["a"]
    held.release()


def test_a_fresh_start_moves_what_a_start_left_before_its_recipe(folder):
    held = claim(folder)
    (folder / "logs").mkdir()
    for name in ("logs/rank_00000.log", "slurm-fd-7.out", "stop"):
        (folder / name).touch()
    assert held.start_anew() == folder.with_name("a.old-1")
    assert files(folder) == [OWNER]
    held.release()


def test_a_fresh_start_does_not_move_the_folder_that_it_works_in(folder, monkeypatch):
    folder.mkdir(parents=True)
    monkeypatch.chdir(folder)
    held = claim(Path())
    assert held.start_anew() is None
    (folder / "recipe.json").touch()
    with pytest.raises(leases.ConfigError, match=r"a folder outside"):
        held.start_anew()
    assert files(folder) == [OWNER, "recipe.json"]
    held.release()


def test_the_copy_of_a_living_run_is_called_a_copy(folder, process):
    process().stdout.readline()
    copy = folder.with_name("copy")
    shutil.copytree(folder, copy)
    with pytest.raises(OwnedError, match=rf"a copy of {folder}, .*remove {copy / OWNER}") as caught:
        claim(copy, say=str)
    assert "kill" not in str(caught.value)
    with pytest.raises(OwnedError, match="kill"):
        claim(folder, say=str)
    record = json.loads((copy / OWNER).read_text())
    del record["folder"]
    (copy / OWNER).write_text(json.dumps(record))
    with pytest.raises(OwnedError, match="kill"):
        claim(copy, say=str)
    (copy / OWNER).unlink()
    claim(copy, say=str).release()


def test_a_damaged_owner_counts_by_its_age(folder):
    folder.mkdir(parents=True)
    (folder / OWNER).write_text('{"start": ')
    with pytest.raises(OwnedError, match="unknown"):
        claim(folder)
    os.utime(folder / OWNER, (1, 1))
    claim(folder, say=str).release()


@pytest.mark.parametrize(
    "text",
    [
        b"\xff\xfe{}",
        b"[" * 100_000,
        b"[1]",
        b"{}",
        json.dumps({"start": "x/../../../y"}).encode(),
        json.dumps({"start": BEFORE, "pid": float("inf")}).encode(),
        json.dumps({"start": BEFORE, "pid": 10**30}).encode(),
        json.dumps({"start": BEFORE, "pid": -1}).encode(),
        json.dumps({"start": f"{BEFORE}\0"}).encode(),
        json.dumps({"start": [BEFORE]}).encode(),
        json.dumps({"start": BEFORE, "host": "h" * 5000}).encode(),
        json.dumps({"start": BEFORE, "folder": "a\0b"}).encode(),
    ],
)
def test_an_owner_with_values_of_no_start_is_unknown(text, folder):
    folder.mkdir(parents=True)
    (folder / OWNER).write_bytes(text)
    assert Owner.parse(text).start == "unknown"
    with pytest.raises(OwnedError, match="unknown"):
        claim(folder)
    os.utime(folder / OWNER, (1, 1))
    claim(folder, say=str).release()
    assert files(folder) == []


def test_an_own_record_is_read_back_whatever_the_folder_is_called(tmp_path):
    folder = tmp_path / os.fsdecode(b"\xff \n\x1b") / "a"
    held = claim(folder)
    assert held.owned()
    assert leases._read(folder / OWNER)[0].folder == str(folder)
    held.release()


def test_the_heartbeat_survives_a_file_that_is_not_text(folder):
    told = []
    held = claim(folder, on_lost=told.append)
    (folder / OWNER).write_bytes(b"\xff" * 100)
    until(lambda: told, 30, "the owner is told that it lost the folder")
    assert "unknown" in told[0]
    held.release()


def test_escape_sequences_of_a_foreign_owner_reach_no_terminal(folder):
    leave_owner(folder, **(ELSEWHERE | {"host": "\x1b]0;x\x07n7"}))
    with pytest.raises(OwnedError) as refused:
        claim(folder)
    assert str(refused.value).isprintable()


def test_a_pipe_as_owner_does_not_keep_a_start_waiting(folder):
    folder.mkdir(parents=True)
    os.mkfifo(folder / OWNER)
    with pytest.raises(OwnedError, match="unknown"):
        claim(folder)


def test_files_of_owners_that_lead_in_a_circle_are_a_mistake(folder):
    leave_owner(folder, pid=2**22)
    shutil.copy(folder / OWNER, folder / f"owner.{BEFORE}.next")
    with pytest.raises(leases.ConfigError, match="earlier owner file"):
        claim(folder)


HOUR = 3600.0


@pytest.mark.parametrize("ahead", [60.0, HOUR, 400 * 24 * HOUR])
def test_a_dead_owner_whose_clock_was_ahead_is_believed_for_one_lease(ahead, folder, monkeypatch):
    monkeypatch.setattr(leases, "STALE_SECONDS", 0.5)
    leave_owner(folder, **ELSEWHERE, silent=-ahead)
    said = []
    begin = time.monotonic()
    held = claim(folder, say=said.append)
    assert time.monotonic() - begin >= 0.5
    assert "writes times in the future" in said[0]
    assert "no heartbeat" in held.taken_over
    assert files(folder) == [OWNER]
    held.release()


@pytest.mark.parametrize("ahead", [HOUR, -HOUR])
def test_a_living_owner_is_not_robbed_whatever_its_clock_says(ahead, folder, monkeypatch):
    """Its beat changes while it is watched; the second start is refused as soon as it does."""
    monkeypatch.setattr(leases, "STALE_SECONDS", 30.0)
    leave_owner(folder, **ELSEWHERE, silent=-ahead)
    beats = []

    def sleep(seconds):
        now = time.time() + ahead
        os.utime(folder / OWNER, (now, now))
        beats.append(now)

    monkeypatch.setattr(leases.time, "sleep", sleep)
    with pytest.raises(OwnedError, match=r"host n7, .* 0 s ago"):
        claim(folder, say=str)
    assert len(beats) == 1
    assert leases._read(folder / OWNER)[0].start == BEFORE


@pytest.mark.parametrize("ahead", [HOUR, -HOUR])
def test_an_owner_with_another_clock_of_a_student_is_seen_alive(ahead, folder, monkeypatch):
    student = folder / "students" / "a"
    leave_owner(student, **ELSEWHERE, silent=-ahead)
    assert living_owner(student) is None

    def sleep(seconds):
        now = time.time() + ahead
        os.utime(student / OWNER, (now, now))

    with monkeypatch.context() as patch:
        patch.setattr(leases.time, "sleep", sleep)
        with pytest.raises(OwnedError, match="would share"):
            claim(folder)
    # Nobody beats: it is dead.
    claim(folder).release()


def test_an_owner_that_stops_beating_while_it_leaves_is_followed(folder, monkeypatch):
    """As long as it beats it is waited for; from its last beat on counts one lease."""
    monkeypatch.setattr(leases, "STALE_SECONDS", 0.5)
    leave_owner(folder, **ELSEWHERE, silent=-HOUR)
    (folder / f"owner.{BEFORE}.leaving").touch()
    slept, rest = [], time.sleep

    def sleep(seconds):
        slept.append(seconds)
        if len(slept) < 4:
            now = time.time() + HOUR
            os.utime(folder / OWNER, (now, now))
        rest(0.1)

    monkeypatch.setattr(leases.time, "sleep", sleep)
    held = claim(folder, say=str)
    assert len(slept) > 4
    assert "no heartbeat" in held.taken_over
    held.release()


def test_a_folder_that_cannot_be_made_is_a_mistake_of_the_user(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(leases.ConfigError, match=r"--runtime\.run_dir: "):
        claim(tmp_path / "file" / "run")
    assert isinstance(tmp_path, Path)


def test_a_folder_that_cannot_be_made_is_named_without_the_systems_number(tmp_path):
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file" / "run", tmp_path / ("x" * 300)):
        with pytest.raises(leases.ConfigError, match=rf"run_dir: {tmp_path}") as refused:
            claim(folder)
        assert "Errno" not in str(refused.value)


def test_of_several_students_all_are_owned_or_one(folder, process, tmp_path):
    assert process().stdout.readline().startswith("owns")
    student = folder / "students" / "a"
    with pytest.raises(OwnedError, match="would share"):
        claim(student)
    assert not (student / OWNER).exists()
    all_of_them = tmp_path / "all"
    one = all_of_them / "students" / "a"
    one.mkdir(parents=True)
    (one / OWNER).write_text((folder / OWNER).read_text())
    with pytest.raises(OwnedError, match="would share"):
        claim(all_of_them)
    (one / OWNER).unlink()
    held = claim(all_of_them)
    inner = held.inside(one)
    assert inner.owned()
    held.release()
    assert not inner.owned()


def linked_run(tmp_path, folder):
    """A run's folder, and another run with a file and a checkpoint."""
    other = tmp_path / "other"
    (other / "checkpoints" / "step_00000002").mkdir(parents=True)
    (other / "recipe.json").write_text("{}")
    folder.mkdir(parents=True)
    (folder / "logs").mkdir()
    return other


@pytest.mark.parametrize(
    "name", ["metrics.jsonl", "logs/rank_00000.log", "recipe.json", "students/a/metrics.jsonl"]
)
@pytest.mark.parametrize("is_there", [True, False])
def test_a_run_is_not_written_through_a_link_to_a_file(name, is_there, folder, tmp_path):
    linked_run(tmp_path, folder)
    (link := folder / name).parent.mkdir(parents=True, exist_ok=True)
    link.symlink_to(target := tmp_path / "theirs")
    if is_there:
        target.write_text("theirs")
    with pytest.raises(ConfigError, match=name):
        claim(folder)
    assert target.exists() == is_there
    assert not (folder / OWNER).exists()


def test_a_folder_of_a_run_may_be_elsewhere_but_not_in_another_run(folder, tmp_path):
    other = linked_run(tmp_path, folder)
    (disk := tmp_path / "disk").mkdir()
    (folder / "checkpoints").symlink_to(disk)
    claim(folder).release()
    (folder / "checkpoints").unlink()
    (folder / "checkpoints").symlink_to(other / "checkpoints")
    with pytest.raises(ConfigError, match="checkpoints"):
        claim(folder)


@pytest.mark.parametrize("name", ["metrics.jsonl", "logs/rank_00000.log"])
def test_a_run_does_not_write_into_a_pipe(name, folder, tmp_path):
    linked_run(tmp_path, folder)
    os.mkfifo(folder / name)
    with pytest.raises(ConfigError, match=name):
        claim(folder)
