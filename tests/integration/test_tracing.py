"""One trace from the HTTP request to the last token, received by a real OTLP endpoint."""

import asyncio
import signal

import aiohttp
import grpc
import pytest
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc
from opentelemetry.proto.trace.v1.trace_pb2 import Span

from tests.fleet import Fleet, generate

pytestmark = pytest.mark.redis

CALLER = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


class Collector(trace_service_pb2_grpc.TraceServiceServicer):
    """Keeps the spans it is sent, by name."""

    def __init__(self) -> None:
        self.spans: dict[str, Span] = {}
        self.services: dict[str, str] = {}

    async def Export(self, request, context):
        for resource in request.resource_spans:
            service = {a.key: a.value.string_value for a in resource.resource.attributes}
            for scope in resource.scope_spans:
                for span in scope.spans:
                    self.spans[span.name] = span
                    self.services[span.name] = service["service.name"]
        return trace_service_pb2.ExportTraceServiceResponse()


@pytest.fixture
async def collector():
    server, collector = grpc.aio.server(), Collector()
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(collector, server)
    collector.endpoint = f"http://127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    await server.start()
    yield collector
    await server.stop(grace=None)


async def test_trace_reaches_from_the_caller_to_the_last_token(
    redis_url: str, collector: Collector
):
    fleet = Fleet(redis_url)
    try:
        async with asyncio.timeout(60):
            await fleet.worker("--otlp-endpoint", collector.endpoint)
            url = await fleet.gateway("--otlp-endpoint", collector.endpoint)
            async with aiohttp.ClientSession(headers={"traceparent": CALLER}) as session:
                await generate(session, url, "hello world", max_new_tokens=5)
            # a process that ends sends what it has
            await asyncio.gather(*(process.stop(signal.SIGTERM) for process in fleet.processes))
    finally:
        await fleet.stop()
    spans = collector.spans
    http = next(span for name, span in spans.items() if "/generate" in name)
    assert (
        http.trace_id.hex() == CALLER.split("-")[1]
        and http.parent_span_id.hex() == "b7ad6b7169203331"
    )
    assert spans["generate"].parent_span_id == http.span_id
    for phase in ("queue", "prefill", "decode"):
        assert spans[phase].parent_span_id == spans["generate"].span_id
    assert {span.trace_id for span in spans.values()} >= {http.trace_id}
    assert collector.services["generate"] == "tokenfleet.worker"
    counts = {a.key: a.value.int_value for a in spans["generate"].attributes}
    assert counts["gen_ai.usage.output_tokens"] == 5
    texts = str(list(spans.values()))
    assert "hello" not in texts, "prompts are not traced"
