"""Namespaces survive the wire: every field, and the defaults of what a message leaves out."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from hicache.errors import InvalidArgumentError
from hicache.rpc.common import namespaces
from hicache.rpc.pb import session_pb2
from hicache.types import Namespace, SymbolKind

FIELDS = [field.name for field in dataclasses.fields(Namespace) if field.name != "tenant"]


def all_set() -> Namespace:
    """A namespace no two fields of which, of one type, are equal."""
    fields: dict[str, Any] = {}
    for number, field in enumerate(dataclasses.fields(Namespace), 2):
        fields[field.name] = {"str": f"word {number}", "int": number}.get(str(field.type))
    return Namespace(**{**fields, "symbol_kind": SymbolKind.HASHES})


def test_every_field_survives_but_the_tenant_is_the_callers() -> None:
    spec = all_set()
    wire = session_pb2.NamespaceSpec.FromString(namespaces.to_message(spec).SerializeToString())
    assert {field.name for field in wire.DESCRIPTOR.fields} == set(FIELDS)
    assert namespaces.from_message(wire, spec.tenant) == spec
    assert namespaces.from_message(wire, "blue") == dataclasses.replace(spec, tenant="blue")


def test_what_is_left_out_has_its_default() -> None:
    sparse = session_pb2.NamespaceSpec(model="m", page_tokens=4, page_bytes=64)
    expected = Namespace(model="m", page_tokens=4, page_bytes=64, kv_dtype="", layout="", tenant="t")
    assert namespaces.from_message(sparse, "t") == expected


def test_an_unknown_kind_of_symbols_is_refused() -> None:
    with pytest.raises(InvalidArgumentError, match="tokens or hashes, not 'words'"):
        namespaces.from_message(session_pb2.NamespaceSpec(symbol_kind="words"), "t")
