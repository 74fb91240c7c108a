"""Whatever a field holds, OpenAI's routes answer, or refuse in OpenAI's shape; never an internal error."""

import json
from dataclasses import replace

import pydantic
import pytest

from gateway.schemas.native import GenerateBody
from gateway.schemas.openai import ChatBody, CompletionBody
from gateway.schemas.platforms import VertexBody

ODD = [
    *(0, -1, 1.5, 2**31, -(2**63), 2**70, 1e308, True, "", "x", "\u0000", "é" * 50),
    *([], [""], [[]], [None], [1], [-1], {}, {"type": "function"}, {"": ""}, {"$ref": "#/x"}),
    [{"type": "function", "function": {"name": "", "parameters": {"$ref": "#/nowhere"}}}],
    [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "[]"}}]}],
    [{"role": "assistant", "content": "\n"}],
    {"type": "regex", "value": "("},
    {"type": "json_schema", "json_schema": {"schema": {"type": "nothing"}}},
    {"messages": [], "self": 1, "raise_exception": 3},
]


@pytest.mark.parametrize(
    ("path", "cls", "given"),
    [
        ("completions", CompletionBody, {"prompt": "Hi"}),
        ("chat/completions", ChatBody, {"messages": [{"role": "user", "content": "Hi"}]}),
    ],
)
async def test_odd_values_are_served_or_refused(client, fleet, path, cls, given):
    card = replace(fleet.registry.cards["tiny"], max_total_tokens=300, max_input_tokens=200)
    template = "{% for m in messages %}{{ m.content }}{% endfor %}{{ tools }}{{ extra }}"
    fleet.registry.cards["tiny"] = replace(card, chat_template=template)
    await client.services.directory.refresh()
    for name in cls.model_fields:
        for value in ODD:
            response = await client.post(f"/v1/{path}", json={**given, name: value})
            text = await response.text()
            assert response.status in (200, 400, 404, 422), (name, value, text)
            if response.status != 200:
                error = json.loads(text)["error"]
                assert set(error) == {"message", "type", "param", "code"} and error["message"]


def with_wrong(item: str, before: str, behind: str) -> str:
    return f"{before}[{','.join([item] * 10_000)}]{behind}"


@pytest.mark.parametrize(
    ("cls", "data"),
    [
        (CompletionBody, with_wrong("{}", '{"prompt":', "}")),
        (CompletionBody, with_wrong("[{}]", '{"prompt":', "}")),
        (CompletionBody, with_wrong("{}", '{"prompt":[', "]}")),
        (CompletionBody, with_wrong("1", '{"prompt":"a","stop":', "}")),
        (ChatBody, with_wrong("1", '{"messages":', "}")),
        (ChatBody, with_wrong("1", '{"messages":[{"role":"user","content":', "}]}")),
        (ChatBody, with_wrong("1", '{"messages":[{"role":"user","tool_calls":', "}]}")),
        (ChatBody, with_wrong("1", '{"messages":[],"tools":', "}")),
        (GenerateBody, with_wrong("1", '{"inputs":"a","parameters":{"stop":', "}}")),
        (VertexBody, with_wrong("1", '{"instances":', "}")),
    ],
    ids=range(10),
)
def test_a_long_list_of_wrong_items_has_few_errors(cls, data):
    """They are collected on the event loop: a million take ten seconds."""
    with pytest.raises(pydantic.ValidationError) as caught:
        cls.model_validate_json(data)
    assert caught.value.error_count() <= 4, "one for every type that it may have"


TEXT_ONLY = "`content` parts of type `image_url` are not supported; this model takes text"
WRONG = "Failed to deserialize the JSON body into the target type: "


@pytest.mark.parametrize(
    ("path", "body", "place", "message"),
    [
        (
            "chat/completions",
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
            "messages.0.content.0.type",
            TEXT_ONLY,
        ),
        (
            "chat/completions",
            {"messages": [{"role": "user", "content": [{"type": "text"}]}]},
            "messages.0.content.0.text",
            f"{WRONG}messages.0.content.0.text: Field required",
        ),
        (
            "chat/completions",
            {"messages": [{"role": "user", "content": 7}]},
            "messages.0.content",
            f"{WRONG}messages.0.content: Input should be a valid string",
        ),
        (
            "chat/completions",
            {"messages": [{"role": "user"}, {"content": "a"}]},
            "messages.1.role",
            f"{WRONG}messages.1.role: Field required",
        ),
        (
            "chat/completions",
            {"messages": [], "tool_choice": {"function": {}}},
            "tool_choice.function.name",
            f"{WRONG}tool_choice.function.name: Field required",
        ),
        (
            "chat/completions",
            {"messages": [], "logit_bias": {"str": "a"}},
            "logit_bias.str",
            f"{WRONG}logit_bias.str: Input should be a valid number",
        ),
        (
            "completions",
            {"prompt": ["a", 1], "colour": "red"},
            "prompt.1",
            f"{WRONG}prompt.1: Input should be a valid string",
        ),
    ],
    ids=range(7),
)
async def test_errors_name_places_in_the_body(client, path, body, place, message):
    """And not the types that pydantic tried there."""
    response = await client.post(f"/v1/{path}", json=body)
    error = (await response.json())["error"]
    assert (response.status, error["param"], error["message"]) == (400, place, message)


@pytest.mark.parametrize("body", [{}, {"messages": [], "logit_bias": {}}], ids=["unknown", "bias"])
async def test_thousands_of_errors_are_counted_and_not_told(client, body):
    """An object has no limit as lists have: only the first of its errors could be told, at the price of all."""
    *_, fields = [body, *body.values()]
    fields |= {f"x{number}": "a" for number in range(2000)}
    response = await client.post("/v1/chat/completions", json=body)
    message = (await response.json())["error"]["message"]
    assert response.status == 400 and "is wrong in 200" in message and "x0" not in message


async def test_vertex_tells_what_is_wrong_with_the_body_that_was_meant(client):
    image = [{"role": "user", "content": [{"type": "image_url"}]}]
    for instance, message in (
        ({"messages": image}, TEXT_ONLY),
        (
            {"inputs": "a", "parameters": {"top_k": "b"}},
            f"{WRONG}instances.0.parameters.top_k: Input should be a valid integer",
        ),
    ):
        response = await client.post("/vertex", json={"instances": [instance]})
        assert response.status == 422
        assert (await response.json())["error"] == message


@pytest.mark.usefixtures("chat_model")
async def test_arguments_that_are_too_deep_are_refused(client):
    call = {"function": {"name": "f", "arguments": '{"a":' * 50_000}}
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "tool_calls": [call]}]
    for path in ("/v1/chat/completions", "/chat_tokenize"):
        response = await client.post(path, json={"messages": messages})
        text = await response.text()
        assert 400 <= response.status < 500 and "must be a JSON object" in text, text
