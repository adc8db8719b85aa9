"""Checks of oracle files of depth: the whole model, its loss, and the groups of the optimiser."""

from __future__ import annotations

import re
from collections.abc import Iterable

import torch
from oracles_dense import Errors, move_statistics
from oracles_depth_scores import check_metrics, check_tta
from oracles_models import Row, Tensors
from torch import Tensor, nn
from translated_names import translate

from fd_large.backbones.swinv2.swinv2 import SwinV2
from fd_large.engine.zero.optimizer import decays
from fd_large.tasks.depth.heads.mim_head import MimHead
from fd_large.tasks.depth.loss import silog_loss
from fd_large.tasks.depth.task import Depth
from fd_large.weights.published import detect

PATCH = 4
# Names of MIM-Depth, and ours.
_NAMES = (
    (r"encoder\.norm3\.", "norm."),
    (r"decoder\.deconv_layers\.", "head.deconvolutions."),
    (r"decoder\.conv_layers\.", "head.convolution."),
    (r"last_layer_depth\.", "head.last."),
)


def renamed(items: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """Tensors of the published model by our names."""
    own: dict[str, Tensor] = {}
    encoder: dict[str, Tensor] = {}
    for name, tensor in items:
        for pattern, ours in _NAMES:
            name, count = re.subn(rf"^{pattern}", ours, name)
            if count:
                own[name] = tensor
                break
        else:
            encoder[name.removeprefix("encoder.")] = tensor
    if encoder:
        # The form of the names is known by a final norm too.
        whole = encoder | {f"norm.{n}": own[f"norm.{n}"] for n in ("weight", "bias")}
        of_student = dict(translate(detect(whole), encoder.items()))
        own |= {f"student.{name}": tensor for name, tensor in of_student.items()}
    return own


def _student(config: dict, embed_dim: int, num_heads: tuple[int, ...], rule: str) -> SwinV2:
    windows = tuple(config["window_size"])
    return SwinV2(
        embed_dim,
        tuple(config["depths"]),
        num_heads,
        window_size=windows[0],
        pretrained_window_sizes=tuple(config["pretrain_window_size"]),
        patch_size=PATCH,
        size_rule="pad",
        window_rule=rule,
        shift_stages=tuple(config["use_shift"]),
        stage_windows=windows,
        norm_eps=1e-6,
        initialization="none",
    )


def _part(tensors: Tensors, prefix: str) -> list[tuple[str, Tensor]]:
    """The tensors of a prefix, without it and without tables of positions."""
    return [
        (name.removeprefix(prefix), tensor)
        for name, tensor in tensors.items()
        if name.startswith(prefix) and "relative_" not in name and "attn_mask" not in name
    ]


def check_depth_mim(spec: dict, tensors: Tensors, dtype: torch.dtype) -> list[Row]:
    """Maps on the way, depths, losses, gradients and running statistics."""
    config, errors = spec["config"], Errors(spec, tensors)
    heads, max_depth = tuple(spec["num_heads"]), config["max_depth"]
    width = spec["embed_dim"]
    student = _student(config, width, heads, spec["window_rule"])
    task = Depth(student, max_depth=max_depth, width=width)
    task.head = MimHead(
        student.width,
        width,
        student.stride,
        filters=config["num_filters"],
        kernels=config["deconv_kernels"],
    )
    held = renamed(_part(tensors, "weights.")) | renamed(_part(tensors, "buffers."))
    task.load_state_dict(held, strict=True)
    task.to(dtype)
    pixels, truth = tensors["input"].to(dtype), tensors["depth"].to(dtype)
    seen: dict[str, Tensor] = {}

    def watch(label: str, module: nn.Module) -> None:
        module.register_forward_hook(lambda _m, _i, out: seen.update({label: out}))

    watch("encoder", task.norm)
    watch("deconv", task.head.deconvolutions)
    watch("conv", task.head.convolution)
    task.head.last.register_forward_pre_hook(lambda _m, given: seen.update(decoder_0=given[0][:1]))
    for mode in ("eval", "train"):
        task.train(mode == "train")
        depth = task(pixels=pixels)
        errors.out(f"out.{mode}.depth", depth)
        if mode == "eval":
            for label, got in seen.items():
                errors.out(f"out.eval.{label}", got)
            log_depth = depth.log()
            loss = silog_loss(log_depth, truth, mean_share=0.85)
            errors.out("out.eval.loss_lambda_085", loss)
            pairs = zip(log_depth.split(1), truth.split(1), strict=True)
            losses = torch.stack([silog_loss(*pair, over="image") for pair in pairs])
            errors.out("out.eval.loss_per_image", losses)
        for norm in task.modules():
            if hasattr(norm, "forget"):
                norm.forget()
        loss, _ = task(pixels=pixels, depths=truth)
        errors.out(f"out.{mode}.loss", loss)
    loss.backward()
    gradients = {name: p.grad for name, p in task.named_parameters()}
    for name, expected in renamed(_part(tensors, "grad.")).items():
        errors.gradient(name, gradients[name], expected)
    move_statistics(task)
    statistics = dict(task.named_buffers())
    for label, expected in tensors.items():
        if label.startswith("out.train.") and "running_" in label:
            (name,) = renamed([(label.removeprefix("out.train."), expected)])
            errors.out(label, statistics[name])
    return errors.rows


def check_depth_optim_groups(spec: dict, tensors: Tensors, dtype: torch.dtype) -> list[Row]:
    """Weight decay and factor of the learning rate of every parameter."""
    config, published = spec["config"], spec["parameters"]
    # Numbers in the order of the file stand in for tensors, which translation only hands on.
    marks = {name: torch.tensor(float(i)) for i, name in enumerate(published)}
    names = {
        own: list(published.values())[int(mark)] for own, mark in renamed(marks.items()).items()
    }
    depths = tuple(config["depths"])
    with torch.device("meta"):
        student = SwinV2(8, depths, (1,) * len(depths), window_size=4, size_rule="pad")
        task = Depth(student, width=8)
    exempt, held = task.no_weight_decay(), dict(task.named_parameters())
    missing, wrong, worst = len(names.keys() ^ held.keys()), 0, 0.0
    for name, (_, decay, scale) in names.items():
        if name in held:
            own = config["weight_decay"] if decays(name, held[name].ndim, *exempt) else 0.0
            wrong += own != decay
            worst = max(worst, abs(task.layer_scale(name, config["layer_decay"]) / scale - 1))
    return [
        Row("names", float(missing), 0.0),
        Row(f"weight decay of {len(names)}", float(wrong), 0.0),
        Row("factors of the learning rate", worst, 1e-12),
    ]


CHECKS = {
    "depth_mim": check_depth_mim,
    "depth_optim_groups": check_depth_optim_groups,
    "depth_metrics": check_metrics,
    "depth_tta": check_tta,
}
