"""Server-sent events out of a byte stream, for clients that go on elsewhere when a connection breaks. No I/O.

Only whole events count: what a broken connection leaves of an event is thrown away, and comes again.
Source: the WHATWG HTML standard, section "Server-sent events".
"""

import json
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Event:
    """One event: what came over the wire, its id (empty when it has none) and its data."""

    raw: bytes
    id: str
    data: str

    @property
    def error(self) -> dict[str, Any] | None:
        """The body of an error event of our API."""
        if '"error"' not in self.data:
            return None
        try:
            body = json.loads(self.data)
        except ValueError:
            return None
        return body if isinstance(body, dict) and "error_type" in body else None

    @property
    def invites_to_come_back(self) -> bool:
        """Whether this gateway gives the stream up, but not the fleet."""
        error = self.error
        return error is not None and error["error_type"] == "unavailable"


class EventSplitter:
    """Turns network chunks, cut anywhere, into whole events; comments are dropped."""

    def __init__(self) -> None:
        self._rest = b""
        self._lines: list[bytes] = []

    def feed(self, chunk: bytes) -> list[Event]:
        """The events that `chunk` completes, in order."""
        *lines, self._rest = (self._rest + chunk).split(b"\n")
        events = []
        for line in lines:
            line = line.removesuffix(b"\r")
            if line:
                if not line.startswith(b":"):
                    self._lines.append(line)
            elif self._lines:
                events.append(_event(self._lines))
                self._lines = []
        return events


def _event(lines: list[bytes]) -> Event:
    fields: dict[str, list[str]] = {}
    for line in lines:
        name, _, value = line.decode("utf-8", "replace").partition(":")
        fields.setdefault(name, []).append(value.removeprefix(" "))
    raw = b"\n".join(lines) + b"\n\n"
    return Event(raw, fields.get("id", [""])[-1], "\n".join(fields.get("data", [])))
