"""The command `fd-large weights`: inspect, convert and fetch weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Literal

from tyro.conf import Positional, arg

from fd_large import doors
from fd_large.cli.arguments import call_subcommand
from fd_large.cli.output import tables
from fd_large.cli.paths import require_paths
from fd_large.errors import ConfigError, FDError, printable
from fd_large.files import check_out
from fd_large.recipes.architectures import (
    Architecture,
    name_of,
    resolve,
    set_fields,
    split_model,
)
from fd_large.recipes.family import FamilyArchitecture

if TYPE_CHECKING:
    from fd_large.backbones.statistics import Statistics


@dataclass(frozen=True, kw_only=True)
class _OfSource:
    # Source of the weights: a file, a folder, a run's folder, package:NAME, hf:REPO or
    # open_clip:ARCH/TAG. FILE#teacher, FILE#student and FILE#projector name a model in a file with
    # several models. The page docs/weights.md lists the formats.
    source: Annotated[str, Positional, arg(metavar="SOURCE")]


@dataclass(frozen=True, kw_only=True)
class Inspect(_OfSource):
    """Say what a weights file holds: format, architecture, parameters, licence.

    If the weights do not show their model, the model's name can be put before them, as in evaluate:
    MODEL=SOURCE, for example timm:NAME=FILE.
    """

    # Name of the model with which the file is compared, such as timm:NAME. auto: the model that the
    # weights show.
    model: str = "auto"


@dataclass(frozen=True, kw_only=True)
class Convert(_OfSource):
    """Write the model of a weights file in another format."""

    # File or folder to write, which must not exist yet.
    out: Annotated[str, Positional, arg(metavar="OUT")]
    # Format. fd: a folder with this project's tensor names and a config.json that describes the
    # model. official: one file with the tensor names of Swin-Transformer, DINO or
    # Feature-Distillation. timm: one .safetensors or .pth file with timm's tensor names (ViT, BEiT,
    # Swin, SwinV2, or an export of a model of timm).
    to: Literal["fd", "official", "timm"]
    # Name of the model whose weights the file has. auto: the model that the weights show.
    model: str = "auto"
    # Fields of the model that the weights do not determine, such as window_size.
    architecture: Architecture = field(default_factory=Architecture)


@dataclass(frozen=True, kw_only=True)
class Fetch:
    """Download weights into a folder that can be used as a source without a network."""

    # Source of the weights: hf:REPO, timm:NAME or open_clip:ARCH/TAG.
    source: Annotated[str, Positional, arg(metavar="SOURCE")]
    # Folder to write, which must not exist yet.
    out: Annotated[str, Positional, arg(metavar="DIR")]


def inspect(source: str, model: str) -> int:
    """Prints a table that describes the weights of a source; returns 0.

    `Inspect` describes the arguments.

    Raises: ConfigError: if the user's own code is named, which is not imported here, or both
        `source` and `model` name a model.
    """
    named, source = split_model(source)
    if named and model != "auto":
        raise ConfigError(
            f"--model: the model is named twice; got {model}, and {named} before the file, "
            "expected one name. Leave out --model, or the name before the file."
        )
    model = named or model
    for where, text, expected in (
        ("weights inspect", source, "a file or another source of docs/weights.md"),
        ("weights inspect" if named else "--model", model, "a model that `models` lists, or auto"),
    ):
        if doors.is_own(text):
            raise ConfigError(
                f"{where}: your own code is not imported for an inspection; got {text}, expected "
                f"{expected}. Name one of these."
            )
    require_paths({"weights inspect": source})
    from fd_large.engine.checkpoint_models import sources_of
    from fd_large.tasks.jobs import job_of
    from fd_large.weights.inspection import inspect, table

    tables().print(table(inspect(source, model=model, sources=sources_of(job_of))))
    return 0


def convert(source: str, out: str, to: str, model: str, architecture: Architecture) -> int:
    """Writes a model in another format, and prints how the source's tensors match it; returns 0.

    `Convert` describes the arguments.
    """
    require_paths({"weights convert": source})
    check_out(out, where="weights convert")
    from fd_large.engine.checkpoint_models import sources_of
    from fd_large.tasks.jobs import job_of
    from fd_large.weights.convert import write
    from fd_large.weights.settle import reconcile

    where = "weights convert"
    resolved = sources_of(job_of).resolve(source, where=where)
    if described := resolved.unpublished:
        _require_alone(described.architecture, model, architecture)
        settled = described.architecture
        statistics: Statistics | None = described.statistics
    else:
        weights = resolved.published
        named = None if model == "auto" else resolve(model)
        settled = reconcile(weights, architecture, named, name=model, where=where, section="")
        statistics = weights.statistics
    items = resolved.fitted(settled)
    file = write(items, settled, to, out, statistics=statistics)
    print(f"{file}: {items.match.summary()}")
    return 0


def _require_alone(described: FamilyArchitecture, model: str, architecture: Architecture) -> None:
    """Checks that `convert` can take the model that a folder of weights describes.

    Raises: ConfigError: if the flags --model or --architecture.NAME describe a model, too, or if
        the user's own code makes the folder's model.
    """
    if described.code:
        raise ConfigError(
            "weights convert: the model is made by your own code, which is not imported here; got "
            f"{name_of(described)}, expected a model of this package or of a library. Write a run "
            "by export RUN OUT --to fd; an export can be used as it is."
        )
    set_by_hand = [f"--architecture.{name}" for name in set_fields(architecture)]
    if model != "auto":
        set_by_hand.append("--model")
    if set_by_hand:
        raise ConfigError(
            f"weights convert: the folder itself states its model, {name_of(described)}; got "
            f"{', '.join(set_by_hand)}, expected no such flags. Leave out these flags."
        )


def fetch(source: str, out: str) -> int:
    """Downloads the weights of `source` to the folder `out`; returns 0.

    It prints the written files, the licence, and the flag by which a run can use the weights as a
    teacher. If more flags are needed, it prints the error that would say so.
    """
    check_out(out, where="weights fetch")
    from fd_large.engine.checkpoint_models import sources_of
    from fd_large.recipes.sections import FrozenModel
    from fd_large.tasks.jobs import job_of
    from fd_large.weights import download
    from fd_large.weights.settle import settle_model

    files, licence = download.fetch(source, out)
    print(printable(f"{out}: {', '.join(files)}; licence of the weights: {licence}"))
    try:
        settled = settle_model(
            FrozenModel(source=out), sources_of(job_of), where="--teacher.source"
        )
    except FDError as error:
        print(f"These weights cannot be a teacher without more flags: {error}")
        return 0
    model = name_of(resolve(settled.model, settled.architecture))
    print(f"The weights hold a {model}; to use them: --teacher.source {out}")
    return 0


def main(arguments: list[str]) -> int:
    """Runs the subcommand that the first argument names; returns the exit code."""
    commands: dict[str, tuple[type, Callable[..., int]]] = {
        "inspect": (Inspect, inspect),
        "convert": (Convert, convert),
        "fetch": (Fetch, fetch),
    }
    return call_subcommand(arguments, commands, command="weights")
