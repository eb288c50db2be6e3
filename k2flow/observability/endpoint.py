"""Serves /metrics for Prometheus, and /healthz and /readyz for whoever runs k2flow: loopback unless told otherwise."""

import logging
import threading
from collections.abc import Callable, Iterable
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, make_server

from prometheus_client import CollectorRegistry
from prometheus_client.exposition import ThreadingWSGIServer, make_wsgi_app

from k2flow.config.settings import PREFIX
from k2flow.errors import SettingsError

log = logging.getLogger(__name__)

Check = Callable[[], str | None]
"""What is wrong, in one line; None if nothing is."""


def serve(host: str, port: int, registry: CollectorRegistry, health: Check, readiness: Check) -> None:
    """Serves in a thread of its own until the process ends. Raises SettingsError where the address cannot be had.

    /healthz and /readyz answer 200, or 503 and what is wrong. They and /metrics answer whatever the flow waits for.
    """
    metrics = make_wsgi_app(registry)
    checks = {"/healthz": health, "/readyz": readiness}

    def app(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        check = checks.get(environ["PATH_INFO"])
        if check is None:
            answer: Iterable[bytes] = metrics(environ, start_response)
            return answer
        wrong = check()
        start_response("503 Service Unavailable" if wrong else "200 OK", [("Content-Type", "text/plain")])
        return [f"{wrong or 'ok'}\n".encode()]

    try:
        server = make_server(host, port, app, ThreadingWSGIServer, handler_class=_Quiet)
    except (OSError, OverflowError) as error:
        raise SettingsError(
            f"{PREFIX}METRICS_PORT: {host}:{port} cannot be listened on ({error}): set another port, or another "
            f"{PREFIX}METRICS_HOST"
        ) from error
    threading.Thread(target=server.serve_forever, name="metrics", daemon=True).start()
    log.info("metrics at http://%s:%d/metrics", host, port)


class _Quiet(WSGIRequestHandler):
    """Scrapes are no news."""

    def log_message(self, format: str, *args: Any) -> None:
        log.debug(format, *args)
