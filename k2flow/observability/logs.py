"""The log: one line an event on standard error, as text or as JSON."""

import logging
import sys
import warnings

JSON_NAMES = {"levelname": "level", "name": "logger"}
"""Names of the JSON fields that differ from those of Python's log records."""


def set_up_logging(level: str, log_format: str = "text") -> None:
    """Write records of at least `level` to standard error, one line each.

    PyIceberg's warnings about its own experimental features are hidden: users cannot act on them.
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        _json_formatter()
        if log_format == "json"
        else logging.Formatter("%(asctime)s %(levelname)-7s %(name)s: %(message)s")
    )
    logging.basicConfig(level=level, handlers=[handler], force=True)
    logging.getLogger("pyiceberg").setLevel(max(logging.WARNING, logging.getLogger().level))
    warnings.filterwarnings("ignore", module="pyiceberg")


def _json_formatter() -> logging.Formatter:
    from pythonjsonlogger.json import JsonFormatter

    return JsonFormatter("%(levelname)s %(name)s %(message)s", rename_fields=JSON_NAMES, timestamp="time")


class ClientLog:
    """A logger for librdkafka clients: their lines become DEBUG records of `log`.

    librdkafka logs each failed attempt, although it retries. A failure that lasts reaches the user as an error.
    """

    def __init__(self, log: logging.Logger) -> None:
        self._log = log

    def log(self, level: int, message: str, *args: object) -> None:
        """Log a line of librdkafka, whatever its level."""
        self._log.debug(message, *args)
