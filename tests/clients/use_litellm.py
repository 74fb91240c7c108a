"""A program of a user of `litellm`: chats, streams, tools, completions, and what goes wrong.

Runs in an environment of its own (frameworks.txt); see report.py for what it prints.
"""

import os
from types import SimpleNamespace
from typing import Any

from report import main, outcome

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # else it asks the internet for prices

import litellm

MESSAGES = [{"role": "user", "content": "Hi é"}]
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"enum": ["Paris", "Rome"]}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}


def where(servers: SimpleNamespace, **changes: Any) -> dict[str, Any]:
    url = changes.pop("url", servers.url)
    values = {"model": "openai/echo", "api_base": f"{url}/v1", "api_key": servers.key}
    return values | {"num_retries": 0, "max_retries": 0, "timeout": 30} | changes


def text_of(chunks: list[Any]) -> str:
    return "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)


def chat(servers: SimpleNamespace) -> Any:
    answer = litellm.completion(messages=MESSAGES, max_tokens=3, **where(servers))
    choice = answer.choices[0]
    usage = (answer.usage.prompt_tokens, answer.usage.completion_tokens)
    return {"text": choice.message.content, "reason": choice.finish_reason, "usage": usage}


def stream(servers: SimpleNamespace) -> Any:
    options = {"stream": True, "stream_options": {"include_usage": True}}
    chunks = list(litellm.completion(messages=MESSAGES, **options, **where(servers)))
    return {"text": text_of(chunks), "completion_tokens": chunks[-1].usage.completion_tokens}


async def asynchronous(servers: SimpleNamespace) -> Any:
    answer = await litellm.acompletion(messages=MESSAGES, **where(servers))
    events = await litellm.acompletion(messages=MESSAGES, stream=True, **where(servers))
    chunks = [chunk async for chunk in events]
    return {"text": answer.choices[0].message.content, "stream": text_of(chunks)}


def tools(servers: SimpleNamespace) -> Any:
    answer = litellm.completion(
        messages=MESSAGES,
        tools=[TOOL],
        tool_choice="required",
        seed=1,
        **where(servers, model="openai/tiny"),
    )
    (call,) = answer.choices[0].message.tool_calls
    return {"name": call.function.name, "arguments": call.function.arguments}


def completion(servers: SimpleNamespace) -> Any:
    model = where(servers, model="text-completion-openai/echo")
    answer = litellm.text_completion(prompt="abc", **model)
    chunks = litellm.text_completion(prompt="abc", stream=True, **model)
    texts = [chunk.choices[0].text for chunk in chunks]
    return {"text": answer.choices[0].text, "stream": "".join(text or "" for text in texts)}


def errors(servers: SimpleNamespace) -> Any:
    cases = {
        401: where(servers, api_key="wrong"),
        404: where(servers, model="openai/nowhere"),
        400: where(servers, max_tokens=10**6),
        422: where(servers, model="openai/tiny"),
        429: where(servers, url=servers.full),
        503: where(servers, url=servers.empty),
    }
    return {status: _errors_of(values) for status, values in cases.items()}


def _errors_of(values: dict[str, Any]) -> dict[str, Any]:
    messages = [{"role": "system", "content": "Be kind"}, *MESSAGES]

    def ask(**options: Any) -> Any:
        answer = litellm.completion(messages=messages, **options, **values)
        return list(answer) if options else answer

    return {"plain": outcome(ask), "stream": outcome(lambda: ask(stream=True))}


if __name__ == "__main__":
    main(chat, stream, asynchronous, tools, completion, errors)
