"""Script by which launchers start `fd-large train`.

It is called as `deepspeed fd_large/train.py`, or as `--module fd_large.train` if the package is
installed.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    if not __package__:
        # Python puts a script's folder first on the path; the package is found from its parent.
        sys.path[0] = str(Path(__file__).resolve().parents[1])
    from fd_large.imports import forget_current_folder

    forget_current_folder()
    # What follows imports for seconds, and minutes on a slow disk.
    from fd_large.ranks.starting import leave_at_signals

    leave_at_signals()
    from fd_large.cli.main import main
    from fd_large.ranks.forked import end_with

    end_with(lambda: main(["train", *sys.argv[1:]]))
