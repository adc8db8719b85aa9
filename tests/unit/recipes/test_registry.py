"""Runs of record: the paper's numbers, and what each docstring promises."""

import inspect

import pytest

from fd_large.errors import ConfigError
from fd_large.recipes import registry

# Published settings: student, teacher, epochs, rates per 512 images, drop path, smallest crop.
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
OURS = {
    "fd_swinv2_base": "swinv2_base",
    "fd_swinv2_large": "swinv2_large",
    "fd_swinv2_1b": "swinv2_1b",
    "fd_swinv2h": "swinv2_huge",
    "fd_swinv2g": "swinv2_giant",
}
# Epochs, warm-up, rate per 512 images, its start and end, layer decay, drop path.
FINE_TUNING = {
    "finetune_clip_vit_base": (100, 20, 1.25e-3, 2.5e-7, 0.60, 0.3),
    "finetune_clip_vit_base_100ep": (100, 20, 1.25e-3, 2.5e-7, 0.65, 0.1),
    "finetune_clip_vit_large": (50, 5, 2.5e-4, 5e-7, 0.75, 0.4),
    "finetune_dino_vit_base": (100, 20, 1.5e-3, 2.5e-7, 0.60, 0.2),
    "finetune_deit_vit_base": (100, 20, 1.25e-3, 2.5e-7, 0.65, 0.3),
    "finetune_esvit_swin_base": (100, 20, 1.25e-3, 2.5e-7, 0.80, 0.4),
}
# Student, size, window, epochs, rate per 512 images, batch.
DETECTION = {
    "coco_mask_rcnn_vit_base": ("vit_base_patch16", 1024, None, 100, 8e-4, 64),
    "coco_mask_rcnn_swinv2_tiny": ("swinv2_tiny", 1024, 16, 36, 3.2e-3, 16),
    "coco_mask_rcnn_swinv2_base": ("swinv2_base", 1024, 16, 36, 3.2e-3, 16),
    "coco_mask_rcnn_swinv2_giant": ("swinv2_giant", 1536, 32, 36, 3.2e-3, 96),
}


def test_the_registry_holds_these_and_names_them_by_function():
    groups = (PAPER, OURS, FINE_TUNING, DETECTION)
    assert set(registry.RECIPES) == {"quickstart"}.union(*groups)
    assert next(iter(registry.RECIPES)) == registry.DEFAULT_RECIPE == "quickstart"
    assert all(registry.get(name).name == name for name in registry.RECIPES)


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


@pytest.mark.parametrize("name", FINE_TUNING)
def test_a_published_fine_tuning_has_the_published_settings(name):
    run = registry.get(name)
    optim, augmentation = run.optim, run.task.finetune
    assert run.task.name == "finetune"
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
    # What is fine-tuned is the student of the recipe of that name.
    assert run.student.model == registry.get(name.replace("finetune", "fd")).student.model
    architecture = run.student_architecture()
    assert architecture == architecture.with_own_position_biases()


def test_the_esvit_student_has_window_14_as_its_teacher():
    run = registry.get("fd_esvit_swin_base")
    assert run.student_architecture().window_size == 14
    assert run.teacher_architecture().window_size == 14


@pytest.mark.parametrize(("name", "model"), OURS.items())
def test_our_swinv2_runs_see_192_pixels_with_window_12(name, model):
    run = registry.get(name)
    for section, net in (
        (run.student, run.student_architecture()),
        (run.teacher, run.teacher_architecture()),
    ):
        assert section.model == model
        assert net.window_size == 12
    assert run.data.image_size == 192
    assert run.student.initialization == "fd"
    # The ends keep the ratio that the paper's Swin run has: 2e-4 / 1e-6 / 1e-5.
    assert run.optim.base_lr / run.optim.warmup_lr == pytest.approx(200)
    assert run.optim.base_lr / run.optim.min_lr == pytest.approx(20)


@pytest.mark.parametrize("name", DETECTION)
def test_detection_has_the_settings_of_its_sources(name):
    run = registry.get(name)
    assert run.task.name == "detection"
    assert (
        run.student.model,
        run.data.image_size,
        getattr(run.student_architecture(), "window_size", None),
        run.optim.epochs,
        run.optim.base_lr,
        run.batch.global_batch_size,
    ) == DETECTION[name]
    # The rate at the source's batch: 1e-4 at 64 (ViTDet), 1e-4 at 16 (Swin), 6e-4 at 96 (G).
    peak = {"vit_base_patch16": 1e-4, "swinv2_giant": 6e-4}.get(run.student.model, 1e-4)
    assert run.optim.rates(run.batch.global_batch_size)[0] == pytest.approx(peak)
    assert run.task.detection.scale_range == (0.1, 2.0)
    # Swin models take any size; a window that does not divide a map is padded.
    assert (run.student.size_rule == "pad") == run.student.model.startswith("swin")


def test_giant_fits_its_network():
    run = registry.get("fd_swinv2g")
    assert run.teacher.placement == "node"
    assert run.batch.micro_batch_size >= 32
    assert run.student.activation_checkpointing == "every"
    assert run.student_architecture().extra_norm_every == 6
    assert "--teacher.model swinv2_1b --teacher.source PATH" in inspect.getdoc(
        registry.RECIPES["fd_swinv2g"]
    )


def test_the_quick_start_needs_nothing_of_the_user():
    run = registry.get("quickstart")
    assert run.data.root.startswith("builtin:")
    assert run.eval.root.startswith("builtin:")
    assert run.teacher.source.startswith("package:")
    assert run.teacher.placement == "sharded"
    # Both maps have stride 8: 16 x 16 tokens.
    student, teacher = run.student_architecture(), run.teacher_architecture()
    assert student.patch_size * 2 ** (len(student.depths) - 1) == teacher.feature_stride == 8
    # Every power of two of ranks up to 16 gets a share.
    assert run.batch.global_batch_size == 16
    # Known only once the time box has measured its steps, the length must not matter before.
    per_epoch = 18 * 256 // run.batch.global_batch_size
    assert int(run.optim.warmup_epochs * per_epoch) == 20
    assert 0 < run.optim.max_seconds <= 240


@pytest.mark.parametrize("name", registry.RECIPES)
def test_the_docstring_tells_hardware_duration_and_result(name):
    facts = registry.facts(name)
    for line in (facts.summary, facts.hardware, facts.duration, facts.result):
        assert 0 < len(line) <= 100
    run = registry.get(name)
    if name == "quickstart":
        assert facts.duration.startswith(f"at most {run.optim.max_steps:,} steps")
        return
    # ImageNet-1K's images or COCO's, the last incomplete batch dropped.
    images = 118_287 if run.task.name == "detection" else 1_281_167
    updates = run.optim.epochs * (images // run.batch.global_batch_size)
    assert facts.duration.startswith(f"{updates:,} steps")


def test_an_unknown_recipe_gets_the_nearest_names():
    with pytest.raises(ConfigError, match=r"^--recipe: no such recipe; got 'fd_swinv2_g', nearest"):
        registry.get("fd_swinv2_g")
