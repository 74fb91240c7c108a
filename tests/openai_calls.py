"""Calls of OpenAI's routes in tests: what is asked, what the fleet answers, and what comes back."""

import json

from common.messages import Finish, FinishReason, Frame, Token, first_chain, next_chain

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<a>{% endif %}"
)
HI = [{"role": "user", "content": "Hi"}]
ADD = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}


def tells(fleet, *tokens: Token, reason=FinishReason.EOS_TOKEN, prompt=()) -> None:
    """Every request is answered with these tokens, a frame each."""

    def answer(request):
        frames, chain = [], first_chain(request.id)
        for number, token in enumerate(tokens):
            chain = next_chain(chain, (token,))
            is_last = number == len(tokens) - 1
            finish = Finish(reason, len(tokens), cached_tokens=2) if is_last else None
            frames.append(
                Frame(tokens=(token,), chain=chain, prompt=() if number else prompt, finish=finish)
            )
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


def prompt_of(client, request) -> str:
    """What the model is told."""
    return client.services.directory.default.tokenizer.decode(request.prompt_tokens)
