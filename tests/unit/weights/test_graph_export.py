"""A student as a graph: the same tokens in onnxruntime and in a reloaded program, any batch."""

from __future__ import annotations

import json

import pytest
import torch
from card_code import run_code
from loading import close
from stored_run import STUDENTS, SWIN, VIT, store_student
from torch import nn

from fd_large.cli import export as command
from fd_large.errors import ConfigError
from fd_large.weights import graph_export

SHIFTED = {**SWIN, "depths": (2,), "num_heads": (2,), "pretrained_window_sizes": (3,)}


def export(folder, to, *words):
    arguments = [str(folder / "run"), "--to", to, str(folder / "out"), *words]
    assert command.main(arguments) == 0


def load(out, to):
    if to == "program":
        return torch.export.load(out / "model.pt2").module()
    onnxruntime = pytest.importorskip("onnxruntime")
    session = onnxruntime.InferenceSession(out / "model.onnx")
    return lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


def operations(out, to):
    """The operations of a graph, each with whose it is."""
    if to == "program":
        graph = torch.export.load(out / "model.pt2").graph
        return {str(node.target).split(".")[0] for node in graph.nodes if node.op != "output"}
    onnx = pytest.importorskip("onnx")
    model = onnx.load(out / "model.onnx")
    return {node.domain for node in model.graph.node}


def compared(net, folder, to, side=32):
    """Images of other numbers than it was traced with: the same tokens."""
    run = load(folder / "out", to)
    for number in (1, 5):
        images = torch.randn(number, 3, side, side)
        with torch.no_grad():
            close(run(images), net(images).tokens)


@pytest.mark.parametrize("to", ["onnx", "program"])
def test_a_vit_with_class_token_and_a_shared_table(tmp_path, to):
    # Drop path in training: no graph has it.
    one_block = {**VIT, "depths": (1,)}
    net = store_student(tmp_path / "run", "vit_base_patch16", one_block, drop_path_rate=0.5)
    export(tmp_path, to)
    compared(net, tmp_path, to)
    card = (tmp_path / "out" / "README.md").read_text()
    found, image = run_code(card, tmp_path / "out", tmp_path)
    close(torch.as_tensor(found["tokens"]), net(image).tokens)
    assert "`tokens` is (1, 17, 32): the class token, then the map, row by row." in card
    found = operations(tmp_path / "out", to)
    assert found == ({""} if to == "onnx" else found)
    assert not [name for name in found if "fd_large" in name or "dropout" in name]
    files = {path.name for path in (tmp_path / "out").iterdir()}
    assert files == {"README.md", "config.json", "model.onnx" if to == "onnx" else "model.pt2"}
    config = json.loads((tmp_path / "out" / "config.json").read_text())["fd_large"]
    assert config["architecture"]["image_size"] == 32


def test_swinv2_at_another_size_than_it_was_trained_at(tmp_path):
    net = store_student(tmp_path / "run", "swinv2_base", SHIFTED)
    export(tmp_path, "program", "--image_size", "48")
    compared(net, tmp_path, "program", side=48)
    told = dict.fromkeys(("image_size", "image_mean", "image_std", "grid", "prefix_tokens"), "")
    torch.export.load(tmp_path / "out" / "model.pt2", extra_files=told)
    assert told == {
        "image_size": "48",
        "image_mean": "0.485 0.456 0.406",
        "image_std": "0.229 0.224 0.225",
        "grid": "24 24",
        "prefix_tokens": "0",
    }


def test_a_student_of_timm(tmp_path):
    net = store_student(tmp_path / "run", "timm:test_convnext2", {})
    export(tmp_path, "program")
    compared(net, tmp_path, "program")


@pytest.mark.sweep
@pytest.mark.parametrize("to", ["onnx", "program"])
@pytest.mark.parametrize("what", [*STUDENTS, "timm:convnextv2_atto", "padded"])
def test_all_students(tmp_path, what, to):
    options = {"size_rule": "pad"} if what == "padded" else {}
    padded = ("swinv2_base", {**SHIFTED, "window_size": 3})
    name, fields = padded if options else STUDENTS.get(what, (what, {}))
    net = store_student(tmp_path / "run", name, fields, **options)
    export(tmp_path, to)
    compared(net, tmp_path, to)


def test_a_model_that_looks_at_values_is_refused_in_one_sentence(tmp_path, monkeypatch):
    name, fields = STUDENTS["plain vit"]
    store_student(tmp_path / "run", name, fields)
    build = graph_export.build

    def looking(*arguments, **named):
        net = build(*arguments, **named)
        forward = net.forward
        net.forward = lambda images: forward(images * 2 if images.sum() > 0 else images)
        return net

    monkeypatch.setattr(graph_export, "build", looking)
    with pytest.raises(ConfigError, match=r"vit .*traced; got .*--to fd"):
        export(tmp_path, "program")
    assert not (tmp_path / "out").exists()


def test_a_graph_that_is_off_the_model_is_refused(tmp_path, monkeypatch):
    """A forward that counts its calls gives other numbers than its graph does."""
    name, fields = STUDENTS["plain vit"]
    store_student(tmp_path / "run", name, fields)
    build = graph_export.build

    class Counting(nn.Module):
        def __init__(self, net):
            super().__init__()
            self.net, self.calls = net, 0

        def forward(self, images):
            self.calls += 1
            return self.net(images * self.calls)

    monkeypatch.setattr(graph_export, "build", lambda *a, **k: Counting(build(*a, **k)))
    with pytest.raises(ConfigError, match=r"vit .*differs from the model; got "):
        export(tmp_path, "program")
    assert not (tmp_path / "out").exists()


def test_missing_packages_are_named_at_once(tmp_path, monkeypatch):
    name, fields = STUDENTS["plain vit"]
    store_student(tmp_path / "run", name, fields)
    monkeypatch.setattr(graph_export, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"onnx, onnxscript, onnxruntime.*fd_large\[onnx\]"):
        export(tmp_path, "onnx")


def test_a_graph_has_no_shards(tmp_path):
    with pytest.raises(ConfigError, match=r"--shard_size: --to program.* Leave out --shard_size\."):
        export(tmp_path, "program", "--shard_size", "1GB")
