"""What a request may bring is refused before anything is queued, on every route and by the rule that it breaks."""

import json
from dataclasses import replace

import pytest
from tokenizers import Tokenizer

from gateway import input_limits
from tests.openai_calls import TEMPLATE

CARD_SIZE = 256
ROUTES = ("/generate", "/v1/completions", "/v1/chat/completions")


def body_of(route: str, text: str = "Hi", **parameters) -> dict:
    """A body of this route; `parameters` are those that all routes have."""
    if route == "/generate":
        return {"inputs": text, "parameters": parameters}
    if route == "/v1/completions":
        return {"prompt": text, **parameters}
    return {"messages": [{"role": "user", "content": text}], **parameters}


async def refused(client, fleet, route: str, body: dict) -> str:
    """The message of a refusal, by which nothing was queued."""
    response = await client.post(route, json=body)
    answer = json.loads(await response.text())
    assert response.status == (422 if route == "/generate" else 400), answer
    assert not fleet.requests
    return answer["error"] if route == "/generate" else answer["error"]["message"]


@pytest.fixture
async def padded(fleet, client):
    """The tokenizer has a token more than the model, as those of fine-tuned models may."""
    tokenizer = Tokenizer.from_str(fleet.registry.tokenizers["bytes"].decode())
    tokenizer.add_special_tokens(["<pad>"])
    fleet.registry.tokenizers["padded"] = tokenizer.to_str().encode()
    card = fleet.registry.cards["tiny"]
    fleet.registry.cards["tiny"] = replace(
        card, tokenizer_digest="padded", chat_template=TEMPLATE, vocab_size=CARD_SIZE
    )
    await client.services.directory.refresh()


@pytest.mark.usefixtures("padded")
@pytest.mark.parametrize("route", ROUTES)
async def test_token_that_the_model_has_not(client, fleet, route):
    message = await refused(client, fleet, route, body_of(route, "Hi<pad>"))
    assert "below 256, the size of the model's vocabulary" in message
    assert "Given: 256, which is `<pad>`" in message
    assert (await client.post(route, json=body_of(route))).status == 200


@pytest.mark.usefixtures("padded")
async def test_token_that_truncation_removes_is_none(client, fleet):
    body = body_of("/generate", "<pad>Hi", truncate=2)
    assert (await client.post("/generate", json=body)).status == 200


async def test_tokens_given_by_number(client, fleet):
    message = await refused(client, fleet, "/v1/completions", {"prompt": [1, 999], "echo": True})
    assert "`prompt` takes token ids below 256" in message and "Given: 999; leave" in message


@pytest.mark.usefixtures("chat_model")
@pytest.mark.parametrize("route", ROUTES)
async def test_long_stop_sequence(client, fleet, route):
    stop = ["x", "y" * 1001]
    message = await refused(client, fleet, route, body_of(route, stop=stop))
    assert "`stop` takes texts of up to 1000 characters. Given: one of 1001" in message
    body = body_of(route, stop=["y" * 1000])
    assert (await client.post(route, json=body)).status == 200


@pytest.mark.usefixtures("chat_model")
@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize(
    ("bias", "rule"),
    [
        ({f"{number:09}": 1 for number in range(1025)}, "up to 1024 tokens. Given: 1025"),
        ({"1": 1, "01": 2}, "each token once. Given: 1 again, as 01"),
    ],
)
async def test_logit_bias_of_too_many_tokens_or_one_twice(client, fleet, route, bias, rule):
    message = await refused(client, fleet, route, body_of(route, logit_bias=bias))
    assert f"`logit_bias` takes {rule}" in message


@pytest.mark.usefixtures("chat_model")
@pytest.mark.parametrize(
    ("route", "several"),
    [
        ("/generate", {"best_of": 2, "do_sample": True}),
        ("/v1/completions", {"n": 2}),
        ("/v1/chat/completions", {"n": 2}),
    ],
)
async def test_sequences_that_would_fill_the_broker(client, fleet, monkeypatch, route, several):
    monkeypatch.setattr(input_limits, "MOST_STORED_BYTES", 2500)
    stop = ["y" * 1000]
    message = await refused(client, fleet, route, body_of(route, stop=stop, **several))
    assert "all sequences of a request may take 2500 bytes" in message
    assert (await client.post(route, json=body_of(route, stop=stop))).status == 200
    assert (await client.post(route, json=body_of(route, **several))).status == 200


async def test_the_prompt_that_an_answer_repeats_is_stored_too(client, fleet, monkeypatch):
    monkeypatch.setattr(input_limits, "MOST_STORED_BYTES", 2500)
    given = {"truncate": 2, "best_of": 2, "do_sample": True}
    body = body_of("/generate", "a" * 1000, **given, return_full_text=True)
    await refused(client, fleet, "/generate", body)
    body = body_of("/generate", "a" * 1000, **given)
    assert (await client.post("/generate", json=body)).status == 200


async def test_several_prompts_count_together(client, fleet, monkeypatch):
    monkeypatch.setattr(input_limits, "MOST_STORED_BYTES", 2500)
    body = {"prompt": ["a", "b"], "stop": "y" * 1000}
    assert "of a request may take" in await refused(client, fleet, "/v1/completions", body)
