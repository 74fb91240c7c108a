"""A strict reader of HTTP/1.1 answers, for bytes that came from a socket until it was closed or fell silent."""

import json
import re
from dataclasses import dataclass

# aiohttp calls its answer to a request line without a version 0.9, and writes it as 1.0 all the same.
_STATUS = re.compile(rb"HTTP/(?:1\.[01]|0\.9) (\d{3}) [\t\x20-\x7e]*")
_HEADER = re.compile(rb"([!#$%&'*+.^_`|~0-9A-Za-z-]+):[ \t]*([\t\x20-\x7e\x80-\xff]*)")
_CHUNK = re.compile(rb"([0-9a-fA-F]+)\r\n")
_WITHOUT_BODY = (204, 304)


class NotHttp(AssertionError):
    """The bytes are no answer."""


@dataclass(frozen=True, slots=True)
class Answer:
    """One answer; `is_whole` is False where the bytes end before it does."""

    status: int
    headers: dict[str, str]
    body: bytes
    is_whole: bool

    def check(self) -> None:
        """AssertionError for a status that is our fault, and for an error that is not told in JSON."""
        assert self.status < 500 or self.status == 503, f"{self.status} {self.body!r}"
        if self.status < 400 or self.status == 417 or not self.is_whole:  # 417: aiohttp's own words
            return
        assert self.headers.get("content-type", "").startswith("application/json"), self
        error = json.loads(self.body)["error"]
        assert error["message"] if isinstance(error, dict) else error, self


def answers_in(data: bytes, *, has_bodies: bool = True) -> list[Answer]:
    """The answers, in order. `has_bodies` is False when only HEAD was asked. Raises NotHttp."""
    answers = []
    while data:
        answer, data = _first(data, has_bodies=has_bodies)
        if answer.status >= 200:
            answers.append(answer)
    return answers


def _first(data: bytes, *, has_bodies: bool) -> tuple[Answer, bytes]:
    head, separator, rest = data.partition(b"\r\n\r\n")
    status_line, *lines = head.split(b"\r\n")
    match = _STATUS.fullmatch(status_line)
    if not separator or match is None:
        raise NotHttp(f"no head: {data[:200]!r}")
    status, headers = int(match[1]), {}
    for line in lines:
        header = _HEADER.fullmatch(line)
        if header is None:
            raise NotHttp(f"no header: {line!r}")
        headers[header[1].decode().lower()] = header[2].decode("latin-1")
    if status < 200 or status in _WITHOUT_BODY or not has_bodies:
        return Answer(status, headers, b"", True), rest
    body, rest, is_whole = _body(headers, rest)
    return Answer(status, headers, body, is_whole), rest


def _body(headers: dict[str, str], rest: bytes) -> tuple[bytes, bytes, bool]:
    if headers.get("transfer-encoding", "").lower() == "chunked":
        return _chunks(rest)
    if "content-length" not in headers:
        return rest, b"", True
    length = int(headers["content-length"])
    return rest[:length], rest[length:], len(rest) >= length


def _chunks(rest: bytes) -> tuple[bytes, bytes, bool]:
    body = b""
    while match := _CHUNK.match(rest):
        size, start = int(match[1], 16), match.end()
        if len(rest) < start + size + 2:
            return body, b"", False
        if rest[start + size : start + size + 2] != b"\r\n":
            raise NotHttp(f"no end of chunk: {rest[start:][:200]!r}")
        body += rest[start : start + size]
        rest = rest[start + size + 2 :]
        if not size:
            return body, rest, True
    if rest and not re.fullmatch(rb"[0-9a-fA-F]*\r?", rest):
        raise NotHttp(f"no chunk: {rest[:200]!r}")
    return body, b"", False
