"""Run the command line: `python -m attnctl` is the command `attnctl`."""

import sys

from attnctl.app.cli import main

if __name__ == "__main__":
    sys.exit(main())
