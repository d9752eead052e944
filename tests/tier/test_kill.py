"""``kill -9`` of a writing process at random moments: nothing acknowledged is lost, the folder opens clean."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("lmdb", reason="the disk tier needs lmdb")
pytest.importorskip("zstandard", reason="the disk tier needs zstandard")

from hicache.keys import chain_keys, fingerprint
from hicache.types import Namespace, Outcome, PageRecord

ROUNDS = 24
PAGE_BYTES = 20_000
CAPACITY_BYTES = 8 << 20
LIVE = 150
NAMESPACE = Namespace("m", 4, PAGE_BYTES)
SPACE = fingerprint(NAMESPACE)

# Writes pages round after round, deletes the oldest; a line on stdout per event: P acknowledged put,
# S delete submitted, D acknowledged delete.
CHILD = """
import collections, os, sys
sys.path.insert(0, sys.argv[2])
from pathlib import Path
from conftest import Driver
from test_kill import CAPACITY_BYTES, LIVE, NAMESPACE, SPACE, content, key, record
from hicache.types import Op, Outcome
store = Driver(Path(sys.argv[1]), CAPACITY_BYTES)
store.store.put_namespace(SPACE, NAMESPACE)
number, live, step = int(sys.argv[3]), collections.deque(), 0
say = lambda what, n: os.write(1, f"{what} {n}\\n".encode())
issued = collections.deque()
def settle():
    what, numbers, batch = issued.popleft()
    assert set(store.wait(batch).outcomes) == {Outcome.OK}
    for n in numbers:
        say(what, n)
say("R", 0)
while True:
    step += 1
    fresh = range(number, number + 1 + step % 7)
    number = fresh.stop
    pages = [content(n) for n in fresh]
    issued.append(("P", fresh, store.submit(
        Op.PUT, [key(n) for n in fresh], pages, records=[record(n) for n in fresh])))
    live.extend(fresh)
    old = [live.popleft() for _ in range(max(0, len(live) - LIVE))]
    if old:
        for n in old:
            say("S", n)
        issued.append(("D", old, store.submit(Op.DELETE, [key(n) for n in old])))
    while len(issued) > 6:
        settle()
"""


def record(number: int) -> PageRecord:
    """Every page is a first page of its own prompt."""
    return PageRecord(SPACE, SPACE, number.to_bytes(16, "little"))


def key(number: int) -> bytes:
    return chain_keys(SPACE, record(number).symbol, 16)[0]


def content(number: int) -> bytes:
    rng = np.random.default_rng(number)
    if number % 2:
        return rng.bytes(PAGE_BYTES)
    return (
        (rng.standard_normal(PAGE_BYTES // 2, dtype=np.float32).view(np.uint32) >> 16).astype("<u2").tobytes()
    )


def write_and_kill(folder: Path, first: int, after_s: float) -> list[tuple[str, int]]:
    """What the child said until it was killed."""
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, str(folder), str(Path(__file__).parent), str(first)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert child.stdout is not None
    assert child.stdout.readline() == b"R 0\n", child.communicate()[1].decode()
    time.sleep(after_s)
    child.send_signal(signal.SIGKILL)
    out, err = child.communicate()
    assert child.returncode == -signal.SIGKILL, err.decode()
    lines = out.decode().split("\n")[:-1]
    return [(line.split()[0], int(line.split()[1])) for line in lines]


@pytest.mark.slow
def test_nothing_acknowledged_is_lost(tmp_path: Path, drive: Any, du: Any, rng: random.Random) -> None:
    first, acknowledged = 0, 0
    for _ in range(ROUNDS):
        said = write_and_kill(tmp_path, first, rng.uniform(0.0, 0.12))
        put = {n for what, n in said if what == "P"}
        submitted = {n for what, n in said if what == "S"}
        deleted = {n for what, n in said if what == "D"}
        acknowledged += len(put)
        assert du(tmp_path) <= CAPACITY_BYTES
        store = drive(tmp_path, CAPACITY_BYTES)
        assert not store.store.wiped
        kept = sorted(put - submitted)
        assert store.get([key(n) for n in kept], PAGE_BYTES) == [content(n) for n in kept]
        gone = sorted(deleted)
        assert set(store.get([key(n) for n in gone], PAGE_BYTES)) <= {Outcome.MISS}
        # what was under way is there whole, or not at all
        window = list(range(first, first + 2000))
        states = store.get([key(n) for n in window], PAGE_BYTES)
        assert all(s is Outcome.MISS or s == content(n) for n, s in zip(window, states, strict=True))
        recovery = store.store.recover()
        matchable = {page_key for chain in recovery for page_key in chain.keys}
        assert not recovery.orphans
        assert {key(n) for n in kept} <= matchable
        assert not {key(n) for n in gone} & matchable
        store.delete(sorted(matchable))
        store.store.close()
        first += 10_000
    assert acknowledged > 10 * ROUNDS
