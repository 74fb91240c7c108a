"""The JSON of answers and events, byte for byte."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.errors import DeadlineExceeded, GenerationFailed, Overloaded, ValidationError
from common.messages import (
    Finish,
    FinishReason,
    Frame,
    GenerationRequest,
    Sampling,
    Stopping,
    Token,
    TopToken,
)
from gateway.generation import Completion
from gateway.native_format import StreamFormat, answer_json, error_json, number, token_json
from gateway.validation import ValidGeneration

FINISH = Finish(FinishReason.EOS_TOKEN, 2)


def valid(*, has_details=True, prefix="", sampling=None) -> ValidGeneration:
    request = GenerationRequest("r", "m", (1, 2, 3), sampling or Sampling(), Stopping(5))
    return ValidGeneration((request,), has_details, prefix, 4)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "null"),
        (float("nan"), "null"),
        (float("-inf"), "null"),
        (-0.10000000149011612, "-0.1"),
        (-11.890625, "-11.890625"),
        (-5.0, "-5.0"),
        (0.0, "0.0"),
        (-1e-9, "-1e-09"),
        (-123456789.0, "-1.2345679e+08"),
    ],
)
def test_log_probability(value, text):
    assert number(value) == text
    json.loads(text)


@given(st.text(), st.integers(0, 2**31), st.floats(allow_nan=False, allow_infinity=False, width=32))
def test_token_is_json(text, id, logprob):
    token = json.loads(token_json(Token(id, text, logprob, True)))
    assert token["text"] == text and token["id"] == id and token["special"] is True
    assert token["logprob"] == pytest.approx(logprob, rel=1e-7)


def test_stream_of_two_frames():
    format = StreamFormat(valid(prefix="Q: ", sampling=Sampling(do_sample=True, seed=9)))
    first = format.events(
        0, Frame(tokens=(Token(1, "a", -0.5, top=(TopToken(7, "x", -0.1),)),), chain=b"\x01\x02")
    )
    assert first.decode() == (
        'id: r:0-0102\ndata: {"index":1,"token":{"id":1,"text":"a","logprob":-0.5,"special":false},'
        '"top_tokens":[{"id":7,"text":"x","logprob":-0.1,"special":false}],'
        '"generated_text":null,"details":null}\n\n'
    )
    last = format.events(
        1, Frame(tokens=(Token(2, "</s>", -1.0, True),), chain=b"\x03", finish=FINISH)
    )
    assert last.decode() == (
        'id: r:1-03\ndata: {"index":2,"token":{"id":2,"text":"</s>","logprob":-1.0,"special":true},'
        '"generated_text":"Q: a","details":{"finish_reason":"eos_token","generated_tokens":2,'
        '"seed":9,"input_length":3}}\n\n'
    )


def test_frame_of_several_tokens_is_several_events_with_one_id():
    tokens = (Token(1, "a", -1.0), Token(2, "b\n", -1.0))
    text = (
        StreamFormat(valid(has_details=False))
        .events(4, Frame(tokens=tokens, chain=b"\xff", finish=FINISH))
        .decode()
    )
    first, last = text.strip().split("\n\n")
    assert first.startswith("data: ") and '"index":1' in first and '"generated_text":null' in first
    assert (
        last.startswith("id: r:4-ff\ndata: ") and '"generated_text":"ab\\n","details":null' in last
    )


def test_finish_without_a_token_still_ends_the_stream():
    format = StreamFormat(valid(has_details=False))
    format.events(0, Frame(tokens=(Token(1, "a", -1.0),), chain=b"a"))
    event = json.loads(format.events(1, Frame(finish=FINISH)).decode().split("data: ")[1])
    assert (
        event["generated_text"] == "a"
        and event["token"]["special"]
        and event["token"]["text"] == ""
    )
    assert format.events(2, Frame()) == b""


def test_answer_with_top_tokens():
    tokens = (Token(1, "a", -0.5, top=(TopToken(1, "a", -0.5),)), Token(2, "</s>", -1.0, True))
    request = valid().request
    answer = Completion(request, "a", tokens, (), FINISH, 0.1)
    body = json.loads(answer_json(valid(prefix="Q"), [answer]))
    assert body["generated_text"] == "Qa"
    assert body["details"]["top_tokens"] == [
        [{"id": 1, "text": "a", "logprob": -0.5, "special": False}],
        [],
    ]
    assert "best_of_sequences" not in body["details"]


@pytest.mark.parametrize(
    ("error", "text", "kind"),
    [
        (Overloaded("queue of 5"), "Model is overloaded", "overloaded"),
        (GenerationFailed("boom"), "Request failed during generation: boom", "generation"),
        (
            GenerationFailed("Request failed during generation: boom"),
            "Request failed during generation: boom",
            "generation",
        ),
        (DeadlineExceeded("late"), "Request failed during generation: late", "deadline"),
        (ValidationError('a "b"'), 'a "b"', "validation"),
    ],
)
def test_error(error, text, kind):
    assert json.loads(error_json(error)) == {"error": text, "error_type": kind}
