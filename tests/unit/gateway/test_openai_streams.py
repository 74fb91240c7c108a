"""Streams of OpenAI's routes: chunks, their ids, and how they end."""

import json

import pytest

from common.messages import Failure, FinishReason, Frame, Token
from tests.openai_calls import HI, events_of, tells

pytestmark = pytest.mark.usefixtures("chat_model")


async def test_chat_stream_has_one_role_and_a_last_reason(client, fleet):
    tells(fleet, Token(1, "a", -1.0), Token(2, "b", -1.0), reason=FinishReason.STOP_SEQUENCE)
    events = await events_of(
        client, "chat/completions", messages=HI, stream_options={"include_usage": True}
    )
    assert len({event["id"] for event in events}) == 1
    assert {event["object"] for event in events} == {"chat.completion.chunk"}
    deltas = [choice["delta"] for event in events for choice in event["choices"]]
    assert deltas == [{"role": "assistant", "content": ""}, {"content": "a"}, {"content": "b"}, {}]
    reasons = [choice["finish_reason"] for event in events for choice in event["choices"]]
    assert reasons == [None, None, None, "stop"]
    assert [event["usage"] for event in events[:-1]] == [None] * 4
    assert events[-1]["choices"] == [] and events[-1]["usage"]["total_tokens"] == 13


async def test_stream_without_usage_does_not_mention_it(client):
    for event in await events_of(client, "completions", prompt="Hi"):
        assert "usage" not in event


async def test_only_the_last_event_of_a_frame_has_an_id(client, fleet):
    response = await client.post("/v1/completions", json={"prompt": "Hi", "stream": True})
    request_id = response.headers["x-request-id"]
    blocks = [block for block in (await response.text()).split("\n\n") if "data:" in block]
    ids = [block.partition("\n")[0] if block.startswith("id:") else None for block in blocks]
    assert ids[0].startswith(f"id: {request_id}:0-") and ids[1] is None
    assert blocks[-1].endswith("data: [DONE]") and ids[-1].startswith(f"id: {request_id}:1-")


async def test_several_streamed_choices_end_once(client, fleet):
    events = await events_of(client, "chat/completions", messages=HI, n=3)
    for index in range(3):
        choices = [choice for event in events for choice in event["choices"]]
        mine = [choice for choice in choices if choice["index"] == index]
        assert mine[0]["delta"]["role"] == "assistant"
        assert "".join(choice["delta"].get("content", "") for choice in mine) == " one two"
        assert [choice["finish_reason"] for choice in mine if choice["finish_reason"]] == ["length"]


async def test_error_in_a_stream_is_the_last_event(client, fleet, frames_of):
    def answer(request):
        first = frames_of(request.id, ["a", "b"])[0]
        return [first, Frame(failure=Failure("generation", "boom"))]

    fleet.answer = answer
    response = await client.post(
        "/v1/chat/completions", json={"messages": HI, "n": 2, "stream": True}
    )
    last = (await response.text()).strip().split("\n\n")[-1]
    error = json.loads(last.removeprefix("data: "))["error"]
    assert response.status == 200 and error["type"] == "generation_error"
