"""Pages of a namespace that names a lossy codec: exact in memory, within the bound when they come from disk."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from e2e_actor import Actor, prompt
from e2e_kit import assert_idle, serving, tiers, wait_recovered

from hicache.errors import HicacheError
from hicache.tier.codec_names import INT8, LOSSY

TALKS, PAGES = 6, 8


def read(actor: Actor, talk: int) -> tuple[np.ndarray, np.ndarray]:
    """What the client gets, every page verified against the server's checksum; and what was stored."""
    with actor.ns.fetch(prompt(talk, PAGES), wait_ms=10_000) as lease:
        assert lease.granted_pages == PAGES
        found = np.empty((PAGES, lease.page_bytes), np.uint8)
        lease.copy_into(found, verify="on-copy")
    return found, actor.maker.make(actor.seeds(prompt(talk, PAGES)))


def floats(pages: np.ndarray) -> np.ndarray:
    return (pages.view(np.uint16).astype(np.uint32) << 16).view(np.float32)


@pytest.mark.parametrize("codec", LOSSY)
def test_a_lossy_page_goes_to_disk_and_back(tmp_path: Path, codec: str) -> None:
    flags = tiers(tmp_path, "32MiB", "64MiB")
    with serving(tmp_path, *flags) as sidecar:
        with Actor(sidecar.target, fields={"codec": codec}) as lossy, Actor(sidecar.target) as exact:
            for talk in range(TALKS):
                assert lossy.store(talk, PAGES, durable=True).durable == PAGES
                assert exact.store(talk, PAGES, durable=True).durable == PAGES
                found, stored = read(lossy, talk)
                assert np.array_equal(found, stored), "still the copy in memory"
        assert sidecar.stop() == 0
        sidecar.start()
        with Actor(sidecar.target, fields={"codec": codec}) as lossy, Actor(sidecar.target) as exact:
            wait_recovered(lossy.client)
            for talk in range(TALKS):
                found, stored = read(lossy, talk)
                assert not np.array_equal(found, stored), "from the disk"
                x, y = floats(stored), floats(found)
                assert np.abs(x - y).max() <= np.abs(x).max() / 8
                again, _ = read(lossy, talk)
                assert np.array_equal(found, again), "decoded the same every time"
                assert exact.read(talk, PAGES).wrong_bytes == 0
                # a client that stores what is there already is told so, whatever its bytes are
                assert lossy.store(talk, PAGES, durable=True).present == PAGES
            stats = assert_idle(lossy.client)
            disk = stats.tiers[-1]
            assert disk.used_bytes < 2 * TALKS * PAGES * lossy.ns.spec.page_bytes


def test_a_lossy_page_survives_pressure(tmp_path: Path) -> None:
    """More pages than memory holds: they leave, come back lossy, leave again. None is taken for corrupt."""
    talks, lossy_talks = 60, 0
    flags = tiers(tmp_path, "4MiB", "64MiB")
    with serving(tmp_path, *flags) as sidecar, Actor(sidecar.target, fields={"codec": INT8}) as actor:
        for _ in range(2):
            for talk in range(talks):
                actor.store(talk, PAGES, durable=True)
            for talk in range(talks):
                found, stored = read(actor, talk)
                x, y = floats(stored), floats(found)
                assert np.abs(x - y).max() <= np.abs(x).max() / 50
                lossy_talks += not np.array_equal(found, stored)
        assert lossy_talks > talks, "most came from the disk"
        stats = assert_idle(actor.client)
        assert all(not tier.corrupt_pages for tier in stats.tiers)


def test_codecs_that_are_not_known_are_refused_with_those_that_are(tmp_path: Path) -> None:
    with serving(tmp_path, *tiers(tmp_path, "32MiB", "")) as sidecar:
        for fields, words in (
            ({"codec": "fp4"}, "fp8-e4m3, int8-g64, int4-g64"),
            ({"codec": INT8, "kv_dtype": "float32"}, "bfloat16"),
        ):
            with pytest.raises(HicacheError, match=words), Actor(sidecar.target, fields=fields) as actor:
                actor.store(0, 1)
