"""Checks of oracle files of segmentation: heads, pyramids, tests, scores, groups and schedules."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable

import numpy as np
import torch
from oracles_models import GRADIENT_FACTOR, Row, Tensors, max_relative
from torch import Tensor, nn

from fd_large.backbones import batch_norm
from fd_large.backbones.translation import NOWHERE, our_name
from fd_large.backbones.vit.vit import ViT
from fd_large.engine.schedule import PolynomialSchedule, RiseAndFall, Schedule, StepSchedule
from fd_large.engine.zero.optimizer import decays
from fd_large.tasks.dense.pyramids import RescaledMaps
from fd_large.tasks.dense.stages import maps_of_blocks, strip
from fd_large.tasks.dense.windows import mean_of_windows, windows
from fd_large.tasks.segmentation.data.labels import class_labels
from fd_large.tasks.segmentation.heads.fcn_head import FcnHead
from fd_large.tasks.segmentation.heads.uper_head import UperHead
from fd_large.tasks.segmentation.loss import IGNORED, pixel_loss
from fd_large.tasks.segmentation.published import HEADS
from fd_large.tasks.segmentation.scores.areas import confusion, scores_of
from fd_large.tasks.segmentation.scores.views import averaged, resized
from fd_large.tasks.segmentation.task import Segmentation


def ours(name: str) -> str:
    """Our name of a parameter of a published model, or of a pyramid by itself."""
    name = re.sub(r"^upsample_", "neck.upsample_", re.sub(r"^fpn", "backbone.fpn", name))
    ours, _ = our_name(name, HEADS)
    return re.sub(r"^backbone\.", "student.", name) if ours == NOWHERE else ours


def _load(model: nn.Module, tensors: Tensors, dtype: torch.dtype) -> nn.Module:
    """Fills a model with the weights and running statistics of a file."""
    held = {
        ours(name.partition(".")[2]): tensor
        for name, tensor in tensors.items()
        if name.startswith(("weights.", "buffers.")) and "relative_position_index" not in name
    }
    model.load_state_dict(held, strict=True)
    # `to` keeps statistics in float32 at least.
    return model.to(dtype)


class Errors:
    """Rows of what is compared with a file, by the tolerances in its JSON."""

    def __init__(self, spec: dict, tensors: Tensors):
        self._tensors = tensors
        self._outputs = spec["suggested_tolerance_max_rel"]
        self._gradients = spec.get(
            "suggested_tolerance_gradients_max_rel", GRADIENT_FACTOR * self._outputs
        )
        self._loose = spec.get("ill_conditioned_gradients_not_in_worst_spread", {})
        self.rows: list[Row] = []

    def out(self, label: str, got: Tensor) -> None:
        self.add(label, got, self._tensors[label])

    def add(self, label: str, got: Tensor, expected: Tensor) -> None:
        """Adds what a file has elsewhere than in its tensors."""
        self.rows.append(
            Row(label, max_relative(got.detach().reshape(expected.shape), expected), self._outputs)
        )

    def gradients(self, named: Iterable[tuple[str, nn.Parameter]]) -> None:
        held = {n: p.grad for n, p in named}
        stored = {n: t for n, t in self._tensors.items() if n.startswith("grad.")}
        for label, expected in stored.items():
            self.gradient(label, held[ours(label.removeprefix("grad."))], expected)

    def gradient(self, label: str, got: Tensor | None, expected: Tensor) -> None:
        allowed = max(self._gradients, 8 * self._loose.get(label, 0.0))
        error = math.inf if got is None else max_relative(got, expected)
        self.rows.append(Row(label, error, allowed))

    def statistics(self, model: nn.Module, prefix: str) -> None:
        held = dict(model.named_buffers())
        for label in self._tensors:
            if label.startswith(prefix) and "running_" in label:
                self.out(label, held[ours(label.removeprefix(prefix))])


def move_statistics(model: nn.Module) -> None:
    batch_norm.move(batch_norm.norms_of(model))


class _Heads(nn.Module):
    def __init__(self, head: nn.Module, auxiliary: nn.Module):
        super().__init__()
        self.head, self.auxiliary = head, auxiliary


def check_upernet(spec: dict, tensors: Tensors, dtype: torch.dtype) -> list[Row]:
    """Both heads: maps on the way, logits, losses over all and over labelled pixels, gradients."""
    config, errors = spec["config"], Errors(spec, tensors)
    widths, classes = config["in_channels"], config["num_classes"]
    head = UperHead(widths, config["channels"], classes, pools=config["pool_scales"])
    auxiliary = FcnHead(widths[2], config["aux_channels"], classes)
    model = _load(_Heads(head, auxiliary), tensors, dtype)
    maps = [nn.Parameter(tensors[f"input.{i}"].to(dtype)) for i in range(len(widths))]
    labels = tensors["label"].long()
    labels = labels.masked_fill(labels == 255, IGNORED)
    seen: dict[str, Tensor] = {}
    watched = {"ppm": head.pooled, "fused": head.fused}
    for i in range(3):
        watched |= {f"lateral{i}": head.laterals[i], f"fpn{i}": head.outputs[i]}
    hooks = [
        module.register_forward_hook(lambda _m, _i, out, label=label: seen.update({label: out}))
        for label, module in watched.items()
    ]
    for mode in ("eval", "train"):
        model.train(mode == "train")
        logits, second = head(maps), auxiliary(maps[2])
        errors.out(f"out.{mode}.logits", logits)
        errors.out(f"out.{mode}.aux_logits", second)
        losses = (pixel_loss(logits, labels), 0.4 * pixel_loss(second, labels))
        for label, loss in zip(("loss", "aux_loss"), losses, strict=True):
            errors.out(f"out.{mode}.{label}", loss)
        if mode == "eval":
            for label, got in seen.items():
                errors.out(f"out.eval.{label}", got)
            whole = resized(logits, labels.shape[-2:])
            errors.out("out.eval.resized_logits_0", whole[:1])
            counts = confusion(whole.argmax(1), labels, classes).numpy()
            errors.out("out.eval.acc_seg", torch.tensor(scores_of(counts).a_acc))
            for label, own, weight in (("loss", logits, 1.0), ("aux_loss", second, 0.4)):
                loss = weight * pixel_loss(own, labels, over="labelled")
                errors.out(f"out.eval.{label}_avg_non_ignore", loss)
    for x in maps:
        x.grad = None
    sum(losses).backward()
    inputs = {f"input.{i}": x for i, x in enumerate(maps)}
    errors.gradients([*model.named_parameters(), *inputs.items()])
    move_statistics(model)
    errors.statistics(model, "out.train.")
    for hook in hooks:
        hook.remove()
    return errors.rows


class _Necked(nn.Module):
    def __init__(self, neck: nn.Module):
        super().__init__()
        self.neck = neck


def check_vit_pyramid(spec: dict, tensors: Tensors, dtype: torch.dtype) -> list[Row]:
    """The rescaled maps, their gradients, and those of what they are made of."""
    config, errors = spec["config"], Errors(spec, tensors)
    scales = config["rescales"]
    model = _load(_Necked(RescaledMaps(config["embed_dim"], scales)), tensors, dtype)
    inputs = [nn.Parameter(tensors[f"input.{i}"].to(dtype)) for i in range(len(scales))]
    for mode in ("eval", "train"):
        model.train(mode == "train")
        outputs = model.neck([x.permute(0, 2, 3, 1) for x in inputs])
        for i, out in enumerate(outputs):
            errors.out(f"out.{mode}.{i}", out)
    _weighted(outputs, tensors).backward()
    named = {f"input.{i}": x for i, x in enumerate(inputs)}
    errors.gradients([*model.named_parameters(), *named.items()])
    move_statistics(model)
    errors.statistics(model, "out.train.")
    return errors.rows


def _weighted(outputs: list[Tensor], tensors: Tensors) -> Tensor:
    return sum((out * tensors[f"cotangent.{i}"].to(out)).sum() for i, out in enumerate(outputs))


class _Plain(nn.Module):
    """A ViT under its own names, and its neck."""

    def __init__(self, student: nn.Module, neck: nn.Module):
        super().__init__()
        self.neck = neck
        for name, module in student.named_children():
            self.add_module(name, module)
        for name, parameter in student.named_parameters(recurse=False):
            self.register_parameter(name, parameter)


def check_beit_backbone(spec: dict, tensors: Tensors, dtype: torch.dtype) -> list[Row]:
    """A ViT's blocks into the rescaled maps."""
    config, errors = spec["config"], Errors(spec, tensors)
    if config["use_rel_pos_bias"] and config["use_shared_rel_pos_bias"]:
        raise ValueError("two kinds of position tables at once are not known to this check")
    relative = "block" if config["use_rel_pos_bias"] else "none"
    if config["use_shared_rel_pos_bias"]:
        relative = "shared"
    vit = ViT(
        config["embed_dim"],
        config["depth"],
        config["num_heads"],
        patch_size=config["patch"],
        image_size=tuple(config["image"]),
        mlp_ratio=config["mlp_ratio"],
        absolute_position=config["use_abs_pos_emb"],
        relative_position=relative,
        layer_scale=config["init_values"] or 0.0,
        qkv_bias="qv",
        initialization="none",
    )
    strip(vit, windowed=False)
    neck = RescaledMaps(config["embed_dim"], config.get("rescales", (4, 2, 1, 0.5)))
    model = _load(_Plain(vit, neck), tensors, dtype)
    for name, parameter in model.named_parameters(recurse=False):
        setattr(vit, name, parameter)
    pixels = nn.Parameter(tensors["input"].to(dtype))
    for mode in ("eval", "train"):
        model.train(mode == "train")
        outputs = neck(maps_of_blocks(vit, pixels, None, config["out_indices"]))
        for i, out in enumerate(outputs):
            errors.out(f"out.{mode}.{i}", out)
        if mode == "eval":
            for i, tokens in enumerate(vit.after_blocks(pixels)):
                if f"out.eval.block{i}" in tensors:
                    errors.out(f"out.eval.block{i}", tokens)
    _weighted(outputs, tensors).backward()
    errors.gradients([*model.named_parameters(), ("input", pixels)])
    return errors.rows


def check_iou(spec: dict, tensors: Tensors, dtype: torch.dtype) -> list[Row]:
    """Labels from files, areas of every image and of all, and the scores."""
    classes, images = spec["config"]["num_classes"], len(spec["config"]["sizes"])
    reduces = spec["config"].get("reduce_zero_label", True)
    rows: list[Row] = []

    def same(label: str, got: np.ndarray, tolerance: float = 0.0) -> None:
        expected = tensors[label].numpy().astype(np.float64)
        wrong = np.isnan(got) != np.isnan(expected)
        error = np.nan_to_num(np.abs(got - expected)).max() if not wrong.any() else math.inf
        rows.append(Row(label, float(error), tolerance))

    total = np.zeros((classes, classes), np.int64)
    for i in range(images):
        labels = class_labels(
            tensors[f"raw.{i}"].numpy(),
            num_classes=classes,
            ignore_value=255,
            reduce_zero_label=reduces,
            where=f"raw.{i}",
        )
        same(f"label.{i}", np.where(labels == IGNORED, 255, labels))
        predicted = tensors[f"pred.{i}"]
        counts = confusion(predicted, torch.from_numpy(labels), classes).numpy()
        _areas(same, str(i), "out.area_{}." + str(i), counts)
        total += counts
    _areas(same, "total", "out.total_{}", total)
    scores = scores_of(total)
    same("out.iou", scores.iou / 100, 1e-7)
    same("out.acc", scores.acc / 100, 1e-7)
    numbers = scores.numbers()
    for name, expected in spec["scores_unrounded_percent"].items():
        # The official areas are float32.
        rows.append(Row(name, abs(numbers[name] - expected) / expected, 1e-6))
    for name, got in numbers.items():
        rows.append(
            Row(f"{name} as reported", abs(round(got, 2) - spec["scores_as_reported"][name]), 1e-9)
        )
    return rows


def _areas(same, name: str, label: str, counts: np.ndarray) -> None:
    right, of_labels, of_predictions = np.diagonal(counts), counts.sum(1), counts.sum(0)
    same(label.format("intersect"), right)
    same(label.format("label"), of_labels)
    same(label.format("pred"), of_predictions)
    same(label.format("union"), of_labels + of_predictions - right)


def check_slide(spec: dict, tensors: Tensors, dtype: torch.dtype) -> list[Row]:
    """Windows, how many cover a pixel, and averaged logits of a toy network."""
    toy, rows = spec["toy_network"], []
    a, b, c = (torch.tensor(toy[key], dtype=dtype)[:, None, None] for key in "abc")

    def logits_of(crops: Tensor) -> Tensor:
        height, width = crops.shape[-2:]
        y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
        return a * crops.mean(1, keepdim=True) + b * y.to(dtype) + c * x.to(dtype)

    for i, case in enumerate(spec["config"]["cases"]):
        image, crop, stride = tensors[f"input.{i}"].to(dtype), case["crop"], case["stride"]
        places = windows(tuple(case["image"]), tuple(crop), tuple(stride))
        stored = [tuple(window) for window in spec["windows_y1_x1_y2_x2"][str(i)]]
        rows.append(Row(f"windows {i}", float(places != stored), 0.0))
        count = torch.zeros(image.shape[-2:])
        for top, left, bottom, right in places:
            count[top:bottom, left:right] += 1
        rows.append(Row(f"count.{i}", max_relative(count, tensors[f"count.{i}"]), 0.0))
        for at_once in (1, 3):
            got = mean_of_windows(image, logits_of, places, at_once=at_once)
            label = f"out.logits.{i}"
            error = max_relative(got, tensors[label])
            rows.append(
                Row(f"{label}, {at_once} at once", error, spec["suggested_tolerance_max_rel"])
            )
    return rows


def check_tta(spec: dict, tensors: Tensors, dtype: torch.dtype) -> list[Row]:
    """Logits of several views, resized and averaged as probabilities."""
    size, rows, views = tuple(spec["config"]["ori_shape"]), [], []
    for label, logits in tensors.items():
        if label.startswith("input."):
            mirrored = label.endswith(".flip")
            views.append((logits.to(dtype), mirrored))
            own = resized(logits.to(dtype).flip(-1) if mirrored else logits.to(dtype), size)
            name = label.replace("input.", "out.logits.")
            expected = tensors[name]
            error = max_relative(own.reshape(expected.shape), expected)
            rows.append(Row(name, error, spec["suggested_tolerance_max_rel"]))
    predicted = averaged(views, size).argmax(1)
    wrong = (predicted.reshape(-1) != tensors["out.pred"].reshape(-1)).sum().item()
    rows.append(Row("out.pred", float(wrong), 0.0))
    return rows


def check_optim_groups(spec: dict, tensors: Tensors, dtype: torch.dtype) -> list[Row]:
    """Layer, decay and factor of the learning rate of every parameter."""
    config, published = spec["config"], spec["parameters"]
    names = {ours(name): values for name, values in published.items()}
    has = {name.partition("backbone.")[2] for name in published if name.startswith("backbone.")}
    with torch.device("meta"):
        vit = ViT(
            32,
            config["depth"],
            2,
            patch_size=16,
            image_size=32,
            absolute_position="pos_embed" in has,
            class_token="cls_token" in has,
            relative_position=_tables(has),
            layer_scale=0.1 if "blocks.0.gamma_1" in has else 0.0,
            qkv_bias="qv" if "blocks.0.attn.q_bias" in has else "fused",
        )
        task = Segmentation(vit, 7, width=8)
    exempt, rates, held = (
        task.no_weight_decay(),
        config["layer_decay"],
        dict(task.named_parameters()),
    )
    missing = len(names.keys() ^ held.keys())
    wrong = 0
    worst = 0.0
    for name, (_, decay, scale) in names.items():
        if name in held:
            own = config["weight_decay"] if decays(name, held[name].ndim, *exempt) else 0.0
            wrong += own != decay
            worst = max(worst, abs(task.layer_scale(name, rates) / scale - 1))
    return [
        Row("names", float(missing), 0.0),
        Row(f"weight decay of {len(names)}", float(wrong), 0.0),
        Row("factors of the learning rate", worst, 1e-12),
    ]


def _tables(names: set[str]) -> str:
    if "rel_pos_bias.relative_position_bias_table" in names:
        return "shared"
    return "block" if "blocks.0.attn.relative_position_bias_table" in names else "none"


def check_dense_schedule(spec: dict, tensors: Tensors, dtype: torch.dtype) -> list[Row]:
    """The learning rates of every schedule at every stored step."""
    rows = []
    for number, case in enumerate(spec["cases"]):
        schedule, scales = _schedule(case)
        worst = 0.0
        for step, rates in case["lr_used"].items():
            for scale, expected in zip(scales, rates, strict=True):
                got = schedule.scaled_at(int(step), scale)
                least = 1e-6 * scale * schedule.peak
                worst = max(worst, abs(got - expected) / max(abs(expected), least))
        rows.append(Row(f"{case['kind']} {number}", worst, spec["tolerance_relative"]))
    return rows


def _schedule(case: dict) -> tuple[Schedule, list[float]]:
    """The schedule of a case, and the factor of each group's learning rates."""
    if case["kind"] == "mim":
        warmup = case["epochs"] // 2 * case["iters"]
        total = case["epochs"] * case["iters"]
        low = case["min_lr"]
        return RiseAndFall(case["max_lr"], low, low, total, warmup), case["scales"]
    peak, total = case["lrs"][0], case["total"]
    numbers = peak, peak * case["ratio"], case.get("min_lr", 0.0), total, case["warmup"]
    schedule: Schedule
    if case["kind"] == "old_step":
        assert case["gamma"] == 0.1
        schedule = StepSchedule(*numbers, drops=tuple(step / total for step in case["steps"]))
    else:
        assert case["kind"] in ("old_poly", "new_poly")
        late = case["kind"] == "new_poly"
        schedule = PolynomialSchedule(*numbers, power=case["power"], after_warmup=late)
    return schedule, [rate / peak for rate in case["lrs"]]


CHECKS = {
    "seg_upernet": check_upernet,
    "seg_vit_pyramid": check_vit_pyramid,
    "seg_beit_backbone": check_beit_backbone,
    "seg_iou": check_iou,
    "seg_slide": check_slide,
    "seg_tta": check_tta,
    "seg_optim_groups": check_optim_groups,
    "dense_schedule": check_dense_schedule,
}
