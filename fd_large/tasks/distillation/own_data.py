"""Which teachers teach which of several datasets (`weighting.rule own_data`)."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from fd_large.data.weighted_roots import weighted_roots
from fd_large.recipes.fields import require


def teaches(
    datasets_of: Mapping[str, Collection[str]], root: str, *, image_mixup: bool
) -> list[list[bool]]:
    """Returns whether a teacher teaches a dataset, for teachers by name and datasets in order.

    Args:
        datasets_of: The names of each teacher's datasets.
        root: `data.root`, a sum of named datasets by weight.
        image_mixup: Whether images are mixed with their neighbours.

    Raises: ConfigError or DataError: if a dataset has no teacher, there is no such dataset, or a
        mixed image would be of two.
    """
    entries = sorted(datasets_of.items())
    require(
        not image_mixup,
        "weighting.rule: a mixed image is of two datasets",
        f"own_data with data.image_mixup {image_mixup}",
        "one of the two",
        "Leave data.image_mixup out",
    )
    names = [part.name for part in weighted_roots(root)]
    require(
        len(names) > 1,
        "weighting.rule: own_data needs several datasets with names",
        f"data.root {root!r}",
        "a sum of them by weight",
        "Name them as in docs/data.md",
    )
    for name, datasets in entries:
        other = [dataset for dataset in datasets if dataset not in names]
        require(
            not other,
            f"teachers.{name}.datasets: no such dataset in data.root",
            ", ".join(other),
            f"some of {', '.join(names)}",
            "Correct the name",
        )
    taught = {dataset for _, datasets in entries for dataset in datasets}
    require(
        taught.issuperset(names),
        "weighting.rule: own_data leaves images without a teacher",
        f"no teacher of {', '.join(name for name in names if name not in taught)}",
        "at least one for each dataset",
        "Name them in --teachers.NAME.datasets",
    )
    return [[dataset in datasets for dataset in names] for _, datasets in entries]
