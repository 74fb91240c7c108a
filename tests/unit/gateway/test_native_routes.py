"""TGI's routes over HTTP: shapes, headers, streams, cancellation. The fleet is in memory."""

import asyncio
import json
import re
from dataclasses import replace

import pytest
from redis.exceptions import ResponseError

from common.errors import GenerationFailed, Overloaded, Unavailable
from common.messages import Failure, Finish, FinishReason, Frame, Token, TopToken


def events_of(text: str) -> list[dict]:
    """What a strict SSE reader sees: id and data of every event."""
    events = []
    for block in text.split("\n\n"):
        fields = dict(
            line.split(": ", 1) for line in block.split("\n") if not line.startswith(":") and line
        )
        if "data" in fields:
            events.append({"id": fields.get("id"), **json.loads(fields["data"])})
    return events


async def post(client, path: str, **body):
    return await client.post(path, json=body)


async def test_generate_gives_only_the_text(client):
    response = await post(client, "/generate", inputs="Hi")
    assert response.status == 200
    assert await response.text() == '{"generated_text":" one two"}'
    assert response.content_type == "application/json"


async def test_generate_details_have_tgis_keys_in_tgis_order(client, fleet):
    response = await post(client, "/generate", inputs="Hi", parameters={"details": True})
    body = json.loads(await response.text())
    assert list(body) == ["generated_text", "details"]
    assert list(body["details"]) == [
        *("finish_reason", "generated_tokens", "seed", "prefill", "tokens")
    ]
    assert body["details"]["tokens"] == [
        {"id": 10, "text": " one", "logprob": -0.5, "special": False},
        {"id": 11, "text": " two", "logprob": -0.5, "special": False},
    ]
    assert body["details"]["prefill"] == [] and body["details"]["seed"] is None
    assert body["details"]["finish_reason"] == "length"


async def test_generate_headers(client):
    response = await post(client, "/generate", inputs="Hé")
    headers = response.headers
    assert headers["x-compute-type"] == "cpu+optimized"
    assert headers["x-compute-characters"] == "2"
    assert headers["x-prompt-tokens"] == "3" and headers["x-generated-tokens"] == "2"
    assert headers["x-queue-time"] == "250" and headers["x-inference-time"] == "1500"
    assert headers["x-time-per-token"] == "750"
    assert float(headers["x-compute-time"]) < 10 and int(headers["x-total-time"]) < 10_000
    assert int(headers["x-validation-time"]) < 10_000
    assert len(headers["x-request-id"]) == 32


async def test_request_that_reaches_the_queue_is_resolved(client, fleet):
    parameters = {"temperature": 0.5, "stop": ["x"], "max_new_tokens": 7, "seed": 3}
    response = await post(client, "/generate", inputs="Hi", parameters=parameters, priority=0)
    (request,) = fleet.requests
    assert request.id == response.headers["x-request-id"]
    assert request.prompt_tokens == (39, 72)
    assert request.sampling.do_sample and request.sampling.seed == 3
    assert request.stopping.max_new_tokens == 7 and request.stopping.stop == ("x",)
    assert request.priority == 0 and request.deadline_s == 3600


async def test_prefill_of_the_prompt(client, fleet):
    def answer(request):
        assert request.prompt_logprobs
        prompt = (TopToken(1, "H", None), TopToken(2, "i", -1.5))
        finish = Finish(FinishReason.EOS_TOKEN, 1)
        return [Frame(tokens=(Token(5, "!", -1.0),), chain=b"x", prompt=prompt, finish=finish)]

    fleet.answer = answer
    response = await post(
        client, "/generate", inputs="Hi", parameters={"decoder_input_details": True}
    )
    details = (await response.json())["details"]
    assert details["prefill"] == [
        {"id": 1, "text": "H", "logprob": None},
        {"id": 2, "text": "i", "logprob": -1.5},
    ]


async def test_best_of_returns_the_most_likely_and_shows_the_others(client, fleet, frames_of):
    def answer(request):
        is_second = request.id.endswith("-1")
        return frames_of(
            request.id, ["good" if is_second else "bad"], logprob=-0.1 if is_second else -3
        )

    fleet.answer = answer
    parameters = {"best_of": 2, "do_sample": True, "details": True}
    response = await post(client, "/generate", inputs="Hi", parameters=parameters)
    body = await response.json()
    assert body["generated_text"] == "good"
    (other,) = body["details"]["best_of_sequences"]
    assert other["generated_text"] == "bad" and "top_tokens" not in other
    seeds = {request.sampling.seed for request in fleet.requests}
    assert len(seeds) == 2 and {body["details"]["seed"], other["seed"]} == seeds


async def test_best_of_failure_fails_the_request_and_cancels_the_other(client, fleet, deadline):
    fleet.answer = None
    parameters = {"best_of": 2, "do_sample": True}
    task = asyncio.create_task(post(client, "/generate", inputs="Hi", parameters=parameters))
    first, second = await fleet.enqueued.get(), await fleet.enqueued.get()
    fleet.push(first.id, Frame(failure=Failure("generation", "boom")))
    response = await task
    assert response.status == 424
    assert (await response.json())["error"] == "Request failed during generation: boom"
    assert await fleet.cancelled.get() == second.id


async def test_stream_events(client, fleet):
    response = await post(
        client, "/generate_stream", inputs="Hi", parameters={"details": True, "seed": 4}
    )
    assert response.status == 200
    assert response.headers["content-type"] == "text/event-stream"
    assert response.headers["cache-control"] == "no-cache"
    assert response.headers["x-accel-buffering"] == "no"
    text = await response.text()
    assert text.startswith(f":\n\nid: {response.headers['x-request-id']}:0-")
    first, last = events_of(text)
    assert list(first) == ["id", "index", "token", "generated_text", "details"]
    assert (first["index"], last["index"]) == (1, 2)
    assert first["generated_text"] is None and first["details"] is None
    assert last["generated_text"] == " one two"
    assert last["details"] == {
        "finish_reason": "length",
        "generated_tokens": 2,
        "seed": None,
        "input_length": 2,
    }
    assert re.fullmatch("[0-9a-f]{32}:0-[0-9a-f]{16}", first["id"])


async def test_stream_without_details_has_null(client):
    events = events_of(await (await post(client, "/generate_stream", inputs="Hi")).text())
    assert events[-1]["details"] is None and events[-1]["generated_text"] == " one two"


async def test_compat_route(client):
    response = await post(client, "/", inputs="Hi")
    assert await response.json() == [{"generated_text": "Hi one two"}]
    response = await post(client, "/", inputs="Hi", parameters={"return_full_text": False})
    assert await response.json() == [{"generated_text": " one two"}]
    response = await post(client, "/", inputs="Hi", stream=True)
    assert response.content_type == "text/event-stream"
    assert events_of(await response.text())[-1]["generated_text"] == "Hi one two"


async def test_the_answer_of_an_encoder_decoder_stands_alone(make_client, fleet):
    cards = fleet.registry.cards
    cards["tiny"] = replace(cards["tiny"], is_encoder_decoder=True)
    client = await make_client()
    response = await post(client, "/", inputs="Hi")
    assert await response.json() == [{"generated_text": " one two"}]
    info = await (await client.get("/info")).json()
    assert info["model_pipeline_tag"] == "text2text-generation"


async def test_errors_before_a_stream_are_real_statuses(client, fleet):
    response = await post(client, "/generate_stream", inputs="")
    assert response.status == 422 and response.content_type == "application/json"
    fleet.error = Overloaded(retry_after_s=7)
    response = await post(client, "/generate_stream", inputs="Hi")
    assert response.status == 429 and response.headers["retry-after"] == "7"
    assert await response.text() == '{"error":"Model is overloaded","error_type":"overloaded"}'
    assert fleet.cancelled.empty(), "a request that was never queued needs no cancel"
    fleet.error = Unavailable("the broker does not answer")
    response = await post(client, "/generate", inputs="Hi")
    assert response.status == 503 and response.headers["retry-after"] == "1"
    assert (await response.json())["error_type"] == "unavailable"
    fleet.error = ResponseError("MISCONF")
    assert (await post(client, "/generate", inputs="Hi")).status == 503


async def test_grammar_that_the_worker_refuses_is_a_422(client, fleet):
    """The gateway compiles it too, but a worker may run another version."""
    message = "Input validation error: grammar is not valid: too large"
    fleet.answer = lambda request: [Frame(failure=Failure("validation", message))]
    grammar = {"type": "regex", "value": "a"}
    response = await post(client, "/generate", inputs="Hi", parameters={"grammar": grammar})
    assert response.status == 422
    assert await response.json() == {"error": message, "error_type": "validation"}


@pytest.mark.parametrize(
    ("failure", "error"),
    [
        (
            Frame(failure=Failure("generation", "boom")),
            {"error": "Request failed during generation: boom", "error_type": "generation"},
        ),
        (
            Frame(failure=Failure("deadline", "too late")),
            {"error": "Request failed during generation: too late", "error_type": "deadline"},
        ),
        (RuntimeError("secret"), {"error": "Internal error", "error_type": "internal"}),
    ],
)
async def test_errors_within_a_stream_are_its_last_event(
    client, fleet, frames_of, failure, error, deadline
):
    def answer(request):
        return [frames_of(request.id, ["a", "b"])[0], failure]

    fleet.answer = answer
    response = await post(client, "/generate_stream", inputs="Hi")
    assert response.status == 200
    text = await response.text()
    token, end = text.removeprefix(":\n\n").strip().split("\n\n")
    assert '"index":1' in token
    assert json.loads(end.removeprefix("data: ")) == error


async def test_stream_without_a_broker_ends_with_the_way_back(client, fleet, frames_of):
    fleet.answer = lambda request: [frames_of(request.id, ["a", "b"])[0], Unavailable("gone")]
    response = await post(client, "/generate_stream", inputs="Hi")
    *_, end = events_of(await response.text())
    assert end["error_type"] == "unavailable"
    way = f"GET /requests/{response.headers['x-request-id']}/stream"
    assert way in end["error"] and "Last-Event-ID" in end["error"]
    assert fleet.cancelled.empty(), "so that the client can come back"


@pytest.mark.parametrize("path", ["/generate", "/generate_stream"])
async def test_client_that_leaves_cancels_its_request(client, fleet, path, deadline):
    fleet.answer = None
    task = asyncio.create_task(post(client, path, inputs="Hi"))
    request = await fleet.enqueued.get()
    if path == "/generate_stream":
        (await task).close()
    else:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
    assert await fleet.cancelled.get() == request.id
    while client.services.admission.num_open:
        await asyncio.sleep(0)


async def test_cancel_that_fails_is_only_logged(client, fleet, deadline, caplog):
    fleet.answer, fleet.cancel_error = None, Unavailable("gone")
    response = await post(client, "/generate_stream", inputs="Hi")
    response.close()
    await fleet.cancelled.get()
    await client.services.generator.close()
    assert "could not cancel" in caplog.text


async def test_limit_of_open_requests(make_client, fleet, deadline):
    client = await make_client(max_concurrent_requests=1)
    fleet.answer = None
    open_stream = await post(client, "/generate_stream", inputs="Hi")
    refused = await post(client, "/generate", inputs="Hi")
    assert refused.status == 429 and refused.headers["retry-after"] == "1"
    open_stream.close()
    await fleet.cancelled.get()


async def test_keep_alive_comments(make_client, fleet, frames_of, deadline):
    client = await make_client(keep_alive_s=0.01)
    fleet.answer = None
    response = await post(client, "/generate_stream", inputs="Hi")
    request = await fleet.enqueued.get()
    for _ in range(3):
        assert await response.content.readuntil(b"\n\n") == b":\n\n"
    fleet.push(request.id, *frames_of(request.id, ["a"]))
    rest = (await response.text()).replace(":\n\n", "")
    assert events_of(rest)[-1]["generated_text"] == "a"


async def test_client_that_stops_reading_is_given_up(make_client, fleet, deadline):
    client = await make_client(keep_alive_s=0.02)
    fleet.answer = None
    response = await post(client, "/generate_stream", inputs="Hi")
    request = await fleet.enqueued.get()
    response.content._protocol.pause_reading()
    large = Frame(tokens=(Token(1, "x" * 2_000_000, -1.0),), chain=b"c")
    for _ in range(12):
        fleet.push(request.id, large)
    assert await fleet.cancelled.get() == request.id


async def test_tokenize(client):
    response = await post(client, "/tokenize", inputs="Hi")
    assert await response.json() == [
        {"id": 39, "text": "H", "start": 0, "stop": 1},
        {"id": 72, "text": "i", "start": 1, "stop": 2},
    ]
    response = await post(client, "/tokenize", inputs="Hi", parameters={"truncate": 1})
    assert [row["text"] for row in await response.json()] == ["i"]
    assert (await post(client, "/tokenize", inputs="")).status == 422


async def test_unknown_model_is_named(client):
    response = await post(client, "/generate", inputs="Hi", model="nope")
    assert response.status == 404
    assert await response.json() == {
        "error": "The model `nope` is not served here. Served: `tiny`",
        "error_type": "model_not_found",
    }
    assert (await post(client, "/generate", inputs="Hi", model="tiny")).status == 200


async def test_metrics_of_requests(client, fleet):
    await post(client, "/generate", inputs="Hi")
    await post(client, "/generate", inputs="")
    fleet.error = GenerationFailed("boom")
    await post(client, "/generate", inputs="Hi")
    text = await (await client.get("/metrics")).text()
    for line in (
        "tgi_request_count 3.0",
        "tgi_request_success 1.0",
        'tgi_request_failure{err="validation"} 1.0',
        'tgi_request_failure{err="generation"} 1.0',
        "tgi_request_generated_tokens_sum 2.0",
        "tgi_request_inference_duration_sum 1.5",
        'tokenfleet_tokens_total{kind="generated",model="tiny"} 2.0',
        'tokenfleet_time_to_first_token_seconds_count{model="tiny"} 1.0',
        'tokenfleet_inter_token_latency_seconds_count{model="tiny"} 1.0',
        "tgi_queue_size 3.0",
        "tgi_batch_current_size 1.0",
        'tokenfleet_workers{model="tiny",state="ready"} 1.0',
    ):
        assert f"\n{line}\n" in text, line
    assert "# TYPE tgi_request_count counter" in text
    assert "_created" not in text


async def test_access_log_has_numbers_and_no_text(client, caplog):
    caplog.set_level("INFO")
    await post(client, "/generate", inputs="my secret")
    (record,) = [record for record in caplog.records if record.name == "gateway.access"]
    assert record.getMessage() == "POST /generate 200"
    assert (record.prompt_tokens, record.generated_tokens, record.model) == (9, 2, "tiny")
    assert record.finish_reason == "length" and record.first_token_s > 0
    assert "secret" not in str(vars(record))
