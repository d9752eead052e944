"""A process of its own: what it yields arrives, and however it ends, its parent lives and says how."""

from __future__ import annotations

import ctypes
import os
import signal
import time
from collections.abc import Iterator

import pytest

from hicache.tier import isolation
from hicache.tier.isolation import Crashed, isolated


def test_what_is_yielded_arrives_in_order() -> None:
    assert list(isolated(lambda: iter(range(1000)))) == list(range(1000))


@pytest.mark.parametrize("number", [signal.SIGSEGV, signal.SIGBUS, signal.SIGABRT, signal.SIGKILL])
def test_a_death_is_told_after_what_came_before_it(number: signal.Signals) -> None:
    def work() -> Iterator[int]:
        yield 7
        os.kill(os.getpid(), number)
        time.sleep(10)

    told = isolated(work)
    assert next(told) == 7
    with pytest.raises(Crashed, match=number.name):
        next(told)


def test_a_read_outside_of_memory_is_survived() -> None:
    def work() -> Iterator[bytes]:
        yield ctypes.string_at(64, 8)

    with pytest.raises(Crashed, match="SIGSEGV"):
        list(isolated(work))


def test_an_exception_is_told_in_words() -> None:
    def work() -> Iterator[int]:
        yield 1
        raise ValueError("no such thing")

    with pytest.raises(Crashed, match="ValueError: no such thing"):
        list(isolated(work))


def test_silence_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    def work() -> Iterator[int]:
        yield 1
        while True:
            time.sleep(1)

    monkeypatch.setattr(isolation, "SILENCE_S", 0.2)
    with pytest.raises(Crashed, match="said nothing"):
        list(isolated(work))


def test_who_stops_listening_leaves_no_child() -> None:
    def work() -> Iterator[int]:
        yield os.getpid()
        while True:
            yield 0

    told = isolated(work)
    child = next(told)
    told.close()
    with pytest.raises(ProcessLookupError):
        os.kill(child, 0)
