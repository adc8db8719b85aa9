"""Runs a student with hidden patches, and decides which tokens count in the loss.

With masks of rectangles, images hide different numbers of patches. A mean over the masked tokens
of a micro-batch, as in the published code, then depends on the numbers of ranks and micro-batches.
Here the number of counted tokens is summed over the whole step before the step's first backward
(`Masked.sums`), and each counted token has the same weight.

Source: Fang et al. (EVA), arXiv 2211.07636; Xie et al. (SimMIM), arXiv 2111.09886, for students
with a coarse map, where a whole token's patches are hidden together; Xue et al. (MaskAlign), arXiv
2211.08887, for students that encode visible patches alone.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fd_large.backbones.feature_map import FeatureMap
from fd_large.engine.parts import Part
from fd_large.tasks.distillation.masked.decoder import Decoder, MaskToken
from fd_large.tasks.distillation.masked.samplers import hidden, masks
from fd_large.tasks.distillation.section import MAP, Mask
from fd_large.tasks.distillation.task import Comparison, Drawn, Seen, Whole


class Counted(NamedTuple):
    """A comparison in which only some tokens count.

    Attributes:
        whole: The comparison of all tokens.
        counts: (B, N) bool, whether a token counts; None if all tokens count.
        of_images: (B,), the weight of each image in a mean over images.
        number: Number of tokens that count in the whole step, a scalar; None if the loss is a mean
            over images.
        micro_batches: Number of micro-batches of the step on all ranks.
    """

    whole: Comparison
    counts: Tensor | None
    of_images: Tensor
    number: Tensor | None
    micro_batches: int

    @property
    def target(self) -> Any:
        """The target of the comparison."""
        return self.whole.target

    def value(self) -> Tensor:
        """Returns the unweighted loss of a micro-batch, a scalar.

        The mean over all micro-batches of a step is the loss of the step.
        """
        if self.counts is None:
            return self.whole.value()
        if self.number is None:
            return self.per_image().mean()
        # A step may hide no patch: with tiny maps, few images or a small mask.share.
        number = self.number.to(torch.float32).clamp(min=1)
        return self.micro_batches * self._losses().sum() / number

    def per_image(self) -> Tensor:
        """Returns the mean loss over the counted tokens of each image, (B,).

        The loss of an image without counted tokens is 0.
        """
        if self.counts is None:
            return self.whole.per_image()
        return self._losses().sum(1) / self.counts.sum(1).clamp(min=1)

    def shares(self) -> Tensor:
        """Returns the weight of each image in a mean over images, (B,)."""
        return self.of_images

    def _losses(self) -> Tensor:
        """Returns the loss of each token, (B, N); 0 for tokens that do not count."""
        normalised = self.target.normalise(self.whole.tokens.detach())
        projected = self.whole.projected.to(normalised.dtype)
        return self.target.loss.per_token(projected, normalised).where(self.counts, 0)


class Masked(Whole, Part):
    """Runs a student from which patches are hidden (`sight` of `Distillation`).

    A hidden patch is replaced by a learnt token, or is not encoded at all (`mask.student`). Without
    a drawn mask, as in evaluation, the student sees the whole image.

    Args:
        mask: The recipe's section `mask`.
        student: The student.
        image_size: Side of the student's images, in pixels.
    """

    def __init__(self, mask: Mask, student: nn.Module, *, image_size: int) -> None:
        self._mask, self._grid = mask, student.grid(image_size, image_size)
        self._drops = mask.student == "dropped"
        self._patches, self._num_hidden = math.prod(self._grid), hidden(mask, self._grid)
        number = f"{self._num_hidden}"
        if mask.ratio_to:
            number += f" to {hidden(mask, self._grid, mask.ratio_to)}"
        most = "at most " if mask.sampler == "block" else ""
        images = f" in {mask.share:g} of the images" if mask.share < 1 else ""
        self.description = (
            f"mask: {mask.sampler}, {most}{number} of "
            f"{self._patches} patches hidden from the student{images}"
            f"{', which encodes the visible ones alone' if self._drops else ''}; the training loss "
            f"is of {mask.tokens} tokens, held-out losses of whole images"
        )
        channels = student.patch_embed.proj.out_channels
        self._token = None if self._drops else MaskToken(channels)
        self._decoder = Decoder(student.width, mask) if mask.decodes else None
        self._differ = mask.varies and mask.tokens != "all" and mask.reduce == "token"
        self.before_step(0.0)

    def modules(self) -> dict[str, nn.Module]:
        """Returns {name in checkpoints: module}, with mask token and decoder if these exist."""
        learnt = {"mask": self._token, "decoder": self._decoder}
        return {name: module for name, module in learnt.items() if module is not None}

    def parts(self) -> tuple[Part, ...]:
        """Returns (self,) if counted tokens must be summed over the images of a step, else ().

        The sum is needed if images may have different numbers of counted patches, and the loss is a
        mean over the counted tokens of the step.
        """
        return (self,) if self._differ else ()

    def width(self, student: nn.Module) -> int:
        """Returns the number of channels of the heads' input.

        With a decoder this is the decoder's width, else the width of `student`.
        """
        return student.width if self._decoder is None else self._mask.decoder_width

    def draws(self, seed: int, epoch: int, positions: Tensor) -> Drawn:
        """Draws the mask of each image in a batch.

        Args:
            seed: The run's seed.
            epoch: Epoch, counted from 0.
            positions: (B,), positions of the images in the epoch's order.

        Returns: {"mask": (N, B) bool, True for a hidden patch}. If the student encodes only visible
            patches, also "visible": (V, B) int64, the row-major indices of the visible patches.
        """
        drawn = torch.from_numpy(masks(self._mask, self._grid, seed, epoch, positions))
        sight = {"mask": drawn.T.contiguous()}
        if self._drops:
            # Visible patches first, in the order of their numbers.
            order = drawn.byte().argsort(dim=1, stable=True)
            visible = order[:, : self._patches - self._num_hidden]
            sight["visible"] = visible.T.contiguous()
        return sight

    def undrawn(self, images: Tensor) -> Drawn:
        """Returns zeros of the shapes in the result of `draws`, on the device of `images`.

        They stand for the result when operations are counted by shapes.

        Args:
            images: (B, 3, H, W) uint8.
        """
        sight = {"mask": images.new_zeros(self._patches, len(images), dtype=torch.bool)}
        if self._drops:
            visible = self._patches - self._num_hidden
            sight["visible"] = images.new_zeros(visible, len(images), dtype=torch.int64)
        return sight

    def see(self, student: nn.Module, pixels: Tensor, keep: Tensor | None, drawn: Drawn) -> Seen:
        """Runs the student on images with hidden patches, and then the decoder if there is one.

        Args:
            student: The student.
            pixels: (B, 3, H, W), normalised.
            keep: (num_sites, B) bool, or None for no drop path.
            drawn: The result of `draws`; empty to show whole images.

        Returns: a map of all patches. Without a decoder, the tokens of patches that were not
            encoded are zeros.
        """
        if self._token is not None and "mask" in drawn:
            mask = drawn["mask"].T.unflatten(1, self._grid)
            hook = student.patch_embed.register_forward_hook(
                lambda _module, _inputs, patches: self._hidden(patches, mask)
            )
            try:
                return Seen(student(pixels, keep))
            finally:
                hook.remove()
        if "visible" not in drawn and self._decoder is None:
            return Seen(student(pixels, keep))
        if "visible" in drawn:
            places = drawn["visible"].T
            map_ = student(pixels, keep, places)
        else:
            map_ = student(pixels, keep)
            places = torch.arange(self._patches, device=pixels.device).expand(len(pixels), -1)
        if self._decoder is None:
            return Seen(_filled(map_, places))
        tokens = map_.tokens.to(self._decoder.embed.weight.dtype)
        return Seen(map_._replace(tokens=self._decoder(tokens, places, self._grid)))

    def _hidden(self, patches: Any, mask: Tensor) -> Any:
        """Replaces hidden patches by the learnt token.

        Args:
            patches: (B, H, W, C); or a tuple of the same patches in two data types.
            mask: (B, h, w) bool, whether each patch is hidden.
        """
        assert self._token is not None
        if isinstance(patches, tuple):
            return tuple(self._token(tokens, mask) for tokens in patches)
        return self._token(patches, mask)

    def counted(self, comparison: Comparison, drawn: Drawn) -> Any:
        """Returns the comparison restricted to the tokens that count in the loss (`mask.tokens`).

        In the comparison of a summary all tokens count. If `drawn` has no mask, the comparison is
        returned unchanged.

        Args:
            comparison: The tokens of student and teacher for one target.
            drawn: The result of `draws`; empty for whole images.
        """
        if "mask" not in drawn:
            return comparison
        patches = self._counted_patches(drawn)
        counts = number = None
        of_map = comparison.target.kind == MAP
        if of_map and not (self._mask.tokens == "all" and self._mask.cls):
            prefix = comparison.projected.shape[1] - patches.shape[1]
            first = patches.new_full((len(patches), prefix), self._mask.cls)
            counts = torch.cat([first, patches], dim=1)
            if self._differ:
                totals = self._totals_of(patches) if self._totals is None else self._totals
                number = totals[0] + prefix * totals[1] * self._mask.cls
        shares = self.shares(drawn, comparison.projected)
        return Counted(comparison, counts, shares, number, self._micro_batches)

    def shares(self, drawn: Drawn, pixels: Tensor) -> Tensor:
        """Returns the weight of each image in a mean over images, (B,) float32.

        The weight is the number of the image's counted patches if images may have different numbers
        of counted patches, the loss is a mean over the counted tokens of the step, and `drawn` has
        a mask. Otherwise the weight is 1.

        Args:
            drawn: The result of `draws`; empty for whole images.
            pixels: A tensor whose first dimension is B.
        """
        if not self._differ or "mask" not in drawn:
            return pixels.new_ones(len(pixels), dtype=torch.float32)
        return self._counted_patches(drawn).sum(1).to(torch.float32)

    def _counted_patches(self, drawn: Drawn) -> Tensor:
        """Returns whether each patch counts in the loss, (B, N) bool.

        Args:
            drawn: The result of `draws`, with a mask.
        """
        mask = drawn["mask"].T
        kinds = {"masked": mask, "visible": ~mask}
        return kinds.get(self._mask.tokens, torch.ones_like(mask))

    # --- the part of a step ---

    def sums(self, task: Any, prepared: dict[str, Any]) -> Tensor:
        """Returns the number of counted patches and the number of images, (2,) float64.

        Args:
            task: Not used.
            prepared: Result of the task's `prepare` on a micro-batch.
        """
        return self._totals_of(self._counted_patches(prepared["drawn"]))

    @staticmethod
    def _totals_of(patches: Tensor) -> Tensor:
        """Returns the number of counted patches and the number of images, (2,) float64.

        Args:
            patches: (B, N) bool, whether a patch counts in the loss.
        """
        of_images = patches.sum(1).double()
        return torch.stack([of_images.sum(), torch.ones_like(of_images).sum()])

    def take(self, totals: Tensor, micro_batches: int) -> None:
        """Stores the totals of a step.

        Args:
            totals: (2,), the numbers of counted patches and of images in the whole step.
            micro_batches: Number of micro-batches of the step on all ranks.
        """
        self._totals, self._micro_batches = totals, micro_batches

    def before_step(self, progress: float) -> None:
        """Drops the numbers that `take` stored earlier.

        Args:
            progress: Fraction of the run's steps that are done; not used.
        """
        self._totals: Tensor | None = None
        self._micro_batches = 1


def _filled(map_: FeatureMap, places: Tensor) -> FeatureMap:
    """Returns a map of all patches, in which patches that were not encoded are zeros.

    Losses and heads that work on single tokens then need no special case.

    Args:
        map_: A map with the visible patches alone, but with the grid of all patches.
        places: (B, V) int64, row-major indices of the visible patches.
    """
    prefix, (rows, columns) = map_.num_prefix_tokens, map_.grid
    visible, width = map_.tokens[:, prefix:], map_.tokens.shape[-1]
    empty = visible.new_zeros(len(visible), rows * columns, width)
    patches = empty.scatter(1, places[..., None].expand(-1, -1, width), visible)
    # A mean over all places would include the zeros.
    summary = map_.summary if prefix else visible.mean(1, keepdim=True)
    return map_._replace(tokens=torch.cat([map_.tokens[:, :prefix], patches], 1), summary=summary)
