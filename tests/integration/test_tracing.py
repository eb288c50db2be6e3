"""Traces of a flow, as a collector receives them."""

import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span

from k2flow.observability import tracing
from tests.integration.conftest import fill
from tests.integration.harness import Lake, batches


class Collector:
    """Collects the requests to /v1/traces, OTLP over HTTP."""

    def __init__(self) -> None:
        self.requests: list[ExportTraceServiceRequest] = []
        collector = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                if self.path == "/v1/traces":
                    collector.requests.append(ExportTraceServiceRequest.FromString(body))
                self.send_response(200)
                self.end_headers()

            def log_message(self, format: str, *arguments: object) -> None:
                """Print nothing on standard error."""

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def spans(self) -> list[Span]:
        return [
            span
            for request in self.requests
            for resource in request.resource_spans
            for scope in resource.scope_spans
            for span in scope.spans
        ]


@pytest.fixture
def collector() -> Iterator[Collector]:
    created = Collector()
    thread = threading.Thread(target=created.server.serve_forever, args=(0.01,))
    thread.start()
    yield created
    created.server.shutdown()
    thread.join()
    created.server.server_close()


def traced(collector: Collector) -> dict[str, str]:
    return {
        "K2FLOW_TRACES": "1",
        "K2FLOW_UNTIL_CAUGHT_UP": "1",
        **batches(1_000),
        "OTEL_EXPORTER_OTLP_ENDPOINT": collector.url,
        "OTEL_EXPORTER_OTLP_COMPRESSION": "none",
    }


@pytest.mark.parametrize("workers", [1, 2])
def test_each_batch_is_a_trace(new_lake: Callable[..., Lake], collector: Collector, workers: int) -> None:
    lake = new_lake(partitions=workers)
    fill(lake, count=3_000, bad=0.05, duplicates=0.05, seed=1)
    with lake.start(1, ("-w", str(workers)), **traced(collector)) as flow:
        log = flow.wait()
        assert flow.codes() == [0], log
    spans = collector.spans()
    batches = [span for span in spans if span.name == "batch"]
    assert [span.parent_span_id for span in batches] == [b""] * len(batches)
    assert sum(value(span, "messages") for span in batches) == 3_000
    for batch in batches:
        steps = [span for span in spans if span.trace_id == batch.trace_id and span is not batch]
        assert {span.parent_span_id for span in steps} == {batch.span_id}
        assert {"decode", "dedup", "write", "commit"} <= {span.name for span in steps}
        assert all(batch.start_time_unix_nano <= span.start_time_unix_nano for span in steps)
        assert all(span.end_time_unix_nano <= batch.end_time_unix_nano for span in steps)
    assert len([span for span in spans if span.name == "commit"]) >= 4
    (resource,) = {str(request.resource_spans[0].resource) for request in collector.requests}
    assert "k2flow.exchange" in resource


def test_failed_batch_is_traced(new_lake: Callable[..., Lake], collector: Collector) -> None:
    lake = new_lake(partitions=1)
    fill(lake, count=1_000, seed=1)
    with lake.start(K2FLOW_FAILPOINTS="gold.written=raise@1", **traced(collector)) as flow:
        flow.wait()
    names = [span.name for span in collector.spans()]
    assert {"batch", "decode", "dedup"} <= set(names)


def value(span: Span, key: str) -> int:
    (found,) = [each.value.int_value for each in span.attributes if each.key == key]
    return int(found)


def test_without_traces_a_span_is_empty() -> None:
    assert tracing._tracer is None
    tracing.begin_batch(messages=1)
    with tracing.span("decode", messages=1) as entered:
        assert entered is None
    tracing.shut_down()
