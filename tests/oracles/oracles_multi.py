"""Checks of oracle files of several teachers: what one teacher's objective has of them."""

from __future__ import annotations

import hashlib
import re

import torch
from oracles_dense import Errors
from oracles_models import Row, Tensors
from torch import Tensor, nn

from fd_large.backbones.feature_map import FeatureMap
from fd_large.tasks.distillation.alignment import align
from fd_large.tasks.distillation.job import KNOWN, RUNNING
from fd_large.tasks.distillation.losses import ClsAndPatches
from fd_large.tasks.distillation.normalisers import Affine
from fd_large.tasks.distillation.several.running_statistics import (
    Moments,
    RunningStatistics,
    moments_of,
    momentum_at,
    sums_of,
)
from fd_large.tasks.distillation.several.similarity import (
    pushed,
    queue_divergence,
    relation_divergence,
)
from fd_large.tasks.distillation.several.weighting import (
    coins,
    kept_beside_worst,
    kept_of_own_data,
    weighted_loss,
)
from fd_large.tasks.distillation.target_statistics import (
    hadamard,
    moments,
    orthogonal,
    phi_s_matrix,
)

NOT_YET_PARTS = {
    "featsharp_phi_standardize": "the way back, and rotation or scale alone",
    "radio_intermediate_normaliser": "tokens that pass unchanged; the scale is apart",
}
_TERMS_OF_THEIA = {"mse": "mse", "cos": "cosine_of_map", "l1": "smooth_l1"}
_TERMS_OF_SAK = {
    "cos_l1": "0.9 cosine_of_map + 0.1 smooth_l1",
    "cos": "cosine_of_map",
    "l2": "mse",
}


def _maps(tensors: Tensors, whose: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors "input.WHOSE.NAME" by NAME; the student's take a gradient."""
    prefix, make = f"input.{whose}.", nn.Parameter if whose == "student" else Tensor
    return {
        name.removeprefix(prefix): make(tensor.to(dtype))
        for name, tensor in tensors.items()
        if name.startswith(prefix)
    }


def check_theia_loss(spec: dict, tensors: Tensors, dtype: torch.dtype) -> list[Row]:
    """Each term of each teacher, and the gradients of the weighted sum."""
    errors, config = Errors(spec, tensors), spec["config"]
    students, teachers = (_maps(tensors, whose, dtype) for whose in ("student", "teacher"))
    share = 1 / len(teachers)
    for case, terms in spec["terms"].items():
        weight = share if case == "even" else config["target_loss_weights"]
        total = f"{0.9 * share} cosine_of_map + {0.1 * weight} smooth_l1"
        for name, student in students.items():
            for term, loss in _TERMS_OF_THEIA.items():
                got = KNOWN.loss(loss, beta=1.0)(student, teachers[name])
                expected = torch.tensor(terms[f"{term}_losses_per_model"][name])
                errors.add(f"{case}.{term}.{name}", got, expected)
            (slope,) = torch.autograd.grad(
                KNOWN.loss(total, beta=1.0)(student, teachers[name]), student
            )
            errors.gradient(f"grad.{case}.{name}", slope, tensors[f"grad.{case}.{name}"])
    return errors.rows


def check_sak_loss(spec: dict, tensors: Tensors, dtype: torch.dtype) -> list[Row]:
    """Each level of each teacher, their sum, and its gradients."""
    errors = Errors(spec, tensors)
    students, teachers = (_maps(tensors, whose, dtype) for whose in ("student", "teacher"))

    def tokens(map_: Tensor) -> FeatureMap:
        return FeatureMap(_tokens(map_), tuple(map_.shape[-2:]), 0)

    for case, name in _TERMS_OF_SAK.items():
        loss, losses = KNOWN.loss(name, beta=1.0), {}
        for level, student in students.items():
            maps = tokens(student), tokens(teachers[level])
            pair = [map_.tokens for map_ in align(*maps, interpolation="bilinear_larger")]
            teacher, _, number = level.rpartition(".")
            term = f"{teacher}_level{int(number) + 1}"
            losses[level] = loss(*pair)
            errors.add(f"{case}.{term}", losses[level], torch.tensor(spec["terms"][case][term]))
        total = torch.stack(list(losses.values())).sum()
        errors.out(f"out.{case}", total)
        slopes = torch.autograd.grad(total, list(students.values()))
        for level, slope in zip(students, slopes, strict=True):
            label = f"grad.{case}.{level}"
            errors.gradient(label, slope, tensors[label])
    return errors.rows


def _kept(case: str, table: Tensor, published: Tensor, config: dict) -> Tensor:
    """Which teachers each image learns from by our rules, (T, B).

    Args:
        case: "drop50", "none", "lowest_loss_0.5", "own_data" ...
        table: (T, B) losses.
        published: (T, B) bool, those of the file. What chance, or DUNE's list of datasets, decides
            is taken from it.
        config: The configuration in the file.
    """
    count, images = table.shape
    if "data" in case:
        names = config["data_set_of_each_image"]
        order = sorted(set(names))
        teaches = published[:, [names.index(name) for name in order]]
        return kept_of_own_data(torch.tensor([order.index(name) for name in names]), teaches)
    number = float(re.search(r"[\d.]*$", case)[0] or 0)
    probability = number / 100 if case.startswith("drop") else number
    if probability in (0.0, 1.0):
        tossed = coins(0, 0, range(images), teachers=count, drop_probability=probability)
    else:
        worst = table.argmax(0).tolist()
        others = [[t for t in range(count) if t != w] for w in worst]
        tossed = torch.stack([published[own, i] for i, own in enumerate(others)], 1)
    return kept_beside_worst(table, tossed)


def check_unic_loss(spec: dict, tensors: Tensors, dtype: torch.dtype) -> list[Row]:
    """The losses of each image, the weights of its teachers, and the gradients."""
    errors, config = Errors(spec, tensors), spec["config"]
    students, teachers = (_maps(tensors, whose, dtype) for whose in ("student", "teacher"))
    loss = ClsAndPatches(
        config.get("smooth_l1_beta", 1.0), cosine=config["lam_cos"], smooth_l1=config["lam_sl1"]
    )
    per_image = {}
    for teacher in config["teachers"]:
        kinds = [kind for kind in ("cls", "patch") if f"{teacher}.{kind}" in teachers]
        loss.num_prefix_tokens = int("cls" in kinds)
        both = []
        for maps in (students, teachers):
            parts = [maps[f"{teacher}.{kind}"] for kind in kinds]
            both.append(
                torch.cat([part.reshape(len(part), -1, part.shape[-1]) for part in parts], 1)
            )
        per_image[teacher] = loss.per_image(*both)
        errors.out(f"out.per_image.{teacher}", per_image[teacher])
    table = torch.stack([per_image[teacher] for teacher in sorted(per_image)])
    for label in [name for name in tensors if name.endswith(".coefficients")]:
        case = label.removeprefix("out.").removesuffix(".coefficients")
        kept = _kept(case, table, tensors[label] > 0, config)
        total = weighted_loss(table, kept, kept.sum(), parts=1)
        errors.out(f"out.{case}.loss", total)
        (weights,) = torch.autograd.grad(total, table, retain_graph=True)
        errors.out(label, weights)
        used = {n: students[n] for n in students if f"grad.{case}.student.{n}" in tensors}
        slopes = torch.autograd.grad(total, list(used.values()), retain_graph=True)
        for part, slope in zip(used, slopes, strict=True):
            expected = tensors[f"grad.{case}.student.{part}"]
            errors.gradient(f"grad.{case}.student.{part}", slope, expected)
    return errors.rows


def _tokens(map_: Tensor) -> Tensor:
    """(B, N, C) of a map (B, C, H, W)."""
    return map_.flatten(2).transpose(1, 2)


def _running(spec: dict, width: int, dtype: torch.dtype) -> RunningStatistics:
    name = "batch" if spec["kind"].startswith("dune") else "running"
    return RUNNING[name](width).to(dtype)


def _in_step(module: RunningStatistics, tokens: Tensor, step: Moments) -> Tensor:
    """Tokens normalised in training, by the statistics of their step where that is asked for."""
    module.moments = step if module.of_step else None
    normalised = module.train()(tokens)
    module.eval()
    return normalised


def check_unic_standardise(spec: dict, tensors: Tensors, dtype: torch.dtype) -> list[Row]:
    """Tokens of each step, and the statistics after it; then by statistics that stay."""
    errors, config = Errors(spec, tensors), spec["config"]
    is_dune = spec["kind"] == "dune_teacher_norm"
    for number, momentum in enumerate(config["momentum"]):
        if "steps" in config:
            ours = momentum_at(number / config["steps"])
            errors.rows.append(Row(f"momentum.{number}", abs(ours - momentum), 1e-12))
    for kind in ("cls", "patch"):
        module = _running(spec, config["dim"], dtype)
        inputs = [tensors[f"input.{kind}.{k}"].to(dtype) for k in range(len(config["momentum"]))]
        steps = [tokens.view(len(tokens), -1, config["dim"]) for tokens in inputs]

        def compare(case: str, got: Tensor, kind: str = kind, steps: list = steps) -> None:
            # Where a channel's deviation is near the rounding of its mean, tokens are uncertain.
            sure = _sure(steps[0])
            errors.add(case, got[..., sure], tensors[case].view_as(got)[..., sure])

        for number, (tokens, momentum) in enumerate(zip(steps, config["momentum"], strict=True)):
            step = moments_of(sums_of(tokens))
            got = _in_step(module, tokens, step)
            compare(f"out.{kind}.{number}", got)
            module.move(step, momentum)
            errors.out(f"out.{kind}.mean.{number}", module.mean[1])
            errors.out(f"out.{kind}.std.{number}", module.deviation[1])
        compare(f"out.{kind}.eval", module(steps[0]))
        if is_dune:
            compare(f"out.{kind}.zero_momentum", module(steps[1]))
        else:
            # UNIC adds its epsilon once where it has no running statistics.
            step = moments_of(sums_of(steps[0]))
            scale = (step.variance[1].sqrt() + spec["config"]["eps"]).reciprocal()
            got = Affine(step.mean[1].to(dtype), scale.to(dtype))(steps[0])
            compare(f"out.{kind}.batch_statistics", got)
    return errors.rows


def _sure(tokens: Tensor) -> Tensor:
    """The channels of which the mean's rounding in float32 is far below the deviation."""
    step = moments_of(sums_of(tokens))
    sure = step.mean[1].abs() * 2**-24 < 1e-7 * step.variance[1].sqrt()
    assert sure.sum() > 1
    return sure


def check_statistics_of_ranks(spec: dict, tensors: Tensors, dtype: torch.dtype) -> list[Row]:
    """Tokens of each rank by statistics whose sums are added up."""
    errors, config = Errors(spec, tensors), spec["config"]
    module = _running(spec, config["dim"], dtype)
    for number, momentum in enumerate(config["momentum"]):
        ranks = [tensors[f"input.rank{r}.{number}"].to(dtype) for r in range(config["ranks"])]
        step = moments_of(torch.stack([sums_of(tokens) for tokens in ranks]).sum(0))
        for rank, tokens in enumerate(ranks):
            got = _in_step(module, tokens, step)
            errors.out(f"out.rank{rank}.{number}", got)
        module.move(step, momentum)
        errors.out(f"out.mean.{number}", module.mean[1])
        errors.out(f"out.std.{number}", module.deviation[1])
    return errors.rows


def check_radio_hadamard(spec: dict, tensors: Tensors, dtype: torch.dtype) -> list[Row]:
    """Signs of small matrices, and hashes of those of real widths."""
    rows = []
    for size, facts in spec["sizes"].items():
        signs = hadamard(int(size))
        if facts["construction"] != "exact":
            rows.append(Row(f"{size}: no matrix", float(signs is not None), 0.0))
            continue
        assert signs is not None, size
        digest = hashlib.sha256(signs.astype("int8").tobytes()).hexdigest()
        same = digest == facts["sha256_of_int8_signs_row_major"]
        rows.append(Row(f"{size}: hash", float(not same), 0.0))
        if (label := f"out.sign.{size}") in tensors:
            wrong = (torch.from_numpy(signs) != tensors[label]).sum().item()
            rows.append(Row(label, float(wrong), 0.0))
    return rows


def check_radio_phi_s(spec: dict, tensors: Tensors, dtype: torch.dtype) -> list[Row]:
    """What the signs of eigenvectors leave alone; and tokens by the file's own matrix."""
    errors, samples = Errors(spec, tensors), tensors["input.samples"].to(dtype)
    # In float64 as ever, in micro batches.
    parts = [(part[None], 1) for part in samples.split(7)]
    mean, covariance = moments(parts, lambda sums: sums)
    errors.out("out.mean", mean)
    matrix, size = phi_s_matrix(covariance), len(mean)
    eigenvalue = spec["inverse_alpha_squared (mean eigenvalue)"]
    one = torch.eye(size, dtype=torch.float64)
    errors.add("W W^T", matrix @ matrix.T * eigenvalue, one)
    if hadamard(size) is not None:
        variances = (matrix @ covariance @ matrix.T).diagonal()
        errors.add("variances", variances, torch.ones_like(variances))
    rotations = [
        orthogonal(size).T @ w.double() * eigenvalue**0.5 for w in (matrix, tensors["out.matrix"])
    ]
    ours, theirs = (
        rows * rows.gather(1, rows.abs().argmax(1)[:, None]).sign() for rows in rotations
    )
    # Directions of neighbouring eigenvalues are less certain than the rest.
    errors.gradient("eigenvectors", ours, theirs)
    published = Affine(tensors["out.mean"].to(dtype), tensors["out.matrix"].to(dtype))
    errors.out("out.normalised", published(samples))
    errors.out("out.tokens", published(tensors["input.tokens"].to(dtype)))
    map_ = published(_tokens(tensors["input.map"].to(dtype)))
    errors.add("out.map", map_, _tokens(tensors["out.map"]))
    return errors.rows


def check_featsharp(spec: dict, tensors: Tensors, dtype: torch.dtype) -> list[Row]:
    """Mean and scale of samples, and the map by the file's own rotation."""
    errors = Errors(spec, tensors)
    mean, covariance = moments([(tensors["input.samples"][None], 1)], lambda sums: sums)
    errors.out("buffers.mean", mean)
    scale = phi_s_matrix(covariance).square().sum(1).mean().sqrt()
    errors.out("buffers.alpha", scale)
    mean, scale, rotation = (
        tensors[f"buffers.{name}"].to(dtype) for name in ("mean", "alpha", "rotation")
    )
    got = Affine(mean, scale * rotation)(_tokens(tensors["input.map"].to(dtype)))
    errors.add("out.phi_s", got, _tokens(tensors["out.phi_s"]))
    return errors.rows


def check_radio_intermediate(spec: dict, tensors: Tensors, dtype: torch.dtype) -> list[Row]:
    """Tokens and maps of each layer, which share a rotation or not."""
    errors = Errors(spec, tensors)
    for layer in range(spec["config"]["layers"]):
        mean, rotation = (tensors[f"buffers.{name}"].to(dtype) for name in ("means", "rotation"))
        each = rotation[layer] if spec["config"]["rotation_per_layer"] else rotation
        normalise = Affine(mean[layer], each)
        errors.out(f"out.tokens.{layer}", normalise(tensors["input.tokens"].to(dtype)))
        got = normalise(_tokens(tensors["input.map"].to(dtype)))
        errors.add(f"out.map.{layer}", got, _tokens(tensors[f"out.map.{layer}"]))
    return errors.rows


def check_lightly_queue(spec: dict, tensors: Tensors, dtype: torch.dtype) -> list[Row]:
    """The queue after each batch, exactly."""
    rows, config = [], spec["config"]
    queue = torch.zeros(config["queue"], config["dim"])
    for number in range(len(config["batches"])):
        queue = pushed(queue, tensors[f"input.{number}"])
        label = f"out.queue.{number}"
        rows.append(Row(label, float(not torch.equal(queue, tensors[label])), 0.0))
    return rows


def check_lightly_loss(spec: dict, tensors: Tensors, dtype: torch.dtype) -> list[Row]:
    """The divergence against a queue, of version 1, and between tokens, of version 3 alone."""
    errors = Errors(spec, tensors)
    queue = tensors["input.queue"].to(dtype)
    students, teachers = (_maps(tensors, whose, dtype) for whose in ("student", "teacher"))
    if spec["kind"] == "lightly_v1_loss":
        student = nn.Parameter(tensors["input.student"].to(dtype))
        loss = queue_divergence(student, tensors["input.teacher"].to(dtype), queue).mean()
        errors.out("out.loss", loss)
        (slope,) = torch.autograd.grad(loss, student)
        errors.gradient("grad.student", slope, tensors["grad.student"])
        return errors.rows
    summary = queue_divergence(students["global"], teachers["global"], queue).mean()
    local = relation_divergence(students["local"], teachers["local"]).mean()
    errors.out("out.global_loss", summary)
    errors.out("out.local_loss", local)
    slopes = torch.autograd.grad(summary + local, list(students.values()))
    for name, slope in zip(students, slopes, strict=True):
        errors.gradient(f"grad.student.{name}", slope, tensors[f"grad.student.{name}"])
    return errors.rows


CHECKS = {
    "lightly_queue": check_lightly_queue,
    "lightly_v1_loss": check_lightly_loss,
    "lightly_v3_loss": check_lightly_loss,
    "dune_statistics_two_ranks": check_statistics_of_ranks,
    "dune_teacher_norm": check_unic_standardise,
    "featsharp_phi_standardize": check_featsharp,
    "radio_hadamard": check_radio_hadamard,
    "radio_intermediate_normaliser": check_radio_intermediate,
    "radio_phi_s": check_radio_phi_s,
    "unic_standardise": check_unic_standardise,
    "unic_statistics_two_ranks": check_statistics_of_ranks,
    "dune_loss": check_unic_loss,
    "sak_loss": check_sak_loss,
    "theia_loss": check_theia_loss,
    "unic_loss": check_unic_loss,
}
