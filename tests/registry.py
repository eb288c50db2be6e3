"""A schema registry for tests: a small HTTP server with Confluent's API."""

import json
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from k2flow.sandbox.kafka.local import free_port


class Registry:
    """A schema registry on a free port.

    Attributes:
        url: Its address.
        answers: Status and body by schema id, or by path for other requests. Other ids are not found, as Confluent's
            registry says it.
        asked: The paths of all requests.
        authorizations: Their Authorization headers.
    """

    def __init__(self, tls: ssl.SSLContext | None = None) -> None:
        self.port = free_port()
        self.url = f"{'https' if tls else 'http'}://127.0.0.1:{self.port}"
        self.answers: dict[int | str, tuple[int, bytes]] = {}
        self.asked: list[str] = []
        self.authorizations: list[str | None] = []
        self._tls = tls

    def register(self, schema_id: int, schema: Any, **more: object) -> None:
        self.answers[schema_id] = (200, json.dumps({"schema": json.dumps(schema), **more}).encode())

    def register_version(self, subject: str, version: int, schema: Any, **more: object) -> None:
        body = {"subject": subject, "version": version, "id": 1000, "schema": json.dumps(schema), **more}
        self.answers[f"/subjects/{subject}/versions/{version}"] = (200, json.dumps(body).encode())

    @contextmanager
    def running(self) -> Iterator[None]:
        registry = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                registry.asked.append(self.path)
                registry.authorizations.append(self.headers["Authorization"])
                path = self.path.partition("?")[0]
                key = int(path.rpartition("/")[2]) if path.startswith("/schemas/ids/") else path
                missing = (404, b'{"error_code": 40403, "message": "Schema not found"}')
                status, body = registry.answers.get(key, missing)
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *arguments: object) -> None:
                """Print nothing."""

        with ThreadingHTTPServer(("127.0.0.1", self.port), Handler) as server:
            if self._tls:
                server.socket = self._tls.wrap_socket(server.socket, server_side=True)
            thread = threading.Thread(target=server.serve_forever, args=(0.01,))
            thread.start()
            try:
                yield
            finally:
                server.shutdown()
                thread.join()
