"""What `checkpoint list|verify|prune` shows and removes."""

import json

import pytest

from fd_large.checkpoint import inspection, store
from fd_large.checkpoint.lease import OWNER
from fd_large.errors import CheckpointError, ConfigError


def test_list_verify_and_prune(folder, stored, updates_left, lease):
    with pytest.raises(ConfigError, match="complete checkpoint"):
        inspection.stored_of(str(folder))
    stored(2, 4, 5, 6)
    _, found = inspection.stored_of(str(folder))
    assert [row["update"] for row in inspection.rows(found)] == [2, 4, 5, 6]
    assert inspection.verify_all(found) == inspection.without_manifest(folder) == []
    removed = inspection.prune_run(folder, None, lease)
    assert [path.name for path in removed] == ["step_00000002"]
    inspection.prune_run(folder, 1, lease)
    assert updates_left() == [4, 6]


def test_prune_removes_nothing_once_another_start_owns_the_folder(
    folder, stored, updates_left, lease
):
    stored(2, 5, 6)
    (folder / OWNER).write_text('{"start": "other", "host": "n7"}')
    assert inspection.prune_run(folder, 1, lease) == []
    assert updates_left() == [2, 5, 6]


@pytest.mark.parametrize("runtime", [{"keep_last": 2}, {"keep_every": 4, "keep_last": "2"}, [], {}])
def test_prune_refuses_a_recipe_that_does_not_say_what_to_keep(folder, stored, lease, runtime):
    (folder / "recipe.json").write_text(json.dumps({"runtime": runtime}))
    stored(4, 6)
    with pytest.raises(ConfigError, match=r"recipe\.json.*keep_last.*keep_every"):
        inspection.prune_run(folder, 1, lease)


def test_what_prune_and_verify_refuse_and_name(folder, stored, lease):
    newest = stored(4, 6)
    (newest / store.file_of(0)).unlink()
    with pytest.raises(ConfigError, match="keep_last"):
        inspection.prune_run(folder, 0, lease)
    with pytest.raises(CheckpointError, match=newest.name):
        inspection.prune_run(folder, 1, lease)
    _, found = inspection.stored_of(str(folder))
    (problem,) = inspection.verify_all(found)
    assert str(newest) in problem
    (newest / "manifest.json").unlink()
    assert [newest.name in text for text in inspection.without_manifest(folder)] == [True]
    with pytest.raises(ConfigError, match=r"recipe\.json"):
        inspection.stored_of(str(folder / "none"))
