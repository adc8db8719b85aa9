"""Protocols that classify the features of frozen models by k-NN, a probe or the user's code.

Each protocol is a function from the features of a model's training and test images
(`FrozenFeatures`) to a class for each test image (`Classified`). The rest is shared by all
protocols: images, heads, pooling, seeds, the table, the page and the intervals.
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
    """Flags that all protocols on features of frozen models have."""

    # Sources of the features, for the student of a distillation run or for an export of that
    # student. own: the student's map. NAME: the output of its head for the map of the teacher NAME.
    # NAME.summary: the output of its head for the summary of the teacher NAME. A single teacher has
    # the name teacher. Several sources are measured side by side. Models without heads are measured
    # by their own map.
    features: tuple[str, ...] = (OWN_FEATURES,)

    def __post_init__(self) -> None:
        require(
            bool(self.features) and len(set(self.features)) == len(self.features),
            "--features: a name is repeated, or none is given",
            " ".join(self.features) or "nothing",
            f"{OWN_FEATURES}, NAME or NAME.summary of the run's teachers",
        )


class FrozenFeatures(NamedTuple):
    """Features of all images by one model.

    Attributes:
        train: Features of the training images, with rows (N, C) float32 and labels (N,) int64. The
            label of an image that could not be decoded is -1. Both arrays are mapped from files,
            and equal on every rank.
        test: Features of the test images. A classifier must not read their labels, which serve to
            count correct predictions.
        classes: Names of the classes.
        seed: Seed of the repetition.
        flags: The command's own arguments.
        label: Name of the model.
        pool: Pooling of the features: "mean" for the mean of the patch tokens, "cls" for the class
            token, or "both" for their concatenation.
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
        """Shows a progress bar during the block of a `with` statement.

        Args:
            description: Description of the work.
            images: Number of images of all ranks, of which each rank has an equal share.

        Returns: a context manager, which yields a function of the number of images that this rank
            has finished since the last call.
        """
        return working(f"{self.label}: {description}", images)


class Classified(NamedTuple):
    """Predictions of a protocol from the features of a model.

    Attributes:
        predicted: Index of the predicted class of each test image, (N,) int64, on every rank.
        details: Further results for summary.json, by name.
    """

    predicted: NDArray[np.int64]
    details: Mapping[str, Any] = {}


Classify = Callable[[FrozenFeatures], Classified]


class _How(NamedTuple):
    """The arguments of `of_features` that `_measure` needs; `of_features` describes them."""

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
    """Returns the protocol of a function that classifies features of frozen models.

    Args:
        name: Name of the protocol in `--task`, in summary.json and in the file name of the plot.
        title: Name of the protocol in tables and plots.
        classify: The function, called once for each model, feature, pooling and seed, on all ranks.
        flags: Dataclass of the flags that `classify` reads: `FrozenFlags` or a subclass.
        pools: Kinds of pooling to compare if --pool is "auto". "cls" and "both" are left out for
            models without a class token.
        settings: The flags that summary.json records, {name in summary.json: name of the flag};
            None for the flags that `flags` adds to `FrozenFlags`, under their own names.
        check: Function of the number of training images and the flags, called before features are
            extracted, which may take hours; None for no check.
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
    """Model whose features are extracted, with one of its heads or without.

    Attributes:
        model: The model.
        feature: Name of the head in tables; "" for the model's own map.
        forward: Function from normalised images to a FeatureMap, in evaluation mode.
        statistics: Normalisation of the images.
        has_class_token: Whether the features include a class token, in the map or beside it.
        modules: The backbone, followed by the head if there is one.
    """

    model: NamedModel
    feature: str
    forward: Callable[[Tensor], FeatureMap]
    statistics: Statistics
    has_class_token: bool
    modules: tuple[nn.Module, ...]


def _measure(how: _How, request: Request) -> Result:
    """Classifies the features of every requested model with every seed, and writes the results.

    Args:
        how: The protocol's function and settings.
        request: The user's request.
    """
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
    """Yields each model with each of the requested features, with one model in memory at a time.

    A model without heads is yielded once, with its own map.

    Args:
        models: The models.
        features: Values of `--features`: "own" for the model's own map, or names of heads.

    Raises:
        ConfigError: If a head is named although no model has heads, or if a model with heads lacks
            the named head.
    """
    from fd_large.ranks import distributed

    heads = [_heads_of(model, features) for model in models]
    if tuple(features) != (OWN_FEATURES,) and not any(heads):
        raise ConfigError(
            f"--features: none of the models has heads; got {' '.join(features)}, expected a "
            "run of distillation, or an export of one that has a folder heads. Leave out "
            "--features."
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
    """Returns the requested heads of a model, {name in `features`: head}.

    The head of "own", which stands for the model's own map, is None. The result is empty if the
    model has no heads, or if only "own" is requested.

    Args:
        model: The model.
        features: Values of `--features`: "own", or names of heads.

    Raises: ConfigError: if the model has heads, but lacks a requested head.
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
    """Yields a row of the table for each kind of pooling, with the accuracy of every seed.

    The kinds of pooling are the one that --pool names, or for "auto" those of the protocol. Of
    these, a subject without a class token has only "mean".

    Args:
        how: The protocol's function and settings.
        subject: The model, with one of its heads or without.
        train: The training images with their labels.
        test: The test images with their labels.
        seeds: Seeds of the repetitions.
        flags: The command's own arguments.
        data: The section `data` of the recipe.
    """
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
    """Returns the predictions of a protocol's function, which may be the user's own or a plugin's.

    Raises:
        ConfigError: If the user's function raises an exception, or does not return one class for
            each test image.
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
