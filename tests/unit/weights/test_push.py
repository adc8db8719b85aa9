"""An export to the Hub: a stand-in on this machine answers as its HTTP endpoint does."""

from __future__ import annotations

import hashlib
from dataclasses import replace

import huggingface_hub
import pytest
import tiny_runs
import torch
import yaml
from card_code import run_code
from hub import TOKEN
from hub import hub as stand_in
from huggingface_hub import constants
from stored_run import STUDENTS, store_student

import fd_large
from fd_large.backbones.registry import build
from fd_large.cli import export as command
from fd_large.engine.frozen import frozen_weights
from fd_large.engine.student import student_weights
from fd_large.errors import ConfigError, FDError, WeightsError
from fd_large.recipes.sections import FrozenModel
from fd_large.weights.load import fill
from fd_large.weights.origin import Origin, origin_of
from fd_large.weights.resolve import Sources
from fd_large.weights.settle import settle_model, settle_student

REPOSITORY = "group/student"


@pytest.fixture
def hub(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no_token"))
    with stand_in({}, tmp_path / "cache") as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        yield server


def contents(folder):
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


@pytest.fixture
def export(tmp_path):
    """Exports a run of a tiny student to the repository."""
    name, fields = STUDENTS["vit with a shared table"]
    store_student(tmp_path / "run", name, fields)

    def run(*words):
        arguments = [str(tmp_path / "run"), str(tmp_path / "out"), "--to", "timm"]
        return command.main([*arguments, "--push", REPOSITORY, *words])

    return run


def test_all_files_arrive_in_a_private_repository(hub, export, tmp_path, monkeypatch, capsys):
    assert export("--license", "mit") == 0
    (created,) = hub.created
    assert created["visibility"] == "private"
    written = contents(tmp_path / "out")
    assert contents(hub.repositories[REPOSITORY]) == written
    digest = hashlib.sha256(written["model.safetensors"]).hexdigest()
    assert digest in hub.objects
    card = written["README.md"].decode()
    assert "license: mit" in card
    # The card's code downloads the repository, which stands here already.
    downloads = {REPOSITORY: str(tmp_path / "out")}
    monkeypatch.setattr(huggingface_hub, "snapshot_download", downloads.__getitem__)
    found, _ = run_code(card, tmp_path, tmp_path)
    assert found["tokens"].shape == (1, 17, 32)
    assert f"uploaded to a private repository: {hub.url}/{REPOSITORY}" in capsys.readouterr().out


@pytest.mark.parametrize("to", ["fd", "timm"])
def test_an_upload_comes_back_to_the_bit(hub, tmp_path, to):
    """As a model, with the head of its teacher; as a teacher; as the weights of a student."""
    run, repository = tiny_runs.tiny_run(), f"group/{to}"  # One name is fetched once.
    tiny_runs.store_task(tmp_path / "run", run, tiny_runs.tiny_task(run))
    arguments = [str(tmp_path / "run"), str(tmp_path / "out"), "--to", to, "--push", repository]
    assert command.main([*arguments, "--license", "mit"]) == 0
    card = (hub.repositories[repository] / "README.md").read_text()
    assert yaml.safe_load(card.split("---\n")[1])["library_name"] == {"fd": "fd_large"}.get(to, to)
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    source, net = f"hf:{repository}", build(run.student.model, run.student.architecture)
    with torch.no_grad():
        model, again = fd_large.load_student(tmp_path / "run"), fd_large.load_student(source)
        assert torch.equal(again(images), model(images))
        guess = model.teacher_map("teacher", images)
        assert torch.equal(again.teacher_map("teacher", images), guess)
        assert origin_of(source, "auto", None) == Origin("mit", repository)
        state, sources = model.backbone.state_dict(), Sources()
        teacher = settle_model(FrozenModel(source=source), sources, where="--teacher.source")
        student = settle_student(replace(run.student, init=source), sources)
        for weights in (
            frozen_weights(teacher, sources, where="--teacher.source"),
            student_weights(student, sources, image_size=32),
        ):
            fill(net, weights)
            assert all(
                torch.equal(tensor, state[name]) for name, tensor in net.state_dict().items()
            )


def test_what_is_there_already_stays_and_nothing_is_exported(hub, export, tmp_path):
    (tmp_path / "there").mkdir()
    hub.repositories[REPOSITORY] = tmp_path / "there"
    with pytest.raises(ConfigError, match=rf"--push: .*got {REPOSITORY}"):
        export()
    assert not (tmp_path / "out").exists()
    assert not contents(tmp_path / "there")


@pytest.mark.parametrize(
    ("token", "words"), [("", "no token.*hf auth login"), ("hf_other", "token is invalid")]
)
def test_tokens(hub, export, tmp_path, monkeypatch, token, words):
    monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(WeightsError, match=rf"--push: .*{words}.*Nothing"):
        export()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("status", "words"),
    [
        (403, "may not write to group/student.*run hf upload --private group/student "),
        (404, "expected a server that takes it.*run hf upload --private group/student "),
        (409, "exists already.*run hf upload --private OWNER/NAME "),
    ],
)
def test_a_refusal_at_the_upload_says_how_to_upload_later(hub, export, tmp_path, status, words):
    hub.refusal = status
    with pytest.raises(FDError, match=words):
        export()
    assert (tmp_path / "out" / "model.safetensors").exists()


def test_no_network(hub, export, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(WeightsError, match=r"--push: .*can be reached. Check the network. Nothing"):
        export()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(WeightsError, match=r"HF_HUB_OFFLINE=1.*Unset this"):
        export()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["student", "a/b/c", "group/", "../x", "group/a b"])
def test_names_that_are_none(export, name):
    with pytest.raises(ConfigError, match="--push: not a repository's name"):
        export("--push", name)
