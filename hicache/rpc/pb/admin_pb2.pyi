from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Iterable as _Iterable, Mapping as _Mapping, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class PinRequest(_message.Message):
    __slots__ = ("session_id", "request_id", "namespace_id", "prompt", "ttl_ms", "tier")
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    NAMESPACE_ID_FIELD_NUMBER: _ClassVar[int]
    PROMPT_FIELD_NUMBER: _ClassVar[int]
    TTL_MS_FIELD_NUMBER: _ClassVar[int]
    TIER_FIELD_NUMBER: _ClassVar[int]
    session_id: bytes
    request_id: bytes
    namespace_id: int
    prompt: bytes
    ttl_ms: int
    tier: int
    def __init__(self, session_id: _Optional[bytes] = ..., request_id: _Optional[bytes] = ..., namespace_id: _Optional[int] = ..., prompt: _Optional[bytes] = ..., ttl_ms: _Optional[int] = ..., tier: _Optional[int] = ...) -> None: ...

class PinResponse(_message.Message):
    __slots__ = ("pin_id", "pages")
    PIN_ID_FIELD_NUMBER: _ClassVar[int]
    PAGES_FIELD_NUMBER: _ClassVar[int]
    pin_id: int
    pages: int
    def __init__(self, pin_id: _Optional[int] = ..., pages: _Optional[int] = ...) -> None: ...

class UnpinRequest(_message.Message):
    __slots__ = ("session_id", "pin_id")
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    PIN_ID_FIELD_NUMBER: _ClassVar[int]
    session_id: bytes
    pin_id: int
    def __init__(self, session_id: _Optional[bytes] = ..., pin_id: _Optional[int] = ...) -> None: ...

class UnpinResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class EvictRequest(_message.Message):
    __slots__ = ("session_id", "request_id", "namespace_id", "prompt", "tier", "everywhere")
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    NAMESPACE_ID_FIELD_NUMBER: _ClassVar[int]
    PROMPT_FIELD_NUMBER: _ClassVar[int]
    TIER_FIELD_NUMBER: _ClassVar[int]
    EVERYWHERE_FIELD_NUMBER: _ClassVar[int]
    session_id: bytes
    request_id: bytes
    namespace_id: int
    prompt: bytes
    tier: int
    everywhere: bool
    def __init__(self, session_id: _Optional[bytes] = ..., request_id: _Optional[bytes] = ..., namespace_id: _Optional[int] = ..., prompt: _Optional[bytes] = ..., tier: _Optional[int] = ..., everywhere: bool = ...) -> None: ...

class EvictResponse(_message.Message):
    __slots__ = ("pages", "kept_pages")
    PAGES_FIELD_NUMBER: _ClassVar[int]
    KEPT_PAGES_FIELD_NUMBER: _ClassVar[int]
    pages: int
    kept_pages: int
    def __init__(self, pages: _Optional[int] = ..., kept_pages: _Optional[int] = ...) -> None: ...

class ClearRequest(_message.Message):
    __slots__ = ("session_id", "request_id", "namespace_id", "all_namespaces")
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    NAMESPACE_ID_FIELD_NUMBER: _ClassVar[int]
    ALL_NAMESPACES_FIELD_NUMBER: _ClassVar[int]
    session_id: bytes
    request_id: bytes
    namespace_id: int
    all_namespaces: bool
    def __init__(self, session_id: _Optional[bytes] = ..., request_id: _Optional[bytes] = ..., namespace_id: _Optional[int] = ..., all_namespaces: bool = ...) -> None: ...

class ClearResponse(_message.Message):
    __slots__ = ("pages", "kept_pages")
    PAGES_FIELD_NUMBER: _ClassVar[int]
    KEPT_PAGES_FIELD_NUMBER: _ClassVar[int]
    pages: int
    kept_pages: int
    def __init__(self, pages: _Optional[int] = ..., kept_pages: _Optional[int] = ...) -> None: ...

class GetStatsRequest(_message.Message):
    __slots__ = ("session_id",)
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    session_id: bytes
    def __init__(self, session_id: _Optional[bytes] = ...) -> None: ...

class GetStatsResponse(_message.Message):
    __slots__ = ("server_version", "uptime_ms", "tiers", "counters", "sessions", "leases", "reservations", "waiting", "copies_in_flight", "namespaces", "tree_nodes", "tree_runs", "tree_pages", "latencies", "state", "devices")
    class CountersEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    SERVER_VERSION_FIELD_NUMBER: _ClassVar[int]
    UPTIME_MS_FIELD_NUMBER: _ClassVar[int]
    TIERS_FIELD_NUMBER: _ClassVar[int]
    COUNTERS_FIELD_NUMBER: _ClassVar[int]
    SESSIONS_FIELD_NUMBER: _ClassVar[int]
    LEASES_FIELD_NUMBER: _ClassVar[int]
    RESERVATIONS_FIELD_NUMBER: _ClassVar[int]
    WAITING_FIELD_NUMBER: _ClassVar[int]
    COPIES_IN_FLIGHT_FIELD_NUMBER: _ClassVar[int]
    NAMESPACES_FIELD_NUMBER: _ClassVar[int]
    TREE_NODES_FIELD_NUMBER: _ClassVar[int]
    TREE_RUNS_FIELD_NUMBER: _ClassVar[int]
    TREE_PAGES_FIELD_NUMBER: _ClassVar[int]
    LATENCIES_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    DEVICES_FIELD_NUMBER: _ClassVar[int]
    server_version: str
    uptime_ms: int
    tiers: _containers.RepeatedCompositeFieldContainer[TierStats]
    counters: _containers.ScalarMap[str, int]
    sessions: int
    leases: int
    reservations: int
    waiting: int
    copies_in_flight: int
    namespaces: int
    tree_nodes: int
    tree_runs: int
    tree_pages: int
    latencies: _containers.RepeatedCompositeFieldContainer[LatencyStats]
    state: str
    devices: _containers.RepeatedCompositeFieldContainer[DeviceStats]
    def __init__(self, server_version: _Optional[str] = ..., uptime_ms: _Optional[int] = ..., tiers: _Optional[_Iterable[_Union[TierStats, _Mapping]]] = ..., counters: _Optional[_Mapping[str, int]] = ..., sessions: _Optional[int] = ..., leases: _Optional[int] = ..., reservations: _Optional[int] = ..., waiting: _Optional[int] = ..., copies_in_flight: _Optional[int] = ..., namespaces: _Optional[int] = ..., tree_nodes: _Optional[int] = ..., tree_runs: _Optional[int] = ..., tree_pages: _Optional[int] = ..., latencies: _Optional[_Iterable[_Union[LatencyStats, _Mapping]]] = ..., state: _Optional[str] = ..., devices: _Optional[_Iterable[_Union[DeviceStats, _Mapping]]] = ...) -> None: ...

class DeviceStats(_message.Message):
    __slots__ = ("name", "tier", "copy_engine", "choices", "direct_bytes", "bounced_bytes", "registered_bytes", "faults", "problem")
    NAME_FIELD_NUMBER: _ClassVar[int]
    TIER_FIELD_NUMBER: _ClassVar[int]
    COPY_ENGINE_FIELD_NUMBER: _ClassVar[int]
    CHOICES_FIELD_NUMBER: _ClassVar[int]
    DIRECT_BYTES_FIELD_NUMBER: _ClassVar[int]
    BOUNCED_BYTES_FIELD_NUMBER: _ClassVar[int]
    REGISTERED_BYTES_FIELD_NUMBER: _ClassVar[int]
    FAULTS_FIELD_NUMBER: _ClassVar[int]
    PROBLEM_FIELD_NUMBER: _ClassVar[int]
    name: str
    tier: str
    copy_engine: str
    choices: _containers.RepeatedCompositeFieldContainer[CopyChoice]
    direct_bytes: int
    bounced_bytes: int
    registered_bytes: int
    faults: int
    problem: str
    def __init__(self, name: _Optional[str] = ..., tier: _Optional[str] = ..., copy_engine: _Optional[str] = ..., choices: _Optional[_Iterable[_Union[CopyChoice, _Mapping]]] = ..., direct_bytes: _Optional[int] = ..., bounced_bytes: _Optional[int] = ..., registered_bytes: _Optional[int] = ..., faults: _Optional[int] = ..., problem: _Optional[str] = ...) -> None: ...

class CopyChoice(_message.Message):
    __slots__ = ("direction", "page_bytes", "rows", "engine", "gb_per_s")
    class GbPerSEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    DIRECTION_FIELD_NUMBER: _ClassVar[int]
    PAGE_BYTES_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    ENGINE_FIELD_NUMBER: _ClassVar[int]
    GB_PER_S_FIELD_NUMBER: _ClassVar[int]
    direction: str
    page_bytes: int
    rows: str
    engine: str
    gb_per_s: _containers.ScalarMap[str, float]
    def __init__(self, direction: _Optional[str] = ..., page_bytes: _Optional[int] = ..., rows: _Optional[str] = ..., engine: _Optional[str] = ..., gb_per_s: _Optional[_Mapping[str, float]] = ...) -> None: ...

class TierStats(_message.Message):
    __slots__ = ("name", "kind", "state", "capacity_bytes", "used_bytes", "pages", "hit_pages", "bytes_in", "bytes_out", "evicted_pages", "dropped_pages", "corrupt_pages", "hit_bytes", "written_bytes", "admitted_pages", "refused_pages", "reason", "degraded_ms")
    NAME_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    CAPACITY_BYTES_FIELD_NUMBER: _ClassVar[int]
    USED_BYTES_FIELD_NUMBER: _ClassVar[int]
    PAGES_FIELD_NUMBER: _ClassVar[int]
    HIT_PAGES_FIELD_NUMBER: _ClassVar[int]
    BYTES_IN_FIELD_NUMBER: _ClassVar[int]
    BYTES_OUT_FIELD_NUMBER: _ClassVar[int]
    EVICTED_PAGES_FIELD_NUMBER: _ClassVar[int]
    DROPPED_PAGES_FIELD_NUMBER: _ClassVar[int]
    CORRUPT_PAGES_FIELD_NUMBER: _ClassVar[int]
    HIT_BYTES_FIELD_NUMBER: _ClassVar[int]
    WRITTEN_BYTES_FIELD_NUMBER: _ClassVar[int]
    ADMITTED_PAGES_FIELD_NUMBER: _ClassVar[int]
    REFUSED_PAGES_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    DEGRADED_MS_FIELD_NUMBER: _ClassVar[int]
    name: str
    kind: str
    state: str
    capacity_bytes: int
    used_bytes: int
    pages: int
    hit_pages: int
    bytes_in: int
    bytes_out: int
    evicted_pages: int
    dropped_pages: int
    corrupt_pages: int
    hit_bytes: int
    written_bytes: int
    admitted_pages: int
    refused_pages: int
    reason: str
    degraded_ms: int
    def __init__(self, name: _Optional[str] = ..., kind: _Optional[str] = ..., state: _Optional[str] = ..., capacity_bytes: _Optional[int] = ..., used_bytes: _Optional[int] = ..., pages: _Optional[int] = ..., hit_pages: _Optional[int] = ..., bytes_in: _Optional[int] = ..., bytes_out: _Optional[int] = ..., evicted_pages: _Optional[int] = ..., dropped_pages: _Optional[int] = ..., corrupt_pages: _Optional[int] = ..., hit_bytes: _Optional[int] = ..., written_bytes: _Optional[int] = ..., admitted_pages: _Optional[int] = ..., refused_pages: _Optional[int] = ..., reason: _Optional[str] = ..., degraded_ms: _Optional[int] = ...) -> None: ...

class LatencyStats(_message.Message):
    __slots__ = ("call", "count", "p50_ms", "p99_ms")
    CALL_FIELD_NUMBER: _ClassVar[int]
    COUNT_FIELD_NUMBER: _ClassVar[int]
    P50_MS_FIELD_NUMBER: _ClassVar[int]
    P99_MS_FIELD_NUMBER: _ClassVar[int]
    call: str
    count: int
    p50_ms: float
    p99_ms: float
    def __init__(self, call: _Optional[str] = ..., count: _Optional[int] = ..., p50_ms: _Optional[float] = ..., p99_ms: _Optional[float] = ...) -> None: ...

class GetTreeRequest(_message.Message):
    __slots__ = ("session_id", "max_nodes", "namespace_id")
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    MAX_NODES_FIELD_NUMBER: _ClassVar[int]
    NAMESPACE_ID_FIELD_NUMBER: _ClassVar[int]
    session_id: bytes
    max_nodes: int
    namespace_id: int
    def __init__(self, session_id: _Optional[bytes] = ..., max_nodes: _Optional[int] = ..., namespace_id: _Optional[int] = ...) -> None: ...

class GetTreeResponse(_message.Message):
    __slots__ = ("nodes", "omitted_nodes")
    NODES_FIELD_NUMBER: _ClassVar[int]
    OMITTED_NODES_FIELD_NUMBER: _ClassVar[int]
    nodes: _containers.RepeatedCompositeFieldContainer[TreeNode]
    omitted_nodes: int
    def __init__(self, nodes: _Optional[_Iterable[_Union[TreeNode, _Mapping]]] = ..., omitted_nodes: _Optional[int] = ...) -> None: ...

class TreeNode(_message.Message):
    __slots__ = ("id", "parent", "namespace", "depth_pages", "pages", "first_symbol_digest", "tier_pages", "pinned_pages", "hits", "idle_ms", "children")
    ID_FIELD_NUMBER: _ClassVar[int]
    PARENT_FIELD_NUMBER: _ClassVar[int]
    NAMESPACE_FIELD_NUMBER: _ClassVar[int]
    DEPTH_PAGES_FIELD_NUMBER: _ClassVar[int]
    PAGES_FIELD_NUMBER: _ClassVar[int]
    FIRST_SYMBOL_DIGEST_FIELD_NUMBER: _ClassVar[int]
    TIER_PAGES_FIELD_NUMBER: _ClassVar[int]
    PINNED_PAGES_FIELD_NUMBER: _ClassVar[int]
    HITS_FIELD_NUMBER: _ClassVar[int]
    IDLE_MS_FIELD_NUMBER: _ClassVar[int]
    CHILDREN_FIELD_NUMBER: _ClassVar[int]
    id: int
    parent: int
    namespace: str
    depth_pages: int
    pages: int
    first_symbol_digest: bytes
    tier_pages: _containers.RepeatedScalarFieldContainer[int]
    pinned_pages: int
    hits: int
    idle_ms: int
    children: int
    def __init__(self, id: _Optional[int] = ..., parent: _Optional[int] = ..., namespace: _Optional[str] = ..., depth_pages: _Optional[int] = ..., pages: _Optional[int] = ..., first_symbol_digest: _Optional[bytes] = ..., tier_pages: _Optional[_Iterable[int]] = ..., pinned_pages: _Optional[int] = ..., hits: _Optional[int] = ..., idle_ms: _Optional[int] = ..., children: _Optional[int] = ...) -> None: ...

class CheckRequest(_message.Message):
    __slots__ = ("session_id",)
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    session_id: bytes
    def __init__(self, session_id: _Optional[bytes] = ...) -> None: ...

class CheckResponse(_message.Message):
    __slots__ = ("ok", "problem", "action_digest")
    OK_FIELD_NUMBER: _ClassVar[int]
    PROBLEM_FIELD_NUMBER: _ClassVar[int]
    ACTION_DIGEST_FIELD_NUMBER: _ClassVar[int]
    ok: bool
    problem: str
    action_digest: str
    def __init__(self, ok: bool = ..., problem: _Optional[str] = ..., action_digest: _Optional[str] = ...) -> None: ...

class GetAdviceRequest(_message.Message):
    __slots__ = ("session_id",)
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    session_id: bytes
    def __init__(self, session_id: _Optional[bytes] = ...) -> None: ...

class GetAdviceResponse(_message.Message):
    __slots__ = ("uses", "rate", "span_ms", "unbounded", "sizes", "policies")
    USES_FIELD_NUMBER: _ClassVar[int]
    RATE_FIELD_NUMBER: _ClassVar[int]
    SPAN_MS_FIELD_NUMBER: _ClassVar[int]
    UNBOUNDED_FIELD_NUMBER: _ClassVar[int]
    SIZES_FIELD_NUMBER: _ClassVar[int]
    POLICIES_FIELD_NUMBER: _ClassVar[int]
    uses: int
    rate: float
    span_ms: int
    unbounded: float
    sizes: _containers.RepeatedCompositeFieldContainer[SizeAdvice]
    policies: _containers.RepeatedCompositeFieldContainer[PolicyAdvice]
    def __init__(self, uses: _Optional[int] = ..., rate: _Optional[float] = ..., span_ms: _Optional[int] = ..., unbounded: _Optional[float] = ..., sizes: _Optional[_Iterable[_Union[SizeAdvice, _Mapping]]] = ..., policies: _Optional[_Iterable[_Union[PolicyAdvice, _Mapping]]] = ...) -> None: ...

class SizeAdvice(_message.Message):
    __slots__ = ("tier", "factor", "capacity_bytes", "hit_ratio")
    TIER_FIELD_NUMBER: _ClassVar[int]
    FACTOR_FIELD_NUMBER: _ClassVar[int]
    CAPACITY_BYTES_FIELD_NUMBER: _ClassVar[int]
    HIT_RATIO_FIELD_NUMBER: _ClassVar[int]
    tier: str
    factor: float
    capacity_bytes: int
    hit_ratio: float
    def __init__(self, tier: _Optional[str] = ..., factor: _Optional[float] = ..., capacity_bytes: _Optional[int] = ..., hit_ratio: _Optional[float] = ...) -> None: ...

class PolicyAdvice(_message.Message):
    __slots__ = ("name", "hit_ratio", "current")
    NAME_FIELD_NUMBER: _ClassVar[int]
    HIT_RATIO_FIELD_NUMBER: _ClassVar[int]
    CURRENT_FIELD_NUMBER: _ClassVar[int]
    name: str
    hit_ratio: float
    current: bool
    def __init__(self, name: _Optional[str] = ..., hit_ratio: _Optional[float] = ..., current: bool = ...) -> None: ...

class DrainRequest(_message.Message):
    __slots__ = ("session_id", "grace_ms")
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    GRACE_MS_FIELD_NUMBER: _ClassVar[int]
    session_id: bytes
    grace_ms: int
    def __init__(self, session_id: _Optional[bytes] = ..., grace_ms: _Optional[int] = ...) -> None: ...

class DrainResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...
