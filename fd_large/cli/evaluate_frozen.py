"""`evaluate` of models as they are: k-NN and linear probes of their features, side by side."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from fd_large.cli.evaluate_flags import OWN_FEATURES, PROBES, ModelFlags
from fd_large.cli.evaluate_results import Row, finish
from fd_large.errors import ConfigError, nearest, without_secrets
from fd_large.files import out_folder
from fd_large.recipes.run import Run
from fd_large.recipes.sections import RANDOM

if TYPE_CHECKING:
    from fd_large.engine.find_model import NamedModel
    from fd_large.probes.measure import Method

# What tables call the features of `--pool`.
_POOLS = {"mean": "mean of patches", "cls": "class token"}


def measure_frozen(models: Sequence[NamedModel], task: str, own: ModelFlags, run: Run) -> int:
    """k-NN or a linear probe on features of models as they are.

    Args:
        models: What is measured.
        task: knn or linear.
        own: How.
        run: A recipe with the images and the first seed.
    """
    from fd_large.data.blocks import keep_blocks_in
    from fd_large.data.labelled import open_split
    from fd_large.kernels.precision import full_float32
    from fd_large.probes import linear
    from fd_large.probes.features import Pool
    from fd_large.probes.measure import measure
    from fd_large.ranks import distributed, meeting
    from fd_large.runtime import logs

    launch = distributed.start()
    logs.start(launch.rank)
    full_float32(distributed.device())
    keep_blocks_in(run.data.cache, run.data.cache_gb)
    data = run.data
    train = meeting.meet(lambda: open_split(data.root, "train", val_fraction=data.val_fraction))
    test = meeting.meet(
        lambda: open_split(data.root, "val", train.classes, val_fraction=data.val_fraction)
    )
    if task != "knn":
        linear.warn_of_few_steps(len(train), linear.Probe(epochs=own.probe_epochs))
    seeds = own.seeds_from(run.runtime.seed)
    rows, folder = [], Path(own.out)
    heads = [_heads_of(model, own.features) for model in models]
    if own.features != (OWN_FEATURES,) and not any(heads):
        raise ConfigError(
            f"--features: none of the models has heads; got {' '.join(own.features)}, expected a "
            "run of distillation, or an export of one that has a folder heads. Leave it out."
        )
    module: Any  # A type checker does not know the methods of a backbone.
    for model, chosen in zip(models, heads, strict=True):
        module, statistics = model.build()
        module.grid(model.image_size, model.image_size)  # Refuses a size that does not fit.
        for feature, head in (chosen or {OWN_FEATURES: None}).items():
            net, prefix = module, module.num_prefix_tokens
            if head is not None:
                net = partial(head.eval().to(distributed.device()), module)
                prefix = head.prefix_tokens(module.num_prefix_tokens)
            both = task == "knn" and prefix
            automatic: list[Pool] = ["mean", "cls"] if both else ["mean"]
            label = model.label if head is None else f"{model.label}, {feature}"
            found = measure(
                net,
                statistics,
                train,
                test,
                out_folder(own.out) / "features",
                method=cast("Method", task),
                seeds=seeds,
                label=label,
                image_size=model.image_size,
                batch_size=own.batch_size,
                pools=automatic if own.pool == "auto" else [own.pool],
                workers=run.data.workers,
                max_pixels=run.data.max_pixels,
                k=own.k,
                temperature=own.temperature,
                rates=own.probe_rates,
                epochs=own.probe_epochs,
            )
            names = [f"head {feature}"] if head is not None else []
            rows += [
                Row(
                    model,
                    one.values,
                    one.details,
                    one.predicted,
                    one.labels,
                    feature=", ".join([*names, *([_POOLS[one.pool]] if len(found) > 1 else [])]),
                )
                for one in found
            ]
    settings = (
        {"k": own.k, "temperature": own.temperature}
        if task == "knn"
        else {"rates": list(own.probe_rates), "epochs": own.probe_epochs}
    )
    finish(
        folder,
        rows,
        PROBES[task].title,
        task=task,
        root=without_secrets(run.data.root),
        seeds=seeds,
        settings=settings | {"batch_size": own.batch_size},
        classes=len(train.classes),
        training_images=len(train),
        pictures=len(test),
    )
    return distributed.leave(0)


def _heads_of(model: NamedModel, features: Sequence[str]) -> dict[str, Any]:
    """Returns what is measured of a model with heads, by the names of `--features`.

    None is its own map; nothing is listed for a model without heads.

    Raises: ConfigError: if it has heads, but not one of these.
    """
    from fd_large.tasks.jobs import heads_of

    if tuple(features) == (OWN_FEATURES,) or model.section.source == RANDOM:
        return {}
    heads = heads_of(model.trained_by, model.folder)
    found: dict[str, Any] = {}
    for feature in features if heads else ():
        label = feature.replace(".", "_")  # NAME.KIND
        if feature != OWN_FEATURES and label not in heads:
            raise ConfigError(
                f"--features: {model.label} has no such head; got {feature}, "
                f"{nearest(label, [OWN_FEATURES, *heads])}. Name one of these."
            )
        found[feature] = heads.get(label)
    return found
