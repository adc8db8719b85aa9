"""Does a model of billions of parameters train on this machine, with the memory of `plan`?

    python benchmarks/true_size.py [--quick] [--model swinv2_giant] [--config zero3_nvme] [--resume]
    python benchmarks/true_size.py --model swinv2_1b --teacher timm:vit_7b_patch16_dinov3 --learn

It trains the student of `fd_swinv2g` (or another SwinV2) by the ordinary `train`, in one process.
The teacher is of the same or another size, with random weights in a bfloat16 safetensors file,
which the benchmark writes. The images are photographs from Python packages, one per step. It
records the seconds and the memory of each part of the run, from the start to the last step; the
bytes of all tensors between two steps, in memory, in files and on disk, beside those that `plan`
expects; and the loss of each step. With --resume, the run saves after half of its steps, is killed
while it writes its last checkpoint, and is started again; its losses and gradient norms must then
be equal to the bit. With --learn, all steps have the same batch, whose loss must fall. --quick uses
a small model.

All files are in a new folder inside --scratch, which is removed at the end. The files take 2 bytes
for each parameter of the teacher, and for each parameter of the student 16 bytes of state on disk
(with zero3_nvme) and 12 bytes in each of two checkpoints. A teacher of 7B parameters with a student
of 1B takes 31 GB, and with a student of 3B 62 GB. Writes benchmarks/results/true_size_MODEL.json,
or _MODEL_from_TEACHER.json.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import harness
from harness import RESULTS, ROOT

sys.path[:0] = [str(ROOT), *map(str, (ROOT / "tests/support").iterdir())]

IMPORTING, BETWEEN = "importing", "between steps"
PASSES, STEP = "teacher, forward, backward", "optimiser step"
TEACHER, STATE, NOTES = "teacher.safetensors", "state", "notes.jsonl"
QUICK, QUICK_TEACHER = "swinv2_tiny", "timm:vit_small_patch16_dinov3"
LEARN_STEPS = 5
PATIENCE = 3600.0  # Seconds without a new part of a run.


def parse() -> argparse.Namespace:
    """Returns the parsed flags of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="swinv2_giant", help="student, and teacher")
    parser.add_argument("--teacher", default="", help="the teacher, where it is another model")
    parser.add_argument("--config", default="zero3_nvme", help="name of a file in ds_configs/")
    parser.add_argument("--steps", type=int, help=f"default: 3, with --learn {LEARN_STEPS}")
    parser.add_argument("--learn", action="store_true", help="the same batch in all steps")
    parser.add_argument("--resume", action="store_true", help="also save, kill and resume")
    parser.add_argument("--scratch", type=Path, help="a folder on a local disk; default: /tmp's")
    parser.add_argument("--quick", action="store_true", help=f"{QUICK} instead")
    parser.add_argument("--out", type=Path, help="the file of the results")
    parser.add_argument("--as-run", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    arguments.steps = arguments.steps or (LEARN_STEPS if arguments.learn else 3)
    if arguments.quick:
        arguments.model = QUICK
        arguments.teacher = arguments.teacher and QUICK_TEACHER
    arguments.teacher = arguments.teacher or arguments.model
    return arguments


# What runs in the process that trains.


class Parts(threading.Thread):
    """Thread that records the parts of this process's work, with their time and peak memory.

    Args:
        path: File to which a line is added at the end of each part.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(daemon=True)
        self._path, self._lock = path, threading.Lock()
        self._begin("")

    def run(self) -> None:
        """Samples memory until the process ends."""
        while True:
            with self._lock:
                self._look()
            time.sleep(0.05)

    def now(self, part: str) -> None:
        """Ends the present part, writes its record, and begins the part with the name `part`.

        Does nothing if the present part has this name.
        """
        with self._lock:
            if part == self._part:
                return
            self._look()
            self.write(
                part=self._part,
                seconds=time.time() - self._began,
                cpu_seconds=time.process_time() - self._cpu,
                bytes_read=moved_bytes()[0] - self._moved[0],
                bytes_written=moved_bytes()[1] - self._moved[1],
                most=self._most,
                at_the_end=resident(),
            )
            self._begin(part)

    def write(self, **line: Any) -> None:
        """Adds a line to the file of records, a JSON object with the entries `line`."""
        with self._path.open("a") as file:
            file.write(json.dumps(line) + "\n")

    def _begin(self, part: str) -> None:
        self._part, self._began, self._cpu = part, time.time(), time.process_time()
        self._moved, self._most = moved_bytes(), dict.fromkeys(resident(), 0)

    def _look(self) -> None:
        self._most = {name: max(most, self._most[name]) for name, most in resident().items()}


def resident() -> dict[str, int]:
    """Returns the bytes of this process in memory: `anonymous`, and `files` for pages of files.

    The system drops pages of files when memory is short.
    """
    lines = Path("/proc/self/status").read_text().splitlines()
    kilobytes = {
        name: int(line.split()[1]) for line in lines if (name := line.split(":")[0])[:3] == "Rss"
    }
    return {
        "anonymous": 1024 * kilobytes["RssAnon"],
        "files": 1024 * (kilobytes["RssFile"] + kilobytes["RssShmem"]),
    }


def moved_bytes() -> tuple[int, int]:
    """Returns two numbers of bytes, which this process has read from disks and written to disks."""
    lines = Path("/proc/self/io").read_text().splitlines()
    counts = {name: int(count) for name, count in (line.split(": ") for line in lines)}
    return counts["read_bytes"], counts["write_bytes"]


def tensor_bytes(teacher: Path, state: Path) -> dict[str, int]:
    """Returns the bytes of all existing tensors: in memory, in the teacher's file and on disk.

    Args:
        teacher: File of the teacher's weights, which is mapped.
        state: Folder of the state on disk, whose files are mapped.
    """
    from tensor_storages import storages

    names = {str(teacher): "teacher's file", str(state): "on disk"}
    spans = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        ends, *_, path = line.split(maxsplit=5) if line.count(" ") > 5 else (line.split()[0], "")
        if kind := next((kind for name, kind in names.items() if path.startswith(name)), ""):
            begin, end = (int(value, 16) for value in ends.split("-"))
            spans.append((begin, end, kind))
    totals = dict.fromkeys(["in memory", *names.values()], 0)
    for address, size in storages().items():
        kind = next((k for begin, end, k in spans if begin <= address < end), "in memory")
        totals[kind] += size
    return totals


def train_and_note(folder: Path) -> int:
    """Trains by the flags after `--`, and records parts, tensors and the bytes that `plan` expects.

    Args:
        folder: Folder of the record and the run.

    Returns: the exit code.
    """
    parts = Parts(folder / NOTES)
    parts.start()
    parts.now(IMPORTING)
    import psutil

    from fd_large.cli.ownership import owning
    from fd_large.cli.train import parse_train
    from fd_large.engine.run import train
    from fd_large.ranks import activity
    from fd_large.runtime.hooks import Hook, Setting, Update
    from fd_large.tasks.jobs import job_of

    class Watch(Hook):
        """Hook that records the parts of a step, its loss and its tensors."""

        def on_start(self, setting: Setting) -> None:
            parts.write(planned=planned_bytes(run, setting.folder))
            parts.now(BETWEEN)

        def beat(self) -> None:
            parts.now(PASSES)

        def judge(self, update: Update) -> None:
            parts.now(STEP)

        def after_update(self, update: Update) -> None:
            parts.now(BETWEEN)
            parts.write(step=update.index + 1, loss=update.loss, grad_norm=update.grad_norm)
            parts.write(
                tensors=tensor_bytes(folder / TEACHER, folder / STATE),
                loading=sum(child.memory_full_info().uss for child in psutil.Process().children()),
                **resident(),
            )

        def on_saved(self, seconds: float) -> None:
            parts.write(saved=seconds)

    def busy() -> None:
        works = activity.current()
        # Once training has begun, the hook says what is done.
        if len(works) > 0 and parts._part not in (BETWEEN, PASSES, STEP):
            parts.now(works[-1].what)

    parsed = parse_train(sys.argv[sys.argv.index("--") + 1 :])
    run = parsed.run
    if "--learn" in sys.argv:
        repeat_first_batch()
    activity.on_change.append(busy)
    with owning(run.run_dir()) as lease:
        return train(
            run, job_of, deepspeed_config=parsed.own.deepspeed_config, lease=lease, hooks=[Watch()]
        )


def repeat_first_batch() -> None:
    """Makes every step use the images and the views of the first step."""
    from fd_large.data import sampler

    each = sampler.MicroBatches.__iter__

    def first(batches: Any) -> Any:
        return itertools.repeat(next(each(batches)), len(batches))

    sampler.MicroBatches.__iter__ = first  # type: ignore[method-assign]


def planned_bytes(run: Any, folder: Path) -> dict[str, int]:
    """Returns the bytes that `plan` expects between two steps: in memory, in the file and on disk.

    Args:
        run: The recipe.
        folder: Folder of the run, with deepspeed.json.
    """
    import torch

    from fd_large.plan.memory import Placement, held
    from fd_large.tasks.jobs import job_of

    with torch.device("meta"):
        task, (teacher,) = job_of(run).models_on_shapes()
    config = json.loads((folder / "deepspeed.json").read_text())
    zero = config["zero_optimization"]
    on_disk = zero.get("offload_optimizer", {}).get("device") == "nvme"
    place = Placement.of(
        run.teacher,
        # Nothing but the place is another: state on a disk is what stage 3 holds.
        {**zero, "offload_optimizer": {}} if on_disk else zero,
        world_size=1,
        node_size=1,
        bfloat16=config["bf16"]["enabled"],
        teacher_persistence_threshold=0,
        float32_sums=config["communication_data_type"] == "fp32",
    )
    sizes = [[p.numel() for p in module.parameters()] for module in (task, teacher)]
    memory = held(*sizes, place)
    on_device = memory.device
    of_state = on_device.masters + on_device.moments + on_device.gradients if on_disk else 0
    return {
        "trained_parameters": sum(sizes[0]),
        "in memory": on_device.total + memory.host.total - on_device.teacher - of_state,
        "teacher's file": on_device.teacher,
        "on disk": of_state,
    }


# What starts it.


def write_teacher(path: Path, model: str) -> int:
    """Writes random weights of a teacher in bfloat16; returns the number of parameters.

    Every matrix is a slice of one block of normal numbers, so that writing takes seconds and little
    memory.

    Args:
        path: The file.
        model: Name of the teacher's model.
    """
    import torch

    from fd_large.checkpoint import tensor_file

    shapes = {name: torch.Size(shape) for name, shape in shapes_of(model).items()}
    numbers = torch.randn(1 << 22, generator=torch.Generator().manual_seed(3)).mul_(0.02).bfloat16()
    most = max(shape.numel() for shape in shapes.values())
    block = numbers.repeat(2 + most // numbers.numel())
    tensors = {}
    for place, (name, shape) in enumerate(shapes.items()):
        if len(shape) > 1 and "logit_scale" not in name:
            # Other stretches for other matrices, each of which begins at a multiple of 64 bytes.
            begin = 32 * (place * 7919 % (numbers.numel() // 32))
            tensors[name] = block[begin : begin + shape.numel()].view(shape)
        else:
            value = 2.3 if "logit_scale" in name else float("norm" in name and "weight" in name)
            tensors[name] = torch.full(shape, value, dtype=torch.bfloat16)
    tensor_file.write(path, tensors)
    return sum(shape.numel() for shape in shapes.values())


def shapes_of(model: str) -> dict[str, tuple[int, ...]]:
    """Returns {name: shape} of the parameters of the model with the name `model`.

    A SwinV2 is made with windows of 12 x 12 tokens, on which the shapes of its tables depend.
    """
    from fd_large.backbones.registry import parameter_shapes
    from fd_large.recipes.architectures import Architecture, resolve

    architecture = Architecture(window_size=12) if is_swin(model) else Architecture()
    return parameter_shapes(resolve(model, architecture))


def is_swin(name: str) -> bool:
    """Whether the model with the name `name` is a SwinV2 of this package."""
    return name.startswith("swinv2")


def flags_of(arguments: argparse.Namespace, folder: Path) -> list[str]:
    """Returns the flags of `train` for the measured run.

    Args:
        arguments: The flags of the benchmark.
        folder: Folder of the run and the teacher.
    """
    flags = {
        "recipe": "fd_swinv2g",
        "deepspeed_config": arguments.config,
        "student.model": arguments.model,
        "student.architecture.window_size": 12,
        "student.drop_path_rate": 0.0,  # A step of one image whose blocks drop shows nothing.
        "teacher.model": arguments.teacher,
        "teacher.source": folder / TEACHER,
        "teacher.statistics": "0.485 0.456 0.406 0.229 0.224 0.225",
        "teacher.placement": "replicated",
        "data.root": "builtin:photographs",
        "data.workers": 1,
        "batch.global_batch_size": 1,
        "batch.micro_batch_size": 1,
        "engine.precision": "bfloat16",
        "optim.base_lr": 1e-4 * 512,
        "optim.warmup_epochs": 0,
        # One more than are waited for: after its last step a run checks the teacher and saves.
        "optim.max_steps": arguments.steps + (not arguments.resume),
        "runtime.run_dir": folder / "run",
        "runtime.log_every": 1,
        "runtime.save_every": arguments.steps // 2 if arguments.resume else 2 * arguments.steps,
        "runtime.keep_last": 1,
        "runtime.watchdog_seconds": 1500,
    }
    if is_swin(arguments.teacher):
        flags["teacher.architecture.window_size"] = 12
    if arguments.config == "zero3_nvme":
        flags["engine.nvme_path"] = folder / STATE
    return [part for name, value in flags.items() for part in (f"--{name}", *str(value).split())]


def notes_of(folder: Path) -> list[dict[str, Any]]:
    """Returns the lines that the training process has recorded in `folder`, or [] before any."""
    path = folder / NOTES
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def start(arguments: argparse.Namespace, folder: Path) -> subprocess.Popen:
    """Starts the training process in a process group of its own; returns the process.

    Args:
        arguments: The flags of the benchmark.
        folder: Folder of the record, the run and the output.
    """
    run_flags = ["--as-run", folder, *(["--learn"] if arguments.learn else [])]
    command = [sys.executable, __file__, *run_flags, "--", *flags_of(arguments, folder)]
    threads = str(os.cpu_count())
    environment = {"OMP_NUM_THREADS": threads, "DS_ACCELERATOR": "cpu", **os.environ}
    with (folder / "output").open("a") as output:
        return subprocess.Popen(
            list(map(str, command)),
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            process_group=0,
        )


def follow(process: subprocess.Popen, folder: Path, until: Any) -> None:
    """Waits until a condition holds, prints the recorded lines meanwhile, and kills the process.

    Args:
        process: The training process.
        folder: Folder of the process's record and output.
        until: Function that returns whether the condition holds.

    Raises:
        SystemExit: With the end of the output, if the process ends before the condition holds, or
            records nothing for `PATIENCE` seconds.
    """
    shown, since = len(notes_of(folder)), time.time()
    try:
        while not until():
            notes = notes_of(folder)
            for note in notes[shown:]:
                print("  ", note, flush=True)
            since = time.time() if len(notes) > shown else since
            shown = len(notes)
            if process.poll() is not None or time.time() - since > PATIENCE:
                raise SystemExit((folder / "output").read_text()[-4000:])
            time.sleep(0.1)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def steps_of(notes: list[dict[str, Any]]) -> dict[int, tuple[float, float]]:
    """Returns {step: (loss, gradient norm)} from `notes`, the recorded lines.

    Lines that record no step are left out.
    """
    return {note["step"]: (note["loss"], note["grad_norm"]) for note in notes if "step" in note}


def measure(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Trains to the last step; with --resume, kills the run in its last save and resumes the run.

    Returns: the recorded lines, and the comparison of the resumed run.
    """
    (folder / STATE).mkdir()
    began = time.time()
    parameters = write_teacher(folder / TEACHER, arguments.teacher)
    print(f"teacher of {parameters:,} parameters: {time.time() - began:.0f} s", flush=True)
    last, checkpoints = arguments.steps, folder / "run" / "checkpoints"
    size = 12 * sum(map(math.prod, shapes_of(arguments.model).values()))

    def is_saving() -> bool:
        parts = checkpoints.glob(f"step_{last:08d}*.part/*.safetensors")
        return any(path.stat().st_size > size / 4 for path in parts if path.exists())

    def is_done() -> bool:
        return (checkpoints / f"step_{last:08d}").is_dir()

    def has_stepped() -> bool:
        # A step's last note is that of its tensors.
        return sum("tensors" in note for note in notes_of(folder)) == last

    process = start(arguments, folder)
    follow(process, folder, is_saving if arguments.resume else has_stepped)
    notes = notes_of(folder)
    record: dict[str, Any] = {"teacher_parameters": parameters, "notes": notes}
    record["left_in_the_folder_of_state"] = [path.name for path in (folder / STATE).iterdir()]
    if arguments.resume:
        left = sorted(path.name for path in checkpoints.iterdir())
        (folder / NOTES).rename(folder / "first.jsonl")
        follow(start(arguments, folder), folder, is_done)
        again = notes_of(folder)
        first, second = steps_of(notes), steps_of(again)
        record["resume"] = {
            "left_by_the_kill": left,
            "steps": sorted(second),
            "equal_to_the_bit": bool(second) and all(second[n] == first[n] for n in second),
            "notes": again,
        }
    return record


def summary(record: dict[str, Any]) -> dict[str, Any]:
    """Returns the results that follow from the recorded lines.

    Args:
        record: The result of `measure`.
    """
    notes = record["notes"]
    planned = next(note["planned"] for note in notes if "planned" in note)
    last_note = [note for note in notes if "tensors" in note][-1]
    importing = next(note for note in notes if note.get("part") == IMPORTING)
    baseline = importing["at_the_end"]["anonymous"]
    tensors = last_note["tensors"]
    explained = baseline + tensors["in memory"]
    parts = [note for note in notes if note.get("part")]
    began = next(place for place, part in enumerate(parts) if part["part"] == BETWEEN)
    return {
        "trained_parameters": planned.pop("trained_parameters"),
        "bytes_between_steps": {"tensors": tensors, "planned": planned},
        "tensors_over_planned": {
            kind: tensors[kind] / size for kind, size in planned.items() if size
        },
        "anonymous_bytes_between_steps": {
            "measured": last_note["anonymous"],
            "process_after_imports": baseline,
            "tensors": tensors["in memory"],
            "unexplained": last_note["anonymous"] - explained,
            "over_explained": last_note["anonymous"] / explained,
        },
        "bytes_of_the_loading_process_alone": last_note["loading"],
        "most_anonymous_bytes": max(part["most"]["anonymous"] for part in parts),
        "most_bytes_of_files": max(part["most"]["files"] for part in parts),
        "seconds_to_the_first_step": sum(part["seconds"] for part in parts[:began]),
        "steps": [{"loss": loss, "grad_norm": norm} for loss, norm in steps_of(notes).values()],
        "parts": parts,
    }


def main() -> int:
    """Measures, prints and writes the results; returns the exit code."""
    arguments = parse()
    # So that nothing is left behind either way.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended"))
    where = arguments.scratch or Path(tempfile.gettempdir())
    folder = Path(tempfile.mkdtemp(prefix="true_size_", dir=where))
    try:
        record = measure(arguments, folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    results = {
        **harness.conditions(__file__, __doc__),
        "model": arguments.model,
        "teacher": arguments.teacher,
        "teacher_parameters": record["teacher_parameters"],
        "left_in_the_folder_of_state": record["left_in_the_folder_of_state"],
        **summary(record),
    }
    if again := record.get("resume"):
        parts = [note for note in again.pop("notes") if note.get("part")]
        results["resume"] = {**again, "parts": parts}
    if arguments.learn:
        losses = [step["loss"] for step in results["steps"]]
        falls = all(after < before for before, after in itertools.pairwise(losses))
        results["learns_one_batch"] = {"losses": losses, "falls_in_each_step": falls}
    name = arguments.model
    if arguments.teacher != name:
        name += f"_from_{arguments.teacher.removeprefix('timm:')}"
    harness.write(results, arguments.out or RESULTS / f"true_size_{name}.json")
    show(results)
    return 0


def show(results: dict[str, Any]) -> None:
    """Prints the results."""
    anonymous = results["anonymous_bytes_between_steps"]
    print(f"{results['model']}: {results['trained_parameters']:,} trained parameters")
    for part in results["parts"]:
        most, (read, written) = part["most"], (part["bytes_read"], part["bytes_written"])
        print(
            f"  {part['part'][:50]:50} {part['seconds']:7.1f} s, anonymous "
            f"{most['anonymous'] / 1e9:6.2f} GB, files {most['files'] / 1e9:6.2f} GB, "
            f"read {read / 1e9:5.1f}, written {written / 1e9:5.1f} GB"
        )
    for number, step in enumerate(results["steps"], 1):
        print(f"  step {number}: loss {step['loss']:.5f}, gradient norm {step['grad_norm']:.3f}")
    if "learns_one_batch" in results:
        print(
            f"  one batch, each loss smaller: {results['learns_one_batch']['falls_in_each_step']}"
        )
    print(f"  tensors / plan: {results['tensors_over_planned']}")
    print(
        f"  anonymous memory between steps {anonymous['measured'] / 1e9:.2f} GB: "
        f"{anonymous['over_explained']:.3f} of tensors and imports, "
        f"{anonymous['unexplained'] / 1e9:.2f} GB unexplained"
    )
    if "resume" in results:
        print(f"  resumed, equal to the bit: {results['resume']['equal_to_the_bit']}")


if __name__ == "__main__":
    if "--as-run" in sys.argv:
        code = train_and_note(Path(sys.argv[sys.argv.index("--as-run") + 1]))
        os._exit(code)
    raise SystemExit(main())
