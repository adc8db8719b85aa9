"""The doctor's look at what is installed: versions, compiler, and what makes training fast."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, requires, version
from importlib.util import find_spec

from fd_large.cli.doctor_finding import Finding, look


def findings() -> Iterator[Finding]:
    """All lines, those without which nothing runs first."""
    yield look("packages", _packages)
    yield look("code", _code)
    yield look("torch", _torch)
    yield look("DeepSpeed ops", _deepspeed_ops)
    yield look("compiler", _compiler)
    yield look("Triton", _triton)
    yield look("NVIDIA apex", _apex)
    yield look("fairscale", _fairscale)


def _packages() -> Finding:
    """What setup.py asks for, in the versions that it asks for."""
    from packaging.requirements import Requirement

    try:
        wanted = [Requirement(line) for line in requires("fd_large") or []]
    except PackageNotFoundError:
        return Finding(
            "packages", "fd_large is not installed", "missing", "pip install -e . in its checkout."
        )
    wrong, found = [], [f"Python {platform.python_version()}"]
    for requirement in wanted:
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            has = version(requirement.name)
        except PackageNotFoundError:
            wrong.append(f"no {requirement.name}")
            continue
        if not requirement.specifier.contains(has, prereleases=True):
            wrong.append(f"{requirement.name} {has}, not {requirement.specifier}")
        elif requirement.name in ("deepspeed", "torchvision", "timm", "numpy"):
            found.append(f"{requirement.name} {has}")
    if wrong:
        return Finding("packages", "; ".join(wrong), "STOPS", "pip install -e . in the checkout.")
    return Finding("packages", ", ".join(found), alike=", ".join(found))


def _code() -> Finding:
    import fd_large
    from fd_large.engine.node_consistency import code_hash
    from fd_large.runtime.run_folder import source_commit

    commit = source_commit()
    at = f"commit {commit[:9]}" if commit else "no checkout"
    found = f"fd_large {fd_large.__version__}, {at}, the files' hash {code_hash()[:8]}"
    return Finding("code", found, alike=found)


def _torch() -> Finding:
    try:
        import torch
    except Exception as error:
        return Finding("torch", f"cannot be imported: {error}", "STOPS", "Install it again.")
    cuda = torch.version.cuda
    found = f"{torch.__version__}, {f'CUDA {cuda}' if cuda else 'built without CUDA'}"
    if cuda:
        found += f", NCCL {'.'.join(map(str, torch.cuda.nccl.version()))}"
    if not cuda and os.path.exists("/proc/driver/nvidia/version"):
        return Finding(
            "torch",
            f"{found}, beside an NVIDIA driver",
            "missing",
            "Install a torch that is built for CUDA: training would run on the CPU.",
            found,
        )
    return Finding("torch", found, alike=found)


def _deepspeed_ops() -> Finding:
    try:
        from fd_large.engine.zero.compiled_ops import ops
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        return Finding(
            "DeepSpeed ops", f"cannot be imported: {reason}", "STOPS", "Install it again."
        )
    found = ops()
    states: dict[str, list[str]] = {}
    for op in found:
        state = "built" if op.built else "can be built" if op.buildable else "cannot be built"
        states.setdefault(state, []).append(op.name)
    said = "; ".join(f"{state}: {', '.join(names)}" for state, names in states.items())
    fused = found[0]
    if not (fused.built or fused.buildable) and _has_gpu():
        return Finding(
            "DeepSpeed ops",
            said,
            "slow",
            "Install nvcc of torch's CUDA version, a C++ compiler and ninja: AdamW is then fused.",
        )
    return Finding("DeepSpeed ops", said)


def _compiler() -> Finding:
    found, missing = [], []
    for name, command in (("C++", "c++"), ("ninja", "ninja"), ("nvcc", "nvcc")):
        path = shutil.which(os.environ.get("CXX", command) if name == "C++" else command)
        if path is None:
            missing.append(name)
        elif name == "ninja":
            found.append(name)
        else:
            lines = subprocess.run(
                [path, "--version"], capture_output=True, text=True, timeout=20, check=False
            ).stdout.splitlines()
            told = next((line for line in lines if "release" in line), (lines or [""])[0])
            found.append(f"{name} {_number(told)}".strip())
    if not _has_gpu():
        missing = [name for name in missing if name != "nvcc"]
    said = ", ".join(found) or "none"
    if missing:
        return Finding(
            "compiler",
            f"{said}; no {', '.join(missing)}",
            "missing",
            "Needed where DeepSpeed's ops and Triton's launchers are not built yet.",
        )
    return Finding("compiler", said)


def _triton() -> Finding:
    if find_spec("triton") is None:
        verdict = "slow" if _has_gpu() else "-"
        return Finding(
            "Triton", "not installed", verdict, "pip install triton: fused kernels on GPUs."
        )
    found = f"{version('triton')}{'' if _has_gpu() else ', idle without a GPU'}"
    if wish := os.environ.get("FD_KERNELS"):
        found += f", FD_KERNELS={wish}"
    return Finding("Triton", found)


def _apex() -> Finding:
    from fd_large.kernels.choose import has_nvidia_apex

    if has_nvidia_apex():
        return Finding("NVIDIA apex", "FusedLayerNorm, FusedAdam")
    beside = "a package of that name, not NVIDIA's" if find_spec("apex") else "not installed"
    return Finding("NVIDIA apex", f"{beside}; optional", "-")


def _fairscale() -> Finding:
    if find_spec("fairscale") is None:
        return Finding(
            "fairscale",
            "not installed; only for --student.activation_checkpointing offload",
            "-",
        )
    return Finding("fairscale", f"{version('fairscale')}: activation offload")


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def _number(told: str) -> str:
    """The version in a compiler's own words."""
    words = [word.strip(",()") for word in told.split()]
    return next((w for w in reversed(words) if w[:1].isdigit() and "." in w), "")
