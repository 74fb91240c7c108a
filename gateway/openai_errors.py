"""Errors in OpenAI's shape, `{"error": {"message", "type", "param", "code"}}`. Pure functions.

400 invalid_request_error   a rule is broken, the body is not JSON, or a field is not supported
401 authentication_error    403 permission_error        404, 405, 413, 415 invalid_request_error
422 invalid_request_error   code template_error: the chat template refuses the messages
424 generation_error        the worker failed on this request; not to be repeated
429 rate_limit_error        code rate_limit_exceeded
503 server_error            code unavailable
"""

import json
import re

from common.errors import (
    FleetError,
    MalformedRequest,
    Overloaded,
    RateLimited,
    ValidationError,
)

_FIELD = re.compile(r"`(\w+)`")  # rules begin with the field that they are about
_PREFIX = "Input validation error: "
_TYPES = {401: "authentication_error", 403: "permission_error", 424: "generation_error"}
_CODES = {401: "invalid_api_key", 429: "rate_limit_exceeded"}


class ContextLengthExceeded(ValidationError):
    """The prompt and the answer are longer than the model's context."""

    kind = "context_length_exceeded"


def is_openai_path(path: str) -> bool:
    """Whether errors of a path have OpenAI's shape."""
    return path.startswith("/v1/")


def openai_status(error: FleetError) -> int:
    """OpenAI answers 400 where TGI answers 422; what a chat template refuses stays 422."""
    if isinstance(error, ValidationError) and error.kind != "template_error":
        return 400
    return error.http_status


def openai_error_json(error: FleetError) -> str:
    """The body of an error, and the data of an error event."""
    message = str(error).removeprefix(_PREFIX)
    if isinstance(error, Overloaded) and not isinstance(error, RateLimited):
        message = "Model is overloaded"
    is_rule = isinstance(error, (ValidationError, MalformedRequest))
    code = None if is_rule and error.kind in ("validation", "malformed_request") else error.kind
    param = "model" if error.kind == "model_not_found" else getattr(error, "param", None)
    if param is None and is_rule and (match := _FIELD.match(message)):
        param = match[1]
    return http_error_json(openai_status(error), message, param=param, code=code)


def http_error_json(
    status: int, message: str, *, param: str | None = None, code: str | None = None
) -> str:
    """The body for a status. Where OpenAI has a code for the status, it replaces `code`."""
    kind = _TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error")
    if status == 429:
        kind = "rate_limit_error"
    error = {"message": message, "type": kind, "param": param, "code": _CODES.get(status, code)}
    return json.dumps({"error": error}, ensure_ascii=False)


def openai_error_event(error: FleetError) -> bytes:
    return f"data: {openai_error_json(error)}\n\n".encode()
