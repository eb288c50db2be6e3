"""The watch on a flow's own connections: it sees each way to close one, and no other socket."""

import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest

from k2flow.flow.peers import Connection, _established, _is_open

Pair = tuple[socket.socket, socket.socket]
CLOSED: dict[str, Callable[[socket.socket, socket.socket], None]] = {
    "by the peer": lambda own, peer: peer.close(),
    "by the peer, for sending": lambda own, peer: peer.shutdown(socket.SHUT_WR),
    "by this process": lambda own, peer: own.close(),
    "by this process, for both": lambda own, peer: own.shutdown(socket.SHUT_RDWR),
}


@pytest.fixture(params=["127.0.0.1", "::"])
def pair(request: pytest.FixtureRequest) -> Iterator[tuple[Pair, tuple[Connection, int]]]:
    """An accepted connection and its peer, with what `_established` returns of it; on an IPv4 or a common socket."""
    with ExitStack() as stack:
        family = socket.AF_INET6 if ":" in request.param else socket.AF_INET
        listener = stack.enter_context(socket.socket(family))
        if family == socket.AF_INET6:
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        listener.bind((request.param, 0))
        listener.listen()
        port = listener.getsockname()[1]
        peer = stack.enter_context(socket.create_connection(("127.0.0.1", port)))
        own = stack.enter_context(listener.accept()[0])
        ((ends, descriptor),) = _established([f"127.0.0.1:{port}", "127.0.0.1:1"], 0).items()
        yield (own, peer), (ends, descriptor)


@pytest.mark.parametrize("close", CLOSED.values(), ids=CLOSED.keys())
def test_a_closed_connection_is_seen(
    pair: tuple[Pair, tuple[Connection, int]], close: Callable[[socket.socket, socket.socket], None]
) -> None:
    (own, peer), (ends, descriptor) = pair
    peer.sendall(b"data that is not read yet")
    assert _is_open(descriptor, ends)
    close(own, peer)
    assert not _is_open(descriptor, ends)


def test_another_connection_under_the_same_number_is_not_the_watched_one(
    pair: tuple[Pair, tuple[Connection, int]],
) -> None:
    (own, _), (ends, descriptor) = pair
    own.close()
    first, second = socket.socketpair()
    with first, second:
        assert first.fileno() == descriptor
        assert not _is_open(descriptor, ends)
