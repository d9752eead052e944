"""``python -m hicache``: the same as the ``hicache`` command."""

from __future__ import annotations

import sys

from hicache.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
