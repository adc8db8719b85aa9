"""Protocols that classify the features of frozen models by k-NN, a probe or the user's code.

Such a protocol is a function from the features of a model's training and test images
(`FrozenFeatures`) to a class for each test image (`Classified`). Images, heads, pooling, seeds,
the table, the page and the intervals are shared by all protocols.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, fields
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from fd_large import doors
from fd_large.errors import ConfigError, FDError, nearest
from fd_large.evaluation.extraction import extracted, join_ranks, working
from fd_large.evaluation.protocol import Batched, Pooled, Protocol, Request, Result
from fd_large.evaluation.results import Row, finish_frozen
from fd_large.files import out_folder
from fd_large.recipes.fields import require
from fd_large.recipes.sections import RANDOM, Data

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor, nn

    from fd_large.backbones.feature_map import FeatureMap
    from fd_large.backbones.statistics import Statistics
    from fd_large.data.labelled import LabelledImages
    from fd_large.engine.find_model import NamedModel
    from fd_large.probes.features import Features, Pool

OWN_FEATURES = "own"
# What tables call the features of `--pool`.
_POOLS = {"mean": "mean of patches", "cls": "class token", "both": "class token and mean"}
# Fields of the recipe on which the features of a frozen model depend.
_FIELDS = (
    "data.root",
    "data.val_fraction",
    *("data.fraction", "data.per_class", "data.label_seed"),
    "data.cache",
    "data.cache_gb",
    "data.image_size",
    "data.workers",
    "data.max_pixels",
    "runtime.seed",
)


@dataclass(frozen=True, kw_only=True)
class FrozenFlags(Pooled, Batched):
    """Flags of all protocols that measure features of frozen models."""

    # Features of the student of a distillation run, or of an export of it. own: its map. NAME or
    # NAME.summary: the output of its head for the map or the summary of the teacher NAME (called
    # teacher if it is the only one). Several are measured side by side. Models without heads are
    # measured by their own map.
    features: tuple[str, ...] = (OWN_FEATURES,)

    def __post_init__(self) -> None:
        require(
            bool(self.features) and len(set(self.features)) == len(self.features),
            "--features: each at most once, and at least one",
            " ".join(self.features) or "nothing",
            f"{OWN_FEATURES}, NAME or NAME.summary of the run's teachers",
        )


class FrozenFeatures(NamedTuple):
    """Features of all images by one model.

    Attributes:
        train: Features of the training images, rows (N, C) float32 and labels (N,) int64, which are
            -1 where an image could not be used. Both arrays are mapped from files, and the same
            on every rank.
        test: Features of the test images; their labels serve to count correct predictions alone.
        classes: Names of the classes.
        seed: Seed of the repetition.
        flags: The command's own arguments.
        label: Name of the model.
        pool: Pooling of the features: "mean" of the patches, "cls" for the class token, or "both".
    """

    train: Features
    test: Features
    classes: Sequence[str]
    seed: int
    flags: Any
    label: str
    pool: Pool

    def working(
        self, description: str, images: int
    ) -> AbstractContextManager[Callable[[float], None]]:
        """Shows progress in the block; yields a function that counts this rank's finished images.

        Args:
            description: Description of the work.
            images: Number of images of all ranks.
        """
        return working(f"{self.label}: {description}", images)


class Classified(NamedTuple):
    """A protocol's predictions from the features of a model.

    Attributes:
        predicted: (N,) int64, the predicted class of each test image, on every rank.
        details: Further results, for summary.json.
    """

    predicted: NDArray[np.int64]
    details: Mapping[str, Any] = {}


Classify = Callable[[FrozenFeatures], Classified]


class _How(NamedTuple):
    """Those arguments of `of_features` with which `_measure` measures."""

    classify: Classify
    pools: tuple[Pool, ...]
    settings: Mapping[str, str]
    check: Callable[[int, Any], None] | None


def of_features(
    name: str,
    title: str,
    classify: Classify,
    *,
    flags: type = FrozenFlags,
    pools: tuple[Pool, ...] = ("mean",),
    settings: Mapping[str, str] | None = None,
    check: Callable[[int, Any], None] | None = None,
) -> Protocol:
    """Makes a protocol from a function of frozen features.

    Args:
        name, title: See `Protocol`.
        classify: The function, called once for each model, feature and seed, on all ranks.
        flags: A dataclass of the flags that it reads: `FrozenFlags`, or a subclass.
        pools: Kinds of pooling to compare without `--pool`; the class token only for models that
            have one.
        settings: The flags that summary.json records, {name in summary.json: the flag's name};
            None: the flags that `flags` adds to `FrozenFlags`, under their own names.
        check: Called with the number of training images and the flags, before the hours in which
            features are extracted.
    """
    if settings is None:
        common = {flag.name for flag in fields(FrozenFlags)} | {"seeds"}
        settings = {flag.name: flag.name for flag in fields(flags) if flag.name not in common}
    how = _How(classify, pools, settings, check)
    return Protocol(
        name=name, title=title, measure=partial(_measure, how), flags=flags, fields=_FIELDS
    )


# ------------------------------------------------------------------------------------------------


class Subject(NamedTuple):
    """A model, or a model with one of its heads, to be measured.

    Attributes:
        model: The model.
        feature: Name of the head in tables; "" for the model's own map.
        forward: Function from normalised images to a FeatureMap, in evaluation mode.
        statistics: Normalisation of its images.
        has_class_token: Whether its map has a class token, or it gives one beside its map.
        modules: The backbone, and the head if there is one.
    """

    model: NamedModel
    feature: str
    forward: Callable[[Tensor], FeatureMap]
    statistics: Statistics
    has_class_token: bool
    modules: tuple[nn.Module, ...]


def _measure(how: _How, request: Request) -> Result:
    """Extracts the features of every model and classifies them with every seed."""
    from fd_large.data.blocks import keep_blocks_in
    from fd_large.data.few_labels import few_labels
    from fd_large.data.labelled import open_split
    from fd_large.ranks import meeting

    assert request.run is not None  # The command `evaluate` has a recipe.
    models, flags, data = request.models(), request.flags, join_ranks(request)
    keep_blocks_in(data.cache, data.cache_gb)
    train = meeting.meet(
        lambda: few_labels(
            open_split(data.root, "train", val_fraction=data.val_fraction),
            fraction=data.fraction,
            per_class=data.per_class,
            seed=data.label_seed,
        )
    )
    test = meeting.meet(
        lambda: open_split(data.root, "val", train.classes, val_fraction=data.val_fraction)
    )
    if how.check is not None:
        how.check(len(train), flags)
    seeds = flags.seeds_from(request.run.runtime.seed)
    rows = [
        row
        for subject in subjects(models, flags.features)
        for row in _rows(how, subject, train, test, seeds, flags, data)
    ]
    settings = {name: getattr(flags, flag) for name, flag in how.settings.items()}
    return finish_frozen(
        request,
        rows,
        seeds=seeds,
        settings=settings | {"batch_size": flags.batch_size},
        classes=len(train.classes),
        training_images=len(train),
        pictures=len(test),
    )


def subjects(models: Sequence[NamedModel], features: Sequence[str]) -> Iterator[Subject]:
    """Yields the subjects, with one model in memory at a time.

    Raises: ConfigError: if a head is named although no model has heads, or a model with heads lacks
        it.
    """
    from fd_large.ranks import distributed

    heads = [_heads_of(model, features) for model in models]
    if tuple(features) != (OWN_FEATURES,) and not any(heads):
        raise ConfigError(
            f"--features: none of the models has heads; got {' '.join(features)}, expected a "
            "run of distillation, or an export of one that has a folder heads. Leave it out."
        )
    for model, chosen in zip(models, heads, strict=True):
        net: Any  # A type checker does not know the methods of a backbone.
        net, statistics = model.build()
        net.grid(model.image_size, model.image_size)  # Refuses a size that does not fit.
        for feature, head in (chosen or {OWN_FEATURES: None}).items():
            if head is None:
                has_class_token = net.num_prefix_tokens or getattr(net, "gives_summary", False)
                yield Subject(model, "", net, statistics, bool(has_class_token), (net,))
                continue
            forward = partial(head.eval().to(distributed.device()), net)
            prefix = head.prefix_tokens(net.num_prefix_tokens)
            yield Subject(model, f"head {feature}", forward, statistics, bool(prefix), (net, head))


def _heads_of(model: NamedModel, features: Sequence[str]) -> dict[str, Any]:
    """Returns the requested heads of a model, by their names in `--features`.

    The value None means the model's own map; the result is empty for a model without heads.

    Raises: ConfigError: if it has heads, but lacks a requested one.
    """
    from fd_large.tasks.jobs import heads_of

    if tuple(features) == (OWN_FEATURES,) or model.section.source == RANDOM:
        return {}
    heads = heads_of(model.trained_by, model.folder)
    chosen: dict[str, Any] = {}
    for feature in features if heads else ():
        label = feature.replace(".", "_")  # NAME.KIND
        if feature != OWN_FEATURES and label not in heads:
            raise ConfigError(
                f"--features: {model.label} has no such head; got {feature}, "
                f"{nearest(label, [OWN_FEATURES, *heads])}. Name one of these."
            )
        chosen[feature] = heads.get(label)
    return chosen


def _rows(
    how: _How,
    subject: Subject,
    train: LabelledImages,
    test: LabelledImages,
    seeds: Sequence[int],
    flags: Any,
    data: Data,
) -> Iterator[Row]:
    """Yields a row for each pooling of a subject; features are stored in temporary files."""
    import numpy as np

    out = out_folder(flags.out)
    pools: Sequence[Pool] = [flags.pool]
    if flags.pool == "auto":
        pools = [pool for pool in how.pools if pool == "mean" or subject.has_class_token]
    label = ", ".join(filter(None, (subject.model.label, subject.feature)))

    def features_of(images: LabelledImages, name: str) -> AbstractContextManager[list[Features]]:
        return extracted(
            subject.forward,
            subject.statistics,
            images,
            out / f"{name}_features",
            image_size=subject.model.image_size,
            words=f"{label}: {name} features",
            flags=flags,
            data=data,
            pools=pools,
        )

    with features_of(train, "training") as voting, features_of(test, "test") as tested:
        for pool, of_train, of_test in zip(pools, voting, tested, strict=True):
            words = [subject.feature, _POOLS[pool] if len(pools) > 1 else ""]
            row = Row(subject.model, feature=", ".join(filter(None, words)), pool=pool)
            row.labels = np.array(of_test.labels)  # Copied: the files are removed.
            for seed in seeds:
                features = FrozenFeatures(
                    of_train, of_test, train.classes, seed, flags, label, pool
                )
                predicted, details = _classified(how.classify, features)
                row.add(of_test.percent(predicted), details, predicted)
            yield row


def _classified(classify: Classify, features: FrozenFeatures) -> Classified:
    """Calls a protocol's function, which may be the user's own or a plugin's.

    Raises: ConfigError: if the user's function raises, or does not return a class for each test
        image.
    """
    if getattr(classify, "__module__", "").startswith("fd_large."):
        return classify(features)
    import numpy as np

    try:
        predicted, details = classify(features)
        predicted = np.asarray(predicted)
        if predicted.shape != features.test.labels.shape or predicted.dtype.kind not in "iu":
            raise ValueError(f"classes {predicted.shape} of {predicted.dtype}")
    except FDError:
        raise
    except Exception as error:  # The user's code may raise anything.
        raise ConfigError(
            f"--task: {features.flags.task} does not classify; got {doors.cause(error)}, expected "
            f"Classified with {len(features.test.labels)} whole numbers, a class for each test "
            "image. Correct the file."
        ) from error
    return Classified(predicted, details)
