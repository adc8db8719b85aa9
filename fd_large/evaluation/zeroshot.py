"""Protocol `zeroshot`, which classifies images by class names, without training images.

The text tower of a CLIP teacher computes a vector for each class from its name. The predicted class
of an image is the class whose vector has the largest cosine similarity to the image embedding. A
student predicts CLIP's image embedding by a head, and CLIP itself computes it. Only the classes of
the test images can be predicted, for example the 200 classes of ImageNet-A or -R. The names of
ImageNet's classes and most prompts come from open_clip, which must be installed for them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fd_large.errors import ConfigError, without_secrets
from fd_large.evaluation.extraction import extracted, join_ranks
from fd_large.evaluation.protocol import Batched, Protocol, Request, Result
from fd_large.evaluation.results import Row, finish_frozen
from fd_large.files import kind_of, out_folder

if TYPE_CHECKING:
    from torch import Tensor

    from fd_large.backbones.feature_map import FeatureMap
    from fd_large.data.labelled import LabelledImages
    from fd_large.engine.find_model import NamedModel

_PROMPTS = ("openai", "simple", "one")
_IMAGENET_CLASSES = 1000
_FIELDS = ("data.root", "data.image_size", "data.workers", "data.max_pixels")


@dataclass(frozen=True, kw_only=True)
class ZeroShotFlags(Batched):
    """Flags of zero-shot classification."""

    # Name of the CLIP teacher of a run whose image embedding the student has learnt.
    clip: str = "clip"
    # CLIP model whose text tower embeds the class names: open_clip:ARCH/TAG, hf:REPO, or a folder
    # with a tokenizer. Empty: the source of the run's CLIP teacher.
    text: str = ""
    # File with the name of a class on each line, in the order of the class folders. Empty: the
    # names of ImageNet's classes if the folders are named by synsets (n01440764) or by numbers (0
    # to 999), else the names of the folders.
    class_names: str = ""
    # Prompts into which a class name is put. openai: the 80 prompts of CLIP's paper. simple: 7 of
    # these prompts (both need open_clip). one: "a photo of a NAME.". Or a file with a prompt on
    # each line, in which {} stands for the class name.
    prompts: str = "openai"


def names_of(folders: Sequence[str], file: str = "") -> list[str]:
    """Returns the name of each class, in the order of the folders.

    Args:
        folders: Names of the class folders in their order, in which 10 may come before 2.
        file: File with the name of a class on each line; if empty, names follow from the folders.

    Raises:
        ConfigError: If a class lacks a name, or if open_clip is missing for ImageNet's names.
    """
    if file:
        names = _lines(file, "--class_names")
        if len(names) != len(folders):
            raise ConfigError(
                f"--class_names: {file}: not a name for each class; got {len(names)} names, "
                f"expected {len(folders)}, one for each of {folders[0]} to {folders[-1]}. Correct "
                "the file."
            )
        return names
    numbers = imagenet_numbers(folders)
    if numbers is None:
        return [folder.replace("_", " ") for folder in folders]
    imagenet = _open_clip("IMAGENET_CLASSNAMES", "--class_names FILE")
    return [imagenet[number] for number in numbers]


def imagenet_numbers(folders: Sequence[str]) -> list[int] | None:
    """Returns the ImageNet class indices of folders, or None if a folder is no class of ImageNet.

    Args:
        folders: Names of the folders, which may be synsets, as in ImageNet itself, -A, -R and
            -Sketch, or all numbers from 0 to 999, as in ImageNet-V2, in any order.
    """
    from timm.data import ImageNetInfo

    if all(folder.isdecimal() and int(folder) < _IMAGENET_CLASSES for folder in folders):
        # Ten folders of digits are no part of ImageNet.
        numbers = [int(folder) for folder in folders]
        return numbers if len(numbers) == _IMAGENET_CLASSES else None
    synsets = {name: number for number, name in enumerate(ImageNetInfo().label_names())}
    if not set(folders) <= synsets.keys():
        return None
    return [synsets[folder] for folder in folders]


def prompts_of(name: str) -> tuple[str, ...]:
    """Returns the prompts, in each of which {} stands for the class name.

    Args:
        name: Value of `--prompts`: "openai", "simple", "one", or the path of a file.

    Raises: ConfigError: if the name is unknown, the file cannot be read, or open_clip is missing.
    """
    if name == "one":
        return ("a photo of a {}.",)
    if name in _PROMPTS:
        texts = _open_clip(f"{name.upper()}_IMAGENET_TEMPLATES", "--prompts one")
        return tuple(text("{}") for text in texts)
    if kind_of(Path(name)) != "file":
        raise ConfigError(
            f"--prompts: unknown prompts; got {name}, expected {', '.join(_PROMPTS)} or a file. "
            "Correct the name."
        )
    return tuple(_lines(name, "--prompts"))


# ------------------------------------------------------------------------------------------------


def _measure(request: Request) -> Result:
    """Classifies the test images by the image embeddings of every requested model."""
    import numpy as np
    import torch

    from fd_large.engine.text_tower import classes_of, probabilities
    from fd_large.ranks import meeting

    models, flags, data = request.models(), request.flags, join_ranks(request)
    prompts = meeting.meet(lambda: prompts_of(flags.prompts))
    images = meeting.meet(lambda: tested_part(data.root))
    names = meeting.meet(lambda: names_of(images.classes, flags.class_names))
    embeddings = meeting.meet(lambda: [_embedding_of(model, flags.clip) for model in models])
    texts = [flags.text or _source(model, flags.clip) for model in models]
    rows, folder = [], out_folder(flags.out) / "features"
    for model, embedding, text in zip(models, embeddings, texts, strict=True):
        classes = meeting.meet(partial(classes_of, text, tuple(names), prompts))
        net: Any  # A type checker does not know the methods of a backbone.
        net, statistics = model.build()
        net.grid(model.image_size, model.image_size)  # Refuses a size that does not fit.
        with extracted(
            partial(embedding, net),
            statistics,
            images,
            folder,
            image_size=model.image_size,
            words=f"{model.label}: embeddings",
            flags=flags,
            data=data,
        ) as (features,):
            blocks = torch.from_numpy(np.array(features.rows)).split(8192)
            of_blocks = [probabilities(block, classes).argmax(1) for block in blocks]
            predicted = torch.cat(of_blocks).numpy()
            row = Row(model)
            row.labels = np.array(features.labels)
            row.add(features.percent(predicted), {"text": without_secrets(text)}, predicted)
        rows.append(row)
    settings = {"prompts": flags.prompts, "clip": flags.clip, "batch_size": flags.batch_size}
    return finish_frozen(request, rows, settings=settings, classes=len(names), pictures=len(images))


def tested_part(root: str) -> LabelledImages:
    """Returns the test images of the dataset `root`, which are in its subfolder val/ or test/.

    All images are returned if the dataset has no such subfolder.
    """
    from fd_large.data.labelled import SPLITS, open_labelled, open_split
    from fd_large.data.roots import local_kind

    where = "data.root"
    has_part = any(local_kind(root, name, where=where) == "folder" for name in SPLITS["val"])
    return open_split(root, "val") if has_part else open_labelled(root)


def _own_projection(model: NamedModel) -> Tensor | None:
    """Returns the matrix by which the CLIP `model` projects its class token to the image embedding.

    The result is None if `model` is the student of a run, or has no such matrix.
    """
    from fd_large.tasks.distillation.teacher import projection_of

    if model.trained_by is not None:
        return None
    with suppress(ConfigError):
        return projection_of(model.label, model.section, model.weights)
    return None


def _embedding_of(model: NamedModel, clip: str) -> Callable[..., Any]:
    """Returns the function by which a model computes image embeddings in the space of a CLIP.

    The function takes a backbone and normalised images, and returns a FeatureMap of 1 x 1 tokens.
    A student has a head for the CLIP's embedding, and a CLIP its own projection.

    Args:
        model: The model.
        clip: Name of the CLIP among the teachers of the model's run.

    Raises: ConfigError: if the model has neither the head nor a projection.
    """
    from fd_large.ranks import distributed
    from fd_large.tasks.jobs import heads_of

    heads = heads_of(model.trained_by, model.folder)
    summary = f"{clip}_summary"
    if summary in heads:
        head = heads[summary].eval().to(distributed.device())
        return partial(head, in_teacher_units=True)
    projection = _own_projection(model)
    if projection is not None:
        return partial(_projected, projection.float().to(distributed.device()))
    known = [name.removesuffix("_summary") for name in heads if name.endswith("_summary")]
    remedy = (
        f"Set --clip {' or '.join(known)}"
        if known
        else "Train with --teachers.clip.source open_clip:ViT-B-16/openai "
        "--teachers.clip.targets map summary --teachers.clip.summary.layer embedding "
        "--teachers.clip.summary.loss cosine --teachers.clip.summary.normaliser none "
        "(docs/several_teachers.md)"
    )
    raise ConfigError(
        f"--clip: {model.label} has learnt no image embedding of a teacher {clip}; got "
        f"embeddings of {', '.join(known) or 'none'}, expected the embedding of a CLIP. {remedy}."
    )


def _projected(projection: Tensor, net: Any, pixels: Tensor) -> FeatureMap:
    from fd_large.tasks.distillation.target import as_map, summary

    return as_map(summary(net(pixels)).float() @ projection.T)


def _source(model: NamedModel, clip: str) -> str:
    """Returns the source of the weights of the CLIP whose text tower is needed.

    If the model itself is a CLIP, its own source is returned; otherwise the source of the teacher
    in the model's run.

    Args:
        model: The model to evaluate.
        clip: Name of the teacher in the run.

    Raises: ConfigError: if the run does not name the source.
    """
    if _own_projection(model) is not None:
        return str(model.section.source)
    teachers = model.trained_by.run.taught_by if model.trained_by else {}
    teacher = teachers.get(clip)
    if teacher is None or not teacher.source:
        raise ConfigError(
            f"--text: {model.label} does not name its teacher's source; got nothing, expected "
            "the CLIP with the text tower. Set --text, for example open_clip:ViT-B-16/openai."
        )
    return str(teacher.source)


def _lines(file: str, flag: str) -> list[str]:
    """Returns the non-empty lines of the text file `file`, without surrounding white space.

    Args:
        file: Path of the file.
        flag: The flag that named the file, for messages.

    Raises: ConfigError: if the file cannot be read.
    """
    try:
        text = Path(file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"{flag}: cannot be read; got {error} for {file}, expected a text file. Correct the "
            "path."
        ) from error
    return [line.strip() for line in text.splitlines() if line.strip()]


def _open_clip(name: str, remedy: str) -> Any:
    """Returns an attribute of open_clip, such as its list of ImageNet's class names.

    Args:
        name: Name of the attribute.
        remedy: What the user can set instead, for the message.

    Raises: ConfigError: if open_clip is not installed.
    """
    try:
        import open_clip
    except ImportError as error:
        raise ConfigError(
            f"--task zeroshot: {name} needs a package that is not installed; got {error}, "
            f"expected open_clip. Run pip install 'fd_large[open_clip]', or set {remedy}."
        ) from error
    return getattr(open_clip, name)


ZEROSHOT = Protocol(
    name="zeroshot",
    title="Zero-shot",
    measure=_measure,
    flags=ZeroShotFlags,
    fields=_FIELDS,
)
