"""The private names of DeepSpeed, torch and torchvision that this package reads or replaces.

A private name may go, or come to mean another thing, with any release. The tables below hold all of
them, and each is held against the installed packages before anything is trained: a name that is
missing, or that is another thing than in the tested version, ends the start with one sentence.

Code takes a private class, function or global by `get`, and replaces a method or a value by
`replace`. Attributes of DeepSpeed's objects are read where they are needed: `check_engine` has
looked for them in the engine that was built. A test holds that the code touches no other private
name of DeepSpeed.
"""

from __future__ import annotations

import hashlib
import inspect
import textwrap
from functools import cache
from importlib.metadata import version
from pkgutil import resolve_name
from typing import Any

from fd_large.errors import VersionError

TESTED = {"deepspeed": "0.19.8", "torch": "2.13.0", "torchvision": "0.28.0"}
"""The versions that the tables were written against."""

_ENGINE = "deepspeed.runtime.engine:DeepSpeedEngine"
_BF16 = "deepspeed.runtime.bf16_optimizer:BF16_Optimizer"
_STAGE_1_2 = "deepspeed.runtime.zero.stage_1_and_2:DeepSpeedZeroOptimizer"
_STAGE_3 = "deepspeed.runtime.zero.stage3:DeepSpeedZeroOptimizer_Stage3"
_INIT = "deepspeed.runtime.zero.partition_parameters:Init"
_COORDINATOR = "deepspeed.runtime.zero.partitioned_param_coordinator"
_FRAGMENT = "deepspeed.utils.tensor_fragment"
_BOXES = "torchvision.models.detection._utils"
_ANCHORS = "torchvision.models.detection.anchor_utils:AnchorGenerator"

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
    # What steps the inner optimiser, before which the gate stands.
    f"{_STAGE_1_2}.step": "7d7aeb50",
    f"{_STAGE_1_2}._optimizer_step": "d0ebca57",
    f"{_STAGE_3}.step": "4b86a344",
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
    "deepspeed.comm.torch:TorchBackend.reduce_scatter_tensor": PRESENT,
    # These outlive an engine.
    "deepspeed.runtime.zero.parameter_offload:FWD_MODULE_STACK": PRESENT,
    f"{_COORDINATOR}:PartitionedParameterCoordinator": PRESENT,
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
    # torch 2.13 and later have this name.
    "torch:compile": "(recompile_limit, isolate_recompiles)",
    # The inner optimiser's own step, which the gate replaces.
    "torch.optim.optimizer:Optimizer.step": "(self, closure)",
    # The heads of detection are made of these.
    f"{_BOXES}:BoxCoder": "(weights, bbox_xform_clip)",
    f"{_BOXES}:BoxCoder.encode_single": "(self, reference_boxes, proposals)",
    f"{_BOXES}:BoxCoder.decode_single": "(self, rel_codes, boxes)",
    f"{_BOXES}:Matcher": "(high_threshold, low_threshold, allow_low_quality_matches)",
    _ANCHORS: "(sizes, aspect_ratios)",
    f"{_ANCHORS}.grid_anchors": "(self, grid_sizes, strides)",
    "torchvision.ops.poolers:LevelMapper": "(k_min, k_max, canonical_scale, canonical_level, eps)",
}
"""Module:name -> what is known of it: a hash of its source, parameters, or only that it is there.

DeepSpeed is pinned to one release, so that the source of what decides numbers can be held. torch
and torchvision may be newer, and have to have the parameters that are used.
"""

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
        "param_groups_fp16_flat_cpu_memory",
        "trainable_param_groups",
        "grad_position",
        "persistent_parameters",
        "ipg_buckets",
        "reduce_bucket_size",
        "_DeepSpeedZeroOptimizer_Stage3__param_id_to_grad_partition",
    ),
    "offloaded optimizer of stage 3": ("subgroup_to_device",),
    "flattened parameter": ("_hp_mapping",),
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
"""Attributes that are read, by the class of their object or by how ZeRO holds the parameter."""

_NOT_AT_START = ("deepspeed.ops:", "torchvision.")
_LISTED = {path.replace(":", ".").rpartition(".")[2] for path in NAMES}.union(*ATTRIBUTES.values())


def check() -> None:
    """Looks at every name that training needs; detection's are looked at when `get` takes them.

    Raises: VersionError: for the first that is not as in the tested version.
    """
    for path in NAMES:
        if not path.startswith(_NOT_AT_START):
            _checked(path)


def get(path: str) -> Any:
    """Returns a private class, function or global.

    Args:
        path: A key of `NAMES`; what is listed as a part of it is looked at too.

    Raises: VersionError: if it is not as in the tested version.
    """
    for part in NAMES:
        if part.startswith(f"{path}."):
            _checked(part)
    return _checked(path)


def replace(owner: Any, name: str, new: Any) -> Any:
    """Puts another method or value in the place of one that is there, and returns the old one.

    Args:
        owner: An engine, an optimiser, a backend or a module.
        name: A listed name.
        new: What takes its place.

    Raises: VersionError: if the owner has no such name.
    """
    assert name in _LISTED, f"{name} is not listed"
    old = _attribute(owner, name)
    setattr(owner, name, new)
    return old


def check_engine(engine: Any, inner: Any, optimizer_class: str | None) -> None:
    """Looks at the attributes of a built engine, its optimiser and its parameters.

    Args:
        engine: DeepSpeed's engine, before its first forward.
        inner: The optimiser that it was given, which must be the one that steps.
        optimizer_class: Name of the class that DeepSpeed wraps it in; None: it is not wrapped.

    Raises: VersionError: for the first attribute that is missing, or for another optimiser.
    """
    optimizer = engine.optimizer
    steps = optimizer if optimizer_class is None else getattr(optimizer, "optimizer", None)
    if steps is not inner or optimizer_class not in (None, type(optimizer).__name__):
        given = type(inner).__name__
        raise _refused(
            f"the optimiser {optimizer_class or 'itself'} of {given}",
            f"{type(optimizer).__name__} of {type(steps).__name__}",
            "deepspeed",
        )
    parameter = next(engine.module.parameters())
    objects = {type(engine).__name__: engine, type(optimizer).__name__: optimizer}
    if optimizer_class == _STAGE_3.partition(":")[2]:
        objects["sharded parameter"] = parameter
        if optimizer.offload_optimizer:
            objects["offloaded optimizer of stage 3"] = optimizer
    elif optimizer_class:
        objects["flattened parameter"] = parameter
        for one in engine.module.parameters():
            if (mapping := getattr(one, "_hp_mapping", None)) is not None:
                objects[type(mapping).__name__] = mapping
    for kind, owner in objects.items():
        for name in ATTRIBUTES.get(kind, ()):
            _attribute(owner, name)


def _attribute(owner: Any, name: str) -> Any:
    try:
        return getattr(owner, name)
    except AttributeError:
        kind = owner.__name__ if inspect.ismodule(owner) else type(owner).__name__
        raise _refused(f"{kind}.{name}", "no such name", "deepspeed") from None


def _checked(path: str) -> Any:
    try:
        found = resolve_name(path)
    except (ImportError, AttributeError):
        raise _refused(path, "no such name") from None
    known = NAMES[path]
    if known.startswith("("):
        lacks = set(known[1:-1].split(", ")) - {*inspect.signature(found).parameters, ""}
        if lacks:
            raise _refused(path, f"parameters with no {', '.join(sorted(lacks))}")
    elif known and (now := _source_hash(found, path)) != known:
        raise _refused(path, f"another source (hash {now} instead of {known})")
    return found


def _refused(path: str, found: str, package: str = "") -> VersionError:
    package = package or path.partition(":")[0].partition(".")[0]
    tested = TESTED[package]
    return VersionError(
        f"{package} {version(package)}: {path.rpartition(':')[2]} is not what this package works "
        f"with; got {found}, expected that of {package} {tested}. "
        f"pip install '{package}=={tested}'."
    )


@cache
def _source_hash(found: Any, path: str) -> str:
    """Hashes the source of a function, or of the one inside a wrapper that hides it."""
    name = path.replace(":", ".").rpartition(".")[2]
    found = inspect.unwrap(found)
    if found.__name__ != name:
        inside = (cell.cell_contents for cell in getattr(found, "__closure__", None) or ())
        found = next((one for one in inside if getattr(one, "__name__", "") == name), found)
    try:
        source = textwrap.dedent(inspect.getsource(found))
    except (OSError, TypeError):
        return "unknown"
    return hashlib.blake2b(source.encode(), digest_size=4).hexdigest()
