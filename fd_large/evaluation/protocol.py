"""The contract of a protocol: its flags, its measurement of models, and its results."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from fd_large.recipes.fields import at_least
from fd_large.recipes.run import Run

if TYPE_CHECKING:
    from fd_large.engine.find_model import NamedModel


class Result(NamedTuple):
    """Tables and files of a protocol, on rank 0; empty on other ranks.

    Attributes:
        tables: The rich tables that the command prints.
        files: Written files, and further lines to print.
        code: The exit code; not 0 where a training ended early.
    """

    tables: Sequence[Any] = ()
    files: Sequence[object] = ()
    code: int = 0


@dataclass(frozen=True, kw_only=True)
class Repeated:
    """The flag of protocols with repetitions over seeds."""

    # Number of repetitions, with runtime.seed and the seeds after it; k-NN has no randomness.
    seeds: int = 1

    def __post_init__(self) -> None:
        at_least("--seeds", self.seeds, 1, "repetitions")

    def seeds_from(self, first: int) -> list[int]:
        """Returns the seed of each repetition.

        Args:
            first: Seed of the first repetition.
        """
        return list(range(first, first + self.seeds))


@dataclass(frozen=True, kw_only=True)
class Pooled:
    """The flag of protocols with a single feature for each image."""

    # Feature of an image of a frozen model: the mean of its patch tokens, its class token, or both
    # side by side in one vector. auto: each that the model has (k-NN: mean and cls).
    pool: Literal["auto", "mean", "cls", "both"] = "auto"


@dataclass(frozen=True, kw_only=True)
class Batched:
    """The flag of protocols that run frozen models on images."""

    # Images at a time while the model is frozen.
    batch_size: int = 256

    def __post_init__(self) -> None:
        at_least("--batch_size", self.batch_size, 1, "images")


class Request(NamedTuple):
    """The arguments of a measurement, as the user gave them.

    Attributes:
        protocol: The protocol.
        flags: The command's own arguments, including all protocols' flags.
        changes: The recipe's fields that the user gave, {full name: value}.
        run: A recipe with these fields; None for a command without a recipe.
        train: Trains a run: (run, deepspeed_config=...) -> exit code.
    """

    protocol: Protocol
    flags: Any
    changes: Mapping[str, Any]
    run: Run | None
    train: Callable[..., int]

    def models(self) -> list[NamedModel]:
        """Finds the models that the user named; reads headers only.

        Raises: FDError: if a model is missing or named twice.
        """
        from fd_large.engine.find_model import find_models
        from fd_large.tasks.jobs import job_of

        size = self.changes.get("data.image_size", 0)
        return find_models(self.flags.models, job_of, image_size=size)


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """A way to measure models, a row of the table in `registry.py`.

    Attributes:
        name: As `--task` names it; also in summary.json and in the plot's name.
        title: Its name in tables and plots.
        measure: Function from `Request` to tables and files. `frozen.of_features` makes it from a
            function of frozen features.
        flags: A dataclass of the flags that it reads, all with defaults; flags that several
            protocols read are in a common base class.
        fields: Fields of a recipe that it reads, section.field; None: all.
        variant: Value of `--protocol` that selects it among protocols of the same name.
        command: Name of the command that uses it.
    """

    name: str
    title: str
    measure: Callable[[Request], Result]
    flags: type
    fields: tuple[str, ...] | None
    variant: str = "cached"
    command: str = "evaluate"
