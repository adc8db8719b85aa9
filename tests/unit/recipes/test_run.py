"""Sections of a run: checked when made, JSON and back, differences by name."""

import json
from dataclasses import replace

import pytest

from fd_large.errors import ConfigError
from fd_large.recipes import registry
from fd_large.recipes.architectures import Architecture
from fd_large.recipes.fields import describe_type, field_names
from fd_large.recipes.run import Run, Task, difference
from fd_large.recipes.sections import Batch, Data, Engine, Optim, Runtime, Student
from fd_large.tasks.detection.section import Detection
from fd_large.tasks.distillation.section import Objective, Teacher
from fd_large.tasks.finetuning.section import FineTune


def a_run(**sections) -> Run:
    defaults = {
        "name": "a_run",
        "student": Student(
            model="swinv2_tiny", architecture=Architecture(depths=(2, 2), num_heads=(3, 6))
        ),
        "teacher": Teacher(model="swinv2_1b"),
    }
    return Run(**{**defaults, **sections})


@pytest.mark.parametrize("name", registry.RECIPES)
def test_json_and_back_is_the_same_run(name):
    run = registry.get(name)
    assert Run.from_dict(json.loads(json.dumps(run.to_dict()))) == run


def test_json_and_back_keeps_overridden_tuples():
    run = a_run()
    again = Run.from_dict(json.loads(json.dumps(run.to_dict())))
    assert again == run
    assert again.student.architecture.depths == (2, 2)
    assert again.optim.betas == (0.9, 0.999)


def test_from_dict_takes_the_default_for_an_absent_field():
    values = a_run().to_dict()
    del values["objective"]
    del values["optim"]["fused"]
    assert Run.from_dict(values) == a_run()


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("optim", "base_rl"), 1.0, "optim.base_rl: no such field; nearest: optim.base_lr"),
        (("optimiser",), {}, "optimiser: no such field; nearest: optim"),
        (("student", "architecture", "dephts"), [1], "student.architecture.dephts: no such field"),
        (("optim", "epochs"), "many", "optim.epochs: a value of the wrong type; got 'many'"),
        (("optim", "epochs"), True, "optim.epochs: a value of the wrong type; got True"),
        (("batch",), 3, "batch: not a section; got 3"),
        (("teacher", "placement"), "nod", "expected one of replicated, sharded, node"),
    ],
)
def test_from_dict_refuses_what_it_does_not_know(path, value, message):
    values = a_run().to_dict()
    inner = values
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    with pytest.raises(ConfigError) as caught:
        Run.from_dict(values)
    assert message in str(caught.value)


def test_from_dict_names_a_needed_field_that_is_absent():
    values = a_run().to_dict()
    del values["student"]["model"]
    with pytest.raises(ConfigError, match=r"student: incomplete; .*'model'"):
        Run.from_dict(values)


@pytest.mark.parametrize(
    ("section", "values", "message"),
    [
        (Student, {"model": "x", "drop_path_rate": 1.0}, "student.drop_path_rate"),
        (Student, {"model": "x", "drop_path_rate": float("nan")}, "student.drop_path_rate"),
        (Student, {"model": "x", "checkpoint_every": 0}, "student.checkpoint_every: too small"),
        (Student, {"model": "x", "size_rule": "crop"}, "student.size_rule"),
        (Teacher, {"model": "x", "placement": "host"}, "teacher.placement"),
        (Data, {"image_size": 0}, "data.image_size: too small; got 0, expected 1 or more pixels"),
        (Data, {"min_crop_scale": 0.0}, "data.min_crop_scale"),
        (Data, {"workers": -1}, "data.workers"),
        (Data, {"max_bad_fraction": 1.0}, "data.max_bad_fraction"),
        (Data, {"max_bad_fraction": -0.1}, "data.max_bad_fraction"),
        (Data, {"max_pixels": 0}, "data.max_pixels: too small; got 0, expected 1 or more pixels"),
        (Data, {"color_jitter": 1.5}, "data.color_jitter: out of range; got 1.5"),
        (Data, {"grayscale_probability": -0.1}, "data.grayscale_probability: out of range"),
        (Objective, {"beta": 0.0}, "objective.beta: must be positive"),
        (Objective, {"whitening_eps": float("inf")}, "objective.whitening_eps"),
        (Optim, {"base_lr": -1.0}, "optim.base_lr: must not be negative"),
        (Optim, {"base_lr": 1e-6}, "optim.base_lr: below"),
        (Optim, {"betas": (0.9, 1.0)}, "optim.betas"),
        (Optim, {"betas": (0.9,)}, "optim.betas: a value of the wrong type"),
        (Optim, {"epochs": 10}, "optim.warmup_epochs"),
        (Optim, {"max_steps": -1}, "optim.max_steps"),
        (Batch, {"global_batch_size": 0}, "batch.global_batch_size"),
        (Batch, {"micro_batch_size": "big"}, "batch.micro_batch_size"),
        (Batch, {"global_batch_size": 12, "micro_batch_size": 8}, "does not divide"),
        (Engine, {"precision": "float16"}, "expected one of auto, float32, bfloat16"),
        (Runtime, {"seed": -1}, "runtime.seed"),
        (Runtime, {"log_every": 0}, "runtime.log_every"),
    ],
)
def test_a_section_refuses_a_value_and_says_which(section, values, message):
    with pytest.raises(ConfigError) as caught:
        section(**values)
    text = str(caught.value)
    assert message in text
    assert "; got " in text
    assert text.endswith(".")


def test_a_run_refuses_an_unknown_net_with_the_nearest():
    with pytest.raises(ConfigError, match=r"^student\.model: .*swinv2_giant"):
        a_run(student=Student(model="swinv2_gaint"))
    with pytest.raises(ConfigError, match=r"^teacher\.model: "):
        a_run(teacher=Teacher(model="clip"))


def test_a_net_of_timm_teaches_and_does_not_learn():
    assert a_run(teacher=Teacher(model="timm")).teacher_architecture().timm_name == "resnet50"
    with pytest.raises(ConfigError, match=r"^student\.model: .* got timm"):
        a_run(student=Student(model="timm"))


def test_max_steps_may_be_shorter_than_the_warmup_of_the_epochs():
    assert Optim(epochs=1, warmup_epochs=10, max_steps=5).max_steps == 5


def test_difference_lists_fields_by_name_with_both_values():
    run = a_run()
    other = replace(
        run,
        optim=replace(run.optim, base_lr=1e-3),
        student=replace(run.student, architecture=Architecture(depths=(2, 4), num_heads=(3, 6))),
    )
    assert difference(run, run) == {}
    assert difference(run, other) == {
        "student.architecture.depths": ((2, 2), (2, 4)),
        "optim.base_lr": (3e-4, 1e-3),
    }


def test_rates_scale_with_the_global_batch():
    # Published: 3e-4 / 5e-7 / 5e-6 per 512 images are 1.2e-3 / 2e-6 / 2e-5 at 2048.
    assert Optim().rates(2048) == pytest.approx((1.2e-3, 2e-6, 2e-5), rel=1e-12)


def test_run_dir_follows_the_name_unless_given():
    assert a_run().run_dir() == "runs/a_run"
    assert a_run(runtime=Runtime(run_dir="elsewhere")).run_dir() == "elsewhere"


def test_field_names_flatten_nested_sections():
    names = field_names(Run)
    assert {"name", "optim.base_lr", "teacher.architecture.depths"} <= set(names)
    assert "teacher.architecture" not in names
    assert describe_type(names["batch.micro_batch_size"]) == "a whole number or auto"
    assert describe_type(names["student.architecture.depths"]) == "whole numbers or None"
    assert describe_type(names["optim.betas"]) == "2 numbers"


@pytest.mark.parametrize(
    ("task", "name"),
    [
        (Task(finetune=FineTune(mixup=0.0)), "finetune"),
        (Task(detection=Detection(num_classes=3)), "detection"),
    ],
)
def test_the_section_of_another_task_stays_empty(task, name):
    with pytest.raises(ConfigError, match=rf"task\.{name}\."):
        a_run(task=task)
    own = {"teacher": Teacher()} | {"task": replace(task, name=name)}
    assert a_run(**own).task.name == name
