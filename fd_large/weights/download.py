"""Finds the file of a source of weights, downloading it if needed.

`locate` returns a file on a path, in an installed package or in the cache of a library, which
downloads it. `fetch` writes a download, with the configuration, image statistics and licence of the
weights, into a folder. The folder can be copied to clusters whose nodes have no network, and used
as a source there.
"""

from __future__ import annotations

import glob
import json
import shutil
from collections.abc import Callable
from functools import partial
from hashlib import sha256
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from fd_large.backbones.download import downloaded
from fd_large.backbones.registry import family_of_source
from fd_large.backbones.statistics import Statistics
from fd_large.errors import WeightsError, first_line, nearest
from fd_large.files import check_out, kind_of
from fd_large.ranks import activity
from fd_large.weights.named import (
    HUB,
    OPEN_CLIP,
    PACKAGE,
    file_in_package,
    no_open_clip,
)
from fd_large.weights.origin import CARD, UNKNOWN, licence_of_card
from fd_large.weights.read import Tensors

_HUB_FILES = ("*.json", "*.safetensors", "*.bin", CARD)
_FETCHED = (*_HUB_FILES, "LICEN?E*", "NOTICE*")
_WHERE = "weights fetch"


class Located(NamedTuple):
    """The file or tensors of a source of weights, with what a library says about them.

    Attributes:
        path: The file or a folder that contains it; if a library provides tensors, the source.
        tensors: Tensors that a library provides instead of a file; None if there is a file.
        library: The library that describes the model; "" if none does.
        config: The library's description of the model: open_clip's configuration, or the module of
            timm or of the user; None without a library.
        statistics: Image statistics that the weights were trained with; None if unknown.
    """

    path: Path
    tensors: Tensors | None = None
    library: str = ""
    config: Any = None
    statistics: Statistics | None = None


def locate(source: str, *, where: str = "weights") -> Located:
    """Returns the file, folder or tensors of a source, downloading them if needed.

    Args:
        source: A source without a known prefix is a path, which need not exist.

    Raises: WeightsError: if a package is not installed, or the weights cannot be downloaded.
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
    # timm, which is a dependency, installs this package.
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(repository, allow_patterns=list(_HUB_FILES)))
    except (OSError, ValueError, RuntimeError) as error:
        raise WeightsError(
            f"{where}: cannot be fetched from Hugging Face; got {first_line(error)} for "
            f"{repository}, expected OWNER/NAME of a repository that is cached or can be reached. "
            "Download its files elsewhere, and give the path of their folder."
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
            f"of {', '.join(tags) or 'none: it has no weights'}. Name the weights as "
            f"{OPEN_CLIP}{architecture}/TAG."
        )
    try:
        path = package.download_pretrained(pretrained)
    except (OSError, ValueError, RuntimeError) as error:
        raise WeightsError(
            f"{where}: cannot be fetched from open_clip; got {first_line(error)} for {name}, "
            "expected weights that are cached or can be reached. Download the file elsewhere, and "
            "give its path and its activation (the field architecture.activation)."
        ) from error
    # open_clip's entry for the weights says which activation they were trained with.
    quick = pretrained.get("quick_gelu", config.get("quick_gelu", False))
    statistics = None
    if pretrained.get("mean") and pretrained.get("std"):
        statistics = Statistics(tuple(pretrained["mean"]), tuple(pretrained["std"]))
    described_by = {**config, "quick_gelu": quick}
    return Located(Path(path), None, "open_clip", described_by, statistics)


def fetch(source: str, out: str | Path) -> tuple[list[str], str]:
    """Downloads the weights of a source into the folder `out`, which appears when it is complete.

    Args:
        source: `hf:REPO`, `open_clip:ARCH/TAG` or `timm:NAME`.

    Returns: the names of the folder's files, and the licence of the weights as their publisher
        states it, or `UNKNOWN`.
    Raises:
        WeightsError: If the source is of another kind, or cannot be downloaded.
        ConfigError: If `out` exists.
    """
    write, out = _writer(source), Path(out)
    check_out(out, where=_WHERE)
    # The name depends on the source: an interrupted download continues, but not of another source.
    aside = out.with_name(f"{out.name}.{sha256(source.encode()).hexdigest()[:12]}.part")
    try:
        aside.mkdir(parents=True, exist_ok=True)
        with activity.work(f"downloading {source}"):
            licence = write(aside)
        # The hub keeps notes on its downloads there.
        shutil.rmtree(aside / ".cache", ignore_errors=True)
        files = sorted(str(p.relative_to(aside)) for p in aside.rglob("*") if kind_of(p) == "file")
        aside.rename(out)
    except OSError as error:
        raise WeightsError(
            f"{_WHERE}: {out}: cannot be written; got {error}, expected a folder with room for "
            "the weights. Choose another folder."
        ) from error
    return files, licence or UNKNOWN


def _writer(source: str) -> Callable[[Path], str]:
    """Returns a function that downloads the weights of `source` into a folder.

    It returns the licence of the weights, or "" if unknown. A source that is not downloaded, such
    as a path, raises WeightsError.
    """
    if source.startswith(HUB):
        return partial(_folder_of_hub, source.removeprefix(HUB))
    if source.startswith(OPEN_CLIP):
        return partial(_folder_of_open_clip, source)
    brought = family_of_source(source)
    if brought and brought[0].scheme.save:
        return partial(brought[0].scheme.save, brought[1], _WHERE)
    raise WeightsError(
        f"{_WHERE}: not a source for downloads; got {source}, expected hf:REPO, timm:NAME or "
        "open_clip:ARCH/TAG. Copy files and folders instead."
    )


def _folder_of_hub(repository: str, folder: Path) -> str:
    from huggingface_hub import HfApi, snapshot_download

    try:
        files = [PurePosixPath(name) for name in HfApi().list_repo_files(repository)]
        # Many folders hold the same weights twice.
        safe = {file.parent for file in files if file.suffix == ".safetensors"}
        twice = [
            glob.escape(str(file))
            for file in files
            if file.suffix == ".bin" and file.parent in safe
        ]
        snapshot_download(
            repository, allow_patterns=list(_FETCHED), ignore_patterns=twice, local_dir=folder
        )
    except Exception as error:  # The hub's client raises many kinds.
        raise WeightsError(
            f"{_WHERE}: cannot be fetched from Hugging Face; got {first_line(error)} for "
            f"{repository}, expected OWNER/NAME of a repository that can be reached. Run this "
            "command where there is a network, and log in with `hf auth login` if the repository "
            "requires a login."
        ) from error
    return licence_of_card(folder / CARD)


def _folder_of_open_clip(source: str, folder: Path) -> str:
    located = locate(source, where=_WHERE)
    is_safe = located.path.suffix == ".safetensors"
    name = "open_clip_model.safetensors" if is_safe else "open_clip_pytorch_model.bin"
    shutil.copyfile(located.path, folder / name)
    described = {"model_cfg": located.config}
    if located.statistics:
        mean, std = map(list, located.statistics)
        described["preprocess_cfg"] = {"mean": mean, "std": std}
    (folder / "open_clip_config.json").write_text(json.dumps(described, indent=1))
    return ""
