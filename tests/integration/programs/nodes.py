"""Two ranks that are nodes n1 and n2: what each is told."""

import os
import sys
from pathlib import Path

from launch import write_result

from fd_large.data.source import open_images
from fd_large.engine import node_consistency
from fd_large.errors import DataError, FDError
from fd_large.ranks import distributed
from fd_large.weights.resolve import Sources

results, root, weights, other_weights = sys.argv[-4:]
distributed.start()
rank = distributed.rank()
found = {}


def told(call):
    try:
        return call()
    except FDError as error:
        return f"{type(error).__name__}: {error}"


source = open_images(root)
os.environ["SLURMD_NODENAME"] = f"n{rank + 1}"
distributed.local_rank = lambda: 0


def check():
    return told(lambda: node_consistency.check(source, {"teacher.source": weights}, Sources()))


found["alike"] = check()


def on_second(name, value):
    """The check with something else on n2."""
    before = getattr(node_consistency, name)
    if rank == 1:
        setattr(node_consistency, name, value)
    try:
        return check()
    finally:
        setattr(node_consistency, name, before)


found["code"] = on_second("code_hash", lambda: "0123456789")
found["versions"] = on_second("_version", lambda name: "1.2.3")
digest = node_consistency.weights_digest
found["weights"] = on_second(
    "weights_digest", lambda name, opened: name and digest(other_weights, opened)
)
found["gone"] = on_second(
    "weights_digest", lambda name, opened: name and digest(name + "x", opened)
)
if rank == 1:
    Path(root, "train-1.tar").rename(Path(root, "train-1.away"))
distributed.barrier()
if rank == 1:
    fewer = open_images(root)
    full, source = source, fewer
found["pictures"] = check()
if rank == 1:
    source = full
    Path(root, "train-1.away").rename(Path(root, "train-1.tar"))
distributed.barrier()


def refuses():
    if rank == 1:
        raise DataError("data.root: no such folder")


found["together"] = told(lambda: distributed.together(refuses))
distributed.barrier()
distributed.stop()
write_result(results, found)
