"""Where weights come from: a path, or a scheme that ends in a file.

A source is a path (also `FILE#teacher` and the like), `package:NAME`, `hf:REPO`,
`open_clip:ARCH/TAG`, or the scheme of a family (`timm:NAME`, `module:PATH/TO/FILE.py:NAME`), which
brings its tensors itself.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from fd_large.backbones.download import downloaded
from fd_large.backbones.registry import family_of_source
from fd_large.backbones.statistics import Statistics
from fd_large.errors import WeightsError, first_line, nearest
from fd_large.weights.named import (
    HUB,
    OPEN_CLIP,
    PACKAGE,
    file_in_package,
    no_open_clip,
)
from fd_large.weights.read import Tensors

_HUB_FILES = ("*.json", "*.safetensors", "*.bin")


class Located(NamedTuple):
    """Where a source ends, and what is known of it by then.

    Attributes:
        path: A file, or a folder that holds one.
        tensors: What there is in place of a file; None if there is one.
        library: The library that describes the model; "" is none.
        config: The library's description of the model.
        statistics: Image statistics that the weights were trained with; None if unknown.
    """

    path: Path
    tensors: Tensors | None = None
    library: str = ""
    config: Any = None
    statistics: Statistics | None = None


def locate(source: str, *, where: str = "weights") -> Located:
    """Returns the file or folder of a source, downloading it where that is what it says.

    Raises: WeightsError: if a package is not installed, or the weights cannot be fetched.
    """
    if source.startswith(PACKAGE):
        return Located(file_in_package(source.removeprefix(PACKAGE), where))
    if source.startswith(HUB):
        return Located(downloaded(source, partial(_from_hub, source.removeprefix(HUB), where)))
    if source.startswith(OPEN_CLIP):
        name = source.removeprefix(OPEN_CLIP)
        return downloaded(source, partial(_from_open_clip, name, where))
    if brought := family_of_source(source):
        family, rest = brought
        assert family.scheme is not None
        net, statistics = family.scheme.load(rest, where)
        name = family.architecture.family
        return Located(Path(source), Tensors(net.state_dict()), name, net, statistics)
    return Located(Path(source))


def _from_hub(repository: str, where: str) -> Path:
    # timm, which is always there, brings it.
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(repository, allow_patterns=list(_HUB_FILES)))
    except (OSError, ValueError, RuntimeError) as error:
        raise WeightsError(
            f"{where}: cannot be fetched from Hugging Face; got {first_line(error)} for "
            f"{repository}, expected OWNER/NAME of a repository in the cache or within reach. "
            "Fetch its files elsewhere, and give the path of their folder."
        ) from error


def _from_open_clip(name: str, where: str) -> Located:
    try:
        import open_clip as package
    except ImportError as error:
        raise no_open_clip(f"{OPEN_CLIP}{name}", where) from error
    architecture, _, tag = name.partition("/")
    config = package.get_model_config(architecture)
    if config is None:
        raise WeightsError(
            f"{where}: open_clip has no such model; got {architecture!r}, "
            f"{nearest(architecture, package.list_models())}. Use one of these."
        )
    pretrained = package.get_pretrained_cfg(architecture, tag) if tag else None
    if not pretrained:
        tags = package.list_pretrained_tags_by_model(architecture)
        raise WeightsError(
            f"{where}: open_clip has no such weights of {architecture}; got {tag!r}, expected one "
            f"of {', '.join(tags) or 'none: it has none'}. Name it as "
            f"{OPEN_CLIP}{architecture}/TAG."
        )
    try:
        path = package.download_pretrained(pretrained)
    except (OSError, ValueError, RuntimeError) as error:
        raise WeightsError(
            f"{where}: cannot be fetched from open_clip; got {first_line(error)} for {name}, "
            "expected weights in the cache or within reach. Fetch the file elsewhere, and give its "
            "path and --teacher.architecture.activation."
        ) from error
    # The weights' own line says which activation they were trained with.
    quick = pretrained.get("quick_gelu", config.get("quick_gelu", False))
    statistics = None
    if pretrained.get("mean") and pretrained.get("std"):
        statistics = Statistics(tuple(pretrained["mean"]), tuple(pretrained["std"]))
    described_by = {**config, "quick_gelu": quick}
    return Located(Path(path), None, "open_clip", described_by, statistics)
