"""Distillation as a job: what is refused before anything heavy, its batches, its evaluations."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import tiny_runs
import torch
from loading import settled

from fd_large.data.sampler import Portion
from fd_large.engine.counting.count import record
from fd_large.engine.counting.step import models_of, on_shapes
from fd_large.engine.forward_backward import arguments_of_step
from fd_large.errors import CheckpointError, ConfigError, FDError, check_all
from fd_large.kernels import choose
from fd_large.recipes import registry
from fd_large.recipes.architectures import resolve
from fd_large.recipes.fields import override
from fd_large.recipes.run import ONLY
from fd_large.tasks.distillation.canary import Canary
from fd_large.tasks.distillation.job import DistillationJob
from fd_large.tasks.distillation.section import Objective, Teacher, Weighting
from fd_large.tasks.distillation.several.weighting import DATASETS
from fd_large.tasks.jobs import stored_run_of


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


def test_what_is_held_out_of_the_training_images_is_what_the_loss_is_measured_on(run, root):
    own = {"data.root": str(root / "train"), "data.val_fraction": 0.5}
    job = DistillationJob(override(run, own | {"eval.root": own["data.root"]}))
    samples = job.open_samples()
    sets = job.held_out(samples)
    trained = {samples[number] for number in range(len(samples))}
    shown = {name: {one.name_of(view) for view in range(16)} for name, one in sets.items()}
    assert shown["unseen_crops"] <= trained
    assert shown["held_out"].isdisjoint(trained)
    assert len(trained) + len(shown["held_out"]) == 8


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
    sharded = override(run, {"teacher.placement": "sharded"})
    assert DistillationJob(sharded).memory_facts() == {"teacher_placement": "sharded"}
    one = DistillationJob(sharded.in_one_process())
    assert one.memory_facts() == {"teacher_placement": "replicated"}


@pytest.mark.parametrize("head", ["linear", "convolutional", "resized_mlp"])
def test_sizes_of_all_that_may_be_split(built, head):
    job, engine = built(objective__head=head)
    models = (engine.task, job.teachers[""].module)
    expected = sorted(p.numel() for model in models for p in model.parameters())
    assert sorted(sum(job.tensor_sizes(), ())) == expected


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
    job = DistillationJob(settled(run.with_fields({**TILED, "batch.global_batch_size": 8})))
    assert job.run.teachers["sam"].teacher_image_size == 64
    assert job.run.teachers["sam"].interpolation == "none"
    job.check()
    job.tensor_sizes()
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
    job = DistillationJob(settled(run.with_fields({**TILED, **fields})))
    with pytest.raises(FDError, match=named):
        check_all(job.check, job.tensor_sizes)


def test_a_mosaic_has_no_summary(run):
    with pytest.raises(FDError, match=r"teachers\.sam\.mosaic"):
        run.with_fields({**TILED, "teachers.sam.targets": ("map", "summary")})


def test_stored_maps_are_of_one_size(run, tmp_path):
    cache = {"task.distillation.views": 1, "task.distillation.cache": str(tmp_path)}
    with pytest.raises(FDError, match=r"^data\.image_sizes: "):
        DistillationJob(run.with_fields({"data.image_sizes": (32, 64), **cache})).check()


def test_the_folder_of_a_run_teaches_the_quick_start(run, tmp_path):
    tiny_runs.store_task(tmp_path / "run", run, tiny_runs.tiny_task(run))
    quickstart = registry.get("quickstart")
    learner = settled(quickstart.with_fields({"teacher.source": str(tmp_path / "run")}))
    assert learner.teacher.model == "swinv2"
    assert learner.teacher.source.startswith(str(tmp_path / "run" / "checkpoints"))
    assert (
        resolve(learner.teacher.model, learner.teacher.architecture) == run.student_architecture()
    )
    assert DistillationJob(learner).make_teachers()[""].grid(128) == (16, 16)


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


def test_several_teachers_are_known_by_their_names(run):
    fields = {"teachers.b.targets": ("map", "summary"), "runtime.canary_every": 7}
    job = DistillationJob(tiny_runs.with_teachers(run, "a", "b", **fields))
    job.check()
    assert job.sources().keys() == {"teachers.a.source", "teachers.b.source", "student.init"}
    assert job.summary()["teachers"].keys() == job.frozen_models().keys() == {"a", "b"}
    assert "held_out/b_summary_loss" in job.metrics
    assert "b_summary_loss" in job.lower_is_better
    job.tensor_sizes()
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
    card = stored_run_of(job).learned(facts, "fd")
    assert card.tables["Teacher b"]["hash of its weights"] == facts["teachers"]["b"]["teacher_hash"]
    assert card.metrics["held_out_b_summary_loss"] == "held-out loss of b summary"
    other = {"teachers": {"a": facts["teachers"]["a"], "c": facts["teachers"]["b"]}}
    with pytest.raises(CheckpointError, match=r"teachers: .*got a, b, expected a, c"):
        job.check_stored(other)
    changed = {"teachers": {**facts["teachers"], "b": {"teacher_hash": "0"}}}
    with pytest.raises(CheckpointError, match=r"teachers\.b\.source: .*expected 0"):
        job.check_stored(changed)


def test_a_name_that_torch_takes_is_refused(run):
    with pytest.raises(ConfigError, match=r"teachers\.train: "):
        DistillationJob(tiny_runs.with_teachers(run, "train")).models_on_shapes()


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
    assert task.join._number == 8 - is_green.sum()
    assert task(**arguments)[0].isfinite()


def test_a_micro_batch_waits_with_its_targets(run):
    """What a plan counts of it is what is held: pixels and the teacher's map."""
    job = DistillationJob(override(run, {"objective.normaliser": "batch"}))
    with on_shapes(choose.Device(None, on_gpu=False)):
        models = models_of(job, bfloat16=False, frozen_bfloat16=False)
        batch = job.probe_batch(4)
        recorder = record(models, batch)
        prepared = models.task.prepare(batch.images, None, None)
    tensors = prepared["pixels"], prepared["maps"][ONLY].tokens
    expected = sum(t.untyped_storage().nbytes() for t in tensors)
    assert recorder.held == pytest.approx(expected, rel=0.01)
