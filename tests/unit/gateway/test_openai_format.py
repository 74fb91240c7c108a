"""OpenAI's routes over HTTP: what reaches the queue, shapes, streams, tools, refusals. The fleet is in memory."""

import json
from dataclasses import replace

import pytest
from tokenizers import Tokenizer, processors

from common.errors import GenerationFailed, Overloaded, Unavailable
from common.messages import (
    Failure,
    Finish,
    FinishReason,
    Frame,
    GrammarKind,
    Token,
    TopToken,
    first_chain,
    next_chain,
)
from gateway.schemas.openai import ChatBody, CompletionBody

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<a>{% endif %}"
)
HI = [{"role": "user", "content": "Hi"}]
ADD = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
CALL = '{"name": "add", "arguments": {"a": 1}}'


@pytest.fixture
def fleet(fleet):
    card = fleet.registry.cards["tiny"]
    fleet.registry.cards["tiny"] = replace(
        card, max_input_tokens=400, max_total_tokens=500, chat_template=TEMPLATE, eos_tokens=(255,)
    )
    return fleet


def tells(fleet, *tokens: Token, reason=FinishReason.EOS_TOKEN, prompt=()) -> None:
    """Every request is answered with these tokens, a frame each."""

    def answer(request):
        frames, chain = [], first_chain(request.id)
        for number, token in enumerate(tokens):
            chain = next_chain(chain, (token,))
            is_last = number == len(tokens) - 1
            finish = Finish(reason, len(tokens), cached_tokens=2) if is_last else None
            frames.append(Frame((token,), chain, () if number else prompt, finish=finish))
        return frames

    fleet.answer = answer


async def post(client, path: str, **body):
    response = await client.post(f"/v1/{path}", json=body)
    return response.status, json.loads(await response.text())


async def events_of(client, path: str, **body) -> list[dict]:
    """The chunks of a stream, which ends as OpenAI's do."""
    response = await client.post(f"/v1/{path}", json={**body, "stream": True})
    text = await response.text()
    assert response.status == 200, text
    lines = [line for line in text.split("\n") if line.startswith("data:")]
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line[5:]) for line in lines[:-1]]


def texts_of(events: list[dict]) -> str:
    choices = [choice for event in events for choice in event["choices"]]
    return "".join(choice["delta"].get("content", "") for choice in choices)


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


def prompt_of(client, request) -> str:
    """What the model is told."""
    return client.services.directory.default.tokenizer.decode(request.prompt_tokens)


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


@pytest.mark.parametrize(
    ("prompt", "num_prompts"), [("a", 1), (["a", "b"], 2), ([1, 2], 1), ([[1], [2, 3]], 2)]
)
async def test_prompt_in_every_shape_and_seeds_that_differ(client, fleet, prompt, num_prompts):
    status, body = await post(client, "completions", prompt=prompt, n=3, seed=5)
    assert status == 200
    assert [choice["index"] for choice in body["choices"]] == list(range(3 * num_prompts))
    assert len({request.id for request in fleet.requests}) == 3 * num_prompts
    assert [request.sampling.seed for request in fleet.requests[:1]] == [5]
    assert len({request.sampling.seed for request in fleet.requests}) == 3


async def test_best_of_gives_the_most_likely(client, fleet, frames_of):
    def answer(request):
        number = int(request.id[-1])
        return frames_of(request.id, [f" {number}"], logprob=-2.0 + number)

    fleet.answer = answer
    _, body = await post(client, "completions", prompt="Hi", best_of=2, n=1)
    assert [choice["text"] for choice in body["choices"]] == [" 1"]
    assert body["usage"]["completion_tokens"] == 2 and body["usage"]["prompt_tokens"] == 2


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


async def test_chat_stream_has_one_role_and_a_last_reason(client, fleet):
    tells(fleet, Token(1, "a", -1.0), Token(2, "b", -1.0), reason=FinishReason.STOP_SEQUENCE)
    events = await events_of(
        client, "chat/completions", messages=HI, stream_options={"include_usage": True}
    )
    assert len({event["id"] for event in events}) == 1
    assert {event["object"] for event in events} == {"chat.completion.chunk"}
    deltas = [choice["delta"] for event in events for choice in event["choices"]]
    assert deltas == [{"role": "assistant", "content": ""}, {"content": "a"}, {"content": "b"}, {}]
    reasons = [choice["finish_reason"] for event in events for choice in event["choices"]]
    assert reasons == [None, None, None, "stop"]
    assert [event["usage"] for event in events[:-1]] == [None] * 4
    assert events[-1]["choices"] == [] and events[-1]["usage"]["total_tokens"] == 13


async def test_stream_without_usage_does_not_mention_it(client):
    for event in await events_of(client, "completions", prompt="Hi"):
        assert "usage" not in event


async def test_only_the_last_event_of_a_frame_has_an_id(client, fleet):
    response = await client.post("/v1/completions", json={"prompt": "Hi", "stream": True})
    request_id = response.headers["x-request-id"]
    blocks = [block for block in (await response.text()).split("\n\n") if "data:" in block]
    ids = [block.partition("\n")[0] if block.startswith("id:") else None for block in blocks]
    assert ids[0].startswith(f"id: {request_id}:0-") and ids[1] is None
    assert blocks[-1].endswith("data: [DONE]") and ids[-1].startswith(f"id: {request_id}:1-")


async def test_several_streamed_choices_end_once(client, fleet):
    events = await events_of(client, "chat/completions", messages=HI, n=3)
    for index in range(3):
        choices = [choice for event in events for choice in event["choices"]]
        mine = [choice for choice in choices if choice["index"] == index]
        assert mine[0]["delta"]["role"] == "assistant"
        assert "".join(choice["delta"].get("content", "") for choice in mine) == " one two"
        assert [choice["finish_reason"] for choice in mine if choice["finish_reason"]] == ["length"]


@pytest.mark.parametrize(
    "messages",
    [
        [{"role": "user", "content": [{"type": "text", "text": "H"}, {"type": "text", "text": "i"}]}],
        [{"role": "user", "content": "Hi", "name": "me", "unknown": 1}],
    ],
)  # fmt: skip
async def test_content_in_parts(client, fleet, messages):
    await post(client, "chat/completions", messages=messages)
    assert prompt_of(client, fleet.requests[0]) == "<user>Hi<a>"


async def test_roles_and_history(client, fleet):
    call = {"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
    messages = [
        {"role": "developer", "content": "D"},
        *HI,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "1", "content": "2"},
    ]
    template = TEMPLATE + "{{ messages[2].tool_calls[0].function.arguments.a }}"
    card = fleet.registry.cards["tiny"]
    fleet.registry.cards["tiny"] = replace(card, chat_template=template)
    await client.services.directory.refresh()
    await post(client, "chat/completions", messages=messages)
    text = prompt_of(client, fleet.requests[0])
    assert text == "<system>D<user>Hi<assistant><tool>2<a>1"


async def test_special_tokens_are_added_to_prompts_but_not_to_chats(make_client, fleet):
    tokenizer = Tokenizer.from_str(fleet.registry.tokenizers["bytes"].decode())
    begin = tokenizer.token_to_id("!")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="! $0", special_tokens=[("!", begin)]
    )
    fleet.registry.tokenizers["bytes"] = tokenizer.to_str().encode()
    client = await make_client()
    await post(client, "completions", prompt="Hi")
    await post(client, "chat/completions", messages=HI)
    assert [request.prompt_tokens[0] == begin for request in fleet.requests] == [True, False]


async def test_final_message_of_the_assistant_is_continued(client, fleet):
    messages = [*HI, {"role": "assistant", "content": "So "}]
    await post(client, "chat/completions", messages=messages)
    await post(client, "chat/completions", messages=messages, continue_final_message=False)
    texts = [prompt_of(client, request) for request in fleet.requests]
    assert texts == ["<user>Hi<assistant>So ", "<user>Hi<assistant>So <a>"]


@pytest.mark.parametrize("choice", ["required", "add", {"function": {"name": "add"}}])
async def test_forced_tool_is_a_grammar_and_a_call(client, fleet, choice):
    tells(fleet, *(Token(1, character, -1.0) for character in CALL))
    asked = {"messages": HI, "tools": [ADD], "tool_choice": choice}
    _, body = await post(client, "chat/completions", **asked)
    grammar = fleet.requests[0].sampling.grammar
    assert grammar.kind is GrammarKind.JSON_SCHEMA and '"const": "add"' in grammar.value
    text = prompt_of(client, fleet.requests[0])
    assert '"name": "add"' in text  # the template shows no tools, so the message does
    (chosen,) = body["choices"]
    (call,) = chosen["message"]["tool_calls"]
    assert call["function"] == {"name": "add", "arguments": '{"a": 1}'} and len(call["id"]) == 9
    assert chosen["message"]["content"] is None
    assert chosen["finish_reason"] == ("tool_calls" if choice == "required" else "stop")

    events = await events_of(client, "chat/completions", **asked)
    deltas = [event["choices"][0]["delta"] for event in events]
    calls = [delta["tool_calls"][0] for delta in deltas if "tool_calls" in delta]
    assert calls[0]["function"] == {"name": "add", "arguments": ""} and calls[0]["id"]
    assert "".join(call["function"]["arguments"] for call in calls) == '{"a": 1}'
    assert len(calls) > 3 and {call["index"] for call in calls} == {0}


async def test_model_that_is_free_may_call_or_answer(client, fleet):
    asked = {"messages": HI, "tools": [ADD]}
    tells(fleet, *(Token(1, part, -1.0) for part in ("<tool_", f"call>{CALL}</tool", "_call>")))
    _, body = await post(client, "chat/completions", **asked)
    assert (
        body["choices"][0]["message"]["tool_calls"] and fleet.requests[0].sampling.grammar is None
    )
    assert body["choices"][0]["finish_reason"] == "tool_calls"
    events = await events_of(client, "chat/completions", **asked)
    assert texts_of(events) == "" and events[-1]["choices"][0]["finish_reason"] == "tool_calls"

    tells(fleet, Token(1, "No ", -1.0), Token(1, "<tool_box>", -1.0))
    events = await events_of(client, "chat/completions", **asked)
    assert texts_of(events) == "No <tool_box>"
    assert events[-1]["choices"][0]["finish_reason"] == "stop"
    await post(client, "chat/completions", **asked, tool_choice="none")
    assert prompt_of(client, fleet.requests[-1]) == "<user>Hi<a>"


SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}


@pytest.mark.parametrize(
    ("given", "kind", "value"),
    [
        ({"type": "json_object"}, "json_schema", {"type": "object"}),
        ({"type": "json_schema", "json_schema": {"name": "x", "strict": True, "schema": SCHEMA}}, "json_schema", SCHEMA),
        ({"type": "json_object", "value": SCHEMA}, "json_schema", SCHEMA),
        ({"type": "json", "value": SCHEMA}, "json_schema", SCHEMA),
        ({"type": "json_schema", "value": {"name": "x", "schema": SCHEMA}}, "json_schema", SCHEMA),
        ({"type": "regex", "value": "[0-9]+"}, "regex", "[0-9]+"),
    ],
)  # fmt: skip
async def test_response_format_in_openais_shapes_and_tgis(client, fleet, given, kind, value):
    status, body = await post(client, "chat/completions", messages=HI, response_format=given)
    assert status == 200, body
    grammar = fleet.requests[0].sampling.grammar
    assert grammar.kind == kind
    assert (json.loads(grammar.value) if kind == "json_schema" else grammar.value) == value


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("completions", {"prompt": "Hi", "suffix": "x"}, "suffix"),
        ("completions", {"prompt": "Hi", "banana": 1}, "banana"),
        ("completions", {"prompt": "Hi", "temperature": 2.5}, "temperature"),
        ("completions", {"prompt": "Hi", "n": 0}, "n"),
        ("completions", {"prompt": "Hi", "n": 2, "best_of": 1}, "best_of"),
        ("completions", {"prompt": "Hi", "logprobs": 6}, "logprobs"),
        ("completions", {"prompt": "Hi", "echo": True, "logprobs": 1}, "logprobs"),
        ("completions", {"prompt": []}, "prompt"),
        ("completions", {"prompt": ""}, "prompt"),
        ("completions", {"prompt": [999]}, "prompt"),
        ("completions", {"prompt": ["a"] * 5}, "prompt"),
        ("completions", {"prompt": "Hi", "stop": [""]}, "stop"),
        ("completions", {"prompt": "Hi", "max_tokens": 0}, "max_tokens"),
        ("completions", {"prompt": "Hi", "logit_bias": {"x": 1}}, "logit_bias"),
        ("completions", {"prompt": "Hi", "stream_options": {}}, "stream_options"),
        ("completions", {"prompt": "Hi", "max_tokens": "7"}, "max_tokens"),
        ("chat/completions", {"messages": []}, "messages"),
        ("chat/completions", {"messages": HI, "functions": [{}]}, "functions"),
        ("chat/completions", {"messages": HI, "audio": {}}, "audio"),
        ("chat/completions", {"messages": HI, "modalities": ["text", "audio"]}, "modalities"),
        ("chat/completions", {"messages": HI, "top_logprobs": 1}, "top_logprobs"),
        ("chat/completions", {"messages": HI, "tool_choice": "required"}, "tool_choice"),
        ("chat/completions", {"messages": HI, "tools": [ADD], "tool_choice": "sub"}, "tool_choice"),
        ("chat/completions", {"messages": HI, "tools": [ADD, ADD]}, "tools"),
        ("chat/completions", {"messages": HI, "max_tokens": 1, "max_completion_tokens": 2}, "max_tokens"),
        ("chat/completions", {"messages": HI, "response_format": {"type": "json_schema"}}, "response_format"),
    ],
)  # fmt: skip
async def test_refusals_name_the_field(client, fleet, path, body, param):
    status, answer = await post(client, path, **body)
    assert status == 400 and set(answer["error"]) == {"message", "type", "param", "code"}
    assert answer["error"]["type"] == "invalid_request_error" and answer["error"]["code"] is None
    assert answer["error"]["param"].split(".")[0] == param, answer
    assert param in answer["error"]["message"] and not fleet.requests


async def test_neutral_values_of_unsupported_fields_are_accepted(client):
    status, _ = await post(
        client, "chat/completions", messages=HI, modalities=["text"], store=False, functions=[]
    )
    assert status == 200


async def test_context_length(client):
    status, body = await post(client, "completions", prompt="Hi", max_tokens=499)
    assert status == 400 and body["error"]["code"] == "context_length_exceeded"
    assert "maximum context length is 500 tokens" in body["error"]["message"]
    status, body = await post(
        client, "chat/completions", messages=[{"role": "user", "content": "x" * 450}]
    )
    assert status == 400 and body["error"]["param"] == "messages"


async def test_template_error(client, fleet):
    card = fleet.registry.cards["tiny"]
    fleet.registry.cards["tiny"] = replace(card, chat_template="{{ raise_exception('no') }}")
    await client.services.directory.refresh()
    status, body = await post(client, "chat/completions", messages=HI)
    assert status == 422 and body["error"]["code"] == "template_error"


@pytest.mark.parametrize(
    ("error", "status", "kind", "code"),
    [
        (Overloaded(retry_after_s=7), 429, "rate_limit_error", "rate_limit_exceeded"),
        (Unavailable("gone"), 503, "server_error", "unavailable"),
        (GenerationFailed("boom"), 424, "generation_error", "generation"),
    ],
)
async def test_errors_of_the_fleet(client, fleet, error, status, kind, code):
    fleet.error = error
    response = await client.post("/v1/completions", json={"prompt": "Hi"})
    body = (await response.json())["error"]
    assert (response.status, body["type"], body["code"]) == (status, kind, code)
    if status in (429, 503):
        assert response.headers["retry-after"] == ("7" if status == 429 else "1")


async def test_errors_around_the_handlers(make_client):
    client = await make_client(api_key="k", payload_limit=1000)
    headers = {"authorization": "Bearer k"}
    for method, path, data, status, code in (
        ("POST", "completions", "{}", 401, "invalid_api_key"),
        ("GET", "models/none/such", None, 404, "model_not_found"),
        ("POST", "nothing", "{}", 404, None),
        ("GET", "completions", None, 405, None),
        ("POST", "completions", "x" * 2000, 413, "payload_too_large"),
        ("POST", "completions", "{", 400, None),
    ):
        given = {"content-type": "application/json", **(headers if status != 401 else {})}
        response = await client.request(method, f"/v1/{path}", data=data, headers=given)
        body = json.loads(await response.text())["error"]
        assert (response.status, body["code"]) == (status, code), path
        assert body["message"] and "type" in body


async def test_error_in_a_stream_is_the_last_event(client, fleet, frames_of):
    def answer(request):
        first = frames_of(request.id, ["a", "b"])[0]
        return [first, Frame(failure=Failure("generation", "boom"))]

    fleet.answer = answer
    response = await client.post(
        "/v1/chat/completions", json={"messages": HI, "n": 2, "stream": True}
    )
    last = (await response.text()).strip().split("\n\n")[-1]
    error = json.loads(last.removeprefix("data: "))["error"]
    assert response.status == 200 and error["type"] == "generation_error"


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


async def test_top_logprobs_up_to_openais_limit(client, fleet):
    asked = {"messages": HI, "logprobs": True}
    status, _ = await post(client, "chat/completions", **asked, top_logprobs=20)
    assert status == 200 and fleet.requests[0].sampling.top_n_tokens == 20
    status, answer = await post(client, "chat/completions", **asked, top_logprobs=21)
    assert status == 400 and answer["error"]["param"] == "top_logprobs"
