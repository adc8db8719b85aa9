"""Sections of a run: checked when made, JSON and back, differences by name."""

import json
from dataclasses import replace

import pytest

from fd_large.errors import ConfigError
from fd_large.recipes import registry
from fd_large.recipes.architectures import Architecture, resolve
from fd_large.recipes.run import Run, Task, difference
from fd_large.recipes.sections import Data, NamedStudent, Optim, Runtime, Student
from fd_large.tasks.classification.section import FineTune
from fd_large.tasks.detection.section import Detection
from fd_large.tasks.distillation.section import Teacher


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


def test_from_dict_takes_the_default_for_an_absent_field():
    values = a_run().to_dict()
    del values["objective"]
    del values["optim"]["fused"]
    assert Run.from_dict(values) == a_run()


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("optim.base_rl", 1.0, r"optim\.base_rl: .*nearest: optim\.base_lr"),
        ("optimiser", {}, r"optimiser: .*nearest: optim, "),
        ("student.architecture.dephts", [1], r"student\.architecture\.dephts: .*depths"),
        ("student.architecture.depths", "many", "student.architecture.depths: .*got 'many'"),
        ("optim.epochs", "many", "optim.epochs: .*got 'many'"),
        ("optim.epochs", True, "optim.epochs: .*got True"),
        ("batch", 3, "batch: .*got 3"),
        ("teacher.placement", "nod", "teacher.placement: .*one of replicated, sharded, node"),
    ],
)
def test_from_dict_refuses_what_it_does_not_know(path, value, message):
    values = a_run().to_dict()
    *sections, name = path.split(".")
    inner = values
    for section in sections:
        inner = inner[section]
    inner[name] = value
    with pytest.raises(ConfigError, match=message):
        Run.from_dict(values)


def test_from_dict_names_a_needed_field_that_is_absent():
    values = a_run().to_dict()
    del values["student"]["model"]
    with pytest.raises(ConfigError, match=r"student: incomplete; .*'model'"):
        Run.from_dict(values)


def test_a_run_refuses_an_unknown_model_with_the_nearest():
    with pytest.raises(ConfigError, match=r"^student\.model: .*swinv2_giant"):
        a_run(student=Student(model="swinv2_gaint"))
    with pytest.raises(ConfigError, match=r"^teacher\.model: "):
        a_run(teacher=Teacher(model="clip"))


def test_any_model_of_timm_teaches_and_learns():
    assert resolve(a_run(teacher=Teacher(model="timm")).teacher.model).timm_name == "resnet50"
    run = a_run(student=Student(model="timm:vgg"), data=Data(image_size=64))
    assert run.student_architecture().timm_name == "vgg"
    assert run.student_architecture().feature_stride == 0  # Its last map.


def test_a_model_of_another_family_keeps_none_of_the_recipes_shape():
    student = Student(
        model="swinv2_tiny",
        architecture=Architecture(window_size=4),
        size_rule="pad",
        window_rule="official",
        shift_stages=(True, False),
    )
    run = a_run(student=student)
    same = run.with_fields({"student.model": "swinv2_base"})
    assert same.student.architecture.window_size == 4
    assert same.student.window_rule == "official"
    other = run.with_fields({"student.model": "timm:x", "student.architecture.feature_stride": 8})
    assert other.student.architecture == Architecture(feature_stride=8)
    assert other.student.sizes() == Student(model="timm:x").sizes()


def test_the_ends_of_the_schedule_follow_the_rate_unless_they_are_set():
    run = a_run(optim=Optim(base_lr=0.128, warmup_lr=3.2e-4, min_lr=0.064))
    lower = run.with_fields({"optim.base_lr": 0.016}).optim
    assert (lower.warmup_lr, lower.min_lr) == (4e-5, 0.008)
    own = run.with_fields({"optim.base_lr": 0.016, "optim.min_lr": 0.001}).optim
    assert (own.warmup_lr, own.min_lr) == (4e-5, 0.001)
    kept = run.with_fields({"optim.base_lr": 0.128, "optim.eps": 1e-6}).optim
    assert kept == replace(run.optim, eps=1e-6)
    stay = run.with_fields({"optim.base_lr": 0.256}, stay=["optim.min_lr"]).optim
    assert (stay.warmup_lr, stay.min_lr) == (6.4e-4, 0.064)
    with pytest.raises(ConfigError, match=r"optim\.base_lr: "):
        run.with_fields({"optim.base_lr": "low"})


@pytest.mark.parametrize(
    ("values", "warmup"),
    [
        ({"optim.epochs": 1}, 0.1),
        ({"optim.epochs": 10}, 1.0),
        ({"optim.epochs": 11}, 10.0),
        ({"optim.epochs": 1, "optim.max_steps": 9}, 10.0),
        ({"optim.epochs": 2, "optim.warmup_epochs": 1}, 1.0),
    ],
)
def test_a_warm_up_that_does_not_fit_is_shortened(values, warmup):
    run = a_run(optim=Optim(epochs=100, warmup_epochs=10))
    assert run.with_fields(values).optim.warmup_epochs == warmup


def test_other_weights_of_a_teacher_bring_their_own_model():
    run = a_run(
        teacher=Teacher(
            model="efficientnet_lite0",
            architecture=Architecture(feature_stride=16),
            source="package:some",
            statistics=(0.0, 0.0, 0.0, 1.0, 1.0, 1.0),
        )
    )
    other = run.with_fields({"teacher.source": "clip.pt", "teacher.architecture.image_size": 96})
    brought = Teacher(source="clip.pt", architecture=Architecture(image_size=96))
    assert other.teacher == brought
    named = run.with_fields({"teacher.source": "clip.pt", "teacher.model": "swinv2_1b"})
    assert named.teacher == replace(brought, model="swinv2_1b", architecture=Architecture())
    # The same weights, none, or random ones are those of the model that the run names.
    for source in ("package:some", "", "random"):
        assert run.with_fields({"teacher.source": source}).teacher == replace(
            run.teacher, source=source
        )
    # A run that names a model and no weights wants that model.
    assert a_run().with_fields({"teacher.source": "x.pth"}).teacher.model == "swinv2_1b"


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


def test_run_dir_follows_the_name_unless_given():
    assert a_run().run_dir() == "runs/a_run"
    assert a_run(runtime=Runtime(run_dir="elsewhere")).run_dir() == "elsewhere"


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
    assert a_run(teacher=Teacher(), task=replace(task, name=name)).task.name == name


@pytest.mark.parametrize("name", ["finetune_clip_vit_base", "coco_mask_rcnn_vit_base"])
def test_what_only_a_distillation_reads_is_refused_field_by_field(name):
    run = registry.get(name)
    objective = replace(run.objective, beta=1.0, whitening_eps=1e-3)
    with pytest.raises(ConfigError, match=r"objective\.beta, objective\.whitening_eps: "):
        replace(run, objective=objective)


@pytest.mark.parametrize(
    ("before", "now", "refused"),
    [
        ({"max_steps": 10}, {"max_steps": 11}, set()),
        ({"max_steps": 10}, {"max_steps": 9}, {"optim.max_steps"}),
        ({"epochs": 20}, {"epochs": 30}, set()),
        ({"epochs": 30}, {"epochs": 20}, {"optim.epochs"}),
        # In another unit, of which the recipe does not say which is longer.
        ({"epochs": 20}, {"epochs": 20, "max_steps": 5}, set()),
        ({"max_steps": 10}, {"max_steps": 11, "epochs": 400}, {"optim.max_steps", "optim.epochs"}),
        ({"max_steps": 10}, {"max_steps": 11, "base_lr": 1.0}, {"optim.base_lr"}),
    ],
)
def test_a_run_goes_on_to_a_larger_length_only(before, now, refused):
    stored = a_run(optim=Optim(**before)).to_dict()
    assert set(a_run(optim=Optim(**now)).changes_since(stored)) == refused


def of_students(**more) -> Run:
    small = NamedStudent(model="vit_large_patch14", base_lr=1e-3, ema_decay=0.9)
    students = {"small": small, "base": NamedStudent(model="vit_base_patch16")}
    return a_run(**{"students": students, "runtime": Runtime(run_dir="all"), **more})


def test_each_of_several_students_has_the_run_that_it_would_have_alone():
    run = of_students(optim=Optim(base_lr=2e-3, layer_decay=0.7))
    assert Run.from_dict(json.loads(json.dumps(run.to_dict()))) == run
    alone = run.each_student()
    assert list(alone) == ["small", "base"]
    small, base = alone.values()
    assert small.student == Student(model="vit_large_patch14")
    assert (small.optim.base_lr, small.optim.ema_decay, small.optim.layer_decay) == (1e-3, 0.9, 0.7)
    assert base.optim == run.optim
    assert (small.run_dir(), base.run_dir()) == ("all/students/small", "all/students/base")
    assert "students" not in small.to_dict()
    assert a_run().each_student() == {"": a_run()}


def test_a_resume_may_take_students_out_and_in_but_not_change_them():
    run = of_students()
    small, base = run.students.values()
    stored = run.to_dict()
    for students in ({"small": small}, {**run.students, "large": base}):
        assert replace(run, students=students).changes_since(stored) == {}
    again = replace(base, activation_checkpointing="every")
    assert replace(run, students={"base": again}).changes_since(stored) == {}
    other = replace(run, students={"small": replace(small, base_lr=1.0)}).changes_since(stored)
    assert other == {"students.small.base_lr": (1e-3, 1.0)}
    assert a_run(runtime=run.runtime).changes_since(stored) == {"students": ("small, base", "")}


def test_the_ends_of_a_students_schedule_follow_its_own_rate():
    run = a_run(optim=Optim(base_lr=0.128, warmup_lr=3.2e-4, min_lr=0.064))

    def ends(values, stay=()):
        optim = run.with_fields(values, stay=stay).each_student()["a"].optim
        return optim.warmup_lr, optim.min_lr

    own = {"students.a.base_lr": 0.016}
    assert ends(own) == (4e-5, 0.008)
    assert ends(own | {"students.a.min_lr": 0.001}) == (4e-5, 0.001)
    assert ends(own | {"optim.min_lr": 0.002}) == (4e-5, 0.002)
    assert ends(own | {"optim.base_lr": 0.256}) == pytest.approx((4e-5, 0.008))
    assert ends({"students.a.base_lr": 0.256}, ["optim.min_lr"]) == (6.4e-4, 0.064)
    assert ends({"students.a.weight_decay": 0.0}) == (3.2e-4, 0.064)
    with pytest.raises(ConfigError, match=r"students\.a\.base_lr: "):
        run.with_fields({"students.a.base_lr": "low"})


def test_a_named_student_begins_as_the_recipes_own():
    values = {
        "student.drop_path_rate": 0.3,
        "students.fast.base_lr": 1e-2,
        "students.vit.model": "vit_base_patch16",
        "students.vit.drop_path_rate": 0.0,
    }
    fast, vit = a_run().with_fields(values).each_student().values()
    assert fast.student == replace(a_run().student, drop_path_rate=0.3)
    assert fast.optim.base_lr == 1e-2
    assert vit.optim == a_run().optim
    # A model of another family keeps nothing of its architecture, as in a run of its own.
    assert vit.student == Student(model="vit_base_patch16", drop_path_rate=0.0)


@pytest.mark.parametrize(
    "name", ["../shared_run", "/tmp/run", "a/b", "a\\b", "..", ".", ".hidden", "a\nb", "a\0", " a"]
)
def test_names_are_no_paths(name):
    """Folders are made of them: runs/NAME, where a foreign recipe would choose another."""
    with pytest.raises(ConfigError, match=r"^name: "):
        replace(a_run(), name=name)
    stored = a_run().to_dict()
    stored["runtime"]["name"] = name
    with pytest.raises(ConfigError, match=r"^runtime\.name: "):
        Run.from_dict(stored)
    with pytest.raises(ConfigError, match=r": not a name"):
        of_students(students={name: NamedStudent(model="vit_base_patch16")})


def test_a_run_needs_a_name_and_a_service_does_not():
    with pytest.raises(ConfigError, match=r"^name: "):
        replace(a_run(), name="")
    assert a_run().runtime.name == ""
    assert replace(a_run(), name="mine 2.0-b").run_dir() == "runs/mine 2.0-b"


def test_what_is_wrong_of_a_student_names_it():
    with pytest.raises(ConfigError, match=r"^students\.Big: "):
        of_students(students={"Big": NamedStudent(model="vit_base_patch16")})
    for field, value in (("drop_path_rate", 1.0), ("ema_decay", 2.0), ("model", "no_such")):
        with pytest.raises(ConfigError, match=rf"^students\.base\.{field}"):
            of_students().with_fields({f"students.base.{field}": value})
    with pytest.raises(ConfigError, match=r"students\.base.*finetune"):
        of_students(teacher=Teacher(), task=Task(name="finetune"))


def test_several_teachers_take_the_place_of_the_only_one():
    fields = {"teachers.clip.source": "clip.pt", "teachers.dino.source": "dino.pt"}
    several = a_run().with_fields(fields)
    assert several.teacher == Teacher()
    assert list(several.taught_by) == ["clip", "dino"]
    assert several.frozen_models.keys() == {"teachers.clip", "teachers.dino"}
    assert Run.from_dict(json.loads(json.dumps(several.to_dict()))) == several
    # Other weights bring their own model, as those of an only teacher do.
    named = several.with_fields({"teachers.dino.model": "dino_vit_base_patch16"})
    assert named.with_fields({"teachers.dino.source": "b.pt"}).teachers["dino"].model == "auto"
    assert named.with_fields({"teachers.clip.source": "b.pt"}).teachers["dino"].model != "auto"


def test_a_run_with_one_teacher_is_stored_as_ever():
    assert not {"teachers", "mask"} & a_run().to_dict().keys()
    masked = a_run().with_fields({"mask.sampler": "block"})
    assert Run.from_dict(masked.to_dict()) == masked
    (entry,) = a_run().taught_by.values()
    assert a_run().with_taught_by({"": entry}) == a_run()


def test_a_resume_with_other_teachers_is_told_by_their_names():
    clip, dino, sam = ({f"teachers.{name}.source": "a.pt"} for name in ("clip", "dino", "sam"))
    one, other = (a_run().with_fields(clip | second) for second in (dino, sam))
    assert one.changes_since(other.to_dict()) == {"teachers": ("clip, sam", "clip, dino")}
    free = one.with_fields({"teachers.dino.placement": "sharded"})
    assert free.changes_since(one.to_dict()) == {}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"teachers.Clip.source": "a"}, r"teachers\.Clip: not a name"),
        ({"teachers.a_summary.source": "a"}, r"teachers\.a_summary: not a name"),
        ({"teachers.scratch.source": "a"}, r"teachers\.scratch: not a name"),
        ({"teachers.a.source": "a", "teacher.source": "b"}, r"^teacher\.source: .*several"),
        ({"teachers.a.source": "a", "objective.loss": "mse"}, r"--teachers\.a\.loss"),
        ({"teachers.a.beta": 0.0}, r"^teachers\.a\.beta: must be positive"),
        ({"teachers.a.weight": -1.0}, r"^teachers\.a\.weight: must not be negative"),
        ({"teachers.a.targets": ()}, r"^teachers\.a\.targets: .*got nothing"),
        ({"teachers.a.summary.loss": "mse"}, r"^teachers\.a\.summary: .*not learnt"),
        ({"teachers.a.source": "a", "task.name": "finetune"}, r"teachers\.a\.source: the task"),
    ],
)
def test_what_several_teachers_cannot_be(fields, message):
    with pytest.raises(ConfigError, match=message):
        a_run().with_fields(fields)
