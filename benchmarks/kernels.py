"""How close do the fused kernels and others come to the memory bandwidth?

    python benchmarks/kernels.py [--quick]    # on a CUDA device
    python benchmarks/kernels.py --blocks     # whole blocks, and which kernels to delete
    python benchmarks/kernels.py --aot        # anywhere: registers, shared memory and spills
    TRITON_INTERPRET=1 python benchmarks/kernels.py --blocks --dry   # every line on a CPU, small

Each operation runs forward and backward separately, at the shapes of a SwinV2-G stage (192 px,
window 12, 32 images) and of ViT-B. The implementations are the package's Triton kernels, plain
torch, torch.compile, and, if installed, the LayerNorm of NVIDIA apex and of Liger; for attention,
flex_attention. They take turns, and the cache is flushed before every sample. The bytes of an
operation are the least that it can move, with each input read once and each result written once.
The share is these bytes per second divided by the bytes per second of copying 1 GiB, with reads and
writes counted.

`--blocks` times forward and backward of whole blocks of SwinV2-G and ViT-B in bfloat16: with plain
torch, with torch.compile of the block, with the package's kernels, and with these kernels in
compiled blocks. Then one kernel at a time is replaced by torch.compile, in an ordinary and in a
compiled block. A kernel should be deleted if without it no block takes more than 1.03 times as
long, where the faster of the two kinds of block counts.

Writes benchmarks/results/kernels.json and .png, kernels_blocks.json, or kernels_aot.json.
"""

from __future__ import annotations

import argparse
import copy
import importlib
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import harness
import torch
import torch.nn.functional as F
from harness import RESULTS, ROOT
from torch import Tensor

sys.path[:0] = [str(ROOT), *map(str, (ROOT / "tests/support").iterdir())]
BF16 = torch.bfloat16
# With --dry a CPU, where sizes are such as Triton's interpreter does in seconds.
DEVICE = "cuda"
IMAGES = 32


@dataclass
class Question:
    """Operation at one shape, whose implementations are compared.

    Attributes:
        name: Name in the table.
        bytes_forward: Least number of bytes that a forward reads and writes.
        bytes_backward: Least number of bytes that a backward reads and writes.
        inputs: Arguments of the implementations; those in floating point need a gradient.
        contenders: The implementations by name, which are functions of the inputs.
        flops: FLOPs of matrix products in a forward; a backward has 2.5 times as many.
        rows: Results, a row for each implementation and direction.
    """

    name: str
    bytes_forward: int
    bytes_backward: int
    inputs: list[Tensor]
    contenders: dict[str, Callable[..., Any]]
    flops: float = 0.0
    rows: list[dict[str, Any]] = field(default_factory=list)


def parse() -> argparse.Namespace:
    """Returns the parsed flags of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few samples, no torch.compile")
    parser.add_argument("--blocks", action="store_true", help="whole blocks, what to delete")
    parser.add_argument("--aot", action="store_true", help="compile for sm_80 and sm_90, no GPU")
    parser.add_argument("--dry", action="store_true", help="every line on a CPU, small")
    return parser.parse_args()


def ahead_of_time() -> int:
    """Compiles every case without a GPU; prints and writes registers, shared memory and spills.

    Returns: the exit code, 1 if a kernel spills registers.
    """
    import triton
    from aot import digest, usage
    from aot_cases import CASES

    cases = {}
    for name, launch in CASES.items():
        cases[name] = usage(launch)
        for row in cases[name]:
            print(
                f"{name:46} {row['kernel']:26} sm_{row['capability']}  {row['registers']:3} "
                f"registers  {row['shared_bytes']:6} B shared  {row['spill_bytes']} B spilled",
                flush=True,
            )
    digests = {name: digest(launch) for name, launch in CASES.items()}
    write("kernels_aot.json", {"triton": triton.__version__, "digests": digests, "cases": cases})
    spilled = [row for rows in cases.values() for row in rows if row["spill_bytes"]]
    print(f"{len(cases)} cases, {sum(map(len, cases.values()))} kernels, {len(spilled)} spill")
    return 1 if spilled else 0


def write(name: str, results: dict[str, Any]) -> None:
    """Writes `results` and the conditions of the benchmark as JSON to RESULTS/`name`."""
    harness.write(
        harness.conditions(__file__, __doc__, ("torch", "triton")) | results, RESULTS / name
    )


@dataclass
class BlockCase:
    """Block of a model with the arguments of its forward.

    Attributes:
        name: Name in the table.
        block: The block, on the device, in bfloat16.
        arguments: The arguments; some of the tensors require a gradient.
    """

    name: str
    block: torch.nn.Module
    arguments: tuple[Any, ...]


# What is replaced together, because it shares kernels.
GROUPS = {
    "residual_norm": ("residual_norm", "layer_norm"),
    "add_norm": ("add_norm", "layer_norm"),
    "window_attention": ("window_attention",),
}
TOLERANCE = 1.03
FASTEST = "triton"


def swinv2_block(
    width: int, heads: int, side: int, window: int, stream: torch.dtype, device: str, images: int
) -> BlockCase:
    """Returns a block of a SwinV2 stage with shifted windows.

    Args:
        width: Number of channels.
        heads: Number of heads.
        side: Side of the map in tokens.
        window: Side of a window in tokens.
        stream: Data type of the residual stream.
        device: The device.
        images: Number of images.
    """
    from fd_large.backbones.swinv2.swinv2 import SwinV2

    net = SwinV2(width, (2,), (heads,), window_size=window, attention_memory="recompute")
    x = torch.randn(images, side, side, width, device=device)
    table = torch.rand((2 * window - 1) ** 2, heads, device=device).mul(16)
    arguments = (
        x.to(stream).requires_grad_(),
        x.to(BF16).requires_grad_(),
        torch.ones(2, images, device=device),
        table.requires_grad_(),
    )
    name = f"SwinV2, {width} channels, {side}x{side}, {str(stream)[6:]} stream"
    return BlockCase(name, net.blocks()[1].to(device, BF16), arguments)


def vit_block(width: int, heads: int, side: int, device: str, images: int) -> BlockCase:
    """Returns a block of the paper's ViT student, with shared relative positions and LayerScale.

    Args:
        width: Number of channels.
        heads: Number of heads.
        side: Side of the map in tokens.
        device: The device.
        images: Number of images.
    """
    from fd_large.backbones.vit.vit import ViT

    net = ViT(
        width, 1, heads, patch_size=16, image_size=16 * side, absolute_position=False,
        relative_position="shared", layer_scale=0.1, qkv_bias="qv", attention_memory="recompute",
    )  # fmt: skip
    x = torch.randn(images, side * side + 1, width, device=device).requires_grad_()
    table = torch.rand((2 * side - 1) ** 2 + 3, heads, device=device).requires_grad_()
    arguments = (x, torch.ones(2, images, device=device), table, (side, side))
    return BlockCase(
        f"ViT, {width} channels, {side}x{side}", net.blocks()[0].to(device, BF16), arguments
    )


def block_cases() -> list[Callable[[], BlockCase]]:
    """Returns functions that make the timed blocks, in order of their share of a student's time."""
    f32 = torch.float32
    if DEVICE == "cpu":
        return [
            lambda: swinv2_block(32, 1, 4, 4, f32, DEVICE, 1),
            lambda: vit_block(32, 1, 4, DEVICE, 1),
        ]
    return [
        lambda: swinv2_block(2048, 64, 12, 12, f32, DEVICE, IMAGES),
        lambda: vit_block(768, 12, 14, DEVICE, 4 * IMAGES),
        lambda: swinv2_block(2048, 64, 12, 12, BF16, DEVICE, IMAGES),
        lambda: swinv2_block(512, 16, 48, 12, f32, DEVICE, IMAGES),
    ]


def ways(names: set[str]) -> dict[str, tuple[str, bool]]:
    """Returns the ways to run a block, {name: (value of FD_KERNELS, whether to compile the block)}.

    Args:
        names: Names of the operations that the block calls.
    """
    settings = {
        "plain torch": ("reference", False),
        "compiled block": ("reference", True),
        "ours": (FASTEST, False),
        "ours in a compiled block": (FASTEST, True),
    }
    for group, operations in GROUPS.items():
        if group in names:
            without = ",".join([FASTEST, *(f"{op}=compiled" for op in operations)])
            settings[f"without {group}"] = (without, False)
            settings[f"without {group}, in a compiled block"] = (without, True)
    return settings


def time_block(case: BlockCase, samples: int) -> list[dict[str, Any]]:
    """Returns a row for each way of running a block, which are timed in turns.

    Args:
        case: The block.
        samples: Number of measured runs of each way.
    """
    from fd_large.engine.block_wrappers import compile_blocks
    from fd_large.kernels import choose

    def timed(block: torch.nn.Module, wish: str) -> float:
        os.environ["FD_KERNELS"] = wish
        leaves = [a for a in case.arguments if isinstance(a, Tensor) and a.requires_grad]

        def run() -> None:
            outputs = block(*case.arguments)
            outputs = outputs if isinstance(outputs, tuple) else (outputs,)
            # One number each: twice the same map may come out.
            total = torch.stack([output.float().sum() for output in outputs]).sum()
            torch.autograd.grad(total, leaves + list(block.parameters()), allow_unused=True)

        return seconds(run)

    with choose.hearing() as heard:
        timed(case.block, FASTEST)
    chosen, blocks = ways({op for op, _ in heard}), {}
    times: dict[str, list[float]] = {}
    failed: dict[str, str] = {}
    for way, (_, is_compiled) in chosen.items():
        blocks[way] = copy.deepcopy(case.block)
        if is_compiled:
            compile_blocks([blocks[way]])
    for sample in range(samples + 3):
        for way, (wish, _) in chosen.items():
            if way in failed:
                continue
            try:
                taken = timed(blocks[way], wish)
            except Exception as error:  # A way that does not run here is reported.
                failed[way] = f"{type(error).__name__}: {error}"[:300]
                continue
            if sample >= 3:
                times.setdefault(way, []).append(taken)
    rows: list[dict[str, Any]] = [
        {
            "block": case.name,
            "way": way,
            "microseconds": 1e6 * statistics.median(values),
            "quartiles": [1e6 * q for q in statistics.quantiles(values, n=4)],
        }
        for way, values in times.items()
    ]
    return rows + [{"block": case.name, "way": w, "failed": why} for w, why in failed.items()]


def verdicts(rows: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Decides for each kernel whether to keep or to delete the kernel.

    Args:
        rows: The rows of `time_block` for all blocks.

    Returns: {kernel: {"ratios": {block: time without the kernel / time with it}, "delete": bool}}.
        A kernel without any ratio is kept.
    """
    by_kernel: dict[str, dict[str, Any]] = {}
    for group in GROUPS:
        ratios: dict[str, float] = {}
        for block in dict.fromkeys(row["block"] for row in rows):
            best: dict[str, float] = {}
            for side, names in (
                ("with", ("ours", "ours in a compiled block")),
                ("without", (f"without {group}", f"without {group}, in a compiled block")),
            ):
                times = [
                    row["microseconds"]
                    for row in rows
                    if row["block"] == block and row["way"] in names and "failed" not in row
                ]
                if times:
                    best[side] = min(times)
            if len(best) == 2:
                ratios[block] = best["without"] / best["with"]
        delete = bool(ratios) and max(ratios.values()) <= TOLERANCE
        by_kernel[group] = {"ratios": ratios, "delete": delete}
    return by_kernel


def whole_blocks(samples: int) -> int:
    """Times all blocks, and prints and writes which kernels to delete; returns the exit code.

    Args:
        samples: Number of measured runs of each way.
    """
    rows: list[dict[str, Any]] = []
    for make in block_cases():
        timings = time_block(make(), samples)
        rows += timings
        for row in timings:
            taken = row.get("failed") or f"{row['microseconds']:9.0f} us"
            print(f"{row['block']:52} {row['way']:48} {taken}", flush=True)
        decided = verdicts(rows)
        # After each, so that a time limit leaves what was timed, and says what it means.
        write("kernels_blocks.json", {"rows": rows, "kernels": decided})
        for group, verdict in decided.items():
            ratios = ", ".join(f"{ratio:.3f}" for ratio in verdict["ratios"].values())
            decision = "DELETE" if verdict["delete"] else "keep"
            print(f"{decision:6} {group}: without it {ratios or 'not timed'}", flush=True)
    return 0


def norm_questions(compiled: bool) -> list[Question]:
    """Returns the questions about residual_norm, layer_norm and add_norm.

    Args:
        compiled: Whether torch.compile is compared, too.
    """
    from fd_large.kernels import residual_norm as rn
    from fd_large.kernels.add_norm import add_norm, add_norm_reference

    def random(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
        return torch.randn(shape, device=DEVICE).to(dtype).requires_grad_()

    def against(kernel: Callable, plain: Callable) -> dict[str, Callable]:
        contenders = {"triton (ours)": kernel, "torch": plain}
        return contenders | ({"torch.compile": torch.compile(plain)} if compiled else {})

    questions = []
    sizes = ((512, 48 * 48), (1024, 24 * 24), (2048, 12 * 12), (4096, 36))
    for width, tokens in ((32, 4),) if DEVICE == "cpu" else sizes:
        n, scale = IMAGES * tokens * width, torch.ones(IMAGES, device=DEVICE)
        for stream, s in ((torch.float32, 4), (BF16, 2)):
            narrow = stream == torch.float32
            questions.append(
                Question(
                    f"residual_norm {width}, {str(stream)[6:]} stream",
                    # Stream in and out, branch, and the copy of a wide stream.
                    n * (2 * s + 2 + 2 * narrow),
                    # Gradients of stream and copy, branch; the branch's and the stream's out.
                    n * (s + 2 + 2 + 2 + s),
                    [random(IMAGES, tokens, width, dtype=stream), random(IMAGES, tokens, width)]
                    + [random(width) for _ in range(3)],
                    against(
                        lambda x, f, w, b, c, scale=scale: rn.residual_norm(
                            x, f, w, b, 1e-5, scale, copy=BF16, branch_bias=c
                        ),
                        lambda x, f, w, b, c, scale=scale: rn.residual_norm_reference(
                            x, f, w, b, 1e-5, scale, c, BF16
                        ),
                    ),
                )
            )
        plain = against(
            lambda x, w, b: rn.layer_norm(x, w, b, 1e-5),
            lambda x, w, b: rn.layer_norm_reference(x, w, b, 1e-5, x.dtype),
        )
        norm = [random(IMAGES, tokens, width), random(width), random(width)]
        question = Question(f"layer_norm {width}", 4 * n, 6 * n, norm, plain | other_norms())
        questions.append(question)
    width, tokens = (32, 5) if DEVICE == "cpu" else (768, 197)
    n, scale = IMAGES * tokens * width, torch.ones(IMAGES, device=DEVICE)
    questions.append(
        Question(
            f"add_norm {width}, float32 stream",
            n * (4 + 2 + 4 + 2),
            n * (4 + 2 + 4 + 2 + 4 + 2),
            [random(IMAGES, tokens, width, dtype=torch.float32), random(IMAGES, tokens, width)]
            + [random(width) for _ in range(3)],
            against(
                lambda x, f, w, b, g: add_norm(x, f, w, b, 1e-6, scale, g, dtype=BF16),
                lambda x, f, w, b, g: add_norm_reference(x, f, w, b, 1e-6, scale, g, BF16),
            ),
        )
    )
    return questions


def other_norms() -> dict[str, Callable]:
    """Returns the LayerNorms of other packages that are installed, {"apex" or "liger": function}.

    A function takes the input, the weight and the bias.
    """
    from fd_large.kernels import choose

    norms: dict[str, Callable] = {}
    if choose.has_nvidia_apex():
        norm = choose.apex_layer_norm()
        norms["apex"] = lambda x, w, b: norm(x, w, b, w.shape, 1e-5)
    try:
        liger = importlib.import_module("liger_kernel.ops.layer_norm").LigerLayerNormFunction
        norms["liger"] = lambda x, w, b: liger.apply(x, w, b, 1e-5)
    except ImportError:
        pass
    return norms


def attention_questions(quick: bool) -> list[Question]:
    """Returns the questions about window attention, at the sizes of SwinV2's windows.

    Args:
        quick: Whether to compare flex_attention, which takes long to compile, at large windows
            only.
    """
    from torch.nn.attention.flex_attention import flex_attention

    from fd_large.kernels.window_attention import window_attention

    flex = torch.compile(flex_attention)
    questions = []
    sizes = ((8, 64, 16), (12, 48, 16), (16, 64, 16), (24, 48, 16), (48, 48, 16))
    for window, side, heads in ((4, 4, 1),) if DEVICE == "cpu" else sizes:
        batch, width, n = IMAGES // 4, heads * 32, window * window
        qkv = torch.randn(batch, side, side, 3 * width, device=DEVICE).to(BF16).requires_grad_()
        table = torch.rand((2 * window - 1) ** 2, heads, device=DEVICE).mul(16).requires_grad_()
        scale = torch.full((heads,), 10.0, device=DEVICE).requires_grad_()

        def ours(qkv, table, scale, window=window, heads=heads):
            return window_attention(
                qkv, num_heads=heads, window=window, shift=window // 2, scale=scale, cosine=True,
                table=table, memory="recompute",
            )  # fmt: skip

        def by_flex(qkv, table, scale, window=window, heads=heads, batch=batch, side=side):
            # Without the shift's mask, and with windows cut and put back by copies.
            count = side // window
            q, k, v = (
                qkv.view(batch, count, window, count, window, 3, heads, 32)
                .permute(5, 0, 1, 3, 6, 2, 4, 7)
                .reshape(3, batch * count * count, heads, window * window, 32)
            )
            q = (F.normalize(q.float(), dim=-1) * scale.view(-1, 1, 1)).to(q.dtype)
            k = F.normalize(k.float(), dim=-1).to(k.dtype)

            def bias(score, _b, h, i, j):
                dy = i // window - j // window + window - 1
                dx = i % window - j % window + window - 1
                return score + table[dy * (2 * window - 1) + dx, h]

            return flex(q, k, v, score_mod=bias, scale=1.0)

        tokens = batch * side * side
        questions.append(
            Question(
                f"window_attention {window}, {heads} heads of 32",
                tokens * width * 2 * 4,
                tokens * width * 2 * (3 + 1 + 1 + 3),
                [qkv, table, scale],
                {"triton (ours)": ours}
                | ({} if quick and window < 24 else {"flex_attention": by_flex}),
                flops=4.0 * tokens * n * width,
            )
        )
    return questions


def copy_bandwidth() -> float:
    """Returns the bytes per second, read plus written, of copying 1 GiB on the device."""
    size = 2**20 if DEVICE == "cpu" else 2**30
    source = torch.empty(size, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    samples = [seconds(lambda: target.copy_(source)) for _ in range(20)]
    return 2 * source.numel() / statistics.median(samples[5:])


def seconds(call: Callable[[], Any]) -> float:
    """Returns the seconds that a call takes on the GPU, or on the CPU with --dry."""
    if DEVICE == "cpu":
        began = time.perf_counter()
        call()
        return time.perf_counter() - began
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def answer(question: Question, samples: int, bandwidth: float) -> None:
    """Times the implementations of a question in turns, and adds their rows to `question.rows`.

    Args:
        question: The question.
        samples: Number of measured runs of each implementation.
        bandwidth: Bytes per second of a copy.
    """
    flush = torch.empty(2**10 if DEVICE == "cpu" else 2**28, dtype=torch.uint8, device=DEVICE)
    times: dict[str, tuple[list[float], list[float]]] = {}
    failed = {}
    for sample in range(samples + 3):
        for name, call in question.contenders.items():
            if name in failed:
                continue
            try:
                forward, backward = once(call, question.inputs, flush)
            except Exception as error:  # A contender that does not run here is reported.
                failed[name] = f"{type(error).__name__}: {error}"[:300]
                continue
            if sample >= 3:
                pair = times.setdefault(name, ([], []))
                pair[0].append(forward)
                pair[1].append(backward)
    for name, pair in times.items():
        for way, values, moved, work in (
            ("forward", pair[0], question.bytes_forward, question.flops),
            ("backward", pair[1], question.bytes_backward, 2.5 * question.flops),
        ):
            median = statistics.median(values)
            question.rows.append(
                {
                    "operation": question.name,
                    "way": way,
                    "by": name,
                    "microseconds": 1e6 * median,
                    "quartiles": [1e6 * q for q in statistics.quantiles(values, n=4)],
                    "gigabytes_per_second": moved / median / 1e9,
                    "share_of_copy": moved / median / bandwidth,
                    "tflops": work / median / 1e12 or None,
                }
            )
    question.rows += [
        {"operation": question.name, "by": name, "failed": why} for name, why in failed.items()
    ]


def once(call: Callable, inputs: list[Tensor], flush: Tensor) -> tuple[float, float]:
    """Returns the seconds of a forward and of its backward, each with a cold cache.

    Args:
        call: The implementation.
        inputs: The arguments of the implementation.
        flush: Large tensor, which is written before each timing to empty the cache.
    """
    results: list[Any] = []
    flush.zero_()
    forward = seconds(lambda: results.append(call(*inputs)))
    outputs = results[0] if isinstance(results[0], tuple) else (results[0],)
    gradients = [torch.ones_like(output) for output in outputs]
    flush.zero_()
    backward = seconds(lambda: torch.autograd.grad(outputs, inputs, gradients, allow_unused=True))
    return forward, backward


def line(row: dict[str, Any]) -> str:
    """Returns the line of the printed table for a result of an implementation.

    Args:
        row: An entry of `Question.rows`; if the implementation did not run, with the reason.
    """
    if "failed" in row:
        return f"{row['operation']:38} {'':8} {row['by']:15} did not run: {row['failed'][:80]}"
    work = f"{row['tflops']:7.1f}" if row["tflops"] else "      -"
    return (
        f"{row['operation']:38} {row['way']:8} {row['by']:15} {row['microseconds']:9.1f} us "
        f"{row['gigabytes_per_second']:7.0f} GB/s {100 * row['share_of_copy']:5.0f}% {work} TFLOP/s"
    )


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Draws the bandwidth of each implementation, forward and backward, as a share of a copy's."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    names = list(dict.fromkeys(row["operation"] for row in rows))
    contenders = list(dict.fromkeys(row["by"] for row in rows))
    height = 0.8 / len(contenders)
    figure, axes = plt.subplots(1, 2, figsize=(13, 0.5 * len(names) + 2), sharey=True)
    for axis, way in zip(axes, ("forward", "backward"), strict=True):
        for index, by in enumerate(contenders):
            shares = {
                r["operation"]: r["share_of_copy"] for r in rows if (r["by"], r["way"]) == (by, way)
            }
            places = [i + (index - len(contenders) / 2 + 0.5) * height for i in range(len(names))]
            axis.barh(places, [100 * shares.get(name, 0) for name in names], height, label=by)
        axis.axvline(85, color="black", linewidth=0.8, linestyle=":")
        axis.set(title=way, xlabel="% of a copy's bandwidth")
    axes[0].set_yticks(range(len(names)), names)
    axes[0].invert_yaxis()
    axes[1].legend(loc="lower right")
    figure.tight_layout()
    harness.save(figure, path)


def main() -> int:
    """Runs the measurement that the flags select; returns the exit code."""
    global DEVICE, IMAGES
    arguments = parse()
    if arguments.aot:
        return ahead_of_time()
    if arguments.dry:
        DEVICE, IMAGES = "cpu", 4
    elif not torch.cuda.is_available():
        print("No CUDA device, so there is nothing to time. To compile the kernels without one:")
        print("python benchmarks/kernels.py --aot")
        return 0
    if arguments.blocks:
        return whole_blocks(2 if arguments.dry else 20)
    os.environ["FD_KERNELS"] = "triton"
    bandwidth = copy_bandwidth()
    compiled = not arguments.quick
    questions = attention_questions(arguments.quick)
    questions += norm_questions(compiled)
    print(f"copy of 1 GiB: {bandwidth / 1e9:.0f} GB/s, reads and writes counted")
    rows: list[dict[str, Any]] = []
    for question in questions:
        answer(question, 2 if arguments.dry else 15 if arguments.quick else 60, bandwidth)
        question.inputs.clear()
        rows += question.rows
        print(*map(line, question.rows), sep="\n", flush=True)
        # After each, so that a time limit leaves what was answered.
        write("kernels.json", {"copy_gigabytes_per_second": bandwidth / 1e9, "rows": rows})
    draw([row for row in rows if "failed" not in row], RESULTS / "kernels.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
