"""`langchain-openai` from PyPI, unmodified: chats, chains, streams, structured output, tools, and its errors."""

from typing import Any

import pytest

from tests.clients.answers import error_of

pytestmark = [pytest.mark.redis, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def said(run_program) -> dict[str, Any]:
    """What each scenario of the program came to."""
    return run_program("use_langchain.py", "frameworks.txt")


def test_chat(said):
    answer = said["chat"]
    assert (answer["text"], answer["reason"]) == ("Hi é", "stop")
    assert (answer["usage"]["input_tokens"], answer["usage"]["output_tokens"]) == (5, 6)
    assert said["chain"] == "Hi Ada"


def test_stream(said):
    stream = said["stream"]
    assert stream["text"] == "Hi é" and stream["chunks"] >= 5
    assert stream["usage"]["total_tokens"] == 11


def test_asynchronous_calls(said):
    assert said["asynchronous"] == {"stream": "Hi", "batch": ["one", "two"]}


def test_structured_output(said):
    """By `response_format`, and by a forced call."""
    assert said["structured"] == ["Report", "Report"]


def test_tools(said):
    assert said["tools"]["name"] == "weather"
    assert said["tools"]["then"] in ("sunny in Paris", "sunny in Rome")


def test_completion(said):
    assert said["completion"]["text"] == "abc" == "".join(said["completion"]["stream"])


@pytest.mark.parametrize(
    ("status", "base", "message"),
    [
        ("400", "ContextOverflowError", "maximum context length is 32768 tokens"),
        ("401", "AuthenticationError", "A valid key is needed"),
        ("404", "NotFoundError", "`nowhere` is not served here"),
        ("422", "UnprocessableEntityError", "there is no system role"),
        ("429", "RateLimitError", "Model is overloaded"),
        ("503", "InternalServerError", "no model is served yet"),
    ],
)
def test_errors(said, status: str, base: str, message: str):
    """Its own classes, which are openai's too; the long context is known by its code."""
    for failure in said["errors"][status].values():
        assert error_of(failure) and base in failure["bases"], failure["bases"]
        assert message in failure["message"]
