"""A TCP proxy that can refuse, hang, and cut connections around a commit or another request."""

import contextlib
import socket
import threading
import time
from collections.abc import Iterator

BUFFER_BYTES = 1 << 16
COMMIT = b"COMMIT\0"  # PostgreSQL's simple query, as psycopg2 sends it
LANDING_SECONDS = 0.1
CONTINUE = b"HTTP/1.1 100"  # the server asks for the rest of a request: no answer yet


class Proxy:
    """Listens on its own port of 127.0.0.1 and forwards everything to `port`."""

    def __init__(self, port: int) -> None:
        self._upstream = port
        self._refusing = False
        self._open = threading.Event()
        self._open.set()
        self._delay = 0.0  # seconds before data of a client is forwarded
        self._cut = ""  # "before" or "after" the next commit is forwarded
        self._unanswered: tuple[bytes, ...] = ()
        self._answer_dropped: set[tuple[socket.socket, socket.socket]] = set()
        self._pairs: set[tuple[socket.socket, socket.socket]] = set()
        self._server = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._server.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    @contextlib.contextmanager
    def refusing(self) -> Iterator[None]:
        """Cut every connection, and every new one at once."""
        self._refusing = True
        self.cut_all()
        yield
        self._refusing = False

    @contextlib.contextmanager
    def hanging(self) -> Iterator[None]:
        """Hold all data back on open connections; deliver it afterwards."""
        self._open.clear()
        yield
        self._open.set()

    @contextlib.contextmanager
    def slow(self, seconds: float) -> Iterator[None]:
        """Forward each piece of a request `seconds` later. Connections do not wait for each other."""
        self._delay = seconds
        yield
        self._delay = 0.0

    def cut_at_commit(self, after: bool) -> None:
        """Forward the next commit, or not, and cut its connection: the client does not learn the outcome."""
        self._cut = "after" if after else "before"

    @contextlib.contextmanager
    def losing_answers(self, requests: tuple[bytes, ...]) -> Iterator[None]:
        """Forward every HTTP request that begins with one of `requests`, and cut its connection instead of an answer.

        The client does not learn the outcome.
        """
        self._unanswered = requests
        yield
        self._unanswered = ()

    def cut_all(self) -> None:
        for pair in list(self._pairs):
            self._close(pair)

    def close(self) -> None:
        self._server.close()
        self._open.set()
        self.cut_all()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._server.accept()
            except OSError:
                return  # closed
            if self._refusing:
                client.close()
                continue
            try:
                server = socket.create_connection(("127.0.0.1", self._upstream), timeout=5)
            except OSError:
                client.close()
                continue
            server.settimeout(None)
            pair = (client, server)
            self._pairs.add(pair)
            for source, target in (pair, pair[::-1]):
                threading.Thread(target=self._pump, args=(source, target, pair), daemon=True).start()

    def _pump(self, source: socket.socket, target: socket.socket, pair: tuple[socket.socket, socket.socket]) -> None:
        try:
            while data := source.recv(BUFFER_BYTES):
                self._open.wait()
                if source is pair[0] and self._delay:
                    time.sleep(self._delay)
                if source is pair[0] and self._unanswered and data.startswith(self._unanswered):
                    self._answer_dropped.add(pair)
                if source is pair[1] and pair in self._answer_dropped and not data.startswith(CONTINUE):
                    break
                if self._cut and source is pair[0] and COMMIT in data:
                    after, self._cut = self._cut == "after", ""
                    if after:
                        target.sendall(data)
                        self._drop_answer(pair)
                    break
                target.sendall(data)
        except OSError:
            pass  # either side has closed
        self._close(pair)

    def _drop_answer(self, pair: tuple[socket.socket, socket.socket]) -> None:
        pair[0].shutdown(socket.SHUT_RDWR)
        time.sleep(LANDING_SECONDS)

    def _close(self, pair: tuple[socket.socket, socket.socket]) -> None:
        self._pairs.discard(pair)
        self._answer_dropped.discard(pair)
        for each in pair:
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()
