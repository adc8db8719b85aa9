"""Reduces gradients for the optimiser in fewer passes than DeepSpeed 0.19.8 makes.

Methods of an engine's objects are replaced; the numbers stay the same.

| stage        | DeepSpeed                                   | here                               |
|--------------|---------------------------------------------|------------------------------------|
| 0            | on one rank: flattens gradients, reduces    | on one rank: leaves gradients in   |
|              | them, copies them back                      | place                              |
|              | on several ranks: flattens and reduces      | copies each gradient into a bucket |
|              | after backward, and copies back             | and reduces during backward        |
|              | computes a norm for clipping alone          | one norm, for clipping and the log |
| 2, and 1 in  | copies gradients into new buckets in every  | copies gradients into lasting      |
| float32      | step, all-reduces the buckets, copies the   | buckets or into the shard; on few  |
|              | rank's shard out of them                    | ranks (`MOST_OWNERS`) sends each   |
|              |                                             | bucket to the rank that steps it   |
|              | computes the norm from float64 copies       | sums squares by chunks in float32  |
|              | in float32: steps a copy of the parameters, | in float32: steps the parameters   |
|              | and copies it back                          |                                    |
| 1, bfloat16  | zeroes the sums twice, and adds float32     | overwrites the sums with the first |
|              | copies to them                              | micro batch                        |
|              | all-reduces a float32 copy of all gradients | sums gradients in place during     |
|              | after backward                              | backward, in buckets as above      |
|              | norm and clipping of all, on every rank     | of the rank's shard                |
| 3            | after a step gathers each tensor that stays | the next forward gathers these     |
|              | whole, in a message each                    | tensors with their neighbours      |

Everything else is reduced by DeepSpeed itself, also during backward: stage 3, and stages 1 and 2
with the optimiser in host memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from fd_large.engine.zero.float32_sums import Float32Sums
from fd_large.engine.zero.gradient_shards import OwnedShards
from fd_large.engine.zero.private_names import get, replace
from fd_large.engine.zero.whole_gradients import WholeGradients

_STAGE_1_2 = "deepspeed.runtime.zero.stage_1_and_2:DeepSpeedZeroOptimizer"


def spare_passes(engine: Any, *, bucket: int) -> Sequence[Tensor]:
    """Replaces DeepSpeed's reduction and clipping of gradients, as the table above says.

    Args:
        engine: DeepSpeed's engine, before its first forward.
        bucket: Number of elements that are reduced together.

    Returns: the tensors that hold gradients and stay in memory from step to step.
    """
    if isinstance(engine.optimizer, get("deepspeed.runtime.bf16_optimizer:BF16_Optimizer")):
        return Float32Sums(engine, bucket).kept
    if isinstance(engine.optimizer, get(_STAGE_1_2)):
        # Another pass over the gradients and another read: their norm says whether all are finite.
        replace(engine.optimizer, "check_overflow", lambda **_: None)
        return [] if engine.optimizer.cpu_offload else OwnedShards(engine, bucket).kept
    if engine.zero_optimization_stage() == 0:
        return WholeGradients(engine, bucket).kept
    # After a step DeepSpeed would gather the small tensors that stay whole in a message each,
    # and wait for the device. The next forward pass gathers them with their neighbours.
    replace(engine.optimizer, "persistent_parameters", [])
    return [engine.optimizer.grad_partitions_flat_buffer]
