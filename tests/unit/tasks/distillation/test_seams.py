"""What fills a seam composes with what fills the others: no subclass of the task, no branch in it.

A stub of a mask stands for a sight: the student sees nothing of some patches, and learns these. A
stub of a stored teacher stands where a teacher stands.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fd_large.backbones.feature_map import FeatureMap
from fd_large.backbones.statistics import IMAGENET
from fd_large.backbones.vit.vit import ViT
from fd_large.data.loader import Batch
from fd_large.data.random_numbers import uniforms
from fd_large.engine.forward_backward import arguments_of_step, completed, prepared
from fd_large.engine.frozen import Frozen
from fd_large.engine.parts import Part
from fd_large.errors import ConfigError
from fd_large.tasks.distillation.job import KNOWN, composed
from fd_large.tasks.distillation.objective import make_target
from fd_large.tasks.distillation.section import FIXED, Weighting
from fd_large.tasks.distillation.task import Comparison, Distillation, Drawn, Maps, Seen, Whole

PATCHES = 16
IMAGES = torch.randint(
    0, 256, (8, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
)


class Masked(NamedTuple):
    """A comparison of the patches that a mask (B, N) counts; each counts the same in a step."""

    whole: Comparison
    mask: Tensor
    number: Tensor | None
    micro_batches: int

    @property
    def target(self) -> Any:
        return self.whole.target

    def shares(self) -> Tensor:
        return self.mask.sum(1).to(torch.float32)

    def per_image(self) -> Tensor:
        normalised = self.target.normalise(self.whole.tokens.detach())
        losses = F.smooth_l1_loss(self.whole.projected, normalised, reduction="none").mean(2)
        return losses[:, -PATCHES:].where(self.mask, 0).sum(1) / self.mask.sum(1)

    def value(self) -> Tensor:
        number = self.shares().sum() if self.number is None else self.number.squeeze()
        return self.micro_batches * (self.per_image() * self.shares()).sum() / number.float()


class Mask(Whole, Part):
    """A sight that hides patches, between one and all but one; their number is of a step."""

    def __init__(self) -> None:
        self.before_step(0.0)

    def parts(self) -> tuple[Part, ...]:
        return (self,)

    def draws(self, seed: int, epoch: int, positions: Tensor) -> Drawn:
        noise = torch.from_numpy(uniforms(seed, epoch, positions, "erasing", PATCHES + 1))
        number = 1 + (noise[:, :1] * (PATCHES - 1)).long()
        return {"mask": (noise[:, 1:].argsort(1).argsort(1) < number).T.contiguous()}

    def see(self, student: nn.Module, pixels: Tensor, keep: Tensor | None, drawn: Drawn) -> Seen:
        mask = drawn["mask"].T.unflatten(1, (4, 4))
        cells = mask.repeat_interleave(8, 1).repeat_interleave(8, 2)
        return super().see(student, pixels.where(~cells[:, None], 0), keep, drawn)

    def counted(self, comparison: Comparison, drawn: Drawn) -> Any:
        if comparison.target.kind != "map":
            return comparison
        return Masked(comparison, drawn["mask"].T, self._number, self._micro_batches)

    def shares(self, drawn: Drawn, pixels: Tensor) -> Tensor:
        return drawn["mask"].sum(0).to(torch.float32)

    def sums(self, task: Any, prepared: dict[str, Any]) -> Tensor:
        return self.shares(prepared["drawn"], prepared["pixels"]).sum().double().reshape(1)

    def take(self, totals: Tensor, micro_batches: int) -> None:
        self._number, self._micro_batches = totals, micro_batches

    def before_step(self, progress: float) -> None:
        self._number, self._micro_batches = None, 1


class OnlyStored:
    """A teacher without a model, whose maps come with the images."""

    width = 12

    def __call__(self, images: Tensor) -> FeatureMap:
        raise AssertionError("there is no model")

    def of_stored(self, images: Tensor, stored: Tensor) -> FeatureMap:
        return FeatureMap(stored.float(), (4, 4), 1)


def vit(width: int, seed: int, **options: Any) -> ViT:
    torch.manual_seed(seed)
    return ViT(width, 2, 2, patch_size=8, image_size=32, **options)


def teacher(seed: int) -> Frozen:
    return Frozen(vit(12, seed), IMAGENET)


def made(*options: str) -> Distillation:
    """A task with the options of a name; teacher b is stored if they say so."""
    normaliser = "batch" if "batch" in options else "whitening"
    teachers: dict[str, Any] = {"a": teacher(10)}
    targets = [make_target(16, 12, teacher="a", normaliser=normaliser, weight=0.7, known=KNOWN)]
    if "two" in options:
        teachers["b"] = OnlyStored() if "stored" in options else teacher(11)
        targets.append(make_target(16, 12, teacher="b", normaliser="running", known=KNOWN))
    if "queue" in options:
        summaries = {"kind": "summary", "loss": "queue", "normaliser": "none", "known": KNOWN}
        targets.append(make_target(16, 12, teacher="a", **summaries))
    weighting = Weighting(rule="drop") if "drop" in options else FIXED
    sight = Mask() if "mask" in options else None
    student = vit(16, 0, drop_path_rate=0.3)
    return composed(student, teachers, targets, weighting=weighting, sight=sight).train()


def batches(count: int, *options: str) -> list[Batch]:
    """The images of a step in so many micro batches."""
    maps = teacher(11)(IMAGES).tokens
    return [
        Batch(IMAGES[at], 1, at, at, targets={"b": maps[at]} if "stored" in options else None)
        for at in torch.arange(8).chunk(count)
    ]


@pytest.mark.parametrize(
    "options",
    [
        ("mask",),
        ("mask", "batch", "queue"),
        ("two", "batch", "queue"),
        ("two", "stored", "drop"),
        ("mask", "two", "stored"),
        ("mask", "two", "drop"),
        ("mask", "two", "stored", "batch", "drop"),
    ],
    ids=" ".join,
)
def test_seams_compose_and_a_step_is_the_same_in_any_number_of_micro_batches(options):
    losses, gradients = [], []
    for count in (1, 2, 4):
        task = made(*options)
        task.before_step(0.0)
        total = 0.0
        parts = batches(count, *options)
        for arguments in arguments_of_step(task, task, parts, seed=3, count=count):
            loss, _ = task(**arguments)
            (loss / count).backward()
            total += loss.item() / count
        task.after_step()
        losses.append(total)
        gradients.append(torch.cat([p.grad.flatten() for p in task.parameters()]))
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-5)
    for gradient in gradients[1:]:
        assert (gradient - gradients[0]).norm() <= 1e-5 * gradients[0].norm()


def test_a_mask_that_counts_by_micro_batch_would_be_noticed():
    """The number of hidden patches differs between the micro batches."""
    drawn = Mask().draws(3, 1, torch.arange(8))["mask"].sum(0)
    assert drawn[:4].sum() != drawn[4:].sum()


def test_maps_that_another_student_has_had_computed_are_taken_as_they_are():
    options = ("two", "stored", "drop")
    task, calls = made(*options), []
    task.teachers.by_name["a"].register_forward_hook(lambda *_: calls.append("a"))
    batch = completed(task, *batches(1, *options))
    assert calls == ["a"]
    other = made(*options)
    other.teachers.by_name["a"].register_forward_hook(lambda *_: calls.append("other"))
    maps: Maps = prepared(other, batch, 3)["maps"]
    assert calls == ["a"]
    assert torch.equal(maps["b"].tokens, teacher(11)(IMAGES).tokens)


def test_a_teacher_that_is_called_as_a_method_is_refused():
    student = vit(16, 0)
    with pytest.raises(ConfigError, match=r"teachers\.keys"):
        composed(student, {"keys": teacher(1)}, [make_target(16, 12, teacher="keys")])
