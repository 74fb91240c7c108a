"""The tokens of a text and their places, as JSON: written beside the event loop, whatever their number."""

import asyncio
import json
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
from tokenizers import AddedToken, Tokenizer, processors

from gateway.galactica import mark_sequences
from gateway.tokenization import TextTokenizer


@pytest.fixture
def executor():
    with ThreadPoolExecutor(1) as executor:
        yield executor


@pytest.fixture
def tokenizer(fleet, executor) -> TextTokenizer:
    """Puts `!` before a text."""
    made = Tokenizer.from_str(fleet.registry.tokenizers["bytes"].decode())
    made.add_special_tokens([AddedToken("<s>", special=True)])
    made.post_processor = processors.TemplateProcessing(
        single="! $A", special_tokens=[("!", made.token_to_id("!"))]
    )
    return TextTokenizer(made, executor)


@pytest.mark.parametrize("text", ["a", 'hé"\\\n<s>x', 'hé"\\\n<s>x' * 500])
async def test_rows_are_those_of_the_text(tokenizer, text):
    rows = json.loads(await tokenizer.spans_json(text))
    assert rows[0] == {
        "id": tokenizer._tokenizer.token_to_id("!"),
        "text": "",
        "start": 0,
        "stop": 0,
    }
    assert [row["id"] for row in rows] == await tokenizer.encode(text)
    assert all(row["text"] == text[row["start"] : row["stop"]] for row in rows)
    assert rows[-1]["text"] == "x" * text.endswith("x") or rows[-1]["text"] == "a"
    bare = json.loads(await tokenizer.spans_json(text, adds_special_tokens=False))
    assert bare == rows[1:]
    for last in (1, 3):
        assert json.loads(await tokenizer.spans_json(text, last=last)) == rows[-last:]


async def test_form_is_that_of_json_dumps(tokenizer):
    text = await tokenizer.spans_json("hé" * 600)
    assert text.decode() == json.dumps(json.loads(text), ensure_ascii=False)


async def test_places_in_a_marked_text_are_those_before_the_marks(tokenizer):
    text = "x [START_DNA]AC[END_DNA] y" * 60
    marked = tokenizer.styled("galactica")
    assert len(mark_sequences(text)) > len(text)
    rows = json.loads(await marked.spans_json(text))
    assert rows[-1] == {**rows[-1], "text": "y", "start": len(text) - 1, "stop": len(text)}


async def test_a_long_text_is_encoded_without_pythons_lock(tokenizer, executor):
    """While the tokenizer works, Python does too: with the lock held, the loop would not turn once."""
    interval, text = sys.getswitchinterval(), "a" * 300_000
    turns = 0
    work = asyncio.create_task(tokenizer.encode(text))
    await asyncio.sleep(0)
    sys.setswitchinterval(1e-6)
    try:
        while not work.done():
            turns += 1
            await asyncio.sleep(0)
    finally:
        sys.setswitchinterval(interval)
    assert len(await work) == 300_001
    assert turns > 1000


async def test_tokenizing_takes_a_place_of_the_gateway(make_client):
    client = await make_client(max_concurrent_requests=1)
    with client.services.admission.permit():
        response = await client.post("/tokenize", json={"inputs": "Hi"})
        assert response.status == 429
    response = await client.post("/tokenize", json={"inputs": "Hi", "parameters": {"truncate": 1}})
    assert response.status == 200 and response.content_type == "application/json"
    (row,) = await response.json()
    assert row == {**row, "text": "i", "start": 1, "stop": 2}
    document = await (await client.get("/openapi.json")).json()
    assert "429" in document["paths"]["/tokenize"]["post"]["responses"]
