"""Checks of oracle files that hold a network, an objective or a resize against fd_large.

Each check takes the JSON and the tensors of a file and returns rows of (label, error, tolerance);
a file whose option is left out on purpose, or not there yet, gives a `Skipped` with its reason.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from translated_names import translate

from fd_large.backbones.feature_map import FeatureMap
from fd_large.backbones.position_tables import progression, resize_positions, resize_table
from fd_large.backbones.resize import resize_images
from fd_large.backbones.statistics import IMAGENET, OPENAI_CLIP
from fd_large.backbones.swin.swin import Swin
from fd_large.backbones.swinv2.published import shared_bias
from fd_large.backbones.swinv2.swinv2 import SwinV2
from fd_large.backbones.translation import expanded, translated
from fd_large.backbones.vit.vit import ViT
from fd_large.backbones.windows import StageWindows, coordinate_table
from fd_large.kernels.whitened_loss import whiten, whitened_loss
from fd_large.kernels.window_attention_reference import position_index, region_ids, region_mask
from fd_large.weights.coverage import covered
from fd_large.weights.published import FORMATS, detect

Tensors = dict[str, Tensor]
CPU = torch.device("cpu")
# Gradients may be this many times further off than outputs.
GRADIENT_FACTOR = 4
# Tolerances that a JSON lacks; from the README of the oracles.
README_TOLERANCES = {"fd_teacher_resize": 2e-5}
TABLE_TOLERANCE = 2e-6  # Absolute.
BICUBIC_TOLERANCE = 1e-5


@dataclass
class Row:
    """One compared tensor: `error` must not exceed `tolerance`."""

    label: str
    error: float
    tolerance: float


@dataclass
class Skipped:
    """A file that is not checked: verdict `not yet` or `left out`, and why."""

    verdict: str
    reason: str


def max_relative(got: Tensor, expected: Tensor, scale: float | None = None) -> float:
    """Returns max|a-b| / max|b|, the error measure of the oracles; inf for NaN or wrong shapes."""
    if got.shape != expected.shape:
        return float("inf")
    difference = (got.double() - expected.double()).abs().max().item()
    largest = expected.abs().max().item() if scale is None else scale
    if difference != difference:
        return float("inf")
    if largest == 0:
        return 0.0 if difference == 0 else float("inf")
    return difference / largest


# --- networks from configurations of the published classes ---


def size_of(config: dict) -> int | tuple[int, int]:
    size = config["img_size"]
    return size if isinstance(size, int) else tuple(size)


def fd_swinv2(config: dict, **plain: Any) -> SwinV2:
    expected = {
        "relative_coords_table_type": "norm8_log",
        "attn_type": "cosine_mh",
        "rpe_output_type": "sigmoid",
    }
    for key, value in expected.items():
        if config.get(key, value) != value:
            raise ValueError(f"option {key} = {config[key]!r} is not known to this check")
    interval = config.get("endnorm_interval", -1)
    return SwinV2(
        config["embed_dim"],
        tuple(config["depths"]),
        tuple(config["num_heads"]),
        window_size=config["window_size"],
        patch_size=config["patch_size"],
        in_chans=config.get("in_chans", 3),
        mlp_ratio=config["mlp_ratio"],
        qkv_bias=config["qkv_bias"],
        patch_norm=config["patch_norm"],
        absolute_position=config["ape"],
        image_size=size_of(config),
        pretrained_window_sizes=config.get("pretrained_window_sizes"),
        extra_norm_every=max(interval, 0),
        shared_position_bias=config.get("use_shared_rel_pos_bias", False),
        initialization="none",
        **plain,
    )


def swin_v1(config: dict, **plain: Any) -> Swin:
    return Swin(
        config["embed_dim"],
        tuple(config["depths"]),
        tuple(config["num_heads"]),
        window_size=config["window_size"],
        image_size=config["img_size"],
        patch_size=config["patch_size"],
        mlp_ratio=config["mlp_ratio"],
        qkv_bias=config["qkv_bias"],
        patch_norm=config["patch_norm"],
        absolute_position=config["ape"],
        norm_eps=config.get("norm_eps", 1e-5),
        initialization="none",
        **plain,
    )


def fd_vit(config: dict, **plain: Any) -> ViT:
    if config.get("use_mean_pooling"):
        raise ValueError("option use_mean_pooling is not known to this check")
    relative = "none"
    if config["use_shared_rel_pos_bias"]:
        relative = "shared"
    elif config["use_rel_pos_bias"]:
        relative = "block"
    qkv_bias = "none"
    if config["qkv_bias"]:
        qkv_bias = "qkv" if config["with_k_bias"] else "qv"
    return ViT(
        config["embed_dim"],
        config["depth"],
        config["num_heads"],
        patch_size=config["patch_size"],
        image_size=size_of(config),
        in_chans=config.get("in_chans", 3),
        mlp_ratio=config["mlp_ratio"],
        class_token=config["with_cls_token"],
        absolute_position=config["use_abs_pos_emb"],
        relative_position=relative,
        layer_scale=config["init_values"] or 0.0,
        qkv_bias=qkv_bias,
        norm_eps=config.get("norm_eps", 1e-6),
        initialization="none",
        **plain,
    )


def plain_vit(config: dict, **plain: Any) -> ViT:
    return ViT(
        config["embed_dim"],
        config["depth"],
        config["num_heads"],
        patch_size=config["patch_size"],
        image_size=size_of(config),
        mlp_ratio=config["mlp_ratio"],
        qkv_bias="fused" if config["qkv_bias"] else "none",
        distillation_token=config["distilled"],
        norm_eps=config["norm_eps"],
        initialization="none",
        **plain,
    )


def clip_vit(config: dict, **plain: Any) -> ViT:
    return ViT(
        config["width"],
        config["layers"],
        config["heads"],
        patch_size=config["patch_size"],
        image_size=config["input_resolution"],
        patch_bias=False,
        pre_norm_layer=True,
        activation="quick_gelu",
        norm_eps=config.get("norm_eps", 1e-5),
        initialization="none",
        **plain,
    )


def load(net: nn.Module, tensors: Tensors, prefix: str = "weights.") -> str:
    """Loads a model through the table of formats, all of it, and returns the format's name."""
    items = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
    form = detect(items)
    expected = {name: tuple(p.shape) for name, p in net.named_parameters()}
    found = dict(covered(expected, translate(form, items.items()), where="oracle"))
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            parameter.copy_(found[name])
    return form


# --- running a model with its inner values in view ---


def flat(x: Tensor) -> Tensor:
    return x.flatten(1, 2) if x.dim() == 4 else x


class Trace:
    """Collects the outputs of named modules, and the input of the final norm, by hooks."""

    def __init__(self, net: nn.Module):
        self.seen: Tensors = {}
        self.inputs: Tensors = {}
        wanted = (
            r"patch_embed|norm_pre|rel_pos_bias|layers\.\d+(\.downsample)?|"
            r"(layers\.\d+\.)?blocks\.\d+"
        )
        for name, module in net.named_modules():
            if re.fullmatch(wanted, name):
                # A published stage ends with its merging, which here runs after the stage.
                module.register_forward_hook(self._output(name.removesuffix(".downsample")))
                module.register_forward_pre_hook(self._input(name))
        net.norm.register_forward_pre_hook(self._input("norm"))

    def _output(self, name: str) -> Callable:
        def hook(module: nn.Module, inputs: tuple, output: Tensor | tuple) -> None:
            # SwinV2 hands its stream on in two dtypes.
            self.seen[name] = output[0] if isinstance(output, tuple) else output

        return hook

    def _input(self, name: str) -> Callable:
        def hook(module: nn.Module, inputs: tuple) -> None:
            if inputs:
                self.inputs[name] = inputs[0]

        return hook


def check_net(
    net: nn.Module,
    spec: dict,
    tensors: Tensors,
    dtype: torch.dtype,
    tolerance: float,
    *,
    extra: Callable[[Tensor, Trace, FeatureMap], Tensors] | None = None,
    images: Tensor | None = None,
) -> list[Row]:
    """Runs a model on a file's input and compares every output, gradient and buffer in the file."""
    form = load(net, tensors)
    net.to(dtype)
    trace = Trace(net)
    given = tensors["input"].to(dtype)
    has_gradients = any(name.startswith("grad.") for name in tensors)
    given.requires_grad_(has_gradients)
    feature_map = net(given if images is None else images.to(dtype))
    outputs = {"final": feature_map.tokens, "pooled": feature_map.tokens.mean(dim=1)}
    for name, value in trace.seen.items():
        if name == "rel_pos_bias":
            index = position_index(*net.image_grid, net.cls_token is not None, CPU)
            outputs[name] = value[index].permute(2, 0, 1)
        elif name == "norm_pre":
            outputs["ln_pre"] = value
        else:
            label = name.replace("layers.", "stage").replace("blocks.", "block")
            outputs[label] = flat(value)
            if label.startswith("block"):
                outputs[f"res{label}_LND"] = value.transpose(0, 1)
    if extra is not None:
        outputs |= extra(given, trace, feature_map)
    rows = []
    for name, expected in tensors.items():
        if name.startswith("out."):
            got = outputs.get(name.removeprefix("out."))
            error = float("inf") if got is None else max_relative(got, expected)
            rows.append(Row(name, error, tolerance))
        elif name.startswith("buffers."):
            rows.append(Row(name, _buffer_error(net, name, expected, trace), tolerance))
    if has_gradients:
        (feature_map.tokens * tensors["cotangent"].to(dtype)).sum().backward()
        rows += gradient_rows(net, form, given, tensors, spec, tolerance)
    return rows


def gradient_rows(
    net: nn.Module, form: str, given: Tensor, tensors: Tensors, spec: dict, tolerance: float
) -> list[Row]:
    stored = {n.removeprefix("grad."): t for n, t in tensors.items() if n.startswith("grad.")}
    silent = {name for name, _ in translate(form, _pairs(spec, stored))}
    largest = max(t.abs().max().item() for t in stored.values())
    limit = GRADIENT_FACTOR * tolerance
    rows = []
    if "input" in stored:
        error = max_relative(given.grad, stored.pop("input"))
        rows.append(Row("grad.input", error, limit))
    parameters = dict(net.named_parameters())
    for name, expected in translate(form, stored.items()):
        # A gradient that is zero but for rounding has no scale of its own.
        scale = largest if name in silent else None
        got = parameters[name].grad if name in parameters else None
        error = float("inf") if got is None else max_relative(got, expected, scale)
        rows.append(Row(f"grad.{name}", error, limit))
    return rows


def _pairs(spec: dict, stored: Tensors) -> list[tuple[str, Tensor]]:
    return [(n, stored[n]) for n in spec.get("parameters_without_influence", []) if n in stored]


def _buffer_error(net: nn.Module, name: str, expected: Tensor, trace: Trace) -> float:
    if name.endswith("relative_coords_table"):
        stage = int(re.search(r"layers\.(\d+)", name)[1])
        window = (expected.shape[1] + 1) // 2
        table = coordinate_table(window, net.layers[stage].pretrained_window, CPU)
        return max_relative(table.view(expected.shape), expected)
    if name.endswith("relative_position_index"):
        if isinstance(net, ViT):
            index = position_index(*net.image_grid, net.cls_token is not None, CPU)
        else:
            side = round(expected.shape[0] ** 0.5)
            index = position_index(side, side, False, CPU)
        return max_relative(index, expected)
    if name.endswith("attn_mask"):
        stage, block = map(int, re.search(r"layers\.(\d+)\.blocks\.(\d+)", name).groups())
        height, width = trace.inputs[f"layers.{stage}.blocks.{block}"].shape[1:3]
        window = round(expected.shape[1] ** 0.5)
        shift = StageWindows(window).over(height, width, block).shift
        regions = region_ids(height, width, (window, window), shift, CPU)
        return max_relative(region_mask(regions, torch.float32), expected)
    return float("inf")


# --- one check per kind ---


def check_fd_swinv2(spec: dict, tensors: Tensors, dtype: torch.dtype) -> list[Row] | Skipped:
    config = spec["config"]
    if config.get("use_mlp_norm_layers"):
        return Skipped(
            "left out", "norms inside the MLP: no published model has them, so the students do not"
        )
    return check_net(fd_swinv2(config), spec, tensors, dtype, tolerance_of(spec))


def check_fd_vit(spec: dict, tensors: Tensors, dtype: torch.dtype) -> list[Row]:
    return check_net(fd_vit(spec["config"]), spec, tensors, dtype, tolerance_of(spec))


def _teacher_outputs(given: Tensor, trace: Trace, feature_map: FeatureMap) -> Tensors:
    raw = flat(trace.inputs["norm"])
    post_norm = feature_map.tokens
    return {
        "raw": raw,
        "post_norm": post_norm,
        "whitened": whiten(post_norm, 1e-5),
        "whitened_without_post_norm": whiten(raw, 1e-5),
    }


def check_teacher_vit(spec: dict, tensors: Tensors, dtype: torch.dtype) -> list[Row]:
    net = plain_vit(spec["config"])
    return check_net(net, spec, tensors, dtype, tolerance_of(spec), extra=_teacher_outputs)


def check_teacher_swin(spec: dict, tensors: Tensors, dtype: torch.dtype) -> list[Row]:
    net = swin_v1(spec["config"])
    return check_net(net, spec, tensors, dtype, tolerance_of(spec), extra=_teacher_outputs)


def check_teacher_clip(spec: dict, tensors: Tensors, dtype: torch.dtype) -> list[Row]:
    def channels(values: tuple[float, ...]) -> Tensor:
        return torch.tensor(values, dtype=dtype).view(1, 3, 1, 1)

    images = tensors["input"].to(dtype) * channels(IMAGENET.std) + channels(IMAGENET.mean)
    images = (images - channels(OPENAI_CLIP.mean)) / channels(OPENAI_CLIP.std)

    def outputs(given: Tensor, trace: Trace, feature_map: FeatureMap) -> Tensors:
        embedding = feature_map.tokens[:, 0] @ tensors["weights.visual.proj"].to(dtype)
        extra = {"clip_input": images, "image_embedding": embedding}
        return _teacher_outputs(given, trace, feature_map) | extra

    net = clip_vit(spec["config"])
    return check_net(net, spec, tensors, dtype, tolerance_of(spec), extra=outputs, images=images)


def check_simmim(spec: dict, tensors: Tensors, dtype: torch.dtype) -> list[Row]:
    """The encoder under the mask that pre-training puts in; decoder and losses are left out."""
    mask = tensors["mask"].flatten(1)[..., None].to(dtype)
    token = tensors["weights.encoder.mask_token"].to(dtype)

    def hide(module: nn.Module, inputs: tuple, output: tuple) -> tuple[Tensor, Tensor]:
        patches = output[0].flatten(1, 2)
        hidden = (patches * (1 - mask) + token * mask).view(output[0].shape)
        return hidden, hidden

    def outputs(given: Tensor, trace: Trace, feature_map: FeatureMap) -> Tensors:
        expected = tensors["out.encoder_map"]
        found = {"encoder_map": feature_map.tokens.transpose(1, 2).reshape(expected.shape)}
        # Traced after the mask, which the published module puts in behind its patch embedding.
        return found | {"patch_embed": flat(unmasked["patches"])}

    net, unmasked = fd_swinv2(spec["config"]), {}
    net.patch_embed.register_forward_hook(lambda m, i, o: unmasked.update(patches=o[0]))
    net.patch_embed.register_forward_hook(hide)
    kept = {
        name: value
        for name, value in tensors.items()
        if name not in ("out.final", "out.norm_target")
    }
    return check_net(net, spec, kept, dtype, tolerance_of(spec), extra=outputs)


def check_interpolation(spec: dict, tensors: Tensors, dtype: torch.dtype) -> list[Row]:
    rows = []
    for case, facts in spec["cases"].items():
        if "source_positions" in facts:
            positions = torch.tensor(facts["source_positions"], dtype=torch.float64)
            got = progression(len(positions), len(facts["target_positions"]))
            error = (torch.from_numpy(got) - positions).abs().max().item()
            rows.append(Row(f"{case}: positions", error, TABLE_TOLERANCE))
        if "keys_in" in facts:
            rows.append(_expansion_row(case, facts))
        for name in tensors:
            if name.startswith(f"{case}.") and name.endswith(".in"):
                rows.append(_resize_row(name, facts, tensors, dtype))
    return rows


def _resize_row(name: str, facts: dict, tensors: Tensors, dtype: torch.dtype) -> Row:
    given, expected = tensors[name].to(dtype), tensors[name.removesuffix(".in") + ".out"]
    if "pos_embed" in name:
        side = round((expected.shape[-2] - 1) ** 0.5)
        got = resize_positions(given.view(1, *given.shape[-2:]), 1, side).view(expected.shape)
        return Row(name, max_relative(got, expected), BICUBIC_TOLERANCE)
    got = resize_table(given, expected.shape[0], 3 if facts.get("cls_token") else 0)
    same = got.shape == expected.shape
    error = (got - expected).abs().max().item() if same else float("inf")
    return Row(name, error, TABLE_TOLERANCE)


def _expansion_row(case: str, facts: dict) -> Row:
    """A shared position bias for every block, by names alone."""
    rows = FORMATS["fd_swinv2"].format.rows
    wanted = {name: () for name in translated(facts["keys_out"], rows).pieces}
    pieces = translated(facts["keys_in"], rows).pieces
    got, _ = expanded(pieces, wanted, shared_bias)
    wrong = len(got.keys() ^ wanted.keys())
    for name, piece in got.items():
        stage, last = name.split(".")[1], name.split("cpb_mlp.")[-1]
        wrong += piece.sources != (f"layers.{stage}.rel_pos_bias.rpe_mlp.{last}",)
    return Row(f"{case}: {len(wanted)} names", float(wrong), 0.0)


def check_teacher_resize(spec: dict, tensors: Tensors, dtype: torch.dtype) -> list[Row]:
    tolerance = tolerance_of(spec)
    size = (spec["config"]["size_out"],) * 2
    outputs = {
        f"out.{'antialias' if antialias else 'no_antialias'}": resize_images(
            tensors["input"].to(dtype), size, antialias=antialias
        )
        for antialias in (True, False)
    }
    return [
        Row(
            name, max_relative(outputs[name], value) if name in outputs else float("inf"), tolerance
        )
        for name, value in tensors.items()
        if name.startswith("out.")
    ]


def check_loss(spec: dict, tensors: Tensors, dtype: torch.dtype) -> list[Row]:
    config, tolerance = spec["config"], tolerance_of(spec)
    values = {name: t.to(dtype) for name, t in tensors.items()}
    student = values["input.student_map"].requires_grad_()
    weight = values["weights.decoder.0.weight"].requires_grad_()
    bias = values["weights.decoder.0.bias"].requires_grad_()
    decoded = nn.functional.linear(student, weight[:, :, 0], bias)
    decoded.retain_grad()
    teacher, eps = values["input.teacher_map"], config["whitening_eps"]
    loss = whitened_loss(decoded, teacher, beta=config["beta"], eps=eps)
    loss.backward()
    got = {
        "out.decoded": decoded,
        "out.whitened": whiten(teacher, eps),
        "loss": loss,
        "grad.decoded": decoded.grad,
        "grad.student_map": student.grad,
        "grad.decoder.0.weight": weight.grad,
        "grad.decoder.0.bias": bias.grad,
    }
    rows = []
    for name, expected in tensors.items():
        if name.startswith(("input.", "weights.")):
            continue
        factor = GRADIENT_FACTOR if name.startswith("grad.") else 1
        error = max_relative(got[name], expected) if name in got else float("inf")
        rows.append(Row(name, error, factor * tolerance))
    return rows


def tolerance_of(spec: dict) -> float:
    """Returns a file's tolerance, from its JSON or else from the README's table for its kind."""
    if "suggested_tolerance_max_rel" in spec:
        return spec["suggested_tolerance_max_rel"]
    return README_TOLERANCES[spec["kind"]]


CHECKS: dict[str, Callable[[dict, Tensors, torch.dtype], list[Row] | Skipped]] = {
    "fd_swinv2": check_fd_swinv2,
    "swinv2_official": check_fd_swinv2,
    "fd_vit": check_fd_vit,
    "fd_teacher_clip": check_teacher_clip,
    "fd_teacher_vit": check_teacher_vit,
    "fd_teacher_swin": check_teacher_swin,
    "fd_teacher_resize": check_teacher_resize,
    "fd_loss": check_loss,
    "simmim": check_simmim,
    "interpolation": check_interpolation,
}
