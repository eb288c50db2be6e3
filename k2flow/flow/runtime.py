"""Runs a flow under `python -m bytewax.run`: trigger, signals, start-up checks, and one-line errors.

Epochs: the source decides when a batch ends. So the epoch interval is the shortest there is, and every batch is an
epoch of its own.
"""

import ctypes
import gc
import logging
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Mapping, Sequence
from contextlib import nullcontext, suppress
from datetime import timedelta
from typing import Any, NoReturn

from prometheus_client import REGISTRY

from k2flow.compat.bytewax import PANIC, WEB_SERVER, CliMain, replace_cli_main
from k2flow.compat.pyarrow import keep_freed_memory
from k2flow.errors import K2flowError, RunError
from k2flow.flow.first_error import end_at_first_error, first_error
from k2flow.flow.peers import watch_peers
from k2flow.flow.process import Process
from k2flow.iceberg.catalog import open_catalog
from k2flow.layers import CANDLES
from k2flow.observability import tracing
from k2flow.observability.endpoint import serve
from k2flow.observability.logs import NativeStderr, set_up_logging
from k2flow.observability.metrics import STAGE, SUPERVISED, Stage
from k2flow.printable import printable
from k2flow.process_exit import ERROR_PREFIX, EXIT_FAILED, EXIT_TRY_AGAIN, PEER_LOST, exit_code

log = logging.getLogger(__name__)
EPOCH_INTERVAL = timedelta(milliseconds=1)
PR_SET_PDEATHSIG = 1  # linux/prctl.h
_ending = threading.Lock()
"""Taken by the thread that ends this process, and never released: others wait, so there is one line."""
STOP_SIGNALS = {signal.SIGTERM, signal.SIGINT}


def install_runner(process: Process) -> None:
    """If bytewax.run is this process's main program, have it run the flow of `process` as this module does."""

    def run(cli_main: CliMain, interval: timedelta | None, kwargs: dict[str, Any]) -> None:
        if kwargs.get("recovery_config") is not None:
            _end("k2flow keeps its state in the tables: run without -r and -b")
        if WEB_SERVER in os.environ:
            _end(f"{WEB_SERVER} makes Bytewax open port 3030 on every interface: unset it")
        if interval:
            process.trigger_override = interval.total_seconds()
        kwargs["epoch_interval"] = EPOCH_INTERVAL
        _run(process, cli_main, kwargs)

    replace_cli_main(run)


def _run(process: Process, cli_main: CliMain, kwargs: dict[str, Any]) -> None:
    """Run the dataflow to its end. After an error of k2flow, exit with one line; raise any other error."""
    keep_freed_memory()
    workers = int(kwargs.get("workers_per_process") or 1) * max(1, len(kwargs.get("addresses") or []))
    debug, native = False, None

    def end(error: BaseException) -> None:
        """End the process, unless `error` is neither k2flow's own nor from a callback."""
        known = _known_cause(error, workers > 1)
        if known is None:
            _end_with_first_error(native)
        else:
            if debug:
                with suppress(OSError):
                    traceback.print_exception(error)
            _end(str(known), exit_code(known, process.reading))

    end_at_first_error(end)
    try:
        debug = process.settings.debug
        native = None if debug else NativeStderr()
        with native or nullcontext():
            _start(process, workers, kwargs)
            cli_main(**kwargs)
            tracing.shut_down()
            log.info("%s: stopped, everything read is committed", process.name)
    except BaseException as error:
        end(error)
        raise


def _start(process: Process, workers: int, kwargs: Mapping[str, Any]) -> None:
    """Set up logs, signals, metrics, traces and the watch on peers, then open the session."""
    settings = process.settings
    set_up_logging(settings.log_level, settings.log_format)
    _stop_on_signals(process)
    if SUPERVISED in os.environ:
        _end_with_supervisor()
    _serve_metrics(process, kwargs.get("process_id") or 0)
    if settings.traces:
        tracing.set_up(process.name)
    if addresses := kwargs.get("addresses"):
        _watch_peers(process, addresses, kwargs["process_id"])
    process.open(workers)
    gc.freeze()  # what exists stays: no collection looks at it again
    STAGE.labels(process.name).set(Stage.OPENED)
    text = "%s: trigger %g s, %d worker(s), from %s"
    log.info(text, process.name, process.trigger_seconds, workers, process.source)


def _end_with_supervisor() -> None:
    """Have this process get SIGTERM when its supervisor is killed: no process would pass signals on to it any more.

    A restarted supervisor could not start the flow while this one runs. Only Linux supports this.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "prctl"):
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def _stop_on_signals(process: Process) -> None:
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


def _await_signal(process: Process, pipe: int) -> None:
    while (number := os.read(pipe, 1)[0]) not in STOP_SIGNALS:
        pass
    log.info("%s: %s, stopping", process.name, signal.Signals(number).name)
    process.stop.set()
    if not process.reading:  # nothing has begun that could be left half done
        logging.shutdown()
        os._exit(0)


def _serve_metrics(process: Process, process_id: int) -> None:
    """Serve this process's metrics, unless a supervisor serves those of all processes. Raises SettingsError."""
    port = process.settings.metrics_port
    if port is None or SUPERVISED in os.environ:
        return

    def not_ready() -> str | None:
        return None if process.reading else f"{process.name}: does not read yet"

    serve(process.settings.metrics_host, port + process_id, REGISTRY, lambda: None, not_ready)
    if process_id == 0:  # one of a cluster is enough
        from k2flow.gaps.metrics import start_gap_metrics
        from k2flow.status.collector import StatusCollector
        from k2flow.status.metrics import StatusMetrics

        candles = process.name == CANDLES.name
        collector = StatusCollector(open_catalog(process.settings), process.settings, process.exchanges, candles)
        status = StatusMetrics(collector.collect)
        REGISTRY.register(status)
        status.start()
        start_gap_metrics(REGISTRY, open_catalog(process.settings), process.exchanges)


def _watch_peers(process: Process, addresses: Sequence[str], number: int) -> None:
    """End this process once another one of its flow is lost: without it no epoch would ever be committed again."""
    settings = process.settings

    def on_lost() -> None:
        if process.finished_reading:  # the other one has ended as it should, and this one is about to
            time.sleep(settings.stop_seconds)
        _end(PEER_LOST, EXIT_TRY_AGAIN)

    watch_peers(addresses, number, settings.peer_seconds, lambda: process.reading, on_lost)


def _known_cause(error: BaseException, cluster: bool) -> K2flowError | None:
    """Return the error of k2flow's own that stopped the dataflow, if one did."""
    first = first_error()
    cause: BaseException | None = first or error
    while cause is not None:
        if isinstance(cause, K2flowError):
            return cause
        cause = cause.__cause__ or cause.__context__
    if cluster and first is None and type(error).__name__ == PANIC:
        return RunError(PEER_LOST)
    return None


def _end_with_first_error(native: NativeStderr | None) -> None:
    """Print what native code wrote. End the process with the traceback of the first error if one was recorded."""
    written = native.text() if native else ""
    first = first_error()
    if first is None:
        sys.stderr.write(written)
        tracing.shut_down()
        return
    _ending.acquire()
    with suppress(OSError):
        sys.stderr.write(written)
        traceback.print_exception(first)  # Bytewax's own error may hide it
    _exit(EXIT_FAILED)


def _end(message: str, code: int = EXIT_FAILED) -> NoReturn:
    """End the process at once: threads of a failed dataflow may still run, and Python would wait for them or abort."""
    _ending.acquire()
    with suppress(OSError):  # standard error may be on a full disk
        print(f"{ERROR_PREFIX}{printable(message)}", file=sys.stderr, flush=True)
    _exit(code)


def _exit(code: int) -> NoReturn:
    tracing.shut_down()
    logging.shutdown()
    os._exit(code)
