"""Every command by every path that is broken: a sentence and exit code 2, no traceback, no wait."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pyarrow
import pytest
from command_server import CommandServer
from launch import ROOT
from pictures import write_pictures
from pyarrow import parquet
from tiny_runs import vit_file

from fd_large.cli.main import COMMANDS
from fd_large.ranks.launch import RANK_VARIABLES

pytestmark = pytest.mark.sweep

TRAIN = "train --deepspeed_config zero3 --optim.max_steps 1"
RUN = "--runtime.run_dir {here}/new"
SEGMENTATION = f"{TRAIN} --recipe ade20k_linear --data.root {{images}} {RUN}"
DEPTH = f"{TRAIN} --recipe nyuv2_linear --data.root {{images}} {RUN}"

# Commands that take no path.
WITHOUT_PATHS = {"recipes", "models"}
# Commands with a hole for a path that is read.
READ = {
    "train --config": f"{TRAIN} {RUN} --config {{}}",
    "train --deepspeed_config": f"train {RUN} --deepspeed_config {{}}",
    "train --allow_code": f"{TRAIN} {RUN} --allow_code {{}}",
    "train --data.root": f"{TRAIN} {RUN} --data.root {{}}",
    "train --teacher.source": f"{TRAIN} {RUN} --data.root {{images}} --teacher.source {{}}",
    "train --student.init": f"{TRAIN} {RUN} --student.init {{}}",
    "train --student.model": f"{TRAIN} {RUN} --student.model module:{{}}:made",
    "train --objective.loss": f"{TRAIN} {RUN} --objective.loss module:{{}}:made",
    "train --objective.target_statistics": (
        f"{TRAIN} {RUN} --objective.normaliser standardise --objective.target_statistics {{}}"
    ),
    "train --eval.root": f"{TRAIN} {RUN} --eval.root {{}}",
    "train --eval.knn_root": f"{TRAIN} {RUN} --eval.knn_root {{}}",
    "train --teacher.source cached": f"{TRAIN} {RUN} --teacher.source cached:{{}}",
    "train segmentation.classes": f"{SEGMENTATION} --task.segmentation.classes {{}}",
    "train segmentation.head_init": f"{SEGMENTATION} --task.segmentation.head_init {{}}",
    "train depth.train_list": f"{DEPTH} --task.depth.train_list {{}}",
    "train depth.val_list": f"{DEPTH} --task.depth.val_list {{}}",
    "statistics --config": "statistics --deepspeed_config zero3 --out {here}/s --config {}",
    "statistics --deepspeed_config": "statistics --out {here}/s --deepspeed_config {}",
    "statistics --data.root": "statistics --deepspeed_config zero3 --out {here}/s --data.root {}",
    "cache --config": "cache quickstart {here}/c --config {}",
    "cache --data.root": "cache quickstart {here}/c --data.root {}",
    "plan --config": "plan --config {}",
    "plan --rates": "plan --rates {}",
    "report": "report {}",
    "runs": "runs {}",
    "checkpoint list": "checkpoint list {}",
    "checkpoint verify": "checkpoint verify {}",
    "checkpoint prune": "checkpoint prune {}",
    "checkpoint export": "checkpoint export {} {here}/o --deepspeed_config zero3",
    "checkpoint export --deepspeed_config": (
        "checkpoint export {run} {here}/o --deepspeed_config {}"
    ),
    "checkpoint import": "checkpoint import {} {run} --deepspeed_config zero3",
    "checkpoint import RUN": "checkpoint import {run} {} --deepspeed_config zero3",
    "checkpoint import --deepspeed_config": "checkpoint import {run} {run} --deepspeed_config {}",
    "weights inspect": "weights inspect {}",
    "weights convert": "weights convert {} {here}/o --to fd",
    "export": "export {} {here}/o --to timm",
    "replay": "replay {}",
    "predict RUN": "predict {} {images}/000.png --out {here}/p",
    "predict IMAGE": "predict {run} {} --out {here}/p",
    "evaluate MODEL": "evaluate {} --task knn --data.root {images} --out {here}/e",
    "evaluate --data.root": "evaluate {run} --task knn --out {here}/e --data.root {}",
    "evaluate --deepspeed_config": (
        "evaluate {run} --task finetune --data.root {images} --out {here}/e --deepspeed_config {}"
    ),
    "evaluate --detections": "evaluate --task detection --annotations {truth} --detections {}",
    "evaluate --annotations": "evaluate --task detection --detections {truth} --annotations {}",
    "transfer RUN": "transfer {} --imagenet {images} --out {here}/t",
    "transfer --imagenet": "transfer {run} --out {here}/t --imagenet {}",
    "transfer --ade20k": "transfer {run} --out {here}/t --ade20k {}",
    "transfer --coco": "transfer {run} --out {here}/t --coco {}",
    "transfer --nyuv2": "transfer {run} --out {here}/t --nyuv2 {}",
    "transfer --deepspeed_config": (
        "transfer {run} --imagenet {images} --out {here}/t --deepspeed_config {}"
    ),
    "diagnose MODEL": "diagnose {} --data.root {images} --out {here}/d",
    "diagnose --data.root": "diagnose {run} --out {here}/d --data.root {}",
}
# Commands with a hole for a path that is written.
WRITTEN = {
    "train --runtime.run_dir": f"{TRAIN} --data.root {{images}} --runtime.run_dir {{}}",
    "train --data.cache": f"{TRAIN} {RUN} --data.root {{parquet}} --data.cache {{}}",
    "train --task.distillation.cache": f"{TRAIN} {RUN} --task.distillation.cache {{}}",
    "train --engine.nvme_path": (
        f"train --deepspeed_config zero3_nvme {RUN} --engine.nvme_path {{}}"
    ),
    "init": "init {}",
    "statistics --out": "statistics --deepspeed_config zero3 --data.root {images} --out {}",
    "cache": "cache quickstart {}",
    "plan --write": "plan --write {}",
    "plan --probe": "plan --probe --gpus 1 --rates {}",
    "checkpoint export OUT": "checkpoint export {run} {} --deepspeed_config zero3",
    "weights convert OUT": "weights convert {weights} {} --to fd",
    "weights fetch": "weights fetch hf:nobody/nothing {}",
    "export OUT": "export {run} {} --to timm",
    "doctor --run_dir": "doctor --run_dir {}",
    "doctor --local_disk": "doctor --local_disk {}",
    "doctor --nvme_path": "doctor --nvme_path {}",
    "predict --out": "predict {run} {images}/000.png --out {}",
    "evaluate --out": "evaluate {run} --task knn --data.root {images} --out {}",
    "evaluate --json": "evaluate --detections {truth} --annotations {truth} --json {}",
    "transfer --out": "transfer {run} --imagenet {images} --out {}",
    "diagnose --out": "diagnose {run} --data.root {images} --out {}",
}
# Flags that an empty string turns off, or leaves as they are.
MAY_BE_EMPTY = {
    *("train --config", "statistics --config", "cache --config", "plan --config", "plan --rates"),
    *("train --student.init", "train --objective.target_statistics", "train --eval.root"),
    *("train --eval.knn_root", "train --data.cache"),
    *("train --task.distillation.cache", "train --runtime.run_dir", "train --engine.nvme_path"),
    *("train segmentation.classes", "train segmentation.head_init", "train depth.train_list"),
    *("train depth.val_list", "plan --write", "plan --probe", "evaluate --json"),
    *("transfer --imagenet", "transfer --ade20k", "transfer --coco", "transfer --nyuv2"),
}
# Paths that are no mistake: a file of the user's, whatever is in it, a folder that is made.
NO_MISTAKE = {
    # It may hold anything; what it lacks is told where a recipe names it.
    ("train --allow_code", "file"),
    # An owner's file of results may be written over.
    *((name, "file") for name in ("plan --write", "plan --probe", "evaluate --json")),
}
SECONDS_WITHOUT_TORCH = 2.0
LONG = "n" * 300


def broken_paths(folder: Path, *, written: bool, disk: Path | None) -> dict[str, str]:
    """Makes broken paths in a new folder; returns them by what they are."""
    (folder / "file").write_bytes(b"\xff\xfe\x00\x80 not UTF-8 \x00" * 8)
    (folder / "folder").mkdir()
    (folder / "closed" / "inside").mkdir(parents=True)
    (folder / "link").symlink_to(folder / "nowhere")
    (folder / "read_only").mkdir()
    os.mkfifo(folder / "fifo")
    (folder / "closed").chmod(0)
    (folder / "read_only").chmod(0o555)
    paths = {
        "empty string": "",
        "file": f"{folder}/file",
        "file for a folder": f"{folder}/file/inside",
        "unreadable folder": f"{folder}/closed/inside",
        "300 bytes": f"{folder}/{LONG}",
        "dangling link": f"{folder}/link",
        "FIFO": f"{folder}/fifo",
        "/dev/zero": "/dev/zero",
    }
    if written:
        paths["read-only"] = f"{folder}/read_only/new"
        if disk:
            paths["full disk"] = f"{disk}/new"
    else:
        paths |= {
            "missing": f"{folder}/missing",
            "folder": f"{folder}/folder",
            "not UTF-8": f"{folder}/" + os.fsdecode(b"\xff\xfe"),
        }
    return paths


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """What else the commands name, all of it sound."""
    top = tmp_path_factory.mktemp("material")
    write_pictures(top / "images", 24, size=32)
    shutil.copytree(ROOT / "tests" / "stored_runs" / "distillation", top / "run")
    (top / "truth.json").write_text('{"images": [], "annotations": [], "categories": []}')
    images = [{"bytes": path.read_bytes()} for path in sorted((top / "images").iterdir())]
    parquet.write_table(pyarrow.table({"image": images}), top / "train.parquet")
    return {
        "parquet": top / "train.parquet",
        "images": top / "images",
        "run": top / "run",
        "truth": top / "truth.json",
        "weights": vit_file(top),
    }


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[CommandServer]:
    environ = {name: value for name, value in os.environ.items() if name not in RANK_VARIABLES}
    home = tmp_path_factory.mktemp("home")
    environ |= {"HOME": str(home), "FD_CACHE": str(home / "cache"), "DS_ACCELERATOR": "cpu"}
    environ |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    with CommandServer(environ) as server:
        yield server


@pytest.fixture(scope="module")
def full_disk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path | None]:
    """A small file system without room; None where this user may mount none."""
    disk = tmp_path_factory.mktemp("disk")
    size = ["mount", "-t", "tmpfs", "-o", "size=8k,nr_inodes=3", "tmpfs", str(disk)]
    if os.geteuid() or subprocess.run(size, capture_output=True).returncode:
        yield None
        return
    (disk / "full").write_bytes(bytes(8192))
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_every_command_is_swept() -> None:
    swept = {line.split()[0] for line in (READ | WRITTEN).values()}
    assert swept == COMMANDS.keys() - WITHOUT_PATHS


@pytest.mark.parametrize("name", [*READ, *WRITTEN])
def test_a_broken_path_is_one_sentence(
    name: str,
    material: dict[str, Path],
    server: CommandServer,
    full_disk: Path | None,
    tmp_path: Path,
) -> None:
    written = name in WRITTEN
    if not written:
        full_disk = None
    wrong = []
    line = (READ | WRITTEN)[name]
    for kind, path in broken_paths(tmp_path, written=written, disk=full_disk).items():
        if (not path and name in MAY_BE_EMPTY) or (name, kind) in NO_MISTAKE:
            continue
        words = [word.replace("{}", path) for word in line.split()]
        words = [path if word == path else word.format(here=tmp_path, **material) for word in words]
        ended = server.run(words, cwd=tmp_path)
        # The verdict of doctor is its exit code.
        codes = (0, 1) if words[0] == "doctor" else (2,)
        slow = not ended.with_torch and ended.seconds > SECONDS_WITHOUT_TORCH
        if ended.code not in codes or "Traceback" in ended.output or slow:
            wrong.append(f"{kind}: {ended.code}, {ended.seconds:.1f} s: {ended.output[-400:]}")
    assert not wrong, "\n".join(wrong)
