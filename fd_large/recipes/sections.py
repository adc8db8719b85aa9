"""The sections of a run: frozen dataclasses, checked when they are made.

Standard library only: `--help` must not wait for torch. The comment over a field is its help on the
command line.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from fd_large.recipes.architectures import Architecture
from fd_large.recipes.fields import at_least, check_types, not_negative, positive, require
from fd_large.recipes.task_sections import Detection, FineTune

# Every rate of the paper's configurations is stated per this many images of a global batch.
RATE_BATCH_SIZE = 512

AUTO = "auto"


@dataclass(frozen=True, kw_only=True)
class Student:
    """The model that learns; it starts from random weights, or from a file."""

    # Name of the model (`python -m fd_large recipes` and architectures.py list them).
    model: str
    # Overrides of the named net's shape; None: as the model has it.
    architecture: Architecture = field(default_factory=Architecture)
    # fd: normal .02, residual outputs rescaled by depth, SwinV2 branch norms start at 1e-5;
    # official: the Swin-Transformer repository's, branch norms start at 0.
    initialization: Literal["fd", "official"] = "fd"
    # Probability of dropping a residual branch in the last block, rising linearly from 0 in the
    # first; 0: off.
    drop_path_rate: float = 0.1
    # File of weights to start from (docs/weights.md lists the formats); empty: random weights.
    init: str = ""
    # Name patterns (*, ?) of tensors that may be missing in that file, and stay random, or be left
    # over.
    init_allow: tuple[str, ...] = ()
    # Image sizes that are no multiple of the patch: drop the remainder as published, or pad the
    # image and mask the padding out of attention.
    size_rule: Literal["drop", "pad"] = "drop"
    # Type of the residual stream; compute: the type of the matrix products, fewer bytes.
    residual_dtype: Literal["float32", "compute"] = "float32"
    # keep: store attention maps for backward (refused on GPUs); recompute: make them again; auto:
    # recompute on GPUs, keep on CPUs, where it is faster.
    attention_memory: Literal["auto", "keep", "recompute"] = "auto"
    # every: keep only the inputs of blocks and compute blocks again in backward; offload: the same
    # with the inputs in host memory.
    activation_checkpointing: Literal["off", "every", "offload"] = "off"
    # Checkpoint each k-th block; 1: every block. Idle while activation_checkpointing is off.
    checkpoint_every: int = 1

    def __post_init__(self) -> None:
        check_types(self, "student")
        require(
            0 <= self.drop_path_rate < 1,
            "student.drop_path_rate: no probability of dropping a branch",
            self.drop_path_rate,
            "0 <= rate < 1",
        )
        at_least("student.checkpoint_every", self.checkpoint_every, 1, "blocks")


@dataclass(frozen=True, kw_only=True)
class Teacher:
    """The frozen model whose last feature map is the target."""

    # Name of the model; its image statistics and its final norm come with it. auto: the model that the
    # weights of `source` show.
    model: str = AUTO
    # Overrides of the named net's shape; None: as the model has it.
    architecture: Architecture = field(default_factory=Architecture)
    # The weights: a file (docs/weights.md lists the formats), package:NAME for those that an
    # installed Python package carries, hf:REPO, open_clip:ARCH/TAG, timm:NAME or
    # module:package.file:function (the last two bring their own model), or `random` for a random
    # teacher (throughput runs, tests); empty: none, and training stops.
    source: str = ""
    # Name patterns (*, ?) of tensors that may be missing in the file, and stay random, or be left
    # over.
    allow: tuple[str, ...] = ()
    # Mean and standard deviation of red, green and blue, six numbers in 0..1, by which its images
    # are normalised; empty: those that its weights were trained with.
    statistics: tuple[float, ...] = ()
    # replicated: whole on every rank; sharded: split over all ranks; node: split over the ranks of
    # a node, whole in every node.
    placement: Literal["replicated", "sharded", "node"] = "replicated"
    # Type of weights and matrix products; auto: the same as the student's compute type.
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"

    def __post_init__(self) -> None:
        check_types(self, "teacher")
        require(
            len(self.statistics) in (0, 6) and all(value > 0 for value in self.statistics[3:]),
            "teacher.statistics: no means and deviations of three channels",
            self.statistics,
            "six numbers, the last three above 0, or none",
        )


@dataclass(frozen=True, kw_only=True)
class Data:
    """Images and the one crop of each that student and teacher see."""

    # Images: a folder, read recursively (labels are not used); tar shards, as their folder, one
    # file or a pattern like "train-{000..146}.tar"; or builtin:photographs.
    root: str = ""
    # Folder on a disk of each node's own, to which the data set is copied once and checked, before
    # training; empty: it is read where it is.
    stage_to: str = ""
    # Side of the square crop, in pixels.
    image_size: int = 224
    # Smallest area of a crop as a fraction of the image's; 1: the whole image.
    min_crop_scale: float = 0.08
    # Strength of random changes of brightness, contrast, saturation and (a quarter of it) hue; 0:
    # off, as in the paper.
    color_jitter: float = 0.0
    # Probability of a view without color; 0: off, as in the paper.
    grayscale_probability: float = 0.0
    # Images that cannot be used are skipped and named; past this fraction of those tried (counted
    # from 1000 up) the run stops with their list. 0: the first one stops it.
    max_bad_fraction: float = 0.01
    # Images of more pixels are skipped like damaged ones, before they take memory; 67108864: 8192 x
    # 8192, up to 0.9 GB while decoded.
    max_pixels: int = 2**26
    # Loader processes per rank; 0: load in the training process.
    workers: int = 4

    def __post_init__(self) -> None:
        check_types(self, "data")
        at_least("data.image_size", self.image_size, 1, "pixels")
        require(
            0 < self.min_crop_scale <= 1,
            "data.min_crop_scale: no fraction of the image's area",
            self.min_crop_scale,
            "0 < scale <= 1",
        )
        for name in ("color_jitter", "grayscale_probability"):
            value = getattr(self, name)
            require(0 <= value <= 1, f"data.{name}: out of range", value, "0 to 1")
        require(
            0 <= self.max_bad_fraction < 1,
            "data.max_bad_fraction: no fraction of the images",
            self.max_bad_fraction,
            "0 <= fraction < 1",
        )
        at_least("data.max_pixels", self.max_pixels, 1, "pixels")
        at_least("data.workers", self.workers, 0, "processes")


@dataclass(frozen=True, kw_only=True)
class Objective:
    """Smooth L1 between the projected student map and the whitened teacher map."""

    # Difference, in whitened units, at which the loss turns from square to linear.
    beta: float = 2.0
    # Added to the variance of a teacher token before the division.
    whitening_eps: float = 1e-5
    # What to do when the grids differ: none: stop with an error; bilinear: resize the teacher's map
    # to the student's grid.
    interpolation: Literal["none", "bilinear"] = "none"
    # Side of the teacher's image, resized from the same crop, in pixels; 0: the student's.
    teacher_image_size: int = 0

    def __post_init__(self) -> None:
        check_types(self, "objective")
        positive("objective.beta", self.beta)
        positive("objective.whitening_eps", self.whitening_eps)
        at_least("objective.teacher_image_size", self.teacher_image_size, 0, "pixels")


@dataclass(frozen=True, kw_only=True)
class Task:
    """What is trained: a module that maps a batch to a loss."""

    # distillation: the student learns the teacher's feature map; finetune: the labels of images;
    # detection: boxes and masks of objects. The last two have no teacher.
    name: Literal["distillation", "finetune", "detection"] = "distillation"
    # Read by the task finetune alone.
    finetune: FineTune = field(default_factory=FineTune)
    # Read by the task detection alone.
    detection: Detection = field(default_factory=Detection)

    def __post_init__(self) -> None:
        check_types(self, "task")


@dataclass(frozen=True, kw_only=True)
class Optim:
    """AdamW, its schedule (linear warm-up, then cosine, per step) and clipping.

    The three rates are per 512 images: the rate used is value x global_batch_size / 512.
    """

    # Peak learning rate per 512 images.
    base_lr: float = 3e-4
    # Learning rate per 512 images at which the warm-up starts.
    warmup_lr: float = 5e-7
    # Learning rate per 512 images at which the cosine ends.
    min_lr: float = 5e-6
    # Decoupled weight decay; norms, biases and SwinV2's position-bias MLPs have none; 0: off.
    weight_decay: float = 0.05
    # Decay rates of AdamW's first and second moment.
    betas: tuple[float, float] = (0.9, 0.999)
    # Added to the root of AdamW's second moment.
    eps: float = 1e-8
    # Largest L2 norm of all gradients together; 0: no clipping.
    clip_norm: float = 3.0
    # Factor of the rate from one layer to the one below it, down to the embedding; 1: all learn at
    # one rate. Warm-up start and end of the schedule are the same for all.
    layer_decay: float = 1.0
    # Of an exponential moving average of the weights, which evaluation and export then use;
    # 0: none.
    ema_decay: float = 0.0
    # Passes over the data; they set the length of the schedule too.
    epochs: int = 300
    # Passes, or a fraction of one, over which the rate rises; 0: off.
    warmup_epochs: float = 10.0
    # Optimizer steps of the run and of its schedule, in place of epochs; 0: epochs decide.
    max_steps: int = 0
    # Seconds of training; after 20 steps the run sets its own length (and its schedule's) to what
    # fits, at most max_steps; 0: no limit.
    max_seconds: float = 0.0
    # Whose AdamW; auto: DeepSpeed's where it builds, else NVIDIA apex's where installed, else
    # torch's.
    fused: Literal["auto", "deepspeed", "apex", "torch"] = "auto"

    def __post_init__(self) -> None:
        check_types(self, "optim")
        for name in ("base_lr", "warmup_lr", "min_lr", "weight_decay", "clip_norm"):
            not_negative(f"optim.{name}", getattr(self, name))
        for value in self.betas:
            require(
                0 <= value < 1,
                "optim.betas: no decay rates",
                self.betas,
                "two numbers with 0 <= beta < 1",
            )
        positive("optim.eps", self.eps)
        require(
            0 < self.layer_decay <= 1,
            "optim.layer_decay: no factor",
            self.layer_decay,
            "0 < layer_decay <= 1",
        )
        require(
            0 <= self.ema_decay < 1,
            "optim.ema_decay: no decay rate",
            self.ema_decay,
            "0 <= ema_decay < 1, for instance 0.9999",
        )
        at_least("optim.epochs", self.epochs, 1, "passes over the data")
        not_negative("optim.warmup_epochs", self.warmup_epochs)
        at_least("optim.max_steps", self.max_steps, 0, "optimizer steps")
        not_negative("optim.max_seconds", self.max_seconds)
        require(
            bool(self.max_steps) or self.warmup_epochs < self.epochs,
            "optim.warmup_epochs: the warm-up outlasts the run",
            self.warmup_epochs,
            f"less than optim.epochs = {self.epochs}",
        )
        require(
            self.min_lr <= self.base_lr and self.warmup_lr <= self.base_lr,
            "optim.base_lr: lower than the rate at an end of the schedule",
            f"base_lr {self.base_lr:g}, warmup_lr {self.warmup_lr:g}, min_lr {self.min_lr:g}",
            "base_lr to be the largest of the three",
        )

    def rates(self, global_batch_size: int) -> tuple[float, float, float]:
        """Returns (peak, warm-up start, end) as the optimizer sees them at that global batch."""
        scale = global_batch_size / RATE_BATCH_SIZE
        return self.base_lr * scale, self.warmup_lr * scale, self.min_lr * scale


@dataclass(frozen=True, kw_only=True)
class Batch:
    """How many images make a step, and how they reach a GPU."""

    # Images per optimizer step, over all ranks and micro-batches.
    global_batch_size: int = 2048
    # Images per GPU and pass; auto: the largest power of two that divides the rank's share and
    # survives a probe step. Accumulation follows from it.
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
                "Change one of the two, or pass --batch.micro_batch_size auto",
            )


@dataclass(frozen=True, kw_only=True)
class Engine:
    """How the ranks compute; what DeepSpeed does is in its own JSON."""

    # Type of parameters and matrix products; auto: bfloat16 on GPUs, float32 on CPUs. Masters,
    # moments, softmax and loss are float32 always.
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    # Ranks that share a node; 0: what the launcher says.
    node_size: int = 0
    # blocks: torch.compile of each of the student's blocks; under ZeRO-3 of what lies between the
    # fetches of its parameters.
    compile: Literal["off", "blocks"] = "off"

    def __post_init__(self) -> None:
        check_types(self, "engine")
        at_least("engine.node_size", self.node_size, 0, "ranks")


@dataclass(frozen=True, kw_only=True)
class Eval:
    """The loss on images that are held out of training."""

    # Folder of held-out images, or builtin:photographs-held-out; empty: no evaluation.
    root: str = ""
    # Steps between two evaluations; 0: only before the first step and after the last.
    every: int = 0
    # Views that an evaluation takes, fixed ones, spread over the images.
    views: int = 256
    # Labelled images in train/ and val/ or test/, on which a distilled student is tested by its
    # nearest neighbours as it trains (evaluate says how); empty: none.
    knn_root: str = ""
    # Steps between two such tests; 0: only before the first step and after the last.
    knn_every: int = 0

    def __post_init__(self):
        check_types(self, "eval")
        at_least("eval.knn_every", self.knn_every, 0, "updates")
        require(
            bool(self.knn_root) or not self.knn_every,
            "eval.knn_every: no images to test the student on",
            self.knn_every,
            "0 without eval.knn_root",
            "Set --eval.knn_root FOLDER",
        )
        at_least("eval.every", self.every, 0, "updates")
        at_least("eval.views", self.views, 1, "views")


@dataclass(frozen=True, kw_only=True)
class Guard:
    """What becomes of a step whose loss or gradient norm is not finite, or far off."""

    # Skip such steps; off: only those that DeepSpeed refuses by itself.
    enabled: bool = True
    # Steps skipped in a row after which the run is taken back to the last checkpoint before them.
    skips: int = 5
    # Times that the run is taken back before it is stopped (exit code 3).
    roll_backs: int = 3
    # Times the running spread (of the last 100 accepted steps) that a value may lie above its
    # median; the spread counts as at least 5% of the loss, and a factor of 1.28 of the norm.
    spread: float = 10.0

    def __post_init__(self) -> None:
        check_types(self, "guard")
        at_least("guard.skips", self.skips, 1, "updates")
        at_least("guard.roll_backs", self.roll_backs, 0, "times")
        positive("guard.spread", self.spread)


@dataclass(frozen=True, kw_only=True)
class Runtime:
    """The run's folder, seed and reports."""

    # Folder of the run; empty: runs/RECIPE.
    run_dir: str = ""
    # Optimizer steps between two lines of the log.
    log_every: int = 20
    # Decides initial weights, order, crops and drop path, whatever the number of ranks.
    seed: int = 0
    # Steps between two checkpoints; 0: one an epoch. The last step is always saved.
    save_every: int = 0
    # Minutes between two checkpoints, besides those by steps; 0 turns this off.
    save_minutes: float = 0.0
    # Newest checkpoints that stay.
    keep_last: int = 2
    # Steps whose multiples' checkpoints stay as well; 0: none.
    keep_every: int = 0
    # Checkpoints in a row that may fail (a full disk) before the run stops; 0: it never stops.
    max_failed_saves: int = 0
    # Whether SIGTERM, SIGUSR1, a file named stop in the run's folder, or the end of the Slurm job
    # makes all ranks save and exit with 75.
    preemption: bool = True
    # Between such a signal and the end: what sbatch is asked for by its option signal.
    notice_seconds: float = 120.0
    # Steps between two looks at the teacher and at the speed of each rank; the teacher is looked
    # at before each checkpoint as well. 0: off.
    canary_every: int = 500
    # Seconds without a step, a batch of an evaluation or the end of a save, after which a rank
    # writes its stacks and exits with 75; below 1800, when collectives give up. 0: off.
    watchdog_seconds: float = 600.0

    def __post_init__(self) -> None:
        check_types(self, "runtime")
        at_least("runtime.log_every", self.log_every, 1, "updates")
        at_least("runtime.save_every", self.save_every, 0, "updates")
        not_negative("runtime.save_minutes", self.save_minutes)
        at_least("runtime.keep_last", self.keep_last, 1, "checkpoints")
        at_least("runtime.keep_every", self.keep_every, 0, "updates")
        at_least("runtime.max_failed_saves", self.max_failed_saves, 0, "checkpoints")
        not_negative("runtime.notice_seconds", self.notice_seconds)
        at_least("runtime.canary_every", self.canary_every, 0, "updates")
        require(
            0 <= self.watchdog_seconds < 1800,
            "runtime.watchdog_seconds: out of range",
            self.watchdog_seconds,
            "0 <= seconds < 1800",
        )
        require(
            0 <= self.seed < 2**63,
            "runtime.seed: no seed of the counter-based generator",
            self.seed,
            "0 <= seed < 2**63",
        )
