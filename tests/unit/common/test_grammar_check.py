"""Grammars are checked alike wherever they arrive, and what is wrong is said on one line."""

import json
import multiprocessing
from contextlib import suppress

import llguidance
import pytest

from common.grammar import (
    MOST_CHARACTERS,
    GrammarError,
    check_grammar,
    compiled,
    llguidance_text,
)
from common.messages import Grammar, GrammarKind
from worker.engine.echo import END_TOKEN, echo_tokenizer_json

FIELDS = {str(number): {"type": "string"} for number in range(5000)}
HUGE_SCHEMA = {"type": "object", "properties": FIELDS, "required": list(FIELDS)}


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
        ("json_schema", json.dumps(HUGE_SCHEMA), "too big (limit for this grammar: 20000)"),
    ],
)
def test_invalid(kind, value, reason):
    with pytest.raises(GrammarError) as raised:
        check_grammar(Grammar(GrammarKind(kind), value))
    assert reason in str(raised.value) and "\n" not in str(raised.value)


def chained(kind: str, link: str, num_links: int) -> Grammar:
    """A grammar as deep as it is long."""
    if kind == "lark":
        rules = (link.replace("A", f"a{i}").replace("B", f"a{i + 1}") for i in range(num_links))
        return Grammar(GrammarKind.LARK, "start: a0\n" + "".join(rules) + f'a{num_links}: "x"')
    parts = {f"d{i}": json.loads(link.replace("B", f"#/$defs/d{i + 1}")) for i in range(num_links)}
    schema = {"$ref": "#/$defs/d0", "$defs": {**parts, f"d{num_links}": {}}}
    return Grammar(GrammarKind.JSON_SCHEMA, json.dumps(schema))


DEEP = [
    ("lark", "A: B\n", 18_000),
    ("lark", 'A: "0" B\n', 12_000),
    ("json", '{"$ref": "B"}', 7000),
    ("json", '{"properties": {"a": {"$ref": "B"}}}', 4000),
    ("json", '{"allOf": [{"$ref": "B"}, {"type": "object"}]}', 3400),
    ("json", '{"items": {"$ref": "B"}}', 5000),
]


def follow(deep: tuple[str, str, int]) -> None:
    """As a gateway and a worker do: either compiles it, or says why not."""
    grammar = chained(*deep)
    assert len(grammar.value) < MOST_CHARACTERS
    tokenizer = llguidance.LLTokenizer(echo_tokenizer_json(), eos_token=END_TOKEN)
    with suppress(GrammarError):
        check_grammar(grammar)
    with suppress(GrammarError):
        compiled(grammar, tokenizer).compute_bitmask()


@pytest.mark.parametrize("deep", DEEP)
def test_what_is_nested_deep_does_not_end_the_process(deep):
    """In a process of its own, which would overflow the stack and die."""
    process = multiprocessing.get_context("spawn").Process(target=follow, args=(deep,))
    process.start()
    process.join(60)
    assert process.exitcode == 0


def test_what_is_too_long_is_not_compiled():
    with pytest.raises(GrammarError, match=r"up to 250000 characters. Given: 250001"):
        check_grammar(Grammar(GrammarKind.REGEX, "a" * 250_001))


def test_white_space_in_json_is_bounded():
    """A small model would otherwise put line feeds between two parts for ever."""
    tokenizer = llguidance.LLTokenizer(echo_tokenizer_json(), eos_token=END_TOKEN)
    grammar = Grammar(GrammarKind.JSON_SCHEMA, '{"type":"array","items":{"type":"null"}}')
    matcher = llguidance.LLMatcher(tokenizer, llguidance_text(grammar))
    accepted = matcher.try_consume_tokens([*b"[" + b"\n" * 99])
    assert accepted == 1 + 40
