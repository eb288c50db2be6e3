"""How a k2flow process ends: its last line on standard error and its exit code, which the supervisor reads."""

from k2flow.errors import K2flowError

ERROR_PREFIX = "k2flow: error: "  # the start of the one line that a process prints before it ends with an error
EXIT_FAILED = 1  # the error is permanent, or unknown
EXIT_UNAVAILABLE = 69  # retryable, and the flow had not begun to read (EX_UNAVAILABLE of BSD's sysexits)
EXIT_TRY_AGAIN = 75  # retryable, and the flow had begun to read (EX_TEMPFAIL of BSD's sysexits)
PEER_LOST = "another process of this flow is lost, so this one stops too: start them all again"


def exit_code(error: K2flowError, reading: bool) -> int:
    """Return the exit code of a flow that `error` ended, before or after it began to read."""
    if not error.retryable:
        return EXIT_FAILED
    return EXIT_TRY_AGAIN if reading else EXIT_UNAVAILABLE
