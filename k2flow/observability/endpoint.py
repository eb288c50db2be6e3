"""The HTTP endpoint of a process: /metrics for Prometheus, /healthz and /readyz for an orchestrator."""

import logging
import threading
from collections.abc import Callable, Iterable
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, make_server

from prometheus_client import CollectorRegistry
from prometheus_client.exposition import ThreadingWSGIServer, make_wsgi_app
from typing_extensions import override

from k2flow.config.settings import PREFIX
from k2flow.errors import SettingsError

log = logging.getLogger(__name__)
HealthCheck = Callable[[], str | None]  # returns the problem in one line, or None


def serve(host: str, port: int, registry: CollectorRegistry, health: HealthCheck, readiness: HealthCheck) -> None:
    """Serve in a thread of its own until the process ends, whatever the flow waits for.

    /healthz and /readyz answer 200, or 503 and the problem. Raises SettingsError if the address is in use or invalid.
    """
    metrics = make_wsgi_app(registry)
    checks = {"/healthz": health, "/readyz": readiness}

    def app(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        check = checks.get(environ["PATH_INFO"])
        if check is None:
            answer: Iterable[bytes] = metrics(environ, start_response)
            return answer
        problem = check()
        start_response("503 Service Unavailable" if problem else "200 OK", [("Content-Type", "text/plain")])
        return [f"{problem or 'ok'}\n".encode()]

    try:
        server = make_server(host, port, app, ThreadingWSGIServer, handler_class=_QuietHandler)
    except (OSError, OverflowError) as error:
        raise SettingsError(
            f"{PREFIX}METRICS_PORT: {host}:{port} cannot be listened on ({error}): set another port, or another "
            f"{PREFIX}METRICS_HOST"
        ) from error
    threading.Thread(target=server.serve_forever, name="metrics", daemon=True).start()
    log.info("metrics at http://%s:%d/metrics", host, port)


class _QuietHandler(WSGIRequestHandler):
    """Logs requests at DEBUG: Prometheus sends one every few seconds."""

    @override
    def log_message(self, format: str, *args: Any) -> None:
        log.debug(format, *args)
