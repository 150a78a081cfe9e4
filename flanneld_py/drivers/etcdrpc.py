"""The part of etcd's gRPC interface we use, described in a table instead of generated code.

etcd3 0.12 ships stubs generated for protobuf 3, which later versions refuse to load. Importing this module
puts itself in their place, so it comes before `import etcd3`; it works with protobuf 3.20 and all later ones,
at the speed of their C implementation. Field numbers: etcd's rpc.proto and kv.proto (api/etcdserverpb,
api/mvccpb of etcd 3.4); a field left out here is skipped by protobuf when the server sends it.
"""

from __future__ import annotations

import os
import re
import sys
from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

_PACKAGE = "etcdserverpb"

# One message a block, one field an entry: `type name number`. A star marks a repeated field, a bar a member
# of the message's oneof. `enum` names values counted from 0.
_MESSAGES = """
ResponseHeader: uint64 cluster_id 1, uint64 member_id 2, int64 revision 3, uint64 raft_term 4

KeyValue: bytes key 1, int64 create_revision 2, int64 mod_revision 3, int64 version 4, bytes value 5,
    int64 lease 6
Event: EventType type 1, KeyValue kv 2, KeyValue prev_kv 3
    enum EventType: PUT DELETE

RangeRequest: bytes key 1, bytes range_end 2, int64 limit 3, int64 revision 4, SortOrder sort_order 5,
    SortTarget sort_target 6, bool serializable 7, bool keys_only 8, bool count_only 9,
    int64 min_mod_revision 10, int64 max_mod_revision 11, int64 min_create_revision 12,
    int64 max_create_revision 13
    enum SortOrder: NONE ASCEND DESCEND
    enum SortTarget: KEY VERSION CREATE MOD VALUE
RangeResponse: ResponseHeader header 1, *KeyValue kvs 2, bool more 3, int64 count 4
PutRequest: bytes key 1, bytes value 2, int64 lease 3, bool prev_kv 4, bool ignore_value 5,
    bool ignore_lease 6
PutResponse: ResponseHeader header 1, KeyValue prev_kv 2
DeleteRangeRequest: bytes key 1, bytes range_end 2, bool prev_kv 3
DeleteRangeResponse: ResponseHeader header 1, int64 deleted 2, *KeyValue prev_kvs 3

Compare: CompareResult result 1, CompareTarget target 2, bytes key 3, |int64 version 4,
    |int64 create_revision 5, |int64 mod_revision 6, |bytes value 7, |int64 lease 8, bytes range_end 64
    enum CompareResult: EQUAL GREATER LESS NOT_EQUAL
    enum CompareTarget: VERSION CREATE MOD VALUE LEASE
RequestOp: |RangeRequest request_range 1, |PutRequest request_put 2,
    |DeleteRangeRequest request_delete_range 3, |TxnRequest request_txn 4
ResponseOp: |RangeResponse response_range 1, |PutResponse response_put 2,
    |DeleteRangeResponse response_delete_range 3, |TxnResponse response_txn 4
TxnRequest: *Compare compare 1, *RequestOp success 2, *RequestOp failure 3
TxnResponse: ResponseHeader header 1, bool succeeded 2, *ResponseOp responses 3
CompactionRequest: int64 revision 1, bool physical 2
CompactionResponse: ResponseHeader header 1

WatchRequest: |WatchCreateRequest create_request 1, |WatchCancelRequest cancel_request 2,
    |WatchProgressRequest progress_request 3
WatchCreateRequest: bytes key 1, bytes range_end 2, int64 start_revision 3, bool progress_notify 4,
    *FilterType filters 5, bool prev_kv 6, int64 watch_id 7, bool fragment 8
    enum FilterType: NOPUT NODELETE
WatchCancelRequest: int64 watch_id 1
WatchProgressRequest:
WatchResponse: ResponseHeader header 1, int64 watch_id 2, bool created 3, bool canceled 4,
    int64 compact_revision 5, string cancel_reason 6, bool fragment 7, *Event events 11

LeaseGrantRequest: int64 TTL 1, int64 ID 2
LeaseGrantResponse: ResponseHeader header 1, int64 ID 2, int64 TTL 3, string error 4
LeaseRevokeRequest: int64 ID 1
LeaseRevokeResponse: ResponseHeader header 1
LeaseKeepAliveRequest: int64 ID 1
LeaseKeepAliveResponse: ResponseHeader header 1, int64 ID 2, int64 TTL 3
LeaseTimeToLiveRequest: int64 ID 1, bool keys 2
LeaseTimeToLiveResponse: ResponseHeader header 1, int64 ID 2, int64 TTL 3, int64 grantedTTL 4,
    *bytes keys 5

StatusRequest:
StatusResponse: ResponseHeader header 1, string version 2, int64 dbSize 3, uint64 leader 4,
    uint64 raftIndex 5, uint64 raftTerm 6, uint64 raftAppliedIndex 7, *string errors 8,
    int64 dbSizeInUse 9, bool isLearner 10

AuthenticateRequest: string name 1, string password 2
AuthenticateResponse: ResponseHeader header 1, string token 2
"""

# Service → method → request and response message. LeaseKeepAlive is a stream in rpc.proto; one request with
# one answer reads the same on the wire as a unary call, which needs no thread of gRPC's to feed it.
_METHODS = {
    "KV": {
        "Range": ("RangeRequest", "RangeResponse"),
        "Put": ("PutRequest", "PutResponse"),
        "DeleteRange": ("DeleteRangeRequest", "DeleteRangeResponse"),
        "Txn": ("TxnRequest", "TxnResponse"),
        "Compact": ("CompactionRequest", "CompactionResponse"),
    },
    "Watch": {"Watch": ("WatchRequest", "WatchResponse")},
    "Lease": {
        "LeaseGrant": ("LeaseGrantRequest", "LeaseGrantResponse"),
        "LeaseRevoke": ("LeaseRevokeRequest", "LeaseRevokeResponse"),
        "LeaseKeepAlive": ("LeaseKeepAliveRequest", "LeaseKeepAliveResponse"),
        "LeaseTimeToLive": ("LeaseTimeToLiveRequest", "LeaseTimeToLiveResponse"),
    },
    "Cluster": {},
    "Maintenance": {"Status": ("StatusRequest", "StatusResponse")},
    "Auth": {"Authenticate": ("AuthenticateRequest", "AuthenticateResponse")},
}
_STREAMS = {"Watch"}

_FIELD = descriptor_pb2.FieldDescriptorProto
_SCALARS = {
    "bool": _FIELD.TYPE_BOOL,
    "bytes": _FIELD.TYPE_BYTES,
    "int64": _FIELD.TYPE_INT64,
    "string": _FIELD.TYPE_STRING,
    "uint64": _FIELD.TYPE_UINT64,
}


def _add_field(message: Any, text: str) -> None:
    mark, kind, name, number = re.fullmatch(r"([*|]?)(\w+) (\w+) (\d+)", text).groups()  # type: ignore[union-attr]
    field = message.field.add(name=name, number=int(number))
    field.label = _FIELD.LABEL_REPEATED if mark == "*" else _FIELD.LABEL_OPTIONAL
    if mark == "|":
        if not message.oneof_decl:
            message.oneof_decl.add(name="choice")
        field.oneof_index = 0
    if kind in _SCALARS:
        field.type = _SCALARS[kind]
    elif kind in {enum.name for enum in message.enum_type}:
        field.type, field.type_name = _FIELD.TYPE_ENUM, f".{_PACKAGE}.{message.name}.{kind}"
    else:
        field.type, field.type_name = _FIELD.TYPE_MESSAGE, f".{_PACKAGE}.{kind}"


def _message_classes() -> dict[str, Any]:
    """Message name → class, made in a pool of our own: the names may be taken in the common one."""
    file = descriptor_pb2.FileDescriptorProto(name="etcd.proto", package=_PACKAGE, syntax="proto3")
    for block in re.split(r"\n(?=\w)", _MESSAGES.strip()):
        head, *enums = re.split(r"\n\s+enum ", block.strip())
        name, _, fields = head.partition(":")
        message = file.message_type.add(name=name)
        for enum in enums:
            enum_name, _, values = enum.partition(":")
            declared = message.enum_type.add(name=enum_name)
            for number, value in enumerate(values.split()):
                declared.value.add(name=value, number=number)
        for field in filter(None, map(str.strip, fields.split(","))):
            _add_field(message, field)
    pool = descriptor_pool.DescriptorPool()
    pool.AddSerializedFile(file.SerializeToString())
    # GetMessageClass came with protobuf 4.22; what it replaced went with 5.
    factory: Any = message_factory
    make = getattr(factory, "GetMessageClass", None) or factory.MessageFactory(pool).GetPrototype
    return {m.name: make(pool.FindMessageTypeByName(f"{_PACKAGE}.{m.name}")) for m in file.message_type}


def _stub_class(service: str, classes: dict[str, Any]) -> type:
    def connect(self: Any, channel: Any) -> None:
        for method, (request, response) in _METHODS[service].items():
            kind = channel.stream_stream if method in _STREAMS else channel.unary_unary
            call = kind(
                f"/{_PACKAGE}.{service}/{method}",
                request_serializer=classes[request].SerializeToString,
                response_deserializer=classes[response].FromString,
            )
            setattr(self, method, call)

    return type(f"{service}Stub", (), {"__init__": connect})


_classes = _message_classes()
_names = _classes | {f"{service}Stub": _stub_class(service, _classes) for service in _METHODS}


def __getattr__(name: str) -> Any:
    """A message class (`RangeRequest`) or a service's stub (`KVStub`, made from a gRPC channel)."""
    try:
        return _names[name]
    except KeyError:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}") from None


# gRPC's core reads this when it is loaded; without it, it writes lines of its own to stderr.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")
sys.modules["etcd3.etcdrpc"] = sys.modules[__name__]
