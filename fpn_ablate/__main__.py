"""Start the command line: `python -m fpn_ablate`."""

import sys

from fpn_ablate.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
