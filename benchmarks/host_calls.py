"""How many calls does the host make for a block of a model under ZeRO-3, FSDP2 and DDP?

    python benchmarks/host_calls.py [--ranks 2] [--contenders zero3 fsdp2 ddp]

It starts its own CPU ranks. Blocks of ViT-L and SwinV2-G, of a small width, learn from equal frozen
blocks, which are sharded over the ranks, or whole with DDP. A step is counted with 6 and with 12
blocks; a sixth of the difference is the count of one block. These are counted in the teacher's
forward, the student's forward and the student's backward:

- calls of Python functions (by sys.setprofile), without those of C functions;
- hooks of modules, before and after each forward;
- launches, which are operations of torch other than views;
- gathers of weights (with gloo, ZeRO-3 gathers by a broadcast of each rank's shard).

As in the full width, the four matrices of a block are gathered and freed in each pass, and smaller
parameters stay. Nothing is timed, so other work on the machine does not matter. Writes
benchmarks/results/host_calls.json.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import harness
from harness import TITLES

FEWER, MORE = 6, 12
WARM_UP = 3
WIDTH, HEADS = 64, 2
MODELS = {
    # Student and teacher, pixels, and what else a block's shape needs.
    "ViT-L": ("fd_clip_vit_large", 56, {"image_size": 56}),
    # An extra norm in every sixth block.
    "SwinV2-G": ("fd_swinv2g", 32, {"window_size": 4, "extra_norm_every": 6}),
}
# As in the full width: a block is gathered ahead, few are held at a time, and what is smaller than
# its four matrices stays.
NARROW = {
    "stage3_prefetch_bucket_size": 13 * WIDTH**2,
    "stage3_max_live_parameters": 3 * 13 * WIDTH**2,
    "stage3_max_reuse_distance": 0,
    "stage3_param_persistence_threshold": WIDTH**2 - 1,
}
PHASES = ("teacher", "forward", "backward")
COUNTS = ("python", "hooks", "launches", "gathers")


def parse() -> argparse.Namespace:
    """Returns the parsed flags of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--contenders", nargs="+", default=["zero3", "fsdp2", "ddp"])
    parser.add_argument("--out", type=Path, default=harness.RESULTS / "host_calls.json")
    parser.add_argument("--as-rank", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def the_run(model: str, blocks: int, *, placement: str, checkpoints: bool) -> Any:
    """Returns a recipe whose student and teacher have a given number of blocks.

    Args:
        model: The kind of blocks, "ViT-L" or "SwinV2-G".
        blocks: Number of blocks.
        placement: Value of teacher.placement.
        checkpoints: Whether every block of the student is checkpointed.
    """
    from fd_large.ranks import distributed
    from fd_large.recipes import registry
    from fd_large.recipes.architectures import Architecture

    name, pixels, shape = MODELS[model]
    run = registry.get(name)
    sizes = {"embed_dim": WIDTH, "depths": (blocks,), "num_heads": (HEADS,)}
    architecture = Architecture(**sizes, **shape)
    mode = "every" if checkpoints else "off"
    return replace(
        run,
        student=replace(run.student, architecture=architecture, activation_checkpointing=mode),
        teacher=replace(
            run.teacher, architecture=architecture, source="random", placement=placement
        ),
        data=replace(run.data, image_size=pixels),
        batch=replace(
            run.batch, global_batch_size=2 * distributed.world_size(), micro_batch_size=2
        ),
        engine=replace(run.engine, precision="bfloat16"),
    )


def build(name: str, run: Any) -> Callable[[Any], Any]:
    """Returns the step of a contender of `contenders.py`.

    ZeRO-3 gets the settings in `NARROW`, and FSDP2 also shards the teacher.

    Args:
        name: The contender.
        run: The recipe.
    """
    import contenders
    from engines import job_of, zero_engine

    from fd_large.engine.forward_backward import forward_backward
    from fd_large.engine.zero.start import deepspeed

    if name != "zero3":
        job = job_of(run)
        if name == "fsdp2":
            for teacher in job.teachers.values():
                contenders.shard(teacher.module, teacher.module.net, bfloat16=True)
        return contenders.build(name, contenders.Setting(run, True, job, None))

    def initialize(*, config: dict[str, Any], **others: Any) -> Any:
        zero = config["zero_optimization"] | NARROW
        return plain(config=config | {"zero_optimization": zero}, **others)

    plain = deepspeed.initialize
    with patch.object(deepspeed, "initialize", initialize):
        job = job_of(run)
        make_task = contenders.Setting(run, True, job, None).make_task
        engine = zero_engine(run, make_task, "zero3", micro_batch_size=2)

    def step(batch: Any) -> None:
        forward_backward(engine, batch, 0)
        engine.deepspeed.step()

    return step


@contextmanager
def phases(now: list[str]) -> Iterator[None]:
    """Keeps in `now[0]`, during the block, which part of a distillation step is running.

    The parts are "teacher" (its forward), "forward" (of the student), "backward" and "update".
    """
    import torch

    from fd_large.tasks.distillation.task import Distillation

    def noted(plain: Callable[..., Any], phase: str, after: str) -> Callable[..., Any]:
        def called(*args: Any, **kwargs: Any) -> Any:
            now[0] = phase
            result = plain(*args, **kwargs)
            now[0] = after
            return result

        return called

    prepare, backward = Distillation.prepare, torch.Tensor.backward
    with (
        patch.object(Distillation, "prepare", noted(prepare, "teacher", "forward")),
        patch.object(torch.Tensor, "backward", noted(backward, "backward", "update")),
    ):
        yield


def counted(step: Callable[[], Any]) -> Counter:
    """Returns {(part of the step, kind of count): number} of a step.

    Two steps run. In the first, launches and gathers are counted, and in the second, calls of
    Python functions and hooks.

    Args:
        step: Function that runs a step.
    """
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    from fd_large.ranks import distributed

    counts, now = Counter(), ["before"]
    call_of_module = torch.nn.Module._call_impl.__code__
    world = distributed.world_size()

    class Operations(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            name = func._schema.name
            if "allgather" in name:
                counts[now[0], "gathers"] += 1
            elif name == "c10d::broadcast_":
                counts[now[0], "gathers"] += 1 / world
            elif func.namespace != "c10d" and not func.is_view:
                counts[now[0], "launches"] += 1
            return func(*args, **(kwargs or {}))

    def profile(frame: Any, event: str, _: Any) -> None:
        if event == "call":
            counts[now[0], "python"] += 1
            if frame.f_code is call_of_module:
                module = frame.f_locals["self"]
                hooks = len(module._forward_pre_hooks) + len(module._forward_hooks)
                counts[now[0], "hooks"] += hooks

    with phases(now):
        with Operations():
            step()
        sys.setprofile(profile)
        try:
            step()
        finally:
            sys.setprofile(None)
    return counts


def run_as_rank(arguments: argparse.Namespace) -> int:
    """Counts the steps of all contenders; rank 0 writes the counts of one block to --out."""
    from engines import noise

    from fd_large.engine.zero import start
    from fd_large.ranks import distributed

    distributed.start()
    start.start()
    rows = []
    for model in MODELS:
        for checkpoints in (False, True):
            for name in arguments.contenders:
                placement = "sharded" if name == "zero3" else "replicated"
                totals = []
                for blocks in (FEWER, MORE):
                    run = the_run(model, blocks, placement=placement, checkpoints=checkpoints)
                    step = partial(build(name, run), noise(2, run.data.image_size))
                    for _ in range(WARM_UP):
                        step()
                    totals.append(counted(step))
                row = {"model": model, "contender": name, "checkpoints": checkpoints}
                for phase in PHASES:
                    row[phase] = {
                        count: round(
                            (totals[1][phase, count] - totals[0][phase, count]) / (MORE - FEWER), 2
                        )
                        for count in COUNTS
                    }
                rows.append(row)
    if distributed.is_main():
        arguments.out.write_text(json.dumps(rows))
    return distributed.leave(0)


def show(rows: list[dict[str, Any]]) -> None:
    """Prints a table of the counts."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title="a block: Python calls, hooks, launches, gathers", title_justify="left")
    for name in ("model", "checkpoints", "contender", *PHASES):
        table.add_column(name, no_wrap=True)
    for row in rows:
        figures = (" ".join(f"{row[phase][count]:g}" for count in COUNTS) for phase in PHASES)
        again = "every" if row["checkpoints"] else "off"
        table.add_row(row["model"], again, TITLES[row["contender"]], *figures)
    Console(width=None if sys.stdout.isatty() else 130).print(table)


def main() -> int:
    """Starts the ranks, or runs as one of them with --as-rank; returns the exit code."""
    arguments = parse()
    if arguments.as_rank:
        return run_as_rank(arguments)
    with tempfile.TemporaryDirectory(prefix="host_calls_") as folder:
        part = Path(folder) / "part.json"
        words = ["--contenders", *arguments.contenders, "--out", part, "--as-rank"]
        code = harness.start(__file__, *words, ranks=arguments.ranks)
        if not part.exists():
            return code
        rows = json.loads(part.read_text())
    results = harness.conditions(__file__, __doc__) | {"ranks": arguments.ranks, "blocks": rows}
    harness.write(results, arguments.out)
    show(rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
