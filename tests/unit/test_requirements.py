"""The files of requirements/ hold what pyproject.toml asks for, by hashes, and name no host."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from fd_large.engine.zero import private_names

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
TORCH = {"torch", "torchvision"}
OF_A_RUN = ("quickstart", "open_clip", "offload", "detection")
EXTRAS = {"ci": ("check", "coverage", "dist", "docs"), "cpu": OF_A_RUN, "cuda": OF_A_RUN}


def pinned(name: str) -> dict[str, str]:
    """Versions of a file, by the name of the package; each has a hash."""
    text = (ROOT / "requirements" / f"{name}.txt").read_text()
    found = re.findall(r"^([\w.-]+)==(\S+)((?: \\\n +--hash=sha256:[0-9a-f]{64})+)$", text, re.M)
    assert len(found) == len(re.findall(r"^\w", text, re.M)), "a package without a hash"
    return {canonicalize_name(package): version for package, version, _ in found}


def wanted(extras: tuple[str, ...]) -> list[Requirement]:
    """What the package and these extras ask for on Linux."""
    lines = [*PROJECT["dependencies"]]
    for extra in extras:
        lines += PROJECT["optional-dependencies"][extra]
    found = [Requirement(line) for line in lines]
    inside = [extra for r in found if r.name == "fd_large" for extra in r.extras]
    others = [r for r in found if r.name != "fd_large"]
    return others if not inside else others + wanted(tuple(inside))


@pytest.mark.parametrize("name", EXTRAS)
def test_a_file_has_what_is_asked_for_and_names_no_host(name):
    versions = pinned(name)
    for requirement in wanted(EXTRAS[name]):
        package = canonicalize_name(requirement.name)
        if package in TORCH and name != "cuda":
            continue
        assert requirement.specifier.contains(versions[package]), f"{requirement}: run `make lock`"
    assert "://" not in (ROOT / "requirements" / f"{name}.txt").read_text()


def test_torch_is_the_tested_one_and_cuda_comes_with_it_alone():
    lines = (ROOT / "requirements/torch.txt").read_text().splitlines()
    listed = dict(line.split("==") for line in lines if not line.startswith("#"))
    assert listed == {package: private_names.TESTED[package] for package in TORCH}
    cuda = pinned("cuda")
    assert {package: cuda[package] for package in TORCH} == listed
    for name in ("ci", "cpu"):
        assert not [package for package in pinned(name) if re.match("nvidia|cuda|torch", package)]
    assert any(package.startswith("nvidia") for package in cuda)


def test_what_two_files_name_is_the_same():
    ci, cpu, cuda = (pinned(name) for name in EXTRAS)
    assert cpu.items() <= ci.items()
    assert cpu.items() <= cuda.items()
