"""Runs on a device that lags behind the host: what waits for it, and that events order the rest."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from functools import partial
from pathlib import Path

import depth_images
import depth_twin
import detection_twin
import pytest
import segmentation_twin
import twin
from dense_runs import flags_of
from labelled_folder import labelled_folder
from launch import ROOT, read_results, run_ranks
from pictures import write_pictures

PROGRAM = Path(__file__).parent / "programs" / "asynchronous_run.py"
STEPS = 5

# What the host waits for in a step, the table of docs/architecture.md: (what, where) -> how often.
AGREEMENT = {"read: loop._agree": 1}
# A gather more than two behind: at most one for each module with weights, of student and teacher,
# and pass.
GATHERS = {"event: partitioned_param_coordinator._fetch_sub_module_impl": 300}
# Of each micro batch: the last sums of gradients, and those before more than two others.
SUMS = {
    "stream: stage3.independent_gradient_partition_epilogue": 1,
    "event: stage3.__reduce_and_partition_ipg_grads": 1,
}
STAGE_3 = AGREEMENT | SUMS

# Of two images on a rank: which boxes there are, and which of them a level and a loss take.
BOXES = {
    "read: rpn.propose": 13,
    "read: matching.sample": 4,
    "read: mask_head.cut_masks": 2,
    "read: pooling._places_by_level": 8,
}
# Three stages of heads, each of which pools anew, and samples for boxes and again for masks.
BOXES_OF_HTC = {name: 3 * count for name, count in BOXES.items()} | {"read: matching.sample": 24}
NORM = {"read: stage3.complete_grad_norm_calculation_for_cpu_offload": 2}

BFLOAT16 = ("--engine.precision", "bfloat16")
SAVED = ("--runtime.save_every", "2", "--optim.ema_decay", "0.9", "--eval.every", "2")
TWO = """
--student.model vit_base_patch16 --student.architecture.embed_dim 16
--student.architecture.depths 1 --student.architecture.num_heads 2
--student.architecture.patch_size 8 --teachers.first.model clip_vit_base_patch16
--teachers.first.architecture.embed_dim 16 --teachers.first.architecture.depths 1
--teachers.first.architecture.num_heads 2 --teachers.first.architecture.patch_size 8
--teachers.first.source random --teachers.first.targets map summary
--teachers.first.summary.loss queue --teachers.first.summary.normaliser none
--teachers.second.model swinv2_base --teachers.second.architecture.embed_dim 8
--teachers.second.architecture.depths 1 1 --teachers.second.architecture.num_heads 1 1
--teachers.second.architecture.window_size 2 --teachers.second.source random
--teachers.second.placement sharded --teachers.second.normaliser batch
--data.image_size 32 --data.workers 0 --runtime.log_every 1 --eval.root= """
TUNED = """
--recipe finetune_clip_vit_base --student.architecture.embed_dim 16
--student.architecture.depths 2 --student.architecture.num_heads 2
--student.architecture.patch_size 8 --data.image_size 32 --data.workers 0
--runtime.log_every 1 --optim.warmup_epochs 0 """


def distilled(folder: Path, ranks: int, config: str, **zero: int) -> list[str]:
    """A command that distils the giant's twin, with other values in the JSON."""
    pictures = write_pictures(folder / "pictures", 40)
    words = twin.words(pictures, folder / "run", config=config, ranks=ranks)
    changed = json.loads(Path(words[1]).read_text())
    changed["zero_optimization"] |= zero
    words[1] = str(folder / "changed.json")
    Path(words[1]).write_text(json.dumps(changed))
    return words


def other(folder: Path, ranks: int, flags: str) -> list[str]:
    """A command at ZeRO 3 with these flags on labelled images."""
    images = labelled_folder(folder / "images", train=48, val=4, side=40)
    return [
        *("--deepspeed_config", str(ROOT / "ds_configs/zero3.json"), *flags.split()),
        *("--data.root", str(images), "--runtime.run_dir", str(folder / "run")),
        *("--batch.global_batch_size", "8", "--batch.micro_batch_size", str(8 // ranks)),
    ]


def detected(folder: Path, ranks: int, heads: str = "") -> list[str]:
    """A command that trains the giant's detection in small, with other heads."""
    images = detection_twin.pictures(folder / "coco")
    flags = flags_of(f"{detection_twin.FLAGS} {heads}")
    return flags(images, folder / "run", STEPS, ranks=ranks)


def deep(folder: Path, ranks: int) -> list[str]:
    """A command that trains the giant's depth in small."""
    images = depth_images.write_images(folder / "nyu", 8)
    return depth_twin.flags(images, folder / "run", STEPS, ranks=ranks)


def segmented(folder: Path, ranks: int) -> list[str]:
    """A command that trains the giant's segmentation in small."""
    images = segmentation_twin.write_images(folder / "ade", 8)
    return segmentation_twin.flags(images, folder / "run", STEPS, ranks=ranks)


def quick(*row: object) -> object:
    return pytest.param(*row, id=str(row[0]))


def slow(*row: object) -> object:
    return pytest.param(*row, id=str(row[0]), marks=pytest.mark.sweep)


# Gradients are summed while backward goes on; what forward frees is gathered again in backward.
SMALL = {"reduce_bucket_size": 5000}
MANY_SUMS = {name: 30 * count for name, count in SUMS.items()}
FREED = {"stage3_prefetch_bucket_size": 0, "stage3_max_reuse_distance": 0}
FREED["stage3_param_persistence_threshold"] = 0
TWICE = {name: 2 * count for name, count in SUMS.items()}
HTC = "--task.detection.heads htc --task.detection.extra_attention True"
MICRO = ("--batch.micro_batch_size", "2", "--optim.layer_decay", "0.8")
RUNS = [
    quick("zero1", 2, AGREEMENT, partial(distilled, config="zero1")),
    quick("zero3", 2, AGREEMENT | MANY_SUMS, partial(distilled, config="zero3", **SMALL)),
    quick("hpZ", 4, STAGE_3, partial(distilled, config="zero3_hpz", **FREED)),
    slow("zero2", 2, AGREEMENT, partial(distilled, config="zero2")),
    slow("accumulation", 2, AGREEMENT | TWICE, partial(distilled, config="zero3")),
    slow("two teachers", 2, STAGE_3, partial(other, flags=TWO)),
    slow("cached", 2, STAGE_3, partial(distilled, config="zero3")),
    slow("fine-tuning", 2, STAGE_3, partial(other, flags=TUNED)),
    slow("segmentation", 2, STAGE_3, segmented),
    slow("detection", 2, STAGE_3 | BOXES, detected),
    slow("htc", 2, STAGE_3 | BOXES_OF_HTC, partial(detected, heads=HTC)),
    slow("depth", 2, STAGE_3, deep),
    slow("teacher stream", 2, STAGE_3, partial(distilled, config="zero3")),
    slow("offload", 2, STAGE_3 | NORM, partial(distilled, config="zero3_offload")),
]
FLAGS = {
    "zero1": BFLOAT16,
    "zero2": (*BFLOAT16, *MICRO),
    "zero3": SAVED,
    "hpZ": ("--engine.node_size", "2"),
    "accumulation": MICRO,
    "teacher stream": (
        *("--teacher.placement", "replicated", "--task.distillation.teacher_stream", "True"),
    ),
    "cached": ("--task.distillation.views", "1", "--task.distillation.cache", "{}/cache"),
}


def seen(folder: Path, ranks: int, words: list[str]) -> list[dict]:
    """Trains on the device; returns what each rank saw of it."""
    run_ranks(PROGRAM, folder, *words, ranks=ranks, results=folder)
    found = read_results(folder, ranks)
    assert [rank["code"] for rank in found] == [0] * ranks
    return found


@pytest.mark.parametrize(("name", "ranks", "table", "words"), RUNS)
def test_a_step_waits_as_the_table_says_and_events_order_the_rest(
    tmp_path, name, ranks, table, words
):
    flags = [flag.format(tmp_path) for flag in FLAGS.get(name, ())]
    given = [*words(tmp_path, ranks), "--optim.max_steps", str(STEPS), *flags]
    for rank in seen(tmp_path, ranks, given):
        assert rank["races"] == []
        assert len(rank["steps"]) == STEPS
        # In the first step DeepSpeed comes to know the modules, and after the last one the teacher
        # is looked at.
        for step in map(str, range(2, STEPS)):
            waits = Counter(rank["steps"][step])
            assert waits - Counter(GATHERS | table) == Counter(), step
    if flags == [*SAVED]:
        shutil.rmtree(tmp_path / f"run/checkpoints/step_{STEPS:08}")
        for rank in seen(tmp_path, ranks, given):
            assert rank["races"] == []
            assert list(rank["steps"]) == [str(STEPS)], "it goes on from the step before"
