"""Checks of oracle files that hold rates, optimiser groups and whole training runs.

A training run is replayed by the engine itself under ZeRO-3, on one rank and on two with half a
batch each; `oracle_training_run.py` is what the ranks run.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Iterator
from pathlib import Path

import launch
import torch
from oracle_unic_run import our_name as unic_name
from oracles_models import Row, Skipped, Tensors
from safetensors.torch import load_file, save_file
from translated_names import translate

from fd_large.backbones.registry import build
from fd_large.backbones.statistics import IMAGENET
from fd_large.backbones.translation import our_name
from fd_large.engine.schedule import CosineSchedule
from fd_large.engine.zero.optimizer import decays
from fd_large.recipes.architectures import Architecture
from fd_large.tasks.classification.task import FineTuning
from fd_large.tasks.distillation.objective import make_target
from fd_large.tasks.distillation.task import Distillation
from fd_large.weights.published import FORMATS

PROGRAM = Path(__file__).parent / "oracle_training_run.py"
UNIC_PROGRAM = Path(__file__).parent / "oracle_unic_run.py"
# Numbers of ranks of a training run; two may be twice as far off as one (another order of sums).
RANKS = (1, 2)
SCHEDULE_TOLERANCE = 1e-12


def relative(got: float, expected: float) -> float:
    return abs(got - expected) / (abs(expected) or 1.0)


def official_accumulated_rate(
    schedule: CosineSchedule, step: int, *, accumulation: int, micro_batches_per_epoch: int
) -> float:
    """The official code's learning rate under accumulation.

    There T, W and the index count micro batches, so that the learning rate depends on how a batch
    is split. Micro batches that are left at the end of an epoch are dropped, but counted.
    """
    if step == 0:
        return schedule.value(0)
    epoch, of_epoch = divmod(step - 1, micro_batches_per_epoch // accumulation)
    return schedule.value(epoch * micro_batches_per_epoch + accumulation * (of_epoch + 1) - 1)


def check_schedule(spec: dict, tensors: Tensors, dtype: torch.dtype) -> list[Row]:
    rows = []
    for number, combo in enumerate(spec["combos"]):
        schedule = CosineSchedule(
            combo["base_lr"],
            combo["warmup_lr"],
            combo["min_lr"],
            combo["total"],
            combo["warmup_steps"],
        )
        accumulation = combo["accumulation"]
        used = [
            schedule.at_step(u)
            if accumulation == 1
            else official_accumulated_rate(
                schedule,
                u,
                accumulation=accumulation,
                micro_batches_per_epoch=combo["steps_per_epoch"],
            )
            for u in range(len(combo["lr_used"]))
        ]
        values = [schedule.value(t) for t in range(len(combo["schedule_value"]))]
        for label, got, expected in (
            ("lr_used", used, combo["lr_used"]),
            ("schedule_value", values, combo["schedule_value"]),
        ):
            worst = max(relative(a, b) for a, b in zip(got, expected, strict=True))
            rows.append(Row(f"{label} {number}", worst, SCHEDULE_TOLERANCE))
    if "layer_decay" in spec:
        rows.append(layer_decay_row(spec["layer_decay"]))
    return rows


def layer_decay_row(spec: dict) -> Row:
    """The rate of every layer at every step; the ends of the schedule are not scaled."""
    schedule = CosineSchedule(
        spec["base_lr"], spec["warmup_lr"], spec["min_lr"], spec["total"], spec["warmup_steps"]
    )
    worst = max(
        relative(schedule.scaled_at(update, scale), expected)
        for update, published in enumerate(spec["lr_used_per_group"])
        for scale, expected in zip(spec["lr_scales"], published, strict=True)
    )
    return Row("layer decay", worst, SCHEDULE_TOLERANCE)


def check_optim_groups(spec: dict, tensors: Tensors, dtype: torch.dtype) -> list[Row]:
    """Pre-training and fine-tuning."""
    return [*pretraining_rows(spec["fd_pretrain"]), *finetuning_rows(spec["finetune"])]


def finetuning_rows(published: dict) -> list[Row]:
    """Layer, group and rate of every parameter; one that differs is one error."""
    nets = {
        "vit_base": ("vit_base_patch16", Architecture(relative_position="block"), "fd_vit"),
        "swin_base": ("swinv2_base", Architecture(), "fd_swinv2"),
    }
    rows = []
    for key, spec in published.items():
        if key not in nets:
            rows.append(Row(f"fine-tuned {key}: no such model here", math.inf, 0.0))
            continue
        name, overrides, form = nets[key]
        with torch.device("meta"):
            task = FineTuning(build(name, overrides), 1000, statistics=IMAGENET)
        exempt, ours = task.no_weight_decay(), dict(task.named_parameters())
        # A head and a norm of the mean are no tensors of a backbone's file.
        own = {name: name for name in spec["parameters"] if name.startswith(("head.", "fc_norm."))}
        rest = {name for name in spec["parameters"] if name not in own}
        inside = {n: our_name(n, FORMATS[form].format.rows)[0] for n in rest}
        names = own | {theirs: f"student.{mine}" for theirs, mine in inside.items()}
        wrong = len(set(names.values()) ^ ours.keys())
        for theirs, (layer, group) in spec["parameters"].items():
            mine = names[theirs]
            decay = decays(mine, ours[mine].ndim, *exempt) if mine in ours else None
            wrong += decay != (group == "decay")
            for rate, scales in spec["lr_scale_by_layer_id"].items():
                wrong += task.layer_scale(mine, float(rate)) != scales[layer]
        rows.append(Row(f"fine-tuned {key}: {len(names)} names", float(wrong), 0.0))
        elements = sum(parameter.numel() for parameter in ours.values())
        missing = abs(elements - spec["trainable_parameters"])
        rows.append(Row(f"fine-tuned {key} elements", float(missing), 0.0))
    return rows


def pretraining_rows(spec: dict) -> list[Row]:
    """Every official name, sent through our table, in the same group."""
    nets = {
        "vit_base": ("vit_base_patch16", "fd_vit", 768),
        "swin_base": ("swinv2_base", "fd_swinv2", 1024),
    }
    rows = []
    for key, published in spec.items():
        if key not in nets:
            rows.append(Row(f"{key}: no such model here", math.inf, 0.0))
            continue
        name, form, width = nets[key]
        with torch.device("meta"):
            student = build(name)
            teachers = {"": lambda images: None}
            task = Distillation(student, teachers, [make_target(student.width, width)])
        groups = {True: set(), False: set()}
        for parameter_name, parameter in task.named_parameters():
            decay = decays(parameter_name, parameter.ndim, *task.no_weight_decay())
            groups[decay].add(parameter_name)
        for decay, label in ((True, "decay"), (False, "no_decay")):
            # A tensor of the projection's rank: the format squeezes it.
            theirs = translate(form, ((n, torch.empty(1, 1, 1)) for n in published[label]))
            names = {n if n.startswith("projection.") else f"student.{n}" for n, _ in theirs}
            wrong = len(names ^ groups[decay]) + abs(len(names) - len(published[label]))
            rows.append(Row(f"{key} {label}: {len(names)} names", float(wrong), 0.0))
        elements = sum(p.numel() for p in task.parameters())
        wrong = abs(elements - published["trainable_parameters"])
        rows.append(Row(f"{key} elements", float(wrong), 0.0))
    return rows


def check_training_run(spec: dict, tensors: Tensors, dtype: torch.dtype) -> list[Row] | Skipped:
    if dtype != torch.float32:
        return Skipped("left out", "the engine trains in float32 or bfloat16")
    allowed = spec["suggested_tolerance"]
    rows: list[Row] = []
    for ranks, result, found in _on_ranks(PROGRAM, spec, tensors):
        rows += _training_rows(spec, tensors, allowed, result, found, ranks)
    return rows


def _on_ranks(program: Path, spec: dict, tensors: Tensors) -> Iterator[tuple[int, dict, Tensors]]:
    """Yields numbers of ranks, what rank 0 of a program wrote with so many, and its tensors."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        (folder / "spec.json").write_text(json.dumps(spec))
        save_file(tensors, folder / "tensors.safetensors")
        for ranks in RANKS:
            launch.run_ranks(program, folder, ranks=ranks, timeout=180, results=folder)
            result = launch.read_results(folder, ranks)[0]
            yield ranks, result, load_file(folder / "found.safetensors")
            for rank in range(ranks):
                (folder / f"rank_{rank}.json").unlink()


def _training_rows(
    spec: dict, tensors: Tensors, allowed: dict, result: dict, found: Tensors, ranks: int
) -> list[Row]:
    by = f"{ranks} rank{'s' if ranks > 1 else ''}: "
    rows = []

    def add(label: str, error: float, tolerance: float) -> None:
        rows.append(Row(by + label, error, tolerance * ranks))

    for label, key, expected in (
        ("losses", "loss_rel", tensors["losses"]),
        ("grad_norms", "grad_norm_rel", tensors["grad_norms"]),
        ("rates", "lr_rel", torch.tensor(spec["steps"]["lr"], dtype=torch.float64)),
    ):
        got = torch.tensor(result[label], dtype=torch.float64)
        add(label, ((got - expected).abs() / expected.abs()).max().item(), allowed[key])
    for label, key in (
        ("student_map", "first_outputs_max_rel"),
        ("target", "first_outputs_max_rel"),
    ):
        expected = tensors[f"first.{label}"]
        add(
            f"first.{label}",
            ((found[f"first.{label}"] - expected).abs().max() / expected.abs().max()).item(),
            allowed[key],
        )
    gradients = {n: found[f"gradient.{n}"] for n in _ours(spec, tensors, "first_step_grad.")}
    difference = expected_square = 0.0
    for name, expected in _ours(spec, tensors, "first_step_grad.").items():
        error = (gradients[name].double() - expected.double()).norm().item()
        size = expected.double().norm().item()
        difference, expected_square = difference + error**2, expected_square + size**2
        add(f"gradient {name}", error / size, allowed["first_step_grad_rel_l2_each"])
    add(
        "gradient, all",
        math.sqrt(difference / expected_square),
        allowed["first_step_grad_rel_l2_global"],
    )
    for name, expected in _ours(spec, tensors, "final.").items():
        add(
            f"final {name}",
            (found[f"final.{name}"] - expected).abs().max().item(),
            allowed["final_abs"],
        )
    return rows


def check_unic_run(spec: dict, tensors: Tensors, dtype: torch.dtype) -> list[Row] | Skipped:
    """UNIC's objective for some steps, with its running statistics, on one rank and on two."""
    if dtype != torch.float32:
        return Skipped("left out", "the engine trains in float32 or bfloat16")
    rows: list[Row] = []
    for ranks, losses, found in _on_ranks(UNIC_PROGRAM, spec, tensors):
        for case, got in losses.items():
            rows += _unic_rows(spec, tensors, case, torch.tensor(got), found, ranks)
    return rows


def _unic_rows(
    spec: dict, tensors: Tensors, case: str, losses: torch.Tensor, found: Tensors, ranks: int
) -> list[Row]:
    by = f"{ranks} rank{'s' if ranks > 1 else ''}, {case}: "
    expected = tensors[f"{case}.losses"]
    worst = ((losses - expected).abs() / expected.abs()).max().item()
    rows = [Row(f"{by}losses", worst, spec["suggested_tolerance_max_rel"])]
    difference = square = finals = 0.0
    for label, theirs in tensors.items():
        kind, _, name = label.removeprefix(f"{case}.").partition(".")
        if not label.startswith(f"{case}.") or "mask_token" in name:
            continue
        if kind == "first_step_grad":
            ours = found[f"{case}.gradient.{unic_name(name)}"]
            difference += (ours - theirs).double().square().sum().item()
            square += theirs.double().square().sum().item()
        elif kind == "final":
            ours = found[f"{case}.final.{unic_name(name)}"]
            error = (ours - theirs).abs()
            if name.endswith("qkv.bias"):  # Adam blows up the rounding of a key's gradient.
                size = len(error) // 3
                error = torch.cat([error[:size], error[2 * size :]])
            finals = max(finals, error.max().item())
        elif kind == "final_statistics":
            ours = found[label]
            error = ((ours - theirs).abs().max() / theirs.abs().max()).item()
            rows.append(Row(f"{by}{name}", error, spec["suggested_tolerance_max_rel"]))
    rows.append(Row(f"{by}gradient, all", math.sqrt(difference / square), 2e-5))
    rows.append(Row(f"{by}finals", finals, 8 * spec[f"{case}.final_abs_without_key_bias"]))
    return rows


def _ours(spec: dict, tensors: Tensors, prefix: str) -> Tensors:
    """The stored tensors under a prefix, by the names of our task."""
    stored = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
    form = "fd_swinv2" if "depths" in spec["config"]["student"] else "fd_vit"
    return {
        n if n.startswith("projection.") else f"student.{n}": t
        for n, t in translate(form, stored.items())
    }


CHECKS = {
    "unic_training_run": check_unic_run,
    "schedule": check_schedule,
    "fd_optim_groups": check_optim_groups,
    "fd_training_run": check_training_run,
}
