"""What is wrong with a body, from pydantic's errors: one problem, in a line, by its place in what the client sent."""

from typing import Any

from pydantic import ValidationError as BodyError
from pydantic_core import from_json

from common.errors import FleetError, MalformedRequest, ValidationError
from gateway.schemas.openai import UNSUPPORTED_PART

NOT_JSON = "Failed to parse the request body as JSON: "

_WRONG_TYPE = "Failed to deserialize the JSON body into the target type: "
_MOST_PROBLEMS = 1000  # pydantic makes objects of all or none, on the event loop


def error_of(error: BodyError, data: bytes) -> FleetError:
    """The error to raise for `data`; values in it are not repeated."""
    if error.error_count() > _MOST_PROBLEMS:  # unknown fields, or values of a `logit_bias`
        return ValidationError(f"{_WRONG_TYPE}it is wrong in {error.error_count()} places")
    problems = error.errors(include_url=False, include_input=False)
    if problems[0]["type"] == "json_invalid":
        problem = problems[0]
        reason = problem["ctx"]["error"] if "ctx" in problem else problem["msg"]
        return MalformedRequest(f"{NOT_JSON}{reason}")
    problem, parts = _nearest(problems, from_json(data))
    place = ".".join(parts)
    if problem["type"] == "extra_forbidden":
        return ValidationError(f"Unrecognized request argument supplied: {place}", param=place)
    if problem["type"] == UNSUPPORTED_PART:
        return ValidationError(problem["msg"], param=place)
    text = f"{_WRONG_TYPE}{place + ': ' if place else ''}{problem['msg']}"
    return ValidationError(text, param=place or None)


def _nearest(problems: list[dict[str, Any]], body: Any) -> tuple[dict[str, Any], list[str]]:
    """The first problem and its place in the body. Where a value may have one of several types, each has problems
    of its own: the one that got furthest is what the client meant.
    """
    places = [_place(problem, body) for problem in problems]
    (first, union_at), *_ = places
    rivals = [
        number
        for number, (parts, _) in enumerate(places)
        if union_at is not None and parts[:union_at] == first[:union_at]
    ]
    nearest = max(rivals, key=lambda number: len(places[number][0]), default=0)
    return problems[nearest], places[nearest][0]


def _place(problem: dict[str, Any], body: Any) -> tuple[list[str], int | None]:
    """Keys and indices that lead to a problem, and how many stand before the first choice of a type.

    pydantic puts the names of the types that it tried between them: they are what is not in the body.
    """
    parts, union_at = [], None
    for number, part in enumerate(problem["loc"], 1):
        is_missing = problem["type"] == "missing" and number == len(problem["loc"])
        if is_missing or _is_in(part, body):
            parts.append(str(part))
            body = None if is_missing else body[part]
        elif union_at is None:
            union_at = len(parts)
    return parts, union_at


def _is_in(part: str | int, body: Any) -> bool:
    if isinstance(body, list):
        return isinstance(part, int) and part < len(body)
    return isinstance(body, dict) and part in body
