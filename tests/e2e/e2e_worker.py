"""A client process under a test's orders: one JSON object a line on standard input, one answer a line on output.

python e2e_worker.py TARGET OPTIONS_AS_JSON. It ends when its input does.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import numpy as np
from e2e_actor import PAGE_BYTES, Actor, prompt

from hicache.errors import ExhaustedError, HicacheError


class Worker:
    """What can be asked of it."""

    def __init__(self, target: str, options: dict[str, Any]) -> None:
        self.actor = Actor(target, **options)
        self.held: list[Any] = []

    def answer(self, order: dict[str, Any]) -> Any:
        return getattr(self, "do_" + order.pop("do"))(**order)

    def do_connect(self) -> str:
        return self.actor.client.connect().server_version

    def do_work(self, **how: int) -> dict[str, int]:
        return self.actor.work(**how)

    def do_store(self, **how: Any) -> Any:
        return dataclasses.asdict(self.actor.store(**how))

    def do_read(self, **how: Any) -> Any:
        return dataclasses.asdict(self.actor.read(**how))

    def do_hold(self, talks: list[int], pages: int, reserve_talks: list[int], ttl_ms: int) -> dict[str, int]:
        """Take leases and reservations and keep them."""
        granted = missing = 0
        for talk in talks:
            lease = self.actor.ns.fetch(prompt(talk, pages), ttl_ms=ttl_ms, wait_ms=5000)
            granted += lease.granted_pages
            self.held.append(lease)
        for talk in reserve_talks:
            room = self.actor.ns.reserve(prompt(talk, pages), ttl_ms=ttl_ms)
            missing += room.missing_pages
            self.held.append(room)
        return {"granted": granted, "missing": missing}

    def do_flood(self, first_talk: int, talks: int, pages: int, wait_ms: int) -> dict[str, float]:
        """Store fresh talks as fast as it goes."""
        began, stored, refused = time.monotonic(), 0, 0
        for talk in range(first_talk, first_talk + talks):
            try:
                stored += self.actor.store(talk, pages, wait_ms=wait_ms).stored
            except ExhaustedError:
                refused += 1
        return {"stored": stored, "refused": refused, "took_s": time.monotonic() - began}

    def do_copy_until_lost(self, talk: int, pages: int, ttl_ms: int, verify: str) -> dict[str, Any]:
        """Lease a talk, tell, then copy it out again and again until the client says that the lease is gone."""
        lease = self.actor.ns.fetch(prompt(talk, pages), ttl_ms=ttl_ms, wait_ms=5000)
        views = lease.numpy()
        first = self.actor.look(lease, talk, verify=verify)
        say({"granted": lease.granted_pages, "wrong": first.wrong_bytes, "valid": lease.still_valid()})
        copies = wrong = 0
        found = np.empty((lease.granted_pages, PAGE_BYTES), np.uint8)
        while True:
            try:
                lease.copy_into(found, verify=verify)
            except HicacheError as error:
                raised = type(error).__name__
                break
            copies += 1
            wrong += self.actor.wrong(talk, found)
        valid = lease.still_valid()
        seen = np.stack(views) if views else found[:0]
        recycled = self.actor.wrong(talk, seen) if len(seen) else 0
        lease.release()
        return {
            "copies": copies,
            "wrong": wrong,
            "raised": raised,
            "valid": valid,
            "foreign_bytes": recycled,
        }


def say(what: Any) -> None:
    sys.stdout.write(json.dumps(what) + "\n")
    sys.stdout.flush()


def main() -> None:
    worker = Worker(sys.argv[1], json.loads(sys.argv[2]))
    for line in sys.stdin:
        try:
            say({"ok": worker.answer(json.loads(line))})
        except HicacheError as error:
            say(
                {"error": type(error).__name__, "message": str(error), "retry_after_ms": error.retry_after_ms}
            )
    worker.actor.client.close()


if __name__ == "__main__":
    main()
