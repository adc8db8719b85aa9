"""The page of a run: what it says, and how it looks where there is a browser."""

from __future__ import annotations

import json
import os
import shutil
import subprocess

import numpy
import pytest
from html_page import check_page
from PIL import Image

from fd_large.report.run_files import read_run
from fd_large.report.run_page import MOST_POINTS, _thin, write_run_page


def test_what_it_says(make_run):
    folder = make_run(words=["--optim.base_lr", "0.1"])
    recipe = json.loads((folder / "recipe.json").read_text())
    recipe["optim"]["base_lr"] = 0.123
    (folder / "recipe.json").write_text(json.dumps(recipe))
    for number, restored in ((7, None), (8, 5)):
        incident = folder / f"incidents/update_{number:08d}"
        incident.mkdir(parents=True)
        off = [{"what": "loss", "value": 1e4}, {"what": "gradient norm", "value": "nan"}]
        broken = [{"rank": 3, "kind": "exp_avg", "tensor": "student.norm.weight"}]
        found = {"index": number - 1, "off": off, "restored": restored}
        found |= {"state_not_finite": broken} if restored else {}
        (incident / "incident.json").write_text(json.dumps(found))
    (folder / "pictures" / "worst.png").write_bytes(b"")
    Image.new("RGB", (40, 30)).save(folder / "pictures" / "worst.png")
    page = check_page(write_run_page(read_run(folder)))
    words = " ".join(filter(None, page.words))
    for told in (
        *("fd_swinv2_base", "done", "60", "0.4300", "0.830 of the baseline"),
        *("optim.base_lr", "0.123", "teacher.pth", "swinv2_base", "worst.png"),
        *(
            "loss 1e+04, gradient norm nan",
            "exp_avg of student.norm.weight on rank 3",
            "skipped, and back to step 5",
            "2 in all",
        ),
        "--deepspeed_config z.json",
    ):
        assert told in words, told
    assert page.tags.count("svg") >= 3
    assert page.tags.count("img") == 1


def test_a_run_that_learned_nothing_says_so_before_anything_else(make_run):
    folder = make_run()
    row = {"update": 60, "held_out_loss": 0.5, "held_out_best_constant": 0.4}
    (folder / "evaluations.jsonl").write_text(json.dumps(row) + "\n")
    words = " ".join(check_page(write_run_page(read_run(folder))).words)
    assert words.index("WORSE THAN A CONSTANT") < words.index("worse than a constant")
    assert words.index("worse than a constant") < words.index("training loss")


@pytest.mark.parametrize(
    ("features", "said"),
    [(("before",), "the student's before training."), (("before", "after"), "before and after")],
)
def test_figures_and_pictures_say_when_they_are_of(features, said, make_run):
    folder = make_run(status="preempted", updates=20, features=features)
    (folder / "evaluations.jsonl").write_text('{"update": 0, "held_out_loss": 0.5}\n')
    Image.new("RGB", (40, 30)).save(folder / "pictures" / "features.png")
    words = " ".join(check_page(write_run_page(read_run(folder))).words)
    assert said in words
    assert words.count("before training") >= 2 + (features == ("before",)), "tile and table"


def test_teachers_of_one_model_are_told_apart(make_run):
    folder = make_run()
    recipe = json.loads((folder / "recipe.json").read_text())
    coarse = {**recipe["teacher"], "model": "dino_vit_base_patch16", "teacher_image_size": 0}
    coarse["architecture"] = {}
    fine = {**coarse, "teacher_image_size": 448, "architecture": {"image_size": 448}}
    coarse["layer"], fine["layer"] = "last", "before_norm"
    recipe["teachers"] = {"coarse": coarse, "fine": fine}
    (folder / "recipe.json").write_text(json.dumps(recipe))
    words = " ".join(check_page(write_run_page(read_run(folder))).words)
    for told in (
        "image size 224 px",
        "changed fields image_size 448",
        "layer before_norm",
        "image size 448 px",
        "(image_size 448) at 448 px from",
    ):
        assert told in words, told
    assert " layer last" not in words, "it is the usual one"


@pytest.mark.parametrize("status", ["failed", None])
def test_of_a_run_that_has_only_begun(status, make_run):
    folder = make_run(status=status, updates=0, held_out=False, features=())
    (folder / "environment.json").unlink()
    (folder / "incidents/update_00000001").mkdir(parents=True)
    (folder / "incidents/update_00000001/incident.json").write_text("{")
    page = check_page(write_run_page(read_run(folder)))
    assert "None: no step was skipped." in page.words
    assert "Curves" not in page.words
    assert ("failed" in page.words) == (status == "failed")


def test_long_runs_have_few_points():
    places = _thin(1_000_000)
    assert len(places) <= MOST_POINTS
    assert (places[0], places[-1]) == (0, 999_999)
    assert _thin(3).tolist() == [0, 1, 2]


@pytest.fixture(scope="module")
def chromium():
    found = shutil.which("chromium") or shutil.which("chromium-browser")
    if not found:
        pytest.skip("no chromium to open the page in")
    return found


@pytest.mark.parametrize(
    ("scheme", "width"),
    [
        pytest.param(0, 390, id="dark, as wide as a phone"),
        pytest.param(1, 1000, id="light", marks=pytest.mark.sweep),
    ],
)
def test_a_browser_shows_it(scheme, width, chromium, make_run, tmp_path):
    page = write_run_page(read_run(make_run()))
    shot = tmp_path / "shot.png"
    command = [chromium, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
    command += [f"--blink-settings=preferredColorScheme={scheme}", f"--window-size={width},900"]
    command += [f"--user-data-dir={tmp_path / 'profile'}", f"--screenshot={shot}", page.as_uri()]
    environment = os.environ | {"HOME": str(tmp_path)}
    subprocess.run(command, capture_output=True, timeout=300, check=True, env=environment)
    with Image.open(shot) as picture:
        pixels = numpy.asarray(picture.convert("RGB")).astype(int)
    # The ground of the page, and something on it that is not grey: the curves.
    corner = pixels[-1, 1].mean()
    assert corner > 200 if scheme else corner < 60
    assert (numpy.ptp(pixels, axis=-1) > 80).sum() > 500
    # Nothing is wider than the window: the margin on the right is empty.
    assert (pixels[:, -4] == pixels[-1, 1]).all()
