"""Words to a run: a recipe, the fields that flags override, and mistakes by name."""

import re

import pytest

from fd_large.cli.flags import parse_run
from fd_large.errors import ConfigError
from fd_large.recipes import registry


@pytest.mark.parametrize("name", registry.RECIPES)
def test_every_recipe_passes_the_flags_unchanged(name):
    assert parse_run(["--recipe", name]) == registry.get(name)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--guard.no_skips", "--guard.no_skips: no such field; nearest: guard.skips"),
        ("--guard.enabled maybe", "--guard.enabled: a value of the wrong type; got maybe"),
    ],
)
def test_a_switch_that_is_none(words, said):
    with pytest.raises(ConfigError, match=re.escape(said)):
        parse_run(words.split())


def test_tuples_unions_and_nested_architectures():
    words = (
        "--recipe fd_swinv2g --student.architecture.depths 2 2 6 2"
        " --student.architecture.embed_dim 32 --student.architecture.num_heads 1 2 4 8"
        " --student.architecture.extra_norm_every 3"
        " --student.architecture.shared_position_bias True"
        " --teacher.architecture.depths 2 2 --teacher.architecture.num_heads 16 32"
        " --batch.micro_batch_size 4 --optim.betas 0.9 0.95"
    )
    run = parse_run(words.split())
    student = run.student.architecture
    assert (student.depths, student.num_heads) == ((2, 2, 6, 2), (1, 2, 4, 8))
    assert (student.embed_dim, student.extra_norm_every) == (32, 3)
    assert student.shared_position_bias is True
    assert run.teacher.architecture.depths == (2, 2)
    assert run.batch.micro_batch_size == 4
    assert run.optim.betas == (0.9, 0.95)


def test_an_override_is_taken_back_with_none():
    words = ["--recipe", "fd_swinv2_base", "--student.architecture.window_size", "None"]
    run = parse_run(words)
    assert run.student.architecture.window_size is None


def test_the_last_of_two_flags_wins_and_hyphens_are_underscores():
    words = ["--optim.epochs=50", "--optim.warmup-epochs", "1", "--optim.epochs", "60"]
    run = parse_run(words)
    assert (run.optim.epochs, run.optim.warmup_epochs) == (60, 1)
