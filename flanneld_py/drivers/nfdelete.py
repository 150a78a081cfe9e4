"""Deleting from nf_tables in one transaction, without a tool: nft may have been removed since."""

from __future__ import annotations

import socket
from collections.abc import Sequence

from flanneld_py.drivers import nfmessages as nf
from flanneld_py.drivers.netlink import (
    ANSWER_TIMEOUT,
    HEADER,
    NLM_F_ACK,
    NLM_F_REQUEST,
    NLMSG_ERROR,
    RECEIVE_SIZE,
    Failure,
    attribute,
    error_of,
    failure,
    messages,
    open_socket,
)
from flanneld_py.packetfilter import ChainKey

BATCH_BEGIN, BATCH_END = 0x10, 0x11
"""NFNL_MSG_BATCH_BEGIN and _END (linux/netfilter/nfnetlink.h)."""
DELTABLE, DELCHAIN, DELRULE = nf.SUBSYSTEM | 2, nf.SUBSYSTEM | 5, nf.SUBSYSTEM | 8


def delete_table(key: ChainKey) -> bytes:
    """The message that deletes the table of a chain, with all that is in it."""
    return _message(DELTABLE, key, (nf.TABLE_NAME, key.table))


def flush_chain(key: ChainKey) -> bytes:
    """The message that deletes the rules of a chain."""
    return _message(DELRULE, key, (nf.OBJECT_TABLE, key.table), (nf.RULE_CHAIN, key.chain))


def delete_rule(key: ChainKey, handle: int) -> bytes:
    """The message that deletes one rule of a chain."""
    return flush_chain(key) + attribute(nf.RULE_HANDLE, handle.to_bytes(8, "big"))


def delete_chain(key: ChainKey) -> bytes:
    """The message that deletes an empty chain."""
    return _message(DELCHAIN, key, (nf.OBJECT_TABLE, key.table), (nf.CHAIN_NAME, key.chain))


def commit(requests: Sequence[bytes]) -> Failure | None:
    """Carry out such messages, all or none; None: done, else why not.

    Raises:
        KernelError: no netlink socket.
    """
    begin, end = (
        HEADER.pack(0, kind, NLM_F_REQUEST, 0, 0) + nf.NFGENMSG.pack(0, 0, nf.SUBSYSTEM >> 8)
        for kind in (BATCH_BEGIN, BATCH_END)
    )
    batch = bytearray()
    for number, request in enumerate((begin, *requests, end)):
        _, kind, flags, _, _ = HEADER.unpack_from(request)
        batch += HEADER.pack(len(request), kind, flags, number, 0) + request[HEADER.size :]
    with open_socket(nf.NETLINK_NETFILTER) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, ANSWER_TIMEOUT)
        try:
            sock.send(batch)
            return _first_refusal(sock, len(requests))
        except OSError as error:
            return failure(error.errno or 0)


def _first_refusal(sock: socket.socket, count: int) -> Failure | None:
    """The kernel answers each message that asks for it, refused or not, at the end of the transaction."""
    answered: set[int] = set()
    while len(answered) < count:
        datagram = sock.recv(RECEIVE_SIZE)
        for kind, flags, number, _, start, end in messages(datagram):
            if kind != NLMSG_ERROR:
                continue
            refused = error_of(datagram, flags, start, end)
            if refused is not None:
                return refused
            answered.add(number)
    return None


def _message(kind: int, key: ChainKey, *names: tuple[int, str]) -> bytes:
    """Its length and number are filled in when it is sent."""
    family = next(number for name, number in nf.FAMILIES.items() if name == key.family)
    return HEADER.pack(0, kind, NLM_F_REQUEST | NLM_F_ACK, 0, 0) + nf.body(family, *names)
