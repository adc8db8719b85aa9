"""Checks of oracle files of several teachers: the heads."""

from __future__ import annotations

import re
from collections.abc import Callable

import torch
from oracles_dense import Errors
from oracles_models import Row, Skipped, Tensors
from torch import Tensor, nn

from fd_large.backbones.feature_map import FeatureMap
from fd_large.tasks.distillation.alignment import align
from fd_large.tasks.distillation.heads.map_head import MapHead, MapShapes
from fd_large.tasks.distillation.heads.map_heads import (
    Convolutional,
    Ladder,
    ResizedMLP,
    UpsamplingMLP,
)
from fd_large.tasks.distillation.heads.token_heads import (
    MLP,
    attention_mlp,
    block,
    linear,
    mlp_relu,
)
from fd_large.tasks.distillation.losses import make_loss
from fd_large.tasks.distillation.several.similarity import units

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
    *,
    run: Callable[[Tensor], Tensor] | None = None,
) -> list[Row]:
    """What a head gives, and the gradients of its input and parameters.

    Args:
        names: Our name of each published parameter.
        run: Calls the head on tokens; None: it takes them as they are.
    """
    errors, prefix = Errors(spec, tensors), "weights."
    published = [n.removeprefix(prefix) for n in tensors if n.startswith(prefix)]
    held = {names[name]: tensors[f"{prefix}{name}"] for name in published}
    head.load_state_dict(held, strict=True)
    head.to(dtype)
    tokens = nn.Parameter(tensors["input"].to(dtype))
    out = (run or head)(tokens)
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


def check_radio_head_v2(spec: dict, tensors: Tensors, dtype: torch.dtype) -> list[Row]:
    """The MLP; where it gives a finer grid, on the patches of the file's image."""
    config = spec["config"]
    pre_norm, factor = config.get("pre_norm", False), config.get("upsample_factor", 1)
    names = _names(tensors, _V2, first=2 if pre_norm else 0)
    sizes = {"hidden": config["hidden"], "inner": config["num_inner"], "pre_norm": pre_norm}
    if factor == 1:
        head: nn.Module = MLP(config["input"], config["output"], **sizes)
        return _check_head(spec, tensors, dtype, head, names)
    grid = tuple(side // config["patch_size"] for side in config["image"][-2:])
    finer = tuple(factor * side for side in grid)
    width = tensors["out"].shape[-1]
    head = UpsamplingMLP(config["input"], width, MapShapes(grid, finer, 0, 1), **sizes)
    names = {name: f"mlp.{ours}" for name, ours in names.items()}
    return _check_head(
        spec,
        tensors,
        dtype,
        head,
        names,
        run=lambda tokens: head(FeatureMap(tokens, grid, 0)).tokens,
    )


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


def check_unic_projector(spec: dict, tensors: Tensors, dtype: torch.dtype) -> list[Row]:
    """A ladder for each teacher on the same blocks, with CLS token and patches in one map."""
    errors, config = Errors(spec, tensors), spec["config"]
    depth, numbers = config["depth"], config["which_blocks"] or range(config["depth"])
    inputs, maps = {}, []
    for number in range(1, depth + 1):
        parts = [
            nn.Parameter(tensors[f"input.{kind}.{number}"].to(dtype)) for kind in ("cls", "patch")
        ]
        inputs |= {
            f"{kind}.{number}": part for kind, part in zip(("cls", "patch"), parts, strict=True)
        }
        tokens = torch.cat([parts[0][:, None], parts[1]], dim=1)
        maps.append(FeatureMap(tokens, (1, config["patch_tokens"]), 1))
    total, heads = torch.zeros((), dtype=dtype), {}
    for teacher, width in config["head_dims"].items():
        grid = maps[0].grid
        head = heads[teacher] = Ladder(
            config["input_dim"],
            width,
            MapShapes(grid, grid, 1, depth),
            hidden=config["hidden"],
            last_hidden=config["last_hidden"],
            blocks=numbers,
            pre_norm=config["prenorm"],
            mid_norm=config["midnorm"],
        )
        prefix = f"weights.heads.{teacher}."
        head.load_state_dict(
            {
                name.removeprefix(prefix).replace("layers.", ""): tensor
                for name, tensor in tensors.items()
                if name.startswith(prefix)
            }
        )
        out = head.to(dtype)(tuple(maps)).tokens
        for kind, got in (("cls", out[:, 0]), ("patch", out[:, 1:])):
            errors.out(f"out.{teacher}.{kind}", got)
            total = total + (got * tensors[f"cotangent.{teacher}.{kind}"].to(dtype)).sum()
    total.backward()
    for label in [name for name in tensors if name.startswith("grad.")]:
        _, kind, *path = label.split(".")
        if kind == "input":
            gradient = inputs[".".join(path)].grad
        else:
            name = ".".join(path[1:]).replace("layers.", "")
            gradient = dict(heads[path[0]].named_parameters())[name].grad
        errors.gradient(label, gradient, tensors[label])
    return errors.rows


# Theia's parameters, and ours; the last of a translator is `last`.
_THEIA = (
    (r"backbone_adapter\.", "first."),
    (r"pad\.1\.", "pad."),
    (r"adapter\.{last}\.", "last."),
    (r"adapter\.", "layers."),
)


def check_theia_translator(spec: dict, tensors: Tensors, dtype: torch.dtype) -> list[Row] | Skipped:
    """A head for each target; of the layers that Theia's translators share, each has its own."""
    errors, config = Errors(spec, tensors), spec["config"]
    width, *grid = config["backbone (C,h,w)"]
    prefix = 0 if config["backbone_no_cls"] else 1
    tokens = nn.Parameter(tensors["input"].to(dtype))
    total, gradients = torch.zeros((), dtype=dtype), {}
    for target, (channels, *places) in config["targets (C,h,w)"].items():
        own = f"translator_heads.{target.replace('.', '_')}."
        used = ("backbone_adapter.", own) if places and config["type"] != "lconv" else (own,)
        names = [n.partition(".")[2] for n in tensors if n.startswith("weights.")]
        names = [name for name in names if name.startswith(used)]
        last = max(int(found[1]) for n in names if (found := re.search(r"\badapter\.(\d+)", n)))
        maps = MapShapes(tuple(grid), tuple(places), prefix, 1)
        head: nn.Module
        if not places:
            head, rules = nn.Linear(width, channels), ((r"adapter\.0\.", ""),)
        elif config["type"] == "mlp":
            hidden, layers = (config[f"translator_{n}"] for n in ("hidden_size", "n_layer"))
            head = ResizedMLP(width, channels, maps, hidden=hidden, layers=layers)
            rules = ((r"backbone_adapter\.", "first."), (r"adapter\.", "mlp."))
        elif config["type"] == "lconv":
            hidden = int(width * config["hidden_size_factor"])
            head, rules = Convolutional(width, channels, maps, hidden=hidden), _THEIA
        elif config["type"] == "conv":
            hidden = config["translator_hidden_size"]
            head = Convolutional(
                width, channels, maps, adapted=hidden, hidden=2 * hidden, last_side=3
            )
            rules = _THEIA
        else:
            return Skipped("left out", f"the package has no head {config['type']!r}")
        rules = tuple((pattern.replace("{last}", str(last)), ours) for pattern, ours in rules)
        ours = {
            name: re.sub(*next(r for r in rules if re.match(r[0], n)), n, count=1)
            for name in names
            if (n := name.removeprefix(own))
        }
        head.load_state_dict({ours[name]: tensors[f"weights.{name}"] for name in names})
        head.to(dtype)
        if isinstance(head, MapHead):
            out = head(FeatureMap(tokens, tuple(grid), prefix)).tokens
        else:
            out = head(tokens[:, 0])
        errors.out(f"out.{target}", out)
        total = total + (out * tensors[f"cotangent.{target}"].to(dtype)).sum()
        gradients[target] = (ours, head)
    total.backward()
    errors.gradient("grad.input", tokens.grad, tensors["grad.input"])
    for label in [name for name in tensors if name.startswith("grad.") and name != "grad.input"]:
        parts = [
            head.get_parameter(ours[name]).grad
            for ours, head in gradients.values()
            if (name := label.removeprefix("grad.")) in ours
        ]
        errors.gradient(label, torch.stack(parts).sum(0), tensors[label])
    return errors.rows


def _resized(tokens: Tensor, grid: tuple[int, int], wanted: tuple[int, int]) -> Tensor:
    """Tokens on the teacher's grid, where the engine resizes the student's map."""
    teacher = FeatureMap(tokens.new_empty(len(tokens), wanted[0] * wanted[1], 0), wanted, 0)
    return align(FeatureMap(tokens, grid, 0), teacher, interpolation="bilinear_student")[0].tokens


def check_lightly_v2(spec: dict, tensors: Tensors, dtype: torch.dtype) -> list[Row]:
    """A head on each place of the student's map, which is then resized; the squared difference."""
    errors, config = Errors(spec, tensors), spec["config"]
    width, *grid = config["student (C,h,w)"]
    out_width, layers = config["teacher dim (blocks x width)"], config["layers"]
    one = layers == 1
    head = (
        linear(width, out_width)
        if one
        else mlp_relu(
            width, out_width, hidden=config["hidden"], inner=layers - 2, activation=nn.GELU
        )
    )
    names = {f"mlp.{name}": name for name in head.state_dict()}
    head.load_state_dict({ours: tensors[f"weights.{name}"] for name, ours in names.items()})
    map_ = nn.Parameter(tensors["input.student_map"].to(dtype))
    tokens = _resized(
        head.to(dtype)(map_.flatten(2).transpose(1, 2)), tuple(grid), tuple(config["teacher grid"])
    )
    errors.out("out.student_tokens", tokens)
    loss = make_loss("mse", beta=1.0)(tokens, tensors["input.teacher_tokens"].to(dtype))
    errors.out("out.loss", loss)
    loss.backward()
    errors.gradient("grad.student_map", map_.grad, tensors["grad.student_map"])
    for name, ours in names.items():
        errors.gradient(f"grad.{name}", head.get_parameter(ours).grad, tensors[f"grad.{name}"])
    return errors.rows


def check_lightly_v3_student(spec: dict, tensors: Tensors, dtype: torch.dtype) -> list[Row]:
    """A head on the student's summary and one on its map, which is resized; tokens of length 1."""
    errors, config = Errors(spec, tensors), spec["config"]
    width, *grid = config["student (C,h,w)"]
    heads = {kind: linear(width, config["teacher dim"]).to(dtype) for kind in ("global", "local")}
    for kind, head in heads.items():
        head.load_state_dict(
            {name: tensors[f"weights.{kind}.{name}"] for name in ("weight", "bias")}
        )
    map_, pooled = (
        nn.Parameter(tensors[f"input.student_{kind}"].to(dtype)) for kind in ("map", "pooled")
    )
    local = heads["local"](map_.flatten(2).transpose(1, 2))
    local = units(_resized(local, tuple(grid), tuple(config["teacher grid"])))
    summary = units(heads["global"](pooled.flatten(1)))
    errors.out("out.local", local)
    errors.out("out.global", summary)
    total = (local * tensors["cotangent.local"].to(dtype)).sum()
    (total + (summary * tensors["cotangent.global"].to(dtype)).sum()).backward()
    for label, part in (("student_map", map_), ("student_pooled", pooled)):
        errors.gradient(f"grad.{label}", part.grad, tensors[f"grad.{label}"])
    for kind, head in heads.items():
        for name, parameter in head.named_parameters():
            label = f"grad.{kind}.{name}"
            errors.gradient(label, parameter.grad, tensors[label])
    return errors.rows


CHECKS = {
    "lightly_v2": check_lightly_v2,
    "lightly_v3_student": check_lightly_v3_student,
    "dune_projector": check_dune_projector,
    "radio_head_attn": check_radio_head_attn,
    "radio_head_v1": check_radio_head_v1,
    "radio_head_v2": check_radio_head_v2,
    "theia_translator": check_theia_translator,
    "unic_projector": check_unic_projector,
}
