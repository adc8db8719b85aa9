"""Names that stand for nothing, told before torch is imported."""

from __future__ import annotations

import subprocess
import sys

import pytest

from fd_large.cli.train import require_names
from fd_large.errors import ConfigError
from fd_large.recipes import registry
from fd_large.recipes.run import Run

DETECTOR = "coco_mask_rcnn_swinv2_base"
SEVERAL = {"teachers.a.source": "a", "teachers.b.source": "b"}


def run_with(fields: dict[str, object], recipe: str = "quickstart") -> Run:
    return registry.get(recipe).with_fields(fields)


@pytest.mark.parametrize("name", registry.RECIPES)
def test_every_recipe_passes(name):
    require_names(registry.get(name))


@pytest.mark.parametrize(
    "fields",
    [
        {"objective.loss": "0.9 cosine + 0.1 smooth_l1"},
        {"objective.normaliser": "phi_s", "objective.head": "ladder"},
        {
            "optim.name": "lars",
            "runtime.trackers": ("wandb", "mlflow"),
            "optim.betas": (0.9, 0.999),
        },
        {"eval.best_metric": "unseen_crops_cosine"},
        {**SEVERAL, "eval.best_metric": "held_out_a_loss"},
        {**SEVERAL, "teachers.a.targets": ("map", "summary"), "teachers.a.summary.loss": "queue"},
    ],
)
def test_names_of_the_package_pass(fields):
    require_names(run_with(fields))


def test_all_that_stand_for_nothing_are_told_at_once(tmp_path):
    fields = {
        "objective.loss": "smoth_l1",
        "objective.head": "mlpp",
        "objective.normaliser": "whitning",
        "optim.name": "adamv",
        "runtime.trackers": ("tensorboard", "wandbb"),
        "eval.best_metric": "held_out_los",
    }
    with pytest.raises(ConfigError) as caught:
        require_names(run_with(fields))
    lines = dict(line.split(": ", 1) for line in str(caught.value).splitlines())
    assert lines.keys() == fields.keys()
    nearest = ("smooth_l1", "mlp", "whitening", "adamw", "wandb", "held_out_loss")
    for field, name in zip(fields, nearest, strict=True):
        assert f"nearest: {name}" in lines[field]


@pytest.mark.parametrize(
    ("fields", "recipe", "field"),
    [
        ({"objective.loss": "0.9 cosin + 0.1 l1"}, "quickstart", "objective.loss"),
        ({"objective.loss": "0.9 cosine 0.1"}, "quickstart", "objective.loss"),
        ({"objective.loss": "losses.py:mine"}, "quickstart", "objective.loss"),
        ({"objective.loss": "module:no/such.py:mine"}, "quickstart", "objective.loss"),
        ({**SEVERAL, "teachers.b.head": "liner"}, "quickstart", "teachers.b.head"),
        (
            {**SEVERAL, "teachers.b.targets": ("summary",), "teachers.b.summary.loss": "sine"},
            *("quickstart", "teachers.b.summary.loss"),
        ),
        ({"task.detection.heads": "mask_rcn"}, DETECTOR, "task.detection.heads"),
        ({"task.segmentation.head": "upper"}, "ade20k_upernet_vit_base", "task.segmentation.head"),
        ({"eval.best_metric": "held_out_loss"}, DETECTOR, "eval.best_metric"),
        ({"eval.best_metric": "test_top2"}, "linear_probe", "eval.best_metric"),
    ],
)
def test_a_name_that_stands_for_nothing_is_refused_by_its_field(fields, recipe, field):
    with pytest.raises(ConfigError, match=rf"^{field}: "):
        require_names(run_with(fields, recipe))


def test_a_command_tells_it_without_torch(tmp_path):
    flags = ["--objective.loss", "smoth_l1", "--task.name", "distillation", "--optim.name", "sgd"]
    program = (
        "import sys; from fd_large.cli.main import main\n"
        f"code = main(['train', '--deepspeed_config', 'zero1', *{flags}])\n"
        "assert code == 2, code\n"
        "assert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, cwd=tmp_path, timeout=60)
