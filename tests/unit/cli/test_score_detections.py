from __future__ import annotations

import json
import subprocess
import sys

import pytest
from coco import unpack_coco_tiny

from fd_large.cli.main import main


@pytest.fixture(scope="module")
def eval_folder(tmp_path_factory):
    return unpack_coco_tiny(tmp_path_factory.mktemp("coco_tiny")) / "eval"


def test_a_file_is_scored_shown_and_written_without_torch(eval_folder, tmp_path):
    program = (
        "import sys\n"
        "from fd_large.cli.main import main\n"
        "names = ('--detections', '--annotations', '--json')\n"
        "pairs = zip(names, sys.argv[1:], strict=True)\n"
        "code = main(['evaluate', *(word for pair in pairs for word in pair)])\n"
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


def test_mistakes_are_reported_before_the_work(eval_folder, tmp_path, capsys):
    results = str(eval_folder / "fakebbox100_results.json")
    truth = str(eval_folder / "instances_val2014_100.json")
    missing = ["--annotations", truth, "--json", str(tmp_path / "a" / "b")]
    for more, found in ((missing, "--json"), (["--annotations", results], "annotations")):
        assert main(["evaluate", "--detections", results, *more]) == 2
        assert found in capsys.readouterr().err
