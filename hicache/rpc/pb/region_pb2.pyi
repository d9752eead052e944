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
    __slots__ = ("region_id", "kind", "size_bytes", "page_bytes", "first_slot_offset", "slot_stride", "slots", "memory")
    class Kind(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        KIND_UNSPECIFIED: _ClassVar[Region.Kind]
        ARENA: _ClassVar[Region.Kind]
        CLIENT: _ClassVar[Region.Kind]
        KV: _ClassVar[Region.Kind]
        TIMELINE: _ClassVar[Region.Kind]
        POOL: _ClassVar[Region.Kind]
    KIND_UNSPECIFIED: Region.Kind
    ARENA: Region.Kind
    CLIENT: Region.Kind
    KV: Region.Kind
    TIMELINE: Region.Kind
    POOL: Region.Kind
    REGION_ID_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    SIZE_BYTES_FIELD_NUMBER: _ClassVar[int]
    PAGE_BYTES_FIELD_NUMBER: _ClassVar[int]
    FIRST_SLOT_OFFSET_FIELD_NUMBER: _ClassVar[int]
    SLOT_STRIDE_FIELD_NUMBER: _ClassVar[int]
    SLOTS_FIELD_NUMBER: _ClassVar[int]
    MEMORY_FIELD_NUMBER: _ClassVar[int]
    region_id: int
    kind: Region.Kind
    size_bytes: int
    page_bytes: int
    first_slot_offset: int
    slot_stride: int
    slots: int
    memory: Memory
    def __init__(self, region_id: _Optional[int] = ..., kind: _Optional[_Union[Region.Kind, str]] = ..., size_bytes: _Optional[int] = ..., page_bytes: _Optional[int] = ..., first_slot_offset: _Optional[int] = ..., slot_stride: _Optional[int] = ..., slots: _Optional[int] = ..., memory: _Optional[_Union[Memory, _Mapping]] = ...) -> None: ...

class Memory(_message.Message):
    __slots__ = ("size_bytes", "fd_token", "cuda_ipc", "cuda_fd_token", "device_uuid")
    SIZE_BYTES_FIELD_NUMBER: _ClassVar[int]
    FD_TOKEN_FIELD_NUMBER: _ClassVar[int]
    CUDA_IPC_FIELD_NUMBER: _ClassVar[int]
    CUDA_FD_TOKEN_FIELD_NUMBER: _ClassVar[int]
    DEVICE_UUID_FIELD_NUMBER: _ClassVar[int]
    size_bytes: int
    fd_token: bytes
    cuda_ipc: bytes
    cuda_fd_token: bytes
    device_uuid: bytes
    def __init__(self, size_bytes: _Optional[int] = ..., fd_token: _Optional[bytes] = ..., cuda_ipc: _Optional[bytes] = ..., cuda_fd_token: _Optional[bytes] = ..., device_uuid: _Optional[bytes] = ...) -> None: ...

class PagedKv(_message.Message):
    __slots__ = ("memories", "plane_memory", "plane_offset", "planes_per_layer", "blocks", "block_tokens", "heads", "head_size", "element_bytes", "strides", "page_offset")
    MEMORIES_FIELD_NUMBER: _ClassVar[int]
    PLANE_MEMORY_FIELD_NUMBER: _ClassVar[int]
    PLANE_OFFSET_FIELD_NUMBER: _ClassVar[int]
    PLANES_PER_LAYER_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    BLOCK_TOKENS_FIELD_NUMBER: _ClassVar[int]
    HEADS_FIELD_NUMBER: _ClassVar[int]
    HEAD_SIZE_FIELD_NUMBER: _ClassVar[int]
    ELEMENT_BYTES_FIELD_NUMBER: _ClassVar[int]
    STRIDES_FIELD_NUMBER: _ClassVar[int]
    PAGE_OFFSET_FIELD_NUMBER: _ClassVar[int]
    memories: _containers.RepeatedCompositeFieldContainer[Memory]
    plane_memory: _containers.RepeatedScalarFieldContainer[int]
    plane_offset: _containers.RepeatedScalarFieldContainer[int]
    planes_per_layer: int
    blocks: int
    block_tokens: int
    heads: int
    head_size: int
    element_bytes: int
    strides: _containers.RepeatedScalarFieldContainer[int]
    page_offset: int
    def __init__(self, memories: _Optional[_Iterable[_Union[Memory, _Mapping]]] = ..., plane_memory: _Optional[_Iterable[int]] = ..., plane_offset: _Optional[_Iterable[int]] = ..., planes_per_layer: _Optional[int] = ..., blocks: _Optional[int] = ..., block_tokens: _Optional[int] = ..., heads: _Optional[int] = ..., head_size: _Optional[int] = ..., element_bytes: _Optional[int] = ..., strides: _Optional[_Iterable[int]] = ..., page_offset: _Optional[int] = ...) -> None: ...

class Timeline(_message.Message):
    __slots__ = ("counters",)
    COUNTERS_FIELD_NUMBER: _ClassVar[int]
    counters: int
    def __init__(self, counters: _Optional[int] = ...) -> None: ...

class RegisterRequest(_message.Message):
    __slots__ = ("session_id", "request_id", "fd_token", "kv", "timeline")
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    FD_TOKEN_FIELD_NUMBER: _ClassVar[int]
    KV_FIELD_NUMBER: _ClassVar[int]
    TIMELINE_FIELD_NUMBER: _ClassVar[int]
    session_id: bytes
    request_id: bytes
    fd_token: bytes
    kv: PagedKv
    timeline: Timeline
    def __init__(self, session_id: _Optional[bytes] = ..., request_id: _Optional[bytes] = ..., fd_token: _Optional[bytes] = ..., kv: _Optional[_Union[PagedKv, _Mapping]] = ..., timeline: _Optional[_Union[Timeline, _Mapping]] = ...) -> None: ...

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
