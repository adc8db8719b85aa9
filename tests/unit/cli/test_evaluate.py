"""`evaluate`: its words and its errors; files of detections, and runs that their task scores."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from coco import unpack_coco_tiny

import fd_large
from fd_large.cli import evaluate
from fd_large.cli.main import main
from fd_large.errors import ConfigError
from fd_large.recipes import registry

TINY = "vit_base_patch16=random"


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (["--task", "knn"], ["MODEL is missing"]),
        (["x", "--k", "0"], ["--k:", "got 0"]),
        (["x", "--sead", "3"], ["--sead", "nearest: --seeds"]),
        (["x", "--task", "cnn"], ["--task", "got 'cnn'"]),
        (["x", "--detections", "a.json"], ["MODEL: not used by --detections"]),
        (["--detections", "a.json"], ["--annotations"]),
        (["nowhere", "--task", "knn", "--data.root", "."], ["nowhere"]),
        ([TINY, "--optim.epochs", "99", "--seeds", "2"], ["--optim.epochs: not used", "--seeds"]),
        ([TINY, TINY], ["the same model twice"]),
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
    with pytest.raises(ConfigError, match=r"optim\.base_lr: .*segmentation"):
        evaluate.main(
            [str(tmp_path), "--optim.base_lr", "1", "--task.segmentation.test_flip", "True"]
        )
    with pytest.raises(ConfigError, match=r"optim\.base_lr: .*segmentation"):
        fd_large.evaluate(
            tmp_path,
            data=tmp_path,
            **{"optim.base_lr": 1.0, "task.segmentation.test_flip": True},
        )
    # The value of a flag is no model.
    with pytest.raises(ConfigError, match=r"task\.segmentation"):
        evaluate.main(["no_run", "--out", str(tmp_path), "--task.segmentation.test_flip", "True"])
