"""Whatever a field holds, OpenAI's routes answer, or refuse in OpenAI's shape; never an internal error."""

import json
from dataclasses import replace

import pytest

from gateway.schemas.openai import ChatBody, CompletionBody

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
