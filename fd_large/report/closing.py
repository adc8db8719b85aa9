"""Writes the closing text of a run, with its results and suggested commands."""

from __future__ import annotations

import math
import os
import shlex
import shutil
import sys
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from fd_large.errors import FDError, printable
from fd_large.files import kind_of
from fd_large.recipes.architectures import changed_words, full_name, image_side_of, model_of
from fd_large.recipes.fields import flat_plain
from fd_large.recipes.file_names import EVENTS, LOGS, METRICS, PAGE, SUMMARY
from fd_large.recipes.left import LEFT
from fd_large.recipes.sections import FOLLOWING, STUDENTS
from fd_large.recipes.small_data import NAME as SMALL_DATA
from fd_large.recipes.small_data import QUICKSTART
from fd_large.report.run_files import RunFiles
from fd_large.tasks.distillation.section import cached_folder
from fd_large.tasks.registry import TASKS

RUNNING = "running"
FEW_VIEWS = 16
"""Number of views below which the loss of the best constant is too low by over 6 %.

The constant is fitted to the same views on which its loss is computed.
"""

FEWEST_STEPS = 400
"""Number of steps of the quick start; in fewer, a student from random weights learns little."""


def closing_text(files: RunFiles, pictures: list[Path]) -> str:
    """Returns the closing text of a run.

    Args:
        files: The run.
        pictures: Paths of the drawn plots.
    """
    rows = closing_rows(files)
    rows += [("" if index else "pictures", str(path)) for index, path in enumerate(pictures)]
    if files.has(PAGE):
        rows.append(("all on a page", f"{files.folder}/{PAGE}"))
    file_names = [name for name in (SUMMARY, METRICS, LOGS) if files.has(name)]
    rows.append(("numbers, logs", f"{files.folder}: {', '.join(file_names) or 'nothing yet'}"))
    if reason := files.summary.get("reason"):
        rows.append(("why it ended", reason))
    width = max(len(label) for label, _ in rows)
    lines = [f"{called(files)}: {status_words(files)}, {progress(files)}; {files.folder}"]
    lines += filter(None, [worse_than_constant(files)])
    lines += [f"  {label:<{width}}  {text}" for label, text in rows]
    steps = next_steps(files)
    lines += ["next:"] if steps else []
    for step in steps:
        lines += [f"  {step['why']}:", f"    {step['command']}"]
    return printable("\n".join(lines))


def beats_constant(files: RunFiles) -> bool | None:
    """Whether a finished run's student is better than a constant prediction on held-out images.

    The best constant is fitted to the same n views, so that its loss is too low by about one part
    in n. The result is True if the student's loss is lower than the constant's, and False if it is
    higher by more than this part. It is None if it is higher by less, if a loss was not measured,
    or if the run is not finished.
    """
    _, losses = files.evaluated("held_out_loss")
    _, constants = files.evaluated("held_out_best_constant")
    views = files.recipe.get("eval", {}).get("views")
    if files.summary.get("status") != "done" or not len(losses) or not len(constants):
        return None
    if losses[-1] < constants[-1]:
        return True
    is_worse = isinstance(views, int) and losses[-1] * (views - 1) > constants[-1] * views
    return False if is_worse else None


def called(files: RunFiles) -> str:
    """Returns a run's name for people.

    It is "NAME (RECIPE)" if the user named the run (`runtime.name`), and "RECIPE" otherwise.
    """
    recipe: str = files.recipe["name"]
    run_name = files.recipe.get("runtime", {}).get("name")
    return f"{run_name} ({recipe})" if run_name else recipe


def status_words(files: RunFiles) -> str:
    """Returns the status of a run for people.

    It is the status in summary.json, such as "done", or "not finished" without this file. A
    finished run whose student is worse than a constant prediction has a warning beside "done".
    """
    if beats_constant(files) is False:
        return "done, but WORSE THAN A CONSTANT"
    return files.summary.get("status") or "not finished"


def worse_than_constant(files: RunFiles) -> str:
    """Returns a text with the losses and suggestions for a student that learned too little.

    The text is "" unless the run is finished and its student is worse than a constant prediction on
    held-out images (`beats_constant`).
    """
    if beats_constant(files) is not False:
        return ""
    _, losses = files.evaluated("held_out_loss")
    _, constants = files.evaluated("held_out_best_constant")
    return (
        f"The student is worse than a constant on held-out images: its loss is {losses[-1]:.4f}, "
        f"and the loss of the best constant prediction is {constants[-1]:.4f}. Try more steps, "
        "another learning rate (a lower one if the loss rose), and larger images if a map has "
        "only a few tokens (data.image_size)."
    )


def stopped_text(files: RunFiles) -> str:
    """Returns the closing text of a stopped run, with the command that resumes it.

    The text has the step of the newest checkpoint, or says that none was saved.
    """
    command = shlex.join(_again(files, {}))
    if files.saved is None:
        return f"stopped before anything was saved. To start again:\n  {command}"
    total = files.summary.get("total_updates")
    of = f" of {total}" if total else ""
    return f"stopped and saved after step {files.saved}{of}. To resume:\n  {command}"


def when_measured(files: RunFiles, name: str) -> str:
    """Returns when the newest value of the metric `name` was measured.

    The text is "before training", "after step 200", or "" for the last finished step. The run must
    have a value of the metric.
    """
    steps, _ = files.evaluated(name)
    if steps[-1] == 0:
        return "before training"
    finished = len(files.updates) and files.updates[-1]
    return "" if steps[-1] == finished else f"after step {steps[-1]}"


def closing_rows(files: RunFiles) -> list[tuple[str, str]]:
    """Returns the results of a run as rows (label, text) for the closing text and the page.

    The rows are the models, losses and metrics, the best checkpoint, the held-out images, speed and
    memory. A row is left out if the run's files lack its value.
    """
    summary, student = files.summary, files.recipe["student"]
    begun = f"begun from {student.get('init') or 'random weights'}"
    rows = [("student", f"{full_name(student)}, {begun}")]
    rows += [
        (name, _frozen(name, section, image_side_of(section, files.recipe["data"]["image_size"])))
        for name, section in files.frozen_models.items()
    ]
    losses = files.trained_loss
    if len(losses):
        rows.append(("training loss", f"{losses[0]:.4f} -> {losses[-1]:.4f}"))
    for name in files.measured:
        _, values = files.evaluated(name)
        _, baseline = files.evaluated(f"{name.removesuffix('_loss')}_best_constant")
        text = " -> ".join(f"{value:z.4f}" for value in dict.fromkeys(values[[0, -1]]))
        text = f"{text} {when_measured(files, name)}".rstrip()
        if name.endswith("_loss") and len(baseline):
            ratio = values[-1] / baseline[-1]
            text += f", {ratio:.3f} of the constant-prediction baseline's {baseline[-1]:.4f}"
            views = files.recipe.get("eval", {}).get("views")
            if isinstance(views, int) and views < FEW_VIEWS:
                text += f" (fitted to these {views} views, so too low; more by --eval.views)"
        if not name.endswith("_best_constant"):
            rows.append((files.words(name), text))
    if best := summary.get("best"):
        value = f"step {best['update']}, {files.words(best['metric'])} {best['value']:.4f}"
        rows.append(("best checkpoint", value))
    root = files.recipe.get("eval", {}).get("root")
    if root and _evaluates(files):
        data = files.recipe.get("data", {})
        part = data.get("val_fraction") if root == data.get("root") else 0
        share = f" (the {part:.0%} that data.val_fraction holds out)" if part else ""
        rows.append(("held-out images", f"{root}{share}"))
    if summary.get("images_per_second"):
        speed = f"{summary['images_per_second']:.1f} images/s on {_devices(summary)}"
        rows.append(("speed", speed))
    if summary.get("peak_memory_bytes"):
        memory = f"{summary['peak_memory_bytes'] / 1e9:.2f} GB on the fullest rank"
        rows.append(("peak memory", memory))
    return rows


def next_steps(files: RunFiles) -> list[dict[str, str]]:
    """Returns the commands to suggest after a run, [{"why": reason, "command": command line}].

    They depend on the run's task, on whether it is finished, stopped or running, and on whether its
    student is better than a constant prediction.
    """
    status = files.summary.get("status")
    steps: list[tuple[str, list[str]]] = []
    if beats_constant(files) is False:
        steps.append(_to_beat_it(files))
    elif status == "done":
        # Cached targets of a teacher exist for these images only.
        stored = any(
            cached_folder(teacher.get("source", "")) for teacher in _teachers(files).values()
        )
        if str(files.recipe["data"]["root"]).startswith("builtin:") and not stored:
            steps.append(_on_own_images(files))
    if status == "done":
        steps += _of_task(files)
    elif status != RUNNING:
        again = f"go on from the last checkpoint ({files.saved} steps)"
        if files.saved is None:
            again = "start again from the beginning: no checkpoint is stored yet"
        steps.append((again, _again(files, {})))
    if files.has(EVENTS):
        events = [_program("tensorboard"), "--logdir", f"{files.folder}/{EVENTS}"]
        steps.append(("all curves in a browser", events))
    if status == "done":
        why = "the runs of record: what they need, how long they take, what to expect"
        steps.append((why, [*_commands(files), "recipes"]))
    return [{"why": why, "command": shlex.join(words)} for why, words in steps]


def _on_own_images(files: RunFiles) -> tuple[str, list[str]]:
    """Returns a reason and a command to train on the user's own images.

    After the quick start with its own models, the command trains the recipe `small_data`, which
    needs no test images and fits its settings to the number of images. Otherwise the command is
    that of the run, with other images.
    """
    models = ("student", "teacher", "task")
    if files.recipe["name"] == QUICKSTART and not any(
        name.startswith(models) for name in files.changed
    ):
        words = ["train", "--deepspeed_config", "zero1", "--recipe", SMALL_DATA]
        return "your own images", [*_commands(files), *words, "--data.root", "FOLDER"]
    changes = {"data.root": "FOLDER"}
    if _evaluates(files):
        changes["eval.root"] = "HELD_OUT_FOLDER"
    changes["runtime.run_dir"] = f"{_group(files)}-2"
    return "the same on your own images", _again(files, changes)


def _to_beat_it(files: RunFiles) -> tuple[str, list[str]]:
    """Returns a reason and a command to train again, for a student that was worse than a constant.

    The command is that of the run, as words, with a new folder. If the held-out loss fell, it has
    more steps or epochs. Otherwise it has a quarter of the learning rates at the peak and at both
    ends of the schedule, since rates that a flag sets do not follow the peak.
    """
    optim = files.recipe["optim"]
    _, losses = files.evaluated("held_out_loss")
    folder = {"runtime.run_dir": f"{_group(files)}-2"}
    if losses[-1] < losses[0]:
        length = "max_steps" if optim.get("max_steps") else "epochs"
        done = int(files.updates[-1]) if len(files.updates) else FEWEST_STEPS
        times = max(4, math.ceil(FEWEST_STEPS / max(1, done)))
        more = {f"optim.{length}": str(times * optim[length])}
        return f"the same with {times} times as many steps", _again(files, more | folder)
    rates = {f"optim.{n}": f"{optim[n] / 4:g}" for n in ("base_lr", "warmup_lr", "min_lr")}
    return "the same at a quarter of the learning rate", _again(files, rates | folder)


def _group(files: RunFiles) -> Path:
    """Returns the folder of the whole run.

    If the run trains several students, `files` are those of one student, whose folder is inside
    the run's. Otherwise the result is the folder of `files`.
    """
    return files.folder.parents[1] if files.folder.parent.name == STUDENTS else files.folder


def _teachers(files: RunFiles) -> dict[str, dict[str, Any]]:
    return files.recipe.get("teachers") or {"teacher": files.recipe.get("teacher") or {}}


def _of_task(files: RunFiles) -> list[tuple[str, list[str]]]:
    """Returns the commands that the run's task suggests, as pairs (reason, words of the command).

    There are none for a task of the user's own, whose code a report does not run.
    """
    if files.task not in TASKS:
        return []  # A task of the user's own, whose code a report does not run.
    values = {"{run}": str(files.folder), "{data.root}": str(files.recipe["data"]["root"])}
    commands = []
    entries = _teachers(files)
    # Cached targets of a teacher exist for the training views only.
    teachers = [
        name for name, entry in entries.items() if not cached_folder(entry.get("source", ""))
    ]
    for why, steps in TASKS[files.task].next_steps:
        if steps[0] == "export":
            if beats_constant(files) is False or not (library := _library(files)):
                continue  # The student is of no use, or cannot be exported.
            values["{library}"] = library
        words = [
            each
            for word in steps
            for each in (
                [f"{{run}}#{name}" for name in teachers] if word == "{teachers}" else [word]
            )
        ]
        for placeholder, value in values.items():
            words = [word.replace(placeholder, value) for word in words]
        commands.append((why, [*_commands(files), *words]))
    return commands


def _library(files: RunFiles) -> str:
    """Returns the first format of `export --to` that can hold the run's student.

    The result is "" if no format can, or if the student's model is unknown.
    """
    student = files.recipe["student"]
    architecture = model_of(student)
    if architecture is None:
        return ""
    # The question of `export` itself, which imports torch.
    from fd_large.weights.export import libraries_of

    pads = student.get("size_rule") == "pad"
    rule = student.get("window_rule", "masked")
    try:
        return libraries_of(architecture, pads=pads, window_rule=rule)[0]
    except FDError:
        return ""


def _evaluates(files: RunFiles) -> bool:
    """Whether the run evaluates on held-out images.

    Every built-in task does so. A run of the user's own task does if it has an evaluation.
    """
    return files.task in TASKS or bool(files.evaluations)


def _commands(files: RunFiles) -> list[str]:
    """Returns the words that call this package's program, as the run was launched.

    They are ["fd-large"] if this script launched the run, and otherwise ["python", "-m",
    "fd_large"]. The first word is a path if a shell would not find the program by its name.
    """
    started = Path(next(iter(files.environment.get("command", [])), ""))
    if started.name == "fd-large":
        return [_program("fd-large")]
    return [_program("python"), "-m", "fd_large"]


def progress(files: RunFiles) -> str:
    """Returns the number of finished steps and the total, as "200 of 400 steps".

    The text is "200 steps" if the total is unknown.
    """
    done = int(files.updates[-1]) if len(files.updates) else 0
    total = files.summary.get("total_updates")
    return f"{done} of {total} steps" if total else f"{done} steps"


def _frozen(name: str, section: dict[str, Any], side: int) -> str:
    model = full_name(section)
    if side:  # Of several teachers, which may have the same model, the size is shown too.
        changed = changed_words(section)
        model += f" ({changed}) at {side} px" if changed else f" at {side} px"
    if section["source"] == "random":
        name = name.replace("teacher ", "teachers.")
        return (
            f"{model} with RANDOM weights: shows only that training runs; set real weights with "
            f"--{name}.source FILE"
        )
    return f"{model} from {section['source']}"


def _devices(summary: dict[str, Any]) -> str:
    count, kind = summary.get("world_size", 1), summary.get("device", "cpu")
    device = {"cuda": "GPU", "cpu": "CPU rank"}.get(kind, kind)
    return f"{count} {device}{'s' if count > 1 else ''}"


def _again(files: RunFiles, more: Mapping[str, str]) -> list[str]:
    """Returns the words of the command that started the run, with some flags changed.

    Args:
        files: The run.
        more: The changed flags, {full name of a field: value}.
    """
    environment = files.environment
    ranks = environment.get("world_size", 1)
    first, *words = environment.get("command") or [""]
    if words[:1] == ["evaluate"]:
        return [*_commands(files), *words]  # The command evaluate resumes its trainings itself.
    if environment.get("launcher") == "srun" and not more and (script := _batch_script()):
        return ["sbatch", script, str(_group(files))]
    flags: dict[str, list[str]] = {}
    values: list[str] = []
    for word in words:
        if word.startswith("--"):
            name = word[2:].partition("=")[0].replace("-", "_")
            flags.pop(name, None)  # If a flag is repeated, the last one counts.
            values = flags.setdefault(name, [])
        values.append(word)
    # The launcher gives local_rank, and fresh would throw away what the run has done.
    left_out = {"local_rank", "fresh", *LEFT, *more}
    arguments = [word for name in flags if name not in left_out for word in flags[name]]
    if "deepspeed_config" not in flags:
        # The run was started from Python: its differences from the recipe become flags.
        arguments = ["--deepspeed_config", "zero3", *_as_flags(files, left_out)]
    arguments += [word for name, value in more.items() for word in (f"--{name}", value)]
    script = ["--module", "fd_large.train"]
    if Path(first).name == "train.py" or kind_of(Path("fd_large/train.py")):
        script = [_train_script(first)]
    match environment.get("launcher"):
        case "python":
            several = ["--ranks", str(ranks)] if ranks > 1 else []
            return [*_commands(files), *several, "train", *arguments]
        case "torchrun":
            return [_program("torchrun"), f"--nproc_per_node={ranks}", *script, *arguments]
    launcher = [_program("deepspeed")]
    if environment.get("device") == "cpu" and ranks > 1:
        # Without GPUs the launcher does not know the number of ranks.
        launcher += ["--num_accelerators", str(ranks)]
    return [*launcher, *script, *arguments]


def _batch_script() -> str:
    """Returns the path of the script that resumes a run in a batch job, or "" if there is none.

    The path is relative to the current folder: slurm/resume.sh in a clone of the repository, or
    resume.sh in a folder that `init` wrote.
    """
    scripts = ("slurm/resume.sh", "resume.sh")
    return next((name for name in scripts if kind_of(Path(name))), "")


def _as_flags(files: RunFiles, left_out: Collection[str]) -> list[str]:
    """Returns flags for the recipe of a run and for the fields in which the run differs from it.

    Args:
        files: The run.
        left_out: Names of fields for which no flag is returned.
    """
    words = ["--recipe", files.recipe["name"]]
    changed = {name: value for name, (value, _) in files.changed.items()}
    if {"optim.base_lr", "optim.epochs"} & changed.keys():
        # As they are, even where the recipe has the same: else they would follow.
        values = flat_plain(files.recipe)
        changed |= {name: values[name] for name in FOLLOWING if name in values}
    for name, value in changed.items():
        if name not in left_out:
            words += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return words


def _train_script(first: str) -> str:
    """Returns the path of train.py for a launcher's command.

    The path is relative to the root of a clone. If the run was started from the installed package,
    and the current folder is no clone, the path leads into the package.

    Args:
        first: The program in the run's command.
    """
    in_clone, script = Path("fd_large/train.py"), Path(__file__).parents[1] / "train.py"
    is_packages = os.path.realpath(first) == os.path.realpath(script)
    is_elsewhere = not kind_of(in_clone) and is_packages
    return str(script if is_elsewhere else in_clone)


def _program(name: str) -> str:
    """Returns how to call a program that is installed in the folder of this Python.

    The result is the program's path. If $PATH already leads to this folder, or the folder has no
    such program, the result is the name alone.
    """
    beside = Path(sys.executable).parent / name
    program_path = shutil.which(name)
    if not kind_of(beside) or (program_path and Path(program_path).parent == beside.parent):
        return name
    relative = os.path.relpath(beside)
    return str(beside) if relative.startswith("..") else relative
