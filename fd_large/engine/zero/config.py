"""Reads the DeepSpeed JSON, checks it at every level against closed lists, and fills it.

The JSON owns ZeRO stage, buckets, offload, hpZ and communication; the recipe owns batch, learning
rates, clipping and precision. A number that JSON and recipe could name is "auto" in the JSON.
DeepSpeed never gets an "auto" (it takes `bf16.enabled: "auto"` for float32), an unknown key (at the
top level it ignores unknown keys), or a setting that its stage would ignore.

Mistakes in the JSON alone are found when it is read, without torch, together with mistakes in the
flags. `check_owned` then checks the JSON against the recipe, and `fill` against ranks and model.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from fd_large import shipped
from fd_large.errors import ConfigError, check_all, nearest
from fd_large.files import parse_json, read_json
from fd_large.plan.buckets import gradient_bucket, prefetch_bucket
from fd_large.plan.memory import persistence_threshold, sums_in_float32

AUTO = "auto"
MICRO_BATCH, ACCUMULATION = "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"
EIGHT_BIT_GROUP = 8
"""The number of elements of a shard that DeepSpeed 0.19.8 quantises must be a multiple of this."""

Kind = tuple[str, Callable[[Any], bool]]


def _is_int(least: int) -> Callable[[Any], bool]:
    return lambda value: type(value) is int and value >= least


# What a value may be, in words and as a check; unlike in Python, a bool is not an int here.
_BOOL: Kind = ("true or false", lambda value: type(value) is bool)
_COUNT: Kind = ("a whole number of 0 or more", _is_int(0))
_POSITIVE: Kind = ("a whole number of 1 or more", _is_int(1))
_NUMBER: Kind = (
    "a number of 0 or more",
    lambda value: type(value) in (int, float) and value >= 0,
)
_DTYPE: Kind = ('"bf16" or "fp32"', lambda value: value in ("bf16", "fp32"))
_DEVICE: Kind = ('"cpu", "nvme" or "none"', lambda value: value in ("cpu", "nvme", "none"))
_TEXT: Kind = ("a text", lambda value: isinstance(value, str))
_STAGE: Kind = ("0, 1, 2 or 3", lambda value: type(value) is int and 0 <= value <= 3)
_LIST: Kind = ("a list of names", lambda value: isinstance(value, list))
_OBJECT: Kind = ("an object", lambda value: isinstance(value, dict))

# The closed lists. A key of DeepSpeed that is not here belongs to the recipe, has no effect on this
# engine, or would put shards in another order than checkpoints have (round_robin_gradients), and is
# refused. `overlap_comm`, `contiguous_gradients` and `reduce_scatter` take effect at stage 3, and
# at stages 1 and 2 where the optimiser is offloaded.
_OFFLOAD = {"device": _DEVICE, "pin_memory": _BOOL, "buffer_count": _COUNT}
_OFFLOAD_OPTIMIZER = {**_OFFLOAD, "nvme_path": _TEXT}
_OFFLOAD_PARAM = {**_OFFLOAD, "buffer_size": _COUNT, "max_in_cpu": _COUNT}
_OFFLOADS = {"offload_optimizer": _OFFLOAD_OPTIMIZER, "offload_param": _OFFLOAD_PARAM}
_STAGE3_KEYS = {
    "stage3_prefetch_bucket_size": _COUNT,
    "stage3_param_persistence_threshold": _COUNT,
    "stage3_model_persistence_threshold": _COUNT,
    "stage3_max_live_parameters": _COUNT,
    "stage3_max_reuse_distance": _COUNT,
    "stage3_module_granularity_threshold": _COUNT,
    "sub_group_size": _POSITIVE,
    "zero_hpz_partition_size": _POSITIVE,
    "zero_quantized_weights": _BOOL,
    "zero_quantized_gradients": _BOOL,
    "offload_param": _OBJECT,
}
_STAGE12_KEYS = {
    "allgather_partitions": _BOOL,
    "allgather_bucket_size": _COUNT,
}
_ANY_STAGE_KEYS = {
    "stage": _STAGE,
    "contiguous_gradients": _BOOL,
    "reduce_scatter": _BOOL,
    "reduce_bucket_size": _POSITIVE,
    "overlap_comm": _BOOL,
    "offload_optimizer": _OBJECT,
}
_BLOCKS: dict[str, dict[str, Kind]] = {
    "bf16": {"enabled": _BOOL},
    "data_types": {"grad_accum_dtype": _DTYPE},
    "zero_optimization": {**_ANY_STAGE_KEYS, **_STAGE12_KEYS, **_STAGE3_KEYS},
    "comms_logger": {
        "enabled": _BOOL,
        "verbose": _BOOL,
        "prof_all": _BOOL,
        "prof_ops": _LIST,
        "debug": _BOOL,
    },
}
_TOP: dict[str, Kind] = {
    "train_batch_size": _POSITIVE,
    "train_micro_batch_size_per_gpu": _POSITIVE,
    "gradient_accumulation_steps": _POSITIVE,
    "gradient_clipping": _NUMBER,
    "communication_data_type": _DTYPE,
    "steps_per_print": _POSITIVE,
    "wall_clock_breakdown": _BOOL,
    "memory_breakdown": _BOOL,
    "zero_allow_untested_optimizer": _BOOL,
    "zero_force_ds_cpu_optimizer": _BOOL,
    "activation_checkpointing": _OBJECT,
    **dict.fromkeys(_BLOCKS, _OBJECT),
}
# Keys whose value may be "auto", which `fill` replaces.
_FILLED = frozenset(
    {
        "train_batch_size",
        "train_micro_batch_size_per_gpu",
        "gradient_accumulation_steps",
        "gradient_clipping",
        "communication_data_type",
        "zero_allow_untested_optimizer",
        "zero_force_ds_cpu_optimizer",
        "bf16.enabled",
        "data_types.grad_accum_dtype",
        "zero_optimization.zero_hpz_partition_size",
        "zero_optimization.stage3_param_persistence_threshold",
        "zero_optimization.stage3_prefetch_bucket_size",
        "zero_optimization.reduce_bucket_size",
        "zero_optimization.offload_optimizer.nvme_path",
    }
)
_CHECKPOINTING = "--student.activation_checkpointing every (or offload)"
_OWNED_ELSEWHERE = {
    "optimizer": "The recipe owns the optimiser: set --optim.*",
    "scheduler": "The recipe owns the schedule: set --optim.*",
    "fp16": "Training is bfloat16 or float32: set --engine.precision",
    "torch_autocast": "Training is bfloat16 or float32: set --engine.precision",
    "amp": "Training is bfloat16 or float32: set --engine.precision",
    "compile": "Remove the key: DeepCompile needs DeepSpeed's own compiled operations for CUDA, "
    "and was never tested here; --engine.compile blocks compiles the student's blocks",
    "checkpoint": "Remove the key: the run folder decides how checkpoints are written",
    "elasticity": "Remove the key: the recipe's global batch holds for any number of ranks",
}


class RunNumbers(NamedTuple):
    """The numbers that recipe and machine fill into the JSON.

    Attributes:
        micro_batch_size: Images per rank and forward.
        accumulation: Micro batches per step.
        node_size: Number of ranks per node.
        clip_norm: Global L2 norm at which gradients are clipped.
        bfloat16: Whether parameters and matrix products are bfloat16.
        parameter_sizes: Number of elements of each tensor that may be sharded.
        nvme_path: Folder on a disk that holds the optimiser's state; "" if the state is in memory.
        trained_sizes: Number of elements of each trained tensor.
        is_probed: Whether a probe is to find the micro batch size, which is 1 until then.
    """

    micro_batch_size: int
    accumulation: int
    world_size: int
    node_size: int
    clip_norm: float
    bfloat16: bool
    parameter_sizes: tuple[int, ...]
    nvme_path: str = ""
    trained_sizes: tuple[int, ...] = ()
    is_probed: bool = False


def load(path: str | Path) -> dict[str, Any]:
    """Reads and checks a DeepSpeed JSON, and returns its content with "auto" values unchanged.

    `path` is a file, or the name of a JSON that this package brings.

    Raises: ConfigError: if the file is missing, is not JSON, repeats a key, or fails `check`.
    """
    path = shipped.deepspeed_config(str(path))

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = [key for key, _ in pairs]
        for key in keys:
            if keys.count(key) > 1:
                raise ConfigError(
                    f"{path}: {key} appears {keys.count(key)} times; expected once. "
                    "Remove the repetition."
                )
        return dict(pairs)

    remedy = "Correct the file, or name another."
    config = read_json(path, where="--deepspeed_config", remedy=remedy, object_pairs_hook=once)
    check(config, where=str(path))
    return config


def check(config: Any, *, where: str) -> None:
    """Checks a DeepSpeed JSON for mistakes that do not depend on recipe, model or ranks.

    Args:
        config: The JSON's content.
        where: Name of the JSON in messages.

    Raises:
        ConfigError: With a line for each unknown key and each invalid value. If there are none,
            with a line for each setting without effect at the JSON's stage.
    """
    wrong = list(_wrong_keys(config)) or list(_ignored(config))
    if wrong:
        raise ConfigError("\n".join(f"{where}: {line}" for line in wrong))


def _wrong_keys(config: Any) -> Iterator[str]:
    """Yields a line for each unknown key of a DeepSpeed JSON, and for each value of a wrong type.

    Numbers out of range, and "auto" for a key that a run does not fill, are wrong too.
    """
    if not isinstance(config, dict):
        yield f"the file is not an object; got {config!r}, expected {{...}}. Correct the file."
        return
    for key in (key for key in config if key in _OWNED_ELSEWHERE):
        yield (
            f"{key} must not be set in the JSON; got {config[key]!r}, expected no such key. "
            f"{_OWNED_ELSEWHERE[key]}."
        )
    known = {key: value for key, value in config.items() if key not in _OWNED_ELSEWHERE}
    yield from _wrong_in(known, _TOP, "")
    for block, keys in _BLOCKS.items():
        yield from _wrong_in(config.get(block, {}), keys, f"{block}.")
    zero = config.get("zero_optimization", {})
    for name, keys in _OFFLOADS.items():
        if isinstance(zero, dict):
            yield from _wrong_in(zero.get(name, {}), keys, f"zero_optimization.{name}.")


def _wrong_in(block: Any, keys: dict[str, Kind], prefix: str) -> Iterator[str]:
    # A block that is no object is reported by the check of the block that holds it.
    for key, value in block.items() if isinstance(block, dict) else ():
        name = f"{prefix}{key}"
        if key not in keys:
            yield f"{name}: no such key; {nearest(key, keys)}. Correct or remove it."
        elif value == AUTO and name not in _FILLED:
            remedy = "Give a value, or remove the key"
            if name == "activation_checkpointing":
                remedy = f"Remove the key, and set {_CHECKPOINTING}"
            yield (
                f'{name}: the run does not fill this "auto", and DeepSpeed would use the text as '
                f'a value; got "auto", expected {keys[key][0]}. {remedy}.'
            )
        elif value != AUTO and not keys[key][1](value):
            yield (
                f"{name}: invalid value; got {value!r}, expected {keys[key][0]}. Correct the value."
            )


def _ignored(config: dict[str, Any]) -> Iterator[str]:
    """Yields a line for each setting without effect, at the JSON's ZeRO stage or in all runs."""
    zero, stage = config.get("zero_optimization", {}), stage_of(config)
    silent = {1: _STAGE3_KEYS, 2: _STAGE3_KEYS, 3: _STAGE12_KEYS}.get(
        stage, _BLOCKS["zero_optimization"].keys() - {"stage"}
    )
    for key in (key for key in zero if key in silent):
        yield (
            f"zero_optimization.{key}: DeepSpeed ignores it at stage {stage}; got "
            f"{zero[key]!r}, expected no such key. Remove the key, or change the stage."
        )
    block = config.get("activation_checkpointing", {})
    if settings := sorted(key for key, value in block.items() if value not in (False, None)):
        yield (
            "activation_checkpointing: DeepSpeed reads this block only in its own wrapper, which "
            f"this engine does not use; got {', '.join(settings)}, expected no settings there. "
            f"Set {_CHECKPOINTING}."
        )
    heard = {key: value for key, value in zero.items() if key not in silent}
    block, weights = heard.get("offload_optimizer", {}), heard.get("offload_param", {})
    blocks = {"zero_optimization.offload_optimizer": (block, {"device", "nvme_path"})}
    if weights.get("device") == "nvme":
        blocks["zero_optimization.offload_param"] = weights, {"device"}
    if block.get("device") != "nvme":
        if weights.get("device") == "nvme":
            yield (
                "zero_optimization.offload_param.device: weights can be on a disk only "
                "together with the optimiser's state; got nvme, and "
                f"{block.get('device', 'none')!r} for offload_optimizer.device, "
                "expected nvme for both. Use ds_configs/zero3_nvme.json "
                'with "offload_param": {"device": "nvme"}.'
            )
        elif "nvme_path" in block:
            yield (
                "zero_optimization.offload_optimizer.nvme_path: the optimiser's state is in "
                f"memory; got {block['nvme_path']!r}, expected no folder. Use "
                "ds_configs/zero3_nvme.json, or leave the folder out."
            )
    elif stage != 3:
        yield (
            "zero_optimization.offload_optimizer.device: only stage 3 can keep its state on a "
            f"disk; got nvme at stage {stage}, expected stage 3. Use ds_configs/zero3_nvme.json."
        )
    else:
        for place, (keys, known) in blocks.items():
            for other in sorted(keys.keys() - known):
                yield (
                    f"{place}.{other}: files are mapped into memory, not copied through buffers; "
                    f"got {keys[other]!r}, expected no such key. Remove the key."
                )


def stage_of(config: dict[str, Any]) -> int:
    """Returns the ZeRO stage in a DeepSpeed JSON, 0 to 3; 0 if the JSON names none."""
    return config.get("zero_optimization", {}).get("stage", 0)


def optimizer_class(config: dict[str, Any]) -> str | None:
    """Returns the name of the class in which DeepSpeed wraps the optimiser; None at stage 0.

    `config` is a filled DeepSpeed JSON.
    """
    if config["bf16"].get("immediate_grad_update"):
        return "BF16_Optimizer"
    split = "DeepSpeedZeroOptimizer"
    return {0: None, 1: split, 2: split, 3: f"{split}_Stage3"}[stage_of(config)]


def offloads(config: dict[str, Any], block_name: str) -> bool:
    """Returns whether a DeepSpeed JSON offloads to host memory or to a disk.

    `block_name` is "offload_optimizer" for the optimiser's state, "offload_param" for the weights.
    """
    block = config.get("zero_optimization", {}).get(block_name, {})
    return block.get("device", "none") != "none"


def offloads_to_disk(config: dict[str, Any], block_name: str = "offload_optimizer") -> bool:
    """Returns whether a DeepSpeed JSON offloads to a disk; for `block_name` see `offloads`."""
    block = config.get("zero_optimization", {}).get(block_name, {})
    return block.get("device") == "nvme"


def nvme_path(config: dict[str, Any]) -> str:
    """Returns the JSON's folder on a disk for the optimiser's state; "" if it names none."""
    return config.get("zero_optimization", {}).get("offload_optimizer", {}).get("nvme_path", "")


def for_deepspeed(config: dict[str, Any]) -> dict[str, Any]:
    """Returns a copy of a filled JSON for DeepSpeed itself.

    In the copy, offload to a disk is replaced by offload to host memory. DeepSpeed's timers are
    turned off too, because they wait for the device around each micro batch.
    """
    in_memory = {"device": "cpu", "pin_memory": False}
    there = [name for name in _OFFLOADS if offloads_to_disk(config, name)]
    zero = {**config.get("zero_optimization", {}), **dict.fromkeys(there, in_memory)}
    clock = {"throughput": {"enabled": False}}
    return {**config, "timers": clock, "zero_optimization": zero}


def check_owned(
    config: dict[str, Any],
    *,
    clip_norm: float,
    global_batch_size: int,
    micro_batch_size: int | str,
    accumulation: int | str | None,
    bfloat16: bool | None,
    nvme_path: str,
) -> None:
    """Checks that the values in the JSON do not contradict the recipe.

    Args:
        config: Result of `load`.
        global_batch_size: Images of a step.
        clip_norm, nvme_path, micro_batch_size, accumulation, bfloat16: See `RunNumbers`. "auto"
            stands for a value that a probe is to find, and None for a value that is not known yet
            and not checked.

    Raises: ConfigError: with a line for each contradiction.
    """
    bf16, types = config.get("bf16", {}), config.get("data_types", {})
    batch, micro = "--batch.global_batch_size", "--batch.micro_batch_size"
    owned = [
        (config, MICRO_BATCH, micro_batch_size, micro, ""),
        (config, ACCUMULATION, accumulation, batch, ""),
        (config, "train_batch_size", global_batch_size, batch, ""),
        (config, "gradient_clipping", float(clip_norm), "--optim.clip_norm", ""),
        (bf16, "enabled", bfloat16, "--engine.precision", "bf16."),
    ]
    if bfloat16:
        # Gradients of micro batches are summed in float32 whatever the parameters are.
        why = "fixed: gradients are summed in float32"
        owned.append((types, "grad_accum_dtype", "fp32", why, "data_types."))
    check_all(
        partial(_check_stage_0, config, bfloat16=bfloat16),
        *(partial(_check_same, *row) for row in owned if row[2] is not None),
        partial(_check_disk, config, nvme_path),
    )


def fill(config: dict[str, Any], numbers: RunNumbers) -> dict[str, Any]:
    """Returns a copy of the JSON of `load` with a value for DeepSpeed in place of every "auto".

    Raises:
        ConfigError: If JSON and recipe name different values, or if a value does not fit the number
            of ranks.
    """
    size, accumulation = numbers.micro_batch_size, numbers.accumulation
    global_batch = size * accumulation * numbers.world_size
    check_owned(
        config,
        clip_norm=numbers.clip_norm,
        global_batch_size=global_batch,
        micro_batch_size=AUTO if numbers.is_probed else size,
        accumulation=AUTO if numbers.is_probed else accumulation,
        bfloat16=numbers.bfloat16,
        nvme_path=numbers.nvme_path,
    )
    filled = parse_json(json.dumps(config))
    stage = stage_of(filled)
    filled[MICRO_BATCH] = size
    filled[ACCUMULATION] = accumulation
    filled["train_batch_size"] = global_batch
    filled["gradient_clipping"] = float(numbers.clip_norm)
    bf16 = filled.setdefault("bf16", {})
    bf16["enabled"] = numbers.bfloat16
    filled.pop("data_types", None)
    if numbers.bfloat16:
        filled["data_types"] = {"grad_accum_dtype": "fp32"}
    # The block has no setting with an effect, or `check` would have refused it.
    filled.pop("activation_checkpointing", None)
    _fill_zero(filled, stage, numbers)
    _fill_sums(filled, numbers)
    if numbers.world_size == 1 and not numbers.bfloat16 and stage in (1, 2):
        if not offloads(filled, "offload_optimizer"):
            # On one rank there is nothing to split, and float32 parameters are their own masters.
            filled["zero_optimization"] = {"stage": 0}
    elif numbers.bfloat16 and stage == 1 and not offloads(filled, "offload_optimizer"):
        # Each gradient is added to its float32 sum and freed while backward goes on.
        bf16["immediate_grad_update"] = True
    # Torch's and apex's AdamW are "untested" to DeepSpeed, and so is our choice under offload.
    filled["zero_allow_untested_optimizer"] = True
    filled["zero_force_ds_cpu_optimizer"] = False
    filled.setdefault("steps_per_print", 10**9)
    return filled


def with_micro_batch(filled: dict[str, Any], size: int, accumulation: int) -> dict[str, Any]:
    """Returns a copy of a filled JSON with other batch sizes, for the same number of ranks.

    Args:
        filled: The filled JSON.
        size: The new micro batch size.
        accumulation: The new number of micro batches of a rank in a step.
    """
    world_size = filled["train_batch_size"] // (filled[MICRO_BATCH] * filled[ACCUMULATION])
    numbers = {MICRO_BATCH: size, ACCUMULATION: accumulation}
    return {**filled, **numbers, "train_batch_size": size * accumulation * world_size}


def _fill_zero(filled: dict[str, Any], stage: int, numbers: RunNumbers) -> None:
    zero = filled.setdefault("zero_optimization", {})
    zero.setdefault("stage", stage)
    if zero.get("zero_hpz_partition_size") == AUTO:
        # One node: its ranks hold the whole model between them already.
        fits = numbers.node_size < numbers.world_size
        zero["zero_hpz_partition_size"] = numbers.node_size if fits else 1
    if zero.get("stage3_param_persistence_threshold") == AUTO:
        zero["stage3_param_persistence_threshold"] = persistence_threshold(numbers.parameter_sizes)
    if offloads_to_disk(filled):
        zero["offload_optimizer"]["nvme_path"] = numbers.nvme_path
    by_size = {
        "reduce_bucket_size": gradient_bucket,
        "stage3_prefetch_bucket_size": prefetch_bucket,
    }
    for key, rule in by_size.items():
        if zero.get(key) == AUTO:
            zero[key] = rule(sum(numbers.trained_sizes))
    if zero.get("zero_quantized_gradients") and numbers.node_size >= numbers.world_size:
        raise ConfigError(
            "zero_optimization.zero_quantized_gradients: DeepSpeed quantises gradients between "
            f"nodes only; got one node of {numbers.world_size} ranks, expected several nodes. "
            "Remove the key."
        )
    if zero.get("zero_quantized_weights"):
        _check_groups(numbers)
    hpz = zero.get("zero_hpz_partition_size", 1)
    if numbers.world_size % hpz:
        raise ConfigError(
            f"zero_optimization.zero_hpz_partition_size: does not divide the ranks; got {hpz} for "
            f'{numbers.world_size} ranks, expected a divisor. Set the key to "auto".'
        )


def _check_stage_0(config: dict[str, Any], *, bfloat16: bool | None) -> None:
    if stage_of(config) == 0 and bfloat16:
        raise ConfigError(
            "zero_optimization.stage: stage 0 trains in float32 only (there DeepSpeed's bfloat16 "
            "has an error of 3.9e-2); got stage 0 and bfloat16, expected stage 1. Use "
            "ds_configs/zero1.json, or --engine.precision float32."
        )


def _check_disk(config: dict[str, Any], folder: str) -> None:
    """Raises ConfigError unless JSON and recipe agree on the folder for offload to a disk.

    They must name the same folder if the JSON offloads the optimiser's state to a disk. Otherwise
    the recipe must name none. `folder` is the recipe's `engine.nvme_path`.
    """
    if not offloads_to_disk(config):
        if folder:
            raise ConfigError(
                "engine.nvme_path: the DeepSpeed JSON keeps the optimiser's state in memory; got "
                f"{folder!r}, expected no folder. Use ds_configs/zero3_nvme.json, or leave the "
                "folder out."
            )
        return
    where = "zero_optimization.offload_optimizer"
    if (nvme_path(config) or AUTO) == AUTO and not folder:
        raise ConfigError(
            f"{where}.nvme_path: no folder is set; got none, expected a folder on a local disk "
            "with 16 bytes free per parameter (18 if the weights are there too), and 4 more with "
            "optim.ema_decay. Set --engine.nvme_path FOLDER."
        )
    block = config["zero_optimization"]["offload_optimizer"]
    _check_same(block, "nvme_path", folder, "--engine.nvme_path", f"{where}.")


def _check_groups(numbers: RunNumbers) -> None:
    """Checks that DeepSpeed can quantise the shards of all trained weights to 8 bits.

    DeepSpeed would fail an assertion if a shard is no multiple of EIGHT_BIT_GROUP elements.
    """
    ranks, of = numbers.world_size, EIGHT_BIT_GROUP
    odd = sorted({n for n in numbers.trained_sizes if -(-n // ranks) % of})
    if odd:
        raise ConfigError(
            f"zero_optimization.zero_quantized_weights: DeepSpeed groups shards by {of} elements; "
            f"got tensors of {', '.join(map(str, odd[:3]))}{' ...' if odd[3:] else ''} elements "
            f"over {ranks} ranks, expected shards of multiples of {of}. Remove the key."
        )


def _fill_sums(filled: dict[str, Any], numbers: RunNumbers) -> None:
    if filled.get("communication_data_type", AUTO) != AUTO:
        return
    wide = sums_in_float32(numbers.world_size, bfloat16=numbers.bfloat16)
    if filled["zero_optimization"].get("zero_quantized_gradients"):
        # DeepSpeed's kernels quantise gradients in the data type of the parameters.
        wide = not numbers.bfloat16
    filled["communication_data_type"] = "fp32" if wide else "bf16"


def _check_same(block: dict[str, Any], key: str, value: Any, field: str, prefix: str) -> None:
    stated = block.get(key, AUTO)
    same_kind = isinstance(stated, bool) == isinstance(value, bool)
    if stated != AUTO and not (same_kind and stated == value):
        raise ConfigError(
            f"{prefix}{key}: JSON and run disagree; got {stated!r} in the JSON, expected "
            f'{value!r} from the recipe and the ranks. Write "auto" in the JSON, or change {field}.'
        )


def computes_in_bfloat16(precision: str) -> bool:
    """Returns whether a run with this `engine.precision` computes in bfloat16.

    "auto" is bfloat16 on GPUs, and float32 on CPUs, where float32 is faster.
    """
    if precision == "auto":
        from fd_large.ranks import distributed  # It imports torch.

        return distributed.device().type == "cuda"
    return precision == "bfloat16"


def ranks_of_a_node(stated: int, local_world_size: int) -> int:
    """Returns the number of ranks per node: `engine.node_size`, or else the launcher's number.

    Args:
        stated: `engine.node_size`; 0 if it is not set.
        local_world_size: The launcher's number of ranks on this node.

    Raises: ConfigError: if the number of all ranks is not a multiple of the result.
    """
    from fd_large.ranks import distributed  # It imports torch.

    size = stated or local_world_size
    if distributed.world_size() % size:
        raise ConfigError(
            f"engine.node_size: does not divide the ranks into nodes of equal size; got {size} "
            f"for {distributed.world_size()} ranks, expected a divisor. Set --engine.node_size."
        )
    return size
