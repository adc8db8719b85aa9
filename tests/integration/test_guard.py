"""A real run that meets NaN and spikes: skipped, taken back, stopped, resumed, replayed."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import twin
from integration.programs import guarded
from launch import ROOT, read_results, run_ranks
from pictures import write_pictures

from fd_large.commands import replay
from fd_large.engine.replay import find_weights, read_incident, run_again
from fd_large.errors import ConfigError, FDError

pytestmark = [pytest.mark.multirank, pytest.mark.slow]

PROGRAM = ROOT / "tests/integration/programs/guarded.py"
RANKS = 2
UPDATES = 16
SAVE_EVERY = 4
SPOILT = {5: (1, "nan"), 8: (0, "spike"), 10: (0, "nan"), 11: (1, "nan"), 13: (0, "spike")}
SPOILT |= {14: (1, "nan")}

FLAGS = f"""
--batch.global_batch_size 4 --batch.micro_batch_size 1 --optim.max_steps {UPDATES}
--runtime.save_every {SAVE_EVERY} --runtime.keep_last 9 --runtime.canary_every 0 --guard.skips 2
""".split()


def train(folder: Path, pictures: Path, config: str, roll_backs: int) -> list[int]:
    (folder / "spoilt.json").write_text(json.dumps(SPOILT))
    words = twin.words(
        pictures, folder / "run", *FLAGS, "--guard.roll_backs", str(roll_backs), config=config
    )
    return run_ranks(PROGRAM, folder, *words, ranks=RANKS, check=False, timeout=300).returncodes


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pictures(tmp_path_factory.mktemp("pictures"), 4 * UPDATES + 3)


@pytest.fixture(scope="module")
def zero3(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return until_it_stops("zero3", pictures, tmp_path_factory)


@pytest.fixture(scope="module")
def zero1(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return until_it_stops("zero1", pictures, tmp_path_factory)


@pytest.fixture(params=["zero3", "zero1"])
def stopped(request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue(request.param)


def until_it_stops(config: str, pictures: Path, folders: pytest.TempPathFactory) -> Path:
    folder = folders.mktemp(config)
    assert train(folder, pictures, config, roll_backs=1) == [3, 3]
    return folder


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def incident(folder: Path, index: int) -> Path:
    return folder / f"run/incidents/update_{index + 1:08d}"


def test_bad_updates_are_skipped_and_rows_of_them_undone(stopped: Path) -> None:
    ranks = read_results(stopped, RANKS)
    for rank in ranks:
        updates = rank["updates"]
        assert [seen["index"] for seen in updates] == list(range(15))
        assert [seen["index"] for seen in updates if seen["skipped"]] == list(SPOILT)
        digests = [seen["digest"] for seen in updates]
        for index in SPOILT:
            # Weights, masters and moments, to the bit; the loop takes back after this is noted.
            assert digests[index] == digests[index - 1], f"update {index} moved something"
        for index in (6, 7, 9, 12):
            assert digests[index] != digests[index - 1]
        (restored,) = rank["restored"]
        assert (restored["at"], restored["to"]) == (11, 8)
        assert restored["digest"] == digests[7]
        assert digests[12] not in digests[:12], "it goes on from there with the next data"
        # Two micro batches an update.
        assert rank["served"][:30] == [u for u in range(15) for _ in range(2)]
        assert rank["status"] == "guard"
    first, second = (rank["updates"] for rank in ranks)
    assert [str(seen["loss"]) for seen in first] == [str(seen["loss"]) for seen in second]


def test_the_run_says_what_happened(stopped: Path) -> None:
    assert read(stopped / "run/summary.json")["status"] == "guard"
    log = (stopped / "run/logs/rank_00000.log").read_text()
    assert "update 6 skipped: its loss is nan" in log
    assert "worst on rank 1 (" in log
    assert "those of 8 updates again, and the run goes on with the next data" in log
    assert "the run ends: updates 14 to 15 were refused one after the other" in log
    rows = [json.loads(x) for x in (stopped / "run/metrics.jsonl").read_text().splitlines()]
    assert [row["update"] for row in rows if row.get("skipped")] == list(SPOILT)
    for row in rows:
        spoilt = SPOILT.get(row["update"], (0, ""))[1]
        assert math.isfinite(row["loss"]) == math.isfinite(row["grad_norm"]) == (spoilt != "nan")
        # No gradient of a skipped update is left for the next.
        assert spoilt or row["grad_norm"] < 3
    rates = [row["learning_rate"] for row in rows]
    assert rates == sorted(rates, reverse=True), "the schedule goes on over a roll-back"
    saved = sorted(p.name for p in (stopped / "run/checkpoints").iterdir())
    assert saved == [f"step_{n:08d}" for n in (4, 8, 12)]


def test_incidents_keep_the_pictures_of_the_rank_at_fault(stopped: Path) -> None:
    said = read(incident(stopped, 5) / "incident.json")
    assert said["culprits"] == [1]
    assert said["images"] == ["rank_00001.safetensors"]
    assert sorted(p.name for p in incident(stopped, 5).iterdir()) == [
        "incident.json",
        "rank_00001.safetensors",
    ]
    fine, bad = said["ranks"]
    assert all(map(math.isfinite, fine["losses"]))
    assert not any(map(math.isfinite, bad["losses"]))
    assert fine["positions"] == [20, 21]
    assert bad["positions"] == [22, 23]
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


def test_replay_reproduces_the_recorded_losses(
    stopped: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    guarded.spoil(monkeypatch.setattr)
    spike = read_incident(incident(stopped, 8))
    weights = find_weights(spike)
    assert (weights.update, weights.accepted_between) == (8, 0)
    replayed = run_again(spike, weights)
    assert replayed.same_teacher
    (own,) = spike.pictures
    assert replayed.losses == {0: pytest.approx(own.losses, rel=1e-5)}
    # A largest value over both ranks is no less than one rank's.
    for name, value in replayed.forward.items():
        assert value <= spike.said["layers"][name] * (1 + 1e-4), name
    assert 0 < replayed.grad_norm < math.inf
    assert replayed.gradient.keys() == {n for n in replayed.forward if "teacher." not in n}

    assert replay.main([str(incident(stopped, 5) / "incident.json")]) == 0
    said = capsys.readouterr().out
    assert "weights: checkpoint of 4 updates, 1 update earlier than the step" in said
    assert "forward: student.patch_embed.proj is the first layer that is not finite" in said
    assert "gradient: projection is the first layer that is not finite" in said


def test_replay_says_how_far_its_weights_are_from_the_step(zero3: Path, tmp_path: Path) -> None:
    shutil.copytree(zero3 / "run", tmp_path / "run")
    spike = read_incident(incident(tmp_path, 8))
    checkpoints = tmp_path / "run/checkpoints"
    with (checkpoints / "step_00000008/rank_00001.safetensors").open("r+b") as file:
        file.truncate(100)
    # Damaged, so the one before it; of the four updates between them, one was skipped.
    assert find_weights(spike)[1:] == (4, 3)
    # Update 10 was undone, by a roll-back to 8 updates; what was skipped moved nothing.
    later = read_incident(incident(tmp_path, 13))
    assert find_weights(later)[1:] == (12, 1)
    (checkpoints / "step_00000012").rename(tmp_path / "aside")
    assert find_weights(later)[1:] == (4, 4)
    (tmp_path / "aside").rename(checkpoints / "step_00000012")
    shutil.rmtree(checkpoints / "step_00000004")
    assert find_weights(spike)[1:] == (12, None)


def test_a_resume_counts_the_roll_backs_before_it(
    zero3: Path, pictures: Path, tmp_path: Path
) -> None:
    shutil.copytree(zero3 / "run", tmp_path / "run")
    assert train(tmp_path, pictures, "zero3", roll_backs=2) == [0, 0]
    for rank in read_results(tmp_path, RANKS):
        assert [seen["index"] for seen in rank["updates"]] == [12, 13, 14, 15]
        assert [seen["index"] for seen in rank["updates"] if seen["skipped"]] == [13, 14]
        assert [(seen["at"], seen["to"]) for seen in rank["restored"]] == [(14, 12)]
    log = (tmp_path / "run/logs/rank_00000.log").read_text()
    assert "(roll-back 2 of 2)" in log
    assert read(tmp_path / "run/summary.json")["status"] == "done"


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda run, at: shutil.rmtree(at), "no incident; got no such file"),
        (lambda run, at: (at / "incident.json").write_text("{"), "cannot be read"),
        (lambda run, at: (at / "incident.json").write_text("{}"), "damaged; got KeyError"),
        (lambda run, at: (at / "rank_00001.safetensors").unlink(), "its pictures are gone"),
        (lambda run, at: (at / "rank_00001.safetensors").write_text("x"), "damaged"),
        (lambda run, at: (run / "recipe.json").unlink(), "outside of its run"),
        (lambda run, at: shutil.rmtree(run / "checkpoints"), "no sound checkpoint; got none"),
        (lambda run, at: _name_teacher(run, "/no/such/file.pt"), "no such file"),
    ],
)
def test_what_cannot_be_replayed_is_told_in_a_sentence(
    spoil: Any, said: str, zero3: Path, tmp_path: Path
) -> None:
    run = shutil.copytree(zero3 / "run", tmp_path / "run")
    spoil(run, run / "incidents/update_00000006")
    with pytest.raises(FDError) as caught:
        replay.main([str(run / "incidents/update_00000006")])
    assert said in str(caught.value)


@pytest.mark.parametrize(
    "name", ["index", "off", "layers", "epoch", "world_size", "micro_batch_size", "grad_norm"]
)
@pytest.mark.parametrize(
    "damage",
    [lambda said, name: said.pop(name), lambda said, name: said.update({name: ""})],
    ids=["missing", "of another type"],
)
def test_a_damaged_incident_is_told_when_it_is_read(
    damage: Any, name: str, zero3: Path, tmp_path: Path
) -> None:
    run = shutil.copytree(zero3 / "run", tmp_path / "run", ignore=lambda *_: ["checkpoints"])
    file = run / "incidents/update_00000006/incident.json"
    said = read(file)
    damage(said, name)
    file.write_text(json.dumps(said))
    with pytest.raises(ConfigError, match=f"damaged; got (KeyError|TypeError) '?{name}"):
        read_incident(file)


def _name_teacher(run: Path, source: str) -> None:
    recipe = read(run / "recipe.json")
    recipe["teacher"]["source"] = source
    (run / "recipe.json").write_text(json.dumps(recipe))
