"""`python -m fd_large weights inspect|convert`."""

from __future__ import annotations

import sys
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from io import StringIO
from typing import Any, Literal

from fd_large.errors import ConfigError, nearest
from fd_large.recipes.architectures import Architecture, resolve

USAGE = """usage: python -m fd_large weights inspect SOURCE [--model NAME]
       python -m fd_large weights convert SOURCE --to FORMAT OUT [--architecture.FIELD VALUE ...]

SOURCE is a file or folder of weights, FILE#teacher (or #student, #projector) of one that holds
several models, package:NAME, hf:REPO or open_clip:ARCH/TAG. docs/weights.md lists the formats.

inspect says what the file holds; --model compares it with a model of the table of models.
convert writes the model to OUT. FORMAT is one of:
  fd        a folder with this project's names and a config.json that tells everything
  official  Swin-Transformer's, DINO's or Feature-Distillation's names, one file
  timm      timm's names (ViT, BEiT, Swin, SwinV2), one .safetensors or .pth file
"""


@dataclass(frozen=True, kw_only=True)
class _Inspect:
    source: str
    model: str = "auto"


@dataclass(frozen=True, kw_only=True)
class _Convert:
    source: str
    out: str
    to: Literal["fd", "official", "timm"]
    model: str = "auto"
    architecture: Architecture = field(default_factory=Architecture)


def run(arguments: list[str]) -> int:
    """Runs `inspect` or `convert`; returns the exit code.

    Raises: ConfigError: for words that are none of theirs; WeightsError: see `inspect`, `write`.
    """
    command, *rest = arguments or ["--help"]
    if command in ("-h", "--help") or "-h" in rest or "--help" in rest:
        print(USAGE, end="")
        return 0
    if command not in ("inspect", "convert"):
        raise ConfigError(
            f"weights: no such command; got {command!r}, {nearest(command, ('inspect', 'convert'))}"
        )
    return _inspect(rest) if command == "inspect" else _convert(rest)


def _inspect(arguments: list[str]) -> int:
    flags = _parsed(_Inspect, "inspect", arguments, ("source",))
    from rich.console import Console

    from fd_large.weights.inspection import inspect, table

    Console(width=None if sys.stdout.isatty() else 120).print(
        table(inspect(flags.source, model=flags.model))
    )
    return 0


def _convert(arguments: list[str]) -> int:
    flags = _parsed(_Convert, "convert", arguments, ("source", "out"))
    from fd_large.backbones.registry import parameter_shapes
    from fd_large.weights.settle import reconcile
    from fd_large.weights.source import open_weights
    from fd_large.weights.write import write

    where = "weights convert"
    weights = open_weights(flags.source, where=where)
    named = None if flags.model == "auto" else resolve(flags.model)
    architecture = reconcile(
        weights, flags.architecture, named, name=flags.model, where=where, section=""
    )
    items = weights.fitted(architecture, parameter_shapes(architecture), where=where)
    file = write(items, architecture, flags.to, flags.out, statistics=weights.statistics)
    print(f"{file}: {items.match.summary()}")
    return 0


def _parsed(flags_type: type, command: str, arguments: list[str], named: tuple[str, ...]) -> Any:
    """Flags by tyro; the words before or between them are the named ones."""
    words, given, i = [], [], 0
    while i < len(arguments):
        if arguments[i].startswith("--"):
            stop = i + 1 + ("=" not in arguments[i])
            # Architecture's tuples take several values.
            while stop < len(arguments) and _is_number(arguments[stop]):
                stop += 1
            given += arguments[i:stop]
            i = stop
        else:
            words.append(arguments[i])
            i += 1
    for name, word in zip(named, words, strict=False):
        given += [f"--{name}", word]
    parsed = _tyro(flags_type, given) if len(words) == len(named) else None
    if parsed is None:
        wanted = " ".join(name.upper() for name in named)
        raise ConfigError(
            f"weights {command}: not understood; got {' '.join(arguments) or 'nothing'}, expected "
            f"{wanted} and flags that exist. See python -m fd_large weights --help."
        )
    return parsed


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True


def _tyro(flags_type: type, arguments: list[str]) -> Any | None:
    import tyro

    with redirect_stderr(StringIO()), redirect_stdout(StringIO()):
        try:
            return tyro.cli(flags_type, args=arguments, console_outputs=False, use_underscores=True)
        except SystemExit:
            return None
