"""Records what is looked up and stored, for experiments: ids only, never tokens, and never in an answer's way.

The loop's thread only queues a reference to the prompt. A thread of its own makes ids of it and writes blocks.
Ids are BLAKE2b hashes under a secret salt, chained page by page, 64 bits each: without the salt they name nothing,
and with it (``record_salt``) a prompt that is known can be found. What does not fit the queue is dropped and counted.
"""

from __future__ import annotations

import hashlib
import logging
import os
import secrets
import threading
from array import array
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from hicache.engine import events
from hicache.engine.events import Event
from hicache.errors import ConfigError
from hicache.recording import BlockBuilder, Entry, EntryKind, opening
from hicache.runtime.clock import Clock
from hicache.runtime.pairing import Pairing, Seen
from hicache.types import NO_USE, Namespace

_log = logging.getLogger(__name__)

QUEUED_EVENTS = 8192
QUEUED_BYTES = 64 << 20
#: How long the thread rests between rounds, and how old a block may get before it is written.
REST_S = 0.05
FLUSH_MS = 1_000
TURN_MAX = (1 << 31) - 1


class _Queued(NamedTuple):
    """An event as it was, and when."""

    event: events.Fetch | events.Reserve | events.Touch
    at_ms: int


class Recorder:
    """Writes ``path``; beyond ``rotate_bytes`` it becomes ``path.1``, that ``path.2`` and so on, ``files`` in all.

    ``see`` is called on the loop's thread; everything else happens on the recorder's own. A file that cannot be
    written any more ends the recording, with a line in the log, and nothing else. Raises ConfigError where it cannot
    be opened at first.
    """

    def __init__(
        self,
        path: Path,
        *,
        rotate_bytes: int,
        files: int,
        show_salt: bool,
        clock: Clock,
        namespace: Callable[[int], tuple[Namespace, bytes]],
    ) -> None:
        self.recorded = self.dropped = 0
        self._path = path
        self._rotate_bytes = rotate_bytes
        self._files = files
        self._show_salt = show_salt
        self._clock = clock
        self._namespace = namespace
        self._salt = secrets.token_bytes(32)
        self._queue: deque[_Queued] = deque()
        self._bytes_in = 0  # written by the loop's thread only
        self._bytes_out = 0  # written by the recorder's only
        self._began_ms = clock.now_ms()
        self._spaces: dict[int, tuple[str, int, int, bytes]] = {}
        self._pairing = Pairing()
        self._builder = BlockBuilder()
        self._block_ms = 0
        self._entries = 0
        self._ended = False
        self._stop = threading.Event()
        try:
            self._open()
        except OSError as error:
            raise ConfigError(f"--record: cannot write {path}: {error.strerror}") from error
        self._thread = threading.Thread(target=self._run, name="hicache-record", daemon=True)
        self._thread.start()

    # --- on the loop's thread

    def see(self, event: Event) -> None:
        """Queue what is worth recording of an event."""
        if isinstance(event, events.Fetch | events.Reserve | events.Touch):
            size = len(event.prompt)
            if (
                self._ended
                or len(self._queue) >= QUEUED_EVENTS
                or self._bytes_in - self._bytes_out + size > QUEUED_BYTES
            ):
                self.dropped += 1
                return
            self._bytes_in += size
            self._queue.append(_Queued(event, self._clock.now_ms()))

    def close(self) -> None:
        """Write what is queued and close the file. Idempotent; may be called on any thread."""
        self._stop.set()
        self._thread.join()

    # --- on the recorder's thread

    def _run(self) -> None:
        try:
            while True:
                stopping = self._stop.wait(REST_S)
                self._round(stopping)
                if stopping:
                    break
        except OSError as error:
            _log.error("recording ends, %s cannot be written: %s", self._path, error)
        finally:
            self._ended = True
            self._queue.clear()
            self._file.close()

    def _round(self, stopping: bool) -> None:  # noqa: FBT001 - a state of the thread
        while self._queue:
            queued = self._queue.popleft()
            self._bytes_out += len(queued.event.prompt)
            entry = self._entry(queued)
            if entry is not None:
                self._builder.add(entry)
                self._entries += 1
                self.recorded += 1
            if self._builder.full:
                self._write()
        if len(self._builder) and (stopping or self._clock.now_ms() - self._block_ms >= FLUSH_MS):
            self._write()

    def _write(self) -> None:
        self._block_ms = self._clock.now_ms()
        self._file.write(self._builder.take())
        self._file.flush()
        if self._file.tell() >= self._rotate_bytes:
            self._file.close()
            self._open()

    def _open(self) -> None:
        """Begin a file; those that are there move on, the oldest goes. Never writes over one."""
        for number in range(self._files - 1, -1, -1):
            old = self._numbered(number)
            if old.exists():
                if number + 1 >= self._files:
                    old.unlink()
                else:
                    old.rename(self._numbered(number + 1))
        self._file = os.fdopen(os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb")
        info: dict[str, object] = {"origin": "hicache serve", "began_unix_s": self._clock.wall_s()}
        if self._show_salt:
            info["salt"] = self._salt.hex()
        self._file.write(opening(info))
        self._file.flush()
        self._entries = 0
        self._pairing.clear()

    def _numbered(self, number: int) -> Path:
        return self._path.with_name(f"{self._path.name}.{number}") if number else self._path

    def _entry(self, queued: _Queued) -> Entry | None:
        event, at_ms = queued
        space, page_tokens, width, root = self._space(event.namespace)
        prompt = event.prompt
        session = 0 if isinstance(event, events.Touch) else event.session
        if isinstance(event, events.Fetch) and event.max_pages:
            prompt = prompt[: event.max_pages * width]
        use = getattr(event, "use", NO_USE)
        seen = Seen(self._entries, at_ms, session, event.namespace, prompt)
        store = isinstance(event, events.Reserve)
        partner = self._pairing.store(seen) if store else self._pairing.look_up(seen)
        if partner is not None and not store:
            return None  # the same request, looked up again
        self._hash(seen, partner, root, width)
        tokens = len(seen.ids) * page_tokens
        return Entry(
            EntryKind.STORE if store else EntryKind.LOOKUP,
            at_ms - self._began_ms,
            space,
            page_tokens,
            seen.ids,
            input_tokens=0 if store else tokens,
            cls=str(use.cls or ""),
            turn=min(max(use.turn, 0), TURN_MAX),
            of=self._entries - partner.number if partner is not None else 0,
        )

    def _hash(self, seen: Seen, partner: Seen | None, root: bytes, width: int) -> None:
        """The ids of its pages; those that it has in common with its look-up are taken from there."""
        done, link = 0, root
        if partner is not None and partner.ids and len(seen.prompt) >= len(partner.prompt):
            seen.ids, link = partner.ids[:], partner.link
            done = len(partner.prompt)
        seen.link = chain(seen.ids, memoryview(seen.prompt)[done:], width, link)

    def _space(self, number: int) -> tuple[str, int, int, bytes]:
        """A namespace's label, page size in tokens, symbol width, and the link that its chains begin with."""
        found = self._spaces.get(number)
        if found is None:
            spec, fingerprint = self._namespace(number)
            root = hashlib.blake2b(fingerprint, key=self._salt, digest_size=16).digest()
            found = self._spaces[number] = (root[:4].hex(), spec.page_tokens, spec.symbol_bytes, root)
        return found


def chain(ids: array[int], symbols: memoryview, width: int, link: bytes) -> bytes:
    """Append the id of each page to ``ids``; returns the last link, from which a longer prompt goes on.

    A page's hash has 24 bytes: 8 are its id, and 16, which no file ever sees, are the salt of the next page's hash.
    So the secret of the first link keeps all of them, without the cost of a key at every page.
    """
    blake2b = hashlib.blake2b
    hashes = []
    for start in range(0, len(symbols) - width + 1, width):
        found = blake2b(symbols[start : start + width], salt=link, digest_size=24).digest()
        hashes.append(found)
        link = found[8:]
    flat = array("q")
    flat.frombytes(b"".join(hashes))
    ids.extend(flat[::3])
    return link
