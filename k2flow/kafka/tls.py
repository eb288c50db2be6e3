"""Why a broker's certificate is not trusted, which librdkafka does not tell."""

import socket
import ssl
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

SECONDS = 5.0


def distrust(config: Mapping[str, str]) -> str | None:
    """What is wrong with the certificate of the first broker of `bootstrap.servers` that has one that is not trusted.

    None where they all are, or do not answer. `config` holds librdkafka's properties.
    """
    authority = config.get("ssl.ca.location")
    folder = authority is not None and Path(authority).is_dir()
    with suppress(OSError, ssl.SSLError):
        context = ssl.create_default_context(cafile=None if folder else authority, capath=authority if folder else None)
        for server in config["bootstrap.servers"].split(","):
            host, _, port = server.strip().rpartition("://")[2].rpartition(":")
            try:
                with (
                    socket.create_connection((host.strip("[]"), int(port)), SECONDS) as connection,
                    context.wrap_socket(connection, server_hostname=host.strip("[]")),
                ):
                    pass
            except ssl.SSLCertVerificationError as error:
                return f"{server.strip()}: {error.verify_message}"
    return None
