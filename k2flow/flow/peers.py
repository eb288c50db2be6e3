"""Watches the connections between the processes of a flow, which Bytewax does not do.

If a process dies or its network is cut, its peers wait for it: on the same host until the supervisor ends them, on
another host forever. TCP alone reports a lost peer after a quarter of an hour of sending, and never without sending.
"""

import os
import select
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import psutil

CHECK_SECONDS = 1.0
MAPPED = "::ffff:"  # an IPv4 address on a socket for both versions, RFC 4291
Connection = tuple[Any, Any]  # a TCP connection's two ends, this process's first


def watch_peers(
    addresses: Sequence[str],
    number: int,
    timeout_seconds: float,
    is_connected: Callable[[], bool],
    on_lost: Callable[[], None],
) -> None:
    """Watch the connections to the other processes, in a thread.

    `addresses` are those (host:port) of all processes, and `number` is this one's index in them. The watch begins once
    `is_connected` says that all are connected. It calls `on_lost` when a peer closes its connection or is silent for
    `timeout_seconds`.
    """

    def check() -> None:
        while not is_connected():
            time.sleep(CHECK_SECONDS)
        watched = _to_peers(_established(addresses, number), addresses)
        for descriptor in watched.values():
            _set_timeout(descriptor, timeout_seconds)
        while len(watched) >= len(addresses) - 1 and all(_is_open(each, ends) for ends, each in watched.items()):
            time.sleep(CHECK_SECONDS)
        on_lost()

    threading.Thread(target=check, name="peers", daemon=True).start()


def _established(addresses: Sequence[str], number: int) -> Mapping[Connection, int]:
    """Return the open connections to other processes, with their file descriptors.

    Each process connects to the ports of those before it; those after it connect to its own port.
    """
    ports = [int(address.rpartition(":")[2]) for address in addresses]
    mine, before = ports[number], set(ports[:number])
    return {
        (each.laddr, each.raddr): each.fd
        for each in psutil.Process().net_connections("tcp")
        if each.status == psutil.CONN_ESTABLISHED and (each.laddr.port == mine or each.raddr.port in before)
    }


def _to_peers(found: Mapping[Connection, int], addresses: Sequence[str]) -> Mapping[Connection, int]:
    """Return the connections to processes of the flow. If there are more, another service has a peer's port."""
    if len(found) <= len(addresses) - 1:
        return found
    known = {each[4][0] for address in addresses for each in socket.getaddrinfo(address.rpartition(":")[0], None)}
    return {ends: descriptor for ends, descriptor in found.items() if ends[1].ip.removeprefix(MAPPED) in known}


def _set_timeout(descriptor: int, seconds: float) -> None:
    """Have the kernel close a connection whose peer is silent this long, whether anything is sent or not."""
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


def _is_open(descriptor: int, ends: Connection) -> bool:
    """Return whether neither side has closed a connection. Its cost does not grow with the host's other sockets."""
    try:
        with socket.socket(fileno=os.dup(descriptor)) as connection:
            if (connection.getsockname()[:2], connection.getpeername()[:2]) != ends:
                return False  # the descriptor is of another one now
            closed = select.poll()
            closed.register(connection, getattr(select, "POLLRDHUP", 0))  # errors and a full close are always reported
            return not closed.poll(0)
    except OSError:  # it is closed, or not connected any more
        return False
