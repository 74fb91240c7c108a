"""Grammars are checked alike wherever they arrive, and what is wrong is said on one line."""

import llguidance
import pytest

from common.grammar import GrammarError, check_grammar, llguidance_text
from common.messages import Grammar, GrammarKind
from worker.engine.echo import END_TOKEN, echo_tokenizer_json


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        ("json_schema", "{}"),
        (
            "json_schema",
            '{"type":"object","properties":{"a":{"$ref":"#/$defs/x"}},"$defs":{"x":{}}}',
        ),
        ("regex", ""),
        ("regex", r"\p{Lu}[a-z]{2,9}|é"),
        ("lark", 'start: "a" | b\nb: /[0-9]+/'),
    ],
)
def test_valid(kind, value):
    check_grammar(Grammar(GrammarKind(kind), value))


@pytest.mark.parametrize(
    ("kind", "value", "reason"),
    [
        ("json_schema", "", "EOF while parsing a value"),
        ("json_schema", "[1]", "object"),
        ("json_schema", '{"type":"foo"}', "Invalid type: foo"),
        ("json_schema", '{"$ref":"#/nowhere"}', "does not exist"),
        ("json_schema", '{"$ref":"https://example.org/schema"}', ""),
        ("json_schema", '{"type":"string","pattern":"("}', "unclosed group"),
        ("json_schema", '{"a":' * 5000, "recursion limit"),
        ("regex", "(", "unclosed group"),
        ("regex", "(?=a)b", "look-around"),
        ("lark", "", "Empty grammar"),
        ("lark", "start: x", 'unknown name: "x"'),
    ],
)
def test_invalid(kind, value, reason):
    with pytest.raises(GrammarError) as raised:
        check_grammar(Grammar(GrammarKind(kind), value))
    assert reason in str(raised.value) and "\n" not in str(raised.value)


def test_white_space_in_json_is_bounded():
    """A small model would otherwise put line feeds between two parts for ever."""
    tokenizer = llguidance.LLTokenizer(echo_tokenizer_json(), eos_token=END_TOKEN)
    grammar = Grammar(GrammarKind.JSON_SCHEMA, '{"type":"array","items":{"type":"null"}}')
    matcher = llguidance.LLMatcher(tokenizer, llguidance_text(grammar))
    accepted = matcher.try_consume_tokens([*b"[" + b"\n" * 99])
    assert accepted == 1 + 40
