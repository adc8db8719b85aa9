"""The package from Python, in a process that goes on afterwards."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow
import pytest
import torch
from PIL import Image
from process_state import state
from pyarrow import parquet

import fd_large
from fd_large.checkpoint import stream
from fd_large.engine import opening
from fd_large.errors import ConfigError
from fd_large.recipes import registry

ROOT = Path(fd_large.__file__).resolve().parents[1]
VIT = {"embed_dim": 8, "num_heads": [2], "patch_size": 4}
TINY = {
    "student": {"model": "vit_base_patch16", "architecture": {**VIT, "depths": [2]}},
    "teacher": {
        "model": "vit_base_patch16",
        "source": "random",
        "architecture": {**VIT, "depths": [1], "image_size": 8},
    },
    "data": {"image_size": 8, "workers": 0, "val_fraction": 0.3},
    "batch": {"global_batch_size": 4, "micro_batch_size": 4},
    "eval": {"root": "", "views": 256},
    "optim.warmup_epochs": 0,
    "runtime.log_every": 1,
}


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Class folders without parts: bright and dark images."""
    root, generator = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for number in range(40):
        folder = root / ("bright" if number % 2 else "dark")
        folder.mkdir(exist_ok=True)
        pixels = generator.integers(0, 100, (12, 12, 3)) + 150 * (number % 2)
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{number:02d}.png")
    return root


def distill(images: Path, out: Path, **more):
    fields = {**TINY, "data": {**TINY["data"], "root": images}, **more}
    return fd_large.distill(out=out, **fields)


@pytest.fixture(scope="module")
def trained(images, tmp_path_factory):
    """A run of two steps, and what the process was like before and after it."""
    before = state()
    result = distill(images, tmp_path_factory.mktemp("runs") / "run", **{"optim.max_steps": 2})
    return result, before, state()


def test_names_are_imported_when_they_are_used():
    code = (
        "import sys, fd_large; names = set(dir(fd_large)); assert names >= set(fd_large.__all__); "
        "loaded = [getattr(fd_large, name) for name in fd_large.__all__]; "
        "assert not {'torch', 'deepspeed', 'matplotlib'} & set(sys.modules), 'heavy'"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="'distil'"):
        _ = fd_large.distil


def test_a_run_leaves_the_process_as_it_was(trained):
    result, before, after = trained
    assert (result.status, result.summary["updates"]) == ("done", 2)
    assert after == before


def test_a_second_call_goes_on_in_the_same_process(trained, images):
    before = state()
    longer = {"optim.max_steps": 3, "deepspeed_config": "zero3"}
    result = distill(images, trained[0].folder, **longer)
    assert result.summary["updates"] == 3
    assert state() == before


def test_several_teachers_go_on_as_they_began(images, tmp_path):
    """Loss, panel and report name each; a resume is exact, and with other teachers refused."""
    only = TINY["teacher"]
    fields = {
        "teacher": {},
        "teachers": {"a": only, "b": {**only, "targets": ["map", "summary"], "loss": "mse"}},
        "eval": {"root": images, "views": 4},
        **{"optim.max_steps": 4, "runtime.save_every": 2},
    }

    def weights(folder):
        reader = stream.newest(folder / "checkpoints" / "step_00000004")
        return {name: stream.read(reader, name, (n,)) for name, n in reader.layout.sizes.items()}

    result = distill(images, tmp_path / "run", **fields)
    assert result.summary["teachers"].keys() == {"a", "b"}
    assert "held_out_b_summary_loss" in result.summary
    with np.load(result.folder / "pictures" / "features_after.npz") as panel:
        assert panel["student_b"].shape == panel["teacher_b"].shape == (4, 2, 2, 8)
    page = (result.folder / "report.html").read_text()
    assert "teacher a" in page
    assert "b summary loss" in page
    whole = weights(result.folder)
    shutil.rmtree(result.folder / "checkpoints" / "step_00000004")
    again = distill(images, result.folder, **fields)
    assert again.summary["updates"] == 4
    resumed = weights(result.folder)
    assert resumed.keys() == whole.keys()
    assert all(torch.equal(resumed[name], tensor) for name, tensor in whole.items())
    other = {"a": only, "c": only}
    message = said(distill, images, result.folder, **{**fields, "teachers": other})
    assert "teachers 'a, b' -> 'a, c'" in message


def test_what_fails_leaves_the_process_as_it_was(images, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(opening, "engine_of", fail)
    before = state()
    with pytest.raises(KeyboardInterrupt):
        distill(images, tmp_path / "run", **{"optim.max_steps": 2})
    assert state() == before


def test_the_student_is_loaded_with_its_preprocessing(trained, images):
    model = trained[0].model
    assert not model.training
    file = images / "dark" / "00.png"
    pixels = model.preprocess(file)
    assert (pixels.dtype, tuple(pixels.shape)) == (torch.uint8, (3, 8, 8))
    with Image.open(file) as picture:
        assert torch.equal(model.preprocess(picture), pixels)
        assert torch.equal(model.preprocess(np.array(picture)), pixels)
    batch = torch.stack([pixels, 255 - pixels])
    with torch.no_grad():
        found = model(batch)
        assert tuple(found.shape) == (2, 8, 2, 2)
        torch.testing.assert_close(model(batch / 255), found)
        torch.testing.assert_close(model.features(batch), found.mean((2, 3)))
    with pytest.raises(fd_large.FDError, match=r"preprocess: .*torch\.float32"):
        model.preprocess(batch[0] / 255)


@pytest.mark.parametrize("name", ["{run}#scratch", "vit_base_patch16=random"])
def test_random_weights_have_learnt_no_teachers_map(trained, name):
    model = fd_large.load_student(name.format(run=trained[0].folder))
    with pytest.raises(ConfigError, match=r"'teacher'"):
        model.teacher_map("teacher", torch.zeros(1, 3, 8, 8))


def test_models_are_evaluated_side_by_side(trained, images, tmp_path):
    before = state()
    found = fd_large.evaluate(
        trained[0],
        f"{trained[0].folder}#scratch",
        data={"root": images, "val_fraction": 0.3, "workers": 0},
        task="knn",
        out=tmp_path,
        k=3,
        pool="mean",
    )
    assert len(found.accuracy) == 2
    assert set(found.accuracy.values()) == {100.0}, "bright and dark are easily told apart"
    html = found._repr_html_()
    assert html.count("100.00%") == 2
    assert "data:image/png;base64," in html
    assert state() == before


def test_parquet_files_are_measured_as_the_folders_that_they_were_made_of(
    trained, images, tmp_path
):
    found = {}
    for part, numbers in (("train", range(30)), ("validation", range(30, 40))):
        files = [next(images.glob(f"*/{number:02d}.png")) for number in numbers]
        for file in files:
            copy = tmp_path / "folders" / part.replace("idation", "") / file.parent.name / file.name
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, copy)
        cells = {"image": [{"bytes": file.read_bytes()} for file in files]}
        cells["label"] = [file.parent.name for file in files]
        (tmp_path / "tables").mkdir(exist_ok=True)
        parquet.write_table(pyarrow.table(cells), tmp_path / "tables" / f"{part}-0.parquet")
    for kind in ("folders", "tables"):
        root = {"root": tmp_path / kind, "workers": 0, "cache": str(tmp_path / "blocks")}
        measured = fd_large.evaluate(
            trained[0], data=root, task="knn", out=tmp_path / f"{kind} out", k=3
        )
        found[kind] = measured.accuracy
    assert found["folders"] == found["tables"]
    assert len(found["tables"]) == 2


def test_a_result_shows_itself(trained):
    result = trained[0]
    html = result._repr_html_()
    assert "quickstart: done" in html
    assert html.count("data:image/png;base64,") == 1
    assert str(result.folder) in html
    assert os.fspath(result) == str(result.folder)
    assert fd_large.result(result.folder).status == "done"


def test_what_is_shown_is_escaped(tmp_path):
    from fd_large.report.notebook import evaluation_html

    row = {"label": "<script>", "accuracy": [50.0, 51.0], "mean": 50.5}
    html = evaluation_html({"nets": [row], "task": "knn", "root": "a&b"}, tmp_path)
    assert "&lt;script&gt;" in html
    assert "a&amp;b" in html
    assert "50.50%" in html


def said(call, *given, **named) -> str:
    with pytest.raises(fd_large.FDError) as caught:
        call(*given, **named)
    return str(caught.value)


def test_mistakes_are_the_command_lines_sentences_all_at_once(tmp_path):
    found = said(
        fd_large.distill, out=tmp_path / "run", optim={"max_stpes": 3, "base_lr": -1.0}
    ).splitlines()
    assert re.match(r"optim\.max_stpes: .*nearest: optim\.max_steps", found[0])
    assert re.match(r"optim\.base_lr: .*got -1\.0", found[1])
    assert "data.root: given twice" in said(
        fd_large.distill, out="x", data="a", **{"data.root": "b"}
    )
    assert "nearest: quickstart." in said(fd_large.distill, out="x", recipe="quikstart")
    assert "not a distillation" in said(fd_large.distill, out="x", recipe="finetune_clip_vit_base")
    assert re.match("sead: .*nearest: seeds", said(fd_large.evaluate, "x", data="y", sead=3))
    assert said(fd_large.evaluate, "x", data="y", k=0).startswith("--k: too small")
    assert not (tmp_path / "run").exists()


def test_paths_and_names_of_files_are_looked_at_before_torch_is_imported(tmp_path):
    code = (
        "import sys, fd_large\n"
        "for fields in ({'data': 'no/such', 'teacher': 'no.pth'}, {'deepspeed_config': 'zero9'}):\n"
        "    try: fd_large.distill(out='run', **fields)\n"
        "    except fd_large.FDError as error: print(error)\n"
        "assert 'torch' not in sys.modules"
    )
    asked = [sys.executable, "-c", code]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    said = subprocess.check_output(asked, cwd=tmp_path, env=environment, text=True, timeout=60)
    fields = [line.partition(":")[0] for line in said.splitlines()]
    assert fields == ["data.root", "teacher.source", "--deepspeed_config"]
    assert not any(tmp_path.iterdir())


def test_a_folder_without_images_is_an_error_and_leaves_the_process_as_it_was(tmp_path):
    (tmp_path / "empty").mkdir()
    before = state()
    assert "data.root: " in said(distill, tmp_path / "empty", tmp_path / "run")
    assert state() == before
    assert not (tmp_path / "run").exists()


def test_a_recipe_with_other_values_by_section_or_by_name():
    wanted = registry.get("fd_clip_vit_base").with_fields(
        {"optim.max_steps": 5, "optim.betas": (0.9, 0.9)}
    )
    assert (
        fd_large.recipe("fd_clip_vit_base", optim={"max_steps": 5, "betas": (0.9, 0.9)}) == wanted
    )
    assert fd_large.recipe("fd_clip_vit_base", **{"optim.max_steps": 5, "optim.betas": [0.9, 0.9]})
    assert isinstance(wanted, fd_large.Run)
    assert "fd_clip_vit_base" in fd_large.RECIPES
