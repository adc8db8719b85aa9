"""Embeds class names by a CLIP's text tower, for zero-shot classification.

The embeddings of a class's prompts are normalised to an L2 norm of 1. Their mean, normalised in the
same way, is the vector of the class. An image belongs to the class whose vector has the largest
cosine with the image's embedding.

Source: Radford et al. (CLIP), arXiv 2103.00020, section 3.1.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fd_large.backbones.transformers.kinds import TEXT_KINDS, fields_of_kind, library
from fd_large.errors import ConfigError, WeightsError, first_line
from fd_large.files import kind_of, parse_json
from fd_large.recipes.family import is_plain
from fd_large.weights.named import HUB, OPEN_CLIP
from fd_large.weights.read import Tensors, read, read_json

PROMPTS = ("a photo of a {}.",)
_WHERE = "zero_shot"
_SIDECAR = "open_clip_config.json"


class Classes(NamedTuple):
    """Classes as embeddings of a text tower.

    Attributes:
        vectors: (K, C) float32 on the CPU, each row of L2 norm 1.
        scale: The factor by which the model multiplies cosines before the softmax.
    """

    vectors: Tensor
    scale: float


def check_prompts(class_names: Sequence[str], prompts: Sequence[str]) -> None:
    """Raises ConfigError unless class names and prompts are lists, and each prompt has a {}."""
    if isinstance(class_names, str) or not class_names:
        raise ConfigError(
            f"{_WHERE}: not a list of class names; got {class_names!r}, expected names such as "
            '["cat", "dog"]. Pass a list.'
        )
    if isinstance(prompts, str) or not prompts or not all("{}" in prompt for prompt in prompts):
        raise ConfigError(
            f"{_WHERE}: not a list of prompts; got {prompts!r}, expected texts that have {{}} "
            "where "
            'the name of the class goes, such as ["a photo of a {}."]. Correct the prompts.'
        )


@lru_cache(maxsize=4)
def classes_of(source: str, class_names: tuple[str, ...], prompts: tuple[str, ...]) -> Classes:
    """Returns the classes' embeddings; the text tower is dropped from memory afterwards.

    Args:
        source: A folder of transformers' CLIP with its tokenizer, or of open_clip; hf:REPO; or
            open_clip:ARCH/TAG.
        class_names: The names of the classes, K.
        prompts: Texts that have {} in the place of the class name.

    Raises: ConfigError, WeightsError: If the text tower is missing or cannot be read.
    """
    check_prompts(class_names, prompts)
    encode, scale = _tower(source)
    with torch.no_grad():
        vectors = [
            F.normalize(encode([prompt.replace("{}", name) for prompt in prompts]).float(), dim=-1)
            for name in class_names
        ]
    means = torch.stack([of_prompts.mean(0) for of_prompts in vectors])
    return Classes(F.normalize(means, dim=-1), scale)


def probabilities(embeddings: Tensor, classes: Classes) -> Tensor:
    """Returns the probability of each class for each image, (B, K) float32.

    `embeddings` are those of the images in the embedding space of the texts, (B, C), of any norm.

    Raises: ConfigError: if the embeddings of images and texts differ in width.
    """
    width, expected = embeddings.shape[1], classes.vectors.shape[1]
    if width != expected:
        raise ConfigError(
            f"{_WHERE}: the head's summary is not in the embedding space of the texts; got "
            f"{width} channels, expected {expected} as in the text tower. Train with "
            "--teachers.NAME.summary.layer embedding, and name the text tower of that teacher."
        )
    vectors = classes.vectors.to(embeddings.device)
    return (classes.scale * F.normalize(embeddings.float(), dim=1) @ vectors.T).softmax(1)


def _tower(source: str) -> tuple[Callable[[list[str]], Tensor], float]:
    """Opens the text tower of a CLIP; for `source` see `classes_of`.

    Returns: a function that maps N texts to embeddings (N, C); the factor by which the model
        multiplies cosines before the softmax.
    Raises: WeightsError: if a package is not installed, or the tower cannot be read.
    """
    is_open_clip = source.startswith(OPEN_CLIP) or kind_of(Path(source) / _SIDECAR) == "file"
    make = _of_open_clip if is_open_clip else _of_transformers
    try:
        return make(source)
    except ImportError as error:
        raise WeightsError(
            f"{_WHERE}: a package for this text tower is not installed; got {first_line(error)} "
            f"for {source}, expected the package. Run pip install 'fd_large[open_clip]' or "
            "'fd_large[transformers]'."
        ) from error
    except (AttributeError, KeyError, OSError, RuntimeError, TypeError, ValueError) as error:
        raise WeightsError(
            f"{_WHERE}: no usable text tower; got {first_line(error)[:300]} for {source}, "
            "expected the folder of a CLIP of transformers with its tokenizer, or of open_clip, "
            "hf:REPO, or open_clip:ARCH/TAG. Name such a source."
        ) from error


def _of_open_clip(source: str) -> tuple[Callable[[list[str]], Tensor], float]:
    import open_clip

    if not source.startswith(OPEN_CLIP):
        return _of_open_clip_folder(open_clip, Path(source))
    name, _, tag = source.removeprefix(OPEN_CLIP).partition("/")
    if (name, tag) not in open_clip.list_pretrained():  # Else a folder or repository, or a file.
        raise ValueError(f"no weights {tag!r} of a model {name!r}")
    model: Any = open_clip.create_model(name, pretrained=tag).eval()
    tokenizer = open_clip.get_tokenizer(name)
    del model.visual
    return lambda texts: model.encode_text(tokenizer(texts)), model.logit_scale.exp().item()


# Settings of a tiny image tower, built in place of the folder's own, which is not needed.
_NO_VISION = {"image_size": 32, "patch_size": 32, "layers": 1, "width": 64}


def _of_open_clip_folder(package: Any, folder: Path) -> tuple[Callable[[list[str]], Tensor], float]:
    """Builds a folder's text tower from open_clip's class and the folder's tensors, as `_tower`.

    No code of the folder is run. The configuration may give sizes and flags but no names, since a
    named model or tokenizer would be downloaded from the Hub and built from its own files.
    `package` is the module open_clip.

    Raises: ValueError: if the configuration gives other entries, or the tensors do not fit it.
    """
    config = read_json(folder / _SIDECAR, where=_WHERE)["model_cfg"]
    text, cleaned = dict(config["text_cfg"]), {}
    if "clean" in (kwargs := text.pop("tokenizer_kwargs", None) or {}):
        cleaned = {"clean": str(kwargs["clean"])}
    fields = {field.name for field in dataclasses.fields(package.CLIPTextCfg)}
    unknown = [
        name
        for name, value in text.items()
        if value is not None
        and (
            name not in fields
            or name.startswith(("hf_", "tokenizer"))
            or not is_plain(value, counts_blocks=name == "layers")
        )
    ]
    if unknown:
        raise ValueError(f"text_cfg: {', '.join(unknown)}, which no tower of a folder may have")
    tensors = read(folder, where=_WHERE)
    kind = package.CustomTextCLIP if "text.token_embedding.weight" in tensors else package.CLIP
    arguments = (int(config["embed_dim"]), _NO_VISION, text, bool(config.get("quick_gelu")))
    with torch.device("meta"):
        expected = kind(*arguments).state_dict()
    shapes = {key: tuple(t.shape) for key, t in expected.items() if not key.startswith("visual.")}
    unlike = [k for k, shape in shapes.items() if k not in tensors or tensors.shape(k) != shape]
    if unlike:
        raise ValueError(f"tensors that do not fit {_SIDECAR}: {', '.join(unlike[:3])}")
    model: Any = kind(*arguments).eval()  # Only now, as large as the file.
    model.load_state_dict({key: tensors[key].float() for key in shapes}, strict=False)
    del model.visual
    tokenizer = package.SimpleTokenizer(context_length=model.context_length, **cleaned)
    return lambda texts: model.encode_text(tokenizer(texts)), model.logit_scale.exp().item()


def _of_transformers(source: str) -> tuple[Callable[[list[str]], Tensor], float]:
    folder = _fetched(source.removeprefix(HUB)) if source.startswith(HUB) else Path(source)
    package = library(_WHERE)
    if kind_of(folder / "config.json", where=_WHERE) != "file":
        raise ValueError("no folder with config.json")
    config = read_json(folder / "config.json", where=_WHERE)
    name = config.get("model_type") if isinstance(config, dict) else None
    if name not in TEXT_KINDS:
        raise ValueError(f"model_type {str(name)[:50]!r}, known: {', '.join(TEXT_KINDS)}")
    tensors = read(folder, where=_WHERE)
    model = _text_model(package, name, config, tensors)
    tokenizer = _tokenizer(package, folder)
    longest = model.config.max_position_embeddings

    def encode(texts: list[str]) -> Tensor:
        # Padded to the length of its training: SigLIP reads the last position, padding or not.
        tokens = tokenizer(
            texts, padding="max_length", max_length=longest, truncation=True, return_tensors="pt"
        )
        output = model(**{key: value for key, value in tokens.items() if key in _TAKEN})
        embeddings: Tensor | None = getattr(output, "text_embeds", None)
        return output.pooler_output if embeddings is None else embeddings

    return encode, tensors["logit_scale"].float().exp().item()


_TAKEN = ("input_ids", "attention_mask")
# Classes of transformers that read tables: those of the published models.
_TOKENIZERS = (
    *("CLIPTokenizer", "CLIPTokenizerFast", "SiglipTokenizer", "Siglip2Tokenizer"),
    *("GemmaTokenizer", "GemmaTokenizerFast", "PreTrainedTokenizerFast", "TokenizersBackend"),
)
_FILES = ("*.json", "*.safetensors", "*.bin", "merges.txt", "*.model")


def _fetched(repository: str) -> Path:
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(repository, allow_patterns=list(_FILES)))


def _text_model(package: Any, name: str, config: dict[str, Any], tensors: Tensors) -> Any:
    """Builds a text tower in float32 from transformers' class and a folder's tensors.

    No code of the folder is run. Only sizes and flags of its config.json are used, since other
    entries may name a kernel or code. `package` is the module transformers, and `name` a key of
    `TEXT_KINDS`.

    Raises: ValueError: if the tensors do not fit the configuration.
    """
    kind = TEXT_KINDS[name]
    # Early files repeat the tower's fields there, and transformers lets these win.
    repeated = config.get(f"{kind.nested}_dict")
    text = config.get(kind.nested) or {}
    text = {**text, **repeated} if isinstance(repeated, dict) else text
    fields, _ = fields_of_kind(kind, {kind.nested: text}, _WHERE)
    values = parse_json(fields)
    if name == "clip":
        values["projection_dim"] = tensors.shape("text_projection.weight")[0]
    settings = getattr(package, kind.config)(**values, attn_implementation="sdpa")
    with torch.device("meta"):
        model = getattr(package, kind.model)(settings)
    expected = {_plain_name(key): (key, tuple(t.shape)) for key, t in model.state_dict().items()}
    stored = {
        _plain_name(key): key for key in tensors if key.startswith(("text_model.", "text_project"))
    }
    unlike = [
        key
        for key, (_, shape) in expected.items()
        if key not in stored or tensors.shape(stored[key]) != shape
    ]
    unread = [key for key in stored if key not in expected and not key.endswith("position_ids")]
    if unlike or unread:
        raise ValueError(
            f"tensors that do not fit config.json: {', '.join([*unlike, *unread][:3])}"
        )
    # Only now, as large as the file.
    state = {key: tensors[stored[plain]].float() for plain, (key, _) in expected.items()}
    model.load_state_dict(state, assign=True)
    for module in model.modules():
        for key, buffer in module.named_buffers(recurse=False):
            if buffer.is_meta:
                assert key == "position_ids", key
                module.register_buffer(key, torch.arange(buffer.shape[1])[None], persistent=False)
    return model.eval()


def _plain_name(key: str) -> str:
    """Returns a tensor's name without "text_model.", which only some releases have."""
    return key.replace("text_model.", "")


def _tokenizer(package: Any, folder: Path) -> Any:
    """Returns the tokenizer that the module transformers (`package`) reads from a folder.

    Raises: ValueError: if the folder names a class that is not in `_TOKENIZERS`.
    """
    file = folder / "tokenizer_config.json"
    config = read_json(file, where=_WHERE) if kind_of(file, where=_WHERE) else {}
    stated = config.get("tokenizer_class") if isinstance(config, dict) else config
    if stated is not None and stated not in _TOKENIZERS:
        raise ValueError(f"tokenizer_class {str(stated)[:50]!r}, known: {', '.join(_TOKENIZERS)}")
    # Each release knows which class it takes for a type of model. No code of the folder is run.
    return package.AutoTokenizer.from_pretrained(
        folder, local_files_only=True, trust_remote_code=False
    )
