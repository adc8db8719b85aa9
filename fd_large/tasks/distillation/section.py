"""The sections of a distillation recipe, and functions of a recipe that do not need torch."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from functools import partial
from typing import Any, ClassVar, Literal

from fd_large import doors
from fd_large.errors import ConfigError, FDError, check_all, nearest
from fd_large.recipes.fields import (
    at_least,
    check_types,
    hints_of,
    not_negative,
    positive,
    require,
    within,
)
from fd_large.recipes.sections import AUTO, FrozenModel
from fd_large.recipes.tables import keys_of
from fd_large.recipes.task_kind import TaskKind

CACHED = "cached:"
Interpolation = Literal["none", "bilinear", "bilinear_student", "bilinear_larger", "auto"]


@dataclass(frozen=True, kw_only=True)
class Teacher(FrozenModel):
    """The frozen model from whose feature map the student learns."""

    place: ClassVar[str] = "teacher"
    folder_schemes: ClassVar[tuple[str, ...]] = (CACHED,)

    # Where the teacher's weights are held. replicated: every rank holds all weights. sharded: the
    # weights are split over all ranks. node: the weights are split over the ranks of a node, and
    # every node holds all of them.
    placement: Literal["replicated", "sharded", "node"] = "replicated"
    # Data type of the teacher's weights and matrix products. auto: the data type of the student's
    # matrix products.
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    # Data type of the teacher's residual stream. compute: the data type of the weights, as in the
    # official code, which uses float16. float32: the sum of a block's output and input is not
    # rounded. Models of other libraries, such as timm, have no choice.
    residual_dtype: Literal["compute", "float32"] = "compute"


@dataclass(frozen=True, kw_only=True)
class Objective:
    """The loss between the student's projected map and the teacher's normalised map."""

    place: ClassVar[str] = "objective"

    # The map of the teacher that the student learns. last: the output of the teacher's final norm.
    # before_norm: the input of that norm, for models of this package's own families.
    layer: Literal["last", "before_norm"] = "last"
    # The loss. smooth_l1: quadratic up to beta, linear above. mse: the mean squared difference. l1:
    # the mean absolute difference. cosine: one minus the cosine of two tokens. cosine_of_map: one
    # minus the cosine of two whole maps. cls_and_patches: half cosine and half smooth_l1, where the
    # CLS token weighs as much as all patches together. relation: the divergence between the
    # student's and the teacher's similarities of the tokens of an image. queue, for summaries
    # alone: the divergence between the student's and the teacher's similarities to the teacher's
    # newest summaries. A weighted sum of losses is written "0.9 cosine_of_map + 0.1 smooth_l1". A
    # function of your own, from (projected, target) to a scalar:
    # module:FILE.py:NAME (docs/extending.md).
    loss: str = "smooth_l1"
    # How the teacher's tokens are normalised. whitening: each token gets mean 0 and variance 1 over
    # its channels. unbiased_whitening: as whitening, with the unbiased variance, as in dBOT. none:
    # tokens stay unchanged. standardise: each channel gets mean 0 and variance 1. phi_s: the
    # channels are rotated and scaled by one number, so that each has variance 1. running: each
    # channel gets about mean 0 and variance 1, by running statistics over the steps. batch: each
    # channel gets mean 0 and variance 1, by the statistics of the step's own images. A function of
    # your own: module:FILE.py:NAME.
    normaliser: str = "whitening"
    # File with the means and deviations of the teacher's channels and their rotation, for the
    # normalisers standardise and phi_s. The command `statistics` writes this file.
    target_statistics: str = ""
    # Module that maps the student's tokens to the teacher's width; it is trained with the student.
    # linear: one linear layer. mlp: two linear layers, with a layer norm and GELU between them.
    # mlp_relu: two linear layers, with a layer norm and ReLU between them. attention_mlp: two
    # transformer blocks, then mlp. block: one transformer block, then a linear layer. ladder: the
    # sum of an MLP on each block of a ViT. convolutional, wide_convolutional: convolutions from the
    # student's grid to the teacher's. resized_mlp: nearest-neighbour resizing to the teacher's
    # grid, then an MLP. upsampling_mlp: an mlp that predicts several tokens of the teacher from
    # each token of the student. A module of your own, made from (width, teacher_width):
    # module:FILE.py:NAME.
    head: str = "linear"
    # Difference at which smooth L1 changes from quadratic to linear, in units of the target.
    beta: float = 2.0
    # Temperature of the losses relation and queue: the divisor of cosines before the softmax.
    temperature: float = 0.07
    # Constant that whitening adds to the variance of a teacher's token, before the token is divided
    # by the square root.
    whitening_eps: float = 1e-5
    # What happens if student and teacher have different grids of tokens. none: the run stops with
    # an error. bilinear: the teacher's map is resized to the student's grid. bilinear_student: the
    # output of the head is resized to the teacher's grid. bilinear_larger: the map with fewer
    # tokens is resized to the other map's grid. auto: bilinear if the grids differ at the teacher's
    # image size, else none.
    interpolation: Interpolation = "none"
    # Side of the teacher's image, in pixels. The image is the student's crop, resized to this
    # side. 0: the side of the student's image. auto: the side at which the teacher's grid equals
    # the student's, if the teacher takes images of that side (docs/weights.md has the rule).
    teacher_image_size: int | Literal["auto"] = 0

    def __post_init__(self) -> None:
        where = self.place
        check_types(self, where)
        positive(f"{where}.beta", self.beta)
        positive(f"{where}.temperature", self.temperature)
        positive(f"{where}.whitening_eps", self.whitening_eps)
        if self.teacher_image_size != AUTO:
            at_least(f"{where}.teacher_image_size", self.teacher_image_size, 0, "pixels, or auto")


# As in recipes of distillation, the teacher decides its image size and the interpolation.
AUTOMATIC = Objective(interpolation=AUTO, teacher_image_size=AUTO)

MAP, SUMMARY = "map", "summary"
EMBEDDING = "embedding"


@dataclass(frozen=True, kw_only=True)
class Summary:
    """The settings for a teacher's summary, which may differ from those for the teacher's map.

    The summary of an image is the CLS token or the mean of the tokens.
    """

    # The summary that the student learns. token: the class token, or, if the model has no class
    # token, the mean of the map's tokens. embedding: the image embedding of a CLIP model, which is
    # the class token after the projection into the space of CLIP's texts; zero-shot classification
    # needs it.
    layer: Literal["token", "embedding"] = "token"
    # Number of channels of the embedding. 0: the number that follows from the teacher's weights,
    # which a run writes into its recipe.json.
    width: int = 0
    # The loss of the summary, a name as for the map. Empty: the loss of the map.
    loss: str = ""
    # The head of the summary, a name as for the map. Empty: the kind of head of the map.
    head: str = ""
    # The normaliser of the summary, a name as for the map. Empty: the normaliser of the map.
    normaliser: str = ""
    # File with the statistics of the summary's channels, for the normalisers standardise and phi_s.
    target_statistics: str = ""
    # Temperature of the summary's loss, if that is queue. 0: the temperature of the map's loss.
    temperature: float = 0.0
    # Weight of the summary's loss relative to the map's loss.
    weight: float = 1.0

    def __post_init__(self) -> None:
        check_types(self, "teachers.NAME.summary")
        not_negative("teachers.NAME.summary.weight", self.weight)
        not_negative("teachers.NAME.summary.temperature", self.temperature)
        at_least("teachers.NAME.summary.width", self.width, 0, "channels")


@dataclass(frozen=True, kw_only=True)
class NamedTeacher(Teacher, Objective):
    """A teacher among several, with the fields of the sections teacher and objective.

    The loss of a run is the weighted sum of the losses on its teachers' maps and summaries.
    """

    place: ClassVar[str] = "teachers.NAME"

    # What the student learns from this teacher. map: all tokens of the map; if the summary is
    # learnt too, without the CLS token. summary: the CLS token, or the mean of all tokens if the
    # model has no CLS token (see summary.layer).
    targets: tuple[Literal["map", "summary"], ...] = (MAP,)
    # Settings for the teacher's summary, if targets has it.
    summary: Summary = field(default_factory=Summary)
    # Weight of this teacher's loss in the sum of all teachers' losses.
    weight: float = 1.0
    # Names of the datasets in data.root from whose images the student learns this teacher's
    # targets, if weighting.rule is own_data.
    datasets: tuple[str, ...] = ()
    # Number k of images along a side of a mosaic. The teacher sees k x k images, tiled into one
    # image of its own size, and its map is cut into the maps of the single images, as RADIO does
    # for SAM. 0: the teacher sees each image alone.
    mosaic: int = 0
    # What happens if student and teacher have different grids of tokens, with the choices of
    # objective.interpolation.
    interpolation: Interpolation = AUTO
    # Side of the teacher's image, in pixels, with the choices of objective.teacher_image_size. For
    # a teacher with a mosaic, this is the side of the mosaic, and 0 and auto mean the side in the
    # teacher's training.
    teacher_image_size: int | Literal["auto"] = AUTO

    def __post_init__(self) -> None:
        Teacher.__post_init__(self)
        Objective.__post_init__(self)
        not_negative(f"{self.place}.weight", self.weight)
        at_least(f"{self.place}.mosaic", self.mosaic, 0, "images")
        require(
            not self.mosaic or self.targets == (MAP,),
            f"{self.place}.mosaic: a mosaic has a single summary, which belongs to no image",
            f"{self.mosaic} with targets {' '.join(self.targets)}",
            f"0, or targets {MAP}",
            beside=(f"{self.place}.targets",),
        )
        require(
            bool(self.targets) and len(set(self.targets)) == len(self.targets),
            f"{self.place}.targets: a target is repeated, or none is given",
            " ".join(self.targets) or "nothing",
            f"{MAP}, {SUMMARY} or both",
        )
        require(
            SUMMARY in self.targets or self.summary == Summary(),
            f"{self.place}.summary: the summary is not learnt",
            f"settings of the summary with the targets {' '.join(self.targets)}",
            "no settings of the summary",
            f"Leave out the fields of the summary, or set --{self.place}.targets {MAP} {SUMMARY}",
        )

    @classmethod
    def joined(cls, teacher: Teacher, objective: Objective) -> NamedTeacher:
        """Returns the entry that has the fields of both sections, `teacher` and `objective`.

        A recipe with a single teacher has these sections instead of an entry.
        """
        return cls(**_values(teacher), **_values(objective))

    def parted(self) -> tuple[Teacher, Objective]:
        """Returns the sections (`teacher`, `objective`) with the fields of the entry.

        This is the inverse of `joined`; fields that only an entry has are left out.
        """
        values = _values(self)
        names = hints_of(Objective)
        objective = {name: values[name] for name in names}
        teacher = {name: values[name] for name in hints_of(Teacher)}
        return Teacher(**teacher), Objective(**objective)

    def as_it_is(self) -> NamedTeacher:
        """Returns the entry without normalisers, so that the teacher's own outputs are targets."""
        usual = Objective()
        return replace(
            self,
            normaliser="none",
            whitening_eps=usual.whitening_eps,
            target_statistics="",
            summary=replace(self.summary, normaliser="", target_statistics=""),
        )

    def weight_of(self, kind: str) -> float:
        """Returns the weight of the loss of the teacher's map or summary in the run's loss.

        Args:
            kind: "map" or "summary".
        """
        return self.weight * (self.summary.weight if kind == SUMMARY else 1.0)

    def width_of(self, kind: str, of_map: int) -> int:
        """Returns the number of channels of the teacher's map or summary as a target.

        Args:
            kind: "map" or "summary".
            of_map: Number of channels of the teacher's map.
        """
        return self.embedding_width or of_map if kind == SUMMARY else of_map

    @property
    def embedding_width(self) -> int:
        """Number of channels of the learnt embedding.

        The number is 0 if the entry learns no embedding, or if the weights have not been read.
        """
        return self.summary.width if self.summary.layer == EMBEDDING else 0

    def setting(self, name: str, kind: str) -> Any:
        """Returns the value of a field for the teacher's map or for its summary.

        For the summary, an empty field has the map's value; only `target_statistics` stays empty.

        Args:
            name: "loss", "temperature", "head", "normaliser" or "target_statistics".
            kind: "map" or "summary".
        """
        value = getattr(self.summary, name) if kind == SUMMARY else getattr(self, name)
        inherits = kind == SUMMARY and name != "target_statistics"
        return value or (getattr(self, name) if inherits else value)


@dataclass(frozen=True, kw_only=True)
class Weighting:
    """The rule that chooses the teachers whose losses count for an image."""

    # Rule that chooses the teachers. fixed: all teachers count, and the loss is the sum of their
    # losses. With the other rules, the loss is the mean over all kept pairs of an image and a
    # teacher in a step. drop: for each image, the teacher with the largest loss is kept, and each
    # other teacher is dropped with drop_probability, as in UNIC (DUNE's lowest_loss). own_data: the
    # teachers of the image's dataset are kept (teachers.NAME.datasets), as in DUNE.
    rule: Literal["fixed", "drop", "own_data"] = "fixed"
    # Probability with which the rule drop leaves out a teacher other than the one with the largest
    # loss, in [0, 1].
    drop_probability: float = 0.5

    def __post_init__(self) -> None:
        check_types(self, "weighting")
        within("weighting.drop_probability", self.drop_probability, "[0, 1]")


FIXED = Weighting()
"""Every image learns from all teachers."""


@dataclass(frozen=True, kw_only=True)
class Mask:
    """The patches that are hidden from the student in training, and the tokens in the loss.

    The teachers, and all evaluations, see whole images. A mask is a function of the seed, the epoch
    and the image's position in the epoch's order.
    """

    # How the hidden patches of an image are drawn. none: no patch is hidden. random: each patch by
    # itself, as in MAE. block: rectangles of patches, as in EVA and BEiT; fewer patches than ratio
    # says may be hidden. block_exact: rectangles, then single patches until the number is reached,
    # as in BEiT v2.
    sampler: Literal["none", "random", "block", "block_exact"] = "none"
    # Fraction of an image's patches that are hidden, in (0, 1).
    ratio: float = 0.4
    # Upper end of the fraction of hidden patches, in (ratio, 1). Each image then draws its own
    # fraction between ratio and ratio_to. 0: all images use ratio.
    ratio_to: float = 0.0
    # Fraction of the images that are masked, in (0, 1]. The student sees the other images whole.
    share: float = 1.0
    # Smallest area of a rectangle of hidden patches, in patches, for the samplers block and
    # block_exact.
    min_patches: int = 16
    # What replaces a hidden patch in the student. token: a learnt token. dropped: nothing; the
    # student encodes the visible patches alone, and their number is the same in all images.
    student: Literal["token", "dropped"] = "token"
    # The tokens whose loss counts. masked: the hidden patches. visible: the other patches. all: all
    # patches. If mask.student is dropped and the loss of hidden patches counts, a decoder predicts
    # these patches.
    tokens: Literal["masked", "visible", "all"] = "masked"
    # Whether the loss of prefix tokens (CLS) counts besides the loss of patches.
    cls: bool = False
    # The mean that gives the loss. token: over all counted tokens of a step on all ranks. image:
    # over the images, where an image has the mean over its counted tokens.
    reduce: Literal["token", "image"] = "token"
    # Number of channels of the decoder that predicts the hidden patches if mask.student is dropped.
    # The decoder is no part of the trained student.
    decoder_width: int = 512
    # Number of transformer blocks of the decoder (see decoder_width).
    decoder_depth: int = 8
    # Number of attention heads in each block of the decoder (see decoder_width).
    decoder_heads: int = 16

    def __post_init__(self) -> None:
        check_types(self, "mask")
        require(0 < self.ratio < 1, "mask.ratio: invalid share", self.ratio, "a number in (0, 1)")
        require(
            self.ratio_to == 0 or self.ratio < self.ratio_to < 1,
            "mask.ratio_to: invalid share",
            self.ratio_to,
            f"0, or a number in ({self.ratio}, 1)",
            beside=("mask.ratio",),
        )
        require(0 < self.share <= 1, "mask.share: invalid share", self.share, "a number in (0, 1]")
        units = {"min_patches": "patches", "decoder_width": "channels", "decoder_depth": "blocks"}
        for name, unit in (units | {"decoder_heads": "heads"}).items():
            at_least(f"mask.{name}", getattr(self, name), 1, unit)
        require(
            self.decoder_width % self.decoder_heads == 0 == self.decoder_width % 4,
            "mask.decoder_width: does not divide into attention heads and positions",
            f"{self.decoder_width} with {self.decoder_heads} heads",
            "a multiple of the heads and of 4",
            beside=("mask.decoder_heads",),
        )
        require(
            not (self.varies and self.student == "dropped"),
            "mask.sampler: only images with equally many visible patches can be encoded together",
            "block, mask.ratio_to or mask.share, by which images differ, with mask.student dropped",
            "random or block_exact, and one ratio for all images",
            beside=("mask.student", "mask.ratio_to", "mask.share"),
        )

    @property
    def hides(self) -> bool:
        """Whether the mask hides any patches from the student."""
        return self.sampler != "none"

    @property
    def varies(self) -> bool:
        """Whether the number of hidden patches may differ between images."""
        return self.sampler == "block" or self.ratio_to > 0 or self.share < 1

    @property
    def decodes(self) -> bool:
        """Whether a decoder predicts the hidden patches, which the student does not encode."""
        return self.hides and self.student == "dropped" and self.tokens != "visible"

    def ignored_fields(self) -> dict[str, str]:
        """Finds the fields that have no effect because of the values of other fields.

        Returns: {full name of the field, such as "mask.ratio": a sentence that says which flags to
        set}.
        """
        names: dict[str, str] = {}
        if not self.decodes:
            decoder = "Set --mask.sampler random, --mask.student dropped and --mask.tokens masked."
            names |= dict.fromkeys(("decoder_width", "decoder_depth", "decoder_heads"), decoder)
        if "block" not in self.sampler:
            names["min_patches"] = "Set --mask.sampler block or block_exact."
        if not self.hides:
            others = ("ratio", "ratio_to", "share", "student", "tokens", "cls", "reduce")
            names |= dict.fromkeys(others, "Set --mask.sampler random, block or block_exact.")
        return {f"mask.{name}": remedy for name, remedy in names.items()}


def label(teacher: str, kind: str) -> str:
    """Returns a target's name in metrics and files.

    The name is NAME for a map and NAME_summary for a summary, where NAME is the teacher's name.

    Args:
        teacher: The teacher's name, or "" for a single teacher.
        kind: "map" or "summary".
    """
    return teacher if kind == MAP else f"{teacher}_{kind}"


def labels_of(teachers: Mapping[str, NamedTeacher]) -> list[str]:
    """Returns the labels of all targets of the teachers, in the order of the mapping.

    Args:
        teachers: The teachers by name.
    """
    return [label(name, kind) for name, entry in teachers.items() for kind in entry.targets]


def field_of(teacher: str, name: str, kind: str = MAP) -> str:
    """Returns the full name of a target's field, as "objective.loss" or "teachers.clip.loss".

    Args:
        teacher: The teacher's name, or "" for a single teacher.
        name: The field of `Objective`.
        kind: "map" or "summary".
    """
    if not teacher:
        return f"objective.{name}"
    return ".".join(("teachers", teacher, *([SUMMARY] if kind == SUMMARY else []), name))


def source_flag(name: str) -> str:
    """Returns the command-line flag of a teacher's source.

    Args:
        name: The teacher's name, or "" for a single teacher.
    """
    return f"--teachers.{name}.source" if name else "--teacher.source"


def called(name: str) -> str:
    """Returns the words for a teacher in messages, "teacher NAME" or "teacher".

    Args:
        name: The teacher's name, or "" for a single teacher.
    """
    return f"teacher {name}" if name else "teacher"


@contextmanager
def naming_target(teacher: str, kind: str = MAP) -> Iterator[None]:
    """Makes errors of the `with` block name the fields of a named teacher.

    In the message of an FDError, "objective.FIELD" becomes the field's name by `field_of`.

    Args:
        teacher: The teacher's name, or "" for a single teacher.
        kind: "map" or "summary".
    """
    try:
        yield
    except FDError as error:
        if not teacher:
            raise
        text = re.sub(r"\bobjective\.(\w+)", lambda m: _field(teacher, m[1], kind), str(error))
        raise type(error)(text) from error


def _field(teacher: str, name: str, kind: str) -> str:
    """Returns the full name of a target's field, by `field_of`.

    If `kind` is "summary" but a summary has no field `name` of its own, the result is the full name
    of the map's field.

    Args:
        teacher: The teacher's name, or "" for a single teacher.
        name: The field of `Objective`.
        kind: "map" or "summary".
    """
    return field_of(teacher, name, kind if name in hints_of(Summary) else MAP)


def _values(section: Teacher | Objective) -> dict[str, Any]:
    """Returns {name: value} of the fields of `section`; nested sections stay objects."""
    return {f.name: getattr(section, f.name) for f in fields(section)}


def cached_folder(source: str) -> str:
    """Returns FOLDER if a teacher's source is the cache cached:FOLDER, else "".

    Args:
        source: The teacher's source in the recipe.
    """
    return source.removeprefix(CACHED) if source.startswith(CACHED) else ""


@dataclass(frozen=True, kw_only=True)
class Views:
    """The views of each image, and how the teachers' maps of the views are computed or stored.

    Maps can only be stored if the views are repeated in later epochs.
    """

    # Number of fixed views of each image. Epoch e uses view e modulo this number, and the views are
    # the same in every run with the same view_seed. 0: every epoch draws new views; but if teachers
    # are read from a cache (cached:FOLDER), the views of the cache are used.
    views: int = 0
    # Seed of the fixed views. It does not depend on runtime.seed.
    view_seed: int = 0
    # Folder for the teachers' maps of the fixed views. The first epochs, one for each view, store
    # the maps; later epochs and other runs learn from the stored maps. Empty: no maps are stored.
    # The command `cache` writes such a folder without a run.
    cache: str = ""
    # Number format of the stored maps: fp32, fp16, fp8 (E4M3) or int8 (docs/cache.md).
    precision: Literal["fp32", "fp16", "fp8", "int8"] = "fp8"
    # Whether replicated teachers compute on a CUDA stream of their own, at the same time as the
    # student's forward and its all-gathers (docs/deepspeed_configs.md). The results are the same.
    # On CPUs this has no effect.
    teacher_stream: bool = False

    def __post_init__(self) -> None:
        check_types(self, "task.distillation")
        require(
            bool(self.views) or not self.cache,
            "task.distillation.cache: only recurring views can be stored",
            f"{self.cache} with task.distillation.views 0",
            "views of 1 or more",
            beside=("task.distillation.views",),
        )
        at_least("task.distillation.views", self.views, 0, "views")
        require(
            0 <= self.view_seed < 2**63,
            "task.distillation.view_seed: invalid seed",
            self.view_seed,
            "a whole number in [0, 2**63)",
        )


_WORDS = {
    "held_out/loss": "held-out loss",
    "held_out/cosine": "held-out cosine",
    "held_out/best_constant": "held-out constant-prediction baseline",
    "unseen_crops/loss": "unseen-crops loss",
    "unseen_crops/cosine": "unseen-crops cosine",
    "unseen_crops/best_constant": "unseen-crops constant-prediction baseline",
    "test/knn": "test k-NN accuracy (%)",
}


def evaluated_words(teachers: Mapping[str, NamedTeacher]) -> dict[str, str]:
    """Returns the labels of an evaluation's metrics by name; see `TrainingJob.metrics`.

    Args:
        teachers: The teachers by name, in a run with several teachers; empty for a single teacher.
    """
    words = dict(_WORDS)
    for target in labels_of(teachers):
        title = target.replace("_", " ")
        for images in ("held_out", "unseen_crops"):
            for name in ("loss", "cosine", "best_constant"):
                words[f"{images}/{target}_{name}"] = f"{_WORDS[f'{images}/{name}']} ({title})"
    return words


_TERM = re.compile(r"(\d+\.?\d*|\.\d+)\s+(\w+)")


def is_sum(loss: str) -> bool:
    """Whether the field `loss` of a recipe is a weighted sum, as "0.9 cosine + 0.1 smooth_l1".

    The result is False for the name of one loss, and for the user's own `module:FILE.py:NAME`.
    """
    return " " in loss and not doors.is_own(loss)


def loss_terms(loss: str, known: Collection[str]) -> list[tuple[float, str]]:
    """Parses a weighted sum of losses, such as "0.9 cosine + 0.1 smooth_l1".

    Args:
        loss: The sum.
        known: Names of the losses that a sum may have.

    Returns: (weight, name of the loss) of each term.
    Raises: ConfigError: if a term is malformed, or its loss is not known.
    """
    terms = []
    for text in loss.split(" + "):
        term = _TERM.fullmatch(text.strip())
        if term is None or not float(term[1]) > 0:
            raise ConfigError(
                f"objective.loss: not a sum of losses by weight; got {text!r} in {loss!r}, "
                'expected terms as in "0.9 cosine + 0.1 smooth_l1", with weights above 0. Correct '
                "the term."
            )
        if term[2] not in known:
            raise ConfigError(
                f"objective.loss: no such loss for a sum; got {term[2]!r}, "
                f"{nearest(term[2], known)}. Use a built-in loss; a function of your own can add "
                "terms itself."
            )
        terms.append((float(term[1]), term[2]))
    return terms


_FOLDER = "tasks/distillation"
NAMED: dict[str, tuple[doors.Kind, dict[str, tuple[str, ...]]]] = {
    "loss": (
        "losses",
        {
            f"{_FOLDER}/losses.py": ("LOSSES",),
            f"{_FOLDER}/job.py": ("SIMILARITIES",),
        },
    ),
    "head": ("heads", {f"{_FOLDER}/heads/registry.py": ("HEADS",)}),
    "normaliser": (
        "normalisers",
        {
            f"{_FOLDER}/normalisers.py": ("NORMALISERS", "BY_STATISTICS"),
            f"{_FOLDER}/job.py": ("RUNNING",),
        },
    ),
}
"""For each field that names a loss, head or normaliser, its kind for `doors`, and the names of the
tables of built-in ones by the file that defines them."""


def _check_names(run: Any) -> None:
    """Raises ConfigError if the recipe `run` has an unknown name of a loss, head or normaliser."""

    def check(teacher: str, kind: str, field_name: str) -> None:
        thing, tables = NAMED[field_name]
        named = entries[teacher].setting(field_name, kind)
        known = [name for file, dicts in tables.items() for name in keys_of(file, *dicts)]
        with naming_target(teacher, kind):
            if field_name == "loss" and is_sum(named):
                loss_terms(named, known)
            else:
                where = f"objective.{field_name}"
                doors.require_known(named, kind=thing, where=where, built_in=known)

    entries: Mapping[str, NamedTeacher] = run.taught_by
    check_all(
        *(
            partial(check, teacher, kind, field_name)
            for teacher, entry in entries.items()
            for kind in entry.targets
            for field_name in NAMED
        )
    )


KIND = TaskKind(
    name="distillation",
    folder="distillation",
    job="distillation.job.DistillationJob",
    stored="distillation.stored.StoredDistillation",
    title="Distillation",
    sections=("teacher", "objective", "teachers", "weighting", "mask", "students"),
    section=Views,
    # A file of statistics is compared by its hash, not by its path.
    may_change=(
        "teacher.placement",
        "objective.target_statistics",
        # A cache is compared by its contents.
        "task.distillation.cache",
        "task.distillation.teacher_stream",
        "teachers.*.placement",
        "teachers.*.target_statistics",
    ),
    check_names=_check_names,
    metrics=lambda run: evaluated_words(run.teachers),
    next_steps=(
        (
            "what student and teacher attend to, and how alike their layers are",
            (
                *("diagnose", "{run}", "{teachers}", "--data.root", "{data.root}"),
                *("--out", "{run}/diagnosis"),
            ),
        ),
        (
            "student and teacher on labelled images (train/ and val/, a folder for each class)",
            (
                *("evaluate", "{run}", "{teachers}", "--task", "knn"),
                *("--data.root", "LABELLED_FOLDER", "--out", "{run}/evaluation"),
            ),
        ),
        (
            "the student for other programs",
            ("export", "{run}", "{run}/export", "--to", "{library}"),
        ),
    ),
)


def check_storable(image_sizes: Sequence[int], mosaics: Mapping[str, int]) -> None:
    """Raises ConfigError if maps are stored in a run with several image sizes or with mosaics.

    Args:
        image_sizes: The image sides of a run with several sides, otherwise empty.
        mosaics: Number of images along a side of a teacher's mosaic, by the teacher's name; 0 for
            a teacher without mosaics.
    """
    require(
        not image_sizes,
        "data.image_sizes: stored maps need views of one size",
        " ".join(map(str, image_sizes)),
        "none",
        "Leave out data.image_sizes, or store no maps",
    )
    for name, mosaic in mosaics.items():
        require(
            not mosaic,
            f"teachers.{name}.mosaic: a mosaic gives no map of a single view, which stored maps "
            "need",
            mosaic,
            "0",
            "Leave out the mosaic, or store no maps",
        )
