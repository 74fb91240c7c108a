"""`text-generation` 0.7.0 from PyPI, unmodified: what its calls return, and which of its errors each status becomes."""

from typing import Any

import pytest

from tests.clients.answers import error_of

pytestmark = [pytest.mark.redis, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def said(run_program) -> dict[str, Any]:
    """What each scenario of the program came to."""
    return run_program("use_text_generation.py", "text_generation.txt")


def texts(events: list[dict[str, Any]]) -> list[str]:
    return [event["token"]["text"] for event in events]


def test_answer(said):
    assert said["plain"] == {
        "generated_text": "ab",
        "details": {
            "finish_reason": "length",
            "generated_tokens": 2,
            "seed": None,
            "prefill": [],
            "tokens": [
                {"id": 97, "text": "a", "logprob": 0.0, "special": False},
                {"id": 98, "text": "b", "logprob": 0.0, "special": False},
            ],
            "top_tokens": None,
            "best_of_sequences": None,
        },
    }
    assert said["seeded"]["details"]["seed"] == 7


def test_every_parameter_at_once(said):
    answer = said["all_parameters"]
    assert answer["generated_text"] == "abcdefcd"  # the whole prompt, though it was truncated
    details, (other,) = answer["details"], answer["details"]["best_of_sequences"]
    for sequence in (details, other):
        assert (sequence["finish_reason"], sequence["generated_tokens"]) == ("stop_sequence", 2)
        assert [token["text"] for token in sequence["prefill"]] == ["c", "d", "e", "f"]
        logprobs = [token["logprob"] for token in sequence["prefill"]]
        assert logprobs[0] is None and all(isinstance(logprob, float) for logprob in logprobs[1:])
        assert [len(tokens) for tokens in sequence["top_tokens"]] == [2, 2]
    assert details["seed"] != other["seed"]


def test_stream(said):
    events = said["streamed"]
    assert texts(events) == ["a", "", "é", "<|endoftext|>"]  # a character is shown when it is whole
    assert [event["generated_text"] for event in events] == [None, None, None, "aé"]
    assert [event["token"]["special"] for event in events] == [False, False, False, True]
    assert all(len(event["top_tokens"]) == 1 for event in events)
    assert events[-1]["details"] == {
        "finish_reason": "eos_token",
        "generated_tokens": 4,
        "seed": None,
    }


def test_asynchronous_client(said):
    assert said["asynchronous"]["generated_text"] == "ab"
    assert said["asynchronous"]["details"]["finish_reason"] == "stop_sequence"
    assert texts(said["streamed_asynchronously"]) == ["a", "b", "c", "<|endoftext|>"]


def test_chat(said):
    answer = said["chat"]
    (choice,) = answer["choices"]
    assert choice["message"]["content"] == "Hi " and choice["finish_reason"] == "length"
    assert [token["token"] for token in choice["logprobs"]["content"]] == ["H", "i", " "]
    assert answer["usage"]["total_tokens"] == 8
    assert said["chat_asynchronously"]["choices"][0]["message"]["content"] == "Hi é"


def test_streamed_chat_breaks_in_the_client(said):
    """Its model of a chunk demands `tool_calls` in every delta, which neither OpenAI nor TGI sends; then it takes the
    chunk for an error that it cannot read either. test_openai.py reads the same bytes.
    """
    sync, asynchronous = said["chat_stream"], said["chat_stream_asynchronously"]
    assert sync["error"] == "AttributeError" and "no attribute 'status'" in sync["message"]
    assert (asynchronous["error"], asynchronous["message"]) == ("KeyError", "'error'")
    for failure in (sync, asynchronous):
        assert "choices.0.delta.tool_calls" in failure["traceback"]
        assert failure["traceback"].count("Field required") == 1, "nothing else is missing"


@pytest.mark.parametrize(
    ("status", "native", "chat", "message"),
    [
        ("401", "UnknownError", "UnknownError", "A valid key is needed"),
        ("404", "NotFoundError", "NotFoundError", "`nowhere` is not served here"),
        ("422", "ValidationError", "BadRequestError", "Given: 3 `inputs` tokens and 1000000"),
        ("429", "OverloadedError", "RateLimitExceededError", "Model is overloaded"),
        ("503", "UnknownError", "UnknownError", "no model is served yet"),
    ],
)
def test_errors(said, status: str, native: str, chat: str, message: str):
    """Its own names where it has one for the status, and our message."""
    found = said["errors"][status]
    for way in ("plain", "stream"):
        assert error_of(found[way]) == native
        assert message in found[way]["message"]
    assert error_of(found["chat"]) == chat


def test_grammar_that_is_none(said):
    failure = said["errors"]["422"]["grammar"]
    assert error_of(failure) == "ValidationError"
    assert "grammar is not valid: unclosed group" in failure["message"]


def test_errors_of_the_asynchronous_client(said):
    found = {status: error_of(said["asynchronous_errors"][status]) for status in ("401", "429")}
    assert found == {"401": "UnknownError", "429": "OverloadedError"}
    assert error_of(said["asynchronous_errors"]["503"]) == "UnknownError"
