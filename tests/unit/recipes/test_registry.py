"""Runs of record: published settings, and what each docstring says."""

import pytest
import torch

from fd_large.engine.student import make_student
from fd_large.errors import ConfigError
from fd_large.recipes import registry
from fd_large.recipes.architectures import resolve
from fd_large.recipes.small_data import USUAL_IMAGES
from fd_large.tasks.distillation.masked.samplers import hidden

# Published: student, teacher, epochs, learning rates per 512 images, drop path, smallest crop.
VIT_RATES = (3e-4, 5e-7, 5e-6)
PAPER = {
    "fd_clip_vit_base": (
        "vit_base_patch16", "clip_vit_base_patch16", 300, VIT_RATES, 0.2, 0.08,
    ),
    "fd_clip_vit_base_100ep": (
        "vit_base_patch16", "clip_vit_base_patch16", 100, VIT_RATES, 0.1, 0.67,
    ),
    "fd_clip_vit_large": (
        "vit_large_patch14", "clip_vit_large_patch14", 300, VIT_RATES, 0.3, 0.08,
    ),
    "fd_dino_vit_base": (
        "vit_base_patch16", "dino_vit_base_patch16", 300, VIT_RATES, 0.3, 0.08,
    ),
    "fd_deit_vit_base": (
        "vit_base_patch16", "deit_vit_base_patch16", 300, VIT_RATES, 0.3, 0.08,
    ),
    "fd_esvit_swin_base": (
        "swinv2_base", "swin_base_esvit", 300, (2e-4, 1e-6, 1e-5), 0.3, 0.08,
    ),
}  # fmt: skip
# Epochs, warm-up, learning rate per 512 images, its start and end, layer decay, drop path.
FINE_TUNING = {
    "finetune_clip_vit_base": (100, 20, 1.25e-3, 2.5e-7, 0.60, 0.3),
    "finetune_clip_vit_base_100ep": (100, 20, 1.25e-3, 2.5e-7, 0.65, 0.1),
    "finetune_clip_vit_large": (50, 5, 2.5e-4, 5e-7, 0.75, 0.4),
    "finetune_dino_vit_base": (100, 20, 1.5e-3, 2.5e-7, 0.60, 0.2),
    "finetune_deit_vit_base": (100, 20, 1.25e-3, 2.5e-7, 0.65, 0.3),
    "finetune_esvit_swin_base": (100, 20, 1.25e-3, 2.5e-7, 0.80, 0.4),
}
# Recipes with several teachers: number of teachers, loss, head, epochs, warm-up, batch, peak of the
# learning rate, its end, weight decay.
TEACHERS = {
    "unic_vit_base": (
        4, "cls_and_patches", "ladder", 200, 10, 512, 6e-4, 1e-6, 0.03,
    ),
    "theia_vit_base": (
        3, "0.9 cosine_of_map + 0.1 smooth_l1", "convolutional", 50, 5, 128, 5e-4, 5e-4, 0.01,
    ),
    "sak_vit_base": (
        3, "0.9 cosine_of_map + 0.1 smooth_l1", "linear", 30, 2, 128, 1e-3, 1e-5, 0.01,
    ),
}  # fmt: skip
# Masked: sampler, hidden patches of a square grid of so many, what the student sees, whose loss
# counts, loss, normaliser, layer, epochs, warm-up, batch, peak of the learning rate, smallest crop.
MASKED = {
    "maskalign_vit_base": (
        "random", 138, 14, "dropped", "visible", "smooth_l1", "whitening", "before_norm",
        200, 20, 1024, 6e-4, 0.2,
    ),
    "maskdistill_vit_base": (
        "block", 78, 14, "token", "masked", "smooth_l1", "unbiased_whitening", "before_norm",
        300, 10, 2048, 1.5e-3, 0.2,
    ),
    "dbot_clip_vit_base": (
        "block", 78, 14, "token", "masked", "cosine", "none", "last",
        1600, 10, 4096, 3e-3, 0.4,
    ),
    "eva_vit_giant": (
        "block", 105, 16, "token", "masked", "cosine", "none", "last",
        150, 2, 4096, 1e-3, 0.2,
    ),
}  # fmt: skip
# Recipes of our own choice, which nobody has published.
AGGLOMERATIVE = (
    "agglomerative_vit_large",
    "agglomerative_swinv2_giant",
    "proxy_vit_giant",
    "proxy_vit_base",
)
# Fine-tuning of CLIP itself: epochs, warm-up, learning rate for 2048 images, layer decay.
PLAIN = {
    "finetune_clip_vit_base_plain": (50, 10, 6e-4, 0.60),
    "finetune_clip_vit_large_plain": (30, 5, 4e-4, 0.65),
}
# By other sources' settings: image size, epochs, warm-up, batch and the learning rates at it, layer
# decay, drop path: BEiTv2's three times, FD's Swin, SimMIM's, SwinV2's.
AFTER_22K = (20, 5, 1024, (7e-5, 0, 1e-6), 0.8, 0.25)
LARGER_FINE_TUNING = {
    "finetune_clip_vit_large_22k": (224, 90, 20, 4096, (6e-4, 0, 1e-6), 0.75, 0.2),
    "finetune_clip_vit_large_22k_1k": (224, *AFTER_22K),
    "finetune_clip_vit_large_22k_1k_336": (336, *AFTER_22K),
    "finetune_swinv2_base": (224, 100, 20, 1024, (2.5e-3, 5e-7, 5e-7), 0.8, 0.4),
    "finetune_swinv2_large": (224, 100, 20, 2048, (5e-3, 1e-6, 1e-6), 0.7, 0.2),
    "finetune_swinv2_giant": (640, 10, 1, 576, (2.1e-5, 2.8125e-7, 2.8125e-7), 0.87, 0.5),
}
# Peak learning rate at the batch of the source: ViTDet, CAE, Swin, Swin, SwinV2-G; the cascades
# ViTDet twice, Swin, SwinV2-L, SwinV2-G twice.
DETECTION = {
    "coco_mask_rcnn_vit_base": (1e-4, 64),
    "coco_mask_rcnn_vit_base_12ep": (3e-4, 32),
    "coco_mask_rcnn_swinv2_tiny": (1e-4, 16),
    "coco_mask_rcnn_swinv2_base": (1e-4, 16),
    "coco_mask_rcnn_swinv2_giant": (6e-4, 96),
    "coco_cascade_vit_base": (1e-4, 64),
    "coco_cascade_vit_large": (1e-4, 64),
    "coco_cascade_swinv2_base": (1e-4, 16),
    "coco_cascade_swinv2_large": (4e-4, 64),
    "coco_htc_swinv2_giant": (6e-4, 96),
    "o365_cascade_swinv2_giant": (1.2e-3, 96),
}
# Crop, peak learning rate, its batch, layer decay, drop path, weight decay, steps: BEiTv2's, MAE's,
# BEiTv2's, Swin's, SwinV2's, DINOv3's.
SEGMENTATION = {
    "ade20k_upernet_vit_base": (512, 5e-5, 16, 0.75, 0.15, 0.05, 160_000),
    "ade20k_upernet_vit_base_mae": (512, 1e-4, 16, 0.65, 0.1, 0.05, 160_000),
    "ade20k_upernet_vit_large": (518, 4e-5, 16, 0.9, 0.2, 0.05, 160_000),
    "ade20k_upernet_swinv2_base": (512, 6e-5, 16, 1.0, 0.3, 0.01, 160_000),
    "ade20k_upernet_swinv2_giant": (640, 4e-5, 32, 1.0, 0.4, 0.05, 80_000),
    "ade20k_linear": (512, 1e-3, 16, 1.0, 0.0, 0.001, 40_000),
}
# Drop path, layer decay, channels of the decoder: MIM-Depth's.
DEPTH = {
    "nyuv2_vit_base": (0.3, 0.9, 128),
    "nyuv2_swinv2_base": (0.3, 0.9, 128),
    "nyuv2_swinv2_large": (0.5, 0.85, 192),
    "nyuv2_swinv2_giant": (0.5, 0.85, 512),
}
OURS = [name for name in registry.RECIPES if name.startswith("fd_swinv2")]


def teacher_of(run):
    return resolve(run.teacher.model, run.teacher.architecture)


def test_recipes_are_named_by_their_function_and_the_quick_start_is_the_default():
    assert all(registry.get(name).name == name for name in registry.RECIPES)
    others = {*PLAIN, *LARGER_FINE_TUNING, *DETECTION, *SEGMENTATION, *DEPTH}
    others |= {*TEACHERS, *AGGLOMERATIVE, *MASKED}
    published = {*PAPER, *FINE_TUNING, *others, "nyuv2_linear"}
    ours = {*OURS, "quickstart", "small_data", "linear_probe"}
    assert published | ours == set(registry.RECIPES)
    assert registry.DEFAULT_RECIPE == "quickstart"


@pytest.mark.parametrize("name", PAPER)
def test_a_published_run_has_the_published_settings(name):
    run = registry.get(name)
    optim = run.optim
    assert (
        run.student.model,
        run.teacher.model,
        optim.epochs,
        (optim.base_lr, optim.warmup_lr, optim.min_lr),
        run.student.drop_path_rate,
        run.data.min_crop_scale,
    ) == PAPER[name]
    assert (run.data.image_size, run.batch.global_batch_size) == (224, 2048)
    assert (optim.warmup_epochs, optim.weight_decay, optim.clip_norm) == (10, 0.05, 3.0)
    assert (optim.betas, optim.eps, run.objective.beta) == ((0.9, 0.999), 1e-8, 2.0)
    assert run.student.initialization == "fd"
    if "esvit" in name:
        assert run.student_architecture().window_size == 14
        assert teacher_of(run).window_size == 14


@pytest.mark.parametrize("name", TEACHERS)
def test_several_teachers_are_learnt_by_the_published_settings(name):
    run = registry.get(name)
    optim, batch = run.optim, run.batch.global_batch_size
    peak, _, last = optim.rates(batch)
    for entry in run.teachers.values():
        assert (
            len(run.teachers),
            entry.loss,
            entry.head,
            optim.epochs,
            optim.warmup_epochs,
            batch,
            pytest.approx(peak),
            pytest.approx(last),
            optim.weight_decay,
        ) == TEACHERS[name]
        assert (entry.beta, optim.clip_norm) == (1.0, 0)


@pytest.mark.parametrize("name", MASKED)
def test_a_masked_run_has_the_published_settings(name):
    run, (sampler, number, side, *others) = registry.get(name), MASKED[name]
    optim, batch = run.optim, run.batch.global_batch_size
    assert hidden(run.mask, (side, side)) == number
    assert [sampler, *others] == [
        run.mask.sampler,
        run.mask.student,
        run.mask.tokens,
        run.objective.loss,
        run.objective.normaliser,
        run.objective.layer,
        optim.epochs,
        optim.warmup_epochs,
        batch,
        pytest.approx(optim.rates(batch)[0]),
        run.data.min_crop_scale,
    ]
    assert (run.student.drop_path_rate, optim.weight_decay) == (0.1, 0.05)
    assert run.mask.cls == (name == "maskalign_vit_base")


def test_the_student_of_eva_has_its_billion():
    with torch.device("meta"):
        student = make_student(registry.get("eva_vit_giant").student, image_size=224)
    assert sum(p.numel() for p in student.parameters()) == pytest.approx(1.011e9, rel=0.002)


def test_the_student_of_the_proxy_learns_from_the_proxy():
    proxy, student = (registry.get(f"proxy_vit_{size}") for size in ("giant", "base"))
    assert teacher_of(student) == proxy.student_architecture()


@pytest.mark.parametrize("name", FINE_TUNING)
def test_a_published_fine_tuning_has_the_published_settings(name):
    run = registry.get(name)
    optim, augmentation = run.optim, run.task.finetune
    assert (
        optim.epochs,
        optim.warmup_epochs,
        optim.base_lr,
        optim.warmup_lr,
        optim.layer_decay,
        run.student.drop_path_rate,
    ) == FINE_TUNING[name]
    assert optim.min_lr == optim.warmup_lr
    assert (optim.weight_decay, optim.clip_norm, run.data.image_size) == (0.05, 5.0, 224)
    assert (augmentation.randaugment, augmentation.randaugment_std) == (9, 0.5)
    assert (augmentation.erasing, augmentation.smoothing) == (0.25, 0.1)
    assert (augmentation.mixup, augmentation.cutmix, augmentation.switch_probability) == (
        0.8, 1.0, 0.5,
    )  # fmt: skip
    # The student of the recipe of that name is fine-tuned, with a position table per block.
    assert run.student.model == registry.get(name.replace("finetune", "fd")).student.model
    architecture = run.student_architecture()
    assert architecture == architecture.with_own_position_biases()


@pytest.mark.parametrize("name", PLAIN)
def test_clip_itself_is_fine_tuned_as_published(name):
    run = registry.get(name)
    optim, augmentation = run.optim, run.task.finetune
    peak, first, last = optim.rates(run.batch.global_batch_size)
    assert (optim.epochs, optim.warmup_epochs, peak, optim.layer_decay) == pytest.approx(
        PLAIN[name]
    )
    assert (first, last) == pytest.approx((1e-6, 1e-6))
    assert (optim.clip_norm, optim.ema_decay, optim.weight_decay) == (0, 0.9998, 0.05)
    assert (augmentation.mixup, augmentation.cutmix, run.student.drop_path_rate) == (0, 0, 0)
    teacher = registry.get(name.replace("finetune", "fd").removesuffix("_plain")).teacher
    assert run.student.model == teacher.model


@pytest.mark.parametrize("name", LARGER_FINE_TUNING)
def test_a_larger_fine_tuning_has_its_source_s_settings(name):
    run = registry.get(name)
    optim, mixing, batch = run.optim, run.task.finetune, run.batch.global_batch_size
    assert (
        run.data.image_size,
        optim.epochs,
        optim.warmup_epochs,
        batch,
        pytest.approx(optim.rates(batch)),
        optim.layer_decay,
        run.student.drop_path_rate,
    ) == LARGER_FINE_TUNING[name]
    # BEiTv2 mixes no images after ImageNet-22K, and clips no gradients.
    assert (mixing.mixup, mixing.cutmix) == ((0, 0) if "22k_1k" in name else (0.8, 1.0))
    assert optim.clip_norm == (0 if "clip" in name else 5)
    if "swinv2" in name:
        shape = run.student_architecture()
        assert shape.pretrained_window_sizes == (12, 12, 12, 6)
        # The third map is one window.
        assert run.data.image_size // 16 == shape.window_size


def test_the_linear_probe_has_the_settings_of_its_source():
    run = registry.get("linear_probe")
    # MAE: 0.1 for 256 images.
    peak, first, last = run.optim.rates(run.batch.global_batch_size)
    assert peak == pytest.approx(0.1 * 16384 / 256)
    assert (first, last, run.optim.weight_decay, run.optim.clip_norm) == (0, 0, 0, 0)
    assert (run.optim.epochs, run.optim.warmup_epochs, run.optim.name) == (90, 10, "lars")


def test_htc_plus_plus_names_all_that_is_public_of_it():
    own = registry.get("coco_htc_swinv2_giant").task.detection
    assert (own.heads, own.extra_attention, own.box_loss) == ("htc", True, "giou")
    assert (own.copy_instances, own.nms) == (0.5, "linear")


@pytest.mark.parametrize("name", DETECTION)
def test_detection_peaks_at_the_learning_rate_of_its_source(name):
    run = registry.get(name)
    peak, batch = DETECTION[name]
    assert run.batch.global_batch_size == batch
    assert run.optim.rates(batch)[0] == pytest.approx(peak)


@pytest.mark.parametrize("name", OURS)
def test_our_swinv2_runs_see_192_pixels_with_window_12(name):
    run = registry.get(name)
    assert run.student.model == run.teacher.model
    assert run.student_architecture().window_size == teacher_of(run).window_size == 12
    # The ends keep their ratio to the peak in the paper's Swin run: 2e-4 / 1e-6 / 1e-5.
    assert run.optim.base_lr / run.optim.warmup_lr == pytest.approx(200)
    assert run.optim.base_lr / run.optim.min_lr == pytest.approx(20)


def test_the_quick_start_needs_no_files():
    run = registry.get("quickstart")
    assert run.data.root.startswith("builtin:")
    assert run.eval.root.startswith("builtin:")
    assert run.teacher.source.startswith("package:")
    # Both maps have stride 8.
    student, teacher = run.student_architecture(), teacher_of(run)
    assert student.patch_size * 2 ** (len(student.depths) - 1) == teacher.feature_stride == 8
    # The warm-up is 20 steps.
    steps_per_epoch = 18 * 256 // run.batch.global_batch_size
    assert int(run.optim.warmup_epochs * steps_per_epoch) == 20


@pytest.mark.parametrize("name", registry.RECIPES)
def test_the_docstring_gives_hardware_duration_and_result(name):
    run, facts = registry.get(name), registry.facts(name)
    for line in (facts.summary, facts.hardware, facts.duration, facts.result):
        assert 0 < len(line) <= 100
    # The last incomplete batch is dropped.
    in_22k = 14_197_122 if name.endswith("_22k") else 1_281_167
    images = 118_287 if name in DETECTION else 24_231 if name in DEPTH else in_22k
    images = USUAL_IMAGES if name == "small_data" else images
    images = 29_600_000 if name == "eva_vit_giant" else images
    steps = run.optim.max_steps or run.optim.epochs * (images // run.batch.global_batch_size)
    assert f"{steps:,} steps" in facts.duration


def test_an_unknown_recipe_gets_the_nearest_names():
    with pytest.raises(ConfigError, match=r"--recipe: .*'fd_swinv2_g'.*fd_swinv2g"):
        registry.get("fd_swinv2_g")


@pytest.mark.parametrize("name", SEGMENTATION)
def test_a_segmentation_has_its_source_s_settings(name):
    run = registry.get(name)
    optim, batch = run.optim, run.batch.global_batch_size
    peak, first, last = optim.rates(batch)
    assert (
        run.data.image_size,
        pytest.approx(peak),
        batch,
        optim.layer_decay,
        run.student.drop_path_rate,
        optim.weight_decay,
        optim.max_steps,
    ) == SEGMENTATION[name]
    assert (first, last) == (pytest.approx(1e-6 * peak), 0)
    assert int(optim.warmup_epochs * (20_210 // batch)) == 1500
    assert (optim.schedule, optim.clip_norm) == ("linear", 0)
    own = run.task.segmentation
    assert (own.num_classes, own.reduce_zero_label, own.loss_over) == (150, True, "all")
    assert own.test_mode == ("slide" if "vit" in run.student.model else "whole")


@pytest.mark.parametrize("name", DEPTH)
def test_a_depth_has_mim_depth_s_settings(name):
    run = registry.get(name)
    optim, own = run.optim, run.task.depth
    assert (run.student.drop_path_rate, optim.layer_decay, own.head_width) == DEPTH[name]
    assert optim.rates(24) == pytest.approx((5e-4, 3e-5, 3e-5))
    assert (optim.schedule, optim.epochs, optim.warmup_epochs) == ("rise_and_fall", 25, 12)
    assert (optim.weight_decay, optim.clip_norm, run.batch.global_batch_size) == (0.05, 0, 24)
    assert (own.loss_over, own.loss_lambda, own.loss_factor) == ("batch", 0.5, 1)
    assert (own.normalise, own.max_depth, own.test_crop) == (False, 10, "nyu")
    assert (own.test_windows, own.test_flip, run.data.image_size) == (2, True, 480)
    if "swinv2" in name:
        assert run.student.stage_windows == (30, 30, 30, 15)
        assert run.student.shift_stages == (True, True, False, False)
        assert run.student_architecture().pretrained_window_sizes == (12, 12, 12, 6)


def test_the_linear_depth_leaves_the_student_as_it_is():
    run = registry.get("nyuv2_linear")
    own = run.task.depth
    assert (own.frozen, own.normalise, own.cut_depth, own.loss_lambda) == (True, True, 0, 0.85)
    assert run.optim.rates(16)[0] == pytest.approx(3e-4)
