"""Disk folders for the tests of the offline commands."""

from __future__ import annotations

import dataclasses
import itertools
import random
import subprocess
import sys
import threading
from pathlib import Path

from hicache.keys import chain_keys, fingerprint
from hicache.tier.disk import DiskStore, Layout
from hicache.types import Batch, Completion, Namespace, Op, Outcome, PageRecord

PAGE_BYTES = 8_000
NAMESPACE = Namespace("llama-test", 4, PAGE_BYTES)
SPACE = fingerprint(NAMESPACE)
CAPACITY_BYTES = 32 << 20


@dataclasses.dataclass(frozen=True, slots=True)
class Made:
    """A page and its key."""

    key: bytes
    record: PageRecord
    content: bytes


def pages_of(talks: int, length: int, namespace: Namespace = NAMESPACE) -> list[Made]:
    """Talks of so many pages each, parents first. Half of the bytes compress."""
    made, space = [], fingerprint(namespace)
    for talk in range(talks):
        parent = space
        for at in range(length):
            record = PageRecord(space, parent, (talk << 32 | at).to_bytes(16, "little"))
            parent = chain_keys(parent, record.symbol, 16)[0]
            half = random.Random(f"{talk}/{at}").randbytes(namespace.page_bytes // 2)
            content = bytes(b for pair in zip(half, itertools.repeat(63)) for b in pair)
            made.append(Made(parent, record, content))
    return made


class Shop:
    """A store that waits for its batches."""

    def __init__(self, folder: Path, capacity_bytes: int = CAPACITY_BYTES, shard_bytes: int = 0) -> None:
        self._woken = threading.Event()
        self._ids = itertools.count(1)
        self.store = DiskStore(
            folder,
            capacity_bytes,
            self._woken.set,
            layout=Layout(shard_bytes=shard_bytes),
            wall_ms=lambda: 1000,
        )

    def do(self, op: Op, made: list[Made], buffers: list[bytes] | list[bytearray]) -> Completion:
        self.store.submit(
            Batch(
                next(self._ids),
                op,
                len(buffers[0]) if buffers else 0,
                keys=[each.key for each in made],
                buffers=[memoryview(each) for each in buffers],
                records=[each.record for each in made] if op is Op.PUT else (),
            )
        )
        while True:
            self._woken.clear()
            for completion in self.store.poll():
                return completion
            assert self._woken.wait(30)

    def put(self, made: list[Made], namespace: Namespace = NAMESPACE) -> None:
        self.store.put_namespace(fingerprint(namespace), namespace)
        done = self.do(Op.PUT, made, [each.content for each in made])
        assert set(done.outcomes) == {Outcome.OK}

    def get(self, made: list[Made]) -> list[bytes | Outcome]:
        into = [bytearray(len(each.content)) for each in made]
        done = self.do(Op.GET, made, into)
        return [
            bytes(page) if outcome is Outcome.OK else outcome
            for page, outcome in zip(into, done.outcomes, strict=True)
        ]


def make_folder(folder: Path, talks: int = 10, length: int = 8, **options: int) -> list[Made]:
    """A closed folder, and what is in it."""
    shop, made = Shop(folder, **options), pages_of(talks, length)
    shop.put(made)
    shop.store.close()
    return made


def hicache(*words: str | Path) -> subprocess.CompletedProcess[str]:
    """Run the command line."""
    return subprocess.run(
        [sys.executable, "-m", "hicache", *map(str, words)],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


def tree_state(folder: Path) -> dict[str, tuple[bytes, int]]:
    """Every file's bytes and time of change."""
    return {
        str(path.relative_to(folder)): (path.read_bytes(), path.stat().st_mtime_ns)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
