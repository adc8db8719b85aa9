"""A frozen teacher, replicated on each rank, sharded over all ranks, or sharded inside each node.

A sharded teacher is a second ZeRO-3 engine without an optimiser. The engine has a configuration of
its own, so that the student may have any ZeRO stage. A teacher has no gradients, no float32 copy
and no entry in a checkpoint.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fd_large import mapped_files
from fd_large.backbones.feature_map import FeatureMap
from fd_large.backbones.vit.published import TEXT_PROJECTIONS
from fd_large.data.random_numbers import random_words
from fd_large.engine.frozen import Frozen, built_from, frozen_weights
from fd_large.engine.own_stream import beside
from fd_large.engine.zero import partition
from fd_large.engine.zero.fingerprint import fingerprint, held_fingerprint
from fd_large.engine.zero.partition import load_weights
from fd_large.engine.zero.start import deepspeed
from fd_large.engine.zero.stream_order import order_gathers
from fd_large.engine.zero.whole_blocks import gather_whole
from fd_large.errors import ConfigError
from fd_large.plan.buckets import prefetch_bucket
from fd_large.ranks import distributed
from fd_large.recipes.architectures import resolve
from fd_large.recipes.fields import require
from fd_large.recipes.sections import RANDOM, FrozenModel
from fd_large.tasks.distillation.section import (
    EMBEDDING,
    SUMMARY,
    NamedTeacher,
    cached_folder,
    called,
    source_flag,
)
from fd_large.tasks.distillation.task import Maps
from fd_large.weights.coverage import Fitted
from fd_large.weights.resolve import Sources

log = logging.getLogger(__name__)


class PlacedTeacher:
    """A teacher with the same interface for every placement.

    Args:
        module: The model.
        engine: The model's DeepSpeed engine if the weights are sharded, else None.
        group: The process group over which the weights are sharded; None for all ranks.

    Attributes:
        module: The model. Its parameters are sharded if there is a DeepSpeed engine (`engine`).
        fingerprint: Hash of the weights when the teacher was built, the same for every placement.
        width: Number of channels of the map.
        projection: (Ce, width) float32, the matrix that maps a summary to an image embedding of Ce
            channels; None if no embedding is learnt.
    """

    projection: Tensor | None = None

    def __init__(self, module: Frozen, engine: Any, group: Any) -> None:
        self.module, self._engine, self._group = module, engine, group
        self._whole: dict[str, Tensor] = {}
        self.fingerprint = self.hash_now()
        self.width = module.width

    def __call__(self, images: Tensor, **options: bool) -> FeatureMap:
        """Returns the map of uint8 images (B, 3, H, W), without gradient.

        Args:
            images: The images.
            options: Keyword arguments of the model's forward, which only `Mosaic` has.

        Raises:
            WeightsError: on this rank alone, if the weights are mapped from a file that has changed
                since it was mapped.
        """
        with torch.no_grad():
            feature_map = (self._engine or self.module)(images, **options)
        # Checked after the forward, so that nothing is learned from weights that changed meanwhile.
        mapped_files.check(self.module)
        return feature_map

    def hash_now(self) -> str:
        """Returns the hash of the present weights.

        The hash is equal to `fingerprint` unless the weights have changed in memory.
        """
        return fingerprint(self.module.net, group=self._group)

    def shard_hash(self) -> str:
        """Returns "PART/PARTS HASH" of this rank's own shard of the weights, without a collective.

        A damaged shard reaches all ranks by all-gathers; the hashes of the shards show which rank
        holds the damaged shard.
        """
        return held_fingerprint(self.module, self._whole)

    def map_of_fixed_images(self, image_size: int) -> Tensor:
        """Returns the map (2, N, C) of two fixed images of noise; all ranks must call this method.

        Args:
            image_size: Side of the images, in pixels.
        """
        words = random_words(0, 0, range(2), "canary", num_blocks=-(-3 * image_size**2 // 4))
        pixels = (words.reshape(2, -1)[:, : 3 * image_size**2] >> 24).astype("uint8")
        images = torch.from_numpy(pixels).view(2, 3, image_size, image_size)
        return self(images.to(distributed.device())).tokens

    def held_bytes(self) -> int:
        """Returns the size of the weights that this rank holds between steps, in bytes."""
        total = 0
        for parameter in self.module.parameters():
            total += parameter.numel() * parameter.element_size()
            if partition.is_partitioned(parameter):
                total += parameter.ds_tensor.numel() * parameter.ds_tensor.element_size()
        return total


def place(
    make: Callable[[], Frozen],
    *,
    placement: str,
    dtype: torch.dtype,
    seed: int,
    node_size: int,
    persistence_threshold: int,
    weights: Iterable[tuple[str, Tensor]] | None = None,
    whole_first: bool = False,
    where: str = "--teacher.source",
) -> PlacedTeacher:
    """Builds a teacher whose weights are placed as the recipe says.

    This function must run before the student's engine is built. If the student's hpZ process group
    existed already, which is global to the process, DeepSpeed would keep a second, permanent copy
    of the teacher's weights.

    Args:
        make: Constructs the teacher with random weights.
        placement: "replicated", "sharded" or "node".
        dtype: Data type of the teacher's weights and matrix products.
        seed: Seed of the random weights.
        node_size: Number of ranks per node.
        persistence_threshold: Number of elements up to which a tensor is not sharded.
        weights: Names and tensors of the model, on every rank; None for random weights. Tensors
            that are mapped from a file (`Fitted`) take no memory in addition to the model's.
        whole_first: See `partition.build`.
        where: The flag of the teacher's source, for messages.
    """
    group = None
    if placement == "node" and node_size < distributed.world_size():
        group = distributed.node_group(node_size)
    shards = node_size if group is not None else distributed.world_size()
    partitioned = placement != "replicated" and shards > 1
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "steps_per_print": 10**9,
        "zero_optimization": {
            "stage": 3,
            "stage3_param_persistence_threshold": persistence_threshold,
        },
    }
    module = None
    if isinstance(weights, Fitted) and not partitioned:
        module = built_from(weights, make, dtype=dtype, where=where)
    if module is None:
        module = partition.build(
            make, config, partitioned=partitioned, seed=seed, group=group, whole_first=whole_first
        )
        if weights is not None:
            load_weights(module.net, weights, where=where)
    if dtype == torch.bfloat16:
        partition.to_bfloat16(module)
        config["bf16"] = {"enabled": True}
    if not partitioned:
        module.to(distributed.device())
        return PlacedTeacher(module, None, None)
    zero = config["zero_optimization"]
    zero["stage3_prefetch_bucket_size"] = prefetch_bucket(
        sum(parameter.ds_numel for parameter in module.parameters())
    )
    engine, *_ = deepspeed.initialize(model=module, config=config)
    engine.eval()
    gather_whole(engine, module.net, zero)
    order_gathers(engine)
    log.debug("teacher: sharded over %d ranks", shards)
    return PlacedTeacher(module, engine, group)


class Beside:
    """Wraps `Distillation.teachers`, to run the teachers on a separate CUDA stream in training.

    Args:
        teachers: The wrapped callable, as `Teachers`.
    """

    def __init__(self, teachers: Any) -> None:
        self._teachers, self.by_name = teachers, teachers.by_name

    def __call__(self, images: Tensor, given_maps: Maps, training: bool) -> Maps:
        """Returns `given_maps`, and by name the maps of teachers that `given_maps` does not have.

        In training, this method may return before the other stream has computed the maps; reading a
        map waits until the map is computed.

        Args:
            images: (B, 3, H, W) uint8.
            given_maps: Maps by the teacher's name, and other targets of the batch.
            training: Whether the other stream is used.
        """
        if not training:
            return self._teachers(images, given_maps, training)

        def maps() -> Maps:
            with torch.no_grad():
                return self._teachers(images, given_maps, training)

        return beside(maps, (images, given_maps), images.device)


def check_stream(placements: Collection[str], *, stored_maps: bool) -> None:
    """Raises ConfigError if teachers are sharded or maps are stored while a second stream is used.

    The all-gathers of a sharded teacher and those of the student would wait for each other in the
    order of their calls.

    Args:
        placements: Placements of the teachers.
        stored_maps: Whether the run reads or writes stored maps.
    """
    unfit = {*placements, *(["stored maps"] if stored_maps else [])} - {"replicated"}
    require(
        not unfit,
        "task.distillation.teacher_stream: only for teachers that are whole on each rank",
        ", ".join(sorted(unfit)),
        "replicated teachers",
        "Leave out teacher_stream, or set the teacher's placement to replicated",
    )


def built_teacher(
    name: str,
    entry: NamedTeacher,
    make: Callable[[], Frozen],
    sources: Sources,
    *,
    student_type: str,
    seed: int,
    node_size: int,
    persistence_threshold: int,
) -> PlacedTeacher:
    """Builds a teacher by `place`, and logs its model, placement, size and hash.

    All ranks must call this function.

    Args:
        name: The teacher's name, or "" for a single teacher.
        entry: The teacher's entry in the recipe `DistillationJob.settled`.
        make: Constructs the teacher with random weights.
        sources: Opens the teacher's weights.
        student_type: Data type of the student's matrix products, also used by the teacher unless
            its entry names another.
        seed: Seed of random weights.
        node_size: Number of ranks per node.
        persistence_threshold: Number of elements up to which a tensor is not sharded.
    """
    where, title = source_flag(name), called(name)
    weights = frozen_weights(entry, sources, where=where)
    if entry.source == RANDOM:
        log.warning(
            "%s: RANDOM weights (%s random): the student learns nothing useful",
            title,
            where,
        )
    teacher = place(
        make,
        placement=entry.placement,
        dtype=getattr(torch, student_type if entry.dtype == "auto" else entry.dtype),
        seed=seed,
        node_size=node_size,
        persistence_threshold=persistence_threshold,
        weights=weights,
        whole_first=resolve(entry.model, entry.architecture).whole_first,
        where=where,
    )
    log.debug(
        "%s: %s, %s, %.1f MB on this rank, hash %s",
        title,
        entry.model,
        entry.placement,
        teacher.held_bytes() / 1e6,
        teacher.fingerprint,
    )
    if entry.embedding_width:
        projection = projection_of(name, entry, sources)
        teacher.projection = projection.float().to(distributed.device())
    return teacher


def with_embedding(name: str, entry: NamedTeacher, sources: Sources) -> NamedTeacher:
    """Returns a teacher's entry with the width of the image embedding, if the embedding is learnt.

    If no embedding is learnt, the entry is returned unchanged. The image embedding of a CLIP
    teacher is the teacher's summary after a projection into the embedding space of texts. The
    projection is among the teacher's weights and follows the final norm.

    Args:
        name: The teacher's name.
        entry: The teacher's entry in the recipe.
        sources: Opens the teacher's weights.

    Raises:
        ConfigError: if the weights have no projection that fits the map, or if the entry learns
            another layer than the last.
    """
    if entry.summary.layer != EMBEDDING or SUMMARY not in entry.targets:
        return entry
    if entry.layer != "last":
        raise ConfigError(
            f"teachers.{name}.summary.layer: an embedding follows the final norm; got {EMBEDDING} "
            f"with layer {entry.layer}, expected last. Leave one of them out."
        )
    tensor, is_transposed = _named(name, entry, sources)
    shape = sources.resolve(entry.source).tensors.shape(tensor)
    width = shape[1] if is_transposed else shape[0]
    return replace(entry, summary=replace(entry.summary, width=width))


def projection_of(name: str, entry: FrozenModel, sources: Sources) -> Tensor:
    """Returns the matrix from a CLIP summary to its embedding, (embedding width, map width).

    Args:
        name: The teacher's name.
        entry: The teacher's entry in the recipe.
        sources: Opens the teacher's weights.

    Raises: ConfigError: if the weights have no projection that fits the map.
    """
    tensor, is_transposed = _named(name, entry, sources)
    projection = sources.resolve(entry.source).tensors[tensor]
    return projection.T if is_transposed else projection


def _named(name: str, entry: FrozenModel, sources: Sources) -> tuple[str, bool]:
    """Returns (name of the projection's tensor in the teacher's weights, whether it is transposed).

    A transposed projection has the shape (map width, embedding width).

    Args:
        name: The teacher's name.
        entry: The teacher's entry in the recipe.
        sources: Opens the teacher's weights.

    Raises: ConfigError: if the weights have no projection that fits the map.
    """
    got = f"{entry.source or 'none'}"
    if entry.source and entry.source != RANDOM and not cached_folder(entry.source):
        tensors = sources.resolve(entry.source, where=source_flag(name)).tensors
        named = next((key for key in TEXT_PROJECTIONS if key in tensors), None)
        if named is not None:
            is_transposed = TEXT_PROJECTIONS[named]
            into = tensors.shape(named)[0 if is_transposed else 1]
            width = getattr(resolve(entry.model, entry.architecture), "width", 0)
            if into == width:
                return named, is_transposed
            got = f"{named} of {into} channels for a map of {width}"
    raise ConfigError(
        f"teachers.{name}.summary.layer: no projection into the space of texts in the teacher's "
        f"weights; got {got}, expected the file or folder of a CLIP ViT with "
        f"{' or '.join(TEXT_PROJECTIONS)}. Name such weights, for example "
        f"open_clip:ViT-B-16/openai, or leave {EMBEDDING} out."
    )
