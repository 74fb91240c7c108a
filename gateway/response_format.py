"""`response_format` of a chat, in OpenAI's shapes and TGI's, as a grammar. Knows no HTTP."""

from typing import Any

from common.errors import ValidationError
from common.messages import Grammar, GrammarKind
from gateway.json_schema import schema_grammar
from gateway.schemas.openai import ResponseFormat

_EXPRESSIONS = {"regex": GrammarKind.REGEX, "lark": GrammarKind.LARK}


def grammar_of(given: ResponseFormat | None) -> Grammar | None:
    """What the answer must be; not compiled yet. Raises ValidationError.

    OpenAI  {"type": "text" | "json_object"}, {"type": "json_schema", "json_schema": {name, schema}}
    TGI     {"type": "json" | "json_object", "value": schema}, {"type": "json_schema", "value": {name, schema}},
            {"type": "regex" | "lark", "value": expression}
    """
    if given is None or given.type == "text":
        return None
    if given.type in _EXPRESSIONS:
        if not isinstance(given.value, str):
            raise _wrong(f"of the type {given.type} needs a text as `value`")
        return Grammar(_EXPRESSIONS[given.type], given.value)
    return schema_grammar(_schema(given))


def _schema(given: ResponseFormat) -> Any:
    """The JSON schema; any object when none is given."""
    value = given.value
    if given.type == "json_schema":
        if given.json_schema is not None:
            value = given.json_schema.value
        elif isinstance(value, dict) and "schema" in value:
            value = value["schema"]
        else:
            raise _wrong("of the type json_schema needs `json_schema`: {name, schema}")
    return {"type": "object"} if value is None else value


def _wrong(rule: str) -> ValidationError:
    return ValidationError(
        f"Input validation error: `response_format` {rule}", param="response_format"
    )
