"""Distillation as a job: what is refused before anything heavy, its batches, its evaluations."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import tiny_runs
import torch
from PIL import Image

from fd_large.data.sampler import Portion
from fd_large.engine.checkpoint_models import sources_of
from fd_large.engine.count import on_shapes, run_on_shapes
from fd_large.engine.forward_backward import arguments_of_step
from fd_large.engine.recorder import Recorder
from fd_large.errors import CheckpointError, ConfigError, FDError, ShapeError, check_all
from fd_large.kernels import choose
from fd_large.recipes import registry
from fd_large.recipes.fields import override
from fd_large.recipes.run import ONLY
from fd_large.tasks.distillation.canary import Canary
from fd_large.tasks.distillation.job import DistillationJob
from fd_large.tasks.distillation.section import NamedTeacher, Objective, Teacher, Weighting
from fd_large.tasks.distillation.task import DATASETS
from fd_large.tasks.jobs import job_of
from fd_large.weights.source import Sources


@pytest.fixture
def root(tmp_path):
    """Labelled images, red and green."""
    for split, count in (("train", 8), ("val", 4)):
        for number in range(count):
            color = number % 2
            folder = tmp_path / split / ("red", "green")[color]
            folder.mkdir(parents=True, exist_ok=True)
            levels = np.zeros((40, 48, 3), np.uint8)
            levels[..., color] = 200 + number
            Image.fromarray(levels).save(folder / f"{number}.png")
    return tmp_path


@pytest.fixture
def run(root):
    fields = {"batch.global_batch_size": 4, "data.workers": 0, "eval.views": 3, "eval.root": ""}
    return override(tiny_runs.tiny_run(str(root / "train")), fields)


@pytest.fixture
def built(run):
    """Returns fields -> a job with its teacher, its task, and an engine that is the task."""

    def build(**fields):
        named = {name.replace("__", "."): value for name, value in fields.items()}
        job = DistillationJob(override(run, named))
        job.build(bfloat16=False, node_size=1, persistence_threshold=0)
        torch.manual_seed(0)
        task = job.make_task()
        return job, SimpleNamespace(task=task, deepspeed=task)

    return build


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"eval.root": "/no/such"}, r"eval\.root"),
        ({"eval.knn_root": "/no/such"}, r"eval\.knn_root"),
        ({"teacher.source": ""}, r"teacher\.source"),
        ({"student.init": "/no/such"}, r"student\.init"),
        (
            {"teacher.placement": "sharded", "task.distillation.teacher_stream": True},
            r"teacher_stream: .*got sharded",
        ),
    ],
)
def test_mistakes_name_their_field(run, fields, named):
    with pytest.raises(FDError, match=named):
        DistillationJob(override(run, fields)).check()


def test_all_mistakes_are_told_at_once(run):
    names = ("objective.loss", "objective.normaliser", "objective.head", "eval.root")
    fields = dict.fromkeys(names, "/no/such") | {"teacher.source": ""}
    with pytest.raises(FDError) as caught:
        DistillationJob(override(run, fields)).check()
    told = [line.partition(":")[0].removeprefix("--") for line in str(caught.value).splitlines()]
    assert sorted(told) == sorted(fields)


def test_a_sound_recipe_passes_and_lists_its_sources(run, root):
    job = DistillationJob(override(run, {"eval.root": str(root), "eval.knn_root": str(root)}))
    job.check()
    assert dict(job.sources()) == {"teacher.source": "random", "student.init": ""}
    assert job.summary()["teacher"] == {"model": "clip_vit_base_patch16", "source": "random"}
    assert job.splits_models() == (run.teacher.placement != "replicated")
    sharded = override(run, {"teacher.placement": "sharded"})
    assert DistillationJob(sharded).splits_models()
    assert not DistillationJob(DistillationJob(sharded).in_one_process()).splits_models()


@pytest.mark.parametrize("head", ["linear", "convolutional", "resized_mlp"])
def test_sizes_of_all_that_may_be_split(built, head):
    job, engine = built(objective__head=head)
    models = (engine.task, job.teachers[""].module)
    expected = sorted(p.numel() for model in models for p in model.parameters())
    assert sorted(job.parameter_sizes()) == expected


@pytest.mark.parametrize(
    ("field", "value", "named"),
    [
        ("data.image_size", 36, "^student: "),
        ("objective.teacher_image_size", 36, "^teacher: "),
        ("objective.teacher_image_size", 16, r"4.?x.?4.*2.?x.?2|interpolation"),
    ],
)
def test_maps_that_do_not_fit_are_refused(run, field, value, named):
    with pytest.raises(ShapeError, match=named):
        DistillationJob(override(run, {field: value})).parameter_sizes()


def test_a_ladder_stands_on_blocks_of_one_shape_and_learns_summaries_too(run):
    with pytest.raises(ConfigError, match=r"objective\.head.*blocks"):
        DistillationJob(override(run, {"objective.head": "ladder"})).parameter_sizes()
    vit = {"model": "vit_base_patch16", "architecture.depths": (2,), "architecture.embed_dim": 8}
    vit |= {"architecture.num_heads": (2,), "architecture.patch_size": 8}
    fields = {f"student.{name}": value for name, value in vit.items()}
    fields |= {f"teachers.a.{name}": value for name, value in vit.items()}
    fields |= {"teachers.a.source": "random", "teachers.a.head": "ladder"}
    run = run.with_fields({**fields, "teachers.a.targets": ("map", "summary")})
    heads = DistillationJob(run).models_on_shapes()[0].heads["a"]
    assert [heads[kind].cls for kind in ("map", "summary")] == [None, None]
    assert heads["map"].grid == (4, 4)
    assert heads["summary"].grid == (1, 1)
    DistillationJob(run).parameter_sizes()


AUTO = {"teacher_image_size": "auto", "interpolation": "auto"}


@pytest.mark.parametrize(
    ("fields", "side", "positions", "interpolation"),
    [
        # The student's grid is 6x6; the file's positions are for 4x4 patches of 8 pixels.
        ({}, 48, 48, "none"),
        ({"teacher.architecture.image_size": 32}, 32, 32, "bilinear"),
        ({"objective.teacher_image_size": 64}, 64, 64, "bilinear"),
        ({"objective.teacher_image_size": 0}, 0, 32, "bilinear"),
        ({"objective.interpolation": "bilinear"}, 0, 32, "bilinear"),
        ({"objective.interpolation": "none"}, 48, 48, "none"),
        ({"objective.interpolation": "none", "objective.teacher_image_size": 0}, 0, 32, "none"),
        # An equal grid of 4x4: as the file is.
        ({"data.image_size": 32}, 0, 32, "none"),
    ],
)
def test_the_teachers_image_and_positions_follow(
    run, tmp_path, fields, side, positions, interpolation
):
    source = str(tiny_runs.vit_file(tmp_path))
    automatic = {f"objective.{name}": value for name, value in AUTO.items()}
    run = run.with_fields({"teacher.source": source, "data.image_size": 48, **automatic, **fields})
    settled = settle(run)
    assert settled.objective.teacher_image_size == side
    assert settled.objective.interpolation == interpolation
    assert settled.teacher_architecture().image_size == positions
    assert settle(settled) == settled
    fits = interpolation == "bilinear" or side or run.data.image_size == 32
    with nullcontext() if fits else pytest.raises(ShapeError, match="6x6"):
        DistillationJob(settled).parameter_sizes()


TILED = {
    "teachers.sam.model": "dino_vit_base_patch16",
    "teachers.sam.architecture.embed_dim": 8,
    "teachers.sam.architecture.depths": (1,),
    "teachers.sam.architecture.num_heads": (2,),
    "teachers.sam.architecture.patch_size": 8,
    "teachers.sam.architecture.image_size": 64,
    "teachers.sam.source": "random",
    "teachers.sam.mosaic": 2,
    "batch.micro_batch_size": 4,
}


def test_maps_out_of_mosaics_are_those_of_full_ones(run):
    job = DistillationJob(settle(run.with_fields({**TILED, "batch.global_batch_size": 8})))
    assert job.run.teachers["sam"].teacher_image_size == 64
    assert job.run.teachers["sam"].interpolation == "none"
    job.check()
    job.parameter_sizes()
    job.build(bfloat16=False, node_size=1, persistence_threshold=0)
    task = job.make_task()
    images = torch.randint(0, 256, (8, 3, 32, 32)).byte()
    whole = task.train().learnt(images, None)["sam"].tokens
    halves = [task.learnt(half, None)["sam"].tokens for half in images.split(4)]
    torch.testing.assert_close(whole, torch.cat(halves))
    # In evaluation no image sees another one.
    alone = task.eval().learnt(images, None)["sam"].tokens
    torch.testing.assert_close(alone[5:6], task.learnt(images[5:6], None)["sam"].tokens)
    assert not torch.allclose(alone, whole, atol=1e-5)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"batch.micro_batch_size": 2}, r"^batch\.micro_batch_size: mosaics .* a multiple of 4"),
        ({"batch.micro_batch_size": "auto"}, r"^batch\.micro_batch_size: mosaics"),
        ({"teachers.sam.mosaic": 3}, r"^(.*\n)*.*3x3 images"),
    ],
)
def test_mosaics_that_do_not_fit_are_refused(run, fields, named):
    job = DistillationJob(settle(run.with_fields({**TILED, **fields})))
    with pytest.raises(FDError, match=named):
        check_all(job.check, job.parameter_sizes)


def test_a_mosaic_has_no_summary(run):
    with pytest.raises(FDError, match=r"teachers\.sam\.mosaic"):
        run.with_fields({**TILED, "teachers.sam.targets": ("map", "summary")})


SIZES = {"data.image_size": 48, "data.image_sizes": (32, 48, 64)}
FREE = {"teacher.architecture.absolute_position": False}


@pytest.mark.parametrize(
    ("fields", "setting", "sides", "interpolation"),
    [
        # Positions for one size.
        ({}, 32, {32: 32, 48: 32, 64: 32}, "bilinear"),
        # A model of any size, on the student's images or on those that give it the same grid.
        (FREE, 0, {32: 32, 48: 48, 64: 64}, "none"),
        (FREE | {"objective.teacher_image_size": 64}, 64, {32: 64, 48: 64, 64: 64}, "bilinear"),
        (
            FREE | {"teacher.architecture.patch_size": 16, "teacher.architecture.image_size": 64},
            "auto",
            {32: 64, 48: 96, 64: 128},
            "none",
        ),
    ],
)
def test_a_teacher_has_its_size_for_each_of_the_students(
    run, fields, setting, sides, interpolation
):
    automatic = {f"objective.{name}": value for name, value in AUTO.items()}
    run = run.with_fields({**SIZES, **automatic, **fields})
    settled = settle(run)
    assert settled.objective.teacher_image_size == setting
    assert settled.objective.interpolation == interpolation
    assert settle(settled) == settled
    job = DistillationJob(settled)
    job.parameter_sizes()
    teacher = job.make_teachers()[""]
    assert {size: teacher.side(size) for size in SIZES["data.image_sizes"]} == sides
    assert job.frozen_models()["teacher"].image_size in (sides[48], 0)
    assert job.probe_batch(2).images.shape == (2, 3, 64, 64)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"data.image_sizes": (48, 36)}, r"data\.image_sizes: 36: student"),
        (
            FREE | {"objective.head": "convolutional"},
            r"objective\.head: convolutional .*data\.image_sizes",
        ),
        ({"objective.interpolation": "none"}, "interpolation"),
    ],
)
def test_a_size_that_does_not_fit_is_refused(run, fields, named):
    automatic = {f"objective.{name}": value for name, value in AUTO.items()}
    run = run.with_fields({**SIZES, **automatic, **fields})
    with pytest.raises(FDError, match=named):
        DistillationJob(settle(run)).parameter_sizes()


def test_stored_maps_are_of_one_size(run, tmp_path):
    cache = {"task.distillation.views": 1, "task.distillation.cache": str(tmp_path)}
    with pytest.raises(FDError, match=r"^data\.image_sizes: stored maps"):
        DistillationJob(run.with_fields({**SIZES, **cache})).check()


def settle(run):
    return DistillationJob(run).settle(Sources())


def test_the_folder_of_a_run_teaches_the_quick_start(run, tmp_path):
    tiny_runs.store_task(tmp_path / "run", run, tiny_runs.tiny_task(run))
    learner = registry.get("quickstart").with_fields({"teacher.source": str(tmp_path / "run")})
    settled = DistillationJob(learner).settle(sources_of(job_of))
    assert settled.teacher.model == "swinv2"
    assert settled.teacher.source.startswith(str(tmp_path / "run" / "checkpoints"))
    assert settled.teacher_architecture() == run.student_architecture()
    assert DistillationJob(settled).make_teachers()[""].grid(128) == (16, 16)


def test_a_line_says_how_the_grids_meet(run, caplog):
    with caplog.at_level("INFO"):
        DistillationJob(override(run, {"data.image_size": 48})).parameter_sizes()
    assert "teacher 4x4 (images of 32 px), student 6x6 (images of 48 px)" in caplog.text


def test_a_settled_run_says_what_is_automatic_whatever_it_was(run):
    """A job that is not settled, as `plan` counts it, sees the same teacher."""
    automatic = override(run, {f"objective.{name}": value for name, value in AUTO.items()})
    assert DistillationJob(automatic).parameter_sizes() == DistillationJob(run).parameter_sizes()
    (part,) = DistillationJob(automatic).frozen_models().values()
    assert part.image_size == 0


def test_batches_go_on_where_an_epoch_was_left(run):
    job = DistillationJob(run)
    samples = job.open_samples()
    whole = list(job.batches(samples, Portion(1, 0, 2, 0, 1)))
    assert [batch.images.shape for batch in whole] == [(2, 3, 32, 32)] * 4
    assert sorted(i for batch in whole for i in batch.indices.tolist()) == list(range(8))
    # A step of four images is two micro batches.
    rest = list(job.batches(samples, Portion(1, 1, 2, 0, 1)))
    assert all(torch.equal(a.images, b.images) for a, b in zip(whole[2:], rest, strict=True))
    probe = job.probe_batch(3)
    assert probe.images.shape == (3, 3, 32, 32)
    assert probe.images.dtype == whole[0].images.dtype == torch.uint8


def test_evaluations_of_images_that_training_never_sees(built, root):
    job, engine = built(eval__root=str(root / "val"), eval__every=5)
    (evaluation,) = job.evaluations(engine, job.open_samples(), 2)
    names = {
        f"{part}_{name}" for part in ("held_out", "unseen_crops") for name in ("loss", "cosine")
    }
    for step, last, panel in ((0, False, True), (5, False, False), (9, True, True)):
        metrics, drawn = evaluation.measure(step, last, lambda: None)
        constants = {"held_out_best_constant", "unseen_crops_best_constant"}
        assert metrics.keys() == (names | constants if last else names)
        assert (drawn is not None) == panel
        assert metrics.keys() <= {name.replace("/", "_") for name in job.metrics}
    # The teacher is random and the student untrained: it does not beat a constant.
    assert metrics["held_out_loss"] > metrics["held_out_best_constant"]
    assert [step for step in range(11) if evaluation.due(step, step == 9)] == [0, 5, 9, 10]


def test_red_and_green_are_told_apart_by_knn(built, root, tmp_path):
    job, engine = built(eval__knn_root=str(root), runtime__run_dir=str(tmp_path / "run"))
    (evaluation,) = job.evaluations(engine, job.open_samples(), 3)
    assert evaluation.measure(0, False, lambda: None) == ({"test_knn": 100.0}, None)
    assert not list((tmp_path / "run").rglob("*.*"))
    assert engine.task.training
    assert not engine.task.student._forward_hooks


def test_a_checkpoint_of_another_teacher_is_refused(built):
    job, _ = built()
    facts = job.facts()
    assert facts["teacher_source"] == "random"
    job.check_stored(facts)
    other, _ = built(runtime__seed=5)
    with pytest.raises(CheckpointError, match=rf"teacher\.source.*{facts['teacher_hash']}"):
        other.check_stored(facts)


def several(run, *names, **more):
    """The run with its teacher under each of these names."""
    entry = NamedTeacher.joined(run.teacher, run.objective)
    run = replace(
        run, teacher=Teacher(), objective=Objective(), teachers={name: entry for name in names}
    )
    return run.with_fields(more)


def test_several_teachers_are_known_by_their_names(run):
    fields = {"teachers.b.targets": ("map", "summary"), "runtime.canary_every": 7}
    job = DistillationJob(several(run, "a", "b", **fields))
    job.check()
    assert job.sources().keys() == {"teachers.a.source", "teachers.b.source", "student.init"}
    assert job.summary()["teachers"].keys() == job.frozen_models().keys() == {"a", "b"}
    assert "held_out/b_summary_loss" in job.metrics
    assert "b_summary_loss" in job.lower_is_better
    job.parameter_sizes()
    job.build(bfloat16=False, node_size=1, persistence_threshold=0)
    heads = {name for name, _ in job.make_task().named_parameters() if name.startswith("heads.")}
    assert {name.rpartition(".")[0] for name in heads} == {
        "heads.a.map",
        "heads.b.map",
        "heads.b.summary",
    }
    assert sum(isinstance(hook, Canary) for hook in job.hooks()) == 2
    # A checkpoint of other teachers is refused by their names.
    facts = job.facts()
    job.check_stored(facts)
    card = job.learned(facts)
    assert card.tables["Teacher b"]["hash of its weights"] == facts["teachers"]["b"]["teacher_hash"]
    assert card.metrics["held_out_b_summary_loss"] == "held-out loss of b summary"
    other = {"teachers": {"a": facts["teachers"]["a"], "c": facts["teachers"]["b"]}}
    with pytest.raises(CheckpointError, match=r"teachers: .*got a, b, expected a, c"):
        job.check_stored(other)
    changed = {"teachers": {**facts["teachers"], "b": {"teacher_hash": "0"}}}
    with pytest.raises(CheckpointError, match=r"teachers\.b\.source: .*expected 0"):
        job.check_stored(changed)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("teachers.a.loss", "msee", r"^teachers\.a\.loss: no such"),
        ("teachers.a.head", "mpl", r"^teachers\.a\.head: no such"),
        ("teachers.b.summary.normaliser", "non", r"^teachers\.b\.summary\.normaliser: no such"),
        ("teachers.b.whitening_eps", 0.1, None),
        ("teachers.a.target_statistics", "x", r"^teachers\.a\.target_statistics: nothing in this"),
    ],
)
def test_a_mistake_names_the_teacher(run, field, value, message):
    job = DistillationJob(
        several(run, "a", "b", **{"teachers.b.targets": ("map", "summary"), field: value})
    )
    if message is None:
        job.check()
        return
    with pytest.raises(ConfigError, match=message) as caught:
        job.check()
    assert "objective" not in str(caught.value)


def test_a_name_that_torch_takes_is_refused(run):
    with pytest.raises(ConfigError, match=r"teachers\.train: not a name"):
        DistillationJob(several(run, "train")).models_on_shapes()


def test_the_canary_watches_the_teacher_where_it_is_asked_for(built):
    for every in (0, 7):
        hooks = built(runtime__canary_every=every)[0].hooks()
        assert any(isinstance(hook, Canary) for hook in hooks) == bool(every)


@pytest.fixture
def two_datasets(run, root):
    """Two teachers, and a dataset of each color, in which teachers by name say what is theirs."""

    def made(**datasets):
        entry = replace(run.taught_by[ONLY], normaliser="batch", whitening_eps=1e-5)
        return replace(
            run,
            teacher=Teacher(),
            objective=Objective(),
            teachers={name: replace(entry, datasets=own) for name, own in datasets.items()},
            weighting=Weighting(rule="own_data"),
            data=replace(run.data, root=f"0.5 red={root}/train/red + 0.5 green={root}/train/green"),
        )

    return made


@pytest.mark.parametrize(
    ("datasets", "named"),
    [
        ({"one": ("red",), "two": ("blue",)}, "teachers.two.datasets"),
        ({"one": ("red",), "two": ()}, "no teacher of green"),
    ],
)
def test_each_dataset_has_a_teacher(two_datasets, datasets, named):
    with pytest.raises(ConfigError, match=named):
        DistillationJob(two_datasets(**datasets)).check()


def test_images_come_with_their_dataset_which_chooses_their_teachers(two_datasets):
    job = DistillationJob(two_datasets(two=("green", "red"), one=("red",)))
    assert not job.learns_from_images_alone
    job.build(bfloat16=False, node_size=1, persistence_threshold=0)
    batch = next(job.batches(job.open_samples(), Portion(0, 0, 4, 0, 1)))
    is_green = (batch.images[:, 1] > batch.images[:, 0]).all(-1).all(-1)
    assert torch.equal(batch.targets[DATASETS] == 1, is_green)
    assert 0 < is_green.sum() < 4
    task = job.make_task()
    (arguments,) = arguments_of_step(task, task, [batch], 0, count=1)
    # Green ones learn from one of the two.
    assert arguments["number"] == 8 - is_green.sum()
    assert task(**arguments)[0].isfinite()


def test_a_micro_batch_waits_with_its_targets(run):
    """What a plan counts of it is what is held: pixels and the teacher's map."""
    job = DistillationJob(override(run, {"objective.normaliser": "batch"}))
    with on_shapes(choose.Device(None, on_gpu=False)):
        task, frozen = job.models_on_shapes()
        batch = job.probe_batch(4)
        one = run_on_shapes(task, frozen, batch, Recorder((task, *frozen)))
        prepared = task.prepare(batch.images, None, None)
    tensors = prepared["pixels"], prepared["maps"][ONLY].tokens
    expected = sum(t.untyped_storage().nbytes() for t in tensors)
    assert one.recorder.held == pytest.approx(expected, rel=0.01)
