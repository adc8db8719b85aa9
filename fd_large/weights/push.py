"""Upload of an exported folder to a repository on the Hugging Face Hub."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fd_large.errors import ConfigError, WeightsError, first_line

REPOSITORY = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*", re.ASCII)
"""OWNER/NAME, as the Hugging Face Hub names repositories."""


def check_push(repository: str) -> None:
    """Checks that an upload to a new repository can succeed, before the export writes its files.

    Args:
        repository: OWNER/NAME of the repository, which must not exist yet.

    Raises:
        ConfigError: If the name is invalid or the repository exists.
        WeightsError: If there is no valid token or no network.
    """
    if not REPOSITORY.fullmatch(repository):
        raise ConfigError(
            f"--push: not a repository's name; got {repository!r}, expected OWNER/NAME, such as "
            "my-group/swinv2-giant. Name a repository that does not exist yet."
        )
    api = _api()
    with _explained(repository, "Nothing was exported."):
        api.whoami()
        exists = api.repo_exists(repository)
    if exists:
        raise _there(
            repository, "Nothing was exported: name another repository, or export without --push."
        )


def push(folder: Path, repository: str) -> str:
    """Creates a private repository and uploads a folder to it; returns the repository's address.

    Args:
        folder: Folder of an export, which stays on disk after an error.
        repository: OWNER/NAME of the repository.

    Raises: ConfigError: if the repository exists; WeightsError: if the upload fails.
    """
    api = _api()
    later = f"{folder} is written: to upload it later, run hf upload {repository} {folder}"
    with _explained(repository, f"{later}."):
        # Private, since only its owner can decide whether the student may be public.
        address = api.create_repo(repository, private=True)
        api.upload_folder(
            repo_id=repository, folder_path=folder, commit_message="Export of fd_large"
        )
    return str(address)


def _api() -> Any:
    from huggingface_hub import HfApi

    # Read now: huggingface_hub itself reads it once, when it is imported.
    return HfApi(endpoint=os.environ.get("HF_ENDPOINT") or None)


def _there(repository: str, remedy: str) -> ConfigError:
    return ConfigError(
        f"--push: a repository with this name exists already; got {repository}, expected a new "
        f"name. {remedy}"
    )


@contextmanager
def _explained(repository: str, remedy: str) -> Iterator[None]:
    """Turns errors of the Hub's client in the `with` block into our errors.

    Args:
        repository: OWNER/NAME of the repository, for messages.
        remedy: End of each error's message.

    Raises: ConfigError: if the repository exists; WeightsError: for other errors.
    """
    from huggingface_hub.errors import LocalTokenNotFoundError, OfflineModeIsEnabled

    try:
        yield
    except LocalTokenNotFoundError as error:
        raise WeightsError(
            "--push: no token of Hugging Face on this machine; got none, expected a token that "
            f"may write to {repository}. Run hf auth login, or set HF_TOKEN. {remedy}"
        ) from error
    except OfflineModeIsEnabled as error:
        raise WeightsError(
            "--push: Hugging Face is switched off here; got HF_HUB_OFFLINE=1, expected a network. "
            f"Unset this variable. {remedy}"
        ) from error
    except Exception as error:  # Its errors of the network depend on its version.
        status = getattr(getattr(error, "response", None), "status_code", None)
        message = first_line(error).rstrip(".")
        if status == 409:
            raise _there(repository, remedy) from error
        if status in (401, 403):
            raise WeightsError(
                f"--push: the token may not write to {repository}; got {message}, expected a token "
                f"with write access there (huggingface.co/settings/tokens). {remedy}"
            ) from error
        raise WeightsError(
            f"--push: cannot be uploaded to {repository}; got {message}, expected a server that "
            f"can be reached. {remedy}"
        ) from error
