"""The zoo once more, straight from its definitions: lists and sums, no queue, no cleverness, O(n) everywhere.

A twin holds entries in a list. A plan works on a copy of the whole twin, which is thrown away if it is aborted and
becomes the twin if it is committed. Every twin says what happens when a run comes (``arrive``), is used (``use``), who
goes next (``choose``), and what is kept of pages that were evicted (``remember``).
"""

from __future__ import annotations

import dataclasses
from math import exp, log2

from hicache.policy.random_order import draw
from hicache.policy.sketch import CountMin


@dataclasses.dataclass
class Entry:
    """One run."""

    run: int
    pages: int
    depth: int
    last: int
    path: int
    cls: str = ""
    exposed: bool = False
    segment: int = 0
    rank: float = 0
    hits: int = 1
    note: float = 0

    @property
    def place(self):
        return (self.rank, -self.depth, self.run)


class Twin:
    """What all twins do alike; by itself it is LRU."""

    def __init__(self):
        self.entries: list[Entry] = []
        self.ghosts: list[dict[int, int]] = [{}, {}]  # id -> note, oldest first
        self.given: list[int] = []
        self.full = self.clock = self.now = self.count = 0

    # --- what the machine calls

    def find(self, run):
        return next(each for each in self.entries if each.run == run)

    def insert(self, entry, ids):
        self.now = max(self.now, entry.last)
        self.arrive(entry, ids)
        self.entries.append(entry)
        self.clock += entry.pages

    def hit(self, run, now):
        self.use(self.find(run), now)

    def split(self, run, tail, tail_pages):
        head = self.find(run)
        head.pages -= tail_pages
        made = dataclasses.replace(
            head, run=tail, pages=tail_pages, depth=head.depth + head.pages, exposed=False
        )
        self.entries.append(made)

    def merge(self, run, absorbed):
        head, gone = self.find(run), self.find(absorbed)
        if (gone.segment, gone.rank) > (head.segment, head.rank):
            head.segment, head.rank, head.last, head.note = gone.segment, gone.rank, gone.last, gone.note
        head.hits = max(head.hits, gone.hits)
        head.pages += gone.pages
        self.entries.remove(gone)

    def hide(self, run):
        self.find(run).exposed = False

    def expose(self, run):
        self.find(run).exposed = True

    def trim(self, run, pages, ids):
        entry = self.find(run)
        entry.pages -= pages
        if ids:
            self.remember(entry, ids)

    def forget(self, run, ids):
        entry = self.find(run)
        self.entries.remove(entry)
        if ids:
            self.remember(entry, ids)

    # --- helpers

    def total(self):
        return sum(each.pages for each in self.entries)

    def size(self, segment):
        return sum(e.pages for e in self.entries if e.segment == segment and e.run not in self.given)

    def first(self, segment=None):
        found = [
            e
            for e in self.entries
            if e.exposed and e.run not in self.given and (segment is None or e.segment == segment)
        ]
        return min(found, key=lambda e: e.place, default=None)

    def recall(self, ids, table=0):
        if not ids or ids[0] not in self.ghosts[table]:
            return -1
        notes = [self.ghosts[table].pop(each, -1) for each in ids]
        return notes[0]

    def keep(self, ids, note, limit, table=0):
        ghosts = self.ghosts[table]
        for each in reversed(ids):
            ghosts.pop(each, None)
            ghosts[each] = note
        while len(ghosts) > limit:
            del ghosts[next(iter(ghosts))]

    def ghost_limit(self, share):
        return max(1024, int(share * self.full))

    # --- what differs

    def arrive(self, entry, ids):
        entry.rank = entry.last

    def use(self, entry, now):
        entry.rank = max(now, entry.rank)

    def choose(self):
        return self.first()

    def left(self, entries):
        pass

    def remember(self, entry, ids):
        pass


class Fifo(Twin):
    def arrive(self, entry, ids):
        self.count += 1
        entry.rank = self.count

    def use(self, entry, now):
        pass


class Lfu(Twin):
    age = 0

    def score(self, entry):
        entry.rank = (entry.hits + self.age) * 2**48 + entry.last

    def arrive(self, entry, ids):
        self.score(entry)

    def use(self, entry, now):
        entry.hits += 1
        entry.last = max(entry.last, now)
        self.score(entry)

    def left(self, entries):
        self.age = max([self.age, *(e.rank // 2**48 for e in entries)])


class PlainLfu(Lfu):
    def left(self, entries):
        pass


class Gdsf(Lfu):
    attention = 0.0

    def arrive(self, entry, ids):
        entry.note = int(2**16 * (1 + entry.depth / self.attention if self.attention else 1))
        self.score(entry)

    def score(self, entry):
        entry.rank = (self.age + entry.hits * entry.note) * 2**48 + entry.last


class Pgdsf(Gdsf):
    attention = 64.0


class Slru(Twin):
    def use(self, entry, now):
        entry.rank = max(now, entry.rank) if entry.segment else now
        entry.segment = 1

    def choose(self):
        while self.size(1) > 0.8 * self.full and (old := self.first(1)):
            old.segment, old.rank = 0, self.now
        return self.first(0) or self.first(1)


class TwoQueue(Twin):
    def arrive(self, entry, ids):
        if self.recall(ids) >= 0:
            entry.segment, entry.rank = 1, entry.last
        else:
            self.count += 1
            entry.rank = self.count

    def use(self, entry, now):
        if entry.segment:
            entry.rank = max(now, entry.rank)

    def choose(self):
        order = (0, 1) if self.size(0) > 0.25 * self.full else (1, 0)
        return self.first(order[0]) or self.first(order[1])

    def remember(self, entry, ids):
        if not entry.segment:
            self.keep(ids, 0, self.ghost_limit(0.5))


class Mq(Twin):
    def arrive(self, entry, ids):
        entry.hits = max(0, self.recall(ids)) + 1
        entry.segment = min(7, int(log2(entry.hits)))
        entry.note = self.clock + self.full
        entry.rank = entry.last

    def use(self, entry, now):
        entry.hits += 1
        segment = min(7, int(log2(entry.hits)))
        entry.rank = max(now, entry.rank)
        entry.segment = segment
        entry.note = self.clock + self.full

    def choose(self):
        if not self.given:
            lowered = []
            for segment in range(1, 8):
                while (head := self.first(segment)) and head not in lowered and head.note < self.clock:
                    head.segment, head.rank, head.note = segment - 1, self.now, self.clock + self.full
                    lowered.append(head)
        return next((found for segment in range(8) if (found := self.first(segment))), None)

    def remember(self, entry, ids):
        self.keep(ids, entry.hits, self.ghost_limit(4))


class Arc(Twin):
    target = 0.0

    def arrive(self, entry, ids):
        b1, b2 = len(self.ghosts[0]), len(self.ghosts[1])
        entry.rank = entry.last
        if self.recall(ids, 0) >= 0:
            entry.segment = 1
            self.target = min(self.full, self.target + entry.pages * max(1, b2 / b1))
        elif self.recall(ids, 1) >= 0:
            entry.segment = 1
            self.target = max(0, self.target - entry.pages * max(1, b1 / b2))

    def use(self, entry, now):
        entry.rank = max(now, entry.rank) if entry.segment else now
        entry.segment = 1

    def choose(self):
        order = (0, 1) if self.size(0) > self.target else (1, 0)
        return self.first(order[0]) or self.first(order[1])

    def remember(self, entry, ids):
        self.keep(ids, 0, 10**6, entry.segment)
        t1 = sum(e.pages for e in self.entries if e.segment == 0)
        self.keep([], 0, max(0, self.full - t1), 0)
        self.keep([], 0, max(0, 2 * self.full - self.total() - len(self.ghosts[0])), 1)


class S3Fifo(Twin):
    def arrive(self, entry, ids):
        self.count += 1
        entry.rank = self.count
        entry.segment = int(self.recall(ids) >= 0)

    def use(self, entry, now):
        entry.note = min(3, entry.note + 1)

    def choose(self):
        while True:
            order = (0, 1) if self.size(0) > 0.1 * self.full else (1, 0)
            head = self.first(order[0]) or self.first(order[1])
            if head is None or head.note <= 1 - head.segment:
                return head
            self.count += 1
            head.note = head.note - 1 if head.segment else 0
            head.segment, head.rank = 1, self.count

    def remember(self, entry, ids):
        if not entry.segment:
            self.keep(ids, 0, self.ghost_limit(0.9))


class Frequency(Twin):
    def score(self, entry):
        entry.rank = (self.clock + int(self.full * log2(entry.hits))) * 2**48 + entry.last

    def arrive(self, entry, ids):
        entry.hits = max(0, self.recall(ids)) + 1
        self.score(entry)

    def use(self, entry, now):
        entry.hits += 1
        entry.last = max(entry.last, now)
        self.score(entry)

    def remember(self, entry, ids):
        self.keep(ids, entry.hits, self.ghost_limit(4))


class Marconi(Twin):
    def score(self, entry):
        saved = entry.depth / (entry.depth + 64)
        entry.rank = (self.clock + int(0.5 * self.full * saved)) * 2**48 + entry.last

    def arrive(self, entry, ids):
        self.score(entry)

    def use(self, entry, now):
        entry.last = max(entry.last, now)
        self.score(entry)


class TailLru(Twin):
    def arrive(self, entry, ids):
        entry.segment, entry.rank = int(entry.depth + entry.pages > 4), entry.last

    def choose(self):
        return self.first(0) or self.first(1)


class Priority(Twin):
    def arrive(self, entry, ids):
        entry.segment, entry.rank = {"low": 0, "high": 2}.get(entry.cls, 1), entry.last

    def choose(self):
        return self.first(0) or self.first(1) or self.first(2)


class PriorityTtl(Priority):
    def use(self, entry, now):
        super().use(entry, now)
        self.now = max(now, self.now)

    def choose(self):
        oldest = self.first()
        return oldest if oldest and oldest.rank + 20 < self.now else super().choose()


class Random(Twin):
    time = 0

    def arrive(self, entry, ids):
        entry.rank = self.time

    def use(self, entry, now):
        pass

    def expose(self, run):
        entry = self.find(run)
        if not entry.exposed:
            entry.rank = draw(1, run, self.time)
        entry.exposed = True

    def left(self, entries):
        self.time = max([self.time, *(e.rank for e in entries)])


class Workload(Twin):
    def __init__(self):
        super().__init__()
        self.names, self.starts, self.waits = [], [0] * 16, {at: [] for at in range(16)}

    def arrive(self, entry, ids):
        note = self.recall(ids)
        if note >= 0:
            self.waits[note % 16].append(self.clock - note // 16)
        if entry.cls not in self.names:
            self.names.append(entry.cls)
        entry.segment = 2 * self.names.index(entry.cls) + (entry.depth > 0)
        self.start(entry)
        entry.rank = entry.last

    def start(self, entry):
        self.starts[entry.segment] += 1
        entry.note = self.clock

    def use(self, entry, now):
        self.waits[entry.segment].append(self.clock - entry.note)
        self.start(entry)
        entry.rank = max(now, entry.rank)

    def chance(self, entry):
        waits = self.waits[entry.segment]
        full = max(1, self.full)
        share = (len(waits) + 4) / (self.starts[entry.segment] + 8)
        mean = (sum(waits) + 8 * full) / (len(waits) + 8)
        still = min(share, 1) * exp(-(self.clock - entry.note) / mean)
        return still * (1 - exp(-full / mean)) / (1 - min(share, 0.999) + still)

    def choose(self):
        heads = [head for at in range(16) if (head := self.first(at))]
        return min(heads, key=lambda e: (self.chance(e), e.place), default=None)

    def remember(self, entry, ids):
        self.keep(ids, entry.note * 16 + entry.segment, self.ghost_limit(2))


class WTinyLfu(Twin):
    """``note``: the era of the count."""

    def __init__(self):
        super().__init__()
        self.sketch, self.era, self.next_era = CountMin(1 << 16), 0, 0

    def uses(self, entry):
        return entry.hits // 2 ** (self.era - entry.note)

    def arrive(self, entry, ids):
        if self.clock >= self.next_era:
            self.next_era = self.clock + max(1024, 10 * self.full)
            self.era += 1
            self.sketch.halve()
        entry.hits = 1 + (self.sketch.estimate(ids[0]) if ids else 0)
        entry.note, entry.rank = self.era, entry.last

    def use(self, entry, now):
        entry.hits, entry.note = self.uses(entry) + 1, self.era
        entry.rank = now if entry.segment == 1 else max(now, entry.rank)
        entry.segment = 2 if entry.segment else 0

    def choose(self):
        window = 0.01 * self.full
        while self.size(2) > 0.8 * (self.full - window) and (old := self.first(2)):
            old.segment, old.rank = 1, self.now
        while self.size(0) > window and (old := self.first(0)) and self.size(0) - old.pages >= window:
            old.segment, old.rank = 1, self.now
        candidate, victim = self.first(0), self.first(1) or self.first(2)
        if candidate and victim and self.uses(candidate) > self.uses(victim):
            candidate.segment, candidate.rank = 1, self.now
            return self.first(1) or self.first(2)
        return candidate if candidate and victim else victim or candidate

    def remember(self, entry, ids):
        for each in ids:
            self.sketch.raise_to(each, self.uses(entry))


TWINS = {
    "2q": TwoQueue,
    "arc": Arc,
    "fifo": Fifo,
    "gdsf": Gdsf,
    "lfu": Lfu,
    "lfu:ageing=0": PlainLfu,
    "lru": Twin,
    "marconi": Marconi,
    "mq": Mq,
    "pgdsf": Pgdsf,
    "priority": Priority,
    "priority:ttl=20": PriorityTtl,
    "random": Random,
    "recency-frequency": Frequency,
    "s3fifo": S3Fifo,
    "slru": Slru,
    "tail-lru": TailLru,
    "workload": Workload,
    "wtinylfu": WTinyLfu,
}
