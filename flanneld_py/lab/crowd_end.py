"""What puts and deletes the crowd's records, by gRPC as hosts do; run as a script in etcd's namespace.

`ADDRESS:PORT LEASE OPERATIONS` are its arguments: etcd, the etcd lease that puts name, and how many
operations one transaction has at most. It reads lines of JSON, each a list of pairs of a key and its value,
or null to delete it, and answers each line, when all of it is stored, with the time (nanoseconds,
CLOCK_MONOTONIC) at which the last transaction was sent.

A process of its own: gRPC's threads live in the namespace in which the first of them was made. The messages
are those of etcd's rpc.proto (TxnRequest, RequestOp, PutRequest, DeleteRangeRequest), written by hand.
"""

from __future__ import annotations

import json
import sys
import time

import grpc

ANSWER_WITHIN = 30.0
REST = 0.01
"""Seconds before a line is answered: whoever waits for it would need a processor while hosts follow."""


def varint(number: int) -> bytes:
    """As protobuf writes an integer: seven bits a byte, the lowest first."""
    written = bytearray()
    while number > 127:
        written.append(number & 127 | 128)
        number >>= 7
    return bytes((*written, number))


def field(number: int, content: bytes) -> bytes:
    """A field of bytes, text, or a message."""
    return varint(number << 3 | 2) + varint(len(content)) + content


def operation(key: str, value: str | None, lease: int) -> bytes:
    if value is None:
        return field(3, field(1, key.encode()))
    put = field(1, key.encode()) + field(2, value.encode()) + varint(3 << 3) + varint(lease)
    return field(2, put)


def serve(endpoint: str, lease: int, most: int) -> None:
    channel = grpc.insecure_channel(endpoint)
    transact = channel.unary_unary("/etcdserverpb.KV/Txn")
    grpc.channel_ready_future(channel).result(ANSWER_WITHIN)
    print(time.monotonic_ns(), flush=True)
    for line in sys.stdin:
        operations = [field(2, operation(key, value, lease)) for key, value in json.loads(line)]
        requests = [b"".join(operations[start : start + most]) for start in range(0, len(operations), most)]
        sent = time.monotonic_ns()
        for request in requests:
            sent = time.monotonic_ns()
            transact(request, timeout=ANSWER_WITHIN)
        time.sleep(REST)
        print(sent, flush=True)


if __name__ == "__main__":
    serve(sys.argv[1], int(sys.argv[2], 16), int(sys.argv[3]))
