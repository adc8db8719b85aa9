"""The commands of README, CONTRIBUTING and docs/: each is read, and those that need no GPU run."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from page_examples import EXAMPLES

from fd_large import shipped
from fd_large.backbones.statistics import IMAGENET
from fd_large.checkpoint import store
from fd_large.cli import arguments as cli_arguments
from fd_large.cli.arguments import WithRecipe
from fd_large.cli.main import main
from fd_large.ranks.launch import RANK_VARIABLES
from fd_large.recipes.architectures import Architecture, resolve
from fd_large.recipes.sections import AUTO
from fd_large.weights.convert import write

ROOT = Path(__file__).resolve().parents[2]
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "benchmarks/README.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
]
# What a reader replaces by words of their own; all else is a file in the current folder.
PLACEHOLDERS = {"NAME": "quickstart", "SOURCE": "FILE", "OUT": "out"}
# Programs of others, whose arguments are theirs.
FOREIGN = {"apptainer", "docker", "enroot", "vi", "while", "grep", "run=runs/fd_swinv2g"}


class Command(NamedTuple):
    """A command of a page.

    Attributes:
        where: Page and line.
        words: Program and arguments, with what the page abbreviates filled in.
        needs: What the page says that it needs: "a GPU", "a cluster" ...; empty if nothing.
    """

    where: str
    words: list[str]
    needs: str


def commands_of(path: Path) -> Iterator[Command]:
    """Yields the commands of a page's blocks that are marked as bash."""
    blocks = re.finditer(r"^( *)```bash\n(.*?)^\1```", path.read_text(), re.DOTALL | re.MULTILINE)
    for block in blocks:
        first = path.read_text()[: block.start(2)].count("\n") + 1
        lines = block[2].splitlines()
        needed, before, continued, started = "", [], "", 0
        for number, line in enumerate(lines, first):
            text, _, comment = f" {line}".partition(" #")
            if (needs := re.search(r"needs (.*)", comment)) and not text.strip():
                needed = needs[1]
            started = number if not continued else started
            continued += text.rstrip("\\")
            if text.endswith("\\") or not continued.strip():
                continued = continued if text.endswith("\\") else ""
                continue
            words, continued = shlex.split(continued), ""
            if words[0] == "...":  # The command above, with more.
                words = [*before, *words[1:]]
            else:
                before = words
            where = f"{path.relative_to(ROOT)}:{started}"
            yield Command(where, [w for w in words if w != "..."], needs[1] if needs else needed)


COMMANDS = [command for page in PAGES for command in commands_of(page)]
by_place = pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.where)


def arguments_of(words: list[str]) -> list[str] | None:
    """Returns what a command passes to fd_large, whatever starts it; None if it is another's."""
    words = [PLACEHOLDERS.get(word, word) for word in words]
    while re.match(r"[A-Z_]+=", words[0]):
        words = words[1:]
    if words[0] == "fd-large":
        return words[1:]
    if words[0] == "sbatch":
        script = next(word for word in words if word.endswith(".sh"))
        given = words[words.index(script) + 1 :]
        text = (ROOT / script).read_text().replace('"$config"', "zero2")  # Its default.
        if "resume" in script:
            given = ["--deepspeed_config", "zero3", *given[1:]]
        else:
            started = re.search(
                r"^launch (--recipe \w+ --deepspeed_config \w+)", text, re.MULTILINE
            )
            given = [*started[1].split(), *given]
        return ["train", *given]
    for number, word in enumerate(words):
        if word == "fd_large/train.py":
            return ["train", *words[number + 1 :]]
        if word == "fd_large.train" and words[number - 1] in ("-m", "--module"):
            return ["train", *words[number + 1 :]]
        if word == "fd_large" and words[number - 1] in ("-m", "--module"):
            return words[number + 1 :]
    return None


def check_foreign(words: list[str]) -> None:
    """Checks what can be checked of a command of another program."""
    program, *rest = words
    if program == "make":
        goals = [word for word in rest if "=" not in word]
        assert all(re.search(rf"^{goal}:", (ROOT / "Makefile").read_text(), re.M) for goal in goals)
    elif program == "pip":
        project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
        for extras in re.findall(r"\[(\S+)\]", " ".join(rest)):
            assert set(extras.split(",")) <= project["optional-dependencies"].keys()
    elif program == "python" and rest[0].endswith(".py"):
        text = (ROOT / rest[0]).read_text()
        assert all(f'"{word}"' in text for word in rest if word.startswith("--"))
    elif program == "python" and rest[0] == "-c":
        compile(rest[1], "page", "exec")
    else:
        assert program in FOREIGN or rest[:2] == ["-m", "build"], f"{program} is not known here"


class Parsed(Exception):
    """Ends a command once its arguments are read."""


@pytest.fixture
def parsed(monkeypatch, tmp_path):
    """Lets commands read their arguments and do nothing; what they read is in the list."""
    found: list[Any] = []
    parse = cli_arguments._Parser.parse

    def parse_alone(parser, arguments):
        found.append(parse(parser, arguments))
        raise Parsed

    monkeypatch.setattr(cli_arguments._Parser, "parse", parse_alone)
    monkeypatch.chdir(tmp_path)
    for name in RANK_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    for name, text in EXAMPLES.items():
        Path(name).write_text(text)
    return found


@by_place
def test_commands_of_the_pages_are_read(command, parsed, capsys):
    given = arguments_of(command.words)
    if given is None:
        check_foreign(command.words)
        return
    if given == ["--version"]:
        assert main(given) == 0
        return
    with pytest.raises(Parsed):
        pytest.fail(f"exit code {main(given)}: {capsys.readouterr().err}")
    (read,) = parsed
    assert isinstance(read, WithRecipe)
    if hasattr(read.own, "deepspeed_config") and read.own.deepspeed_config:
        shipped.deepspeed_config(read.own.deepspeed_config)
    if read.run is not None:
        for section in (read.run.student, *read.run.frozen_models.values()):
            assert section.model == AUTO or resolve(section.model, section.architecture)


# ------------------------------------------------------------------------------------------------

SHORT = """
    --optim.max_steps 1 --optim.epochs 1 --optim.warmup_epochs 0
    --batch.global_batch_size 2 --batch.micro_batch_size 1 --data.workers 0
"""
# What only a long run leaves behind; these commands run in the tests of their files.
LEFT_BEHIND = {
    "DEPTH_RUN": "test_depth.py",
    "DETECTION_RUN": "test_predict.py and test_evaluate.py",
    "INCIDENT": "test_replay.py",
    "RUN/incidents/update_NNNNNNNN": "test_replay.py",
    "SEGMENTATION_RUN": "test_segmentation.py",
    "results.json": "test_evaluate.py",
}
# Flags that make the models of a recipe small; later flags win.
TINY_VIT = """
    --student.architecture.embed_dim 32 --student.architecture.depths 2
    --student.architecture.num_heads 2 --student.architecture.patch_size 8 --data.image_size 32
"""
TINY_RECIPES = {
    # The tiny file is of another model than the recipe's teacher.
    "fd_clip_vit_base": f"{TINY_VIT} --teacher.model auto",
    # Batch norms are of both images of a step.
    "small_data": "--batch.micro_batch_size 2",
    "finetune_clip_vit_base": TINY_VIT,
    "coco_mask_rcnn_swinv2_base": """
        --student.architecture.embed_dim 16 --student.architecture.depths 1 2 2 1
        --student.architecture.num_heads 1 2 2 4 --student.architecture.window_size 4
        --student.architecture.patch_size 2 --data.image_size 64
        --task.detection.proposals_per_image 8 --task.detection.rois_per_image 8
        --task.detection.detections_per_image 2 --task.detection.head_width 8
    """,
    "ade20k_upernet_vit_base": f"""
        {TINY_VIT} --task.segmentation.num_classes 4 --task.segmentation.head_width 8
    """,
    "nyuv2_vit_base": f"{TINY_VIT} --task.depth.head_width 8 --task.depth.test_crop none",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder in which the files that the pages name exist."""
    import depth_images
    import timm
    from coco import unpack_coco_tiny
    from PIL import Image
    from safetensors.torch import save_file
    from segmentation_twin import write_images
    from stored_run import FOUR, VIT, store_student
    from tiny_runs import vit_file

    folder = tmp_path_factory.mktemp("reader")
    for number in range(12):
        split = "val" if number % 3 == 2 else "train"
        for root in ("FOLDER", "HELD_OUT_FOLDER"):
            path = folder / root / split / f"class_{number % 2}" / f"{number}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (80, 72), (20 * number, 255 - 20 * number, 99)).save(path)
    Image.new("RGB", (80, 72), (200, 120, 40)).save(folder / "image.jpg")
    (folder / "runs").mkdir()
    for run in ("RUN", "runs/mine", "runs/quickstart"):
        student = store_student(folder / run, "vit_base_patch16", VIT)
        store.set_best(folder / run, 3)
    of_run = resolve("vit_base_patch16", Architecture(**VIT, image_size=32))
    write(student.named_parameters(), of_run, "fd", folder / "vit.safetensors", statistics=IMAGENET)
    store_student(folder / "PYRAMID_RUN", "swinv2_base", FOUR)
    for name in ("FILE", "clip.pt", "ViT-B-16.pt"):
        vit_file(folder / f"weights_{name}").rename(folder / name)
    save_file(timm.create_model("resnet50").state_dict(), folder / "resnet50.safetensors")
    for name, text in EXAMPLES.items():
        (folder / name).write_text(text)
    unpack_coco_tiny(folder / "COCO")
    write_images(folder / "ADE20K")
    depth_images.write_images(folder / "NYUV2")
    return folder


@pytest.mark.sweep
@by_place
def test_commands_of_the_pages_run(command, folder, tmp_path):
    given = arguments_of(command.words)
    if given is None:
        pytest.skip("of another program")
    if command.needs:
        pytest.skip(f"needs {command.needs}")
    for word in given:
        if word in LEFT_BEHIND:
            pytest.skip(f"run by {LEFT_BEHIND[word]}")
    given = [str(tmp_path / "out") if word in ("OUT", "out") else word for word in given]
    if given[0] == "evaluate" and "finetune" in given:
        given += SHORT.split()
    if given[0] in ("evaluate", "diagnose"):
        given += ["--out", str(tmp_path / "out")]
    if given[0] == "train":
        recipe = given[given.index("--recipe") + 1] if "--recipe" in given else "quickstart"
        given += [*SHORT.split(), *TINY_RECIPES.get(recipe, "").split()]
        given += ["--runtime.run_dir", str(tmp_path / "run")]
        if recipe.startswith("coco"):
            given[given.index("RUN")] = "PYRAMID_RUN"
    finished = subprocess.run(
        [sys.executable, "-m", "fd_large", *given],
        cwd=folder,
        env={
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "DS_ACCELERATOR": "cpu",
            "WANDB_MODE": "offline",
        },
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert finished.returncode == 0, finished.stdout[-2000:] + finished.stderr[-2000:]


def test_every_page_is_in_the_site():
    text = (ROOT / "mkdocs.yml").read_text()
    for page in (ROOT / "docs").rglob("*.md"):
        assert f" {page.relative_to(ROOT / 'docs')}\n" in text, (
            "a page that the menu lacks ends `make docs`"
        )


def test_workflow_and_hooks_run_what_a_change_has_to_pass():
    ci = (ROOT / ".ci/run").read_text()
    assert {"check", "docs", "dist", "test"} <= set(re.findall(r"^make (\w+)$", ci, re.M))
    assert "- run: .ci/run\n" in (ROOT / ".github/workflows/ci.yml").read_text()
    hooks = (ROOT / ".pre-commit-config.yaml").read_text()
    assert re.findall(r"entry: (.*)", hooks) == ["make check", ".ci/run"]


@pytest.mark.parametrize(
    ("base", "refused"),
    [
        ("", True),
        ("a/b:1.0", True),
        ("a/b@sha256:12", True),
        ("@sha256:" + "0" * 64, True),
        ("a/b@sha256:" + "0" * 64, False),
        ("a/b:1.0@sha256:" + "f" * 64, False),
    ],
)
def test_an_image_is_built_on_a_digest_alone(base: str, refused: bool):
    text = (ROOT / "Dockerfile").read_text().replace("\\\n", "")
    (check,) = re.findall(r"^RUN (printf .*)$", text, re.M)
    done = subprocess.run(
        ["sh", "-c", check], env={**os.environ, "BASE": base}, capture_output=True, text=True
    )
    assert done.returncode == refused
    assert done.stderr.startswith("BASE: an image without its digest" if refused else "")
    instructions = re.findall(r"^([A-Z]+) (.*)$", text, re.M)
    assert ("ARG", "BASE") in instructions, "no default"
    assert ("USER", "fd_large") in instructions


def test_what_the_workflow_takes_from_elsewhere_is_named_by_its_hash():
    text = (ROOT / ".github/workflows/ci.yml").read_text()
    used = re.findall(r"uses: (\S+)", text)
    assert used
    assert all(re.fullmatch(r"[\w./-]+@[0-9a-f]{40}", one) for one in used), used
    assert "EXTRA_INDEX" not in text


def test_torch_of_an_index_of_its_own_leaves_all_else_where_it_was(tmp_path):
    (tmp_path / "pyproject.toml").touch()

    def commands(*more: str) -> list[str]:
        words = ["make", "-n", "-f", ROOT / "Makefile", ".venv/test", *more]
        set_by_ci = ("LOCK", "TORCH", "TORCH_INDEX")
        environ = {name: value for name, value in os.environ.items() if name not in set_by_ci}
        done = subprocess.run(words, cwd=tmp_path, env=environ, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return [line for line in done.stdout.splitlines() if " pip install " in line]

    usual, own = commands(), commands("TORCH_INDEX=INDEX")
    (added,) = [line for line in own if line not in usual]
    assert added.endswith("--index-url INDEX torch torchvision")
    assert [line for line in own if line in usual] == usual
    assert not any("index" in line for line in usual)
    (tmp_path / "FILE").touch()
    locked, torch, package = commands("LOCK=FILE", "TORCH_INDEX=INDEX")
    assert locked.endswith("--no-deps --require-hashes --requirement FILE")
    assert "--index-url INDEX" in torch
    assert "--no-deps --no-build-isolation" in package


def test_the_page_of_masks_has_the_figures_of_its_benchmark():
    faster = json.loads((ROOT / "benchmarks/results/masked.json").read_text())["faster"]
    text = (ROOT / "docs/masked.md").read_text()
    for row, case in (
        ("mask tokens", "mask tokens"),
        ("visible patches alone", "visible patches"),
        ("visible patches and a decoder of 8 blocks", "visible patches, decoder"),
    ):
        assert f"| {row} | {faster[case]['median']:.2f} |" in text
    assert faster["visible patches"]["quartiles"][0] > 2
