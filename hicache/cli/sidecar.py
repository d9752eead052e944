"""A ``hicache serve`` child process of our own: for the demo, for replays, and for tests.

It stands in a folder, tells when it serves, and ends by its own pid. Should this process die first, the
child sees the end of its standard input and drains.
"""

from __future__ import annotations

import contextlib
import selectors
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

from hicache.cli import config
from hicache.cli.serve import READY_WORD
from hicache.errors import HicacheError, UnavailableError

START_TIMEOUT_S = 30.0
STOP_TIMEOUT_S = 30.0
_TAIL_LINES = 25


class Sidecar:
    """Starts with ``start`` (or ``with``), ends with ``stop`` or ``kill``; may be started again on the same folder.

    Files in ``folder``: ``hicache.sock`` and its companions, ``log``. ``flags`` go to ``hicache serve``.
    """

    def __init__(self, folder: Path, flags: Sequence[str] = ()) -> None:
        self.folder = folder
        self.flags = tuple(flags)
        self.socket_path = folder / "hicache.sock"
        self.log_path = folder / "log"
        self.ready_line = ""
        self._child: subprocess.Popen[bytes] | None = None

    @property
    def target(self) -> str:
        """What a client connects to."""
        return f"unix://{self.socket_path}"

    @property
    def pid(self) -> int:
        """The child's process id; 0 when none runs."""
        return self._child.pid if self._child is not None and self._child.poll() is None else 0

    def start(self, timeout_s: float = START_TIMEOUT_S) -> Sidecar:
        """Start and wait until it serves. Raises UnavailableError with the log's tail when it does not."""
        assert not self.pid, "one child at a time"
        words = ["serve", "--until-eof", "--socket-path", str(self.socket_path), *self.flags]
        with self.log_path.open("ab") as errors:
            self._child = self._launch(words, errors)
        self.ready_line = ""
        try:
            self.ready_line = self._wait_ready(timeout_s)
        finally:
            if not self.ready_line:
                self.kill()
        return self

    def _launch(self, words: list[str], errors: BinaryIO) -> subprocess.Popen[bytes]:
        """``hicache`` with these words, pipes at its standard input and output."""
        return subprocess.Popen(  # noqa: S603 - our own command
            [sys.executable, "-m", "hicache", *words],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            env=config.child_environment(),
            start_new_session=True,  # Ctrl-C is for us; we end the child in order
        )

    def _wait_ready(self, timeout_s: float) -> str:
        assert self._child is not None and self._child.stdout is not None
        with selectors.DefaultSelector() as selector:
            selector.register(self._child.stdout, selectors.EVENT_READ)
            line = self._child.stdout.readline().decode().strip() if selector.select(timeout_s) else None
        if line and READY_WORD in line:
            return line
        why = f"is not serving after {timeout_s:g} s" if line is None else "ended before it served"
        raise UnavailableError(f"the sidecar {why}; its log ends with:\n{self.log_tail()}")

    def log_tail(self) -> str:
        """What matters of the log, indented: from its last error on, else its last lines."""
        with contextlib.suppress(OSError):
            lines = self.log_path.read_text(encoding="utf-8", errors="replace").splitlines()
            errors = [index for index, line in enumerate(lines) if " level=error " in line]
            shown = lines[errors[-1] :][:_TAIL_LINES] if errors else lines[-_TAIL_LINES:]
            return "\n".join(f"  | {line}" for line in shown)
        return "  | (no log)"

    def stop(self, timeout_s: float = STOP_TIMEOUT_S) -> int:
        """Drain and end it; kill it when it takes too long. Returns its exit code. Idempotent."""
        return self._end(signal.SIGTERM, timeout_s)

    def kill(self) -> int:
        """End it at once, as ``kill -9`` does. Idempotent."""
        return self._end(signal.SIGKILL, STOP_TIMEOUT_S)

    def _end(self, how: signal.Signals, timeout_s: float) -> int:
        child = self._child
        if child is None:
            return 0
        if child.poll() is None:
            child.send_signal(how)
        try:
            child.wait(timeout_s)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
        for pipe in (child.stdin, child.stdout):
            if pipe is not None:
                pipe.close()
        self._child = None
        return int(child.returncode)

    def __enter__(self) -> Sidecar:
        return self if self.pid else self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()


@contextlib.contextmanager
def temporary(flags: Sequence[str] = (), *, disk_bytes: str = "") -> Iterator[Sidecar]:
    """A sidecar in a temporary folder, with a disk tier there if ``disk_bytes`` is given; nothing is left behind."""
    with tempfile.TemporaryDirectory(prefix="hicache-") as name:
        folder = Path(name)
        disk = ("--disk-path", str(folder / "disk"), "--disk-bytes", disk_bytes) if disk_bytes else ()
        grace = ("--grace", "1s")  # what it holds goes with the folder: nothing to save
        with Sidecar(folder, (*grace, *flags, *disk)) as sidecar:
            try:
                yield sidecar
            except HicacheError:
                sys.stderr.write(f"the sidecar's log ends with:\n{sidecar.log_tail()}\n")
                raise
