"""Table of the built-in protocols; users name their own as `--task module:FILE.py:NAME`.

To add a protocol, add its file and an entry here. Nothing here imports torch, since the command
line reads the flags and names.
"""

from __future__ import annotations

from fd_large import doors
from fd_large.errors import ConfigError
from fd_large.evaluation.cached_probe import CACHED_PROBE
from fd_large.evaluation.diagnosis.protocol import DIAGNOSIS
from fd_large.evaluation.knn import KNN
from fd_large.evaluation.protocol import Protocol
from fd_large.evaluation.robustness import ROBUSTNESS
from fd_large.evaluation.scored_runs import scored_by
from fd_large.evaluation.trainings import trained_by
from fd_large.evaluation.transfer.table import TRANSFER
from fd_large.evaluation.zeroshot import ZEROSHOT
from fd_large.tasks.registry import TASKS

_FROZEN = {protocol.name: protocol for protocol in (KNN, CACHED_PROBE)}
PROTOCOLS: tuple[Protocol, ...] = (
    *_FROZEN.values(),
    ZEROSHOT,
    ROBUSTNESS,
    *(
        trained_by(kind, variant="official", trains_all=False)
        if kind.name in _FROZEN
        else trained_by(kind)
        for kind in TASKS.values()
        if kind.trains_models
    ),
    *(scored_by(kind) for kind in TASKS.values() if kind.scores_runs),
    TRANSFER,
    DIAGNOSIS,
)
"""All protocols. Without `--protocol`, `--task` selects the first protocol of its name."""


def protocol_of(name: str, variant: str = "cached") -> Protocol:
    """Returns the protocol of a name, which may be the user's own.

    Args:
        name: Value of `--task`.
        variant: Value of `--protocol`, which selects among protocols of the same name.

    Raises: ConfigError: if the protocol does not exist or cannot be imported.
    """
    built_in: dict[str, Protocol] = {}
    for protocol in PROTOCOLS:
        is_asked = protocol.name not in built_in or protocol.variant == variant
        if protocol.command == "evaluate" and is_asked:
            built_in[protocol.name] = protocol
    # A file that lacks the name is not imported.
    doors.require_known(name, kind="protocols", where="--task", built_in=built_in)
    loaded = doors.load(name, kind="protocols", where="--task", built_in=built_in)
    if not isinstance(loaded, Protocol):
        raise ConfigError(
            f"--task: not a protocol; got {type(loaded).__name__} from {name}, expected a "
            "Protocol, such as of_features makes. docs/extending.md has an example."
        )
    if name not in built_in and (loaded.name in built_in or not loaded.name.isidentifier()):
        raise ConfigError(
            f"--task: a protocol's name that is taken or invalid; got {loaded.name!r} "
            f"from {name}, expected an identifier other than {', '.join(built_in)}. Rename it."
        )
    return loaded
