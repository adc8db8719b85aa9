"""Checks of oracle files of several teachers: what one teacher's objective has of them."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable

import torch
from oracles_dense import Errors
from oracles_models import Row, Skipped, Tensors
from torch import Tensor, nn

from fd_large.backbones.feature_map import FeatureMap
from fd_large.tasks.distillation.alignment import align
from fd_large.tasks.distillation.heads import MLP, attention_mlp, block, mlp_relu
from fd_large.tasks.distillation.losses import make_loss
from fd_large.tasks.distillation.normalisers import Affine, standardise
from fd_large.tasks.distillation.rotations import hadamard, orthogonal, phi_s_matrix
from fd_large.tasks.distillation.target_statistics import TargetStatistics, moments

_TEACHERS = "the engine has one teacher"
_STATISTICS = "running statistics of the targets"
_RELATION = "losses against a queue or between tokens of an image"

# Kinds that nothing in the package stands behind, and why.
NOT_YET = {
    "dinov3_exchange": "students in groups of ranks",
    "dune_statistics_two_ranks": _STATISTICS,
    "lightly_mixup": "mixup of images without labels",
    "lightly_queue": _RELATION,
    "lightly_v1_loss": _RELATION,
    "lightly_v2": "the student's map is never resized",
    "lightly_v3_loss": _RELATION,
    "lightly_v3_student": _RELATION,
    "theia_translator": "heads that change the grid",
    "unic_projector": "heads on the maps of all blocks",
    "unic_statistics_two_ranks": _STATISTICS,
    "unic_training_run": _TEACHERS,
}
NOT_YET_PARTS = {
    "dune_teacher_norm": f"training: {_STATISTICS}",
    "featsharp_phi_standardize": "the way back, and rotation or scale alone",
    "radio_intermediate_normaliser": "tokens that pass unchanged; the scale is apart",
    "unic_standardise": f"training: {_STATISTICS}",
    "dune_loss": f"selection of teachers: {_TEACHERS}",
    "unic_loss": f"dropping of teachers: {_TEACHERS}",
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
                got = make_loss(loss, beta=1.0)(student, teachers[name])
                expected = torch.tensor(terms[f"{term}_losses_per_model"][name])
                errors.add(f"{case}.{term}.{name}", got, expected)
            (slope,) = torch.autograd.grad(
                make_loss(total, beta=1.0)(student, teachers[name]), student
            )
            errors.gradient(f"grad.{case}.{name}", slope, tensors[f"grad.{case}.{name}"])
    return errors.rows


def check_sak_loss(spec: dict, tensors: Tensors, dtype: torch.dtype) -> list[Row] | Skipped:
    """Each level of each teacher, their sum, and its gradients."""
    errors = Errors(spec, tensors)
    students, teachers = (_maps(tensors, whose, dtype) for whose in ("student", "teacher"))
    if any(map_.shape[-1] < teachers[name].shape[-1] for name, map_ in students.items()):
        return Skipped("not yet", "the student's map is never resized")

    def tokens(map_: Tensor) -> FeatureMap:
        return FeatureMap(_tokens(map_), tuple(map_.shape[-2:]), 0)

    for case, name in _TERMS_OF_SAK.items():
        loss, losses = make_loss(name, beta=1.0), {}
        for level, student in students.items():
            pair = align(tokens(student), tokens(teachers[level]), interpolation="bilinear")
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


def check_unic_loss(spec: dict, tensors: Tensors, dtype: torch.dtype) -> list[Row]:
    """The losses of each image, and the gradients by the file's own weights of them."""
    errors, config = Errors(spec, tensors), spec["config"]
    students, teachers = (_maps(tensors, whose, dtype) for whose in ("student", "teacher"))
    name = f"{config['lam_cos']} cosine + {config['lam_sl1']} smooth_l1"
    loss = make_loss(name, beta=config.get("smooth_l1_beta", 1.0))
    per_image = {}
    for teacher in config["teachers"]:
        kinds = []
        for kind in ("cls", "patch"):
            if (label := f"{teacher}.{kind}") in teachers:
                maps = students[label], teachers[label]
                images = zip(*(m.reshape(len(m), 1, -1, m.shape[-1]) for m in maps), strict=True)
                kinds.append(torch.stack([loss(*image) for image in images]))
        per_image[teacher] = torch.stack(kinds).mean(0)
        errors.out(f"out.per_image.{teacher}", per_image[teacher])
    table = torch.stack([per_image[teacher] for teacher in sorted(per_image)])
    for label in [name for name in tensors if name.endswith(".coefficients")]:
        case = label.removeprefix("out.").removesuffix(".coefficients")
        total = (tensors[label].to(dtype) * table).sum()
        errors.out(f"out.{case}.loss", total)
        used = {n: students[n] for n in students if f"grad.{case}.student.{n}" in tensors}
        slopes = torch.autograd.grad(total, list(used.values()), retain_graph=True)
        for part, slope in zip(used, slopes, strict=True):
            expected = tensors[f"grad.{case}.student.{part}"]
            errors.gradient(f"grad.{case}.student.{part}", slope, expected)
    return errors.rows


# Names of RADIO's and DUNE's parameters, and ours, where Sequentials are numbered.
_V1 = ((r"fc1\.", "0."), (r"norm\.", "1."), (r"fc2\.", "{last}."))
_V2 = (
    (r"pre_norm\.0\.", "first.0."),
    (r"fc1\.", "first.{first}."),
    (r"blocks\.", "inner."),
    (r"final\.", "last."),
)


def _check_head(
    spec: dict,
    tensors: Tensors,
    dtype: torch.dtype,
    head: nn.Module,
    names: dict[str, str],
) -> list[Row]:
    """What a head gives, and the gradients of its input and parameters.

    Args:
        names: Our name of each published parameter.
    """
    errors, prefix = Errors(spec, tensors), "weights."
    published = [n.removeprefix(prefix) for n in tensors if n.startswith(prefix)]
    held = {names[name]: tensors[f"{prefix}{name}"] for name in published}
    head.load_state_dict(held, strict=True)
    head.to(dtype)
    tokens = nn.Parameter(tensors["input"].to(dtype))
    out = head(tokens)
    errors.out("out", out)
    out.backward(tensors["cotangent"].to(dtype))
    errors.gradient("grad.input", tokens.grad, tensors["grad.input"])
    gradients = {name: parameter.grad for name, parameter in head.named_parameters()}
    for name in published:
        got, expected = gradients[names[name]], tensors[f"grad.{name}"]
        if name.endswith("qkv.bias"):  # The bias of the keys has no effect.
            width = len(expected) // 3
            got, expected = (torch.cat([t[:width], t[2 * width :]]) for t in (got, expected))
        errors.gradient(f"grad.{name}", got, expected)
    return errors.rows


def _names(tensors: Tensors, rules: tuple[tuple[str, str], ...], **numbers: int) -> dict[str, str]:
    """Our names of the published parameters."""
    names = {}
    for label in tensors:
        if label.startswith("weights."):
            name = ours = label.removeprefix("weights.")
            for pattern, replacement in rules:
                ours, count = re.subn(rf"^(?:{pattern})", replacement.format(**numbers), ours)
                if count:
                    break
            names[name] = ours
    return names


def check_radio_head_v1(spec: dict, tensors: Tensors, dtype: torch.dtype) -> list[Row]:
    config = spec["config"]
    inner = config["num_inner"]
    head = mlp_relu(config["input"], config["output"], hidden=config["hidden"], inner=inner)
    names = _names(tensors, _V1, last=3 * inner + 3)
    for name in names:
        if found := re.match(r"inner\.(\d+)\.", name):
            names[name] = f"{int(found[1]) + 3}.{name[found.end() :]}"
    return _check_head(spec, tensors, dtype, head, names)


def check_radio_head_v2(spec: dict, tensors: Tensors, dtype: torch.dtype) -> list[Row] | Skipped:
    config = spec["config"]
    if config.get("upsample_factor", 1) != 1:
        return Skipped("not yet", "heads that change the grid")
    pre_norm = config.get("pre_norm", False)
    head = MLP(
        config["input"],
        config["output"],
        hidden=config["hidden"],
        inner=config["num_inner"],
        pre_norm=pre_norm,
    )
    return _check_head(spec, tensors, dtype, head, _names(tensors, _V2, first=2 if pre_norm else 0))


def check_radio_head_attn(spec: dict, tensors: Tensors, dtype: torch.dtype) -> list[Row] | Skipped:
    config = spec["config"]
    built = (config["blocks"], config["heads"], config["layer_scale_init"])
    if built != (2, 16, 1e-5):
        return Skipped("left out", f"RADIO has no such head: {built}")
    pre_norm = config.get("pre_norm", False)
    head = attention_mlp(
        config["input"], config["output"], hidden=config["hidden"], pre_norm=pre_norm
    )
    rules = (
        (r"blocks\.", ""),
        *((rf"mlp\.{old}", f"2.{new}") for old, new in _V2),
    )
    names = _names(tensors, rules, first=2 if pre_norm else 0)
    return _check_head(spec, tensors, dtype, head, names)


def check_dune_projector(spec: dict, tensors: Tensors, dtype: torch.dtype) -> list[Row] | Skipped:
    config = spec["config"]
    built = (config["mlp_ratio"], config["layer_norm_eps"])
    if built != (4.0, 1e-6):
        return Skipped("left out", f"DUNE has no such head: {built}")
    depth = config["num_blocks"]
    head = block(config["input_dim"], config["output_dim"], heads=config["num_heads"], blocks=depth)
    rules = ((r"blocks\.", ""), (r"\w+\.(?=weight|bias)", "{last}."))
    return _check_head(spec, tensors, dtype, head, _names(tensors, rules, last=depth))


def _tokens(map_: Tensor) -> Tensor:
    """(B, N, C) of a map (B, C, H, W)."""
    return map_.flatten(2).transpose(1, 2)


def _scaled(mean: Tensor, deviation: Tensor) -> Callable[[Tensor], Tensor]:
    """The package's standardisation by a mean and deviations."""
    nothing = torch.zeros(0)
    return standardise(TargetStatistics(mean, deviation, nothing, {}))


def check_unic_standardise(spec: dict, tensors: Tensors, dtype: torch.dtype) -> list[Row]:
    """Tokens by statistics that stay, whose deviations have a thousandth at least or an epsilon."""
    errors, is_dune = Errors(spec, tensors), spec["kind"] == "dune_teacher_norm"
    cases = {"eval": 0, "zero_momentum": 1} if is_dune else {"eval": 0}
    for kind in ("cls", "patch"):
        for case, number in cases.items():
            mean, deviation = (
                tensors[f"out.{kind}.{name}.{case}"].to(dtype) for name in ("mean", "std")
            )
            tokens = tensors[f"input.{kind}.{number}"].to(dtype)
            if is_dune:
                got = _scaled(mean, deviation)(tokens)
            else:
                got = Affine(mean, (deviation + spec["config"]["eps"]).reciprocal())(tokens)
            # The mean is stored in float32, and some channels have deviations near its rounding.
            sure = mean.abs() * 2**-24 < 1e-7 * deviation
            assert sure.sum() > 1
            expected = tensors[f"out.{kind}.{case}"]
            errors.add(f"out.{kind}.{case}", got[..., sure], expected[..., sure])
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


CHECKS = {
    "dune_teacher_norm": check_unic_standardise,
    "featsharp_phi_standardize": check_featsharp,
    "radio_hadamard": check_radio_hadamard,
    "radio_intermediate_normaliser": check_radio_intermediate,
    "radio_phi_s": check_radio_phi_s,
    "unic_standardise": check_unic_standardise,
    "dune_loss": check_unic_loss,
    "dune_projector": check_dune_projector,
    "radio_head_attn": check_radio_head_attn,
    "radio_head_v1": check_radio_head_v1,
    "radio_head_v2": check_radio_head_v2,
    "sak_loss": check_sak_loss,
    "theia_loss": check_theia_loss,
    "unic_loss": check_unic_loss,
}
