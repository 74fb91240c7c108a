"""Log-probabilities in OpenAI's two shapes."""

import pytest

from common.messages import FinishReason, Token, TopToken
from tests.openai_calls import HI, events_of, post, tells

pytestmark = pytest.mark.usefixtures("chat_model")


async def test_logprobs_of_completions_with_echo(client, fleet):
    prompt = (TopToken(1, "H", None), TopToken(2, "i", -1.5))
    tells(fleet, Token(3, "!", -0.25), reason=FinishReason.LENGTH, prompt=prompt)
    _, body = await post(client, "completions", prompt="Hi", echo=True, logprobs=0)
    assert fleet.requests[0].prompt_logprobs
    expected = {
        "text_offset": [0, 1, 2],
        "token_logprobs": [None, -1.5, -0.25],
        "tokens": ["H", "i", "!"],
        "top_logprobs": None,
    }
    assert body["choices"][0]["text"] == "Hi!" and body["choices"][0]["logprobs"] == expected
    (event,) = await events_of(client, "completions", prompt="Hi", echo=True, logprobs=0)
    assert event["choices"][0]["logprobs"] == expected

    _, body = await post(client, "completions", prompt="Hi", echo=True, logprobs=0, max_tokens=0)
    assert body["choices"][0]["text"] == "Hi" and body["usage"]["completion_tokens"] == 0
    assert body["choices"][0]["logprobs"]["tokens"] == ["H", "i"]


async def test_logprobs_of_chats(client, fleet):
    top = (TopToken(1, "é", -0.5), TopToken(2, "x", float("-inf")))
    tells(fleet, Token(1, "é", -0.5, top=top), Token(255, "</s>", 0.0, is_special=True))
    entry = {
        "token": "é",
        "logprob": -0.5,
        "bytes": [195, 169],
        "top_logprobs": [
            {"token": "é", "logprob": -0.5, "bytes": [195, 169]},
            {"token": "x", "logprob": -9999.0, "bytes": [120]},
        ],
    }
    asked = {"messages": HI, "logprobs": True, "top_logprobs": 2}
    _, body = await post(client, "chat/completions", **asked)
    assert body["choices"][0]["logprobs"] == {"content": [entry], "refusal": None}
    events = await events_of(client, "chat/completions", **asked)
    found = [event["choices"][0]["logprobs"] for event in events]
    assert [entry for logprobs in found if logprobs for entry in logprobs["content"]] == [entry]


async def test_top_logprobs_up_to_openais_limit(client, fleet):
    asked = {"messages": HI, "logprobs": True}
    status, _ = await post(client, "chat/completions", **asked, top_logprobs=20)
    assert status == 200 and fleet.requests[0].sampling.top_n_tokens == 20
    status, answer = await post(client, "chat/completions", **asked, top_logprobs=21)
    assert status == 400 and answer["error"]["param"] == "top_logprobs"
