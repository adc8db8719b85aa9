"""What `evaluate` takes to measure models: its tests, and the flags that each of them reads."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Annotated, Literal, NamedTuple

from tyro.conf import Positional, arg

from fd_large.cli.arguments import AllowsCode
from fd_large.cli.sweep import SweepFlags
from fd_large.recipes.fields import at_least, positive, require
from fd_large.tasks.registry import TASKS


class Test(NamedTuple):
    """A test that --task names.

    Attributes:
        title: Words for it in tables and plots.
        flags: The command's own arguments that it reads, besides models, task and out.
        fields: Fields of a recipe that it reads; None: all.
    """

    title: str
    flags: tuple[str, ...]
    fields: tuple[str, ...] | None


# What the features of a frozen model depend on.
_FLAGS = ("features", "pool", "batch_size")
OWN_FEATURES = "own"
_FIELDS = (
    "data.root",
    "data.val_fraction",
    "data.cache",
    "data.cache_gb",
    "data.image_size",
    "data.workers",
    "data.max_pixels",
    "runtime.seed",
)
PROBES = {
    "knn": Test("k-NN", ("k", "temperature", *_FLAGS), _FIELDS),
    "linear": Test(
        "Linear probe", ("protocol", "seeds", "probe_rates", "probe_epochs", *_FLAGS), _FIELDS
    ),
}
TRAININGS = {
    kind.name: Test(
        kind.title,
        (
            *("seeds", "recipe", "deepspeed_config"),
            # One layer on a frozen model has no layer decay.
            *(("protocol",) if kind.name in PROBES else (f.name for f in fields(SweepFlags))),
        ),
        None,
    )
    for kind in TASKS.values()
    if kind.trains_models
}


@dataclass(frozen=True, kw_only=True)
class ModelFlags(SweepFlags, AllowsCode):
    """Flags of `evaluate` that measure models."""

    # Models to measure.
    models: Annotated[tuple[str, ...], Positional, arg(metavar="[MODEL ...]")] = ()
    # knn: k nearest neighbours of frozen features; linear: a linear probe on them; finetune: the
    # whole model learns the labels; or the task of one run that is scored as it was trained, such
    # as detection. auto: that of the first run's task, else knn.
    task: str = "auto"
    # How a linear probe is made. cached: in minutes, on features of the centre crops. official: as
    # in Feature-Distillation, on random crops, by the recipe linear_probe, through the engine.
    protocol: Literal["cached", "official"] = "cached"
    # Number of repetitions, with runtime.seed and the seeds after it; k-NN has no randomness.
    seeds: int = 1
    # Folder for summary.json, the plot, and the runs of what is trained.
    out: str = "evaluation"
    # Number of neighbours that vote.
    k: int = 20
    # A neighbour's vote is exp(cosine similarity / temperature).
    temperature: float = 0.07
    # What is measured of the student of a distillation run, or of an export of one: own, its map;
    # NAME or NAME.summary, what its head for that teacher's map or summary makes of it, where the
    # only teacher of a run is called teacher. Several are measured side by side. Other models are
    # measured by their own map.
    features: tuple[str, ...] = (OWN_FEATURES,)
    # Feature of an image of a frozen model: the mean of its patch tokens, or its class token. auto:
    # k-NN of each that the model has, a probe of the mean.
    pool: Literal["auto", "mean", "cls"] = "auto"
    # Images at a time while the model is frozen.
    batch_size: int = 256
    # Learning rates of the linear probe per 256 images; all are tried, and a held-out tenth of the
    # training images decides.
    probe_rates: tuple[float, ...] = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
    # Epochs of the linear probe.
    probe_epochs: int = 30
    # Recipe of what is trained; empty: the published one that fits the model.
    recipe: str = ""
    # DeepSpeed's JSON for what is trained, a path or a name; empty: zero1.
    deepspeed_config: str = ""

    def __post_init__(self) -> None:
        SweepFlags.__post_init__(self)
        AllowsCode.__post_init__(self)
        at_least("--seeds", self.seeds, 1, "repetitions")
        at_least("--k", self.k, 1, "neighbours")
        at_least("--batch_size", self.batch_size, 1, "images")
        at_least("--probe_epochs", self.probe_epochs, 1, "epochs")
        positive("--temperature", self.temperature)
        require(
            bool(self.features) and len(set(self.features)) == len(self.features),
            "--features: each at most once, and one at least",
            " ".join(self.features) or "nothing",
            f"{OWN_FEATURES}, NAME or NAME.summary of the run's teachers",
        )
        require(
            bool(self.probe_rates) and min(self.probe_rates) > 0,
            "--probe_rates: invalid learning rates",
            self.probe_rates,
            "numbers above 0",
        )

    def seeds_from(self, first: int) -> list[int]:
        """Returns the seed of each repetition.

        Args:
            first: Seed of the first repetition.
        """
        return list(range(first, first + self.seeds))
