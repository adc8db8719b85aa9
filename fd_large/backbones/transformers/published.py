"""Reads the configuration and the tensors of a folder of transformers.

transformers renames tensors between releases, so the names in a file and in the module are
translated to a common form before they are compared.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from fd_large.backbones.family import Options
from fd_large.backbones.published import Matched, WeightFacts
from fd_large.backbones.transformers.architecture import TransformersArchitecture
from fd_large.backbones.transformers.kinds import KINDS, fields_of, kind_of
from fd_large.backbones.transformers.transformers_backbone import build
from fd_large.backbones.translation import Piece, Shape, Shapes, our_name, table
from fd_large.recipes.architectures import Architecture

log = logging.getLogger(__name__)

# The form in which the names of all releases agree, and those of models around the vision model.
_AROUND = "{|vision_model.|dinov2.|dinov2_with_registers.|convnext.|convnextv2.|ijepa.|hiera.}"
_OF_COMMON = """
{|encoder.|model.}{layers|layer}.#.         layers.#.
    attention.{attention.query|q_proj}.*    attention.q_proj.*
    attention.{attention.key|k_proj}.*      attention.k_proj.*
    attention.{attention.value|v_proj}.*    attention.v_proj.*
    attention.{output.dense|o_proj}.*       attention.o_proj.*
    {intermediate.dense|mlp.fc1}.*          mlp.fc1.*
    {output.dense|mlp.fc2}.*                mlp.fc2.*
    mlp.{weights_out|down_proj}.*           mlp.down_proj.*
    *                                       *
{model.|}stages.*                           stages.*
*                                           *
"""
_COMMON = table(_OF_COMMON, start=_AROUND)
# One tensor of DINOv2's files is two of the module's, in this order.
_JOINED, _HALVES = ".mlp.weights_in.", (".mlp.gate_proj.", ".mlp.up_proj.")
# What follows the map or only pre-training has, and the text model.
_DROPPED = (
    "text_model.",
    "logit_",
    "head.",
    "classifier.",
    "pooler.",
    "decoder.",
    "encoder_norm.",
    "multiscale_fusion.",
    "embeddings.mask_token",
    "embeddings.position_ids",
    "rope_embeddings.",
)


def of_config(config: Mapping[str, Any], where: str) -> Architecture | None:
    """Returns the architecture that `config`, the contents of transformers' config.json, describes.

    Returns None if `model_type` is not a supported type of transformers. Logs a warning about
    fields that this release of transformers does not know.

    Raises:
        WeightsError: For a configuration that no published model has, or if transformers is not
            installed. The message begins with `where`.
    """
    name = config.get("model_type")
    if not isinstance(name, str) or name not in KINDS:
        return None
    text, others = fields_of(name, config, where)
    architecture = TransformersArchitecture(transformers_type=name, transformers_config=text)
    settings = _weightless(architecture).net.config
    if others := [other for other in others if not hasattr(settings, other)]:
        log.warning(
            "%s: config.json has fields that this release of transformers does not know, which may "
            "change the model: %s",
            where,
            ", ".join(others)[:200],
        )
    size = getattr(settings, "image_size", 0)
    side = (size if isinstance(size, int) else max(size)) if size else 0
    return Architecture(transformers_type=name, transformers_config=text, image_size=side)


def matched(architecture: TransformersArchitecture, file: Shapes, where: str) -> Matched:
    """Matches the tensors of a model with those of a file, by their names in the common form.

    Args:
        architecture: The model.
        file: {name: shape} of the file's tensors.
        where: Field that the user set, for messages.
    """
    expected = _shapes(architecture)
    ours = {_common(name.removeprefix("net.")): name for name in expected}
    dropped = (*_DROPPED, *_norm_of_mean(architecture, where))
    pieces: dict[str, Piece] = {}
    left_out = 0
    for name in file:
        common = _common(name)
        halves = [common.replace(_JOINED, half) for half in _HALVES]
        if _JOINED in common and all(half in ours for half in halves):
            pieces |= {ours[half]: _Half((name,), number=i) for i, half in enumerate(halves)}
        elif common in ours:
            pieces[ours[common]] = Piece((name,))
        elif common.startswith(dropped) or 0 in file[name]:
            left_out += 1
        else:
            pieces[f"net.{name}"] = Piece((name,))
    return Matched(
        pieces,
        expected,
        [f"left out on purpose: {left_out} tensors of no part of the map"] if left_out else [],
        f"transformers' {architecture.transformers_type}",
        "The folder's config.json and its weights do not belong together: fetch both again.",
    )


@dataclass(frozen=True)
class _Half(Piece):
    """Rule that takes the first or the second half of the rows of a file's tensor.

    Attributes:
        number: 0 for the first half, 1 for the second.
    """

    number: int = 0

    def shape(self, shape_of: Callable[[str], Shape]) -> Shape:
        """Returns the shape of the half of the file's tensor that this rule takes.

        For an odd number of rows it returns the shape of the whole tensor, which fits no model.

        Args:
            shape_of: Returns the shape of a tensor of the file, given its name there.
        """
        rows, *rest = super().shape(shape_of) or (1,)
        return (rows if rows % 2 else rows // 2, *rest)

    def read(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Returns the half that this rule takes.

        Args:
            tensors: The tensors of the file, by their names in the file.
        """
        return tensors[self.sources[0]].chunk(2)[self.number]


def facts_of(architecture: TransformersArchitecture) -> WeightFacts:
    """Returns the facts that most published models of the architecture's type have in common.

    The image size is the architecture's, or 224 pixels if it is 0. The licence is unknown.
    """
    statistics = kind_of(architecture.transformers_type, "teacher.model").statistics
    return WeightFacts(statistics, architecture.image_size or 224, "", "transformers")


def _common(name: str) -> str:
    return our_name(name, _COMMON)[0]


def _norm_of_mean(architecture: TransformersArchitecture, where: str) -> tuple[str, ...]:
    norm = kind_of(architecture.transformers_type, where).norm_of_mean
    return (f"{norm}.",) if norm else ()


@lru_cache(maxsize=4)
def _weightless(architecture: TransformersArchitecture) -> Any:
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        return build(architecture, Options())


def _shapes(architecture: TransformersArchitecture) -> dict[str, Shape]:
    state = _weightless(architecture).state_dict()
    return {name: tuple(t.shape) for name, t in state.items() if t.is_floating_point()}
