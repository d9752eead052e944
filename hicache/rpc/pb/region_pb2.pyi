from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Iterable as _Iterable, Mapping as _Mapping, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class ListRegionsRequest(_message.Message):
    __slots__ = ("session_id",)
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    session_id: bytes
    def __init__(self, session_id: _Optional[bytes] = ...) -> None: ...

class ListRegionsResponse(_message.Message):
    __slots__ = ("regions",)
    REGIONS_FIELD_NUMBER: _ClassVar[int]
    regions: _containers.RepeatedCompositeFieldContainer[Region]
    def __init__(self, regions: _Optional[_Iterable[_Union[Region, _Mapping]]] = ...) -> None: ...

class Region(_message.Message):
    __slots__ = ("region_id", "kind", "size_bytes", "page_bytes", "first_slot_offset", "slot_stride", "slots")
    class Kind(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        KIND_UNSPECIFIED: _ClassVar[Region.Kind]
        ARENA: _ClassVar[Region.Kind]
        CLIENT: _ClassVar[Region.Kind]
    KIND_UNSPECIFIED: Region.Kind
    ARENA: Region.Kind
    CLIENT: Region.Kind
    REGION_ID_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    SIZE_BYTES_FIELD_NUMBER: _ClassVar[int]
    PAGE_BYTES_FIELD_NUMBER: _ClassVar[int]
    FIRST_SLOT_OFFSET_FIELD_NUMBER: _ClassVar[int]
    SLOT_STRIDE_FIELD_NUMBER: _ClassVar[int]
    SLOTS_FIELD_NUMBER: _ClassVar[int]
    region_id: int
    kind: Region.Kind
    size_bytes: int
    page_bytes: int
    first_slot_offset: int
    slot_stride: int
    slots: int
    def __init__(self, region_id: _Optional[int] = ..., kind: _Optional[_Union[Region.Kind, str]] = ..., size_bytes: _Optional[int] = ..., page_bytes: _Optional[int] = ..., first_slot_offset: _Optional[int] = ..., slot_stride: _Optional[int] = ..., slots: _Optional[int] = ...) -> None: ...

class RegisterRequest(_message.Message):
    __slots__ = ("session_id", "request_id", "fd_token")
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    FD_TOKEN_FIELD_NUMBER: _ClassVar[int]
    session_id: bytes
    request_id: bytes
    fd_token: bytes
    def __init__(self, session_id: _Optional[bytes] = ..., request_id: _Optional[bytes] = ..., fd_token: _Optional[bytes] = ...) -> None: ...

class RegisterResponse(_message.Message):
    __slots__ = ("region_id", "size_bytes")
    REGION_ID_FIELD_NUMBER: _ClassVar[int]
    SIZE_BYTES_FIELD_NUMBER: _ClassVar[int]
    region_id: int
    size_bytes: int
    def __init__(self, region_id: _Optional[int] = ..., size_bytes: _Optional[int] = ...) -> None: ...

class UnregisterRequest(_message.Message):
    __slots__ = ("session_id", "region_id")
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    REGION_ID_FIELD_NUMBER: _ClassVar[int]
    session_id: bytes
    region_id: int
    def __init__(self, session_id: _Optional[bytes] = ..., region_id: _Optional[int] = ...) -> None: ...

class UnregisterResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...
