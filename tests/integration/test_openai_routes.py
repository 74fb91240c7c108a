"""OpenAI's streams against a broker and an echo worker: what becomes of them when clients leave and come back."""

import asyncio
import json
from collections.abc import AsyncIterator

import aiohttp
import pytest

from tests.fleet import Fleet

pytestmark = [pytest.mark.redis, pytest.mark.usefixtures("deadline")]

MESSAGES = [{"role": "user", "content": "abcdefghij"}]
LONG = {"messages": MESSAGES, "stream": True, "max_tokens": 3000, "ignore_eos": True}


@pytest.fixture
async def session(redis_url: str) -> AsyncIterator[aiohttp.ClientSession]:
    fleet = Fleet(redis_url)
    try:
        await fleet.worker("--echo-delay-ms", "20")
        url = await fleet.gateway("--keep-alive-s", "0.01")
        async with aiohttp.ClientSession(url) as session:
            yield session
    finally:
        await fleet.stop()


async def lines_of(response: aiohttp.ClientResponse) -> AsyncIterator[str]:
    async for line in response.content:
        yield line.decode().rstrip("\n")


async def state_of(session: aiohttp.ClientSession, request_id: str) -> str:
    async with session.get(f"/requests/{request_id}") as answer:
        return (await answer.json())["state"]


async def test_client_that_leaves_ends_all_choices(session):
    async with session.post("/v1/chat/completions", json={**LONG, "n": 2}) as response:
        request_id = response.headers["x-request-id"]
        seen: set[int] = set()
        async for line in lines_of(response):
            if line.startswith("data:"):
                seen |= {choice["index"] for choice in json.loads(line[5:])["choices"]}
            if seen == {0, 1}:
                break
        response.close()
    for number in (0, 1):
        while await state_of(session, f"{request_id}-{number}") != "cancelled":
            await asyncio.sleep(0.02)  # nothing announces it over HTTP


async def test_client_that_comes_back_misses_nothing_and_hears_nothing_twice(session):
    body = {"messages": MESSAGES, "stream": True, "stream_options": {"include_usage": True}}
    headers = {"idempotency-key": "once"}
    seen, last_id, has_comment = [], "", False
    async with session.post("/v1/chat/completions", json=body, headers=headers) as response:
        async for line in lines_of(response):
            has_comment |= line == ":"
            if line.startswith("id:"):
                last_id = line[3:].strip()
            elif line.startswith("data:"):
                seen.append(json.loads(line[5:]))
                if len(seen) == 4 and last_id:
                    break
        response.close()
    assert has_comment, "silence is filled with comments"

    headers["last-event-id"] = last_id
    async with session.post("/v1/chat/completions", json=body, headers=headers) as response:
        rest = [line[5:] async for line in lines_of(response) if line.startswith("data:")]
    assert rest[-1].strip() == "[DONE]"
    chunks = [*seen, *map(json.loads, rest[:-1])]
    deltas = [choice["delta"] for chunk in chunks for choice in chunk["choices"]]
    assert "".join(delta.get("content", "") for delta in deltas) == "abcdefghij"
    assert [delta["role"] for delta in deltas if "role" in delta] == ["assistant"]
    assert len({(chunk["id"], chunk["created"]) for chunk in chunks}) == 1
    assert chunks[-1]["usage"]["completion_tokens"] == 11


async def test_request_of_a_chat_can_be_read_by_its_id(session):
    body = {"messages": MESSAGES, "max_tokens": 3}
    headers = {"idempotency-key": "by id"}
    async with session.post("/v1/chat/completions", json=body, headers=headers) as response:
        assert (await response.json())["choices"][0]["message"]["content"] == "abc"
        request_id = response.headers["x-request-id"]
    async with session.get(f"/requests/{request_id}/stream") as response:
        events = [json.loads(line[5:]) async for line in lines_of(response) if line[:5] == "data:"]
    assert events[-1]["generated_text"] == "abc"
