"""Protocol `robustness`, which tests fine-tuned classifiers on other test sets for ImageNet.

The labels of a test set are mapped to the model's classes. ImageNet-V2 names its folders by class
numbers; -A and -R have 200 of the classes; a class of ObjectNet corresponds to one or more classes
of ImageNet; and an image of ImageNet's validation set has several ReaL labels, or none. The
predicted class is the one with the largest logit among the classes that occur in the set, or among
all classes with ReaL labels, as in the publications.

Source: Recht et al. (V2), arXiv 1902.10811; Hendrycks et al., arXiv 1907.07174 (A) and 2006.16241
(R); Wang et al. (Sketch), arXiv 1905.13549; Barbu et al. (ObjectNet), NeurIPS 2019, scored as in
imagenet-testbed (Taori et al., arXiv 2007.00644); Beyer et al. (ReaL), arXiv 2006.07159.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from fd_large.errors import ConfigError, DataError
from fd_large.evaluation.extraction import extracted, join_ranks
from fd_large.evaluation.protocol import Batched, Protocol, Request, Result
from fd_large.evaluation.results import Row, finish_frozen
from fd_large.evaluation.zeroshot import imagenet_numbers, tested_part
from fd_large.files import kind_of, out_folder, read_json

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

    from fd_large.backbones.feature_map import FeatureMap
    from fd_large.data.labelled import LabelledImages
    from fd_large.engine.find_model import NamedModel

_FIELDS = ("data.root", "data.workers", "data.max_pixels")
_REAL_FILE = re.compile(r"ILSVRC2012_val_(\d{8})\.")
# Folders of a download of ObjectNet.
_MAPPINGS, _IMAGES = "mappings", "images"


@dataclass(frozen=True, kw_only=True)
class RobustnessFlags(Batched):
    """Flags of the protocol `robustness`."""

    # Source of the images' classes in robustness. folders: the folder of an image. real: the ReaL
    # labels of ImageNet's validation images, found by file name; images without a label are left
    # out.
    labels: Literal["folders", "real"] = "folders"


class LabelSet(NamedTuple):
    """Test images with their correct classes.

    Attributes:
        images: The images; their own labels are not used.
        right: The correct classes of each image, as ImageNet's class numbers or as names.
        all_classes: Whether any class of the model may be predicted. If False, only classes that
            are correct for some image of the set may be predicted.
    """

    images: LabelledImages
    right: Sequence[Sequence[int] | Sequence[str]]
    all_classes: bool = False


def open_set(root: str, labels: str) -> LabelSet:
    """Opens a test set, whose kind is recognised by its folders.

    Args:
        root: Value of data.root: a folder with class folders, a folder that has these below val/
            or test/, or the folder of an ObjectNet download.
        labels: "folders" if the class of an image is that of its folder, or "real" for the ReaL
            labels of ImageNet's validation images.

    Raises: DataError: if the labels cannot be found.
    """
    if labels == "real":
        return _real(tested_part(root))
    if kind_of(Path(root) / _MAPPINGS) == "folder":
        return _objectnet(root)
    images = tested_part(root)
    numbers = imagenet_numbers(images.classes)
    names: Sequence[Any] = images.classes if numbers is None else numbers
    return LabelSet(images, [(names[label],) for label in images.labels.tolist()])


def _real(images: LabelledImages) -> LabelSet:
    import timm.data

    file = Path(timm.data.__file__).parent / "_info" / "imagenet_real_labels.json"
    of_number = read_json(file, where="--labels", holds=list)
    right = []
    for index in range(len(images)):
        named = _REAL_FILE.search(images[index])
        if named is None or not 0 < int(named[1]) <= len(of_number):
            raise DataError(
                f"--labels: not a validation image of ImageNet; got {Path(images[index]).name}, "
                "expected names such as ILSVRC2012_val_00000001.JPEG, by which ReaL's labels are "
                "found. Keep the files' own names, or leave out --labels."
            )
        right.append(of_number[int(named[1]) - 1])
    return LabelSet(images, right, all_classes=True)


def _objectnet(root: str) -> LabelSet:
    """Opens those images of ObjectNet whose class corresponds to classes of ImageNet.

    Args:
        root: Folder of the download.
    """
    import numpy as np

    from fd_large.data.labelled import open_labelled
    from fd_large.data.val_fraction import Part

    of_folder = _classes_of_folders(Path(root) / _MAPPINGS)
    images = open_labelled(str(Path(root) / _IMAGES))
    right = [of_folder.get(name, []) for name in images.classes]
    places = np.flatnonzero([bool(right[label]) for label in images.labels.tolist()])
    images = replace(images, images=Part(images.images, places), labels=images.labels[places])
    return LabelSet(images, [right[label] for label in images.labels.tolist()])


def _classes_of_folders(mappings: Path) -> dict[str, list[int]]:
    """Returns {folder of ObjectNet: ImageNet's class numbers}, from the files of the download.

    Args:
        mappings: The download's folder `mappings`.

    Raises: DataError: if the files are missing or damaged.
    """

    def table(name: str) -> dict[str, Any]:
        entries: dict[str, Any] = read_json(
            mappings / f"{name}.json", where="data.root", holds=dict
        )
        return entries

    try:
        lines = (mappings / "imagenet_to_label_2012_v2").read_text(encoding="utf-8").splitlines()
        numbers = {
            lines[line].strip(): int(number)
            for number, line in table("pytorch_to_imagenet_2012_id").items()
        }
        of_label = {
            label: [numbers[name] for name in names.split("; ")]
            for label, names in table("objectnet_to_imagenet_1k").items()
        }
        labels = table("folder_to_objectnet_label")
        return {folder: of_label[label] for folder, label in labels.items() if label in of_label}
    except (AttributeError, LookupError, OSError, TypeError, ValueError) as error:
        raise DataError(
            f"data.root: {mappings}: not ObjectNet's class mappings; got {type(error).__name__} "
            f"{error}, expected the files of its download. Fetch these files again."
        ) from error


def columns_of(right: LabelSet, classes: Sequence[str]) -> list[tuple[int, ...]]:
    """Returns, for each image, the indices of the correct classes among the model's logits.

    Args:
        right: The images with their correct classes.
        classes: Names of the classes that the model was trained for.

    Raises: DataError: if the model was not trained for a class of the set.
    """
    of_imagenet = imagenet_numbers(classes)
    by_name: Mapping[Any, int] = {name: place for place, name in enumerate(classes)}
    if of_imagenet is not None:
        by_name = {number: place for place, number in enumerate(of_imagenet)}
    names = {name for of_image in right.right for name in of_image}
    if unknown := sorted(names - by_name.keys(), key=str):
        raise DataError(
            f"data.root: classes that the model was not trained for; got {unknown[0]} and "
            f"{len(unknown) - 1} more, expected the model's own {len(classes)} classes, or "
            "ImageNet's for a model of ImageNet. Use another dataset, or another model."
        )
    return [tuple(by_name[name] for name in of_image) for of_image in right.right]


def best_of(
    logits: NDArray[np.float32], right: Sequence[tuple[int, ...]], *, all_classes: bool
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Returns labels and predictions, (N,) each; both are equal where the prediction is correct.

    The label of an image is the first of the image's correct classes, or -1 without any. The
    prediction is the class with the largest logit. If this is one of several correct classes of the
    image, the prediction is replaced by the label, so that both are equal.

    Args:
        logits: (N, K), of N images and K classes.
        right: The correct classes of each image, as indices from 0 to K - 1.
        all_classes: Whether classes that are correct for no image may be predicted.
    """
    import numpy as np

    known = np.arange(logits.shape[1])
    if not all_classes:
        known = np.array(sorted({column for columns in right for column in columns}))
    predicted = known[logits[:, known].argmax(1)].astype(np.int64)
    labels = np.array([columns[0] if columns else -1 for columns in right], dtype=np.int64)
    # If an image has several correct classes, a prediction of any is recorded as the first.
    is_right = [column in columns for column, columns in zip(predicted, right, strict=True)]
    return labels, np.where(is_right, labels, predicted)


# ------------------------------------------------------------------------------------------------


def _measure(request: Request) -> Result:
    """Classifies the images of a test set by the classifier of every requested model."""
    import numpy as np

    from fd_large.backbones.feature_map import FeatureMap
    from fd_large.data.centre_crops import NO_LABEL
    from fd_large.evaluation.diagnosis.models import trained_task
    from fd_large.ranks import meeting
    from fd_large.tasks.jobs import stored_run_of

    models, flags, data = request.models(), request.flags, join_ranks(request)
    label_set = meeting.meet(lambda: open_set(data.root, flags.labels))
    jobs = meeting.meet(lambda: [_job_of(model) for model in models])
    rows, folder = [], out_folder(flags.out) / "logits"
    for model, job in zip(models, jobs, strict=True):
        task: Any  # A type checker does not know the classifier's methods.
        task, stored = trained_task(model, stored_run_of(job), where="evaluate")
        # The names of the classes may be read from a folder, which a node may lack.
        classes = meeting.meet(stored.classes) or ()
        columns = meeting.meet(partial(columns_of, label_set, classes))

        def logits(pixels: Tensor, task: Any = task) -> FeatureMap:
            return FeatureMap(task.logits(pixels, None)[:, None], (1, 1), 0)

        with extracted(
            logits,
            task.statistics,
            label_set.images,
            folder,
            image_size=model.image_size,
            words=f"{model.label}: images",
            flags=flags,
            data=data,
        ) as (outputs,):
            rows_of_logits, unusable = np.array(outputs.rows), outputs.labels == NO_LABEL
        labels, predicted = best_of(rows_of_logits, columns, all_classes=label_set.all_classes)
        row = Row(model)
        row.labels = np.where(unusable, NO_LABEL, labels)
        counts = row.labels >= 0
        accuracy = 100 * float((predicted == row.labels)[counts].mean()) if counts.any() else 0.0
        row.add(accuracy, {"images": int(counts.sum())}, predicted)
        rows.append(row)
    settings = {"labels": flags.labels, "batch_size": flags.batch_size}
    return finish_frozen(request, rows, settings=settings, pictures=len(label_set.images))


def _job_of(model: NamedModel) -> Any:
    """Returns the job of the run that trained `model` as a classifier.

    Raises: ConfigError: if `model` is not the student of such a run.
    """
    job = model.trained_by
    kind = job.run.task.kind() if job else None
    if job is None or kind is None or not kind.trains_models or model.checkpoint is None:
        got = "weights" if job is None else f"a run of {job.run.task.name}"
        raise ConfigError(
            f"{model.source}: has no classifier of its own; got {got}, expected a run that "
            "fine-tuned. Fine-tune it by --task finetune, and name a folder of its --out."
        )
    return job


ROBUSTNESS = Protocol(
    name="robustness",
    title="Robustness",
    measure=_measure,
    flags=RobustnessFlags,
    fields=_FIELDS,
)
