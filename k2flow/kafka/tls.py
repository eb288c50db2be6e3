"""Why a broker's certificate is not trusted, which librdkafka does not tell."""

import socket
import ssl
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from urllib.parse import urlsplit

SECONDS = 5.0
PORT = 9092  # librdkafka's, where a server is named without one


def distrust(config: Mapping[str, str]) -> str | None:
    """What is wrong with the certificate of the first broker of `bootstrap.servers` that has one that is not trusted.

    None where they all are, or do not answer. `config` holds librdkafka's properties.
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
                    socket.create_connection((host, at.port or PORT), SECONDS) as connection,
                    context.wrap_socket(connection, server_hostname=host),
                ):
                    pass
            except ssl.SSLCertVerificationError as error:
                return f"{server}: {error.verify_message}"
    return None
