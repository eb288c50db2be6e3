"""How a command ends after an error."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from k2flow.errors import K2flowError
from k2flow.process_exit import ERROR_PREFIX

DEBUG = "K2FLOW_DEBUG"
TRUE = {"1", "true", "t", "yes", "y", "on"}


@contextmanager
def exit_on_error(code: int, context: str = "") -> Iterator[None]:
    """Print a K2flowError as one line on standard error, after `context`, and exit with `code`.

    With --debug the error passes, and Python prints its traceback.
    """
    try:
        yield
    except K2flowError as error:
        if os.environ.get(DEBUG, "").lower() in TRUE:
            raise
        print(f"{ERROR_PREFIX}{context}{error}", file=sys.stderr)
        raise SystemExit(code) from None
