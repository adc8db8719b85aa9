"""A real run that meets NaN and spikes: skipped, taken back, stopped, resumed, replayed."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import twin
from closeness import distance
from integration.programs import guarded
from kills import state
from launch import ROOT, read_results, run_ranks
from pictures import write_pictures

from fd_large.cli import replay as command
from fd_large.engine.replay import replay
from fd_large.tasks.jobs import job_of

PROGRAM = ROOT / "tests/integration/programs/guarded.py"
RANKS = 2
UPDATES = 16
SAVE_EVERY = 4
# A checkpoint is due after the steps 3, 7, 11 and 15, counted from 0.
SPOILT = {3: (1, "nan"), 6: (1, "nan"), 8: (0, "spike"), 10: (0, "nan"), 11: (1, "nan")}
SPOILT |= {13: (0, "spike"), 14: (1, "nan")}
SAVED = [5, 8, 12]
CONFIGS = ("zero1", "zero2", "zero3", "zero3_offload")

FLAGS = f"""
--batch.global_batch_size 4 --batch.micro_batch_size 1 --optim.max_steps {UPDATES}
--runtime.save_every {SAVE_EVERY} --runtime.keep_last 9 --runtime.canary_every 0 --guard.skips 2
--student.architecture.depths 1 1
""".split()


def train(folder: Path, pictures: Path, configs: Sequence[str], roll_backs: int) -> list[int]:
    """Trains FOLDER/CONFIG/run with each, one after the other; returns the ranks' exit codes."""
    more = (*FLAGS, "--guard.roll_backs", str(roll_backs))
    runs = {
        name: twin.words(pictures, folder / name / "run", *more, config=name) for name in configs
    }
    (folder / "spoilt.json").write_text(json.dumps(SPOILT))
    (folder / "runs.json").write_text(json.dumps(runs))
    finished = run_ranks(PROGRAM, folder, ranks=RANKS, check=False, timeout=400)
    assert (folder / "rank_0.json").exists(), "\n".join(finished.outputs)
    return finished.returncodes


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pictures(tmp_path_factory.mktemp("pictures"), 4 * UPDATES + 3)


@pytest.fixture(scope="module")
def ended(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the runs of all configs, each until the guard stops it."""
    folder = tmp_path_factory.mktemp("ended")
    assert train(folder, pictures, CONFIGS, roll_backs=1) == [3, 3]
    return folder


@pytest.fixture(params=CONFIGS)
def stopped(request: pytest.FixtureRequest, ended: Path) -> Path:
    return ended / request.param


@pytest.fixture(scope="module")
def zero3(ended: Path) -> Path:
    return ended / "zero3"


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def incident(folder: Path, index: int) -> Path:
    return folder / f"run/incidents/update_{index + 1:08d}"


def test_bad_updates_are_skipped_and_rows_of_them_undone(stopped: Path) -> None:
    ranks = [result[stopped.name] for result in read_results(stopped.parent, RANKS)]
    for rank in ranks:
        assert (rank["code"], rank["status"]) == (3, "guard")
        updates = rank["updates"]
        assert [seen["index"] for seen in updates] == list(range(15))
        assert [seen["index"] for seen in updates if seen["skipped"]] == list(SPOILT)
        digests = [seen["digest"] for seen in updates]
        for index in SPOILT:
            # Weights, masters and moments, to the bit; the loop takes back after this is noted.
            assert digests[index] == digests[index - 1], f"update {index} moved something"
        for index in set(range(1, 15)) - set(SPOILT):
            assert digests[index] != digests[index - 1]
        (restored,) = rank["restored"]
        assert (restored["at"], restored["to"]) == (11, 8)
        assert restored["digest"] == digests[7]
        assert digests[12] not in digests[:12], "it goes on from there with the next data"
        # Two micro batches a step.
        assert rank["served"][:30] == [u for u in range(15) for _ in range(2)]
    first, second = (rank["updates"] for rank in ranks)
    assert [str(seen["loss"]) for seen in first] == [str(seen["loss"]) for seen in second]


def test_the_run_says_what_happened(stopped: Path) -> None:
    assert read(stopped / "run/summary.json")["status"] == "guard"
    log = (stopped / "run/logs/rank_00000.log").read_text()
    assert "step 4 skipped: its loss is nan" in log
    assert "worst on rank 1 (" in log
    assert "those after 8 steps, and the run continues with the next data" in log
    assert "the run ends: steps 14 to 15 were refused one after the other" in log
    rows = [json.loads(x) for x in (stopped / "run/metrics.jsonl").read_text().splitlines()]
    assert [row["update"] for row in rows if row.get("skipped")] == list(SPOILT)
    for row in rows:
        spoilt = SPOILT.get(row["update"], (0, ""))[1]
        assert math.isfinite(row["loss"]) == math.isfinite(row["grad_norm"]) == (spoilt != "nan")
        # No gradient of a skipped step is left for the next.
        assert spoilt or row["grad_norm"] < 3
    rates = [row["learning_rate"] for row in rows]
    assert rates == sorted(rates, reverse=True), "the schedule goes on over a roll-back"


def test_a_checkpoint_due_at_a_refused_update_waits_for_the_next_good_one(stopped: Path) -> None:
    checkpoints = sorted((stopped / "run/checkpoints").iterdir())
    assert [path.name for path in checkpoints] == [f"step_{n:08d}" for n in SAVED]
    first, _, last = (read(path / "manifest.json") for path in checkpoints)
    assert first["optimizer_steps"] == 4, "one of five was refused"
    # Due at the end of a row of refused steps, from which the run was taken back.
    assert last["optimizer_steps"] == 6
    before, after = (state(stopped / "run", update) for update in (8, 12))
    assert all((before[key] == after[key]).all() for key in before)


def test_incidents_keep_the_pictures_of_the_rank_at_fault(stopped: Path) -> None:
    said = read(incident(stopped, 6) / "incident.json")
    assert said["culprits"] == [1]
    assert said["images"] == ["rank_00001.safetensors"]
    assert sorted(p.name for p in incident(stopped, 6).iterdir()) == [
        "incident.json",
        "rank_00001.safetensors",
    ]
    fine, bad = said["ranks"]
    assert all(map(math.isfinite, fine["losses"]))
    assert not any(map(math.isfinite, bad["losses"]))
    assert fine["positions"] == [24, 25]
    assert bad["positions"] == [26, 27]
    assert all(name.endswith(".png") for name in bad["names"])
    assert said["first_layer_not_finite"] == "student.patch_embed.proj"
    layers = list(said["layers"])
    assert layers[0].startswith("teacher.net.patch_embed")
    assert layers[-1] == "projection"
    assert all(math.isfinite(v) for name, v in said["layers"].items() if "teacher." in name)
    spike = read(incident(stopped, 8) / "incident.json")
    assert spike["culprits"] == [0]
    assert [off["what"] for off in spike["off"]] == ["loss", "gradient norm"]
    assert spike["off"][0]["value"] > spike["off"][0]["limit"]
    assert read(incident(stopped, 11) / "incident.json")["restored"] == 8


@pytest.mark.closeness
def test_replay_reproduces_the_recorded_losses(
    stopped: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    guarded.spoil(monkeypatch.setattr)
    replayed = replay(incident(stopped, 8), job_of)
    assert replayed.checkpoint == 8
    assert not replayed.other_training
    assert {one.rank for one in replayed.micro_batches} == {0}
    assert distance(replayed.losses, [one.recorded for one in replayed.micro_batches]) <= 1e-5
    assert 0 < replayed.grad_norm < math.inf

    assert command.main([str(incident(stopped, 6) / "incident.json")]) == 0
    said = capsys.readouterr().out
    assert "weights: checkpoint of 5 steps, 1 step before this step" in said
    assert "nan !" in said


def test_a_resume_counts_the_roll_backs_before_it(
    zero3: Path, pictures: Path, tmp_path: Path
) -> None:
    shutil.copytree(zero3 / "run", tmp_path / "zero3/run")
    assert train(tmp_path, pictures, ["zero3"], roll_backs=2) == [0, 0]
    for result in read_results(tmp_path, RANKS):
        rank = result["zero3"]
        assert [seen["index"] for seen in rank["updates"]] == [12, 13, 14, 15]
        assert [seen["index"] for seen in rank["updates"] if seen["skipped"]] == [13, 14]
        assert [(seen["at"], seen["to"]) for seen in rank["restored"]] == [(14, 12)]
    log = (tmp_path / "zero3/run/logs/rank_00000.log").read_text()
    assert "(roll-back 2 of 2)" in log
    assert read(tmp_path / "zero3/run/summary.json")["status"] == "done"
