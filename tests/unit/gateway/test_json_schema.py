"""Schemas as they are meant: narrower than as they are written, and never contradictory."""

import json
from functools import partial

import jsonschema_rs
import llguidance
import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.errors import ValidationError
from gateway.grammar import checked_grammar
from gateway.json_schema import as_meant
from gateway.schemas.native import JsonGrammar

NAMES = {"name": {"type": "string"}, "age": {"type": "integer"}}


def test_properties_make_an_object_with_no_other_ones():
    given = {"properties": NAMES, "required": ["name"]}
    assert as_meant(given) == {
        **given,
        "type": "object",
        "additionalProperties": False,
    }
    assert given == {"properties": NAMES, "required": ["name"]}, "what was given stays as it was"


def test_inner_objects_are_meant_so_too():
    inner = {"properties": NAMES}
    meant = as_meant(
        {
            "type": "array",
            "items": {"$ref": "#/$defs/person"},
            "$defs": {
                "person": {"type": "object", "properties": {"parts": {"anyOf": [inner, {}]}}}
            },
        }
    )
    person = meant["$defs"]["person"]
    assert person["additionalProperties"] is False
    assert person["properties"]["parts"]["anyOf"] == [
        {**inner, "type": "object", "additionalProperties": False},
        {},
    ]


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "object"},
        {"type": "object", "properties": NAMES, "additionalProperties": True},
        {"type": "object", "properties": NAMES, "patternProperties": {"^x": {}}},
        {"type": "object", "properties": NAMES, "required": ["other"]},
        {
            "allOf": [{"properties": {"a": {}}}, {"$ref": "#/$defs/b"}],
            "$defs": {"b": {"properties": {}}},
        },
        {"type": "object", "properties": {"a": {}}, "anyOf": [{"properties": {"b": {}}}]},
        {"$ref": "#/$defs/b", "properties": {"a": {}}, "$defs": {"b": {"properties": {"b": {}}}}},
        {"not": {"properties": NAMES}},
        {"type": "string"},
        {"properties": 5},
        True,
        "no schema",
    ],
)
def test_what_says_otherwise_stays_as_it_is(schema):
    assert as_meant(schema) == schema


TGIS_EXAMPLE = {"properties": {"activity": {"type": "string"}}, "required": ["activity"]}


@pytest.mark.parametrize("value", [TGIS_EXAMPLE, json.dumps(TGIS_EXAMPLE)])
async def test_the_grammar_of_a_request_is_what_was_meant(value):
    grammar = await checked_grammar(JsonGrammar(type="json", value=value))
    assert json.loads(grammar.value) == as_meant(TGIS_EXAMPLE) != TGIS_EXAMPLE


async def test_what_is_no_json_is_for_the_compiler_to_refuse():
    with pytest.raises(ValidationError, match="EOF while parsing"):
        await checked_grammar(JsonGrammar(type="json", value='{"a":'))


def test_schemas_nested_without_end_are_no_trouble():
    schema = {"type": "object"}
    for _ in range(900):
        schema = {"properties": {"a": schema}}
    assert as_meant(schema)["type"] == "object"


def _schemas(parts, *, has_types):
    objects = st.fixed_dictionaries(
        {
            "properties": st.dictionaries(st.sampled_from("abc"), parts, max_size=2),
            **({"type": st.just("object")} if has_types else {}),
        },
        optional={
            **({} if has_types else {"type": st.just("object")}),
            "required": st.lists(st.sampled_from("abc"), max_size=2, unique=True),
            "additionalProperties": st.booleans(),
            "anyOf": st.lists(parts, min_size=1, max_size=2),
            "allOf": st.lists(parts, min_size=1, max_size=2),
        },
    )
    arrays = st.fixed_dictionaries({"type": st.just("array"), "items": parts})
    choices = st.fixed_dictionaries({"anyOf": st.lists(parts, min_size=1, max_size=2)})
    return st.one_of(objects, arrays, choices)


LEAVES = st.sampled_from([{}, {"type": "integer"}])
SCHEMAS = st.recursive(LEAVES, partial(_schemas, has_types=False), max_leaves=6)
TYPED_SCHEMAS = st.recursive(LEAVES, partial(_schemas, has_types=True), max_leaves=6)
TEXTS = st.recursive(
    st.integers(0, 1) | st.just("x"),
    lambda parts: st.lists(parts, max_size=2) | st.dictionaries(st.sampled_from("abcd"), parts),
    max_leaves=5,
)


@given(SCHEMAS, TEXTS)
def test_what_answers_the_schema_made_answers_the_one_given(schema, text):
    if jsonschema_rs.is_valid(as_meant(schema), text):
        assert jsonschema_rs.is_valid(schema, text)


@given(TYPED_SCHEMAS)  # without a type, objects may be impossible and numbers not
def test_what_can_be_followed_as_given_can_be_followed_as_meant(schema):
    def problem(value):
        try:
            grammar = llguidance.LLMatcher.grammar_from_json_schema(json.dumps(value))
        except ValueError as error:
            return str(error)
        return llguidance.LLMatcher.validate_grammar(grammar)

    if not problem(schema):
        assert not problem(as_meant(schema))
