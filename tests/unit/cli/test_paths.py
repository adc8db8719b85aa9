"""Paths that are not there are told before torch is imported."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from fd_large import doors
from fd_large.cli.paths import (
    paths_of,
    paths_of_models,
    require_apart,
    require_paths,
    require_sources,
)
from fd_large.cli.train import train_run
from fd_large.errors import ConfigError
from fd_large.recipes import registry
from fd_large.recipes.fields import override

ROOT = Path(__file__).resolve().parents[3]
MISTAKES = {
    "train --deepspeed_config zero4": ["--deepspeed_config"],
    "train --deepspeed_config zero3 --data.root /no/a --eval.root /no/b --teacher.source no.pt": [
        *("data.root", "eval.root", "teacher.source"),
    ],
    "train --deepspeed_config zero3 --student.init /no/run": ["student.init"],
    "train --deepspeed_config wrong.json --optim.epoch 1": ["wrong.json: a", "--optim.epoch"],
    # What JSON and recipe say of one thing.
    "train --deepspeed_config own.json --engine.precision float32 --engine.nvme_path /disk"
    " --data.root /no/a": [
        *("gradient_clipping", "train_batch_size", "bf16.enabled", "engine.nvme_path", "data.root"),
    ],
    "transfer --deepspeed_config wrong.json": ["wrong.json: a"],
    # Mistyped names make teachers of their own.
    "train --deepspeed_config zero3 --teachers.coarse.source no.pt --teachers.corse.beta 1": [
        *("teachers.coarse.source", "teachers.corse"),
    ],
    "cache theia_vit_base out --teachers.clpi.source random": ["teachers.clip.source"],
    "evaluate no/run#teacher vit=no.pt --data.root /no/a": [
        *("model no/run#teacher", "model vit=no.pt", "data.root"),
    ],
    "train --deepspeed_config zero3 --data.root= --teacher.source tim:x --objective.loss smoth": [
        *("data.root", "--teacher.source", "objective.loss"),
    ],
    "train --deepspeed_config zero3 --data.root mist.py:run --student.model timm:resnte50": [
        *("data.root", "student.model"),
    ],
    # What would take the machine down.
    "train --deepspeed_config zero3 --recipe quickstart --data.workers 100000": ["data.workers"],
    "evaluate x=random --data.workers 100000": ["data.workers"],
    "cache quickstart out --data.root builtin:photographs --data.workers 100000": ["data.workers"],
    "diagnose no/run --data.root /no/a": ["model no/run", "data.root"],
    "plan --recipe linear_probe --student.init no/run": ["student.init"],
    "weights inspect no.pt": ["weights inspect"],
    "weights convert no.pt out --to timm": ["weights convert"],
    "export no/run out --to timm": ["export"],
    "report no/run": ["report"],
    "predict no/run no.jpg": ["predict"],
    "replay no/incident": ["replay"],
    "checkpoint list no/run": ["checkpoint"],
}


def test_wrong_paths_are_told_at_once_and_before_torch(tmp_path):
    program = """
import json, sys
from fd_large.cli.main import main
for line in json.loads(sys.argv[1]):
    print(f"# {main(line.split())} {'torch' in sys.modules}", file=sys.stderr)
"""
    (tmp_path / "wrong.json").write_text('{"a": 1}')
    (tmp_path / "own.json").write_text(
        '{"gradient_clipping": 7, "train_batch_size": 3, "bf16": {"enabled": true}}'
    )
    done = subprocess.run(
        [sys.executable, "-c", program, json.dumps(list(MISTAKES))],
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT), "PATH": ""},
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    *told, rest = re.split(r"^# (?:2 False)$", done.stderr, flags=re.MULTILINE)
    assert not rest.strip()
    for line, text, wanted in zip(MISTAKES, told, MISTAKES.values(), strict=True):
        assert len(text.strip().splitlines()) == len(wanted), line
        for what in wanted:
            assert f"{what}: " in text, line


def test_what_is_no_path_or_is_there_passes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lr=1e-3").mkdir()
    (tmp_path / "image.tar").touch()
    monkeypatch.setattr(doors, "installed", lambda kind: {"ours": None})
    for text in (
        *("", "random", "hf:owner/name", "timm:vit_tiny=random", "module:no.py:f", "s3://a/b"),
        *("builtin:photographs", "train-{0..9}.tar", "train-*.tar", "ours", "image.tar"),
    ):
        require_paths({"data.root": text})
    require_paths(paths_of_models(["lr=1e-3", "lr=1e-3#student", "vit=image.tar", "x=random"]))
    with pytest.raises(ConfigError, match="theirs"):
        require_paths({"data.root": "theirs"})


def test_every_node_tells_its_own(monkeypatch):
    for rank, local_rank, tells in (("0", "0", True), ("1", "1", False), ("8", "0", True)):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("LOCAL_RANK", local_rank)
        with pytest.raises(ConfigError) as caught:
            require_paths({"data.root": "/no/a"})
        assert caught.value.rank_local is tells


def test_recipes_of_record_name_nothing_that_is_missing():
    for name in registry.RECIPES:
        require_paths(paths_of(registry.get(name)))


def test_a_teacher_without_weights_is_told_with_the_nearest_name():
    recipe = registry.get("quickstart")
    fields = {"teachers.coarse.source": "random", "teachers.corse.beta": 1.0}
    with pytest.raises(ConfigError, match=r"^teachers\.corse: .*nearest: coarse") as caught:
        require_sources(recipe.with_fields(fields))
    assert "random" not in str(caught.value), "it shows no model"
    fields |= {"teachers.corse.model": "clip_vit_base_patch16"}
    with pytest.raises(ConfigError, match=r"hf:REPO.*cached:FOLDER or random"):
        require_sources(recipe.with_fields(fields))
    require_sources(recipe.with_fields(fields | {"teachers.corse.source": "random"}))


@pytest.mark.parametrize("field", ["data.root", "eval.root"])
def test_a_folder_of_images_is_no_folder_of_a_run(field, tmp_path, monkeypatch):
    (tmp_path / "all" / "images").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)

    def start(folder, fresh):
        fields = {field: str(tmp_path / "all/images"), "runtime.run_dir": folder}
        require_apart(override(registry.get("quickstart"), fields), fresh=fresh)

    for fresh in (False, True):
        with pytest.raises(ConfigError, match=f"images of {field}"):
            start("all/images", fresh)
        start("all/images/run", fresh)
        start("run", fresh)
    start("all", fresh=False)
    with pytest.raises(ConfigError, match=f"a parent folder of {field}"):
        start("all", fresh=True)


def test_training_refuses_it_before_anything_is_written(tmp_path):
    images = {"data.root": str(tmp_path), "runtime.run_dir": str(tmp_path)}
    with pytest.raises(ConfigError, match=r"--runtime\.run_dir: .*images"):
        train_run(override(registry.get("quickstart"), images), deepspeed_config="zero3")
    assert not any(tmp_path.iterdir())


def test_a_part_of_a_file_is_a_path_and_a_name_may_have_such_a_mark(tmp_path):
    for name in ("weights.pth", "images#1"):
        (tmp_path / name).touch()
    require_paths({"a": f"{tmp_path}/weights.pth#teacher", "b": f"{tmp_path}/images#1"})
    with pytest.raises(ConfigError, match=r"^a: .*expected module:.*/mist\.py:run"):
        require_paths({"a": f"{tmp_path}/mist.py:run"})
    with pytest.raises(ConfigError, match=r"^a: .*file"):
        require_paths({"a": f"{tmp_path}/gone.pth#teacher"})
