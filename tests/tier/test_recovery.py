"""The tree's chains come back as a plain model says, without page bodies."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lmdb", reason="the disk tier needs lmdb")
pytest.importorskip("zstandard", reason="the disk tier needs zstandard")

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hicache.keys import chain_keys, fingerprint
from hicache.types import Namespace, Outcome, PageRecord, SymbolKind

TOKENS = Namespace("m", 4, 600, tenant="a")
HASHES = Namespace("m", 4, 600, tenant="b", symbol_kind=SymbolKind.HASHES, symbol_hash_bytes=16)
SPACES = {fingerprint(space): space for space in (TOKENS, HASHES)}

Path_ = tuple[int, ...]  # a page, as the choices that lead to it


def database(driver: Any) -> Any:
    """The one shard's databases."""
    [shard] = driver.store._shelf.shards
    return shard.db


def page_at(space: bytes, path: Path_) -> tuple[bytes, PageRecord]:
    """Key and record of the page at the end of a path."""
    parent, key, symbol = space, space, b""
    for choice in path:
        symbol = choice.to_bytes(4, "little") * 4
        parent, [key] = key, chain_keys(key, symbol, 16)
    return key, PageRecord(space, parent, symbol)


def store_paths(driver: Any, space: bytes, paths: list[Path_]) -> dict[bytes, int]:
    driver.store.put_namespace(space, SPACES[space])
    rows = dict(page_at(space, path) for path in paths)
    if not rows:
        return {}
    done = driver.put({key: key * 19 for key in rows}, records=list(rows.values()))
    assert set(done.outcomes) == {Outcome.OK}
    return dict(zip(rows, done.charges, strict=True))


def recovered_paths(driver: Any) -> tuple[dict[bytes, dict[Path_, bytes]], dict[bytes, int], set[bytes]]:
    """namespace -> path -> key; key -> charge; stranded pages."""
    chains: dict[bytes, list[list[Path_]]] = {}
    found: dict[bytes, dict[Path_, bytes]] = {}
    charges: dict[bytes, int] = {}
    lost: set[bytes] = set()
    recovery = driver.store.recover()
    for chain in recovery:
        earlier = chains.setdefault(chain.namespace_fingerprint, [])
        assert chain.parent >= -1 or chain.parent_key
        path: Path_ | None = (
            () if chain.parent == -1 else None if chain.parent == -2 else earlier[chain.parent][-1]
        )
        stranded = path is None or path[:1] == (-1,)
        assert stranded or not any(pages[0][:1] == (-1,) for pages in earlier), "stranded chains come last"
        path = (-1,) if path is None else path
        pages = []
        for index, key in enumerate(chain.keys):
            path += (int.from_bytes(chain.symbols[16 * index : 16 * index + 4], "little"),)
            pages.append(path)
            if stranded:
                lost.add(key)
            else:
                found.setdefault(chain.namespace_fingerprint, {})[path] = key
        earlier.append(pages)
        charges.update(zip(chain.keys, chain.charges, strict=True))
    ends = [pages[-1] for per_space in chains.values() for pages in per_space]
    starts = [pages[0][:-1] for per_space in chains.values() for pages in per_space]
    for end in ends:  # a chain ends where several pages follow or none does
        assert starts.count(end) != 1 or len(chains) > 1 or end[0] == -1
    assert not recovery.orphans
    return found, charges, lost


paths = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=7).map(tuple), max_size=12)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(tokens=paths, hashes=paths, reopen=st.booleans())
def test_chains_are_what_the_model_says(
    tokens: list[Path_], hashes: list[Path_], reopen: bool, tmp_path_factory: Any, drive: Any
) -> None:
    """Pages whose ancestors are all stored come back, the others are stranded."""
    folder = tmp_path_factory.mktemp("disk")
    driver = drive(folder, 4 << 20)
    expected: dict[bytes, dict[Path_, bytes]] = {}
    charges: dict[bytes, int] = {}
    orphans: set[bytes] = set()
    for space, some in ((fingerprint(TOKENS), tokens), (fingerprint(HASHES), hashes)):
        # every other page of a path is stored, so that there are gaps
        pages = {path[:n] for path in some for n in range(1, len(path) + 1) if (n + path[0]) % 4}
        charges |= store_paths(driver, space, sorted(pages))
        for path in pages:
            key = page_at(space, path)[0]
            if all(path[:n] in pages for n in range(1, len(path))):
                expected.setdefault(space, {})[path] = key
            else:
                orphans.add(key)
    if reopen:
        driver.store.close()
        driver = drive(folder, 4 << 20)
        assert driver.store.namespaces() == (SPACES if charges else {})
    found, found_charges, found_orphans = recovered_paths(driver)
    assert found == expected
    assert found_orphans == orphans
    assert found_charges == {key: charges[key] for key in found_charges}
    driver.store.close()


def test_a_long_chain_is_one_chain_and_a_deleted_middle_strands_the_rest(tmp_path: Path, drive: Any) -> None:
    driver = drive(tmp_path)
    space = fingerprint(TOKENS)
    long = tuple(random.Random(1).randrange(100) for _ in range(300))
    store_paths(driver, space, [long[:n] for n in range(1, 301)])
    [chain] = list(driver.store.recover())
    assert len(chain.keys) == 300
    assert chain.keys == chain_keys(space, chain.symbols, 16)
    driver.delete([chain.keys[100]])
    recovery = driver.store.recover()
    front, back = list(recovery)
    assert (front.parent, front.keys) == (-1, chain.keys[:100])
    assert (back.parent, back.parent_key, back.keys) == (-2, chain.keys[100], chain.keys[101:])
    assert not recovery.orphans


def test_rotten_rows_and_pages_without_records_are_orphans(tmp_path: Path, drive: Any) -> None:
    driver = drive(tmp_path)
    space = fingerprint(TOKENS)
    charges = store_paths(driver, space, [(1,), (1, 2), (1, 2, 3), (9,)])
    keys = list(charges)
    driver.put({b"x" * 32: b"page"})
    unknown = fingerprint(Namespace("other", 4, 600))
    stray = chain_keys(unknown, bytes(16), 16)[0]
    driver.put({stray: b"page"}, records=[PageRecord(unknown, unknown, bytes(16))])
    db = database(driver)
    with db.env.begin(write=True, db=db.meta) as txn:
        row = bytearray(txn.get(keys[1]))
        row[-1] ^= 1
        txn.put(keys[1], row)
        txn.put(keys[3], b"??")
    recovery = driver.store.recover()
    assert [(chain.keys, chain.parent) for chain in recovery] == [([keys[0]], -1), ([keys[2]], -2)]
    assert set(recovery.orphans) == {keys[1], keys[3], b"x" * 32, stray}
    driver.delete(recovery.orphans)
    again = driver.store.recover()
    assert [chain.keys for chain in again] == [[keys[0]], [keys[2]]]
    assert not again.orphans


def test_a_namespace_of_a_newer_version_is_left_out(tmp_path: Path, drive: Any) -> None:
    driver = drive(tmp_path)
    space = fingerprint(TOKENS)
    store_paths(driver, space, [(1,)])
    db = database(driver)
    with db.env.begin(write=True, db=db.namespaces) as txn:
        txn.put(space, txn.get(space)[:-1] + b', "colour": "red"}')
    driver.store.close()
    driver = drive(tmp_path)
    assert driver.store.namespaces() == {}
    recovery = driver.store.recover()
    assert not list(recovery)
    assert len(recovery.orphans) == 1
