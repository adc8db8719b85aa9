"""Commands, exit codes and mistakes in one sentence; no torch before it is needed."""

import errno
import importlib
import inspect
import json
import logging
import os
import re
import subprocess
import sys
import types
from dataclasses import replace
from pathlib import Path

import pytest

from fd_large.cli import main as cli
from fd_large.cli.train import Train, parse_train
from fd_large.errors import ConfigError, DataError
from fd_large.ranks.launch import RANK_VARIABLES
from fd_large.recipes import registry
from fd_large.recipes.architectures import ARCHITECTURES, FAMILIES
from fd_large.recipes.fields import field_names
from fd_large.recipes.run import Run

ROOT = Path(__file__).resolve().parents[3]


def run_python(*arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
    clean = {k: v for k, v in os.environ.items() if k not in RANK_VARIABLES}
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env={**clean, **environ},
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch):
    for name in RANK_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    # `train` takes over the log of the process.
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    logging.captureWarnings(False)


@pytest.fixture
def engine(monkeypatch, tmp_path):
    """Stands in for the engine: records the call, or raises what `raises` holds."""
    calls = types.SimpleNamespace(run=None, flags=None, raises=None)

    def train(run, job_of, *, deepspeed_config, lease, fresh, profile):
        assert lease.owned()
        calls.run, calls.flags = run, (deepspeed_config, fresh)
        if calls.raises:
            raise calls.raises
        return 0

    monkeypatch.chdir(tmp_path)  # Where the run's folder is made.
    monkeypatch.setattr("fd_large.ranks.distributed.start", lambda launch: None)
    module = types.ModuleType("fd_large.engine.run")
    module.train = train
    monkeypatch.setitem(sys.modules, "fd_large.engine.run", module)
    return calls


def one_sentence(capsys) -> str:
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = captured.err.splitlines()
    assert len(lines) == 1, captured.err
    return lines[0]


def test_the_recipe_gives_the_defaults_and_flags_override(engine):
    words = (
        "--local_rank=3 --deepspeed_config zero3 --recipe fd_swinv2g --fresh"
        " --teacher.source random --data.root builtin:photographs --optim.base_lr=1e-4"
        " --batch.micro_batch_size auto"
    )
    assert cli.main(["train", *words.split()]) == 0
    recipe = registry.get("fd_swinv2g")
    assert engine.flags == ("zero3", True)
    assert engine.run.student == recipe.student
    assert engine.run.teacher == replace(recipe.teacher, source="random")
    assert engine.run.name == "fd_swinv2g"
    assert engine.run.data.root == "builtin:photographs"
    assert engine.run.optim.base_lr == 1e-4
    assert engine.run.batch.micro_batch_size == "auto"


def test_without_a_recipe_the_default_one_runs(engine):
    assert cli.main(["train", "--deepspeed_config", "zero3"]) == 0
    assert engine.run == registry.get("quickstart")
    assert engine.flags == ("zero3", False)


@pytest.mark.parametrize(
    ("words", "found"),
    [
        ("--optim.base_rl 3", ["--optim.base_rl", "nearest: --optim.base_lr"]),
        ("--base_lr 3", ["--base_lr", "nearest: --optim.base_lr"]),
        ("--student.architecture.dephts 2", ["nearest: --student.architecture.depths"]),
        ("--guard.no_skips", ["--guard.no_skips", "nearest: --guard.skips"]),
        ("--name x", ["--name"]),
        ("--recipe fd_clip_vit_bas", ["--recipe", "'fd_clip_vit_bas', nearest"]),
        ("--student.model swinv2_gaint", ["student.model", "'swinv2_gaint', nearest"]),
        ("--batch.micro_batch_size x", ["batch.micro_batch_size", "got x, "]),
        ("--batch.micro_batch_size 7", ["batch.micro_batch_size"]),
        ("--student.architecture.depths 2 x", ["student.architecture.depths", "got 2 x, "]),
        ("--engine.precision=fp16", ["got fp16, expected one of auto, float32, bfloat16"]),
        ("--guard.enabled maybe", ["--guard.enabled", "got maybe"]),
        ("--profile -1", ["--profile:", "got -1"]),
    ],
)
def test_a_mistake_is_one_sentence_and_exit_code_2(words, found, engine, capsys):
    assert cli.main(["train", "--deepspeed_config", "zero3", *words.split()]) == 2
    said = one_sentence(capsys)
    for part in found:
        assert part in said
    assert engine.run is None


def test_several_mistakes_are_a_line_each(engine, capsys):
    words = "stray --optim.base_rl 3 --optim.eps -1 --data.workers x"
    assert cli.main(["train", *words.split()]) == 2
    named = [line.partition(":")[0] for line in capsys.readouterr().err.splitlines()]
    assert sorted(named) == [
        "--data.workers",
        "--deepspeed_config",
        "--optim.base_rl",
        "optim.eps",
        "train",
    ]


def test_a_run_ends_with_its_report(engine, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("fd_large.report.make.make_report", lambda folder: f"report of {folder}")
    words = ["train", "--deepspeed_config", "zero3", "--runtime.run_dir", str(tmp_path)]
    assert cli.main(words) == 0
    assert capsys.readouterr().out == f"\nreport of {tmp_path}\n"


def test_a_report_that_fails_does_not_fail_the_run(engine, tmp_path, monkeypatch, capsys):
    # No recipe.json in it: no run.
    words = ["train", "--deepspeed_config", "zero3", "--runtime.run_dir", str(tmp_path)]
    assert cli.main(words) == 0
    said = capsys.readouterr()
    assert "the run is complete: " in said.out
    assert "Traceback" not in said.out + said.err


@pytest.mark.parametrize(
    ("words", "found"),
    [("", "RUN"), ("one two", "two"), ("--rum one", "--rum"), ("nowhere", "nowhere")],
)
def test_a_mistake_in_report_is_one_sentence(words, found, capsys):
    assert cli.main(["report", *words.split()]) == 2
    assert found in one_sentence(capsys)


def test_an_unknown_command_names_the_nearest(capsys):
    assert cli.main(["trian"]) == 2
    assert "nearest: train" in one_sentence(capsys)


def test_a_users_mistake_in_the_engine_is_a_sentence_and_ours_a_traceback(engine, capsys):
    arguments = ["train", "--deepspeed_config", "zero3"]
    engine.raises = DataError("data.root: no images; got images, expected some. Mend it.")
    assert cli.main(arguments) == 2
    assert one_sentence(capsys) == str(engine.raises)
    engine.raises = RuntimeError("ours")
    with pytest.raises(RuntimeError, match="ours"):
        cli.main(arguments)


def test_a_refused_path_is_a_sentence_and_a_servers_refusal_a_traceback(engine, capsys):
    arguments = ["train", "--deepspeed_config", "zero3"]
    for error, code in ((errno.ENOSPC, 2), (errno.ESTALE, 75), (errno.ECONNRESET, 75)):
        engine.raises = OSError(error, os.strerror(error), "a/path")
        assert cli.main(arguments) == code
        assert one_sentence(capsys).startswith("a/path: ")
    engine.raises = OSError(errno.ECONNREFUSED, "Connection refused")  # Of a tracker, say.
    with pytest.raises(ConnectionError):
        cli.main(arguments)


def test_the_exit_code_is_the_errors_own(engine, capsys):
    class Stopped(ConfigError):
        exit_code = 3

    engine.raises = Stopped("guard: stopped")
    assert cli.main(["train", "--deepspeed_config", "zero3"]) == 3


@pytest.mark.parametrize("variable", RANK_VARIABLES)
def test_only_rank_0_tells_a_mistake(variable, monkeypatch, capsys):
    monkeypatch.setattr(cli, "SECONDS_FOR_RANK_0", 0.0)
    monkeypatch.setenv(variable, "1")
    assert cli.main(["trian"]) == 2
    assert capsys.readouterr().err == ""
    monkeypatch.setenv(variable, "0")
    assert cli.main(["trian"]) == 2
    one_sentence(capsys)


@pytest.mark.parametrize(
    ("words", "found"),
    [
        ("--ranks", "--ranks: not a number of processes; got ''"),
        ("--ranks=0 train", "--ranks: not a number of processes; got '0'"),
        ("--ranks train", "--ranks: not a number of processes; got 'train'"),
        ("--ranks 2 trian", "nearest: train"),
        ("--ranks 2 train --deepspeed_config zero3 --data.root /nowhere", "data.root"),
    ],
)
def test_a_mistake_is_told_before_ranks_are_started(words, found, capsys, monkeypatch):
    monkeypatch.setattr(cli, "run_ranks", lambda *_, **__: pytest.fail("ranks"))
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")  # With a GPU every rank tells it.
    assert cli.main(words.split()) == 2
    assert found in one_sentence(capsys)


@pytest.mark.parametrize("has_gpu", [False, True])
def test_each_rank_runs_the_command(has_gpu, engine, monkeypatch, tmp_path):
    """What ranks share is imported before they are forked, where there is no GPU to spoil."""
    started, shared = [], []

    def run_ranks(number, work, *, prepare):
        assert prepare is cli.leave_at_signals
        started.append((number, *shared))
        return work()

    def import_module(name):
        shared.append(name)
        return importlib.import_module(name)

    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    monkeypatch.setattr(cli, "_GPUS", (str(tmp_path if has_gpu else tmp_path / "no"),))
    monkeypatch.setattr(cli, "run_ranks", run_ranks)
    monkeypatch.setattr(cli, "import_module", import_module)
    words = ["train", "--deepspeed_config", "zero3", "--runtime.run_dir", str(tmp_path / "run")]
    monkeypatch.setattr(sys, "argv", ["fd_large", "--ranks", "3", *words])
    assert cli.main(["--ranks", "3", *words]) == 0
    assert sys.argv == ["fd_large", *words]
    assert engine.run.run_dir() == str(tmp_path / "run")
    [(number, *names)] = started
    assert number == 3
    assert ("fd_large.engine.run" in names) != has_gpu


def test_help_lists_every_field_with_help_and_the_recipes_default(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")  # One column of boxes.
    assert cli.main(["train", "--help", "all", "--recipe", "fd_swinv2g"]) == 0
    text = capsys.readouterr().out.replace("│", " ")
    names = {*field_names(Train), *field_names(Run)} - {"name"}
    for name in names:
        # The flag, then words before the default: a field without help shows "(default" alone.
        pattern = rf"^ +--{re.escape(name)}[ ,].*?\((default|required)"
        entry = re.search(pattern, text, re.DOTALL | re.MULTILINE)
        assert entry, name
        _flag, told = entry.group().split("\n", 1)
        assert len(told.split()) > 3, (name, told)
    words = " ".join(text.split())
    assert "(default: fd_swinv2g)" in words
    assert inspect.getdoc(Train).splitlines()[0] in words
    assert "7.5e-05" in text


@pytest.mark.parametrize("recipe", registry.RECIPES)
def test_help_of_train_is_one_screen(recipe, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    assert cli.main(["train", "--help", "--recipe", recipe]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 50
    assert max(map(len, lines)) <= 100
    flags = {line.split()[0].removeprefix("--") for line in lines if line.startswith("  --")}
    assert {"deepspeed_config", "recipe", "data.root", "optim.base_lr"} <= flags
    run = registry.get(recipe)
    kind = run.task.kind()
    # What is shown is a flag of this recipe's, and a section that its task refuses is not there.
    assert flags <= field_names(Train).keys() | field_names(Run).keys()
    named = {line.split()[0] for line in lines if re.match(r"  [a-z]+ ", line)}
    assert {"student", "optim", "runtime"} <= named
    assert ("teacher" in named) == ("teacher" in kind.sections) == ("teacher.source" in flags)
    assert f"({run.optim.base_lr})" in "\n".join(lines)


@pytest.mark.parametrize(
    "command", ["train", "plan", "cache", "statistics", "evaluate", "transfer"]
)
@pytest.mark.parametrize("asked", ["optim", "optim.eps", "task.detection", "teachers", "all"])
def test_help_shows_a_section_in_full(command, asked, capsys):
    assert cli.main([command, "--help", asked]) == 0
    text = capsys.readouterr().out
    for section, sample in (
        ("optim", "--optim.ema_decay"),
        ("task.detection", "--task.detection.num_classes"),
        ("teachers", "--teachers.NAME.layer"),
        ("data", "--data.root"),
    ):
        is_shown = asked in (section, "all") or asked.startswith(f"{section}.")
        assert (f"{sample} " in text) == is_shown, section


def test_a_section_that_is_not_there_has_the_nearest_name(capsys):
    assert cli.main(["train", "--help", "optm"]) == 2
    assert "nearest: optim" in one_sentence(capsys)
    assert cli.main(["train", "--recipe", "quickstrat", "--help"]) == 2
    assert "nearest: quickstart" in one_sentence(capsys)


def test_an_unknown_flag_names_the_help_of_its_section(capsys):
    assert cli.main(["plan", "--optim.base_rl", "1"]) == 2
    assert "plan --help optim." in one_sentence(capsys)
    assert cli.main(["plan", "--gpsu", "1"]) == 2
    assert "plan --help." in one_sentence(capsys)


def test_help_lists_the_section_of_a_task_of_the_users_own(tmp_path, monkeypatch, capsys):
    (tmp_path / "colour.py").write_text(
        "from dataclasses import dataclass\n"
        "from fd_large.recipes.task_kind import TaskKind\n"
        "@dataclass(frozen=True, kw_only=True)\n"
        "class Colour:\n"
        '    """Of a colour."""\n'
        "    # Factor of the loss.\n"
        "    weight: float = 1.0\n"
        "KIND = TaskKind(name='colour', job='', section=Colour)\n"
    )
    monkeypatch.chdir(tmp_path)
    asked = ["train", "--task.name", "module:colour.py:KIND", "--help", "task.colour"]
    assert cli.main(asked) == 0
    assert "--task.colour.weight" in capsys.readouterr().out


def test_usage_shows_which_arguments_are_optional(capsys):
    for command, usage in (("recipes", "[NAME]"), ("models", "[PART]"), ("report", "RUN")):
        assert cli.main([command, "--help"]) == 0
        assert f"{command} [-h] {usage}\n" in capsys.readouterr().out


@pytest.mark.parametrize("width", [80, 100, 120])
def test_the_table_of_recipes_fits_its_width(width, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(width))
    assert cli.main(["recipes"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(len(line.rstrip()) for line in lines) <= width
    assert lines[0].rstrip().endswith("GPU-hours are planned on A100s")
    # No name is cut or broken.
    for name in registry.RECIPES:
        run = registry.get(name)
        assert any(f" {name} " in line for line in lines)
        nets = [run.student.model, *(frozen.model for frozen in run.frozen_models.values())]
        for net in nets:
            assert any(f" {net} " in line for line in lines)


@pytest.mark.parametrize("name", registry.RECIPES)
def test_a_recipe_is_shown_as_the_run_file_that_it_is(name, tmp_path, capsys):
    assert cli.main(["recipes", name]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith(f"# {registry.facts(name).summary}\n")
    file = tmp_path / "run.yaml"
    file.write_text(shown)
    given = parse_train(["--deepspeed_config", "zero3", "--config", str(file)])
    assert given.run == registry.get(name)


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (["quickstrat"], ["'quickstrat'", "nearest: quickstart"]),
        (["NOPE"], ["'NOPE'", "known: "]),
        (["quickstart", "fd_swinv2g"], ["'fd_swinv2g'"]),
    ],
)
def test_a_recipe_that_is_not_there_is_one_sentence_with_names_that_are(words, found, capsys):
    assert cli.main(["recipes", *words]) == 2
    said = one_sentence(capsys)
    for part in ["recipes: ", *found]:
        assert part in said


@pytest.mark.parametrize("columns", ["", "wide", "-3"])
def test_a_width_that_is_no_number_is_passed_by(columns, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", columns)
    assert cli.main(["recipes"]) == 0
    assert "quickstart" in capsys.readouterr().out


def test_models_are_listed_and_found_by_a_part_of_their_names(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert cli.main(["models"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for name in ARCHITECTURES.keys() - FAMILIES.keys():
        assert any(f" {name} " in line for line in lines)
    assert max(map(len, lines)) <= 80
    assert cli.main(["models", "Vit_Base_Patch16"]) == 0
    found = capsys.readouterr().out.split()
    assert {"clip_vit_base_patch16", "timm:vit_base_patch16_224"} <= set(found)
    assert cli.main(["models", "inception_resnet"]) == 0
    assert capsys.readouterr().out.startswith("timm:inception_resnet_v2  (refused: ")
    assert cli.main(["models", "no such"]) == 2
    assert "'no such'" in one_sentence(capsys)


IMPORTS = """
import json, sys
from fd_large.cli.main import main
code = main({arguments})
heavy = [m for m in ("torch", "deepspeed", "numpy") if m in sys.modules]
print(json.dumps([code, heavy]))
"""


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["train", "--help"],
        ["train", "--help", "optim"],
        ["--ranks", "2", "train", "--help"],
        ["recipes"],
        ["recipes", "quickstart"],
        ["models"],
        ["report", "--help"],
        ["train", "--typo", "1"],
    ],
)
def test_answers_without_torch(arguments):
    done = run_python("-c", IMPORTS.format(arguments=arguments))
    assert done.returncode == 0, done.stderr
    code, heavy = json.loads(done.stdout.splitlines()[-1])
    assert heavy == []
    assert code == (2 if "--typo" in arguments else 0)


def test_the_script_finds_the_package_from_any_folder(tmp_path):
    script = ROOT / "fd_large" / "train.py"
    done = subprocess.run(
        [sys.executable, str(script), "--local_rank=0", "--optim.base_rl", "1"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2
    assert "--optim.base_rl" in done.stderr


def test_the_module_exits_with_mains_code():
    done = run_python("-m", "fd_large", "trian")
    assert done.returncode == 2
    assert "nearest: train" in done.stderr


def test_a_closed_pipe_is_no_traceback():
    command = [sys.executable, "-m", "fd_large", "train", "--help", "all"]
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as running:
        # More than a pipe holds is still to come.
        assert running.stdout.readline().startswith("usage: ")
        running.stdout.close()
        assert running.stderr.read() == ""
        assert running.wait(60) == 0


def test_the_version(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("fd_large 0.")


@pytest.mark.parametrize(
    "words",
    [
        *(["report", ""], ["export", "", "out", "--to", "timm"], ["weights", "inspect", ""]),
        *(["init", ""], ["checkpoint", "list", ""], ["evaluate", "run", ""], ["replay", ""]),
        ["train", "--deepspeed_config", "zero3", "--config", ""],
    ],
)
def test_an_empty_string_is_no_folder(words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(words) == 2
    assert ": empty; got ''" in one_sentence(capsys)
    assert not list(tmp_path.iterdir())
