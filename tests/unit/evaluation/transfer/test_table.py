"""`transfer`: what is trained by which recipe, in which folder, what goes on, what is refused."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import depth_images
import detection_twin
import pytest
import segmentation_twin
import tiny_runs
import transfer_toy
from html_page import check_page
from labelled_folder import labelled_folder

from fd_large.cli.main import main
from fd_large.engine.find_model import slug
from fd_large.errors import ConfigError, Exit, ShapeError
from fd_large.evaluation.recorded_runs import decides
from fd_large.evaluation.transfer.cells import Row, _published
from fd_large.evaluation.transfer.columns import COLUMNS
from fd_large.recipes import registry
from fd_large.recipes.fields import override


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    return transfer_toy.write_toy(tmp_path_factory.mktemp("toy"))


@pytest.fixture
def trained(monkeypatch):
    """The recipes of the trainings; each ends at once with scores that tell its weights."""
    runs = []

    def train(run, *, deepspeed_config):
        runs.append(run)
        better = 10 if "/mine/" in run.student.init else 0
        scores = {"test_top1": 70 + better + run.runtime.seed, "val_mIoU": 40 + better}
        scores |= {"box_AP": 0.3, "mask_AP": 0.2, "val_rmse": 0.4}
        Path(run.run_dir(), "summary.json").write_text(json.dumps({"status": "done", **scores}))
        return 0

    monkeypatch.setattr("fd_large.cli.train.train_run", train)
    # Nothing is built that would have to go, and it takes a second.
    monkeypatch.setattr("gc.collect", lambda: 0)
    return runs


def summary_of(out: Path) -> dict:
    return json.loads((out / "summary.json").read_text())


def test_a_table_of_all_rows_and_columns(toy, trained, tmp_path, capsys):
    out = tmp_path / "out"
    assert main([*transfer_toy.words(toy, out), "--seeds", "2"]) == 0
    rows = ("mine", "mine_teacher", "mine_from_scratch")
    columns = transfer_toy.COLUMNS
    cells = [(row, column, seed) for seed in (0, 1) for column in columns for row in rows]
    assert [run.run_dir() for run in trained] == [f"{out}/{r}/{c}/seed_{s}" for r, c, s in cells]
    names = {Path(run.run_dir()).parts[-3:-1]: run.name for run in trained}
    assert names["mine", "finetune"] == "finetune_swinv2_base"
    assert names["mine_from_scratch", "finetune"] == names["mine", "finetune"]
    assert names["mine_teacher", "finetune"] == names["mine", "finetune"]
    assert names["mine_teacher", "linear"] == "linear_probe"
    assert names["mine", "ade20k"] == "ade20k_upernet_swinv2_base"
    assert names["mine_teacher", "ade20k"] == "ade20k_upernet_vit_base"
    assert names["mine_teacher", "nyuv2"] == "nyuv2_vit_base"
    assert names["mine_from_scratch", "coco"] == "coco_mask_rcnn_swinv2_tiny"
    for run in trained:
        row, column, seed = Path(run.run_dir()).parts[-3:]
        weights = {"mine": "mine/checkpoints/step_00000003", "mine_teacher": "vit"}.get(row)
        assert run.student.init == (str(toy / weights) if weights else "")
        assert run.data.root == str(toy / ("imagenet" if column in columns[:2] else column))
        assert (run.optim.max_steps, f"seed_{run.runtime.seed}") == (3, seed)

    found = summary_of(out)
    assert {cell["status"] for cell in found["cells"]} == {"done"}
    unlike = {(c["row"], c["column"]): c["unlike_first"] for c in found["cells"]}
    size = {"data.image_size": [64, 32]}
    assert [unlike[row, "linear"] for row in rows] == [{}, size, {}]
    assert [unlike[row, "finetune"] for row in rows[:2]] == [{}, size]
    assert unlike["mine_from_scratch", "finetune"] == {"optim.layer_decay": [0.8, 1.0]}
    assert unlike["mine_from_scratch", "coco"] == {}, "that recipe has no layer decay"
    recipes = ["ade20k_upernet_swinv2_base", "ade20k_upernet_vit_base"]
    assert unlike["mine_teacher", "ade20k"]["recipe"] == recipes
    difference = next(d for d in found["differences"] if d["score"] == "val_mIoU")
    assert (difference["of"], difference["less"], difference["mean"]) == (*rows[:2], 10.0)
    assert found["published"] == []
    told = capsys.readouterr().out
    assert "30 trainings, 0 of them done before" in told
    assert "80.50 +- 0.71" in told
    text = (out / "transfer.txt").read_text()
    assert "+10.00 +- 0.00" in text
    assert "70.50 +- 0.71 *" in text
    assert "optim.layer_decay 1 (0.8)" in text
    page = check_page(out / "report.html")
    assert {"mine: teacher", "30.00 +- 0.00", "40.00 +- 0.00 *"} <= set(page.words)
    assert (out / "transfer.png").stat().st_size > 10_000

    # Nothing is left to train, and columns of earlier starts stay in the table.
    del trained[:]
    before = found
    some = [*transfer_toy.words(toy, out), "--seeds", "2", "--only", "coco"]
    assert main(some) == 0
    assert main(["transfer", "--table", "--out", str(out)]) == 0
    assert not trained
    after = summary_of(out)
    key = lambda cell: cell["run"]  # noqa: E731
    assert sorted(after.pop("cells"), key=key) == sorted(before.pop("cells"), key=key)
    assert after == before


def test_a_row_of_another_kind_is_trained_as_long_as_the_first(toy, trained, tmp_path):
    words = transfer_toy.words(toy, tmp_path)
    for field in ("--optim.max_steps", "--batch.global_batch_size"):  # And the one after it.
        place = words.index(field)
        words[place : place + 4] = []
    rows = ["--rows", "student", "teacher"]
    assert main([*words, *rows, "--only", "coco"]) == 0
    student, teacher = trained
    assert [run.name for run in trained] == [
        "coco_mask_rcnn_swinv2_tiny",
        "coco_mask_rcnn_vit_base",
    ]
    for field in ("epochs", "max_steps", "warmup_epochs", "ema_decay"):
        assert getattr(teacher.optim, field) == getattr(student.optim, field)
    assert teacher.batch.global_batch_size == student.batch.global_batch_size
    assert teacher.optim.layer_decay == 0.7
    cells = {cell["row"]: cell for cell in summary_of(tmp_path)["cells"]}
    assert cells["mine_teacher"]["changed"]["optim.epochs"] == [100, 36]
    assert "optim.epochs" not in cells["mine_teacher"]["unlike_first"]

    # A recipe that is named is every row's.
    del trained[:]
    named = ["--coco.recipe", "coco_mask_rcnn_swinv2_base", "--out", str(tmp_path / "named")]
    assert main([*words, *rows, "--only", "coco", *named]) == 0
    assert [run.name for run in trained] == ["coco_mask_rcnn_swinv2_base"] * 2


def test_a_sweep_tries_the_recipes_of_all_rows_for_each(
    toy, trained, tmp_path, monkeypatch, capsys
):
    from fd_large.cli import train as command

    calm = command.train_run

    def train(run, *, deepspeed_config):
        Path(run.run_dir()).mkdir(parents=True, exist_ok=True)
        code = calm(run, deepspeed_config=deepspeed_config)
        plain = run.name == "finetune_clip_vit_base_plain"
        told = {"status": "done", "test_top1": 60.0 + 10 * plain, "test_loss": 1.0}
        Path(run.run_dir(), "summary.json").write_text(json.dumps(told))
        return code

    monkeypatch.setattr("fd_large.cli.train.train_run", train)
    images = labelled_folder(tmp_path / "images", train=54, val=6, side=2)
    words = [*transfer_toy.words(toy, tmp_path / "out"), "--only", "finetune", "--sweep"]
    words[words.index("--imagenet") + 1] = str(images)
    words += ["--sweep_rates", "1", "--sweep_decays", "0.8"]
    assert main(words) == 0
    tried = {}
    for run in trained[:-3]:
        assert run.data.root == str(images / "train")
        tried.setdefault(Path(run.run_dir()).parent.name, set()).add(
            (run.name, run.optim.layer_decay)
        )
    recipes = "finetune_swinv2_base", "finetune_clip_vit_base_plain"
    of_each = {(recipes[0], 0.8), (recipes[1], 0.6), (recipes[1], 0.8)}
    assert tried["mine"] == tried["mine_teacher"] == of_each
    assert tried["mine_from_scratch"] == {(name, 1.0) for name in recipes}
    assert [run.name for run in trained[-3:]] == [recipes[1]] * 3
    assert [run.data.root for run in trained[-3:]] == [str(images)] * 3
    for cell in summary_of(tmp_path / "out")["cells"]:
        assert (cell["sweep"]["recipe"], cell["sweep"]["held_out_accuracy"]) == (recipes[1], 70.0)
        assert cell["status"] == "done"
    assert "As far as is known, no run that led" in " ".join(capsys.readouterr().out.split())
    del trained[:]
    assert main(words) == 0
    assert not trained
    assert main([*words, "--slurm"]) == 2
    assert "--sweep: its trials" in capsys.readouterr().err
    assert main([*transfer_toy.words(toy, tmp_path / "out"), "--only", "linear", "--sweep"]) == 2
    assert "--sweep: no column" in capsys.readouterr().err


def test_dense_columns_are_swept_by_their_scores_on_a_part_of_the_train_split(
    toy, trained, tmp_path, monkeypatch, capsys
):
    from fd_large.cli import train as command

    calm = command.train_run

    def train(run, *, deepspeed_config):
        Path(run.run_dir()).mkdir(parents=True, exist_ok=True)
        calm(run, deepspeed_config=deepspeed_config)
        # The larger mIoU and the smaller error are of the second rate.
        better = run.optim.base_lr > registry.get(run.name).optim.base_lr
        told = {"status": "done", "val_mIoU": 40.0 + better, "val_rmse": 0.4 - 0.1 * better}
        told |= {"box_AP": 0.3 + 0.1 * better, "mask_AP": 0.2}
        Path(run.run_dir(), "summary.json").write_text(json.dumps(told))
        return 0

    monkeypatch.setattr("fd_large.cli.train.train_run", train)
    words = [*transfer_toy.words(toy, tmp_path / "out"), "--only", "ade20k", "coco", "nyuv2"]
    words += [
        "--sweep",
        "--sweep_rates",
        "2",
        "--sweep_decays",
        "1",
        "--rows",
        "student",
        "teacher",
    ]
    for name, write in (
        ("ade20k", segmentation_twin.write_images),
        ("coco", detection_twin.pictures),
        ("nyuv2", depth_images.write_images),
    ):
        words[words.index(f"--{name}") + 1] = str(write(tmp_path / name, 24))
    assert main(words) == 0
    trials, runs = trained[:-6], trained[-6:]
    tried = {}
    for run in trials:
        assert run.data.val_fraction == 0.1
        column, row, _ = Path(run.run_dir()).relative_to(tmp_path / "out" / "sweep").parts
        tried.setdefault((column, row), set()).add(run.name)
    # A recipe of the other kind of models fits no row.
    assert tried == {
        ("ade20k", "mine"): {"ade20k_upernet_swinv2_base"},
        ("ade20k", "mine_teacher"): {"ade20k_upernet_vit_base"},
        ("coco", "mine"): {"coco_mask_rcnn_swinv2_tiny"},
        ("coco", "mine_teacher"): {"coco_mask_rcnn_vit_base"},
        ("nyuv2", "mine"): {"nyuv2_swinv2_base"},
        ("nyuv2", "mine_teacher"): {"nyuv2_vit_base"},
    }
    for run in runs:
        assert run.data.val_fraction == 0.0
        assert run.optim.base_lr == 2 * registry.get(run.name).optim.base_lr
    cells = summary_of(tmp_path / "out")["cells"]
    found = {(c["row"], c["column"]): c["sweep"] for c in cells}
    assert {s["rate"] for s in found.values()} == {2.0}
    assert found["mine", "ade20k"]["held_out_mIoU"] == 41.0
    assert found["mine", "coco"]["held_out_box_AP"] == pytest.approx(0.4)
    assert found["mine", "nyuv2"]["held_out_rmse"] == pytest.approx(0.3)
    teacher = str(toy / "vit")
    assert found["mine_teacher", "nyuv2"]["held_out_not_known"] == [teacher]
    said = " ".join(capsys.readouterr().out.split())
    assert f"training images of {tmp_path}/ade20k, " in said
    for title in ("ADE20K segmentation", "NYUv2 depth"):
        assert (
            f"mine: teacher, {title}: it is not known whether these images were in the training of"
            in said
        )
    assert "mine: teacher, NYUv2 depth: other settings than the first row" in said

    # The same command trains nothing again; other images are refused.
    del trained[:]
    assert main(words) == 0
    assert not trained
    # What the last column may not set is said before the first one's trials.
    (tmp_path / "out").rename(tmp_path / "before")
    assert main([*words, "--nyuv2.optim.layer_decay", "0.5"]) == 2
    assert "--optim.layer_decay: the sweep decides it" in capsys.readouterr().err
    assert not trained
    (tmp_path / "before").rename(tmp_path / "out")
    record = next((tmp_path / "out" / "sweep").glob("ade20k/mine/*/trial.json"))
    assert "held_out_mIoU" in json.loads(record.read_text())
    (tmp_path / "ade20k" / "images" / "training" / "0000.jpg").unlink()
    assert main(words) == 2
    assert "holds a trial of another recipe, other images" in capsys.readouterr().err


def test_what_fails_is_named_and_the_others_go_on(toy, trained, tmp_path, monkeypatch, capsys):
    from fd_large.cli import train as command

    calm, fails = (
        command.train_run,
        {"linear": ShapeError("linear: does not fit; got 2."), "coco": 3},
    )

    def train(run, *, deepspeed_config):
        column = Path(run.run_dir()).parts[-2]
        if isinstance(fails.get(column), Exception):
            raise fails[column]
        code = calm(run, deepspeed_config=deepspeed_config)
        if column in fails:
            ended = {"status": "guard", "reason": "the loss is not finite"}
            Path(run.run_dir(), "summary.json").write_text(json.dumps(ended))
        return fails.get(column, code)

    monkeypatch.setattr("fd_large.cli.train.train_run", train)
    words = [*transfer_toy.words(toy, tmp_path), "--rows", "student"]
    assert main(words) == Exit.LOOK
    said = " ".join(capsys.readouterr().out.split())
    assert f"FAILED {tmp_path}/mine/linear/seed_0: linear: does not fit; got 2." in said
    assert f"FAILED {tmp_path}/mine/coco/seed_0: guard: the loss is not finite" in said
    begun = [Path(run.run_dir()).parts[-2] for run in trained]
    assert begun == ["finetune", "ade20k", "coco", "nyuv2"]

    # The next start tries them again, after what has not failed.
    fails.clear()
    shutil.rmtree(tmp_path / "mine" / "ade20k")
    del trained[:]
    assert main(words) == 0
    assert [Path(run.run_dir()).parts[-2] for run in trained] == ["ade20k", "linear", "coco"]
    assert {cell["status"] for cell in summary_of(tmp_path)["cells"]} == {"done"}


def test_a_run_that_is_stopped_ends_the_command(toy, trained, tmp_path, monkeypatch):
    monkeypatch.setattr("fd_large.cli.train.train_run", lambda run, **_: Exit.AGAIN)
    assert main(transfer_toy.words(toy, tmp_path)) == Exit.AGAIN
    assert len(list(tmp_path.glob("*/*/*/cell.json"))) == 1


def test_trainings_of_anything_else_are_not_taken(toy, trained, tmp_path, capsys):
    words = [*transfer_toy.words(toy, tmp_path), "--rows", "student", "--only", "finetune"]
    assert main(words) == 0
    shutil.copytree(toy / "imagenet", tmp_path / "copy")
    others = {
        "optim.max_steps 3 -> 4": ["--finetune.optim.max_steps", "4"],
        "optim.base_lr": ["--optim.base_lr", "0.5"],
        "data.root": ["--imagenet", str(tmp_path / "copy")],
    }
    for said, more in others.items():
        assert main([*words, *more]) == 2
        assert said in capsys.readouterr().err
    file = tmp_path / "mine/finetune/seed_0/cell.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "weights": "another"}))
    assert main(words) == 2
    assert "got weights 'another' -> " in capsys.readouterr().err
    assert len(trained) == 1
    # What decides no score may differ.
    file.unlink()
    free = ["--runtime.log_every", "7", "--data.workers", "1", "--batch.micro_batch_size", "1"]
    assert main([*words, *free]) == 0


def test_the_images_of_a_pass_decide_where_norms_or_losses_see_them():
    names = ("finetune", "linear", "detection", "segmentation", "depth")
    found = [decides("batch.micro_batch_size", name) for name in names]
    assert found == [False, False, False, True, True]


def test_a_teacher_that_runs_share_comes_once(toy, trained, tmp_path):
    shutil.copytree(toy / "mine", toy / "other")
    words = transfer_toy.words(toy, tmp_path)
    words.insert(1, str(toy / "other"))
    assert main([*words, "--only", "linear"]) == 0
    rows = {row["name"]: row for row in summary_of(tmp_path)["rows"]}
    assert set(rows) == {"other", "other_teacher", "other_from_scratch", "mine"}
    assert rows["mine"]["teacher"] == rows["other"]["teacher"] == "other_teacher"


def test_each_of_several_teachers_is_a_row(toy, trained, tmp_path, capsys):
    fields = {"teachers.fine.architecture.mlp_ratio": 2.0}
    run = tiny_runs.with_teachers(tiny_runs.tiny_run(), "coarse", "fine", **fields)
    tiny_runs.store_task(tmp_path / "two", run, tiny_runs.tiny_task(run))
    words = ["transfer", str(tmp_path / "two"), *transfer_toy.SHORT.split(), "--only", "finetune"]
    words += ["--imagenet", str(toy / "imagenet"), "--out"]
    assert main([*words, str(tmp_path / "out")]) == 0
    summary = summary_of(tmp_path / "out")
    names = [row["name"] for row in summary["rows"]]
    assert names == ["two", "two_coarse", "two_fine", "two_from_scratch"]
    less = [difference["less"] for difference in summary["differences"]]
    assert less == names[1:]
    assert main([*words, str(tmp_path / "one"), "--rows", "student", "fine"]) == 0
    assert [row["name"] for row in summary_of(tmp_path / "one")["rows"]] == ["two", "two_fine"]
    capsys.readouterr()
    assert main([*words, str(tmp_path / "none"), "--rows", "pupil"]) == 2
    assert "got 'pupil', known: coarse, fine, scratch" in capsys.readouterr().err


def test_a_label_that_other_runs_change_is_no_new_training(toy, trained, tmp_path, capsys):
    shutil.copytree(toy / "mine", tmp_path / "b" / "mine")
    out, more = tmp_path / "out", ["--rows", "student", "--only", "linear"]
    words = [*transfer_toy.words(toy, out), *more]
    assert main(words) == 0
    words.insert(1, str(tmp_path / "b" / "mine"))
    assert main(words) == 2
    said = capsys.readouterr().err
    assert f"{out}/mine: holds trainings of this start under another label" in said
    name = slug(str(toy / "mine"))
    (out / "mine").rename(out / name)
    assert main(words) == 0
    # Besides the first start's training, that of the other run alone.
    assert [Path(run.student.init).parents[1] for run in trained] == [
        toy / "mine",
        tmp_path / "b" / "mine",
    ]


@pytest.mark.parametrize(
    ("words", "found"),
    [
        ([], ["RUN is missing"]),
        (["RUN", "--only", "coco"], ["--coco"]),
        (["RUN", "--imagenet", "no/where", "--coco", "gone/"], ["--imagenet:", "--coco:"]),
        (
            ["RUN", "--ade20k.optim.max_stepz", "3"],
            ["--ade20k.optim.max_stepz: ", "nearest: --ade20k.optim.max_steps"],
        ),
        (["RUN", "--coco.optim.max_steps", "x"], ["--coco.optim.max_steps:", "got x"]),
        (["RUN", "--coco.recipe", "linear_probe"], ["--coco.recipe:", "got linear_probe"]),
        (["RUN", "--coco.recipe", "coco_mask"], ["--coco.recipe:", "nearest"]),
        (["RUN", "--data.root", "x", "--runtime.run_dir", "y"], ["--data.root", "--out"]),
        (["RUN", "--coco.eval.root", "x"], ["--coco.eval.root: set by transfer"]),
        (["RUN", "--seeds", "0"], ["--seeds"]),
        (["--table", "--out", "nowhere"], ["--out: nowhere: ", "got no summary.json"]),
        ([".", "--imagenet", "."], ["recipe.json"]),
    ],
)
def test_mistakes_name_the_argument(words, found, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "RUN").mkdir()
    assert main(["transfer", *words]) == 2
    said = capsys.readouterr().err
    for part in found:
        assert part in said
    assert [path.name for path in tmp_path.iterdir()] == ["RUN"]


def test_what_cannot_be_trained_is_said_first(toy, trained, tmp_path, monkeypatch, capsys):
    def cannot(student, *args, **options):
        raise ConfigError("student.model: no pyramid; got it, expected more. Set --student.model.")

    monkeypatch.setattr("fd_large.tasks.segmentation.job.Segmentation", cannot)
    words = [*transfer_toy.words(toy, tmp_path / "out"), "--rows", "student", "--only"]
    assert main([*words, "ade20k", "linear"]) == 0
    assert (
        "mine on ade20k (student.model: no pyramid; got it, expected more)"
        in capsys.readouterr().out
    )
    assert [Path(run.run_dir()).parts[-2] for run in trained] == ["linear"]
    assert main([*words, "ade20k"]) == 2
    assert "Set --rows or --only" in capsys.readouterr().err


def test_the_papers_figures_stand_beside_a_run_of_its_recipe():
    run = registry.get("fd_clip_vit_base")
    changed = override(run, {"optim.epochs": 30})
    model = SimpleNamespace(label="a")
    found = {}
    for of, recipe, unchanged in (
        (run, "finetune_clip_vit_base", True),
        (run, "finetune_clip_vit_base", False),
        (changed, "finetune_clip_vit_base", True),
    ):
        cells = {("a", "finetune", 0): {"recipe": recipe, "unchanged": unchanged}}
        row = Row("student", model, replace(of, teacher=replace(of.teacher, source="x")), "")
        found[of is run, unchanged] = list(_published(row, COLUMNS["finetune"], cells))
    of_record = {"row": "a", "column": "finetune", "figures": {"test_top1": 85.0}}
    assert found[True, True] == [of_record | {"same_settings": True}]
    assert found[True, False] == [of_record | {"same_settings": False}]
    assert found[False, True] == []
    (teacher,) = _published(Row("teacher", model, run, ""), COLUMNS["coco"], {})
    assert teacher["figures"] == {"box_AP": 45.0, "mask_AP": 39.8}
    assert not teacher["same_settings"]
    assert not list(_published(Row("scratch", model, run, ""), COLUMNS["coco"], {}))


def test_the_plan_needs_no_dataset_and_leaves_nothing(toy, trained, tmp_path, capsys):
    words = ["transfer", str(toy / "mine"), "--out", str(tmp_path / "out"), "--plan"]
    words += ["--only", "linear", "--rows", "student", "scratch", "--seeds", "2", "--gpus", "24"]
    assert main([*words, "--linear.batch.global_batch_size", "128"]) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "linear_probe mine: from scratch 900,810 8 " in told, "90 x (1,281,167 // 128)"
    assert "2 seeds: " in told
    assert not trained
    assert not (tmp_path / "out").exists()
    assert main([*words, "--gpu", "h1000"]) == 2
    assert "nearest: h100" in capsys.readouterr().err


def test_the_plan_is_of_the_columns_that_the_same_command_trains(toy, tmp_path, capsys):
    words = ["transfer", str(toy / "mine"), "--out", str(tmp_path / "out"), "--plan"]
    words += ["--rows", "scratch", "--ade20k"]
    assert main([*words, str(toy / "ade20k")]) == 0
    told = capsys.readouterr().out
    assert re.search(r"model +ade20k", told)
    assert "coco" not in told
    assert main([*words, str(toy / "none")]) == 2
    assert "--ade20k: no such file or folder" in capsys.readouterr().err


def test_a_window_is_that_of_models_that_have_one(toy, trained, tmp_path):
    words = [*transfer_toy.words(toy, tmp_path), "--coco.student.architecture.window_size", "4"]
    assert main([*words, "--only", "coco", "--rows", "student", "teacher"]) == 0
    student, teacher = (run.student_architecture() for run in trained)
    assert student.window_size == 4
    # Coordinates stay those of the distillation's windows of 2, in maps of 16, 8, 4 and 2.
    assert student.pretrained_window_sizes == (2, 2, 2, 2)
    assert teacher.family == "vit"


def test_mistakes_in_datasets_and_in_what_the_models_decide(toy, trained, tmp_path, capsys):
    words = transfer_toy.words(toy, tmp_path / "out")
    wrong = [*words, "--ade20k", str(toy / "coco"), "--coco", str(toy / "ade20k")]
    assert main(wrong) == 2
    said = capsys.readouterr().err
    assert "no annotations of the split" in said
    assert "no images with labels" in said
    assert main([*words, "--coco.student.architecture.mlp_ratio", "2"]) == 2
    assert (
        "--student.architecture.mlp_ratio: the evaluated models decide" in capsys.readouterr().err
    )
    assert not trained
