"""/invocations, /vertex and /chat_tokenize over HTTP. The fleet is in memory."""

from dataclasses import replace

import pytest

HI = [{"role": "user", "content": "Hi"}]


@pytest.fixture
def fleet(fleet):
    card = fleet.registry.cards["tiny"]
    template = "{% for m in messages %}<u>{{ m.content }}{% endfor %}"
    fleet.registry.cards["tiny"] = replace(card, chat_template=template)
    return fleet


async def test_invocations_tell_bodies_apart(client):
    async def post(**body):
        response = await client.post("/invocations", json=body)
        assert response.status == 200, await response.text()
        return await response.json()

    native = {"inputs": "Hi", "parameters": {"return_full_text": False}}
    assert await post(**native, messages=HI) == [{"generated_text": " one two"}]
    assert (await post(messages=HI))["choices"][0]["message"]["content"] == " one two"
    assert (await post(prompt="Hi"))["choices"][0]["text"] == " one two"


DEEP = '{"inputs":' + "[" * 100_000 + "]" * 100_000 + "}"


@pytest.mark.parametrize("data", ["{", "[]", "{}", "7", '"text"', DEEP], ids=range(6))
async def test_invocations_refuse_what_they_cannot_read(client, data):
    headers = {"content-type": "application/json"}
    response = await client.post("/invocations", data=data, headers=headers)
    assert response.status in (400, 422)
    assert set(await response.json()) == {"error", "error_type"}


async def test_vertex_answers_every_instance_in_order(client, fleet, frames_of):
    fleet.answer = lambda request: frames_of(request.id, [f" {request.stopping.max_new_tokens}"])
    instances = [
        {"inputs": "Hi", "parameters": {"max_new_tokens": 3}},
        {"messages": HI, "max_tokens": 4},
    ]
    response = await client.post("/vertex", json={"instances": instances})
    assert await response.json() == {"predictions": [" 3", " 4"]}


@pytest.mark.parametrize(
    "instances", [[], [{"inputs": "Hi"}] * 5, [{}], [{"messages": HI, "stream": True}]]
)
async def test_vertex_refusals(client, fleet, instances):
    response = await client.post("/vertex", json={"instances": instances})
    assert response.status == 422 and (await response.json())["error_type"] == "validation"
    assert not fleet.requests


async def test_chat_tokenize_shows_prompt_and_tokens(client):
    response = await client.post("/chat_tokenize", json={"messages": HI})
    body = await response.json()
    assert body["templated_text"] == "<u>Hi"
    assert [token["text"] for token in body["tokenize_response"]] == list("<u>Hi")
    assert body["tokenize_response"][1] | {"id": 0} == {"id": 0, "text": "u", "start": 1, "stop": 2}


def example_of(schema: dict, schemas: dict) -> dict:
    """The body that the documentation page starts from."""
    schema = schemas[schema["$ref"].rpartition("/")[2]] if "$ref" in schema else schema
    if "examples" in schema:
        return schema["examples"][0]
    required = schema.get("required", [])
    fields = schema.get("properties", {}).items()
    return {name: field["examples"][0] for name, field in fields if name in required}


async def test_examples_of_the_documentation_run_as_shown(client, fleet):
    card = fleet.registry.cards["tiny"]
    fleet.registry.cards["tiny"] = replace(card, max_input_tokens=200, max_total_tokens=400)
    await client.services.directory.refresh()
    document = await (await client.get("/openapi.json")).json()
    ran = set()
    for path, operations in document["paths"].items():
        if (body := operations.get("post", {}).get("requestBody")) is None:
            continue
        schema = body["content"]["application/json"]["schema"]
        example = example_of(schema, document["components"]["schemas"])
        response = await client.post(path, json=example)
        assert response.status == 200, (path, example, await response.text())
        ran.add(path)
    assert ran >= {"/", "/generate", "/v1/chat/completions", "/vertex", "/invocations"}
