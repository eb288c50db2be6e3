"""OpenTelemetry traces: with K2FLOW_TRACES, one per batch of a worker, until the batch's epoch ends.

A batch is an epoch. A worker takes the next batch only after this one is written, and committed if a commit is due. So
all spans of the worker's thread until then belong to the batch. A commit may cover several batches; its spans belong to
the last one. OpenTelemetry's own variables name the collector (OTEL_EXPORTER_OTLP_ENDPOINT and others). Without
K2FLOW_TRACES no part of OpenTelemetry is imported, and a span costs one call.
"""

import threading
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

from k2flow.config.settings import PREFIX
from k2flow.errors import MissingExtraError

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import Span, TracerProvider
    from opentelemetry.trace import Tracer

Value = str | int | float | bool
_provider: "TracerProvider | None" = None
_tracer: "Tracer | None" = None
_batches: "dict[int, Span]" = {}
"""The open batch of each thread, by the operating system's thread id. To Python, a Bytewax thread is a new thread in
each call: neither thread-local values nor OpenTelemetry's context survive a call."""


def set_up(exchange: str) -> None:
    """Send spans to the collector of the OTEL_* variables. Raises MissingExtraError without the extra `traces`."""
    global _provider, _tracer
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        raise MissingExtraError(
            f"{PREFIX}TRACES needs OpenTelemetry ({error}): pip install 'k2flow[traces]', or unset {PREFIX}TRACES"
        ) from error
    _provider = TracerProvider(resource=Resource.create({"service.name": "k2flow", "k2flow.exchange": exchange}))
    _provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    _tracer = _provider.get_tracer("k2flow")


def shut_down() -> None:
    """End all open batches and send the remaining spans; wait at most ten seconds for the collector."""
    global _provider, _tracer
    if _provider is not None:
        while _batches:
            _batches.popitem()[1].end()
        _provider.shutdown()
        _provider = _tracer = None


def begin_batch(**attributes: Value) -> None:
    """Begin a batch: this thread's spans belong to it until it ends or another one begins."""
    if _tracer is not None:
        from opentelemetry.context import Context

        end_batch()
        _batches[threading.get_ident()] = _tracer.start_span("batch", Context(), attributes=attributes)  # type: ignore[assignment]


def end_batch() -> None:
    """End this thread's batch, if it has one."""
    if (batch := _batches.pop(threading.get_ident(), None)) is not None:
        batch.end()


def span(name: str, **attributes: Value) -> AbstractContextManager[object]:
    """Return a span for one step of the batch. It records an exception that leaves it."""
    if _tracer is None:
        return nullcontext()
    from opentelemetry.trace import set_span_in_context

    batch = _batches.get(threading.get_ident())
    return _tracer.start_as_current_span(name, set_span_in_context(batch) if batch else None, attributes=attributes)
