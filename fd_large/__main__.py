"""`python -m fd_large COMMAND`."""

import sys

from fd_large.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
