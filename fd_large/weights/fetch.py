"""What a library downloads, as a folder that is a source wherever it is copied to.

For clusters whose nodes have no network: fetched once where there is one, with the configuration,
image statistics and licence that belong to the weights.
"""

from __future__ import annotations

import glob
import json
import shutil
from collections.abc import Callable
from functools import partial
from hashlib import sha256
from pathlib import Path, PurePosixPath

from fd_large.backbones.registry import family_of_source
from fd_large.errors import WeightsError, first_line
from fd_large.files import check_out, kind_of
from fd_large.ranks import activity
from fd_large.weights.locate import HUB, OPEN_CLIP, locate
from fd_large.weights.origin import CARD, UNKNOWN, licence_of_card

WHERE = "weights fetch"
_FILES = ("*.json", "*.safetensors", "*.bin", CARD, "LICEN?E*", "NOTICE*")


def fetch(source: str, out: str | Path) -> tuple[list[str], str]:
    """Downloads the weights of a source into a new folder, which appears once it is whole.

    Args:
        source: `hf:REPO`, `open_clip:ARCH/TAG` or `timm:NAME`.
        out: The folder.

    Returns: the names of its files, and the licence of the weights as their publisher states it.
    Raises: WeightsError: if the source is none that is downloaded, or cannot be had; ConfigError:
        if something stands at `out`.
    """
    write, out = _writer(source), Path(out)
    check_out(out, where=WHERE)
    # An interrupted call is taken up again; files of another source must not get into this folder.
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
            f"{WHERE}: {out}: cannot be written; got {error}, expected a place with room for the "
            "weights. Choose another."
        ) from error
    return files, licence or UNKNOWN


def _writer(source: str) -> Callable[[Path], str]:
    """What writes the files of a source into a folder, and returns the licence."""
    if source.startswith(HUB):
        return partial(_of_hub, source.removeprefix(HUB))
    if source.startswith(OPEN_CLIP):
        return partial(_of_open_clip, source)
    brought = family_of_source(source)
    if brought and brought[0].scheme.save:
        return partial(brought[0].scheme.save, brought[1], WHERE)
    raise WeightsError(
        f"{WHERE}: not a source that is downloaded; got {source}, expected hf:REPO, timm:NAME or "
        "open_clip:ARCH/TAG. Files and folders are sources as they are: copy them."
    )


def _of_hub(repository: str, folder: Path) -> str:
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
            repository, allow_patterns=list(_FILES), ignore_patterns=twice, local_dir=folder
        )
    except Exception as error:  # The hub's client raises many kinds.
        raise WeightsError(
            f"{WHERE}: cannot be fetched from Hugging Face; got {first_line(error)} for "
            f"{repository}, expected OWNER/NAME of a repository within reach. Run this where there "
            "is a network, and log in by `hf auth login` where the repository asks for it."
        ) from error
    return licence_of_card(folder / CARD)


def _of_open_clip(source: str, folder: Path) -> str:
    located = locate(source, where=WHERE)
    is_safe = located.path.suffix == ".safetensors"
    name = "open_clip_model.safetensors" if is_safe else "open_clip_pytorch_model.bin"
    shutil.copyfile(located.path, folder / name)
    described = {"model_cfg": located.config}
    if located.statistics:
        mean, std = map(list, located.statistics)
        described["preprocess_cfg"] = {"mean": mean, "std": std}
    (folder / "open_clip_config.json").write_text(json.dumps(described, indent=1))
    return ""
