"""From OpenAI's prompts and conversations to what the model reads."""

from dataclasses import replace

import pytest
from tokenizers import Tokenizer, processors

from tests.openai_calls import HI, TEMPLATE, post, prompt_of

pytestmark = pytest.mark.usefixtures("chat_model")


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


async def test_guideline_is_a_variable_of_the_template(client, fleet, chat_model):
    """TGI's field for models that judge by a policy."""
    card = fleet.registry.cards["tiny"]
    template = (
        "{{ guideline or 'none' }}|{{ other }}|{% for m in messages %}{{ m.content }}{% endfor %}"
    )
    fleet.registry.cards["tiny"] = replace(card, chat_template=template)
    await client.services.directory.refresh()
    other = {"chat_template_kwargs": {"other": "b", "guideline": "c"}}
    for body in ({"guideline": "a", **other}, {"guideline": None, **other}, {}):
        status, answer = await post(client, "chat/completions", messages=HI, **body)
        assert status == 200, answer
    assert [prompt_of(client, request) for request in fleet.requests] == [
        "a|b|Hi",
        "c|b|Hi",
        "none||Hi",
    ]


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
