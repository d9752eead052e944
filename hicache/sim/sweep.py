"""Many cells in parallel, each result a JSON line as soon as it is there: a sweep that was stopped goes on.

Every process maps the same packed trace. A result is kept under a key of all that it depends on; what is there under
its key is not computed again.
"""

from __future__ import annotations

import concurrent.futures
import json
import multiprocessing
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Protocol

from hicache.errors import HicacheError
from hicache.sim.cell import Cell, run_cell
from hicache.sim.options import Settings
from hicache.sim.packed import PackedTrace

Result = dict[str, object]
Clock = Callable[[], int]
RESULTS = "results.jsonl"


class OnDone(Protocol):
    """Hears of each result as it is there."""

    def __call__(self, cell: Cell, result: Result, *, new: bool) -> None:
        """``new``: it was computed now, not found."""


def stored_results(folder: Path) -> dict[str, Result]:
    """What a folder holds, by key. A line that was cut off, as by a kill, is as if it were not there."""
    path = folder / RESULTS
    found: dict[str, Result] = {}
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                result = json.loads(line)
            except ValueError:
                continue
            if isinstance(result, dict) and "key" in result:
                found[str(result["key"])] = result
    return found


class Sweep:
    """Runs cells of one trace with one set of settings. ``now_ns``: any clock."""

    def __init__(self, settings: Settings, trace: PackedTrace, folder: Path, *, now_ns: Clock) -> None:
        self.failures: list[tuple[Cell, str]] = []
        self._settings = settings
        self._trace = trace
        self._folder = folder
        self._now_ns = now_ns

    def key(self, cell: Cell) -> str:
        """Of a cell's result."""
        facts = self._trace.facts
        return cell.key(self._settings, facts.sha256, facts.block_tokens)

    def run(self, cells: Sequence[Cell], *, jobs: int, on_done: OnDone) -> list[Result]:
        """The cells' results, in their order; those that failed are in ``failures`` instead."""
        stored = stored_results(self._folder)
        results: dict[str, Result] = {}
        todo: list[Cell] = []
        for cell in cells:
            found = stored.get(self.key(cell))
            if found is None:
                todo.append(cell)
            else:
                results[self.key(cell)] = found
                on_done(cell, found, new=False)
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._folder / RESULTS
        broken = path.exists() and not path.read_bytes().endswith(b"\n") and path.stat().st_size > 0
        with path.open("a", encoding="utf-8") as out:
            out.write("\n" if broken else "")
            for cell, result in self._new(todo, jobs):
                out.write(json.dumps(result) + "\n")
                out.flush()
                results[self.key(cell)] = result
                on_done(cell, result, new=True)
        return [results[key] for cell in cells if (key := self.key(cell)) in results]

    def _new(self, cells: Sequence[Cell], jobs: int) -> Iterable[tuple[Cell, Result]]:
        if not cells:
            return
        if jobs <= 1:
            for cell in cells:
                try:
                    yield cell, run_cell(cell, self._settings, self._trace, self._now_ns)
                except HicacheError as error:
                    self.failures.append((cell, str(error)))
            return
        yield from self._parallel(cells, jobs)

    def _parallel(self, cells: Sequence[Cell], jobs: int) -> Iterable[tuple[Cell, Result]]:
        context = multiprocessing.get_context("spawn")
        start = (self._settings, self._trace.path, self._now_ns)
        pool = concurrent.futures.ProcessPoolExecutor(
            min(jobs, len(cells)), context, initializer=_begin, initargs=start
        )
        try:
            tasks = {pool.submit(_work, cell): cell for cell in cells}
            for task in concurrent.futures.as_completed(tasks):
                error = task.exception()
                if error is None:
                    yield tasks[task], task.result()
                else:
                    self.failures.append((tasks[task], f"{type(error).__name__}: {error}"))
        finally:
            pool.shutdown(cancel_futures=True)


_place: list[tuple[Settings, PackedTrace, Clock]] = []  # of a worker process: what all its cells share


def _begin(settings: Settings, path: Path, now_ns: Clock) -> None:
    _place.append((settings, PackedTrace(path), now_ns))


def _work(cell: Cell) -> Result:
    settings, trace, now_ns = _place[0]
    return run_cell(cell, settings, trace, now_ns)
