"""Entry for launchers, which take a file: `deepspeed fd_large/train.py --deepspeed_config JSON`."""

import sys
from pathlib import Path

if __name__ == "__main__":
    # Python puts the script's folder first on the path; the package is found from its parent.
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    from fd_large.cli.main import main

    sys.exit(main(["train", *sys.argv[1:]]))
