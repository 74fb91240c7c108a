"""Clients that come back: to another gateway, with a key, by the request's id, or not at all."""

import asyncio
import signal

import aiohttp
import pytest
from redis.asyncio import Redis

from common.client import FleetClient
from common.codec import decode_frame
from common.messages import OnDisconnect, RequestState, Stopping
from common.redis_keys import ModelKeys
from common.request_queue import RequestQueue
from common.request_store import RequestStore
from tests.fleet import Fleet, events_in, place_of
from tests.requests import a_request

pytestmark = [pytest.mark.redis, pytest.mark.usefixtures("long_deadline")]

KEYS = ModelKeys("echo")
TEXT = "The quick brown fox jumps over the lazy dog. "


def body_of(text: str = TEXT, **parameters) -> dict:
    return {"inputs": text, "parameters": {"max_new_tokens": 40, **parameters}}


async def events_of(answer: aiohttp.ClientResponse, count: int | None = None) -> list:
    """`(id, data)` of a response, up to `count` of them."""
    found = []
    async for event in events_in(answer):
        found.append(event)
        if len(found) == count:
            break
    return found


def text_of(events: list) -> str:
    return "".join(data["token"]["text"] for _, data in events)


async def state_of(session: aiohttp.ClientSession, url: str, request_id: str) -> dict:
    async with session.get(f"{url}/requests/{request_id}") as answer:
        return {"status": answer.status, **await answer.json()}


async def until_state(redis: Redis, request_id: str, state: bytes) -> None:
    while await redis.hget(KEYS.request(request_id), "state") != state:
        await asyncio.sleep(0.02)  # a state has no channel to wait on


async def test_client_reads_on_when_its_gateway_is_killed(fleet: Fleet):
    await fleet.worker("--echo-delay-ms", "20")
    urls = await asyncio.gather(fleet.gateway(), fleet.gateway())
    loop, events, gaps = asyncio.get_running_loop(), [], []
    async with FleetClient(*urls) as client:
        last_at = loop.time()
        async for event in client.stream(TEXT, parameters={"max_new_tokens": 40}):
            gaps.append(loop.time() - last_at)
            last_at = loop.time()
            events.append(event)
            if len(events) == 10:
                await next(_gateway_at(fleet, urls[0])).stop(signal.SIGKILL)
    assert [event["index"] for event in events] == list(range(1, 41))
    assert events[-1]["generated_text"] == TEXT[:40]
    assert max(gaps[1:]) < 1.0


def _gateway_at(fleet: Fleet, url: str):
    port = url.rpartition(":")[2]
    return (
        process
        for process in fleet.processes
        if process.name == "gateway" and any(port in line for line in process.lines)
    )


async def test_coming_back_by_id(fleet: Fleet, session: aiohttp.ClientSession):
    await fleet.worker("--echo-delay-ms", "10")
    one, two = await asyncio.gather(fleet.gateway(), fleet.gateway())
    headers = {"x-on-disconnect": "grace"}
    async with session.post(f"{one}/generate_stream", json=body_of(), headers=headers) as answer:
        request_id = answer.headers["x-request-id"]
        before = await events_of(answer, 8)
    url, last = f"{two}/requests/{request_id}/stream", before[-1][0]
    async with session.get(url, headers={"last-event-id": last}) as answer:
        assert answer.status == 200 and answer.headers["x-request-id"] == request_id
        after = await events_of(answer)
    assert [place_of(event_id) for event_id, _ in before + after] == list(range(40))
    assert text_of(before + after) == TEXT[:40] == after[-1][1]["generated_text"]
    assert [data["index"] for _, data in after] == list(range(9, 41))

    async with session.get(url) as answer:
        assert await events_of(answer) == before + after, "all over again, byte for byte"
    async with session.get(url, headers={"last-event-id": after[-1][0]}) as answer:
        assert answer.status == 204
    wrong = f"{request_id}:7-{'00' * 8}"
    async with session.get(url, headers={"last-event-id": wrong}) as answer:
        assert answer.status == 409 and (await answer.json())["error_type"] == "stream_diverged"
    for bad in ("nonsense", f"other:7-{'00' * 8}", f"{request_id}:x-00"):
        async with session.get(url, headers={"last-event-id": bad}) as answer:
            assert answer.status == 422, bad
    async with session.get(f"{two}/requests/unknown/stream") as answer:
        assert answer.status == 404 and (await answer.json())["error_type"] == "request_not_found"

    status = await state_of(session, two, request_id)
    assert (status["state"], status["attempts"], status["generated_tokens"]) == ("finished", 1, 40)
    assert status["finish_reason"] == "length"


async def test_two_readers_of_one_request(fleet: Fleet, session, redis: Redis):
    await fleet.worker("--echo-delay-ms", "10")
    url = await fleet.gateway()
    async with session.post(f"{url}/generate_stream", json=body_of()) as first:
        request_id = first.headers["x-request-id"]
        await events_of(first, 3)
        second = await session.get(f"{url}/requests/{request_id}/stream")
        assert (await events_of(second, 1))[0][1]["index"] == 1
        while await redis.scard(KEYS.watchers(request_id)) < 2:
            await asyncio.sleep(0.01)  # noted in the background
    rest = await events_of(second)
    assert rest[-1][1]["generated_text"] == TEXT[:40], "one left, the other still reads"


async def test_ten_at_once_with_one_key_are_one_generation(fleet: Fleet, session, redis: Redis):
    await fleet.worker("--echo-delay-ms", "5")
    urls = await asyncio.gather(fleet.gateway(), fleet.gateway())
    headers = {"idempotency-key": "order 66"}
    body = body_of(do_sample=True, temperature=0.5, details=True)

    async def ask(number: int) -> tuple[str, list]:
        url = f"{urls[number % 2]}/generate_stream"
        async with session.post(url, json=body, headers=headers) as answer:
            assert answer.status == 200, await answer.text()
            return answer.headers["x-request-id"], await events_of(answer)

    answers = await asyncio.gather(*(ask(number) for number in range(10)))
    assert all(answer == answers[0] for answer in answers)
    assert len([key async for key in redis.scan_iter("fleet:{echo}:request:*")]) == 1
    assert await redis.hget(KEYS.request(answers[0][0]), "attempts") == b"1"

    async with session.post(f"{urls[0]}/generate", json=body, headers=headers) as answer:
        again = await answer.json()
    assert again["generated_text"] == answers[0][1][-1][1]["generated_text"]
    assert again["details"]["seed"] == answers[0][1][-1][1]["details"]["seed"]
    other = body_of("something else")
    for path in ("generate", "generate_stream"):
        async with session.post(f"{urls[1]}/{path}", json=other, headers=headers) as answer:
            assert answer.status == 422
            assert (await answer.json())["error_type"] == "idempotency_conflict"


async def test_repeated_post_goes_on_behind_the_last_event(fleet: Fleet, session):
    await fleet.worker("--echo-delay-ms", "10")
    url = f"{await fleet.gateway()}/generate_stream"
    headers = {"x-on-disconnect": "grace"}
    async with session.post(url, json=body_of(), headers=headers) as answer:
        before = await events_of(answer, 5)
    headers = {"last-event-id": before[-1][0]}
    async with session.post(url, json=body_of(), headers=headers) as answer:
        after = await events_of(answer)
    assert text_of(before + after) == TEXT[:40]
    async with session.post(url, json=body_of(), headers={"x-on-disconnect": "x"}) as answer:
        assert answer.status == 422


async def test_what_becomes_of_a_request_whose_client_left(fleet: Fleet, session, redis: Redis):
    await fleet.worker("--echo-delay-ms", "25")
    url = await fleet.gateway()

    async def left(policy: str) -> str:
        headers = {"x-on-disconnect": policy}
        async with session.post(
            f"{url}/generate_stream", json=body_of(), headers=headers
        ) as answer:
            await events_of(answer, 2)
            return answer.headers["x-request-id"]

    cancel, run, grace = await asyncio.gather(left("cancel"), left("run"), left("grace"))
    await until_state(redis, cancel, b"cancelled")
    await until_state(redis, run, b"finished")
    await until_state(redis, grace, b"finished")  # it takes a second, the grace ten


async def test_delete_ends_a_request(fleet: Fleet, session):
    await fleet.worker("--echo-delay-ms", "25")
    url = await fleet.gateway()
    async with session.post(f"{url}/generate_stream", json=body_of()) as stream:
        request_id = stream.headers["x-request-id"]
        await events_of(stream, 2)
        assert (await state_of(session, url, request_id))["state"] == "running"
        async with session.delete(f"{url}/requests/{request_id}") as answer:
            assert answer.status == 200 and (await answer.json())["cancelled"] is True
        rest = await events_of(stream)
    assert rest[-1][1]["error_type"] == "cancelled" and len(rest) < 5
    async with session.delete(f"{url}/requests/{request_id}") as answer:
        assert (await answer.json())["cancelled"] is False
    async with session.delete(f"{url}/requests/none") as answer:
        assert answer.status == 404


async def test_gateway_that_stops_ends_behind_a_whole_event(fleet: Fleet):
    await fleet.worker("--echo-delay-ms", "50")
    urls = await asyncio.gather(fleet.gateway("--drain-s", "0.2"), fleet.gateway())
    events = []
    async with FleetClient(*urls) as client:
        async for event in client.stream(TEXT, parameters={"max_new_tokens": 30}):
            events.append(event)
            if len(events) == 3:
                next(_gateway_at(fleet, urls[0])).send(signal.SIGTERM)
    assert [event["index"] for event in events] == list(range(1, 31))
    assert events[-1]["generated_text"] == TEXT[:30]
    assert await next(_gateway_at(fleet, urls[0])).process.wait() == 0


async def test_orphans_are_ended(redis: Redis):
    queue, store = RequestQueue(redis, KEYS), RequestStore(redis, KEYS)
    await queue.create_group()
    policies = ("cancel", "grace", "run", "cancel")
    requests = [a_request(model="echo", on_disconnect=OnDisconnect(policy)) for policy in policies]
    for request in requests:
        await queue.enqueue(request, max_waiting=10)
    await queue.lease("w1", await queue.fetch("w1", count=4))
    waiting = a_request(model="echo", on_disconnect=OnDisconnect.GRACE)
    await queue.enqueue(waiting, max_waiting=10)
    await store.watch([(requests[3].id, "somebody")])
    assert not (await store.look_for_orphans()).unwatched, "they are young"
    await asyncio.sleep(0.005)  # time by the broker's clock
    first = await store.look_for_orphans(patience_s=0.001)
    unwatched = [requests[0].id, requests[1].id, waiting.id]
    assert (first.unwatched, first.num_ended) == (frozenset(unwatched), 0), (
        "seen for the first time"
    )
    second = await store.look_for_orphans(patience_s=0.001, seen=first.unwatched)
    assert (second.unwatched, second.num_ended) == (frozenset(), 3)
    cancels = [await redis.hget(KEYS.request(request.id), "cancel") for request in requests]
    assert cancels == [b"1", b"1", None, None]
    assert (await store.status(waiting.id)).state is RequestState.CANCELLED
    assert 0 < await redis.pttl(KEYS.watchers(requests[3].id)) <= 60_000
    assert await store.unwatch(requests[3].id, "somebody") == 0


async def left_behind(fleet: Fleet, session, url: str, headers: dict[str, str]) -> str:
    """Read ten events, then lose the gateway, the worker and everything in the broker; the last id."""
    async with session.post(f"{url}/generate_stream", json=body_of(), headers=headers) as answer:
        before = await events_of(answer, 10)
        await fleet.stop()
    return before[-1][0]


@pytest.mark.parametrize(("salt", "is_same"), [("one", True), ("other", False)])
async def test_nothing_is_spliced_when_every_holder_is_gone(
    fleet: Fleet, session, redis: Redis, salt: str, is_same: bool
):
    await fleet.worker("--echo-delay-ms", "10", "--echo-salt", "one")
    headers = {"idempotency-key": "k"}
    last = await left_behind(fleet, session, await fleet.gateway(), headers)
    await redis.flushall()
    await fleet.worker("--echo-salt", salt)
    url = f"{await fleet.gateway()}/generate_stream"
    headers["last-event-id"] = last
    async with session.post(url, json=body_of(), headers=headers) as answer:
        if answer.status == 409:  # the worker was faster than the first look
            events = [("", await answer.json())]
        else:
            events = await events_of(answer)
    if is_same:
        assert [place_of(event_id) for event_id, _ in events] == list(range(10, 40))
    else:
        assert [data["error_type"] for _, data in events] == ["stream_diverged"]


async def test_request_that_a_worker_cannot_run_is_told_so_and_the_worker_lives(
    fleet: Fleet, redis: Redis
):
    """A gateway refuses it, but the smaller of two workers may get it."""
    worker = await fleet.worker("--max-batch-total-tokens", "64", "--max-total-tokens", "64")
    queue = RequestQueue(redis, KEYS)
    for _ in range(2):  # an idle worker that nothing else wakes
        request = a_request(model="echo", stopping=Stopping(max_new_tokens=100))
        await queue.enqueue(request, max_waiting=10)
        await until_state(redis, request.id, b"failed")
        [frame] = map(decode_frame, await redis.lrange(KEYS.journal(request.id), 0, -1))
        assert (
            frame.failure.kind == "validation" and "<= 64 on this worker" in frame.failure.message
        )
    assert worker.process.returncode is None
