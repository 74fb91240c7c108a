"""What the fuzzers found, and what a schema must say so that they find nothing."""

import json

import pytest
from pydantic import ValidationError

from common.messages import OnDisconnect
from gateway.schemas.native import GenerateBody
from gateway.schemas.openai import ChatBody


@pytest.mark.parametrize("request_id", ["%1F", "%0D%0A", "%C3%A9", "%FF", "0f%00"])
@pytest.mark.parametrize("method", ["GET", "DELETE"])
async def test_request_id_that_no_header_may_hold(client, method: str, request_id: str):
    for path in (f"/requests/{request_id}", f"/requests/{request_id}/stream"):
        if method == "DELETE" and path.endswith("stream"):
            continue
        response = await client.request(method, path)
        assert response.status == 404
        assert (await response.json())["error_type"] == "request_not_found"


@pytest.mark.parametrize("event", ["é:0-00", "a b:0-00", "a:0-0", "a:0-zz", "a:-1-00", "a:1e9-00"])
async def test_event_that_no_gateway_wrote(client, event: str):
    headers = {"last-event-id": event}
    response = await client.post("/generate_stream", json={"inputs": "a"}, headers=headers)
    assert response.status == 422
    assert "`Last-Event-ID` must be the id of an event" in (await response.json())["error"]


@pytest.mark.parametrize("expectation", ["100-continue", "100-CONTINUE", "miracles"])
async def test_expectations(client, expectation: str):
    """The one that HTTP knows is met, others are ignored."""
    headers = {"expect": expectation}
    response = await client.post("/generate", json={"inputs": "a"}, headers=headers)
    assert response.status == 200


async def test_parameters_that_are_null_may_be(client):
    nulls = {name: None for name in GenerateBody.model_json_schema()["properties"]}
    parameters = GenerateBody.model_json_schema()["$defs"]["GenerateParameters"]["properties"]
    for body in (
        {**nulls, "inputs": "a"},
        {"inputs": "a", "parameters": dict.fromkeys(parameters)},
    ):
        response = await client.post("/generate", json=body)
        assert response.status == 200, await response.text()


@pytest.mark.parametrize("body", [GenerateBody, ChatBody])
def test_schema_says_what_may_be_null(body):
    """By JSON Schema of OpenAPI 3.1; `nullable` is gone there."""
    assert "nullable" not in json.dumps(body.model_json_schema())


async def test_rules_are_told_but_not_by_the_schema_s_words(client):
    fields = GenerateBody.model_json_schema()["$defs"]["GenerateParameters"]["properties"]
    assert (
        fields["top_p"]["exclusiveMaximum"] == 1 and fields["temperature"]["exclusiveMinimum"] == 0
    )
    GenerateBody.model_validate_json('{"inputs": "", "parameters": {"top_p": 3.0}}')
    with pytest.raises(ValidationError):
        GenerateBody.model_validate_json('{"inputs": "", "parameters": {"top_p": "3.0"}}')
    body = {"inputs": "a", "parameters": {"top_p": 3.0}}
    error = await (await client.post("/generate", json=body)).json()
    assert error["error"] == "Input validation error: `top_p` must be > 0.0 and < 1.0"  # TGI's


async def test_openapi_tells_headers_links_and_events(client):
    paths = (await (await client.get("/openapi.json")).json())["paths"]
    generate = paths["/generate_stream"]["post"]
    headers = {parameter["name"]: parameter["schema"] for parameter in generate["parameters"]}
    assert headers["X-On-Disconnect"]["enum"] == [policy.value for policy in OnDisconnect]
    assert headers["Idempotency-Key"]["maxLength"] == 255
    answer = generate["responses"]["200"]
    assert set(answer["links"]) == {"status", "cancel"} and "x-request-id" in answer["headers"]
    operations = {item["operationId"] for path in paths.values() for item in path.values()}
    assert {link["operationId"] for link in answer["links"].values()} <= operations
    event = answer["content"]["text/event-stream"]["schema"]
    assert event["properties"]["data"]["contentMediaType"] == "application/json"
    assert "204" in paths["/requests/{request_id}/stream"]["get"]["responses"]
    assert "text/plain" in paths["/metrics"]["get"]["responses"]["200"]["content"]
