from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Iterable as _Iterable, Mapping as _Mapping, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class MatchRequest(_message.Message):
    __slots__ = ("session_id", "namespace_id", "prompt", "touch", "request_class", "turn", "cost_per_page", "prefetch")
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    NAMESPACE_ID_FIELD_NUMBER: _ClassVar[int]
    PROMPT_FIELD_NUMBER: _ClassVar[int]
    TOUCH_FIELD_NUMBER: _ClassVar[int]
    REQUEST_CLASS_FIELD_NUMBER: _ClassVar[int]
    TURN_FIELD_NUMBER: _ClassVar[int]
    COST_PER_PAGE_FIELD_NUMBER: _ClassVar[int]
    PREFETCH_FIELD_NUMBER: _ClassVar[int]
    session_id: bytes
    namespace_id: int
    prompt: bytes
    touch: bool
    request_class: str
    turn: int
    cost_per_page: float
    prefetch: bool
    def __init__(self, session_id: _Optional[bytes] = ..., namespace_id: _Optional[int] = ..., prompt: _Optional[bytes] = ..., touch: bool = ..., request_class: _Optional[str] = ..., turn: _Optional[int] = ..., cost_per_page: _Optional[float] = ..., prefetch: bool = ...) -> None: ...

class MatchResponse(_message.Message):
    __slots__ = ("matched_pages", "run_pages", "run_tier")
    MATCHED_PAGES_FIELD_NUMBER: _ClassVar[int]
    RUN_PAGES_FIELD_NUMBER: _ClassVar[int]
    RUN_TIER_FIELD_NUMBER: _ClassVar[int]
    matched_pages: int
    run_pages: _containers.RepeatedScalarFieldContainer[int]
    run_tier: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, matched_pages: _Optional[int] = ..., run_pages: _Optional[_Iterable[int]] = ..., run_tier: _Optional[_Iterable[int]] = ...) -> None: ...

class FetchRequest(_message.Message):
    __slots__ = ("session_id", "request_id", "namespace_id", "prompt", "max_pages", "ttl_ms", "wait_ms", "request_class", "turn", "cost_per_page", "reserve_missing", "reserve_ttl_ms", "device")
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    NAMESPACE_ID_FIELD_NUMBER: _ClassVar[int]
    PROMPT_FIELD_NUMBER: _ClassVar[int]
    MAX_PAGES_FIELD_NUMBER: _ClassVar[int]
    TTL_MS_FIELD_NUMBER: _ClassVar[int]
    WAIT_MS_FIELD_NUMBER: _ClassVar[int]
    REQUEST_CLASS_FIELD_NUMBER: _ClassVar[int]
    TURN_FIELD_NUMBER: _ClassVar[int]
    COST_PER_PAGE_FIELD_NUMBER: _ClassVar[int]
    RESERVE_MISSING_FIELD_NUMBER: _ClassVar[int]
    RESERVE_TTL_MS_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    session_id: bytes
    request_id: bytes
    namespace_id: int
    prompt: bytes
    max_pages: int
    ttl_ms: int
    wait_ms: int
    request_class: str
    turn: int
    cost_per_page: float
    reserve_missing: bool
    reserve_ttl_ms: int
    device: bool
    def __init__(self, session_id: _Optional[bytes] = ..., request_id: _Optional[bytes] = ..., namespace_id: _Optional[int] = ..., prompt: _Optional[bytes] = ..., max_pages: _Optional[int] = ..., ttl_ms: _Optional[int] = ..., wait_ms: _Optional[int] = ..., request_class: _Optional[str] = ..., turn: _Optional[int] = ..., cost_per_page: _Optional[float] = ..., reserve_missing: bool = ..., reserve_ttl_ms: _Optional[int] = ..., device: bool = ...) -> None: ...

class FetchResponse(_message.Message):
    __slots__ = ("lease_id", "matched_pages", "granted_pages", "expires_in_ms", "extents", "operation_id", "tier_pages", "pending_pages", "pending_ms", "reserved")
    LEASE_ID_FIELD_NUMBER: _ClassVar[int]
    MATCHED_PAGES_FIELD_NUMBER: _ClassVar[int]
    GRANTED_PAGES_FIELD_NUMBER: _ClassVar[int]
    EXPIRES_IN_MS_FIELD_NUMBER: _ClassVar[int]
    EXTENTS_FIELD_NUMBER: _ClassVar[int]
    OPERATION_ID_FIELD_NUMBER: _ClassVar[int]
    TIER_PAGES_FIELD_NUMBER: _ClassVar[int]
    PENDING_PAGES_FIELD_NUMBER: _ClassVar[int]
    PENDING_MS_FIELD_NUMBER: _ClassVar[int]
    RESERVED_FIELD_NUMBER: _ClassVar[int]
    lease_id: int
    matched_pages: int
    granted_pages: int
    expires_in_ms: int
    extents: Extents
    operation_id: int
    tier_pages: _containers.RepeatedScalarFieldContainer[int]
    pending_pages: int
    pending_ms: int
    reserved: ReserveResponse
    def __init__(self, lease_id: _Optional[int] = ..., matched_pages: _Optional[int] = ..., granted_pages: _Optional[int] = ..., expires_in_ms: _Optional[int] = ..., extents: _Optional[_Union[Extents, _Mapping]] = ..., operation_id: _Optional[int] = ..., tier_pages: _Optional[_Iterable[int]] = ..., pending_pages: _Optional[int] = ..., pending_ms: _Optional[int] = ..., reserved: _Optional[_Union[ReserveResponse, _Mapping]] = ...) -> None: ...

class FetchQuery(_message.Message):
    __slots__ = ("namespace_id", "prompt", "max_pages", "request_class", "turn", "cost_per_page", "device")
    NAMESPACE_ID_FIELD_NUMBER: _ClassVar[int]
    PROMPT_FIELD_NUMBER: _ClassVar[int]
    MAX_PAGES_FIELD_NUMBER: _ClassVar[int]
    REQUEST_CLASS_FIELD_NUMBER: _ClassVar[int]
    TURN_FIELD_NUMBER: _ClassVar[int]
    COST_PER_PAGE_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    namespace_id: int
    prompt: bytes
    max_pages: int
    request_class: str
    turn: int
    cost_per_page: float
    device: bool
    def __init__(self, namespace_id: _Optional[int] = ..., prompt: _Optional[bytes] = ..., max_pages: _Optional[int] = ..., request_class: _Optional[str] = ..., turn: _Optional[int] = ..., cost_per_page: _Optional[float] = ..., device: bool = ...) -> None: ...

class FetchManyRequest(_message.Message):
    __slots__ = ("session_id", "request_id", "queries", "ttl_ms", "wait_ms", "release_lease_ids", "renew_lease_ids")
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    QUERIES_FIELD_NUMBER: _ClassVar[int]
    TTL_MS_FIELD_NUMBER: _ClassVar[int]
    WAIT_MS_FIELD_NUMBER: _ClassVar[int]
    RELEASE_LEASE_IDS_FIELD_NUMBER: _ClassVar[int]
    RENEW_LEASE_IDS_FIELD_NUMBER: _ClassVar[int]
    session_id: bytes
    request_id: bytes
    queries: _containers.RepeatedCompositeFieldContainer[FetchQuery]
    ttl_ms: int
    wait_ms: int
    release_lease_ids: _containers.RepeatedScalarFieldContainer[int]
    renew_lease_ids: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, session_id: _Optional[bytes] = ..., request_id: _Optional[bytes] = ..., queries: _Optional[_Iterable[_Union[FetchQuery, _Mapping]]] = ..., ttl_ms: _Optional[int] = ..., wait_ms: _Optional[int] = ..., release_lease_ids: _Optional[_Iterable[int]] = ..., renew_lease_ids: _Optional[_Iterable[int]] = ...) -> None: ...

class FetchManyResponse(_message.Message):
    __slots__ = ("outcomes", "lost_lease_ids", "renewed_expires_in_ms")
    OUTCOMES_FIELD_NUMBER: _ClassVar[int]
    LOST_LEASE_IDS_FIELD_NUMBER: _ClassVar[int]
    RENEWED_EXPIRES_IN_MS_FIELD_NUMBER: _ClassVar[int]
    outcomes: _containers.RepeatedCompositeFieldContainer[FetchOutcome]
    lost_lease_ids: _containers.RepeatedScalarFieldContainer[int]
    renewed_expires_in_ms: int
    def __init__(self, outcomes: _Optional[_Iterable[_Union[FetchOutcome, _Mapping]]] = ..., lost_lease_ids: _Optional[_Iterable[int]] = ..., renewed_expires_in_ms: _Optional[int] = ...) -> None: ...

class FetchOutcome(_message.Message):
    __slots__ = ("fetch", "refusal")
    FETCH_FIELD_NUMBER: _ClassVar[int]
    REFUSAL_FIELD_NUMBER: _ClassVar[int]
    fetch: FetchResponse
    refusal: Refusal
    def __init__(self, fetch: _Optional[_Union[FetchResponse, _Mapping]] = ..., refusal: _Optional[_Union[Refusal, _Mapping]] = ...) -> None: ...

class Refusal(_message.Message):
    __slots__ = ("reason", "message", "hint", "retry_after_ms")
    REASON_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    HINT_FIELD_NUMBER: _ClassVar[int]
    RETRY_AFTER_MS_FIELD_NUMBER: _ClassVar[int]
    reason: str
    message: str
    hint: str
    retry_after_ms: int
    def __init__(self, reason: _Optional[str] = ..., message: _Optional[str] = ..., hint: _Optional[str] = ..., retry_after_ms: _Optional[int] = ...) -> None: ...

class Extents(_message.Message):
    __slots__ = ("pages", "region_id", "offset", "first_slot", "checksums", "generations")
    PAGES_FIELD_NUMBER: _ClassVar[int]
    REGION_ID_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    FIRST_SLOT_FIELD_NUMBER: _ClassVar[int]
    CHECKSUMS_FIELD_NUMBER: _ClassVar[int]
    GENERATIONS_FIELD_NUMBER: _ClassVar[int]
    pages: _containers.RepeatedScalarFieldContainer[int]
    region_id: _containers.RepeatedScalarFieldContainer[int]
    offset: _containers.RepeatedScalarFieldContainer[int]
    first_slot: _containers.RepeatedScalarFieldContainer[int]
    checksums: _containers.RepeatedScalarFieldContainer[int]
    generations: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, pages: _Optional[_Iterable[int]] = ..., region_id: _Optional[_Iterable[int]] = ..., offset: _Optional[_Iterable[int]] = ..., first_slot: _Optional[_Iterable[int]] = ..., checksums: _Optional[_Iterable[int]] = ..., generations: _Optional[_Iterable[int]] = ...) -> None: ...

class LoadRequest(_message.Message):
    __slots__ = ("session_id", "request_id", "lease_id", "region_id", "first_page", "page_units", "places", "first_layer", "layers", "timeline_id", "counter", "unverified")
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    LEASE_ID_FIELD_NUMBER: _ClassVar[int]
    REGION_ID_FIELD_NUMBER: _ClassVar[int]
    FIRST_PAGE_FIELD_NUMBER: _ClassVar[int]
    PAGE_UNITS_FIELD_NUMBER: _ClassVar[int]
    PLACES_FIELD_NUMBER: _ClassVar[int]
    FIRST_LAYER_FIELD_NUMBER: _ClassVar[int]
    LAYERS_FIELD_NUMBER: _ClassVar[int]
    TIMELINE_ID_FIELD_NUMBER: _ClassVar[int]
    COUNTER_FIELD_NUMBER: _ClassVar[int]
    UNVERIFIED_FIELD_NUMBER: _ClassVar[int]
    session_id: bytes
    request_id: bytes
    lease_id: int
    region_id: int
    first_page: int
    page_units: int
    places: bytes
    first_layer: int
    layers: int
    timeline_id: int
    counter: int
    unverified: bool
    def __init__(self, session_id: _Optional[bytes] = ..., request_id: _Optional[bytes] = ..., lease_id: _Optional[int] = ..., region_id: _Optional[int] = ..., first_page: _Optional[int] = ..., page_units: _Optional[int] = ..., places: _Optional[bytes] = ..., first_layer: _Optional[int] = ..., layers: _Optional[int] = ..., timeline_id: _Optional[int] = ..., counter: _Optional[int] = ..., unverified: bool = ...) -> None: ...

class LoadResponse(_message.Message):
    __slots__ = ("loaded_pages", "missing_pages", "corrupt_pages", "reason", "moved_bytes")
    LOADED_PAGES_FIELD_NUMBER: _ClassVar[int]
    MISSING_PAGES_FIELD_NUMBER: _ClassVar[int]
    CORRUPT_PAGES_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    MOVED_BYTES_FIELD_NUMBER: _ClassVar[int]
    loaded_pages: int
    missing_pages: _containers.RepeatedScalarFieldContainer[int]
    corrupt_pages: _containers.RepeatedScalarFieldContainer[int]
    reason: str
    moved_bytes: int
    def __init__(self, loaded_pages: _Optional[int] = ..., missing_pages: _Optional[_Iterable[int]] = ..., corrupt_pages: _Optional[_Iterable[int]] = ..., reason: _Optional[str] = ..., moved_bytes: _Optional[int] = ...) -> None: ...

class ReserveRequest(_message.Message):
    __slots__ = ("session_id", "request_id", "namespace_id", "prompt", "ttl_ms", "wait_ms", "drop_pressure", "request_class", "turn", "cost_per_page")
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    NAMESPACE_ID_FIELD_NUMBER: _ClassVar[int]
    PROMPT_FIELD_NUMBER: _ClassVar[int]
    TTL_MS_FIELD_NUMBER: _ClassVar[int]
    WAIT_MS_FIELD_NUMBER: _ClassVar[int]
    DROP_PRESSURE_FIELD_NUMBER: _ClassVar[int]
    REQUEST_CLASS_FIELD_NUMBER: _ClassVar[int]
    TURN_FIELD_NUMBER: _ClassVar[int]
    COST_PER_PAGE_FIELD_NUMBER: _ClassVar[int]
    session_id: bytes
    request_id: bytes
    namespace_id: int
    prompt: bytes
    ttl_ms: int
    wait_ms: int
    drop_pressure: bool
    request_class: str
    turn: int
    cost_per_page: float
    def __init__(self, session_id: _Optional[bytes] = ..., request_id: _Optional[bytes] = ..., namespace_id: _Optional[int] = ..., prompt: _Optional[bytes] = ..., ttl_ms: _Optional[int] = ..., wait_ms: _Optional[int] = ..., drop_pressure: bool = ..., request_class: _Optional[str] = ..., turn: _Optional[int] = ..., cost_per_page: _Optional[float] = ...) -> None: ...

class ReserveResponse(_message.Message):
    __slots__ = ("reservation_id", "present_pages", "missing_pages", "expires_in_ms")
    RESERVATION_ID_FIELD_NUMBER: _ClassVar[int]
    PRESENT_PAGES_FIELD_NUMBER: _ClassVar[int]
    MISSING_PAGES_FIELD_NUMBER: _ClassVar[int]
    EXPIRES_IN_MS_FIELD_NUMBER: _ClassVar[int]
    reservation_id: int
    present_pages: int
    missing_pages: int
    expires_in_ms: int
    def __init__(self, reservation_id: _Optional[int] = ..., present_pages: _Optional[int] = ..., missing_pages: _Optional[int] = ..., expires_in_ms: _Optional[int] = ...) -> None: ...

class CommitRequest(_message.Message):
    __slots__ = ("session_id", "request_id", "reservation_id", "first_page", "pages", "region_id", "offset", "checksums", "durable", "last", "page_units", "places", "timeline_id", "counter", "layers_wait_ms")
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    RESERVATION_ID_FIELD_NUMBER: _ClassVar[int]
    FIRST_PAGE_FIELD_NUMBER: _ClassVar[int]
    PAGES_FIELD_NUMBER: _ClassVar[int]
    REGION_ID_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    CHECKSUMS_FIELD_NUMBER: _ClassVar[int]
    DURABLE_FIELD_NUMBER: _ClassVar[int]
    LAST_FIELD_NUMBER: _ClassVar[int]
    PAGE_UNITS_FIELD_NUMBER: _ClassVar[int]
    PLACES_FIELD_NUMBER: _ClassVar[int]
    TIMELINE_ID_FIELD_NUMBER: _ClassVar[int]
    COUNTER_FIELD_NUMBER: _ClassVar[int]
    LAYERS_WAIT_MS_FIELD_NUMBER: _ClassVar[int]
    session_id: bytes
    request_id: bytes
    reservation_id: int
    first_page: _containers.RepeatedScalarFieldContainer[int]
    pages: _containers.RepeatedScalarFieldContainer[int]
    region_id: _containers.RepeatedScalarFieldContainer[int]
    offset: _containers.RepeatedScalarFieldContainer[int]
    checksums: _containers.RepeatedScalarFieldContainer[int]
    durable: bool
    last: bool
    page_units: int
    places: bytes
    timeline_id: int
    counter: int
    layers_wait_ms: int
    def __init__(self, session_id: _Optional[bytes] = ..., request_id: _Optional[bytes] = ..., reservation_id: _Optional[int] = ..., first_page: _Optional[_Iterable[int]] = ..., pages: _Optional[_Iterable[int]] = ..., region_id: _Optional[_Iterable[int]] = ..., offset: _Optional[_Iterable[int]] = ..., checksums: _Optional[_Iterable[int]] = ..., durable: bool = ..., last: bool = ..., page_units: _Optional[int] = ..., places: _Optional[bytes] = ..., timeline_id: _Optional[int] = ..., counter: _Optional[int] = ..., layers_wait_ms: _Optional[int] = ...) -> None: ...

class CommitResponse(_message.Message):
    __slots__ = ("stored_pages", "already_present_pages", "durable_pages")
    STORED_PAGES_FIELD_NUMBER: _ClassVar[int]
    ALREADY_PRESENT_PAGES_FIELD_NUMBER: _ClassVar[int]
    DURABLE_PAGES_FIELD_NUMBER: _ClassVar[int]
    stored_pages: int
    already_present_pages: int
    durable_pages: int
    def __init__(self, stored_pages: _Optional[int] = ..., already_present_pages: _Optional[int] = ..., durable_pages: _Optional[int] = ...) -> None: ...

class AbortRequest(_message.Message):
    __slots__ = ("session_id", "reservation_id")
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    RESERVATION_ID_FIELD_NUMBER: _ClassVar[int]
    session_id: bytes
    reservation_id: int
    def __init__(self, session_id: _Optional[bytes] = ..., reservation_id: _Optional[int] = ...) -> None: ...

class AbortResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class PrefetchRequest(_message.Message):
    __slots__ = ("session_id", "request_id", "namespace_id", "prompt", "tier")
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    NAMESPACE_ID_FIELD_NUMBER: _ClassVar[int]
    PROMPT_FIELD_NUMBER: _ClassVar[int]
    TIER_FIELD_NUMBER: _ClassVar[int]
    session_id: bytes
    request_id: bytes
    namespace_id: int
    prompt: bytes
    tier: int
    def __init__(self, session_id: _Optional[bytes] = ..., request_id: _Optional[bytes] = ..., namespace_id: _Optional[int] = ..., prompt: _Optional[bytes] = ..., tier: _Optional[int] = ...) -> None: ...

class PrefetchResponse(_message.Message):
    __slots__ = ("operation_id", "matched_pages", "moving_pages")
    OPERATION_ID_FIELD_NUMBER: _ClassVar[int]
    MATCHED_PAGES_FIELD_NUMBER: _ClassVar[int]
    MOVING_PAGES_FIELD_NUMBER: _ClassVar[int]
    operation_id: int
    matched_pages: int
    moving_pages: int
    def __init__(self, operation_id: _Optional[int] = ..., matched_pages: _Optional[int] = ..., moving_pages: _Optional[int] = ...) -> None: ...

class WaitOperationRequest(_message.Message):
    __slots__ = ("session_id", "operation_id", "wait_ms")
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    OPERATION_ID_FIELD_NUMBER: _ClassVar[int]
    WAIT_MS_FIELD_NUMBER: _ClassVar[int]
    session_id: bytes
    operation_id: int
    wait_ms: int
    def __init__(self, session_id: _Optional[bytes] = ..., operation_id: _Optional[int] = ..., wait_ms: _Optional[int] = ...) -> None: ...

class WaitOperationResponse(_message.Message):
    __slots__ = ("done", "moved_pages", "failed_pages", "fetch")
    DONE_FIELD_NUMBER: _ClassVar[int]
    MOVED_PAGES_FIELD_NUMBER: _ClassVar[int]
    FAILED_PAGES_FIELD_NUMBER: _ClassVar[int]
    FETCH_FIELD_NUMBER: _ClassVar[int]
    done: bool
    moved_pages: int
    failed_pages: int
    fetch: FetchResponse
    def __init__(self, done: bool = ..., moved_pages: _Optional[int] = ..., failed_pages: _Optional[int] = ..., fetch: _Optional[_Union[FetchResponse, _Mapping]] = ...) -> None: ...

class CancelOperationRequest(_message.Message):
    __slots__ = ("session_id", "operation_id")
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    OPERATION_ID_FIELD_NUMBER: _ClassVar[int]
    session_id: bytes
    operation_id: int
    def __init__(self, session_id: _Optional[bytes] = ..., operation_id: _Optional[int] = ...) -> None: ...

class CancelOperationResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class RenewLeasesRequest(_message.Message):
    __slots__ = ("session_id", "lease_ids", "ttl_ms")
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    LEASE_IDS_FIELD_NUMBER: _ClassVar[int]
    TTL_MS_FIELD_NUMBER: _ClassVar[int]
    session_id: bytes
    lease_ids: _containers.RepeatedScalarFieldContainer[int]
    ttl_ms: int
    def __init__(self, session_id: _Optional[bytes] = ..., lease_ids: _Optional[_Iterable[int]] = ..., ttl_ms: _Optional[int] = ...) -> None: ...

class RenewLeasesResponse(_message.Message):
    __slots__ = ("lost_lease_ids", "expires_in_ms")
    LOST_LEASE_IDS_FIELD_NUMBER: _ClassVar[int]
    EXPIRES_IN_MS_FIELD_NUMBER: _ClassVar[int]
    lost_lease_ids: _containers.RepeatedScalarFieldContainer[int]
    expires_in_ms: int
    def __init__(self, lost_lease_ids: _Optional[_Iterable[int]] = ..., expires_in_ms: _Optional[int] = ...) -> None: ...

class ReleaseLeasesRequest(_message.Message):
    __slots__ = ("session_id", "lease_ids")
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    LEASE_IDS_FIELD_NUMBER: _ClassVar[int]
    session_id: bytes
    lease_ids: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, session_id: _Optional[bytes] = ..., lease_ids: _Optional[_Iterable[int]] = ...) -> None: ...

class ReleaseLeasesResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ReportCorruptRequest(_message.Message):
    __slots__ = ("session_id", "request_id", "lease_id", "pages")
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    LEASE_ID_FIELD_NUMBER: _ClassVar[int]
    PAGES_FIELD_NUMBER: _ClassVar[int]
    session_id: bytes
    request_id: bytes
    lease_id: int
    pages: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, session_id: _Optional[bytes] = ..., request_id: _Optional[bytes] = ..., lease_id: _Optional[int] = ..., pages: _Optional[_Iterable[int]] = ...) -> None: ...

class ReportCorruptResponse(_message.Message):
    __slots__ = ("corrupt_pages",)
    CORRUPT_PAGES_FIELD_NUMBER: _ClassVar[int]
    corrupt_pages: int
    def __init__(self, corrupt_pages: _Optional[int] = ...) -> None: ...

class ReadPagesRequest(_message.Message):
    __slots__ = ("session_id", "lease_id", "first_page", "pages")
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    LEASE_ID_FIELD_NUMBER: _ClassVar[int]
    FIRST_PAGE_FIELD_NUMBER: _ClassVar[int]
    PAGES_FIELD_NUMBER: _ClassVar[int]
    session_id: bytes
    lease_id: int
    first_page: int
    pages: int
    def __init__(self, session_id: _Optional[bytes] = ..., lease_id: _Optional[int] = ..., first_page: _Optional[int] = ..., pages: _Optional[int] = ...) -> None: ...

class PageChunk(_message.Message):
    __slots__ = ("page", "offset", "data", "checksum")
    PAGE_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    CHECKSUM_FIELD_NUMBER: _ClassVar[int]
    page: int
    offset: int
    data: bytes
    checksum: int
    def __init__(self, page: _Optional[int] = ..., offset: _Optional[int] = ..., data: _Optional[bytes] = ..., checksum: _Optional[int] = ...) -> None: ...

class WritePagesRequest(_message.Message):
    __slots__ = ("open", "chunk")
    class Open(_message.Message):
        __slots__ = ("session_id", "request_id", "reservation_id", "durable", "last")
        SESSION_ID_FIELD_NUMBER: _ClassVar[int]
        REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
        RESERVATION_ID_FIELD_NUMBER: _ClassVar[int]
        DURABLE_FIELD_NUMBER: _ClassVar[int]
        LAST_FIELD_NUMBER: _ClassVar[int]
        session_id: bytes
        request_id: bytes
        reservation_id: int
        durable: bool
        last: bool
        def __init__(self, session_id: _Optional[bytes] = ..., request_id: _Optional[bytes] = ..., reservation_id: _Optional[int] = ..., durable: bool = ..., last: bool = ...) -> None: ...
    OPEN_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    open: WritePagesRequest.Open
    chunk: PageChunk
    def __init__(self, open: _Optional[_Union[WritePagesRequest.Open, _Mapping]] = ..., chunk: _Optional[_Union[PageChunk, _Mapping]] = ...) -> None: ...
