"""Several students from one teacher pass on two ranks: each is the run that it would be alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import twin
from launch import ROOT, run_ranks
from pictures import write_pictures

from fd_large.checkpoint.read import newest_sound

STEPS = 5
SHARED = f"--optim.max_steps {STEPS} --runtime.save_every 2 --optim.ema_decay 0.9".split()
SHARED += ["--data.image_sizes", "16", "32"]
SHAPE = {
    "architecture.depths": "1 1",
    "architecture.num_heads": "1 2",
    "architecture.window_size": "4",
}
OPTIMISED = {"drop_path_rate": "0.3", "base_lr": "3e-3", "layer_decay": "0.8"}
STUDENTS = {
    "wide": {"model": "swinv2_base", "architecture.embed_dim": "32", **SHAPE},
    "narrow": {"model": "swinv2_base", "architecture.embed_dim": "16", **SHAPE, **OPTIMISED},
}


def of_all() -> list[str]:
    """The flags of a run with both students, of which one sets its own learning rates."""
    named = [
        (f"--students.{student}.{field}", *text.split())
        for student, values in STUDENTS.items()
        for field, text in values.items()
    ]
    return [*SHARED, *(word for words in named for word in words)]


def outcome(run_dir: Path) -> tuple[list[list[float]], dict[str, bytes]]:
    """Losses, norms and learning rates of all steps, and the files of the last checkpoint."""
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    numbers = [[row[k] for k in ("update", "loss", "grad_norm", "learning_rate")] for row in rows]
    reader, _ = newest_sound(run_dir)
    assert reader is not None
    assert reader.manifest["update"] == STEPS
    files = {p.name: p.read_bytes() for p in reader.path.iterdir() if p.name != "manifest.json"}
    return numbers, files


@pytest.mark.parametrize(
    ("config", "ranks", "compared"),
    [
        ("zero3", 2, ("wide", "narrow")),
        ("zero1", 2, ("wide", "narrow")),
        # Both engines have the one group of hpZ; the second is built when it is there.
        ("zero3_hpz", 4, ("narrow",)),
    ],
)
def test_each_is_the_run_that_it_would_be_alone_to_the_bit(config, ranks, compared, tmp_path):
    images, folder = write_pictures(tmp_path / "images", 16), tmp_path / "all"
    nodes = ("--engine.node_size", "2") if config == "zero3_hpz" else ()
    if config == "zero3":
        # Killed in its fourth step or after it, and started again.
        started = twin.start(images, folder, *of_all())
        saved = folder / "students/narrow/checkpoints/step_00000002/manifest.json"
        try:
            started.until(saved.exists)
        finally:
            started.kill()
    twin.train(images, folder, *of_all(), *nodes, config=config, ranks=ranks)
    for name in compared:
        recipe = folder / "students" / name / "recipe.json"
        words = ["--config", recipe, "--runtime.run_dir", tmp_path / name]
        json_config = ROOT / f"ds_configs/{config}.json"
        run_ranks(twin.TRAIN, "--deepspeed_config", json_config, *words, ranks=ranks, timeout=180.0)
        numbers, files = outcome(folder / "students" / name)
        assert len(numbers) == STEPS
        alone = outcome(tmp_path / name)
        assert numbers == alone[0], name
        assert files.keys() == alone[1].keys()
        assert [file for file in files if files[file] != alone[1][file]] == [], name
    summary = json.loads((folder / "summary.json").read_text())
    assert (summary["status"], summary["students"]) == ("done", dict.fromkeys(STUDENTS, "done"))
