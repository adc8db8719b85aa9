"""Sections of a run are checked when they are made."""

from __future__ import annotations

import pytest

from fd_large.errors import ConfigError
from fd_large.recipes.sections import Batch, Data, Engine, Optim, Runtime, Student
from fd_large.tasks.distillation.section import Objective, Teacher


@pytest.mark.parametrize(
    ("section", "field", "value"),
    [
        (Student, "drop_path_rate", 1.0),
        (Student, "drop_path_rate", float("nan")),
        (Student, "checkpoint_every", 0),
        (Student, "size_rule", "crop"),
        (Student, "shift_stages", (True, False)),  # Without the official rule.
        (Student, "stage_windows", (30, 15)),
        (Teacher, "placement", "host"),
        (Data, "image_size", 0),
        (Data, "min_crop_scale", 0.0),
        (Data, "workers", -1),
        (Data, "max_bad_fraction", 1.0),
        (Data, "max_bad_fraction", -0.1),
        (Data, "max_pixels", 0),
        (Data, "color_jitter", 1.5),
        (Data, "grayscale_probability", -0.1),
        (Objective, "beta", 0.0),
        (Objective, "whitening_eps", float("inf")),
        (Optim, "base_lr", -1.0),
        (Optim, "base_lr", 1e-6),  # Below min_lr.
        (Optim, "betas", (0.9, 1.0)),
        (Optim, "betas", (0.9,)),
        (Optim, "warmup_epochs", 300.0),  # As long as the run.
        (Optim, "max_steps", -1),
        (Optim, "drops", (0.75,)),  # Without steps.
        (Batch, "global_batch_size", 0),
        (Batch, "micro_batch_size", "big"),
        (Batch, "micro_batch_size", 1000),  # Does not divide 2048.
        (Engine, "precision", "float16"),
        (Runtime, "seed", -1),
        (Runtime, "log_every", 0),
    ],
)
def test_a_section_refuses_a_value_and_names_the_field(section, field, value):
    needed = {"model": "x"} if section is Student else {}
    with pytest.raises(ConfigError, match=rf"^{section.__name__.lower()}\.{field}: .*; got .*\.$"):
        section(**needed, **{field: value})


def test_max_steps_may_be_shorter_than_the_warmup_of_the_epochs():
    assert Optim(epochs=1, warmup_epochs=10, max_steps=5).max_steps == 5


def test_rates_scale_with_the_global_batch():
    # Published: 3e-4 / 5e-7 / 5e-6 per 512 images are 1.2e-3 / 2e-6 / 2e-5 at 2048.
    assert Optim().rates(2048) == pytest.approx((1.2e-3, 2e-6, 2e-5), rel=1e-12)
