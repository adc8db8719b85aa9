"""Checks of oracle files of several teachers: what one teacher's objective has of them."""

from __future__ import annotations

import re

import torch
from oracles_dense import Errors
from oracles_models import Row, Skipped, Tensors
from torch import Tensor, nn

from fd_large.backbones.feature_map import FeatureMap
from fd_large.tasks.distillation.alignment import align
from fd_large.tasks.distillation.heads import MLP, attention_mlp, block, mlp_relu
from fd_large.tasks.distillation.losses import make_loss

_TEACHERS = "the engine has one teacher"
_STATISTICS = "running statistics of the targets"
_RELATION = "losses against a queue or between tokens of an image"
_NORMALISER = "normalisers with statistics"

# Kinds that nothing in the package stands behind, and why.
NOT_YET = {
    "dinov3_exchange": "students in groups of ranks",
    "dune_statistics_two_ranks": _STATISTICS,
    "dune_teacher_norm": _NORMALISER,
    "featsharp_phi_standardize": _NORMALISER,
    "lightly_mixup": "mixup of images without labels",
    "lightly_queue": _RELATION,
    "lightly_v1_loss": _RELATION,
    "lightly_v2": "the student's map is never resized",
    "lightly_v3_loss": _RELATION,
    "lightly_v3_student": _RELATION,
    "radio_hadamard": _NORMALISER,
    "radio_intermediate_normaliser": _NORMALISER,
    "radio_phi_s": _NORMALISER,
    "theia_translator": "heads that change the grid",
    "unic_projector": "heads on the maps of all blocks",
    "unic_standardise": _STATISTICS,
    "unic_statistics_two_ranks": _STATISTICS,
    "unic_training_run": _TEACHERS,
}
NOT_YET_PARTS = {
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
        return FeatureMap(map_.flatten(2).transpose(1, 2), tuple(map_.shape[-2:]), 0)

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
        if name.endswith("qkv.bias"):  # That of the keys has no effect.
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


CHECKS = {
    "dune_loss": check_unic_loss,
    "dune_projector": check_dune_projector,
    "radio_head_attn": check_radio_head_attn,
    "radio_head_v1": check_radio_head_v1,
    "radio_head_v2": check_radio_head_v2,
    "sak_loss": check_sak_loss,
    "theia_loss": check_theia_loss,
    "unic_loss": check_unic_loss,
}
