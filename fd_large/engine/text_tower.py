"""The text tower of a CLIP model: class names as vectors beside which images are classified.

A class is the mean of its prompts' embeddings, each of length 1; an image belongs to the class
whose vector has the largest cosine with its embedding.

Source: Radford et al. (CLIP), arXiv 2103.00020, section 3.1.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fd_large.errors import ConfigError, WeightsError, first_line
from fd_large.files import kind_of
from fd_large.weights.locate import HUB, OPEN_CLIP

PROMPTS = ("a photo of a {}.",)
_WHERE = "zero_shot"
_SIDECAR = "open_clip_config.json"


class Classes(NamedTuple):
    """Classes as a text tower sees them.

    Attributes:
        vectors: (K, C) float32, of length 1, on the CPU.
        scale: What the model multiplies cosines by before a softmax.
    """

    vectors: Tensor
    scale: float


def check_prompts(class_names: Sequence[str], prompts: Sequence[str]) -> None:
    """Refuses a text in place of a list of names, and prompts without a place for a name.

    Raises: ConfigError: saying which.
    """
    if isinstance(class_names, str) or not class_names:
        raise ConfigError(
            f"{_WHERE}: no list of class names; got {class_names!r}, expected names such as "
            '["cat", "dog"]. Put them into a list.'
        )
    if isinstance(prompts, str) or not prompts or not all("{}" in prompt for prompt in prompts):
        raise ConfigError(
            f"{_WHERE}: no list of prompts; got {prompts!r}, expected texts that have {{}} where "
            'the name of the class goes, such as ["a photo of a {}."]. Correct them.'
        )


@lru_cache(maxsize=4)
def classes_of(source: str, class_names: tuple[str, ...], prompts: tuple[str, ...]) -> Classes:
    """Returns classes by their names; the tower is in memory meanwhile only.

    Args:
        source: A folder of transformers' CLIP with its tokenizer, or of open_clip; hf:REPO; or
            open_clip:ARCH/TAG.
        class_names: The names of the classes, K.
        prompts: Texts that have {} where the name goes.

    Raises: ConfigError, WeightsError: if there is no such tower.
    """
    check_prompts(class_names, prompts)
    encode, scale = _tower(source)
    with torch.no_grad():
        vectors = [
            F.normalize(encode([prompt.format(name) for prompt in prompts]).float(), dim=-1)
            for name in class_names
        ]
    means = torch.stack([of_prompts.mean(0) for of_prompts in vectors])
    return Classes(F.normalize(means, dim=-1), scale)


def probabilities(embeddings: Tensor, classes: Classes) -> Tensor:
    """Returns what the model says of images, (B, K) float32.

    Args:
        embeddings: (B, C) in the space of the texts, of any length.
        classes: The classes.

    Raises: ConfigError: if the two are not of one space.
    """
    width, wanted = embeddings.shape[1], classes.vectors.shape[1]
    if width != wanted:
        raise ConfigError(
            f"{_WHERE}: the head's summary is not in the space of the texts; got {width} channels "
            f"beside {wanted} of the text tower, expected equal ones. Train with "
            "--teachers.NAME.summary.layer embedding, and name the text tower of that teacher."
        )
    vectors = classes.vectors.to(embeddings.device)
    return (classes.scale * F.normalize(embeddings.float(), dim=1) @ vectors.T).softmax(1)


def _tower(source: str) -> tuple[Callable[[list[str]], Tensor], float]:
    """Returns what encodes texts, (N, C), and the scale of cosines."""
    is_open_clip = source.startswith(OPEN_CLIP) or kind_of(Path(source) / _SIDECAR) == "file"
    make = _of_open_clip if is_open_clip else _of_transformers
    try:
        return make(source)
    except ImportError as error:
        raise WeightsError(
            f"{_WHERE}: a package for this text tower is not installed; got {first_line(error)} "
            f"for {source}, expected it. pip install 'fd_large[open_clip]' or "
            "'fd_large[transformers]'."
        ) from error
    except (AttributeError, KeyError, OSError, RuntimeError, TypeError, ValueError) as error:
        raise WeightsError(
            f"{_WHERE}: no text tower; got {first_line(error)[:300]} for {source}, expected the "
            "folder of a CLIP of transformers with its tokenizer, or of open_clip, hf:REPO, or "
            "open_clip:ARCH/TAG. Name one."
        ) from error


def _of_open_clip(source: str) -> tuple[Callable[[list[str]], Tensor], float]:
    import open_clip

    name, _, tag = source.removeprefix(OPEN_CLIP).partition("/")
    if not source.startswith(OPEN_CLIP):
        name, tag = f"local-dir:{source}", ""
    model: Any = open_clip.create_model(name, pretrained=tag or None).eval()
    tokenizer = open_clip.get_tokenizer(name)
    del model.visual
    return lambda texts: model.encode_text(tokenizer(texts)), model.logit_scale.exp().item()


def _of_transformers(source: str) -> tuple[Callable[[list[str]], Tensor], float]:
    from transformers import AutoModel, AutoTokenizer

    is_local = not source.startswith(HUB)
    name = source.removeprefix(HUB)
    # A name that is no folder would be looked for on the Hub, and code that comes along is not run.
    options = {"local_files_only": is_local, "trust_remote_code": False}
    model: Any = AutoModel.from_pretrained(name, **options).eval()
    tokenizer = AutoTokenizer.from_pretrained(name, **options)
    del model.vision_model

    longest = model.config.text_config.max_position_embeddings

    def encode(texts: list[str]) -> Tensor:
        # To the length that it was trained with: SigLIP reads the last place, whatever is there.
        given = tokenizer(
            texts, padding="max_length", max_length=longest, truncation=True, return_tensors="pt"
        )
        found: Tensor = model.get_text_features(**given).pooler_output
        return found

    return encode, model.logit_scale.exp().item()
