"""Names that stand for nothing, told before torch is imported."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from PIL import Image

from fd_large.cli.main import main
from fd_large.cli.train import _fitted, require_names
from fd_large.errors import ConfigError
from fd_large.recipes import registry
from fd_large.recipes.fields import override
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


@pytest.mark.parametrize(
    ("flags", "code", "told"),
    [
        ("--check 64", 0, "64 ranks; 2048 images per step, 32 per micro-batch"),
        ("--check 512", 2, "expected a multiple of 16384 (512 x 32)"),
        ("--check 512 --batch.global_batch_size 16384", 0, "512 ranks; 16384 images"),
        ("--check 512 --batch.micro_batch_size auto", 0, "auto per micro-batch"),
        ("--check 6 --batch.micro_batch_size auto", 2, "batch.global_batch_size: "),
        ("--check 64 --optim.name adamv", 2, "optim.name: "),
        ("--check 64 --data.root /no/such", 2, "data.root: "),
        ("--check -1", 2, "--check: "),
        # Its batch follows from its images, unless it is named.
        ("--check 7 --recipe small_data", 0, "7 ranks; the size of the dataset decides"),
        ("--check 7 --recipe small_data --batch.global_batch_size 64", 2, "multiple of 7 (7 x 1)"),
        ("--check 7 --recipe small_data --batch.global_batch_size 63", 0, "7 ranks; 63 images"),
    ],
)
def test_a_check_for_many_ranks_trains_nothing(flags, code, told, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = "--recipe fd_swinv2g --deepspeed_config zero2 --teacher.source random"
    given = ["train", *words.split(), "--data.root", "builtin:photographs", *flags.split()]
    assert main(given) == code
    said = capsys.readouterr()
    assert told in " ".join((said.out + said.err).split())
    assert not list(tmp_path.iterdir())


def test_a_check_knows_the_batch_of_a_run_file_and_of_a_stored_run(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file, folder = tmp_path / "mine.yaml", tmp_path / "run"
    file.write_text("name: small_data\nbatch: {global_batch_size: 64}\n")
    words = f"--deepspeed_config zero2 --data.root builtin:photographs --runtime.run_dir {folder}"
    check = ["train", *words.split(), "--check", "7"]
    assert main([*check, "--config", str(file)]) == 2
    fields = {"data.root": "builtin:photographs", "runtime.run_dir": str(folder)}
    stored = run_with({**fields, "batch.global_batch_size": 96}, "small_data")
    folder.mkdir()
    (folder / "recipe.json").write_text(json.dumps(stored.to_dict()))
    assert main([*check, "--recipe", "small_data"]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "got global_batch_size 64 " in said
    assert "got global_batch_size 96 " in said
    assert main([*check, "--recipe", "small_data", "--fresh"]) == 0


def test_what_follows_from_images_is_decided_in_a_new_folder_alone(tmp_path):
    images = tmp_path / "images"
    images.mkdir()
    for number in range(120):
        Image.new("RGB", (8, 8)).save(images / f"{number}.png")
    folder = tmp_path / "run"
    fields = {"data.root": str(images), "runtime.run_dir": str(folder), "optim.epochs": 7}
    asked = run_with(fields, "small_data")
    run = _fitted(asked, fields, fresh=False)
    assert (run.optim.epochs, run.batch.global_batch_size) == (7, 32)
    assert (run.eval.root, run.data.val_fraction) == (str(images), 0.1)
    folder.mkdir()
    (folder / "recipe.json").write_text("{}")
    assert _fitted(asked, fields, fresh=False) == asked
    assert _fitted(asked, fields, fresh=True) == run
    # Whoever opens the images says what is wrong with them.
    lost = override(asked, {"data.root": str(tmp_path / "lost")})
    assert _fitted(lost, fields, fresh=True) == lost
    parts = {"data.root": str(tmp_path / "parts")}
    for part in ("train", "val"):
        (tmp_path / "parts" / part).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / "parts" / part / "a.png")
    divided = _fitted(override(asked, parts), fields, fresh=True)
    assert (divided.eval.root, divided.data.val_fraction) == (f"{tmp_path}/parts/val", 0.0)
