"""`python -m elastic_moe` is the command `elastic-moe`."""

from __future__ import annotations

import sys

from elastic_moe.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
