"""The folder of a run: who may enter it, and what it records of a start and of own code."""

from __future__ import annotations

import json
import logging

import pytest

from fd_large import doors
from fd_large.errors import ConfigError
from fd_large.recipes import registry
from fd_large.recipes.fields import override
from fd_large.runtime.run_folder import (
    cut_before,
    open_folder,
    record_code,
    recorded_code,
    rows_before,
    status_of,
    write_environment,
    written_or_logged,
)


def test_code_is_recorded_with_the_step_from_which_it_is_used(tmp_path, caplog):
    assert recorded_code(tmp_path) == {}
    record_code(tmp_path, {}, 0)
    assert not (tmp_path / "code.json").exists(), "a run without such code has no such file"
    record_code(tmp_path, {"module:a.py:x": "1", "module:b.py:y": "2"}, 0)
    record_code(tmp_path, {"module:a.py:x": "1", "module:b.py:y": "2"}, 5)
    assert not caplog.records
    with caplog.at_level(logging.WARNING):
        record_code(tmp_path, {"module:a.py:x": "1", "module:b.py:y": "3"}, 7)
    assert ["b.py" in record.getMessage() for record in caplog.records] == [True]
    starts = json.loads((tmp_path / "code.json").read_text())
    assert [start["update"] for start in starts] == [0, 7]
    assert recorded_code(tmp_path) == {"module:a.py:x": "1", "module:b.py:y": "3"}


def test_a_file_that_is_as_it_was_recorded_may_be_imported(tmp_path):
    names = {}
    for name in ("same", "edited", "gone"):
        (tmp_path / f"{name}.py").write_text("value = 1\n")
        names[name] = f"module:{tmp_path}/{name}.py:value"
    recorded = doors.hashes(list(names.values()))
    (tmp_path / "edited.py").write_text("value = 2\n")
    (tmp_path / "gone.py").unlink()
    doors.allow_unchanged(recorded)
    assert doors.load(names["same"], kind="losses", where="") == 1
    for name in ("edited", "gone"):
        with pytest.raises(ConfigError, match=f"{name}.py"):
            doors.load(names[name], kind="losses", where="")


def enter(folder, start_anew=None, **fields):
    named = {name.replace("__", "."): value for name, value in fields.items()}
    run = override(registry.get("quickstart"), named)
    open_folder(folder, run.to_dict(), run.changes_since, start_anew=start_anew)
    return json.loads((folder / "recipe.json").read_text())


def test_a_run_goes_on_in_its_own_folder_alone(tmp_path):
    folder = tmp_path / "runs" / "a"
    enter(folder, optim__base_lr=0.2)
    # What does not change the result may change, and the newest is recorded.
    found = enter(folder, optim__base_lr=0.2, runtime__log_every=3, data__workers=1)
    assert found["runtime"]["log_every"] == 3
    with pytest.raises(ConfigError, match=r"got optim\.base_lr 0\.2 -> 0\.3, .*--fresh"):
        enter(folder, optim__base_lr=0.3, runtime__log_every=7)
    assert json.loads((folder / "recipe.json").read_text()) == found


def test_one_student_is_told_where_it_goes_on_and_not_to_begin_anew(tmp_path):
    enter(tmp_path, students__wide__model="swinv2_tiny", students__slim__model="swinv2_tiny")
    with pytest.raises(ConfigError, match=r"wide, slim.*students/NAME/recipe\.json") as caught:
        enter(tmp_path)
    assert "fresh" not in str(caught.value)


def test_a_fresh_start_takes_any_recipe(tmp_path, caplog):
    folder = tmp_path / "a"
    enter(folder, runtime__seed=1)

    def move():
        return folder.rename(tmp_path / "a.old-1")

    with caplog.at_level("INFO"):
        assert enter(folder, start_anew=move, runtime__seed=2)["runtime"]["seed"] == 2
    assert "the old run is in" in caplog.text


@pytest.mark.parametrize("name", ["summary.json", "report.html", "checkpoints/best.pth"])
def test_a_folder_of_somebody_else_is_not_written_to(tmp_path, name):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_text("mine")
    with pytest.raises(ConfigError, match=rf"got {name.partition('/')[0]} "):
        enter(tmp_path)
    assert path.read_text() == "mine"
    assert not (tmp_path / "recipe.json").exists()


def test_a_folder_that_a_script_or_a_killed_start_made_is_entered(tmp_path):
    for name in ("logs/rank_00000.log", "slurm-fd-7.out", "owner.json", "transfer.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "checkpoints").mkdir()
    enter(tmp_path)


@pytest.mark.parametrize("text", ["{", "[]", '{"colour": 1}'])
def test_a_damaged_recipe_is_named(tmp_path, text):
    (tmp_path / "recipe.json").write_text(text)
    with pytest.raises(ConfigError, match=r"recipe\.json: .*--fresh"):
        enter(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"--runtime\.run_dir: "):
        enter(tmp_path / "file" / "run")


def test_where_and_how_it_was_started(tmp_path):
    write_environment(tmp_path, {"a": 1}, "torchrun", {"test/top1": "top-1"}, ("loss",))
    found = json.loads((tmp_path / "environment.json").read_text())
    assert (found["launcher"], found["world_size"], found["device"]) == ("torchrun", 1, "cpu")
    assert found["metrics"] == {"test/top1": "top-1"}
    assert found["lower_is_better"] == ["loss"]
    assert found["packages"]["torch"]
    assert json.loads((tmp_path / "deepspeed.json").read_text()) == {"a": 1}


def test_the_status_of_a_run_that_has_none_yet(tmp_path):
    assert status_of(tmp_path) is None
    for text, status in (("{", None), ("[]", None), ('{"status": "done"}', "done")):
        (tmp_path / "summary.json").write_text(text)
        assert status_of(tmp_path) == status


def test_rows_end_at_a_torn_line_and_at_the_step(tmp_path):
    file = tmp_path / "metrics.jsonl"
    assert rows_before(file, 9) == []
    file.write_text("".join(f'{{"update": {number}}}\n' for number in range(5)) + '{"update": 5')
    assert [row["update"] for row in rows_before(file, 9)] == [0, 1, 2, 3, 4]
    assert [row["update"] for row in rows_before(file, 3)] == [0, 1, 2]
    file.write_text('{"update": 0}\n{"update": 1}')  # Whole by chance: its end is missing.
    assert [row["update"] for row in rows_before(file, 9)] == [0]


def test_rows_are_cut_off_by_their_bytes_however_they_were_written(tmp_path):
    file = tmp_path / "metrics.jsonl"
    assert cut_before(file, 9) == []
    whole = '{"update":0, "loss":1.50}\n{"update": 1, "note": "é"}\n{ "update": 2 }\n'
    file.write_text(whole + '{"update": 3}\n{"upd', encoding="utf-8")
    assert [row["update"] for row in cut_before(file, 3)] == [0, 1, 2]
    assert file.read_text(encoding="utf-8") == whole


@pytest.mark.parametrize("bad", [b'{"update": 1, "n": "\xff"}', b"[1, 2]", b'{"update": null}'])
def test_a_damaged_line_costs_itself_alone_and_is_named(bad, tmp_path, caplog):
    file = tmp_path / "metrics.jsonl"
    rows = [f'{{"update": {number}}}\n'.encode() for number in range(5)]
    file.write_bytes(rows[0] + bad + b"\n" + b"".join(rows[2:]) + bad)
    assert [row["update"] for row in rows_before(file, 4)] == [0, 2, 3]
    assert not caplog.records, "who reads only says nothing"
    assert [row["update"] for row in cut_before(file, 4)] == [0, 2, 3]
    (warning,) = caplog.messages
    assert f"{file}: line 2 cannot be read" in warning
    assert "LEFT OUT" in warning
    assert file.read_bytes() == rows[0] + rows[2] + rows[3]
    assert [row["update"] for row in cut_before(file, 4)] == [0, 2, 3]
    file.write_bytes(rows[0] + rows[2] + bad + b"\n" + rows[4])
    assert [row["update"] for row in cut_before(file, 4)] == [0, 2]
    assert "line 3" in caplog.messages[-1]
    file.write_bytes(rows[0] + rows[2] + bad + b"\n" + bad)
    assert [row["update"] for row in cut_before(file, 4)] == [0, 2]
    assert len(caplog.messages) == 2, "a torn end is cut off silently"
    assert file.read_bytes() == rows[0] + rows[2]


def test_a_full_disk_is_logged_and_other_errors_are_not_hidden(caplog):
    with written_or_logged("summary.json"):
        raise OSError("No space left on device")
    assert "summary.json: NOT WRITTEN: No space left" in caplog.text
    with pytest.raises(ValueError, match="x"), written_or_logged("summary.json"):
        raise ValueError("x")
