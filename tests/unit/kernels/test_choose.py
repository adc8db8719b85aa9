from __future__ import annotations

import logging
import sys
import types
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from fd_large.errors import ConfigError
from fd_large.kernels import choose, whitened_loss  # noqa: F401 (its operation is asked for)
from fd_large.kernels.residual_norm import layer_norm

CASE = {"width": 64, "empty": False, "stream": torch.float32}
NORM = {**CASE, "branch": torch.float32, "weight": torch.float32}


@pytest.fixture(autouse=True)
def fresh_choices(monkeypatch):
    monkeypatch.delenv("FD_KERNELS", raising=False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    choose.reset()
    yield
    choose.reset()


@pytest.fixture
def gpu(monkeypatch):
    """A GPU's compute capability, as a list to change."""
    capability = [9, 0]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: tuple(capability))
    return capability


@pytest.fixture
def no_triton(monkeypatch):
    monkeypatch.setattr(choose, "find_spec", lambda name: None)


@pytest.mark.parametrize(
    ("wish", "device", "choice"),
    [
        (None, "cuda", "triton"),
        (None, "cpu", "reference"),
        (None, "meta", "reference"),
        ("triton", "cuda", "triton"),
        ("triton", "meta", "triton"),
        ("reference", "cuda", "reference"),
        ("apex", "cuda", "triton"),  # apex has no such kernel.
        ("apex", "cpu", "reference"),
    ],
)
def test_what_runs_where(wish, device, choice, gpu, monkeypatch):
    if wish is not None:
        monkeypatch.setenv("FD_KERNELS", wish)
    assert choose.implementation("residual_norm", device, **CASE) == choice


@pytest.mark.parametrize(
    ("wish", "device", "choice"),
    [
        ("auto", "cuda", "compiled"),
        ("triton", "cuda", "compiled"),
        ("reference", "cuda", "reference"),
        ("auto", "cpu", "reference"),
        ("auto", "meta", "reference"),
        ("compiled", "cpu", "compiled"),
    ],
)
def test_an_operation_without_kernels_of_ours_is_compiled_on_gpus(
    wish, device, choice, gpu, monkeypatch
):
    monkeypatch.setenv("FD_KERNELS", wish)
    assert choose.implementation("whitened_loss", device) == choice


def test_an_operation_can_be_asked_for_alone(gpu, monkeypatch):
    for wish in ("auto,residual_norm=compiled", "residual_norm=compiled"):
        monkeypatch.setenv("FD_KERNELS", wish)
        assert choose.wished() == wish
        assert choose.implementation("residual_norm", "cuda", **CASE) == "compiled"
        assert choose.implementation("layer_norm", "cuda", **NORM) == "triton"
        assert choose.may_run_kernels("cpu")
    monkeypatch.setenv("FD_KERNELS", "reference, window_attention=auto")
    assert choose.implementation("residual_norm", "cuda", **CASE) == "reference"
    assert choose.may_run_kernels("cuda")


def test_every_file_that_registers_operations_is_known():
    room = Path(choose.__file__).parent
    registering = {p.stem for p in room.glob("*.py") if "\nchoose.register(" in p.read_text()}
    assert registering == set(choose._FILES)


@pytest.mark.parametrize("wish", ["compiled", "auto"])
def test_torch_compile_on_old_gpus_and_without_triton(wish, gpu, monkeypatch):
    monkeypatch.setenv("FD_KERNELS", wish)

    def choice():
        choose.reset()
        if wish == "auto":
            return choose.implementation("whitened_loss", "cuda")
        with pytest.raises(ConfigError, match=r"torch.compile"):
            choose.implementation("whitened_loss", "cuda")
        return "reference"

    gpu[:] = 6, 1
    assert choice() == "reference"
    gpu[:] = 9, 0
    monkeypatch.setattr(choose, "find_spec", lambda name: None)
    assert choice() == "reference"


def test_cases_that_were_not_tested_run_on_the_reference(gpu, monkeypatch, caplog):
    caplog.set_level(logging.DEBUG, logger="fd_large")
    for wish in ("auto", "triton"):
        monkeypatch.setenv("FD_KERNELS", wish)
        for change in ({"width": 16}, {"width": 8193}, {"empty": True}, {"copy": torch.float16}):
            case = CASE | change
            assert choose.implementation("residual_norm", "cuda", **case) == "reference"
    assert "residual_norm on cuda: reference (not tested in Triton: 16 channels)" in caplog.text


def test_the_log_says_once_what_runs_and_why(gpu, caplog):
    caplog.set_level(logging.DEBUG, logger="fd_large")
    for width in (32, 64, 128):
        choose.implementation("residual_norm", "cuda", **CASE | {"width": width})
    assert caplog.messages == ["residual_norm on cuda: triton (FD_KERNELS=auto)"]


def test_old_gpus_and_missing_packages_run_the_reference_by_default(gpu, no_triton, monkeypatch):
    assert choose.implementation("residual_norm", "cuda", **CASE) == "reference"
    monkeypatch.setattr(choose, "find_spec", lambda name: True)
    choose.reset()
    for other in ((7, 5), (8, 9), (10, 0)):
        gpu[:] = other
        choose.reset()
        assert choose.implementation("residual_norm", "cuda", **CASE) == "reference"


def test_an_amd_gpu_that_calls_itself_9_0_runs_the_reference(gpu, monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert choose.implementation("residual_norm", "cuda", **CASE) == "reference"


def test_triton_where_it_cannot_run_is_refused(gpu, monkeypatch):
    monkeypatch.setenv("FD_KERNELS", "triton")
    with pytest.raises(ConfigError, match=r"cpu, .*TRITON_INTERPRET=1"):
        choose.implementation("residual_norm", "cpu", **CASE)
    with pytest.raises(ConfigError, match="device mps"):
        choose.implementation("residual_norm", "mps", **CASE)
    gpu[:] = 7, 5
    with pytest.raises(ConfigError, match=r"compute capability \(7, 5\)"):
        choose.implementation("residual_norm", "cuda", **CASE)


def test_triton_that_is_not_installed_is_refused(gpu, no_triton, monkeypatch):
    monkeypatch.setenv("FD_KERNELS", "triton")
    with pytest.raises(ConfigError, match="package triton"):
        choose.implementation("residual_norm", "cuda", **CASE)


def test_the_interpreter_makes_triton_run_on_the_cpu(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert choose.implementation("residual_norm", "cpu", **CASE) == "reference"
    monkeypatch.setenv("FD_KERNELS", "triton")
    assert choose.implementation("residual_norm", "cpu", **CASE) == "triton"


def test_unknown_implementation_is_named(monkeypatch):
    for wish, told in (
        ("apx", "nearest: apex"),
        ("auto,residual_norm=compield", "nearest: compiled"),
        ("auto,residual_nrom=compiled", "nearest: residual_norm"),
    ):
        monkeypatch.setenv("FD_KERNELS", wish)
        with pytest.raises(ConfigError, match=told):
            choose.wished()


@pytest.fixture
def apex_stand_in(monkeypatch):
    """A STAND-IN for NVIDIA apex: it has its names and signature, none of its kernels."""
    calls = []

    def fused_layer_norm_affine(input, weight, bias, normalized_shape, eps=1e-6):
        calls.append(tuple(normalized_shape))
        return F.layer_norm(input, normalized_shape, weight, bias, eps)

    names = ("apex", "apex.normalization", "apex.normalization.fused_layer_norm", "apex.optimizers")
    modules = {name: types.ModuleType(name) for name in names}
    modules["apex"].__spec__ = types.SimpleNamespace(name="apex")
    modules["apex.normalization"].FusedLayerNorm = object
    modules["apex.optimizers"].FusedAdam = object
    modules["apex.normalization.fused_layer_norm"].fused_layer_norm_affine = fused_layer_norm_affine
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(choose, "APEX_DEVICES", ("cpu", "cuda"))
    return calls


def norm_inputs():
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(3, 5, 2, 8, generator=generator)
    return x, *(torch.randn(8, generator=generator) for _ in range(2))


def test_apex_runs_when_asked_for(apex_stand_in, monkeypatch):
    x, weight, bias = norm_inputs()
    expected = layer_norm(x, weight, bias, 1e-5)
    assert apex_stand_in == []
    monkeypatch.setenv("FD_KERNELS", "apex")
    assert torch.equal(layer_norm(x, weight, bias, 1e-5), expected)
    assert apex_stand_in == [(8,)]
    layer_norm(x, weight.bfloat16(), bias.bfloat16(), 1e-5)
    assert apex_stand_in == [(8,)]  # Not with mixed dtypes.


def test_another_project_named_apex_is_refused(apex_stand_in, monkeypatch):
    monkeypatch.delattr(sys.modules["apex.optimizers"], "FusedAdam")
    monkeypatch.setenv("FD_KERNELS", "apex")
    x, weight, bias = norm_inputs()
    with pytest.raises(ConfigError, match="another project"):
        layer_norm(x, weight, bias, 1e-5)


def test_apex_where_it_has_no_kernel_is_refused(monkeypatch):
    monkeypatch.setenv("FD_KERNELS", "apex")
    assert choose.implementation("layer_norm", "cuda", **NORM) == "apex"
    with pytest.raises(ConfigError, match="got cpu, "):
        choose.implementation("layer_norm", "cpu", **NORM)


def test_a_start_holds_the_other_kernels_against_their_references_beside_apex(monkeypatch):
    device = choose.Device((9, 0), wish="apex")
    with choose.standing_in(device):
        assert choose.implementation("residual_norm", "meta", **CASE) == "triton"
        assert choose.implementation("whitened_loss", "meta") == "compiled"
