"""Two ranks that are nodes n1 and n2, or two ranks of one node: what each is told, and copies."""

import logging
import os
import sys
from pathlib import Path

from launch import write_result

from fd_large.data import staging
from fd_large.data.source import open_images
from fd_large.engine import node_consistency
from fd_large.errors import DataError, FDError
from fd_large.ranks import distributed
from fd_large.weights.resolve import Sources

results, root, local, small, weights, other_weights = sys.argv[-6:]
distributed.start()
rank = distributed.rank()
found = {}


def told(call):
    try:
        return call()
    except FDError as error:
        return f"{type(error).__name__}: {error}"


# --- two ranks of one node -----------------------------------------------------------------------
said = []


class Keep(logging.Handler):
    def emit(self, record):
        said.append(record.getMessage())


logging.getLogger("fd_large.data.staging").addHandler(Keep())
logging.getLogger().setLevel(logging.INFO)
copied = []
make = staging._Copy._make
staging._Copy._make = lambda self, file: copied.append(file.name) or make(self, file)
source = open_images(root)
staged = staging.stage(source, local)
found["copied"] = list(copied)
found["same"] = [
    staged.fingerprint == source.fingerprint,
    all(staged.read(i) == source.read(i) for i in range(len(source))),
    staged[0].startswith(local),
]
found["said"] = list(said)
# Rank 1 must not wait for a rank 0 that cannot.
found["full"] = told(lambda: staging.stage(source, small))

# --- two nodes -----------------------------------------------------------------------------------
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
# A node whose origin gives other bytes of the same size and time.
if rank == 1:
    shard = Path(root, "train-0.tar")
    status, held = shard.stat(), shard.read_bytes()
    shard.write_bytes(held[:600] + bytes([held[600] ^ 1]) + held[601:])
    os.utime(shard, ns=(status.st_atime_ns, status.st_mtime_ns))
    found["differ"] = told(lambda: staging.stage(source, local + "-n2"))
else:
    found["differ"] = told(lambda: staging.stage(source, local))
distributed.barrier()
distributed.stop()
write_result(results, found)
