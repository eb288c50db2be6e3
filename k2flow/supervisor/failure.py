"""Why the processes of a flow ended: from their exit codes and from the error lines on their standard error."""

import os
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

from k2flow.process_exit import ERROR_PREFIX, EXIT_FAILED, EXIT_TRY_AGAIN, EXIT_UNAVAILABLE, PEER_LOST


@dataclass(frozen=True)
class FlowFailure:
    """Why a flow ended, in one line, and whether the supervisor restarts it.

    A failure that it does not restart may still pass by itself: services that did not answer at the first start.
    """

    reason: str
    retryable: bool
    permanent: bool


def find_failure(flow: str, codes: Sequence[int | None], errors: Sequence[str], was_up: bool) -> FlowFailure | None:
    """Return the failure of a flow, or None if all its processes ended well.

    The cause is a killed process, else the first of the processes' `errors`, else an unexpected exit code. A process
    that hung after another one had failed has no exit code. Retryable and unexpected errors lead to a restart if the
    flow had started well, in this run or an earlier one (`was_up`). At the first start they go to the user.
    """
    if not any(codes) and None not in codes:
        return None
    killed = [(i, f"was killed by signal {-code}") for i, code in enumerate(codes) if code is not None and code < 0]
    causes = [error for error in errors if error != PEER_LOST]
    if causes and not killed:
        permanent = EXIT_FAILED in codes
        return FlowFailure(causes[0], not permanent and (EXIT_UNAVAILABLE not in codes or was_up), permanent)
    expected = (0, None, EXIT_TRY_AGAIN)
    if errors and not killed and all(code in expected for code in codes):
        return FlowFailure(PEER_LOST, True, False)
    crashed = [(i, f"ended with exit code {code}") for i, code in enumerate(codes) if code not in expected]
    i, how = next(iter(killed + crashed), (codes.index(None) if None in codes else 0, "hung"))
    reason = f"process {i} of {len(codes)} of {flow} {how}; nothing is lost: a restart resumes where the tables end"
    retryable = bool(killed) or not crashed or was_up
    return FlowFailure(reason, retryable, not retryable)


class StderrRelay:
    """Passes on the standard error of a flow's processes line by line, except their final error lines.

    Those are collected in `errors` without their prefix. If all processes report the same, the user sees it once.
    """

    def __init__(self) -> None:
        self.errors: list[str] = []
        self._read, self.pipe = os.pipe()
        self._relay = threading.Thread(target=self._pass_on)

    def __enter__(self) -> Self:
        self._relay.start()
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self.pipe)
        self._relay.join()

    def _pass_on(self) -> None:
        with open(self._read, encoding="utf-8", errors="replace") as lines:
            for line in lines:
                if line.startswith(ERROR_PREFIX):
                    self.errors.append(line.removeprefix(ERROR_PREFIX).strip())
                else:
                    print(line, end="", file=sys.stderr, flush=True)
