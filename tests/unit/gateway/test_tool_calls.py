"""Function calls in text: the schema that forces one, and what the readers find, however a text is cut."""

import json
from itertools import pairwise

import llguidance
import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.grammar import check_grammar
from common.messages import Grammar, GrammarKind
from gateway.tool_calls import (
    Arguments,
    CallBegins,
    CallDetector,
    Content,
    ForcedCallReader,
    Reader,
    call_schema,
)

CALL = '{"name": "f", "arguments": {"a": "}\\"{", "b": [1, {}]}}'
ARGUMENTS = '{"a": "}\\"{", "b": [1, {}]}'


def read(reader: Reader, parts: list[str]) -> tuple[str, list[tuple[str, str]]]:
    """Content, and name and arguments of the calls."""
    content, calls = "", []
    pieces = [piece for part in parts for piece in reader.push(part)] + reader.finish()
    for piece in pieces:
        match piece:
            case Content(text):
                content += text
            case CallBegins(name):
                calls.append([name, ""])
            case Arguments(text):
                calls[-1][1] += text
    return content, [tuple(call) for call in calls]


def cut(text: str, places: list[int]) -> list[str]:
    edges = [0, *sorted(place % (len(text) + 1) for place in places), len(text)]
    return [text[start:end] for start, end in pairwise(edges)]


@given(places=st.lists(st.integers(0, 99), max_size=8))
def test_forced_call_streams_its_arguments(places):
    assert read(ForcedCallReader(), cut(f" {CALL} ", places)) == ("", [("f", ARGUMENTS)])


def test_forced_call_that_was_cut_off_keeps_what_there_is():
    assert read(ForcedCallReader(), ['{"name":"f","arguments":{"a":"x']) == ("", [("f", '{"a":"x')])
    assert read(ForcedCallReader(), ['{"na']) == ('{"na', [])


@pytest.mark.parametrize(
    "text",
    [
        CALL,
        f"  [{CALL}]",
        f"```json\n{CALL}\n```",
        f"<tool_call>\n{CALL}\n</tool_call>",
        f"<tool_call>{CALL}",
        f"[TOOL_CALLS] [{CALL}]",
        f"<|python_tag|>{CALL.replace('arguments', 'parameters')}",
        f'{{"type": "function", "function": {CALL}}}',
    ],
)
@given(places=st.lists(st.integers(0, 199), max_size=8))
def test_calls_are_found_in_every_form(text, places):
    content, calls = read(CallDetector(["f"]), cut(text, places))
    assert content.strip() == "" and [name for name, _ in calls] == ["f"]
    assert json.loads(calls[0][1]) == json.loads(ARGUMENTS)


@pytest.mark.parametrize(
    "text",
    [
        "Just text with a < and a [ in it",
        '{"name": "unknown", "arguments": {}}',
        '{"name": "f", "arguments": 7}',
        '{"answer": 1}',
        "```python\nprint(1)\n```",
        "[1, 2]",
        "<tool_call>broken</tool_call>",
        "ends with <tool_c",
    ],
)
@given(places=st.lists(st.integers(0, 199), max_size=8))
def test_everything_else_is_content_unchanged(text, places):
    assert read(CallDetector(["f"]), cut(text, places)) == (text, [])


def test_text_before_calls_and_two_calls():
    text = f"Let me see. <tool_call>{CALL}</tool_call>\n<tool_call>{CALL}</tool_call>"
    content, calls = read(CallDetector(["f"]), [text])
    assert content == "Let me see. " and len(calls) == 2


def test_text_streams_while_it_cannot_be_a_call():
    detector = CallDetector(["f"])
    assert detector.push("Hello ") == [Content("Hello ")]
    assert detector.push("a <to") == [Content("a ")]
    assert detector.push("ad>") == [Content("<toad>")]


def accepts(schema: dict, text: str) -> bool:
    """Whether a whole text follows a schema, by the engine that the workers use."""
    vocabulary = llguidance.LLTokenizer("byte")
    matcher = llguidance.LLMatcher(
        vocabulary, llguidance.LLMatcher.grammar_from_json_schema(json.dumps(schema))
    )
    return all(matcher.consume_token(byte) for byte in text.encode()) and matcher.is_accepting()


def test_schema_forces_a_call_with_references_from_its_new_root():
    parameters = {
        "type": "object",
        "properties": {"color": {"$ref": "#/$defs/Color"}},
        "required": ["color"],
        "additionalProperties": False,
        "$defs": {"Color": {"enum": ["red"]}},
    }
    schema = call_schema({"paint": parameters, "a/b~c%20 d": None})
    check_grammar(Grammar(GrammarKind.JSON_SCHEMA, json.dumps(schema)))
    assert accepts(schema, '{"name":"paint","arguments":{"color":"red"}}')
    assert accepts(schema, '{"name":"a/b~c%20 d","arguments":{"any":1}}')
    assert not accepts(schema, '{"name":"paint","arguments":{"color":"blue"}}')
    assert not accepts(schema, '{"name":"other","arguments":{}}')
