"""The queue's transitions against a real broker: who may do what, in which state, and how often."""

import asyncio

import pytest
from redis.asyncio import Redis

from common.errors import Overloaded, Unavailable
from common.lua import Scripts
from common.redis_client import open_redis
from common.redis_keys import ModelKeys
from common.request_queue import MAX_ATTEMPTS, MAX_STALLED, Append, Lease, RequestQueue
from common.request_store import RequestStore
from common.token_journal import TokenJournal
from tests.requests import a_request, frames_of

pytestmark = pytest.mark.redis


@pytest.fixture
async def queue(redis: Redis, keys: ModelKeys) -> RequestQueue:
    queue = RequestQueue(redis, keys)
    await queue.create_group()
    return queue


async def take(queue: RequestQueue, worker: str = "w1") -> Lease | None:
    leases = await queue.lease(worker, await queue.fetch(worker, count=1))
    return leases[0] if leases else None


def an_append(lease: Lease, base: int, frame=None) -> Append:
    return Append(lease.request.id, lease.token, lease.queue, base, frame)


async def put(queue: RequestQueue, lease: Lease, base: int, frame=None):
    return (await queue.append([an_append(lease, base, frame)], patience_s=1))[0]


async def journal(redis: Redis, keys: ModelKeys, request_id: str):
    return await TokenJournal(redis, keys, subscriber=None).read(request_id)


async def test_request_goes_through_the_queue_once(
    queue: RequestQueue, redis: Redis, keys: ModelKeys
):
    request = a_request()
    assert await queue.enqueue(request, max_waiting=10)
    assert not await queue.enqueue(request, max_waiting=10), "the same id again attaches"
    assert (await queue.depth()).waiting == 1

    lease = await take(queue)
    assert lease.request == request and lease.frames == ()
    assert await take(queue, "w2") is None
    assert (await queue.depth()).running == 1

    frames = frames_of(request.id, ["a", "b"])
    for index, frame in enumerate(frames):
        assert (await put(queue, lease, index, frame)).is_ok
    assert await journal(redis, keys, request.id) == frames
    depth = await queue.depth()
    assert (depth.waiting, depth.running) == (0, 0)
    assert await redis.hget(keys.request(request.id), "state") == b"finished"


async def test_enqueueing_notes_who_reads_the_stream(
    queue: RequestQueue, redis: Redis, keys: ModelKeys
):
    request = a_request()
    assert await queue.enqueue(request, max_waiting=10, watcher="first")
    assert not await queue.enqueue(request, max_waiting=10, watcher="second")
    assert await redis.smembers(keys.watchers(request.id)) == {b"first", b"second"}
    assert 0 < await redis.pttl(keys.watchers(request.id)) <= 60_000
    assert await RequestStore(redis, keys).unwatch(request.id, "first") == 1


async def test_entry_and_state_are_readable(queue: RequestQueue, redis: Redis, keys: ModelKeys):
    request = a_request(tenant="acme")
    await queue.enqueue(request, max_waiting=10)
    [(_, fields)] = await redis.xrange(keys.queue(1))
    assert fields[b"id"] == request.id.encode()
    assert (fields[b"prompt_tokens"], fields[b"max_new_tokens"], fields[b"tenant"]) == (
        b"3",
        b"8",
        b"acme",
    )
    assert await redis.hget(keys.request(request.id), "state") == b"queued"


async def test_queue_is_bounded(queue: RequestQueue):
    for _ in range(3):
        await queue.enqueue(a_request(), max_waiting=3)
    with pytest.raises(Overloaded) as refused:
        await queue.enqueue(a_request(priority=0), max_waiting=3)
    assert refused.value.retry_after_s >= 1
    await take(queue)
    assert await queue.enqueue(a_request(), max_waiting=3), "a running request does not count"


async def test_bound_holds_before_any_worker_came(redis: Redis, keys: ModelKeys):
    queue = RequestQueue(redis, keys)
    await queue.enqueue(a_request(), max_waiting=1)
    with pytest.raises(Overloaded):
        await queue.enqueue(a_request(), max_waiting=1)
    await queue.create_group()
    assert await take(queue) is not None, "a group made later sees what came before"


async def test_priorities_are_served_in_order(queue: RequestQueue):
    for priority in (2, 1, 0, 1):
        await queue.enqueue(a_request(priority=priority), max_waiting=10)
    leases = await queue.lease("w1", await queue.fetch("w1", count=3))
    assert [lease.request.priority for lease in leases] == [0, 1, 1]


async def test_waiting_worker_gets_a_request_at_once(queue: RequestQueue):
    waiting = asyncio.create_task(queue.wait("w1"))
    request = a_request()
    await queue.enqueue(request, max_waiting=10)
    [entry] = await waiting
    assert entry.request_id == request.id


async def test_retry_of_an_append_after_a_lost_reply(
    queue: RequestQueue, redis: Redis, keys: ModelKeys
):
    await queue.enqueue(a_request(), max_waiting=10)
    lease = await take(queue)
    frames = frames_of(lease.request.id, ["a", "b", "c"])
    await put(queue, lease, 0, frames[0])
    again = await put(queue, lease, 0, frames[0])
    assert again.ahead == (frames[0],), "the journal says what it already holds"
    await put(queue, lease, 1, frames[1])
    await put(queue, lease, 2, frames[2])
    assert (await put(queue, lease, 2, frames[2])).is_ok, "the retry of the last frame is no fault"
    assert await journal(redis, keys, lease.request.id) == frames


async def test_old_holder_is_fenced(queue: RequestQueue, redis: Redis, keys: ModelKeys):
    await queue.enqueue(a_request(), max_waiting=10)
    old = await take(queue)
    frames = frames_of(old.request.id, ["a", "b", "c"])
    await put(queue, old, 0, frames[0])
    assert await queue.revoke_abandoned() == 1, "w1 has no heartbeat"
    assert (await put(queue, old, 1, frames[1])).is_fenced

    new = await take(queue, "w2")
    assert new.frames == (frames[0],), "the next holder goes on from the journal"
    assert (await put(queue, old, 1, frames[1])).is_fenced
    assert (await put(queue, new, 1, frames[1])).is_ok
    assert await journal(redis, keys, old.request.id) == frames[:2]


async def test_living_worker_is_not_revoked(queue: RequestQueue, redis: Redis, keys: ModelKeys):
    await queue.enqueue(a_request(), max_waiting=10)
    lease = await take(queue)
    await redis.set(keys.heartbeat("w1"), 5000, px=5000)
    assert await queue.revoke_abandoned() == 0
    assert (await put(queue, lease, 0, frames_of(lease.request.id, ["a"])[0])).is_ok


async def test_released_request_goes_to_the_front(queue: RequestQueue):
    first, second = a_request(), a_request()
    await queue.enqueue(first, max_waiting=10)
    lease = await take(queue)
    await queue.enqueue(second, max_waiting=10)
    assert await queue.release(lease.token, lease.queue, first.id)
    assert not await queue.release(lease.token, lease.queue, first.id), "it is not held any more"
    assert (await take(queue, "w2")).request == first


async def test_cancel_of_a_queued_request_ends_it(
    queue: RequestQueue, redis: Redis, keys: ModelKeys
):
    request = a_request()
    await queue.enqueue(request, max_waiting=10)
    assert await queue.cancel(request.id)
    assert not await queue.cancel(request.id)
    [frame] = await journal(redis, keys, request.id)
    assert frame.failure.kind == "cancelled"
    assert await take(queue) is None, "the entry is skipped"
    assert (await queue.depth()).running == 0


async def test_cancel_of_a_running_request_reaches_its_worker(
    queue: RequestQueue, redis, keys: ModelKeys
):
    await queue.enqueue(a_request(), max_waiting=10)
    lease = await take(queue)
    frames = frames_of(lease.request.id, ["a", "b", "c"])
    await put(queue, lease, 0, frames[0])
    assert (await put(queue, lease, 1)).is_ok, "a touch writes nothing"
    assert await queue.cancel(lease.request.id)
    assert (await put(queue, lease, 1)).is_cancelled, "and tells of the cancel"
    assert (await put(queue, lease, 1, frames[1])).is_fenced
    assert [frame.is_terminal for frame in await journal(redis, keys, lease.request.id)] == [
        False,
        True,
    ]
    assert (await queue.depth()).running == 0


async def test_request_past_its_deadline_fails(queue: RequestQueue, redis: Redis, keys: ModelKeys):
    request = a_request(deadline_s=-1.0)
    await queue.enqueue(request, max_waiting=10)
    assert await take(queue) is None
    [frame] = await journal(redis, keys, request.id)
    assert frame.failure.kind == "deadline"


async def test_request_that_kills_its_workers_becomes_a_dead_letter(
    queue: RequestQueue, redis, keys: ModelKeys
):
    request = a_request()
    await queue.enqueue(request, max_waiting=10)
    for attempt in range(3):
        assert await take(queue, f"w{attempt}") is not None
        assert await queue.revoke_abandoned() == 1
    assert await take(queue, "w4") is None
    [(_, letter)] = await redis.xrange(keys.dead_letters)
    assert letter[b"id"] == request.id.encode() and letter[b"reason"] == b"no progress"
    [frame] = await journal(redis, keys, request.id)
    assert frame.failure.kind == "generation"


async def test_progress_forgives_earlier_attempts(queue: RequestQueue):
    await queue.enqueue(a_request(), max_waiting=10)
    frames = None
    for attempt in range(6):
        lease = await take(queue, f"w{attempt}")
        frames = frames or frames_of(lease.request.id, list("abcdefgh"))
        await put(queue, lease, attempt, frames[attempt])
        await queue.revoke_abandoned()
    assert await take(queue) is not None


async def test_every_key_of_a_request_expires(queue: RequestQueue, redis: Redis, keys: ModelKeys):
    await queue.enqueue(a_request(), max_waiting=10)
    lease = await take(queue)
    frames = frames_of(lease.request.id, ["a", "b"])
    await put(queue, lease, 0, frames[0])
    names = [keys.request(lease.request.id), keys.journal(lease.request.id)]
    live = [await redis.pttl(name) for name in names]
    assert all(3600_000 < ttl <= 4200_000 for ttl in live), live
    await put(queue, lease, 1, frames[1])
    done = [await redis.pttl(name) for name in names]
    assert all(0 < ttl <= 600_000 for ttl in done), done


async def test_rolled_back_journal_asks_for_the_missing_frames(
    queue: RequestQueue, redis, keys: ModelKeys
):
    await queue.enqueue(a_request(), max_waiting=10)
    lease = await take(queue)
    frames = frames_of(lease.request.id, ["a", "b", "c"])
    await put(queue, lease, 0, frames[0])
    await put(queue, lease, 1, frames[1])
    await redis.rpop(keys.journal(lease.request.id))
    assert (await put(queue, lease, 2, frames[2])).resend_from == 1


async def test_scripts_survive_a_flushed_script_cache(queue: RequestQueue, redis: Redis):
    await queue.enqueue(a_request(), max_waiting=10)
    await redis.script_flush()
    assert await take(queue) is not None


async def test_missing_broker_is_an_error_within_the_patience(keys: ModelKeys, tmp_path):
    redis = open_redis(f"unix://{tmp_path}/nobody.sock")
    queue = RequestQueue(redis, keys, scripts=Scripts(redis, patience_s=0.1))
    with pytest.raises(Unavailable):
        await queue.enqueue(a_request(), max_waiting=10)
    await redis.aclose()


async def test_who_told_nothing_before_its_worker_died_is_a_suspect(queue: RequestQueue):
    silent, talking = a_request(), a_request()
    for request in (silent, talking):
        await queue.enqueue(request, max_waiting=10)
    leases = await queue.lease("w1", await queue.fetch("w1", count=2))
    [lease] = [lease for lease in leases if lease.request.id == talking.id]
    await put(queue, lease, 0, frames_of(talking.id, ["a", "b"])[0])
    await queue.revoke_abandoned()
    entries = await queue.fetch("w2", count=2)
    suspects = {silent.id: True, talking.id: False}
    assert {entry.request_id: entry.is_suspect for entry in entries} == suspects
    await queue.lease("w2", [entry for entry in entries if not entry.is_suspect])
    await queue.revoke_abandoned()
    entries = await queue.fetch("w3", count=2)
    assert {entry.request_id: entry.is_suspect for entry in entries}[silent.id], "still not tried"


async def test_heartbeat_from_before_the_clock_was_set_back_holds_for_one_lease(
    queue: RequestQueue, redis: Redis, keys: ModelKeys
):
    await queue.enqueue(a_request(), max_waiting=10)
    await take(queue, "w1")
    await redis.set(keys.heartbeat("w1"), 5000, px=5000 + 3_600_000)
    assert await queue.revoke_abandoned() == 0, "its worker may live, and gets a lease to say so"
    assert 0 < await redis.pttl(keys.heartbeat("w1")) <= 5000
    await redis.delete(keys.heartbeat("w1"))
    assert await queue.revoke_abandoned() == 1


async def test_worker_that_outlives_its_lease_was_not_ended_by_its_request(
    queue: RequestQueue, redis: Redis, keys: ModelKeys
):
    """As when the broker's clock jumps: heartbeats run out, but nobody died."""
    request = a_request()
    await queue.enqueue(request, max_waiting=10)
    frame = frames_of(request.id, ["a"])[0]
    for turn in range(2 * MAX_ATTEMPTS):
        lease = await take(queue, f"w{turn % 2}")
        await queue.revoke_abandoned()
        for _ in range(2):  # the reply of the first was lost
            assert (await put(queue, lease, 0, frame)).is_fenced
    assert await redis.hmget(keys.request(request.id), "stalled", "attempts") == [b"0", b"0"]
    for turn in range(MAX_STALLED):
        await take(queue, f"dies-{turn}")
        await queue.revoke_abandoned()
    assert await take(queue) is None, "three workers did die"
    assert await redis.xlen(keys.dead_letters) == 1


async def test_worker_that_leases_again_what_it_lost_is_alive(
    queue: RequestQueue, redis: Redis, keys: ModelKeys
):
    request = a_request()
    await queue.enqueue(request, max_waiting=10)
    for _ in range(2 * MAX_STALLED):
        lost = await take(queue, "w1")
        await queue.revoke_abandoned()
    await take(queue, "w1")
    await put(queue, lost, 0)
    assert await redis.hget(keys.request(request.id), "stalled") == b"1", (
        "if it ends now, that counts"
    )
