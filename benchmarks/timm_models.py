"""Which models of timm can be teachers or students, and is the adapter's map equal to timm's?

    python benchmarks/timm_models.py [--work FILE] [--only PATTERN] [--again refused|crashed]
    python benchmarks/timm_models.py --students [--work FILE] [--only PATTERN]

Every model in `timm.list_models()` runs as a whole on the meta device, at its own image size. The
adapter finds a feature map in the output of `forward_features`, or refuses the model. Then the
smallest model of each class is built as a teacher with random weights, in float32, and its map is
compared with timm's, also at another image size if the model takes one. If a class has another map
in `forward_features` than the last of `forward_intermediates`, all its models of up to 400M
parameters are compared.

`--students` tests every model as a student: four images pass forward and backward on the meta
device in training mode, with batch norms in groups of two, and each trained parameter must get a
gradient.

Child processes with limited memory test the models, so that a crash ends only one child. Answers
are kept in FILE, a line for each, and are not computed again. The table is written to
benchmarks/results/timm_models.json.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
import warnings
from collections import defaultdict
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

RESULT = Path(__file__).parent / "results" / "timm_models.json"
NAMES_A_CHILD, CHILD_BYTES, CHILD_SECONDS = 120, 12 * 2**30, 1800
LARGEST, TOLERANCE = 400_000_000, 1e-5
SMALL_SIDE = 96
"""Side in pixels of the images for models that take any size, where maps are compared."""


def shapes_of(name: str) -> dict[str, Any]:
    """Runs timm's model `name` on the meta device, and finds the feature map in its output.

    Returns: shape and stride of the map, or under `refused` the reason why there is none.
    """
    import timm
    import torch

    from fd_large.backbones.timm.models import create, layout_of
    from fd_large.errors import FDError

    answer: dict[str, Any] = {"name": name}
    try:
        with torch.device("meta"):
            whole: Any = create(name).eval()
        answer["class"] = type(whole).__name__
        answer["parameters"] = sum(p.numel() for p in whole.parameters())
        side = timm.get_pretrained_cfg(name).input_size[-1]
        with torch.no_grad():
            returned = whole.forward_features(torch.empty(2, 3, side, side, device="meta"))
        layout = layout_of(whole, name, side, returned)
    except FDError as error:
        return answer | {"refused": str(error)}
    return answer | {"side": side, "map": [*layout.grid, layout.width], "stride": layout.stride}


def numbers_of(name: str) -> dict[str, Any]:
    """Compares the adapter's map of the model `name` with timm's, at one or two image sizes.

    The weights are random.

    Returns: {"at SIDE": the largest relative difference, or the adapter's refusal} for each image
        size; the model's name; and the result of `is_last`.
    """
    import timm
    import torch

    from fd_large.backbones.timm.models import can_resize, last_map, sized
    from fd_large.backbones.timm.timm_backbone import TimmBackbone
    from fd_large.errors import FDError

    size, layout = sized(name, 0), last_map(name, 0).layout
    sides, stride = [size.side], layout.stride
    if not size.is_only and layout.is_regular:
        sides = [-(-SMALL_SIDE // stride) * stride]
    elif can_resize(name):
        other = 224 // stride * stride
        sides.append(other if other != size.side else other * 2 // 3 // stride * stride)
    answer: dict[str, Any] = {"name": name}
    for side in sides:
        try:
            ours = TimmBackbone(name, image_size=0 if side == size.side else side).eval()
        except FDError as error:
            answer[f"at {side}"] = str(error)
            if side != size.side and len(sides) == 1:
                sides.append(size.side)
            continue
        arguments = sized(name, side).arguments
        whole: Any = scattered(timm.create_model(name, **arguments)).eval()
        state = whole.state_dict()
        ours.net.load_state_dict({key: state[key] for key in ours.net.state_dict()})
        images = torch.randn(1, 3, side, side)
        with torch.no_grad():
            tokens = ours(images).tokens
            theirs = in_tokens(whole.forward_features(images), ours.width)[:, -tokens.shape[1] :]
            error = (tokens - theirs).abs().max() / theirs.abs().max()
            answer[f"at {side}"] = float(f"{error:.1e}")
            if "is_last_intermediate" not in answer:
                answer["is_last_intermediate"] = is_last(whole, images, theirs)
    return answer


def student_of(name: str) -> dict[str, Any]:
    """Runs forward and backward of timm's model `name` as a student, on the meta device.

    Returns: facts about the model; under `refused` or `difference`, the reason why it cannot train.
    """
    import torch

    from fd_large.backbones import batch_norm
    from fd_large.backbones.timm.models import sized
    from fd_large.backbones.timm.timm_backbone import TimmBackbone
    from fd_large.errors import FDError

    answer: dict[str, Any] = {"name": name}
    try:
        side = sized(name, 0).side
        with torch.device("meta"):
            net = TimmBackbone(name, drop_path_rate=0.1, is_trained=True).train()
        norms = batch_norm.norms_of(net)
        for groups in {norm.norm_groups for norm in norms}:
            groups.size = 2
        net(torch.empty(4, 3, side, side, device="meta")).tokens.sum().backward()
    except FDError as error:
        return answer | {"refused": str(error)}
    without = [key for key, p in net.named_parameters() if p.requires_grad and p.grad is None]
    if without:
        answer["difference"] = f"without a gradient: {', '.join(without[:3])}"
    return answer | {
        "batch_norms": len(norms),
        "drop_path": any(net.drop_path_rates),
        "blocks": len(net.blocks()),
    }


def is_last(whole: Any, images: Any, theirs: Any) -> bool:
    """Whether a map is the last of timm's `forward_intermediates`, with or without a final norm.

    Args:
        whole: The model of timm.
        images: The images.
        theirs: The map, (B, N, C).
    """
    import torch

    last = [len(whole.feature_info) - 1]
    for norm in (True, False):
        try:
            (inner,) = whole.forward_intermediates(
                images, indices=last, norm=norm, output_fmt="NCHW", intermediates_only=True
            )
        except (AssertionError, RuntimeError, TypeError, ValueError):
            continue
        inner = inner.flatten(2).transpose(1, 2)
        if inner.shape == theirs.shape and torch.allclose(inner, theirs, rtol=1e-4, atol=1e-5):
            return True
    return False


def in_tokens(features: Any, width: int) -> Any:
    """Returns features of timm as tokens (B, N, C).

    Args:
        features: The features in the layout NLC, NHWC or NCHW.
        width: Number of channels C.
    """
    if features.dim() == 3:
        return features
    is_last = features.shape[-1] == width and features.shape[1] != width
    return features.flatten(1, 2) if is_last else features.flatten(2).transpose(1, 2)


def scattered(net: Any) -> Any:
    """Changes norms, biases and running statistics of the model `net` to random values.

    Otherwise they have their defaults, by which errors would not show.

    Returns: `net`, which is changed in place.
    """
    import torch

    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, tensor in (*net.named_parameters(), *net.named_buffers()):
            if name.endswith("running_var"):
                tensor.uniform_(0.5, 2, generator=generator)
            elif name.endswith("running_mean") or (tensor.dim() == 1 and tensor.requires_grad):
                tensor.add_(torch.randn(tensor.shape, generator=generator) * 0.1)
    return net


def family_of(name: str) -> str:
    """Returns the name of the module in timm.models that defines the model `name`."""
    import timm

    return timm.model_entrypoint(name).__module__.rpartition(".")[2]


def child(task: str, work: Path) -> None:
    """Tests the models named on standard input, and adds a line of results for each to a file.

    Args:
        task: Test, "shapes" (`shapes_of`), "numbers" (`numbers_of`) or "student" (`student_of`).
        work: The file.
    """
    import gc

    import torch

    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    answer = {"shapes": shapes_of, "numbers": numbers_of, "student": student_of}[task]
    for name in sys.stdin.read().split():
        began = time.process_time()
        try:
            record = answer(name)
        except Exception as error:
            record = {"name": name, "difference": f"{type(error).__name__}: {error}"[:300]}
        record |= {"task": task, "cpu_seconds": round(time.process_time() - began, 1)}
        with work.open("a") as file:
            file.write(json.dumps(record) + "\n")
        gc.collect()


def known(work: Path, task: str) -> dict[str, dict[str, Any]]:
    """Returns {name of a model: newest answer} from the file of answers.

    Args:
        work: The file.
        task: Test that gave the answers, "shapes", "numbers" or "student".
    """
    lines = work.read_text().splitlines() if work.exists() else []
    answers = [json.loads(line) for line in lines]
    return {answer["name"]: answer for answer in answers if answer["task"] == task}


def ask(task: str, names: list[str], work: Path) -> None:
    """Runs child processes until the file has an answer for each name.

    A name at which a child crashes gets the exit code as its answer.

    Args:
        task: Test, "shapes", "numbers" or "student".
        names: The names of models.
        work: The file of answers.
    """
    left = list(names)
    while left:
        batch = left[:NAMES_A_CHILD]
        before = len(work.read_text().splitlines()) if work.exists() else 0
        process = subprocess.Popen(
            [sys.executable, __file__, "--child", task, "--work", str(work)],
            stdin=subprocess.PIPE,
            text=True,
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (CHILD_BYTES,) * 2),
        )
        try:
            process.communicate("\n".join(batch), timeout=CHILD_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        answered = len(work.read_text().splitlines()) - before if work.exists() else 0
        if answered < len(batch):
            lost = {"name": batch[answered], "task": task, "crashed": process.returncode}
            with work.open("a") as file:
                file.write(json.dumps(lost) + "\n")
            answered += 1
        left = left[answered:]
        print(f"{task}: {len(names) - len(left)} of {len(names)}", flush=True)


def in_turn(names: list[str]) -> list[str]:
    """Returns the models' `names`, sorted so that the families of models take turns.

    Thus all families have answers after a short time.
    """
    places: dict[str, int] = defaultdict(int)
    keys = []
    for name in names:
        places[family_of(name)] += 1
        keys.append((places[family_of(name)], name))
    return [name for _, name in sorted(keys)]


def kind_of(name: str, answer: dict[str, Any]) -> str:
    """Returns the family and the class of the model `name`, as FAMILY.CLASS.

    Args:
        name: Name of the model in timm.
        answer: Answer of the task "shapes" for this model, which has the name of its class.
    """
    return f"{family_of(name)}.{answer['class']}"


def smallest_of(answers: dict[str, dict[str, Any]]) -> list[str]:
    """Returns the name of the smallest model of each family and class.

    Models without a feature map or with more than `LARGEST` parameters do not count.

    Args:
        answers: The answers of the task "shapes", by name.
    """
    kinds: dict[str, list[tuple[int, str]]] = defaultdict(list)
    for name, answer in answers.items():
        if "map" in answer and answer["parameters"] <= LARGEST:
            kinds[kind_of(name, answer)].append((answer["parameters"], name))
    return [min(models)[1] for models in kinds.values()]


def main() -> None:
    """Tests the models without a stored answer, and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=Path("timm_models.jsonl"))
    parser.add_argument("--only", default="*", help="pattern of names")
    parser.add_argument("--again", default="", choices=("", "refused", "crashed", "difference"))
    parser.add_argument("--table", action="store_true", help="write what is known, ask nothing")
    parser.add_argument("--students", action="store_true", help="take each name as a student")
    parser.add_argument("--child", default="", help=argparse.SUPPRESS)
    flags = parser.parse_args()
    if flags.child:
        child(flags.child, flags.work)
        return
    import timm

    names = [name for name in timm.list_models() if fnmatch(name, flags.only)]
    if flags.table:
        write(names, known(flags.work, "shapes"), known(flags.work, "numbers"), timm.__version__)
        return
    if flags.students:
        have = known(flags.work, "student")
        ask("student", in_turn([n for n in names if n not in have]), flags.work)
        write_students(names, known(flags.work, "student"))
        return
    have = known(flags.work, "shapes")
    todo = [n for n in names if n not in have or (flags.again and flags.again in have[n])]
    ask("shapes", in_turn(todo), flags.work)
    shapes = known(flags.work, "shapes")
    have = known(flags.work, "numbers")
    smallest = smallest_of(shapes)
    todo = [n for n in smallest if n not in have or (flags.again and flags.again in have[n])]
    ask("numbers", todo, flags.work)
    have = known(flags.work, "numbers")
    differs = {
        kind_of(n, shapes[n]) for n in smallest if have[n].get("is_last_intermediate") is False
    }
    others = [
        n
        for n in names
        if "map" in shapes[n]
        and kind_of(n, shapes[n]) in differs
        and shapes[n]["parameters"] <= LARGEST
        and n not in have
    ]
    ask("numbers", sorted(others, key=lambda n: shapes[n]["parameters"]), flags.work)
    write(names, known(flags.work, "shapes"), known(flags.work, "numbers"), timm.__version__)


def write(
    names: list[str],
    shapes: dict[str, dict[str, Any]],
    numbers: dict[str, dict[str, Any]],
    version: str,
) -> None:
    """Writes the table of teachers by family, and prints a summary.

    Args:
        names: All names of models.
        shapes: The answers of the task "shapes", by name.
        numbers: The answers of the task "numbers", by name.
        version: Version of timm.
    """
    families: dict[str, dict[str, Any]] = {}
    reasons: dict[str, list[str]] = defaultdict(list)
    for name in (name for name in names if name in shapes):
        answer = shapes[name]
        family = families.setdefault(family_of(name), {"works": 0, "names": 0})
        family["names"] += 1
        if "map" in answer and "difference" not in answer:
            family["works"] += 1
            continue
        text = answer.get("refused") or answer.get("difference") or f"crash {answer['crashed']}"
        family.setdefault("others", []).append(name)
        reasons[text.replace(name, "NAME")].append(name)
    for name, answer in numbers.items():
        if name in shapes:
            pairs = {k: v for k, v in answer.items() if k.startswith(("at ", "is_", "diff", "cra"))}
            families[family_of(name)].setdefault("numbers", {})[name] = pairs
    errors = [v for n in numbers.values() for k, v in n.items() if k.startswith("at ")]
    measured = [e for e in errors if isinstance(e, float)]
    table = {
        **(json.loads(RESULT.read_text()) if RESULT.exists() else {}),
        "timm": version,
        "date": time.strftime("%Y-%m-%d"),
        "names": len(names),
        "run": len(shapes),
        "work": sum(family["works"] for family in families.values()),
        "compared_with_numbers": len(numbers),
        "largest_relative_error": max(measured, default=None),
        "above_tolerance": sum(not e <= TOLERANCE for e in measured),
        "refused": reasons,
        "families": families,
    }
    RESULT.write_text(json.dumps(table, indent=1) + "\n")
    print(json.dumps({k: v for k, v in table.items() if k != "families"}, indent=1))


def write_students(names: list[str], answers: dict[str, dict[str, Any]]) -> None:
    """Adds the numbers of models that can be students to the table, and prints them.

    Args:
        names: All names of models.
        answers: The answers of the task "student", by name.
    """
    reasons: dict[str, list[str]] = defaultdict(list)
    families: dict[str, dict[str, int]] = {}
    for name in (name for name in names if name in answers):
        answer = answers[name]
        family = families.setdefault(
            family_of(name), {"names": 0, "train": 0, "train_with_batch_norms": 0}
        )
        family["names"] += 1
        if answer.get("refused") or "difference" in answer or "crashed" in answer:
            text = answer.get("refused") or answer.get("difference") or f"{answer['crashed']}"
            reasons[text.replace(name, "NAME")].append(name)
            continue
        family["train"] += 1
        family["train_with_batch_norms"] += answer["batch_norms"] > 0
    counted = {key: sum(f[key] for f in families.values()) for key in ("names", "train")}
    counted["train_with_batch_norms"] = sum(f["train_with_batch_norms"] for f in families.values())
    table = json.loads(RESULT.read_text())
    table["students"] = {**counted, "refused": reasons, "families": families}
    RESULT.write_text(json.dumps(table, indent=1) + "\n")
    print(json.dumps({**counted, "refused": reasons}, indent=1))


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    main()
