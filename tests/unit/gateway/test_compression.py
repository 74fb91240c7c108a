"""Inflating stops where the limit is, and at nothing that is not whole. Over HTTP: test_bad_bodies.py."""

import gzip
import zlib

import pytest

from gateway.compression import inflate

NUM_BYTES = 10_000_000


@pytest.mark.parametrize(
    ("encoding", "data"),
    [("gzip", gzip.compress(bytes(NUM_BYTES))), ("deflate", zlib.compress(bytes(NUM_BYTES)))],
    ids=["gzip", "deflate"],
)
def test_no_more_is_inflated_than_shows_that_it_is_too_long(encoding, data):
    assert inflate(data, encoding, limit=1000) == bytes(1001)
    assert inflate(data, encoding, limit=NUM_BYTES) == bytes(NUM_BYTES)
