from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Iterable as _Iterable, Mapping as _Mapping, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class GetCapabilitiesRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetCapabilitiesResponse(_message.Message):
    __slots__ = ("server_version", "server_epoch", "tiers", "fd_socket", "max_message_bytes", "max_inflight_per_session", "max_lease_ttl_ms", "idempotency_entries", "idempotency_ttl_ms", "stream_chunk_bytes", "max_prompt_bytes", "max_prompt_pages", "max_queries_per_call", "kv_memory", "device_uuids", "pool_shared")
    SERVER_VERSION_FIELD_NUMBER: _ClassVar[int]
    SERVER_EPOCH_FIELD_NUMBER: _ClassVar[int]
    TIERS_FIELD_NUMBER: _ClassVar[int]
    FD_SOCKET_FIELD_NUMBER: _ClassVar[int]
    MAX_MESSAGE_BYTES_FIELD_NUMBER: _ClassVar[int]
    MAX_INFLIGHT_PER_SESSION_FIELD_NUMBER: _ClassVar[int]
    MAX_LEASE_TTL_MS_FIELD_NUMBER: _ClassVar[int]
    IDEMPOTENCY_ENTRIES_FIELD_NUMBER: _ClassVar[int]
    IDEMPOTENCY_TTL_MS_FIELD_NUMBER: _ClassVar[int]
    STREAM_CHUNK_BYTES_FIELD_NUMBER: _ClassVar[int]
    MAX_PROMPT_BYTES_FIELD_NUMBER: _ClassVar[int]
    MAX_PROMPT_PAGES_FIELD_NUMBER: _ClassVar[int]
    MAX_QUERIES_PER_CALL_FIELD_NUMBER: _ClassVar[int]
    KV_MEMORY_FIELD_NUMBER: _ClassVar[int]
    DEVICE_UUIDS_FIELD_NUMBER: _ClassVar[int]
    POOL_SHARED_FIELD_NUMBER: _ClassVar[int]
    server_version: str
    server_epoch: bytes
    tiers: _containers.RepeatedCompositeFieldContainer[TierInfo]
    fd_socket: str
    max_message_bytes: int
    max_inflight_per_session: int
    max_lease_ttl_ms: int
    idempotency_entries: int
    idempotency_ttl_ms: int
    stream_chunk_bytes: int
    max_prompt_bytes: int
    max_prompt_pages: int
    max_queries_per_call: int
    kv_memory: _containers.RepeatedScalarFieldContainer[str]
    device_uuids: _containers.RepeatedScalarFieldContainer[bytes]
    pool_shared: bool
    def __init__(self, server_version: _Optional[str] = ..., server_epoch: _Optional[bytes] = ..., tiers: _Optional[_Iterable[_Union[TierInfo, _Mapping]]] = ..., fd_socket: _Optional[str] = ..., max_message_bytes: _Optional[int] = ..., max_inflight_per_session: _Optional[int] = ..., max_lease_ttl_ms: _Optional[int] = ..., idempotency_entries: _Optional[int] = ..., idempotency_ttl_ms: _Optional[int] = ..., stream_chunk_bytes: _Optional[int] = ..., max_prompt_bytes: _Optional[int] = ..., max_prompt_pages: _Optional[int] = ..., max_queries_per_call: _Optional[int] = ..., kv_memory: _Optional[_Iterable[str]] = ..., device_uuids: _Optional[_Iterable[bytes]] = ..., pool_shared: bool = ...) -> None: ...

class TierInfo(_message.Message):
    __slots__ = ("name", "kind", "capacity_bytes", "durable", "client_readable")
    NAME_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    CAPACITY_BYTES_FIELD_NUMBER: _ClassVar[int]
    DURABLE_FIELD_NUMBER: _ClassVar[int]
    CLIENT_READABLE_FIELD_NUMBER: _ClassVar[int]
    name: str
    kind: str
    capacity_bytes: int
    durable: bool
    client_readable: bool
    def __init__(self, name: _Optional[str] = ..., kind: _Optional[str] = ..., capacity_bytes: _Optional[int] = ..., durable: bool = ..., client_readable: bool = ...) -> None: ...

class AttachRequest(_message.Message):
    __slots__ = ("hello", "keep_alive", "region_released", "goodbye")
    HELLO_FIELD_NUMBER: _ClassVar[int]
    KEEP_ALIVE_FIELD_NUMBER: _ClassVar[int]
    REGION_RELEASED_FIELD_NUMBER: _ClassVar[int]
    GOODBYE_FIELD_NUMBER: _ClassVar[int]
    hello: Hello
    keep_alive: KeepAlive
    region_released: RegionReleased
    goodbye: Goodbye
    def __init__(self, hello: _Optional[_Union[Hello, _Mapping]] = ..., keep_alive: _Optional[_Union[KeepAlive, _Mapping]] = ..., region_released: _Optional[_Union[RegionReleased, _Mapping]] = ..., goodbye: _Optional[_Union[Goodbye, _Mapping]] = ...) -> None: ...

class Hello(_message.Message):
    __slots__ = ("client_name", "token", "resume_session_id")
    CLIENT_NAME_FIELD_NUMBER: _ClassVar[int]
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    RESUME_SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    client_name: str
    token: bytes
    resume_session_id: bytes
    def __init__(self, client_name: _Optional[str] = ..., token: _Optional[bytes] = ..., resume_session_id: _Optional[bytes] = ...) -> None: ...

class KeepAlive(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class RegionReleased(_message.Message):
    __slots__ = ("region_id",)
    REGION_ID_FIELD_NUMBER: _ClassVar[int]
    region_id: int
    def __init__(self, region_id: _Optional[int] = ...) -> None: ...

class Goodbye(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class AttachResponse(_message.Message):
    __slots__ = ("welcome", "keep_alive", "draining", "region_retired")
    WELCOME_FIELD_NUMBER: _ClassVar[int]
    KEEP_ALIVE_FIELD_NUMBER: _ClassVar[int]
    DRAINING_FIELD_NUMBER: _ClassVar[int]
    REGION_RETIRED_FIELD_NUMBER: _ClassVar[int]
    welcome: Welcome
    keep_alive: KeepAlive
    draining: Draining
    region_retired: RegionRetired
    def __init__(self, welcome: _Optional[_Union[Welcome, _Mapping]] = ..., keep_alive: _Optional[_Union[KeepAlive, _Mapping]] = ..., draining: _Optional[_Union[Draining, _Mapping]] = ..., region_retired: _Optional[_Union[RegionRetired, _Mapping]] = ...) -> None: ...

class Welcome(_message.Message):
    __slots__ = ("session_id", "server_epoch", "tenant", "resumed", "keep_alive_ms", "resume_window_ms")
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    SERVER_EPOCH_FIELD_NUMBER: _ClassVar[int]
    TENANT_FIELD_NUMBER: _ClassVar[int]
    RESUMED_FIELD_NUMBER: _ClassVar[int]
    KEEP_ALIVE_MS_FIELD_NUMBER: _ClassVar[int]
    RESUME_WINDOW_MS_FIELD_NUMBER: _ClassVar[int]
    session_id: bytes
    server_epoch: bytes
    tenant: str
    resumed: bool
    keep_alive_ms: int
    resume_window_ms: int
    def __init__(self, session_id: _Optional[bytes] = ..., server_epoch: _Optional[bytes] = ..., tenant: _Optional[str] = ..., resumed: bool = ..., keep_alive_ms: _Optional[int] = ..., resume_window_ms: _Optional[int] = ...) -> None: ...

class Draining(_message.Message):
    __slots__ = ("grace_ms",)
    GRACE_MS_FIELD_NUMBER: _ClassVar[int]
    grace_ms: int
    def __init__(self, grace_ms: _Optional[int] = ...) -> None: ...

class RegionRetired(_message.Message):
    __slots__ = ("region_id",)
    REGION_ID_FIELD_NUMBER: _ClassVar[int]
    region_id: int
    def __init__(self, region_id: _Optional[int] = ...) -> None: ...

class NamespaceSpec(_message.Message):
    __slots__ = ("model", "revision", "adapter", "salt", "kv_dtype", "layout", "codec", "layers", "kv_heads", "head_size", "page_tokens", "world_size", "engine_version", "page_bytes", "symbol_kind", "symbol_hash_bytes", "extra_key_bytes")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    REVISION_FIELD_NUMBER: _ClassVar[int]
    ADAPTER_FIELD_NUMBER: _ClassVar[int]
    SALT_FIELD_NUMBER: _ClassVar[int]
    KV_DTYPE_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_FIELD_NUMBER: _ClassVar[int]
    CODEC_FIELD_NUMBER: _ClassVar[int]
    LAYERS_FIELD_NUMBER: _ClassVar[int]
    KV_HEADS_FIELD_NUMBER: _ClassVar[int]
    HEAD_SIZE_FIELD_NUMBER: _ClassVar[int]
    PAGE_TOKENS_FIELD_NUMBER: _ClassVar[int]
    WORLD_SIZE_FIELD_NUMBER: _ClassVar[int]
    ENGINE_VERSION_FIELD_NUMBER: _ClassVar[int]
    PAGE_BYTES_FIELD_NUMBER: _ClassVar[int]
    SYMBOL_KIND_FIELD_NUMBER: _ClassVar[int]
    SYMBOL_HASH_BYTES_FIELD_NUMBER: _ClassVar[int]
    EXTRA_KEY_BYTES_FIELD_NUMBER: _ClassVar[int]
    model: str
    revision: str
    adapter: str
    salt: str
    kv_dtype: str
    layout: str
    codec: str
    layers: int
    kv_heads: int
    head_size: int
    page_tokens: int
    world_size: int
    engine_version: str
    page_bytes: int
    symbol_kind: str
    symbol_hash_bytes: int
    extra_key_bytes: int
    def __init__(self, model: _Optional[str] = ..., revision: _Optional[str] = ..., adapter: _Optional[str] = ..., salt: _Optional[str] = ..., kv_dtype: _Optional[str] = ..., layout: _Optional[str] = ..., codec: _Optional[str] = ..., layers: _Optional[int] = ..., kv_heads: _Optional[int] = ..., head_size: _Optional[int] = ..., page_tokens: _Optional[int] = ..., world_size: _Optional[int] = ..., engine_version: _Optional[str] = ..., page_bytes: _Optional[int] = ..., symbol_kind: _Optional[str] = ..., symbol_hash_bytes: _Optional[int] = ..., extra_key_bytes: _Optional[int] = ...) -> None: ...

class OpenNamespaceRequest(_message.Message):
    __slots__ = ("session_id", "namespace")
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    NAMESPACE_FIELD_NUMBER: _ClassVar[int]
    session_id: bytes
    namespace: NamespaceSpec
    def __init__(self, session_id: _Optional[bytes] = ..., namespace: _Optional[_Union[NamespaceSpec, _Mapping]] = ...) -> None: ...

class OpenNamespaceResponse(_message.Message):
    __slots__ = ("namespace_id", "fingerprint", "symbol_bytes")
    NAMESPACE_ID_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    SYMBOL_BYTES_FIELD_NUMBER: _ClassVar[int]
    namespace_id: int
    fingerprint: bytes
    symbol_bytes: int
    def __init__(self, namespace_id: _Optional[int] = ..., fingerprint: _Optional[bytes] = ..., symbol_bytes: _Optional[int] = ...) -> None: ...
