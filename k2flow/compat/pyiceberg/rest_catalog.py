"""PyIceberg's REST catalog with timeouts: its own waits forever for a server that does not answer."""

from collections.abc import Mapping
from typing import Any

from pyiceberg.catalog.rest import RestCatalog
from requests import PreparedRequest, Response, Session
from requests.adapters import HTTPAdapter
from typing_extensions import override

TIMEOUT_SECONDS = (5.0, 60.0)
"""To connect, and between two bytes of the answer: a commit to a busy server takes seconds."""


class TimedRestCatalog(RestCatalog):
    """Requests raise requests' ConnectTimeout and ReadTimeout, which are OSErrors; the outcome is then unknown."""

    @override
    def _config_headers(self, session: Session) -> None:
        """Set the timeouts. PyIceberg calls this first for a new session, before it requests a token with it."""
        for scheme in ("http://", "https://"):
            session.mount(scheme, _TimedAdapter())
        super()._config_headers(session)


class _TimedAdapter(HTTPAdapter):
    @override
    def send(
        self,
        request: PreparedRequest,
        stream: bool = False,
        timeout: float | tuple[float, float] | tuple[float, None] | None = None,
        verify: bool | str = True,
        cert: bytes | str | tuple[bytes | str, bytes | str] | None = None,
        proxies: Mapping[str, str] | None = None,
    ) -> Response:
        limits: Any = TIMEOUT_SECONDS if timeout is None else timeout
        return super().send(request, stream, limits, verify, cert, proxies)
