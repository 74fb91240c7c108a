"""What a broker answers, and how it goes over the wire (RESP2)."""

from typing import Any

Value = Any  # bytes, int, None, list of them, Status, or an Error


class Error(Exception):
    """An error reply, with its code as the first word."""


class Status(bytes):
    """A status reply such as OK."""


OK = Status(b"OK")


def encode_reply(reply: Value) -> bytes:
    """A reply as RESP2."""
    if isinstance(reply, Status):
        return b"+%s\r\n" % reply
    if isinstance(reply, Error):
        return b"-%s\r\n" % str(reply).encode()
    if reply is None:
        return b"$-1\r\n"
    if isinstance(reply, int):
        return b":%d\r\n" % reply
    if isinstance(reply, bytes):
        return b"$%d\r\n%s\r\n" % (len(reply), reply)
    return b"*%d\r\n%s" % (len(reply), b"".join(map(encode_reply, reply)))
