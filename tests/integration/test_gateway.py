"""The gateway against a real broker: a scripted worker uses the worker's end of the queue, no engine is needed."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import replace

import aiohttp
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from common.errors import GenerationFailed
from common.messages import (
    Failure,
    Finish,
    FinishReason,
    Frame,
    GenerationRequest,
    ModelCard,
    Token,
    first_chain,
    next_chain,
)
from common.redis_keys import ModelKeys
from common.request_queue import Append, Lease, RequestQueue
from common.worker_registry import WorkerRegistry, WorkerStatus
from gateway.server import serve
from gateway.settings import GatewaySettings
from tests.fleet import place_of

pytestmark = [pytest.mark.redis, pytest.mark.usefixtures("deadline")]

CARD = ModelCard("tiny", 100, 200, vocab_size=256, tokenizer_digest="bytes", device="cpu")


def byte_tokenizer() -> bytes:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(
        models.BPE({character: n for n, character in enumerate(alphabet)}, merges=[])
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return tokenizer.to_str().encode()


class ScriptedWorker:
    """Leases requests and writes what `script` says, one frame a step, until told otherwise."""

    def __init__(self, redis, card: ModelCard = CARD) -> None:
        self.card = card
        self.queue = RequestQueue(redis, ModelKeys(card.model))
        self.registry = WorkerRegistry(redis)
        self.script: Callable[[GenerationRequest], list[str]] = lambda request: [" one", " two"]
        self.failure: Failure | None = None
        self.may_finish = asyncio.Event()
        self.may_finish.set()
        self.leased: asyncio.Queue[GenerationRequest] = asyncio.Queue()
        self.cancelled: asyncio.Queue[str] = asyncio.Queue()
        self._tasks: set[asyncio.Task] = set()

    async def announce(self) -> None:
        await self.registry.announce(self.card, byte_tokenizer())
        await self.queue.create_group()
        await self.beat()

    async def beat(self, state: str = "ready") -> None:
        status = WorkerStatus("w1", self.card.model, state=state, slots=8)
        await self.registry.beat(self.card, status, lease_s=5.0)

    async def run(self) -> None:
        while True:
            for lease in await self.queue.lease("w1", await self.queue.wait("w1")):
                self.leased.put_nowait(lease.request)
                task = asyncio.create_task(self._serve(lease))
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)

    async def _serve(self, lease: Lease) -> None:
        request, words = lease.request, self.script(lease.request)
        chain = first_chain(request.id)
        for base, word in enumerate(words):
            if base == len(words) - 1:
                await self._hold(lease, base)
            tokens = (Token(100 + base, word, -0.5),)
            chain = next_chain(chain, tokens)
            is_last = base == len(words) - 1
            finish = Finish(FinishReason.LENGTH, len(words), lease.waited_s) if is_last else None
            frame = Frame(tokens=tokens, chain=chain, finish=finish)
            if is_last and self.failure:
                frame = Frame(failure=self.failure)
            if not await self._append(lease, base, frame):
                return

    async def _hold(self, lease: Lease, base: int) -> None:
        while not self.may_finish.is_set():
            if not await self._append(lease, base, None):
                return
            with suppress(TimeoutError):
                async with asyncio.timeout(0.01):
                    await self.may_finish.wait()

    async def _append(self, lease: Lease, base: int, frame: Frame | None) -> bool:
        append = Append(lease.request.id, lease.token, lease.queue, base, frame)
        (result,) = await self.queue.append([append], patience_s=1.0)
        if result.is_cancelled:
            self.cancelled.put_nowait(lease.request.id)
        return result.is_ok


@pytest.fixture
async def worker(redis) -> AsyncIterator[ScriptedWorker]:
    worker = ScriptedWorker(redis)
    await worker.announce()
    task = asyncio.create_task(worker.run())
    yield worker
    task.cancel()
    await asyncio.gather(task, *worker._tasks, return_exceptions=True)


@asynccontextmanager
async def running_gateway(
    url: str, **values
) -> AsyncIterator[tuple[aiohttp.ClientSession, asyncio.Event]]:
    """A gateway on a port of its own; gives a client session and the event that stops it."""
    settings = GatewaySettings(hostname="127.0.0.1", port=0, redis_url=url, **values)
    stop, started = asyncio.Event(), asyncio.get_running_loop().create_future()
    server = asyncio.create_task(serve(settings, stop=stop, started=started))
    try:
        await asyncio.wait((server, started), return_when=asyncio.FIRST_COMPLETED)
        if server.done():
            server.result()
        async with aiohttp.ClientSession(f"http://127.0.0.1:{started.result()}") as session:
            yield session, stop
    finally:
        stop.set()
        await server


@pytest.fixture
async def session(redis_url, worker) -> AsyncIterator[aiohttp.ClientSession]:
    async with running_gateway(redis_url) as (session, _):
        yield session


async def sse(response: aiohttp.ClientResponse) -> AsyncIterator[tuple[str, dict]]:
    """Events as the standard defines them: fields until a blank line; comments are skipped."""
    fields: dict[str, str] = {}
    async for raw in response.content:
        line = raw.decode().rstrip("\n")
        if line and not line.startswith(":"):
            name, _, value = line.partition(":")
            fields[name] = value.removeprefix(" ")
        elif not line and "data" in fields:
            yield fields.get("id", ""), json.loads(fields["data"])
            fields = {}


async def test_answer_in_one_piece(session, worker):
    async with session.post(
        "/generate", json={"inputs": "Hi", "parameters": {"details": True}}
    ) as response:
        assert response.status == 200, await response.text()
        body = await response.json()
    assert body["generated_text"] == " one two"
    assert [token["id"] for token in body["details"]["tokens"]] == [100, 101]
    assert (await worker.leased.get()).id == response.headers["x-request-id"]


async def test_stream_delivers_every_frame_once(session, worker):
    words = [f" {number}" for number in range(100)]
    worker.script = lambda request: words
    async with session.post("/generate_stream", json={"inputs": "Hi"}) as response:
        events = [event async for event in sse(response)]
    assert [data["token"]["text"] for _, data in events] == words
    assert [data["index"] for _, data in events] == list(range(1, 101))
    assert [place_of(id) for id, _ in events] == list(range(100))
    assert events[-1][1]["generated_text"] == "".join(words)
    chain = first_chain(response.headers["x-request-id"])
    for number, (id, data) in enumerate(events):
        chain = next_chain(chain, (Token(data["token"]["id"], data["token"]["text"], 0.0),))
        assert id == f"{response.headers['x-request-id']}:{number}-{chain.hex()}"


async def test_stream_of_a_client_without_chunks(session, worker):
    reader, writer = await asyncio.open_connection("127.0.0.1", session._base_url.port)
    body = b'{"inputs": "Hi"}'
    head = "POST /generate_stream HTTP/1.0\r\ncontent-type: application/json\r\n"
    writer.write(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
    told = (await reader.read()).decode()
    writer.close()
    assert "transfer-encoding" not in told.partition("\r\n\r\n")[0].lower()
    lines = told.partition("\r\n\r\n")[2].splitlines()
    assert {line.partition(":")[0] for line in lines} == {"", "id", "data"}
    last = json.loads(lines[-2].removeprefix("data: "))
    assert last["generated_text"] == " one two"


async def test_client_that_reads_late_gets_everything(session, worker):
    words = [f" {number:06}" + "x" * 50_000 for number in range(200)]
    worker.script = lambda request: words
    async with session.post("/generate_stream", json={"inputs": "Hi"}) as response:
        transport = response.connection.transport
        transport.pause_reading()
        while (await worker.queue.depth()).running or (await worker.queue.depth()).waiting:
            await asyncio.sleep(0.01)
        transport.resume_reading()
        told = (await response.read()).decode()
    events = [
        json.loads(line.removeprefix("data: "))
        for line in told.splitlines()
        if line.startswith("data: ")
    ]
    assert [event["token"]["text"] for event in events] == words
    assert events[-1]["generated_text"] == "".join(words)


async def test_many_streams_at_once(session, worker):
    worker.script = lambda request: [request.id, " a", " b"]

    async def one(number: int) -> bool:
        body = {"inputs": f"prompt {number}"}
        async with session.post("/generate_stream", json=body) as response:
            assert response.status == 200, await response.text()
            events = [data async for _, data in sse(response)]
        return events[-1]["generated_text"] == response.headers["x-request-id"] + " a b"

    assert all(await asyncio.gather(*(one(number) for number in range(50))))


async def test_best_of(session, worker):
    body = {"inputs": "Hi", "parameters": {"best_of": 2, "do_sample": True, "details": True}}
    async with session.post("/generate", json=body) as response:
        details = (await response.json())["details"]
    assert len(details["best_of_sequences"]) == 1
    first, second = await worker.leased.get(), await worker.leased.get()
    assert {first.id, second.id} == {f"{response.headers['x-request-id']}-{n}" for n in (0, 1)}


async def test_request_of_several_sequences_tells_of_each(session, worker):
    body = {"inputs": "Hi", "parameters": {"best_of": 2, "do_sample": True}}
    async with session.post("/generate", json=body) as answer:
        request_id = answer.headers["x-request-id"]
    async with session.get(f"/requests/{request_id}") as answer:
        told = await answer.json()
        assert answer.status == 200, told
    assert told["id"] == request_id
    assert [row["id"] for row in told["sequences"]] == [f"{request_id}-0", f"{request_id}-1"]
    assert {row["state"] for row in told["sequences"]} == {"finished"}
    async with session.get(f"/requests/{request_id}/stream") as answer:
        refused = await answer.json()
    assert answer.status == 404 and f"/requests/{request_id}-1/stream" in refused["error"]
    async with session.get(f"/requests/{request_id}-1/stream") as answer:
        assert answer.status == 200 and b"generated_text" in await answer.read()
    async with session.delete(f"/requests/{request_id}") as answer:
        assert [row["cancelled"] for row in (await answer.json())["sequences"]] == [False, False]
    async with session.get("/requests/unknown") as answer:
        assert answer.status == 404


async def test_client_that_leaves_cancels_a_running_request(session, worker):
    worker.may_finish.clear()
    response = await session.post("/generate_stream", json={"inputs": "Hi"})
    request = await worker.leased.get()
    async for _, data in sse(response):
        assert data["token"]["text"] == " one"
        break
    response.close()
    assert await worker.cancelled.get() == request.id


async def test_client_that_leaves_cancels_a_waiting_request(redis, redis_url):
    worker = ScriptedWorker(redis)
    await worker.announce()
    async with running_gateway(redis_url) as (session, _):
        response = await session.post("/generate_stream", json={"inputs": "Hi"})
        assert (await worker.queue.depth()).waiting == 1
        response.close()
        key = ModelKeys("tiny").request(response.headers["x-request-id"])
        while await redis.hget(key, "state") == b"queued" and not await redis.hget(key, "cancel"):
            await asyncio.sleep(0.01)
    entries = await worker.queue.fetch("w1", count=5)
    assert len(entries) == 1 and await worker.queue.lease("w1", entries) == []


async def test_failure_of_a_worker(session, worker):
    worker.failure = Failure(GenerationFailed.kind, "boom")
    error = {"error": "Request failed during generation: boom", "error_type": "generation"}
    async with session.post("/generate", json={"inputs": "Hi"}) as response:
        assert response.status == 424 and await response.json() == error
    async with session.post("/generate_stream", json={"inputs": "Hi"}) as response:
        events = [data async for _, data in sse(response)]
    assert events[0]["token"]["text"] == " one" and events[1] == error


async def test_full_queue(redis, redis_url):
    worker = ScriptedWorker(redis)
    await worker.announce()
    async with running_gateway(redis_url, max_waiting_requests=2) as (session, _):
        waiting = [await session.post("/generate_stream", json={"inputs": "Hi"}) for _ in range(2)]
        async with session.post("/generate", json={"inputs": "Hi"}) as response:
            assert response.status == 429 and int(response.headers["retry-after"]) >= 1
            assert await response.json() == {
                "error": "Model is overloaded",
                "error_type": "overloaded",
            }
        for response in waiting:
            response.close()


async def test_two_models(session, worker, redis):
    other = ScriptedWorker(redis, replace(CARD, model="other"))
    other.script = lambda request: [" other"]
    await other.announce()
    task = asyncio.create_task(other.run())
    while True:
        async with session.post("/generate", json={"inputs": "Hi", "model": "other"}) as response:
            if response.status == 200:
                break
            assert response.status == 404
        await asyncio.sleep(0.05)  # until the directory may look again
    async with session.post("/generate", json={"inputs": "Hi"}) as response:
        assert response.status == 422
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def test_no_broker(tmp_path):
    async with running_gateway(f"unix://{tmp_path}/none.sock") as (session, _):
        for _ in range(2):
            async with session.post("/generate", json={"inputs": "Hi"}) as response:
                assert response.status == 503 and response.headers["retry-after"] == "1"
        async with session.get("/health") as response:
            assert response.status == 503
        async with session.get("/health/live") as response:
            assert response.status == 200


async def test_stopping_gateway_finishes_its_streams(redis_url, worker):
    worker.may_finish.clear()
    async with running_gateway(redis_url) as (session, stop):
        response = await session.post("/generate_stream", json={"inputs": "Hi"})
        stream = sse(response)
        assert (await anext(stream))[1]["token"]["text"] == " one"
        stop.set()
        with pytest.raises(aiohttp.ClientConnectionError):
            while True:
                async with aiohttp.ClientSession() as other:
                    await other.get(response.url.origin() / "health")
        worker.may_finish.set()
        assert (await anext(stream))[1]["generated_text"] == " one two"


async def test_stopping_gateway_cancels_what_takes_too_long(redis_url, worker):
    worker.may_finish.clear()
    async with running_gateway(redis_url, drain_s=0.05) as (session, stop):
        await session.post("/generate_stream", json={"inputs": "Hi"})
        request = await worker.leased.get()
        stop.set()
        assert await worker.cancelled.get() == request.id


async def test_port_opens_when_a_worker_is_ready(redis, redis_url, free_port):
    settings = GatewaySettings(
        hostname="127.0.0.1", port=free_port, redis_url=redis_url, wait_for_model=True
    )
    stop, started = asyncio.Event(), asyncio.get_running_loop().create_future()
    server = asyncio.create_task(serve(settings, stop=stop, started=started))
    with pytest.raises(OSError):
        await asyncio.open_connection("127.0.0.1", free_port)
    worker = ScriptedWorker(redis)
    await worker.announce()
    assert await started == free_port
    stop.set()
    await server


async def test_stop_while_waiting_for_a_worker(redis_url):
    settings = GatewaySettings(
        hostname="127.0.0.1", port=0, redis_url=redis_url, wait_for_model=True
    )
    stop = asyncio.Event()
    server = asyncio.create_task(serve(settings, stop=stop))
    stop.set()
    await server
