"""Constructs the student of a recipe, and finds the weights that it starts from."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import replace

import torch
from torch import Tensor, nn

from fd_large.backbones import batch_norm
from fd_large.backbones.registry import build, family_of_source
from fd_large.engine.task import Task
from fd_large.errors import ConfigError, FDError
from fd_large.kernels import choose
from fd_large.ranks import distributed
from fd_large.recipes.architectures import by_name, overrides, resolve
from fd_large.recipes.batch_sizes import nearest_divisors
from fd_large.recipes.family import FamilyArchitecture
from fd_large.recipes.sections import RANDOM, Batch, FrozenModel, Student
from fd_large.weights.resolve import Sources

OWN_FIELDS = (
    "drop_path_rate",
    "residual_dtype",
    "attention_memory",
    "activation_checkpointing",
    "checkpoint_every",
    "norm_batch",
)
"""Fields of the section student that a user may set with a named model, which decides the rest."""
FEWEST_VALUES = 16
"""Least number of values from which a batch norm takes statistics."""
FINAL_NORM = {"norm.weight": 1.0, "norm.bias": 0.0}
"""Parameters of a ViT's final norm, which a task may leave out of its student, and the values that
fill them when the model is opened with its final norm."""


def make_student(
    student: Student,
    *,
    image_size: int = 0,
    sequential_stages: int = 0,
    resizes_positions: bool = False,
) -> nn.Module:
    """Constructs the student, with random weights from torch's global generator.

    Args:
        student: The recipe's section `student`.
        image_size: Side of the images for which position tables are made, in pixels; 0 for the side
            that the architecture states.
        sequential_stages, resizes_positions: See `backbones.family.Options`.

    Raises: ConfigError: if the model cannot be trained.
    """
    architecture = resolve(student.model, student.architecture)
    net = build(
        architecture.at(image_size) if image_size else architecture,
        initialization=student.initialization,
        drop_path_rate=student.drop_path_rate,
        **student.sizes(),
        residual_dtype=student.residual_dtype,
        attention_memory=attention_memory(student.attention_memory),
        sequential_stages=sequential_stages,
        is_trained=True,
        resizes_positions=resizes_positions,
    )
    if not student.norm_batch and not student.init and batch_norm.norms_of(net):
        raise ConfigError(
            f"student.norm_batch: {student.model} has batch norms, and random weights have no "
            "running statistics; got norm_batch 0 without --student.init, expected a number of "
            "images. Set --student.norm_batch 32, or --student.init to trained weights."
        )
    return net


def check_layers(student: nn.Module) -> None:
    """Raises ConfigError unless a student says to which layers its parameters belong.

    Layer decay needs them; the message names a remedy for `optim.layer_decay`.
    """
    student.layer_id(next(name for name, _ in student.named_parameters()))


def has_layers(student: Student, *, image_size: int) -> bool:
    """Returns whether a student can be built, and trained with `optim.layer_decay`.

    `image_size` is the side of the images, in pixels.
    """
    try:
        with torch.device("meta"):
            check_layers(make_student(student, image_size=image_size))
    except FDError:
        return False
    return True


def check_norm_batch(
    student: Student, group: int, batch: Batch, *, image_size: int, world_size: int
) -> int:
    """Checks that the group size of a student's batch norms fits the batch sizes.

    Args:
        student: The recipe's section, with all fields set that the weights decide. For a model
            without batch norms, every size is accepted.
        group: Number of images that share statistics (`Run.norm_batch`); 0 for none.
        batch: The recipe's section `batch`.
        image_size: Side of the images, in pixels.
        world_size: The number of ranks.

    Returns: `group`, or 0 if the student has no batch norms, or its batch norms have no groups.
    Raises: ConfigError: if the sizes do not fit; the message names the nearest valid numbers.
    """
    if not group or not resolve(student.model, student.architecture).has_batch_norms:
        return 0
    with torch.device("meta"):
        net = make_student(student, image_size=image_size)
    norms = batch_norm.norms_of(net)
    if all(norm.norm_groups.size == batch_norm.PASS for norm in norms):
        return 0
    images = batch.global_batch_size
    if images % group:
        near = " or ".join(str(size) for size in nearest_divisors(images, group) if size > 1)
        raise ConfigError(
            "student.norm_batch: the group of images with shared statistics must divide the "
            f"global batch; got groups of {group} in a batch of {images}, expected a divisor. Set "
            f"--student.norm_batch {near}."
        )
    if group * net.fewest_places < FEWEST_VALUES:
        least = -(-FEWEST_VALUES // net.fewest_places)
        enough = next((size for size in range(least, images + 1) if images % size == 0), None)
        remedy = (
            f"--student.norm_batch {enough}" if enough else f"--batch.global_batch_size {least}"
        )
        raise ConfigError(
            f"student.norm_batch: too few values for batch norm statistics; got {group} images of "
            f"{net.fewest_places} positions in the smallest map of {student.model}, expected "
            f"{FEWEST_VALUES} values. Set {remedy}, or a larger --data.image_size."
        )
    share, micro_batch = images // world_size, batch.micro_batch_size
    if micro_batch not in ("auto", share) and micro_batch % group:
        inside = [size for size in nearest_divisors(micro_batch, group) if size > 1]
        smaller = f", or --student.norm_batch {' or '.join(map(str, inside))}" if inside else ""
        whole = f"{group} or {share}" if share % group == 0 else str(share)
        raise ConfigError(
            "batch.micro_batch_size: a micro batch would split a group of images with shared "
            f"statistics; got {micro_batch} images with groups of {group}, expected a multiple of "
            f"{group}, or all {share} images of a rank. Set --batch.micro_batch_size "
            f"{whole}{smaller}."
        )
    return group


def group_norms(task: Task, group: int, *, global_batch: int = 0, micro_batch: int = 0) -> None:
    """Lets the student's batch norms, if any, normalise by groups of images.

    All ranks must call this function. Batch norms of a user's own model keep their groups.

    Args:
        task: The task.
        group: Number of images that share statistics (`Run.norm_batch`); 0 for none.
        global_batch: Images of a step over all ranks. With 0, each micro batch begins a group.
        micro_batch: Images of a micro batch.
    """
    for groups in {norm.norm_groups for norm in task.student_norms()}:
        if groups.size != batch_norm.PASS:
            groups.size = group
            groups.lie_in(global_batch, micro_batch)


def student_weights(
    student: Student, sources: Sources, *, image_size: int = 0, without: Collection[str] = ()
) -> Iterable[tuple[str, Tensor]] | None:
    """Finds the weights of `student.init`; reads only headers of files.

    Args:
        student: The recipe's section, with all fields set that the weights decide.
        sources: The sources that open the weights.
        image_size: See `make_student`; position tables are resized to this size.
        without: Names of tensors that the task does not use.

    Returns: pairs (name, unsharded tensor) for the student; None for random weights.
    Raises: WeightsError: if the file does not fit the student.
    """
    if not student.init:
        return None
    architecture = resolve(student.model, student.architecture)
    return sources.resolve(student.init, where="--student.init").fitted(
        architecture.at(image_size) if image_size else architecture,
        without=without,
        allow=student.init_allow,
        remedy="Name the model of the file by --student.model and --student.architecture.*, or set "
        "--student.init_allow NAMES to do without these tensors.",
    )


def as_student(
    named: FrozenModel,
    architecture: FamilyArchitecture,
    section: Student,
    *,
    trained_as: Student | None,
) -> Student:
    """Returns the recipe's section of a student that starts from a named model's weights.

    Args:
        named: The section of the model and its weights, with all fields set that these decide.
        architecture: The student's architecture in training.
        section: The section that gives the student's other fields.
        trained_as: The student of the run that trained the model; None if no run did.
    """
    model = trained_as.model if trained_as else named.model
    if by_name(model) is None:
        model = architecture.own_name if architecture.code else architecture.example
    brought = family_of_source(named.source)
    # Code of the user's own makes its weights itself.
    fills_itself = brought is not None and brought[0].scheme.weightless is None
    has_file = named.source != RANDOM and not fills_itself
    return replace(
        section,
        model=model,
        architecture=overrides(architecture, resolve(model)),
        init=named.source if has_file else "",
        init_allow=named.allow if has_file else (),
    )


def refuse_decided(fields: Collection[str], allowed: Collection[str]) -> None:
    """Raises ConfigError if the user set fields of a student that a named model decides.

    `fields` are those that the user set, of which only `allowed` may be set. The message has a line
    for each other field.
    """
    if mistakes := [name for name in fields if name not in allowed]:
        raise ConfigError(
            "\n".join(
                f"--student.{name}: the evaluated models decide this field; got a value of your "
                f"own, expected only {', '.join(allowed)} of student.*. Leave the field out, or "
                "train with it (docs/evaluation.md)."
                for name in mistakes
            )
        )


def attention_memory(mode: str) -> str:
    """Returns the value of `student.attention_memory` for the recipe's value `mode`.

    "auto" becomes "recompute" on GPUs and "keep" on CPUs.

    Raises: ConfigError: if `mode` is "keep" on a GPU.
    """
    planned = choose.stood_for()
    on_gpu = planned.on_gpu if planned else distributed.device().type == "cuda"
    if mode == "keep" and on_gpu:
        raise ConfigError(
            "student.attention_memory: keep would hold N x N float32 maps on the GPU; got keep, "
            "expected recompute. Set --student.attention_memory auto."
        )
    if mode == "auto":
        return "recompute" if on_gpu else "keep"
    return mode
