"""The command: what it writes and refuses, of whatever model; recipes of record without torch."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_runs

from fd_large.cli import main as cli
from fd_large.plan.buckets import gradient_bucket
from fd_large.plan.candidate import Candidate
from fd_large.plan.rates import CARDS

ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.parametrize("gpu", ["h100", "b200"])
def test_a_recipe_of_record_needs_no_torch(gpu, tmp_path):
    code = (
        "import sys; from fd_large.cli.main import main;"
        f"code = main(['plan', '--recipe', 'fd_swinv2g', '--gpus', '64', '--gpu', '{gpu}',"
        f" '--network', '400', '--write', {str(tmp_path / 'ds' / 'mine.json')!r}]);"
        "assert not {'torch', 'deepspeed', 'numpy', 'timm'} & set(sys.modules); sys.exit(code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert f"64 x {CARDS[gpu].name} on 8 nodes, 8 x 400 Gb/s per node" in done.stdout
    assert ("fused kernels" in done.stdout) == (gpu == "h100")
    assert "\n(within 1 %: least communication first)" in done.stdout
    assert "36.2 GB per checkpoint" in done.stdout
    written = json.loads((tmp_path / "ds" / "mine.json").read_text())
    assert written["zero_optimization"]["stage"] in (2, 3)
    assert f"pass:\n  --deepspeed_config zero{written['zero_optimization']['stage']}" in done.stdout
    assert done.stdout.endswith(f"--deepspeed_config {tmp_path}/ds/mine.json\n")


def test_the_recipes_own_flags_and_what_does_not_fit(capsys):
    words = "--recipe fd_swinv2g --gpus 2 --gpu a100_40 --batch.global_batch_size 4096 --rows 3"
    assert cli.main(["plan", *words.split()]) == 0
    told = capsys.readouterr().out
    assert "4096 images per step" in told
    assert "Settings that do not fit" in told
    assert "GB for one image" in told


@pytest.mark.parametrize(
    ("words", "found"),
    [
        ("--gpus 12", ["--gpus:", "got 12 GPUs in nodes of 8"]),
        ("--gpus 0", ["--gpus:", "got 0"]),
        ("--gpus -3", ["--gpus:", "got -3"]),
        ("--network 0", ["--network:"]),
        ("--network nan", ["--network:", "got nan"]),
        ("--nics_per_node -1", ["--nics_per_node:", "got -1, expected 0 or more"]),
        ("--write /", ["--write"]),
        ("--write /proc/none/mine.json", ["--write"]),
        ("--rates /", ["--rates"]),
        ("--gpu h1000 --rows 0", ["nearest: h100", "--rows:"]),
        ("--batch.global_batch_sise 8", ["nearest: --batch.global_batch_size"]),
        ("--gpus 24 --recipe fd_swinv2g", ["Set --batch.global_batch_size 2040"]),
        ("--teacher.model timm:vgg61", ["vgg61"]),
        ("--teacher.model auto --teacher.source random", ["teacher.model", "--teacher.source"]),
        ("--teacher.source module:gone.py:Toy", ["--teacher.source", "gone.py"]),
        ("--data.image_size 96", ["student.size_rule"]),
        ("--gpus 1 --gpu a100_40 --recipe fd_swinv2g --write mine.json", ["--write"]),
    ],
)
def test_mistakes_name_the_flag(words, found, capsys):
    assert cli.main(["plan", *words.split()]) == 2
    said = " ".join(capsys.readouterr().err.split())
    for part in found:
        assert part in said


def test_the_written_json_is_the_shipped_one():
    for name, candidate in (
        ("zero1", Candidate(stage=1)),
        ("zero2", Candidate(stage=2)),
        ("zero3", Candidate(stage=3)),
        ("zero3_hpz", Candidate(stage=3, hpz=True)),
    ):
        shipped = json.loads((ROOT / f"ds_configs/{name}.json").read_text())
        assert candidate.deepspeed() == shipped
        assert candidate.shipped_config == name
    assert Candidate(stage=0).shipped_config == "zero1"
    assert gradient_bucket(3_014_600_000) == 100_000_000
    assert gradient_bucket(600_000_000) == 20_000_000


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("--teacher.model timm:test_convnext2", "teacher timm:test_convnext2: 0.3M"),
        ("--teacher.source timm:test_convnext2", "teacher timm:test_convnext2: 0.3M"),
        ("--teacher.source module:{file}:Toy", "toy.py:Toy: 0.0M parameters, 0.0 GFLOP"),
        ("--student.model timm:test_convnext2", "student timm:test_convnext2: 0."),
        ("--teacher.model module:{file}:Toy", "0.0M parameters, 0.0 GFLOP"),
        ("--student.model module:{file}:Toy", "0.0M parameters with its"),
    ],
)
def test_any_model_can_be_planned(words, told, tmp_path, capsys):
    own = tmp_path / "toy.py"
    own.write_text(TOY)
    words = f"--gpus 1 --objective.interpolation bilinear {words.format(file=own)}"
    assert cli.main(["plan", *words.split()]) == 0
    assert told in capsys.readouterr().out


def test_a_plan_takes_the_weights_that_training_takes(tmp_path, capsys):
    run = tiny_runs.tiny_run()
    tiny_runs.store_task(tmp_path / "mine", run, tiny_runs.tiny_task(run))
    words = ["plan", "--gpus", "1", "--student.init", str(tmp_path / "mine")]
    assert cli.main([*words, "--recipe", "finetune_swinv2_base"]) == 2
    told = " ".join(capsys.readouterr().err.split())
    assert "--student.init: " in told
    assert "not the model of the run; got depths 2 2 instead of 2 2 18 2, embed_dim 16" in told
    for name in ("embed_dim", "patch_size", "window_size"):
        words += [f"--student.architecture.{name}", str(getattr(tiny_runs.SWIN, name))]
    words += ["--student.architecture.depths", "2", "2", "--data.image_size", "32"]
    assert cli.main([*words, "--student.architecture.num_heads", "2", "4"]) == 0
    assert "student swinv2_tiny: 0.0M parameters" in capsys.readouterr().out


TOY = """
from torch import nn

from fd_large.backbones.feature_map import FeatureMap


class Toy(nn.Module):
    width, num_prefix_tokens, drop_path_rates = 8, 0, ()

    def __init__(self):
        super().__init__()
        self.patches = nn.Conv2d(3, 8, 16, stride=16)

    def blocks(self):
        return [self.patches]

    def grid(self, height, width):
        return height // 16, width // 16

    def forward(self, images, keep=None):
        x = self.patches(images)
        return FeatureMap(x.flatten(2).transpose(1, 2), tuple(x.shape[-2:]), 0)
"""
