"""The recipe in the folder of a run, or one sentence."""

from __future__ import annotations

import json

import pytest

from fd_large.errors import ConfigError
from fd_large.recipes import registry
from fd_large.recipes.small_data import Images, fit
from fd_large.recipes.stored import (
    read_recipe,
    require_same_settings,
    run_of_checkpoint,
    with_stored_ends,
)


def test_a_stored_recipe_is_the_same_run(tmp_path):
    run = registry.get("quickstart")
    (tmp_path / "recipe.json").write_text(json.dumps(run.to_dict()))
    assert read_recipe(tmp_path, where="report") == run


def test_a_checkpoint_belongs_to_its_run(tmp_path):
    checkpoint = tmp_path / "checkpoints" / "best"
    assert run_of_checkpoint(checkpoint) == checkpoint
    (tmp_path / "recipe.json").write_text("{}")
    assert run_of_checkpoint(checkpoint) == tmp_path
    assert run_of_checkpoint(str(tmp_path)) == tmp_path


@pytest.mark.parametrize("text", [None, "", "{", "[]", "3", '{"student": {"model": "no"}}', "{}"])
def test_what_is_none_is_named(tmp_path, text):
    if text is not None:
        (tmp_path / "recipe.json").write_text(text)
    with pytest.raises(ConfigError, match=r"^report: .*recipe\.json"):
        read_recipe(tmp_path, where="report")


def test_the_folder_of_several_students_names_theirs(tmp_path):
    for folder in (tmp_path, tmp_path / "students" / "a"):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "recipe.json").write_text(json.dumps(registry.get("quickstart").to_dict()))
    with pytest.raises(ConfigError, match=rf"several .*{tmp_path}/students/a\."):
        read_recipe(tmp_path, where="export")
    assert read_recipe(tmp_path / "students" / "a", where="export").name == "quickstart"


def test_other_settings_are_told_before_weights_are_open(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    here = {"runtime.run_dir": str(folder)}
    run = registry.get("quickstart").with_fields(here)
    # As a run stores it: completed by its weights.
    numbers = {"objective.interpolation": "none", "objective.teacher_image_size": 0}
    settled = run.with_fields(numbers)
    (folder / "recipe.json").write_text(json.dumps(settled.to_dict()))
    require_same_settings(run)
    require_same_settings(run.with_fields({"runtime.log_every": 3}))
    for field, value in {"runtime.seed": 5, "optim.base_lr": 1.0, "objective.loss": "l1"}.items():
        with pytest.raises(ConfigError, match=rf"other settings.*{field} "):
            require_same_settings(run.with_fields({field: value}))
    # A length alone may be changed in ways that the sentence names.
    with pytest.raises(ConfigError, match=r"optim\.max_steps .*larger"):
        require_same_settings(run.with_fields({"optim.max_steps": 5}))
    require_same_settings(run.with_fields({"optim.max_steps": 3000}))
    # Whoever enters the folder says what is wrong with it.
    (folder / "recipe.json").write_text("null")
    require_same_settings(run.with_fields({"runtime.seed": 5}))
    require_same_settings(run.with_fields({"runtime.run_dir": str(tmp_path / "new")}))


def test_a_run_goes_on_with_the_ends_that_it_began_with(tmp_path):
    """Those of an earlier version did not follow the rate."""
    recipe = registry.get("quickstart")
    ends = {"warmup_lr": recipe.optim.warmup_lr, "min_lr": recipe.optim.min_lr}
    stored = recipe.to_dict()
    stored["optim"] |= {"base_lr": 0.25}
    (tmp_path / "recipe.json").write_text(json.dumps(stored))
    now = recipe.with_fields({"optim.base_lr": 0.25, "runtime.run_dir": str(tmp_path)})
    assert now.optim.min_lr != ends["min_lr"]

    def ends_of(run, named=("optim.base_lr",)):
        optim = with_stored_ends(run, named).optim
        return {"warmup_lr": optim.warmup_lr, "min_lr": optim.min_lr}

    assert ends_of(now) == ends
    require_same_settings(with_stored_ends(now, ["optim.base_lr"]))
    # What is set is as it is set; another rate is another run; a new folder has none.
    assert ends_of(now, ["optim.min_lr"]) == ends | {"min_lr": now.optim.min_lr}
    for fields in ({"optim.base_lr": 0.5}, {"runtime.run_dir": str(tmp_path / "new")}):
        other = now.with_fields(fields)
        assert with_stored_ends(other, []) == other
    (tmp_path / "recipe.json").write_text("null")
    assert with_stored_ends(now, []) == now


def test_a_run_goes_on_with_what_followed_from_its_images(tmp_path):
    here = {"runtime.run_dir": str(tmp_path), "optim.base_lr": 0.01}
    asked = registry.get("small_data").with_fields(here)
    begun, _ = fit(asked, Images(300, can_divide=True), 2, here)
    (tmp_path / "recipe.json").write_text(json.dumps(begun.to_dict()))
    assert with_stored_ends(asked, here) == begun
    assert with_stored_ends(asked, [*here, "optim.epochs"]).optim.epochs == asked.optim.epochs
    # Another student is refused for itself alone, another recipe has its own numbers.
    other = asked.with_fields({"student.model": "swinv2_tiny"})
    assert with_stored_ends(other, here).batch == begun.batch
    other = asked.with_fields({"task.name": "finetune"})
    assert with_stored_ends(other, here).batch == asked.batch


def test_what_followed_from_images_is_not_taken_for_others(tmp_path):
    images, elsewhere = tmp_path / "images", tmp_path / "elsewhere"
    images.mkdir()
    here = {"runtime.run_dir": str(tmp_path), "data.root": str(images)}
    asked = registry.get("small_data").with_fields(here)
    begun, _ = fit(asked, Images(300, can_divide=True), 1, here)
    (tmp_path / "recipe.json").write_text(json.dumps(begun.to_dict()))
    with pytest.raises(ConfigError, match=r"data\.root '.*elsewhere'.*--runtime\.run_dir"):
        with_stored_ends(asked.with_fields({"data.root": str(elsewhere)}), here)
    elsewhere.symlink_to(images)
    moved = asked.with_fields({"data.root": str(elsewhere)})
    assert with_stored_ends(moved, here).batch == begun.batch


def test_several_students_go_on_with_the_ends_that_they_began_with(tmp_path):
    """Those of an earlier version had the ends of all."""
    here = {"runtime.run_dir": str(tmp_path), "students.a.base_lr": 0.256}
    now = registry.get("quickstart").with_fields(here)
    stored = now.to_dict()
    for name in ("warmup_lr", "min_lr"):
        del stored["students"]["a"][name]
    (tmp_path / "recipe.json").write_text(json.dumps(stored))
    run = with_stored_ends(now, here)
    require_same_settings(run)
    assert run.each_student()["a"].optim.min_lr == registry.get("quickstart").optim.min_lr
    assert with_stored_ends(now, [*here, "students.a.min_lr"]).students["a"].min_lr == 0.128
