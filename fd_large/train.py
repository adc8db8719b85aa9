"""Entry for launchers: `deepspeed fd_large/train.py`, or `--module fd_large.train` if installed."""

import os
import sys
from pathlib import Path

if __name__ == "__main__":
    if not __package__:
        # Python puts a script's folder first on the path; the package is found from its parent.
        sys.path[0] = str(Path(__file__).resolve().parents[1])
    from fd_large.imports import forget_current_folder

    forget_current_folder()
    from fd_large.cli.main import main

    try:
        code = main(["train", *sys.argv[1:]])
    except Exception as error:
        # This hook writes to terminal and log: runtime/terminal.py.
        sys.excepthook(type(error), error, error.__traceback__)
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    # DeepSpeed's threads now and then abort an interpreter that shuts down, whatever its code was;
    # and one whose peers are gone may wait in it for the kernel of a collective.
    os._exit(code)
