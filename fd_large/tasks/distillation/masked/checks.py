"""Checks before a run that student, losses, heads and grids work with hidden patches."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import partial

from torch import nn

from fd_large.backbones.layers import PatchEmbed
from fd_large.recipes.fields import require
from fd_large.tasks.distillation.heads import registry
from fd_large.tasks.distillation.losses import Loss
from fd_large.tasks.distillation.masked.samplers import hidden
from fd_large.tasks.distillation.section import MAP, Mask, NamedTeacher, field_of

# Heads that treat each token alone.
_OF_TOKENS = ("linear", "mlp", "mlp_relu")
# Heads whose output has the same grid as the student's map.
_OF_PLACES = (*_OF_TOKENS, "attention_mlp", "block", "ladder")


def mask_checks(
    mask: Mask,
    make_student: Callable[[], nn.Module],
    entries: Mapping[str, NamedTeacher],
    loss_of: Callable[[NamedTeacher, str], Loss],
    *,
    image_size: int,
    image_sizes: Sequence[int],
    rule: str = "fixed",
) -> Iterator[Callable[[], None]]:
    """Yields functions that raise ConfigError if other parts of a recipe do not fit its mask.

    Args:
        mask: The recipe's section `mask`.
        make_student: Constructs the student, on the meta device.
        entries: The recipe's entry of each teacher, by name.
        loss_of: Makes the loss of a target from the teacher's entry and "map" or "summary".
        image_size: Side of the student's images, in pixels.
        image_sizes: All image sides of a run with several sides, otherwise empty.
        rule: The rule that chooses each image's teachers (weighting.rule).
    """
    if not mask.hides:
        return
    yield partial(
        require,
        not image_sizes,
        "data.image_sizes: a mask is drawn before the size of its images is known",
        " ".join(map(str, image_sizes)),
        "none",
        "Leave out data.image_sizes, or set --mask.sampler none",
    )
    yield partial(
        require,
        # Other rules weigh an image by its hidden patches, though its mean includes class tokens.
        rule == "fixed" or not mask.varies or not mask.cls or mask.reduce == "image",
        "mask.cls: images that hide different numbers of patches would count their class tokens "
        "differently",
        f"True with weighting.rule {rule}",
        "False",
        "set --mask.reduce image",
        beside=("mask.sampler", "mask.ratio_to", "mask.share", "weighting.rule"),
    )
    yield lambda: _check_student(mask, make_student(), image_size)
    for name, entry in entries.items():
        if MAP in entry.targets:
            yield partial(_check_target, mask, name, entry, loss_of)


def _check_student(mask: Mask, student: nn.Module, image_size: int) -> None:
    """Raises ConfigError if the student or the image size does not fit the mask.

    The student must be able to hide patches in the way of `mask.student`. The mask must hide some
    patches of an image but not all. If the mask is made of rectangles, it must hide at least as
    many patches as the smallest rectangle has.

    Args:
        mask: The recipe's section `mask`.
        student: The student, on the meta device.
        image_size: Side of the student's images, in pixels.
    """
    has_patches = isinstance(getattr(student, "patch_embed", None), PatchEmbed)
    require(
        has_patches if mask.student == "token" else getattr(student, "encodes_some", False),
        "mask.student: "
        + (
            "a learnt token can replace patches only in this package's own models with a patch "
            "embedding"
            if mask.student == "token"
            else "visible patches alone can be encoded only by a ViT of this package without "
            "windows and without position tables in each block"
        ),
        f"{mask.student} for a {type(student).__name__}",
        "another student" + (", or token" if has_patches else ""),
        "Change --student.model",
    )
    rows, columns = student.grid(image_size, image_size)
    number = hidden(mask, (rows, columns))
    most = hidden(mask, (rows, columns), mask.ratio_to or mask.ratio)
    require(
        0 < number <= most < rows * columns,
        "mask.ratio: hides all patches or none",
        f"{mask.ratio} of {rows}x{columns}, {number} in number"
        + (f", to {mask.ratio_to}, {most}" if mask.ratio_to else ""),
        "at least one patch, but not all",
        beside=("mask.ratio_to",),
    )
    require(
        mask.sampler == "random" or number >= mask.min_patches,
        "mask.min_patches: rectangles are larger than the number of hidden patches, so that many "
        "images would hide nothing",
        f"{mask.min_patches} beside {number} hidden of {rows}x{columns}",
        f"at most {number}",
        beside=("mask.ratio",),
    )


def _check_target(
    mask: Mask, name: str, entry: NamedTeacher, loss_of: Callable[[NamedTeacher, str], Loss]
) -> None:
    """Raises ConfigError if a teacher's loss, head or interpolation does not work with the mask.

    Args:
        mask: The recipe's section `mask`.
        name: The teacher's name, or "" for a single teacher.
        entry: The teacher's entry in the recipe.
        loss_of: See `mask_checks`.
    """
    loss, heads = loss_of(entry, MAP), _OF_PLACES
    require(
        loss.of_tokens or (mask.tokens == "all" and mask.cls),
        f"{field_of(name, 'loss')}: a loss of single tokens is needed if only some tokens count",
        entry.loss,
        "smooth_l1, mse, l1, cosine or a sum of these, or a Loss that says of_tokens",
        beside=("mask.tokens", "mask.cls"),
    )
    if mask.student == "dropped":
        heads = (
            tuple(head for head in _OF_PLACES if head != "ladder") if mask.decodes else _OF_TOKENS
        )
    _check_head(mask, name, entry.head, heads)
    require(
        entry.interpolation not in ("bilinear_student", "bilinear_larger"),
        f"{field_of(name, 'interpolation')}: a mask is drawn on the student's grid, so that the "
        "student's map must not be resized",
        entry.interpolation,
        "none, bilinear or auto",
    )


def _check_head(mask: Mask, name: str, head: str, known: Collection[str]) -> None:
    """Raises ConfigError if a teacher's head does not work with the mask.

    Args:
        mask: The recipe's section `mask`.
        name: The teacher's name, or "" for a single teacher.
        head: Name of the head in the recipe.
        known: The built-in heads that work; a user's own head works if the student has a mask
            token.
    """
    is_own = head not in registry.HEADS
    require(
        head in known or (is_own and mask.student == "token"),
        f"{field_of(name, 'head')}: with a mask a head must keep the student's tokens in place, "
        "and a head of visible patches must treat each token alone",
        f"{head} with mask.student {mask.student}",
        ", ".join(known),
        beside=("mask.student",),
    )
