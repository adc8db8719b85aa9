"""A trained model with its preprocessing, for code of the user's own."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fd_large.backbones.feature_map import FeatureMap
from fd_large.backbones.statistics import Statistics, normalise
from fd_large.data.centre_crops import central_view
from fd_large.data.decode import decode
from fd_large.engine.text_tower import PROMPTS, check_prompts, classes_of, probabilities
from fd_large.errors import ConfigError, ShapeError, nearest

if TYPE_CHECKING:
    from PIL.Image import Image

_SUMMARY = "_summary"


class TrainedModel(nn.Module):
    """A trained backbone that takes raw images and normalises them itself.

    Args:
        backbone: Normalised images (B, 3, H, W) -> FeatureMap.
        statistics: The normalisation of the backbone's images.
        image_size: Side of the images that the backbone was trained with, in pixels.
        source: Source of the weights.
        heads: Reads the heads that predict teachers' maps, by name; see `StoredRun.heads`.

    Attributes:
        image_size: Side of the images that `preprocess` returns, in pixels.
    """

    def __init__(
        self,
        backbone: nn.Module,
        statistics: Statistics,
        *,
        image_size: int,
        source: str,
        heads: Callable[[], Mapping[str, nn.Module]] = dict,
    ) -> None:
        super().__init__()
        self._read_heads = heads
        self.heads: Mapping[str, nn.Module] | None = None
        self.backbone, self.image_size, self.source = backbone, image_size, source
        self._statistics = statistics

    def preprocess(self, image: str | Path | Image | Tensor | Any) -> Tensor:
        """Returns the central crop of an image, (3, image_size, image_size) uint8.

        As in evaluations, the short side is first resized to 256/224 of `image_size` (bicubic).

        Args:
            image: A path; an image of Pillow; or uint8 pixels, as a tensor (3, H, W) or an array
                (H, W, 3).

        Raises:
            DataError: If the file is no image.
            ShapeError: For another shape or data type.
        """
        if isinstance(image, (str, os.PathLike)):
            path = Path(image)
            return central_view(decode(path.read_bytes(), str(path)), self.image_size)
        if hasattr(image, "convert"):  # It is an image of Pillow.
            image = image.convert("RGB")
        if not isinstance(image, Tensor):
            import numpy

            image = torch.from_numpy(numpy.array(image)).movedim(-1, 0)
        if image.dtype != torch.uint8 or image.ndim != 3 or len(image) != 3:
            raise ShapeError(
                f"preprocess: not an image; got {image.dtype} {tuple(image.shape)}, expected uint8 "
                "pixels, a tensor (3, H, W) or an array (H, W, 3). Convert the image."
            )
        return central_view(image, self.image_size)

    def forward(self, images: Tensor) -> Tensor:
        """Returns the map of patch tokens, (B, C, H, W), with H rows and W columns of patches.

        Args:
            images: (B, 3, S, S), uint8 as from `preprocess`, or float in 0..1.
        """
        tokens, grid, prefix, _ = self.backbone(self._normalised(images))
        return tokens[:, prefix:].transpose(1, 2).unflatten(2, grid)

    def features(self, images: Tensor) -> Tensor:
        """Returns the feature of each image, (B, C) float32: the mean over its patch tokens.

        Args:
            images: As in `forward`.
        """
        return self(images).float().mean((2, 3))

    def teacher_map(self, name: str, images: Tensor, *, in_teacher_units: bool = False) -> Tensor:
        """Returns the student's prediction of a teacher's map, (B, C, H, W), by a trained head.

        The heads are read from the run's checkpoint, or from the folder of the export, at the first
        call.

        Args:
            name: The teacher's name; "teacher" for a run with one teacher; NAME_summary for a
                summary, a map (B, C, 1, 1) of a single position.
            images: As in `forward`.
            in_teacher_units: True for a prediction in the units of the teacher's map; False for
                the units of the normalised target.

        Raises: ConfigError: if the model has no such head, or the normaliser cannot be undone.
        """
        tokens, grid, prefix, _ = self._guess(name, images, in_teacher_units)
        return tokens[:, prefix:].transpose(1, 2).unflatten(2, grid)

    def teacher_summary(
        self, name: str, images: Tensor, *, in_teacher_units: bool = False
    ) -> Tensor:
        """Returns the student's prediction of a teacher's summary of each image, (B, C).

        Args:
            name: The teacher's name.
            images: As in `teacher_map`.
            in_teacher_units: As in `teacher_map`.

        Raises: ConfigError: as in `teacher_map`.
        """
        return self._guess(f"{name}{_SUMMARY}", images, in_teacher_units).tokens.flatten(1)

    def zero_shot(
        self,
        images: Tensor,
        class_names: Sequence[str],
        *,
        text: str | os.PathLike[str],
        teacher: str = "clip",
        prompts: Sequence[str] = PROMPTS,
    ) -> Tensor:
        """Returns the probability of each class for each image, (B, K) float32.

        No classifier is trained. Example:

            model.zero_shot(images, ["cat", "dog"], text="open_clip:ViT-B-16/openai")

        The student's prediction of a CLIP teacher's image embedding is compared with the class
        names' embeddings by the same CLIP's text tower. The student must have learnt the embedding
        (`teachers.NAME.summary.layer embedding`), with a normaliser that can be undone.

        Args:
            images: As in `forward`.
            class_names: The names of the classes, K.
            text: The CLIP whose text tower is used: a folder of transformers with a tokenizer, or
                of open_clip; hf:REPO; or open_clip:ARCH/TAG.
            teacher: The name of that CLIP among the run's teachers.
            prompts: Texts that have {} in the place of a class name; the vector of a class is the
                mean of the texts' embeddings.

        Raises:
            ConfigError: As in `teacher_map`, or if the embeddings of the text tower and of the
                teacher differ in width.
            WeightsError: If the text tower cannot be fetched or read.
        """
        check_prompts(class_names, prompts)
        learnt = [name.removesuffix(_SUMMARY) for name in self._loaded() if name.endswith(_SUMMARY)]
        if teacher not in learnt:
            names = ", ".join(map(repr, learnt)) or "none"
            raise ConfigError(
                f"zero_shot: the student of {self.source} has not learnt a summary of this "
                f"teacher; got teacher={teacher!r} and a run with summaries of {names}, expected "
                "a CLIP whose image embedding it has learnt (teachers.NAME.summary.layer "
                f"embedding). Name that CLIP, or train with --teachers.{teacher}.targets map "
                f"summary --teachers.{teacher}.summary.layer embedding (docs/several_teachers.md)."
            )
        guess = self.teacher_summary(teacher, images, in_teacher_units=True)
        return probabilities(guess, classes_of(os.fspath(text), tuple(class_names), tuple(prompts)))

    def _guess(self, name: str, images: Tensor, in_teacher_units: bool) -> FeatureMap:
        heads = self._loaded()
        if name not in heads:
            expected = (
                f"{nearest(name, heads)}. A run has a head for each target that it learnt, "
                "and NAME_summary for a teacher's summary."
                if heads
                else "expected a run of distillation, or an export of one that has a folder heads"
            )
            raise ConfigError(f"{self.source}: no head with this name; got {name!r}, {expected}")
        pixels = self._normalised(images)
        head = heads[name].to(pixels.device)
        output: FeatureMap = head(self.backbone, pixels, in_teacher_units=in_teacher_units)
        return output

    def _loaded(self) -> Mapping[str, nn.Module]:
        if self.heads is None:
            self.heads = {name: head.eval() for name, head in self._read_heads().items()}
        return self.heads

    def _normalised(self, images: Tensor) -> Tensor:
        images = images.to(next(self.backbone.parameters()).device)
        pixels = images if images.dtype == torch.uint8 else images * 255
        return normalise(pixels, self._statistics)
