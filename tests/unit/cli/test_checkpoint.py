"""The command `checkpoint`: what it prints and removes, and its exit codes."""

from __future__ import annotations

import json

import pytest
import torch
from stored_run import store_tensors

from fd_large.checkpoint import store
from fd_large.cli.main import main


@pytest.fixture
def run(tmp_path):
    (tmp_path / "recipe.json").write_text('{"runtime": {"keep_last": 2, "keep_every": 0}}')
    for update in (2, 4, 6):
        store_tensors(tmp_path, {"w": torch.zeros(500)}, update=update, ranks=2, stage=1)
    return tmp_path


def test_list_shows_a_row_for_each(run, capsys):
    assert main(["checkpoint", "list", str(run)]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    numbers = [[cell for cell in row if cell not in "\u2502|"] for row in rows]
    # Steps, samples, ranks, ZeRO stage.
    assert [row[:4] for row in numbers if row[1:2] and row[0] in "246"] == [
        ["2", "128", "2", "1"],
        ["4", "256", "2", "1"],
        ["6", "384", "2", "1"],
    ]


def test_list_says_why_a_run_on_one_rank_is_at_stage_0(run, tmp_path, capsys):
    words = "ZeRO 0: with one rank in float32, stages 1 and 2 have nothing to shard."
    assert main(["checkpoint", "list", str(run)]) == 0
    assert words not in " ".join(capsys.readouterr().out.split())
    store_tensors(tmp_path, {"w": torch.zeros(500)}, update=8, ranks=1, stage=0)
    assert main(["checkpoint", "list", str(run)]) == 0
    assert words in " ".join(capsys.readouterr().out.split())


def test_verify_names_what_is_damaged_and_ends_with_1(run, capsys):
    assert main(["checkpoint", "verify", str(run)]) == 0
    assert "3 of 3" in capsys.readouterr().out
    folder = store.checkpoints_of(run)
    file = folder / store.name_of(4) / store.file_of(1)
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    (folder / store.name_of(6) / "manifest.json").write_text("{")
    assert main(["checkpoint", "verify", str(run)]) == 1
    shown = capsys.readouterr().out
    assert f"{store.name_of(4)}: {store.file_of(1)}" in shown
    assert f"{store.name_of(6)}: manifest.json" in shown
    assert "1 of 3" in shown


def test_verify_and_prune_name_a_newest_that_is_damaged(run, capsys):
    newest = store.complete(run)[-1].path
    (newest / store.file_of(0)).unlink()
    assert main(["checkpoint", "verify", str(run)]) == 1
    assert f"damaged: {newest}" in capsys.readouterr().out
    assert main(["checkpoint", "prune", str(run), "--keep_last", "1"]) == 2
    assert newest.name in capsys.readouterr().err
    assert [item.update for item in store.complete(run)] == [2, 4, 6]


@pytest.mark.parametrize(
    ("keep_every", "flags", "stay"),
    [(0, [], [4, 6]), (0, ["--keep_last", "1"], [6]), (4, ["--keep_last", "1"], [4, 6])],
)
def test_prune_leaves_the_newest_and_every_nth(run, keep_every, flags, stay, capsys):
    kept = {"keep_last": 2, "keep_every": keep_every}
    (run / "recipe.json").write_text(json.dumps({"runtime": kept}))
    assert main(["checkpoint", "prune", str(run), *flags]) == 0
    assert [item.update for item in store.complete(run)] == stay
    assert f"removed {3 - len(stay)}: step_00000002" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["prune", "RUN", "--keep_last", "0"], "--keep_last"),
        (["list", "RUN/none"], "recipe.json"),
        (["verify", "RUN/empty"], "no complete checkpoint"),
        (["verify"], "RUN"),
        (["export", "RUN", "out"], "--deepspeed_config"),
        (["import", "RUN", "RUN", "--deepspeed_config", "zero3"], "latest"),
        (["lst", "RUN"], "list"),
    ],
)
def test_a_mistake_ends_with_2(run, arguments, named, capsys):
    (run / "empty").mkdir()
    (run / "empty" / "recipe.json").write_text("{}")
    arguments = [argument.replace("RUN", str(run)) for argument in arguments]
    assert main(["checkpoint", *arguments]) == 2
    assert named in capsys.readouterr().err
    assert [item.update for item in store.complete(run)] == [2, 4, 6]


def test_list_names_a_newest_checkpoint_that_cannot_be_read(run, capsys):
    newest = store.complete(run)[-1].path
    (newest / "manifest.json").write_text("[" * 100_000)
    assert main(["checkpoint", "list", str(run)]) == 0
    assert f"damaged: {newest}" in capsys.readouterr().out


@pytest.mark.parametrize(
    "text",
    [
        *("", "null", '{"a": 1}', '{"runtime": 1}', '{"runtime": {"keep_last": 2}}'),
        *('{"runtime": {"keep_every": 4, "keep_last": "2"}}', "[" * 100_000),
    ],
)
def test_prune_refuses_a_damaged_recipe(run, text, capsys):
    (run / "recipe.json").write_text(text)
    before = store.complete(run)
    assert main(["checkpoint", "prune", str(run)]) == 2
    assert "recipe.json" in capsys.readouterr().err
    assert store.complete(run) == before
