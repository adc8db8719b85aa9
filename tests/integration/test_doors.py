"""Code of the user's own, from a folder outside the package, on real ranks; what imports none."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import pytest
import torch
from closeness import distance
from integration.test_extending import EXAMPLES
from kills import kill_and_resume, state
from launch import ROOT, Finished, run_ranks
from pictures import write_pictures
from safetensors import safe_open
from twin import WITH_LOADERS, losses, train

MAIN = ROOT / "fd_large" / "__main__.py"
STEPS = 10


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pictures(tmp_path_factory.mktemp("pictures"), 26)


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the files, each of which says in FILE.ran that it was imported."""
    folder = tmp_path_factory.mktemp("own")
    for name in ("cosine.py", "head.py", "lion.py", "lines.py"):
        mark = f"\nopen({str(folder / name) + '.ran'!r}, 'a').write('x')\n"
        (folder / name).write_text(EXAMPLES[name] + mark)
    return folder


def flags(own: Path, stage: int) -> tuple[str, ...]:
    return (
        *("--deepspeed_config", str(ROOT / f"ds_configs/zero{stage}.json")),
        *("--objective.loss", f"module:{own}/cosine.py:cosine"),
        *("--objective.head", f"module:{own}/head.py:mlp"),
        *("--optim.name", f"module:{own}/lion.py:Lion", "--optim.base_lr", "1e-3"),
        *("--runtime.trackers", "tensorboard", f"module:{own}/lines.py:Csv"),
        # As transformers has it.
        *("--student.architecture.extra_norm_every", "0"),
        *("--optim.layer_decay", "0.8", "--optim.ema_decay", "0.9"),
        *("--optim.max_steps", str(STEPS), "--runtime.save_every", "1"),
        *WITH_LOADERS,
    )


@pytest.fixture(scope="module", params=[3, pytest.param(1, marks=pytest.mark.sweep)])
def calm(
    request: pytest.FixtureRequest, pictures: Path, own: Path, tmp_path_factory
) -> tuple[int, Path]:
    """A run that nobody disturbs: its ZeRO stage and folder."""
    folder = tmp_path_factory.mktemp("runs") / f"calm{request.param}"
    train(pictures, folder, *flags(own, request.param))
    return request.param, folder


def same_end(run_dir: Path, calm: Path) -> None:
    wanted, found = state(calm, STEPS), state(run_dir, STEPS)
    assert wanted.keys() == found.keys()
    assert all(torch.equal(values, found[key]) for key, values in wanted.items())
    assert losses(run_dir) == losses(calm)


def test_a_killed_run_ends_as_one_that_was_not(calm, pictures, own, tmp_path):
    stage, reference = calm
    kinds = {key.partition(".")[0] for key in state(reference, STEPS)}
    assert kinds == {"master", "momentum", "ema"}
    run_dir = tmp_path / "killed"
    met = kill_and_resume(pictures, run_dir, 1, stage, *flags(own, stage), longest_rest=0.3)
    train(pictures, run_dir, *flags(own, stage))
    assert met[0]["alive"], met
    same_end(run_dir, reference)
    with (run_dir / "metrics.csv").open(newline="") as file:
        rows = [(int(update), float(loss)) for update, loss, _ in csv.reader(file)]
    assert rows == list(enumerate(losses(reference)))
    metrics = json.loads((run_dir / "environment.json").read_text())["metrics"]
    assert metrics["loss"] == "cosine loss"
    manifest = json.loads((run_dir / f"checkpoints/step_{STEPS:08d}/manifest.json").read_text())
    assert manifest["moments"] == ["momentum"]
    assert len(manifest["code"]) == 4
    assert [start["files"] for start in code(run_dir)] == [manifest["code"]]


def code(run_dir: Path) -> list[dict]:
    return json.loads((run_dir / "code.json").read_text())


def halfway(calm: Path, run_dir: Path) -> Path:
    shutil.copytree(calm, run_dir)
    shutil.rmtree(run_dir / f"checkpoints/step_{STEPS:08d}")
    return run_dir


@pytest.mark.closeness
def test_an_edited_file_is_said_and_recorded_and_other_ranks_resume(calm, pictures, own, tmp_path):
    stage, reference = calm
    run_dir = halfway(reference, tmp_path / "run")
    path = own / "cosine.py"
    text = path.read_text()
    try:
        path.write_text(text + "\n# Edited.\n")
        finished = train(pictures, run_dir, *flags(own, 4 - stage), ranks=1)
    finally:
        path.write_text(text)
    assert "cosine.py" in finished.outputs[0]
    assert "NOT THE FILE" in finished.outputs[0]
    assert [start["update"] for start in code(run_dir)] == [0, STEPS - 1]
    assert len({start["files"][f"module:{path}:cosine"] for start in code(run_dir)}) == 2
    assert distance(losses(run_dir), losses(reference)) <= 1e-5
    wanted, found = state(reference, STEPS), state(run_dir, STEPS)
    for key in (key for key in wanted if key.startswith("momentum.")):
        assert distance(found[key], wanted[key]) <= 1e-3, key


def command(*words: object, ranks: int = 1) -> Finished:
    return run_ranks(MAIN, *words, ranks=ranks, check=False)


def imported(own: Path) -> int:
    return sum(path.stat().st_size for path in own.glob("*.ran"))


def test_nothing_is_imported_because_a_stored_run_names_it(calm, pictures, own, tmp_path):
    stage, reference = calm
    run_dir = halfway(reference, tmp_path / "run")
    before = imported(own)
    # What needs none of it.
    for words in (
        ("report", run_dir),
        ("checkpoint", "list", run_dir),
        ("weights", "inspect", run_dir),
    ):
        assert command(*words).returncodes == [0]
    out = tmp_path / "exported"
    assert command("export", run_dir, out, "--to", "hf").returncodes == [0], "only the student"
    assert str(own) not in (out / "README.md").read_text()
    assert command("export", run_dir, tmp_path / "fd", "--to", "fd").returncodes == [0]
    (file,) = (tmp_path / "fd").glob("*.safetensors")
    with safe_open(file, "pt") as tensors:
        assert not [name for name in tensors.keys() if name.startswith("decoder.")]  # noqa: SIM118
    # A command that builds the whole task.
    look = ("diagnose", run_dir, "--data.root", pictures, "--images", "2", "--out", tmp_path / "d")
    refused = command(*look)
    assert refused.returncodes == [2]
    assert f"--allow-code {own}/head.py {own}/cosine.py" in refused.outputs[0]
    assert "Traceback" not in refused.outputs[0]
    # The same recipe without the names is another recipe.
    plain = flags(own, stage)[:2] + flags(own, stage)[-10:]
    other = train(pictures, run_dir, *plain, check=False)
    assert other.returncodes == [2, 2]
    assert "objective.loss" in other.outputs[0]
    # A file that is gone.
    gone = flags(tmp_path / "gone", stage)
    missing = train(pictures, run_dir, *gone, check=False)
    assert missing.returncodes == [2, 2]
    assert "no such file" in missing.outputs[0]
    assert imported(own) == before
    allowed = (own / "cosine.py", own / "head.py")
    assert command(*look, "--allow-code", *allowed).returncodes == [0]
    assert imported(own) == before + 2
