"""Which operations take the time of a distillation step, and how much do fused kernels save?

    python benchmarks/roofline.py [--recipe fd_swinv2g] [--sizes 192:12 224:14] [--card h100]
                                  [--batch 32] [--json FILE]

It runs a recipe's student (forward, backward) and teacher (forward) on the meta device, where
tensors have shapes but no values, once with the reference kernels and once with the fused kernels.
It records the FLOPs of each operation, and the bytes that the operation reads and writes. No GPU is
needed. Times are calculated for the named card, as the longer of FLOPs / matmul rate and bytes /
memory bandwidth.

How it counts, one record per dispatched operation:

- views and empty tensors cost nothing; each distinct input is read once (a dimension of stride 0
  counts as one element), each new output is written once, an in-place target is read and written;
- a gather reads its index and at most as much of its source as it writes;
- a fused operation counts as the kernels that it launches and the operations of torch between them.
  Each launch reads or writes each of its tensors once, so that a tensor that one kernel writes for
  another counts twice;
- caches and repeated reads inside a kernel are ignored.

A fused operation counts as fused only in a case that meets these conditions: its own rules call the
case tested; benchmarks/results/kernels_aot.json records its forward and backward kernels as
compiled for this width (for attention: window, class token and head width) and these dtypes,
within the shared memory and without spills; and, for attention, a test compares the case with the
reference. Otherwise the operation counts as the reference, and is listed below the table.

Parameters are bfloat16, as on GPUs. Nothing is recomputed. Writes benchmarks/results/roofline.json
and .png.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import harness
import torch
from harness import RESULTS, ROOT
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

sys.path[:0] = [str(ROOT), *map(str, (ROOT / "tests/support").iterdir())]

from fd_large.engine.counting.recorder import Recorder, bytes_of, place_of  # noqa: E402
from fd_large.kernels import choose  # noqa: E402
from fd_large.kernels.operation import recording  # noqa: E402
from fd_large.plan.rates import Rates, rates_of  # noqa: E402
from fd_large.recipes import registry  # noqa: E402
from fd_large.recipes.run import Run  # noqa: E402
from fd_large.report import style  # noqa: E402

PHASES = ("student forward", "student backward", "teacher forward")
CLASSES = ("matmul", "attention", "stream", "activation", "bias gradient", "loss")

# For each operation: the start of its cases' names in kernels_aot.json, and its kernels.
FUSED = {
    "layer_norm": ("residual_norm", ("_residual_norm_forward", "_residual_norm_backward")),
    "residual_norm": ("residual_norm", ("_residual_norm_forward", "_residual_norm_backward")),
    "add_norm": ("residual_norm", ("_add_norm_forward", "_add_norm_backward")),
    "window_attention": ("window_attention", ("_forward", "_backward")),
}
# The kernels' names of the tensors whose dtypes decide about an operation.
ARGUMENTS = {"stream": "Y", "normed": "NORMED"}
# Shared memory that a program may have, as in tests/unit/kernels/test_aot.py.
SHARED_BYTES = {80: 163 * 1024, 90: 227 * 1024}


@dataclass(frozen=True)
class Row:
    """Costs of an operation, or the total costs of several operations.

    Attributes:
        phase: "student forward", "student backward" or "teacher forward".
        stage: "stage N" of a Swin model, "blocks" of a ViT, or "ends" for all other modules.
        kind: Class of the operation, such as "matmul" or "attention" (see `CLASSES`).
        op: Name of the operation.
        flops: Floating-point operations of matrix products.
        read: Bytes that are read.
        written: Bytes that are written.
        seconds: Calculated seconds on the card.
        calls: Number of operations.
    """

    phase: str
    stage: str
    kind: str
    op: str
    flops: int
    read: int
    written: int
    seconds: float
    calls: int = 1

    def __add__(self, other: Row) -> Row:
        return replace(
            self,
            flops=self.flops + other.flops,
            read=self.read + other.read,
            written=self.written + other.written,
            seconds=self.seconds + other.seconds,
            calls=self.calls + other.calls,
        )

    @property
    def moved(self) -> int:
        """Bytes that are read or written."""
        return self.read + self.written


class Counter(Recorder):
    """Recorder of every operation that computes or moves bytes within its `with` block.

    A forward operation is assigned to the innermost running module. A backward operation is
    assigned to the module of its forward, whose name hooks store on the nodes of the graph.

    Args:
        card: Rates that give the seconds.
    """

    def __init__(self, card: Rates) -> None:
        super().__init__()
        self.card = card
        self.rows: list[Row] = []
        self.phase, self._running, self._fused = "", [""], ""

    @contextmanager
    def named(self, model: nn.Module) -> Iterator[None]:
        """Makes the counter assign operations, during the block, to the modules of `model`."""
        handles = []
        for name, module in model.named_modules():
            handles.append(
                module.register_forward_pre_hook(lambda m, i, n=name: self._running.append(n))
            )
            handles.append(module.register_forward_hook(self._leave, with_kwargs=True))
        yield
        for handle in handles:
            handle.remove()

    def _leave(self, module: nn.Module, args: Any, kwargs: Any, out: Any) -> None:
        name = self._running.pop()
        stop = {t.grad_fn for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        pending = [t.grad_fn for t in tree_leaves(out) if isinstance(t, Tensor)]
        visited = set(stop)
        while pending:
            node = pending.pop()
            if node is None or node in visited:
                continue
            visited.add(node)
            node.metadata.setdefault("module", name)
            pending += [before for before, _ in node.next_functions]

    def record(
        self, func: Any, known: Any, args: Any, kwargs: Any, outs: list[Tensor], out: Any
    ) -> None:
        """Adds a row for an operation, or a row for each kernel of a fused operation.

        Args: As for `Recorder.record`.
        """
        if func.namespace == "fd_large":
            self._launch(known.name, args, kwargs)
            return
        super().record(func, known, args, kwargs, outs, out)
        operation = self.operations.pop()
        self._add(operation.name, operation.flops, operation.read, operation.written)

    def _launch(self, name: str, args: Any, kwargs: Any) -> None:
        """Adds a row for each kernel that a fused operation launches.

        The operation's code runs, but its kernel launches are only recorded.

        Args:
            name: Name of the operation, without "fd_large::".
            args: Positional arguments of the call.
            kwargs: Keyword arguments of the call.
        """
        from torch._library.custom_ops import OPDEFS

        places = {place_of(t) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        self._fused = name
        with recording() as launches, self:
            OPDEFS[f"fd_large::{name}"]._init_fn(*args, **kwargs)
        for launch in launches:
            tensors = [t for t in launch.arguments if isinstance(t, Tensor)]
            read = written = 0
            for t in {place_of(t): t for t in tensors}.values():
                # What no earlier one had is an output of this launch.
                if place_of(t) in places:
                    read += bytes_of(t)
                else:
                    written += bytes_of(t)
            places |= {place_of(t) for t in tensors}
            self._add(name, 0, read, written)
        self._fused = ""

    def _add(self, name: str, flops: int, read: int, written: int) -> None:
        node = torch._C._current_autograd_node()
        module = self._running[-1] if node is None else node.metadata.get("module", "")
        op = self._fused or name
        kind = _kind(op, module, node, flops)
        seconds = max(flops / self.card.matmul, (read + written) / self.card.bandwidth)
        row = Row(self.phase, _stage(module), kind, op, flops, read, written, seconds)
        self.rows.append(row)


def _stage(module: str) -> str:
    parts = module.split(".")
    if "layers" in parts:
        return f"stage {parts[parts.index('layers') + 1]}"
    return "blocks" if "blocks" in parts else "ends"


def _kind(op: str, module: str, node: Any, flops: int) -> str:
    if flops:
        return "matmul"
    if "attention" in op:
        return "attention"
    if "gelu" in op:
        return "activation"
    if op == "sum" and node is not None and node.name().startswith(("Addmm", "Linear", "Convol")):
        return "bias gradient"
    if module in ("", "projection"):
        return "loss"
    leaf = module.rsplit(".", 1)[-1]
    if (".attn" in module and leaf not in ("qkv", "proj")) or "position_bias" in module:
        return "attention"
    return "activation" if leaf == "mlp" else "stream"


Proof = Callable[[str, dict[str, Any]], bool]


def proof(recorded: dict[str, list[dict[str, Any]]]) -> Proof:
    """Returns a function that decides whether an operation counts as fused.

    The arguments of the function are the operation's name and its case (sizes and dtypes).

    Args:
        recorded: The cases of kernels_aot.json.
    """
    from aot_cases import COMPARED, COMPARED_IMAGES

    compared = {((size[3],) * 2, 0, size[6]) for size in COMPARED.values()} | COMPARED_IMAGES

    def covers(row: dict[str, Any], kernel: str, case: dict[str, Any]) -> bool:
        if "window" in case:
            names = ("WH", "WW", "PREFIX", "D")
            sizes = (*case["window"], case["prefix"], case["head_width"])
            constants = dict(zip(names, sizes, strict=True))
        else:
            constants = {"C": case["width"]}
        dtypes = {
            ARGUMENTS.get(name, name.upper()): str(value).removeprefix("torch.")
            for name, value in case.items()
            # A copy of the same dtype is none.
            if isinstance(value, torch.dtype) and (name, value) != ("copy", case.get("stream"))
        }
        return (
            row["kernel"] == kernel
            and all(row["constants"].get(name) == size for name, size in constants.items())
            and all(row["dtypes"].get(name, dtype) == dtype for name, dtype in dtypes.items())
            and row["spill_bytes"] == 0
            and row["shared_bytes"] <= SHARED_BYTES[row["capability"]]
        )

    def proven(op: str, case: dict[str, Any]) -> bool:
        start, kernels = FUSED[op]
        rows = [row for name, rows in recorded.items() if name.startswith(start) for row in rows]
        if "window" in case:
            place = (tuple(case["window"]), case["prefix"], case["head_width"])
            if place not in compared:
                return False
            rows = [row for row in rows if ("TABLE" in row["dtypes"]) == case["table"]]
        return all(
            any(covers(row, kernel, case) for row in rows if row["capability"] == capability)
            for kernel in kernels
            for capability in SHARED_BYTES
        )

    return proven


@contextmanager
def only(proven: Proof) -> Iterator[set[str]]:
    """Makes operations use the reference kernels during the block where `proven` returns False.

    Args:
        proven: The result of `proof`.

    Yields: a set to which the names and cases of these operations are added.
    """
    known, refused = dict(choose._operations), set()

    def narrowed(op: str) -> Callable[..., str]:
        def untested(**case: Any) -> str:
            why = known[op].untested(**case)
            if why or proven(op, case):
                return why
            place = (
                f"{case['window']}, width {case['head_width']}"
                if "window" in case
                else (case["width"])
            )
            dtypes = sorted({str(v)[6:] for v in case.values() if isinstance(v, torch.dtype)})
            refused.add(f"{op} {place} ({', '.join(dtypes)})")
            return "not proven"

        return untested

    for op, operation in known.items():
        if operation.untested is None:
            continue
        choose.register(op, narrowed(op), operation.apex_untested)
    choose._implementation.cache_clear()
    try:
        yield refused
    finally:
        choose._operations.update(known)
        choose._implementation.cache_clear()


def count(run: Run, batch: int, card: Rates, *, kernels: str = "reference") -> list[Row]:
    """Returns a row for every operation of a run's step, without recomputation.

    The step runs on the meta device.

    Args:
        run: The recipe.
        batch: Number of images.
        card: Rates that give the seconds.
        kernels: "reference" or "triton".
    """
    from fd_large.tasks.distillation.job import DistillationJob

    # Maps are not made again: the reference keeps them, as it may not on a GPU.
    run = replace(run, student=replace(run.student, attention_memory="keep"))
    device = choose.Device((9, 0) if kernels == "triton" else None, on_gpu=False)
    with choose.standing_in(device):
        return _rows(DistillationJob(run), batch, card)


def _rows(job: Any, batch: int, card: Rates) -> list[Row]:
    with torch.device("meta"):
        task, (teacher,) = job.models_on_shapes()
    for model in (teacher, task):
        model.to(torch.bfloat16)
    size = job.run.data.image_size
    images = torch.empty(batch, 3, size, size, dtype=torch.uint8, device="meta")
    keep = torch.empty(len(task.drop_path_rates), batch, dtype=torch.bool, device="meta")
    counter = Counter(card)
    with counter.named(teacher), counter.named(task):
        counter.phase = "teacher forward"
        with counter:
            prepared = task.prepare(images, None, keep)
        counter.phase = "student forward"
        with counter:
            loss, _ = task(**prepared)
        counter.phase = "student backward"
        with counter:
            loss.backward()
    return counter.rows


def summed(rows: list[Row], key: Callable[[Row], Any]) -> dict[Any, Row]:
    """Returns {key: sum of the rows with this key}.

    Args:
        rows: The rows.
        key: Function from a row to its key.
    """
    total: dict[Any, Row] = {}
    for row in rows:
        name = key(row)
        total[name] = total[name] + row if name in total else row
    return total


def beside(rows: list[Row], phases: tuple[str, ...]) -> int:
    """Returns the bytes that operations other than matrix products read and write.

    Args:
        rows: The rows of a step.
        phases: Parts of the step (`Row.phase`) that are summed.
    """
    return sum(row.moved for row in rows if row.phase in phases and row.kind != "matmul")


def variants(run: Run, sizes: list[tuple[int, int]]) -> Iterator[tuple[dict[str, Any], Run]]:
    """Yields a label and a run for each size and data type of the residual stream.

    Args:
        run: The recipe.
        sizes: Pairs (side of the images, side of a window); empty for those of the recipe.
    """
    for image_size, window in sizes or [(run.data.image_size, 0)]:
        sized = run
        if window:
            student, teacher = (
                replace(part, architecture=replace(part.architecture, window_size=window))
                for part in (run.student, run.teacher)
            )
            data = replace(run.data, image_size=image_size)
            sized = replace(run, student=student, teacher=teacher, data=data)
        for stream in ("float32", "compute"):
            label = {
                "image_size": image_size,
                "window": sized.student_architecture().window_size,
                "stream": "float32" if stream == "float32" else "bfloat16",
            }
            student = replace(sized.student, residual_dtype=stream)
            yield label, replace(sized, student=student)


def measured(rows: list[Row], batch: int) -> dict[str, Any]:
    """Returns the costs per image, by phase and class, by stage, and by operation.

    Args:
        rows: The rows of a step.
        batch: Number of images of the step.
    """

    def numbers(row: Row) -> dict[str, Any]:
        return {
            "gflop": row.flops / batch / 1e9,
            "gb_read": row.read / batch / 1e9,
            "gb_written": row.written / batch / 1e9,
            "microseconds": row.seconds / batch * 1e6,
            "operations": row.calls,
        }

    def table(key: Callable[[Row], Any]) -> dict[str, Any]:
        return {" / ".join(name): numbers(row) for name, row in summed(rows, key).items()}

    student = ("student forward", "student backward")
    return {
        "student_beside_matmul_gb": beside(rows, student) / batch / 1e9,
        "teacher_beside_matmul_gb": beside(rows, ("teacher forward",)) / batch / 1e9,
        "student_microseconds": sum(r.seconds for r in rows if r.phase in student) / batch * 1e6,
        "step_microseconds": sum(r.seconds for r in rows) / batch * 1e6,
        "student_gflop": sum(r.flops for r in rows if r.phase in student) / batch / 1e9,
        "by_class": table(lambda row: (row.phase, row.kind)),
        "by_stage": table(lambda row: (row.phase, row.stage, row.kind)),
        "by_operation": table(lambda row: (row.phase, row.kind, row.op)),
    }


def show(results: dict[str, Any]) -> None:
    """Prints a table of the results, and the operations that counted as the reference."""
    from rich.console import Console
    from rich.table import Table

    table = Table(
        title=f"{results['recipe']}, batch {results['batch']}, per image, besides matrix products",
        title_justify="left",
    )
    table.add_column("px, window, stream, kernels", no_wrap=True)
    columns = [(phase, kind) for phase in PHASES for kind in CLASSES[1:4]]
    for phase, kind in columns:
        table.add_column(f"{phase.replace(' ', chr(10), 1)}\n{kind}", justify="right")
    for name in ("student\nsum GB", "teacher\nsum GB", "student\nus", "step\nus"):
        table.add_column(name, justify="right")
    for case in results["cases"]:
        cells = []
        for phase, kind in columns:
            row = case["by_class"].get(f"{phase} / {kind}", {"gb_read": 0, "gb_written": 0})
            cells.append(f"{row['gb_read'] + row['gb_written']:.2f}")
        table.add_row(
            f"{case['image_size']}, {case['window']}, {case['stream']}, {case['kernels']}",
            *cells,
            f"{case['student_beside_matmul_gb']:.2f}",
            f"{case['teacher_beside_matmul_gb']:.2f}",
            f"{case['student_microseconds']:,.0f}",
            f"{case['step_microseconds']:,.0f}",
        )
    Console(width=None if Console().is_terminal else 170).print(table)
    for case in results["counted_as_reference"]:
        print(f"counted as the reference, since not compiled or not compared in this case: {case}")


def draw(results: dict[str, Any], path: Path) -> None:
    """Draws time and bytes of the student's forward and backward, by class."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    cases = [c for c in results["cases"] if c["kernels"] != "reference" or c["stream"] == "float32"]
    names = [
        f"{case['image_size']} px, {case['kernels']}"
        + (f", {case['stream']} stream" if case["kernels"] != "reference" else "")
        for case in cases
    ]
    colors = (style.LIGHT_GREY, style.VERMILLION, style.BLUE, style.GREEN, "#E69F00", style.GREY)
    figure, axes = plt.subplots(
        1, 2, figsize=(11, 1.6 + 0.42 * len(cases)), sharey=True, layout="constrained"
    )
    for side, unit in zip(axes, ("microseconds", "gb"), strict=True):
        left = [0.0] * len(cases)
        for kind, color in zip(CLASSES, colors, strict=True):
            if unit == "gb" and kind == "matmul":
                continue
            values = [_of_student(case, kind, unit) for case in cases]
            side.barh(names, values, left=left, color=color, label=kind)
            left = [a + b for a, b in zip(left, values, strict=True)]
        for y, total in enumerate(left):
            text = f" {total:,.0f}" if unit == "microseconds" else f" {total:.2f}"
            side.text(total, y, text, va="center", size=style.SMALL_SIZE, color=style.GREY)
        style.plain_axes(side)
        side.grid(axis="x", color=style.LIGHT_GREY, linewidth=0.6)
        side.grid(axis="y", visible=False)
        side.margins(x=0.16)
    axes[0].invert_yaxis()
    axes[0].set_xlabel(f"microseconds per image on {results['card']['name']} (calculated)")
    axes[1].set_xlabel("GB per image besides the matrix products (counted)")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside lower center", ncols=len(labels), frameon=False, fontsize=9
    )
    figure.suptitle(
        f"{results['recipe']}: the student's forward and backward, batch {results['batch']}",
        size=style.TITLE_SIZE,
    )
    figure.savefig(path, dpi=style.DPI)


def _of_student(case: dict[str, Any], kind: str, unit: str) -> float:
    rows = [case["by_class"].get(f"{phase} / {kind}") for phase in PHASES[:2]]
    present = [row for row in rows if row]
    if unit == "gb":
        return sum(row["gb_read"] + row["gb_written"] for row in present)
    return sum(row["microseconds"] for row in present)


def parse() -> argparse.Namespace:
    """Returns the parsed flags of the command line."""

    def size(text: str) -> tuple[int, int]:
        pixels, _, window = text.partition(":")
        return int(pixels), int(window or 0)

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipe", default="fd_swinv2g", help="name of a recipe")
    parser.add_argument("--sizes", nargs="*", type=size, default=[], help="PIXELS:WINDOW ...")
    parser.add_argument("--card", default="h100", help="GPU whose rates give the times")
    parser.add_argument(
        "--rates", default="", help="JSON of measured rates, which replace the card's"
    )
    parser.add_argument("--batch", type=int, default=32, help="images")
    parser.add_argument("--quick", action="store_true", help="the recipe's own size, batch 4")
    parser.add_argument("--json", type=Path, default=RESULTS / "roofline.json")
    return parser.parse_args()


def main() -> int:
    """Counts, prints, writes and draws the results; returns the exit code."""
    arguments = parse()
    if arguments.quick:
        arguments.sizes, arguments.batch = [], 4
    card = rates_of(arguments.card, arguments.rates)
    recorded = json.loads((RESULTS / "kernels_aot.json").read_text())["cases"]
    cases = []
    with only(proof(recorded)) as refused:
        for label, run in variants(registry.get(arguments.recipe), arguments.sizes):
            for kernels in ("reference", "triton"):
                rows = count(run, arguments.batch, card, kernels=kernels)
                name = "fused" if kernels == "triton" else kernels
                cases.append(label | {"kernels": name} | measured(rows, arguments.batch))
    results = {
        **harness.conditions(__file__, __doc__, ("torch",)),
        "machine": "none: shapes on the meta device, calculated for the card",
        "recipe": arguments.recipe,
        "batch": arguments.batch,
        "card": card.to_dict(),
        "counted_as_reference": sorted(refused),
        "cases": cases,
    }
    harness.write(results, arguments.json)
    show(results)
    draw(results, arguments.json.with_suffix(".png"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
