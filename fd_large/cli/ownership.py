"""Claims a run's folder for all ranks of a command that writes to the folder."""

from __future__ import annotations

import _thread
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fd_large import imports
from fd_large.checkpoint.lease import Lease, OwnedError, claim
from fd_large.errors import Exit, FDError
from fd_large.ranks import activity, failures
from fd_large.ranks.launch import find_launch, find_rank
from fd_large.runtime import terminal

log = logging.getLogger(__name__)


@contextmanager
def owning(run_dir: str) -> Iterator[Lease]:
    """Starts the process group, and owns a run's folder during the block.

    Every rank has to call this function. Rank 0 claims the folder before torch is imported, so that
    a refusal appears at once. The other ranks get the result in a broadcast, so that a refusal ends
    all ranks together.

    Raises: FDError: on all ranks, if rank 0 cannot claim the folder, mostly because another command
        owns it.
    """
    terminal.take()
    folder = Path(run_dir)
    lease, refusal, launch = None, None, None
    try:
        if find_rank() == 0:
            try:
                lease = claim(folder, say=terminal.show_error, on_lost=_end)
            except FDError as error:
                launch = find_launch()
                if launch.world_size == 1:
                    raise
                terminal.show_error(str(error))
                refusal = str(error)
        with activity.work("loading torch"), imports.for_good("torch"):
            from fd_large.ranks import distributed
            from fd_large.runtime import logs

        logs.start(find_rank())
        distributed.start(launch)
        start, refusal = distributed.broadcast_object((lease.start if lease else "", refusal))
        if refusal:
            refused = OwnedError(refusal)
            refused.shown = True
            raise refused
        if lease is None:
            lease = Lease(folder, start)
        elif lease.taken_over:
            log.warning("%s", lease.taken_over)
        yield lease
    finally:
        if lease is not None:
            lease.release()


def _end(why: str) -> None:
    from fd_large.ranks import distributed

    terminal.show_error(why)
    if distributed.is_guest():
        _thread.interrupt_main()
        return
    failures.tell(Exit.LOOK, why)
    os._exit(Exit.LOOK)
