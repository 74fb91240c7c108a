"""OpenAI's routes over HTTP, on a fleet in memory: what reaches the queue, and whole answers."""

import json

import pytest

from common.messages import FinishReason, Token
from gateway.schemas.openai import ChatBody, CompletionBody
from tests.openai_calls import HI, post, prompt_of, tells

pytestmark = pytest.mark.usefixtures("chat_model")


async def test_completion_has_openais_keys(client, fleet):
    tells(fleet, Token(1, " one", -0.5), Token(255, "</s>", -0.1, is_special=True))
    status, body = await post(client, "completions", model="tiny", prompt="Hi")
    assert status == 200
    assert body.pop("id").startswith("cmpl-") and body.pop("created") > 0
    assert body.pop("system_fingerprint").startswith("tokenfleet-")
    assert body == {
        "object": "text_completion",
        "model": "tiny",
        "choices": [{"text": " one", "index": 0, "logprobs": None, "finish_reason": "stop"}],
        "usage": {
            "prompt_tokens": 2,
            "completion_tokens": 2,
            "total_tokens": 4,
            "prompt_tokens_details": {"cached_tokens": 2},
        },
    }


async def test_chat_has_openais_keys(client, fleet):
    tells(fleet, Token(1, " one", -0.5), Token(2, " two", -0.5), reason=FinishReason.LENGTH)
    _, body = await post(client, "chat/completions", messages=HI)
    assert body["id"].startswith("chatcmpl-") and body["object"] == "chat.completion"
    assert body["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": " one two", "refusal": None},
            "logprobs": None,
            "finish_reason": "length",
        }
    ]
    (request,) = fleet.requests
    assert prompt_of(client, request) == "<user>Hi<a>"


async def test_openais_defaults_reach_the_queue(client, fleet):
    await post(client, "completions", prompt="Hi")
    (request,) = fleet.requests
    assert request.sampling.do_sample and request.sampling.temperature == 1.0
    assert request.stopping.max_new_tokens == 16 and not request.stopping.include_stop


async def test_parameters_reach_the_queue(client, fleet):
    await post(
        client,
        "chat/completions",
        messages=HI,
        temperature=0.5,
        top_p=0.9,
        frequency_penalty=1,
        presence_penalty=-2,
        logit_bias={"7": -100},
        seed=-1,
        stop="x",
        max_completion_tokens=9,
        top_k=-1,
        min_tokens=2,
        ignore_eos=True,
        repetition_penalty=1.5,
        user="me",
    )
    sampling, stopping = fleet.requests[0].sampling, fleet.requests[0].stopping
    assert (sampling.temperature, sampling.top_p, sampling.top_k) == (0.5, 0.9, 0)
    assert (sampling.frequency_penalty, sampling.presence_penalty) == (1.0, -2.0)
    assert sampling.logit_bias == ((7, -100.0),) and sampling.seed == 2**64 - 1
    assert sampling.repetition_penalty == 1.5
    assert (stopping.stop, stopping.max_new_tokens, stopping.min_new_tokens) == (("x",), 9, 2)
    assert stopping.ignore_eos


@pytest.mark.parametrize("greedy", [{"temperature": 0}, {"top_p": 0}])
async def test_greedy(client, fleet, greedy):
    await post(client, "completions", prompt="Hi", seed=3, **greedy)
    assert not fleet.requests[0].sampling.do_sample


async def test_every_optional_field_may_be_null(client):
    for path, cls, given in (
        ("completions", CompletionBody, {"prompt": "Hi"}),
        ("chat/completions", ChatBody, {"messages": HI}),
    ):
        nulls = dict.fromkeys(set(cls.model_fields) - set(given))
        status, body = await post(client, path, **given, **nulls)
        assert status == 200, body


async def test_best_of_gives_the_most_likely(client, fleet, frames_of):
    def answer(request):
        number = int(request.id[-1])
        return frames_of(request.id, [f" {number}"], logprob=-2.0 + number)

    fleet.answer = answer
    _, body = await post(client, "completions", prompt="Hi", best_of=2, n=1)
    assert [choice["text"] for choice in body["choices"]] == [" 1"]
    assert body["usage"]["completion_tokens"] == 2 and body["usage"]["prompt_tokens"] == 2


async def test_placeholders_mean_the_default_model(client, fleet):
    for name in ("tgi", "dummy"):
        status, body = await post(client, "completions", model=name, prompt="Hi")
        assert status == 200 and body["model"] == "tiny"
    status, body = await post(client, "completions", model="gpt-4", prompt="Hi")
    assert status == 404 and "`tiny`" in body["error"]["message"]


async def test_idempotency_key_makes_one_generation(client, fleet):
    headers = {"idempotency-key": "k1"}
    ids = set()
    for prompt, status in (("Hi", 200), ("Other", 400)):
        response = await client.post("/v1/completions", json={"prompt": prompt}, headers=headers)
        assert response.status == status
        ids.add(response.headers["x-request-id"])
    assert len(ids) == 1 and len(fleet.requests) == 1
    assert json.loads(await response.text())["error"]["code"] == "idempotency_conflict"


async def test_openapi_describes_the_routes(client):
    document = await (await client.get("/openapi.json")).json()
    operation = document["paths"]["/v1/chat/completions"]["post"]
    error = operation["responses"]["429"]["content"]["application/json"]["schema"]["$ref"]
    assert error.endswith("OpenAIErrorAnswer") and "/v1/models/{model}" in document["paths"]
    body = document["components"]["schemas"]["ChatBody"]
    assert body["required"] == ["messages"] and body["properties"]["messages"]["examples"]
