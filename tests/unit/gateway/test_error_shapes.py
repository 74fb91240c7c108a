"""Every error is JSON: TGI's shape on its routes, OpenAI's under /v1. The fleet is in memory."""

import asyncio
import json
from dataclasses import replace

import pytest

from common.errors import GenerationFailed, Overloaded, Unavailable
from common.messages import Failure, Frame

NATIVE, CHAT = "/generate", "/v1/chat/completions"
BODIES = {NATIVE: {"inputs": "Hi"}, CHAT: {"messages": [{"role": "user", "content": "Hi"}]}}
JSON = {"content-type": "application/json"}


async def error_of(response, path: str) -> tuple[int, str, str]:
    """Status, kind and message of an answer that has the shape of its route."""
    assert response.content_type == "application/json", await response.text()
    assert response.headers["server"] == "tokenfleet"
    body = await response.json()
    if path.startswith("/v1/"):
        assert set(body) == {"error"}
        assert set(body["error"]) == {"message", "type", "param", "code"}
        return response.status, body["error"]["type"], body["error"]["message"]
    assert set(body) == {"error", "error_type"}
    return response.status, body["error_type"], body["error"]


@pytest.mark.parametrize("path", ["/nothing", "/v1/nothing", "/generate/", "/requests/unknown"])
async def test_404(client, path):
    assert (await error_of(await client.get(path), path))[0] == 404


@pytest.mark.parametrize("path", BODIES)
async def test_404_of_a_model_says_what_is_served(client, path):
    response = await client.post(path, json={**BODIES[path], "model": "other"})
    status, _, message = await error_of(response, path)
    assert status == 404 and "`tiny`" in message


@pytest.mark.parametrize("path", BODIES)
async def test_405(client, path):
    response = await client.get(path)
    assert (await error_of(response, path))[0] == 405
    assert response.headers["allow"] == "POST"


@pytest.mark.parametrize("path", BODIES)
async def test_413(make_client, path):
    client = await make_client(payload_limit=100)
    response = await client.post(path, data=b"[" * 101, headers=JSON)
    status, kind, message = await error_of(response, path)
    assert status == 413 and "100 bytes" in message
    assert kind in ("payload_too_large", "invalid_request_error")


@pytest.mark.parametrize("path", BODIES)
async def test_415(client, path):
    response = await client.post(
        path, data=json.dumps(BODIES[path]), headers={"content-type": "a/b"}
    )
    status, _, message = await error_of(response, path)
    assert status == 415 and "`Content-Type: application/json`" in message


@pytest.mark.parametrize(("path", "status"), [(NATIVE, 422), (CHAT, 400)])
async def test_422(client, path, status):
    response = await client.post(path, json={**BODIES[path], "model": 7})
    assert (await error_of(response, path))[0] == status


@pytest.mark.parametrize("header", ["x-model", "last-event-id", "x-on-disconnect"])
@pytest.mark.parametrize("path", BODIES)
async def test_headers_that_are_not_utf8(client, path, header):
    body = json.dumps(BODIES[path]).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
    head += f"Connection: close\r\nContent-Length: {len(body)}\r\n{header}: "
    reader, writer = await asyncio.open_connection(client.host, client.port)
    writer.write(head.encode() + b"\xff\xff\xff\r\n\r\n" + body)
    answer = await reader.read()
    writer.close()
    assert int(answer.split()[1]) in (400, 404, 422)
    assert "???" in json.dumps(json.loads(answer.partition(b"\r\n\r\n")[2]))


@pytest.mark.parametrize("path", BODIES)
async def test_400(client, path):
    response = await client.post(path, data=b"{", headers=JSON)
    status, kind, _ = await error_of(response, path)
    assert status == 400 and kind in ("malformed_request", "invalid_request_error")


@pytest.mark.parametrize("path", BODIES)
async def test_424(chat_client, fleet, path):
    failure = Failure(GenerationFailed.kind, "boom")
    fleet.answer = lambda request: [Frame(failure=failure)]
    response = await chat_client.post(path, json=BODIES[path])
    status, _, message = await error_of(response, path)
    assert status == 424 and "boom" in message


@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize(
    ("error", "status"),
    [(Overloaded(retry_after_s=7), 429), (Unavailable(), 503), (RuntimeError("defect"), 500)],
)
async def test_429_500_503(chat_client, fleet, path, error, status):
    fleet.error = error
    response = await chat_client.post(path, json=BODIES[path])
    found, _, message = await error_of(response, path)
    assert found == status
    assert response.headers.get("retry-after") == {429: "7", 503: "1", 500: None}[status]
    assert "defect" not in message


async def test_429_of_a_full_process(make_client, fleet):
    client = await make_client(max_concurrent_requests=1)
    fleet.answer = None
    stream = await client.post("/generate_stream", json=BODIES[NATIVE])
    for path, body in BODIES.items():
        status, _, message = await error_of(await client.post(path, json=body), path)
        assert (status, message) == (429, "Model is overloaded")
    stream.close()


@pytest.fixture
async def chat_client(make_client, fleet):
    """The model has a chat template."""
    fleet.registry.cards["tiny"] = replace(
        fleet.registry.cards["tiny"], chat_template="{{ messages[0].content }}"
    )
    return await make_client()
