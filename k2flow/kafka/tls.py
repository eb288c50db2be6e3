"""The reason why a broker's certificate is not trusted, which librdkafka does not report."""

import socket
import ssl
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from urllib.parse import urlsplit

TIMEOUT_SECONDS = 5.0
DEFAULT_PORT = 9092  # librdkafka's


def certificate_problem(config: Mapping[str, str]) -> str | None:
    """Return what is wrong with the first untrusted certificate among the brokers of `bootstrap.servers`.

    Args:
        config: librdkafka's properties.

    Returns:
        The server and the problem; None if all certificates are trusted, or no broker answers.
    """
    authority = config.get("ssl.ca.location")
    folder = authority is not None and Path(authority).is_dir()
    with suppress(OSError, ValueError):
        context = ssl.create_default_context(cafile=None if folder else authority, capath=authority if folder else None)
        for server in filter(None, map(str.strip, config["bootstrap.servers"].split(","))):
            at = urlsplit(server if "://" in server else f"//{server}")
            host = at.hostname or ""
            try:
                with (
                    socket.create_connection((host, at.port or DEFAULT_PORT), TIMEOUT_SECONDS) as connection,
                    context.wrap_socket(connection, server_hostname=host),
                ):
                    pass
            except ssl.SSLCertVerificationError as error:
                return f"{server}: {error.verify_message}"
    return None
