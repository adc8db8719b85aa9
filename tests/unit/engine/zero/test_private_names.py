"""Private names of DeepSpeed: all are listed, and one that is not as listed ends the start."""

from __future__ import annotations

import ast
import faulthandler
import logging
import os
import re
from functools import lru_cache
from pathlib import Path
from pkgutil import resolve_name
from types import SimpleNamespace

import pytest
import torch
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

import fd_large
from fd_large.backbones.timm.models import OLDEST
from fd_large.engine.zero import private_names, start
from fd_large.engine.zero.start import deepspeed
from fd_large.errors import VersionError

PACKAGE = Path(fd_large.__file__).parent
DEEPSPEED = Path(deepspeed.__file__).parent
TABLES = PACKAGE / "engine" / "zero" / "private_names.py"
LISTED = private_names._LISTED

# DeepSpeed's documented interface, as far as it is used.
PUBLIC = {
    *("deepspeed.initialize", "deepspeed.init_distributed", "deepspeed.zero.Init"),
    *("deepspeed.comm.all_reduce", "deepspeed.comm.destroy_process_group", "deepspeed.comm.reduce"),
    *("deepspeed.ops.adam", "deepspeed.ops.adam.FusedAdam"),
    *("backward", "destroy", "gradient_clipping", "is_gradient_accumulation_boundary"),
    *("load_checkpoint", "optimizer"),
    *("save_checkpoint", "zero_optimization_stage"),
}


@lru_cache
def files() -> dict[Path, ast.Module]:
    """The trees of the package's files."""
    return {path: ast.parse(path.read_text()) for path in sorted(PACKAGE.rglob("*.py"))}


def of_deepspeed() -> set[str]:
    """Names of what DeepSpeed's engine, optimisers and parameters have: methods and attributes."""
    files = [
        *("runtime/engine.py", "runtime/base_optimizer.py", "runtime/bf16_optimizer.py"),
        *("runtime/zero/stage_1_and_2.py", "runtime/zero/stage3.py"),
        *("runtime/zero/partition_parameters.py", "runtime/zero/parameter_offload.py"),
        *("utils/tensor_fragment.py", "utils/mixed_precision_linkage.py", "utils/groups.py"),
        *("comm/comm.py", "comm/torch.py"),
    ]
    names = set()
    for file in files:
        for node in ast.walk(ast.parse((DEEPSPEED / file).read_text())):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                names.add(node.name)
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                names.add(node.attr)
            elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                names.add(node.target.id)
    return names


def of_others() -> set[str]:
    """Names of this package's own functions and attributes, and of what torch and Python have.

    Those that DeepSpeed shares with them (`step`, `param_groups`) cannot be told apart.
    """
    names = set()
    for tree in files().values():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                names.add(node.name)
            elif isinstance(node, ast.AnnAssign | ast.Assign):
                targets = [node.target] if isinstance(node, ast.AnnAssign) else node.targets
                for target in targets:
                    if isinstance(target, ast.Name):
                        names.add(target.id)
                    elif isinstance(target, ast.Attribute) and dotted(target.value) == "self":
                        names.add(target.attr)
    others = (
        *(torch, torch.distributed, torch.Tensor, torch.nn.Module),
        torch.optim.AdamW([torch.zeros(1)]),
        *(str, list, dict, os, Path, logging.Logger, faulthandler),
    )
    return names.union({"params"}, *map(dir, others))  # `params`: pycocotools.


def dotted(node: ast.expr) -> str:
    """Returns "a.b.c" of such an expression, and "" of another."""
    if isinstance(node, ast.Attribute):
        base = dotted(node.value)
        return f"{base}.{node.attr}" if base else ""
    return node.id if isinstance(node, ast.Name) else ""


@lru_cache
def private() -> set[str]:
    return of_deepspeed() - of_others()


def touched(tree: ast.AST) -> set[str]:
    """Names of DeepSpeed that a file touches, by attribute, by `getattr` or by import."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            if (path := dotted(node)).startswith("deepspeed."):
                found.add(path)
            elif node.attr in private():
                found.add(node.attr)
        elif isinstance(node, ast.Call) and dotted(node.func) in ("getattr", "hasattr", "setattr"):
            name = node.args[1]
            found |= {name.value} & private() if isinstance(name, ast.Constant) else set()
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("deepspeed"):
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {a.name for a in node.names if a.name.startswith("deepspeed.")}
    # The tree of a.b.c holds a.b as well, which is left out.
    return {name for name in found if not any(one.startswith(f"{name}.") for one in found)}


def assigned(tree: ast.AST) -> set[str]:
    """Listed names that a file assigns to."""
    return {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and isinstance(node.ctx, ast.Store | ast.Del)
        and node.attr in LISTED
        and dotted(node.value) != "self"
    }


def written(tree: ast.AST) -> set[str]:
    """Names of attributes in a file, and the parts of its strings."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            found.add(node.attr)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found |= set(re.split("[.:]", node.value))
    return found


def test_no_name_of_deepspeed_is_touched_that_is_not_listed():
    found = {path: touched(tree) - PUBLIC - LISTED for path, tree in files().items()}
    assert not {path: names for path, names in found.items() if names and path != TABLES}


def test_an_unlisted_name_is_seen():
    for code, name in {
        "engine.optimizer.all_grad_tensors": "all_grad_tensors",
        "getattr(engine, '_step_applied')": "_step_applied",
        "deepspeed.runtime.engine.DeepSpeedEngine": "deepspeed.runtime.engine.DeepSpeedEngine",
        "from deepspeed.utils import groups": "deepspeed.utils.groups",
    }.items():
        assert touched(ast.parse(code)) == {name}
        assert name not in PUBLIC | LISTED


def test_nothing_is_assigned_to_a_listed_name_but_by_replace():
    # The norm that stage 0 keeps as DeepSpeed's optimisers do is new there, and replaces nothing;
    # so is what an optimiser on a disk is set up with.
    new = {"_global_grad_norm", "grad_partitions_flat_buffer", "subgroup_to_device"}
    assert set().union(*map(assigned, files().values())) == new


def test_an_assignment_is_seen():
    assert assigned(ast.parse("engine.clip_fp32_gradients = None")) == {"clip_fp32_gradients"}


def test_what_is_listed_is_used_or_decides_what_is_used():
    used = set().union(*(written(tree) for path, tree in files().items() if path != TABLES))
    assert set().union(*private_names.ATTRIBUTES.values()) <= used
    # A hash may be of what calls, or is called by, what is used.
    for path, known in private_names.NAMES.items():
        name = re.split("[.:]", path)[-1]
        assert known.isalnum() or name.removesuffix("Builder") in used, path


def bounds_of_setup() -> dict[str, SpecifierSet]:
    bounds = {}
    for node in ast.walk(ast.parse((PACKAGE.parent / "setup.py").read_text())):
        if isinstance(node, ast.Constant) and re.match(r"\S+[>=]=\d", str(node.value)):
            bounds[Requirement(node.value).name] = Requirement(node.value).specifier
    return bounds


def test_setup_allows_the_tested_versions_and_no_other_deepspeed():
    bounds, tested = bounds_of_setup(), private_names.TESTED
    assert bounds["deepspeed"] == SpecifierSet(f"=={tested['deepspeed']}")
    for package in ("torch", "torchvision"):
        assert bounds[package] == SpecifierSet(f">={tested[package].removesuffix('.0')}")


def test_setup_and_the_backbones_refuse_the_same_timm():
    assert bounds_of_setup()["timm"] == SpecifierSet(f">={OLDEST}")


def test_the_image_carries_the_tested_torch():
    text = (PACKAGE.parent / "Dockerfile").read_text()
    named = re.findall(r"pytorch/pytorch:([\d.]+)-cuda\S+-devel", text)
    (checked,) = re.findall(r"assert torch\.__version__\S+ == '([\d.]+)'", text)
    assert [*named, checked] == [private_names.TESTED["torch"]] * 2
    assert text.count("torch:") == 1


# --- what is refused ---


@pytest.mark.parametrize(
    ("owner", "name", "new", "found"),
    [
        (private_names._ENGINE, "clip_fp32_gradients", None, "no such name"),
        (private_names._BF16, "clear_hp_grads", None, "no such name"),
        (private_names._BF16, "step", lambda self: None, "another source"),
        (private_names._INIT, "_aligned_size", len, "another source"),
        ("torch", "compile", lambda model, dynamic: model, "no isolate_recompiles"),
    ],
)
def test_the_start_is_refused(one_rank, monkeypatch, owner, name, new, found):
    package = owner.partition(".")[0]
    owner = resolve_name(owner)
    if new is None:
        monkeypatch.delattr(owner, name)
    else:
        monkeypatch.setattr(owner, name, new)
    with pytest.raises(VersionError, match=rf"{package} \d\.\S+: \S*{name} .*{found}") as refused:
        start.start()
    assert refused.value.exit_code == 2
    assert f"pip install '{package}=={private_names.TESTED[package]}'" in str(refused.value)


def test_the_build_is_refused_where_an_object_lacks_what_a_checkpoint_reads(
    make_engine, monkeypatch
):
    for config, names in private_names.ATTRIBUTES.items():
        monkeypatch.setitem(private_names.ATTRIBUTES, config, (*names, "renamed"))
    for config, kind in {
        "whole": "DeepSpeedEngine",
        "flat": "DeepSpeedEngine",
        "sharded": "DeepSpeedEngine",
    }.items():
        with pytest.raises(VersionError, match=f"{kind}[.]renamed .*no such name"):
            make_engine(config)


def test_a_name_that_is_not_there_is_not_replaced():
    engine = SimpleNamespace()
    with pytest.raises(VersionError, match=r"SimpleNamespace\.clip_fp32_gradients"):
        private_names.replace(engine, "clip_fp32_gradients", None)
    assert not vars(engine)


def test_an_optimiser_that_is_not_the_given_one_is_refused():
    given = torch.optim.AdamW([torch.zeros(1)])
    copied = SimpleNamespace(optimizer=torch.optim.AdamW([torch.zeros(1)]))
    with pytest.raises(VersionError, match="the optimiser"):
        private_names.check_engine(SimpleNamespace(optimizer=copied), given, "SimpleNamespace")
