"""The command `embed` in chunks of four images; rank 0 is killed within its third one if asked."""

import os
import signal
import sys

from fd_large.cli.main import main
from fd_large.evaluation import embedding

embedding.CHUNK = 4
extract, calls = embedding.extract, []


def extract_or_die(*args, **options):
    calls.append(args)
    if len(calls) == int(os.environ.get("KILLED_AT", "0")) and os.environ.get("RANK") == "0":
        os.kill(os.getpid(), signal.SIGKILL)
    return extract(*args, **options)


embedding.extract = extract_or_die
sys.exit(main(["embed", *sys.argv[1:]]))
