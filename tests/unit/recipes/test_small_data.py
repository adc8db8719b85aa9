"""What follows from the number of images and devices, and what the user set."""

import pytest

from fd_large.recipes import registry
from fd_large.recipes.fields import override
from fd_large.recipes.small_data import PEAKS, Images, fit, fitted_fields

RECIPE = registry.get("small_data")


@pytest.mark.parametrize(
    ("images", "ranks", "batch", "steps"),
    [
        (20, 1, 16, 400),
        (300, 1, 32, 405),
        (300, 2, 32, 405),
        (300, 3, 33, 405),
        (1_000, 2, 64, 600),
        (10_000, 1, 256, 1_560),
        (60_000, 2, 256, 9_360),
    ],
)
def test_batch_and_length_follow_from_the_images(images, ranks, batch, steps):
    run, line = fit(RECIPE, Images(images), ranks, ())
    assert run.batch.global_batch_size == batch
    assert run.optim.epochs * (images // batch) == steps
    assert run.optim.warmup_epochs * (images // batch) == pytest.approx(0.05 * steps, abs=1)
    assert run.eval.every == run.runtime.save_every == steps // 10
    assert run.optim.rates(batch)[0] == pytest.approx(PEAKS["convolutions"], rel=1e-4)
    assert f"batch {batch} " in line
    assert f"{steps:,} steps" in line
    assert "no image is held out" in line


def test_the_recipe_s_own_numbers_are_those_of_a_thousand_images():
    assert fit(RECIPE, Images(1_000), 1, ())[0] == RECIPE


@pytest.mark.parametrize(
    ("model", "kind"),
    [
        ("timm:resnest14d", "convolutions"),
        ("timm:mobilenetv3_small_100", "convolutions"),
        ("timm:vit_tiny_patch16_224", "attention"),
        ("timm:swin_tiny_patch4_window7_224", "windows"),
        ("vit_base_patch16", "attention"),
        ("swinv2_tiny", "windows"),
    ],
)
@pytest.mark.parametrize("recipe", ["small_data", "quickstart"])
def test_a_student_has_the_rate_of_its_kind(model, kind, recipe):
    own = registry.get(recipe)
    run = own.with_fields({"student.model": model})
    if model == own.student.model:
        assert fitted_fields(run) == ()
        return
    run, line = fit(run, Images(300), 1, ())
    peak, first, last = run.optim.rates(run.batch.global_batch_size)
    assert peak == pytest.approx(PEAKS[kind], rel=1e-3)
    assert 0 < first < last < peak
    assert kind in line
    assert run.optim.max_steps == own.optim.max_steps


def test_what_is_set_stays_and_the_rest_follows_it():
    fields = {"batch.global_batch_size": 100, "optim.base_lr": 0.01, "optim.max_steps": 50}
    run, line = fit(RECIPE.with_fields(fields), Images(300), 1, fields)
    assert {name: getattr(getattr(run, section), name) for section, name in (
        ("batch", "global_batch_size"), ("optim", "base_lr"), ("optim", "max_steps")
    )} == {"global_batch_size": 100, "base_lr": 0.01, "max_steps": 50}  # fmt: skip
    assert run.optim.min_lr == pytest.approx(0.1 * 0.01)
    assert run.eval.every == 20
    assert run.optim.warmup_epochs * 3 == pytest.approx(2.5, rel=1e-3)
    assert "50 steps" in line
    assert "batch 100 (as set)" in line
    assert "learning rate 0.002 (as set)" in line


def test_the_line_tells_the_warm_up_that_is_set():
    fields = {"optim.max_steps": 50, "optim.warmup_epochs": 3.0}
    _, line = fit(RECIPE.with_fields(fields), Images(160), 1, fields)
    assert "50 steps (10 passes)" in line
    assert "warm-up 30%" in line


@pytest.mark.parametrize(
    ("images", "named", "root", "fraction"),
    [
        (Images(300, can_divide=True), (), "FOLDER", 0.1),
        (Images(50, can_divide=True), (), "", 0.0),
        (Images(300), (), "", 0.0),
        (Images(300, tested="FOLDER/val"), (), "FOLDER/val", 0.0),
        (Images(300, can_divide=True), ("eval.root",), "", 0.0),
        (Images(300, can_divide=True), ("data.val_fraction",), "", 0.0),
    ],
)
def test_some_images_are_held_out_where_nobody_says_which(images, named, root, fraction):
    run, _ = fit(override(RECIPE, {"data.root": "FOLDER"}), images, 1, named)
    assert (run.eval.root, run.data.val_fraction) == (root, fraction)


def test_other_recipes_and_students_that_a_recipe_knows_stay():
    assert fitted_fields(registry.get("fd_clip_vit_base")) == ()
    assert fitted_fields(registry.get("quickstart")) == ()
    assert fitted_fields(RECIPE.with_fields({"task.name": "finetune"})) == ()
