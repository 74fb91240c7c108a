"""The `openai` package, unmodified: completions, chats, streams, tools, structured output, log-probabilities.

The model `echo` answers with its prompt, and to a chat with the last message; `tiny` says anything, so long as it fits.
What goes wrong is in test_openai_errors.py.
"""

from collections.abc import AsyncIterator
from typing import Literal

import openai
import pytest
from pydantic import BaseModel, ConfigDict, Field

pytestmark = [pytest.mark.redis, pytest.mark.usefixtures("deadline")]

MESSAGES = [{"role": "user", "content": "Hi é"}]


class Report(BaseModel):
    """Short, so that a model that says anything comes to the end of it."""

    model_config = ConfigDict(extra="forbid")

    verdict: Literal["yes", "no"]
    is_sure: bool
    marks: list[Literal[1, 2, 3]] = Field(min_length=1, max_length=2)


class Weather(BaseModel):
    """The weather in a city."""

    city: Literal["Paris", "Rome"]
    is_metric: bool


@pytest.fixture
async def client(servers) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(
        base_url=f"{servers.url}/v1", api_key=servers.key, max_retries=0
    ) as client:
        yield client


async def test_completions(client: openai.AsyncOpenAI):
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


async def test_chats(client: openai.AsyncOpenAI):
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


async def test_structured_output(client: openai.AsyncOpenAI):
    completion = await client.chat.completions.parse(
        model="tiny", messages=MESSAGES, response_format=Report, temperature=1, seed=3
    )
    message = completion.choices[0].message
    assert isinstance(message.parsed, Report) and completion.choices[0].finish_reason == "stop"
    assert message.parsed == Report.model_validate_json(message.content)
    assert message.refusal is None


async def test_streamed_structured_output(client: openai.AsyncOpenAI):
    async with client.chat.completions.stream(
        model="tiny", messages=MESSAGES, response_format=Report, temperature=1, seed=4
    ) as stream:
        kinds = [event.type async for event in stream]
        final = await stream.get_final_completion()
    assert {"chunk", "content.delta", "content.done"} <= set(kinds)
    assert isinstance(final.choices[0].message.parsed, Report)


async def test_json_object(client: openai.AsyncOpenAI):
    answer = await client.chat.completions.create(
        model="tiny", messages=MESSAGES, response_format={"type": "json_object"}, max_tokens=20
    )
    assert answer.choices[0].message.content.lstrip().startswith("{")


@pytest.mark.parametrize(
    "choice", ["required", {"type": "function", "function": {"name": "Weather"}}]
)
async def test_forced_call(client: openai.AsyncOpenAI, choice):
    completion = await client.chat.completions.parse(
        model="tiny",
        messages=MESSAGES,
        tools=[openai.pydantic_function_tool(Weather)],
        tool_choice=choice,
        temperature=1,
        seed=5,
    )
    (made,) = completion.choices[0].message.tool_calls
    assert made.function.name == "Weather" and made.type == "function" and made.id
    assert isinstance(made.function.parsed_arguments, Weather)
    assert completion.choices[0].message.content is None
    assert completion.choices[0].finish_reason == ("tool_calls" if choice == "required" else "stop")


async def test_streamed_call(client: openai.AsyncOpenAI):
    async with client.chat.completions.stream(
        model="tiny",
        messages=MESSAGES,
        tools=[openai.pydantic_function_tool(Weather)],
        tool_choice="required",
        temperature=1,
        seed=6,
    ) as stream:
        kinds = [event.type async for event in stream]
        final = await stream.get_final_completion()
    assert "tool_calls.function.arguments.delta" in kinds
    (made,) = final.choices[0].message.tool_calls
    assert isinstance(made.function.parsed_arguments, Weather)


async def test_conversation_with_a_call(client: openai.AsyncOpenAI):
    """What a client sends back after it ran a function."""
    call = {"id": "1", "type": "function", "function": {"name": "Weather", "arguments": "{}"}}
    answer = await client.chat.completions.create(
        model="echo",
        tools=[openai.pydantic_function_tool(Weather)],
        messages=[
            *MESSAGES,
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "1", "content": "sunny"},
        ],
    )
    assert answer.choices[0].message.content == "sunny"
    assert answer.choices[0].message.tool_calls is None


async def test_streamed_logprobs(client: openai.AsyncOpenAI):
    stream = await client.chat.completions.create(
        model="echo", messages=MESSAGES, stream=True, logprobs=True, top_logprobs=2
    )
    tokens = [
        token
        async for chunk in stream
        for choice in chunk.choices
        for token in (choice.logprobs.content if choice.logprobs else ())
    ]
    assert bytes(byte for token in tokens for byte in token.bytes).decode() == "Hi é"
    assert all(len(token.top_logprobs) == 2 for token in tokens)


async def test_models(client: openai.AsyncOpenAI):
    assert [model.id async for model in client.models.list()] == ["echo", "slow", "tiny"]
    assert (await client.models.retrieve("echo")).id == "echo"


async def test_headers_of_an_answer(client: openai.AsyncOpenAI):
    """`_request_id` is what its users put into bug reports."""
    raw = await client.completions.with_raw_response.create(model="echo", prompt="a")
    assert raw.headers["x-request-id"] and raw.parse()._request_id == raw.headers["x-request-id"]


def test_synchronous_client(servers):
    with openai.OpenAI(base_url=f"{servers.url}/v1", api_key=servers.key) as client:
        answer = client.completions.create(model="echo", prompt="abc")
        assert answer.choices[0].text == "abc"
        chunks = client.chat.completions.create(model="echo", messages=MESSAGES, stream=True)
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "Hi é"
