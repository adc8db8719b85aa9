"""What is printed to be run next: each command is parsed as if it were pasted, for each task."""

from __future__ import annotations

import json
import shlex
from dataclasses import replace
from pathlib import Path

import pytest

import fd_large
from fd_large import shipped
from fd_large.cli import diagnose, evaluate, export, init, predict, recipes
from fd_large.cli.arguments import choose, parse, parse_with_recipe
from fd_large.cli.main import COMMANDS
from fd_large.cli.train import parse_train
from fd_large.recipes import registry
from fd_large.recipes.architectures import Architecture, resolve
from fd_large.recipes.fields import override
from fd_large.report.closing import (
    beats_constant,
    closing_rows,
    closing_text,
    next_steps,
    stopped_text,
)
from fd_large.report.run_files import read_run
from fd_large.tasks.registry import TASKS
from fd_large.weights.export import export_of

FLAGS = ["--deepspeed_config", "ds_configs/zero3.json"]
STARTS = {
    "deepspeed": ["/home/u/fd_large/train.py", "--local_rank=0"],
    "torchrun": ["/home/u/fd_large/train.py"],
    "python": ["/home/u/fd_large/__main__.py", "train"],
    "srun": ["/usr/bin/fd-large", "train"],
}
OWN = {
    "diagnose": diagnose.Diagnose,
    "export": export.Export,
    "predict": predict.Predict,
}


def pasted(command: str):
    """Parses a command as the shell and this program would; returns (name, what was parsed)."""
    program, *words = shlex.split(command)
    if Path(program).name == "tensorboard":
        assert words[0] == "--logdir"
        assert Path(words[1]).is_dir()
        return "tensorboard", words[1]
    if words[:2] == ["-m", "fd_large"]:
        words = words[4:] if words[2:4] == ["--ranks", "2"] else words[2:]
    elif Path(program).name in ("deepspeed", "torchrun"):
        place = next(i for i, word in enumerate(words) if "fd_large" in word)
        words = ["train", *words[place + 1 :]]
    else:
        assert Path(program).name == "fd-large"
    name, rest = choose(words, COMMANDS, note="")
    if name == "train":
        given = parse_train(rest)
        assert shipped.deepspeed_config(given.own.deepspeed_config).is_file()
        return name, given
    if name == "evaluate":
        return name, parse_with_recipe(
            evaluate.Evaluate, rest, command=name, recipe=registry.FINETUNING_RECIPE
        )
    if name == "recipes":
        assert rest == []
        return name, recipes
    return name, parse(OWN[name], rest, command=name)


@pytest.fixture
def run_of(make_run):
    def make(task, launcher="deepspeed", *, status="done", words=(), command=None):
        name = next(name for name in registry.RECIPES if registry.get(name).task.name == task)
        changes = {"data.root": "my images"}
        folder = make_run("runs/a run", status=status)
        recipe = override(registry.get(name), changes)
        recipe = replace(recipe, runtime=replace(recipe.runtime, run_dir=str(folder)))
        (folder / "recipe.json").write_text(json.dumps(recipe.to_dict()))
        flags = ["--recipe", name, "--data.root", changes["data.root"], *words]
        flags += ["--runtime.run_dir", str(folder)]
        environment = {
            "world_size": 2,
            "device": "cpu",
            "launcher": launcher,
            "command": command or [*STARTS[launcher], *FLAGS, *flags],
        }
        (folder / "environment.json").write_text(json.dumps(environment))
        return folder, recipe

    return make


@pytest.mark.parametrize("launcher", STARTS)
@pytest.mark.parametrize("task", TASKS)
def test_after_a_finished_run(task, launcher, run_of):
    folder, recipe = run_of(task, launcher)
    steps = next_steps(read_run(folder))
    found = dict(pasted(step["command"]) for step in steps)
    expected = {words[0] for _, words in TASKS[task].next_steps}
    assert found.keys() == {*expected, "tensorboard", "recipes"}, "not on its images once more"
    if task == "distillation":
        assert found["diagnose"].models == (str(folder), f"{folder}#teacher")
        assert found["diagnose"].data.root == recipe.data.root
    elif TASKS[task].scores_runs:
        assert found["predict"]
    elif task == "finetune":
        assert found["evaluate"]


def test_stored_maps_are_no_teacher_to_look_at(run_of):
    folder, recipe = run_of("distillation")
    recipe = override(recipe, {"teacher.source": "cached:targets"})
    (folder / "recipe.json").write_text(json.dumps(recipe.to_dict()))
    found = dict(pasted(step["command"]) for step in next_steps(read_run(folder)))
    assert found["diagnose"].models == (str(folder),)


@pytest.mark.parametrize("launcher", STARTS)
@pytest.mark.parametrize("task", TASKS)
def test_a_run_that_was_stopped_goes_on_by_the_same_recipe(
    task, launcher, run_of, tmp_path, monkeypatch
):
    if launcher == "srun":
        monkeypatch.chdir(tmp_path)  # No batch script is here.
    folder, recipe = run_of(task, launcher, status="preempted", words=["--fresh"])
    (folder / "checkpoints/step_00000005").mkdir(parents=True)
    again, *_ = next_steps(read_run(folder))
    assert again["why"] == "go on from the last checkpoint (5 steps)"
    name, given = pasted(again["command"])
    assert name == "train"
    assert given.run == recipe
    assert not given.own.fresh
    assert ("--ranks 2 train" in again["command"]) == (launcher == "python")
    told, command = stopped_text(read_run(folder)).splitlines()
    assert told == "stopped and saved after step 5 of 60. To resume:"
    assert command.strip() == again["command"]


@pytest.mark.parametrize("place", ["slurm", "."])
def test_a_run_of_a_job_goes_on_by_the_script_for_that(place, run_of, tmp_path, monkeypatch):
    folder, _ = run_of("distillation", "srun", status="preempted", words=["--fresh"])
    monkeypatch.chdir(tmp_path)
    if place == "slurm":
        Path("slurm").symlink_to(shipped.folder("slurm"))
    else:
        init.write(tmp_path / "jobs")
        monkeypatch.chdir(tmp_path / "jobs")
    again, *_ = next_steps(read_run(folder))
    program, script, run = shlex.split(again["command"])
    assert program == "sbatch"
    assert script == str(Path(place, "resume.sh"))
    assert Path(script).is_file()
    assert (folder / "environment.json").samefile(Path(run, "environment.json"))
    assert stopped_text(read_run(folder)).splitlines()[1].strip() == again["command"]


@pytest.mark.parametrize("launcher", ["deepspeed", "torchrun"])
def test_a_run_that_was_started_from_elsewhere_goes_on_from_there(
    launcher, run_of, tmp_path, monkeypatch
):
    own = Path(fd_large.__file__).parent / "train.py"
    folder, _ = run_of("distillation", launcher, status="preempted", command=[str(own), *FLAGS])
    for here in (tmp_path, own.parents[1]):
        monkeypatch.chdir(here)
        again, *_ = next_steps(read_run(folder))
        script = next(w for w in shlex.split(again["command"]) if w.endswith("train.py"))
        assert (here / script).samefile(own)
        assert (script == "fd_large/train.py") == (here != tmp_path)


def test_a_run_that_was_stopped_before_its_first_checkpoint(make_run):
    told = stopped_text(read_run(make_run(status="preempted", updates=0)))
    assert told.startswith("stopped before anything was saved. To start again:\n")


def test_the_quick_start_leads_to_images_of_ones_own(run_of):
    folder, _ = run_of("distillation")
    recipe = registry.get("quickstart")
    (folder / "recipe.json").write_text(json.dumps(recipe.to_dict()))
    first, *_ = next_steps(read_run(folder))
    assert first["why"] == "your own images"
    _, given = pasted(first["command"])
    assert (given.run.name, given.run.data.root) == ("small_data", "FOLDER")
    assert "eval.root" not in first["command"]


def test_the_quick_start_of_another_student_leads_to_the_same_on_images_of_ones_own(run_of):
    folder, _ = run_of("distillation")
    recipe = override(registry.get("quickstart"), {"student.drop_path_rate": 0.1})
    (folder / "recipe.json").write_text(json.dumps(recipe.to_dict()))
    first, *_ = next_steps(read_run(folder))
    assert first["why"] == "the same on your own images"
    _, given = pasted(first["command"])
    assert (given.run.data.root, given.run.eval.root) == ("FOLDER", "HELD_OUT_FOLDER")
    assert given.run.runtime.run_dir == f"{folder}-2"


def test_the_end_names_the_run_and_its_student(run_of):
    folder, recipe = run_of("distillation")
    head, student, *_ = closing_text(read_run(folder), []).splitlines()
    assert head.startswith(f"{recipe.name}: done")
    assert recipe.student.model in student
    assert student.endswith("from random weights")
    named = override(recipe, {"runtime.name": "wide images", "student.init": "a.safetensors"})
    (folder / "recipe.json").write_text(json.dumps(named.to_dict()))
    head, student, *_ = closing_text(read_run(folder), []).splitlines()
    assert head.startswith(f"wide images ({recipe.name}): done")
    assert student.endswith("from a.safetensors")


def with_losses(folder, student, constant, *, views=256):
    recipe = json.loads((folder / "recipe.json").read_text())
    recipe["eval"]["views"] = views
    (folder / "recipe.json").write_text(json.dumps(recipe))
    row = {"update": 60, "held_out_loss": student, "held_out_best_constant": constant}
    (folder / "evaluations.jsonl").write_text(json.dumps(row) + "\n")
    return read_run(folder)


def test_a_student_that_is_worse_than_a_constant_is_not_offered(run_of):
    folder, recipe = run_of("distillation", words=["--optim.min_lr", "1e-4"])
    good = dict(pasted(one["command"]) for one in next_steps(with_losses(folder, 0.1, 0.2)))
    files = with_losses(folder, 0.236, 0.138)
    first, *others = next_steps(files)
    assert "export" in good
    assert "export" not in dict(pasted(one["command"]) for one in others)
    _, given = pasted(first["command"])
    assert given.run.optim.base_lr == pytest.approx(recipe.optim.base_lr / 4)
    assert given.run.optim.min_lr == pytest.approx(recipe.optim.min_lr / 4)
    assert given.run.runtime.run_dir == f"{folder}-2"
    before = json.dumps({"update": 0, "held_out_loss": 0.3}) + "\n"
    evaluations = folder / "evaluations.jsonl"
    evaluations.write_text(before + evaluations.read_text())
    _, given = pasted(next_steps(read_run(folder))[0]["command"])
    # Four times the 60 steps would still be fewer than the quick start has.
    assert given.run.optim.max_steps == 7 * recipe.optim.max_steps
    assert given.run.optim.base_lr == recipe.optim.base_lr
    told, why, *_ = closing_text(files, []).splitlines()
    assert "done, but WORSE THAN A CONSTANT, 60 of 60 steps" in told
    assert "0.2360" in why
    assert "0.1380" in why


@pytest.mark.parametrize(
    ("student", "views", "learned"),
    [(0.19, 2, True), (0.21, 256, False), (0.39, 2, None), (0.41, 2, False), (9.0, 1, None)],
)
def test_a_constant_that_is_fitted_to_few_views_condemns_no_student(
    student, views, learned, run_of
):
    folder, _ = run_of("distillation")
    files = with_losses(folder, student, 0.2, views=views)
    assert beats_constant(files) is learned
    assert ("WORSE THAN A CONSTANT" in closing_text(files, [])) == (learned is False)
    assert (f"these {views} views" in dict(closing_rows(files))["held out loss"]) == (views < 16)


def test_a_run_that_python_started_goes_on_by_what_differs(run_of):
    notebook = ["/usr/lib/ipykernel_launcher.py", "-f", "/root/kernel.json"]
    folder, recipe = run_of("distillation", "python", status="stopped", command=notebook)
    again, *_ = next_steps(read_run(folder))
    _, given = pasted(again["command"])
    assert given.run == recipe


def test_a_run_of_evaluate_goes_on_by_that_command(run_of):
    words = ["evaluate", "a model", "--task", "finetune", "--data.root", "labelled"]
    start = ["/home/u/fd_large/__main__.py", *words]
    folder, _ = run_of("finetune", "python", status="preempted", command=start)
    again, *_ = next_steps(read_run(folder))
    name, given = pasted(again["command"])
    assert (name, given.own.models, given.own.task) == ("evaluate", ("a model",), "finetune")


def test_a_task_of_the_users_own_has_no_steps_of_its_own(run_of):
    folder, _ = run_of("distillation")
    recipe = json.loads((folder / "recipe.json").read_text())
    recipe["task"] = {"name": "module:/home/u/mine.py:KIND"}
    (folder / "recipe.json").write_text(json.dumps(recipe))
    found = [pasted(step["command"])[0] for step in next_steps(read_run(folder))]
    assert found == ["tensorboard", "recipes"]


def test_a_task_of_the_users_own_names_held_out_images_only_where_it_evaluates(run_of):
    folder, _ = run_of("distillation")
    recipe = registry.get("quickstart").to_dict() | {
        "task": {"name": "module:/home/u/mine.py:KIND"}
    }
    (folder / "recipe.json").write_text(json.dumps(recipe))
    assert "--eval.root HELD_OUT_FOLDER" in next_steps(read_run(folder))[0]["command"]
    assert "held-out images" in dict(closing_rows(read_run(folder)))
    (folder / "evaluations.jsonl").unlink()
    first, *_ = next_steps(read_run(folder))
    assert "--data.root FOLDER" in first["command"]
    assert "--eval.root" not in first["command"]
    assert "held-out images" not in dict(closing_rows(read_run(folder)))


def test_images_that_the_recipe_holds_out_are_a_part_of_the_folder(run_of):
    folder, recipe = run_of("distillation")
    of_run = {"data.root": "photos", "data.val_fraction": 0.1}
    for root, part in (("photos", "10%"), ("others", "")):
        changed = override(recipe, of_run | {"eval.root": root}).to_dict()
        (folder / "recipe.json").write_text(json.dumps(changed))
        shown = dict(closing_rows(read_run(folder)))["held-out images"]
        assert shown.startswith(root)
        assert ("10%" in shown) == bool(part)


@pytest.mark.parametrize("task", ["distillation", "finetune"])
def test_a_student_of_the_users_own_goes_out_as_fd_and_no_code_is_allowed(task, run_of, tmp_path):
    folder, recipe = run_of(task)
    nets, heads = tmp_path / "my nets.py", tmp_path / "heads.py"
    for file in (nets, heads):
        file.write_text("")
    recipe = recipe.to_dict()
    recipe["student"] |= {"model": f"module:{nets}:Net", "architecture": {}}
    (folder / "recipe.json").write_text(json.dumps(recipe))
    names = [f"module:{nets}:Net", f"module:{heads}:head"]
    starts = [{"update": 0, "files": dict.fromkeys(names, "hash")}]
    (folder / "code.json").write_text(json.dumps(starts))
    found = dict(pasted(step["command"]) for step in next_steps(read_run(folder)))
    assert found["export"].to == "fd"
    # The folder may have come from elsewhere, and its code.json with it.
    assert "allow" not in json.dumps(next_steps(read_run(folder)))


@pytest.mark.parametrize(
    ("model", "architecture", "to"),
    [
        ("timm:resnet18", {}, "timm"),
        ("timm:resnet18", {"feature_stride": 8}, "fd"),
        # timm has no norms on the main path.
        ("swinv2_huge", {}, "fd"),
        ("a model of another version", {}, ""),
    ],
)
def test_what_is_offered_is_what_export_takes(model, architecture, to, run_of):
    folder, recipe = run_of("distillation")
    plain = recipe.to_dict()
    plain["student"] |= {"model": model, "architecture": architecture}
    (folder / "recipe.json").write_text(json.dumps(plain))
    found = dict(pasted(step["command"]) for step in next_steps(read_run(folder)))
    if to == "":
        assert "export" not in found
        return
    offered = found["export"].to
    assert offered == to
    # As `export` does, which refuses what the library lacks.
    export_of(resolve(model, Architecture(**architecture)), offered, pads=False)


def test_a_student_s_own_images_are_for_the_whole_group(make_run):
    folder = make_run("runs/group/students/wide")
    first, *_ = next_steps(read_run(folder))
    words = first["command"].split()
    assert words[words.index("--runtime.run_dir") + 1] == f"{folder.parents[1]}-2"


def test_stored_targets_are_of_their_images_alone(make_run):
    steps = next_steps(read_run(make_run(source="cached:targets")))
    assert "own images" not in " ".join(step["why"] for step in steps)


@pytest.mark.parametrize("name", ["time_box", "staging"])
def test_fields_that_left_are_in_no_command_and_no_difference(name, tmp_path):
    stored = Path(fd_large.__file__).parents[1] / "tests/stored_runs" / name
    files = read_run(stored)
    commands = " ".join(step["command"] for step in next_steps(files))
    assert "max_seconds" not in commands
    assert "stage_to" not in commands
    idle = {"time_box": "data.stage_to", "staging": "optim.max_seconds"}[name]
    assert idle not in files.changed
