"""What children of the nursery do: write until they are killed, or read everything back and report."""

from __future__ import annotations

import itertools
import json
import os
import random
import threading
from collections import deque
from pathlib import Path
from typing import Any

from crash_world import (
    NAMESPACES,
    PRINTS,
    SPACES,
    Name,
    content,
    disk_use,
    everything,
    key,
    record,
    version_of,
)

from hicache.tier.disk import DiskStore, Layout
from hicache.types import Batch, Completion, Op, Outcome

IN_FLIGHT = 8
OUTCOMES = {Outcome.OK: "o", Outcome.MISS: "m", Outcome.CORRUPT: "c", Outcome.FULL: "f", Outcome.FAULT: "x"}


class Shop:
    """A disk store and its batches."""

    def __init__(self, folder: str, capacity_bytes: int, **options: Any) -> None:
        self._woken = threading.Event()
        self.next_id = 1  # of the batch to come
        layout = Layout(shard_bytes=options.pop("shard_bytes", 0), scrub_bytes_per_s=options.pop("scrub", 0))
        self.store = DiskStore(Path(folder), capacity_bytes, self._woken.set, layout=layout, **options)

    def submit(self, op: Op, names: list[Name], buffers: list[Any] | None = None, **columns: Any) -> int:
        size = SPACES[names[0][0]][0] if names and op in (Op.PUT, Op.GET) else 0
        views = [memoryview(buffer) for buffer in buffers or []]
        batch = Batch(self.next_id, op, size, keys=[key(n) for n in names], buffers=views, **columns)
        self.next_id += 1
        self.store.submit(batch)
        return batch.id

    def done(self) -> list[Completion]:
        """At least one completion."""
        while not (found := self.store.poll()):
            self._woken.clear()
            if not (found := self.store.poll()):
                assert self._woken.wait(60), "no completion in 60 s"
                continue
            break
        return found


class Writer:
    """Stores, overwrites, deletes and stores again at random, near the capacity, until somebody ends it.

    Every line of the diary is written before what it tells can matter: "S" before a batch is given away, "A" after
    its completion.
    """

    def __init__(self, folder: str, diary: str, seed: str, held: dict[str, int], **options: Any) -> None:
        self._fd = os.open(diary, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        self._rng = random.Random(seed)
        self._say("B")
        self._shop = Shop(folder, options.pop("capacity_bytes"), **options)
        for fingerprint, namespace in zip(PRINTS, NAMESPACES, strict=True):
            self._shop.store.put_namespace(fingerprint, namespace)
        names = {key(name): name for name in everything()}
        self._charges: dict[Name, int] = {}
        for chain in self._shop.store.recover():
            self._charges.update(
                {names[k]: charge for k, charge in zip(chain.keys, chain.charges, strict=True) if k in names}
            )
        # pages that were read back but that no chain holds take room as well
        for text in held:
            space, number = map(int, text.split("."))
            self._charges.setdefault((space, number), SPACES[space][0] + 8192)
        self._version = max(held.values(), default=0)
        self._issued: dict[int, tuple[Op, list[Name]]] = {}
        self._buffers: deque[list[bytes]] = deque(maxlen=64)
        self._say("R")

    def run(self, steps: int = 1 << 60) -> None:
        for _ in range(steps):
            self._step()
            while len(self._issued) > IN_FLIGHT:
                self._settle()
        while self._issued:
            self._settle()

    def close(self) -> None:
        self._shop.store.close()
        self._say("E")

    def _say(self, line: str) -> None:
        os.write(self._fd, f"{line}\n".encode())

    def _step(self) -> None:
        kind = self._rng.random()
        if sum(self._charges.values()) > 0.9 * self._shop.store.usable_bytes or kind < 0.25:
            self._delete()
        elif kind < 0.3:
            self._issue(Op.FLUSH, [], [])
        else:
            self._put()

    def _put(self) -> None:
        space = self._rng.choices(range(len(SPACES)), (6, 4, 1))[0]
        count = 1 if space == 2 else self._rng.randint(1, 8)
        first = self._rng.randrange(SPACES[space][1])
        names = [(space, number) for number in range(first, min(first + count, SPACES[space][1]))]
        self._version += 1
        self._issue(Op.PUT, names, [self._version] * len(names))

    def _delete(self) -> None:
        if not self._charges:
            return
        held = sorted(self._charges)
        first = self._rng.randrange(len(held))
        names = held[first : first + self._rng.randint(1, 12)]
        if self._rng.random() < 0.2:
            names.append(self._rng.choice(everything()))
        self._issue(Op.DELETE, list(dict.fromkeys(names)), [])

    def _issue(self, op: Op, names: list[Name], versions: list[int]) -> None:
        pages = [content(name, version) for name, version in zip(names, versions, strict=op is Op.PUT)]
        self._buffers.append(pages)
        self._issued[self._shop.next_id] = (op, names)
        shown = ",".join(
            f"{space}.{number}:{version}"
            for (space, number), version in itertools.zip_longest(names, versions, fillvalue=0)
        )
        self._say(f"S {self._shop.next_id} {op.value} {shown}")
        records = [record(name) for name in names] if op is Op.PUT else ()
        self._shop.submit(op, names, pages, records=records)

    def _settle(self) -> None:
        for completion in self._shop.done():
            self._say(f"A {completion.id} {''.join(OUTCOMES[each] for each in completion.outcomes)}")
            op, names = self._issued.pop(completion.id)
            for at, outcome in enumerate(completion.outcomes if names else ()):
                if op is Op.PUT and outcome is Outcome.OK:
                    self._charges[names[at]] = completion.charges[at]
                elif op is Op.DELETE and outcome in (Outcome.OK, Outcome.MISS):
                    self._charges.pop(names[at], None)


def write(folder: str, diary: str, seed: str, held: dict[str, int], **options: Any) -> None:
    """Write until killed, or for ``steps``; then close unless ``close`` is False."""
    steps, close = options.pop("steps", 1 << 60), options.pop("close", True)
    writer = Writer(folder, diary, seed, held, **options)
    writer.run(steps)
    if close:
        writer.close()


def read(folder: str, answer: str, *, boot_id: str = "", **options: Any) -> None:
    """Open the folder, recover, read every page there can be, and write down what was seen."""
    if boot_id:
        pretend_boot(boot_id)
    shop = Shop(folder, options.pop("capacity_bytes"), **options)
    recovery = shop.store.recover()
    chained = {page for chain in recovery for page in chain.keys}
    seen: dict[str, int | str] = {}
    for space, (size, count) in enumerate(SPACES):
        step = max(1, (4 << 20) // size)
        for first in range(0, count, step):
            names = [(space, number) for number in range(first, min(first + step, count))]
            into = [bytearray(size) for _ in names]
            shop.submit(Op.GET, names, into)
            (completion,) = shop.done()
            for name, outcome, page in zip(names, completion.outcomes, into, strict=True):
                if outcome is Outcome.OK:
                    seen[f"{space}.{name[1]}"] = version_of(name, page)
                elif outcome is not Outcome.MISS:
                    seen[f"{space}.{name[1]}"] = outcome.value
    by_key = {key(name): f"{name[0]}.{name[1]}" for name in everything()}
    found = {
        "wiped": shop.store.wiped,
        "seen": seen,
        "chained": sorted(by_key.get(each, each.hex()) for each in chained),
        "orphans": len(recovery.orphans),
        "namespaces": len(shop.store.namespaces()),
        "disk_bytes": disk_use(Path(folder)),
    }
    shop.store.close()
    Path(answer).write_text(json.dumps(found))


def inspect(folder: str, answer: str) -> None:
    """What the offline check says."""
    from hicache.tier.inspect import hold_folder, inspect_folder

    with hold_folder(Path(folder)):
        report = inspect_folder(Path(folder), bodies=True)
    Path(answer).write_text(json.dumps({"problems": report.problems(), "pages": report.pages}))


def pretend_boot(boot_id: str) -> None:
    """As if the machine had been started anew."""
    from hicache.tier import folder

    path = Path(os.environ["HICACHE_CRASH_SCRATCH"]) / f"boot-{os.getpid()}"
    path.write_text(boot_id)
    folder._BOOT_ID = path


TASKS = {"write": write, "read": read, "inspect": inspect}
