"""The command: what it prints, writes and refuses; recipes of record without torch."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from fd_large import doors
from fd_large.cli import main as cli
from fd_large.cli.plan import plan
from fd_large.cli.plan_workload import count_anew, shape_fields
from fd_large.plan import kept_counts
from fd_large.plan.buckets import gradient_bucket
from fd_large.plan.candidate import Candidate
from fd_large.plan.cluster import Cluster
from fd_large.plan.rates import CARDS
from fd_large.plan.search import checkpoint_bytes
from fd_large.recipes import registry

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
    assert "Settings that fit, fastest first (within 1 %: least communication first)" in done.stdout
    assert "36.2 GB per checkpoint" in done.stdout
    written = json.loads((tmp_path / "ds" / "mine.json").read_text())
    assert written["zero_optimization"]["stage"] in (2, 3)


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
        ("--gpus 12", ["--gpus:", "got 12 in nodes of 8"]),
        ("--gpus 0", ["--gpus:", "got 0"]),
        ("--gpus -3", ["--gpus:", "got -3"]),
        ("--network 0", ["--network:"]),
        ("--network nan", ["--network:", "got nan"]),
        ("--nics_per_node -1", ["--nics_per_node:", "got -1, expected 0 or more"]),
        ("--write /", ["--write"]),
        ("--write /proc/none/mine.json", ["--write"]),
        ("--rates /", ["--rates"]),
        ("--gpu h1000 --rows 0", ["nearest: h100", "--rows:"]),
        ("--batch.global_batch_sise 8", ["nearest: batch.global_batch_size"]),
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


@pytest.mark.parametrize("columns", [80, 120])
def test_the_tables_fit_the_terminal(columns, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(columns))
    words = "--recipe fd_swinv2g --gpus 256 --batch.global_batch_size 8192 --rows 30"
    assert cli.main(["plan", *words.split()]) == 0
    told = capsys.readouterr().out
    assert "\N{HORIZONTAL ELLIPSIS}" not in told, "a cell lost its end"
    assert "3 + hpZ" in told
    assert "replicated" in told
    assert ("comm." in told) == (columns == 120)


def test_the_written_json_is_the_shipped_one():
    for name, candidate in (
        ("zero1", Candidate(stage=1)),
        ("zero2", Candidate(stage=2)),
        ("zero3", Candidate(stage=3)),
        ("zero3_hpz", Candidate(stage=3, hpz=True)),
    ):
        shipped = json.loads((ROOT / f"ds_configs/{name}.json").read_text())
        assert candidate.deepspeed() == shipped
    assert gradient_bucket(3_014_600_000) == 100_000_000
    assert gradient_bucket(600_000_000) == 20_000_000


# With fused kernels and without; others are counted in the sweep.
QUICK = {("quickstart", "h100"), ("quickstart", "l40s"), ("fd_clip_vit_base", "h100")}


@pytest.mark.parametrize(
    ("name", "gpu"),
    [
        pytest.param(name, gpu, marks=() if (name, gpu) in QUICK else pytest.mark.sweep)
        for name in registry.RECIPES
        for gpu in ("h100", "l40s")
    ],
)
def test_kept_counts_are_those_of_the_recipe(name, gpu):
    """If this fails: python benchmarks/keep_counts.py."""
    run, rates = registry.get(name), CARDS[gpu]
    kept = kept_counts.read(kept_counts.key(shape_fields(run), rates.capability, "fused"))
    assert kept == count_anew(run, rates, "fused")


@pytest.mark.parametrize("name", registry.RECIPES)
def test_every_recipe_s_counts_are_kept(name):
    """If this fails: python benchmarks/keep_counts.py."""
    fields = shape_fields(registry.get(name))
    for capability in {rates.capability for rates in CARDS.values()}:
        assert kept_counts.read(kept_counts.key(fields, capability, "fused"))


def test_what_changes_a_step_is_counted_anew():
    run = registry.get("fd_clip_vit_base")
    fields = shape_fields(run)
    for change in (
        {"batch": {"global_batch_size": 8192}},
        {"student": {"activation_checkpointing": "every", "init": "hf:some/where"}},
        {"teacher": {"placement": "sharded", "source": "random"}},
    ):
        assert shape_fields(changed(run, change)) == fields
    for change in (
        {"data": {"image_size": 192}},
        {"student": {"checkpoint_every": 2}},
        {"teacher": {"dtype": "float32"}},
        {"objective": {"teacher_image_size": 256}},
    ):
        assert shape_fields(changed(run, change)) != fields


def changed(run, change):
    sections = {name: replace(getattr(run, name), **values) for name, values in change.items()}
    return replace(run, **sections)


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


def test_an_optimiser_of_the_users_own_is_counted_by_what_it_keeps(tmp_path):
    path = tmp_path / "sgd.py"
    path.write_text(
        "import torch\n"
        "def momentum(groups, lr):\n    return torch.optim.SGD(groups, lr=lr, momentum=0.9)\n"
        "def plain(groups, lr):\n    return torch.optim.SGD(groups, lr=lr)\n"
    )
    doors.allow(path)
    run = registry.get("fd_swinv2_base")
    cluster = Cluster(gpus=8, gpus_per_node=8, nic_gigabits=400, nics_per_node=8)
    stored, states = [], []
    for name in ("adamw", f"module:{path}:momentum", f"module:{path}:plain"):
        load, _, good, _ = plan(replace(run, optim=replace(run.optim, name=name)), cluster)
        stored.append(checkpoint_bytes(load) / load.parameters)
        states.append(min(one.memory.states for one in good))
    assert stored == [12, 8, 4]
    assert states == sorted(states, reverse=True)
    assert len(set(states)) == 3
