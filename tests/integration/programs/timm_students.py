"""Rank program: students of timm under ZeRO-3, stopped in the middle and resumed.

timm_students.py FOLDER NAME leaves a student's losses, those after a resume, and whether the two
ends are the same to the bit; and in FOLDER/NAME the folder of the run.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import timm
import torch
from launch import write_result
from scenarios import ZERO3, start_engine, take_step, tiny_run

from fd_large.engine.checkpoints import Checkpoints
from fd_large.engine.zero import start, state
from fd_large.engine.zero.engine import Engine
from fd_large.ranks import distributed
from fd_large.recipes.run import Run

UPDATES, SAVED_AT = 4, 3
STUDENTS: dict[str, dict[str, Any]] = {
    "convnextv2_atto": {},
    "vit_tiny_patch16_224": {"activation_checkpointing": "every"},
    "swin_tiny_patch4_window7_224": {"activation_checkpointing": "offload"},
    "eva02_tiny_patch14_224": {},
    "resnet18": {},
    # Their batch norms, from random weights, have groups that lie on both ranks.
    "mobilenetv3_small_050": {"norm_batch": 4, "activation_checkpointing": "every"},
    "resnet10t": {"norm_batch": 4},
    "resnet50": {"norm_batch": 4, "activation_checkpointing": "every"},
    "efficientnet_b0": {"norm_batch": 4, "activation_checkpointing": "every"},
    "regnety_004": {"norm_batch": 4},
    "ghostnet_100": {"norm_batch": 4},
    "repvgg_a0": {"norm_batch": 4},
    "mobilevit_xxs": {"norm_batch": 4, "activation_checkpointing": "every"},
    "cspdarknet53": {"norm_batch": 4},
}


def student_run(name: str, folder: Path) -> Run:
    """A run of a few small images; the ResNet starts from a file in the folder."""
    init = ""
    if name == "resnet18":
        init = str(folder / f"{name}.pth")
    size = 56 if "patch14" in name else 64
    return tiny_run(
        student={
            "model": f"timm:{name}",
            "architecture": {},
            "drop_path_rate": 0.5,
            "init": init,
            **STUDENTS[name],
        },
        data={"image_size": size},
        objective={"interpolation": "bilinear", "teacher_image_size": 64},
        batch={"global_batch_size": 4, "micro_batch_size": 2},
        runtime={"run_dir": str(folder / name)},
    )


def write_weights(path: Path) -> None:
    """A file of a ResNet whose running statistics are not those of a fresh one."""
    torch.manual_seed(3)
    net = timm.create_model("resnet18")
    for name, buffer in net.named_buffers():
        if name.endswith("running_mean"):
            buffer.normal_(0, 0.2)
        elif name.endswith("running_var"):
            buffer.uniform_(0.5, 2)
    torch.save(net.state_dict(), path)


def trained(engine: Engine, run: Run, updates: range) -> list[float]:
    """The losses of some steps."""
    return [take_step(engine, run, update) for update in updates]


def opened(run: Run) -> tuple[Engine, Checkpoints]:
    """The run's engine in training, and its checkpoints."""
    engine, job = start_engine(run, ZERO3)
    engine.task.train()
    checkpoints = Checkpoints(
        Path(run.run_dir()),
        engine,
        runtime=run.runtime,
        global_batch_size=run.batch.global_batch_size,
        facts={**job.facts(), "pictures": "noise", "commit": "", "recipe": run.to_dict()},
        check_stored=job.check_stored,
    )
    return engine, checkpoints


def held(engine: Engine) -> dict[str, torch.Tensor]:
    """Copies of what a checkpoint of this rank holds."""
    return {piece.key: piece.values.clone() for piece in state.shards(engine)}


def closed(engine: Engine) -> None:
    engine.deepspeed.destroy()
    start.forget_engines()


def result(name: str, folder: Path) -> dict[str, Any]:
    """Trains a student, and from the middle once more."""
    run = student_run(name, folder)
    if distributed.is_main():
        Path(run.run_dir()).mkdir()
        (Path(run.run_dir()) / "recipe.json").write_text(json.dumps(run.to_dict()))
    distributed.barrier()
    engine, checkpoints = opened(run)
    losses = trained(engine, run, range(SAVED_AT))
    checkpoints.optimizer_steps = SAVED_AT  # None was skipped.
    checkpoints.save(SAVED_AT)
    checkpoints.settle()
    losses += trained(engine, run, range(SAVED_AT, UPDATES))
    end = held(engine)
    closed(engine)

    engine, checkpoints = opened(run)
    for buffer in engine.task.student.buffers():  # Those of the file are to come from elsewhere.
        if buffer.is_floating_point():
            buffer.zero_()
    assert checkpoints.resume() == SAVED_AT
    again = trained(engine, run, range(SAVED_AT, UPDATES))
    resumed = held(engine)
    closed(engine)
    same = end.keys() == resumed.keys() and all(torch.equal(end[k], resumed[k]) for k in end)
    return {"losses": losses, "resumed": again, "same": same, "kinds": len(end)}


def main(folder: Path, name: str) -> None:
    distributed.start()
    start.start()
    write_result(folder, result(name, folder))
    distributed.barrier()


if __name__ == "__main__":
    main(Path(sys.argv[-2]), sys.argv[-1])
