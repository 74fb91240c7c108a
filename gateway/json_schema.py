"""A client's JSON schema as those who write them for language models mean it. Knows no HTTP.

JSON Schema's own reading leaves more open than they think: `properties` says nothing of a text that is no object, and
nothing of other properties. A model that may answer with a bare number, or invent keys, does. Every answer to the
schema made here is an answer to the given one, too.
"""

import json
from typing import Any

from common.messages import Grammar, GrammarKind

_KINDS = frozenset({"type", "$ref", "anyOf", "oneOf", "allOf", "enum", "const", "not", "if"})
_OTHER_KEYS = frozenset({"additionalProperties", "patternProperties", "unevaluatedProperties"})
_JOINING = frozenset({"allOf", "not", "if", "dependentSchemas"})  # one text, several schemas
_CHOOSING = frozenset({"$ref", "anyOf", "oneOf"})
_SCHEMAS_BY_NAME = ("properties", "$defs", "definitions", "patternProperties")
_LISTS_OF_SCHEMAS = ("anyOf", "oneOf", "prefixItems")
_SCHEMAS = ("items", "additionalProperties", "contains")
_DEEPEST = 100  # what is nested deeper stays as it is


def schema_grammar(schema: Any) -> Grammar:
    """The grammar of a schema, given as JSON or as its text; not compiled yet."""
    if isinstance(schema, str):
        try:
            schema = json.loads(schema)
        except (ValueError, RecursionError):  # the compiler says what is wrong
            return Grammar(GrammarKind.JSON_SCHEMA, schema)
    return Grammar(GrammarKind.JSON_SCHEMA, json.dumps(as_meant(schema)))


def as_meant(schema: Any) -> Any:
    """What has `properties` and no kind is an object, and an object with `properties` has no others.

    Where several schemas hold for one text, each may know only some of its keys: then nothing is closed.
    """
    if not isinstance(schema, dict):
        return schema
    return _typed(schema) if _joins(schema, 0) else _closed(schema, 0)


def _joins(value: Any, depth: int) -> bool:
    if depth > _DEEPEST:
        return True
    if isinstance(value, list):
        return any(_joins(part, depth + 1) for part in value)
    if not isinstance(value, dict):
        return False
    keys = value.keys()
    if _JOINING & keys or ("properties" in keys and _CHOOSING & keys):
        return True
    return any(_joins(part, depth + 1) for part in value.values())


def _typed(schema: dict[str, Any]) -> dict[str, Any]:
    is_object = isinstance(schema.get("properties"), dict) and not _KINDS & schema.keys()
    return {"type": "object", **schema} if is_object else schema


def _closed(schema: Any, depth: int) -> Any:
    if not isinstance(schema, dict) or depth > _DEEPEST:
        return schema
    closed = _typed(schema)
    for name in _SCHEMAS_BY_NAME:
        if isinstance(parts := schema.get(name), dict):
            closed = closed | {name: {key: _closed(part, depth + 1) for key, part in parts.items()}}
    for name in _LISTS_OF_SCHEMAS:
        if isinstance(parts := schema.get(name), list):
            closed = closed | {name: [_closed(part, depth + 1) for part in parts]}
    for name in _SCHEMAS:
        if name in schema:
            closed = closed | {name: _closed(schema[name], depth + 1)}
    return closed | {"additionalProperties": False} if _is_whole(schema) else closed


def _is_whole(schema: dict[str, Any]) -> bool:
    """Whether all keys that such an object may have are named here."""
    properties, required = schema.get("properties"), schema.get("required", [])
    if not isinstance(properties, dict) or not isinstance(required, list):
        return False
    return all(name in properties for name in required) and not _OTHER_KEYS & schema.keys()
