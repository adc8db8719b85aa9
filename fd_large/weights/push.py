"""Upload of an exported folder to a repository on the Hugging Face Hub."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fd_large.errors import ConfigError, WeightsError, first_line

REPOSITORY = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*", re.ASCII)
"""OWNER/NAME, as the Hugging Face Hub names repositories."""


def check_push(repository: str) -> None:
    """Checks, before the export writes its files, that an upload to OWNER/NAME can succeed.

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
    renamed = "Nothing was exported: name another repository, or export without --push."
    with _explained(repository, "Nothing was exported.", renamed):
        api.whoami()
        exists = api.repo_exists(repository)
    if exists:
        raise _there(repository, renamed)


def push(folder: Path, repository: str) -> str:
    """Uploads an export's folder to a new private repository, and returns the latter's address.

    The folder stays on disk after an error.

    Raises: ConfigError: if the repository exists; WeightsError: if the upload fails.
    """
    api = _api()
    # Private, since only its owner can decide whether the student may be public.
    later = f"{folder} is written: to upload it later, run hf upload --private"
    path = shlex.quote(str(folder))
    with _explained(repository, f"{later} {repository} {path}.", f"{later} OWNER/NAME {path}."):
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
def _explained(repository: str, remedy: str, renamed: str) -> Iterator[None]:
    """Turns errors of the Hub's client in the `with` block into a WeightsError, or a ConfigError.

    The WeightsError ends with `remedy`. The ConfigError, which says that the repository exists,
    ends with `renamed`.
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
            raise _there(repository, renamed) from error
        if status in (401, 403):
            raise WeightsError(
                f"--push: the token is invalid or may not write to {repository}; got {message}, "
                "expected a token with write access there (huggingface.co/settings/tokens). "
                f"{remedy}"
            ) from error
        expected = "a server that can be reached. Check the network."
        if status:
            expected = "a server that takes it. Check the name and HF_ENDPOINT, or try again later."
        raise WeightsError(
            f"--push: cannot be uploaded to {repository}; got {message}, expected {expected} "
            f"{remedy}"
        ) from error
