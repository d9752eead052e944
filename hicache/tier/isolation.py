"""Work that a garbage file may kill, done in a process of its own.

LMDB believes its file: a rotten page number or size is a read outside of the map, and the process dies with SIGBUS or
SIGSEGV. Whoever only wants to know what is wrong with a file must outlive that.
"""

from __future__ import annotations

import contextlib
import faulthandler
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Generator, Iterator
from multiprocessing.connection import Connection
from typing import TypeVar

T = TypeVar("T")

#: A reader that says nothing for so long goes in circles.
SILENCE_S = 120.0


class Crashed(Exception):
    """The process died, or never ended. The text says how."""


def isolated(work: Callable[[], Iterator[T]]) -> Generator[T, None, None]:
    """What ``work`` yields, from a forked process. Not while other threads run.

    Raises Crashed where that process dies or falls silent; an exception of ``work`` is Crashed, too.
    """
    reader, writer = multiprocessing.Pipe(duplex=False)
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if not child:
        reader.close()
        _serve(work, writer)
    writer.close()
    try:
        yield from _received(reader)
    except EOFError:
        raise Crashed(_ended(child)) from None
    finally:
        reader.close()
        with contextlib.suppress(ProcessLookupError, ChildProcessError):
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)


def _received(reader: Connection) -> Iterator[T]:
    while True:
        if not reader.poll(SILENCE_S):
            raise Crashed(f"it said nothing for {SILENCE_S:.0f} s")
        what, value = reader.recv()
        if what == "end":
            return
        if what == "error":
            raise Crashed(value)
        yield value


def _serve(work: Callable[[], Iterator[object]], writer: Connection) -> None:
    """The child's whole life."""
    status = 1
    try:
        silence = os.open(os.devnull, os.O_WRONLY)
        faulthandler.disable()
        os.dup2(silence, 2)  # a failed assertion inside LMDB is told by the way the process ends
        for value in work():
            writer.send(("value", value))
        writer.send(("end", None))
        status = 0
    except BrokenPipeError:
        status = 0  # nobody listens any more
    except BaseException as exc:  # noqa: BLE001 - the process's edge: told to the parent
        with contextlib.suppress(OSError):
            writer.send(("error", f"{type(exc).__name__}: {exc}"))
    finally:
        os._exit(status)


def _ended(child: int) -> str:
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        return f"reading it kills the process ({signal.Signals(os.WTERMSIG(status)).name})"
    return f"reading it ends the process with status {os.waitstatus_to_exitcode(status)}"
