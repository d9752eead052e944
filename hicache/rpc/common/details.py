"""``google.rpc``'s Status, ErrorInfo and RetryInfo: of googleapis-common-protos, or, without it, made here alike."""

from __future__ import annotations

from typing import Any

from google.protobuf import any_pb2, descriptor_pb2, descriptor_pool, duration_pb2, message_factory

Field = descriptor_pb2.FieldDescriptorProto


def made() -> tuple[Any, Any, Any]:
    """The three message classes, on the wire what googleapis-common-protos has, in a pool of their own."""
    file = descriptor_pb2.FileDescriptorProto(name="hicache/google_rpc.proto", package="google.rpc")
    file.syntax = "proto3"
    file.dependency.extend(["google/protobuf/any.proto", "google/protobuf/duration.proto"])
    status = file.message_type.add(name="Status")
    _field(status, 1, "code", Field.TYPE_INT32)
    _field(status, 2, "message", Field.TYPE_STRING)
    _field(status, 3, "details", Field.TYPE_MESSAGE, ".google.protobuf.Any", many=True)
    info = file.message_type.add(name="ErrorInfo")
    entry = info.nested_type.add(name="MetadataEntry")
    entry.options.map_entry = True
    _field(entry, 1, "key", Field.TYPE_STRING)
    _field(entry, 2, "value", Field.TYPE_STRING)
    _field(info, 1, "reason", Field.TYPE_STRING)
    _field(info, 2, "domain", Field.TYPE_STRING)
    _field(info, 3, "metadata", Field.TYPE_MESSAGE, ".google.rpc.ErrorInfo.MetadataEntry", many=True)
    retry = file.message_type.add(name="RetryInfo")
    _field(retry, 1, "retry_delay", Field.TYPE_MESSAGE, ".google.protobuf.Duration")
    pool = descriptor_pool.DescriptorPool()
    for needed in (any_pb2, duration_pb2):
        pool.AddSerializedFile(needed.DESCRIPTOR.serialized_pb)
    pool.AddSerializedFile(file.SerializeToString())
    names = ("Status", "ErrorInfo", "RetryInfo")
    found = [
        message_factory.GetMessageClass(pool.FindMessageTypeByName(f"google.rpc.{name}")) for name in names
    ]
    return found[0], found[1], found[2]


def _field(message: Any, number: int, name: str, kind: int, of: str = "", *, many: bool = False) -> None:
    label = Field.LABEL_REPEATED if many else Field.LABEL_OPTIONAL
    message.field.add(number=number, name=name, type=kind, label=label, type_name=of or None)


Status: Any
ErrorInfo: Any
RetryInfo: Any
try:
    from google.rpc import error_details_pb2, status_pb2  # type: ignore[import-untyped]
except ImportError:
    Status, ErrorInfo, RetryInfo = made()
else:
    Status, ErrorInfo = status_pb2.Status, error_details_pb2.ErrorInfo
    RetryInfo = error_details_pb2.RetryInfo
