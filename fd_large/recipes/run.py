"""What a run is: frozen dataclasses by section, checked when they are made.

`Run` holds everything that decides a run except what the DeepSpeed JSON owns (ZeRO stage, buckets,
offload, hpZ). The command line, `recipe.json` of a run folder and the recipes are three ways to the
same object. Standard library only: `--help` must not wait for torch.

The comment over a field is its help on the command line.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from functools import cache
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from fd_large.errors import ConfigError, nearest
from fd_large.recipes.architectures import Architecture, resolve

# Every rate of the paper's configurations is stated per this many images of a global batch.
RATE_BATCH_SIZE = 512
# teacher.model: the net that the weights show.
AUTO = "auto"


@dataclass(frozen=True, kw_only=True)
class Student:
    """The net that learns; it starts from random weights, or from a file."""

    # Name of the net (`python -m fd_large recipes` and architectures.py list them).
    model: str
    # Overrides of the named net's shape; None: as the net has it.
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
        _check_types(self, "student")
        _require(
            0 <= self.drop_path_rate < 1,
            "student.drop_path_rate: no probability of dropping a branch",
            self.drop_path_rate,
            "0 <= rate < 1",
        )
        _at_least("student.checkpoint_every", self.checkpoint_every, 1, "blocks")


@dataclass(frozen=True, kw_only=True)
class Teacher:
    """The frozen net whose last feature map is the target."""

    # Name of the net; its image statistics and its final norm come with it. auto: the net that the
    # weights of `source` show.
    model: str
    # Overrides of the named net's shape; None: as the net has it.
    architecture: Architecture = field(default_factory=Architecture)
    # The weights: a file (docs/weights.md lists the formats), package:NAME for those that an
    # installed Python package carries, hf:REPO, open_clip:ARCH/TAG, timm:NAME or
    # module:package.file:function (the last two bring their own net), or `random` for a random
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
        _check_types(self, "teacher")
        _require(
            len(self.statistics) in (0, 6) and all(value > 0 for value in self.statistics[3:]),
            "teacher.statistics: no means and deviations of three channels",
            self.statistics,
            "six numbers, the last three above 0, or none",
        )


@dataclass(frozen=True, kw_only=True)
class Data:
    """Pictures and the one crop of each that student and teacher see."""

    # Images: a folder, read recursively (labels are not used); tar shards, as their folder, one
    # file or a pattern like "train-{000..146}.tar"; or builtin:photographs.
    root: str = ""
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
        _check_types(self, "data")
        _at_least("data.image_size", self.image_size, 1, "pixels")
        _require(
            0 < self.min_crop_scale <= 1,
            "data.min_crop_scale: no fraction of the image's area",
            self.min_crop_scale,
            "0 < scale <= 1",
        )
        for name in ("color_jitter", "grayscale_probability"):
            value = getattr(self, name)
            _require(0 <= value <= 1, f"data.{name}: out of range", value, "0 to 1")
        _require(
            0 <= self.max_bad_fraction < 1,
            "data.max_bad_fraction: no fraction of the images",
            self.max_bad_fraction,
            "0 <= fraction < 1",
        )
        _at_least("data.max_pixels", self.max_pixels, 1, "pixels")
        _at_least("data.workers", self.workers, 0, "processes")


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
        _check_types(self, "objective")
        _positive("objective.beta", self.beta)
        _positive("objective.whitening_eps", self.whitening_eps)
        _at_least("objective.teacher_image_size", self.teacher_image_size, 0, "pixels")


@dataclass(frozen=True, kw_only=True)
class Task:
    """What is trained: a module that maps a batch to a loss."""

    # distillation: the student learns the teacher's feature map.
    name: Literal["distillation"] = "distillation"

    def __post_init__(self) -> None:
        _check_types(self, "task")


@dataclass(frozen=True, kw_only=True)
class Optim:
    """AdamW, its schedule (linear warm-up, then cosine, per update) and clipping.

    The three rates are per 512 images: the rate used is value x global_batch_size / 512.
    """

    # Peak learning rate per 512 images.
    base_lr: float = 3e-4
    # Learning rate per 512 images at which the warm-up starts.
    warmup_lr: float = 5e-7
    # Learning rate per 512 images at which the cosine ends.
    min_lr: float = 5e-6
    # Decoupled weight decay; norms, biases and SwinV2's position-bias nets have none; 0: off.
    weight_decay: float = 0.05
    # Decay rates of AdamW's first and second moment.
    betas: tuple[float, float] = (0.9, 0.999)
    # Added to the root of AdamW's second moment.
    eps: float = 1e-8
    # Largest L2 norm of all gradients together; 0: no clipping.
    clip_norm: float = 3.0
    # Passes over the data; they set the length of the schedule too.
    epochs: int = 300
    # Passes, or a fraction of one, over which the rate rises; 0: off.
    warmup_epochs: float = 10.0
    # Optimizer updates of the run and of its schedule, in place of epochs; 0: epochs decide.
    max_steps: int = 0
    # Seconds of training; after 20 updates the run sets its own length (and its schedule's) to what
    # fits, at most max_steps; 0: no limit.
    max_seconds: float = 0.0
    # Whose AdamW; auto: DeepSpeed's where it builds, else NVIDIA apex's where installed, else
    # torch's.
    fused: Literal["auto", "deepspeed", "apex", "torch"] = "auto"

    def __post_init__(self) -> None:
        _check_types(self, "optim")
        for name in ("base_lr", "warmup_lr", "min_lr", "weight_decay", "clip_norm"):
            _not_negative(f"optim.{name}", getattr(self, name))
        for value in self.betas:
            _require(
                0 <= value < 1,
                "optim.betas: no decay rates",
                self.betas,
                "two numbers with 0 <= beta < 1",
            )
        _positive("optim.eps", self.eps)
        _at_least("optim.epochs", self.epochs, 1, "passes over the data")
        _not_negative("optim.warmup_epochs", self.warmup_epochs)
        _at_least("optim.max_steps", self.max_steps, 0, "optimizer updates")
        _not_negative("optim.max_seconds", self.max_seconds)
        _require(
            bool(self.max_steps) or self.warmup_epochs < self.epochs,
            "optim.warmup_epochs: the warm-up outlasts the run",
            self.warmup_epochs,
            f"less than optim.epochs = {self.epochs}",
        )
        _require(
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
    """How many images make an update, and how they reach a GPU."""

    # Images per optimizer update, over all ranks and micro-batches.
    global_batch_size: int = 2048
    # Images per GPU and pass; auto: the largest power of two that divides the rank's share and
    # survives a probe step. Accumulation follows from it.
    micro_batch_size: int | Literal["auto"] = "auto"

    def __post_init__(self) -> None:
        _check_types(self, "batch")
        _at_least("batch.global_batch_size", self.global_batch_size, 1, "images")
        if self.micro_batch_size != "auto":
            _at_least("batch.micro_batch_size", self.micro_batch_size, 1, "images, or auto")
            _require(
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

    def __post_init__(self) -> None:
        _check_types(self, "engine")
        _at_least("engine.node_size", self.node_size, 0, "ranks")


@dataclass(frozen=True, kw_only=True)
class Eval:
    """The loss on images that are held out of training."""

    # Folder of held-out images, or builtin:photographs-held-out; empty: no evaluation.
    root: str = ""
    # Updates between two evaluations; 0: only before the first update and after the last.
    every: int = 0
    # Views that an evaluation takes, fixed ones, spread over the images.
    views: int = 256

    def __post_init__(self):
        _check_types(self, "eval")
        _at_least("eval.every", self.every, 0, "updates")
        _at_least("eval.views", self.views, 1, "views")


@dataclass(frozen=True, kw_only=True)
class Runtime:
    """The run's folder, seed and reports."""

    # Folder of the run; empty: runs/RECIPE.
    run_dir: str = ""
    # Optimizer updates between two lines of the log.
    log_every: int = 20
    # Decides initial weights, order, crops and drop path, whatever the number of ranks.
    seed: int = 0
    # Updates between two checkpoints; 0: one an epoch. The last update is always saved.
    save_every: int = 0
    # Newest checkpoints that stay.
    keep_last: int = 2
    # Updates whose multiples' checkpoints stay as well; 0: none.
    keep_every: int = 0
    # Checkpoints in a row that may fail (a full disk) before the run stops; 0: it never stops.
    max_failed_saves: int = 0

    def __post_init__(self) -> None:
        _check_types(self, "runtime")
        _at_least("runtime.log_every", self.log_every, 1, "updates")
        _at_least("runtime.save_every", self.save_every, 0, "updates")
        _at_least("runtime.keep_last", self.keep_last, 1, "checkpoints")
        _at_least("runtime.keep_every", self.keep_every, 0, "updates")
        _at_least("runtime.max_failed_saves", self.max_failed_saves, 0, "checkpoints")
        _require(
            0 <= self.seed < 2**63,
            "runtime.seed: no seed of the counter-based generator",
            self.seed,
            "0 <= seed < 2**63",
        )


@dataclass(frozen=True, kw_only=True)
class Run:
    """A run, whole: a name and its sections."""

    name: str
    student: Student
    teacher: Teacher
    data: Data = field(default_factory=Data)
    objective: Objective = field(default_factory=Objective)
    task: Task = field(default_factory=Task)
    optim: Optim = field(default_factory=Optim)
    batch: Batch = field(default_factory=Batch)
    engine: Engine = field(default_factory=Engine)
    eval: Eval = field(default_factory=Eval)
    runtime: Runtime = field(default_factory=Runtime)

    def __post_init__(self) -> None:
        _check_types(self, "run")
        # Unknown nets and overrides that fit no net are found here, before any rank starts.
        for where, section in (("student", self.student), ("teacher", self.teacher)):
            if where == "teacher" and self.teacher.model == AUTO:
                continue  # Known once the weights are open.
            try:
                resolve(section.model, section.architecture)
            except ConfigError as error:
                raise ConfigError(f"{where}.{error}") from None
        _require(
            self.student_architecture().family not in ("timm", "module"),
            "student.model: nets of timm, or of one's own, only teach",
            self.student.model,
            "a net of the families swinv2, swin or vit",
        )

    def student_architecture(self) -> Architecture:
        """Returns the student's architecture with the overrides filled in."""
        return resolve(self.student.model, self.student.architecture)

    def teacher_architecture(self) -> Architecture:
        """Returns the teacher's architecture with the overrides filled in.

        Raises: ConfigError: while the net is `auto`, which the weights decide (weights/settle.py).
        """
        _require(
            self.teacher.model != AUTO,
            "teacher.model: auto is the net of the weights",
            f"teacher.source {self.teacher.source!r}",
            "weights to be opened first",
            "Set --teacher.source, or name a net",
        )
        return resolve(self.teacher.model, self.teacher.architecture)

    def run_dir(self) -> str:
        """Returns the folder of the run: the named one, else runs/RECIPE."""
        return self.runtime.run_dir or f"runs/{self.name}"

    def to_dict(self) -> dict[str, Any]:
        """Returns nested dicts, lists and plain values only, as `recipe.json` holds them."""
        return _plain(asdict(self))

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Run:
        """Returns the run that `to_dict` wrote; a key that is absent takes the field's default.

        Raises:
            ConfigError: A key is unknown, a needed one absent, or a value of the wrong type.
        """
        return _from_plain(cls, values, "")


def field_names(cls: type = Run, prefix: str = "") -> dict[str, Any]:
    """Returns {"student.model": type, ...}: every field of a dataclass, nested ones flattened."""
    names: dict[str, Any] = {}
    for name, hint in _hints(cls).items():
        if is_dataclass(hint):
            names |= field_names(hint, f"{prefix}{name}.")
        else:
            names[prefix + name] = hint
    return names


def difference(a: Run, b: Run) -> dict[str, tuple[Any, Any]]:
    """Returns {"optim.base_lr": (value in a, value in b), ...} for the fields that differ."""
    flat_a, flat_b = _flat(a), _flat(b)
    return {name: (flat_a[name], flat_b[name]) for name in flat_a if flat_a[name] != flat_b[name]}


def describe_type(hint: Any) -> str:
    """Returns words for a field's type: "a whole number or auto"."""
    origin = get_origin(hint)
    if origin is Literal:
        options = [str(option) for option in get_args(hint)]
        return options[0] if len(options) == 1 else f"one of {', '.join(options)}"
    if origin in (Union, UnionType):
        return " or ".join(describe_type(part) for part in get_args(hint))
    if origin is tuple:
        count, part = len(get_args(hint)), get_args(hint)[0]
        some = "" if Ellipsis in get_args(hint) else f"{count} "
        return some + {int: "whole numbers", float: "numbers"}.get(part, describe_type(part))
    return {
        int: "a whole number",
        float: "a number",
        str: "text",
        bool: "True or False",
        NoneType: "None",
    }.get(hint, f"a section {getattr(hint, '__name__', hint)}")


# ------------------------------------------------------------------------------------------------

_Section = TypeVar("_Section")


@cache
def _hints(cls: type) -> dict[str, Any]:
    """Field name to type, annotations evaluated; cached because every construction asks."""
    hints = get_type_hints(cls)
    return {f.name: hints[f.name] for f in fields(cls)}


def _fits(value: Any, hint: Any) -> bool:
    origin = get_origin(hint)
    if origin is Literal:
        return any(type(value) is type(option) and value == option for option in get_args(hint))
    if origin in (Union, UnionType):
        return any(_fits(value, part) for part in get_args(hint))
    if origin is tuple:
        parts = get_args(hint)
        if not isinstance(value, tuple):
            return False
        if Ellipsis in parts:
            return all(_fits(item, parts[0]) for item in value)
        return len(value) == len(parts) and all(map(_fits, value, parts))
    if hint is float:  # A whole number will do; True is not a number here.
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, hint)


def _check_types(section: Any, where: str) -> None:
    for name, hint in _hints(type(section)).items():
        value = getattr(section, name)
        if not _fits(value, hint):
            raise ConfigError(
                f"{where}.{name}: a value of the wrong type; got {value!r},"
                f" expected {describe_type(hint)}. Mend the value."
            )


def _require(ok: bool, what: str, got: Any, expected: str, remedy: str = "") -> None:
    if not ok:
        remedy = remedy or f"Mend --{what.partition(':')[0]}"
        raise ConfigError(f"{what}; got {got}, expected {expected}. {remedy}.")


def _positive(where: str, value: float) -> None:
    _require(0 < value < math.inf, f"{where}: must be positive", value, "a number above 0")


def _not_negative(where: str, value: float) -> None:
    _require(0 <= value < math.inf, f"{where}: must not be negative", value, "a number from 0 up")


def _at_least(where: str, value: int, least: int, unit: str) -> None:
    _require(value >= least, f"{where}: too small", value, f"{least} or more {unit}")


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    return list(value) if isinstance(value, tuple) else value


def _flat(section: Any, prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for f in fields(section):
        value = getattr(section, f.name)
        if is_dataclass(value):
            flat |= _flat(value, f"{prefix}{f.name}.")
        else:
            flat[prefix + f.name] = value
    return flat


def _from_plain(cls: type[_Section], values: Any, prefix: str) -> _Section:
    if not isinstance(values, dict):
        raise ConfigError(
            f"{prefix.rstrip('.') or 'recipe'}: not a section; got {values!r}, expected names with"
            " values. Write the section as a JSON object."
        )
    hints = _hints(cls)
    arguments: dict[str, Any] = {}
    for name, value in values.items():
        if name not in hints:
            close = nearest(prefix + name, [prefix + known for known in hints])
            raise ConfigError(f"{prefix}{name}: no such field; {close}")
        hint = hints[name]
        if is_dataclass(hint):
            value = _from_plain(hint, value, f"{prefix}{name}.")
        elif isinstance(value, list):  # JSON has no tuples.
            value = tuple(value)
        if not is_dataclass(hint) and not _fits(value, hint):
            raise ConfigError(
                f"{prefix}{name}: a value of the wrong type; got {value!r},"
                f" expected {describe_type(hint)}. Mend the value."
            )
        arguments[name] = value
    try:
        return cls(**arguments)
    except TypeError as error:  # A field without a default is absent.
        where = prefix.rstrip(".") or "recipe"
        raise ConfigError(f"{where}: incomplete; {error}. Add the field.") from None
