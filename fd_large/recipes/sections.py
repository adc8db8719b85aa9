"""Sections of a recipe, which are frozen dataclasses that check their values when made.

Only the standard library is imported, so that `--help` does not wait for torch. The comment above a
field is its help text on the command line.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar, Literal

from fd_large.errors import ConfigError, ConflictError, nearest
from fd_large.ranks.failures import LONGEST_WAIT_SECONDS
from fd_large.recipes.architectures import Architecture
from fd_large.recipes.family import FamilyArchitecture
from fd_large.recipes.fields import (
    at_least,
    check_types,
    is_name,
    not_negative,
    positive,
    require,
    statistics_or_none,
    within,
)

# Learning rates are stated per this many images of a global batch, as in the paper's
# configurations.
RATE_BATCH_SIZE = 512
FOLLOWING = ("optim.warmup_lr", "optim.min_lr", "optim.warmup_epochs")
"""Fields that follow other fields unless the user sets them (`Optim.implied`)."""

AUTO, ADAMW, RANDOM = "auto", "adamw", "random"
STUDENTS = "students"
"""Name of the folder, inside the folder of a run, with the run folders of several students."""

# Fields of the student that decide how sizes that do not fit are treated.
SIZE_FIELDS = ("size_rule", "window_rule", "shift_stages", "stage_windows")


USUAL_NORM_BATCH, FEWEST_OF_NORM = 32, 8
"""Default and least number of images that share the statistics of a batch norm."""


@dataclass(frozen=True, kw_only=True)
class Student:
    """The model that is trained. It starts from random weights or from a file."""

    place: ClassVar[str] = "student"

    # Name of the model, for example swinv2_base or vit_base_patch16. A model of timm is named
    # timm:NAME, for example timm:convnextv2_atto (docs/timm.md), and a model of your own
    # module:PATH/TO/FILE.py:NAME (docs/extending.md).
    model: str
    # Changes to the named model's shape. None keeps the model's own value.
    architecture: Architecture = field(default_factory=Architecture)
    # Distribution of random initial weights. fd: normal with standard deviation 0.02; the last
    # weight of each residual branch shrinks with depth, and the norms at the ends of SwinV2's
    # residual branches start at 1e-5. official: as in the Swin-Transformer repository, where the
    # norms at the ends of SwinV2's residual branches start at 0.
    initialization: Literal["fd", "official"] = "fd"
    # Probability with which the last block drops a residual branch, in [0, 1). The probability
    # rises linearly over the blocks, from 0 in the first block. 0 turns drop path off.
    drop_path_rate: float = 0.1
    # Weights to start from: a file or a run folder (docs/weights.md lists the formats). Empty
    # starts from random weights.
    init: str = ""
    # Name patterns (with * and ?) of tensors in which student.init and the model may differ. A
    # tensor of the model that the file lacks then stays random, and a tensor of the file that the
    # model lacks is ignored.
    init_allow: tuple[str, ...] = ()
    # Number of neighbouring images of the global batch that share the statistics of a batch norm in
    # training. It matters only for a model with batch norms, such as a ResNet. 0: the running
    # statistics of student.init are used unchanged. auto: 0 with student.init; without it, the
    # divisor of batch.global_batch_size, at least 8, that is nearest to 32.
    norm_batch: int | Literal["auto"] = "auto"
    # What happens to an image whose size is not a multiple of the patch size. drop: the remaining
    # pixels are ignored, as published. pad: the image is padded, and maps are padded as window_rule
    # says.
    size_rule: Literal["drop", "pad"] = "drop"
    # How a Swin model cuts a map into windows if the map's size is not a multiple of the window
    # size, or if the map is no larger than a window. masked: padding is hidden from attention, a
    # window is never larger than the map, and a single window is not shifted. official: as in the
    # published backbones of mmdetection, mmsegmentation and MIM-Depth-Estimation, padding takes
    # part in attention, and windows keep their size and shift; this needs size_rule pad.
    window_rule: Literal["masked", "official"] = "masked"
    # Whether odd blocks shift their windows, a value for each stage, under window_rule official.
    # True True False False is the choice of MIM-Depth-Estimation. Empty: odd blocks of all stages
    # shift their windows.
    shift_stages: tuple[bool, ...] = ()
    # Side of a window in tokens, a number for each stage of a SwinV2, under window_rule official;
    # for example 30 30 30 15. Empty: architecture.window_size in all stages.
    stage_windows: tuple[int, ...] = ()
    # Data type of the residual stream. float32: always float32. compute: the data type of matrix
    # products; if that is bfloat16, the residual stream takes less memory.
    residual_dtype: Literal["float32", "compute"] = "float32"
    # How the backward pass gets the attention maps. keep: the forward pass stores them (refused on
    # GPUs). recompute: the backward pass computes them again. auto: recompute on GPUs, and keep on
    # CPUs, where it is faster.
    attention_memory: Literal["auto", "keep", "recompute"] = "auto"
    # Whether the backward pass computes blocks again. off: it does not. every: the forward pass
    # stores only the inputs of blocks, and the backward pass computes the blocks again. offload: as
    # every, with the inputs in host memory.
    activation_checkpointing: Literal["off", "every", "offload"] = "off"
    # Number k, 1 or more: every k-th block is checkpointed; 1 checkpoints every block. Ignored if
    # activation_checkpointing is off.
    checkpoint_every: int = 1

    def __post_init__(self) -> None:
        check_types(self, self.place)
        within(f"{self.place}.drop_path_rate", self.drop_path_rate, "[0, 1)")
        at_least(f"{self.place}.checkpoint_every", self.checkpoint_every, 1, "blocks")
        if self.norm_batch != "auto" and self.norm_batch != 0:
            at_least(f"{self.place}.norm_batch", self.norm_batch, 2, "images, or auto, or 0")
        for name in ("shift_stages", "stage_windows"):
            require(
                self.window_rule == "official" or not getattr(self, name),
                f"{self.place}.{name}: only for window_rule official",
                f"{getattr(self, name)} with window_rule {self.window_rule}",
                "none",
                beside=(f"{self.place}.window_rule",),
            )
        for side in self.stage_windows:
            at_least(f"{self.place}.stage_windows", side, 1, "tokens")

    def without_rules_unknown_to(
        self, architecture: FamilyArchitecture, *, unchanged: Collection[str] = ()
    ) -> Student:
        """Returns the section with the defaults of those fields that have no use for a model.

        Only the fields on image and window sizes are reset (`SIZE_FIELDS`), without those in
        `unchanged`.
        """
        usual = Student(model=self.model).sizes()
        if architecture.can_pad:
            usual = {} if architecture.has_stage_windows else {"stage_windows": ()}
        return replace(self, **{name: v for name, v in usual.items() if name not in unchanged})

    def sizes(self) -> dict[str, Any]:
        """Returns {name: value} of the fields on image and window sizes (`SIZE_FIELDS`).

        They decide what the model does with images and maps whose sizes are no multiples of the
        patch size and of the window size, and the windows of each stage.
        """
        return {name: getattr(self, name) for name in SIZE_FIELDS}


@dataclass(frozen=True, kw_only=True)
class NamedStudent(Student):
    """A student among several that learn from the same batches, with its optimisation."""

    place: ClassVar[str] = "students.NAME"

    # Peak learning rate of this student, per 512 images. None: optim.base_lr.
    base_lr: float | None = None
    # Learning rate of this student at which the warm-up starts, per 512 images. None:
    # optim.warmup_lr. If this student has its own base_lr, and neither this field nor
    # optim.warmup_lr is set, the ratio of optim.warmup_lr to optim.base_lr is kept.
    warmup_lr: float | None = None
    # Learning rate of this student at which the schedule ends, per 512 images. None: optim.min_lr.
    # If this student has its own base_lr, and neither this field nor optim.min_lr is set, the ratio
    # of optim.min_lr to optim.base_lr is kept.
    min_lr: float | None = None
    # Weight decay of this student. None: optim.weight_decay.
    weight_decay: float | None = None
    # Factor of this student's learning rate from a layer to the layer below it. None:
    # optim.layer_decay.
    layer_decay: float | None = None
    # Decay of the exponential moving average of this student's weights. None: optim.ema_decay. 0:
    # no average is kept.
    ema_decay: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        try:
            # The ends are below any rate here; a run compares the rates with its own ends.
            self.optimised(Optim(warmup_lr=0, min_lr=0))
        except ConflictError as error:
            raise error.renamed(lambda n: n.replace("optim.", f"{self.place}.")) from None
        except ConfigError as error:
            raise ConfigError(str(error).replace("optim.", f"{self.place}.")) from None

    def alone(self) -> Student:
        """Returns the section `student` for a run that trains only this student."""
        return Student(**{f.name: getattr(self, f.name) for f in fields(Student)})

    def optimised(self, optim: Optim) -> Optim:
        """Returns the section `optim` for a run that trains only this student.

        The student's own values replace those of `optim`, the section of the common run.
        """
        values = {f.name: getattr(self, f.name) for f in fields(self) if hasattr(optim, f.name)}
        return replace(
            optim, **{name: value for name, value in values.items() if value is not None}
        )


_SOURCES = (
    *("a file of weights", "a folder of a run or an export", "package:NAME", "hf:REPO"),
    *("open_clip:ARCH/TAG", "timm:NAME", "module:PATH/TO/FILE.py:NAME"),
)


@dataclass(frozen=True, kw_only=True)
class FrozenModel:
    """A frozen model: its name and the source of its weights."""

    place: ClassVar[str] = "model"
    folder_schemes: ClassVar[tuple[str, ...]] = ()
    """Prefixes that `source` may have before a folder's path, such as "cached:"."""

    # Name of the model, which also decides the statistics that normalise its images, and its final
    # norm. auto: the model to which the weights of `source` belong.
    model: str = AUTO
    # Changes to the named model's shape. None keeps the model's own value.
    architecture: Architecture = field(default_factory=Architecture)
    # Source of the weights: a file, a folder, or another source that docs/weights.md
    # lists. `random`: random weights, for throughput runs and tests. A run whose source is empty
    # does not start.
    source: str = ""
    # Name patterns (with * and ?) of tensors in which `source` and the model may differ. A tensor
    # of the model that the source lacks then stays random, and a tensor of the source that the
    # model lacks is ignored.
    allow: tuple[str, ...] = ()
    # Mean and standard deviation of red, green and blue with which the model's images are
    # normalised: six numbers for pixel values in 0..1. Empty: the statistics of the model's
    # training.
    statistics: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        check_types(self, self.place)
        statistics_or_none(f"{self.place}.statistics", self.statistics)

    def require_source(self, flag: str, *, others: Iterable[str] = ()) -> None:
        """Refuses a model without a source of weights.

        Args:
            flag: The flag of the model's source, for messages.
            others: Names of the other models, of which the message suggests the nearest, since the
                model's name may be mistyped.

        Raises: ConfigError: if `source` is empty.
        """
        if self.source:
            return
        where = flag.removeprefix("--").removesuffix(".source")
        others = list(others)
        hint = f" ({nearest(where.rpartition('.')[2], others)})" if others else ""
        # Random weights show no model.
        folders = (f"{scheme}FOLDER" for scheme in self.folder_schemes)
        forms = (*_SOURCES, *folders, *([RANDOM] if self.model != AUTO else []))
        expected = f"{', '.join(forms[:-1])} or {forms[-1]}"
        if self.model == AUTO:
            raise ConfigError(
                f"{where}: neither a model nor weights; got nothing, expected {expected}. Set "
                f"{flag}, or correct the name{hint}."
            )
        mistyped = f", or correct a mistyped name{hint}" if hint.startswith(" (nearest") else ""
        raise ConfigError(
            f"{where}.source: {self.model} has no weights; got nothing, expected {expected}. Set "
            f"{flag}; random is for a test or a throughput run{mistyped}."
        )


@dataclass(frozen=True, kw_only=True)
class Data:
    """The training images, and the crop of each image that student and teacher see."""

    # The training images. A folder is read recursively, and labels are ignored. Tar shards or
    # parquet files are given as their folder, as one file, or as a pattern
    # like "train-{000..146}.tar". Further forms are a saved Hugging Face dataset, addresses of tar
    # or parquet files that begin with s3://, gs:// or https:// (docs/data.md), builtin:photographs,
    # and a source of your own, module:PATH/TO/FILE.py:NAME (docs/extending.md). A mixture of
    # several, by weights, is written "0.7 /data/imagenet + 0.3 web=/data/web" (docs/data.md).
    root: str = ""
    # Fraction of the images that is held out of all training and used for tests: k-NN, linear
    # probes and fine-tuning. The images are those of a folder without train/ and val/, or, in
    # segmentation, depth and detection, those of the train split. The names of the files decide
    # which images are held out, so that added images do not change the choice among the others. 0
    # holds no image out.
    val_fraction: float = 0.0
    # Fraction of the labelled training images of each class from which fine-tuning, linear probes
    # and k-NN learn, in (0, 1]. At least one image of each class is used. 1: all images.
    fraction: float = 1.0
    # Largest number of labelled training images of each class from which fine-tuning, linear probes
    # and k-NN learn. 0: no limit.
    per_class: int = 0
    # Seed of the choice of labelled images by data.fraction and data.per_class. The choice also
    # depends on the images' names.
    label_seed: int = 0
    # Folder on a local disk of each node for blocks of files that are read from an object store,
    # and for images that are unpacked from parquet files. Empty: the folder `blocks` of the
    # cache (FD_CACHE, else ~/.cache/fd_large).
    cache: str = ""
    # Size limit of data.cache on each node, in gigabytes, above 0. When it is exceeded, the files
    # that were used longest ago are removed.
    cache_gb: float = 50.0
    # Side of the square crop, in pixels.
    image_size: int = 224
    # Sides of the square crop in a run at several resolutions, in pixels; data.image_size must be
    # one of them. Each step draws one side for all its images. Evaluations and tables of positions
    # use data.image_size. Empty: all steps use data.image_size.
    image_sizes: tuple[int, ...] = ()
    # Smallest area of a crop, as a fraction of the image's area in (0, 1]. 1 takes the whole image.
    min_crop_scale: float = 0.08
    # Strength of random changes of brightness, contrast, saturation and hue, in [0, 1]; hue changes
    # by a quarter of this strength. 0 turns the changes off, as in the paper.
    color_jitter: float = 0.0
    # Probability of turning an image grey, in [0, 1]. 0 turns this off, as in the paper.
    grayscale_probability: float = 0.0
    # Whether each image is mixed with the neighbouring image of the global batch (mixup). The
    # weight of the two images is random, and the same in each group of 128 images. Student and
    # teachers see the mixed image.
    image_mixup: bool = False
    # Largest fraction of images that may be unusable (damaged, or larger than max_pixels),
    # in [0, 1). Unusable images are skipped and named. The fraction is taken of the images tried in
    # all starts of the run, counted as at least 1000. If it is exceeded, the run stops and lists
    # the unusable images, and the next start counts from 0. A value of 0 stops the run at the first
    # unusable image.
    max_bad_fraction: float = 0.01
    # Largest number of pixels of an image. Larger images are skipped like damaged images, before
    # they are decoded. The default is 8192 x 8192; an image of that size takes up to 0.9 GB while
    # it is decoded.
    max_pixels: int = 2**26
    # Number of loader processes per rank. The limit is 16 for each core that the rank may use, but
    # at least 64. 0 loads in the training process.
    workers: int = 4

    def __post_init__(self) -> None:
        check_types(self, "data")
        at_least("data.image_size", self.image_size, 1, "pixels")
        named = " ".join(map(str, self.image_sizes))
        require(
            len(set(self.image_sizes)) == len(self.image_sizes),
            "data.image_sizes: a size is given more than once",
            named,
            "different numbers",
        )
        for side in self.image_sizes:
            at_least("data.image_sizes", side, 1, "pixels")
        require(
            self.image_size in self.sides,
            "data.image_size: not one of data.image_sizes",
            self.image_size,
            f"one of {named}",
            beside=("data.image_sizes",),
        )
        within("data.min_crop_scale", self.min_crop_scale, "(0, 1]")
        within("data.color_jitter", self.color_jitter, "[0, 1]")
        within("data.grayscale_probability", self.grayscale_probability, "[0, 1]")
        within("data.val_fraction", self.val_fraction, "[0, 1)")
        within("data.fraction", self.fraction, "(0, 1]")
        at_least("data.per_class", self.per_class, 0, "images")
        within("data.max_bad_fraction", self.max_bad_fraction, "[0, 1)")
        at_least("data.max_pixels", self.max_pixels, 1, "pixels")
        at_least("data.workers", self.workers, 0, "processes")
        positive("data.cache_gb", self.cache_gb)

    @property
    def sides(self) -> tuple[int, ...]:
        """Sides in pixels of the square crops; a step has crops of one of these sides.

        They are `image_sizes`, or `image_size` alone if that field is empty.
        """
        return self.image_sizes or (self.image_size,)


@dataclass(frozen=True, kw_only=True)
class Optim:
    """The optimiser, its learning rate schedule (linear warm-up, then a decay) and clipping.

    The three learning rates are per 512 images: a step uses value x global_batch_size / 512.
    """

    # Name of the optimiser. adamw: AdamW. lars: LARS, for linear probes with large batches. An
    # optimiser of your own, a torch.optim.Optimizer that acts element by element and takes (groups,
    # lr): module:FILE.py:NAME (docs/extending.md).
    name: str = ADAMW
    # Peak learning rate per 512 images.
    base_lr: float = 3e-4
    # Learning rate per 512 images at which the warm-up starts. The schedule cosine uses it for the
    # first two steps, as in the published runs. If base_lr is changed and warmup_lr is not set,
    # warmup_lr keeps its ratio to base_lr.
    warmup_lr: float = 5e-7
    # Learning rate per 512 images at which the schedule ends. If base_lr is changed and min_lr is
    # not set, min_lr keeps its ratio to base_lr.
    min_lr: float = 5e-6
    # Shape of the learning rate. cosine: half a period of a cosine after the warm-up. linear: a
    # straight line over all steps, multiplied by the warm-up's factor, as in the published
    # segmentation runs of Swin, BEiT and MAE. linear_after_warmup: a straight line from the end of
    # the warm-up, as in mmsegmentation 1.x. rise_and_fall: a rise with power 0.9 during the
    # warm-up, a fall with the same power in as many steps, then min_lr, as in the published depth
    # runs of SwinV2. steps: the peak divided by ten after each fraction of the run in `drops`, but
    # not below min_lr, multiplied by the warm-up's factor, as in the published detectors.
    schedule: Literal["cosine", "linear", "linear_after_warmup", "rise_and_fall", "steps"] = (
        "cosine"
    )
    # Fractions of the run after which the learning rate of the schedule steps falls, each between 0
    # and 1, such as 0.75 0.9167 (after epochs 27 and 33 of 36). Other schedules need an empty list.
    drops: tuple[float, ...] = ()
    # Decoupled weight decay. Norms, biases and SwinV2's position-bias MLPs are not decayed. 0 turns
    # it off.
    weight_decay: float = 0.05
    # Decay rates of AdamW's first and second moments, each in [0, 1).
    betas: tuple[float, float] = (0.9, 0.999)
    # Constant added to the square root of AdamW's second moment.
    eps: float = 1e-8
    # Largest L2 norm of the gradient of all parameters together. A gradient of larger norm is
    # scaled down to this norm. 0 turns clipping off.
    clip_norm: float = 3.0
    # Factor of the learning rate from a layer to the layer below it, down to the embedding,
    # in (0, 1]. 1 gives all layers the same learning rate. The factor scales a layer's peak in
    # every schedule, its warmup_lr in every schedule but cosine, and its min_lr in rise_and_fall
    # alone.
    layer_decay: float = 1.0
    # Factor of the learning rate of the whole backbone, in (0, 1], multiplied by the factors of
    # layer_decay. Heads and feature pyramids have the full learning rate. 1 turns it off.
    backbone_rate: float = 1.0
    # Decay of the exponential moving average of the weights, in [0, 1), for example 0.9999.
    # Evaluation and export use the average. 0 turns it off.
    ema_decay: float = 0.0
    # Number of passes over the dataset, which also sets the length of the schedule.
    epochs: int = 300
    # Length of the warm-up, in which the learning rate rises, in epochs; fractions are allowed. 0
    # turns warm-up off. If optim.epochs is set to a number that does not exceed the warm-up, and
    # warmup_epochs is not set, the warm-up keeps its share of the run.
    warmup_epochs: float = 10.0
    # Number of optimiser steps of the run and of its schedule, in place of optim.epochs. 0 uses
    # optim.epochs.
    max_steps: int = 0
    # Implementation of AdamW. auto: DeepSpeed's if it can be built, else NVIDIA apex's if it is
    # installed, else torch's.
    fused: Literal["auto", "deepspeed", "apex", "torch"] = "auto"

    def __post_init__(self) -> None:
        check_types(self, "optim")
        require(
            self.name != "muon",
            "optim.name: Muon works on whole matrices, but ZeRO updates shards that may cut a "
            "matrix anywhere",
            repr(self.name),
            "an optimiser that acts element by element",
            "Use adamw or lars",
        )
        usual = {"betas": (0.9, 0.999), "eps": 1e-8, "fused": "auto"}
        for name, value in usual.items() if self.name != ADAMW else ():
            require(
                getattr(self, name) == value,
                f"optim.{name}: read by AdamW alone",
                getattr(self, name),
                f"{value} beside optim.name {self.name}",
                "set it in the optimiser's own file",
                beside=("optim.name",),
            )
        for name in ("base_lr", "warmup_lr", "min_lr", "weight_decay", "clip_norm"):
            not_negative(f"optim.{name}", getattr(self, name))
        for value in self.betas:
            within("optim.betas", value, "[0, 1)")
        positive("optim.eps", self.eps)
        within("optim.layer_decay", self.layer_decay, "(0, 1]")
        within("optim.backbone_rate", self.backbone_rate, "(0, 1]")
        within("optim.ema_decay", self.ema_decay, "[0, 1)")
        self._check_schedule()

    def _check_schedule(self) -> None:
        steps = self.schedule == "steps"
        require(
            bool(self.drops) == steps and all(0 < drop < 1 for drop in self.drops),
            f"optim.drops: do not fit optim.schedule {self.schedule}",
            self.drops,
            "shares of the run between 0 and 1" if steps else "none",
            beside=("optim.schedule",),
        )
        at_least("optim.epochs", self.epochs, 1, "passes over the data")
        not_negative("optim.warmup_epochs", self.warmup_epochs)
        at_least("optim.max_steps", self.max_steps, 0, "steps")
        require(
            bool(self.max_steps) or self.warmup_epochs < self.epochs,
            "optim.warmup_epochs: warm-up longer than the run",
            self.warmup_epochs,
            f"less than optim.epochs = {self.epochs}",
            beside=("optim.epochs",),
        )
        require(
            self.min_lr <= self.base_lr and self.warmup_lr <= self.base_lr,
            "optim.base_lr: below the learning rate at an end of the schedule",
            f"base_lr {self.base_lr:g}, warmup_lr {self.warmup_lr:g}, min_lr {self.min_lr:g}",
            "base_lr to be the largest of the three",
            beside=tuple(
                f"optim.{name}"
                for name in ("warmup_lr", "min_lr")
                if getattr(self, name) > self.base_lr
            ),
        )

    def implied(self, values: Mapping[str, Any]) -> dict[str, float]:
        """Returns values of fields that follow from changed fields, such as {"optim.min_lr": 1e-6}.

        If base_lr changes, the learning rates at both ends of the schedule keep their ratios to
        base_lr. If the changed number of epochs does not exceed the epochs of warm-up, the warm-up
        keeps its share of the run.

        Args:
            values: The changed fields, {full name: value}. These fields are not in the result.
        """
        following: dict[str, float] = {}
        peak = values.get("optim.base_lr")
        if isinstance(peak, int | float) and self.base_lr:
            ends = {"optim.warmup_lr": self.warmup_lr, "optim.min_lr": self.min_lr}
            following |= {name: rate * (peak / self.base_lr) for name, rate in ends.items()}
        epochs = values.get("optim.epochs")
        by_steps = values.get("optim.max_steps", self.max_steps)
        if isinstance(epochs, int) and epochs <= self.warmup_epochs and not by_steps:
            following["optim.warmup_epochs"] = self.warmup_epochs * (epochs / self.epochs)
        return {name: value for name, value in following.items() if name not in values}

    def rates(self, global_batch_size: int) -> tuple[float, float, float]:
        """Returns the learning rates of a run with `global_batch_size` images in a step.

        Returns: the rate at the peak, at the start of the warm-up and at the end of the schedule.
        """
        scale = global_batch_size / RATE_BATCH_SIZE
        return self.base_lr * scale, self.warmup_lr * scale, self.min_lr * scale


@dataclass(frozen=True, kw_only=True)
class Batch:
    """The number of images in a step, and in one pass on a rank."""

    # Number of images in a step, over all ranks and micro-batches.
    global_batch_size: int = 2048
    # Number of images in one pass on a rank. auto: the largest power of two that divides the number
    # of images of a rank in a step, and that fits in memory; a trial step finds it. The number of
    # passes per step follows.
    micro_batch_size: int | Literal["auto"] = "auto"

    def __post_init__(self) -> None:
        check_types(self, "batch")
        at_least("batch.global_batch_size", self.global_batch_size, 1, "images")
        if self.micro_batch_size != "auto":
            at_least("batch.micro_batch_size", self.micro_batch_size, 1, "images, or auto")
            require(
                self.global_batch_size % self.micro_batch_size == 0,
                "batch.micro_batch_size: does not divide batch.global_batch_size"
                f" = {self.global_batch_size}",
                self.micro_batch_size,
                "a divisor",
                "pass --batch.micro_batch_size auto",
                beside=("batch.global_batch_size",),
            )


@dataclass(frozen=True, kw_only=True)
class Engine:
    """Precision, nodes and disks of the ranks. DeepSpeed's own settings are in its JSON file."""

    # Data type of parameters and matrix products. auto: bfloat16 on GPUs, float32 on CPUs. Master
    # weights, moments, softmax and loss are always float32.
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    # Number of ranks in a node. 0 takes the number from the launcher.
    node_size: int = 0
    # Parts of the student that torch.compile compiles. off: none. blocks: each block; under ZeRO-3,
    # the parts of a block between the all-gathers of its parameters.
    compile: Literal["off", "blocks"] = "off"
    # Folder on a local disk for master weights, moments and gradients, 16 bytes per parameter (20
    # with optim.ema_decay), with ds_configs/zero3_nvme.json. The folder is empty again when the run
    # ends.
    nvme_path: str = ""

    def __post_init__(self) -> None:
        check_types(self, "engine")
        at_least("engine.node_size", self.node_size, 0, "ranks")


@dataclass(frozen=True, kw_only=True)
class Eval:
    """Evaluation during training, on images that are not trained on."""

    # Held-out images: a folder, builtin:photographs-held-out, or a source of your own,
    # module:PATH/TO/FILE.py:NAME. Empty turns the held-out loss off.
    root: str = ""
    # Number of steps between two evaluations. 0 evaluates only before the first step and after the
    # last step.
    every: int = 0
    # Number of views in an evaluation. The views are the same in every evaluation, and are spread
    # over the images.
    views: int = 256
    # Folder of labelled images, with train/ and val/ or test/, on which training tests the student
    # of a distillation by k-NN, as `evaluate --task knn` does. Empty turns the test off.
    knn_root: str = ""
    # Number of steps between two k-NN tests. 0 tests only before the first step and after the last
    # step.
    knn_every: int = 0
    # Metric by which evaluations are compared, so that the best checkpoint is kept besides the
    # newest ones, in RUN/checkpoints/best. Examples are held_out_loss and test_knn for a
    # distillation, test_top1 for fine-tuning, box_AP for detection, val_mIoU for segmentation and
    # val_rmse for depth. Lower is better for losses and for errors of the depth, higher for other
    # metrics. Empty: only the newest checkpoints are kept.
    best_metric: str = ""
    # Number of consecutive evaluations without a better value of best_metric after which the run
    # ends early. 0 trains to the last step.
    patience: int = 0

    def __post_init__(self) -> None:
        check_types(self, "eval")
        at_least("eval.patience", self.patience, 0, "evaluations")
        require(
            bool(self.best_metric) or not self.patience,
            "eval.patience: needs a metric to compare evaluations by",
            self.patience,
            "0 while eval.best_metric is empty",
            "set --eval.best_metric, for example held_out_loss",
            beside=("eval.best_metric",),
        )
        require(
            bool(self.every or self.knn_every) or not self.patience,
            "eval.patience: needs evaluations during training",
            self.patience,
            "0 while eval.every and eval.knn_every are 0",
            beside=("eval.every", "eval.knn_every"),
        )
        at_least("eval.knn_every", self.knn_every, 0, "steps")
        require(
            bool(self.knn_root) or not self.knn_every,
            "eval.knn_every: needs images to test the student on",
            self.knn_every,
            "0 while eval.knn_root is empty",
            beside=("eval.knn_root",),
        )
        at_least("eval.every", self.every, 0, "steps")
        at_least("eval.views", self.views, 1, "views")


@dataclass(frozen=True, kw_only=True)
class Guard:
    """Guard that skips steps whose loss or gradient norm is not finite or far too large."""

    # Whether steps with an abnormal loss or gradient norm are skipped. False: only the steps that
    # DeepSpeed itself refuses are skipped.
    enabled: bool = True
    # Number of consecutive skipped steps after which the run rolls back to the last checkpoint
    # before them.
    skips: int = 5
    # Number of roll-backs after which the run stops with exit code 3 instead of rolling back again.
    roll_backs: int = 3
    # Largest distance of a loss or gradient norm above its median over the last 100 accepted steps,
    # as a multiple of their spread, above 0. The spread counts as at least 5% of the median loss,
    # and at least a factor of 1.28 for the gradient norm.
    spread: float = 10.0

    def __post_init__(self) -> None:
        check_types(self, "guard")
        at_least("guard.skips", self.skips, 1, "steps")
        at_least("guard.roll_backs", self.roll_backs, 0, "times")
        positive("guard.spread", self.spread)


@dataclass(frozen=True, kw_only=True)
class Runtime:
    """The run's folder, seed, log, checkpoints and reaction to signals."""

    # Folder of the run. Empty: runs/RECIPE.
    run_dir: str = ""
    # Number of steps between two lines of the log.
    log_every: int = 20
    # Trackers, which show the numbers of the run besides the progress bar and the files in its
    # folder. tensorboard: curves in RUN/events. wandb: Weights & Biases. mlflow: MLflow. A Tracker
    # of your own: module:FILE.py:NAME (docs/extending.md). An empty list turns them off.
    trackers: tuple[str, ...] = ("tensorboard",)
    # Name of the run in wandb and mlflow. Empty: the name of its folder.
    name: str = ""
    # Tags of the run in wandb and mlflow.
    tags: tuple[str, ...] = ()
    # Seed of initial weights, order of images, crops and drop path, in [0, 2**63). The results do
    # not depend on the number of ranks.
    seed: int = 0
    # Number of steps between two checkpoints. 0 saves a checkpoint once per epoch. The last step
    # always has a checkpoint.
    save_every: int = 0
    # Minutes between two checkpoints, which are saved in addition to those of save_every. 0 turns
    # these checkpoints off.
    save_minutes: float = 0.0
    # Number of newest checkpoints that are kept, 1 or more; older checkpoints are removed.
    keep_last: int = 2
    # Interval in steps at which further checkpoints are kept: 1000 also keeps the checkpoints of
    # steps 1000, 2000 and so on. 0 keeps no further checkpoints.
    keep_every: int = 0
    # Number of consecutive checkpoints that cannot be written, for example on a full disk, after
    # which the run stops. 0: the run never stops for this reason.
    max_failed_saves: int = 0
    # Whether all ranks save a checkpoint and exit with code 75 on SIGTERM, on SIGUSR1, if a file
    # named stop is in the run folder, or when the end of the Slurm job approaches.
    preemption: bool = True
    # Seconds between the scheduler's signal and the forced end of the job, as in sbatch's
    # option --signal.
    notice_seconds: float = 120.0
    # Number of steps between two checks of the teacher's weights and of each rank's speed. The
    # teacher is also checked before each checkpoint. 0 turns the checks off.
    canary_every: int = 500
    # Seconds for which a rank may wait for the end of a step, for a batch of an evaluation or for
    # the end of a save. A rank that waits longer writes its stack traces and exits with code 75.
    # The number is less than 1800, at which collectives time out. 0 turns the watchdog off.
    watchdog_seconds: float = 600.0

    def __post_init__(self) -> None:
        check_types(self, "runtime")
        if self.name:
            is_name("runtime.name", self.name)
        at_least("runtime.log_every", self.log_every, 1, "steps")
        at_least("runtime.save_every", self.save_every, 0, "steps")
        not_negative("runtime.save_minutes", self.save_minutes)
        at_least("runtime.keep_last", self.keep_last, 1, "checkpoints")
        at_least("runtime.keep_every", self.keep_every, 0, "steps")
        at_least("runtime.max_failed_saves", self.max_failed_saves, 0, "checkpoints")
        not_negative("runtime.notice_seconds", self.notice_seconds)
        at_least("runtime.canary_every", self.canary_every, 0, "steps")
        longest = f"[0, {LONGEST_WAIT_SECONDS:.0f})"
        within("runtime.watchdog_seconds", self.watchdog_seconds, longest)
        require(
            0 <= self.seed < 2**63,
            "runtime.seed: invalid seed",
            self.seed,
            "a whole number in [0, 2**63)",
        )
