"""A short run of the fuzzers at a fixed seed; `make fuzz` runs them for long, at a new one."""

import random

import pytest

from tests.fuzz.arena import open_arena
from tests.fuzz.http_answers import NotHttp, answers_in
from tests.fuzz.raw_http import shoot
from tests.fuzz.schema_cases import SHORT, run_cases

SEED = 20_26


@pytest.fixture
async def arena(tmp_path):
    async with open_arena(tmp_path) as arena:
        yield arena


@pytest.mark.slow
@pytest.mark.redis
@pytest.mark.timeout(300)
async def test_gateway_stands(arena, tmp_path):
    """Both fuzzers on one fleet: starting one takes most of the time."""
    num_cases = await run_cases(
        arena.url, seed=SEED, max_examples=20, phases=SHORT, folder=tmp_path
    )
    assert num_cases >= 250
    assert await shoot(arena, seed=SEED, seconds=6) > 50
    await arena.check()


def test_reader_of_answers():
    ok = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi"
    chunked = b"HTTP/1.1 400 Bad\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nhi\r\n0\r\n\r\n"
    first, second = answers_in(b"HTTP/1.1 100 Continue\r\n\r\n" + ok + chunked)
    assert (first.status, first.body, first.is_whole) == (200, b"hi", True)
    assert (second.status, second.body, second.is_whole) == (400, b"hi", True)
    assert not answers_in(chunked[:-7])[0].is_whole and not answers_in(ok[:-1])[0].is_whole
    with pytest.raises(AssertionError):
        second.check()
    for spoiled in (ok[1:], ok.replace(b": ", b" "), b"x" + chunked, chunked.replace(b"hi", b"h")):
        with pytest.raises(NotHttp):
            answers_in(spoiled)


def test_cases_can_be_replayed():
    from tests.fuzz.requests import spoiled_request

    def draw(number: int) -> bytes:
        return spoiled_request(random.Random(f"7/{number}"))

    assert [draw(n) for n in range(50)] == [draw(n) for n in range(50)]
    assert len({draw(n) for n in range(50)}) > 40
