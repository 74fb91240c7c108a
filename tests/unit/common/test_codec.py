"""Every message survives the wire, and what is no message is refused."""

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.codec import DecodeError, decode, decode_frame, encode, encode_frame
from common.messages import (
    Failure,
    Finish,
    FinishReason,
    Frame,
    GenerationRequest,
    Grammar,
    GrammarKind,
    ModelCard,
    Sampling,
    Stopping,
    Token,
    TopToken,
    first_chain,
    next_chain,
)

texts = st.text(max_size=8)
logprobs = st.floats(-100, 0)
ids = st.integers(0, 2**31 - 1)
top_tokens = st.builds(TopToken, ids, texts, st.none() | logprobs, st.booleans())
tokens = st.builds(
    Token, ids, texts, logprobs, st.booleans(), st.lists(top_tokens, max_size=2).map(tuple)
)
finishes = st.builds(Finish, st.sampled_from(FinishReason), ids, *[st.floats(0, 1e6)] * 3, ids)
frames = (
    st.builds(
        Frame,
        chain=st.binary(max_size=8),
        tokens=st.lists(tokens, max_size=3).map(tuple),
        prompt=st.lists(top_tokens, max_size=3).map(tuple),
    )
    | st.builds(Frame, finish=finishes)
    | st.builds(Frame, failure=st.builds(Failure, texts, texts))
)
requests = st.builds(
    GenerationRequest,
    id=texts,
    model=texts,
    prompt_tokens=st.lists(ids).map(tuple),
    sampling=st.builds(
        Sampling,
        temperature=st.floats(0.1, 10),
        seed=st.integers(0, 2**64 - 1),
        logit_bias=st.lists(st.tuples(ids, st.floats(-100, 100))).map(tuple),
        watermark=st.booleans(),
        grammar=st.none() | st.builds(Grammar, st.sampled_from(GrammarKind), texts),
    ),
    stopping=st.builds(Stopping, ids, stop=st.lists(texts).map(tuple)),
)


@given(frames)
def test_frame_round_trip(frame: Frame):
    assert decode_frame(encode_frame(frame)) == frame


@given(requests)
def test_request_round_trip(request: GenerationRequest):
    assert decode(GenerationRequest, encode(request)) == request


def test_model_card_round_trip():
    card = ModelCard("m", 10, 20, 30, "digest", eos_tokens=(1, 2), chat_template="{{ x }}")
    assert decode(ModelCard, encode(card)) == card


def test_field_of_a_newer_writer_is_ignored():
    data = msgpack.packb([1, {"max_new_tokens": 3, "invented_later": 1}])
    assert decode(Stopping, data) == Stopping(3)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xc1",
        msgpack.packb(1),
        msgpack.packb([2, {}]),
        msgpack.packb([1, {}]),
        msgpack.packb([1, 3]),
    ],
)
def test_what_is_no_message_is_refused(data: bytes):
    with pytest.raises(DecodeError):
        decode(Stopping, data)
    with pytest.raises(DecodeError):
        decode_frame(data)


def test_chain_depends_on_request_order_and_text():
    one, two = Token(1, "a", 0.0), Token(2, "b", 0.0)
    start = first_chain("r")
    assert next_chain(start, (one, two)) != next_chain(start, (two, one))
    assert next_chain(start, (one,)) != next_chain(first_chain("s"), (one,))
    assert next_chain(start, (one,)) != next_chain(start, (Token(1, "c", 0.0),))
