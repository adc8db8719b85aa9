"""Checks that a global batch divides among ranks, without torch, so that mistakes appear early."""

from __future__ import annotations

from fd_large.errors import ConfigError


def check_division(*, global_batch_size: int, micro_batch_size: int, world_size: int) -> None:
    """Refuses a global batch size that does not divide into micro-batches on all ranks.

    Raises: ConfigError: if a size does not divide, with the nearest sizes that do, or if a size is
        not positive.
    """
    for key, size in (
        ("global_batch_size", global_batch_size),
        ("micro_batch_size", micro_batch_size),
    ):
        if size < 1:
            raise ConfigError(
                f"batch.{key}: not a number of images; got {size}, expected 1 or more. "
                f"Set --batch.{key} to a positive number."
            )
    step = world_size * micro_batch_size
    if global_batch_size % step:
        below = global_batch_size // step * step
        near = " or ".join(str(size) for size in (below, below + step) if size)
        remedy = f"Set --batch.global_batch_size to {near}"
        if global_batch_size % world_size == 0:
            sizes = nearest_divisors(global_batch_size // world_size, micro_batch_size)
            remedy += f", or --batch.micro_batch_size to {' or '.join(map(str, sizes))}"
        elif global_batch_size % micro_batch_size == 0:
            ranks = nearest_divisors(global_batch_size // micro_batch_size, world_size)
            remedy += f", or start {' or '.join(map(str, ranks))} ranks"
        raise ConfigError(
            "batch.global_batch_size: does not divide into micro batches on all ranks; "
            f"got global_batch_size {global_batch_size} with micro_batch_size "
            f"{micro_batch_size} on {world_size} {'ranks' if world_size > 1 else 'rank'}, "
            f"expected a multiple of {step} ({world_size} x {micro_batch_size}). {remedy}."
        )


def nearest_divisors(number: int, target: int) -> list[int]:
    """Returns the divisors of `number` that are nearest to `target`, below and above it.

    There is only one if `target` itself divides `number`, or is larger than `number`.
    """
    below = next(size for size in range(min(target, number), 0, -1) if number % size == 0)
    above = next((size for size in range(target, number + 1) if number % size == 0), None)
    return [below] if above is None or above == below else [below, above]
