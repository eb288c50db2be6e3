"""A schema registry for tests: a small HTTP server with Confluent's API."""

import json
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from uuid import UUID

from k2flow.sandbox.kafka.local import free_port

NOT_FOUND = (404, b'{"error_code": 40403, "message": "Schema not found"}')
NO_SUCH_PATH = (404, b'{"error_code": 404, "message": "HTTP 404 Not Found"}')


class Registry:
    """A schema registry on a free port.

    Attributes:
        url: Its address.
        answers: Status and body by schema id, or by path for other requests. Other ids are not found, as Confluent's
            registry says it: with its error code, or, above 2^31, without.
        other_answer: Status and body for all other requests, in place of 'not found'.
        every_answer: Status and body for all requests, of something else at the address.
        asked: The paths of all requests.
        authorizations: Their Authorization headers.
    """

    def __init__(self, tls: ssl.SSLContext | None = None) -> None:
        self.port = free_port()
        self.url = f"{'https' if tls else 'http'}://127.0.0.1:{self.port}"
        self.answers: dict[int | str, tuple[int, bytes]] = {"/schemas/types": (200, b'["AVRO"]')}
        self.other_answer: tuple[int, bytes] | None = None
        self.every_answer: tuple[int, bytes] | None = None
        self.asked: list[str] = []
        self.authorizations: list[str | None] = []
        self._tls = tls

    def register(self, schema_id: int, schema: Any, **more: object) -> None:
        self.answers[schema_id] = (200, json.dumps({"schema": json.dumps(schema), **more}).encode())

    def register_guid(self, guid: UUID, schema: Any, *ids: tuple[str, int], **more: object) -> None:
        """Give a schema a GUID, and ids by context. The ids are not registered."""
        self.answers[f"/schemas/guids/{guid}"] = (200, json.dumps({"schema": json.dumps(schema), **more}).encode())
        listed = [{"context": context, "id": schema_id} for context, schema_id in ids]
        self.answers[f"/schemas/guids/{guid}/ids"] = (200, json.dumps(listed).encode())

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
                known = NOT_FOUND if not isinstance(key, int) or key < 2**31 else NO_SUCH_PATH
                answer = registry.answers.get(key, registry.other_answer or known)
                status, body = registry.every_answer or answer
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
