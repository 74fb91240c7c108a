"""Requests as bytes: good ones of every route, and ways to spoil them. All draws come from one `random.Random`."""

import json
from collections.abc import Callable
from copy import deepcopy
from random import Random
from typing import Any

_GENERATE = {"inputs": "abc", "parameters": {"max_new_tokens": 3, "details": True, "stop": ["b"]}}
_CHAT = {
    "messages": [{"role": "user", "content": "Hi"}],
    "max_tokens": 3,
    "logprobs": True,
    "stop": ["x"],
    "logit_bias": {"5": 1.5},
}
_BODIES: tuple[tuple[str, dict[str, Any]], ...] = (
    ("/generate", _GENERATE),
    ("/generate_stream", {"inputs": "abc", "parameters": {"max_new_tokens": 3, "top_n_tokens": 2}}),
    ("/", {**_GENERATE, "stream": True}),
    ("/tokenize", {"inputs": "abc"}),
    ("/chat_tokenize", _CHAT),
    ("/v1/completions", {"prompt": ["abc", "de"], "max_tokens": 2, "n": 2, "echo": True}),
    ("/v1/chat/completions", _CHAT),
    ("/v1/chat/completions", {**_CHAT, "stream": True, "stream_options": {"include_usage": True}}),
    ("/invocations", {"prompt": "abc", "max_tokens": 2}),
    ("/vertex", {"instances": [{"inputs": "abc", "parameters": {"max_new_tokens": 2}}]}),
)
_GETS = (
    "/",
    "/health",
    "/info",
    "/metrics",
    "/v1/models",
    "/v1/models/tiny",
    "/openapi.json",
    "/docs",
    "/requests/0f0f",
    "/requests/0f0f/stream",
)
_VALUES: tuple[Any, ...] = (
    None,
    True,
    0,
    -1,
    2**31,
    2**63,
    10**400,
    1e308,
    -0.0,
    "",
    "\x00",
    "\ud800",
    "é" * 300,
    [],
    {},
    [[[[]]]],
    {"type": "regex", "value": "("},
    {"type": "json", "value": {"$ref": "#"}},
)
_JUNK = (
    b"\x00",
    b"\r\n",
    b"\n",
    b"\r",
    b" ",
    b":",
    b"\xff\xfe",
    b"%00",
    b"%",
    b"..",
    b"\t",
    b"0",
    b"-1",
    b"99999999999999999999",
    b"{" * 2000,
    b"[" * 20_000,
    b"a" * 9000,
    b"Transfer-Encoding: chunked\r\n",
    b"Content-Length: 5\r\n",
    b"Expect: 100-continue\r\n",
    b"Connection: upgrade\r\nUpgrade: websocket\r\n",
    b"Content-Encoding: gzip\r\n",
    b"Last-Event-ID: \xe9:0-00\r\n",
    b"Idempotency-Key: \x01\r\n",
    b"X-Model: \xff\r\n",
    b"traceparent: 00-0-0-0\r\n",
    b"Origin: \x80\r\n",
)


def good_request(random: Random) -> bytes:
    """One that the gateway serves."""
    if random.random() < 0.25:
        method = random.choice(("GET", "GET", "DELETE", "OPTIONS", "POST"))
        return f"{method} {random.choice(_GETS)} HTTP/1.1\r\nHost: a\r\n\r\n".encode()
    path, body = random.choice(_BODIES)
    return post(path, json.dumps(body).encode(), is_chunked=random.random() < 0.2)


def spoiled_request(random: Random) -> bytes:
    """One or two requests with something wrong in their bodies, or anywhere."""
    if random.random() < 0.4:
        path, body = random.choice(_BODIES)
        data = _spoiled_json(random, body)
        return post(path, data, is_chunked=random.random() < 0.2)
    data = good_request(random)
    if random.random() < 0.2:
        data += good_request(random)
    for _ in range(random.randint(1, 4)):
        data = random.choice(_SPOILERS)(random, data)
    return data


def post(path: str, body: bytes, *, is_chunked: bool = False) -> bytes:
    """A request with this body."""
    head = f"POST {path} HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n".encode()
    if is_chunked:
        middle = len(body) // 2
        parts = [part for part in (body[:middle], body[middle:]) if part]
        chunks = b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in parts)
        return head + b"Transfer-Encoding: chunked\r\n\r\n" + chunks + b"0\r\n\r\n"
    return head + b"Content-Length: %d\r\n\r\n" % len(body) + body


def _spoiled_json(random: Random, body: dict[str, Any]) -> bytes:
    body = json.loads(json.dumps(body))
    for _ in range(random.randint(1, 3)):
        place: Any = body
        while True:
            keys = list(place) if isinstance(place, dict) else list(range(len(place)))
            if not keys:
                break
            key = random.choice(keys)
            if isinstance(place[key], (dict, list)) and random.random() < 0.6:
                place = place[key]
                continue
            place[key] = deepcopy(random.choice(_VALUES))
            break
    text = json.dumps(body)
    if random.random() < 0.3:
        text = text.replace(random.choice('"{}[],:0123'), random.choice(("", "NaN", '"', "\\u")), 1)
    return text.encode("utf-8", "surrogatepass")


def _flip(random: Random, data: bytes) -> bytes:
    place = random.randrange(len(data))
    return data[:place] + bytes([data[place] ^ (1 << random.randrange(8))]) + data[place + 1 :]


def _insert(random: Random, data: bytes) -> bytes:
    place = random.randint(0, len(data))
    return data[:place] + random.choice(_JUNK) + data[place:]


def _insert_header(random: Random, data: bytes) -> bytes:
    place = data.find(b"\r\n") + 2
    return data[:place] + random.choice(_JUNK) + data[place:]


def _delete(random: Random, data: bytes) -> bytes:
    start = random.randrange(len(data))
    shorter = data[:start] + data[start + random.randint(1, 20) :]
    return shorter or data


def _repeat(random: Random, data: bytes) -> bytes:
    start = random.randrange(len(data))
    part = data[start : start + random.randint(1, 60)]
    return data[:start] + part * random.randint(2, 5) + data[start:]


def _cut(random: Random, data: bytes) -> bytes:
    return data[: random.randint(1, len(data))]


_SPOILERS: tuple[Callable[[Random, bytes], bytes], ...] = (
    _flip,
    _insert,
    _insert,
    _insert_header,
    _insert_header,
    _delete,
    _repeat,
    _cut,
)
