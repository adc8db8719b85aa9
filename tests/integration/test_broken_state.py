"""NaN in the state of a real run: never stored, named, gone back from, also after a kill."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import twin
from kills import state
from launch import ROOT, Finished, read_results, run_ranks
from pictures import write_pictures

PROGRAM = ROOT / "tests/integration/programs/broken_state.py"
RANKS, STEPS, BROKEN = 2, 12, 6
FLAGS = f"""
--batch.global_batch_size 4 --batch.micro_batch_size 2 --optim.max_steps {STEPS}
--runtime.save_every 3 --runtime.canary_every 0 --guard.skips 2 --optim.ema_decay 0.9
--student.architecture.depths 1 1
""".split()
# Where the state lies -> the rank whose state breaks, and the kind of the tensor.
BREAKS = {
    "zero1": (1, "master"),
    "zero2": (0, "exp_avg"),
    "zero3": (1, "ema"),
    "zero3_offload": (0, "exp_avg_sq"),
    "zero3_nvme": (1, "exp_avg"),
}


def train(folder: Path, runs: list[dict[str, Any]]) -> tuple[Finished, list[list[int]]]:
    """Trains runs one after the other; returns what each rank left of them, if it came to that."""
    folder.mkdir(exist_ok=True)
    (folder / "runs.json").write_text(json.dumps(runs))
    finished = run_ranks(PROGRAM, folder, ranks=RANKS, check=False, timeout=400)
    left = (folder / "rank_0.json").exists()
    return finished, read_results(folder, RANKS) if left else []


def stored(run_dir: Path) -> dict[int, bool]:
    """Whether each complete checkpoint holds finite numbers alone, oldest first."""
    steps = sorted(int(p.name[5:]) for p in (run_dir / "checkpoints").glob("step_????????"))
    tensors = {step: state(run_dir, step).values() for step in steps}
    return {step: all(one.isfinite().all() for one in held) for step, held in tensors.items()}


def read(path: Path) -> Any:
    return json.loads(path.read_text())


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pictures(tmp_path_factory.mktemp("pictures"), 4 * STEPS + 3)


@pytest.fixture(scope="module")
def healed(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the runs of all configs, in each of which the state broke once."""
    folder, runs = tmp_path_factory.mktemp("healed"), []
    for config, (rank, kind) in BREAKS.items():
        more = FLAGS
        if config == "zero3_nvme":
            disk = tmp_path_factory.mktemp("disk")
            more = [*FLAGS, "--engine.nvme_path", str(disk), "--engine.precision", "bfloat16"]
        words = twin.words(pictures, folder / config, *more, config=config)
        runs.append({"words": words, "step": BROKEN, "rank": rank, "kind": kind})
    finished, codes = train(folder, runs)
    assert codes == [[0] * len(runs)] * RANKS, "\n".join(finished.outputs)
    return folder


@pytest.mark.parametrize("config", BREAKS)
def test_a_state_that_breaks_on_one_rank_is_gone_back_from_by_all(
    healed: Path, config: str
) -> None:
    run_dir, (rank, kind) = healed / config, BREAKS[config]
    assert read(run_dir / "summary.json")["status"] == "done"
    # Of the two that stay; the one of the broken state was never there.
    assert stored(run_dir) == {9: True, STEPS: True}
    assert [p.name for p in (run_dir / "incidents").iterdir()] == [f"update_{BROKEN + 1:08d}"]
    incident = read(run_dir / f"incidents/update_{BROKEN + 1:08d}/incident.json")
    (broken,) = incident["state_not_finite"]
    assert (broken["rank"], broken["kind"]) == (rank, kind)
    assert f"{kind}.{broken['tensor']}" in state(run_dir, STEPS)
    assert incident["restored"] == 3
    own = (run_dir / f"logs/rank_{rank:05d}.log").read_text()
    assert f"{kind} of {broken['tensor']} is not finite" in own
    rows = [json.loads(x) for x in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [row["update"] for row in rows if row.get("skipped")] == [BROKEN]
    assert [row["update"] for row in rows] == list(range(STEPS))


def test_killed_and_started_again_it_goes_on_from_what_is_sound(
    pictures: Path, tmp_path: Path
) -> None:
    folders = {name: tmp_path / name for name in ("old", "killed", "lost")}
    more = [*FLAGS, "--guard.roll_backs", "1"]
    words = {n: twin.words(pictures, f, *more, config="zero1") for n, f in folders.items()}
    breaks = {"step": BROKEN, "rank": 1, "kind": "master"}
    kept = ["--runtime.keep_last", "9"]
    finished, _ = train(
        tmp_path / "first",
        [
            {"words": [*words["old"], *kept], **breaks, "unchecked": True},
            {"words": words["killed"], **breaks, "kill": 9},
        ],
    )
    assert finished.returncodes == [-9, -9], "\n".join(finished.outputs)
    assert read(folders["old"] / "summary.json")["status"] == "guard"
    # The masters of float32 are the parameters: the losses of two steps more are not finite.
    assert stored(folders["old"]) == {3: True, BROKEN: False, BROKEN + 2: False}
    assert all(stored(folders["killed"]).values())
    assert 3 in stored(folders["killed"])
    shutil.copytree(folders["old"], folders["lost"])
    shutil.rmtree(folders["lost"] / "checkpoints/step_00000003")

    finished, codes = train(
        tmp_path / "again", [{"words": words[name]} for name in ("old", "killed", "lost")]
    )
    assert codes == [[0, 0, 3]] * RANKS, "\n".join(finished.outputs)
    for name in ("old", "killed"):
        assert read(folders[name] / "summary.json")["status"] == "done"
        assert stored(folders[name]) == {9: True, STEPS: True}
    aside = {path.name for path in (folders["old"] / "checkpoints").glob("damaged_*")}
    assert aside == {"damaged_step_00000006", "damaged_step_00000008"}
    assert stored(folders["lost"]) == {6: False, 8: False}, "nothing is removed"
    reason = read(folders["lost"] / "summary.json")["reason"]
    assert "step_00000008" in reason
    assert "master of " in reason
