"""`huggingface_hub.InferenceClient`, unmodified: text generation and chats, in one piece and streamed, and its errors."""

from collections.abc import Iterator

import httpx2
import pytest
from huggingface_hub import AsyncInferenceClient, InferenceClient
from huggingface_hub.errors import (
    HfHubHTTPError,
    OverloadedError,
    UnknownError,
    ValidationError,
)

pytestmark = [pytest.mark.redis, pytest.mark.usefixtures("deadline")]

MESSAGES = [{"role": "user", "content": "abc"}]


@pytest.fixture
def client(servers) -> Iterator[InferenceClient]:
    with InferenceClient(base_url=servers.url, api_key=servers.key) as client:
        yield client


def test_text_generation(client: InferenceClient):
    assert client.text_generation("abc", max_new_tokens=2) == "abcab"  # TGI's default
    answer = client.text_generation("abc", max_new_tokens=2, return_full_text=False)
    assert answer == "ab"


def test_details(client: InferenceClient):
    answer = client.text_generation(
        "abc",
        details=True,
        decoder_input_details=True,
        best_of=2,
        do_sample=True,
        top_n_tokens=2,
        stop=["c"],
    )
    details = answer.details
    assert (answer.generated_text, details.finish_reason) == ("abcabc", "stop_sequence")
    assert [token.text for token in details.prefill] == ["a", "b", "c"]
    assert details.prefill[0].logprob is None and details.prefill[1].logprob < 0
    assert [token.text for token in details.tokens] == ["a", "b", "c"]
    assert [len(tokens) for tokens in details.top_tokens] == [2, 2, 2]
    (other,) = details.best_of_sequences
    assert other.generated_tokens == 3 and other.seed != details.seed


def test_stream(client: InferenceClient):
    texts = client.text_generation("abc", stream=True, max_new_tokens=2)
    assert list(texts) == ["a", "b"]


def test_stream_with_details(client: InferenceClient):
    events = list(client.text_generation("abc", stream=True, details=True, return_full_text=False))
    assert [event.token.text for event in events] == ["a", "b", "c", "<|endoftext|>"]
    assert [event.index for event in events] == [1, 2, 3, 4]
    last = events[-1]
    assert last.generated_text == "abc" and last.token.special
    assert (last.details.finish_reason, last.details.input_length) == ("eos_token", 3)


def test_chat(client: InferenceClient):
    answer = client.chat_completion(MESSAGES, logprobs=True, max_tokens=2)
    choice = answer.choices[0]
    assert (choice.message.content, choice.finish_reason) == ("ab", "length")
    assert [token.token for token in choice.logprobs.content] == ["a", "b"]
    assert answer.usage.completion_tokens == 2


def test_streamed_chat(client: InferenceClient):
    chunks = list(
        client.chat_completion(MESSAGES, stream=True, stream_options={"include_usage": True})
    )
    deltas = [choice.delta.content for chunk in chunks for choice in chunk.choices]
    assert "".join(delta or "" for delta in deltas) == "abc"
    assert chunks[-1].usage.completion_tokens == 4


def test_structured_output(client: InferenceClient):
    schema = {
        "type": "object",
        "properties": {"sure": {"type": "boolean"}},
        "required": ["sure"],
        "additionalProperties": False,
    }
    wanted = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}
    answer = client.chat_completion(MESSAGES, model="tiny", response_format=wanted, seed=1)
    assert '"sure"' in answer.choices[0].message.content


def test_openai_spelling(client: InferenceClient):
    answer = client.chat.completions.create(messages=MESSAGES, model="echo")
    assert answer.choices[0].message.content == "abc"


async def test_asynchronous_client(servers):
    async with AsyncInferenceClient(base_url=servers.url, api_key=servers.key) as client:
        assert await client.text_generation("abc", max_new_tokens=2) == "abcab"
        stream = await client.text_generation("abc", stream=True, details=True, max_new_tokens=2)
        events = [event async for event in stream]
        assert [event.token.text for event in events] == ["a", "b"]
        stream = await client.chat_completion(MESSAGES, stream=True)
        deltas = [chunk.choices[0].delta.content async for chunk in stream]
        assert "".join(delta or "" for delta in deltas) == "abc"


ERRORS = {
    401: (UnknownError, "A valid key is needed"),
    404: (UnknownError, "`nowhere` is not served here"),
    422: (ValidationError, "`temperature` must be strictly positive"),
    429: (OverloadedError, "Model is overloaded"),
    503: (UnknownError, "no model is served yet"),
}


@pytest.mark.parametrize("streams", [False, True])
@pytest.mark.parametrize("status", ERRORS)
def test_errors(servers, status: int, streams: bool):
    """Its class for the `error_type`, which is of the status, and our message."""
    url = {429: servers.full, 503: servers.empty}.get(status, servers.url)
    key = "wrong" if status == 401 else servers.key
    headers = {"X-Model": "nowhere"} if status == 404 else {}
    cls, message = ERRORS[status]
    temperature = -1.0 if status == 422 else None
    with (
        InferenceClient(base_url=url, api_key=key, headers=headers) as client,
        pytest.raises(cls, match=message) as failure,
    ):
        list(client.text_generation("abc", stream=streams, temperature=temperature))
    assert type(failure.value) is cls
    cause = failure.value.__cause__
    assert isinstance(cause, (HfHubHTTPError, httpx2.HTTPStatusError))
    assert cause.response.status_code == status


@pytest.mark.parametrize("status", [401, 404, 422, 429, 503])
def test_errors_of_chats(servers, status: int):
    url = {429: servers.full, 503: servers.empty}.get(status, servers.url)
    key = "wrong" if status == 401 else servers.key
    model = {404: "nowhere", 422: "tiny"}.get(status, "echo")
    role = "system" if status == 422 else "user"
    with (
        InferenceClient(base_url=url, api_key=key) as client,
        pytest.raises(HfHubHTTPError) as failure,
    ):
        client.chat_completion([{"role": role, "content": "a"}], model=model)
    assert failure.value.response.status_code == status
