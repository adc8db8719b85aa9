"""Arguments to a dataclass and to fields of a recipe; mistakes by name, all at once."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

import pytest
from tyro.conf import Positional, arg

from fd_large import doors
from fd_large.cli.arguments import AllowsCode, HelpShown, choose, parse, parse_with_recipe
from fd_large.cli.cache import Cache
from fd_large.cli.evaluate import Evaluate
from fd_large.cli.report import Report
from fd_large.cli.statistics import Statistics
from fd_large.cli.train import parse_train
from fd_large.errors import ConfigError
from fd_large.recipes import registry
from fd_large.recipes.fields import at_least, field_names, flat, override
from fd_large.recipes.run import Run


@dataclass(frozen=True, kw_only=True)
class Teacher:
    """A teacher of several."""

    # Name of the model.
    model: str
    # Share of the loss.
    weight: float = 1.0

    def __post_init__(self) -> None:
        if self.weight < 0:
            raise ConfigError("weight: negative")


@dataclass(frozen=True, kw_only=True)
class Toy:
    """A command."""

    # What is read.
    source: Annotated[str, Positional, arg(metavar="SOURCE")]
    # What else is read.
    others: Annotated[tuple[str, ...], Positional, arg(metavar="OTHER ...")] = ()
    # Where it goes.
    to: Literal["a", "b"]
    # Numbers.
    numbers: tuple[float, ...] = (1.0,)
    # Two numbers.
    pair: tuple[int, int] = (0, 0)
    # A count.
    count: int | None = None
    # A switch.
    loud: bool = False
    # Teachers by name.
    teachers: dict[str, Teacher] = field(default_factory=dict)

    def __post_init__(self) -> None:
        at_least("pair", self.pair[0], 0, "things")
        at_least("count", self.count or 0, 0, "things")


@dataclass(frozen=True, kw_only=True)
class WithRecipe:
    """A command that takes a recipe."""

    # Name of the recipe.
    recipe: str = "quickstart"
    # An amount.
    rows: int = 1


def toy(text: str) -> Toy:
    return parse(Toy, text.split(), command="toy")


def run_of(text: str) -> Run:
    return parse_with_recipe(WithRecipe, text.split(), command="plan", recipe="quickstart").run


def run_of_file(path, text: str) -> Run:
    arguments = ["--deepspeed_config", "zero1", "--config", str(path), *text.split()]
    return parse_train(arguments).run


def mistakes(call) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        call()
    return str(caught.value).splitlines()


def fields_of(said: list[str]) -> list[str]:
    return [line.partition(":")[0] for line in said]


@pytest.mark.parametrize(
    ("text", "changed"),
    [
        ("s --to a", {}),
        ("--to=b s", {"to": "b"}),
        ("--to b s o p", {"to": "b", "others": ("o", "p")}),
        ("--source s --to a o", {"others": ("o",)}),
        ("o --to a --source s", {"others": ("o",)}),
        ("s --to a --others o p", {"others": ("o", "p")}),
        ("s --to a --to b", {"to": "b"}),
        ("--numbers 1 -2e-3 s --to a", {"numbers": (1.0, -2e-3)}),
        ("--pair 1 2 s o --to a", {"pair": (1, 2), "others": ("o",)}),
        ("--loud s --to a", {"loud": True}),
        ("--loud True s --to a", {"loud": True}),
        ("--loud --loud False s --to a", {}),
        ("--loud --no-loud s --to a", {}),
        ("s --count 3 --to a --count None", {}),
        ("s --local_rank=3 --to a", {}),
    ],
)
def test_flags_and_positional_arguments_mix(text, changed):
    assert toy(text) == Toy(**{"source": "s", "to": "a", **changed})


def test_a_value_may_begin_with_a_dash():
    assert toy("-s -o --to a") == Toy(source="-s", others=("-o",), to="a")


def test_sections_are_named_on_the_command_line():
    given = toy(
        "s --to a --teachers.clip-b.model m --teachers.dino.model n --teachers.dino.weight 2"
    )
    assert given.teachers == {
        "clip-b": Teacher(model="m"),
        "dino": Teacher(model="n", weight=2.0),
    }
    assert flat(given)["teachers.dino.weight"] == 2.0
    changed = override(given, {"teachers.dino.weight": 3.0, "teachers.new.model": "o"})
    assert changed.teachers["dino"] == Teacher(model="n", weight=3.0)
    assert changed.teachers["new"] == Teacher(model="o")
    assert "teachers.NAME.weight" in field_names(Toy)


def test_the_later_value_of_an_entry_holds_and_is_told(caplog):
    given = toy("s --to b --to a --teachers.a.model m --teachers.b.model m --teachers.a.model n")
    assert given.teachers == {"a": Teacher(model="n"), "b": Teacher(model="m")}
    (said,) = caplog.messages
    assert "--teachers.a.model: given twice" in said


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("s --to a --teachers.clip.modle m", ["--teachers.clip.modle", "teachers.clip.model"]),
        ("s --to a --teachers.clip.weight x", ["--teachers.clip.weight", "a number"]),
        ("s --to a --teachers.clip.weight 1", ["teachers.clip", "model"]),
        ("s --to a --teachers.clip 1", ["--teachers.clip", "teachers.clip.model"]),
        ("s --to c", ["--to", "got c", "a, b"]),
        ("s", ["--to"]),
        ("--to a", ["SOURCE is missing"]),
        ("s --to a --pair 1", ["--pair", "2 whole numbers"]),
        ("s --to a --count", ["--count", "got nothing"]),
        ("s --to a --loud=maybe", ["--loud", "maybe"]),
        ("s --to a --no_count", ["--no_count"]),
        ("s --to a --count -1", ["count", "-1"]),
        ("--colour red s --to a", ["--colour"]),
    ],
)
def test_a_mistake_is_one_sentence(text, found):
    (said,) = mistakes(lambda: toy(text))
    for part in found:
        assert part in said


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("--cuont 3 --to c --numbers x", ["--cuont", "--to", "--numbers"]),
        ("s --to a --pair -1 2 --count -1 --cuont 3", ["--cuont", "pair", "count"]),
    ],
)
def test_all_mistakes_are_reported_at_once(text, named):
    assert fields_of(mistakes(lambda: toy(text))) == named


@pytest.mark.parametrize(("command", "kind"), [("cache", Cache), ("statistics", Statistics)])
@pytest.mark.parametrize(
    ("text", "recipe"),
    [
        ("fd_swinv2g here", "fd_swinv2g"),
        ("--recipe fd_swinv2g --out here", "fd_swinv2g"),
        ("here --recipe fd_swinv2g", "fd_swinv2g"),
        ("fd_swinv2g --out here", "fd_swinv2g"),
        ("--out here", "quickstart"),
        # A recipe that is named wins over the name in the file, however it is named.
        ("--out here --config {file}", "fd_clip_vit_base"),
        ("--config {file} --out here --recipe fd_swinv2g", "fd_swinv2g"),
        ("fd_swinv2g here --config {file}", "fd_swinv2g"),
        ("--config {file} fd_swinv2g here", "fd_swinv2g"),
    ],
)
def test_commands_that_read_teachers_take_a_recipe_alike(command, kind, text, recipe, tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("name: fd_clip_vit_base\noptim: {epochs: 7, warmup_epochs: 1}\n")
    arguments = text.format(file=file).split()
    arguments += ["--deepspeed_config", "zero1"] if kind is Statistics else []
    given = parse_with_recipe(kind, arguments, command=command, recipe="quickstart")
    assert (given.own.out, given.run.name) == ("here", recipe)
    assert (given.run.optim.epochs == 7) == ("--config" in text)


@pytest.mark.parametrize("name", registry.RECIPES)
def test_every_recipe_passes_unchanged(name):
    assert run_of(f"--recipe {name}") == registry.get(name)


def test_fields_of_a_recipe_mix_with_the_commands_own():
    text = (
        "--optim.betas 0.9 0.95 --rows 3 --recipe fd_swinv2g --student.architecture.depths 2 2 6 2"
    )
    text += " --student.architecture.window-size 7 --student.architecture.window-size None"
    text += (
        " --batch.micro_batch_size auto --optim.epochs=50 --optim.epochs 60 --guard.enabled False"
    )
    given = parse_with_recipe(WithRecipe, text.split(), command="plan", recipe="quickstart")
    assert given.own == WithRecipe(recipe="fd_swinv2g", rows=3)
    assert given.run == override(registry.get("fd_swinv2g"), given.fields)
    assert given.fields == {
        "optim.betas": (0.9, 0.95),
        "student.architecture.depths": (2, 2, 6, 2),
        "student.architecture.window_size": None,
        "batch.micro_batch_size": "auto",
        "optim.epochs": 60,
        "guard.enabled": False,
    }


def test_a_commands_own_argument_may_have_a_sections_name():
    text = "s --task finetune --task.finetune.erasing 0"
    given = parse_with_recipe(
        Evaluate, text.split(), command="evaluate", recipe="finetune_clip_vit_base"
    )
    assert (given.own.task, given.own.models) == ("finetune", ("s",))
    assert given.run.task.finetune.erasing == 0
    assert given.fields == {"task.finetune.erasing": 0}


def test_mistakes_in_a_recipe_are_reported_with_the_others():
    text = "--recipe fd_swinv2g --rowss 3 --optim.base_rl 1 --optim.eps -1 --optim.clip_norm -2"
    text += " --data.image_size 0 --engine.precision fp16 --student.model swinv2_gaint"
    assert set(fields_of(mistakes(lambda: run_of(f"stray {text}")))) == {
        *("plan", "--rowss", "--optim.base_rl", "--engine.precision"),
        *("optim.eps", "optim.clip_norm", "data.image_size", "student.model"),
    }
    assert fields_of(mistakes(lambda: run_of("--recipe quickstrat"))) == ["--recipe"]


@pytest.mark.parametrize("asked", ["--help", "-h"])
def test_help_lists_metavars_comments_and_defaults(asked, capsys):
    with pytest.raises(HelpShown):
        toy(f"{asked} --to c")
    text = " ".join(capsys.readouterr().out.split())
    for part in ("SOURCE", "OTHER ...", "What is read.", "{a,b}", "Two numbers. (default: 0 0)"):
        assert part in text


def test_choose():
    commands = {"list": "List.", "verify": "Verify."}
    assert choose(["list", "x"], commands) == ("list", ["x"])
    with pytest.raises(ConfigError, match="nearest: verify"):
        choose(["verfy"], commands)
    with pytest.raises(HelpShown):
        choose([], commands)


def test_code_is_allowed_by_the_argument_of_commands_that_build_stored_models(tmp_path):
    path = tmp_path / "own.py"
    with pytest.raises(ConfigError, match="--allow_code"):
        parse(AllowsCode, ["--allow-code", str(path)], command="export")
    path.write_text("x = 1\n")
    source = f"module:{path}:x"
    assert not doors.is_allowed(source)
    parse(AllowsCode, ["--allow-code", str(path)], command="export")
    assert doors.is_allowed(source)


def test_code_that_is_not_there_is_reported_at_once_and_nothing_is_imported(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(f"def cosine(): pass\nopen({str(tmp_path / 'ran')!r}, 'w')\n")
    text = f"source --objective.loss module:{file}:cosin --optim.name module:gone.py:Lion"
    text += f" --runtime.trackers tensorboard module:gone.py:Csv --task.name module:{file}"
    text += f" --objective.head module:{file}:cosine --student.model=module:no.such.one:Net"
    found = mistakes(lambda: run_of(text))
    assert fields_of(found) == [
        *("--objective.loss", "--optim.name", "--runtime.trackers", "--task.name"),
        "--student.model",
    ]
    assert "nearest: cosine" in str(found)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("text", "named"),
    [
        # The recipe's own value stands in for a refused one; its conflicts are nobody's mistakes.
        ("--batch.micro_batch_size 3", ["batch.micro_batch_size"]),
        ("--student.architecture.num_heads 3 5", ["student.architecture.num_heads"]),
        ("--student.architecture.depths 0", ["student.architecture.depths"]),
        ("--batch.global_batch_size -1 --batch.micro_batch_size 3", ["batch.global_batch_size"]),
        ("--batch.global_batch_size x --batch.micro_batch_size 3", ["--batch.global_batch_size"]),
        ("--batch.global_batch_size 100 --batch.micro_batch_sise 5", ["--batch.micro_batch_sise"]),
        (
            "--batch.global_batch_size 16 --batch.micro_batch_size 3",
            ["batch.micro_batch_size"],
        ),
        (
            "--student.architecture.depths 1 2 --student.architecture.num_heads 3 5",
            ["student.architecture.num_heads"],
        ),
        (
            "--student.architecture.depths 0 --student.architecture.num_heads 1 2",
            ["student.architecture.depths"],
        ),
        # Others are told beside.
        ("--batch.micro_batch_size 3 --optim.eps 0", ["batch.micro_batch_size", "optim.eps"]),
        ("--batch.micro_batch_size 0 --optim.max_stpes 1", None),
    ],
)
def test_a_mistake_brings_no_second_one(text, named):
    found = fields_of(mistakes(lambda: run_of(f"--recipe fd_swinv2g {text}")))
    named = named or ["--optim.max_stpes", "batch.micro_batch_size"]
    assert sorted(found) == sorted(named)


@pytest.mark.parametrize(
    ("text", "own", "of_recipe"),
    [
        ("--optim.warmup_epochs 5e2", ["optim.warmup_epochs"], ["optim.epochs"]),
        ("--optim.min_lr 1", ["optim.min_lr"], ["optim.base_lr"]),
        ("--batch.global_batch_size 100", ["batch.global_batch_size"], ["batch.micro_batch_size"]),
        ("--batch.global_batch_size 9 --batch.micro_batch_size 2", ["batch.micro_batch_size"], []),
        ("--eval.patience 3", ["eval.patience"], ["eval.best_metric"]),
        (
            "--student.architecture.depths 2 2",
            ["student.architecture.depths"],
            ["student.architecture.num_heads"],
        ),
    ],
)
def test_the_remedy_of_a_conflict_names_first_what_the_user_set(text, own, of_recipe):
    (told,) = mistakes(lambda: run_of(f"--recipe fd_swinv2g {text}"))
    _, _, remedy = told.rpartition(". Change ")
    mine, _, theirs = remedy.partition(", or ")
    assert all(f"--{name}" in mine for name in own), told
    assert all(f"--{name}" in theirs for name in of_recipe), told
    assert bool(of_recipe) == ("which the recipe sets" in theirs), told


def test_a_conflict_in_a_file_has_the_line_of_what_stands_there(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("name: fd_swinv2g\noptim:\n  warmup_epochs: 500\n")
    (told,) = mistakes(lambda: run_of_file(path, ""))
    assert told.startswith(f"{path}:3: optim.warmup_epochs: ")
    # A value of the file that is refused is no reason to complain of the flags.
    path.write_text("name: fd_swinv2g\nbatch: {micro_batch_size: 3}\n")
    (told,) = mistakes(lambda: run_of_file(path, "--batch.global_batch_size 100"))
    assert told.startswith(f"{path}:2: batch.micro_batch_size: ")


def test_what_a_file_sets_follows_no_flag(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("name: quickstart\noptim: {min_lr: 0.001}\n")
    optim = run_of_file(path, "--optim.base_lr 0.064").optim
    assert (optim.min_lr, optim.warmup_lr) == (0.001, 1.6e-4)


def test_a_command_without_flags_says_so():
    (told,) = mistakes(lambda: parse(Report, ["RUN", "--optim.max_steps", "3"], command="report"))
    assert told.startswith("--optim.max_steps: unknown flag; expected RUN and no flags. ")
