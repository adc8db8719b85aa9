"""Curves in Weights & Biases' files of a run without a network, read back record by record."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

from fd_large.runtime import curves
from fd_large.runtime.curves import TAGS
from fd_large.runtime.meter import Meter

wandb = pytest.importorskip("wandb", reason="needs the package wandb")


def records(path):
    """Reads a .wandb file: LevelDB's log format after a header of 7 bytes, in blocks of 32 KiB."""
    from wandb.proto import wandb_internal_pb2

    data, place, part = path.read_bytes(), 7, b""
    while place + 7 <= len(data):
        left = 32768 - place % 32768
        if left < 7:
            place += left
            continue
        size, kind = int.from_bytes(data[place + 4 : place + 6], "little"), data[place + 6]
        part += data[place + 7 : place + 7 + size]
        place += 7 + size
        if kind in (1, 4):  # Whole, or the last of several.
            record = wandb_internal_pb2.Record()
            record.ParseFromString(part)
            yield record
            part = b""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    recipe = {"name": "r", "runtime": {"name": "mine", "tags": ["a", "b"]}, "optim": {"lr": 0.1}}
    (tmp_path / "recipe.json").write_text(json.dumps(recipe))
    monkeypatch.setattr(curves, "SECONDS_TO_FINISH", 600.0)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for name in ("WANDB_API_KEY", "WANDB_PROJECT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_MODE", "offline")
    # What it has read of the environment.
    wandb.teardown()
    yield tmp_path
    wandb.teardown()


def test_a_run_and_the_same_run_after_a_restart(folder, make_setting, run_updates):
    from fd_large.runtime.wandb import WandB

    run_updates([Meter([WandB()])], make_setting(), 8, evaluate=(2, 4), end="preempted")
    run_updates([Meter([WandB()])], make_setting(first=8), 10, evaluate=(9,))
    # Its service may still write the end of a file after a run of it is finished.
    wandb.teardown()
    id = json.loads((folder / "trackers.json").read_text())["wandb"]
    # The folder of a second start within a second has a number after the id.
    files = sorted(folder.glob(f"wandb/offline-run-*-{id}*/run-{id}.wandb"))
    found = [record for file in files for record in records(file)]
    runs = [record.run for record in found if record.WhichOneof("record_type") == "run"]
    assert {(run.run_id, run.display_name, run.project) for run in runs} == {
        (id, "mine", "fd_large")
    }
    assert list(runs[0].tags) == ["a", "b"]
    settings = {update.key: update.value_json for update in runs[0].config.update}
    assert json.loads(settings["optim"]) == {"lr": 0.1}
    points = {}
    for record in found:
        if record.WhichOneof("record_type") == "history":
            items = {i.key or "/".join(i.nested_key): i.value_json for i in record.history.item}
            values = {name: json.loads(value) for name, value in items.items()}
            for name in values.keys() - {"_step", "_runtime", "_timestamp"}:
                points.setdefault(name, []).append((values["_step"], values[name]))
    assert points[TAGS["loss"]] == [(i + 1, pytest.approx(i / 100)) for i in range(10)]
    assert points["held_out/loss"] == [(2, 2.0), (4, 4.0), (9, 9.0)]


def test_numbers_of_an_earlier_step_say_so(monkeypatch):
    from fd_large.runtime.wandb import WandB

    tracker, logged = WandB(), []
    run = SimpleNamespace(log=lambda values, step: logged.append((step, values)))
    vars(tracker).update(_run=run, _early={}, _step=8)
    tracker.send({"box/AP": 0.5}, 4)
    assert logged == [(8, {"box/AP": 0.5, "evaluation/of_step": 4})]


def test_without_a_key_training_goes_on(folder, make_setting, run_updates, monkeypatch, caplog):
    from fd_large.runtime.wandb import WandB

    monkeypatch.setenv("WANDB_MODE", "online")
    wandb.teardown()
    monkeypatch.setenv("NETRC", str(folder / "no_netrc"))
    run_updates([Meter([WandB()])], make_setting(), 4)
    assert "wandb gets no further points: no API key; run `wandb login`" in caplog.text
    assert not (folder / "trackers.json").exists()
