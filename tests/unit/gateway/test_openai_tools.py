"""Tools and response formats of OpenAI's chats: grammars that are asked, calls that come back."""

import json

import pytest

from common.messages import GrammarKind, Token
from tests.openai_calls import ADD, HI, events_of, post, prompt_of, tells, texts_of

pytestmark = pytest.mark.usefixtures("chat_model")

CALL = '{"name": "add", "arguments": {"a": 1}}'
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}
MEANT = {**SCHEMA, "additionalProperties": False}  # see gateway/json_schema.py


@pytest.mark.parametrize("choice", ["required", "add", {"function": {"name": "add"}}])
async def test_forced_tool_is_a_grammar_and_a_call(client, fleet, choice):
    tells(fleet, *(Token(1, character, -1.0) for character in CALL))
    asked = {"messages": HI, "tools": [ADD], "tool_choice": choice}
    _, body = await post(client, "chat/completions", **asked)
    grammar = fleet.requests[0].sampling.grammar
    assert grammar.kind is GrammarKind.JSON_SCHEMA and '"const": "add"' in grammar.value
    text = prompt_of(client, fleet.requests[0])
    assert '"name": "add"' in text  # the template shows no tools, so the message does
    (chosen,) = body["choices"]
    (call,) = chosen["message"]["tool_calls"]
    assert call["function"] == {"name": "add", "arguments": '{"a": 1}'} and len(call["id"]) == 9
    assert chosen["message"]["content"] is None
    assert chosen["finish_reason"] == ("tool_calls" if choice == "required" else "stop")

    events = await events_of(client, "chat/completions", **asked)
    deltas = [event["choices"][0]["delta"] for event in events]
    calls = [delta["tool_calls"][0] for delta in deltas if "tool_calls" in delta]
    assert calls[0]["function"] == {"name": "add", "arguments": ""} and calls[0]["id"]
    assert "".join(call["function"]["arguments"] for call in calls) == '{"a": 1}'
    assert len(calls) > 3 and {call["index"] for call in calls} == {0}


async def test_model_that_is_free_may_call_or_answer(client, fleet):
    asked = {"messages": HI, "tools": [ADD]}
    tells(fleet, *(Token(1, part, -1.0) for part in ("<tool_", f"call>{CALL}</tool", "_call>")))
    _, body = await post(client, "chat/completions", **asked)
    assert (
        body["choices"][0]["message"]["tool_calls"] and fleet.requests[0].sampling.grammar is None
    )
    assert body["choices"][0]["finish_reason"] == "tool_calls"
    events = await events_of(client, "chat/completions", **asked)
    assert texts_of(events) == "" and events[-1]["choices"][0]["finish_reason"] == "tool_calls"

    tells(fleet, Token(1, "No ", -1.0), Token(1, "<tool_box>", -1.0))
    events = await events_of(client, "chat/completions", **asked)
    assert texts_of(events) == "No <tool_box>"
    assert events[-1]["choices"][0]["finish_reason"] == "stop"
    await post(client, "chat/completions", **asked, tool_choice="none")
    assert prompt_of(client, fleet.requests[-1]) == "<user>Hi<a>"


@pytest.mark.parametrize(
    ("given", "kind", "value"),
    [
        ({"type": "json_object"}, "json_schema", {"type": "object"}),
        ({"type": "json_schema", "json_schema": {"name": "x", "strict": True, "schema": SCHEMA}}, "json_schema", MEANT),
        ({"type": "json_object", "value": SCHEMA}, "json_schema", MEANT),
        ({"type": "json", "value": SCHEMA}, "json_schema", MEANT),
        ({"type": "json_schema", "value": {"name": "x", "schema": SCHEMA}}, "json_schema", MEANT),
        ({"type": "regex", "value": "[0-9]+"}, "regex", "[0-9]+"),
    ],
)  # fmt: skip
async def test_response_format_in_openais_shapes_and_tgis(client, fleet, given, kind, value):
    status, body = await post(client, "chat/completions", messages=HI, response_format=given)
    assert status == 200, body
    grammar = fleet.requests[0].sampling.grammar
    assert grammar.kind == kind
    assert (json.loads(grammar.value) if kind == "json_schema" else grammar.value) == value
