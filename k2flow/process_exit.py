"""How a k2flow process ends: its last line on standard error and its exit code, which the supervisor reads."""

from k2flow.errors import CatalogRefusedError, K2flowError

ERROR_PREFIX = "k2flow: error: "  # the start of the one line that a process prints before it ends with an error
EXIT_FAILED = 1  # the error is permanent, or unknown
EXIT_UNAVAILABLE = 69  # retryable, but no service answered before the flow read: EX_UNAVAILABLE of BSD's sysexits
EXIT_TRY_AGAIN = 75  # retryable, and the services had answered (EX_TEMPFAIL of BSD's sysexits)
PEER_LOST = "another process of this flow is lost, so this one stops too: start them all again"


def exit_code(error: K2flowError, reading: bool) -> int:
    """Return the exit code of a flow that `error` ended, before or after it began to read."""
    if not error.retryable:
        return EXIT_FAILED
    return EXIT_TRY_AGAIN if reading or isinstance(error, CatalogRefusedError) else EXIT_UNAVAILABLE
