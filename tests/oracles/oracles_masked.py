"""Checks of oracle files of masked distillation: masks, losses, targets, students and trainings."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from oracles_dense import Errors
from oracles_models import Row, Skipped, Tensors, load
from torch import Tensor, nn

from fd_large.backbones.feature_map import FeatureMap
from fd_large.backbones.vit.vit import ViT
from fd_large.tasks.distillation.job import KNOWN
from fd_large.tasks.distillation.masked.samplers import block_mask, hidden, masks, random_masks
from fd_large.tasks.distillation.masked.sight import Counted, Masked
from fd_large.tasks.distillation.objective import make_target
from fd_large.tasks.distillation.section import Mask
from fd_large.tasks.distillation.task import Comparison, Seen

NOT_YET_PARTS = {
    "target_clip": "the projection of a map: the engine learns the tokens before it",
    "train_eva": "stop_grad_conv1, which the check puts in itself",
    "student_maskalign": "several levels and their fusion, which the check computes itself",
}
NOT_YET = {
    "mask_attention": "no sampler reads the teacher's attention",
    "mask_collate": "ratios stratified over a rank's batch (DINOv2): here each image draws alone",
    "mask_ibot": "iBOT's order of draws: here a ratio is a function of (seed, epoch, position)",
    "student_milan": "MILAN's prompting decoder",
}
_DEVIATIONS = 5


# --- masks ---


def _deviations(found: np.ndarray, mean: float, deviation: float, draws: int) -> float:
    """How many standard errors the means of two samples lie apart."""
    error = np.hypot(found.std() / len(found) ** 0.5, deviation / draws**0.5)
    return abs(found.mean() - mean) / max(error, 1e-9)


def check_mask_blockwise(spec: dict, tensors: Tensors, dtype: torch.dtype) -> list[Row] | Skipped:
    """The official masks in the official order of draws, and the contract for our own."""
    config, statistics = spec["config"], spec["statistics"]
    if config["code"] == "dinov2" or config["min_aspect"] != 0.3 or "max_num_patches" in config:
        return Skipped("not yet", "blocks of a largest size, or of other aspects")
    grid, number = tuple(config["grid"]), config["num_masking_patches"]
    least, exact = config["min_num_patches"], config["code"] == "beit2"
    rows = []
    for seed, expected in zip(config["seeds"], tensors["out.masks"].bool(), strict=True):
        draw = random.Random(seed)
        for number_of, one in enumerate(expected):
            found = block_mask(draw, grid, number, min_patches=least)
            wrong = (
                (found & ~one.numpy().reshape(-1)).sum()
                if exact
                else (found != one.numpy().reshape(-1)).sum()
            )
            rows.append(Row(f"masks of {seed}, {number_of}", float(wrong), 0.0))
    ratio = number / (grid[0] * grid[1])
    own = Mask(sampler="block_exact" if exact else "block", ratio=ratio, min_patches=least)
    drawn = masks(own, grid, spec["provenance"]["seed"], 0, np.arange(4000)).reshape(-1, *grid)
    counts = drawn.sum((1, 2))
    pairs = (drawn[:, 1:] & drawn[:, :-1]).sum((1, 2)) + (drawn[..., 1:] & drawn[..., :-1]).sum(
        (1, 2)
    )
    rows.append(Row("most", float(max(counts.max() - statistics["count_max"], 0)), 0.0))
    for name, values in (("count", counts), ("neighbour_pairs_per_masked", pairs / counts)):
        apart = _deviations(
            values,
            statistics[f"{name}_mean"],
            statistics[f"{name}_std"],
            statistics["draws"],
        )
        rows.append(Row(f"{name}, beyond five standard errors", max(apart - _DEVIATIONS, 0), 0.0))
    frequency = tensors["out.frequency"].double().numpy()
    both = (frequency + drawn.mean(0)) / 2
    error = np.sqrt(both * (1 - both) * (1 / len(drawn) + 1 / statistics["draws"]))
    apart = np.abs(drawn.mean(0) - frequency) / error
    beyond = max(float(apart.max()) - _DEVIATIONS, 0)
    rows.append(Row("frequency, beyond five standard errors", beyond, 0.0))
    return rows


def check_mask_random(spec: dict, tensors: Tensors, dtype: torch.dtype) -> list[Row]:
    """The tokens that are kept, their order, and the way back."""
    config, noise = spec["config"], tensors["input.noise"].double().numpy()
    rows = []
    for case, ratio in enumerate(config["ratios"]):
        number = hidden(Mask(sampler="random", ratio=ratio), (1, config["tokens"]))
        found = torch.from_numpy(random_masks(noise, number))
        differ = (found != tensors[f"out.mask.{case}"].bool()).sum().item()
        rows.append(Row(f"mask {ratio}", float(differ), 0.0))
        kept = tensors[f"out.kept_tokens.{case}"].sort(1).values
        ours = (~found).nonzero()[:, 1].view(len(found), -1)
        rows.append(Row(f"kept {ratio}", float((kept != ours).sum()), 0.0))
    return rows


# --- losses ---


def _counted(target: Any, pred: Tensor, tokens: Tensor, mask: Tensor, **own: Any) -> Counted:
    numbers = {"of_images": mask.sum(1), "number": mask.sum(), "micro_batches": 1, **own}
    return Counted(Comparison(target, pred, tokens), mask, **numbers)


def check_loss_masked(spec: dict, tensors: Tensors, dtype: torch.dtype) -> list[Row]:
    """All masked tokens alike: of the whole, of parts by themselves, and of parts of a step."""
    config, errors = spec["config"], Errors(spec, tensors)
    cosine = config["code"] in ("eva", "negcosine")
    target = make_target(
        1,
        config["dim"],
        loss="cosine" if cosine else "smooth_l1",
        beta=config.get("beta", 2.0),
        normaliser="whitening" if config.get("normalise_target") else "none",
        whitening_eps=config.get("normalise_eps", 1e-5),
        known=KNOWN,
    )
    pred = nn.Parameter(tensors["input.pred"].to(dtype))
    tokens, mask = tensors["input.target"].to(dtype), tensors["input.mask"].bool()
    # The engine's is one minus the cosine, EVA's minus the cosine.
    less = 1.0 if config["code"] == "eva" else 0.0

    def value(at: Any, **own: Any) -> Tensor:
        return _counted(target, pred[at], tokens[at], mask[at], **own).value() - less

    whole = value(slice(None))
    (slope,) = torch.autograd.grad(whole, pred)
    parts = list(torch.arange(len(mask)).chunk(2))
    found = {
        "out.loss": whole,
        "out.loss_of_halves": torch.stack([value(part) for part in parts]),
        "out.loss_of_images": torch.stack([value([image]) for image in range(len(mask))]),
    }
    for label, got in found.items():
        error = (got.detach().double() - tensors[label].double()).abs().max().item()
        errors.rows.append(Row(label, error, 1e-6))
    errors.gradient("grad.pred", slope, tensors["grad.pred"])
    step = torch.stack([value(part, number=mask.sum(), micro_batches=2) for part in parts]).mean()
    errors.rows.append(Row("halves of a step", (step - whole).abs().item(), 1e-6))
    return errors.rows


def check_loss_dbot(spec: dict, tensors: Tensors, dtype: torch.dtype) -> list[Row]:
    """The class token counts as a masked one does."""
    errors = Errors(spec, tensors)
    normaliser = "unbiased_whitening" if spec["config"]["norm_feature_loss"] else "none"
    target = make_target(1, spec["config"]["dim"], normaliser=normaliser, known=KNOWN)
    pred = nn.Parameter(tensors["input.pred"].to(dtype))
    tokens = tensors["input.target"].to(dtype)
    loss = _counted(target, pred, tokens, tensors["input.mask"].bool()).value()
    (slope,) = torch.autograd.grad(loss, pred)
    errors.out("out.loss", loss)
    errors.gradient("grad.pred", slope, tensors["grad.pred"])
    return errors.rows


class _CrossEntropy:
    """Stands for a target whose loss is that of prototypes, of which each token has its own."""

    loss: Any

    def __init__(self) -> None:
        self.loss = self

    def normalise(self, tokens: Tensor) -> Tensor:
        return tokens

    def per_token(self, projected: Tensor, tokens: Tensor) -> Tensor:
        return -(tokens * (projected / 0.1).log_softmax(-1)).sum(-1)


def check_loss_per_image(spec: dict, tensors: Tensors, dtype: torch.dtype) -> list[Row]:
    """The mean over the tokens of an image, and over all images; the loss itself is the file's."""
    errors, mask = Errors(spec, tensors), tensors["input.mask"].bool()
    student = nn.Parameter(tensors["input.student"].to(dtype))
    size = (*mask.shape, student.shape[-1])
    pred, tokens = torch.zeros(size, dtype=dtype), torch.zeros(size, dtype=dtype)
    pred[mask], tokens[mask] = student, tensors["input.teacher"].to(dtype)
    loss = _counted(_CrossEntropy(), pred, tokens, mask, number=None).value()
    (slope,) = torch.autograd.grad(loss, student)
    errors.out("out.loss", loss)
    errors.gradient("grad.student", slope, tensors["grad.student"])
    return errors.rows


# --- targets and students ---


def check_target_clip(spec: dict, tensors: Tensors, dtype: torch.dtype) -> list[Row] | Skipped:
    """The patches after the final norm, or before it; the file's projection is applied here."""
    config = spec["config"]
    if config["image"] != config["resolution"]:
        return Skipped("not yet", "positions of another size, resized by a factor")
    errors = Errors(spec, tensors)
    net = ViT(
        config["width"],
        config["depth"],
        config["heads"],
        patch_size=config["patch"],
        image_size=config["image"],
        pre_norm_layer=True,
        patch_bias=False,
        activation="quick_gelu",
        norm_eps=1e-5,
        initialization="none",
    )
    load(net, {n.replace("weights.", "weights.visual."): t for n, t in tensors.items()})
    net.to(dtype)
    images = tensors["input.images"].to(dtype)
    with torch.no_grad():
        tokens = net(images).tokens
        if config["code"] == "dbot_beit" and not config["post_patch_norm"]:
            *_, last = net.after_blocks(images)
            tokens = torch.cat([tokens[:, :1], last[:, 1:]], dim=1)
        first = 1 if config["code"] == "eva" else 0
        errors.out("out.target", tokens[:, first:] @ tensors["weights.proj"].to(dtype))
    return errors.rows


def _student(config: dict, tensors: Tensors, dtype: torch.dtype, **options: Any) -> ViT:
    """A ViT with the weights of a file that are its own."""
    net = ViT(
        config["width"],
        config["depth"],
        config["heads"],
        patch_size=config["patch"],
        image_size=config["image"],
        mlp_ratio=config["mlp_ratio"],
        initialization="none",
        **options,
    ).to(dtype)
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            parameter.copy_(tensors[f"weights.{name}"])
    return net


class _Parts(nn.Module):
    """Student, what the sight adds, and head, under the names of a file's code."""

    def __init__(self, sight: Masked, student: ViT, head: nn.Module) -> None:
        super().__init__()
        self.student, self.head = student, head
        for name, module in sight.modules().items():
            self.add_module(name, module)

    def named(self) -> dict[str, nn.Parameter]:
        return {_theirs(name): parameter for name, parameter in self.named_parameters()}


def _theirs(name: str) -> str:
    for ours, theirs in (
        ("student.", ""),
        ("mask.token", "mask_token"),
        ("decoder.mask_token.token", "mask_token"),
        ("decoder.", "decoder_"),
    ):
        if name.startswith(ours):
            return name.replace(ours, theirs, 1)
    return name


def _fill(parts: _Parts, tensors: Tensors, head: str) -> dict[str, nn.Parameter]:
    """Fills all parts from a file; returns its parameters by the file's names."""
    named = {
        name.replace("head.", f"{head}.", 1) if name.startswith("head.") else name: parameter
        for name, parameter in parts.named().items()
    }
    with torch.no_grad():
        for name, parameter in named.items():
            parameter.copy_(tensors[f"weights.{name}"])
    return named


def _eva(spec: dict, tensors: Tensors, dtype: torch.dtype) -> tuple[Any, ...]:
    """EVA's student around the engine's sight: parameters, and features and loss of a batch."""
    config = spec["config"]
    student = config["student"]
    if student["postnorm"]:
        raise ValueError("postnorm is not known to this check")
    relative = {"shared_rel_pos_bias": "shared", "rel_pos_bias": "block"}
    net = _student(
        student,
        tensors,
        dtype,
        absolute_position=student["abs_pos"],
        relative_position=next((r for name, r in relative.items() if student[name]), "none"),
        layer_scale=student["layer_scale"],
        qkv_bias="qv",
    )
    if student["stop_grad_conv1"]:
        net.patch_embed.register_forward_hook(lambda _m, _i, x: x.detach() * 0.9 + x * 0.1)
    mask = Mask(sampler="block", ratio=0.4)
    sight = Masked(mask, net, image_size=student["image"])
    head = nn.Linear(student["width"], config["teacher_dim"])
    parts = _Parts(sight, net, head).to(dtype)
    named = _fill(parts, tensors, "lm_head")
    target = make_target(
        student["width"], config["teacher_dim"], loss="cosine", normaliser="none", known=KNOWN
    )
    target.head = head

    def run(images: Tensor, hidden: Tensor, tokens: Tensor) -> tuple[Seen, Counted]:
        drawn = {"mask": hidden.bool().T}
        seen = sight.see(net, images.to(dtype), None, drawn)
        grid = FeatureMap(tokens.to(dtype), seen.map.grid, 0)
        compared = Comparison(target, *target.compared(seen, grid))
        return seen, sight.counted(compared, drawn)

    return named, run


def check_student_eva(spec: dict, tensors: Tensors, dtype: torch.dtype) -> list[Row]:
    """Features, predictions, loss and all gradients of a student with mask tokens."""
    errors, hidden = Errors(spec, tensors), tensors["input.mask"].bool()
    named, run = _eva(spec, tensors, dtype)
    images = nn.Parameter(tensors["input.images"].to(dtype))
    tokens = torch.zeros(*hidden.shape, spec["config"]["teacher_dim"])
    tokens[hidden] = tensors["input.target"]
    seen, counted = run(images, hidden, tokens)
    loss = counted.value() - 1
    loss.backward()
    errors.out("out.features", seen.map.tokens)
    errors.out("out.pred", counted.whole.projected[hidden])
    errors.rows.append(Row("out.loss", abs(loss.item() - tensors["out.loss"].item()), 1e-6))
    return _with_gradients(errors, tensors, {**named, "input": images})


def _with_gradients(errors: Errors, tensors: Tensors, named: dict[str, Tensor]) -> list[Row]:
    for label, expected in tensors.items():
        if label.startswith("grad."):
            errors.gradient(label, named[label.removeprefix("grad.")].grad, expected)
    return errors.rows


def _dbot(spec: dict, tensors: Tensors, dtype: torch.dtype) -> tuple[Any, ...]:
    """dBOT's student and decoder around the engine's sight; see `_eva`."""
    config = spec["config"]
    own = config["student"]
    net = _student(own, tensors, dtype)
    # The tables are fixed in the public code.
    net.pos_embed.requires_grad_(False)
    mask = Mask(
        sampler="random",
        ratio=config["mask_ratio"],
        student="dropped",
        cls=True,
        **{name: own[name] for name in ("decoder_width", "decoder_depth", "decoder_heads")},
    )
    sight = Masked(mask, net, image_size=own["image"])
    parts = _Parts(sight, net, nn.Linear(sight.width(net), own["width"])).to(dtype)
    named = _fill(parts, tensors, "decoder_predp")
    normaliser = "unbiased_whitening" if config["norm_feature_loss"] else "none"
    target = make_target(1, own["width"], normaliser=normaliser, known=KNOWN)
    target.head = parts.head

    def run(images: Tensor, noise: Tensor, tokens: Tensor) -> tuple[Any, ...]:
        drawn = _dropped(net, own["image"], noise, mask)
        seen = sight.see(net, images.to(dtype), None, drawn)
        map_ = FeatureMap(tokens.to(dtype), seen.map.grid, 1)
        counted = sight.counted(Comparison(target, *target.compared(seen, map_)), drawn)
        return drawn, counted

    return net, named, run


def _dropped(net: ViT, size: int, noise: Tensor, mask: Mask) -> dict[str, Tensor]:
    """What is drawn for given noise."""
    number = hidden(mask, net.grid(size, size))
    masked = torch.from_numpy(random_masks(noise.double().numpy(), number))
    visible = (~masked).nonzero()[:, 1].view(len(masked), -1)
    return {"mask": masked.T, "visible": visible.T}


def check_student_dbot(spec: dict, tensors: Tensors, dtype: torch.dtype) -> list[Row]:
    """Encoder on visible patches, decoder on all, loss and gradients."""
    errors = Errors(spec, tensors)
    net, named, run = _dbot(spec, tensors, dtype)
    images = nn.Parameter(tensors["input.images"].to(dtype))
    drawn, counted = run(images, tensors["input.noise"], tensors["input.target"])
    loss = counted.value()
    loss.backward()
    order = tensors["input.noise"].argsort(1)[:, : drawn["visible"].shape[0]]
    with torch.no_grad():
        latent = net(images, None, order).tokens
    errors.out("out.latent", latent)
    errors.out("out.pred", counted.whole.projected)
    errors.out("out.loss", loss)
    differ = (counted.counts != tensors["out.mask"].bool()).sum().item()
    errors.rows.append(Row("out.mask", float(differ), 0.0))
    return _with_gradients(errors, tensors, {**named, "input": images})


def check_student_maskalign(spec: dict, tensors: Tensors, dtype: torch.dtype) -> Any:
    """The encoder on visible patches, its blocks and their gradients, by the file's own levels."""
    config, errors = spec["config"], Errors(spec, tensors)
    if config["fusion_type"] != "linear" or config["target_norm"] != "whiten":
        return Skipped("not yet", "other fusions of levels, or targets of unit length")
    own = config["student"]
    net = _student(own, tensors, dtype)
    mask = Mask(
        sampler="random", ratio=config["mask_ratio"], student="dropped", tokens="visible", cls=True
    )
    order = tensors["input.noise"].argsort(1)
    drawn = _dropped(net, own["image"], tensors["input.noise"], mask)
    kept = order[:, : len(drawn["visible"])]
    differ = (kept.sort(1).values != drawn["visible"].T).sum() + (kept != tensors["out.kept"]).sum()
    errors.rows.append(Row("out.kept", float(differ), 0.0))
    blocks = torch.stack(list(net.after_blocks(tensors["input.images"].to(dtype), None, kept)))
    names = ["distill_weights"] + [
        f"distill_heads.{level}.{part}"
        for level in range(own["depth"])
        for part in ("weight", "bias")
    ]
    added = {name: nn.Parameter(tensors[f"weights.{name}"].to(dtype)) for name in names}
    fused = torch.einsum("ij,jbnc->ibnc", added["distill_weights"], blocks)
    target, losses = make_target(1, config["teacher_dim"], beta=1.0, known=KNOWN), []
    index = torch.cat([torch.zeros(len(kept), 1, dtype=torch.long), kept + 1], dim=1)
    for level, tokens in enumerate(fused):
        weight, bias = (added[f"distill_heads.{level}.{part}"] for part in ("weight", "bias"))
        student = nn.functional.linear(tokens, weight, bias)
        whole = tensors[f"input.teacher_hidden.{level + 1}"].to(dtype)
        teacher = whole.gather(1, index[..., None].expand(-1, -1, whole.shape[-1]))
        errors.out(f"out.student.{level}", student)
        errors.out(f"out.target.{level}", target.normalise(teacher))
        counts = torch.ones(student.shape[:2], dtype=torch.bool)
        losses.append(2 * _counted(target, student, teacher, counts, number=None).value())
    top = int(config["loss_weights"].removeprefix("top"))
    loss = torch.stack(losses[-top:]).mean()
    loss.backward()
    errors.out("out.loss", loss)
    return _with_gradients(errors, tensors, {**dict(net.named_parameters()), **added})


# --- trainings ---


def _trained(
    spec: dict, tensors: Tensors, named: dict[str, nn.Parameter], loss_of: Callable[[int], Tensor]
) -> list[Row]:
    """Steps of AdamW as the file's loop takes them, and the weights that they end with."""
    config, errors = spec["config"], Errors(spec, tensors)
    adam = dict(config["adamw"])
    decay = adam.pop("weight_decay")
    taught = {name: one for name, one in named.items() if one.requires_grad}
    groups = [
        {"params": [taught[name] for name in spec["decay"]], "weight_decay": decay},
        {"params": [taught[name] for name in spec["no_decay"]], "weight_decay": 0.0},
    ]
    assert len(taught) == len(spec["decay"]) + len(spec["no_decay"])
    optimizer = torch.optim.AdamW(groups, lr=0.0, foreach=False, **adam)
    losses, norms = [], []
    for step, rate in enumerate(config["lrs"]):
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.zero_grad()
        loss = loss_of(step)
        loss.backward()
        if step == 0:
            first = {name: one.grad.clone() for name, one in taught.items()}
        norms.append(nn.utils.clip_grad_norm_(taught.values(), config["clip"]).item())
        optimizer.step()
        losses.append(loss.item())
    apart = (torch.tensor(losses).double() - tensors["out.losses"]).abs().max().item()
    errors.rows.append(Row("losses", apart, 2e-6))
    ratio = torch.tensor(norms).double() / tensors["out.grad_norms"] - 1
    errors.rows.append(Row("norms", ratio.abs().max().item(), 1e-5))
    joined = [
        torch.cat([values[name].double().flatten() for name in taught])
        for values in (first, {n: tensors[f"first_step_grad.{n}"] for n in taught})
    ]
    errors.rows.append(
        Row("first gradient", ((joined[0] - joined[1]).norm() / joined[1].norm()).item(), 2e-5)
    )
    float64 = next(iter(taught.values())).dtype == torch.float64
    bound = 1e-6 if float64 else 8 * max(spec["final_float32_worst_absolute"].values())
    for name, one in taught.items():
        difference = (one.detach().double() - tensors[f"final.{name}"].double()).abs()
        if name.endswith("qkv.bias"):  # The gradient of keys is rounding alone.
            third = len(difference) // 3
            difference = torch.cat([difference[:third], difference[-third:]])
        errors.rows.append(Row(f"final.{name}", difference.max().item(), bound))
    return errors.rows


def check_train_eva(spec: dict, tensors: Tensors, dtype: torch.dtype) -> list[Row]:
    """Five steps of EVA's student."""
    named, run = _eva(spec, tensors, dtype)

    def loss_of(step: int) -> Tensor:
        batch = [
            tensors[f"input.{name}"][step % spec["config"]["batches"]]
            for name in ("images", "masks", "teacher_raw")
        ]
        return run(*batch)[1].value() - 1

    return _trained(spec, tensors, named, loss_of)


def check_train_dbot(spec: dict, tensors: Tensors, dtype: torch.dtype) -> list[Row]:
    """Five steps of dBOT's student and decoder."""
    _, named, run = _dbot(spec, tensors, dtype)

    def loss_of(step: int) -> Tensor:
        at = step % spec["config"]["batches"]
        images, tokens = tensors["input.images"][at], tensors["input.teacher_raw"][at]
        return run(images, tensors["input.noise"][step], tokens)[1].value()

    return _trained(spec, tensors, named, loss_of)


CHECKS = {
    "mask_blockwise": check_mask_blockwise,
    "mask_random": check_mask_random,
    "loss_masked": check_loss_masked,
    "loss_dbot": check_loss_dbot,
    "loss_per_image": check_loss_per_image,
    "target_clip": check_target_clip,
    "student_eva": check_student_eva,
    "student_dbot": check_student_dbot,
    "student_maskalign": check_student_maskalign,
    "train_eva": check_train_eva,
    "train_dbot": check_train_dbot,
}
