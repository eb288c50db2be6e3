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
    """The second of two processes, connected to this one."""

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
        peer = Peer(port, listener)
        yield peer
        peer.process.kill()
        peer.process.communicate()
        peer.connection.close()


def watched(port: int, connected: threading.Event) -> threading.Event:
    """Return an event that is set once the peer is lost."""
    lost = threading.Event()
    addresses = [f"127.0.0.1:{port}", f"127.0.0.1:{free_port()}"]
    peers.watch_peers(addresses, 0, 3, connected.is_set, lost.set)
    return lost


def test_dead_peer_is_lost(port: int, peer: Peer) -> None:
    connected = threading.Event()
    lost = watched(port, connected)
    connected.set()
    assert not lost.wait(0.5)
    os.kill(peer.process.pid, signal.SIGKILL)
    assert lost.wait(30)


def test_watch_starts_after_all_are_connected(port: int, peer: Peer) -> None:
    lost = watched(port, threading.Event())
    peer.process.kill()
    assert not lost.wait(0.5)


def test_kernel_closes_silent_connections(port: int, peer: Peer) -> None:
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


def test_peer_without_a_connection_is_lost(port: int) -> None:
    """All were connected a moment ago."""
    connected = threading.Event()
    connected.set()
    assert watched(port, connected).wait(30)


def test_other_service_at_a_peer_port_is_ignored(port: int, peer: Peer) -> None:
    """Of two possible connections, the one from an address of the flow is watched."""
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
