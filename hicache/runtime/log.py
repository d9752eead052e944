"""Log lines as ``key=value`` pairs, with the id of the request they belong to.

time=2026-11-20T23:50:02.113 level=warning logger=hicache.runtime.ports request=9f2c msg="..."
"""

from __future__ import annotations

import contextvars
import datetime
import logging
import sys
from typing import TextIO

#: Set by the edge that serves a request; "" outside of one. Tasks inherit it.
request_id: contextvars.ContextVar[str] = contextvars.ContextVar("hicache_request_id", default="")

_PLAIN = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-.:/+,@%")
_ESCAPES = str.maketrans({"\\": "\\\\", '"': '\\"', "\n": "\\n", "\r": "\\r", "\t": "\\t"})


def quote(value: object) -> str:
    """The value as it stands in a line: bare if it is one plain word, else in double quotes, on one line."""
    text = str(value)
    if text and _PLAIN.issuperset(text):
        return text
    return f'"{text.translate(_ESCAPES)}"'


class KeyValueFormatter(logging.Formatter):
    """Formats a record as one line; a traceback follows it, indented."""

    def format(self, record: logging.LogRecord) -> str:
        """One record."""
        when = datetime.datetime.fromtimestamp(record.created).isoformat(timespec="milliseconds")
        parts = [f"time={when}", f"level={record.levelname.lower()}", f"logger={record.name}"]
        request = getattr(record, "request_id", "") or request_id.get()
        if request and request != "-":
            parts.append(f"request={quote(request)}")
        parts.append(f"msg={quote(record.getMessage())}")
        line = " ".join(parts)
        if record.exc_info:
            line += "\n  " + self.formatException(record.exc_info).replace("\n", "\n  ")
        return line


def setup_logging(level: str = "info", stream: TextIO | None = None) -> logging.Handler:
    """Send everything that hicache logs, from ``level`` on, to ``stream`` (stderr). Returns the handler."""
    handler = logging.StreamHandler(stream if stream is not None else sys.stderr)
    handler.setFormatter(KeyValueFormatter())
    logger = logging.getLogger("hicache")
    for old in [each for each in logger.handlers if isinstance(each.formatter, KeyValueFormatter)]:
        logger.removeHandler(old)
    logger.addHandler(handler)
    logger.setLevel(level.upper())
    logger.propagate = False
    return handler
