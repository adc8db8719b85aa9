"""Weights files as somebody with bad intentions would write them: each is read or refused.

    python tests/support/models/hostile.py --cases 10000 --out benchmarks/results/hostile_files.json

Sound files are changed (headers, pickles, archives, configurations) as hypothesis draws it.
Children of this process, which has imported everything, inspect each, settle a teacher on it and
read its tensors, within limits on memory and processor time. Every outcome is success or an
FDError.
"""

from __future__ import annotations

import argparse
import copy
import io
import json
import logging
import math
import os
import resource
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
import warnings
import zipfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

# Memory is what comes over that of the process; processor time depends little on what else runs.
MEMORY_BYTES, CPU_SECONDS, CLOCK_SECONDS = 500 << 20, 5, 300
# Files that one child reads: forking is the dearest part.
TOGETHER = 10

NUMBERS = (0, -1, 1, 3, 1e-30, 10**4, 10**8, 2**63, 10**30, 1e308, -1e308, 0.5)
VALUES = (
    *(*NUMBERS, None, True, "", "x" * 600, "../../etc/passwd", "[/red]\x1b[31m", "\ud800"),
    *([], {}, [0], [1, 2], [10**8], [-1] * 5, ["a"], {"a": 1}, [[1]], [None] * 3, "1", [1e308] * 3),
)
NAMES = (
    *("blocks.99999999.norm1.weight", "layers.99999999.blocks.0.norm1.weight", "[/red]", "", "\n"),
    *("blocks.1e9.norm1.weight", "blocks.-1.norm1.weight", "visual.class_embedding", "n" * 600),
    *("blocks.0.attn.relative_position_bias_table", "relative_coords_table", "input_resolution"),
    *("layers.0.blocks.0.attn.relative_coords_table", "layers.0.blocks.0.attn_mask", "dist_token"),
    *("depth", "depths", "checkpoint_path", "pretrained", "num_hidden_layers", "model_type"),
)
# Pieces of pickles: numbers, containers, calls, and opcodes that size or loop.
PIECES = (
    *(
        b"}",
        b"]",
        b")",
        b"(",
        b"0",
        b"1",
        b"2",
        b".",
        b"N",
        b"\x88",
        b"t",
        b"\x85",
        b"\x86",
        b"\x87",
    ),
    *(b"s", b"u", b"a", b"e", b"b", b"R", b"\x81", b"Q", b"q\x00", b"h\x00", b"h\x01", b"h\x05"),
    *(b"K\xff", b"J\xff\xff\xff\x7f", b"J\xff\xff\xff\xff", b"\x8a\x08" + b"\xff" * 7 + b"\x7f"),
    *(b"r\xff\xff\xff\xff", b"j\xff\xff\xff\xff", b"\x8b\xff\xff\xff\x7f", b"T\xff\xff\xff\x7f"),
    *(b"\x8e" + b"\xff" * 8, b"\x95" + b"\xff" * 8, b"X\x01\x00\x00\x00a", b"X\xff\xff\xff\x7f"),
    *(b"cos\nsystem\n", b"cbuiltins\neval\n", b"ctorch\nload\n", b"(ios\nsystem\n", b"\x82\x01"),
    *(b"c__torch__\nM\n", b"ccollections\nOrderedDict\n", b"ctorch\nLongStorage\n", b"2\x86" * 40),
    *(b"I" + b"9" * 5000 + b"\n", b"ctorch._utils\n_rebuild_tensor_v2\n", b"cbuiltins\nset\n"),
)


# --- sound files ---


def write_sound(folder: Path) -> None:
    """Writes the files that are changed, each kind in a folder of its own."""
    import timm
    import torch
    import transformers
    from loading import HF_VIT, TIMM_SWIN, TIMM_VIT, TINY_SWIN, TINY_VIT
    from safetensors.torch import save_file
    from torch import nn

    from fd_large.backbones.registry import build
    from fd_large.backbones.statistics import IMAGENET
    from fd_large.recipes.architectures import resolve
    from fd_large.weights.convert import write

    vit, swin = ("vit_base_patch16", TINY_VIT), ("swinv2_tiny", TINY_SWIN)
    states = {name: build(name, tiny).state_dict() for name, tiny in (vit, swin)}
    for kind, (name, tiny) in {"own": vit, "own_swin": swin}.items():
        write(states[name].items(), resolve(name, tiny), "fd", folder / kind, statistics=IMAGENET)
    for kind, name, arguments in (
        ("timm", "vit_base_patch16_clip_quickgelu_224", TIMM_VIT),
        ("timm_swin", "swinv2_tiny_window8_256", TIMM_SWIN),
    ):
        net = timm.create_model(name, num_classes=0, **arguments)
        options = {"model_args": arguments, "safe_serialization": True}
        timm.models.save_for_hf(net, folder / kind, **options)
    net = transformers.ViTModel(transformers.ViTConfig(**HF_VIT))
    net.save_pretrained(folder / "hf", max_shard_size="30KB")
    config = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    (folder / "hf" / "preprocessor_config.json").write_text(json.dumps(config))
    for kind in ("torch", "legacy", "script", "bare"):
        (folder / kind).mkdir()
    state = {"model": states["vit_base_patch16"], "epoch": 3, "lr": [0.1, None]}
    torch.save(state, folder / "torch" / "net.pth")
    torch.save(state, folder / "legacy" / "net.pth", _use_new_zipfile_serialization=False)
    save_file(states["swinv2_tiny"], folder / "bare" / "net.safetensors")
    script = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Sequential(nn.ReLU()))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.trace(script.eval(), torch.ones(1, 3, 8, 8)).save(folder / "script" / "net.pt")


# --- changes ---


def edited_json(draw, text: str) -> str:
    """Another value, key or text somewhere."""
    whole = json.loads(text)
    places = []

    def walk(node) -> None:
        items = node.items() if isinstance(node, dict) else enumerate(node)
        for key, value in items:
            places.append((node, key))
            if isinstance(value, dict | list):
                walk(value)

    walk(whole)
    for _ in range(draw(st.integers(1, 3))):
        node, key = draw(st.sampled_from(places))
        how = draw(st.sampled_from(("value", "value", "remove", "add", "deep")))
        value = copy.deepcopy(draw(st.sampled_from(VALUES)))
        if how == "remove" and isinstance(node, dict):
            node.pop(key, None)
        elif how == "add" and isinstance(node, dict):
            node[draw(st.sampled_from(NAMES))] = value
        elif how == "deep":
            node[key] = "DEEP"
        elif isinstance(node, dict) or key < len(node):
            node[key] = value
    return json.dumps(whole).replace('"DEEP"', "[" * 3000 + "]" * 3000)


def edited_bytes(draw, content: bytes, ends: int = 400) -> bytes:
    """Bytes changed, put in, or taken away, near the beginning or the end."""
    content = bytearray(content)
    for _ in range(draw(st.integers(1, 4))):
        near = draw(st.integers(0, min(ends, len(content))))
        at = near if draw(st.booleans()) else len(content) - near
        how = draw(st.sampled_from(("change", "insert", "remove", "cut")))
        if how == "change":
            content[at : at + 1] = bytes([draw(st.integers(0, 255))])
        elif how == "insert":
            content[at:at] = draw(st.sampled_from(PIECES))
        elif how == "remove":
            del content[at : at + draw(st.integers(1, 40))]
        else:
            del content[at:]
    return bytes(content)


def edited_pickle(draw, content: bytes) -> bytes:
    """Pieces put in, or in place of others, anywhere."""
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(content)))
        piece = draw(st.sampled_from(PIECES)) * draw(st.sampled_from((1, 1, 1, 3, 1000)))
        content = content[:at] + piece + content[at + draw(st.sampled_from((0, len(piece)))) :]
    return content


def edited_archive(draw, content: bytes) -> bytes:
    """Another pickle, code or byte order, members lost, given twice or compressed."""
    buffer = io.BytesIO()
    compress = draw(st.sampled_from((zipfile.ZIP_STORED,) * 3 + (zipfile.ZIP_DEFLATED,)))
    lost = draw(
        st.sampled_from(("", "", "", "data/0", "data.pkl", "byteorder", ".py", "constants"))
    )
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(buffer, "w", compress) as new:
        for name in old.namelist():
            member = old.read(name)
            if name.endswith("/data.pkl"):
                member = edited_pickle(draw, member)
            elif name.endswith(".py") and draw(st.booleans()):
                member = edited_bytes(draw, member)
            if not lost or lost not in name:
                new.writestr(name, member)
    return buffer.getvalue()


def edited_header(draw, content: bytes) -> bytes:
    """Another header of safetensors, and a size that it has or not."""
    size = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + size])
    for _ in range(draw(st.integers(1, 3))):
        name = draw(st.sampled_from(sorted(header)))
        how = draw(st.sampled_from(("rename", "copy", "remove", "edit", "edit")))
        if how in ("rename", "copy"):
            header[draw(st.sampled_from(NAMES))] = header[name]
        if how in ("rename", "remove") and len(header) > 1:
            del header[name]
        if how == "edit" and isinstance(header[name], dict):
            part = draw(st.sampled_from(("dtype", "shape", "data_offsets")))
            header[name] = header[name] | {part: draw(st.sampled_from(VALUES))}
    text = json.dumps(header).encode()
    size = draw(st.sampled_from((len(text),) * 4 + (0, len(text) + 1, 1 << 24, (1 << 64) - 1)))
    return struct.pack("<Q", size) + text + content[8 + struct.unpack("<Q", content[:8])[0] :]


def changed(draw, path: Path) -> None:
    """Changes one file."""
    content = path.read_bytes()
    if path.suffix == ".json":
        if draw(st.integers(0, 3)):
            content = edited_json(draw, content.decode()).encode()
        else:
            content = edited_bytes(draw, content)
    elif draw(st.integers(0, 3)) == 0:
        content = edited_bytes(draw, content)
    elif path.suffix == ".safetensors":
        content = edited_header(draw, content)
    elif zipfile.is_zipfile(path):
        content = edited_archive(draw, content)
    else:
        content = edited_bytes(draw, content, ends=4000)
    path.write_bytes(content)


# --- reading, in children of a process that has everything imported ---


def read_all(folder: Path) -> str:
    """Does what a user does with a file; returns how it ended, in one line."""
    from rich.console import Console

    from fd_large.engine.frozen import frozen_weights
    from fd_large.errors import FDError
    from fd_large.recipes.sections import FrozenModel
    from fd_large.weights.inspection import inspect, table
    from fd_large.weights.resolve import Sources
    from fd_large.weights.settle import settle_model

    files = [path for path in folder.iterdir() if path.suffix in (".pth", ".pt")]
    source = files[0] if files else folder
    if (folder / "net.safetensors").is_file():
        source = folder / "net.safetensors"
    sources, where, refusals = Sources(), "--teacher.source", 0
    for act in ("inspect", "teach"):
        try:
            if act == "inspect":
                Console(file=io.StringIO()).print(table(inspect(source, sources=sources)))
            else:
                teacher = settle_model(FrozenModel(source=str(source)), sources, where=where)
                for _, tensor in frozen_weights(teacher, sources, where=where):
                    tensor.sum()
        except FDError as error:
            refusals += 1
            if len(str(error)) > 4000:
                return f"a message of {len(str(error))} characters: {str(error)[:300]}"
    return "refused" if refusals else "read"


def in_children(folders: list[Path]) -> list[str]:
    """Reads in a child with limits, and in another what is left when it dies; how each ended."""
    ends: list[str] = []
    while len(ends) < len(folders):
        ends += in_child(folders[len(ends) :])
    return ends


def in_child(folders: list[Path]) -> list[str]:
    """Reads until all are read or the child is dead; returns how each ended, at least one."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (held + MEMORY_BYTES,) * 2)
        signal.alarm(CLOCK_SECONDS)
        with os.fdopen(writing, "w", errors="replace") as pipe:
            for folder in folders:
                used = math.ceil(time.process_time())
                hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
                resource.setrlimit(resource.RLIMIT_CPU, (used + CPU_SECONDS, hard))
                try:
                    end = read_all(folder)
                except BaseException:
                    end = traceback.format_exc()[-3000:]
                print(json.dumps(end), file=pipe, flush=True)
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        ends = [json.loads(line) for line in pipe]
    status = os.waitstatus_to_exitcode(os.wait4(child, 0)[1])
    if len(ends) < len(folders):
        ends.append(f"ended by code {status} of the process")
    return ends


@dataclass
class Outcome:
    """What came of the cases."""

    ends: Counter = field(default_factory=Counter)
    by_kind: dict[str, Counter] = field(default_factory=dict)
    findings: list[str] = field(default_factory=list)


def run(cases: int, scratch: Path, *, start: int = 0, keep: Path | None = None) -> Outcome:
    """Changes and reads files.

    Args:
        cases: How many.
        scratch: An empty folder to work in.
        start: Seed of what hypothesis draws.
        keep: Where folders that end otherwise are kept; None: the first one is an error.
    """
    outcome = Outcome()
    sound = scratch / "sound"
    sound.mkdir()
    warnings.simplefilter("ignore")
    logging.disable()
    try:
        write_sound(sound)
        kinds = sorted(path.name for path in sound.iterdir())
        ready = dict(zip(kinds, in_children([sound / kind for kind in kinds]), strict=True))
        # The bare tensors do not tell the windows, and the scripted archive is of no format.
        expected = {kind: "refused" if kind in ("bare", "script") else "read" for kind in kinds}
        assert ready == expected, ready
        changed_and_read(outcome, kinds, cases, scratch, start, keep)
    finally:
        logging.disable(logging.NOTSET)
    return outcome


def changed_and_read(
    outcome: Outcome, kinds: list[str], cases: int, scratch: Path, start: int, keep: Path | None
) -> None:
    """Notes in the outcome how files of these kinds end, changed."""

    @seed(start)
    @settings(
        max_examples=cases // TOGETHER,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(st.data())
    def some(data) -> None:
        chosen = [data.draw(st.sampled_from(kinds)) for _ in range(TOGETHER)]
        folders = [scratch / f"case-{n}" for n in range(TOGETHER)]
        for kind, folder in zip(chosen, folders, strict=True):
            shutil.rmtree(folder, ignore_errors=True)
            shutil.copytree(scratch / "sound" / kind, folder)
            files = sorted(path for path in folder.iterdir() if path.name != "README.md")
            for path in data.draw(st.lists(st.sampled_from(files), min_size=1, max_size=2)):
                changed_safely(data.draw, path)
        for kind, folder, end in zip(chosen, folders, in_children(folders), strict=True):
            if end not in ("read", "refused"):
                outcome.findings.append(f"{kind}: {end}")
                assert keep, outcome.findings[-1]
                shutil.copytree(folder, keep / f"{len(outcome.findings)}_{kind}")
                end = "finding"
            outcome.ends[end] += 1
            outcome.by_kind.setdefault(kind, Counter())[end] += 1

    some()


def changed_safely(draw, path: Path) -> None:
    """Changes a file; one that was changed beyond parsing is changed as bytes."""
    try:
        changed(draw, path)
    except (ValueError, LookupError, TypeError, RecursionError, struct.error, zipfile.BadZipFile):
        path.write_bytes(edited_bytes(draw, path.read_bytes()))


def main() -> int:
    """Runs many cases and writes what came of them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--keep", type=Path, required=True, help="for files that end otherwise")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    sys.path.insert(0, str(Path(__file__).resolve().parent))
    with tempfile.TemporaryDirectory() as scratch:
        outcome = run(arguments.cases, Path(scratch), start=arguments.seed, keep=arguments.keep)
    results = {
        "question": __doc__.splitlines()[0],
        "command": f"python hostile.py --cases {arguments.cases} --seed {arguments.seed}",
        "memory_limit_bytes": MEMORY_BYTES,
        "ends": dict(outcome.ends),
        "by_kind": {kind: dict(ends) for kind, ends in sorted(outcome.by_kind.items())},
        "cpu_limit_seconds": CPU_SECONDS,
        "findings": sorted(set(outcome.findings)),
    }
    text = json.dumps(results, indent=1)
    print(text)
    if arguments.out:
        arguments.out.write_text(f"{text}\n")
    return bool(outcome.findings)


if __name__ == "__main__":
    sys.exit(main())
