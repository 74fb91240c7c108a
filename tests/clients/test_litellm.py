"""`litellm` from PyPI, unmodified: chats, streams, tools, completions, and its errors."""

import json
from typing import Any

import pytest

from tests.clients.answers import error_of

pytestmark = [pytest.mark.redis, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def said(run_program) -> dict[str, Any]:
    """What each scenario of the program came to."""
    return run_program("use_litellm.py", "frameworks.txt")


def test_chat(said):
    assert said["chat"] == {"text": "Hi ", "reason": "length", "usage": [5, 3]}
    assert said["asynchronous"] == {"text": "Hi é", "stream": "Hi é"}


def test_stream(said):
    assert said["stream"] == {"text": "Hi é", "completion_tokens": 6}


def test_tools(said):
    call = said["tools"]
    assert call["name"] == "weather"
    assert json.loads(call["arguments"])["city"] in ("Paris", "Rome")


def test_completion(said):
    assert said["completion"] == {"text": "abc", "stream": "abc"}


@pytest.mark.parametrize(
    ("status", "name", "message"),
    [
        ("400", "ContextWindowExceededError", "maximum context length is 32768 tokens"),
        ("401", "AuthenticationError", "A valid key is needed"),
        ("404", "NotFoundError", "`nowhere` is not served here"),
        ("422", "BadRequestError", "there is no system role"),  # it has one class for 400 and 422
        ("429", "RateLimitError", "Model is overloaded"),
        ("503", "ServiceUnavailableError", "no model is served yet"),
    ],
)
def test_errors(said, status: str, name: str, message: str):
    for failure in said["errors"][status].values():
        assert error_of(failure) == name
        assert message in failure["message"]
