"""Server-sent events out of a byte stream. Knows the wire format, no API's payload.

Only `data` is kept: event names, ids and comments (keep-alives) carry nothing that a load generator
measures.
Source: the WHATWG HTML standard, section "Server-sent events".
"""


class EventSplitter:
    """Turns network chunks, cut anywhere, into the `data` of whole events.

    Lines may end in LF or CRLF. A lone CR as a line end is legal but no server sends it, so it is
    not understood.
    """

    def __init__(self) -> None:
        self._rest = b""
        self._data: list[bytes] = []

    def feed(self, chunk: bytes) -> list[bytes]:
        """The data of the events that `chunk` completes, in order."""
        *lines, self._rest = (self._rest + chunk).split(b"\n")
        events = []
        for line in lines:
            if line.startswith(b"data:"):
                self._data.append(line[5:].strip())
            elif line in (b"", b"\r") and self._data:
                events.append(b"\n".join(self._data))
                self._data = []
        return events

    @property
    def has_unfinished_event(self) -> bool:
        """Whether bytes of an event came whose end did not: the stream was cut."""
        return bool(self._data or self._rest.strip())
