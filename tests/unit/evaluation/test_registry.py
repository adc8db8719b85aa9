"""The table of protocols, and the door beside it: docs/extending.md's example, and mistakes."""

from __future__ import annotations

import json

import numpy as np
import pytest
from html_page import check_page
from page_examples import EXAMPLES
from plugins import install

import fd_large
from fd_large import doors
from fd_large.cli.main import main
from fd_large.evaluation.registry import PROTOCOLS, protocol_of
from fd_large.tasks.registry import TASKS

TINY = ["vit_base_patch16=random", "timm:test_vit=random"]


@pytest.fixture
def words(labelled_images, tmp_path, monkeypatch):
    """Arguments for two tiny models; files of the user's own stand in the test's folder."""
    monkeypatch.chdir(tmp_path)
    for name in ("_files", "_names"):
        monkeypatch.setattr(doors, name, set())
    small = ["--data.image_size", "32", "--data.workers", "0", "--batch_size", "8"]
    return ["evaluate", *TINY, "--data.root", str(labelled_images), *small]


def test_each_name_with_each_variant_is_one_protocol():
    keys = [(one.name, one.variant) for one in PROTOCOLS]
    assert len(set(keys)) == len(keys)
    assert {one.name: one.command for one in PROTOCOLS if one.command != "evaluate"} == {
        "transfer": "transfer",
        "diagnose": "diagnose",
    }
    for protocol in (one for one in PROTOCOLS if one.command == "evaluate"):
        assert protocol_of(protocol.name, protocol.variant) is protocol
    measured = {kind.name for kind in TASKS.values() if kind.trains_models or kind.scores_runs}
    assert {name for name, _ in keys} == {
        "knn",
        "linear",
        "zeroshot",
        "robustness",
        *measured,
        "transfer",
        "diagnose",
    }
    assert protocol_of("linear").flags is not protocol_of("linear", "official").flags


def test_a_protocol_of_the_users_own_has_table_page_and_intervals(words, tmp_path, capsys):
    (tmp_path / "nearest_mean.py").write_text(EXAMPLES["nearest_mean.py"])
    task = ["--task", "module:nearest_mean.py:NEAREST_MEAN"]
    assert main([*words, *task, "--shots", "3"]) == 0
    assert "Nearest class mean: accuracy" in capsys.readouterr().out
    summary = json.loads((tmp_path / "evaluation" / "summary.json").read_text())
    assert summary["task"] == "nearest_mean"
    assert summary["settings"] == {"shots": 3, "batch_size": 8}
    first, second = summary["nets"]
    # Red, green and blue images.
    assert first["accuracy"][0] > 50
    assert second["difference"]["to"] == first["label"]
    low, high = second["difference"]["interval"]
    assert low <= second["difference"]["mean"] <= high
    with np.load(tmp_path / "evaluation" / "predictions.npz") as kept:
        right = (kept[f"predicted/{first['label']}"][0] == kept["labels"]).mean()
    assert 100 * right == pytest.approx(first["accuracy"][0])
    assert (tmp_path / "evaluation" / "nearest_mean.png").stat().st_size > 5000
    page = check_page(tmp_path / "evaluation" / "report.html")
    assert {"shots", f"{first['accuracy'][0]:.2f}"} <= set(page.words)

    # The flags of built-in protocols are not its own; its own are not those of others.
    assert main([*words, *task, "--k", "3"]) == 2
    assert "--k: not used by nearest_mean" in capsys.readouterr().err
    assert main([*words, "--shots", "3"]) == 2
    assert "--shots" in capsys.readouterr().err
    assert main([*words, *task, "--help"]) == 0
    assert "Training images of each class that count" in " ".join(capsys.readouterr().out.split())


def test_from_python_it_is_named_alike(words, labelled_images, tmp_path):
    (tmp_path / "nearest_mean.py").write_text(EXAMPLES["nearest_mean.py"])
    task = "module:nearest_mean.py:NEAREST_MEAN"
    found = fd_large.evaluate(
        TINY[0], data={"root": labelled_images, "image_size": 32, "workers": 0}, task=task, shots=2
    )
    assert found.summary["settings"]["shots"] == 2


def test_a_protocol_of_an_installed_package_brings_its_flags(words, tmp_path, monkeypatch, capsys):
    (tmp_path / "protocol_of_a_test.py").write_text(EXAMPLES["nearest_mean.py"])
    install(tmp_path, "protocols", "nearest = protocol_of_a_test:NEAREST_MEAN")
    monkeypatch.syspath_prepend(tmp_path)
    assert main([*words, "--task", "nearest", "--shots", "2"]) == 0
    assert json.loads((tmp_path / "evaluation/summary.json").read_text())["settings"]["shots"] == 2


OF_FEATURES = "from fd_large.evaluation.frozen import Classified, of_features\n"


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("OWN = 3", "got int"),
        ("import nothing_of_that_name", "nothing_of_that_name"),
        (f"{OF_FEATURES}OWN = of_features('knn', 'x', None)", "got 'knn'"),
        (f"{OF_FEATURES}OWN = of_features('a/b', 'x', None)", "got 'a/b'"),
        (f"{OF_FEATURES}OWN = of_features('own', 'x', lambda features: 1 / 0)", "own.py line 2"),
        (
            f"{OF_FEATURES}OWN = of_features('own', 'x', lambda f: Classified(f.test.labels[:2]))",
            "expected Classified with 12 whole numbers",
        ),
        (
            f"{OF_FEATURES}OWN = of_features('own', 'x', lambda f: Classified(f.test.labels / 2))",
            "expected Classified with 12 whole numbers",
        ),
    ],
)
def test_mistakes_of_a_file_end_in_one_sentence(words, tmp_path, capsys, text, found):
    (tmp_path / "own.py").write_text(text)
    assert main([*words, "--task", "module:own.py:OWN"]) == 2
    said = capsys.readouterr().err
    assert "--task: " in said
    assert found in said
    assert "Traceback" not in said


def test_no_file_is_imported_that_the_command_line_does_not_name(words, tmp_path, capsys):
    (tmp_path / "own.py").write_text("raise SystemExit('imported')\nOWN = 1\n")
    assert main([*words, "--task", "module:own.py:OTHER"]) == 2
    assert "no such name" in capsys.readouterr().err
    with pytest.raises(fd_large.errors.ConfigError, match="allow-code"):
        protocol_of("module:own.py:OWN")
