"""A process that has imported everything and forks children on request, so that each costs a fork and no imports.

Children are whole processes: they can be killed, stopped and watched like any, and die with their nursery, which dies
with the tests. They differ from freshly started ones only in what was imported before their first line.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import importlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

MAX_BYTES = 1 << 17
#: What sidecars and their clients import sooner or later.
SIDECARS = (
    "hicache.cli.main",
    "hicache.cli.serve",
    "hicache.rpc.server",
    "hicache.runtime",
    "hicache.rpc.client",
)


class Child:
    """A forked process, as subprocess.Popen shows one."""

    def __init__(self, nursery: Nursery, pid: int, stdin: BinaryIO, stdout: BinaryIO) -> None:
        self.pid = pid
        self.stdin = stdin
        self.stdout = stdout
        self.returncode: int | None = None
        self._nursery = nursery
        self._pidfd = os.pidfd_open(pid)

    def poll(self) -> int | None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self.wait(0)
        return None

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            poller = select.poll()
            poller.register(self._pidfd, select.POLLIN)
            if not poller.poll(None if timeout is None else timeout * 1000):
                raise subprocess.TimeoutExpired("forked", timeout or 0)
            self.returncode = os.waitstatus_to_exitcode(self._nursery.ask({"wait": self.pid}))
            os.close(self._pidfd)
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.returncode is None:  # not reaped, so that the number is still its own
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


class Nursery:
    """Starts at once, with its imports; ``close`` ends it and its children."""

    def __init__(self, modules: Sequence[str]) -> None:
        self._line, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._lock = threading.Lock()
        with theirs:
            words = [sys.executable, __file__, str(theirs.fileno()), json.dumps(sys.path), *modules]
            self._process = subprocess.Popen(
                words,
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                start_new_session=True,
            )

    def ask(self, what: Mapping[str, Any], fds: Sequence[int] = ()) -> int:
        with self._lock:
            socket.send_fds(self._line, [json.dumps(what).encode()], fds)
            answer = self._line.recv(MAX_BYTES)
        assert answer, "the nursery is alive"
        return int(json.loads(answer))

    def fork(
        self, what: str, args: Sequence[str], *, stderr: int | None = None, environ: Mapping[str, str]
    ) -> Child:
        """Run ``module:function`` with ``args`` in ``sys.argv``, pipes at its standard input and output."""
        in_read, in_write = os.pipe()
        out_read, out_write = os.pipe()
        ask = {"fork": what, "args": list(args), "environ": dict(environ), "cwd": str(Path.cwd())}
        ask["path"] = list(sys.path)
        fds = [in_read, out_write, 2 if stderr is None else stderr]
        try:
            pid = self.ask(ask, fds)
        finally:
            os.close(in_read)
            os.close(out_write)
        return Child(self, pid, os.fdopen(in_write, "wb"), os.fdopen(out_read, "rb"))

    def close(self) -> None:
        self._line.close()
        self._process.wait(20)


@functools.cache
def sidecars() -> Nursery:
    """The one for sidecars and their clients; it ends with this process."""
    made = Nursery(SIDECARS)
    atexit.register(made.close)
    return made


# --- the nursery's side


def _serve(line: socket.socket) -> None:
    children: set[int] = set()
    try:
        while True:
            data, fds, _, _ = socket.recv_fds(line, MAX_BYTES, 3)
            if not data:
                return
            ask = json.loads(data)
            if "wait" in ask:
                answer = os.waitpid(ask["wait"], 0)[1]
                children.discard(ask["wait"])
            else:
                answer = os.fork()
                if not answer:
                    line.close()
                    _child(ask, fds)
                children.add(answer)
                for fd in fds:
                    os.close(fd)
            line.send(json.dumps(answer).encode())
    finally:
        for pid in children:
            os.kill(pid, signal.SIGKILL)


def _child(ask: dict[str, Any], fds: Sequence[int]) -> None:
    status = 1
    try:
        os.setsid()
        for number, fd in enumerate(fds):
            os.dup2(fd, number)
            os.close(fd)
        os.chdir(ask["cwd"])
        os.environ.clear()
        os.environ.update(ask["environ"])
        sys.path[:] = ask["path"]
        module, _, name = ask["fork"].partition(":")
        sys.argv = [module, *ask["args"]]
        status = int(getattr(importlib.import_module(module), name)() or 0)
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else int(bool(error.code))
    except BaseException:  # noqa: BLE001 - the process's edge: printed, and its status says it
        traceback.print_exc()
    finally:
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)


if __name__ == "__main__":
    sys.path[:] = json.loads(sys.argv[2])
    for wanted in sys.argv[3:]:
        importlib.import_module(wanted)
    _serve(socket.socket(fileno=int(sys.argv[1])))
