"""Entry of `python -m fd_large COMMAND`, which runs a command of `fd-large`."""

import sys

from fd_large.imports import forget_current_folder

if __name__ == "__main__":
    forget_current_folder()
    if sys.argv[1:2] == ["train"]:
        from fd_large.ranks.starting import leave_at_signals

        leave_at_signals()
    from fd_large.cli.main import main

    sys.exit(main())
