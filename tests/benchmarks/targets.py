"""How to ask a server for a stream and how to read its events. Knows payloads, no sockets.

| api           | route                  | one token is                  | servers               |
|---------------|------------------------|-------------------------------|-----------------------|
| `tgi`         | `/generate_stream`     | one event                     | tokenfleet, TGI       |
| `openai`      | `/v1/completions`      | a chunk with text, unless the | the same, vLLM,       |
| `openai-chat` | `/v1/chat/completions` | `usage` at the end says more  | SGLang, llama.cpp's   |
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Progress:
    """What one event says."""

    has_token: bool = False
    is_end: bool = False
    total_tokens: int | None = None  # the server's own count, where the event carries one
    prompt_tokens: int | None = None
    error: str | None = None  # kind of the error that ends this request
    message: str = ""


@dataclass(frozen=True, slots=True)
class Target:
    """One way of talking to a server. `body` maps (prompt, max_new_tokens) to the JSON of a
    request.
    """

    api: str
    path: str
    body: Callable[[str, int], dict[str, Any]]
    read: Callable[[bytes], Progress]


def target_for(
    api: str,
    *,
    model: str = "",
    ignore_eos: bool = True,
    temperature: float = 0.0,
    top_p: float = 1.0,
) -> Target:
    """The target of that name. Raises ValueError on an unknown `api`.

    Args:
        api: "tgi", "openai" or "openai-chat".
        model: the `model` field of OpenAI bodies; vLLM refuses a name that it does not serve.
        ignore_eos: ask for exactly `max_new_tokens` tokens.
        temperature: 0 is greedy decoding; else `top_p` counts too, 1 being off.
    """

    def tgi_body(prompt: str, max_new_tokens: int) -> dict[str, Any]:
        parameters = {"max_new_tokens": max_new_tokens, "details": True}
        parameters |= {"do_sample": temperature > 0}
        if temperature > 0:
            parameters["temperature"] = temperature
        if temperature > 0 and top_p < 1:
            parameters["top_p"] = top_p
        if ignore_eos:
            parameters["ignore_eos_token"] = True
        return {"inputs": prompt, "parameters": parameters}

    def openai_body(max_new_tokens: int) -> dict[str, Any]:
        usage = {"include_usage": True}
        body = {
            "max_tokens": max_new_tokens,
            "temperature": temperature,
            "top_p": top_p if temperature > 0 else 1.0,
            "stream": True,
            "stream_options": usage,
        }
        return (
            body
            | ({"model": model} if model else {})
            | ({"ignore_eos": True} if ignore_eos else {})
        )

    def completion_body(prompt: str, max_new_tokens: int) -> dict[str, Any]:
        return {"prompt": prompt} | openai_body(max_new_tokens)

    def chat_body(prompt: str, max_new_tokens: int) -> dict[str, Any]:
        return {"messages": [{"role": "user", "content": prompt}]} | openai_body(max_new_tokens)

    targets = {
        "tgi": Target("tgi", "/generate_stream", tgi_body, read_tgi),
        "openai": Target("openai", "/v1/completions", completion_body, read_openai),
        "openai-chat": Target("openai-chat", "/v1/chat/completions", chat_body, read_openai),
    }
    if api not in targets:
        raise ValueError(f"`api` must be one of {', '.join(targets)}. Given: {api}")
    return targets[api]


def read_tgi(data: bytes) -> Progress:
    """An event of `/generate_stream`. Raises ValueError when it is no JSON object."""
    event = _object(data)
    if "error" in event:
        return _error(event)
    details = event.get("details") or {}
    return Progress(
        has_token=event.get("token") is not None,
        is_end=event.get("generated_text") is not None,
        total_tokens=details.get("generated_tokens"),
        prompt_tokens=details.get("input_length"),
    )


def read_openai(data: bytes) -> Progress:
    """A chunk of either OpenAI route. Raises ValueError when it is neither JSON object nor
    `[DONE]`.

    A chunk without text is no token: chat streams open with a role alone, and close with a bare
    finish reason.
    """
    if data == b"[DONE]":
        return Progress(is_end=True)
    chunk = _object(data)
    if chunk.get("error"):
        return _error(chunk)
    usage = chunk.get("usage") or {}
    return Progress(
        has_token=any(_has_text(choice) for choice in chunk.get("choices") or ()),
        total_tokens=usage.get("completion_tokens"),
        prompt_tokens=usage.get("prompt_tokens"),
    )


def error_kind(body: bytes) -> tuple[str, str]:
    """(kind, message) of an error body of any server; a body that is not JSON has no kind."""
    try:
        error = _error(_object(body))
    except ValueError:
        return "", body[:200].decode(errors="replace")
    return error.error or "", error.message


def _has_text(choice: dict[str, Any]) -> bool:
    delta = choice.get("delta") or {}
    texts = (
        choice.get("text"),
        delta.get("content"),
        delta.get("reasoning_content"),
        delta.get("reasoning"),
    )
    return any(texts)


def _error(event: dict[str, Any]) -> Progress:
    """TGI has `error` and `error_type` side by side, OpenAI nests `message`, `type` and `code`."""
    error = event.get("error")
    if isinstance(error, dict):
        kind = error.get("type") or error.get("code") or error.get("http_status_code")
        return Progress(error=str(kind or "error"), message=str(error.get("message", "")))
    return Progress(error=str(event.get("error_type") or "error"), message=str(error or ""))


def _object(data: bytes) -> dict[str, Any]:
    value = json.loads(data)
    if not isinstance(value, dict):
        raise ValueError(f"expected a JSON object, got {data[:80]!r}")
    return value
