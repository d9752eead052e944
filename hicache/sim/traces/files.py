"""A trace in a file: opened again for every iteration, read as a stream."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from hicache.errors import InvalidArgumentError
from hicache.sim.traces import source
from hicache.sim.traces.formats import Format
from hicache.sim.traces.lines import Line, Parser
from hicache.sim.traces.model import Problems, Request


class LineTrace:
    """A trace of JSON lines.

    Bad lines are noted in ``problems`` and left out; with ``strict`` the first one raises InvalidArgumentError.
    """

    def __init__(self, path: Path, form: Format, *, block_tokens: int, strict: bool) -> None:
        self.path = path
        self.format = form.name
        self.block_tokens = block_tokens or form.block_tokens
        self.problems = Problems()
        self._form = form
        self._strict = strict
        self._sha256 = ""

    @property
    def name(self) -> str:
        """The file's name."""
        return self.path.name

    def sha256(self) -> str:
        """Of the uncompressed bytes; read once, then remembered."""
        if not self._sha256:
            self._sha256 = source.sha256(self.path)
        return self._sha256

    def __iter__(self) -> Iterator[Request]:
        """The requests, in the order of the file."""
        self.problems = Problems()
        parse = self._form.parser(self.block_tokens)
        number = 0
        with source.opened(self.path) as stream:
            lines = source.lines(stream)
            while True:
                number += 1
                try:
                    raw = next(lines, b"")
                except source.DAMAGE as error:
                    self._bad(number, f"the file cannot be read on from here: {error}")
                    return
                if not raw:
                    return
                request = self._request(parse, number, raw)
                if request is not None:
                    yield request

    def _request(self, parse: Parser, number: int, raw: bytes) -> Request | None:
        try:
            line: Line = json.loads(raw)
            return parse(line)
        except KeyError as error:
            problem = f"no {error} in it"
        except (ValueError, TypeError, AttributeError, RecursionError, OverflowError) as error:
            if not raw.strip():
                return None
            problem = str(error)
        self._bad(number, f"not a {self._form.title} line: {problem}")
        return None

    def _bad(self, number: int, problem: str) -> None:
        if self._strict:
            raise InvalidArgumentError(f"{self.path}:{number}: {problem}", hint=self._form.expected)
        self.problems.note(number, problem)
