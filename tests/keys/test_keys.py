"""Fingerprints, page keys and the checks of a namespace."""

from __future__ import annotations

import dataclasses
import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hicache.errors import InvalidArgumentError
from hicache.keys import (
    KEY_BYTES,
    MAX_NAME_BYTES,
    chain_keys,
    fingerprint,
    validate,
    validate_use,
    whole_pages,
)
from hicache.types import NO_USE, Namespace, SymbolKind, Use

BASE = Namespace("llama", 16, 65536)
HASHES = dataclasses.replace(BASE, symbol_kind=SymbolKind.HASHES, symbol_hash_bytes=32)

short = st.integers(0, 9)
word = st.text("ab\0=", max_size=3)
namespaces = st.builds(
    Namespace,
    **{
        field.name: {"str": word, "int": short, "SymbolKind": st.sampled_from(SymbolKind)}[str(field.type)]
        for field in dataclasses.fields(Namespace)
    },
)


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(Namespace)])
def test_every_field_changes_the_fingerprint(field: str) -> None:
    """Namespaces that differ in one field never share pages."""
    value = getattr(BASE, field)
    if isinstance(value, SymbolKind):
        other: object = SymbolKind.HASHES
    else:
        other = value + 1 if isinstance(value, int) else value + "x"
    assert fingerprint(dataclasses.replace(BASE, **{field: other})) != fingerprint(BASE)


@given(namespaces, namespaces)
def test_fingerprints_are_equal_exactly_when_namespaces_are(one: Namespace, two: Namespace) -> None:
    """No two namespaces run into each other, whatever their strings hold."""
    assert (fingerprint(one) == fingerprint(two)) == (one == two)
    assert len(fingerprint(one)) == KEY_BYTES


@given(namespaces, st.data())
def test_text_moved_between_fields_changes_the_fingerprint(one: Namespace, data: st.DataObject) -> None:
    """Fields are told apart by more than the order of their bytes."""
    names = [field.name for field in dataclasses.fields(Namespace) if str(field.type) == "str"]
    left, right = data.draw(st.lists(st.sampled_from(names), min_size=2, max_size=2, unique=True))
    swapped = dataclasses.replace(one, **{left: getattr(one, right), right: getattr(one, left)})
    assert (fingerprint(swapped) == fingerprint(one)) == (swapped == one)


@given(st.binary(min_size=1, max_size=32), st.integers(1, 8), st.integers(0, 6), st.data())
def test_page_keys_are_a_hash_chain(seed: bytes, width: int, pages: int, data: st.DataObject) -> None:
    """Each key is the hash of the key before it and its page's symbol."""
    symbols = data.draw(st.binary(min_size=width * pages, max_size=width * pages))
    expected = []
    for page in range(pages):
        before = expected[-1] if expected else seed
        expected.append(hashlib.sha256(before + symbols[page * width : page * width + width]).digest())
    assert chain_keys(seed, symbols, width) == expected


@given(st.binary(min_size=4, max_size=40), st.data())
def test_a_chain_can_be_continued(symbols: bytes, data: st.DataObject) -> None:
    """Keys computed in two steps are the keys computed in one."""
    symbols = symbols[: len(symbols) // 4 * 4]
    at = 4 * data.draw(st.integers(1, len(symbols) // 4))
    head = chain_keys(b"seed", symbols[:at], 4)
    assert head + chain_keys(head[-1], symbols[at:], 4) == chain_keys(b"seed", symbols, 4)


@given(st.integers(0, 300))
def test_a_token_prompt_loses_its_partial_page_only(tokens: int) -> None:
    """Tokens that fill no page are left out, all others kept."""
    prompt = bytes(range(256)) * 5
    prompt = prompt[: 4 * tokens]
    kept = whole_pages(BASE, prompt)
    assert prompt.startswith(kept)
    assert len(kept) == tokens // 16 * 64


@pytest.mark.parametrize(
    ("namespace", "length"),
    [
        pytest.param(BASE, 66, id="half a token"),
        pytest.param(HASHES, 33, id="half a hash"),
        pytest.param(dataclasses.replace(BASE, extra_key_bytes=8), 64, id="tokens without their extra keys"),
    ],
)
def test_a_prompt_of_impossible_length_is_refused(namespace: Namespace, length: int) -> None:
    """A length that no prompt of the namespace can have is the caller's mistake."""
    with pytest.raises(InvalidArgumentError):
        whole_pages(namespace, bytes(length))


def test_whole_symbols_are_kept_as_they_are() -> None:
    """Prompts of whole symbols come back unchanged in every kind of namespace."""
    extra = dataclasses.replace(BASE, extra_key_bytes=8)
    for namespace, length in ((BASE, 128), (HASHES, 96), (extra, 144), (BASE, 0)):
        assert whole_pages(namespace, bytes(length)) == bytes(length)


@pytest.mark.parametrize(
    "change",
    [
        {"model": ""},
        {"tenant": ""},
        {"page_tokens": 0},
        {"page_tokens": 4097},
        {"page_bytes": 0},
        {"page_bytes": (1 << 30) + 1},
        {"world_size": 0},
        {"layers": -1},
        {"kv_heads": -1},
        {"head_size": -1},
        {"symbol_hash_bytes": 16},
        {"extra_key_bytes": 65},
        {"extra_key_bytes": -1},
        {"symbol_kind": SymbolKind.HASHES},
        {"symbol_kind": SymbolKind.HASHES, "symbol_hash_bytes": 15},
        {"symbol_kind": SymbolKind.HASHES, "symbol_hash_bytes": 33},
        {"symbol_kind": SymbolKind.HASHES, "symbol_hash_bytes": 32, "extra_key_bytes": 8},
    ],
    ids=str,
)
def test_a_namespace_that_cannot_be_served_is_refused(change: dict[str, object]) -> None:
    """Each limit of a namespace is enforced, and its field named."""
    with pytest.raises(InvalidArgumentError, match=r"namespace: .*"):
        validate(dataclasses.replace(BASE, **change))  # type: ignore[arg-type]


@pytest.mark.parametrize("field", ["model", "tenant", "salt", "adapter"])
def test_names_are_bounded(field: str) -> None:
    """Names of clients cannot take memory without end; the bound is in bytes, not letters."""
    validate(dataclasses.replace(BASE, **{field: "x" * MAX_NAME_BYTES}))  # type: ignore[arg-type]
    with pytest.raises(InvalidArgumentError, match=field):
        validate(dataclasses.replace(BASE, **{field: "é" * (MAX_NAME_BYTES // 2 + 1)}))  # type: ignore[arg-type]


def test_namespaces_within_the_limits_are_served() -> None:
    """The smallest and the largest allowed values pass."""
    for change in (
        {},
        {"page_tokens": 4096, "page_bytes": 1 << 30, "extra_key_bytes": 64},
        {"page_tokens": 1, "page_bytes": 1},
        {"symbol_kind": SymbolKind.HASHES, "symbol_hash_bytes": 16},
    ):
        validate(dataclasses.replace(BASE, **change))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("use", "word"),
    [
        (Use("x" * 65), "class"),
        (Use("a\nb"), "class"),
        (Use("", -1), "turn"),
        (Use("", 1 << 32), "turn"),
        (Use("", 0, -1.0), "cost"),
        (Use("", 0, float("nan")), "cost"),
        (Use("", 0, float("inf")), "cost"),
    ],
)
def test_what_is_said_of_a_use_is_checked(use: Use, word: str) -> None:
    """Each refusal names its field."""
    with pytest.raises(InvalidArgumentError, match=word):
        validate_use(use)


def test_a_use_within_the_limits_is_taken() -> None:
    """Also the one that says nothing."""
    for use in (NO_USE, Use("ü" * 32, (1 << 32) - 1, 1e18)):
        assert validate_use(use) is use
