"""Clients that outlive gateways: ours, and other people's on our transport."""

import asyncio
import json
import signal
import sys
import threading
from collections.abc import AsyncIterator

import httpx2
import pytest
from huggingface_hub import InferenceClient
from huggingface_hub.utils import close_session, set_client_factory
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from redis.asyncio import Redis

from common.client import FleetClient, texts_of
from common.errors import FleetError, Unavailable
from common.httpx_transport import AsyncResumingTransport, ResumingTransport
from tests.fleet import ROOT, Fleet, Process, free_port

pytestmark = [pytest.mark.redis, pytest.mark.usefixtures("long_deadline")]

TEXT = "The quick brown fox jumps over the lazy dog. "
BODY = {"inputs": TEXT, "parameters": {"max_new_tokens": 40}}


@pytest.fixture
async def fleet(redis_url: str) -> AsyncIterator[Fleet]:
    fleet = Fleet(redis_url)
    await fleet.worker("--echo-delay-ms", "20")
    yield fleet
    await fleet.stop()


async def two_gateways(fleet: Fleet) -> tuple[list[str], Process]:
    """Their URLs, and the process of the first."""
    first = await fleet.gateway()
    process = fleet.processes[-1]
    return [first, await fleet.gateway()], process


async def test_errors_of_the_service_are_raised(fleet: Fleet):
    async with FleetClient(await fleet.gateway()) as client:
        with pytest.raises(FleetError, match="max_new_tokens") as refused:
            await client.generate(TEXT, parameters={"max_new_tokens": 0})
        assert refused.value.http_status == 422
        with pytest.raises(FleetError, match="max_new_tokens"):
            async for _ in client.stream(TEXT, parameters={"max_new_tokens": 0}):
                pass
        answer = await client.generate(TEXT, parameters={"max_new_tokens": 4})
        assert answer["generated_text"] == TEXT[:4]


async def test_gateway_that_never_was_costs_nothing(fleet: Fleet):
    urls = (f"http://127.0.0.1:{free_port()}", await fleet.gateway())
    async with FleetClient(*urls) as client:
        events = [event async for event in client.stream(TEXT, parameters={"max_new_tokens": 5})]
    assert texts_of(events) == TEXT[:5]


async def test_patience_ends():
    async with FleetClient(f"http://127.0.0.1:{free_port()}", patience_s=0.2) as client:
        with pytest.raises(Unavailable, match=r"within 0 s|within"):
            await client.generate(TEXT)


async def test_command_prints_the_answer_over_a_killed_gateway(fleet: Fleet):
    urls, first = await two_gateways(fleet)
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "common.cli", "generate", TEXT, "--max-new-tokens", "40"),
        *(part for url in urls for part in ("--url", url)),
        cwd=ROOT,
        stdout=asyncio.subprocess.PIPE,
    )
    begun = await process.stdout.readexactly(5)
    await first.stop(signal.SIGKILL)
    rest = await process.stdout.read()
    assert await process.wait() == 0
    assert (begun + rest).decode() == TEXT[:40] + "\n"


async def test_async_transport_goes_on_elsewhere(fleet: Fleet):
    urls, first = await two_gateways(fleet)
    data = []
    async with (
        httpx2.AsyncClient(
            transport=AsyncResumingTransport(urls), base_url="http://fleet"
        ) as client,
        client.stream("POST", "/generate_stream", json=BODY) as response,
    ):
        async for line in response.aiter_lines():
            if line.startswith("data:"):
                data.append(json.loads(line[5:]))
                if len(data) == 5:
                    await first.stop(signal.SIGKILL)
    assert [event["index"] for event in data] == list(range(1, 41))
    assert data[-1]["generated_text"] == TEXT[:40]


async def test_huggingface_client_survives_a_killed_gateway(fleet: Fleet):
    urls, first = await two_gateways(fleet)
    transport = ResumingTransport(urls)
    set_client_factory(lambda: httpx2.Client(transport=transport, timeout=None))
    loop, has_five = asyncio.get_running_loop(), asyncio.Event()
    may_go_on = threading.Event()

    def read() -> str:
        client = InferenceClient(model=urls[0], token="none")
        text = ""
        for token in client.text_generation(TEXT, stream=True, max_new_tokens=40):
            text += token
            if len(text) == 5:
                loop.call_soon_threadsafe(has_five.set)
                may_go_on.wait()
        return text

    try:
        reading = asyncio.create_task(asyncio.to_thread(read))
        await has_five.wait()
        await first.stop(signal.SIGKILL)
        may_go_on.set()
        assert await reading == TEXT[:40]
    finally:
        may_go_on.set()
        close_session()
        set_client_factory(lambda: httpx2.Client(follow_redirects=True, timeout=None))


async def test_transport_leaves_other_answers_alone(fleet: Fleet):
    url = await fleet.gateway()
    async with httpx2.AsyncClient(transport=AsyncResumingTransport([url])) as client:
        answer = await client.post("http://fleet/generate", json=BODY)
        assert answer.json() == {"generated_text": TEXT[:40]}
        assert (await client.get("http://fleet/info")).json()["router"] == "tokenfleet"
        assert (await client.post("http://fleet/generate", json={})).status_code == 422


async def test_attempts_are_spans_and_send_their_context(fleet: Fleet, redis: Redis):
    spans, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(spans))
    trace.set_tracer_provider(provider)
    async with FleetClient(await fleet.gateway()) as client:
        with provider.get_tracer("test").start_as_current_span("caller") as caller:
            await client.generate(TEXT, parameters={"max_new_tokens": 2})
    by_name = {span.name: span for span in spans.get_finished_spans()}
    [attempt] = [span for name, span in by_name.items() if name != "caller"]
    assert attempt.parent.span_id == caller.get_span_context().span_id
    assert attempt.context.trace_id == caller.get_span_context().trace_id
