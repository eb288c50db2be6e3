"""Watches the connections between the processes of a flow, for Bytewax does not.

A process whose peer has died, or whose network was cut, waits for it: on the same host until the supervisor ends it, on
another one for ever, since TCP alone gives up after a quarter of an hour of sending, and never where nothing is sent.
"""

import os
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import psutil

CHECK_SECONDS = 1.0

MAPPED = "::ffff:"  # an IPv4 address on a socket for both, RFC 4291
Connection = tuple[Any, Any]
"""A TCP connection's two ends, this process's first."""


def watch(
    addresses: Sequence[str],
    number: int,
    silent_seconds: float,
    connected: Callable[[], bool],
    lost: Callable[[], None],
) -> None:
    """Calls `lost`, from a thread of its own, when a connection to another process is gone.

    `addresses` (host:port) are those of all processes, of which this is the one with `number`; `connected` tells when
    each has found all others. A connection is gone when the other side has closed it, or has been silent for
    `silent_seconds`.
    """

    def check() -> None:
        while not connected():
            time.sleep(CHECK_SECONDS)
        watched = _to_peers(_established(addresses, number), addresses)
        for descriptor in watched.values():
            _give_up_after(descriptor, silent_seconds)
        while len(watched) >= len(addresses) - 1 and not watched.keys() - _established(addresses, number).keys():
            time.sleep(CHECK_SECONDS)
        lost()

    threading.Thread(target=check, name="peers", daemon=True).start()


def _established(addresses: Sequence[str], number: int) -> Mapping[Connection, int]:
    """The connections to other processes that both sides hold open, with their file descriptors.

    Each process connects to those before it, at their ports; those after it come to its own.
    """
    ports = [int(address.rpartition(":")[2]) for address in addresses]
    mine, before = ports[number], set(ports[:number])
    return {
        (each.laddr, each.raddr): each.fd
        for each in psutil.Process().net_connections("tcp")
        if each.status == psutil.CONN_ESTABLISHED and (each.laddr.port == mine or each.raddr.port in before)
    }


def _to_peers(found: Mapping[Connection, int], addresses: Sequence[str]) -> Mapping[Connection, int]:
    """Of these connections those to other processes of the flow: where there are more, a service has a peer's port."""
    if len(found) <= len(addresses) - 1:
        return found
    known = {each[4][0] for address in addresses for each in socket.getaddrinfo(address.rpartition(":")[0], None)}
    return {ends: descriptor for ends, descriptor in found.items() if ends[1].ip.removeprefix(MAPPED) in known}


def _give_up_after(descriptor: int, seconds: float) -> None:
    """Makes the kernel close a connection whose other side is silent for so long, whether anything is sent or not."""
    probe = max(1, round(seconds / 3))
    options = {
        "TCP_KEEPIDLE": probe,
        "TCP_KEEPINTVL": probe,
        "TCP_KEEPCNT": 2,
        "TCP_USER_TIMEOUT": round(seconds * 1000),
    }
    with socket.socket(fileno=os.dup(descriptor)) as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in options.items():
            if hasattr(socket, name):  # Linux has all of them
                connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
