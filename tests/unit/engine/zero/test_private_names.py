"""Private names of DeepSpeed: all are listed here, with the source of what decides numbers."""

from __future__ import annotations

import ast
import faulthandler
import hashlib
import inspect
import logging
import os
import re
import textwrap
import tomllib
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

# --- what is used of DeepSpeed 0.19.8: to go to another release, see docs/development.md ---

_ENGINE = "deepspeed.runtime.engine:DeepSpeedEngine"
_BF16 = "deepspeed.runtime.bf16_optimizer:BF16_Optimizer"
_STAGE_1_2 = "deepspeed.runtime.zero.stage_1_and_2:DeepSpeedZeroOptimizer"
_STAGE_3 = "deepspeed.runtime.zero.stage3:DeepSpeedZeroOptimizer_Stage3"
_PARTITION = "deepspeed.runtime.zero.partition_parameters"
_INIT = f"{_PARTITION}:Init"
_OFFLOAD = "deepspeed.runtime.zero.parameter_offload:DeepSpeedZeRoOffload"
_COORDINATOR = "deepspeed.runtime.zero.partitioned_param_coordinator"
_GATHERS = f"{_COORDINATOR}:PartitionedParameterCoordinator"
_FRAGMENT = "deepspeed.utils.tensor_fragment"

# Module:name -> a hash of its source where that decides numbers, or only that it is there.
PRESENT = ""
NAMES = {
    # Replaced, and what calls them. In another order, gradients are reduced or clipped twice or
    # never, or sums are not zeroed, and nothing fails.
    f"{_ENGINE}.allreduce_gradients": "7d509677",
    f"{_ENGINE}.buffered_allreduce_fallback": "1d99feb2",
    f"{_ENGINE}.clip_fp32_gradients": "0d8dded6",
    f"{_ENGINE}._take_model_step": "109c429a",
    _BF16: PRESENT,
    f"{_BF16}.step": "02bcd885",
    f"{_BF16}.accumulate_hp_grads_and_remove_lp": "49105a01",
    f"{_BF16}.update_hp_grads": "4374d605",
    f"{_BF16}._update_hp_grad": "c5c5fce0",
    f"{_BF16}.get_grads_for_norm": "57a091b5",
    f"{_BF16}.clear_hp_grads": "9b33851c",
    _STAGE_1_2: PRESENT,
    f"{_STAGE_1_2}.create_gradient_handling_hooks": "f61e99c3",
    f"{_STAGE_1_2}.process_gradients": "fdf13974",
    f"{_STAGE_1_2}.reduce_gradients": "76fe1d59",
    f"{_STAGE_1_2}.overlapping_partition_gradients_reduce_epilogue": "9f0b89f0",
    f"{_STAGE_1_2}.scaled_global_norm": "13a298f4",
    f"{_STAGE_1_2}._get_preflattened_grad_partition": "64b598b7",
    # A master may be the parameters' memory, and they stay views of their group.
    f"{_STAGE_1_2}._link_all_hp_params": "b341878d",
    f"{_STAGE_1_2}._update_model_bit16_weights": "a6ccee23",
    # What steps the inner optimiser, before which the gate stands.
    f"{_STAGE_1_2}.step": "7d7aeb50",
    f"{_STAGE_1_2}._optimizer_step": "d0ebca57",
    f"{_STAGE_3}.step": "4b86a344",
    # What says whether a norm is finite, in each of these, and what else reads it.
    "deepspeed.runtime.utils:is_invalid_grad_norm": "1e895362",
    "deepspeed.runtime.zero.stage3:is_invalid_grad_norm": PRESENT,
    "deepspeed.runtime.zero.stage_1_and_2:is_invalid_grad_norm": PRESENT,
    "deepspeed.runtime.bf16_optimizer:is_invalid_grad_norm": PRESENT,
    "deepspeed.runtime.utils:clip_tensors_by_global_norm": "7f8bb4d5",
    "deepspeed.runtime.bf16_optimizer:clip_tensors_by_global_norm": PRESENT,
    f"{_STAGE_1_2}.check_overflow": "c8766884",
    f"{_STAGE_1_2}.unscale_and_clip_grads": "d9993978",
    f"{_STAGE_3}._optimizer_step": "ec705a8f",
    # Which elements a rank holds, and where. In another order, a checkpoint is wrong.
    f"{_BF16}._setup_for_real_optimizer": "5e4823a6",
    f"{_STAGE_1_2}.__init__": "ec3ada37",
    f"{_STAGE_3}._create_fp16_partitions_with_defragmentation": "aa1f2f54",
    f"{_STAGE_3}._create_fp32_partitions": "140bb9ee",
    f"{_STAGE_3}.get_param_id": "f150bd82",
    f"{_STAGE_3}.set_grad_positions": "31696c4c",
    # Replaced by what keeps state on a disk, and what it does in their place.
    _STAGE_3: PRESENT,
    f"{_STAGE_3}._setup_for_real_optimizer": "69af0b5e",
    f"{_STAGE_3}._create_param_groups_fp16_flat_cpu_memory": "3ec7ff9c",
    f"{_STAGE_3}.initialize_optimizer_states": "5e6faebb",
    f"{_STAGE_3}.partition_grads": "d24e062f",
    f"{_STAGE_3}._offload_grad_partition_at_boundary": "d69c2d3e",
    f"{_INIT}._convert_to_deepspeed_param": "96cea0ce",
    f"{_INIT}._post_init_method": "4d7dddb5",
    f"{_INIT}._aligned_size": "9b394cc8",
    f"{_INIT}._partition": "162ecf63",
    f"{_INIT}._partition_param": "5022e7a4",
    f"{_INIT}._partition_param_sec": "992789bf",
    f"{_FRAGMENT}:get_hp_fragment_mapping": "c287fa1e",
    f"{_FRAGMENT}:fragment_address": "b8a30aaf",
    f"{_FRAGMENT}:tensor_fragment.get_hp_fragment": "613026fe",
    # These copy masters to the parameters that forward uses.
    f"{_FRAGMENT}:safe_set_local_fp32_param": "a7475bb8",
    f"{_BF16}.update_lp_params": "cba7e99a",
    f"{_STAGE_1_2}.update_lp_params": "a1b71e50",
    f"{_STAGE_3}._reassign_or_swap_out_partitioned_parameters": "940a4e40",
    f"{_STAGE_3}._partition_all_parameters": "2c6c615b",
    f"{_STAGE_3}.invalidate_secondary_tensor": "3dff70b1",
    # The collectives over gloo are replaced by name.
    "deepspeed.comm:comm": PRESENT,
    "deepspeed.comm.comm:cdb": PRESENT,
    "deepspeed.comm.torch:TorchBackend.all_gather_into_tensor": PRESENT,
    "deepspeed.comm.torch:TorchBackend.reduce": PRESENT,
    "deepspeed.comm.torch:TorchBackend.reduce_scatter_tensor": PRESENT,
    # Replaced by what asks Python for less, and knows whole blocks.
    "deepspeed.utils:nvtx": PRESENT,
    "deepspeed.utils.nvtx:enable_nvtx": PRESENT,
    _PARTITION: PRESENT,
    f"{_PARTITION}:print_rank_0": "c5013022",
    _COORDINATOR: PRESENT,
    f"{_COORDINATOR}:print_rank_0": PRESENT,
    f"{_COORDINATOR}:iter_params": "fbe84190",
    f"{_COORDINATOR}:get_all_parameters": "8ff9f67e",
    # These outlive an engine.
    "deepspeed.runtime.zero.parameter_offload:FWD_MODULE_STACK": PRESENT,
    f"{_OFFLOAD}.get_param_coordinator": PRESENT,
    _GATHERS: PRESENT,
    # What waits for gathers, and what gathers: in another order an event is waited for too late.
    f"{_GATHERS}._fetch_sub_module_impl": "6c85754d",
    f"{_GATHERS}._PartitionedParameterCoordinator__all_gather_params_": "fd3bd762",
    "deepspeed.utils:groups": PRESENT,
    "deepspeed.utils.groups:_ZERO_PARAM_INTRA_PARALLEL_GROUP": PRESENT,
    "deepspeed.utils.groups:_WORLD_GROUP": PRESENT,
    # Compiled operations. The first is made by compilers' answers when it is asked for.
    "deepspeed.ops:__compatible_ops__": PRESENT,
    "deepspeed.git_version_info:installed_ops": PRESENT,
    "deepspeed.ops.op_builder:FusedAdamBuilder": PRESENT,
    "deepspeed.ops.op_builder:CPUAdamBuilder": PRESENT,
    "deepspeed.ops.op_builder:AsyncIOBuilder": PRESENT,
    "deepspeed.ops.op_builder:QuantizerBuilder": PRESENT,
    # Its checkpoints hold objects of these classes.
    "deepspeed.runtime.fp16.loss_scaler:LossScaler": PRESENT,
    "deepspeed.runtime.fp16.loss_scaler:DynamicLossScaler": PRESENT,
    "deepspeed.runtime.zero.config:ZeroStageEnum": PRESENT,
}

# Attributes that are read, by the class of their object or by how ZeRO holds the parameter.
ATTRIBUTES = {
    "DeepSpeedEngine": ("communication_data_type", "global_steps", "skipped_steps"),
    "BF16_Optimizer": (
        "bf16_groups",
        "fp32_groups_flat_partition",
        "fp32_groups_gradient_flat_partition",
        "fp32_groups_gradients",
        "fp32_groups_gradients_flat",
        "fp32_groups_has_gradients",
    ),
    "DeepSpeedZeroOptimizer": (
        "_global_grad_norm",
        "averaged_gradients",
        "bit16_groups",
        "bit16_groups_flat",
        "cpu_offload",
        "parallel_partitioned_bit16_groups",
        "partition_size",
        "single_partition_of_fp32_groups",
    ),
    "DeepSpeedZeroOptimizer_Stage3": (
        "_global_grad_norm",
        "contiguous_gradients",
        "fp16_groups",
        "fp16_partitioned_groups_flat_numel",
        "fp32_partitioned_groups_flat",
        "grad_partitions_flat_buffer",
        "parameter_offload",
        "param_groups_fp16_flat_cpu_memory",
        "trainable_param_groups",
        "grad_position",
        "persistent_parameters",
        "ipg_buckets",
        "reduce_bucket_size",
        "_DeepSpeedZeroOptimizer_Stage3__param_id_to_grad_partition",
    ),
    "offloaded optimizer of stage 3": ("subgroup_to_device",),
    "DeepSpeedZeRoOffload": ("backward_hooks", "forward_hooks"),
    "PartitionedParameterCoordinator": ("_PartitionedParameterCoordinator__allgather_stream",),
    "flattened parameter": ("_hp_mapping",),
    "zero.Init": ("num_ranks_in_param_group", "pin_memory", "rank_in_group", "remote_device"),
    "sharded parameter": (
        "ds_id",
        "ds_numel",
        "ds_persist",
        "ds_process_group",
        "ds_secondary_tensor",
        "ds_shape",
        "ds_tensor",
    ),
    "tensor_fragment": ("hp_fragment_address", "lp_fragment_address", "param_group_index"),
}

LISTED = {
    *(path.replace(":", ".").rpartition(".")[2] for path in [*NAMES, *private_names.PARAMETERS]),
    *(name for names in ATTRIBUTES.values() for name in names),
}

# DeepSpeed's documented interface, as far as it is used.
PUBLIC = {
    *("deepspeed.initialize", "deepspeed.init_distributed", "deepspeed.zero.Init"),
    "deepspeed.accelerator.get_accelerator",
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
    # so is what an optimiser on a disk is set up with, and hpZ's copy.
    new = {"_global_grad_norm", "grad_partitions_flat_buffer", "subgroup_to_device"}
    new.add("ds_secondary_tensor")
    assert set().union(*map(assigned, files().values())) == new


def test_an_assignment_is_seen():
    assert assigned(ast.parse("engine.clip_fp32_gradients = None")) == {"clip_fp32_gradients"}


def test_what_is_listed_is_used_or_decides_what_is_used():
    used = set().union(*(written(tree) for path, tree in files().items() if path != TABLES))
    assert set().union(*ATTRIBUTES.values()) <= used
    # A hash may be of what calls, or is called by, what is used.
    for path in [*(path for path, known in NAMES.items() if not known), *private_names.PARAMETERS]:
        assert re.split("[.:]", path)[-1].removesuffix("Builder") in used, path


def bounds_of_package() -> dict[str, SpecifierSet]:
    project = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text())["project"]
    return {r.name: r.specifier for r in map(Requirement, project["dependencies"])}


def test_the_package_allows_the_tested_versions_and_no_other_deepspeed():
    bounds, tested = bounds_of_package(), private_names.TESTED
    assert bounds["deepspeed"] == SpecifierSet(f"=={tested['deepspeed']}")
    for package in ("torch", "torchvision"):
        assert bounds[package] == SpecifierSet(f">={tested[package].removesuffix('.0')}")


def test_the_package_and_the_backbones_refuse_the_same_timm():
    assert bounds_of_package()["timm"] == SpecifierSet(f">={OLDEST}")


def test_the_image_carries_the_tested_torch():
    text = (PACKAGE.parent / "Dockerfile").read_text()
    named = re.findall(r"pytorch/pytorch:([\d.]+)-cuda\S+-devel", text)
    (checked,) = re.findall(r"assert torch\.__version__\S+ == '([\d.]+)'", text)
    assert [*named, checked] == [private_names.TESTED["torch"]] * 2
    assert text.count("torch:") == 1


def test_the_lock_and_the_page_have_the_tested_versions():
    torch_and_vision = private_names.TESTED["torch"], private_names.TESTED["torchvision"]
    lock = (PACKAGE.parent / "requirements/torch.txt").read_text()
    assert re.findall(r"==(\S+)", lock) == [*torch_and_vision]
    page = (PACKAGE.parent / "docs/install.md").read_text()
    assert f"| {' | '.join(torch_and_vision)} | {OLDEST} |" in page


# --- what the tested DeepSpeed is ---


def source_hash(found, path: str) -> str:
    """Hashes the source of a function, or of the one inside a wrapper that hides it."""
    name = path.replace(":", ".").rpartition(".")[2]
    found = inspect.unwrap(found)
    if not name.endswith(found.__name__):  # A name that begins with __ has its class in front.
        inside = (cell.cell_contents for cell in getattr(found, "__closure__", None) or ())
        found = next(one for one in inside if getattr(one, "__name__", "") == name)
    source = textwrap.dedent(inspect.getsource(found))
    return hashlib.blake2b(source.encode(), digest_size=4).hexdigest()


@pytest.mark.parametrize("path", NAMES)
def test_a_name_is_there_with_the_source_that_was_read(one_rank, path):
    found = resolve_name(path)
    if NAMES[path]:
        assert source_hash(found, path) == NAMES[path]


@pytest.mark.parametrize("config", ["whole", "flat", "sharded", "disk"])
def test_an_engine_has_the_attributes_that_are_read(make_engine, config):
    engine = make_engine(config).deepspeed
    optimizer = engine.optimizer
    objects = {type(engine).__name__: engine, type(optimizer).__name__: optimizer}
    parameters = list(engine.module.parameters())
    if config in ("sharded", "disk"):
        objects["sharded parameter"] = parameters[0]
        coordinator = optimizer.parameter_offload.get_param_coordinator()
        objects[type(coordinator).__name__] = coordinator
        objects["DeepSpeedZeRoOffload"] = optimizer.parameter_offload
        if optimizer.offload_optimizer:
            objects["offloaded optimizer of stage 3"] = optimizer
    elif config == "flat":
        objects["flattened parameter"] = parameters[0]
        mappings = [getattr(parameter, "_hp_mapping", None) for parameter in parameters]
        objects |= {type(one).__name__: one for one in mappings if one is not None}
    for kind, owner in objects.items():
        assert [name for name in ATTRIBUTES.get(kind, ()) if not hasattr(owner, name)] == []


# --- what is refused ---


def test_another_release_of_deepspeed_ends_the_start(one_rank, monkeypatch):
    monkeypatch.setattr(private_names, "version", lambda package: "0.19.9")
    with pytest.raises(VersionError, match=r"deepspeed 0\.19\.9: .*0\.19\.8") as refused:
        start.start()
    assert refused.value.exit_code == 2
    # The tested release, built at home.
    monkeypatch.setattr(private_names, "version", lambda package: "0.19.8+abc123")
    start.start()


@pytest.mark.parametrize(
    ("new", "found"),
    [(None, "no such name"), (lambda model, dynamic: model, "isolate_recompiles")],
)
def test_another_torch_ends_the_start(one_rank, monkeypatch, new, found):
    if new is None:
        monkeypatch.delattr(torch, "compile")
    else:
        monkeypatch.setattr(torch, "compile", new)
    with pytest.raises(VersionError, match=rf"torch \d\.\S+: \S*compile .*{found}") as refused:
        start.start()
    assert refused.value.exit_code == 2
    assert f"pip install 'torch=={private_names.TESTED['torch']}'" in str(refused.value)


def test_a_part_of_torchvision_is_looked_at_when_it_is_taken(monkeypatch):
    path = f"{private_names._BOXES}:BoxCoder"
    monkeypatch.setattr(resolve_name(path), "encode_single", lambda self, boxes: boxes)
    with pytest.raises(VersionError, match=r"torchvision .*BoxCoder\.encode_single"):
        private_names.get(path)


def test_a_name_that_is_not_there_is_not_replaced():
    engine = SimpleNamespace()
    with pytest.raises(VersionError, match=r"SimpleNamespace\.clip_fp32_gradients"):
        private_names.replace(engine, "clip_fp32_gradients", None)
    assert not vars(engine)


def test_an_optimiser_that_is_not_the_given_one_is_refused():
    given = torch.optim.AdamW([torch.zeros(1)])
    copied = SimpleNamespace(optimizer=torch.optim.AdamW([torch.zeros(1)]))
    with pytest.raises(VersionError, match="the optimiser"):
        private_names.check_optimizer(copied, given, "SimpleNamespace")
