"""Threads that move pages give way to the one that answers."""

from __future__ import annotations

import contextlib
import os
import threading

#: Nice value of threads that copy, compress or write. On a machine whose cores are all busy, a thread of ordinary
#: priority that wakes up to answer a call would otherwise wait for a time slice of each of them, some 3 ms.
BACKGROUND_NICE = 15


def background() -> None:
    """Give the calling thread background priority (on Linux a thread has a nice value of its own)."""
    os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), BACKGROUND_NICE)


def idle() -> None:
    """Give the calling thread what nobody else wants of the processors (on Linux: SCHED_IDLE)."""
    background()
    with contextlib.suppress(PermissionError):
        os.sched_setscheduler(threading.get_native_id(), os.SCHED_IDLE, os.sched_param(0))
