"""Signals of a flow's process: SIGTERM and SIGINT drain it, and the death of its supervisor counts as SIGTERM."""

import ctypes
import logging
import os
import signal
import threading

from k2flow.flow.process import FlowProcess

log = logging.getLogger(__name__)

PR_SET_PDEATHSIG = 1  # linux/prctl.h
STOP_SIGNALS = {signal.SIGTERM, signal.SIGINT}


def end_with_supervisor() -> None:
    """Have this process get SIGTERM when its supervisor is killed: no process would pass signals on to it any more.

    A restarted supervisor could not start the flow while this one runs. Only Linux supports this.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "prctl"):
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def stop_on_signals(process: FlowProcess) -> None:
    """On SIGTERM or SIGINT ask the source to end: the messages read so far are committed, and the exit code is 0.

    By default SIGTERM kills Bytewax at once, and SIGINT leaves the other processes of a cluster hanging. A thread acts
    on the signals. The main thread may be inside Bytewax, connecting to a process that never starts, where no Python
    handler runs. The C handler does run, and writes the signal's number into a pipe.
    """
    read, write = os.pipe()
    os.set_blocking(write, False)
    signal.set_wakeup_fd(write)
    for number in STOP_SIGNALS:
        signal.signal(number, lambda *_: None)
    threading.Thread(target=_await_signal, args=(process, read), name="signals", daemon=True).start()


def _await_signal(process: FlowProcess, pipe: int) -> None:
    while (number := os.read(pipe, 1)[0]) not in STOP_SIGNALS:
        pass
    log.info("%s: %s, stopping", process.exchange.name, signal.Signals(number).name)
    process.stop.set()
    if not process.reading:  # nothing has begun that could be left half done
        logging.shutdown()
        os._exit(0)
