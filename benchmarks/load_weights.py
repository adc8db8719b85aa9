"""How much memory and time does each rank take to load a large model under ZeRO-3?

    python benchmarks/load_weights.py [--quick]

Two CPU ranks load a ViT of more than 300M parameters from a .pth and from a .safetensors file, and
end with their shards of bf16 weights and exact float32 master weights. Two loaders take turns, each
in new processes: this package's, and a naive one, by which every rank reads the whole file into a
whole float32 model and partitions it afterwards. A thread samples how much anonymous memory
(RssAnon) grows from just before building. Writes benchmarks/results/load_weights.json and .png.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import tempfile
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import harness
from harness import RESULTS, ROOT

sys.path.insert(0, str(ROOT))

LOADERS = ("fd_large", "naive")
FILES = ("weights.pth", "weights.safetensors")
RANKS = 2
ALLOWANCE = 200e6


class PeakMemory(threading.Thread):
    """Thread that samples the anonymous memory of this process, to find its peak growth.

    Args:
        seconds_between: Seconds between two samples.
    """

    def __init__(self, seconds_between: float = 0.002) -> None:
        super().__init__(daemon=True)
        self._between, self._done = seconds_between, threading.Event()
        self._before = self._peak = anonymous_bytes()
        self.samples = 0

    def run(self) -> None:
        """Samples the memory until `stop` is called."""
        while not self._done.wait(self._between):
            self._peak = max(self._peak, anonymous_bytes())
            self.samples += 1

    def stop(self) -> dict[str, int]:
        """Stops sampling; returns the peak growth and the growth that stays (`after`), in bytes."""
        self._done.set()
        self.join()
        after = anonymous_bytes()
        return {"peak": max(self._peak, after) - self._before, "after": after - self._before}


def anonymous_bytes() -> int:
    """Returns the bytes of this process's memory that no file backs (RssAnon)."""
    with open("/proc/self/status") as status:
        line = next(line for line in status if line.startswith("RssAnon:"))
    return int(line.split()[1]) * 1024


def parse() -> argparse.Namespace:
    """Returns the parsed flags of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a smaller model, one round")
    parser.add_argument("--rounds", type=int, default=3, help="loads of each kind")
    parser.add_argument("--files", nargs="+", choices=FILES, default=FILES)
    parser.add_argument("--out", type=Path, default=RESULTS / "load_weights.json")
    parser.add_argument("--as-rank", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--loader", choices=LOADERS, help=argparse.SUPPRESS)
    return parser.parse_args()


def named(quick: bool) -> str:
    """Returns the name of the model to load, a ViT-B if `quick` and otherwise a ViT-L."""
    return "vit_base_patch16" if quick else "vit_large_patch14"


def write_files(folder: Path, name: str) -> dict[str, int]:
    """Writes random weights of the model `name` to `folder`, as .pth and as .safetensors file.

    Returns: `parameters`, their number, and `largest_tensor`, the number of elements of the largest
        tensor.
    """
    import torch
    from safetensors.torch import save_file

    from fd_large.backbones.registry import build

    state = build(name, initialization="official", seed=1).state_dict()
    torch.save({"model": state}, folder / "weights.pth")
    save_file(state, folder / "weights.safetensors")
    sizes = [tensor.numel() for tensor in state.values()]
    return {"parameters": sum(sizes), "largest_tensor": max(sizes)}


def load(path: Path, name: str, loader: str) -> dict[str, Any]:
    """Loads a file on this rank.

    Every rank has to call this function.

    Args:
        path: The file.
        name: Name of the model.
        loader: "fd_large" for this package's loader, or "naive".

    Returns: seconds, memory in bytes, and a hash of all ranks' weights.
    """
    import torch
    from safetensors.torch import load_file

    from fd_large.backbones.registry import build
    from fd_large.engine.student import student_weights
    from fd_large.engine.zero import partition, start
    from fd_large.engine.zero.fingerprint import fingerprint
    from fd_large.engine.zero.partition import load_weights
    from fd_large.ranks import distributed
    from fd_large.recipes import registry
    from fd_large.tasks.jobs import job_of
    from fd_large.weights.resolve import Sources

    torch.set_num_threads(1)
    distributed.start()
    start.start()
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
    }
    run = registry.get("fd_clip_vit_base")
    run = replace(run, student=replace(run.student, model=name, init=str(path)))

    def whole() -> torch.nn.Module:
        model = build(name, initialization="official")
        is_torchs = path.suffix == ".pth"
        read = torch.load(path, "cpu", weights_only=True) if is_torchs else load_file(path)
        model.load_state_dict(read.get("model", read))
        return model

    distributed.barrier()
    memory, begin = PeakMemory(), time.perf_counter()
    memory.start()
    if loader == "naive":
        model = partition.build(whole, config, partitioned=True, seed=0, whole_first=True)
    else:
        sources = Sources()
        run = job_of(run).settle(sources)
        model = partition.build(
            lambda: build(name, initialization="official"), config, partitioned=True, seed=0
        )
        load_weights(
            model,
            student_weights(run.student, sources, image_size=run.data.image_size),
            where="--student.init",
        )
    hashed = time.perf_counter()
    digest = fingerprint(model)
    begin += time.perf_counter() - hashed  # Not part of loading.
    masters = partition.to_bfloat16(model, keep_exact=True)
    distributed.barrier()
    seconds = time.perf_counter() - begin
    grown = memory.stop()
    assert sum(master.numel() for master in masters.values()) > 0
    return {
        "seconds": seconds,
        "peak_bytes": grown["peak"],
        "bytes_after": grown["after"],
        "samples": memory.samples,
        "fingerprint": digest,
    }


def start_ranks(path: Path, arguments: argparse.Namespace, loader: str) -> list[dict[str, Any]]:
    """Loads a file of weights once in new processes; returns the measurements of each rank.

    Args:
        path: The file.
        arguments: The flags.
        loader: "fd_large" for this package's loader, or "naive".
    """
    flags = ["--as-rank", path, "--loader", loader, *(["--quick"] if arguments.quick else [])]
    code = harness.start(__file__, *flags, ranks=RANKS)
    if code:
        sys.exit(f"load_weights: the ranks ended with {code}")
    return [json.loads(found_of(path, rank).read_text()) for rank in range(RANKS)]


def found_of(path: Path, rank: int) -> Path:
    """Returns the file to which a rank writes its measurements.

    Args:
        path: The file of weights.
        rank: The rank.
    """
    return path.with_name(f"found-{rank}.json")


def draw(results: dict[str, Any], path: Path) -> None:
    """Draws peak memory and time of both loaders, for both kinds of file."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(8.4, 3.4), layout="constrained")
    files = list(results["loads"]["naive"])
    colors = {"fd_large": "#4477aa", "naive": "#bb5566"}
    for place, loader in enumerate(LOADERS):
        at = [i + 0.38 * (place - 0.5) for i in range(len(files))]
        cases = [results["loads"][loader][file] for file in files]
        for axes, values in (
            (left, [case["peak_bytes"] / 1e9 for case in cases]),
            (right, [case["median_seconds"] for case in cases]),
        ):
            bars = axes.bar(at, values, width=0.36, color=colors[loader], label=loader)
            axes.bar_label(bars, fmt="%.2f" if axes is left else "%.1f", size=8, padding=2)
    left.axhline(results["bound_bytes"] / 1e9, color="0.3", linestyle="--", linewidth=1)
    left.annotate(
        "bound", (0.5, results["bound_bytes"] / 1e9), va="bottom", ha="center", size=8, color="0.3"
    )
    left.set_ylabel("peak growth of RssAnon per rank, GB")
    right.set_ylabel("seconds to load (median)")
    for axes in (left, right):
        axes.set_xticks(range(len(files)), [Path(file).suffix for file in files])
        axes.margins(y=0.15)
    left.legend(frameon=False, loc="upper right")
    figure.suptitle(
        f"{results['parameters'] / 1e6:.0f}M parameters onto {RANKS} CPU ranks under ZeRO-3",
        size=10,
    )
    harness.save(figure, path)


def bound(sizes: dict[str, int]) -> int:
    """Returns the bytes of memory that a rank may take to load the model.

    The limit is the sum of the rank's shards in bf16 and float32, the largest tensor in float32,
    and `ALLOWANCE`.

    Args:
        sizes: The result of `write_files`.
    """
    share = -(-sizes["parameters"] // RANKS)
    return int((2 + 4) * share + 4 * sizes["largest_tensor"] + ALLOWANCE)


def main() -> int:
    """Starts the ranks, or loads as one of them with --as-rank; returns the exit code."""
    arguments = parse()
    name = named(arguments.quick)
    if arguments.as_rank:
        figures = load(arguments.as_rank, name, arguments.loader)
        from fd_large.ranks import distributed

        found_of(arguments.as_rank, distributed.rank()).write_text(json.dumps(figures))
        return distributed.leave(0)
    rounds = 1 if arguments.quick else arguments.rounds
    scratch = Path(tempfile.mkdtemp(prefix="load_weights_"))
    loads: dict[str, dict[str, list]] = {
        loader: {file: [] for file in arguments.files} for loader in LOADERS
    }
    try:
        sizes = write_files(scratch, name)
        for _ in range(rounds):
            for file in arguments.files:
                for loader in LOADERS:
                    loads[loader][file].append(start_ranks(scratch / file, arguments, loader))
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    hashes = {
        rank["fingerprint"]
        for files in loads.values()
        for turns in files.values()
        for turn in turns
        for rank in turn
    }
    results = {
        **harness.conditions(__file__, __doc__, ("torch", "deepspeed", "safetensors")),
        "net": name,
        **sizes,
        "ranks": RANKS,
        "bound_bytes": bound(sizes),
        "same_masters": len(hashes) == 1,
        "loads": {
            loader: {file: summary(turns) for file, turns in files.items()}
            for loader, files in loads.items()
        },
    }
    harness.write(results, arguments.out)
    draw(results, arguments.out.with_suffix(".png"))
    return show(results)


def summary(turns: list[list[dict[str, Any]]]) -> dict[str, Any]:
    """Returns the largest peak of all ranks and loads, the seconds, and all single peaks.

    Args:
        turns: The measurements of each rank, for each load.
    """
    seconds = [max(rank["seconds"] for rank in turn) for turn in turns]
    return {
        "peak_bytes": max(rank["peak_bytes"] for turn in turns for rank in turn),
        "peak_bytes_by_rank": [[rank["peak_bytes"] for rank in turn] for turn in turns],
        "bytes_after": max(rank["bytes_after"] for turn in turns for rank in turn),
        "median_seconds": statistics.median(seconds),
        "seconds": seconds,
    }


def show(results: dict[str, Any]) -> int:
    """Prints the results; returns 1 if a bound is exceeded or the weights differ, else 0."""
    print(f"{results['net']}: {results['parameters']:,} parameters, {RANKS} ranks, ZeRO-3")
    files = list(results["loads"]["naive"])
    for file in files:
        for loader in LOADERS:
            case = results["loads"][loader][file]
            print(
                f"  {file:20} {loader:9} peak {case['peak_bytes'] / 1e6:7.0f} MB per rank, "
                f"{case['median_seconds']:5.1f} s"
            )
    worst = max(results["loads"]["fd_large"][file]["peak_bytes"] for file in files)
    is_within = worst < results["bound_bytes"]
    print(f"  bound {results['bound_bytes'] / 1e6:.0f} MB: {'kept' if is_within else 'BROKEN'}")
    least = min(results["loads"]["naive"][file]["peak_bytes"] for file in files)
    if results["bound_bytes"] >= least:
        print(f"  the bound separates nothing: the naive loader takes {least / 1e6:.0f} MB")
    print(f"  masters of all loads {'equal' if results['same_masters'] else 'DIFFER'}")
    return 0 if is_within and results["same_masters"] else 1


if __name__ == "__main__":
    sys.exit(main())
