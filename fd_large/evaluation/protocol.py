"""Interface of a protocol: its flags, its function that measures models, and its results."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from fd_large.recipes.fields import at_least
from fd_large.recipes.run import Run

if TYPE_CHECKING:
    from fd_large.engine.find_model import NamedModel


class Result(NamedTuple):
    """Results of a protocol; tables and files are empty on other ranks than rank 0.

    Attributes:
        tables: Tables of rich that the command prints.
        files: Written files, and further lines, which the command prints below the tables.
        code: The exit code, which is not 0 if a training ended early.
    """

    tables: Sequence[Any] = ()
    files: Sequence[object] = ()
    code: int = 0


@dataclass(frozen=True, kw_only=True)
class Repeated:
    """Flag --seeds, for protocols that are repeated with several seeds."""

    # Number of repetitions. Their seeds are runtime.seed and the numbers after it. The result of
    # k-NN is the same for every seed.
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
    """Flag --pool, for protocols that use a single feature vector of each image."""

    # Feature of an image of a frozen model. mean: the mean of its patch tokens. cls: its class
    # token. both: these two, concatenated. auto: each feature that the model has (for k-NN, mean
    # and cls).
    pool: Literal["auto", "mean", "cls", "both"] = "auto"


@dataclass(frozen=True, kw_only=True)
class Batched:
    """Flag --batch_size, for protocols that run frozen models on images."""

    # Number of images in a forward of a frozen model.
    batch_size: int = 256

    def __post_init__(self) -> None:
        at_least("--batch_size", self.batch_size, 1, "images")


class Request(NamedTuple):
    """Arguments of a measurement, as the user gave them.

    Attributes:
        protocol: The protocol.
        flags: The command's own arguments, including all protocols' flags.
        changes: The recipe's fields that the user set, {full name: value}.
        run: The recipe with these fields; None for a command without a recipe.
        train: Function that trains a run, (run, deepspeed_config=...) -> exit code.
    """

    protocol: Protocol
    flags: Any
    changes: Mapping[str, Any]
    run: Run | None
    train: Callable[..., int]

    def models(self) -> list[NamedModel]:
        """Finds the models that the user named, without reading their weights.

        Raises: FDError: if a model is missing or named twice.
        """
        from fd_large.engine.find_model import find_models
        from fd_large.tasks.jobs import job_of

        size = self.changes.get("data.image_size", 0)
        return find_models(self.flags.models, job_of, image_size=size)


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """Way to measure models, which `registry.py` lists.

    Attributes:
        name: Name in `--task`, in summary.json and in the file name of the plot.
        title: Name in tables and plots.
        measure: Function that measures models. `frozen.of_features` makes the whole protocol from
            a function that classifies features.
        flags: Dataclass of the flags that the protocol reads, all with defaults. Flags that several
            protocols read are in a common base class.
        fields: Full names of the recipe's fields that the protocol reads; None for all.
        variant: Value of `--protocol` that selects this protocol among those of the same name.
        command: Name of the command that uses the protocol.
    """

    name: str
    title: str
    measure: Callable[[Request], Result]
    flags: type
    fields: tuple[str, ...] | None
    variant: str = "cached"
    command: str = "evaluate"
