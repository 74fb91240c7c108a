"""Clients from PyPI, unmodified, against a running gateway and an echo worker: what a user's program does.

The echo model answers with its prompt, and to a chat with the last message.
"""

from collections.abc import AsyncIterator

import openai
import pytest
from huggingface_hub import AsyncInferenceClient
from huggingface_hub.errors import TextGenerationError, ValidationError

from tests.fleet import Fleet

pytestmark = [pytest.mark.redis, pytest.mark.usefixtures("deadline")]

KEY = "secret"


@pytest.fixture
async def url(redis_url: str) -> AsyncIterator[str]:
    fleet = Fleet(redis_url)
    try:
        await fleet.worker()
        yield await fleet.gateway("--api-key", KEY)
    finally:
        await fleet.stop()


@pytest.fixture
async def client(url: str) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0) as client:
        yield client


async def test_openai_client(client: openai.AsyncOpenAI, url: str):
    """One server for all that its client can do: starting one takes most of the time."""
    await _completions(client)
    await _chats(client)
    await _models(client)
    await _errors(client, url)


async def _completions(client: openai.AsyncOpenAI) -> None:
    answer = await client.completions.create(model="echo", prompt="abc", temperature=0)
    (choice,) = answer.choices
    assert (choice.text, choice.finish_reason) == ("abc", "stop")
    assert answer.id.startswith("cmpl-") and answer.object == "text_completion"
    assert answer.usage.prompt_tokens == 3 and answer.usage.completion_tokens == 4
    assert answer.usage.total_tokens == 7

    answer = await client.completions.create(
        model="echo", prompt=["abc", "def"], n=2, max_tokens=2, logprobs=2, seed=1
    )
    assert [choice.text for choice in answer.choices] == ["ab", "ab", "de", "de"]
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert {choice.finish_reason for choice in answer.choices} == {"length"}
    logprobs = answer.choices[2].logprobs
    assert logprobs.tokens == ["d", "e"] and logprobs.text_offset == [0, 1]
    assert logprobs.token_logprobs == [0.0, 0.0] and set(logprobs.top_logprobs[0]) > {"d"}

    answer = await client.completions.create(
        model="echo", prompt=[97, 98], echo=True, logprobs=0, max_tokens=0
    )
    assert answer.choices[0].text == "ab"
    assert answer.choices[0].logprobs.token_logprobs[0] is None
    assert answer.usage.completion_tokens == 0

    answer = await client.completions.create(model="echo", prompt="one two three", stop=" th")
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == ("one two", "stop")

    stream = await client.completions.create(
        model="echo",
        prompt=["ab", "cd"],
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"ignore_eos": True},
        max_tokens=5,
    )
    texts, reasons, usage = {0: "", 1: ""}, {}, None
    async for chunk in stream:
        usage = chunk.usage
        for choice in chunk.choices:
            texts[choice.index] += choice.text
            if choice.finish_reason:
                reasons[choice.index] = choice.finish_reason
    assert texts == {0: "abab", 1: "cdcd"} and reasons == {0: "length", 1: "length"}
    assert (usage.prompt_tokens, usage.completion_tokens) == (4, 10)


async def _chats(client: openai.AsyncOpenAI) -> None:
    messages = [{"role": "system", "content": "Be kind"}, {"role": "user", "content": "Hi é"}]
    answer = await client.chat.completions.create(
        model="echo", messages=messages, n=2, logprobs=True, top_logprobs=1
    )
    assert [choice.message.content for choice in answer.choices] == ["Hi é", "Hi é"]
    assert answer.choices[0].finish_reason == "stop" and answer.choices[1].index == 1
    assert answer.choices[0].message.role == "assistant" and answer.id.startswith("chatcmpl-")
    tokens = answer.choices[0].logprobs.content
    assert bytes(byte for token in tokens for byte in token.bytes).decode() == "Hi é"
    assert len(tokens[0].top_logprobs) == 1

    stream = await client.chat.completions.create(
        model="echo",
        messages=messages,
        n=2,
        stream=True,
        stream_options={"include_usage": True},
        max_completion_tokens=3,
    )
    texts, roles, usage = {0: "", 1: ""}, [], None
    async for chunk in stream:
        usage = chunk.usage
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            roles += [choice.delta.role] if choice.delta.role else []
    assert texts == {0: "Hi ", 1: "Hi "} and roles == ["assistant", "assistant"]
    assert usage.completion_tokens == 6

    call = '{"name": "add", "arguments": {"a": 1}}'
    tools = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]
    answer = await client.chat.completions.create(
        model="echo",
        tools=tools,
        messages=[
            {"role": "user", "content": "?"},
            {"role": "tool", "tool_call_id": "1", "content": call},
        ],
    )
    (made,) = answer.choices[0].message.tool_calls
    assert (made.function.name, made.function.arguments) == ("add", '{"a": 1}')
    assert answer.choices[0].finish_reason == "tool_calls"


async def _models(client: openai.AsyncOpenAI) -> None:
    assert [model.id async for model in client.models.list()] == ["echo"]
    assert (await client.models.retrieve("echo")).id == "echo"


async def _errors(client: openai.AsyncOpenAI, url: str) -> None:
    with pytest.raises(openai.NotFoundError) as failure:
        await client.completions.create(model="gpt-9", prompt="a")
    assert failure.value.code == "model_not_found" and "echo" in failure.value.message
    assert failure.value.type == "invalid_request_error"

    with pytest.raises(openai.BadRequestError) as failure:
        await client.completions.create(model="echo", prompt="a", temperature=3)
    assert failure.value.param == "temperature" and failure.value.code is None

    with pytest.raises(openai.BadRequestError) as failure:
        await client.completions.create(model="echo", prompt="a", max_tokens=10**6)
    assert failure.value.code == "context_length_exceeded"

    with pytest.raises(openai.BadRequestError, match="suffix"):
        await client.completions.create(model="echo", prompt="a", suffix="z")

    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="wrong", max_retries=0) as stranger:
        with pytest.raises(openai.AuthenticationError) as failure:
            await stranger.completions.create(model="echo", prompt="a")
    assert failure.value.code == "invalid_api_key"
    assert failure.value.type == "authentication_error"


async def test_openai_client_of_a_full_gateway(redis_url: str):
    fleet = Fleet(redis_url)
    try:
        await fleet.worker("--echo-delay-ms", "20")
        url = await fleet.gateway("--max-concurrent-requests", "1")
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="-", max_retries=0) as client:
            stream = await client.completions.create(
                model="echo",
                prompt="a",
                max_tokens=2000,
                stream=True,
                extra_body={"ignore_eos": True},
            )
            await anext(aiter(stream))
            with pytest.raises(openai.RateLimitError) as failure:
                await client.completions.create(model="echo", prompt="a")
            assert failure.value.code == "rate_limit_exceeded"
            assert failure.value.response.headers["retry-after"] == "1"
            await stream.close()  # ends the generation, so that the retries below get through
            patient = client.with_options(max_retries=5)
            answer = await patient.completions.create(model="echo", prompt="a")
            assert answer.choices[0].text == "a"
    finally:
        await fleet.stop()


async def test_huggingface_client(url: str):
    async with AsyncInferenceClient(base_url=url, api_key=KEY) as client:
        assert await client.text_generation("abc", max_new_tokens=2) == "abcab"  # TGI's default

        answer = await client.text_generation("abc", details=True, decoder_input_details=True)
        assert answer.generated_text == "abcabc" and answer.details.finish_reason == "eos_token"
        assert [token.text for token in answer.details.prefill] == ["a", "b", "c"]

        stream = await client.text_generation(
            "abc", stream=True, details=True, max_new_tokens=2, return_full_text=False
        )
        events = [event async for event in stream]
        assert [event.token.text for event in events] == ["a", "b"]
        assert events[-1].generated_text == "ab" and events[-1].details.finish_reason == "length"

        messages = [{"role": "user", "content": "abc"}]
        answer = await client.chat_completion(messages, logprobs=True, max_tokens=2)
        assert answer.choices[0].message.content == "ab"
        assert answer.choices[0].finish_reason == "length" and answer.usage.completion_tokens == 2

        stream = await client.chat_completion(messages, stream=True)
        deltas = [chunk.choices[0].delta.content async for chunk in stream]
        assert "".join(delta or "" for delta in deltas) == "abc"

        with pytest.raises(ValidationError, match="strictly positive"):
            await client.text_generation("abc", temperature=-1.0)
    async with AsyncInferenceClient(base_url=url, api_key="wrong") as stranger:
        with pytest.raises(TextGenerationError, match="valid key"):
            await stranger.text_generation("abc")
