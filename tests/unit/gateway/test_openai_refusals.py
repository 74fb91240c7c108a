"""What OpenAI's routes refuse, and how errors look there."""

import json
from dataclasses import replace

import pytest

from common.errors import GenerationFailed, Overloaded, Unavailable
from tests.openai_calls import ADD, HI, post

pytestmark = pytest.mark.usefixtures("chat_model")


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("completions", {"prompt": "Hi", "suffix": "x"}, "suffix"),
        ("completions", {"prompt": "Hi", "banana": 1}, "banana"),
        ("completions", {"prompt": "Hi", "temperature": 2.5}, "temperature"),
        ("completions", {"prompt": "Hi", "n": 0}, "n"),
        ("completions", {"prompt": "Hi", "n": 2, "best_of": 1}, "best_of"),
        ("completions", {"prompt": "Hi", "logprobs": 6}, "logprobs"),
        ("completions", {"prompt": "Hi", "echo": True, "logprobs": 1}, "logprobs"),
        ("completions", {"prompt": []}, "prompt"),
        ("completions", {"prompt": ""}, "prompt"),
        ("completions", {"prompt": [999]}, "prompt"),
        ("completions", {"prompt": ["a"] * 5}, "prompt"),
        ("completions", {"prompt": "Hi", "stop": [""]}, "stop"),
        ("completions", {"prompt": "Hi", "max_tokens": 0}, "max_tokens"),
        ("completions", {"prompt": "Hi", "logit_bias": {"x": 1}}, "logit_bias"),
        ("completions", {"prompt": "Hi", "stream_options": {}}, "stream_options"),
        ("completions", {"prompt": "Hi", "max_tokens": "7"}, "max_tokens"),
        ("chat/completions", {"messages": []}, "messages"),
        ("chat/completions", {"messages": HI, "functions": [{}]}, "functions"),
        ("chat/completions", {"messages": HI, "audio": {}}, "audio"),
        ("chat/completions", {"messages": HI, "modalities": ["text", "audio"]}, "modalities"),
        ("chat/completions", {"messages": HI, "top_logprobs": 1}, "top_logprobs"),
        ("chat/completions", {"messages": HI, "tool_choice": "required"}, "tool_choice"),
        ("chat/completions", {"messages": HI, "tools": [ADD], "tool_choice": "sub"}, "tool_choice"),
        ("chat/completions", {"messages": HI, "tools": [ADD, ADD]}, "tools"),
        ("chat/completions", {"messages": HI, "max_tokens": 1, "max_completion_tokens": 2}, "max_tokens"),
        ("chat/completions", {"messages": HI, "response_format": {"type": "json_schema"}}, "response_format"),
    ],
)  # fmt: skip
async def test_refusals_name_the_field(client, fleet, path, body, param):
    status, answer = await post(client, path, **body)
    assert status == 400 and set(answer["error"]) == {"message", "type", "param", "code"}
    assert answer["error"]["type"] == "invalid_request_error" and answer["error"]["code"] is None
    assert answer["error"]["param"].split(".")[0] == param, answer
    assert param in answer["error"]["message"] and not fleet.requests


async def test_neutral_values_of_unsupported_fields_are_accepted(client):
    status, _ = await post(
        client, "chat/completions", messages=HI, modalities=["text"], store=False, functions=[]
    )
    assert status == 200


async def test_context_length(client):
    status, body = await post(client, "completions", prompt="Hi", max_tokens=499)
    assert status == 400 and body["error"]["code"] == "context_length_exceeded"
    assert "maximum context length is 500 tokens" in body["error"]["message"]
    status, body = await post(
        client, "chat/completions", messages=[{"role": "user", "content": "x" * 450}]
    )
    assert status == 400 and body["error"]["param"] == "messages"


async def test_template_error(client, fleet):
    card = fleet.registry.cards["tiny"]
    fleet.registry.cards["tiny"] = replace(card, chat_template="{{ raise_exception('no') }}")
    await client.services.directory.refresh()
    status, body = await post(client, "chat/completions", messages=HI)
    assert status == 422 and body["error"]["code"] == "template_error"


@pytest.mark.parametrize(
    ("error", "status", "kind", "code"),
    [
        (Overloaded(retry_after_s=7), 429, "rate_limit_error", "rate_limit_exceeded"),
        (Unavailable("gone"), 503, "server_error", "unavailable"),
        (GenerationFailed("boom"), 424, "generation_error", "generation"),
    ],
)
async def test_errors_of_the_fleet(client, fleet, error, status, kind, code):
    fleet.error = error
    response = await client.post("/v1/completions", json={"prompt": "Hi"})
    body = (await response.json())["error"]
    assert (response.status, body["type"], body["code"]) == (status, kind, code)
    if status in (429, 503):
        assert response.headers["retry-after"] == ("7" if status == 429 else "1")


async def test_errors_around_the_handlers(make_client):
    client = await make_client(api_key="k", payload_limit=1000)
    headers = {"authorization": "Bearer k"}
    for method, path, data, status, code in (
        ("POST", "completions", "{}", 401, "invalid_api_key"),
        ("GET", "models/none/such", None, 404, "model_not_found"),
        ("POST", "nothing", "{}", 404, None),
        ("GET", "completions", None, 405, None),
        ("POST", "completions", "x" * 2000, 413, "payload_too_large"),
        ("POST", "completions", "{", 400, None),
    ):
        given = {"content-type": "application/json", **(headers if status != 401 else {})}
        response = await client.request(method, f"/v1/{path}", data=data, headers=given)
        body = json.loads(await response.text())["error"]
        assert (response.status, body["code"]) == (status, code), path
        assert body["message"] and "type" in body
