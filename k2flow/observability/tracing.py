"""OpenTelemetry traces, where K2FLOW_TRACES asks for them: of each worker's batch one, until its epoch is over.

A batch is an epoch, and a worker takes no other before it is written, and committed if that is due. So what the
worker's thread does until then belongs to the batch, and a commit, which may be of several, to the last one. Where
spans go is said by OpenTelemetry's own variables (OTEL_EXPORTER_OTLP_ENDPOINT and others). Without K2FLOW_TRACES
nothing of it is imported, and a span costs a call.
"""

import threading
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

from k2flow.config.settings import PREFIX
from k2flow.errors import SettingsError

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import Span, TracerProvider
    from opentelemetry.trace import Tracer

Value = str | int | float | bool

_provider: "TracerProvider | None" = None
_tracer: "Tracer | None" = None
_batches: "dict[int, Span]" = {}
"""Of each thread the batch that is not ended. By the system's number of it: for Python a thread of Bytewax's is a new
one in each call, so that neither its thread-local values nor OpenTelemetry's context last."""


def set_up(exchange: str) -> None:
    """From now on spans go to the collector that OTEL_* variables name. Raises SettingsError without the extra."""
    global _provider, _tracer
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        raise SettingsError(f"{PREFIX}TRACES needs OpenTelemetry: pip install 'k2flow[traces]' ({error})") from error
    _provider = TracerProvider(resource=Resource.create({"service.name": "k2flow", "k2flow.exchange": exchange}))
    _provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    _tracer = _provider.get_tracer("k2flow")


def end() -> None:
    """Sends what is left, also of batches that were not ended; waits ten seconds at the most for a collector."""
    global _provider, _tracer
    if _provider is not None:
        while _batches:
            _batches.popitem()[1].end()
        _provider.shutdown()
        _provider = _tracer = None


def begin_batch(**attributes: Value) -> None:
    """The spans of this thread belong to a new batch, until it ends or another one begins."""
    if _tracer is not None:
        from opentelemetry.context import Context

        end_batch()
        _batches[threading.get_ident()] = _tracer.start_span("batch", Context(), attributes=attributes)  # type: ignore[assignment]


def end_batch() -> None:
    """Ends this thread's batch, if it has one."""
    if (batch := _batches.pop(threading.get_ident(), None)) is not None:
        batch.end()


def span(name: str, **attributes: Value) -> AbstractContextManager[object]:
    """One step of the batch, for as long as it is entered; an exception that leaves it is recorded."""
    if _tracer is None:
        return nullcontext()
    from opentelemetry.trace import set_span_in_context

    batch = _batches.get(threading.get_ident())
    return _tracer.start_as_current_span(name, set_span_in_context(batch) if batch else None, attributes=attributes)
