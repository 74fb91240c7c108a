"""Every script against a plain model of what it should do, over drawn histories: on a real server and on the simulated one."""

import contextvars
import random

import pytest
import redis as sync_redis
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from common.codec import encode_frame
from common.errors import Overloaded
from common.messages import Failure, Finish, FinishReason, Frame
from common.redis_keys import ModelKeys
from common.request_queue import (
    CANCELLED_FRAME,
    POISON_FRAME,
    Append,
    Appended,
    Entry,
    Lease,
    RequestQueue,
)
from tests.requests import a_request, frames_of
from tests.simulation.lua import Lua
from tests.simulation.memory_broker import MemoryBroker
from tests.simulation.network import SimNetwork, Weather
from tests.simulation.oracle import Oracle, OracleEntry
from tests.simulation.virtual_loop import PROCESS, VirtualLoop

WORKERS = ("w1", "w2", "w3")
IDS = tuple(f"request-{number}" for number in range(6))
FRAMES = {request_id: frames_of(request_id, list("abcdef")) for request_id in IDS}
MAX_WAITING = 4
_ALIVE_MS = 1_000_000_000  # longer than a history takes


class Transitions(RuleBasedStateMachine):
    """`make` gives a function that runs coroutines, and a RequestQueue on an empty broker."""

    def __init__(self, make) -> None:
        super().__init__()
        self.run, self.client, self.close = make()
        self.keys = ModelKeys("model")
        self.queue = RequestQueue(self.client, self.keys)
        self.run(self.queue.create_group())
        self.oracle = Oracle(len(self.keys.queues))
        self.delivered: list[tuple[str, Entry, int, OracleEntry]] = []
        self.leases: list[tuple[str, Lease]] = []

    def teardown(self) -> None:
        self.close()

    @rule(request_id=st.sampled_from(IDS), priority=st.integers(0, 2))
    def enqueue(self, request_id: str, priority: int) -> None:
        expected = self.oracle.enqueue(request_id, priority, MAX_WAITING)
        request = a_request(id=request_id, priority=priority)
        try:
            found = (
                "OK"
                if self.run(self.queue.enqueue(request, max_waiting=MAX_WAITING))
                else "DUPLICATE"
            )
        except Overloaded:
            found = "FULL"
        assert found == expected

    @rule(worker=st.sampled_from(WORKERS), count=st.integers(1, 3))
    def fetch(self, worker: str, count: int) -> None:
        before = {id(entry) for queue in self.oracle.queues for entry in queue if entry.consumer}
        expected = self.oracle.fetch(worker, count)
        found = self.run(self.queue.fetch(worker, count=count))
        assert [entry.request_id for entry in found] == expected
        fresh = [
            (number, entry)
            for number, queue in enumerate(self.oracle.queues)
            for entry in queue
            if entry.consumer and id(entry) not in before
        ]
        for entry, (number, known) in zip(found, fresh, strict=True):
            self.delivered.append((worker, entry, number, known))

    @rule(worker=st.sampled_from(WORKERS), request_id=st.sampled_from(IDS))
    def begin(self, worker: str, request_id: str) -> None:
        """The usual way of a request, so that histories get far."""
        self.enqueue(request_id, 1)
        self.fetch(worker, 3)
        for item in list(self.delivered):
            if item[0] == worker:
                self._lease(worker, item, repeats=False)

    @precondition(lambda self: self.delivered)
    @rule(data=st.data(), repeats=st.booleans(), is_foreign=st.booleans())
    def lease(self, data, repeats: bool, is_foreign: bool) -> None:
        """Also a second time, and now and then by a worker to whom the entry was not delivered."""
        item = data.draw(st.sampled_from(self.delivered[-4:]))
        worker = data.draw(st.sampled_from(WORKERS)) if is_foreign else item[0]
        self._lease(worker, item, repeats=repeats)

    def _lease(self, worker: str, item: tuple, *, repeats: bool) -> None:
        _, entry, number, known = item
        if not any(each is known for each in self.oracle.queues[number]):
            return  # acknowledged meanwhile: LEASE would only acknowledge it again
        frames = {"cancelled": CANCELLED_FRAME, "poison": POISON_FRAME}
        for _ in range(1 + repeats):
            if not any(item is known for item in self.oracle.queues[number]):
                return
            leases = self.run(self.queue.lease(worker, [entry]))
            token = leases[0].token if leases else "none"
            expected = self.oracle.lease(worker, number, known, token, frames)
            assert bool(leases) == (expected == "OK"), expected
            if leases:
                journal = self.oracle.requests[entry.request_id].journal
                assert [encode_frame(frame) for frame in leases[0].frames] == journal
                self.leases.append((worker, leases[0]))

    @precondition(lambda self: self.leases)
    @rule(
        data=st.data(),
        offset=st.sampled_from((0, 0, 0, 0, -1, 1)),
        kind=st.sampled_from("aaattffx"),
    )
    def append(self, data, offset: int, kind: str) -> None:
        """By its holder or a former one, at the right place or a wrong one; kinds: append, touch, finished, failed."""
        self._append(data, offset, kind)

    def _append(self, data, offset: int, kind: str) -> None:
        holders = [
            lease
            for _, lease in self.leases
            if self.oracle.requests[lease.request.id].token == lease.token
        ]
        former = [lease for _, lease in self.leases[-3:]]
        lease = data.draw(st.sampled_from(holders * 3 + former))
        request_id = lease.request.id
        known = self.oracle.requests.get(request_id)
        base = max(0, (len(known.journal) if known else 0) + offset)
        frame = {
            "a": FRAMES[request_id][min(base, 4)],
            "t": None,
            "f": Frame(chain=b"12345678", finish=Finish(FinishReason.LENGTH, base)),
            "x": Frame(failure=Failure("generation", "it broke")),
        }[kind]
        name = {"a": "append", "t": "touch", "f": "finished", "x": "failed"}[kind]
        data_bytes = encode_frame(frame) if frame else b""
        for _ in range(
            1 + (kind in "fx" or data.draw(st.booleans()))
        ):  # a retry: the reply was lost
            append = Append(request_id, lease.token, lease.queue, base, frame)
            [found] = self.run(self.queue.append([append], patience_s=1))
            expected = self.oracle.step(
                request_id, lease.token, base, name, data_bytes, CANCELLED_FRAME
            )
            assert _same(found, expected), (found, expected)

    @rule(data=st.data(), num_frames=st.integers(1, 3))
    def decode(self, data, num_frames: int) -> None:
        """Some frames of a holder, each perhaps sent twice."""
        for _ in range(num_frames if self.leases else 0):
            self._append(data, 0, "a")

    @rule(request_id=st.sampled_from(IDS))
    def cancel(self, request_id: str) -> None:
        expected = self.oracle.cancel(request_id, CANCELLED_FRAME)
        assert self.run(self.queue.cancel(request_id)) == expected

    @precondition(lambda self: self.leases)
    @rule(data=st.data())
    def release(self, data) -> None:
        _, lease = data.draw(st.sampled_from(self.leases[-3:]))
        expected = self.oracle.release(lease.request.id, lease.token)
        found = self.run(self.queue.release(lease.token, lease.queue, lease.request.id))
        assert found == expected

    @rule(worker=st.sampled_from(WORKERS))
    def beat(self, worker: str) -> None:
        self.run(self.client.set(self.keys.heartbeat(worker), _ALIVE_MS, px=_ALIVE_MS))
        self.oracle.alive.add(worker)

    @rule(worker=st.sampled_from(WORKERS))
    def die(self, worker: str) -> None:
        self.run(self.client.delete(self.keys.heartbeat(worker)))
        self.oracle.alive.discard(worker)

    @rule()
    def reap(self) -> None:
        assert self.run(self.queue.revoke_abandoned()) == self.oracle.reap()

    @rule(worker=st.sampled_from(WORKERS))
    def look_back(self, worker: str) -> None:
        """What a worker finds that it does not know of is exactly what was delivered to it."""
        found = self.run(self.queue.delivered(worker, known=()))
        expected = [e.request_id for q in self.oracle.queues for e in q if e.consumer == worker]
        assert sorted(entry.request_id for entry in found) == sorted(expected)

    @rule(request_id=st.sampled_from(IDS))
    def lose_tail(self, request_id: str) -> None:
        known = self.oracle.requests.get(request_id)
        if known and known.state == "running":
            self.oracle.lose_tail(request_id)
            self.run(self.client.rpop(self.keys.journal(request_id)))

    @rule()
    def flush_scripts(self) -> None:
        self.run(self.client.script_flush())

    @invariant()
    def journals_and_states_agree(self) -> None:
        for request_id, known in self.oracle.requests.items():
            assert (
                self.run(self.client.lrange(self.keys.journal(request_id), 0, -1)) == known.journal
            )
            row = self.run(self.client.hgetall(self.keys.request(request_id)))
            assert (row[b"state"].decode(), row[b"token"].decode()) == (known.state, known.token)

    @invariant()
    def depth_agrees(self) -> None:
        depth = self.run(self.queue.depth())
        assert depth.waiting == self.oracle.num_waiting
        assert depth.running == sum(bool(e.consumer) for q in self.oracle.queues for e in q)


def _same(found: Appended, expected: int | list[bytes]) -> bool:
    if isinstance(expected, list):
        return [encode_frame(frame) for frame in found.ahead] == expected
    if expected >= 0:
        return found.is_ok
    if expected == -1:
        return found.is_fenced
    return found.is_cancelled if expected == -2 else found.resend_from == -1_000_000 - expected


def _play(make, *, histories: int) -> None:
    run_state_machine_as_test(
        lambda: Transitions(make),
        settings=settings(
            max_examples=histories,
            stateful_step_count=40,
            deadline=None,
            derandomize=True,
            suppress_health_check=list(HealthCheck),
        ),
    )


def test_scripts_do_what_the_model_says_in_simulation():
    from common.redis_client import open_redis

    lua = Lua()

    class Anybody:
        stopped_until = 0.0

        async def turn(self) -> None:
            """It always runs."""

    def make():
        draw = random.Random(0)
        loop = VirtualLoop(draw)
        loop.network = SimNetwork(MemoryBroker(lua, loop.time), draw, Weather())
        PROCESS.set(Anybody())
        client = open_redis("unix:///simulated")

        def close() -> None:
            loop.run_until_complete(client.aclose())
            loop.close()

        return loop.run_until_complete, client, close

    context = contextvars.copy_context()  # what a history sets must not reach other tests
    context.run(_play, make, histories=60)


@pytest.mark.redis
def test_scripts_do_what_the_model_says_on_a_server(redis_server: str):
    import asyncio

    from common.redis_client import open_redis

    def make():
        with sync_redis.Redis(unix_socket_path=redis_server.removeprefix("unix://")) as server:
            server.flushall()
        loop = asyncio.new_event_loop()
        client = open_redis(redis_server)

        def close() -> None:
            loop.run_until_complete(client.aclose())
            loop.close()

        return loop.run_until_complete, client, close

    _play(make, histories=50)
