"""OpenTelemetry traces, where K2FLOW_TRACES asks for them: of each worker's batch one, from its end to its commits.

A batch is an epoch, and a worker takes no other before it is committed, so what the worker's thread does until then
belongs to the batch. Where spans go is said by OpenTelemetry's own variables (OTEL_EXPORTER_OTLP_ENDPOINT and others).
Without K2FLOW_TRACES nothing of it is imported, and a span costs a call.
"""

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any

from k2flow.errors import SettingsError
from k2flow.settings import PREFIX

Value = str | int | float | bool
Start = Callable[..., AbstractContextManager[Any]]

_start: Start | None = None
_flush: Callable[[], object] | None = None
_batch = threading.local()


def set_up(exchange: str) -> None:
    """From now on spans go to the collector that OTEL_* variables name. Raises SettingsError without the extra."""
    global _start, _flush
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        raise SettingsError(f"{PREFIX}TRACES needs OpenTelemetry: pip install 'k2flow[traces]' ({error})") from error
    provider = TracerProvider(resource=Resource.create({"service.name": "k2flow", "k2flow.exchange": exchange}))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    _start, _flush = provider.get_tracer("k2flow").start_as_current_span, provider.shutdown


def end() -> None:
    """Sends what is left."""
    end_batch()
    if _flush is not None:
        _flush()


def begin_batch(**attributes: Value) -> None:
    """The spans of this thread belong to a new batch, until it ends or another one begins."""
    if _start is not None:
        end_batch()
        _batch.open = ExitStack()
        _batch.open.enter_context(_start("batch", attributes=attributes))


def end_batch() -> None:
    """Ends this thread's batch, if it has one."""
    if (batch := getattr(_batch, "open", None)) is not None:
        _batch.open = None
        batch.close()


def span(name: str, **attributes: Value) -> AbstractContextManager[object]:
    """One step of the batch, for as long as it is entered; an exception that leaves it is recorded."""
    return nullcontext() if _start is None else _start(name, attributes=attributes)
