"""The load generator against a server whose every token time is known: it must measure those and no
others.
"""

import asyncio
import itertools
import json
import math
import statistics

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.benchmarks.client import RequestRecord, StreamClient, WallClock
from tests.benchmarks.load import Load, LoadGenerator, poisson_arrivals
from tests.benchmarks.prompts import Prompts, prompts_for
from tests.benchmarks.report import percentile, summarize, table
from tests.benchmarks.sse import EventSplitter
from tests.benchmarks.sse_server import Script, VirtualClock, in_pieces, scripted_server, tgi_events
from tests.benchmarks.targets import error_kind, target_for


async def _send(
    script: Script, *, api: str = "tgi", intended_at: float | None = None
) -> RequestRecord:
    clock = VirtualClock()
    async with (
        scripted_server(lambda body: script, clock) as url,
        StreamClient(url, target_for(api), clock=clock) as client,
        asyncio.timeout(5),
    ):
        return await client.send("a prompt", 4, intended_at=intended_at)


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.text(min_size=1, max_size=8), max_size=4),
    st.integers(1, 9),
    st.sampled_from(["\n", "\r\n"]),
)
def test_events_survive_any_cut(texts, size, newline):
    payloads = [json.dumps({"text": text}) for text in texts]
    lines = [
        f": keep-alive{newline}{newline}id: 1{newline}data: {payload}{newline}"
        for payload in payloads
    ]
    stream = "".join(line + newline for line in lines).encode()
    splitter = EventSplitter()
    events = [
        event
        for start in range(0, len(stream), size)
        for event in splitter.feed(stream[start : start + size])
    ]
    assert [event.decode() for event in events] == payloads
    assert not splitter.has_unfinished_event


def test_an_event_of_several_data_lines_is_one_event():
    assert EventSplitter().feed(b"data: a\ndata:b\n\ndata: c") == [b"a\nb"]


async def test_latencies_are_those_of_the_server():
    gaps_s = [0.25, 0.5, 0.125, 2.0]
    record = await _send(Script(in_pieces(tgi_events(4), gaps_s, size=7)))
    assert record.error is None
    assert record.first_token_s == 0.25
    assert record.gaps_s == [0.5, 0.125, 2.0]
    assert record.whole_s == sum(gaps_s)
    assert (record.num_tokens, record.total_tokens, record.prompt_tokens) == (4, 4, 7)


async def test_latency_counts_from_the_intended_arrival():
    record = await _send(Script(in_pieces(tgi_events(1), [0.25], size=999)), intended_at=-3.0)
    assert record.first_token_s == record.whole_s == 3.25


async def test_tokens_of_one_chunk_have_no_gap():
    events = tgi_events(3)
    record = await _send(Script([(0.5, events[0]), (0.5, events[1] + events[2])]))
    assert record.gaps_s == [0.5, 0.0]


@pytest.mark.parametrize("api", ["openai", "openai-chat"])
async def test_openai_streams_count_text_unless_usage_says_more(api):
    def chunk(text, **rest):
        choice = (
            {"text": text} if api == "openai" else {"delta": {"role": "assistant", "content": text}}
        )
        return b"data: " + json.dumps({"choices": [choice]} | rest).encode() + b"\n\n"

    usage = {"choices": [], "usage": {"prompt_tokens": 5, "completion_tokens": 6}}
    pieces = [(0.5, chunk("")), (0.5, chunk("a")), (0.25, chunk("b")), (0.5, chunk(""))]
    done = (0.0, b"data: [DONE]\n\n")
    record = await _send(
        Script([*pieces, (0.0, b"data: " + json.dumps(usage).encode() + b"\n\n"), done]), api=api
    )
    assert (record.error, record.first_token_s, record.gaps_s) == (None, 1.0, [0.25])
    assert (record.num_tokens, record.prompt_tokens) == (6, 5)
    assert (await _send(Script([*pieces, done]), api=api)).num_tokens == 2


@pytest.mark.parametrize(
    ("script", "kind"),
    [
        (
            Script([(0, b'{"error":"full","error_type":"overloaded"}')], status=429),
            "http 429 overloaded",
        ),
        (Script([(0, b"<html>")], status=502), "http 502"),
        (
            Script([(0, b'data: {"error":"bad","error_type":"generation"}\n\n')]),
            "stream generation",
        ),
        (Script([(0, tgi_events(2)[0])]), "disconnected"),
        (Script([(0, tgi_events(2)[0])], is_cut=True), "disconnected"),
        (Script([(0, b"data: {oops\n\n")]), "bad event"),
    ],
)
async def test_errors_have_a_kind(script, kind):
    record = await _send(script)
    assert record.error == kind


async def test_nobody_listening_and_no_answer_are_errors_of_their_own():
    gone = asyncio.Event()
    async with StreamClient("http://127.0.0.1:1", target_for("tgi"), clock=WallClock()) as client:
        assert (await client.send("a", 1)).error == "connect"

    async def never(reader, writer):
        await gone.wait()
        writer.close()

    async with await asyncio.start_server(never, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        client = StreamClient(
            f"http://127.0.0.1:{port}", target_for("tgi"), clock=WallClock(), timeout_s=0.01
        )
        async with client:
            assert (await client.send("a", 1)).error == "timeout"
        gone.set()


def test_error_bodies_of_both_dialects():
    assert error_kind(b'{"error":"m","error_type":"validation"}') == ("validation", "m")
    assert error_kind(b'{"error":{"message":"m","type":"NotFoundError"}}') == ("NotFoundError", "m")
    assert error_kind(b"nonsense") == ("", "nonsense")


async def test_a_closed_loop_sends_each_request_once_and_never_more_than_its_users_at_once():
    seen, now, peak, turn = [], 0, 0, itertools.count()
    events = [(0.0, event) for event in tgi_events(3)]

    def choose(body):
        nonlocal now, peak
        seen.append(body["inputs"])
        is_refused = next(turn) == 9
        return Script([(0, b"{}")], status=503) if is_refused else Script(events)

    async with scripted_server(choose) as url:
        client = StreamClient(url, target_for("tgi"), clock=WallClock())
        send = client.send

        async def counted(*args, **kwargs):
            nonlocal now, peak
            now += 1
            peak = max(peak, now)
            record = await send(*args, **kwargs)
            now -= 1
            return record

        client.send = counted
        load = Load(prompts_for(None, 8), max_new_tokens=3, num_requests=20)
        async with client, asyncio.timeout(5):
            level = await LoadGenerator(client, load).closed(4, num_warmup=5)
    assert len(seen) == len(set(seen)) == 25  # warm-up included, no prompt twice
    assert peak == 4
    assert (level.num_requests, level.errors, level.output_tokens) == (
        19,
        {"http 503 error": 1},
        57,
    )
    assert level.tokens_per_s == pytest.approx(57 / level.wall_s)
    assert level.first_token_ms.p50 <= level.first_token_ms.p90 <= level.first_token_ms.p99
    assert level.first_token_ms.max <= level.whole_ms.max
    assert "1 x http 503 error" in table([level])
    json.dumps(level.facts, allow_nan=False)


def test_staggered_users_end_their_first_answers_in_turn():
    load = Load(prompts_for(None, 8), max_new_tokens=64, is_staggered=True)
    assert [load.tokens_of(number, 4) for number in range(6)] == [16, 32, 48, 64, 64, 64]
    assert Load(prompts_for(None, 8), max_new_tokens=64).tokens_of(0, 4) == 64


def test_pauses_are_spread_and_the_same_in_every_run():
    load = Load(prompts_for(None, 8), longest_pause_s=0.005)
    pauses = [load.pause_s(number) for number in range(1000)]
    assert 0 <= min(pauses) < 0.0005 and 0.0045 < max(pauses) <= 0.005
    assert sum(pauses) / 1000 == pytest.approx(0.0025, rel=0.1)
    assert pauses == [load.pause_s(number) for number in range(1000)]
    assert Load(prompts_for(None, 8)).pause_s(7) == 0


async def test_an_open_loop_goes_on_asking_while_a_server_stalls():
    num_waiting, all_came = 0, asyncio.Event()

    async def stall(reader, writer):
        nonlocal num_waiting
        await reader.readuntil(b"\r\n\r\n")
        num_waiting += 1
        if num_waiting == 5:
            all_came.set()
        await all_came.wait()
        body = b"".join(tgi_events(2))
        writer.write(
            b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\nconnection: close\r\n\r\n" % len(body) + body
        )
        await writer.drain()
        writer.close()
        await writer.wait_closed()

    async with await asyncio.start_server(stall, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        client = StreamClient(f"http://127.0.0.1:{port}", target_for("tgi"), clock=WallClock())
        load = Load(prompts_for(None, 8), max_new_tokens=2, num_requests=5)
        async with client, asyncio.timeout(5):
            level = await LoadGenerator(client, load).open(500.0)
    assert (level.num_requests, level.errors, level.output_tokens) == (5, {}, 10)


def test_poisson_arrivals_are_repeatable_ordered_and_of_the_asked_rate():
    arrivals = list(poisson_arrivals(20.0, seed=1, duration_s=200.0))
    assert arrivals == list(poisson_arrivals(20.0, seed=1, duration_s=200.0))
    assert arrivals == sorted(arrivals) and arrivals[-1] < 200
    assert len(arrivals) == pytest.approx(4000, rel=0.1)
    gaps = [after - before for before, after in itertools.pairwise(arrivals)]
    mean = sum(gaps) / len(gaps)
    spread = math.sqrt(sum((gap - mean) ** 2 for gap in gaps) / len(gaps))
    assert spread == pytest.approx(mean, rel=0.1)  # exponential: standard deviation equals the mean


@settings(max_examples=25, deadline=None)
@given(st.lists(st.floats(-1e6, 1e6), min_size=2, max_size=50))
def test_percentiles_agree_with_the_standard_library(values):
    ours = [percentile(sorted(values), hundredths / 100) for hundredths in range(1, 100)]
    assert ours == pytest.approx(statistics.quantiles(values, n=100, method="inclusive"), abs=1e-6)
    assert (percentile(sorted(values), 0), percentile(sorted(values), 1)) == (
        min(values),
        max(values),
    )


def test_failed_requests_count_into_nothing_but_errors():
    good = RequestRecord(0.0, 0.5, [1.0, 1.5, 2.0], 2.0, total_tokens=3)
    bad = RequestRecord(0.0, 0.0, [9.0], 50.0, error="timeout")
    level = summarize([good, bad], unit="users", value=2, wall_s=2.0, client_cpu_s=0.1)
    assert (level.num_requests, level.errors, level.output_tokens) == (1, {"timeout": 1}, 3)
    assert (level.tokens_per_s, level.first_token_ms.max, level.whole_ms.max) == (1.5, 1000, 2000)
    assert (level.gap_ms.p50, level.token_ms.p50, level.send_lag_ms.max) == (500, 500, 500)
    assert level.client_cores == pytest.approx(0.05)


def test_prompts_have_the_asked_length_and_share_only_what_is_asked():
    distinct, shared = Prompts(64, _words), Prompts(64, _words, shared_share=0.5)
    assert _words(distinct(0)) == _words(shared(1)) == 64
    assert len({" ".join(distinct(index).split()[:8]) for index in range(200)}) == 200
    first, second = shared(0).split(), shared(1).split()
    assert first[:32] == second[:32] and first[32:40] != second[32:40]
    assert len(prompts_for("bytes", 64)(3).encode()) == 64


def test_prompts_allow_for_special_tokens_and_refuse_what_cannot_be():
    assert len(Prompts(64, lambda text: _words(text) + 2)(0).split()) == 62
    with pytest.raises(ValueError, match="exactly 63 tokens"):
        Prompts(63, lambda text: 2 * _words(text))(0)


def _words(text: str) -> int:
    return len(text.split())
