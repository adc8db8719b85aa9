"""The command: what it prints, writes and refuses; without torch."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from fd_large.cli import main as cli
from fd_large.plan.candidate import Candidate, bucket_elements

ROOT = Path(__file__).resolve().parents[3]


def test_it_needs_no_torch(tmp_path):
    code = (
        "import sys; from fd_large.cli.main import main;"
        "code = main(['plan', '--recipe', 'fd_swinv2g', '--gpus', '64', '--gpu', 'h100',"
        f" '--network', '400', '--write', {str(tmp_path / 'ds' / 'mine.json')!r}]);"
        "assert not {'torch', 'deepspeed', 'numpy', 'timm'} & set(sys.modules); sys.exit(code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert "64 x H100 SXM 80 GB on 8 nodes, 8 x 400 Gb/s per node" in done.stdout
    assert "Settings that fit, best first" in done.stdout
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
        ("--teacher.model timm --teacher.architecture.timm_name vgg16", ["vgg16"]),
        ("--gpus 1 --gpu a100_40 --recipe fd_swinv2g --write mine.json", ["--write"]),
        ("--recipe finetune_clip_vit_base", ["--recipe"]),
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
    # The same keys and values, but for the bucket of stages 1 and 2, which grows with the net.
    for name, candidate in (
        ("zero1", Candidate(stage=1)),
        ("zero2", Candidate(stage=2)),
        ("zero3", Candidate(stage=3)),
        ("zero3_hpz", Candidate(stage=3, hpz=True)),
    ):
        shipped = json.loads((ROOT / f"ds_configs/{name}.json").read_text())
        assert candidate.deepspeed(28_000_000) == shipped
    assert bucket_elements(2, 3_014_600_000) == 100_000_000
    assert bucket_elements(1, 600_000_000) == 20_000_000
