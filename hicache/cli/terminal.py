"""Where tables and progress bars go."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

#: Width in characters of tables that go to a file or a pipe, where nobody says how wide to be.
PIPE_WIDTH = 120


def console(*, stderr: bool = False) -> Console:
    """Standard output, or standard error where standard output belongs to JSON."""
    from rich.console import Console

    stream = sys.stderr if stderr else sys.stdout
    return Console(stderr=stderr, width=None if stream.isatty() else PIPE_WIDTH, highlight=False)
