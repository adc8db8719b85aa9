"""What is checked and settled before anything of a run is built."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from loading import made

from fd_large.checkpoint.lease import claimed
from fd_large.engine import opening
from fd_large.engine.job import TrainingJob
from fd_large.engine.opening import Checked, open_together
from fd_large.engine.zero import config as ds
from fd_large.errors import ConfigError, DataError, FDError, WeightsError
from fd_large.recipes import registry
from fd_large.recipes.architectures import Architecture
from fd_large.tasks.distillation.section import Objective, Teacher
from fd_large.tasks.jobs import job_of

NUMBERS = (0.485, 0.456, 0.406, 0.229, 0.224, 0.225)


@pytest.mark.parametrize("statistics", [(), NUMBERS, (0.5,) * 6])
@pytest.mark.parametrize("kind", ["timm's ViT", "BEiT", "no head"])
def test_a_stored_run_of_a_bare_teacher_goes_on_as_it_began(
    kind, statistics, one_rank, tmp_path, monkeypatch
):
    """Earlier versions did not ask for the image statistics of such a file."""
    state = made("vit_base_patch16" if kind == "BEiT" else "dino_vit_base_patch16").state_dict()
    if kind == "BEiT":
        table = state.pop("rel_pos_bias.relative_position_bias_table")
        for block in range(2):
            state[f"blocks.{block}.attn.relative_position_bias_table"] = table.clone()
    elif kind == "timm's ViT":
        state |= {"head.weight": torch.zeros(3, 32), "head.bias": torch.zeros(3)}
    torch.save(state, tmp_path / "teacher.pth")
    heads = () if kind == "BEiT" else (2,)
    run = registry.get("fd_clip_vit_base")
    run = replace(
        run,
        teacher=Teacher(
            source=str(tmp_path / "teacher.pth"),
            architecture=Architecture(num_heads=heads or None),
        ),
        objective=Objective(),
        runtime=replace(run.runtime, run_dir=str(tmp_path / "run")),
    )
    opened = []

    def only_settled(job, *_):
        opened.append(job.run)
        raise DataError("no more of it")

    monkeypatch.setattr(opening, "check", only_settled)

    def start_of(run, **more):
        with claimed(tmp_path / "run") as lease:
            open_together([run], job_of, "zero3", [lease], **more)

    with pytest.raises(WeightsError, match="image statistics"):
        start_of(run)
    with pytest.raises(DataError):
        start_of(replace(run, teacher=replace(run.teacher, statistics=NUMBERS)))
    settled = opened.pop()
    stored = replace(settled, teacher=replace(settled.teacher, statistics=statistics)).to_dict()
    (tmp_path / "run").mkdir(exist_ok=True)
    (tmp_path / "run" / "recipe.json").write_text(json.dumps(stored))
    with pytest.raises(DataError):
        start_of(run)
    assert opened[0].changes_since(stored) == {}
    with pytest.raises(WeightsError, match="image statistics"):
        start_of(run, fresh=True)
    other = tmp_path / "other.pth"
    torch.save(state, other)
    with pytest.raises(WeightsError, match="image statistics"):
        start_of(replace(run, teacher=replace(run.teacher, source=str(other))))


class Wrong(TrainingJob):
    """A job whose images and student are refused."""

    def open_samples(self):
        raise DataError("data.root: no images")

    def check(self):
        raise ConfigError(f"student.drop_path_rate: got {self.run.student.drop_path_rate}")


@pytest.mark.parametrize(
    ("students", "told"),
    [
        ([{"init": "/no/such"}, {"init": "/nor/this"}], ["/no/such", "/nor/this"]),
        ([{"drop_path_rate": 0.3}, {"drop_path_rate": 0.4}], ["got 0.3", "got 0.4"]),
    ],
)
def test_the_mistakes_of_all_students_are_told_at_once(students, told, one_rank, tmp_path):
    run = registry.get("fd_clip_vit_base")
    run = replace(run, runtime=replace(run.runtime, run_dir=str(tmp_path / "run")))
    runs = [replace(run, student=replace(run.student, **fields)) for fields in students]
    with pytest.raises(FDError) as caught:
        open_together(runs, Wrong, "gone.json", [None, None])
    lines = str(caught.value).splitlines()
    assert len(lines) == 4
    for words in (*told, "gone.json", "data.root"):
        assert sum(words in line for line in lines) == 1, lines
    assert not (tmp_path / "run").exists()


def test_only_what_is_trained_has_state_on_a_disk():
    sizes = (1000, 24)
    numbers = ds.RunNumbers(1, 1, 1, 1, 1.0, True, (*sizes, 5000), trained_sizes=sizes)
    run = registry.get("fd_swinv2g")
    there = {"zero_optimization": {"offload_param": {"device": "nvme"}}}
    checked = Checked(SimpleNamespace(run=run), None, numbers, {})
    assert opening._disk_bytes(checked) == 16 * sum(sizes)
    assert opening._disk_bytes(checked._replace(config=there)) == 18 * sum(sizes)
    averaged = SimpleNamespace(run=replace(run, optim=replace(run.optim, ema_decay=0.9)))
    assert opening._disk_bytes(checked._replace(job=averaged)) == 20 * sum(sizes)
