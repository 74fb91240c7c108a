"""Whole events, wherever the network cuts."""

import itertools

from hypothesis import given
from hypothesis import strategies as st

from common.event_stream import EventSplitter

STREAM = (
    b':\n\nid: r:0-aa\ndata: {"a": 1}\n\n: wait\n\ndata: two\r\ndata: lines\r\n\r\n'
    b"id: r:1-bb\ndata: [DONE]\n\n"
)
EXPECTED = [("r:0-aa", '{"a": 1}'), ("", "two\nlines"), ("r:1-bb", "[DONE]")]


@given(st.lists(st.integers(0, len(STREAM)), max_size=8))
def test_cuts_do_not_matter(cuts: list[int]):
    splitter, places = EventSplitter(), sorted({0, *cuts, len(STREAM)})
    chunks = [STREAM[start:end] for start, end in itertools.pairwise(places)]
    events = [event for chunk in chunks for event in splitter.feed(chunk)]
    assert [(event.id, event.data) for event in events] == EXPECTED


def test_half_an_event_is_none():
    assert EventSplitter().feed(b"id: r:0-aa\ndata: x\n") == []


def test_raw_bytes_tell_the_same_event():
    [event, *_] = EventSplitter().feed(STREAM)
    assert EventSplitter().feed(event.raw) == [event]


def test_errors_are_recognized():
    [error] = EventSplitter().feed(b'data: {"error":"gone","error_type":"unavailable"}\n\n')
    assert error.invites_to_come_back and error.error["error"] == "gone"
    [final] = EventSplitter().feed(b'data: {"error":"bad","error_type":"generation"}\n\n')
    assert final.error and not final.invites_to_come_back
    [text] = EventSplitter().feed(b'data: {"token":{"text":"\\"error\\""}}\n\n')
    assert text.error is None
