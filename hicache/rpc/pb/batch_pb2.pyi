from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Iterable as _Iterable, Mapping as _Mapping, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class MatchManyRequest(_message.Message):
    __slots__ = ("session_id", "namespace_id", "prompts", "prompt_pages", "touch", "prefetch")
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    NAMESPACE_ID_FIELD_NUMBER: _ClassVar[int]
    PROMPTS_FIELD_NUMBER: _ClassVar[int]
    PROMPT_PAGES_FIELD_NUMBER: _ClassVar[int]
    TOUCH_FIELD_NUMBER: _ClassVar[int]
    PREFETCH_FIELD_NUMBER: _ClassVar[int]
    session_id: bytes
    namespace_id: int
    prompts: bytes
    prompt_pages: int
    touch: bool
    prefetch: bool
    def __init__(self, session_id: _Optional[bytes] = ..., namespace_id: _Optional[int] = ..., prompts: _Optional[bytes] = ..., prompt_pages: _Optional[int] = ..., touch: bool = ..., prefetch: bool = ...) -> None: ...

class MatchManyResponse(_message.Message):
    __slots__ = ("matched_pages",)
    MATCHED_PAGES_FIELD_NUMBER: _ClassVar[int]
    matched_pages: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, matched_pages: _Optional[_Iterable[int]] = ...) -> None: ...

class StoreManyRequest(_message.Message):
    __slots__ = ("session_id", "request_id", "namespace_id", "prompts", "prompt_pages", "region_id", "offset", "checksums", "wait_ms", "durable")
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    NAMESPACE_ID_FIELD_NUMBER: _ClassVar[int]
    PROMPTS_FIELD_NUMBER: _ClassVar[int]
    PROMPT_PAGES_FIELD_NUMBER: _ClassVar[int]
    REGION_ID_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    CHECKSUMS_FIELD_NUMBER: _ClassVar[int]
    WAIT_MS_FIELD_NUMBER: _ClassVar[int]
    DURABLE_FIELD_NUMBER: _ClassVar[int]
    session_id: bytes
    request_id: bytes
    namespace_id: int
    prompts: bytes
    prompt_pages: int
    region_id: _containers.RepeatedScalarFieldContainer[int]
    offset: _containers.RepeatedScalarFieldContainer[int]
    checksums: _containers.RepeatedScalarFieldContainer[int]
    wait_ms: int
    durable: bool
    def __init__(self, session_id: _Optional[bytes] = ..., request_id: _Optional[bytes] = ..., namespace_id: _Optional[int] = ..., prompts: _Optional[bytes] = ..., prompt_pages: _Optional[int] = ..., region_id: _Optional[_Iterable[int]] = ..., offset: _Optional[_Iterable[int]] = ..., checksums: _Optional[_Iterable[int]] = ..., wait_ms: _Optional[int] = ..., durable: bool = ...) -> None: ...

class StoreManyResponse(_message.Message):
    __slots__ = ("outcomes",)
    OUTCOMES_FIELD_NUMBER: _ClassVar[int]
    outcomes: _containers.RepeatedCompositeFieldContainer[StoreOutcome]
    def __init__(self, outcomes: _Optional[_Iterable[_Union[StoreOutcome, _Mapping]]] = ...) -> None: ...

class StoreOutcome(_message.Message):
    __slots__ = ("present_pages", "stored_pages", "reason", "message")
    PRESENT_PAGES_FIELD_NUMBER: _ClassVar[int]
    STORED_PAGES_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    present_pages: int
    stored_pages: int
    reason: str
    message: str
    def __init__(self, present_pages: _Optional[int] = ..., stored_pages: _Optional[int] = ..., reason: _Optional[str] = ..., message: _Optional[str] = ...) -> None: ...
