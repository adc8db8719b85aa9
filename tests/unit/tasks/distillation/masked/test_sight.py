"""What a student sees of hidden patches, and that a step is the same however it is divided."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fd_large.backbones.feature_map import FeatureMap
from fd_large.backbones.statistics import IMAGENET, normalise
from fd_large.backbones.swinv2.swinv2 import SwinV2
from fd_large.backbones.vit.vit import ViT
from fd_large.data.loader import Batch
from fd_large.engine.forward_backward import arguments_of_step
from fd_large.engine.frozen import Frozen
from fd_large.tasks.distillation.job import KNOWN, composed, sight_of
from fd_large.tasks.distillation.objective import make_target
from fd_large.tasks.distillation.section import FIXED, Mask, Weighting

SIZE, GRID = 32, (8, 8)
IMAGES = torch.randint(
    0, 256, (8, 3, SIZE, SIZE), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
)
DECODER = {"decoder_width": 16, "decoder_depth": 1, "decoder_heads": 2}
# Ten tries for rectangles of at least 12 patches often fall short of 26.
BLOCKS = Mask(sampler="block", min_patches=12)
DROPPED = {"sampler": "random", "ratio": 0.75, "student": "dropped"}
MASKS = {
    "blocks": BLOCKS,
    "blocks cls": Mask(sampler="block", min_patches=12, cls=True),
    "blocks of images": Mask(sampler="block", min_patches=12, reduce="image"),
    "ratios": Mask(sampler="random", ratio=0.1, ratio_to=0.5, share=0.6),
    "exact": Mask(sampler="block_exact", min_patches=12, tokens="all"),
    "visible": Mask(**DROPPED, tokens="visible", cls=True),
    "decoder": Mask(**DROPPED, **DECODER),
}


def vit(width: int, seed: int, **options: Any) -> ViT:
    torch.manual_seed(seed)
    return ViT(width, 2, 2, patch_size=4, image_size=SIZE, **options)


def student(seed: int = 0, **options: Any) -> ViT:
    own = {"relative_position": "shared", "qkv_bias": "qv", "drop_path_rate": 0.3, **options}
    return vit(16, seed, **own)


def test_the_log_says_how_many_patches_are_hidden():
    sight = sight_of(MASKS["visible"], student(), SIZE)
    assert f"random, 48 of {GRID[0] * GRID[1]} patches" in sight.description
    assert not sight_of(Mask(), student(), SIZE).description


class Stored:
    """A teacher without a model, whose maps come with the images."""

    width = 12

    def __call__(self, images: torch.Tensor) -> FeatureMap:
        raise AssertionError("there is no model")

    def of_stored(self, images: torch.Tensor, stored: torch.Tensor) -> FeatureMap:
        return FeatureMap(stored, GRID, 1)


def made(mask: Mask, *options: str, net: Any = None):
    """A masked task with the options of a name."""
    net = net or student()
    sight = sight_of(mask, net, SIZE)
    teachers: dict[str, Any] = {"a": Frozen(vit(12, 10), IMAGENET)}
    torch.manual_seed(1)
    width, normaliser = sight.width(net), "batch" if "batch" in options else "whitening"
    # The summary first: an image has the same weight whichever target is asked for it.
    of_a = {"teacher": "a", "normaliser": normaliser, "known": KNOWN, "with_prefix": False}
    targets = [make_target(width, 12, **of_a)]
    if "summary" in options:
        targets.insert(0, make_target(width, 12, kind="summary", **{**of_a, "loss": "cosine"}))
    if "stored" in options:
        teachers["b"] = Stored()
        targets.append(make_target(width, 12, teacher="b", loss="0.5 cosine + 0.5 l1", known=KNOWN))
    weighting = Weighting(rule="drop") if "drop" in options else FIXED
    return composed(net, teachers, targets, weighting=weighting, sight=sight).train()


def step(task, count: int):
    """Loss and gradients of a step in so many micro batches."""
    maps = Frozen(vit(12, 11), IMAGENET)(IMAGES).tokens
    batches = [
        Batch(IMAGES[at], 1, at, at, targets={"b": maps[at]})
        for at in torch.arange(len(IMAGES)).chunk(count)
    ]
    task.before_step(0.0)
    total = 0.0
    for arguments in arguments_of_step(task, task, batches, seed=3, count=count):
        loss, _ = task(**arguments)
        (loss / count).backward()
        total += loss.item() / count
    task.after_step()
    return total, {name: one.grad for name, one in task.named_parameters()}


@pytest.mark.parametrize("options", [(), ("summary", "stored", "batch", "drop")], ids=" ".join)
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_a_step_is_the_same_in_any_number_of_micro_batches(mask, options):
    results = [step(made(mask, *options), count) for count in (1, 2, 4)]
    (loss, first), *others = results
    assert [name for name, gradient in first.items() if gradient is None] == []
    size = torch.cat([gradient.flatten() for gradient in first.values()]).norm()
    for other, gradients in others:
        assert other == pytest.approx(loss, rel=1e-6)
        assert all((gradients[name] - first[name]).norm() <= 1e-5 * size for name in first)


def test_rectangles_hide_different_numbers_so_that_means_of_micro_batches_would_differ():
    task = made(BLOCKS)
    counts = task.draws(3, 1, torch.arange(8))["mask"].sum(0)
    assert counts[:4].sum() != counts[4:].sum()
    assert task.parts == (task.sight,)
    assert made(MASKS["exact"]).parts == ()


def test_nothing_hidden_and_all_tokens_are_the_loss_without_a_mask_to_the_bit():
    plain = made(Mask())
    loss, gradients = step(plain, 1)
    task = made(Mask(sampler="block", tokens="all", cls=True))
    task.sight.draws = lambda *_: {"mask": torch.zeros(64, len(IMAGES), dtype=torch.bool)}
    found, ours = step(task, 1)
    assert found == loss
    assert all(torch.equal(ours[name], gradients[name]) for name in gradients)
    assert not ours["mask.token"].any()


@pytest.mark.parametrize("options", [(), ("stored", "drop")], ids=" ".join)
def test_a_step_that_hides_nothing_has_no_loss(options):
    task = made(BLOCKS, *options)
    task.sight.draws = lambda *draw: {"mask": torch.zeros(64, len(draw[2]), dtype=torch.bool)}
    loss, gradients = step(task, 2)
    assert loss == 0
    assert not any(gradient.any() for gradient in gradients.values())


@pytest.mark.parametrize("mask", [BLOCKS, MASKS["visible"], MASKS["decoder"]])
def test_evaluation_sees_whole_images(mask):
    task = made(mask).eval()
    with torch.no_grad():
        prepared = task.prepare(IMAGES, None, None)
        loss, metrics = task(**prepared)
        seen = task.sight.see(task.student, prepared["pixels"], None, {})
        whole = task.student(prepared["pixels"])
    if not mask.decodes:
        assert torch.equal(seen.map.tokens, whole.tokens)
    assert seen.map.tokens.shape[:2] == whole.tokens.shape[:2]
    (target,) = task.targets
    plain = target.value(*target.compared(seen, prepared["maps"]["a"]))
    assert torch.equal(loss, plain)
    assert "cosine" in metrics


def test_only_masked_tokens_learn():
    """Projections of the others, and of CLS, have no gradient."""
    task = made(MASKS["blocks"], net=student(drop_path_rate=0.0))
    heard = []
    task.targets[0].head.register_forward_hook(lambda _m, _i, output: heard.append(output))
    drawn = task.draws(3, 1, torch.arange(8))
    loss, _ = task(**task.prepare(IMAGES, None, None, draws=drawn))
    (slope,) = torch.autograd.grad(loss, heard[0])
    assert torch.equal(slope.abs().sum(-1) > 0, drawn["mask"].T)


def test_the_student_does_not_see_what_is_hidden():
    """Other pixels under the mask change nothing that it gives."""
    other = torch.randint(0, 256, IMAGES.shape, dtype=torch.uint8)
    for mask in MASKS.values():
        task = made(mask, net=student(drop_path_rate=0.0))
        drawn = task.draws(3, 1, torch.arange(8))
        cells = drawn["mask"].T.unflatten(1, GRID)[:, None]
        hidden = cells.repeat_interleave(4, 2).repeat_interleave(4, 3)
        changed = torch.where(hidden, other, IMAGES)
        maps = [
            task.sight.see(task.student, normalise(images, IMAGENET), None, drawn).map.tokens
            for images in (IMAGES, changed)
        ]
        assert torch.equal(*maps)
        whole = task.student(normalise(IMAGES, IMAGENET)).tokens
        assert not torch.equal(maps[0], whole)


def test_a_swin_hides_all_patches_of_a_token_of_its_map():
    torch.manual_seed(0)
    net = SwinV2(8, (1, 1), (1, 2), window_size=4)
    task = made(Mask(sampler="random", ratio=0.5), net=net)
    shown = []
    net.patch_embed.register_forward_hook(lambda _m, _i, output: shown.append(output))
    drawn = task.draws(0, 0, torch.arange(8))
    heard = []
    hook = net.layers[0].register_forward_pre_hook(lambda _m, inputs: heard.append(inputs[0]))
    seen = task.sight.see(net, normalise(IMAGES, IMAGENET), None, drawn)
    hook.remove()
    assert seen.map.grid == (4, 4) == (GRID[0] // 2, GRID[1] // 2)
    tokens = heard[0][0] if isinstance(heard[0], tuple) else heard[0]
    is_token = (tokens == task.mask.token[0, 0]).all(-1)
    cells = drawn["mask"].T.unflatten(1, (4, 4)).repeat_interleave(2, 1).repeat_interleave(2, 2)
    assert torch.equal(is_token, cells)


@pytest.mark.parametrize("class_token", [True, False])
def test_a_summary_of_visible_patches_is_of_these_alone(class_token):
    net = student(class_token=class_token, drop_path_rate=0.0)
    task = made(MASKS["visible"], net=net)
    drawn = task.draws(3, 1, torch.arange(8))
    pixels = normalise(IMAGES, IMAGENET)
    seen = task.sight.see(net, pixels, None, drawn).map
    alone = net(pixels, None, drawn["visible"].T).tokens
    if class_token:
        assert torch.equal(seen.tokens[:, :1], alone[:, :1])
    else:
        assert torch.equal(seen.summary, alone.mean(1, keepdim=True))


@pytest.mark.parametrize("class_token", [True, False])
def test_a_summary_has_the_type_of_its_head(class_token):
    net = student(class_token=class_token, drop_path_rate=0.0, residual_dtype="float32")
    task = made(MASKS["visible"], "summary", net=net).bfloat16()
    loss, _ = task(**task.prepare(IMAGES, None, None, task.draws(3, 1, torch.arange(8))))
    assert loss.isfinite()


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_a_step_on_shapes_has_the_shapes_of_what_is_drawn(mask):
    """So that a plan counts visible patches alone."""
    task = made(mask)
    drawn, undrawn = (task.draws(0, 0, torch.arange(8)), task.sight.undrawn(IMAGES))
    outlines = [{n: (one.shape, one.dtype) for n, one in d.items()} for d in (drawn, undrawn)]
    assert outlines[0] == outlines[1]
    seen = []
    task.student.blocks[0].register_forward_hook(lambda _m, _i, output: seen.append(output.shape))
    task.shapes_only(Batch(IMAGES, 0, torch.arange(8), torch.arange(8))).backward()
    assert seen == [(8, 1 + (16 if mask.student == "dropped" else 64), 16)]
