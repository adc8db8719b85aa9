"""Checks of oracle files of several teachers: which images a rank has, and how they are mixed."""

from __future__ import annotations

import torch
from oracles_models import Row, Tensors

from fd_large.data.mixing import mixed
from fd_large.data.sampler import MicroBatches, Portion


def check_lightly_mixup(spec: dict, tensors: Tensors, dtype: torch.dtype) -> list[Row]:
    """The mix of a batch by its share, exactly; the partners are the file's own."""
    rows, images = [], tensors["input"].double()
    for number, share in enumerate(spec["lambda"]):
        partners = tensors[f"permutation.{number}"].long()
        got = mixed(images, images[partners], share).float()
        label = f"out.{number}"
        rows.append(Row(label, float(not torch.equal(got, tensors[label])), 0.0))
    return rows


def check_dinov3_exchange(spec: dict, tensors: Tensors, dtype: torch.dtype) -> list[Row]:
    """Each rank of a student's group gets the targets of the images that it has by our order.

    A student of ours is trained on all ranks, and a rank computes the targets of its own images.
    """
    rows, config = [], spec["config"]
    size, each = config["global_batch"], config["images_per_rank_in"]
    for rank, place in spec["ranks"].items():
        portion = Portion(
            0, 0, place["images"], rank=place["subgroup_rank"], world_size=place["subgroup_size"]
        )
        (positions,) = MicroBatches(size, portion, size)
        owners, places = positions // each, positions % each
        got = torch.stack(
            [
                tensors[f"input.rank{owner}"][:, place]
                for owner, place in zip(owners.tolist(), places.tolist(), strict=True)
            ],
            dim=1,
        )
        label = f"out.rank{rank}"
        rows.append(Row(label, float(not torch.equal(got, tensors[label])), 0.0))
    return rows


CHECKS = {
    "dinov3_exchange": check_dinov3_exchange,
    "lightly_mixup": check_lightly_mixup,
}
