from __future__ import annotations

import argparse
import json
import pickle

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from fd_large.errors import WeightsError
from fd_large.weights.read import read, read_json, split_part, unwrap

TENSORS = {"a.weight": torch.arange(6.0).view(2, 3), "a.bias": torch.zeros(2)}


def same(found):
    assert found.keys() == TENSORS.keys()
    assert all(torch.equal(found[name], TENSORS[name]) for name in TENSORS)


def test_safetensors(tmp_path):
    save_file(TENSORS, tmp_path / "a.safetensors")
    found = read(tmp_path / "a.safetensors")
    same(found)
    assert found.shape("a.weight") == (2, 3)
    assert found.dtype("a.weight") == torch.float32
    save_file({f"module.{n}": t for n, t in TENSORS.items()}, tmp_path / "b.safetensors")
    same(read(tmp_path / "b.safetensors"))


@pytest.mark.parametrize("wrap", [(), ("model",), ("state_dict",), ("student",)])
@pytest.mark.parametrize("prefix", ["", "module.", "module.backbone."])
@pytest.mark.parametrize("new_format", [True, False])
def test_torch_files_and_their_wrapping(tmp_path, wrap, prefix, new_format):
    contents = {f"{prefix}{name}": tensor for name, tensor in TENSORS.items()}
    for key in wrap:
        contents = {"epoch": 7, key: contents, "optimizer": {"lr": 0.1}}
    path = tmp_path / "a.pth"
    torch.save(contents, path, _use_new_zipfile_serialization=new_format)
    found = read(path)
    same(found)
    assert found.wrapping == wrap
    assert found.shape("a.weight") == (2, 3)


def test_reading_is_lazy(tmp_path):
    """Names and shapes of a file of 96 MB cost no anonymous memory; one tensor costs no copy."""
    rows = 6_000_000
    torch.save({"model": {"a": torch.zeros(rows), "b": torch.zeros(rows * 3)}}, tmp_path / "a.pth")
    save_file({"a": torch.zeros(rows), "b": torch.zeros(rows * 3)}, tmp_path / "a.safetensors")
    for name in ("a.pth", "a.safetensors"):
        before = anonymous()
        found = read(tmp_path / name)
        assert found.shape("b") == (rows * 3,)
        assert found["b"].sum() == 0
        assert anonymous() - before < 50e6, name
        del found
    (tmp_path / "a.pth").unlink()
    (tmp_path / "a.safetensors").unlink()


def anonymous() -> int:
    with open("/proc/self/status") as file:
        line = next(line for line in file if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024


def test_heads_do_not_hide_a_prefix():
    state = {"module.backbone.a": torch.zeros(1), "module.head.b": torch.zeros(1)}
    assert unwrap({"student": state})[0].keys() == {"a", "head.b"}


def test_student_is_taken_before_teacher_unless_it_is_named():
    state = {"student": {"a": torch.ones(1)}, "teacher": {"a": torch.zeros(1)}}
    assert unwrap(state)[0]["a"] == 1
    assert unwrap(state, part="teacher") == ({"a": torch.zeros(1)}, ("teacher",))


def test_parts_of_a_path(tmp_path):
    assert split_part("a/b.pth") == ("a/b.pth", "")
    assert split_part("a/b.pth#teacher") == ("a/b.pth", "teacher")
    (tmp_path / "a#teacher").touch()
    assert split_part(tmp_path / "a#teacher") == (str(tmp_path / "a#teacher"), "")
    with pytest.raises(WeightsError, match=r"got #tutor, .*#student"):
        split_part("a.pth#tutor")


def test_torchscript_archives(tmp_path):
    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            # No Linear: DeepSpeed may have replaced it in this process by what cannot be scripted.
            self.a = torch.nn.Conv1d(3, 2, 1)

        def forward(self, x):
            return self.a(x)

    net = Net()
    with pytest.warns((DeprecationWarning, FutureWarning), match="torch.jit"):
        torch.jit.script(net).save(str(tmp_path / "a.pt"))
    found = read(tmp_path / "a.pt")
    assert torch.equal(found["a.weight"], net.a.weight)


def test_missing_files_and_folders(tmp_path):
    with pytest.raises(WeightsError, match=r"--teacher.source: .*none.pth: "):
        read(tmp_path / "none.pth", where="--teacher.source")
    with pytest.raises(WeightsError, match=r"without model\.safetensors"):
        read(tmp_path)


@pytest.mark.parametrize("name", ["model.onnx", "model.pt2"])
def test_an_exported_graph_is_named(name, tmp_path):
    """As a folder and as a file; beside weights it is no matter."""
    (tmp_path / name).write_bytes(b"a graph")
    for path in (tmp_path, tmp_path / name):
        with pytest.raises(WeightsError, match=r"got (an ONNX|a torch\.export).*--to fd"):
            read(path, where="--teacher.source")
    torch.save(TENSORS, tmp_path / "pytorch_model.bin")
    same(read(tmp_path))


def test_folders(tmp_path):
    torch.save(TENSORS, tmp_path / "pytorch_model.bin")
    same(read(tmp_path))
    save_file({"b": torch.zeros(1)}, tmp_path / "model.safetensors")
    assert read(tmp_path).keys() == {"b"}


def test_the_folder_of_a_run_says_what_to_do(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(WeightsError, match=r"of a run.*Export"):
        read(tmp_path)


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_sharded_files(tmp_path, kind):
    save = save_file if kind == "safetensors" else torch.save
    stem = "model" if kind == "safetensors" else "pytorch_model"
    index = {}
    for i, (name, tensor) in enumerate(TENSORS.items()):
        save({name: tensor}, tmp_path / f"{stem}-{i}.{kind}")
        index[name] = f"{stem}-{i}.{kind}"
    path = tmp_path / f"{stem}.{kind}.index.json"
    path.write_text(json.dumps({"weight_map": index}))
    same(read(tmp_path))
    path.write_text(json.dumps({"weight_map": {**index, "c": index["a.bias"]}}))
    with pytest.raises(WeightsError, match=r"got no c, .* 3"):
        read(tmp_path)
    (tmp_path / index["a.bias"]).unlink()
    with pytest.raises(WeightsError, match=r"got no .*-1"):
        read(path)
    path.write_text("{")
    with pytest.raises(WeightsError, match="damaged"):
        read(path)


@pytest.mark.parametrize("name", ["a.safetensors", "a.pth"])
@pytest.mark.parametrize("keep", [0, 3, 0.5, 0.98])
def test_files_cut_short(tmp_path, name, keep):
    path = tmp_path / name
    big = {"a": torch.randn(4000)}
    save_file(big, path) if name.endswith("safetensors") else torch.save(big, path)
    content = path.read_bytes()
    path.write_bytes(content[: keep if isinstance(keep, int) else int(len(content) * keep)])
    with pytest.raises(WeightsError, match="damaged"):
        read(path)


@pytest.mark.parametrize("name", ["a.safetensors", "a.pth"])
def test_files_of_another_kind(tmp_path, name):
    path = tmp_path / name
    path.write_text("<html><body>404 not found</body></html>" * 9)
    with pytest.raises(WeightsError, match="weights file"):
        read(path)


class CfgNode(dict):
    """As yacs has it: pickled under its own name, which is not installed here."""


CfgNode.__module__, CfgNode.__qualname__ = "yacs.config", "CfgNode"


@pytest.fixture
def _yacs(monkeypatch):
    """pickle looks its classes up while it writes."""
    import sys
    import types

    module = types.ModuleType("yacs.config")
    module.CfgNode = CfgNode
    monkeypatch.setitem(sys.modules, "yacs", types.ModuleType("yacs"))
    monkeypatch.setitem(sys.modules, "yacs.config", module)


@pytest.mark.usefixtures("_yacs")
def test_harmless_settings_are_read_without_their_code(tmp_path):
    node = CfgNode(DATA=CfgNode(IMG_SIZE=224))
    node.__dict__["_immutable"] = True
    extras = {
        "config": node,
        "args": argparse.Namespace(lr=1, path=tmp_path),
        "best": np.float64(0.5),
        "epoch": np.int64(3),
    }
    for new_format in (True, False):
        torch.save(
            {"model": dict(TENSORS), **extras},
            tmp_path / "a.pth",
            _use_new_zipfile_serialization=new_format,
        )
        same(read(tmp_path / "a.pth"))


class Bomb:
    """Writes a file if anybody unpickles it."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


@pytest.mark.parametrize("new_format", [True, False])
def test_files_that_want_to_run_code_are_refused(tmp_path, new_format):
    trap, path = tmp_path / "ran", tmp_path / "a.pth"
    torch.save(
        {"model": dict(TENSORS), "args": Bomb(trap)},
        path,
        _use_new_zipfile_serialization=new_format,
    )
    with pytest.raises(WeightsError, match=r"got (io\.|builtins\.|_io\.)?open.*trust"):
        read(path)
    assert not trap.exists()
    path.write_bytes(pickle.dumps({"model": Bomb(trap)}))
    trap.unlink(missing_ok=True)
    with pytest.raises(WeightsError):
        read(path)
    assert not trap.exists()


@pytest.mark.parametrize("contents", [[1, 2], {}, {"model": {}}, {"a": torch.zeros(1), "b": 2}])
def test_contents_without_tensors_by_name(tmp_path, contents):
    torch.save(contents, tmp_path / "a.pth")
    with pytest.raises(WeightsError, match="weights:"):
        read(tmp_path / "a.pth")


def test_altered_and_cut_files_of_both_formats(tmp_path):
    path = tmp_path / "a.pth"
    torch.save(dict(TENSORS), path)
    whole = path.read_bytes()
    path.write_bytes(whole.replace(b"PK\x01\x02", b"XXXX"))  # Its table of contents.
    with pytest.raises(WeightsError, match="damaged"):
        read(path)
    torch.save(dict(TENSORS), path, _use_new_zipfile_serialization=False)
    whole = path.read_bytes()
    for size in range(0, len(whole), 16):
        path.write_bytes(whole[:size])
        with pytest.raises(WeightsError):
            read(path)


def test_names_that_are_numbers(tmp_path):
    torch.save({0: torch.zeros(1)}, tmp_path / "a.pth")
    with pytest.raises(WeightsError, match=r"dense tensors; got 0,"):
        read(tmp_path / "a.pth")


@pytest.mark.parametrize("hollow", [torch.zeros(2, 2).to_sparse(), torch.empty(2, device="meta")])
def test_tensors_without_values(tmp_path, hollow):
    torch.save({"model": {**TENSORS, "hollow": hollow}}, tmp_path / "a.pth")
    with pytest.raises(WeightsError, match=r"dense tensors; got hollow,"):
        read(tmp_path / "a.pth")


def test_index_whose_file_names_are_numbers(tmp_path):
    path = tmp_path / "model.safetensors.index.json"
    path.write_text(json.dumps({"weight_map": {"a": 1, "b": "x.safetensors"}}))
    with pytest.raises(WeightsError, match="got no 1, expected all 2 files"):
        read(path)


@pytest.mark.parametrize(
    ("text", "got"),
    [
        ("[" * 100_000, "nested too deeply"),
        ('{"a": NaN}', "NaN for a number"),
        ('{"a": -Infinity}', "-Infinity for a number"),
        ('{"a": 1e999}', "1e999 for a number"),
        ('{"a": ' + "9" * 5000 + "}", "digits"),
        ("[" + "0," * 1_000_001 + "0]", "more than 1,000,000 values"),
        ('"' + "a" * (4 << 20) + '"', "more than 4 MB"),
        ("\xff", "decode"),
        ("{", "Expecting"),
    ],
    ids=["deep", "nan", "infinity", "overflow", "digits", "values", "large", "bytes", "cut"],
)
def test_json_from_elsewhere_is_read_within_bounds(tmp_path, text, got):
    path = tmp_path / "config.json"
    path.write_text(text, encoding="latin-1")
    with pytest.raises(WeightsError, match=rf"config\.json: .*; got .*{got}"):
        read_json(path)


def test_an_index_may_be_larger_than_a_configuration(tmp_path):
    path = tmp_path / "model.safetensors.index.json"
    path.write_text(json.dumps("a" * (4 << 20)))
    assert len(read_json(path)) == 4 << 20


@pytest.mark.parametrize("name", ["x" * 600, "x" * 600 + ".safetensors", "\ud800", "a\0b"])
def test_an_index_may_name_no_file(tmp_path, name):
    """No file system takes these names."""
    path = tmp_path / "model.safetensors.index.json"
    path.write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(WeightsError, match=r"^--teacher\.source: ") as error:
        read(path, where="--teacher.source")
    assert len(str(error.value)) < 400 + len(str(path))


def test_messages_have_an_end(tmp_path):
    """However long the names in a file are."""
    torch.save({f"{i}" + "x" * 400: 1 for i in range(9)}, tmp_path / "a.pth")
    torch.save({"x" * 1_000_000: 1}, tmp_path / "b.pth")
    for name in ("a.pth", "b.pth"):
        with pytest.raises(WeightsError, match="dense tensors") as error:
            read(tmp_path / name)
        assert len(str(error.value)) < 1000
