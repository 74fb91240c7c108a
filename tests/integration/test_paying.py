"""Who pays for a generation: whoever has it queued for its prompt, and everybody for what they read and had not before."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest
from aiohttp.test_utils import TestClient, TestServer

from gateway.api_keys import line_for
from gateway.app import create_app
from gateway.services import SERVICES
from gateway.settings import GatewaySettings
from tests.fleet import Fleet, events_in

pytestmark = [pytest.mark.redis, pytest.mark.usefixtures("long_deadline")]

PROMPT, ANSWER = 20, 12
BODY = {
    "inputs": "a" * PROMPT,
    "parameters": {"max_new_tokens": ANSWER, "ignore_eos_token": True},
}
COMPLETION = {"prompt": "a" * PROMPT, "max_tokens": ANSWER, "ignore_eos": True, "stream": True}
KEY = {"authorization": "Bearer w3b"}


class Meter:
    """In the place of the limits: notes what every request pays."""

    def __init__(self) -> None:
        self.paid: asyncio.Queue[int] = asyncio.Queue()

    @asynccontextmanager
    async def held(self, key, cost):
        try:
            yield
        finally:
            self.paid.put_nowait(cost())


@pytest.fixture
async def client(fleet: Fleet, tmp_path) -> AsyncIterator[TestClient]:
    """A gateway in this process, whose key `web` is metered."""
    await fleet.worker("--echo-delay-ms", "20")
    keys_file = tmp_path / "keys.toml"
    keys_file.write_text(line_for("web", "w3b"))
    settings = GatewaySettings(redis_url=fleet.redis_url, api_keys_file=str(keys_file))
    app = create_app(settings)
    server = TestServer(app)
    await server.start_server(auto_decompress=False)
    async with TestClient(server, headers=KEY) as client:
        app[SERVICES].limits = Meter()
        await app[SERVICES].directory.wait_until_ready()
        yield client


@pytest.fixture
def payment(client) -> Callable[[], Awaitable[int]]:
    """What the next request to end has paid."""
    paid = client.server.app[SERVICES].limits.paid
    return lambda: asyncio.wait_for(paid.get(), timeout=10)


async def read(response, count: int | None = None) -> list[str]:
    """The ids of events, and the end of the response."""
    ids = []
    async for event_id, _ in events_in(response):
        ids.append(event_id)
        if len(ids) == count:
            break
    response.close()
    return ids


async def leave(client: TestClient, *, policy: str = "grace", count: int = 3) -> list[str]:
    """Begin a stream, and leave behind some events; their ids."""
    headers = {"idempotency-key": "mine", "x-on-disconnect": policy}
    return await read(await client.post("/generate_stream", json=BODY, headers=headers), count)


def path_of(event_id: str) -> str:
    return f"/requests/{event_id.partition(':')[0]}/stream"


async def test_a_claim_to_have_read_is_worth_nothing_by_itself(client, payment):
    headers = {"last-event-id": "free1:999999999-"}
    assert (await client.post("/generate", json=BODY, headers=headers)).status == 200
    assert await payment() == PROMPT + ANSWER, "an answer in one piece has no events"
    headers = {"last-event-id": "free2:999999999-"}
    await read(await client.post("/generate_stream", json=BODY, headers=headers))
    assert PROMPT + ANSWER - 1 <= await payment() <= PROMPT + ANSWER
    assert len(await read(await client.get(path_of("free1:")))) == ANSWER
    assert await payment() == ANSWER


async def test_who_leaves_at_once_and_reads_by_the_id_pays_for_it(client, payment):
    (first,) = await leave(client, count=1)
    assert PROMPT < await payment() < PROMPT + ANSWER
    assert len(await read(await client.get(path_of(first)))) == ANSWER
    assert await payment() == ANSWER


@pytest.mark.parametrize("route", ["GET", "/generate_stream"])
async def test_who_comes_back_pays_for_the_rest_only(client, payment, route):
    ids = await leave(client)
    await payment()
    headers = {"last-event-id": ids[-1], "idempotency-key": "mine"}
    if route == "GET":
        response = await client.get(path_of(ids[-1]), headers=headers)
    else:
        response = await client.post(route, json=BODY, headers=headers)
    assert len(await read(response)) == ANSWER - len(ids)
    assert await payment() == ANSWER - len(ids)


async def test_who_comes_back_to_a_completion_pays_for_the_rest_only(client, payment):
    headers = {"idempotency-key": "mine"}
    ids = await read(await client.post("/v1/completions", json=COMPLETION, headers=headers), 3)
    await payment()
    headers["last-event-id"] = ids[-1]
    response = await client.post("/v1/completions", json=COMPLETION, headers=headers)
    assert (await response.text()).rstrip().endswith("data: [DONE]")
    assert await payment() == ANSWER - len(ids)


async def test_a_retry_pays_not_for_the_prompt_again(client, payment):
    for cost in (PROMPT + ANSWER, ANSWER):
        headers = {"idempotency-key": "mine"}
        assert (await client.post("/generate", json=BODY, headers=headers)).status == 200
        assert await payment() == cost


async def test_what_runs_on_is_paid_by_who_left_it(client, payment):
    ids = await leave(client, policy="run")
    assert await payment() == PROMPT + ANSWER
    for headers in ({}, {"last-event-id": ids[-1]}):
        await read(await client.get(path_of(ids[-1]), headers=headers))
        assert await payment() == 0
    headers = {"idempotency-key": "mine"}
    assert (await client.post("/generate_stream", json=BODY, headers=headers)).status == 200
    assert await payment() == 0


async def test_what_runs_on_behind_a_false_claim_is_paid_too(client, payment):
    headers = {"last-event-id": "free:0-00", "x-on-disconnect": "run"}
    await read(await client.post("/generate_stream", json=BODY, headers=headers))
    assert await payment() == PROMPT + ANSWER
