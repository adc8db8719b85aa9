from __future__ import annotations

import argparse

import pytest
import torch
from safetensors.torch import save_file

from fd_large.errors import WeightsError
from fd_large.weights.read import read, unwrap

TENSORS = {"a.weight": torch.arange(6.0).view(2, 3), "a.bias": torch.zeros(2)}


def same(found):
    assert found.keys() == TENSORS.keys()
    assert all(torch.equal(found[name], TENSORS[name]) for name in TENSORS)


def test_safetensors(tmp_path):
    save_file(TENSORS, tmp_path / "a.safetensors")
    found = read(tmp_path / "a.safetensors")
    same(found)
    assert found.shape("a.weight") == (2, 3)
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
    same(read(path))


def test_heads_do_not_hide_a_prefix():
    state = {"module.backbone.a": torch.zeros(1), "module.head.b": torch.zeros(1)}
    assert unwrap({"student": state}).keys() == {"a", "head.b"}


def test_student_is_taken_before_teacher():
    state = {"student": {"a": torch.ones(1)}, "teacher": {"a": torch.zeros(1)}}
    assert unwrap(state)["a"] == 1


def test_torchscript_archives(tmp_path):
    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.a = torch.nn.Linear(3, 2)

        def forward(self, x):
            return self.a(x)

    net = Net()
    with pytest.warns(DeprecationWarning, match="torch.jit"):
        torch.jit.script(net).save(str(tmp_path / "a.pt"))
    found = read(tmp_path / "a.pt")
    assert torch.equal(found["a.weight"], net.a.weight)


def test_missing_files_and_folders(tmp_path):
    with pytest.raises(WeightsError, match=r"--teacher.source: .*none.pth: no such file"):
        read(tmp_path / "none.pth", where="--teacher.source")
    with pytest.raises(WeightsError, match="a folder"):
        read(tmp_path)


@pytest.mark.parametrize("name", ["a.safetensors", "a.pth"])
@pytest.mark.parametrize("keep", [0, 3, 0.5, 0.98])
def test_files_cut_short(tmp_path, name, keep):
    path = tmp_path / name
    big = {"a": torch.randn(4000)}
    save_file(big, path) if name.endswith("safetensors") else torch.save(big, path)
    content = path.read_bytes()
    path.write_bytes(content[: keep if isinstance(keep, int) else int(len(content) * keep)])
    with pytest.raises(WeightsError, match="damaged, cut short"):
        read(path)


@pytest.mark.parametrize("name", ["a.safetensors", "a.pth"])
def test_files_of_another_kind(tmp_path, name):
    path = tmp_path / name
    path.write_text("<html><body>404 not found</body></html>" * 9)
    with pytest.raises(WeightsError, match="not a weights file"):
        read(path)


def test_objects_are_not_restored(tmp_path):
    path = tmp_path / "a.pth"
    torch.save({"model": dict(TENSORS), "args": argparse.Namespace(lr=1)}, path)
    with pytest.raises(WeightsError, match=r"argparse\.Namespace"):
        read(path)


@pytest.mark.parametrize("contents", [[1, 2], {}, {"model": {}}, {"a": torch.zeros(1), "b": 2}])
def test_contents_without_tensors_by_name(tmp_path, contents):
    torch.save(contents, tmp_path / "a.pth")
    with pytest.raises(WeightsError, match="weights:"):
        read(tmp_path / "a.pth")
