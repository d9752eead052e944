from . import session_pb2 as _session_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Iterable as _Iterable, Mapping as _Mapping, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class WatchEventsRequest(_message.Message):
    __slots__ = ("session_id", "start_revision", "server_epoch", "tiers", "fingerprints", "progress_ms", "all_tenants")
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    START_REVISION_FIELD_NUMBER: _ClassVar[int]
    SERVER_EPOCH_FIELD_NUMBER: _ClassVar[int]
    TIERS_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINTS_FIELD_NUMBER: _ClassVar[int]
    PROGRESS_MS_FIELD_NUMBER: _ClassVar[int]
    ALL_TENANTS_FIELD_NUMBER: _ClassVar[int]
    session_id: bytes
    start_revision: int
    server_epoch: bytes
    tiers: _containers.RepeatedScalarFieldContainer[int]
    fingerprints: _containers.RepeatedScalarFieldContainer[bytes]
    progress_ms: int
    all_tenants: bool
    def __init__(self, session_id: _Optional[bytes] = ..., start_revision: _Optional[int] = ..., server_epoch: _Optional[bytes] = ..., tiers: _Optional[_Iterable[int]] = ..., fingerprints: _Optional[_Iterable[bytes]] = ..., progress_ms: _Optional[int] = ..., all_tenants: bool = ...) -> None: ...

class WatchEventsResponse(_message.Message):
    __slots__ = ("kind", "revision", "server_epoch", "tiers", "snapshot", "first_revision", "namespaces", "namespace_id", "tier", "stored", "pages", "parents", "keys", "symbols")
    class Kind(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        KIND_UNSPECIFIED: _ClassVar[WatchEventsResponse.Kind]
        OPENED: _ClassVar[WatchEventsResponse.Kind]
        SNAPSHOT: _ClassVar[WatchEventsResponse.Kind]
        SNAPSHOT_DONE: _ClassVar[WatchEventsResponse.Kind]
        NEWS: _ClassVar[WatchEventsResponse.Kind]
        PROGRESS: _ClassVar[WatchEventsResponse.Kind]
        COMPACTED: _ClassVar[WatchEventsResponse.Kind]
    KIND_UNSPECIFIED: WatchEventsResponse.Kind
    OPENED: WatchEventsResponse.Kind
    SNAPSHOT: WatchEventsResponse.Kind
    SNAPSHOT_DONE: WatchEventsResponse.Kind
    NEWS: WatchEventsResponse.Kind
    PROGRESS: WatchEventsResponse.Kind
    COMPACTED: WatchEventsResponse.Kind
    KIND_FIELD_NUMBER: _ClassVar[int]
    REVISION_FIELD_NUMBER: _ClassVar[int]
    SERVER_EPOCH_FIELD_NUMBER: _ClassVar[int]
    TIERS_FIELD_NUMBER: _ClassVar[int]
    SNAPSHOT_FIELD_NUMBER: _ClassVar[int]
    FIRST_REVISION_FIELD_NUMBER: _ClassVar[int]
    NAMESPACES_FIELD_NUMBER: _ClassVar[int]
    NAMESPACE_ID_FIELD_NUMBER: _ClassVar[int]
    TIER_FIELD_NUMBER: _ClassVar[int]
    STORED_FIELD_NUMBER: _ClassVar[int]
    PAGES_FIELD_NUMBER: _ClassVar[int]
    PARENTS_FIELD_NUMBER: _ClassVar[int]
    KEYS_FIELD_NUMBER: _ClassVar[int]
    SYMBOLS_FIELD_NUMBER: _ClassVar[int]
    kind: WatchEventsResponse.Kind
    revision: int
    server_epoch: bytes
    tiers: _containers.RepeatedCompositeFieldContainer[_session_pb2.TierInfo]
    snapshot: bool
    first_revision: int
    namespaces: _containers.RepeatedCompositeFieldContainer[WatchedNamespace]
    namespace_id: _containers.RepeatedScalarFieldContainer[int]
    tier: _containers.RepeatedScalarFieldContainer[int]
    stored: _containers.RepeatedScalarFieldContainer[bool]
    pages: _containers.RepeatedScalarFieldContainer[int]
    parents: bytes
    keys: bytes
    symbols: bytes
    def __init__(self, kind: _Optional[_Union[WatchEventsResponse.Kind, str]] = ..., revision: _Optional[int] = ..., server_epoch: _Optional[bytes] = ..., tiers: _Optional[_Iterable[_Union[_session_pb2.TierInfo, _Mapping]]] = ..., snapshot: bool = ..., first_revision: _Optional[int] = ..., namespaces: _Optional[_Iterable[_Union[WatchedNamespace, _Mapping]]] = ..., namespace_id: _Optional[_Iterable[int]] = ..., tier: _Optional[_Iterable[int]] = ..., stored: _Optional[_Iterable[bool]] = ..., pages: _Optional[_Iterable[int]] = ..., parents: _Optional[bytes] = ..., keys: _Optional[bytes] = ..., symbols: _Optional[bytes] = ...) -> None: ...

class WatchedNamespace(_message.Message):
    __slots__ = ("namespace_id", "tenant", "fingerprint", "symbol_bytes", "namespace")
    NAMESPACE_ID_FIELD_NUMBER: _ClassVar[int]
    TENANT_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    SYMBOL_BYTES_FIELD_NUMBER: _ClassVar[int]
    NAMESPACE_FIELD_NUMBER: _ClassVar[int]
    namespace_id: int
    tenant: str
    fingerprint: bytes
    symbol_bytes: int
    namespace: _session_pb2.NamespaceSpec
    def __init__(self, namespace_id: _Optional[int] = ..., tenant: _Optional[str] = ..., fingerprint: _Optional[bytes] = ..., symbol_bytes: _Optional[int] = ..., namespace: _Optional[_Union[_session_pb2.NamespaceSpec, _Mapping]] = ...) -> None: ...
