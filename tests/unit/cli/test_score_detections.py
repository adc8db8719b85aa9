from __future__ import annotations

import json
import subprocess
import sys

import pytest
from coco import unpack_coco_tiny

from fd_large.cli.score_detections import score_file
from fd_large.errors import ConfigError, DataError


@pytest.fixture(scope="module")
def eval_folder(tmp_path_factory):
    return unpack_coco_tiny(tmp_path_factory.mktemp("coco_tiny")) / "eval"


def test_a_file_is_scored_shown_and_written_without_torch(eval_folder, tmp_path):
    program = (
        "import sys\n"
        "from fd_large.cli.score_detections import score_file\n"
        "code = score_file(*sys.argv[1:])\n"
        "assert not {'torch', 'torchvision', 'matplotlib'} & sys.modules.keys()\n"
        "sys.exit(code)\n"
    )
    files = [eval_folder / "fakesegm100_results.json", eval_folder / "instances_val2014_100.json"]
    answer = subprocess.run(
        [sys.executable, "-c", program, *files, tmp_path / "out.json"],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert answer.returncode == 0, answer.stderr
    assert "100 images, 734 detections" in answer.stdout
    row = next(line for line in answer.stdout.splitlines() if "AP50 " in line)
    assert "56.2" in row
    person = next(line for line in answer.stdout.splitlines() if "person" in line)
    written = json.loads((tmp_path / "out.json").read_text())
    assert f"{100 * written['mask']['classes'][0]['ap']:.1f}" in person
    assert written["mask"]["numbers"]["AP"] == pytest.approx(0.319545, abs=1e-6)
    assert list(written) == ["num_images", "num_results", "mask"]
    assert len(written["mask"]["precision_at_recall_0_to_1"]["0.5"]) == 101


def test_mistakes_are_told_before_the_work(eval_folder, tmp_path):
    results, truth = "fakebbox100_results.json", "instances_val2014_100.json"
    with pytest.raises(ConfigError, match="--json: no folder"):
        score_file(str(eval_folder / results), str(eval_folder / truth), str(tmp_path / "a" / "b"))
    with pytest.raises(DataError, match="annotations"):
        score_file(str(eval_folder / results), str(eval_folder / results), "")
