"""Runs a flow under `python -m bytewax.run`: trigger, signals, start-up checks, and errors of one line.

bytewax.run gives a flow no hook before or after the run, and its epoch is 10 s unless told. A flow's module that is
imported by it therefore puts a function of its own in the place of the `cli_main` that bytewax.run is about to call.

Epochs: the source decides when a batch ends, so the epoch interval is the shortest there is, and every batch is an
epoch of its own.
"""

import ctypes
import logging
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from datetime import timedelta
from types import ModuleType
from typing import Any, NoReturn

from prometheus_client import REGISTRY

from k2flow.errors import K2flowError, RunError
from k2flow.flow import first_error as failure
from k2flow.flow.peers import watch
from k2flow.flow.process import FlowProcess
from k2flow.iceberg.catalog import open_catalog
from k2flow.observability import tracing
from k2flow.observability.endpoint import serve
from k2flow.observability.logs import set_up_logging
from k2flow.observability.metrics import STAGE, SUPERVISED, Stage
from k2flow.observability.native_stderr import NativeStderr
from k2flow.process_exit import ERROR_PREFIX, EXIT_FAILED, EXIT_TRY_AGAIN, PEER_LOST, exit_code

log = logging.getLogger(__name__)

EPOCH_INTERVAL = timedelta(milliseconds=1)
WEB_SERVER = "BYTEWAX_DATAFLOW_API_ENABLED"
M_ARENA_MAX = -8  # malloc.h
ARENAS = 2
PR_SET_PDEATHSIG = 1  # linux/prctl.h
STOP_SIGNALS = {signal.SIGTERM, signal.SIGINT}


def install_runner(process: FlowProcess) -> None:
    """If bytewax.run is this process's main program, makes it run the flow of `process` through `_run`."""
    main = sys.modules["__main__"]
    if getattr(getattr(main, "__spec__", None), "name", None) == "bytewax.run":
        _replace_cli_main(main, process)


def keep_freed_memory() -> None:
    """Makes all threads share two heaps: GNU's C library gives each its own, and what one has freed no other can use.

    Arrow shares them too, since k2flow's first lines say so. Its own default (mimalloc) gives the memory of each batch
    back to the system and takes it again for the next: with large batches that is nearly as much system time as the
    decoding takes.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):  # GNU's alone
        libc.mallopt(M_ARENA_MAX, ARENAS)


def end_with_supervisor() -> None:
    """Has this process get SIGTERM when the one that started it is killed: nobody would pass signals on to it any more.

    A supervisor that was started again could not start the flow while this one runs. Linux alone can do it.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "prctl"):
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def _replace_cli_main(main: ModuleType, process: FlowProcess) -> None:
    cli_main: Callable[..., None] = main.cli_main
    told: timedelta | None = getattr(main, "snapshot_interval", None)

    def run(**kwargs: Any) -> None:
        if kwargs.get("recovery_config") is not None:
            _end("k2flow keeps its state in the tables: run without -r and -b")
        if WEB_SERVER in os.environ:
            _end(f"{WEB_SERVER} makes Bytewax open port 3030 on every interface: unset it")
        if told:
            process.trigger_override = told.total_seconds()
        kwargs["epoch_interval"] = EPOCH_INTERVAL
        _run(process, cli_main, kwargs)

    main.cli_main = run  # type: ignore[attr-defined]


def _run(process: FlowProcess, cli_main: Callable[..., None], kwargs: dict[str, Any]) -> None:
    debug, native = False, None
    keep_freed_memory()
    addresses = kwargs.get("addresses") or []
    workers = (kwargs.get("workers_per_process") or 1) * max(1, len(addresses))
    try:
        debug = process.settings.debug
        with nullcontext() if debug else NativeStderr() as native:
            set_up_logging(process.settings.log_level, process.settings.log_format)
            _stop_on_signals(process)
            if SUPERVISED in os.environ:
                end_with_supervisor()
            _serve_metrics(process, kwargs.get("process_id") or 0)
            if process.settings.traces:
                tracing.set_up(process.exchange.name)
            if addresses:
                _watch_peers(process, addresses, kwargs["process_id"])
            process.open(workers)
            STAGE.labels(process.exchange.name).set(Stage.OPENED)
            log.info(
                "%s: trigger %g s, %d worker(s), from topic %s",
                process.exchange.name,
                process.trigger_seconds,
                workers,
                process.exchange.settings.topic,
            )
            cli_main(**kwargs)
            tracing.shut_down()
            log.info("%s: stopped, everything that was read is committed", process.exchange.name)
    except BaseException as error:
        known = _known_cause(error, workers > 1)
        if known is None:
            sys.stderr.write(native.text() if native else "")
            if (first := failure.first()) is not None:  # Bytewax's own error may not tell of it
                traceback.print_exception(first)
                _exit(EXIT_FAILED)
            tracing.shut_down()
            raise
        if debug:
            traceback.print_exception(error)
        _end(str(known), exit_code(known, process.reading))


def _serve_metrics(process: FlowProcess, process_id: int) -> None:
    """Of this process alone, unless a supervisor serves those of all. Raises SettingsError."""
    port = process.settings.metrics_port
    if port is None or SUPERVISED in os.environ:
        return

    def not_ready() -> str | None:
        return None if process.reading else f"{process.exchange.name}: does not read yet"

    serve(process.settings.metrics_host, port + process_id, REGISTRY, lambda: None, not_ready)
    if process_id == 0:  # one of a cluster is enough
        from k2flow.status.collector import StatusCollector
        from k2flow.status.metrics import StatusMetrics

        observer = StatusCollector(open_catalog(process.settings), process.settings, [process.exchange])
        status = StatusMetrics(observer.collect)
        REGISTRY.register(status)
        status.start()


def _watch_peers(process: FlowProcess, addresses: Sequence[str], number: int) -> None:
    """Ends this process once another one of its flow is lost: without it no epoch would ever be committed again."""
    settings = process.settings

    def lost() -> None:
        if process.finished_reading:  # the other one has ended as it should, and this one is about to
            time.sleep(settings.stop_seconds)
        _end(PEER_LOST, EXIT_TRY_AGAIN)

    watch(addresses, number, settings.peer_seconds, lambda: process.reading, lost)


def _known_cause(error: BaseException, cluster: bool) -> K2flowError | None:
    """The error of k2flow's own that stopped the dataflow, if one did."""
    first = failure.first()
    cause: BaseException | None = first or error
    while cause is not None:
        if isinstance(cause, K2flowError):
            return cause
        cause = cause.__cause__ or cause.__context__
    panicked = type(error).__name__ == "PanicException"  # Bytewax's communication has no class of its own
    if cluster and first is None and panicked:
        return RunError(PEER_LOST)
    return None


def _stop_on_signals(process: FlowProcess) -> None:
    """SIGTERM and SIGINT ask the source to end: what was read is committed, and the process exits with 0.

    Bytewax itself dies at once of SIGTERM, and of SIGINT leaves the other processes of a cluster hanging. A thread acts
    on the signals, since the main one may be inside Bytewax, connecting to a process that never comes up, where no
    Python handler runs; only the C handler does, which writes the signal's number into the pipe.
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


def _end(message: str, code: int = EXIT_FAILED) -> NoReturn:
    """Ends the process at once: threads of a failed dataflow may still run, and Python would wait for them or abort."""
    with suppress(OSError):  # where standard error is on a disk that is full
        print(f"{ERROR_PREFIX}{message}", file=sys.stderr, flush=True)
    _exit(code)


def _exit(code: int) -> NoReturn:
    tracing.shut_down()
    logging.shutdown()
    os._exit(code)
