"""How the folder of a run, its hooks and the other ranks learn that an error ends it."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from fd_large.checkpoint.lease import Lease
from fd_large.errors import Exit, first_line
from fd_large.ranks import distributed, failures
from fd_large.runtime.hooks import FAILED, INTERRUPTED, Hook
from fd_large.runtime.run_folder import summary_of, write_status

log = logging.getLogger(__name__)


def end_by(error: BaseException, runs: Sequence[tuple[Lease, Sequence[Hook]]]) -> None:
    """Lets an error end runs so that their folders say so; no collective, others may be gone.

    Args:
        error: What ends them.
        runs: This start's right to write a run's folder, and the hooks that know of the start.
    """
    status, code = FAILED, getattr(error, "exit_code", Exit.LOST)
    if isinstance(error, KeyboardInterrupt):
        status, code = INTERRUPTED, Exit.INTERRUPTED
    reason = first_line(error)
    first = not distributed.peer_is_gone(error)
    if first:
        # The other ranks at once, which wait: a hook, a file may be slow.
        failures.tell(code, reason)
    elif heard := failures.heard():
        reason = str(heard)
    for lease, watching in runs:
        for hook in watching:
            try:
                hook.on_failure(status, reason)
            except Exception:
                log.exception("%s could not end", type(hook).__name__)
        write_end(lease, status, reason, first=first)


def write_end(lease: Lease, status: str, reason: str, *, first: bool) -> None:
    """Writes how a run ended; not `first`, only if no rank that knows more has done so."""
    known = summary_of(lease.folder).get("start") == lease.start
    # Before it is entered the folder may hold another run.
    if lease.entered and lease.owned() and (first or not known):
        entry = {"start": lease.start, "rank": distributed.rank(), "reason": reason}
        write_status(lease.folder, status, **entry)
