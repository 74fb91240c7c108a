"""Bodies that come compressed, inflated up to a limit. Knows no HTTP beyond the names of the encodings.

gzip and deflate, which every client has; others are refused rather than left to what happens to be installed.
"""

import zlib

ENCODINGS = ("gzip", "deflate")

_GZIP, _ZLIB, _RAW = 16 + zlib.MAX_WBITS, zlib.MAX_WBITS, -zlib.MAX_WBITS


def inflate(data: bytes, encoding: str, *, limit: int) -> bytes:
    """What one of ENCODINGS holds: all of it, or the first `limit + 1` bytes. Blocks for milliseconds a megabyte.

    Raises ValueError when it is broken or goes on behind its end.
    """
    inflater = zlib.decompressobj(_window(data, encoding))
    try:
        text = inflater.decompress(data, limit + 1)
    except zlib.error as error:
        raise ValueError(str(error)) from error
    if len(text) <= limit and (not inflater.eof or inflater.unused_data):
        raise ValueError(f"it is not one whole {encoding} stream")
    return text


def _window(data: bytes, encoding: str) -> int:
    """zlib's name of the format. By HTTP `deflate` is zlib's own, whose first byte says so; many send it bare."""
    if encoding == "gzip":
        return _GZIP
    return _ZLIB if data[:1] and data[0] & 0x0F == zlib.DEFLATED else _RAW
