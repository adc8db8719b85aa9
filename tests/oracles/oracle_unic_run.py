"""Rank program: replays UNIC's stored training runs in the engine under ZeRO-3.

python tests/oracles/oracle_unic_run.py FOLDER, with spec.json and tensors.safetensors in it; writes
found.safetensors and each rank's losses by the probability with which teachers are dropped.
"""

from __future__ import annotations

import json
import re
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import deepspeed
import torch
from launch import write_result
from safetensors.torch import load_file, save_file
from torch import Tensor
from whole_weights import whole_weights

from fd_large.backbones.feature_map import FeatureMap
from fd_large.backbones.statistics import Statistics
from fd_large.backbones.vit.vit import ViT
from fd_large.data.loader import Batch
from fd_large.engine.forward_backward import forward_backward
from fd_large.engine.zero import config as ds
from fd_large.engine.zero import start
from fd_large.engine.zero.engine import build_engine
from fd_large.engine.zero.optimizer import set_learning_rate
from fd_large.ranks import distributed
from fd_large.recipes import registry
from fd_large.tasks.distillation.heads.map_head import HeardBlocks, MapShapes
from fd_large.tasks.distillation.heads.map_heads import Ladder
from fd_large.tasks.distillation.heads.registry import HEADS
from fd_large.tasks.distillation.job import KNOWN
from fd_large.tasks.distillation.objective import make_target
from fd_large.tasks.distillation.section import Weighting
from fd_large.tasks.distillation.several.weighting import Weighted
from fd_large.tasks.distillation.task import Distillation, Whole


def our_name(name: str) -> str:
    """Our name of a parameter of UNIC's encoder and ladder."""
    if found := re.fullmatch(r"lp\.heads\.(\w+)\.(\w+)\.(\d+)\.layers\.(.*)", name):
        teacher, kind, block, rest = found.groups()
        return f"heads.{teacher}.map.{kind}.{block}.{rest}"
    return re.sub(r"^encoder\.(?:blocks\.\d+\.)?(?=\d)", "student.blocks.", name).replace(
        "encoder.", "student."
    )


class Unic(Distillation):
    """With UNIC's groups: CLS token and positions are decayed."""

    def no_weight_decay(self) -> tuple[frozenset[str], tuple[str, ...]]:
        """Returns no names."""
        return frozenset(), ()


def main(folder: Path) -> None:
    distributed.start()
    start.start()
    spec = json.loads((folder / "spec.json").read_text())
    tensors = load_file(folder / "tensors.safetensors")
    found: dict[str, Tensor] = {}
    losses = {
        f"drop{round(100 * probability)}": run(spec, tensors, probability, found)
        for probability in spec["config"]["drop_probs"]
    }
    if distributed.is_main():
        save_file({n: t.contiguous() for n, t in found.items()}, folder / "found.safetensors")
    distributed.barrier()
    write_result(folder, losses)


def run(
    spec: dict, tensors: dict[str, Tensor], probability: float, found: dict[str, Tensor]
) -> list[float]:
    """Trains once; returns the losses, and adds what else is compared to `found`."""
    config = spec["config"]
    world, rank = distributed.world_size(), distributed.rank()
    share = config["batch"] // world
    mine = torch.arange(rank * share, (rank + 1) * share)
    widths = {name: width for name, (width, _) in config["teachers (width, heads)"].items()}
    sizes, now = config["student"], {"batch": 0}
    side = sizes["image"] // sizes["patch"]

    sizes_of_ladder = config["projector"]
    HEADS["ladder_of_the_file"] = partial(
        Ladder, hidden=sizes_of_ladder["hidden"], last_hidden=sizes_of_ladder["last_hidden"]
    )

    def taught(name: str) -> FeatureMap:
        raw = [tensors[f"teacher_raw.{name}.{kind}.{now['batch']}"] for kind in ("cls", "patch")]
        return FeatureMap(torch.cat([raw[0][:, None], raw[1]], 1)[mine], (side, side), 1)

    def make_task() -> Unic:
        student = ViT(
            sizes["width"],
            sizes["depth"],
            sizes["heads"],
            patch_size=sizes["patch"],
            image_size=sizes["image"],
            qkv_bias="fused",
            absolute_position=True,
            relative_position="none",
            layer_scale=0.0,
            norm_eps=sizes["layer_norm_eps"],
        )
        grid = (side, side)
        targets = [
            make_target(
                student.width,
                width,
                teacher=name,
                loss="cls_and_patches",
                beta=1.0,
                normaliser="running",
                known=KNOWN,
                head="ladder_of_the_file",
                maps=lambda: MapShapes(grid, grid, 1, sizes["depth"]),
            )
            for name, width in widths.items()
        ]
        return Unic(
            student,
            {name: lambda _images, name=name: taught(name) for name in widths},
            targets,
            # The images are normalised already.
            statistics=Statistics((0.0,) * 3, (1 / 255,) * 3),
            sight=HeardBlocks(Whole()),
            join=Weighted(Weighting(rule="drop", drop_probability=probability), targets),
        )

    adamw = config["adamw"]
    recipe = registry.get("fd_clip_vit_base")
    optim = replace(
        recipe.optim,
        weight_decay=adamw["weight_decay"],
        betas=tuple(adamw["betas"]),
        eps=adamw["eps"],
        clip_norm=0.0,
    )
    zero = {"stage": 3, "stage3_param_persistence_threshold": 0, "reduce_bucket_size": 1_000_000}
    filled = ds.fill(
        {"zero_optimization": zero}, ds.RunNumbers(share, 1, world, world, 0.0, False, (1,))
    )
    weights = {
        our_name(name.removeprefix("weights.")): tensor
        for name, tensor in tensors.items()
        if name.startswith("weights.") and "mask_token" not in name
    }
    for name, width in widths.items():
        weights[f"running.{name}.mean"] = torch.zeros(2, width)
        weights[f"running.{name}.deviation"] = torch.ones(2, width)
    engine = build_engine(
        make_task, filled, optim=optim, seed=recipe.runtime.seed, initial={"": weights.items()}
    )
    task, case, losses = engine.task, f"drop{round(100 * probability)}", []
    task.train()
    steps = config["steps"]
    for step in range(steps):
        now["batch"] = step % config["batches cycled"]
        set_learning_rate(engine.deepspeed.optimizer, spec["lrs"][step])
        task.before_step(step / steps)
        batch = Batch(tensors["images"][now["batch"]][mine], 0, mine, mine)
        loss = forward_backward(engine, batch, 0)
        if step == 0:
            for name, parameter in task.named_parameters():
                gradient = deepspeed.utils.safe_get_full_grad(parameter)
                found[f"{case}.gradient.{name}"] = gradient.clone()
        engine.deepspeed.step()
        task.after_step()
        losses.append((distributed.sum_tensor(loss) / world).item())
    found |= {f"{case}.final.{name}": value for name, value in whole_weights(task)}
    for target in task.targets:
        for name, ours in (("mean", "mean"), ("std", "deviation")):
            for kind, statistics in zip(
                ("cls", "patch"), getattr(target.normalise, ours), strict=True
            ):
                found[f"{case}.final_statistics.{target.teacher}.{kind}.{name}"] = (
                    statistics.clone()
                )
    return losses


if __name__ == "__main__":
    main(Path(sys.argv[1]))
