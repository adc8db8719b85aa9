"""The card of an exported student: what it says, and code that runs as it stands."""

from __future__ import annotations

import hashlib
import json

import pytest
import yaml
from card_code import run_code
from loading import close
from own_net import NET
from stored_run import STUDENTS, SWIN, store_student

from fd_large import doors
from fd_large.cli import export as command
from fd_large.evaluation.lineage import trainings_of
from fd_large.weights.model_card import allowed_by


@pytest.fixture
def exported(tmp_path):
    """Stores a run of a named model and exports it; returns the model and the card."""

    def make(what, to, *words, **options):
        name, fields = STUDENTS[what]
        net = store_student(tmp_path / "run", name, fields, **options)
        out = tmp_path / "out"
        assert command.main([str(tmp_path / "run"), "--to", to, str(out), *words]) == 0
        return net, (out / "README.md").read_text()

    return make


def rows(card):
    """The rows of the card's tables, {what: text}."""
    lines = (line.strip("| ").split(" | ", 1) for line in card.splitlines() if "| " in line)
    return {cells[0]: cells[1] for cells in lines if len(cells) == 2}


def test_where_it_comes_from_and_how_good_it_is(exported):
    _, card = exported("swinv2 of two stages", "timm", source="/somewhere/else/clip.pt")
    assert "somewhere" not in card
    for words in (
        "| weights | clip.pt |",
        "0123456789abcdef",
        "fd_clip_vit_base",
        "| images | images |",
        "fingerprint-of-the-pictures",
        "| samples seen | 192 |",
        "| training loss, last step | 0.2500 |",
        "| held-out loss | 0.3125 |",
        "| loss | smooth L1 (beta 2) to the whitened map |",
        "(ImageNet's)",
        "| map | 8 x 8 tokens of 32 channels at 32 px |",
        "a `timm.models.swin_transformer_v2.SwinTransformerV2`",
    ):
        assert words in card, words


def test_which_trainings_led_to_it_without_a_path(exported, tmp_path):
    _, card = exported("swinv2 of two stages", "fd", source="/somewhere/else/clip.pt")
    run, teacher = json.loads((tmp_path / "out/config.json").read_text())["fd_large"]["trained_by"]
    assert (run["recipe"], run["images"]) == ("fd_clip_vit_base", ["images"])
    assert (run["fingerprint"], run["val_fraction"]) == ("fingerprint-of-the-pictures", 0)
    assert (teacher["recipe"], teacher["weights"]) == ("", "clip.pt")
    assert rows(card)["images of what came before, clip.pt"] == "not known"
    # An export of a student of the export goes on with what that one tells.
    tells = [str(one) for one in trainings_of(str(tmp_path / "out"))]
    out = tmp_path / "out"
    assert tells == [f"{out} (fd_clip_vit_base)", f"{out}: clip.pt"]


@pytest.mark.parametrize(
    ("what", "names"),
    [
        ("swinv2 of two stages", "Swinv2Model"),
        ("vit with a shared table", "BeitModel"),
        ("plain vit", "ViTModel"),
    ],
)
def test_the_names_are_those_of_one_class(exported, what, names):
    _, card = exported(what, "hf")
    assert f"| names | Hugging Face's {names} |" in card


def test_a_time_limit_of_an_earlier_version_says_how_many_steps_it_allowed(tmp_path):
    name, fields = STUDENTS["plain vit"]
    made = [{"step": step, "updates": total} for step, total in [(1, 80), (2, 75), (9, 70)]]
    facts = {"time_box": {"seconds": 5.0, "decisions": made}}
    store_student(tmp_path / "run", name, fields, facts=facts)
    file, out = tmp_path / "run" / "recipe.json", tmp_path / "out"
    recipe = json.loads(file.read_text())
    recipe["optim"] |= {"max_steps": 2000, "max_seconds": 90.0}
    file.write_text(json.dumps(recipe))
    assert command.main([str(tmp_path / "run"), "--to", "fd", str(out)]) == 0
    told = "3 (of 75, as many as its time limit allowed)"
    assert rows((out / "README.md").read_text())["steps"] == told


def test_a_teacher_was_random(exported):
    _, card = exported("plain vit", "fd")
    assert rows(card)["the teacher's weights"].startswith("random weights")


def test_licences_and_the_base_model(exported):
    """What is known is said with who says it; what is not known is said to be unknown."""
    _, card = exported("plain vit", "fd", source="/somewhere/clip.pt")
    assert "\nlicense: unknown\n" in card
    assert "base_model" not in card
    assert rows(card)["this model"].startswith("unknown")
    teacher = rows(card)["the teacher's weights"]
    # Known of the published file, and this may be another.
    assert all(word in teacher for word in ("MIT", "openai/CLIP", "unknown"))


def test_names_from_elsewhere_are_no_markup(exported):
    source = "hf:a/b<script>alert(1)</script>: |[x](y)\n---\n# z"
    _, card = exported("plain vit", "fd", source=source)
    assert "<script" not in card
    assert "\n# z" not in card
    head, _, text = card.removeprefix("---\n").partition("\n---\n")
    assert "base_model" not in yaml.safe_load(head)
    assert r"\|\[x\](y)" in text


def test_licence_and_base_model_as_the_user_says(exported):
    words = ("--license", "apache-2.0", "--base_model", "openai/clip-vit-base-patch16")
    _, card = exported("plain vit", "fd", *words, source="timm:convnextv2_atto")
    assert "\nlicense: apache-2.0\n" in card
    bases = "- openai/clip-vit-base-patch16\n- timm/convnextv2_atto.fcmae_ft_in1k\n"
    assert f"\nbase_model:\n{bases}" in card
    assert "| this model | apache-2.0 |" in card
    teacher = "cc-by-nc-4.0 (timm/convnextv2_atto.fcmae_ft_in1k)"
    assert f"| the teacher's weights | {teacher} |" in card


@pytest.mark.parametrize(
    ("what", "to", "size"),
    [
        ("swinv2 of two stages", "timm", "5GB"),
        ("vit with a shared table", "timm", "30KB"),
        ("swinv2 of two stages", "hf", "30KB"),
        ("plain vit", "hf", "5GB"),
        ("vit with a shared table", "fd", "30KB"),
    ],
)
def test_its_code_runs(exported, tmp_path, what, to, size):
    if to == "hf":
        pytest.importorskip("transformers")
    net, card = exported(what, to, "--shard_size", size)
    found, image = run_code(card, tmp_path / "out", tmp_path)
    tokens = found["tokens"]
    close(tokens.flatten(1, 2) if tokens.dim() == 4 else tokens, net(image).tokens)


@pytest.mark.parametrize(
    "official", [{}, {"window_rule": "official", "shift_stages": (True, False)}]
)
def test_code_for_a_model_that_pads_its_images(tmp_path, official):
    net = store_student(
        tmp_path / "run", "swinv2_base", {**SWIN, "window_size": 3}, size_rule="pad", **official
    )
    out = tmp_path / "out"
    assert command.main([str(tmp_path / "run"), "--to", "fd", str(out)]) == 0
    found, image = run_code((out / "README.md").read_text(), out, tmp_path)
    close(found["tokens"], net(image).tokens)


@pytest.mark.parametrize(
    ("code", "allowed"),
    [
        ("module:/home/me/net.py:Net", "net.py"),
        ("module:mine.nets:Net", "module:mine.nets:Net"),
        ("plugin", ""),
        ("", ""),
    ],
)
def test_own_code_is_allowed_by_its_file_or_its_name(code, allowed):
    assert allowed_by(code) == allowed


def test_code_for_a_model_of_the_users_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "net.py").write_text(NET)
    doors.allow("net.py")
    net = store_student(tmp_path / "run", f"module:{tmp_path}/net.py:Net", {})
    out = tmp_path / "out"
    assert command.main([str(tmp_path / "run"), "--to", "fd", str(out)]) == 0
    card = (out / "README.md").read_text()
    assert str(tmp_path) not in card
    sha256 = hashlib.sha256(NET.encode()).hexdigest()
    assert rows(card)["code"] == f"net.py, SHA-256 {sha256}"
    assert 'load_model(folder, allow_code=["net.py"])' in card
    assert "`net.py`: put its file into the folder in which Python is started" in card
    doors.reset()  # The card's code allows the file beside the current folder.
    found, image = run_code(card, out, tmp_path)
    close(found["tokens"], net(image).tokens)
