"""Connections between processes: real sockets on loopback."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import pytest

from k2flow.flow import peers
from k2flow.sandbox.kafka.local import free_port

CONNECT = """
import socket, sys
connection = socket.create_connection(("127.0.0.1", int(sys.argv[1])))
print("connected", flush=True)
sys.stdin.read()
"""


class Peer:
    """Another process, the second of two, which has connected to this one."""

    def __init__(self, port: int, listener: socket.socket) -> None:
        command = [sys.executable, "-c", CONNECT, str(port)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == b"connected\n"
        self.connection, _ = listener.accept()


@pytest.fixture
def port() -> int:
    return free_port()


@pytest.fixture
def peer(port: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[Peer]:
    monkeypatch.setattr(peers, "CHECK_SECONDS", 0.05)
    with socket.create_server(("127.0.0.1", port)) as listener:
        made = Peer(port, listener)
        yield made
        made.process.kill()
        made.process.communicate()
        made.connection.close()


def watched(port: int, connected: threading.Event) -> threading.Event:
    """Set once the peer is lost."""
    lost = threading.Event()
    addresses = [f"127.0.0.1:{port}", f"127.0.0.1:{free_port()}"]
    peers.watch_peers(addresses, 0, 3, connected.is_set, lost.set)
    return lost


def test_a_peer_that_dies_is_lost(port: int, peer: Peer) -> None:
    connected = threading.Event()
    lost = watched(port, connected)
    connected.set()
    assert not lost.wait(0.5)
    os.kill(peer.process.pid, signal.SIGKILL)
    assert lost.wait(30)


def test_nothing_is_watched_before_all_are_connected(port: int, peer: Peer) -> None:
    lost = watched(port, threading.Event())
    peer.process.kill()
    assert not lost.wait(0.5)


def test_the_kernel_gives_up_on_who_is_silent(port: int, peer: Peer) -> None:
    connected = threading.Event()
    connected.set()
    watched(port, connected)
    level, name = socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT
    for _ in range(200):
        if peer.connection.getsockopt(level, name) == 3_000:
            break
        threading.Event().wait(0.05)
    assert peer.connection.getsockopt(level, name) == 3_000
    assert peer.connection.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
    assert peer.connection.getsockopt(level, socket.TCP_KEEPIDLE) == 1


def test_a_peer_that_was_never_there_is_lost(port: int) -> None:
    """It was, a moment ago, for all were connected."""
    connected = threading.Event()
    connected.set()
    assert watched(port, connected).wait(30)


def test_a_service_at_a_peers_port_is_none(port: int, peer: Peer) -> None:
    """Of two connections that may be to peers the one from an address of the flow's is watched."""
    connected = threading.Event()
    with socket.create_server(("127.0.0.2", port)) as elsewhere:
        service = socket.create_connection(("127.0.0.2", port), source_address=("127.0.0.2", 0))
        other, _ = elsewhere.accept()
        lost = watched(port, connected)
        connected.set()
        time.sleep(0.3)
        service.close()
        other.close()
    assert not lost.wait(0.5)
    peer.process.kill()
    assert lost.wait(30)
